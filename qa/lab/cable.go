package lab

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Cable is the partner link of two virtual controllers: each QEMU listens on a unix socket, and the cable
// connects to both and carries Ethernet frames between them. Like a real one it loses what a dead or frozen
// end does not take, and works again when the end comes back.
//
// Rejected: one QEMU dialling the other. QEMU 7.2's stream netdev never dials again, so that a controller that
// lost its partner's process once would stay without it until its own restart.
//
// QEMU's framing on the socket, both ways:
//
//	offset  size  field
//	0       4     length of the frame, big endian
//	4       n     Ethernet frame
type Cable struct {
	paths  [2]string
	outbox [2]chan []byte // frames towards each end

	cancel context.CancelFunc
	done   sync.WaitGroup

	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]struct{}
}

const (
	// cableQueue frames wait for an end; what comes beyond is lost, as in a switch.
	cableQueue = 512
	// maxFrame is QEMU's NET_BUFSIZE.
	maxFrame = 4096 + 65536
	redial   = 50 * time.Millisecond
)

// newCable begins to carry frames; the ends need not be there yet.
func newCable(a, b string) *Cable {
	ctx, cancel := context.WithCancel(context.Background())
	c := &Cable{paths: [2]string{a, b}, cancel: cancel, conns: map[net.Conn]struct{}{}}
	for i := range c.outbox {
		c.outbox[i] = make(chan []byte, cableQueue)
	}
	for i := range c.paths {
		c.done.Add(1)
		go func() {
			defer c.done.Done()
			c.keep(ctx, i)
		}()
	}
	return c
}

// Cut unplugs the cable, Mend plugs it in again.
func (c *Cable) Cut() { c.set(true) }

// Mend undoes Cut.
func (c *Cable) Mend() { c.set(false) }

func (c *Cable) set(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
}

func (c *Cable) isCut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

// close ends the cable and waits for its goroutines.
func (c *Cable) close() {
	c.cancel()
	c.mu.Lock()
	for conn := range c.conns {
		conn.Close()
	}
	c.mu.Unlock()
	c.done.Wait()
}

// keep holds a connection to one end, for as long as there is one.
func (c *Cable) keep(ctx context.Context, end int) {
	for ctx.Err() == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", c.paths[end])
		if err == nil {
			c.serve(ctx, end, conn)
		}
		select {
		case <-ctx.Done():
		case <-time.After(redial):
		}
	}
}

// serve carries frames of one connection until it breaks.
func (c *Cable) serve(ctx context.Context, end int, conn net.Conn) {
	c.mu.Lock()
	c.conns[conn] = struct{}{}
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	var writer sync.WaitGroup
	writer.Add(1)
	go func() {
		defer writer.Done()
		defer conn.Close() // ends the reader, too
		send(ctx, conn, c.outbox[end])
	}()
	c.receive(conn, c.outbox[1-end])
	cancel()
	conn.Close()
	writer.Wait()
	c.mu.Lock()
	delete(c.conns, conn)
	c.mu.Unlock()
}

func (c *Cable) receive(conn net.Conn, to chan<- []byte) error {
	in := bufio.NewReaderSize(conn, 1<<18)
	var head [4]byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(head[:])
		if n == 0 || n > maxFrame {
			return fmt.Errorf("lab: cable: a frame of %d bytes", n)
		}
		frame := make([]byte, 4+n)
		copy(frame, head[:])
		if _, err := io.ReadFull(in, frame[4:]); err != nil {
			return err
		}
		if c.isCut() {
			continue
		}
		select {
		case to <- frame:
		default: // the other end does not take it: lost
		}
	}
}

// send writes the frames that wait, several at once.
func send(ctx context.Context, conn net.Conn, from <-chan []byte) {
	out := bufio.NewWriterSize(conn, 1<<18)
	for {
		select {
		case <-ctx.Done():
			return
		case frame := <-from:
			if _, err := out.Write(frame); err != nil {
				return
			}
			for len(from) > 0 {
				if _, err := out.Write(<-from); err != nil {
					return
				}
			}
			if out.Flush() != nil {
				return
			}
		}
	}
}
