package nvram_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// tornFirst leaves a region in which record 2, of the data lane, was never written and record 3, in flight beside it and of a kind, was.
func tornFirst(t *testing.T, kind uint8) *nvramtest.Region {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{Pipeline: 2})
	mustAppend(t, l, set(1, 0, 1))
	gate, held := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.Hold = func(off int64, _ int) {
		if off == smallArea.Off+4*block {
			once.Do(func() { close(held) })
			<-gate
		}
	}
	var appends sync.WaitGroup
	appends.Go(func() { l.Append(t.Context(), set(2, 0, 1)) })
	<-held
	appends.Go(func() { l.Append(t.Context(), set(3, kind, 1)) })
	var image []byte
	for bytes.Count(image, []byte("LEDGEREC")) < 2 { // the second write is over
		time.Sleep(time.Millisecond)
		image = r.Bytes()
	}
	close(gate)
	appends.Wait()
	l.Close()
	crashed := newRegion(2)
	crashed.Load(image)
	return crashed
}

// The record after a torn one is whole; it must not come back, not even once the torn one's place was filled anew.
func TestStaleRecordOfEarlierRun(t *testing.T) {
	r := tornFirst(t, 0)
	l := open(t, r, nvram.Options{})
	if got, err := replayed(l); err != nil || fmt.Sprint(got) != "map[1:1]" {
		t.Fatalf("after the crash: %v, %v", got, err)
	}
	if lsn := mustAppend(t, l, set(4, 0, 1)); lsn != 2 {
		t.Fatalf("lsn %d", lsn)
	}
	l.Close()
	l = open(t, r, nvram.Options{})
	defer l.Close()
	if got, err := replayed(l); err != nil || fmt.Sprint(got) != "map[1:1 4:2]" {
		t.Fatalf("in the next run: %v, %v", got, err)
	}
}

// Rot in an acknowledged record is not taken for the end of the log, wherever it is, nor is a superblock that went
// back in time.
func TestRotIsNotTheEnd(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{})
	for i := uint64(1); i <= 6; i++ {
		mustAppend(t, l, set(i, 0, 1))
	}
	l.Close()
	image := r.Bytes()
	for i := range int64(6) {
		for _, at := range []int64{0, 20, 70, 96, block - 1, block, 2*block - 1} {
			r.Load(image)
			r.Flip(smallArea.Off + (2+2*i)*block + at)
			if _, err := nvram.Open(t.Context(), r, smallArea, nvram.Options{ID: logID, Epoch: 1}); !errors.Is(err, nvram.ErrCorrupt) {
				t.Fatalf("record %d, byte %d: %v", i+1, at, err)
			}
		}
	}
	r.Load(image)
	r.Flip(smallArea.Off + 100) // either superblock may rot
	open(t, r, nvram.Options{}).Close()
	r.Load(image)
	r.Flip(smallArea.Off + block + 100)
	open(t, r, nvram.Options{}).Close()
	r.Flip(smallArea.Off + 100)
	r.Flip(smallArea.Off + block + 101)
	if _, err := nvram.Open(t.Context(), r, smallArea, nvram.Options{ID: logID, Epoch: 1}); err != nil && !errors.Is(err, nvram.ErrCorrupt) {
		t.Fatal(err)
	}
}

