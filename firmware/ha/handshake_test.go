package ha

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// An ask that nobody stands behind any more moves nothing, however often it comes; an accept counts only for the newest offer, and
// for a short while.
func TestStaleAsk(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		owner := func(what string) {
			t.Helper()
			synctest.Wait()
			time.Sleep(10 * time.Second)
			a.mu.Lock()
			drained := slices.Contains(a.log, Drain.String())
			a.mu.Unlock()
			if a.phase() != Owner || a.disks.seen().Owner != A || drained {
				t.Fatalf("%s: a %v, %v", what, a.phase(), a.disks.seen())
			}
		}
		ask := func() { a.d.Message(MsgAsk, []byte(askConfirm)) }
		for range 3 {
			ask()
		}
		owner("asked by who is content")
		a.d.Message(MsgOffer, []byte("n")) // an owner asks for nothing
		b.d.Message(MsgProgress, []byte("n"))
		a.d.Message(MsgAccept, nil)
		a.d.Message(MsgAccept, []byte("guessed"))
		owner("accepted what was not offered")

		// The offers are caught here: b answers them late.
		b.loses = MsgOffer
		ask()
		synctest.Wait()
		first := a.d.offered.nonce
		ask()
		synctest.Wait()
		second := a.d.offered.nonce
		if first == "" || first == second {
			t.Fatalf("offers %q, %q", first, second)
		}
		a.d.Message(MsgAccept, []byte(first))
		owner("accepted an earlier offer")
		a.d.Message(MsgAccept, []byte(second))
		owner("accepted an offer that is too old")
		a.d.Message(MsgAccept, make([]byte, 1000))
		owner("accepted at length")
	})
}

// The ask of a firmware that knows no offers is obeyed.
func TestAskWithoutConfirmation(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.d.Message(MsgAsk, nil)
		synctest.Wait()
		if a.phase() != Standby || a.disks.seen().Owner != None {
			t.Fatalf("a %v, %v", a.phase(), a.disks.seen())
		}
	})
}

// An owner that knows no offers hands over at the first ask: so does it where the offer is replaced by that.
func TestOwnerWithoutOffers(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		b.loses = MsgOffer
		a.loses = MsgAsk
		go func() {
			time.Sleep(time.Second)
			a.d.Message(MsgAsk, nil)
		}()
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if a.phase() != Standby || b.phase() != Owner {
			t.Fatalf("a %v, b %v", a.phase(), b.phase())
		}
	})
}

// The partner that asked ends while the owner drains: the owner goes on, and nobody has to order it.
func TestTakerEnds(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		release := make(chan struct{})
		a.mu.Lock()
		a.hang[Drain] = release
		a.mu.Unlock()
		done := make(chan error, 1)
		go func() { done <- b.d.Takeover(t.Context()) }()
		synctest.Wait()
		if a.phase() != HandingOver || b.phase() != Asking {
			t.Fatalf("a %v, b %v", a.phase(), b.phase())
		}
		b.end()
		<-done
		close(release)
		time.Sleep(5 * time.Second)
		if a.phase() != Owner || a.shows() != "serve" || !a.open.Load() || a.disks.seen().Owner != A || a.gate.enter(t.Context()) != nil {
			t.Fatalf("a %v, shows %s, %v", a.phase(), a.shows(), a.disks.seen())
		}
	})
}

// A slow owner is waited for, beyond AskTimeout; one whose link is gone is not waited for as long.
func TestPatience(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		release := make(chan struct{})
		a.mu.Lock()
		a.hang[Drain] = release
		a.mu.Unlock()
		go func() {
			time.Sleep(20 * time.Second)
			close(release)
		}()
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if a.phase() != Standby || b.phase() != Owner {
			t.Fatalf("a %v, b %v", a.phase(), b.phase())
		}
	})
	scene(t, owned(), func(t *testing.T, a, b *node) {
		release := make(chan struct{})
		a.mu.Lock()
		a.hang[Drain] = release
		a.mu.Unlock()
		began := time.Now()
		go func() {
			time.Sleep(100 * time.Millisecond)
			a.mu.Lock()
			a.up = false // as seen from b
			a.mu.Unlock()
		}()
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took >= 7*time.Second || took < 4*time.Second {
			t.Errorf("took %v", took)
		}
		close(release)
		if code := <-a.code; code != ExitFenced {
			t.Fatal(code)
		}
	})
}

// The owner was stopped while it was asked, and goes on when the other has given up.
func TestStoppedWhileAsked(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.mute.Store(true) // stopped: it will read the ask later
		done := make(chan error, 1)
		go func() { done <- b.d.Takeover(t.Context()) }()
		synctest.Wait()
		b.mu.Lock()
		b.failing[Look] = errors.New("members are away")
		b.mu.Unlock()
		if err := <-done; !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		a.mute.Store(false)
		a.d.Message(MsgAsk, []byte(askConfirm))
		time.Sleep(10 * time.Second)
		a.mu.Lock()
		drained := slices.Contains(a.log, Drain.String())
		a.mu.Unlock()
		if a.phase() != Owner || drained {
			t.Fatalf("a %v, drained %v", a.phase(), drained)
		}
	})
}
