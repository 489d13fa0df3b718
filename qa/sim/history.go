package sim

import (
	"bytes"
	"fmt"
	"slices"
)

// history knows what may be read of a LUN to which several commands are under way at a time, whose answers may come
// late or never. A block's content is linearizable: a command takes effect at one moment between its begin and its
// answer; one that has no answer, or an error, may take effect at any moment after its begin, or never.
type history struct {
	now    uint64 // counts begins and ends
	blocks map[int]*block
	writes []*command // from the oldest that is under way on
}

type block struct {
	content []byte // nil: zeros
	set     uint64 // when
	maybe   []doubt
}

type doubt struct {
	data []byte
	by   *command
}

// command is a write or a read.
type command struct {
	lo    int
	data  [][]byte // of a write
	begun uint64
	done  bool // it was answered, well or not
	ended uint64
	// of a read: what each block may be.
	may [][][]byte
}

func newHistory() *history { return &history{blocks: map[int]*block{}} }

func (h *history) at(b int) *block {
	x := h.blocks[b]
	if x == nil {
		x = &block{}
		h.blocks[b] = x
	}
	return x
}

func (x *block) bytes() []byte {
	if x.content == nil {
		return zeros
	}
	return x.content
}

// begin notes a write.
func (h *history) begin(lo int, data [][]byte) *command {
	h.now++
	c := &command{lo: lo, data: data, begun: h.now}
	for i, d := range data {
		x := h.at(lo + i)
		x.maybe = append(x.maybe, doubt{d, c})
	}
	h.writes = append(h.writes, c)
	return c
}

// answered: ok says that it was done.
func (h *history) answered(c *command, ok bool) {
	h.now++
	c.done, c.ended = true, h.now
	if !ok {
		return
	}
	for i, d := range c.data {
		x := h.at(c.lo + i)
		if x.set > c.begun {
			continue // another was acknowledged meanwhile: either may be the later one, so c stays a doubt
		}
		x.content, x.set = d, h.now
		// Writes answered before c began are overwritten; others may come after it.
		x.maybe = slices.DeleteFunc(x.maybe, func(m doubt) bool { return m.by == c || m.by.done && m.by.ended < c.begun })
	}
}

// look begins a read.
func (h *history) look(lo, n int) *command {
	h.now++
	c := &command{lo: lo, begun: h.now, may: make([][][]byte, n)}
	for i := range c.may {
		x := h.at(lo + i)
		c.may[i] = append(c.may[i], x.bytes())
		for _, m := range x.maybe {
			c.may[i] = append(c.may[i], m.data)
		}
	}
	return c
}

// saw checks what a read returned.
func (h *history) saw(c *command, got []byte) error {
	began := c.begun
	alone := h.now == began
	h.now++
	for i := range c.may {
		g := got[i*blockBytes:][:blockBytes]
		b := c.lo + i
		may := slices.ContainsFunc(c.may[i], func(m []byte) bool { return bytes.Equal(m, g) })
		for _, w := range h.writes {
			if k := b - w.lo; !may && w.begun > began && k >= 0 && k < len(w.data) {
				may = bytes.Equal(w.data[k], g)
			}
		}
		if !may {
			return fmt.Errorf("block %d: read %s, want %s or one of %d not acknowledged", b, describe(g), describe(h.at(b).bytes()), len(h.at(b).maybe))
		}
		if !alone {
			continue
		}
		// What was answered and is not seen now never will be.
		x := h.at(b)
		same := func(m doubt) bool { return bytes.Equal(m.data, g) }
		if !bytes.Equal(x.bytes(), g) {
			// A command with these data has taken effect; where several have them, any of those under way may be still to come. (Where the
			// content was the same already, one may have taken effect or not.)
			x.content, x.set = slices.Clone(g), h.now
			if i := slices.IndexFunc(x.maybe, same); i >= 0 && !slices.ContainsFunc(x.maybe[i+1:], same) {
				x.maybe = slices.Delete(x.maybe, i, i+1)
			}
		}
		x.maybe = slices.DeleteFunc(x.maybe, func(m doubt) bool { return m.by.done })
	}
	return nil
}

// trim forgets writes that no read under way can see begin.
func (h *history) trim(reads []*command) {
	oldest := h.now
	for _, r := range reads {
		oldest = min(oldest, r.begun)
	}
	h.writes = slices.DeleteFunc(h.writes, func(w *command) bool { return w.begun < oldest })
}
