package volume

import (
	"errors"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/target"
)

// Every command counts as one of its kind, with its bytes if it succeeded; a miscompare is an answer.
func TestCommands(t *testing.T) {
	_, d := device(t, 1<<20, 512)
	ctx := t.Context()
	sectors := func(n int, c byte) []byte {
		p := make([]byte, n*512)
		for i := range p {
			p[i] = c
		}
		return p
	}
	type figures struct{ reads, readBytes, writes, writeBytes, unmaps, unmapBytes, errors uint64 }
	now := func() figures {
		m := d.meter
		r, w, u := m.Reads.Counts(), m.Writes.Counts(), m.Unmaps.Counts()
		return figures{r.N(), m.Reads.Bytes.Load(), w.N(), m.Writes.Bytes.Load(), u.N(), m.Unmaps.Bytes.Load(),
			m.Reads.Errors.Load() + m.Writes.Errors.Load() + m.Unmaps.Errors.Load()}
	}
	for _, c := range []struct {
		name string
		do   func() error
		want figures
		err  error
	}{
		{"write", func() error { return d.Write(ctx, 0, [][]byte{sectors(8, 1), sectors(3, 2)}, false) }, figures{writes: 1, writeBytes: 11 * 512}, nil},
		{"read", func() error { return d.Read(ctx, 1, [][]byte{sectors(20, 0)}) }, figures{reads: 1, readBytes: 20 * 512}, nil},
		{"unmap", func() error { return d.Unmap(ctx, []target.Range{{LBA: 0, Blocks: 9}, {LBA: 50, Blocks: 1}}) }, figures{unmaps: 1, unmapBytes: 10 * 512}, nil},
		{"write same", func() error { return d.WriteSame(ctx, 0, 30, sectors(1, 3)) }, figures{writes: 1, writeBytes: 30 * 512}, nil},
		{"write same of zeros", func() error { return d.WriteSame(ctx, 0, 30, sectors(1, 0)) }, figures{unmaps: 1, unmapBytes: 30 * 512}, nil},
		{"compare and write", func() error { return d.CompareAndWrite(ctx, 0, sectors(1, 0), sectors(1, 1)) }, figures{writes: 1, writeBytes: 512}, nil},
		{"miscompare", func() error {
			var differs *target.MiscompareError
			if err := d.CompareAndWrite(ctx, 0, sectors(1, 0), sectors(1, 1)); !errors.As(err, &differs) {
				return errors.New("no miscompare")
			}
			return nil
		}, figures{writes: 1}, nil},
		{"read beyond the end", func() error { return d.Read(ctx, 2048, [][]byte{sectors(1, 0)}) }, figures{errors: 1}, target.ErrRange},
		{"write of half a sector", func() error { return d.Write(ctx, 0, [][]byte{make([]byte, 100)}, false) }, figures{errors: 1}, target.ErrAlignment},
		{"unmap beyond the end", func() error { return d.Unmap(ctx, []target.Range{{LBA: 0, Blocks: 2049}}) }, figures{errors: 1}, target.ErrRange},
	} {
		b := now()
		if err := c.do(); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", c.name, err)
		}
		a := now()
		got := figures{a.reads - b.reads, a.readBytes - b.readBytes, a.writes - b.writes, a.writeBytes - b.writeBytes, a.unmaps - b.unmaps, a.unmapBytes - b.unmapBytes, a.errors - b.errors}
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// Who waits for blocks that another request has locked waits in the queue, and the wait is part of the whole command.
func TestLockedBlocksQueue(t *testing.T) {
	const delay = 60 * time.Millisecond
	_, d := device(t, 1<<20, 4096)
	unlock, _, err := d.locks.lock(t.Context(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- d.Write(t.Context(), 1, [][]byte{make([]byte, 4096)}, false) }()
	go func() { done <- d.Read(t.Context(), 2, [][]byte{make([]byte, 8192)}) }()
	time.Sleep(delay)
	unlock()
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	took := func(h *meter.Histogram) (uint64, time.Duration) {
		c := h.Counts()
		return c.N(), time.Duration(c.Nanos)
	}
	for name, h := range map[string]*meter.Histogram{"read queue": &d.meter.ReadQueue, "write queue": &d.meter.WriteQueue, "reads": &d.meter.Reads.Histogram, "writes": &d.meter.Writes.Histogram} {
		if n, in := took(h); n != 1 || in < delay/2 {
			t.Errorf("%s: %d times, %v", name, n, in)
		}
	}
	if n, in := took(&d.meter.Journal); n != 1 || in > delay/2 {
		t.Errorf("journal: %d times, %v", n, in)
	}
}
