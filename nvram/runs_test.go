package nvram_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// life is a run of the log and the loss of power at its end.
type life struct {
	acked  []uint8 // kinds of sets that are acknowledged, one record each
	trim   int     // 1: then what is in the data lane is given up, 2: in the other, 3: in both; and the log is closed, and opened again
	flying []uint8 // kinds of sets whose records are being written when the power goes,
	whole  int     // a bit for each that is on the medium
}

func (l life) String() string {
	return fmt.Sprintf("acked %v, trim %d, flying %v, whole %b", l.acked, l.trim, l.flying, l.whole)
}

// lives are all that there are, within the bounds of the exhaustive test.
func lives(ackeds [][]uint8, trims []int) (all []life) {
	kinds := []uint8{nvram.KindWrite, nvram.KindUpdate}
	flying := [][]uint8{nil}
	for _, a := range kinds {
		flying = append(flying, []uint8{a})
		for _, b := range kinds {
			flying = append(flying, []uint8{a, b})
		}
	}
	for _, acked := range ackeds {
		for _, trim := range trims {
			for _, f := range flying {
				for whole := range 1 << len(f) {
					all = append(all, life{acked, trim, f, whole})
				}
			}
		}
	}
	return all
}

// journalOf is a region, and what its log must hold.
type journalOf struct {
	t    *testing.T
	r    *nvramtest.Region
	name uint64
	must map[uint64]uint64 // name → LSN: acknowledged, or found once, and not given up
	may  map[uint64]uint64 // given up, which a crash may undo
	kind map[uint64]uint8
}

// check opens the log and compares.
func (j *journalOf) check(what string) *nvram.Log {
	j.t.Helper()
	l, err := nvram.Open(j.t.Context(), j.r, smallArea, nvram.Options{ID: logID, Epoch: 1, Pipeline: 4})
	if err != nil {
		j.t.Fatalf("%s: %v", what, err)
	}
	got, err := replayed(l)
	if err != nil {
		j.t.Fatalf("%s: %v", what, err)
	}
	for name, lsn := range j.must {
		if got[name] != lsn {
			j.t.Fatalf("%s: set %d, lsn %d, is at %d of %v", what, name, lsn, got[name], got)
		}
	}
	for name, lsn := range got {
		if j.must[name] != lsn && j.may[name] != lsn {
			j.t.Fatalf("%s: set %d at lsn %d of %v: it never counted; %v must be there, %v may", what, name, lsn, got, j.must, j.may)
		}
	}
	return l
}

// live is one life, to the loss of power.
func (j *journalOf) live(x life, what string) {
	l := j.check(what)
	for _, kind := range x.acked {
		j.name++
		j.kind[j.name] = kind
		j.must[j.name] = mustAppend(j.t, l, set(j.name, kind, 1))
	}
	if x.trim > 0 {
		end := l.Stats().Next
		if x.trim&1 > 0 {
			l.Trim(end)
		}
		if x.trim&2 > 0 {
			l.TrimUpdates(end)
		}
		for name, lsn := range j.must {
			if x.trim&1 > 0 && j.kind[name] != nvram.KindUpdate || x.trim&2 > 0 && j.kind[name] == nvram.KindUpdate {
				j.may[name] = lsn
				delete(j.must, name)
			}
		}
		if err := l.Close(); err != nil {
			j.t.Fatal(err)
		}
		l = j.check(what + "; trimmed")
	}
	// The records are built one after the other, and none is durable before all are being written.
	began, gate := make(chan int64, 4), make(chan struct{})
	j.r.Hold = func(off int64, _ int) {
		if off >= smallArea.Off+2*block {
			began <- off
			<-gate
		}
	}
	before := j.r.Bytes()
	var offs []int64
	var appends sync.WaitGroup
	first := j.name
	for _, kind := range x.flying {
		j.name++
		j.kind[j.name] = kind
		s := set(j.name, kind, 1)
		appends.Go(func() { l.Append(j.t.Context(), s) })
		offs = append(offs, <-began)
	}
	j.r.Hold = nil
	close(gate)
	appends.Wait()
	l.Close()
	after := j.r.Bytes()
	// A record is a header block and a payload block. Superblocks are those of the end, or of the moment: a trim may not have been written.
	lsn := l.Stats().Next - uint64(len(offs))
	for i, off := range offs {
		if x.whole>>i&1 == 0 {
			copy(after[off:off+2*block], before[off:])
		}
	}
	copy(after[smallArea.Off:smallArea.Off+2*block], before[smallArea.Off:])
	j.r = nvramtest.NewRegion(int64(len(after)), 512, 1)
	j.r.Load(after)
	for i := range offs {
		if x.whole>>i&1 == 0 {
			break
		}
		j.must[first+1+uint64(i)] = lsn + uint64(i)
	}
}

// Two runs that end in a loss of power, in every way that there is within small bounds, and several that do nothing behind each: what was acknowledged is
// there, and nothing comes back that did not count once.
func TestRunsExhaustively(t *testing.T) {
	const w, u = nvram.KindWrite, nvram.KindUpdate
	firsts, seconds := lives([][]uint8{nil, {w}}, []int{0}), lives([][]uint8{nil, {w}, {u}, {w, w}}, []int{0, 1, 2, 3})
	if testing.Short() {
		firsts = firsts[:len(firsts)/8]
	}
	ran := 0
	for _, a := range firsts {
		for _, b := range seconds {
			j := &journalOf{t: t, r: newRegion(1), must: map[uint64]uint64{}, may: map[uint64]uint64{}, kind: map[uint64]uint8{}}
			format(t, j.r)
			what := fmt.Sprintf("%v; %v", a, b)
			j.live(a, what)
			j.live(b, what)
			for i := range 3 {
				l := j.check(fmt.Sprintf("%s; opening %d", what, i+1))
				l.Close()
			}
			ran++
		}
	}
	t.Logf("%d histories", ran)
}
