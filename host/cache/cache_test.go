package cache

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var storeA, storeB = [16]byte{1}, [16]byte{2}

func lineOf(seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 9))
	p := make([]byte, lineBytes)
	for i := 0; i < len(p); i += 8 {
		le.PutUint64(p[i:], rng.Uint64())
	}
	return p
}

func openAt(t *testing.T, path string, regions int64) *Cache {
	t.Helper()
	c, err := Open(t.Context(), Options{Path: path, SizeBytes: blockBytes + regions*regionBytes})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// put waits until the line is there.
func putLine(t *testing.T, c *Cache, store [16]byte, segment uint32, line int, p []byte) {
	t.Helper()
	before := c.Stats().Written
	c.Write(store, segment, line, p)
	for i := 0; c.Stats().Written == before; i++ {
		if i > 10000 || c.Stats().Err != nil {
			t.Fatal("line was not written")
		}
		time.Sleep(time.Millisecond)
	}
}

func has(t *testing.T, c *Cache, store [16]byte, segment uint32, line int, want []byte) bool {
	t.Helper()
	p := make([]byte, lineBytes)
	if !c.Read(store, segment, line, p) {
		return false
	}
	if !bytes.Equal(p, want) {
		t.Fatalf("segment %d line %d: wrong content", segment, line)
	}
	return true
}

func TestWarmAfterRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	c := openAt(t, path, 2)
	for i := range uint64(100) {
		putLine(t, c, storeA, uint32(i+1), int(i), lineOf(i))
	}
	if has(t, c, storeB, 1, 0, nil) || has(t, c, storeA, 1, 1, nil) {
		t.Error("a line that was never put in")
	}
	if _, err := Open(t.Context(), Options{Path: path}); err == nil {
		t.Error("a file in use was opened again")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = openAt(t, path, 2)
	for i := range uint64(100) {
		if !has(t, c, storeA, uint32(i+1), int(i), lineOf(i)) {
			t.Errorf("line %d is gone", i)
		}
	}
	if s := c.Stats(); s.Hits != 100 || s.Bytes != 100*lineBytes || s.CapacityBytes != 252*lineBytes {
		t.Errorf("%+v", s)
	}
	c.Close()
	c = openAt(t, path, 3) // another size: formatted anew, and nothing of the old is believed
	if has(t, c, storeA, 1, 0, nil) {
		t.Error("a line of the old geometry")
	}
	c.Close()
}

// Round and round: the cache never holds more than it may, and lines that are read stay.
func TestReplacement(t *testing.T) {
	c := openAt(t, filepath.Join(t.TempDir(), "cache"), 2)
	defer c.Close()
	putLine(t, c, storeA, 7, 7, lineOf(7))
	for i := range uint64(1000) {
		putLine(t, c, storeB, uint32(i+1), 0, lineOf(i%4))
		if i%50 == 0 && !has(t, c, storeA, 7, 7, lineOf(7)) {
			t.Fatal("a line that is read all the time was replaced")
		}
	}
	if s := c.Stats(); s.Bytes != s.CapacityBytes {
		t.Errorf("%+v", s)
	}
	if has(t, c, storeB, 1, 0, nil) {
		t.Error("the oldest line is still there")
	}
}

// A bit flipped anywhere in the file costs at most what it hit, and is never given out.
func TestBitFlips(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	c := openAt(t, path, 1)
	for i := range uint64(20) {
		putLine(t, c, storeA, uint32(i+1), 3, lineOf(i))
	}
	c.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(4, 4))
	for n := range 100 {
		p := append([]byte(nil), good...)
		at := rng.IntN(2*blockBytes + 20*lineBytes)
		if n < 30 {
			at = rng.IntN(2 * blockBytes) // head and table
		}
		p[at] ^= 1 << rng.IntN(8)
		os.WriteFile(path, p, 0o600)
		c := openAt(t, path, 1)
		kept := 0
		for i := range uint64(20) {
			if has(t, c, storeA, uint32(i+1), 3, lineOf(i)) {
				kept++
			}
		}
		if at >= 2*blockBytes && (kept != 19 || c.Stats().Bad != 1) {
			t.Errorf("flip at %d: %d lines, %d bad", at, kept, c.Stats().Bad)
		}
		c.Close()
	}
}

// flaky is a medium that is cut off, or that keeps old tables as a power cut does.
type flaky struct {
	p                []byte
	fail, keepTables bool
}

