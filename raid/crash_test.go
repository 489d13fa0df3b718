package raid_test

import (
	"bytes"
	"errors"
	"flag"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// crashAll was run when this was written: 6 and 5 member writes, 13,127 crashes, 33 s.
var crashAll = flag.Bool("crash-all", false, "try every subset of landed, lost and torn writes")

// landing records the writes of one Apply: (disk, offset) in the order of discovery.
type landing struct {
	disk int
	off  int64
}

// Cutting the power inside an Update with each of its member writes landed, lost or torn, with every pair
// of members missing afterwards: applying the logged update again gives the new content, and every other block of
// the stripe is as it was.
func TestCrashInUpdate(t *testing.T) {
	for _, blocks := range [][]int{{5}, {0, 33}} {
		b := newBed(t, 5, raid.Options{K: 2, M: 2}, 4)
		b.fill(0)
		b.update(0, 9)
		if err := b.a.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		u, after := b.prepare(0, blocks...)
		log := flatten(u.Encode())
		writes := discover(t, b, log)
		states := 1
		for range writes {
			states *= 3
		}
		step := 1
		if !*crashAll {
			step = states/60 | 1
		}
		tried := 0
		for state := 0; state < states; state += step {
			choose(5, 2, func(missing []int) {
				if len(missing) == 1 && state%2 == 1 {
					return // pairs and none cover the singles
				}
				tried++
				c := b.clone()
				applyWith(t, c, log, writes, state)
				c.a.Close()
				c.set.PowerCut()
				c.set.PowerOn()
				c.open(raid.Options{}, missing...)
				for range 2 { // replay is idempotent
					if err := c.a.Apply(ctx, decode(t, log)); err != nil {
						t.Fatalf("state %d without %v: %v", state, missing, err)
					}
				}
				c.want[0] = after
				c.checkAll()
				c.cold(missing...)
				c.checkAll()
				c.scrubClean()
				c.a.Close()
			})
		}
		t.Logf("blocks %v: %d member writes, %d crashes replayed", blocks, len(writes), tried)
	}
}

func flatten(bufs [][]byte) []byte { return bytes.Join(bufs, nil) }

func decode(t testing.TB, log []byte) *raid.Update {
	t.Helper()
	u, err := raid.DecodeUpdate([][]byte{log})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func discover(t testing.TB, b *bed, log []byte) []landing {
	t.Helper()
	c := b.clone()
	defer c.a.Close()
	var mu sync.Mutex
	var out []landing
	for _, d := range c.set.Disks {
		d.OnWrite(func(w raidtest.Write) raidtest.Verdict {
			mu.Lock()
			defer mu.Unlock()
			if w.Off >= raid.DataOffset {
				out = append(out, landing{w.Disk, w.Off})
			}
			return raidtest.Land
		})
	}
	if err := c.a.Apply(ctx, decode(t, log)); err != nil {
		t.Fatal(err)
	}
	return out
}

// applyWith applies with the writes' fates read from state in base 3, and makes what landed durable: the array believes
// that all landed, as it would of a drive's cache.
func applyWith(t testing.TB, c *bed, log []byte, writes []landing, state int) {
	t.Helper()
	fate := make(map[landing]raidtest.Verdict)
	for _, w := range writes {
		fate[w] = []raidtest.Verdict{raidtest.Land, raidtest.Lose, raidtest.Tear}[state%3]
		state /= 3
	}
	for _, d := range c.set.Disks {
		d.OnWrite(func(w raidtest.Write) raidtest.Verdict { return fate[landing{w.Disk, w.Off}] })
	}
	if err := c.a.Apply(ctx, decode(t, log)); err != nil {
		t.Fatal(err)
	}
	for _, d := range c.set.Disks {
		d.OnWrite(nil)
	}
	if err := c.a.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

// A log of several updates of the same stripe, and a full write after them, replayed whole after random power cuts of
// the drives' caches: the last content, whichever of them had been applied.
func TestReplayOrder(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
	b.fillAll()
	if err := b.a.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for round := range 40 {
		var log [][]byte
		for range 1 + b.rng.IntN(4) {
			u, after := b.prepare(1, b.rng.IntN(95), 95)
			log = append(log, flatten(u.Encode()))
			if err := b.a.Apply(ctx, u); err != nil {
				t.Fatal(err)
			}
			u.Release()
			b.want[1] = after
			if b.rng.IntN(3) == 0 {
				if err := b.a.Flush(ctx); err != nil {
					t.Fatal(err)
				}
			}
		}
		full := round%3 == 0
		if full { // completed and flushed: the updates before it must not undo it
			b.fill(1)
			if err := b.a.Flush(ctx); err != nil {
				t.Fatal(err)
			}
		}
		b.a.Close()
		b.set.PowerCut()
		b.set.PowerOn()
		b.open(raid.Options{})
		for _, l := range log {
			if err := b.a.Apply(ctx, decode(t, l)); err != nil {
				t.Fatal(err)
			}
		}
		b.checkAll()
		b.scrubClean()
		if err := b.a.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// An update fails on a member in the middle: the member is recorded before Apply returns, and comes back stale.
func TestWriteErrorInUpdate(t *testing.T) {
	for disk := range 6 {
		b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
		b.fillAll()
		b.set.Disks[disk].Once(1000, raidtest.FailTorn)
		for s := range b.geo.Stripes {
			b.update(s, 0, 40)
		}
		b.set.Disks[disk].OnWrite(nil)
		if f := b.a.Label().Failed; f != 1<<disk {
			t.Fatalf("disk %d: failed %b", disk, f)
		}
		b.checkAll()
		b.cold()
		b.checkAll()
		if r := b.a.Status().Refused; len(r) != 1 || !errors.Is(r[0].Err, raid.ErrStaleMember) {
			t.Fatalf("refused %v", r)
		}
	}
}