// What a mirror says of itself outlives its power.
func TestMirrorKnowsItself(t *testing.T) {
	own, other := newRegion(1), newRegion(2)
	format(t, own)
	l := open(t, own, nvram.Options{})
	defer l.Close()
	for i := uint64(1); i <= 4; i++ {
		mustAppend(t, l, set(i, 0, 1))
	}
	feed := &grab{}
	l2 := newRegion(3)
	l2.Load(own.Bytes())
	fed, err := nvram.Open(t.Context(), l2, smallArea, nvram.Options{ID: logID, Epoch: 1, Replicator: feed, MirrorTimeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer fed.Close()
	reopen := func(complete bool) *nvram.Mirror {
		t.Helper()
		m, err := nvram.OpenMirror(other, smallArea)
		if err != nil {
			t.Fatal(err)
		}
		if m.Complete(logID, 1) != complete {
			t.Fatalf("complete is %v: %+v", !complete, m.State())
		}
		if err := m.Replay(func(uint64, nvram.Set) error { return nil }); (err == nil) != complete || !complete && !errors.Is(err, nvram.ErrStale) {
			t.Fatal(err)
		}
		return m
	}
	m := reopen(false)
	s, st := feed.begin(t, m)
	if !st.Full {
		t.Fatalf("%+v", st)
	}
	if err := m.Begin(st); err != nil {
		t.Fatal(err)
	}
	reopen(false)
	for {
		it, err := s.Next()
		if err != nil {
			t.Fatal(err)
		}
		if it.Kind == nvram.ItemComplete {
			if err := m.MarkComplete(it.LSN + 1); !errors.Is(err, nvram.ErrInvalid) {
				t.Fatalf("complete beyond its end: %v", err)
			}
			if err := m.MarkComplete(it.LSN); err != nil {
				t.Fatal(err)
			}
			break
		}
		for name, bad := range map[string]nvram.Item{
			"lsn":    {LSN: it.LSN + 1, Off: it.Off, Frame: it.Frame},
			"offset": {LSN: it.LSN, Off: it.Off + block, Frame: it.Frame},
			"short":  {LSN: it.LSN, Off: it.Off, Frame: it.Frame[:block]},
		} {
			if _, err := m.Write(bad.LSN, bad.Off, bad.Frame); !errors.Is(err, nvram.ErrInvalid) && !errors.Is(err, nvram.ErrCorrupt) {
				t.Fatalf("frame with a wrong %s: %v", name, err)
			}
		}
		if _, err := m.Write(it.LSN, it.Off, it.Frame); err != nil {
			t.Fatal(err)
		}
		reopen(false)
		it.Release()
	}
	m = reopen(true)
	if err := m.Begin(nvram.Start{ID: logID, Epoch: 0, Run: 9, Bytes: st.Bytes, Tail: st.Tail, Head: st.Head}); !errors.Is(err, nvram.ErrStale) {
		t.Fatalf("an older epoch: %v", err)
	}
	tail := st.Tail
	tail[0] = nvram.Position{LSN: 9, Off: tail[0].Off + 10*block, Seq: tail[0].Seq + 5} // beyond what it has
	if err := m.Trim(tail); err != nil {
		t.Fatal(err)
	}
	reopen(false)
}

// grab is a Replicator that leaves the feed to the test.
type grab struct{ feed *nvram.Feed }

func (g *grab) Attach(f *nvram.Feed) { g.feed = f }
func (g *grab) Detach()              {}

// begin waits until the log is solo, which a full session of a log with content needs.
func (g *grab) begin(t *testing.T, m *nvram.Mirror) (*nvram.Session, nvram.Start) {
	for {
		s, st, err := g.feed.Begin(m.State())
		if err == nil {
			return s, st
		}
		if !errors.Is(err, nvram.ErrSoloFirst) {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// goOn is a run that writes sets 4 to 6 to the data lane, gives up what is before the last or does not, and says what is to be there then.
func goOn(t *testing.T, l *nvram.Log, trimmed bool) string {
	defer l.Close()
	for _, name := range []uint64{4, 5, 6} {
		mustAppend(t, l, set(name, 0, 1))
	}
	if trimmed {
		l.Trim(4)
		return "map[6:4]"
	}
	return "map[1:1 4:2 5:3 6:4]"
}

// The record after a torn one is whole and in the other lane, which the next run does not write to: it must not come back in any run, when what it
// claims the place of is there, and when that was given up.
func TestStaleRecordOfOtherLane(t *testing.T) {
	for _, trimmed := range []bool{false, true} {
		r := tornFirst(t, nvram.KindUpdate)
		l := open(t, r, nvram.Options{})
		if got, err := replayed(l); err != nil || fmt.Sprint(got) != "map[1:1]" {
			t.Fatalf("after the crash: %v, %v", got, err)
		}
		want := goOn(t, l, trimmed)
		for range 3 {
			l = open(t, r, nvram.Options{})
			if got, err := replayed(l); err != nil || fmt.Sprint(got) != want {
				t.Errorf("in a later run, trimmed %v: %v, %v", trimmed, got, err)
			}
			l.Close()
		}
	}
}

// The same in the mirror, which has both records that the owner lost.
func TestStaleRecordInMirror(t *testing.T) {
	for c := range 4 {
		runs, trimmed := 1+c/2, c%2 == 1 // runs of the owner until the standby is there again; after two the mirror begins anew
		own, other := newRegion(1), newRegion(2)
		format(t, own)
		mirror := func() *nvram.Mirror {
			m, err := nvram.OpenMirror(other, smallArea)
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
		m := mirror()
		start := func(m *nvram.Mirror) *nvram.Log {
			l := open(t, own, nvram.Options{Replicator: nvramtest.NewPartner(m), Witness: &nvramtest.Witness{}, MirrorTimeout: time.Minute})
			for began := time.Now(); l.Stats().Mirror != nvram.MirrorInSync; time.Sleep(time.Millisecond) {
				if time.Since(began) > 20*time.Second {
					l.Close()
					t.Fatalf("%d runs: never in sync: %+v", runs, l.Stats())
				}
			}
			return l
		}
		l := start(m)
		mustAppend(t, l, set(1, 0, 1))
		image := own.Bytes()
		mustAppend(t, l, set(2, 0, 1))
		mustAppend(t, l, set(3, nvram.KindUpdate, 1))
		l.Close()
		own.Load(image)
		for range runs - 1 {
			open(t, own, nvram.Options{}).Close()
		}
		l = start(m)
		want := goOn(t, l, trimmed)
		for range 3 {
			start(m).Close()
			m = mirror()
			if got, err := replayed(m); err != nil || fmt.Sprint(got) != want {
				t.Errorf("%d runs, trimmed %v: %v, %v", runs, trimmed, got, err)
			}
		}
	}
}

// What a host wrote is not taken for a record, however much it looks like one.
func TestPayloadLikeARecord(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{})
	mustAppend(t, l, set(1, 0, 1))
	forged := bytes.Clone(r.Bytes()[smallArea.Off+2*block:][:block])
	if string(forged[:8]) != "LEDGEREC" {
		t.Fatalf("a record begins with %q", forged[:8])
	}
	forged[17] = 1 // lsn 257
	s := set(2, 0, 1)
	s.Payload = [][]byte{forged}
	mustAppend(t, l, s)
	l.Close()
	for range 2 {
		l = open(t, r, nvram.Options{})
		var got []byte
		err := l.Replay(func(lsn uint64, s nvram.Set) error {
			if lsn == 2 {
				got = bytes.Clone(s.Payload[0])
			}
			return nil
		})
		if err != nil || !bytes.Equal(got, forged) {
			t.Fatalf("the payload is other: %v", err)
		}
		l.Close()
	}
}
