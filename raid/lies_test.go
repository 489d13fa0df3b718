package raid_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// where is the byte offset of a block of a strip on its member; block -1 is the checksum block.
func (b *bed) where(stripe uint64, strip, block int) (disk *raidtest.Disk, off int64) {
	m, slot := raid.LayoutOf(b.a).Strip(stripe, strip)
	return b.set.Disks[m], raid.DataOffset + int64(slot)*raid.SlotBytes + int64(1+block)*raid.BlockBytes
}

// LAB.md's table of what Linux md returns wrong, here: each fault in each strip of a stripe, in a full write and in an
// update; read warm and cold; then repaired, so that afterwards any other two strips may be lost.
func TestLies(t *testing.T) {
	type fault struct {
		name    string
		verdict raidtest.Verdict
	}
	for _, f := range []fault{{"lost", raidtest.Lose}, {"torn", raidtest.Tear}, {"misdirected", raidtest.Misdirect}} {
		for _, how := range []string{"full", "update"} {
			t.Run(f.name+" "+how, func(t *testing.T) {
				for strip := range 5 {
					for _, warm := range []bool{true, false} {
						b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
						b.fillAll()
						disk, _ := b.where(0, strip, 0)
						disk.MisdirectBy(raid.SlotBytes)
						disk.Once(1000, f.verdict)
						if how == "full" {
							b.fill(0)
						} else {
							b.update(0, 3, 35, 67) // all data strips
						}
						disk.OnWrite(nil)
						if !warm {
							b.cold()
						}
						b.checkAll()
						for s := range b.want {
							if _, err := b.a.Scrub(ctx, s); err != nil {
								t.Fatal(err)
							}
						}
						b.scrubClean()
						c := b.a.Status().Counters
						if c.ChecksumErrors+c.StaleStrips == 0 || c.Repairs == 0 {
							t.Fatalf("strip %d: nothing was found: %+v", strip, c)
						}
						if err := b.a.Flush(ctx); err != nil {
							t.Fatal(err)
						}
						m, _ := raid.LayoutOf(b.a).Strip(0, (strip+1)%5)
						n, _ := raid.LayoutOf(b.a).Strip(0, (strip+2)%5)
						b.cold(m, n)
						b.checkAll()
						b.a.Close()
					}
				}
			})
		}
	}
}

