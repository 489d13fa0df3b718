package nvram_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// world is an owner, its standby and the members' witness, and what was promised so far.
type world struct {
	t       testing.TB
	seed    uint64
	owner   *nvramtest.Region
	standby *nvramtest.Region
	witness *nvramtest.Witness
	partner *nvramtest.Partner
	log     *nvram.Log
	liar    bool
	timeout time.Duration

	mu      sync.Mutex
	name    uint64            // of the last set
	acked   map[uint64]uint64 // name → LSN
	trimmed [2]uint64
}

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{t: t, seed: seed, owner: newRegion(seed), standby: newRegion(seed + 1), witness: &nvramtest.Witness{}, acked: map[uint64]uint64{}, timeout: 3 * time.Millisecond}
	format(t, w.owner)
	return w
}

func (w *world) mirror() *nvram.Mirror {
	m, err := nvram.OpenMirror(w.standby, smallArea)
	if err != nil {
		w.t.Fatalf("seed %d: %v", w.seed, err)
	}
	return m
}

// start opens the owner's log, with a standby or none.
func (w *world) start(m *nvram.Mirror) error {
	w.partner = nvramtest.NewPartner(m)
	w.partner.AckEarly = w.liar
	var err error
	w.log, err = nvram.Open(context.Background(), w.owner, smallArea, nvram.Options{
		ID: logID, Epoch: 1, Replicator: w.partner, Witness: w.witness, MirrorTimeout: w.timeout,
	})
	return err
}

// add appends one or two sets and notes the promise.
func (w *world) add(rng *rand.Rand) error {
	kind := uint8(nvram.KindWrite)
	if rng.IntN(3) == 0 {
		kind = nvram.KindUpdate
	} else if rng.IntN(5) == 0 {
		kind = nvram.KindInternal
	}
	w.mu.Lock()
	w.name++
	sets := []nvram.Set{set(w.name, kind, 1+rng.IntN(2))}
	names := []uint64{w.name}
	if rng.IntN(3) == 0 {
		w.name++
		sets = append(sets, set(w.name, kind, 1))
		names = append(names, w.name)
	}
	w.mu.Unlock()
	lsn, err := w.log.Append(context.Background(), sets...)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range names {
		w.acked[n] = lsn
	}
	return nil
}

// trim gives up all of a lane but the newest few records, as destage does.
func (w *world) trim(lane int, keep uint64) {
	w.mu.Lock()
	lsn := uint64(0)
	for _, l := range w.acked {
		lsn = max(lsn, l)
	}
	lsn -= min(lsn, keep)
	w.trimmed[lane] = max(w.trimmed[lane], lsn)
	w.mu.Unlock()
	if lane == 0 {
		w.log.Trim(lsn)
	} else {
		w.log.TrimUpdates(lsn)
	}
}

// retrim gives up again what an earlier run gave up: its room may not have become free.
func (w *world) retrim() {
	w.log.Trim(w.trimmed[0])
	w.log.TrimUpdates(w.trimmed[1])
}

// promised is a snapshot of what must be there: acknowledged, not given up. Which lane a set is in is not
// noted, so both trims must have spared it.
func (w *world) promised() map[uint64]uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := maps.Clone(w.acked)
	maps.DeleteFunc(p, func(_, lsn uint64) bool { return lsn < max(w.trimmed[0], w.trimmed[1]) })
	return p
}

