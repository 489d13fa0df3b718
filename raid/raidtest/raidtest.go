// Package raidtest is a set of drives in memory that do what drives do once a year, on demand: lose their
// cache in a power cut, in any order and in halves; lose, tear and misdirect single writes; rot, stall, die and come
// back as an older copy of themselves. They know persistent reservations, and have a port for each controller.
//
// Everything random follows from the seed. It owns no clock and starts no goroutine.
package raidtest

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/ledge-storage/ledge/raid"
)

const sector = 512

// What a drive answers when it is meant to fail.
var (
	// ErrIO is a dead drive's answer, and of a sector that cannot be read.
	ErrIO = errors.New("raidtest: input/output error")
	// ErrPower is everything's answer between PowerCut and PowerOn.
	ErrPower = errors.New("raidtest: no power")
)

// Set is the drives of an enclosure.
type Set struct {
	Disks []*Disk
}

// NewSet makes n blank drives of size bytes.
func NewSet(seed uint64, n int, size int64) *Set {
	s := new(Set)
	s.Add(seed, n, size)
	return s
}

// Add puts n more blank drives into the enclosure.
func (s *Set) Add(seed uint64, n int, size int64) {
	for range n {
		i := len(s.Disks)
		s.Disks = append(s.Disks, &Disk{
			index: i, size: size, rng: rand.New(rand.NewPCG(seed, uint64(i))),
			media: make(map[int64][]byte), unreadable: make(map[int64]bool), keys: make(map[string]uint64),
		})
	}
}

// Drives returns a new port to every drive, for a controller.
func (s *Set) Drives(controller string) []raid.Drive {
	out := make([]raid.Drive, len(s.Disks))
	for i, d := range s.Disks {
		out[i] = d.Port(controller)
	}
	return out
}

// PowerCut takes the power of all drives: what their caches held lands in part (Disk.PowerCut).
func (s *Set) PowerCut() {
	for _, d := range s.Disks {
		d.PowerCut()
	}
}

// PowerOn brings all drives back.
func (s *Set) PowerOn() {
	for _, d := range s.Disks {
		d.PowerOn()
	}
}

// Clone copies the set as it is: data, caches, faults, reservations. It is cheap.
func (s *Set) Clone() *Set {
	c := new(Set)
	for _, d := range s.Disks {
		c.Disks = append(c.Disks, d.Clone())
	}
	return c
}

// Reseed makes everything random that follows of the drives follow from seed.
func (s *Set) Reseed(seed uint64) {
	for i, d := range s.Disks {
		d.mu.Lock()
		d.rng = rand.New(rand.NewPCG(seed, uint64(i)))
		d.mu.Unlock()
	}
}

// Verdict is what becomes of one write.
type Verdict int

const (
	Land      Verdict = iota
	Lose              // acknowledged, and gone
	Tear              // acknowledged; of each block only some sectors land
	Misdirect         // acknowledged; lands Disk.MisdirectBy further on
	Fail              // answered ErrIO, nothing lands
	FailTorn          // answered ErrIO, some sectors land
)

// Write is a write that a Disk.OnWrite judges.
type Write struct {
	Disk int
	Off  int64
	Data []byte // not to be kept
}

// Disk is one drive.
type Disk struct {
	index int
	size  int64

	mu    sync.Mutex
	rng   *rand.Rand
	media map[int64][]byte // block number → immutable content
	cache []pending        // oldest first
	// onWrite judges each write; nil: Land.
	onWrite     func(Write) Verdict
	misdirectBy int64
	unreadable  map[int64]bool
	dead, off   bool
	stalled     chan struct{} // closed when the stall ends
	keys        map[string]uint64
	holder      uint64
	stats       Stats
}

// Stats count what a drive was asked.
type Stats struct {
	Reads, ReadBlocks, Writes, WriteBlocks, Flushes uint64
}

type pending struct {
	block int64
	data  []byte
}

// Clone copies the drive.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &Disk{index: d.index, size: d.size, rng: rand.New(rand.NewPCG(d.rng.Uint64(), 1)), media: maps.Clone(d.media),
		cache: slices.Clone(d.cache), onWrite: d.onWrite, misdirectBy: d.misdirectBy, unreadable: maps.Clone(d.unreadable),
		dead: d.dead, off: d.off, stalled: d.stalled, keys: maps.Clone(d.keys), holder: d.holder}
}

// OnWrite sets what judges each write from now on; nil: all land.
func (d *Disk) OnWrite(f func(Write) Verdict) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.onWrite = f
}

// Once judges the next n writes at or above the first slot (labels are spared) with v, then all land.
func (d *Disk) Once(n int, v Verdict) {
	d.OnWrite(func(w Write) Verdict {
		if n == 0 || w.Off < raid.DataOffset {
			return Land
		}
		n--
		return v
	})
}

// MisdirectBy sets how far misdirected writes miss, in bytes.
func (d *Disk) MisdirectBy(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.misdirectBy = bytes
}

// Rot flips a bit of the byte at off, wherever it is.
func (d *Disk) Rot(off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	block := off / raid.BlockBytes
	b := slices.Clone(d.at(block))
	b[off%raid.BlockBytes] ^= 1 << d.rng.IntN(8)
	d.drain()
	d.media[block] = b
}

// Unreadable makes the block at off answer ErrIO until it is written again.
func (d *Disk) Unreadable(off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unreadable[off/raid.BlockBytes] = true
}