var errMedium = errors.New("medium")

func (f *flaky) ReadAt(p []byte, off int64) (int, error) {
	if f.fail {
		return 0, errMedium
	}
	return copy(p, f.p[off:]), nil
}

func (f *flaky) WriteAt(p []byte, off int64) (int, error) {
	if f.fail {
		return 0, errMedium
	}
	if f.keepTables && len(p) == blockBytes {
		return len(p), nil
	}
	return copy(f.p[off:], p), nil
}

var _ io.ReaderAt = (*flaky)(nil)

// A table that is older than its lines names what is not there any more.
func TestPowerCut(t *testing.T) {
	f := &flaky{p: make([]byte, blockBytes+regionBytes)}
	open := func() *Cache {
		c, err := Open(t.Context(), Options{SizeBytes: int64(len(f.p)), medium: f})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := open()
	for i := range uint64(slotsPer) {
		putLine(t, c, storeA, uint32(i+1), 0, lineOf(i))
	}
	c.Close()
	c = open()
	f.keepTables = true
	for i := range uint64(10) {
		putLine(t, c, storeA, uint32(i+1001), 0, lineOf(i+1000))
	}
	c.Close()
	c = open()
	lost := 0
	for i := range uint64(slotsPer) {
		if !has(t, c, storeA, uint32(i+1), 0, lineOf(i)) {
			lost++
		}
	}
	if lost != 10 {
		t.Errorf("%d lines lost", lost)
	}
	c.Close()
}

func TestFailingMedium(t *testing.T) {
	f := &flaky{p: make([]byte, blockBytes+regionBytes)}
	c, err := Open(t.Context(), Options{SizeBytes: int64(len(f.p)), medium: f})
	if err != nil {
		t.Fatal(err)
	}
	putLine(t, c, storeA, 1, 0, lineOf(1))
	f.fail = true
	p := make([]byte, lineBytes)
	if c.Read(storeA, 1, 0, p) || c.Stats().Err == nil {
		t.Error("a failed read was a hit, or was not reported")
	}
	f.fail = false
	c.Write(storeA, 2, 0, p)
	if c.Read(storeA, 1, 0, p) {
		t.Error("a medium that failed is used again")
	}
	if err := c.Close(); !errors.Is(err, errMedium) {
		t.Errorf("close: %v", err)
	}
	if _, err := Open(t.Context(), Options{SizeBytes: 100, medium: f}); !errors.Is(err, ErrSize) {
		t.Errorf("too small: %v", err)
	}
}

func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		os.MkdirAll("testdata", 0o755)
		os.WriteFile(path, got, 0o644)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the format has changed", name)
	}
	return want
}

func TestGolden(t *testing.T) {
	h := head{id: [16]byte{9, 8, 7}, regions: 77}
	if got, err := decodeHead(golden(t, "head.golden", h.encode())); err != nil || got != h {
		t.Errorf("%+v %v", got, err)
	}
	var e [slotsPer]entry
	e[0] = entry{storeA, 1 << 27, 127, 0xdeadbeef}
	e[125] = entry{storeB, 5, 0, 1}
	if got, err := decodeTable(h.id, 3, golden(t, "table.golden", encodeTable(h.id, 3, &e))); err != nil || got != e {
		t.Error(err)
	}
	p := lineOf(1)
	if a := sumOf(storeA, 5, 6, p); a == sumOf(storeB, 5, 6, p) || a == sumOf(storeA, 6, 6, p) || a == sumOf(storeA, 5, 7, p) {
		t.Error("the checksum doesn't cover the name")
	}
}

func FuzzDecode(f *testing.F) {
	h := head{id: [16]byte{9}, regions: 7}
	f.Add(h.encode())
	f.Add(encodeTable(h.id, 3, &[slotsPer]entry{{storeA, 1, 2, 3}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		if got, err := decodeHead(p); err == nil && string(got.encode()[:44]) != string(p[:44]) {
			t.Error("head does not survive")
		} else if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Error(err)
		}
		if got, err := decodeTable(h.id, 3, p); err == nil {
			if again, err := decodeTable(h.id, 3, encodeTable(h.id, 3, &got)); err != nil || again != got {
				t.Error("table does not survive")
			}
		} else if !errors.Is(err, ErrCorrupt) {
			t.Error(err)
		}
	})
}
