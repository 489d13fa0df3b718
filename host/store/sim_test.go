package store

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ledge-storage/ledge/target"
)

var (
	seeds    = flag.Int("seeds", simSeeds, "how many seeds TestSimulation runs")
	fromSeed = flag.Uint64("from", 1, "the first of them")
)

const (
	simWorkers  = 3
	simContents = 4000
	// simSnapWithin is how long a snapshot may wait for another.
	simSnapWithin = 2 * time.Millisecond
)

// simulation drives a store with concurrent writers, cuts the power at a random write, opens the
// store as another host does, and compares every block with the model; and again.
type simulation struct {
	t     *testing.T
	seed  uint64
	sh    *shelf
	opt   Options
	model map[string]*modelVolume // volumes that surely exist
	snaps map[*modelVolume]bool   // snapshots that surely exist
	taken int                     // snapshots so far
	// doubt finds out what a cut left open.
	doubt func(st *Store)
	sums  *simSums
	// Of which checkpoint one copy was damaged, and which.
	damaged uint64
	second  bool
}

// modelVolume is what may be read: of each block the last acknowledged content, or one of those
// that were requested after it and not acknowledged. Contents are numbers, see content.
type modelVolume struct {
	name   string
	mu     sync.Mutex
	blocks [][]uint64
	sizes  []int64 // that it may have
	// during is the snapshot that is being taken: what is written meanwhile it may have, or not.
	during *modelVolume
	// Of a snapshot: the volume that it is of. Of a clone: the snapshot that it began as.
	of     *modelVolume
	origin *modelVolume
	number int
}

// copy is what the volume may be now.
func (m *modelVolume) copy(name string) *modelVolume {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &modelVolume{name: name, sizes: slices.Clone(m.sizes)}
	for _, b := range m.blocks {
		c.blocks = append(c.blocks, slices.Clone(b))
	}
	return c
}

// content is block number n of all that there are: 0 is zeros; there are few, so that most
// are duplicates; odd ones compress. Half of them end in their own CRC-32C, as blocks of ext4's directories do: a CRC-32C
// over such a block is the same whatever else is in it.
func content(n uint64) []byte { return contents()[n] }

var contents = sync.OnceValue(func() [][]byte {
	all := make([][]byte, simContents)
	for n := range all {
		all[n] = makeContent(uint64(n))
	}
	return all
})

func makeContent(n uint64) []byte {
	if n == 0 {
		return make([]byte, BlockBytes)
	}
	p := noise(n, 1)
	if n%2 != 0 {
		p = bytes.Repeat([]byte(fmt.Sprintf("block %8d of the model ", n)), 200)[:BlockBytes]
	}
	if n&2 != 0 {
		le.PutUint32(p[BlockBytes-4:], crc(p[:BlockBytes-4]))
	}
	return p
}

func newModelVolume(name string) *modelVolume {
	v := &modelVolume{name: name, blocks: make([][]uint64, simBlocks), sizes: []int64{simBlocks * BlockBytes}}
	for i := range v.blocks {
		v.blocks[i] = []uint64{0}
	}
	return v
}

func TestSimulation(t *testing.T) {
	n := *seeds
	if testing.Short() {
		n = min(n, 4)
	}
	workers := runtime.GOMAXPROCS(0)
	var ran, broken atomic.Int64
	sums := simSums{of: map[string]int64{}}
	t.Cleanup(func() {
		t.Logf("%d seeds of stores of %d KiB segments: %v", ran.Load(), SegmentBytes>>10, sums.of)
		if ran.Load() < 1000 {
			return
		}
		for _, what := range simMust {
			if sums.of[what] == 0 {
				t.Errorf("it never happened: %s", what)
			}
		}
	})
	for w := range workers {
		t.Run(fmt.Sprint("worker=", w), func(t *testing.T) {
			t.Parallel()
			for i := w; i < n && broken.Load() == 0; i += workers {
				seed := *fromSeed + uint64(i)
				if !t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { simulate(t, seed, &sums) })
				}) {
					broken.Add(1)
					t.Fatalf("replay with -run TestSimulation -from %d -seeds 1", seed)
				}
				ran.Add(1)
			}
		})
	}
}

