package raid_test

import (
	"fmt"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// gensBed is an array of whose stripe 0 only the generations are in memory, once push was called.
func gensBed(t *testing.T) *bed {
	t.Helper()
	b := newBed(t, 6, raid.Options{K: 3, M: 2, CacheBytes: 1}, 40)
	b.fillAll()
	return b
}

// push drives the checksum blocks of stripe 0 out of memory.
func (b *bed) push() {
	b.t.Helper()
	for s := range uint64(raid.LRUStripes) {
		b.check(1+s, 0, 1)
	}
	if sums, gens := raid.Known(b.a, 0); sums || !gens {
		b.t.Fatalf("checksums of stripe 0 in memory: %v, generations: %v", sums, gens)
	}
}

func (b *bed) reads() (n int) {
	for _, d := range b.set.Disks {
		n += int(d.Stats().Reads)
	}
	return n
}

// A stripe of which the generations alone are in memory is read without asking parity: one block is one I/O, or two where its
// checksum block is far from it.
func TestGensSaveReads(t *testing.T) {
	b := gensBed(t)
	for _, c := range []struct{ block, known, cold int }{{3, 1, 3}, {30, 2, 4}, {64, 1, 3}} {
		b.check(0, 0, 1)
		b.push()
		before := b.reads()
		b.check(0, c.block, 1)
		if n := b.reads() - before; n != c.known {
			t.Errorf("block %d: %d reads, want %d", c.block, n, c.known)
		}
		raid.ForgetSums(b.a)
		before = b.reads()
		b.check(0, c.block, 1)
		if n := b.reads() - before; n != c.cold {
			t.Errorf("block %d, nothing known: %d reads, want %d", c.block, n, c.cold)
		}
	}
}

// Strips that an update did not touch are older than those that it did, and no worse.
func TestGensOfUpdates(t *testing.T) {
	b := gensBed(t)
	for _, block := range []int{3, 40, 90} {
		b.update(0, block)
		b.push()
		b.check(0, 0, b.blocks())
	}
	if c := b.a.Status().Counters; c.StaleStrips+c.ChecksumErrors+c.Repairs != 0 {
		t.Errorf("%+v", c)
	}
}

// What drives did with a write shows where only the generations are in memory; the stripe is repaired.
func TestLiesByGens(t *testing.T) {
	for _, v := range []raidtest.Verdict{raidtest.Lose, raidtest.Tear, raidtest.Misdirect} {
		for _, full := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v full=%v", v, full), func(t *testing.T) {
				for strip := range 3 {
					b := gensBed(t)
					b.check(0, 0, 1)
					b.push() // what is known of it now must not be believed later
					disk, _ := b.where(0, strip, 0)
					disk.MisdirectBy(raid.SlotBytes)
					disk.Once(1000, v)
					if full {
						b.fill(0)
					} else {
						b.update(0, 3, 35, 67)
					}
					disk.OnWrite(nil)
					b.push()
					b.check(0, 0, b.blocks())
					if c := b.a.Status().Counters; c.ChecksumErrors+c.StaleStrips == 0 || c.Repairs == 0 {
						t.Fatalf("strip %d: nothing was found: %+v", strip, c)
					}
					b.checkAll()
					b.a.Close()
				}
			})
		}
	}
}
