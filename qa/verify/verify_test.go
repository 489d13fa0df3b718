package verify

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// mem is a device that can forget, tear and refuse writes.
type mem struct {
	mu   sync.Mutex
	data []byte
	fail func(off int64, p []byte) ([]byte, error) // what reaches the medium, and what the caller is told
}

func (m *mem) ReadAt(_ context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(p, m.data[off:])
	return nil
}

func (m *mem) WriteAt(_ context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		q, err := m.fail(off, p)
		copy(m.data[off:], q)
		return err
	}
	copy(m.data[off:], p)
	return nil
}

func run(t *testing.T, m *mem) error {
	t.Helper()
	w, err := New(Options{Seed: 7, Offset: 1 << 20, Bytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for w.Acked() < 500 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if err := w.Run(ctx, m); err != nil && m.fail == nil {
		t.Fatal(err)
	}
	_, err = w.Check(t.Context(), m)
	return err
}

func TestHonestDevice(t *testing.T) {
	if err := run(t, &mem{data: make([]byte, 4<<20)}); err != nil {
		t.Fatal(err)
	}
}

func TestFailedWritesMayGoEitherWay(t *testing.T) {
	var n int
	m := &mem{data: make([]byte, 4<<20)}
	m.fail = func(_ int64, p []byte) ([]byte, error) {
		if n++; n%3 == 0 {
			return p[:len(p)/BlockBytes/2*BlockBytes], errors.New("cut")
		}
		return p, nil
	}
	if err := run(t, m); err != nil {
		t.Fatal(err)
	}
}

func TestLiesAreFound(t *testing.T) {
	lies := map[string]func(n int, p []byte) []byte{
		"lost": func(n int, p []byte) []byte { return nil },
		"torn": func(n int, p []byte) []byte { return p[:len(p)-512] },
		"rot": func(n int, p []byte) []byte {
			q := append([]byte(nil), p...)
			q[100] ^= 1
			return q
		},
	}
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			var n int
			m := &mem{data: make([]byte, 4<<20)}
			m.fail = func(_ int64, p []byte) ([]byte, error) {
				if n++; n > 400 && n%2 == 0 {
					return lie(n, p), nil
				}
				return p, nil
			}
			if err := run(t, m); err == nil {
				t.Fatal("a device that lies passed")
			}
		})
	}
}

// blind is a device of which a part answers reads with errors.
type blind struct {
	*mem
	from, to int64
}

func (b blind) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < b.to && off+int64(len(p)) > b.from {
		return errors.New("unreadable")
	}
	return b.mem.ReadAt(ctx, p, off)
}

// TestCheckReadable: what answers with an error is counted, what answers with the wrong data is found.
func TestCheckReadable(t *testing.T) {
	m := &mem{data: make([]byte, 4<<20)}
	w, err := New(Options{Seed: 7, Offset: 1 << 20, Bytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for w.Acked() < 500 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if err := w.Run(ctx, m); err != nil {
		t.Fatal(err)
	}
	b := blind{m, 1<<20 + 10*BlockBytes, 1<<20 + 15*BlockBytes}
	if r, err := w.CheckReadable(t.Context(), b); err != nil || r.Unreadable != 5 {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := w.Check(t.Context(), b); err == nil {
		t.Fatal("Check passes over errors")
	}
	m.data[1<<20+20*BlockBytes+100] ^= 1
	if _, err := w.CheckReadable(t.Context(), b); !errors.Is(err, ErrTorn) {
		t.Fatalf("rot beside errors: %v", err)
	}
}
