package raid_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/raid"
)

// hedgeBed is an array that knows how long its reads take, and would wait for an hour.
func hedgeBed(t *testing.T, o raid.Options) *bed {
	t.Helper()
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
	b.fillAll()
	b.a.Close()
	b.open(o)
	for range 20 {
		b.checkAll()
	}
	return b
}

// readBehind reads while drives hang, and returns what was read.
func (b *bed) readBehind(stripe uint64, block, count int) chan error {
	done := make(chan error, 1)
	go func() {
		p, err := b.read(stripe, block, count)
		if err == nil && !bytes.Equal(p, b.want[stripe][block*raid.BlockBytes:(block+count)*raid.BlockBytes]) {
			err = fmt.Errorf("stripe %d block %d+%d: wrong data", stripe, block, count)
		}
		done <- err
	}()
	return done
}

func await(t *testing.T, done chan error) {
	t.Helper()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("the read waits for a drive that hangs")
	}
}

// A member hangs, or two: reads of one block and of all are answered by the others while it still hangs; the late answers change
// nothing that was read; the member is not stuck when it has answered.
func TestHedgedRead(t *testing.T) {
	for _, strips := range [][]int{{1}, {0, 2}, {1, 4}, {3, 4}} {
		t.Run(fmt.Sprint(strips), func(t *testing.T) {
			b := hedgeBed(t, raid.Options{ReadTimeout: time.Hour, WriteTimeout: time.Hour})
			b.check(1, 0, b.blocks()) // parity is in memory: else nobody would tell the generations where both strips of it hang
			var resume []func()
			for _, s := range strips {
				d, _ := b.where(1, s, 0)
				resume = append(resume, d.Stall())
			}
			got := make([]byte, b.geo.StripeBytes)
			done := make(chan error, 1)
			go func() { done <- b.a.Read(ctx, 1, 0, [][]byte{got}) }()
			await(t, done)
			if !bytes.Equal(got, b.want[1]) {
				t.Fatal("wrong data")
			}
			for _, s := range strips {
				if s < 3 {
					await(t, b.readBehind(1, s*raid.StripBlocks+7, 3))
				}
			}
			s := b.a.Status()
			data := strips[0] < 3 // else nothing of what was read hangs
			if data && s.Counters.Hedges == 0 || s.Counters.HedgeWins != s.Counters.Hedges || s.Counters.Repairs+s.Counters.StaleStrips != 0 {
				t.Fatalf("%+v", s.Counters)
			}
			hedged := uint64(0)
			for _, m := range s.Members {
				hedged += m.Hedges
				if m.Slow || m.Timeouts != 0 {
					t.Fatalf("%+v: nobody waited for ReadTimeout", m)
				}
			}
			if data && hedged == 0 {
				t.Fatal("no member is said to be late")
			}
			clear(got)
			for _, r := range resume {
				r()
			}
			b.a.Close() // waits for the late answers
			if !bytes.Equal(got, make([]byte, len(got))) {
				t.Fatal("a late answer was written where the reader no longer expects it")
			}
		})
	}
}

// No hedge where parity cannot stand for what is late, nor where no parity strip has told the generations.
func TestNoHedge(t *testing.T) {
	for name, c := range map[string]struct {
		strips []int
		cold   bool
	}{
		"more than parity": {strips: []int{0, 1, 2}},
		"parity unheard":   {strips: []int{3, 4}, cold: true},
	} {
		t.Run(name, func(t *testing.T) {
			// The cache of an array this small holds all: what is cold was never read.
			b := hedgeBed(t, raid.Options{ReadTimeout: time.Hour, WriteTimeout: time.Hour})
			stripe := uint64(1)
			if c.cold {
				raid.ForgetSums(b.a)
			}
			var resume []func()
			for _, s := range c.strips {
				d, _ := b.where(stripe, s, 0)
				resume = append(resume, d.Stall())
			}
			before := b.a.Status().Counters.Hedges // a busy machine may have been late before
			done := b.readBehind(stripe, 0, b.blocks())
			time.Sleep(40 * soon) // far beyond what is late here
			select {
			case err := <-done:
				t.Fatalf("answered (%v) without the members that it needs", err)
			default:
			}
			for _, r := range resume {
				r()
			}
			await(t, done)
			if s := b.a.Status().Counters; s.Hedges != before {
				t.Fatalf("%+v", s)
			}
		})
	}
}

// A member that was hedged and does not answer for ReadTimeout is stuck as any other, until it answers.
func TestHedgedThenStuck(t *testing.T) {
	b := hedgeBed(t, raid.Options{ReadTimeout: 10 * soon})
	d, _ := b.where(1, 1, 0)
	resume := d.Stall()
	m, _ := raid.LayoutOf(b.a).Strip(1, 1)
	await(t, b.readBehind(1, 32, 4))
	slow := func(want bool) {
		t.Helper()
		for range 12000 {
			if s := b.a.Status().Members[m]; s.Slow == want && s.Timeouts > 0 {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Fatalf("slow is not %v: %+v", want, b.a.Status().Members[m])
	}
	slow(true)
	await(t, b.readBehind(1, 32, 4)) // round the member, at once
	resume()
	slow(false)
	b.checkAll()
}
