package guest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// through dials a path whose target sends back what it gets.
func through(t *testing.T) (*Path, net.Conn) {
	t.Helper()
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Add(1)
	go func() {
		defer serving.Done()
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			serving.Add(1)
			go func() {
				defer serving.Done()
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	p, err := NewPath()
	if err != nil {
		t.Fatal(err)
	}
	p.To(echo.Addr().String())
	c, err := net.Dial("tcp", p.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		p.Close()
		echo.Close()
		serving.Wait()
	})
	return p, c
}

// exchange sends n bytes and returns what comes back.
func exchange(t *testing.T, c net.Conn, n int) (sent, got []byte) {
	t.Helper()
	sent, got = bytes.Repeat([]byte{7}, n), make([]byte, n)
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	return sent, got
}

// TestPath: nothing passes a cut, nothing is lost by it, one byte is changed when asked, and a break is heard.
func TestPath(t *testing.T) {
	p, c := through(t)
	if sent, got := exchange(t, c, 100<<10); !bytes.Equal(sent, got) {
		t.Fatal("a path changes what it carries")
	}
	p.Cut()
	if _, err := c.Write([]byte("through a cut")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatalf("%d bytes came through a cut", n)
	}
	_ = c.SetReadDeadline(time.Time{})
	p.Mend()
	got := make([]byte, len("through a cut"))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "through a cut" {
		t.Fatalf("after the cut: %q, %v", got, err)
	}
	for _, flip := range []func(){p.FlipTowardsTarget, p.FlipTowardsGuest} {
		flip()
		sent, got := exchange(t, c, flippable)
		differ := 0
		for i := range sent {
			if sent[i] != got[i] {
				differ++
			}
		}
		if differ > 1 || p.Flipped() != (differ == 1) {
			t.Errorf("%d bytes differ; flipped: %v", differ, p.Flipped())
		}
		exchange(t, c, 256<<10) // where the 4 KiB came in pieces
		if !p.Flipped() {
			t.Error("no byte was changed")
		}
	}
	p.Break()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a broken path carries")
	}
}

// TestPathToTheDead: a connection that is made through a cut whose far end is gone hears nothing of that, and is
// carried once the far end is back.
func TestPathToTheDead(t *testing.T) {
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := gone.Addr().String()
	p, err := NewPath()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.To(address)
	p.Cut()
	gone.Close()
	c, err := net.Dial("tcp", p.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	back, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	p.Mend()
	s, err := back.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}
