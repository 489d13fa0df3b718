package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/klauspost/reedsolomon"
	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
	"github.com/ledge-storage/ledge/raid/layout"
)

// The bed of the array: two arrays of 8+2 over twelve files each. One is written, by itself and by the bare writers, and never
// read; one is written once and then read. The cache of checksum blocks is as small as it can be: an array of real size
// does not have the checksum blocks of what is read in sequence in memory.

const (
	arrayMembers = 12
	arrayData    = 8
	arrayParity  = 2
	arraySpares  = 2
	// arrayDepth is how many stripes are under way at a time, of every contestant.
	arrayDepth = 4
)

var arrayAsks = []ask{
	{what: "full-stripe write, array to bare", a: "write", b: "bare write", bound: .85, comment: "the bare program has parity and checksums for nothing"},
	{what: "full-stripe write, array to bare+codec", a: "write", b: "bare+codec write", bound: .85, comment: "parity and checksums are computed by both"},
	{what: "sequential read, array to bare", a: "read", b: "bare read", bound: .85, comment: "the bare program verifies nothing"},
	{what: "sequential read, array to bare+crc", a: "read", b: "bare+crc read", bound: .85, comment: "checksums are computed by both"},
	{what: "read with 2 members lost, to healthy", a: "degraded read", b: "read", bound: .7},
	{what: "scrub, array to bare read of all strips", a: "scrub of all", b: "bare scrub", bound: .8, comment: "the bare program verifies nothing"},
	{what: "scrub, array to bare+codec", a: "scrub of all", b: "bare+codec scrub", bound: .8, comment: "checksums and parity are verified by both"},
}

func openArrayShm(ctx context.Context, s settings, dir string) (*contest, error) {
	return openArray(ctx, s, dir, false)
}

func openArrayDisk(ctx context.Context, s settings, dir string) (*contest, error) {
	return openArray(ctx, s, dir, true)
}

// arrayBed is what the contestants share.
type arrayBed struct {
	geo    raid.Geometry
	layout *layout.Layout
	code   reedsolomon.Encoder
	data   [][]byte // of each stripe
	images [][]byte // of each stripe: the slots of its strips, one behind the other
	gen    atomic.Uint64
	busy   []sync.Mutex // of each stripe: its writers come one by one, as its generations must

	written, read []*os.File // for the bare programs
	arrays        []*raid.Array
}

func openArray(ctx context.Context, s settings, dir string, direct bool) (*contest, error) {
	b := new(arrayBed)
	closeAll := func() error {
		var errs []error
		for _, a := range b.arrays {
			errs = append(errs, a.Close())
		}
		for _, f := range append(b.written, b.read...) {
			errs = append(errs, f.Close())
		}
		return errors.Join(errs...)
	}
	c, err := b.open(ctx, s, dir, direct)
	if err != nil {
		return nil, errors.Join(err, closeAll())
	}
	c.close = closeAll
	return c, nil
}

func (b *arrayBed) open(ctx context.Context, s settings, dir string, direct bool) (*contest, error) {
	small := raid.Options{K: arrayData, M: arrayParity, Spares: arraySpares, CacheBytes: 1}
	var err error
	if b.layout, err = layout.New(arrayMembers, arrayData, arrayParity, arraySpares); err != nil {
		return nil, err
	}
	if b.code, err = reedsolomon.New(arrayData, arrayParity); err != nil {
		return nil, err
	}
	w, err := b.create(ctx, filepath.Join(dir, "w"), s.slots, direct, small)
	if err != nil {
		return nil, err
	}
	b.geo = w.Geometry()
	b.busy = make([]sync.Mutex, b.geo.Stripes)
	for range b.geo.Stripes {
		b.data = append(b.data, randomBytes(int(b.geo.StripeBytes), len(b.data)))
	}
	r, err := b.create(ctx, filepath.Join(dir, "r"), s.slots, direct, small)
	if err != nil {
		return nil, err
	}
	for _, a := range []*raid.Array{w, r} {
		for st := range b.geo.Stripes {
			if err := a.WriteStripe(ctx, st, b.gen.Add(1), [][]byte{b.data[st]}); err != nil {
				return nil, err
			}
		}
		if err := a.Flush(ctx); err != nil {
			return nil, err
		}
	}
	if b.written, err = bareFiles(filepath.Join(dir, "w"), direct); err != nil {
		return nil, err
	}
	if b.read, err = bareFiles(filepath.Join(dir, "r"), direct); err != nil {
		return nil, err
	}
	if err := b.takeImages(); err != nil {
		return nil, err
	}
	small.ReadOnly = true
	healthy, err := b.reopen(ctx, filepath.Join(dir, "r"), direct, small)
	if err != nil {
		return nil, err
	}
	degraded, err := b.reopen(ctx, filepath.Join(dir, "r"), direct, small, 2, 7)
	if err != nil {
		return nil, err
	}
	return b.contest(ctx, w, healthy, degraded)
}

