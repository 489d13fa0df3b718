package nvram_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// freshWitness is a pool's members whose label says that nothing acknowledged is in the log. A call of the log waits
// until the test lets it go on.
type freshWitness struct {
	called chan string
	answer chan error
}

func newFreshWitness() *freshWitness {
	return &freshWitness{called: make(chan string, 8), answer: make(chan error, 8)}
}

func (w *freshWitness) call(ctx context.Context, what string) error {
	w.called <- what
	select {
	case err := <-w.answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *freshWitness) EnterSolo(ctx context.Context, _ uint64) error { return w.call(ctx, "enter") }
func (w *freshWitness) LeaveSolo(ctx context.Context) error           { return w.call(ctx, "leave") }

// Nothing of a fresh log is acknowledged before the members are told that there may be something.
func TestFreshIsLeftFirst(t *testing.T) {
	for _, test := range []struct {
		name, call string
		patience   time.Duration
	}{{"partner", "leave", time.Minute}, {"alone", "enter", time.Millisecond}} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, 1)
			var m *nvram.Mirror
			if test.name == "partner" {
				m = w.mirror()
			}
			members := newFreshWitness()
			l, err := nvram.Open(t.Context(), w.owner, smallArea, nvram.Options{ID: logID, Epoch: 1, Replicator: nvramtest.NewPartner(m), Witness: members, Fresh: true, MirrorTimeout: test.patience})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			done := make(chan error, 1)
			go func() {
				_, err := l.Append(context.Background(), set(1, nvram.KindWrite, 1))
				done <- err
			}()
			if got := <-members.called; got != test.call {
				t.Fatalf("the log called %q, want %q", got, test.call)
			}
			select {
			case err := <-done:
				t.Fatalf("acknowledged (%v) while the members say that the log is fresh", err)
			case <-time.After(50 * time.Millisecond):
			}
			if test.call == "leave" { // an answer that is lost changes nothing: it is asked again
				members.answer <- errors.New("no majority")
				if got := <-members.called; got != "leave" {
					t.Fatalf("the log called %q", got)
				}
				select {
				case err := <-done:
					t.Fatalf("acknowledged (%v) after a failure to tell the members", err)
				default:
				}
			}
			members.answer <- nil
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A mirror is voided in sync only as long as the members say that nobody needs the log either.
func TestVoidOnlyFresh(t *testing.T) {
	for _, test := range []struct {
		name  string
		fresh bool
		runs  int
		want  error
	}{{"first run", false, 1, nil}, {"fresh", true, 2, nil}, {"later run, nothing in the log", false, 2, nvram.ErrSoloFirst}} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, 1)
			g := &grab{}
			var l *nvram.Log
			for range test.runs {
				if l != nil {
					l.Close()
				}
				var err error
				if l, err = nvram.Open(t.Context(), w.owner, smallArea, nvram.Options{ID: logID, Epoch: 1, Replicator: g, Witness: &nvramtest.Witness{}, Fresh: test.fresh, MirrorTimeout: time.Minute}); err != nil {
					t.Fatal(err)
				}
			}
			defer l.Close()
			if _, st, err := g.feed.Begin(w.mirror().State()); !errors.Is(err, test.want) || err == nil && !st.Full {
				t.Fatalf("begin: full %t, %v; want %v", st.Full, err, test.want)
			}
		})
	}
}
