package store

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

var (
	seeds    = flag.Int("seeds", 12, "how many seeds TestSimulation runs")
	fromSeed = flag.Uint64("from", 1, "the first of them")
)

const (
	simBlocks   = 3000
	simWorkers  = 3
	simContents = 4000
)

// simulation drives a store with concurrent writers, cuts the power at a random write, opens the
// store as another host does, and compares every block with the model; and again.
type simulation struct {
	t     *testing.T
	seed  uint64
	sh    *shelf
	opt   Options
	model map[string]*modelVolume // volumes that surely exist
	// doubt is what a cut left open of the volumes' list.
	doubt *doubtful
}

// modelVolume is what may be read: of each block the last acknowledged content, or one of those
// that were requested after it and not acknowledged. Contents are numbers, see content.
type modelVolume struct {
	name   string
	mu     sync.Mutex
	blocks [][]uint64
	sizes  []int64 // that it may have
}

type doubtful struct {
	name    string
	created bool // else deleted
	v       *modelVolume
}

// content is block number n of all that there are: 0 is zeros; there are few, so that most
// are duplicates; odd ones compress.
func content(n uint64) []byte { return contents()[n] }

var contents = sync.OnceValue(func() [][]byte {
	all := make([][]byte, simContents)
	for n := range all {
		all[n] = makeContent(uint64(n))
	}
	return all
})

func makeContent(n uint64) []byte {
	switch {
	case n == 0:
		return make([]byte, BlockBytes)
	case n%2 == 0:
		return noise(n, 1)
	}
	return bytes.Repeat([]byte(fmt.Sprintf("block %8d of the model ", n)), 200)[:BlockBytes]
}

func newModelVolume(name string) *modelVolume {
	v := &modelVolume{name: name, blocks: make([][]uint64, simBlocks), sizes: []int64{simBlocks * BlockBytes}}
	for i := range v.blocks {
		v.blocks[i] = []uint64{0}
	}
	return v
}

func TestSimulation(t *testing.T) {
	for i := range *seeds {
		seed := *fromSeed + uint64(i)
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { simulate(t, seed) })
		if t.Failed() {
			t.Fatalf("replay with -run TestSimulation -from %d -seeds 1", seed)
		}
	}
}

func simulate(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0))
	s := &simulation{t: t, seed: seed, sh: newShelf(t, seed), model: map[string]*modelVolume{}}
	s.sh.p.jitter = true
	s.opt = s.sh.options()
	s.opt.CheckpointSegments = 1 + rng.IntN(4)
	s.opt.Workers = 1 + rng.IntN(2)
	if rng.IntN(3) == 0 {
		s.opt.CapacityBytes = 24 * SegmentBytes // the cleaner works
	}
	const lives = 5
	for life := range lives {
		// Cuts fall anywhere: in recovery, in the first writes, in the middle, late.
		cutAt := []int{1 + rng.IntN(6), 1 + rng.IntN(40), 1 + rng.IntN(400), 0}[rng.IntN(4)]
		if life == lives-1 {
			cutAt = 0
		}
		s.sh.repower(cutAt)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		st, err := Open(ctx, s.opt)
		if err == nil {
			s.compare(ctx, st)
			s.work(ctx, st, rng.Uint64())
			if rng.IntN(2) == 0 {
				st.Close(ctx)
			} else {
				st.stop()
			}
		} else if !s.cut() {
			t.Fatalf("life %d: open: %v", life, err)
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
	if d := s.doubt; d != nil {
		_, err := st.Volume(d.name)
		if err == nil {
			s.model[d.name] = d.v
		} else {
			delete(s.model, d.name)
		}
		s.doubt = nil
	}
	if n := len(st.Volumes()); n != len(s.model) {
		s.t.Errorf("%d volumes, the model has %d", n, len(s.model))
	}
	for name, m := range s.model {
		v, err := st.Volume(name)
		if err != nil {
			s.t.Errorf("volume %s: %v", name, err)
			continue
		}
		size, known := v.Info().SizeBytes, false
		for _, may := range m.sizes {
			known = known || may == size
		}
		if !known {
			s.t.Errorf("volume %s has %d bytes, the model %v", name, size, m.sizes)
		}
		m.sizes = []int64{size}
		got := make([]byte, BlockBytes)
		for lba := range uint64(size / BlockBytes) {
			if err := v.Read(ctx, lba, got); err != nil {
				if s.bad(st, fmt.Sprint("read ", name, " block ", lba), err) {
					return
				}
				return
			}
			s.check(m, lba, got, true)
		}
	}
}

func (s *simulation) check(m *modelVolume, lba uint64, got []byte, settle bool) {
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
				s.doubt = &doubtful{name: name, created: true, v: m}
				return
			}
			s.model[name] = m
			continue
		}
		if rng.IntN(4) == 0 {
			delete(s.model, name)
			if err := st.DeleteVolume(ctx, name); s.bad(st, "delete", err) || err != nil {
				s.doubt = &doubtful{name: name, v: m}
				return
			}
			continue
		}
		size := int64(1000+rng.IntN(simBlocks-999)) * BlockBytes
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

// writer works on runs of 8 blocks, each the n-th of simWorkers.
func (s *simulation) writer(ctx context.Context, st *Store, v *Volume, m *modelVolume, w int, rng *rand.Rand) {
	limit := int(m.sizes[0] / BlockBytes)
	for range 150 {
		run := rng.IntN(limit/8/simWorkers)*simWorkers + w
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
		var data []byte
		numbers := make([]uint64, n)
		zeros := rng.IntN(8) == 0
		for i := range numbers {
			if !zeros {
				numbers[i] = uint64(rng.IntN(simContents))
			}
			data = append(data, content(numbers[i])...)
			m.blocks[lba+uint64(i)] = append(m.blocks[lba+uint64(i)], numbers[i])
		}
		var err error
		if zeros {
			err = v.Zero(ctx, lba, n)
		} else {
			err = v.Write(ctx, lba, data)
		}
		switch {
		case err == nil:
			for i, number := range numbers {
				m.blocks[lba+uint64(i)] = []uint64{number}
			}
		case isNoSpace(err): // nothing of it was written
			for i := range numbers {
				b := m.blocks[lba+uint64(i)]
				m.blocks[lba+uint64(i)] = b[:len(b)-1]
			}
		default:
			s.bad(st, "write", err)
			return
		}
	}
}

// checkCounts compares the live counts with the maps.
func checkCounts(t *testing.T, st *Store) {
	must(t, st.Sync(t.Context()))
	st.mu.RLock()
	defer st.mu.RUnlock()
	live, pages := map[uint32]int64{}, int64(0)
	for _, v := range st.volumes {
		mapped := int64(0)
		v.m.each(func(_ uint64, p *page) {
			for _, l := range p {
				if l != 0 {
					live[l.segment()]++
					mapped++
				}
			}
		})
		pages += v.m.pages
		if mapped != v.m.mapped {
			t.Errorf("volume %s: %d blocks mapped, counted %d", v.name, mapped, v.m.mapped)
		}
	}
	if pages != st.mapPages {
		t.Errorf("%d pages, counted %d", pages, st.mapPages)
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