// simSums counts what happened in all seeds.
type simSums struct {
	mu sync.Mutex
	of map[string]int64
}

func (s *simSums) add(what string, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[what] += n
}

var simMust = []string{"segments written", "segments freed", "blocks moved", "checkpoints", "duplicates", "duplicates beside another", "overwritten before they were packed", "power cuts", "cuts in opening",
	"segments replayed", "segments beside the log replayed", "blocks stored beside the log", "segments beside the log sealed in time", "checkpoints read from their second copy", "segments of the log without what they refer to", "records replayed", "no space", "lines from the cache", "lies of the cache", "bad lines found",
	"pages read", "pages written", "pages written again", "pages of deleted volumes read"}

// take adds up what a store did that has stopped.
func (s *simulation) take(st *Store) {
	c := &st.counters
	for what, n := range map[string]int64{"segments written": c.segmentsWritten, "segments freed": c.segmentsFreed, "blocks moved": c.blocksMoved,
		"checkpoints": c.checkpoints, "duplicates": c.duplicates, "duplicates beside another": c.beside, "overwritten before they were packed": c.absorbed, "segments replayed": c.replayedSegments,
		"segments beside the log replayed": c.replayedAside, "blocks stored beside the log": c.aside, "segments beside the log sealed in time": c.asideInTime,
		"checkpoints read from their second copy": c.copiesRead, "segments of the log without what they refer to": c.shortSegments, "records replayed": c.replayedRecords, "bad lines found": c.badLines,
		"pages read": c.pagesRead, "pages written": c.pagesWritten, "pages written again": c.pagesAgain, "pages of deleted volumes read": c.latePages} {
		s.sums.add(what, n)
	}
}

// lyingCache is a flash cache that keeps what it likes, and now and then gives a line with a bit turned over, or another line.
type lyingCache struct {
	mu    sync.Mutex
	lines map[lineKey][]byte
	rng   *rand.Rand
	sums  *simSums
}

func (c *lyingCache) Read(_ [16]byte, segment uint32, line int, p []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.lines[lineKey{segment, line}]
	switch what := c.rng.IntN(20); {
	case b == nil || what < 3:
		return false
	case what == 3:
		for k, other := range c.lines {
			if k != (lineKey{segment, line}) {
				b = other
				break
			}
		}
		fallthrough
	default:
		copy(p, b)
		if what == 4 {
			p[c.rng.IntN(len(p))] ^= 1 << c.rng.IntN(8)
		}
		if what <= 4 {
			c.sums.add("lies of the cache", 1)
		}
		c.sums.add("lines from the cache", 1)
		return true
	}
}

func (c *lyingCache) Write(_ [16]byte, segment uint32, line int, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rng.IntN(4) > 0 {
		c.lines[lineKey{segment, line}] = bytes.Clone(p)
	}
}

