package initiator

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

const engineTarget = "iqn.2026-11.test:engine"

// slow is a device whose writes can be held, to see what an engine does with those of a dead session.
type slow struct {
	target.Device
	mu   sync.Mutex
	gate chan struct{} // nil: open
	in   chan struct{} // told when a write is held
}

func (s *slow) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	s.mu.Lock()
	gate := s.gate
	s.gate = nil // one write only
	s.mu.Unlock()
	if gate != nil {
		s.in <- struct{}{}
		<-gate
	}
	return s.Device.Write(ctx, lba, src, fua)
}

// engines are two controllers of our own target engine over one device.
func engines(t *testing.T, bytes int64) (portals []string, ctl [2]*scsi.Target, dev *slow) {
	t.Helper()
	m, err := mem.New(mem.Options{Bytes: bytes, BlockBytes: 4096, Name: "disk"})
	if err != nil {
		t.Fatal(err)
	}
	dev = &slow{Device: m, in: make(chan struct{}, 1)}
	for i := range 2 {
		srv, err := iscsi.NewServer(iscsi.Options{PortalGroupTag: uint16(i + 1)})
		if err != nil {
			t.Fatal(err)
		}
		tg := scsi.NewTarget(engineTarget, scsi.Options{})
		if err := tg.Attach(2, dev, scsi.UnitOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := srv.AddTarget(tg); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { srv.Serve(context.Background(), l); close(done) }()
		t.Cleanup(func() { srv.Close(); <-done })
		portals, ctl[i] = append(portals, l.Addr().String()), tg
	}
	own(ctl, 0)
	return portals, ctl, dev
}

func own(ctl [2]*scsi.Target, owner int) {
	states := [2]target.AccessState{target.Standby, target.Standby}
	states[owner] = target.Optimized
	for _, c := range ctl {
		c.SetPortGroups([]target.PortGroup{{ID: 1, State: states[0], Ports: []uint16{1}}, {ID: 2, State: states[1], Ports: []uint16{2}}})
	}
}

func openEngine(t *testing.T, portals []string, digests bool) *Device {
	t.Helper()
	d, err := Open(context.Background(), Config{Portals: portals, Target: engineTarget, LUN: 2, Initiator: "iqn.2026-11.test:host", Digests: digests,
		ProbeInterval: 20 * time.Millisecond, MaxBackoff: 50 * time.Millisecond, PingInterval: 50 * time.Millisecond, PingTimeout: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Our initiator and our target: data of all sizes, digests, and ownership that moves under load.
func TestOwnEngine(t *testing.T) {
	for _, digests := range []bool{false, true} {
		portals, ctl, _ := engines(t, 32<<20)
		d := openEngine(t, portals, digests)
		want := pattern(int(d.Size()), 3)
		ctx := context.Background()
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				part := want[i<<22 : (i+1)<<22]
				for off := 0; off < len(part); {
					n := min(4096*(1+(off>>12*7)%300), len(part)-off)
					at := int64(i<<22 + off)
					if err := d.WriteAt(ctx, part[off:off+n], at); err != nil {
						t.Error(err)
					}
					got := make([]byte, n)
					if err := d.ReadAt(ctx, got, at); err != nil || !bytes.Equal(got, part[off:off+n]) {
						t.Errorf("read of %d at %d: %v", n, at, err)
					}
					off += n
				}
			})
		}
		for i := range 10 {
			own(ctl, (i+1)%2)
			time.Sleep(5 * time.Millisecond)
		}
		wg.Wait()
		if err := d.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if err := d.Unmap(ctx, 0, 8<<20); err != nil {
			t.Fatal(err)
		}
		copy(want, make([]byte, 8<<20))
		got := make([]byte, len(want))
		if err := d.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("at the end: %v, equal %v", err, bytes.Equal(got, want))
		}
		if err := d.ReadAt(ctx, got[:4096], d.Size()); !errors.Is(err, target.ErrRange) {
			t.Fatalf("beyond the end: %v", err)
		}
	}
}

// The ghost: a write hangs in the target, its session is lost and it is sent again; a newer write to
// the block is acknowledged; then the first one goes on. The newer data must stay.
func TestGhost(t *testing.T) {
	portals, _, dev := engines(t, 1<<20)
	d := openEngine(t, portals[:1], false)
	ctx := context.Background()
	gate := make(chan struct{})
	dev.mu.Lock()
	dev.gate = gate
	dev.mu.Unlock()
	first := make(chan error, 1)
	go func() { first <- d.WriteAt(ctx, bytes.Repeat([]byte{1}, 4096), 0) }()
	<-dev.in
	d.mu.Lock()
	sess := d.paths[0].sess
	d.mu.Unlock()
	sess.Kill(errors.New("the test cuts the cable"))
	<-sess.Dead()
	// The target must not let the new session write before the old write has ended.
	go func() { time.Sleep(100 * time.Millisecond); close(gate) }()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(ctx, bytes.Repeat([]byte{2}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-gate:
	default:
		t.Error("the new session wrote while the old session's write was still held")
	}
	got := make([]byte, 4096)
	if err := d.ReadAt(ctx, got, 0); err != nil || got[0] != 2 {
		t.Fatalf("reads %d, %v; the older write came back", got[0], err)
	}
}

func benchmarkIO(b *testing.B, parallel, size int, write bool) {
	m, _ := mem.New(mem.Options{Bytes: 64 << 20, BlockBytes: 4096, Name: "disk"})
	srv, err := iscsi.NewServer(iscsi.Options{})
	if err != nil {
		b.Fatal(err)
	}
	tg := scsi.NewTarget(engineTarget, scsi.Options{})
	tg.Attach(2, m, scsi.UnitOptions{})
	srv.AddTarget(tg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() { srv.Serve(context.Background(), l); close(done) }()
	defer func() { srv.Close(); <-done }()
	d, err := Open(context.Background(), Config{Portals: []string{l.Addr().String()}, Target: engineTarget, LUN: 2, Initiator: "iqn.2026-11.test:host"})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for i := range parallel {
		wg.Go(func() {
			p := make([]byte, size)
			for n := i; n < b.N; n += parallel {
				off := int64(n*size) % (64 << 20)
				var err error
				if write {
					err = d.WriteAt(context.Background(), p, off)
				} else {
					err = d.ReadAt(context.Background(), p, off)
				}
				if err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkRead4K(b *testing.B)      { benchmarkIO(b, 1, 4096, false) }
func BenchmarkRead4Kx32(b *testing.B)   { benchmarkIO(b, 32, 4096, false) }
func BenchmarkWrite4K(b *testing.B)     { benchmarkIO(b, 1, 4096, true) }
func BenchmarkWrite4Kx32(b *testing.B)  { benchmarkIO(b, 32, 4096, true) }
func BenchmarkRead128Kx8(b *testing.B)  { benchmarkIO(b, 8, 128<<10, false) }
func BenchmarkWrite128Kx8(b *testing.B) { benchmarkIO(b, 8, 128<<10, true) }
