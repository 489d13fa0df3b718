// Package nvramtest has a Region in memory whose power can be cut at any write.
//
// It owns nothing but bytes. It promises what NVRAM does, and no more: a write that returned is durable; of the
// writes under way when the power goes, each granule (512 bytes of a sector, 8 of a pmem store) is old or
// new by chance, each by itself, so that a later write can be whole while an earlier one is torn.
package nvramtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
)

// ErrPower is what every call returns while the power is off.
var ErrPower = errors.New("nvramtest: power is off")

// Region is the memory. It implements nvram.Region.
type Region struct {
	// Hold, if set, runs in each WriteAt while the write is under way: a test delays it there.
	Hold func(off int64, n int)

	mu      sync.Mutex
	size    int64
	pages   [][]byte // immutable, so that copies are cheap; nil: zeros
	granule int
	rng     *rand.Rand
	off     bool // power
	cutAt   int
	writes  int
	under   map[*write]struct{}
	fail    error
}

const pageBytes = 4096

type write struct {
	p   []byte
	off int64
}

// Image is the content of a region at a moment.
type Image struct{ pages [][]byte }

// NewRegion returns size zeros. granule is 8 or 512; what tears follows from seed.
func NewRegion(size int64, granule int, seed uint64) *Region {
	return &Region{size: size, pages: make([][]byte, (size+pageBytes-1)/pageBytes), granule: granule, rng: rand.New(rand.NewPCG(seed, 1)), under: map[*write]struct{}{}}
}

// CutAt cuts the power during the nth write from now (1 is the next); 0 never.
func (r *Region) CutAt(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cutAt = 0
	if n > 0 {
		r.cutAt = r.writes + n
	}
}

// Cut cuts the power now.
func (r *Region) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut()
}

// Restore gives power back; what the cut left is there.
func (r *Region) Restore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.off, r.cutAt, r.fail = false, 0, nil
}

// Fail makes every later write fail with err, nothing written, until Restore.
func (r *Region) Fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = err
}

// Writes so far.
func (r *Region) Writes() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.writes
}

// Off tells whether the power is off.
func (r *Region) Off() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.off
}

// Bytes is a copy of the content; Load replaces it (an older copy of the module, an empty one).
func (r *Region) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := make([]byte, r.size)
	r.read(b, 0)
	return b
}

// Image is a copy of the content that costs nothing; Show makes one the content.
func (r *Region) Image() Image {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Image{slices.Clone(r.pages)}
}

// Show replaces the content by an image's.
func (r *Region) Show(i Image) {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.pages)
	copy(r.pages, i.pages)
}

// page gives a page that may be changed.
func (r *Region) page(i int64) []byte {
	p := make([]byte, pageBytes)
	copy(p, r.pages[i])
	r.pages[i] = p
	return p
}

// read and write are of whole pages, but that the last may be short. Called with mu held.
func (r *Region) read(p []byte, off int64) {
	for len(p) > 0 {
		if page := r.pages[off/pageBytes]; page != nil {
			copy(p, page)
		} else {
			clear(p[:min(len(p), pageBytes)])
		}
		n := min(len(p), pageBytes)
		p, off = p[n:], off+int64(n)
	}
}

func (r *Region) write(p []byte, off int64) {
	for len(p) > 0 {
		page := make([]byte, pageBytes)
		n := copy(page, p)
		r.pages[off/pageBytes] = page
		p, off = p[n:], off+int64(n)
	}
}

// Load replaces the content.
func (r *Region) Load(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.pages)
	r.write(b[:min(int64(len(b)), r.size)], 0)
}

// Flip inverts a bit: rot.
func (r *Region) Flip(off int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.page(off / pageBytes)[off%pageBytes] ^= 1 << (off & 7)
}

// ReadAt implements nvram.Region.
func (r *Region) ReadAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.check(p, off); err != nil {
		return 0, err
	}
	r.read(p, off)
	return len(p), nil
}

// WriteAt implements nvram.Region.
func (r *Region) WriteAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	if err := r.check(p, off); err != nil {
		r.mu.Unlock()
		return 0, err
	}
	if r.fail != nil {
		defer r.mu.Unlock()
		return 0, r.fail
	}
	w := &write{p, off}
	r.under[w] = struct{}{}
	if r.writes++; r.writes == r.cutAt {
		r.cut()
	}
	hold := r.Hold
	r.mu.Unlock()
	if hold != nil {
		hold(off, len(p))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.under[w]; !ok {
		return 0, ErrPower
	}
	delete(r.under, w)
	r.write(p, off)
	return len(p), nil
}

// cut tears what is under way. Called with mu held.
func (r *Region) cut() {
	r.off = true
	for w := range r.under {
		r.tear(w)
	}
	clear(r.under)
}

func (r *Region) tear(w *write) {
	whole, none := r.rng.IntN(8) == 0, r.rng.IntN(8) == 0
	for i := 0; i < len(w.p); i += r.granule {
		if whole || !none && r.rng.IntN(2) == 0 {
			copy(r.page((w.off + int64(i)) / pageBytes)[(w.off+int64(i))%pageBytes:], w.p[i:min(i+r.granule, len(w.p))])
		}
	}
}

func (r *Region) check(p []byte, off int64) error {
	if r.off {
		return ErrPower
	}
	if off < 0 || off+int64(len(p)) > r.size || off%4096 != 0 || len(p)%4096 != 0 {
		return fmt.Errorf("nvramtest: %d bytes at %d of a region of %d", len(p), off, r.size)
	}
	return nil
}

// Size implements nvram.Region.
func (r *Region) Size() int64 { return r.size }

// Close implements nvram.Region; the content stays.
func (r *Region) Close() error { return nil }