// contest checks once that every reader reads what was written, then makes the contestants.
func (b *arrayBed) contest(ctx context.Context, w, healthy, degraded *raid.Array) (*contest, error) {
	n := int(b.geo.Stripes)
	dst := make([][]byte, arrayDepth)
	scratch := make([][]byte, arrayDepth)
	for i := range dst {
		dst[i] = aligned(int(b.geo.StripeBytes))
		scratch[i] = aligned((arrayData + arrayParity) * raid.SlotBytes)
	}
	lent := make([][][]byte, arrayDepth) // what each worker was lent
	loans := make([]raid.Loan, arrayDepth)
	fetcher := func(a *raid.Array) func(worker, i int) (int, error) {
		return func(worker, i int) (_ int, err error) {
			loans[worker].Return()
			lent[worker], err = a.Fetch(ctx, uint64(i%n), 0, arrayData*raid.StripBlocks, lent[worker][:0], &loans[worker])
			return int(b.geo.StripeBytes), err
		}
	}
	copier := func(worker, i int) (int, error) {
		return len(dst[worker]), healthy.Read(ctx, uint64(i%n), 0, [][]byte{dst[worker]})
	}
	bareRead := func(check bool) func(worker, i int) (int, error) {
		return func(worker, i int) (int, error) {
			err := b.each(arrayData, i%n, func(strip int, f int, off int64) error {
				p := dst[worker][strip*raid.StripBytes:][:raid.StripBytes]
				if _, err := unix.Pread(int(b.read[f].Fd()), p, off+raid.BlockBytes); err != nil {
					return err
				}
				if check {
					sumBlocks(p)
				}
				return nil
			})
			return len(dst[worker]), err
		}
	}
	for what, f := range map[string]func(worker, i int) (int, error){"read": fetcher(healthy), "degraded read": fetcher(degraded), "copied read": copier, "bare read": bareRead(false)} {
		for i := range n {
			lent[0] = [][]byte{dst[0]} // who lends nothing fills dst
			if _, err := f(0, i); err != nil || !bytes.Equal(bytes.Join(lent[0], nil), b.data[i]) {
				return nil, fmt.Errorf("%s: stripe %d is not what was written (%v)", what, i, err)
			}
		}
	}
	bareScrub := func(check bool) func(worker, i int) (int, error) {
		return func(worker, i int) (int, error) {
			slots := scratch[worker]
			err := b.each(arrayData+arrayParity, i%n, func(strip int, f int, off int64) error {
				p := slots[strip*raid.SlotBytes:][:raid.SlotBytes]
				if _, err := unix.Pread(int(b.read[f].Fd()), p, off); err != nil {
					return err
				}
				if check {
					sumBlocks(p)
				}
				return nil
			})
			if err == nil && check {
				var ok bool
				if ok, err = b.code.Verify(b.shards(slots)); err == nil && !ok {
					err = errors.New("parity does not match")
				}
			}
			return len(slots), err
		}
	}
	mb := func(name string, f func(worker, i int) (int, error)) contestant {
		return contestant{name: name, unit: "MB/s", run: megabytes(arrayDepth, f)}
	}
	return &contest{contestants: []contestant{
		mb("write", func(_, i int) (int, error) {
			b.busy[i%n].Lock()
			defer b.busy[i%n].Unlock()
			return int(b.geo.StripeBytes), w.WriteStripe(ctx, uint64(i%n), b.gen.Add(1), [][]byte{b.data[i%n]})
		}),
		mb("bare write", func(_, i int) (int, error) {
			err := b.each(arrayData+arrayParity, i%n, func(strip int, f int, off int64) error {
				return pwrite(b.written[f], off, b.images[i%n][strip*raid.SlotBytes:][:raid.SlotBytes])
			})
			return int(b.geo.StripeBytes), err
		}),
		mb("bare+codec write", func(worker, i int) (int, error) { return b.codecWrite(scratch[worker], i%n, true) }),
		mb("codec alone", func(worker, i int) (int, error) { return b.codecWrite(scratch[worker], i%n, false) }),
		mb("read", fetcher(healthy)),
		mb("copied read", copier),
		mb("bare read", bareRead(false)),
		mb("bare+crc read", bareRead(true)),
		mb("degraded read", fetcher(degraded)),
		mb("scrub", func(_, i int) (int, error) {
			r, err := healthy.Scrub(ctx, uint64(i%n))
			if err == nil && (r.Bad != 0 || r.Absent != 0 || r.Unwritten) {
				err = fmt.Errorf("stripe %d: %+v", i%n, r)
			}
			return (arrayData + arrayParity) * raid.SlotBytes, err
		}),
		// As the weekly one does it: large reads of many stripes.
		{name: "scrub of all", unit: "MB/s", run: func(ctx context.Context, d time.Duration) (float64, error) {
			begin, bytes := time.Now(), int64(0)
			for bytes == 0 || time.Since(begin) < d && ctx.Err() == nil {
				r, err := healthy.ScrubAll(ctx, raid.ScrubOptions{Used: func(stripe uint64) bool { return stripe < uint64(n) }})
				if err == nil && (r.Stripes != uint64(n) || r.Unwritten+r.Rotten+r.Stale+r.Unreadable+r.Mismatched != 0) {
					err = fmt.Errorf("scrub of all: %+v", r)
				}
				if err != nil {
					return 0, err
				}
				bytes += int64(n) * (arrayData + arrayParity) * raid.SlotBytes
			}
			return float64(bytes) / 1e6 / time.Since(begin).Seconds(), ctx.Err()
		}},
		mb("bare scrub", bareScrub(false)),
		mb("bare+codec scrub", bareScrub(true)),
	}}, nil
}

