package lab

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/qa/verify"
)

// writer is an initiator that writes proved blocks to a volume, through whatever happens.
type writer struct {
	t   *testing.T
	ctx context.Context
	dev *initiator.Device
	w   *verify.Writer

	stop context.CancelFunc
	over chan error
}

// newWriter opens the volume through the agent's portal and begins with a region of bytes at off.
func newWriter(t *testing.T, ctx context.Context, v api.Volume, seed uint64, off, bytes int64) *writer {
	t.Helper()
	dev, err := initiator.Open(ctx, initiator.Config{Portals: []string{v.Portal}, Target: v.IQN, LUN: v.LUN,
		Initiator: "iqn.2026-11.lab:writer"})
	if err != nil {
		t.Fatalf("writer: %v", err)
	}
	w, err := verify.New(verify.Options{Seed: seed, Offset: off, Bytes: bytes})
	if err != nil {
		t.Fatal(err)
	}
	return &writer{t: t, ctx: ctx, dev: dev, w: w}
}

// begin lets it write.
func (w *writer) begin() {
	ctx, cancel := context.WithCancel(w.ctx)
	w.stop, w.over = cancel, make(chan error, 1)
	go func() { w.over <- w.w.Run(ctx, w.dev) }()
}

// advance waits until n more writes were acknowledged than now: the writer goes on.
func (w *writer) advance(what string, n uint64) {
	w.t.Helper()
	from := w.w.Acked()
	began := time.Now()
	ctx, cancel := context.WithTimeout(w.ctx, 3*time.Minute)
	defer cancel()
	err := poll(ctx, func() error {
		if now := w.w.Acked(); now < from+n {
			return fmt.Errorf("%s: %d writes acknowledged, %d more than before; %d were awaited; paths %+v", what, now, now-from, n, w.dev.Paths())
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Logf("%s: %d more writes acknowledged in %.1f s", what, n, time.Since(began).Seconds())
}

// check stops the writer and reads everything back: acknowledged, whole, its own.
func (w *writer) check(what string) verify.Report {
	w.t.Helper()
	w.stop()
	if err := <-w.over; err != nil {
		// An error is an answer, and its blocks may hold either content; a path that went must not cause one.
		w.t.Errorf("%s: writes failed: %v", what, err)
	}
	return w.reads(what)
}

// reads is check for a writer that rests.
func (w *writer) reads(what string) verify.Report {
	w.t.Helper()
	r, err := w.w.Check(w.ctx, w.dev)
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	w.t.Logf("%s: all right: %d writes acknowledged, %d of %d blocks written, longest pause %.1f s", what, r.Writes, r.Written, r.Blocks, r.Stall.Seconds())
	return r
}
