package nvram_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const block = nvram.BlockBytes

var logID = nvram.ID{1, 2, 3}

// smallArea has lanes of 24 and 16 blocks.
var smallArea = nvram.Area{Off: block, Size: (2 + 24 + 16) * block}

func newRegion(seed uint64) *nvramtest.Region {
	return nvramtest.NewRegion(smallArea.Off+smallArea.Size, 512, seed)
}

func format(t testing.TB, r nvram.Region) {
	t.Helper()
	if err := nvram.Format(r, smallArea, nvram.FormatOptions{ID: logID, Epoch: 1, UpdateBytes: 16 * block}); err != nil {
		t.Fatal(err)
	}
}

// content is the payload of a set that names itself.
func content(name uint64, blocks int) []byte {
	b := make([]byte, blocks*block)
	for i := 0; i < len(b); i += 8 {
		for j := range 8 {
			b[i+j] = byte(name>>(8*j)) ^ byte(i>>3)
		}
	}
	return b
}

// set with a name, of so many blocks in two extents and two buffers where it can be split.
func set(name uint64, kind uint8, blocks int) nvram.Set {
	p := content(name, blocks)
	s := nvram.Set{Kind: kind}
	half := blocks / 2
	if half > 0 {
		s.Extents = append(s.Extents, nvram.Extent{LUN: 7, LBA: name, Blocks: uint32(half)})
	}
	s.Extents = append(s.Extents, nvram.Extent{LUN: 9, LBA: name, Blocks: uint32(blocks - half)}, nvram.Extent{LUN: 1, LBA: name, Blocks: 77, Zero: true})
	s.Payload = [][]byte{p[:block], p[block:]}
	return s
}

// check that a replayed set is the one that it says it is, and return its name.
func check(s nvram.Set) (uint64, error) {
	if len(s.Extents) < 2 {
		return 0, fmt.Errorf("%d extents", len(s.Extents))
	}
	name := s.Extents[0].LBA
	p := bytes.Join(s.Payload, nil)
	if !bytes.Equal(p, content(name, len(p)/block)) {
		return name, fmt.Errorf("set %d: content differs", name)
	}
	blocks := 0
	for _, e := range s.Extents {
		if !e.Zero {
			blocks += int(e.Blocks)
		}
		if e.LBA != name {
			return name, fmt.Errorf("set %d: extent of set %d", name, e.LBA)
		}
	}
	if blocks*block != len(p) {
		return name, fmt.Errorf("set %d: %d blocks, %d bytes", name, blocks, len(p))
	}
	return name, nil
}

type replayer interface {
	Replay(func(uint64, nvram.Set) error) error
}

// replayed returns name → LSN of what l replays.
func replayed(l replayer) (map[uint64]uint64, error) {
	got, last := map[uint64]uint64{}, uint64(0)
	err := l.Replay(func(lsn uint64, s nvram.Set) error {
		if lsn < last {
			return fmt.Errorf("lsn %d after %d", lsn, last)
		}
		last = lsn
		name, err := check(s)
		if _, twice := got[name]; twice {
			return fmt.Errorf("set %d twice", name)
		}
		got[name] = lsn
		return err
	})
	return got, err
}

func open(t testing.TB, r nvram.Region, o nvram.Options) *nvram.Log {
	t.Helper()
	o.ID = logID
	o.Epoch = max(o.Epoch, 1)
	l, err := nvram.Open(t.Context(), r, smallArea, o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustAppend(t testing.TB, l *nvram.Log, s ...nvram.Set) uint64 {
	t.Helper()
	lsn, err := l.Append(t.Context(), s...)
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

func TestAppendReplay(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{})
	want := map[uint64]uint64{}
	for i := uint64(0); i < 3; i++ {
		lsn := mustAppend(t, l, set(10+i, 0, 1), set(20+i, 3, 2))
		want[10+i], want[20+i] = lsn, lsn
		want[30+i] = mustAppend(t, l, set(30+i, nvram.KindUpdate, 1))
	}
	l.Close()
	for range 3 {
		l = open(t, r, nvram.Options{})
		got, err := replayed(l)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("got %v, want %v: %v", got, want, err)
		}
		l.Close()
	}
	if _, err := l.Append(t.Context(), set(1, 0, 1)); !errors.Is(err, nvram.ErrClosed) {
		t.Fatal(err)
	}
}

func TestWrapAndTrim(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{})
	kept := map[uint64]uint64{}
	for i := uint64(1); i < 200; i++ {
		lsn := mustAppend(t, l, set(i, 0, 1+int(i%4)))
		up := mustAppend(t, l, set(1000+i, nvram.KindUpdate, 1+int(i%3)))
		kept = map[uint64]uint64{i: lsn, 1000 + i: up}
		l.Trim(lsn)
		l.TrimUpdates(up)
		if i%17 != 0 {
			continue
		}
		l.Close()
		l = open(t, r, nvram.Options{})
		if got, err := replayed(l); err != nil || fmt.Sprint(got) != fmt.Sprint(kept) {
			t.Fatalf("round %d: got %v, want %v: %v", i, got, kept, err)
		}
	}
	l.Close()
}

