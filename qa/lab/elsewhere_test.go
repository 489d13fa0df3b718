package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/initiator"
)

// testElsewhere: hosts hold nothing that matters (P6). The agent is killed in mid-write, everything that it had is deleted, and one is
// started elsewhere: volumes, a snapshot and its clone have all that was acknowledged. How long that takes is logged.
func testElsewhere(t *testing.T, ctx context.Context, l *Lab) {
	rng := rand.New(rand.NewPCG(5, 5))
	const other = "elsewhere"
	_, _, err := l.EnsureVolume(ctx, other, 1<<30)
	fatal(t, err)
	w := []*writer{
		newWriter(t, ctx, verified(t, ctx, l), 0xe15e, 3*verifyBytes, verifyBytes),
		newWriter(t, ctx, l.show(t, ctx, other), 0xe15f, 0, verifyBytes),
	}
	defer func() {
		for _, w := range w {
			w.dev.Close()
		}
	}()
	var snapshot string
	var held [sha256.Size]byte
	for round := range 3 {
		if round == 1 { // between two writes, so that what it holds is known
			snapshot = fmt.Sprintf("%s@round%d", other, round)
			held = w[1].sum()
			l.must(t, ctx, "snapshot", "create", snapshot)
		}
		for _, w := range w {
			w.begin()
		}
		for _, w := range w {
			w.advance(fmt.Sprintf("round %d", round), someWrites)
		}
		time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond)
		fatal(t, l.MoveHost())
		for _, w := range w {
			w.stop()
			if err := <-w.over; err != nil {
				t.Logf("round %d: a write was answered with an error: %v", round, err)
			}
			w.dev.Close()
		}
		began := time.Now()
		fatal(t, l.StartAgent(ctx))
		serves := time.Since(began)
		first := time.Duration(0)
		for i, name := range []string{verifyVolume, other} {
			w[i].reopen(l.volume(t, ctx, name))
			if first == 0 {
				fatal(t, w[i].dev.ReadAt(ctx, make([]byte, 4096), int64(3-3*i)*verifyBytes))
				first = time.Since(began)
			}
		}
		for i, name := range []string{verifyVolume, other} {
			w[i].reads(fmt.Sprintf("round %d, volume %s, agent elsewhere", round, name))
		}
		t.Logf("round %d: kill -9 and all deleted; elsewhere it serves %.1f s after its start, the first block is read after %.1f s, all are after %.1f s", round,
			serves.Seconds(), first.Seconds(), time.Since(began).Seconds())
		if snapshot == "" {
			continue
		}
		clone := fmt.Sprintf("clone%d", round)
		l.must(t, ctx, "volume", "clone", snapshot, clone)
		c := &writer{t: t, ctx: ctx}
		c.reopen(l.volume(t, ctx, clone))
		if got := c.sum(); !bytes.Equal(got[:], held[:]) {
			t.Errorf("round %d: the clone of %s holds something else than the volume did", round, snapshot)
		}
		c.dev.Close()
	}
}

// reopen connects to where the volume is now.
func (w *writer) reopen(v initiator.Config) {
	w.t.Helper()
	dev, err := initiator.Open(w.ctx, v)
	if err != nil {
		w.t.Fatalf("writer: %v", err)
	}
	w.dev = dev
}

// sum is of the first verifyBytes.
func (w *writer) sum() [sha256.Size]byte {
	w.t.Helper()
	p := make([]byte, verifyBytes)
	const most = 1 << 20
	for off := 0; off < len(p); off += most {
		fatal(w.t, w.dev.ReadAt(w.ctx, p[off:min(off+most, len(p))], int64(off)))
	}
	return sha256.Sum256(p)
}

// volume is how the volume is reached.
func (l *Lab) volume(t *testing.T, ctx context.Context, name string) initiator.Config {
	t.Helper()
	v, made, err := l.EnsureVolume(ctx, name, 1<<30)
	fatal(t, err)
	if made {
		t.Fatalf("volume %s is gone", name)
	}
	return initiator.Config{Portals: []string{v.Portal}, Target: v.IQN, LUN: v.LUN, Initiator: "iqn.2026-11.lab:writer"}
}
