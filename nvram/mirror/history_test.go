package mirror

import (
	"context"
	"maps"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

// TestRandomLinks: over real connections, the cable is cut and mended, the standby restarts, the owner dies at some
// moment. Every set acknowledged before is in the own log, and in the mirror unless the members say solo; then the
// owner restarts, and both are the same in the end.
func TestRandomLinks(t *testing.T) {
	n, only := uint64(12), os.Getenv("LEDGE_SEED")
	if testing.Short() {
		n = 3
	}
	for seed := uint64(1); seed <= n; seed++ {
		if only != "" {
			seed, _ = strconv.ParseUint(only, 10, 64)
			n = seed
		}
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) { randomLinks(t, seed) })
	}
}

func randomLinks(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 3))
	p := newPair(t)
	slow := time.Duration(rng.IntN(300)) * time.Microsecond
	p.other.Hold = func(int64, int) { time.Sleep(slow) }
	p.b.Receive(p.mirror(), 0)
	l := p.open(nvram.Options{MirrorTimeout: 10 * time.Millisecond})

	var mu sync.Mutex
	acked, name, trimmed := map[uint64]uint64{}, uint64(0), uint64(0)
	var writers sync.WaitGroup
	for range 3 {
		writers.Go(func() {
			for {
				mu.Lock()
				name++
				mine := name
				mu.Unlock()
				lsn, err := l.Append(context.Background(), set(mine, 1+int(mine%3)))
				if err != nil {
					return
				}
				mu.Lock()
				acked[mine] = lsn
				if mine%8 == 0 && lsn > 6 {
					trimmed = max(trimmed, lsn-6)
					l.Trim(trimmed)
				}
				mu.Unlock()
			}
		})
	}
	for range 2 + rng.IntN(10) {
		switch rng.IntN(4) {
		case 0:
			p.cable.set(true)
		case 1, 2:
			p.cable.set(false)
		case 3:
			p.b.StopReceiving()
			p.b.Receive(p.mirror(), 0)
		}
		time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
	}
	mu.Lock()
	promised := maps.Clone(acked)
	mu.Unlock()
	p.own.Cut()
	solo, _ := p.witness.Solo()
	l.Close()
	writers.Wait()
	p.b.StopReceiving()
	p.own.Restore()
	needed := func() map[uint64]uint64 {
		n := maps.Clone(promised)
		maps.DeleteFunc(n, func(_, lsn uint64) bool { return lsn < trimmed })
		return n
	}
	holds := func(what string, r replayer) {
		t.Helper()
		got := names(t, r)
		for name, lsn := range needed() {
			if !got[name] {
				t.Fatalf("LEDGE_SEED=%d: %s: set %d, acknowledged as lsn %d, is missing", seed, what, name, lsn)
			}
		}
	}
	m := p.mirror()
	if !solo {
		if len(needed()) > 0 && !m.Complete(testID, 3) {
			t.Fatalf("LEDGE_SEED=%d: not solo, and the mirror is not complete: %+v", seed, m.State())
		}
		if m.Complete(testID, 3) {
			holds("mirror", m)
		}
	}
	p.cable.set(false)
	p.b.Receive(m, 0)
	l = p.open(nvram.Options{})
	defer l.Close()
	holds("own log", l)
	if err := l.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := l.Stats().Acked; n > trimmed+6 { // the writers may have filled the log before one of them came to trim it
		trimmed = n - 6
	}
	l.Trim(trimmed)
	if _, err := l.Append(t.Context(), set(name+1, 1)); err != nil {
		t.Fatal(err)
	}
	until(t, "in sync after the restart", func() bool { solo, _ := p.witness.Solo(); return !solo && inSync(l)() })
	p.b.StopReceiving()
	if !m.Complete(testID, 3) {
		t.Fatal("in sync, and the mirror is not complete")
	}
	holds("mirror after the resync", m)
}