// An array from before 2026-11-28 goes on with the checksums that it has: it is read and written, rebuilt, updated in part, and replayed. What
// they do not see is why new arrays have others: a lost write of a block that ends in its own CRC-32C.
func TestOldChecksums(t *testing.T) {
	b := newBed(t, 7, raid.Options{K: 3, M: 2, Spares: 1, OldChecksums: true}, 12)
	b.fillAll()
	for s := range b.geo.Stripes {
		b.update(s, int(s)%96, (int(s)+40)%96)
	}
	u, after := b.prepare(2, 7, 50)
	log := bytes.Join(u.Encode(), nil)
	u.Release()
	b.a.Close()
	b.open(raid.Options{}, 3)
	if s := b.a.Status(); s.Checksums != raid.ChecksumsCRC32C {
		t.Fatalf("%s", s.Checksums)
	}
	u, err := raid.DecodeUpdate([][]byte{log})
	if err == nil {
		err = b.a.Apply(ctx, u)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.want[2] = after
	b.checkAll()
	b.fill(1)
	b.update(4, 9)
	b.cold(3)
	b.checkAll()

	b = newBed(t, 6, raid.Options{K: 3, M: 2, OldChecksums: true}, 10)
	b.fillAll()
	was := bytes.Clone(b.want[0][3*raid.BlockBytes : 4*raid.BlockBytes])
	disk, off := b.where(0, 0, 3)
	disk.OnWrite(func(w raidtest.Write) raidtest.Verdict {
		if w.Off == off {
			return raidtest.Lose
		}
		return raidtest.Land
	})
	b.update(0, 3)
	disk.OnWrite(nil)
	b.cold()
	if got, err := b.read(0, 3, 1); err != nil || !bytes.Equal(got, was) {
		t.Errorf("the lost write shows with a CRC-32C: %v", err)
	}
}

// A drive that goes on lying, its repairs too, must not keep an update from being made: it is failed in the
// end. (A repair that is torn heals half of what is left.)
func TestLiesWithoutEnd(t *testing.T) {
	for _, v := range []raidtest.Verdict{raidtest.Lose, raidtest.Tear, raidtest.Misdirect} {
		for liars := 1; liars <= 2; liars++ {
			b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
			b.fillAll()
			for strip := range liars {
				disk, _ := b.where(0, strip, 0)
				disk.MisdirectBy(raid.SlotBytes)
				disk.Once(1<<30, v)
			}
			b.update(0, 3, 35, 67)
			b.cold()
			b.update(0, 4, 36, 68)
			if failed := b.a.Label().Failed; v != raidtest.Tear && bits.OnesCount64(failed) != liars {
				t.Fatalf("verdict %d: failed members %06b with %d liars", v, failed, liars)
			}
			b.checkAll()
			b.cold()
			b.checkAll()
		}
	}
}

// One update's writes lost on m members together, parity among them or not.
func TestLostOnSeveral(t *testing.T) {
	choose(5, 2, func(strips []int) {
		b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
		b.fillAll()
		for _, s := range strips {
			d, _ := b.where(0, s, 0)
			d.Once(1000, raidtest.Lose)
		}
		b.update(0, 3, 35, 67)
		for _, s := range strips {
			d, _ := b.where(0, s, 0)
			d.OnWrite(nil)
		}
		b.cold()
		b.checkAll()
		b.a.Scrub(ctx, 0)
		b.scrubClean()
		b.a.Close()
	})
}

// An update of which some strips landed, and whose image is lost with the log (an operator gave it up): what is read is old or new, each block for
// itself, or an error, and never anything else; a new write of a block succeeds, as a loss where it must, and a full write heals all.
func TestHalfAnUpdate(t *testing.T) {
	for landed := range 1 << 5 {
		b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
		b.fillAll()
		old := bytes.Clone(b.want[0])
		for strip := range 5 {
			if landed>>strip&1 == 0 {
				d, _ := b.where(0, strip, 0)
				d.Once(1000, raidtest.Lose)
			}
		}
		b.update(0, 3, 35, 67)
		for strip := range 5 {
			d, _ := b.where(0, strip, 0)
			d.OnWrite(nil)
		}
		b.cold()
		look := func(what string) (unreadable int) {
			for n := range b.blocks() {
				at := n * raid.BlockBytes
				p, err := b.read(0, n, 1)
				switch {
				case errors.Is(err, raid.ErrUnrecoverable):
					unreadable++
				case err != nil:
					t.Fatal(err)
				case !bytes.Equal(p, b.want[0][at:at+raid.BlockBytes]) && !bytes.Equal(p, old[at:at+raid.BlockBytes]):
					t.Errorf("strips %05b landed, %s: block %d holds something else", landed, what, n)
				}
			}
			return unreadable
		}
		unreadable := look("at once")
		c := b.clone()
		r, err := c.a.ScrubAll(ctx, raid.ScrubOptions{AcceptOld: true})
		if err != nil || r.Lost != 0 {
			t.Fatalf("strips %05b landed, accepted: %+v, %v", landed, r, err)
		}
		for n := range c.blocks() {
			p, err := c.read(0, n, 1)
			if at := n * raid.BlockBytes; err != nil || !bytes.Equal(p, b.want[0][at:at+raid.BlockBytes]) && !bytes.Equal(p, old[at:at+raid.BlockBytes]) {
				t.Errorf("strips %05b landed, accepted: block %d holds something else, %v", landed, n, err)
			}
			copy(c.want[0][n*raid.BlockBytes:], p)
		}
		c.scrubClean()
		c.gen++
		c.update(0, 3, 40, 70)
		c.cold(0, 3) // two members missing
		c.checkAll()
		c.a.Close()
		for strip := range 5 { // with a member missing, what can be had of it is; nothing panics, and nothing is wrong
			m, _ := raid.LayoutOf(b.a).Strip(0, strip)
			c := b.clone(m)
			if _, err := c.a.ScrubAll(ctx, raid.ScrubOptions{AcceptOld: true}); err != nil {
				t.Fatal(err)
			}
			for n := range c.blocks() {
				p, err := c.read(0, n, 1)
				if at := n * raid.BlockBytes; err == nil && !bytes.Equal(p, b.want[0][at:at+raid.BlockBytes]) && !bytes.Equal(p, old[at:at+raid.BlockBytes]) {
					t.Errorf("strips %05b landed, strip %d missing, accepted: block %d holds something else", landed, strip, n)
				} else if err != nil && !errors.Is(err, raid.ErrUnrecoverable) {
					t.Fatal(err)
				}
			}
			c.a.Close()
		}
		fresh := b.random(1)
		b.gen++
		write := []raid.BlockWrite{{Block: 40, Data: fresh}}
		u, err := b.a.PrepareUpdate(ctx, 0, b.gen, write)
		if errors.Is(err, raid.ErrUnrecoverable) && unreadable > 0 {
			u, err = b.a.PrepareLoss(ctx, 0, b.gen, write, raid.LossSpec{})
		}
		if err == nil {
			err = b.a.Apply(ctx, u)
		}
		if err != nil {
			t.Fatalf("strips %05b landed: a new write: %v", landed, err)
		}
		u.Release()
		copy(b.want[0][40*raid.BlockBytes:], fresh)
		b.check(0, 40, 1)
		if after := look("after a new write"); after > unreadable {
			t.Errorf("strips %05b landed: %d blocks cannot be read, then %d", landed, unreadable, after)
		}
		b.fill(0)
		b.checkAll()
		b.scrubClean()
		b.a.Close()
	}
}

// The same where the new blocks landed and nothing else did: none is right by its strip's checksum block. Who knows blocks by themselves keeps
// them; else they are lost. With a checksum block that is torn, that is so for all blocks of its strip.
func TestAcceptValid(t *testing.T) {
	for _, known := range []bool{true, false} {
		for _, torn := range []bool{false, true} {
			b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
			b.fillAll()
			for strip := range 5 {
				d, sum := b.where(0, strip, -1)
				d.OnWrite(func(w raidtest.Write) raidtest.Verdict {
					if strip >= 3 || w.Off == sum {
						return raidtest.Lose
					}
					return raidtest.Land
				})
			}
			b.update(0, 3, 35, 67)
			for strip := range 5 {
				d, sum := b.where(0, strip, -1)
				d.OnWrite(nil)
				if torn && strip == 1 {
					d.Rot(sum + 50)
				}
			}
			b.cold()
			if _, err := b.read(0, 35, 1); !errors.Is(err, raid.ErrUnrecoverable) {
				t.Fatalf("block 35: %v", err)
			}
			asked := 0
			o := raid.ScrubOptions{AcceptOld: true, Valid: func(stripe uint64, block int, data []byte) bool {
				asked++
				return bytes.Equal(data, b.want[stripe][block*raid.BlockBytes:][:raid.BlockBytes])
			}}
			want := []int{3, 35, 67}
			if torn {
				want = []int{3, 67}
				for n := range raid.StripBlocks {
					want = append(want, raid.StripBlocks+n)
				}
			}
			if !known {
				o.Valid = nil
			}
			r, err := b.a.ScrubAll(ctx, o)
			if err != nil || r.Lost != 0 || known && (asked != len(want) || r.LostBlocks != 0) || !known && r.LostBlocks != uint64(len(want)) {
				t.Fatalf("known %v, torn %v: asked for %d, %+v, %v", known, torn, asked, r, err)
			}
			b.cold(0, 4)
			for n := range b.blocks() {
				if !known && slices.Contains(want, n) {
					if _, err := b.read(0, n, 1); !errors.Is(err, raid.ErrUnrecoverable) {
						t.Errorf("block %d, which is lost: %v", n, err)
					}
					continue
				}
				b.check(0, n, 1)
			}
			b.a.Close()
		}
	}
}

// Rot in any block of any strip, checksum blocks included, is never returned; the strip is repaired in place; and
// as many blocks of one column may rot as there is parity.
func TestRot(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	if err := b.a.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for strip := range 5 {
		for _, block := range []int{-1, 0, 17, 31} {
			for _, cold := range []bool{false, true} {
				if cold {
					b.cold()
				}
				d, off := b.where(1, strip, block)
				d.Rot(off + 100)
				d2, off2 := b.where(1, (strip+1)%5, block)
				d2.Unreadable(off2)
				for n := 0; n < 96; n += 32 {
					b.check(1, n+max(block, 0), 1)
				}
				b.check(1, 0, 96)
				if r, err := b.a.Scrub(ctx, 1); err != nil {
					t.Fatalf("strip %d block %d: %+v %v", strip, block, r, err)
				}
				b.scrubClean()
			}
		}
	}
	for i := range 3 { // m+1 in one column: that block alone is lost
		d, off := b.where(2, i, 9)
		d.Rot(off)
	}
	for i := range 3 {
		_, err := b.read(2, i*32+9, 1)
		wantErr(t, err, raid.ErrUnrecoverable)
		b.check(2, i*32, 9)
		b.check(2, i*32+10, 22)
	}
	b.fill(2) // writing it again heals it
	b.scrubClean()
	if st := b.a.Status(); st.Counters.Repairs == 0 || st.State != raid.Optimal {
		t.Fatalf("%+v", st)
	}
}

// Rot in different columns of more strips than there is parity: all of it comes back.
func TestRotScattered(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	b.cold()
	for i := range 5 {
		for c := i; c < 32; c += 5 {
			d, off := b.where(0, i, c)
			d.Rot(off + int64(c))
		}
	}
	b.check(0, 0, 96)
	b.scrubClean()
}

// A member replaced by an older copy of itself, label and all: every stripe written since is right.
func TestOldCopy(t *testing.T) {
	for disk := range 6 {
		b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
		b.fillAll()
		old := b.set.Disks[disk].Snapshot()
		for s := range b.geo.Stripes {
			if s%2 == 0 {
				b.fill(s)
			} else {
				b.update(s, int(s), 50)
			}
		}
		b.a.Close()
		b.set.Disks[disk].Restore(old)
		b.open(raid.Options{})
		b.checkAll()
		for s := range b.want {
			b.a.Scrub(ctx, s)
		}
		b.scrubClean()
		b.a.Close()
	}
}

// A degraded read reads only what it needs: the checksum blocks of parity, and the needed columns of k strips.
func TestReadsWhatIsNeeded(t *testing.T) {
	b := newBed(t, 12, raid.Options{K: 8, M: 2}, 10)
	b.fillAll()
	blocks := func() (n uint64) {
		for _, d := range b.set.Disks {
			n += d.Stats().ReadBlocks
		}
		return n
	}
	m, _ := raid.LayoutOf(b.a).Strip(0, 2)
	b.cold(m)
	for _, c := range []struct {
		block, count int
		most         uint64
		what         string
	}{
		{2*32 + 20, 1, 8*2 + 2, "cold, absent: k blocks, k checksum blocks, parity's"},
		{2*32 + 21, 1, 8 + 1, "warm, absent: k blocks"},
		{3*32 + 5, 1, 1, "warm, present"},
	} {
		before := blocks()
		b.check(0, c.block, c.count)
		if n := blocks() - before; n > c.most {
			t.Errorf("%s: %d blocks were read, not %d", c.what, n, c.most)
		}
	}
	b.cold(m)
	before := uint64(0)
	for _, d := range b.set.Disks {
		before += d.Stats().Reads
	}
	b.check(1, 0, b.blocks())
	var after uint64
	for _, d := range b.set.Disks {
		after += d.Stats().Reads
	}
	if n := after - before; n > 10 {
		t.Errorf("a whole stripe took %d reads", n)
	}
}

// A full write reads nothing. An update reads the way that takes fewer blocks.
func TestUpdateReads(t *testing.T) {
	for _, c := range []struct {
		strips int
		delta  bool
		most   uint64
	}{{1, true, 3}, {2, true, 4}, {6, false, 2}, {8, false, 0}} {
		t.Run(fmt.Sprint(c.strips), func(t *testing.T) {
			b := newBed(t, 12, raid.Options{K: 8, M: 2}, 10)
			read := func() (n uint64) {
				for _, d := range b.set.Disks {
					n += d.Stats().ReadBlocks
				}
				return n
			}
			before := read()
			b.fill(0)
			if n := read() - before; n != 0 {
				t.Errorf("a full write read %d blocks", n)
			}
			var blocks []int
			for i := range c.strips {
				blocks = append(blocks, i*32+4)
			}
			before = read()
			b.update(0, blocks...)
			if n := read() - before; n != c.most {
				t.Errorf("%d blocks were read, not %d", n, c.most)
			}
			if d := b.a.Status().Counters.UpdatesByDelta == 1; d != c.delta {
				t.Errorf("delta: %v", d)
			}
			b.cold()
			b.checkAll()
			b.scrubClean()
		})
	}
}
