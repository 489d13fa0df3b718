package cache

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// until waits for what another goroutine does.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in two minutes: %s", what)
		}
	}
}

// load puts lines 0–99 of a segment in, and waits until they are there.
func load100(t testing.TB, c *Cache, segment uint32) {
	t.Helper()
	for line := range 100 {
		before := c.Stats()
		c.Write(storeA, segment, line, lineOf(LineBytes, storeA, segment, line))
		until(t, "a line is taken", func() bool { return c.Stats().Written > before.Written })
	}
}

func openFileAt(t testing.TB, path string, bytes int64, buffered bool) *Cache {
	t.Helper()
	return openWith(t, Options{Path: path, SizeBytes: bytes, Buffered: buffered, ReadTimeout: time.Minute, slowTimeout: time.Minute})
}

// On a file, with and without the page cache: what was in it is in it after a restart.
func TestWarmAfterRestart(t *testing.T) {
	for _, buffered := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), "cache")
		c := openFileAt(t, path, 64<<20, buffered)
		load100(t, c, 7)
		if has(t, c, storeB, 7, 0) || has(t, c, storeA, 8, 1) || has(t, c, storeA, 7, 100) {
			t.Error("a line that was never put in")
		}
		if _, err := Open(t.Context(), Options{Path: path}); !errors.Is(err, ErrInUse) {
			t.Errorf("a file in use was opened again: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		c = openFileAt(t, path, 64<<20, buffered)
		for line := range 100 {
			if !has(t, c, storeA, 7, line) {
				t.Errorf("line %d is gone", line)
			}
		}
		s := c.Stats()
		if s.Hits != 100 || s.Bytes != 100*LineBytes || s.CapacityBytes < 50<<20 || s.Lines != 100 || s.Bad != 0 || s.Err != nil {
			t.Errorf("%+v", s)
		}
		if len(s.Stores) != 1 || s.Stores[0].Hits != 100 || s.Stores[0].HitBytes != 100*LineBytes || s.Stores[0].Lines != 100 {
			t.Errorf("%+v", s.Stores)
		}
		c.Close()
	}
}

// Any part of a line, wherever it lies in it.
func TestReadAt(t *testing.T) {
	c := openFileAt(t, filepath.Join(t.TempDir(), "cache"), 64<<20, false)
	defer c.Close()
	load100(t, c, 7)
	rng := rand.New(rand.NewPCG(5, 5))
	for range 500 {
		line, at := rng.IntN(100), rng.IntN(LineBytes)
		p := make([]byte, 1+rng.IntN(min(LineBytes-at, 9000)))
		if !c.ReadAt(storeA, 7, line*LineBytes+at, p) {
			t.Fatalf("line %d at %d: a miss", line, at)
		}
		if !bytes.Equal(p, lineOf(LineBytes, storeA, 7, line)[at:at+len(p)]) {
			t.Fatalf("line %d at %d: wrong bytes", line, at)
		}
	}
	p := make([]byte, 8)
	for _, off := range []int{-1, LineBytes - 4, segmentLines * LineBytes} {
		if c.ReadAt(storeA, 7, off, p) {
			t.Errorf("read at %d: not within a line of a segment", off)
		}
	}
	for range 3 {
		c.ReadAt(storeA, 8, 0, p)
	}
	if s := c.Stats(); s.Misses != 0 || s.Hits != 500 || c.ghost.admit(nameOf(0, 8, 0)) {
		t.Errorf("a part that is not here counts: %+v", s)
	}
	if c.Read(storeA, 7, 0, p) || c.Read(storeA, 0, 0, p) || c.ReadAt(storeA, 7, 0, nil) {
		t.Error("bad arguments are a hit")
	}
}

// One bit flipped, anywhere: at most what it hit is missing, and no wrong byte is given.
func TestBitFlips(t *testing.T) {
	d := newDisk(smallSize(20))
	c := openWith(t, small(d))
	for i := range 16 {
		fill(t, c, storeA, uint32(i+1), 3)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(4, 4))
	full := held(c)
	for k, good := range d.blocks {
		for range 20 {
			bad := bytes.Clone(good)
			bad[rng.IntN(blockBytes)] ^= 1 << rng.IntN(8)
			d.blocks[k] = bad
			o := small(d)
			c := openWith(t, o)
			kept, isLine := 0, k >= smallRegion/blockBytes*2
			for i := range 16 {
				if has(t, c, storeA, uint32(i+1), 3) {
					kept++
				}
			}
			if s := c.Stats(); isLine && (kept != full-1 || s.Bad != 1) {
				t.Errorf("flip in block %d: %d of %d lines, %d bad", k, kept, full, s.Bad)
			} else if k < 3 && kept != full { // head, state, head's copy
				t.Errorf("flip in block %d: %d of %d lines", k, kept, full)
			}
			d.blocks[k] = good
		}
	}
}