// codecWrite computes parity and checksums of a stripe's data, and writes each strip, checksum block first, without a copy.
func (b *arrayBed) codecWrite(scratch []byte, stripe int, write bool) (int, error) {
	shards := make([][]byte, arrayData+arrayParity)
	for i := range shards {
		if i < arrayData {
			shards[i] = b.data[stripe][i*raid.StripBytes:][:raid.StripBytes]
		} else {
			shards[i] = scratch[i*raid.SlotBytes+raid.BlockBytes:][:raid.StripBytes]
		}
	}
	if err := b.code.Encode(shards); err != nil {
		return 0, err
	}
	one := func(strip, f int, off int64) error {
		sum := scratch[strip*raid.SlotBytes:][:raid.BlockBytes]
		for c, crc := range sumBlocks(shards[strip]) {
			binary.LittleEndian.PutUint32(sum[64+4*c:], crc)
		}
		binary.LittleEndian.PutUint32(sum[48:], crc32.Checksum(sum, castagnoli))
		if !write {
			return nil
		}
		n, err := unix.Pwritev(int(b.written[f].Fd()), [][]byte{sum, shards[strip]}, off)
		if err == nil && n != raid.SlotBytes {
			err = fmt.Errorf("%d bytes written", n)
		}
		return err
	}
	return int(b.geo.StripeBytes), b.each(arrayData+arrayParity, stripe, one)
}