// Die makes every request fail from now on; Revive ends it, with all that was there.
func (d *Disk) Die() { d.setDead(true) }

// Revive ends Die.
func (d *Disk) Revive() { d.setDead(false) }

func (d *Disk) setDead(dead bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = dead
}

// Wipe makes the drive blank, as a replacement in its slot would be.
func (d *Disk) Wipe() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.media, d.cache, d.keys, d.holder = make(map[int64][]byte), nil, make(map[string]uint64), 0
	d.unreadable = make(map[int64]bool)
}

// Stall makes every request hang until the returned function is called.
func (d *Disk) Stall() (resume func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := make(chan struct{})
	d.stalled = c
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		close(c)
		d.stalled = nil
	})
}

// PowerCut: of the writes in the cache each sector lands or not, later ones never under earlier ones. Requests fail
// until PowerOn. Registrations survive: they are kept by the drive (APTPL).
func (d *Disk) PowerCut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	// Sorted, so that the outcome depends on what was written and not on goroutines' order.
	slices.SortStableFunc(d.cache, func(a, b pending) int { return int(a.block - b.block) })
	for _, p := range d.cache {
		switch d.rng.IntN(3) {
		case 0:
		case 1:
			d.media[p.block] = p.data
		case 2:
			d.media[p.block] = d.tear(d.media[p.block], p.data)
		}
	}
	d.cache, d.off = nil, true
}

// PowerOn ends PowerCut.
func (d *Disk) PowerOn() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off = false
}

// Stats returns the counts so far.
func (d *Disk) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// Snapshot returns the content as it would be read; Restore makes the drive an older copy of itself.
func (d *Disk) Snapshot() map[int64][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drain()
	return maps.Clone(d.media)
}

// Restore is the inverse of Snapshot.
func (d *Disk) Restore(s map[int64][]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.media, d.cache = maps.Clone(s), nil
}

var zeroBlock = make([]byte, raid.BlockBytes)

// at is the content of a block as a read sees it.
func (d *Disk) at(block int64) []byte {
	for i := len(d.cache) - 1; i >= 0; i-- {
		if d.cache[i].block == block {
			return d.cache[i].data
		}
	}
	if b := d.media[block]; b != nil {
		return b
	}
	return zeroBlock
}

func (d *Disk) drain() {
	for _, p := range d.cache {
		d.media[p.block] = p.data
	}
	d.cache = nil
}

func (d *Disk) tear(old, data []byte) []byte {
	if old == nil {
		old = zeroBlock
	}
	b := slices.Clone(old)
	for s := 0; s < raid.BlockBytes; s += sector {
		if d.rng.IntN(2) == 0 {
			copy(b[s:s+sector], data[s:s+sector])
		}
	}
	return b
}

// ready waits out a stall and says whether the drive answers. The lock is held before and after.
func (d *Disk) ready() error {
	for d.stalled != nil {
		c := d.stalled
		d.mu.Unlock()
		<-c
		d.mu.Lock()
	}
	switch {
	case d.off:
		return ErrPower
	case d.dead:
		return ErrIO
	}
	return nil
}

func (d *Disk) read(p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.ready(); err != nil {
		return err
	}
	if err := d.check(p, off); err != nil {
		return err
	}
	d.stats.Reads++
	d.stats.ReadBlocks += uint64(len(p) / raid.BlockBytes)
	for i := 0; i < len(p); i += raid.BlockBytes {
		block := (off + int64(i)) / raid.BlockBytes
		if d.unreadable[block] {
			return ErrIO
		}
		copy(p[i:], d.at(block))
	}
	return nil
}

func (d *Disk) check(p []byte, off int64) error {
	if off < 0 || off%raid.BlockBytes != 0 || len(p)%raid.BlockBytes != 0 || off+int64(len(p)) > d.size {
		return fmt.Errorf("raidtest: disk %d: %d bytes at %d of %d", d.index, len(p), off, d.size)
	}
	return nil
}

func (d *Disk) write(controller string, p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.ready(); err != nil {
		return err
	}
	if err := d.check(p, off); err != nil {
		return err
	}
	if d.holder != 0 && d.keys[controller] == 0 {
		return raid.ErrReservation
	}
	d.stats.Writes++
	d.stats.WriteBlocks += uint64(len(p) / raid.BlockBytes)
	verdict := Land
	if d.onWrite != nil {
		verdict = d.onWrite(Write{d.index, off, p})
	}
	to := off / raid.BlockBytes
	switch verdict {
	case Lose:
		return nil
	case Fail:
		return ErrIO
	case Misdirect:
		to += d.misdirectBy / raid.BlockBytes
	}
	for i := 0; i < len(p); i += raid.BlockBytes {
		block := to + int64(i/raid.BlockBytes)
		data := slices.Clone(p[i : i+raid.BlockBytes])
		if verdict == Tear || verdict == FailTorn {
			data = d.tear(d.at(block), data)
		}
		delete(d.unreadable, block)
		d.cache = append(d.cache, pending{block, data})
	}
	if len(d.cache) > 4096 { // a drive's cache is bounded: it writes the oldest itself
		for _, p := range d.cache[:2048] {
			d.media[p.block] = p.data
		}
		d.cache = slices.Clone(d.cache[2048:])
	}
	if verdict == FailTorn {
		return ErrIO
	}
	return nil
}

func (d *Disk) flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.ready(); err != nil {
		return err
	}
	d.stats.Flushes++
	d.drain()
	return nil
}
