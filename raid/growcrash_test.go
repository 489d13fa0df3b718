package raid_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// cutter takes the power of all its drives at one write or flush, counted over all of them.
type cutter struct {
	mu   sync.Mutex
	left int // steps until then; negative: never
	cut  bool
	seen int
}

var errCut = errors.New("power was cut")

func (c *cutter) step() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen++
	if c.left--; c.left == -1 {
		c.cut = true
	}
	if c.cut {
		return errCut
	}
	return nil
}

func (c *cutter) over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

type cutDrive struct {
	raid.Drive
	c *cutter
}

func (d cutDrive) WriteAt(p []byte, off int64) (int, error) {
	if err := d.c.step(); err != nil {
		return 0, err
	}
	return d.Drive.WriteAt(p, off)
}

func (d cutDrive) Flush() error {
	if err := d.c.step(); err != nil {
		return err
	}
	return d.Drive.Flush()
}

func (d cutDrive) ReadAt(p []byte, off int64) (int, error) {
	if d.c.over() {
		return 0, errCut
	}
	return d.Drive.ReadAt(p, off)
}

// growBed is an array on drives whose power can go, and a host that logs its updates before they are applied.
type growBed struct {
	*bed
	c      *cutter
	epoch  uint64
	old    int
	log    [][]byte // images that are not trimmed
	halted bool
}

// begin opens what of the drives is there, as an owner does: it raises the epoch, then replays its log.
func (g *growBed) begin(lost uint64) error {
	drives := g.set.Drives("A")
	for i := range drives {
		if lost>>i&1 != 0 {
			drives[i] = nil
		} else {
			drives[i] = cutDrive{drives[i], g.c}
		}
	}
	a, err := raid.Open(ctx, drives, raid.Options{})
	if err != nil {
		return err
	}
	g.adopt(a)
	g.epoch++
	if err := a.WriteLabel(ctx, func(l *raid.Label) { l.Epoch = g.epoch }); err != nil {
		return err
	}
	for _, l := range g.log {
		if err := a.Apply(ctx, decode(g.t, l)); err != nil {
			return err
		}
	}
	return nil
}

// host does one random thing to a random stripe; false when the power is gone.
func (g *growBed) host(rng *rand.Rand) bool {
	s := rng.Uint64N(g.stripes())
	if g.want[s] == nil {
		return true
	}
	if rng.IntN(2) == 0 {
		block := rng.IntN(g.blocks())
		p, err := g.read(s, block, 1)
		if err == nil && !bytes.Equal(p, g.want[s][block*raid.BlockBytes:][:raid.BlockBytes]) {
			g.t.Errorf("stripe %d block %d: wrong data while growing", s, block)
		}
		if err != nil && !g.c.over() {
			g.t.Errorf("stripe %d block %d: %v", s, block, err)
		}
		return err == nil
	}
	after := bytes.Clone(g.want[s])
	var w []raid.BlockWrite
	for _, n := range []int{rng.IntN(g.blocks() / 2), g.blocks()/2 + rng.IntN(g.blocks()/2)} {
		d := make([]byte, raid.BlockBytes)
		for i := range d {
			d[i] = byte(rng.Uint32())
		}
		copy(after[n*raid.BlockBytes:], d)
		w = append(w, raid.BlockWrite{Block: n, Data: d})
	}
	g.gen++
	u, err := g.a.PrepareUpdate(ctx, s, g.gen, w)
	if err != nil {
		if !g.c.over() {
			g.t.Errorf("update stripe %d: %v", s, err)
		}
		return false
	}
	defer u.Release()
	g.log = append(g.log, flatten(u.Encode()))
	g.want[s] = after // logged: it will be there
	if err := g.a.Apply(ctx, u); err != nil {
		if !g.c.over() {
			g.t.Errorf("apply to stripe %d: %v", s, err)
		}
		return false
	}
	return true
}

func (g *growBed) stripes() uint64 { return g.geo.Stripes }

func copyBed(b *bed) *bed {
	c := &bed{t: b.t, set: b.set.Clone(), want: make(map[uint64][]byte), gen: b.gen, rng: b.rng, geo: b.geo}
	for s, d := range b.want {
		c.want[s] = bytes.Clone(d)
	}
	return c
}

