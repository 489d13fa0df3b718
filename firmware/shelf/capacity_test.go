package shelf

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
)

// The pool of 100 TB: 24 sparse files of 5.9 TB as drives, 11.9 million extents, all but a few of them mapped to
// 16 LUNs in no order, one of the LUNs as thinly as a LUN can be.

var capacityTB = flag.Float64("capacity", 100, "size in TB of the pool of TestCapacity")

const (
	capacityDrives = 24
	capacityFree   = 1000
	capacityLUNs   = 16
	// The thin LUN has an extent in every 300.
	thinStride = 300
	childEnv   = "LEDGE_CAPACITY_CHILD"
)

type capacityFigures struct {
	Extents                  uint32
	ArrayOpen, LogOpen, Pool time.Duration
	HeapBytes, RSSBytes, HWM int64
	Allocate, Map, Lookup    time.Duration // of one extent
}

func capacityPaths(dir string) []string {
	var ps []string
	for i := range capacityDrives {
		ps = append(ps, filepath.Join(dir, fmt.Sprintf("d%02d", i)))
	}
	return ps
}

func capacityArray(t *testing.T, dir string, open func(context.Context, []raid.Drive, raid.Options) (*raid.Array, error)) *raid.Array {
	t.Helper()
	var ds []raid.Drive
	for _, p := range capacityPaths(dir) {
		d, err := drive.Open(p, drive.Options{Controller: "A", Direct: true})
		if err != nil {
			t.Fatal(err)
		}
		ds = append(ds, d)
	}
	a, err := open(context.Background(), ds, raid.Options{K: 8, M: 2})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestCapacity: the full pool of 100 TB opens within 10 s and a heap of 1 GiB, and serves. The process that opens it
// is another one than that which made it, so the figures are a controller's.
func TestCapacity(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		t.Skip("this is the child")
	}
	dir := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "ledge-capacity"); err == nil { // the disk here is nobody's array
		t.Cleanup(func() { os.RemoveAll(shm) })
		dir = shm
	}
	// Data, parity and checksums, on the members' share that is no spare space; and the metadata.
	need := *capacityTB * 1e12 * 10 / 8 * 33 / 32 / (capacityDrives - 2)
	for _, p := range capacityPaths(dir) {
		if err := drive.Create(p, int64(need*1.001)/4096*4096+64<<20); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	free := makeFullPool(t, dir)
	t.Logf("made in %v", time.Since(start).Round(time.Millisecond))

	cmd := exec.Command(os.Args[0], "-test.run=^TestCapacityChild$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("child: %v\n%s", err, out)
	}
	_, after, ok := bytes.Cut(out, []byte("FIGURES "))
	if !ok {
		t.Fatalf("child said nothing:\n%s", out)
	}
	var f capacityFigures
	if err := json.NewDecoder(bytes.NewReader(after)).Decode(&f); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d extents (%.1f TB), %d of them free", f.Extents, float64(f.Extents)*8*1024*1024/1e12, free)
	t.Logf("start-up: array %v, log %v, pool %v", f.ArrayOpen, f.LogOpen, f.Pool)
	t.Logf("memory: heap %d MiB, resident %d MiB, at most %d MiB", f.HeapBytes>>20, f.RSSBytes>>20, f.HWM>>20)
	t.Logf("one extent: find free %v, map %v, look up %v", f.Allocate, f.Map, f.Lookup)
	limit := int64(1<<30) * int64(f.Extents) / 11_900_000
	if limit = max(limit, 256<<20); f.HeapBytes > limit || f.HWM > limit {
		t.Errorf("heap of %d MiB, resident at most %d MiB; the promise is %d MiB", f.HeapBytes>>20, f.HWM>>20, limit>>20)
	}
}

// makeFullPool writes the metadata of a pool as months of use would leave it.
func makeFullPool(t *testing.T, dir string) (free int) {
	t.Helper()
	ctx := context.Background()
	a := capacityArray(t, dir, raid.Create)
	defer a.Close()
	p := newPool(a, nil, Options{})
	g := a.Geometry()
	sb, err := layOut(g.Stripes, g.K, g.M, uint32(p.opts.ExtentBlocks), uint32(p.opts.MaxLUNs), uint32(p.opts.MaxHosts), uint32(p.opts.ReservationBlocks))
	if err != nil {
		t.Fatal(err)
	}
	sb.UUID, sb.GenCeiling = [16]byte{1}, 1<<33
	p.sb = sb
	p.table = newExtentTable(&p.sb)
	rng := rand.New(rand.NewPCG(1, 1))
	order := make([]uint32, sb.Extents)
	for i := range order {
		order[i] = uint32(i)
	}
	rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	var next [capacityLUNs + 1]uint32
	for i, x := range order {
		if len(order)-i <= capacityFree {
			free++
			continue
		}
		lun := 1 + uint32(rng.IntN(capacityLUNs))
		e := extentEntry{lun: lun, ext: next[lun], birth: uint64(i + 1), written: 0xff}
		if lun == capacityLUNs {
			e.ext *= thinStride
		}
		next[lun]++
		p.table.entries[x] = e
	}
	for id := uint32(1); id <= capacityLUNs; id++ {
		n := uint64(next[id])
		if id == capacityLUNs {
			n *= thinStride
		}
		p.luns[id] = &LUN{p: p, id: id, rec: lunRecord{ID: id, UUID: [16]byte{byte(id)}, Blocks: max(n, 1) * uint64(sb.ExtentBlocks),
			BlockBytes: 4096, Kind: KindPlain, State: lunLive, Name: "lun" + strconv.Itoa(int(id))}}
	}
	if err := p.format(ctx); err != nil {
		t.Fatal(err)
	}
	return free
}