// each calls f for the first strips of a stripe, each in a goroutine, with the file and the offset of its slot.
func (b *arrayBed) each(strips, stripe int, f func(strip, file int, off int64) error) error {
	var wg sync.WaitGroup
	errs := make([]error, strips)
	for i := range strips {
		wg.Go(func() {
			m, slot := b.layout.Strip(uint64(stripe), i)
			errs[i] = f(i, m, raid.DataOffset+int64(slot)*raid.SlotBytes)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (b *arrayBed) shards(slots []byte) [][]byte {
	shards := make([][]byte, arrayData+arrayParity)
	for i := range shards {
		shards[i] = slots[i*raid.SlotBytes+raid.BlockBytes:][:raid.StripBytes]
	}
	return shards
}

// takeImages reads what the array has made of the stripes.
func (b *arrayBed) takeImages() error {
	for st := range b.data {
		image := aligned((arrayData + arrayParity) * raid.SlotBytes)
		err := b.each(arrayData+arrayParity, st, func(strip, f int, off int64) error {
			_, err := unix.Pread(int(b.written[f].Fd()), image[strip*raid.SlotBytes:][:raid.SlotBytes], off)
			return err
		})
		if err != nil {
			return err
		}
		b.images = append(b.images, image)
	}
	return nil
}

func memberPath(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("drive%02d", i)) }

// create makes files of whole, allocated blocks and an array on them.
func (b *arrayBed) create(ctx context.Context, dir string, slots int, direct bool, o raid.Options) (*raid.Array, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	var drives []raid.Drive
	for i := range arrayMembers {
		size := raid.DataOffset + int64(slots)*raid.SlotBytes
		if err := drive.Create(memberPath(dir, i), size); err != nil {
			return nil, err
		}
		if err := allocate(memberPath(dir, i), size); err != nil {
			return nil, err
		}
		d, err := drive.Open(memberPath(dir, i), drive.Options{Controller: "A", Direct: direct})
		if err != nil {
			return nil, err
		}
		drives = append(drives, d)
	}
	a, err := raid.Create(ctx, drives, o)
	if err != nil {
		return nil, err
	}
	b.arrays = append(b.arrays, a)
	return a, a.Acquire(ctx, 1)
}

// allocate writes zeros: a first write of a file's block costs more than the next, and is no drive's.
func allocate(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	zeros := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// reopen opens the array again, without some members.
func (b *arrayBed) reopen(ctx context.Context, dir string, direct bool, o raid.Options, without ...int) (*raid.Array, error) {
	drives := make([]raid.Drive, arrayMembers)
	for i := range drives {
		d, err := drive.Open(memberPath(dir, i), drive.Options{Controller: "A", Direct: direct})
		if err != nil {
			return nil, err
		}
		drives[i] = d
	}
	for _, i := range without {
		drives[i].Close()
		drives[i] = nil
	}
	a, err := raid.Open(ctx, drives, o)
	if err == nil {
		b.arrays = append(b.arrays, a)
	}
	return a, err
}

func bareFiles(dir string, direct bool) (files []*os.File, err error) {
	flags := os.O_RDWR
	if direct {
		flags |= unix.O_DIRECT
	}
	for i := range arrayMembers {
		f, err := os.OpenFile(memberPath(dir, i), flags, 0)
		if errors.Is(err, unix.EINVAL) { // a file system without O_DIRECT: package drive does the same
			f, err = os.OpenFile(memberPath(dir, i), os.O_RDWR, 0)
		}
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

func pwrite(f *os.File, off int64, p []byte) error {
	n, err := unix.Pwrite(int(f.Fd()), p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d written", n, len(p))
	}
	return err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sumBlocks computes the checksum of each block.
func sumBlocks(p []byte) (sums [1 + raid.StripBlocks]uint32) {
	for i := 0; i < len(p); i += raid.BlockBytes {
		sums[i/raid.BlockBytes] = uint32(xxh3.HashSeed(p[i:i+raid.BlockBytes], 1))
	}
	return sums
}

// aligned returns n bytes that start at a multiple of a block.
func aligned(n int) []byte {
	b := make([]byte, n+raid.BlockBytes)
	at := (raid.BlockBytes - int(uintptr(unsafe.Pointer(&b[0]))%raid.BlockBytes)) % raid.BlockBytes
	return b[at : at+n : at+n]
}

func randomBytes(n, seed int) []byte {
	b := aligned(n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}).Read(b)
	return b
}
