package hostile

import (
	"bytes"
	"net"
	"testing"
)

// TestSentIsSeeded: the same seed sends the same bytes, to a peer that only listens.
func TestSentIsSeeded(t *testing.T) {
	send := func() []byte {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = got.ReadFrom(c)
				c.Close()
			}
		}()
		r, err := ISCSI(t.Context(), Options{Network: "tcp", Address: l.Addr().String(), Seed: 3, PDUs: 200, Workers: 1}, "iqn.x")
		if err != nil {
			t.Fatal(err)
		}
		if r.PDUs < 200 || r.Connections == 0 {
			t.Fatalf("sent %+v", r)
		}
		l.Close()
		<-done
		return got.Bytes()
	}
	if a, b := send(), send(); !bytes.Equal(a, b) {
		t.Fatalf("two runs of one seed differ: %d and %d bytes", len(a), len(b))
	}
}

func TestNobodyListeningIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	if _, err := ISCSI(t.Context(), Options{Network: "tcp", Address: addr, PDUs: 10}, "iqn.x"); err == nil {
		t.Fatal("no error")
	}
}