func simulate(t *testing.T, seed uint64, sums *simSums) {
	rng := rand.New(rand.NewPCG(seed, 0))
	s := &simulation{t: t, seed: seed, sh: newShelf(t, seed), model: map[string]*modelVolume{}, snaps: map[*modelVolume]bool{}, sums: sums}
	s.sh.p.jitter = true
	s.opt = s.sh.options()
	s.opt.CheckpointSegments = 1 + rng.IntN(4)
	s.opt.Workers = 1 + rng.IntN(2)
	s.opt.PackDelay = []time.Duration{-1, -1, time.Millisecond, time.Hour}[rng.IntN(4)]
	if rng.IntN(3) == 0 {
		s.opt.CapacityBytes = int64(simLeast+rng.IntN(25-simLeast)) * SegmentBytes // the cleaner works
	}
	if rng.IntN(2) == 0 {
		s.opt.MapBytes = 1 + rng.Int64N(40*pageBytes) // what is little for the maps
	}
	s.opt.coldTimes = []float64{0.3, 1, 1, coldTimes}[rand.New(rand.NewPCG(seed, 4)).IntN(4)]
	if seed%3 == 0 {
		s.opt.IndexBytes = 1 << 11 // room for 256 of the contents
	}
	if rng.IntN(2) == 0 {
		s.opt.Cache = &lyingCache{lines: map[lineKey][]byte{}, rng: rand.New(rand.NewPCG(seed, 3)), sums: sums}
	}
	const lives = 5
	for life := range lives {
		// Cuts fall anywhere: in recovery, in the first writes, in the middle, late.
		cutAt := []int{1 + rng.IntN(6), 1 + rng.IntN(40), 1 + rng.IntN(400), 0}[rng.IntN(4)]
		if life == lives-1 {
			cutAt = 0
		}
		s.sh.repower(cutAt)
		s.damage(rand.New(rand.NewPCG(seed, 5+uint64(life))))
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		st, err := Open(ctx, s.opt)
		if err == nil {
			s.compare(ctx, st)
			s.work(ctx, st, rng.Uint64())
			if rng.IntN(2) == 0 {
				st.Close(ctx)
			} else {
				st.stop()
			}
			s.take(st)
		} else if !s.cut() {
			t.Fatalf("life %d: open: %v", life, err)
		} else {
			sums.add("cuts in opening", 1)
		}
		if s.cut() {
			sums.add("power cuts", 1)
		}
		cancel()
		if t.Failed() {
			t.Fatalf("life %d", life)
		}
	}
	s.sh.repower(0)
	st := open(t, s.opt)
	s.compare(t.Context(), st)
	checkCounts(t, st)
	must(t, st.Close(t.Context()))
}

// damage turns a bit over in one of the two copies of the checkpoint, in every third opening.
func (s *simulation) damage(rng *rand.Rand) {
	super, blank, err := readSuper(s.t.Context(), s.sh.journal)
	must(s.t, err)
	if blank || super.ckptCopy == 0 || rng.IntN(3) > 0 {
		return
	}
	second := rng.IntN(2) == 0
	if s.damaged == super.ckptID && s.second != second {
		return
	}
	s.damaged, s.second = super.ckptID, second
	n, count := super.ckptFrom, super.ckptSegs
	if second {
		n, count = n+count, super.ckptCopy
	}
	at := int64(n+uint32(rng.IntN(int(count))))*SegmentBytes + trailerOffset // whatever pages there are stay whole
	s.sh.p.mu.Lock()
	defer s.sh.p.mu.Unlock()
	p := bytes.Clone(s.sh.segments.pages[at])
	p[rng.IntN(BlockBytes)] ^= 1 << rng.IntN(8)
	s.sh.segments.pages[at] = p
	s.sums.add("copies of a checkpoint damaged", 1)
}

func (s *simulation) cut() bool {
	s.sh.p.mu.Lock()
	defer s.sh.p.mu.Unlock()
	return s.sh.p.cut
}

// bad reports err unless it is the power's.
func (s *simulation) bad(st *Store, what string, err error) bool {
	if err == nil || s.cut() || isNoSpace(err) {
		return false
	}
	s.t.Errorf("%s: %v", what, err)
	return true
}

// compare reads everything, and makes what was read the only truth from now on.
func (s *simulation) compare(ctx context.Context, st *Store) {
	if s.doubt != nil {
		s.doubt(st)
		s.doubt = nil
	}
	if n := len(st.Volumes()); n != len(s.model) {
		s.t.Errorf("%d volumes, the model has %d", n, len(s.model))
	}
	list, err := st.Snapshots("")
	if err != nil || len(list) != len(s.snaps) {
		s.t.Errorf("%d snapshots, the model has %d; %v", len(list), len(s.snaps), err)
	}
	for m := range s.snaps {
		v, err := st.OpenSnapshot(m.of.name, m.name)
		if err == nil {
			s.compareOne(ctx, st, v, m)
		} else {
			s.t.Errorf("snapshot %s@%s: %v", m.of.name, m.name, err)
		}
	}
	for name, m := range s.model {
		v, err := st.Volume(name)
		if err == nil {
			s.compareOne(ctx, st, v, m)
		} else {
			s.t.Errorf("volume %s: %v", name, err)
		}
	}
}

