package nvram_test

import (
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

// Which mirrors a session goes on with, and which it voids.
func TestSessionResumesOrVoids(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	g := &grab{}
	for range 3 { // run 4 starts at LSN 7, the tails are at 1
		l := open(t, r, nvram.Options{})
		mustAppend(t, l, set(1, 0, 1))
		mustAppend(t, l, set(2, 0, 1))
		l.Close()
	}
	l := open(t, r, nvram.Options{Replicator: g, Epoch: 5, MirrorTimeout: time.Millisecond})
	defer l.Close()
	if err := l.Settle(t.Context()); err != nil { // solo, so that a full session may begin
		t.Fatal(err)
	}
	mustAppend(t, l, set(3, 0, 1)) // LSN 7
	good := nvram.MirrorState{ID: logID, Epoch: 5, Run: 4, RunLSN: 7, Bytes: [2]uint64{24 * block, 16 * block}, Next: 8, Complete: true}
	for name, c := range map[string]struct {
		change func(*nvram.MirrorState)
		resume uint64 // 0: full
	}{
		"current":                    {func(*nvram.MirrorState) {}, 8},
		"behind":                     {func(m *nvram.MirrorState) { m.Next = 7 }, 7},
		"run before":                 {func(m *nvram.MirrorState) { m.Run, m.RunLSN, m.Next = 3, 5, 6 }, 6},
		"run before, ahead":          {func(m *nvram.MirrorState) { m.Run, m.RunLSN, m.Next = 3, 5, 9 }, 7},
		"two runs before":            {func(m *nvram.MirrorState) { m.Run, m.RunLSN, m.Next = 2, 3, 5 }, 0},
		"another log":                {func(m *nvram.MirrorState) { m.ID[0]++ }, 0},
		"incomplete":                 {func(m *nvram.MirrorState) { m.Complete = false }, 0},
		"another size":               {func(m *nvram.MirrorState) { m.Bytes[0]++ }, 0},
		"beyond the log":             {func(m *nvram.MirrorState) { m.Next = 9 }, 0},
		"before the tails":           {func(m *nvram.MirrorState) { m.Next = 0 }, 0},
		"empty":                      {func(m *nvram.MirrorState) { *m = nvram.MirrorState{} }, 0},
		"a run that was not yet had": {func(m *nvram.MirrorState) { m.Run = 5 }, 0},
	} {
		m := good
		c.change(&m)
		s, st, err := g.feed.Begin(m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if st.Full != (c.resume == 0) || !st.Full && st.Resume != c.resume {
			t.Errorf("%s: full %v, resume at %d; want resume at %d", name, st.Full, st.Resume, c.resume)
		}
		s.End(nil)
	}
	good.Epoch = 6
	if _, _, err := g.feed.Begin(good); err == nil {
		t.Error("a partner that saw a newer epoch is fed")
	}
}

// Room is not used again before the superblock that frees it is durable.
func TestTrimIsDurableFirst(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{})
	defer l.Close()
	var last uint64
	for s := l.Stats(); s.Bytes-s.Reserve-s.Used >= 2*block; s = l.Stats() {
		last = mustAppend(t, l, set(1, 0, 1))
	}
	gate, held := make(chan struct{}), make(chan struct{})
	ring := make(chan struct{}, 1)
	r.Hold = func(off int64, _ int) {
		if off < smallArea.Off+2*block {
			close(held)
			<-gate
			return
		}
		ring <- struct{}{}
	}
	done := make(chan error)
	go func() {
		_, err := l.Append(t.Context(), set(2, 0, 1))
		done <- err
	}()
	l.Trim(last)
	<-held
	for l.Stats().Waiting == 0 {
		time.Sleep(time.Millisecond)
	}
	select {
	case <-ring:
		t.Error("the ring was written before the tail was durable")
	case <-time.After(20 * time.Millisecond):
	}
	r.Hold = nil
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
