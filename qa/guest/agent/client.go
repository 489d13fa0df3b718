package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// ErrGone: the guest's end of the line is closed.
var ErrGone = errors.New("agent: the guest is gone")

// Client is the test's end. Its methods may be called from any goroutine.
type Client struct {
	Hello Hello
	line  io.ReadWriteCloser
	done  chan struct{} // closed when the reader ended
	why   error         // set before done is closed

	writing sync.Mutex

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan Answer
}

// NewClient waits for the guest's hello. It ends when line does: whoever gives up closes it.
func NewClient(line io.ReadWriteCloser) (*Client, error) {
	c := &Client{line: line, done: make(chan struct{}), waiting: map[uint64]chan Answer{}}
	in := newLines(line)
	if err := in.next(&c.Hello); err != nil {
		return nil, fmt.Errorf("%w before its hello: %w", ErrGone, err)
	}
	if c.Hello.Version != Version {
		return nil, fmt.Errorf("agent: the guest speaks version %d, this is %d", c.Hello.Version, Version)
	}
	go c.read(in)
	return c, nil
}

func (c *Client) read(in lines) {
	defer close(c.done)
	for {
		var a Answer
		if c.why = in.next(&a); c.why != nil {
			return
		}
		c.mu.Lock()
		to := c.waiting[a.ID]
		delete(c.waiting, a.ID)
		c.mu.Unlock()
		if to != nil {
			to <- a
		}
	}
}

// Do runs a command in the guest and waits for its end. An error means that there is no answer.
func (c *Client) Do(ctx context.Context, r Request) (Answer, error) {
	to := make(chan Answer, 1)
	c.mu.Lock()
	c.last++
	r.ID = c.last
	c.waiting[r.ID] = to
	c.mu.Unlock()
	c.writing.Lock()
	err := write(c.line, r)
	c.writing.Unlock()
	if err != nil {
		return Answer{}, fmt.Errorf("%w: %w", ErrGone, err)
	}
	select {
	case a := <-to:
		return a, nil
	case <-c.done:
		return Answer{}, fmt.Errorf("%w: %w", ErrGone, c.why)
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.waiting, r.ID)
		c.mu.Unlock()
		return Answer{}, context.Cause(ctx)
	}
}

// Close closes the line and waits for the reader.
func (c *Client) Close() error {
	err := c.line.Close()
	<-c.done
	return err
}