// TestCapacityChild opens the pool that TestCapacity made, uses it, and prints figures.
func TestCapacityChild(t *testing.T) {
	dir := os.Getenv(childEnv)
	if dir == "" {
		t.Skip("TestCapacity runs it")
	}
	ctx := context.Background()
	f := capacityFigures{}
	region := nvramtest.NewRegion(64<<20, 512, 1)
	if err := nvram.Format(region, nvram.Area{Size: region.Size()}, nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	lap := func(d *time.Duration) {
		*d = time.Since(start).Round(time.Millisecond)
		start = time.Now()
	}
	a := capacityArray(t, dir, raid.Open)
	defer a.Close()
	lap(&f.ArrayOpen)
	log, err := nvram.Open(ctx, region, nvram.Area{Size: region.Size()}, nvram.Options{Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	lap(&f.LogOpen)
	p, err := OpenPool(ctx, a, log, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Abort()
	lap(&f.Pool)
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	f.HeapBytes, f.Extents = int64(m.HeapAlloc)-region.Size(), p.sb.Extents
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	f.RSSBytes, f.HWM = statusBytes(status, "VmRSS:"), statusBytes(status, "VmHWM:")
	useFullPool(t, p, &f)
	out, _ := json.Marshal(f)
	fmt.Printf("FIGURES %s\n", out)
}

func statusBytes(status []byte, field string) int64 {
	_, rest, _ := bytes.Cut(status, []byte(field))
	n, _ := strconv.ParseInt(strings.Fields(string(rest))[0], 10, 64)
	return n << 10
}

func useFullPool(t *testing.T, p *Pool, f *capacityFigures) {
	t.Helper()
	ctx := context.Background()
	table, used := p.table, p.table.used
	if want := int(p.sb.Extents) - capacityFree; used != want || table.free.n != capacityFree {
		t.Fatalf("%d extents used, %d free; want %d and %d", used, table.free.n, want, capacityFree)
	}
	// Every entry is found again.
	rng := rand.New(rand.NewPCG(2, 2))
	start, n := time.Now(), 200000
	for range n {
		x := uint32(rng.IntN(len(table.entries)))
		if e := table.entries[x]; e.lun != 0 {
			if got, ok := table.lookup(extentKey{e.lun, e.ext}); !ok || got != x {
				t.Fatalf("extent %d of LUN %d is %d, %t; want %d", e.ext, e.lun, got, ok, x)
			}
		}
	}
	f.Lookup = time.Since(start) / time.Duration(n)
	// The last free extents are found, wherever they are, and mapped anywhere.
	var taken []uint32
	start = time.Now()
	for {
		x, ok := table.take(0)
		if !ok {
			break
		}
		taken = append(taken, x)
	}
	f.Allocate = time.Since(start) / capacityFree
	if len(taken) != capacityFree {
		t.Fatalf("%d free extents found, %d are there", len(taken), capacityFree)
	}
	start = time.Now()
	for i, x := range taken {
		table.enter(extentKey{capacityLUNs, uint32(i)*thinStride*3 + 1}, x)
	}
	f.Map = time.Since(start) / capacityFree
	for i, x := range taken {
		table.leave(extentKey{capacityLUNs, uint32(i)*thinStride*3 + 1})
		table.release(x)
	}
	// A host's view: thin space is written, read back, deleted; other LUNs are what they were.
	l, err := p.CreateLUN(ctx, LUNSpec{Name: "new", Kind: KindPlain, Bytes: 1 << 40, BlockBytes: 4096})
	if err != nil {
		t.Fatal(err)
	}
	b, got := bytes.Repeat([]byte{0xa5}, 4096), make([]byte, 4096)
	for i := range uint64(50) {
		if err := l.Write(ctx, i*5000, [][]byte{b}, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(50) {
		if err := l.Read(ctx, i*5000, [][]byte{got}); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("block %d reads otherwise: %v", i*5000, err)
		}
	}
	if err := p.DeleteLUN(ctx, "new"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		left := table.used
		p.mu.Unlock()
		if left == used {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d extents used after the deletion, %d before", left, used)
		}
	}
}

// BenchmarkBuildTable makes the maps of a full pool of 100 TB from its entries.
func BenchmarkBuildTable(b *testing.B) {
	sb := superblock{Extents: 11_932_948}
	t := newExtentTable(&sb)
	rng := rand.New(rand.NewPCG(1, 1))
	for i, x := range rng.Perm(len(t.entries)) {
		t.entries[x] = extentEntry{lun: 1 + uint32(i%capacityLUNs), ext: uint32(i / capacityLUNs)}
	}
	for b.Loop() {
		n := newExtentTable(&sb)
		n.entries = t.entries
		if err := n.build(runtime.GOMAXPROCS(0)); err != nil {
			b.Fatal(err)
		}
	}
}