func (s *simulation) compareOne(ctx context.Context, st *Store, v *Volume, m *modelVolume) {
	name := m.name
	size, known := v.Info().SizeBytes, false
	for _, may := range m.sizes {
		known = known || may == size
	}
	if !known {
		s.t.Errorf("volume %s has %d bytes, the model %v", name, size, m.sizes)
	}
	m.sizes = []int64{size}
	const most = 16
	room := make([]byte, most*BlockBytes)
	for lba := uint64(0); lba < uint64(size/BlockBytes); lba += most {
		got := room[:min(most, uint64(size/BlockBytes)-lba)*BlockBytes]
		clear(got)
		if err := v.Read(ctx, lba, got); err != nil {
			s.bad(st, fmt.Sprint("read ", name, " blocks from ", lba), err)
			return
		}
		for i := range uint64(len(got) / BlockBytes) {
			s.check(m, lba+i, got[i*BlockBytes:][:BlockBytes], true)
		}
	}
}

func (s *simulation) check(m *modelVolume, lba uint64, got []byte, settle bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.blocks[lba] {
		if bytes.Equal(got, content(n)) {
			if settle {
				m.blocks[lba] = []uint64{n}
			}
			return
		}
	}
	s.t.Errorf("volume %s block %d holds %.40q, the model says %v", m.name, lba, got, m.blocks[lba])
}

// work runs the writers until they are done or the power is cut. Each has blocks of its own.
func (s *simulation) work(ctx context.Context, st *Store, seed uint64) {
	var wg sync.WaitGroup
	rng := rand.New(rand.NewPCG(seed, 1))
	s.administrate(ctx, st, rng)
	for _, m := range s.model {
		v, err := st.Volume(m.name)
		if err != nil {
			continue // its deletion was on its way
		}
		for w := range simWorkers {
			wg.Go(func() { s.writer(ctx, st, v, m, w, rand.New(rand.NewPCG(seed, uint64(w)+2))) })
		}
	}
	for range rng.IntN(4) { // copies of what is being written
		time.Sleep(time.Duration(rng.Int64N(int64(simSnapWithin))))
		name := []string{"a", "b", "c"}[rng.IntN(3)]
		if s.model[name] == nil || s.doubt != nil || s.cut() {
			continue
		}
		s.snapshot(ctx, st, s.model[name])
	}
	wg.Wait()
}

// administrate creates, deletes and resizes, one thing at a time.
func (s *simulation) administrate(ctx context.Context, st *Store, rng *rand.Rand) {
	for range 3 {
		name := []string{"a", "b", "c"}[rng.IntN(3)]
		m := s.model[name]
		if m == nil {
			m = newModelVolume(name)
			_, err := st.CreateVolume(ctx, name, simBlocks*BlockBytes)
			if s.bad(st, "create", err) {
				return
			}
			if err != nil {
				s.doubt = s.maybe(name, m)
				return
			}
			s.model[name] = m
			continue
		}
		switch rng.IntN(10) {
		case 0, 1:
			err := st.DeleteVolume(ctx, name)
			if errors.Is(err, ErrHasSnapshots) {
				if len(s.snapshotsOf(m)) == 0 {
					s.t.Errorf("volume %s has no snapshots, but %v", name, err)
				}
				continue
			}
			if err == nil && len(s.snapshotsOf(m)) > 0 {
				s.t.Errorf("volume %s was deleted under its snapshots", name)
			}
			delete(s.model, name)
			if s.bad(st, "delete", err) || err != nil {
				s.doubt = s.maybe(name, m)
				return
			}
			continue
		case 2, 3:
			s.snapshot(ctx, st, m)
		case 4, 5, 6:
			if snaps := s.snapshotsOf(m); len(snaps) > 0 {
				s.useSnapshot(ctx, st, rng, m, snaps[rng.IntN(len(snaps))])
			}
		case 7:
			s.promote(ctx, st, m)
		case 8:
			s.rename(ctx, st, m, []string{"a", "b", "c", "d"}[rng.IntN(4)])
			name = m.name
		case 9:
			if err := st.SetCompression(ctx, name, Compression(rng.IntN(int(compressions)))); s.bad(st, "compression", err) {
				return
			}
		}
		if s.doubt != nil || s.cut() {
			return
		}
		size := int64(simBlocks/3+rng.IntN(simBlocks*2/3+1)) * BlockBytes
		old := m.sizes[0]
		cutOff := func() {
			for lba := size / BlockBytes; lba < simBlocks; lba++ {
				if lba < old/BlockBytes {
					m.blocks[lba] = append(m.blocks[lba], 0)
				}
			}
		}
		if err := st.ResizeVolume(ctx, name, size); s.bad(st, "resize", err) || err != nil {
			m.sizes = append(m.sizes, size)
			cutOff()
			return
		}
		m.sizes = []int64{size}
		for lba := size / BlockBytes; lba < simBlocks; lba++ {
			m.blocks[lba] = []uint64{0}
		}
	}
}

