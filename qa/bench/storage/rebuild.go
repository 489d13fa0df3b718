package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// The bed of rebuilds: simulated drives in memory that take one request at a time, at simulatedMBps in either
// direction, all of the same size. The same k+m among 24 and among 10 members, each with spare space, and how long it takes
// until a lost member's strips are all in spare space.
//
// What arithmetic allows: a drive of B bytes held B·(n-s)/n of strips; for each one k are read and one is written, by
// n-1 drives. With k and s alike, the time goes with (n-s)/(n·(n-1)).

const (
	simulatedMBps = 12
	rebuildData   = 4
	rebuildParity = 2
	rebuildSpares = 1
)

var rebuildAsks = []ask{
	{what: fmt.Sprintf("rebuild of a member, %d+%d, time among 10 to time among 24", rebuildData, rebuildParity), a: "among 10", b: "among 24", bound: 3,
		comment: fmt.Sprintf("arithmetic allows %.2f with the same k and spares", ideal(10)/ideal(24))},
}

// ideal is proportional to the least time of a rebuild among n.
func ideal(n float64) float64 { return (n - rebuildSpares) / n / (n - 1) }

func openRebuild(ctx context.Context, s settings, _ string) (*contest, error) {
	c := &contest{close: func() error { return nil }}
	for _, n := range []int{10, 24} {
		c.contestants = append(c.contestants, contestant{name: fmt.Sprintf("among %d", n), unit: "s", run: func(ctx context.Context, _ time.Duration) (float64, error) {
			return rebuildOnce(ctx, n, int64(s.rebuildMB)<<20)
		}})
	}
	return c, nil
}

// rebuildOnce fills an array, loses a member, and returns the seconds that its rebuild takes.
func rebuildOnce(ctx context.Context, n int, bytes int64) (seconds float64, err error) {
	set := raidtest.NewSet(1, n, raid.DataOffset+bytes/raid.SlotBytes*raid.SlotBytes)
	drives := make([]raid.Drive, n)
	pace := make([]*paced, n)
	for i, d := range set.Drives("A") {
		pace[i] = &paced{Drive: d}
		drives[i] = pace[i]
	}
	o := raid.Options{K: rebuildData, M: rebuildParity, Spares: rebuildSpares, WriteTimeout: time.Minute, ReadTimeout: time.Minute}
	a, err := raid.Create(ctx, drives, o)
	if err != nil {
		return 0, err
	}
	data := randomBytes(int(a.Geometry().StripeBytes), n)
	for st := range a.Geometry().Stripes {
		if err := a.WriteStripe(ctx, st, 1, [][]byte{data}); err != nil {
			return 0, errors.Join(err, a.Close())
		}
	}
	if err := errors.Join(a.Flush(ctx), a.Close()); err != nil {
		return 0, err
	}
	drives[3] = nil
	if a, err = raid.Open(ctx, drives, o); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	if err := a.WriteLabel(ctx, func(*raid.Label) {}); err != nil { // the member counts as failed from here on
		return 0, err
	}
	for _, p := range pace {
		p.start()
	}
	begin := time.Now()
	if err := a.Rebuild(ctx, 3, nil, nil); err != nil {
		return 0, err
	}
	return time.Since(begin).Seconds(), nil
}

// paced is a drive of simulatedMBps, once started.
type paced struct {
	raid.Drive
	mu   sync.Mutex
	on   bool
	free time.Time // when the last request will be through
}

func (p *paced) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.on = true
}

func (p *paced) pass(n int) {
	p.mu.Lock()
	if !p.on {
		p.mu.Unlock()
		return
	}
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(n) * time.Second / (simulatedMBps * 1e6))
	wait := p.free.Sub(now)
	p.mu.Unlock()
	time.Sleep(wait)
}

func (p *paced) ReadAt(b []byte, off int64) (int, error) {
	p.pass(len(b))
	return p.Drive.ReadAt(b, off)
}

func (p *paced) WriteAt(b []byte, off int64) (int, error) {
	p.pass(len(b))
	return p.Drive.WriteAt(b, off)
}