// What is not ours is not touched; what is empty, or ours of another version, is used.
func TestForeign(t *testing.T) {
	dir := t.TempDir()
	open := func(name string, content func(p []byte)) error {
		p := make([]byte, 16<<20)
		content(p)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Open(t.Context(), Options{Path: path, SizeBytes: 24 << 20})
		if err == nil {
			return c.Close()
		}
		if after, _ := os.ReadFile(path); !bytes.Equal(after, p) {
			t.Errorf("%s: refused, and written to", name)
		}
		return err
	}
	if err := open("empty", func([]byte) {}); err != nil {
		t.Errorf("empty: %v", err)
	}
	if err := open("version 1", func(p []byte) { copy(p, "LEDGECH1 and what it had") }); err != nil {
		t.Errorf("version 1: %v", err)
	}
	for name, at := range map[string]int{"ext4": 1024 + 56, "partitions": 510, "bcache": 4096 + 24, "at the end": 16<<20 - 8192, "within the first MiB": 1<<20 - 1} {
		if err := open(name, func(p []byte) { p[at] = 0x53 }); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, o := range map[string]Options{
		"no directory": {Path: filepath.Join(dir, "none", "cache")},
		"a directory":  {Path: dir},
		"too small":    {Path: filepath.Join(dir, "tiny"), SizeBytes: 100},
		"small":        {Path: filepath.Join(dir, "tiny"), SizeBytes: 3 << 20},
	} {
		if c, err := Open(t.Context(), o); err == nil {
			t.Errorf("%s: opened", name)
			c.Close()
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, Options{Path: filepath.Join(dir, "empty")}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// A device that is missing is not made, and not waited for either.
	c, err := Open(t.Context(), Options{Path: "/dev/ledge-no-such-device", SizeBytes: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if c.Stats().Err == nil || has(t, c, storeA, 1, 1) {
		t.Error("a missing device is not reported")
	}
	c.Close()
	if _, err := os.Stat("/dev/ledge-no-such-device"); !errors.Is(err, syscall.ENOENT) {
		t.Error("a file was made in /dev")
	}
}

// After ten seconds without a power cut, what was put in is durable, be it much or little.
func TestDurableInTenSeconds(t *testing.T) {
	for _, lines := range []int{1, smallPer, smallPer + 3, 5 * smallPer} {
		d := newDisk(smallSize(32))
		clock := fakeClock{time.Unix(1e9, 0)}
		o := small(d)
		o.now = clock.now
		c := openWith(t, o)
		for line := range lines {
			fill(t, c, storeA, 1, line)
		}
		clock.t = clock.t.Add(checkpoint)
		c.everyTick()
		for k, old := range d.unsaved { // the power goes, and what was not synced with it
			if d.blocks[k] = old; old == nil {
				delete(d.blocks, k)
			}
		}
		clear(d.unsaved)
		if c = openWith(t, o); held(c) != lines {
			t.Errorf("%d of %d lines", held(c), lines)
		}
	}
}

// After a restart, writing goes on in a hole in the ring, and the power is cut before a table tells: what was
// overwritten behind the hole is known.
func TestCutBehindAHole(t *testing.T) {
	d := newDisk(smallSize(16))
	c := openWith(t, small(d))
	all := func(c *Cache) (n int) {
		for i := range 40 * smallPer {
			if has(t, c, storeA, uint32(i/segmentLines+1), i%segmentLines) {
				n++
			}
		}
		return n
	}
	for i := range 20 * smallPer {
		for range 2 {
			fill(t, c, storeA, uint32(i/segmentLines+1), i%segmentLines)
		}
	}
	c.Close()
	l := c.layout
	hole := (c.next + 5) % l.regions
	delete(d.blocks, l.tableAt(hole)/blockBytes)
	c = openWith(t, small(d))
	if c.next != hole {
		t.Fatalf("goes on at %d, the hole is %d", c.next, hole)
	}
	d.onWrite = func(off int64, _ int) error {
		switch off {
		case l.regionAt(hole + 1): // written whole, and the hole's table is not durable
			delete(d.blocks, l.tableAt(hole)/blockBytes)
		case l.tableAt(hole + 1):
			d.dead = true
			return errPower
		}
		return nil
	}
	for i := 20 * smallPer; i < 40*smallPer && !d.dead; i++ {
		for range 2 {
			fill(t, c, storeA, uint32(i/segmentLines+1), i%segmentLines)
		}
	}
	if !d.dead {
		t.Fatal("the power was not cut")
	}
	d.onWrite = nil
	d.powerOn()
	c = openWith(t, small(d))
	if n := all(c); n < 6*smallPer || c.Stats().Bad > 0 {
		t.Errorf("%d lines, %d bad", n, c.Stats().Bad)
	}
}

// A power cut while the medium is formatted leaves what is known as ours.
func TestCutInFormat(t *testing.T) {
	for seed := range uint64(50) {
		d := newDisk(smallSize(8))
		d.rng, d.cutIn = rand.New(rand.NewPCG(seed, 1)), 1
		if c := openWith(t, small(d)); c.Stats().Err == nil {
			t.Error("formatted without power")
		}
		d.powerOn()
		if c := openWith(t, small(d)); c.Stats().Err != nil || fill(t, c, storeA, 1, 1) || !fill(t, c, storeA, 1, 1) {
			t.Errorf("does not come up: %v", c.Stats().Err)
		}
	}
}

// Grown and shrunk, while it serves and between restarts: what fits stays.
func TestResize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	c := openFileAt(t, path, 64<<20, false)
	for segment := range uint32(4) {
		load100(t, c, segment+1)
	}
	count := func(c *Cache) (n int) {
		for segment := range uint32(4) {
			for line := range 100 {
				if has(t, c, storeA, segment+1, line) {
					n++
				}
			}
		}
		return n
	}
	check := func(c *Cache, size int64, least, most int) {
		t.Helper()
		if n := count(c); n < least || n > most {
			t.Errorf("at %d MiB: %d of 400 lines, want %d to %d", size>>20, n, least, most)
		}
		if s := c.Stats(); s.CapacityBytes < size*3/4 || s.CapacityBytes > size || s.Bad+s.Failures != 0 || s.Err != nil {
			t.Errorf("at %d MiB: %+v", size>>20, s)
		}
		if info, err := os.Stat(path); err != nil || info.Size() != size {
			t.Errorf("the file has %d bytes, want %d: %v", info.Size(), size, err)
		}
	}
	for _, s := range []struct {
		size        int64
		least, most int
	}{{96 << 20, 400, 400}, {20 << 20, 270, 270}} {
		if err := c.Resize(s.size); err != nil {
			t.Fatal(err)
		}
		check(c, s.size, s.least, s.most)
	}
	if err := c.Resize(1 << 20); !errors.Is(err, ErrSize) {
		t.Errorf("too small: %v", err)
	}
	c.Close()
	if err := c.Resize(64 << 20); err == nil {
		t.Error("resized after Close")
	}
	for _, s := range []struct {
		size        int64
		least, most int
	}{{40 << 20, 270, 270}, {12 << 20, 150, 150}} {
		c = openFileAt(t, path, s.size, false)
		check(c, s.size, s.least, s.most)
		load := held(c)
		c.Close()
		c = openFileAt(t, path, s.size, false)
		if held(c) != load {
			t.Errorf("%d lines after another restart, of %d", held(c), load)
		}
		c.Close()
	}
}

// A freed segment's lines are gone at once, and nothing else is.
func TestForget(t *testing.T) {
	d := newDisk(smallSize(32))
	c := openWith(t, small(d))
	for segment := range uint32(3) {
		for line := range 100 {
			fill(t, c, storeA, segment+1, line)
		}
	}
	c.Forget(storeA, 2)
	c.Forget(storeB, 1)
	c.Forget(storeA, 99)
	for segment := range uint32(3) {
		for line := range 100 {
			if has(t, c, storeA, segment+1, line) == (segment == 1) {
				t.Fatalf("segment %d line %d", segment+1, line)
			}
		}
	}
	if s := c.Stats(); s.Forgotten != 100 || s.Lines != 200 {
		t.Errorf("%+v", s)
	}
}

// More stores than there are numbers, and more in a region than its table has room for.
func TestManyStores(t *testing.T) {
	d := newDisk(smallSize(8))
	c := openWith(t, small(d))
	for i := range 1000 {
		store := [16]byte{byte(i), byte(i >> 8), 7}
		fill(t, c, store, 5, 5)
		if fill(t, c, store, 5, 5); !has(t, c, store, 5, 5) {
			t.Fatalf("store %d: no place", i)
		}
	}
	c.Close()
	c = openWith(t, small(d))
	n := 0
	for i := range 1000 {
		if has(t, c, [16]byte{byte(i), byte(i >> 8), 7}, 5, 5) {
			n++
		}
	}
	if s := c.Stats(); n < 4*tableStores || s.Bad != 0 {
		t.Errorf("%d lines after a restart: %+v", n, s)
	}
}