func TestRefusals(t *testing.T) {
	r := newRegion(1)
	if _, err := nvram.Open(t.Context(), r, smallArea, nvram.Options{}); !errors.Is(err, nvram.ErrEmpty) {
		t.Fatal(err)
	}
	format(t, r)
	if _, err := nvram.Open(t.Context(), r, smallArea, nvram.Options{ID: nvram.ID{9}, Epoch: 1}); !errors.Is(err, nvram.ErrForeign) {
		t.Fatal(err)
	}
	l := open(t, r, nvram.Options{Epoch: 5})
	l.Close()
	if _, err := nvram.Open(t.Context(), r, smallArea, nvram.Options{ID: logID, Epoch: 4}); !errors.Is(err, nvram.ErrStale) {
		t.Fatal(err)
	}
	if _, err := nvram.OpenMirror(r, smallArea); !errors.Is(err, nvram.ErrForeign) {
		t.Fatal(err)
	}
	l = open(t, r, nvram.Options{Epoch: 5})
	defer l.Close()
	for name, c := range map[string]struct {
		sets []nvram.Set
		want error
	}{
		"none":                     {nil, nvram.ErrInvalid},
		"short payload":            {[]nvram.Set{{Extents: []nvram.Extent{{Blocks: 2}}, Payload: [][]byte{make([]byte, block)}}}, nvram.ErrInvalid},
		"zero extent with payload": {[]nvram.Set{{Extents: []nvram.Extent{{Blocks: 1, Zero: true}}, Payload: [][]byte{make([]byte, block)}}}, nvram.ErrInvalid},
		"both lanes":               {[]nvram.Set{set(1, 0, 1), set(2, nvram.KindUpdate, 1)}, nvram.ErrInvalid},
		"too large":                {[]nvram.Set{set(1, 0, 6)}, nvram.ErrTooLarge},
		"too large by its table":   {[]nvram.Set{{Extents: make([]nvram.Extent, 2000)}}, nvram.ErrTooLarge},
		"overflowing":              {[]nvram.Set{{Extents: []nvram.Extent{{Blocks: 1 << 31}, {Blocks: 1 << 31}}}}, nvram.ErrInvalid},
	} {
		if _, err := l.Append(t.Context(), c.sets...); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	mustAppend(t, l, set(1, 0, l.MaxAppendBlocks()))
	mustAppend(t, l, set(2, nvram.KindUpdate, l.MaxUpdateBlocks()))
}

// A full log makes hosts wait, leaves internal sets their reserve and updates their lane, and goes on after a Trim.
func TestBackPressure(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{ReserveBytes: 8 * block})
	defer l.Close()
	var last uint64
	full, cancel := context.WithCancel(t.Context())
	for i := uint64(1); ; i++ {
		if s := l.Stats(); s.Bytes-s.Reserve-s.Used < 2*block {
			break
		}
		last = mustAppend(t, l, set(i, 0, 1))
	}
	cancel()
	if _, err := l.Append(full, set(100, 0, 1)); !errors.Is(err, context.Canceled) {
		t.Fatalf("append to a full log: %v", err)
	}
	for i := uint64(0); i < 4; i++ {
		mustAppend(t, l, set(200+i, nvram.KindInternal, 1))
	}
	for i := uint64(0); i < 100; i++ { // updates go round their own lane
		l.TrimUpdates(mustAppend(t, l, set(300+i, nvram.KindUpdate, 3)) + 1)
	}
	var waiting sync.WaitGroup
	for i := uint64(0); i < 4; i++ {
		waiting.Go(func() {
			if _, err := l.Append(t.Context(), set(400+i, 0, 1)); err != nil {
				t.Error(err)
			}
		})
	}
	for l.Stats().Waiting < 4 {
		time.Sleep(time.Millisecond)
	}
	l.Trim(last + 1)
	waiting.Wait()
}

// Concurrent Appends share records.
func TestGroupCommit(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	gate := make(chan struct{})
	l := open(t, r, nvram.Options{Pipeline: 1})
	defer l.Close()
	r.Hold = func(int64, int) { <-gate }
	var appends sync.WaitGroup
	for i := uint64(1); i <= 4; i++ {
		appends.Go(func() { mustAppend(t, l, set(i, 0, 1)) })
	}
	for l.Stats().Waiting < 4 {
		time.Sleep(time.Millisecond)
	}
	close(gate)
	appends.Wait()
	if s := l.Stats(); s.Records != 2 || s.Sets != 4 {
		t.Fatalf("%d records for %d sets, want 2 for 4", s.Records, s.Sets)
	}
}

// A local write error fails the log: nothing of it or after it is acknowledged.
func TestWriteError(t *testing.T) {
	r := newRegion(1)
	format(t, r)
	l := open(t, r, nvram.Options{})
	mustAppend(t, l, set(1, 0, 1))
	broken := errors.New("media error")
	r.Fail(broken)
	if _, err := l.Append(t.Context(), set(2, 0, 1)); !errors.Is(err, broken) || !errors.Is(err, nvram.ErrClosed) {
		t.Fatal(err)
	}
	<-l.Failed()
	if _, err := l.Append(t.Context(), set(3, 0, 1)); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	l.Close()
}
