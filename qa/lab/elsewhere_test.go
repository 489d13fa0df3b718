package lab

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator"
)

// lostWhen are the moments at which testElsewhere's hosts are lost; meanwhile is what goes on with the volumes besides the writes.
var lostWhen = []struct {
	name      string
	meanwhile func(ctx context.Context, l *Lab, other string, rest func()) error
}{
	{"in mid-write", nil},
	{"right after a snapshot was ordered", func(ctx context.Context, l *Lab, other string, rest func()) error {
		rest() // so that what it holds is known
		return l.AgentDo(ctx, "POST", "/v1/snapshots", api.SnapshotRequest{Name: "held", Volumes: []string{other}}, nil)
	}},
	{"in mid-write, beside a clone", nil},
}

// testElsewhere: hosts hold nothing that matters (P6). The agent is killed under writes, everything that it had is deleted, and one is
// started elsewhere: the volumes, a snapshot and its clone, which is written to as well, have all that was acknowledged. How long that
// takes is logged. qa/shelf does the same many times, as processes; that the agent before is shut out, if it still ran, is
// TestEarlierAgentIsShutOut in host/agent.
func testElsewhere(t *testing.T, ctx context.Context, l *Lab) {
	rng := rand.New(rand.NewPCG(5, 5))
	const other, clone = "elsewhere", "elsewhere-clone"
	_, _, err := l.EnsureVolume(ctx, other, 1<<30)
	fatal(t, err)
	names := []string{verifyVolume, other}
	w := []*writer{
		newWriter(t, ctx, verified(t, ctx, l), 0xe15e, 3*verifyBytes, verifyBytes),
		newWriter(t, ctx, l.show(t, ctx, other), 0xe15f, 0, verifyBytes),
	}
	defer func() {
		for _, w := range w {
			w.dev.Close()
		}
	}()
	var held [sha256.Size]byte
	for round, lost := range lostWhen {
		for _, w := range w {
			w.begin()
		}
		for _, w := range w {
			w.advance(fmt.Sprintf("round %d", round), someWrites)
		}
		if lost.meanwhile != nil {
			fatal(t, lost.meanwhile(ctx, l, other, func() {
				w[1].stop()
				<-w[1].over
				held = w[1].sum()
				w[1].over <- nil
			}))
		} else {
			time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond)
		}
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
		for i, name := range names {
			w[i].reopen(l.volume(t, ctx, name))
			if first == 0 {
				fatal(t, w[i].w.ReadOne(ctx, w[i].dev))
				first = time.Since(began)
			}
		}
		connected := time.Since(began)
		for i, name := range names {
			w[i].reads(fmt.Sprintf("round %d, volume %s, agent elsewhere", round, name))
		}
		for line := range strings.Lines(tail(l.Agent.Log(), 200)) {
			if strings.Contains(line, "msg=recovered") {
				t.Log(strings.TrimSpace(line))
			}
		}
		t.Logf("round %d: lost %s, with all that the host had; elsewhere it serves %.1f s after its start, the first acknowledged block is read after %.1f s, all %d volumes are connected after %.1f s and read after %.1f s",
			round, lost.name, serves.Seconds(), first.Seconds(), len(w), connected.Seconds(), time.Since(began).Seconds())
		switch {
		case lost.meanwhile != nil: // the clone of what another host's snapshot has; it is written to behind that
			l.must(t, ctx, "volume", "clone", other+"@held", clone)
			names, w = append(names, clone), append(w, newWriter(t, ctx, l.show(t, ctx, clone), 0xe160, verifyBytes, verifyBytes))
		case round == 0:
			continue
		}
		again := fmt.Sprintf("elsewhere-again%d", round)
		l.must(t, ctx, "volume", "clone", other+"@held", again)
		for _, name := range []string{clone, again} {
			c := &writer{t: t, ctx: ctx}
			c.reopen(l.volume(t, ctx, name))
			if c.sum() != held {
				t.Errorf("round %d: volume %s, a clone of %s@held, holds something else than the volume did", round, name, other)
			}
			c.dev.Close()
		}
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
