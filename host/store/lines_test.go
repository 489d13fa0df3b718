package store

import (
	"errors"
	"testing"
)

// The buffer of a line is another's only when nobody uses it any more, however the line left the cache.
func TestLineBuffers(t *testing.T) {
	fill := func(c *lineCache, n uint32) *line {
		l, mine := c.get(lineKey{n, 0})
		if mine {
			l.data = c.buffer()
			close(l.ready)
		}
		return l
	}
	done := func(c *lineCache, l *line) { c.done(lineSet{l.key: l}) }
	same := func(a, b []byte) bool { return &a[0] == &b[0] }

	c := newLineCache(0)
	a := fill(c, 1)
	was := a.data
	c.drop(a.key)
	b := fill(c, 1) // another line of that name
	if same(was, b.data) {
		t.Fatal("dropped in use: its buffer is used again")
	}
	fill(c, 1)
	done(c, b)
	if x := c.buffer(); same(x, b.data) {
		t.Fatal("its buffer is used again with one user left")
	}
	done(c, b)
	done(c, a)
	if x := c.buffer(); !same(x, was) {
		t.Error("the buffer of a line that was dropped is lost")
	}
	was = b.data
	c.drop(b.key)
	if x := c.buffer(); !same(x, was) {
		t.Error("the buffer of a line that nobody used is lost")
	}

	failed := fill(c, 2)
	other, _ := c.get(failed.key)
	was, failed.err = failed.data, errors.New("failed")
	done(c, failed)
	if x := c.buffer(); same(x, was) {
		t.Fatal("failed, with a user left: its buffer is used again")
	}
	done(c, other)
	if x := c.buffer(); !same(x, was) {
		t.Error("the buffer of a line that failed is lost")
	}

	// Lines that are in use stay when there are too many; the others go, oldest first, and their buffers with them.
	var used [][]byte
	for n := range uint32(2 * linesAtOnce) {
		used = append(used, fill(c, 10+n).data)
	}
	for n := range uint32(4 * freeLines) {
		l := fill(c, 100+n)
		for i, p := range used {
			if same(l.data, p) {
				t.Fatalf("the buffer of line %d, which is in use, is used again", i)
			}
		}
		done(c, l)
	}
	var all []*line
	for n := range uint32(2 * freeLines) {
		all = append(all, fill(c, 1000+n))
	}
	for _, l := range all {
		done(c, l)
		c.drop(l.key)
	}
	if len(c.free) != freeLines || len(c.lines) > c.limit+1 {
		t.Errorf("%d buffers kept, %d lines", len(c.free), len(c.lines))
	}
}