// may adds n to what the block may hold.
func (m *modelVolume) may(lba, n uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blocks[lba] = append(m.blocks[lba], n)
	if d := m.during; d != nil {
		d.blocks[lba] = append(d.blocks[lba], n)
	}
}

// maybe is the doubt whether volume name, which is m, exists.
func (s *simulation) maybe(name string, m *modelVolume) func(st *Store) {
	return func(st *Store) {
		delete(s.model, name)
		if _, err := st.Volume(name); err == nil {
			s.model[name] = m
		}
	}
}

// snapshotsOf is in the order in which they were taken.
func (s *simulation) snapshotsOf(m *modelVolume) (list []*modelVolume) {
	for x := range s.snaps {
		if x.of == m {
			list = append(list, x)
		}
	}
	slices.SortFunc(list, func(a, b *modelVolume) int { return a.number - b.number })
	return list
}

// snapshot takes one, while writers may be at work.
func (s *simulation) snapshot(ctx context.Context, st *Store, m *modelVolume) {
	s.taken++
	snap := m.copy(fmt.Sprint("s", s.taken%4))
	snap.number, snap.of = s.taken, m
	exists := slices.ContainsFunc(s.snapshotsOf(m), func(x *modelVolume) bool { return x.name == snap.name })
	if !exists {
		m.mu.Lock()
		for i, b := range m.blocks { // what began before copy and was added after it
			snap.blocks[i] = append(snap.blocks[i], b...)
		}
		m.during = snap
		m.mu.Unlock()
	}
	_, err := st.Snapshot(ctx, snap.name, m.name)
	m.mu.Lock()
	m.during = nil
	m.mu.Unlock()
	switch {
	case exists && (err == nil || !errors.Is(err, ErrExists) && !s.cut()):
		s.t.Errorf("a second snapshot %s of %s: %v", snap.name, m.name, err)
	case exists:
	case err == nil:
		s.snaps[snap] = true
	case !s.bad(st, "snapshot", err):
		s.doubt = func(st *Store) {
			if _, err := st.OpenSnapshot(m.name, snap.name); err == nil {
				s.snaps[snap] = true
			}
		}
	}
}

// useSnapshot deletes it, makes a clone of it, or rolls its volume back.
func (s *simulation) useSnapshot(ctx context.Context, st *Store, rng *rand.Rand, m, snap *modelVolume) {
	switch rng.IntN(3) {
	case 0:
		err := st.DeleteSnapshot(ctx, m.name, snap.name)
		delete(s.snaps, snap)
		if err != nil && !s.bad(st, "delete snapshot", err) {
			s.doubt = func(st *Store) {
				if _, err := st.OpenSnapshot(m.name, snap.name); err == nil {
					s.snaps[snap] = true
				}
			}
		}
	case 1:
		name := []string{"a", "b", "c", "d"}[rng.IntN(4)]
		c := snap.copy(name)
		c.origin = snap
		_, err := st.Clone(ctx, m.name, snap.name, name)
		switch {
		case s.model[name] != nil && (err == nil || !errors.Is(err, ErrExists) && !s.cut()):
			s.t.Errorf("a second volume %s: %v", name, err)
		case s.model[name] != nil:
		case err == nil:
			s.model[name] = c
		case !s.bad(st, "clone", err):
			s.doubt = s.maybe(name, c)
		}
	case 2:
		now := snap.copy(m.name)
		err := st.Rollback(ctx, m.name, snap.name)
		if s.bad(st, "roll back", err) {
			return
		}
		if err == nil {
			m.blocks, m.sizes = now.blocks, now.sizes
			return
		}
		m.sizes = append(m.sizes, now.sizes...)
		for i := range m.blocks {
			m.blocks[i] = append(m.blocks[i], now.blocks[i]...)
		}
	}
}