// holds says whether r replays all that was promised, and nothing that was never appended.
func (w *world) holds(r replayer, promised map[uint64]uint64) error {
	got, err := replayed(r)
	if err != nil {
		return err
	}
	for name, lsn := range promised {
		if got[name] != lsn {
			return fmt.Errorf("set %d, acknowledged as lsn %d, is at %d of %v", name, lsn, got[name], got)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name := range got {
		if name == 0 || name > w.name {
			return fmt.Errorf("set %d was never appended", name)
		}
	}
	return nil
}

// judge checks P1 on the media as they are: with the owner's log closed or dead, and the standby's power back.
func (w *world) judge(promised map[uint64]uint64, solo bool) error {
	w.owner.Restore()
	w.standby.Restore()
	l, err := nvram.Open(context.Background(), w.owner, smallArea, nvram.Options{ID: logID, Epoch: 1})
	if err != nil {
		return fmt.Errorf("open the own log: %w", err)
	}
	defer l.Close()
	if err := w.holds(l, promised); err != nil {
		return fmt.Errorf("own log: %w", err)
	}
	if solo {
		return nil
	}
	m, err := nvram.OpenMirror(w.standby, smallArea)
	if err != nil {
		return err
	}
	if len(promised) > 0 && !m.Complete(logID, 1) {
		return fmt.Errorf("the members do not say solo, and the mirror is not complete: %+v (%v)", m.State(), m.Damage())
	}
	if m.Complete(logID, 1) {
		if err := w.holds(m, promised); err != nil {
			return fmt.Errorf("mirror: %w", err)
		}
	}
	return nil
}

// settle reconnects a standby and waits until the members say that all is well.
func (w *world) settle(m *nvram.Mirror) {
	w.partner.Connect(m)
	for i := 0; w.log.Stats().Mirror != nvram.MirrorInSync; i++ {
		if i > 20000 {
			w.t.Fatalf("seed %d: never in sync: %+v", w.seed, w.log.Stats())
		}
		time.Sleep(time.Millisecond / 2)
	}
	for {
		if solo, _ := w.witness.Solo(); !solo {
			return
		}
		time.Sleep(time.Millisecond / 2)
	}
}

// work is a fixed sequence of appends and trims that goes round both lanes.
func (w *world) work(n int) error {
	rng := rand.New(rand.NewPCG(w.seed, 7))
	w.retrim()
	for range n {
		if err := w.add(rng); err != nil {
			return err
		}
		w.trim(0, 1)
		w.trim(1, 1)
	}
	return nil
}

// The owner's power goes at every write to its region in turn: while opening, appending, trimming. Then it restarts,
// goes on in a new run with the standby, and must end with the same in both.
func TestPowerCutOwner(t *testing.T) {
	for _, granule := range []int{512, 8} {
		cuts := 0
		for n := 1; ; n++ {
			w := newWorld(t, uint64(n))
			w.owner = nvramtest.NewRegion(w.owner.Size(), granule, uint64(n))
			format(t, w.owner)
			w.owner.CutAt(n)
			err := w.start(w.mirror())
			if err == nil {
				err = w.work(50)
				solo, _ := w.witness.Solo()
				w.log.Close()
				if !w.owner.Off() && err == nil {
					break // past the last write
				}
				if !errors.Is(err, nvram.ErrClosed) && err != nil {
					t.Fatalf("cut %d: %v", n, err)
				}
				if err := w.judge(w.promised(), solo); err != nil {
					t.Fatalf("granule %d, cut %d: %v", granule, n, err)
				}
			}
			cuts++
			w.owner.Restore()
			if err := w.start(w.mirror()); err != nil {
				t.Fatalf("granule %d, cut %d: restart: %v", granule, n, err)
			}
			if err := w.log.Settle(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := w.work(8); err != nil {
				t.Fatal(err)
			}
			w.settle(nil)
			w.log.Close()
			if err := w.judge(w.promised(), false); err != nil {
				t.Fatalf("granule %d, cut %d, after the restart: %v", granule, n, err)
			}
		}
		if cuts < 40 {
			t.Fatalf("only %d cuts", cuts)
		}
	}
}

// The standby's power goes at every write to its mirror in turn. The owner goes on alone; the standby comes back and is
// brought current.
func TestPowerCutStandby(t *testing.T) {
	cuts := 0
	for n := 1; ; n++ {
		w := newWorld(t, uint64(n))
		w.timeout = 60 * time.Millisecond // solo only when the standby is off
		m := w.mirror()
		w.standby.CutAt(n)
		if err := w.start(m); err != nil {
			t.Fatal(err)
		}
		for w.log.Stats().Mirror != nvram.MirrorInSync && !w.standby.Off() {
			time.Sleep(time.Millisecond / 2)
		}
		if err := w.work(16); err != nil {
			t.Fatal(err)
		}
		off := w.standby.Off()
		w.partner.Cut()
		promised := w.promised()
		solo, _ := w.witness.Solo()
		if off {
			cuts++
			w.standby.Restore()
			if m := w.mirror(); !solo && m.Complete(logID, 1) {
				if err := w.holds(m, promised); err != nil {
					t.Fatalf("cut %d: %v", n, err)
				}
			} else if !solo && len(promised) > 0 {
				t.Fatalf("cut %d: not solo, and the mirror is not complete", n)
			}
			w.settle(w.mirror())
		}
		w.log.Close()
		if err := w.judge(w.promised(), false); off && err != nil {
			t.Fatalf("cut %d, after the resync: %v", n, err)
		}
		if !off {
			break
		}
	}
	if cuts < 20 {
		t.Fatalf("only %d cuts", cuts)
	}
}

// seeds to run: a number of them, or the one in LEDGE_SEED.
func seeds(n int) []uint64 {
	if s, err := strconv.ParseUint(os.Getenv("LEDGE_SEED"), 10, 64); err == nil {
		return []uint64{s}
	}
	all := make([]uint64, n)
	for i := range all {
		all[i] = uint64(i + 1)
	}
	return all
}

// run is one random history: three writers, a destager, links and standbys that come and go, members that
// refuse; the owner's and the standby's power is cut at some moment, several times over.
func (w *world) run() error {
	rng := rand.New(rand.NewPCG(w.seed, 99))
	for life := range 1 + rng.IntN(3) {
		hold := func(off int64, _ int) {
			for range (off / block * 7) % 13 {
				runtime.Gosched()
			}
			if off/block%5 == 0 {
				time.Sleep(20 * time.Microsecond)
			}
		}
		w.owner.Hold, w.standby.Hold = hold, hold
		var m *nvram.Mirror
		if rng.IntN(4) > 0 {
			m = w.mirror()
		}
		if err := w.start(m); err != nil {
			return fmt.Errorf("life %d: %w", life, err)
		}
		if err := w.holds(w.log, w.promised()); err != nil {
			return fmt.Errorf("life %d: own log: %w", life, err)
		}
		w.retrim()
		promised, solo := w.live(rng)
		if err := w.judge(promised, solo); err != nil {
			return fmt.Errorf("life %d: %w", life, err)
		}
	}
	return nil
}

// live runs the owner until its power goes and returns what was promised just before, and what the members said.
func (w *world) live(rng *rand.Rand) (promised map[uint64]uint64, solo bool) {
	var writers sync.WaitGroup
	for i := range 3 {
		r := rand.New(rand.NewPCG(w.seed, uint64(i)))
		writers.Go(func() {
			for w.add(r) == nil {
				w.trim(r.IntN(2), uint64(1+r.IntN(4)))
			}
		})
	}
	for range rng.IntN(12) {
		switch rng.IntN(7) {
		case 0:
			w.partner.Cut()
		case 1, 2:
			w.partner.Connect(nil)
		case 3: // the standby restarts, at times without having had time to end a write
			w.partner.Cut()
			w.standby.CutAt(1 + rng.IntN(3))
			time.Sleep(time.Millisecond)
			w.standby.Cut()
			w.standby.Restore()
			w.partner.Connect(w.mirror())
		case 4:
			w.witness.SetFail(errors.New("no majority"), rng.IntN(2) == 0)
			time.Sleep(time.Millisecond)
			w.witness.SetFail(nil, false)
		case 5:
			if rng.IntN(3) == 0 && w.log.Stats().Mirror == nvram.MirrorSolo {
				w.partner.Cut()
				w.standby.Load(nil) // its NVRAM was exchanged
				w.partner.Connect(w.mirror())
			}
		}
		time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
	}
	if rng.IntN(2) == 0 {
		w.owner.CutAt(1 + rng.IntN(4))
		time.Sleep(time.Millisecond)
	}
	promised = w.promised()
	w.owner.Cut()
	solo, _ = w.witness.Solo()
	w.standby.Cut()
	w.log.Close()
	writers.Wait()
	maps.DeleteFunc(promised, func(_, lsn uint64) bool { return lsn < max(w.trimmed[0], w.trimmed[1]) }) // given up since
	return promised, solo
}

func TestRandomHistories(t *testing.T) {
	n := 150
	if testing.Short() {
		n = 20
	}
	for _, seed := range seeds(n) {
		w := newWorld(t, seed)
		if err := w.run(); err != nil {
			t.Fatalf("LEDGE_SEED=%d: %v", seed, err)
		}
	}
}

// The same histories with a partner that acknowledges before its write is durable: the judge must notice.
func TestLyingPartnerIsCaught(t *testing.T) {
	for seed := uint64(1); seed < 400; seed++ {
		w := newWorld(t, seed)
		w.liar = true
		if err := w.run(); err != nil {
			t.Logf("seed %d: %v", seed, err)
			return
		}
	}
	t.Fatal("a partner that acknowledges too early went unnoticed")
}