// The power goes at a write or flush of a growth, with a host at work or without one; up to m members are lost with
// it, new or old ones; the array opens, has every block, grows to the end without them, and has every block; and so
// it is when they come back then, and are refused.
func TestGrowCrash(t *testing.T) {
	for _, c := range []struct {
		name                         string
		n, k, m, spares, slots, more int
		crashes                      int // of the run of make test
		busy                         bool
	}{
		{"1+1 of 3 to 4", 3, 1, 1, 0, 12, 1, 40, false},
		{"1+1 of 3 to 6", 3, 1, 1, 0, 10, 3, 20, true},
		{"2+2 of 5 to 6", 5, 2, 2, 0, 12, 1, 30, true},
		{"2+1 of 4 to 6, 1 spare", 4, 2, 1, 1, 9, 2, 20, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, c.n, raid.Options{K: c.k, M: c.m, Spares: c.spares}, c.slots)
			for s := range b.geo.Stripes {
				if s%7 != 5 {
					b.fill(s)
				}
			}
			must(t, b.a.Flush(ctx))
			b.a.Close()
			run := func(cut int, seed uint64) int {
				g := &growBed{bed: copyBed(b), c: &cutter{left: -1}, old: c.n}
				rng := rand.New(rand.NewPCG(seed, 9))
				growCrash(g, rng, c.more, c.slots, cut, c.busy)
				return g.c.seen
			}
			steps := run(-1, 1)
			each := 1
			if !*crashAll {
				each = max(1, steps/c.crashes)
			}
			crashes := 0
			for cut := 0; cut < steps && !t.Failed(); cut += each {
				run(cut, uint64(cut)+1)
				crashes++
			}
			t.Logf("%d writes and flushes, %d crashes", steps, crashes)
		})
	}
}

func growCrash(g *growBed, rng *rand.Rand, more, slots, cut int, busy bool) {
	t := g.t
	g.set.Add(rng.Uint64(), more, driveBytes(slots))
	n := g.old + more
	must(t, g.begin(memberBits(n)&^memberBits(g.old)))
	g.c.mu.Lock()
	g.c.left, g.c.seen = cut, 0
	g.c.mu.Unlock()
	var added []raid.Drive
	for _, d := range g.set.Drives("A")[g.old:] {
		added = append(added, cutDrive{d, g.c})
	}
	err := g.grow(rng, added, busy)
	if cut < 0 {
		must(t, err)
		g.checkGrown(n)
		return
	}
	if err == nil { // only the end was cut, or the count came out lower
		return
	}
	g.a.Close()
	g.set.PowerCut()
	g.set.PowerOn()
	g.c = &cutter{left: -1}
	var lost uint64
	for _, i := range rng.Perm(n)[:rng.IntN(g.geo.M+1)] {
		lost |= 1 << i
	}
	if err := g.begin(lost); err != nil {
		t.Fatalf("cut at %d, without %b: %v", cut, lost, err)
	}
	g.checkAll()
	s := g.a.GrowStatus()
	switch {
	case s.Growing:
		err = g.grow(rng, nil, busy)
	case g.a.Geometry().N == g.old:
		if lost&memberBits(g.old) != 0 {
			return // a growth does not begin degraded
		}
		added = nil
		for i, d := range g.set.Drives("A")[g.old:] {
			if lost>>(g.old+i)&1 != 0 {
				g.set.Disks[g.old+i].Wipe() // it is replaced
			}
			added = append(added, cutDrive{d, g.c})
		}
		lost = 0
		err = g.grow(rng, added, busy)
	default:
		err = nil
	}
	if err != nil {
		t.Fatalf("cut at %d, without %b, %+v: %v", cut, lost, s, err)
	}
	g.checkGrown(n)
	if t.Failed() {
		t.Fatalf("cut at %d, without %b, %+v", cut, lost, s)
	}
	// The others come back, old.
	must(t, g.a.Flush(ctx))
	failed := g.a.Label().Failed
	g.a.Close()
	must(t, g.begin(0))
	if refused := len(g.a.Status().Refused); failed != lost || refused != popcount(lost) {
		t.Fatalf("cut at %d, without %b: failed %b, refused %v", cut, lost, failed, g.a.Status().Refused)
	}
	g.checkGrown(n)
	g.a.Close()
}

// grow grows with a host at work.
func (g *growBed) grow(rng *rand.Rand, added []raid.Drive, busy bool) error {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	if busy {
		hostRNG := rand.New(rand.NewPCG(rng.Uint64(), 3))
		wg.Go(func() {
			for g.host(hostRNG) {
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	err := g.a.Grow(ctx, added, raid.GrowOptions{Force: true})
	close(stop)
	wg.Wait()
	return err
}

func (g *growBed) checkGrown(n int) {
	g.t.Helper()
	if geo, s := g.a.Geometry(), g.a.GrowStatus(); geo.N != n || geo.Stripes <= g.geo.Stripes && g.geo.N != n || s.Growing {
		g.t.Fatalf("%+v, %+v", geo, s)
	}
	g.checkAll()
	for s := range g.want {
		if _, err := g.a.Scrub(ctx, s); err != nil {
			g.t.Fatalf("scrub stripe %d: %v", s, err)
		}
	}
}

func memberBits(n int) uint64 { return 1<<n - 1 }

func popcount(x uint64) (n int) {
	for ; x != 0; x &= x - 1 {
		n++
	}
	return n
}

var _ = raidtest.Land