func (s *simulation) rename(ctx context.Context, st *Store, m *modelVolume, to string) {
	apply := func() {
		delete(s.model, m.name)
		m.name = to
		s.model[to] = m
	}
	taken := s.model[to] != nil
	err := st.RenameVolume(ctx, m.name, to)
	switch {
	case taken && (err == nil || !errors.Is(err, ErrExists) && !s.cut()):
		s.t.Errorf("%s has the name of %s now: %v", m.name, to, err)
	case taken:
	case err == nil:
		apply()
	case !s.bad(st, "rename", err):
		s.doubt = func(st *Store) {
			if _, err := st.Volume(to); err == nil {
				apply()
			}
		}
	}
}

// promote turns a clone and its origin's volume round.
func (s *simulation) promote(ctx context.Context, st *Store, c *modelVolume) {
	origin := c.origin
	alive := origin != nil && s.snaps[origin]
	var moved []*modelVolume
	clash := false
	if alive {
		for _, x := range s.snapshotsOf(origin.of) {
			if x.number <= origin.number {
				moved = append(moved, x)
				clash = clash || slices.ContainsFunc(s.snapshotsOf(c), func(y *modelVolume) bool { return x.name == y.name })
			}
		}
	}
	apply := func() {
		v := origin.of
		v.origin, c.origin = origin, v.origin
		for _, x := range moved {
			x.of = c
		}
	}
	err := st.Promote(ctx, c.name)
	switch {
	case s.cut() && err != nil:
		if alive && !clash {
			s.doubt = func(st *Store) {
				if _, err := st.OpenSnapshot(c.name, origin.name); err == nil {
					apply()
				}
			}
		}
	case !alive && !errors.Is(err, ErrNoClone), alive && clash && !errors.Is(err, ErrExists):
		s.t.Errorf("promote %s: %v; origin alive: %v, names clash: %v", c.name, err, alive, clash)
	case alive && !clash && err != nil:
		s.t.Errorf("promote %s: %v", c.name, err)
	case alive && !clash:
		apply()
	}
}

// writer works on runs of 8 blocks, each the n-th of simWorkers.
func (s *simulation) writer(ctx context.Context, st *Store, v *Volume, m *modelVolume, w int, rng *rand.Rand) {
	limit := int(m.sizes[0] / BlockBytes)
	hot := rng.IntN(2) == 0 // half of its writes overwrite each other
	for range simOps {
		run := w
		if !hot || rng.IntN(2) == 0 {
			run += rng.IntN(limit/8/simWorkers) * simWorkers
		}
		lba := uint64(run*8 + rng.IntN(4))
		n := uint64(1 + rng.IntN(4))
		if lba+n > uint64(limit) {
			continue
		}
		if rng.IntN(4) == 0 {
			got := make([]byte, n*BlockBytes)
			if err := v.Read(ctx, lba, got); err != nil {
				s.bad(st, "read", err)
				return
			}
			for i := range n {
				s.check(m, lba+i, got[i*BlockBytes:(i+1)*BlockBytes], false)
			}
			continue
		}
		data := make([]byte, 0, n*BlockBytes)
		numbers := make([]uint64, n)
		zeros := rng.IntN(8) == 0
		for i := range numbers {
			if !zeros {
				numbers[i] = uint64(rng.IntN(simContents))
			}
			data = append(data, content(numbers[i])...)
			m.may(lba+uint64(i), numbers[i])
		}
		var err error
		if zeros {
			err = v.Zero(ctx, lba, n)
		} else {
			err = v.Write(ctx, lba, data)
		}
		switch {
		case err == nil:
			m.mu.Lock()
			for i, number := range numbers {
				m.blocks[lba+uint64(i)] = []uint64{number}
			}
			m.mu.Unlock()
		case isNoSpace(err): // nothing of it was written
			s.sums.add("no space", 1)
			m.mu.Lock()
			for i := range numbers {
				b := m.blocks[lba+uint64(i)]
				m.blocks[lba+uint64(i)] = b[:len(b)-1]
			}
			m.mu.Unlock()
		default:
			s.bad(st, "write", err)
			return
		}
	}
}

// placeOf is where a block is stored.
func placeOf(t testing.TB, v *Volume, lba uint64) loc {
	for {
		v.st.mu.RLock()
		p := v.m.absent(lba)
		if p == nil {
			defer v.st.mu.RUnlock()
			return v.m.get(lba)
		}
		v.st.mu.RUnlock()
		must(t, v.st.want(t.Context(), v.Meter(), p))
	}
}

// checkCounts compares what is counted with the maps.
func checkCounts(t *testing.T, st *Store) {
	must(t, st.Sync(t.Context()))
	st.mu.Lock()
	must(t, st.wait(t.Context(), func() bool { return len(st.dying) == 0 }))
	limit := st.maps.limit
	st.maps.limit = 1 << 40
	st.mu.Unlock()
	for { // the maps are brought into memory
		var absent []*page
		st.mu.RLock()
		for _, v := range st.volumes {
			v.m.each(func(_ uint64, p *page) {
				if p.at == nil {
					absent = append(absent, p)
				}
			})
		}
		if len(absent) == 0 {
			break
		}
		st.mu.RUnlock()
		for _, p := range absent {
			must(t, st.want(t.Context(), st.unmetered, p))
		}
	}
	defer func() {
		st.mu.RUnlock()
		st.mu.Lock()
		st.maps.limit = limit
		st.mu.Unlock()
	}()
	live, seen := map[uint32]int64{}, map[*page]int32{}
	is := mapUse{homes: map[uint32]*home{}}
	for _, v := range st.volumes {
		mapped := int64(0)
		v.m.each(func(_ uint64, p *page) {
			if seen[p]++; seen[p] == 1 {
				is.adopt(p)
			}
			count := uint16(0)
			for _, l := range p.at {
				if l != 0 {
					count++
					if seen[p] == 1 && l != lost {
						live[l.segment()]++
					}
				}
			}
			if mapped += int64(count); count != p.count {
				t.Errorf("a page of volume %s knows %d blocks, counted %d", v.name, count, p.count)
			}
		})
		if mapped != v.m.mapped {
			t.Errorf("volume %s: %d blocks mapped, counted %d", v.name, mapped, v.m.mapped)
		}
	}
	if m := &st.maps; is.pages != m.pages || is.resident != m.resident || is.dirty != m.dirty || len(st.dying) != 0 {
		t.Errorf("%d pages, counted %d; %d in memory, counted %d; %d changed, counted %d; %d maps to take apart", is.pages, m.pages, is.resident, m.resident, is.dirty, m.dirty,
			len(st.dying))
	}
	for n, h := range st.maps.homes {
		if x := is.homes[n]; x == nil && h.live != 0 || x != nil && x.live != h.live {
			t.Errorf("segment %d has %d bytes of pages, and %+v count", n, h.live, x)
		}
		delete(is.homes, n)
	}
	if len(is.homes) > 0 {
		t.Errorf("segments with pages that are not known: %v", is.homes)
	}
	for n, s := range st.segs {
		if live[n] != s.live {
			t.Errorf("segment %d: %d references, counted %d", n, live[n], s.live)
		}
		delete(live, n)
	}
	if len(live) > 0 {
		t.Errorf("references to segments that are none: %v", live)
	}
}

func isNoSpace(err error) bool { return errors.Is(err, target.ErrNoSpace) }
