package sim

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// model knows what may be read. A block has one content that was acknowledged or seen, and, after a cut,
// those of operations that were not acknowledged: whichever is read then is the content from then on.
type model struct {
	luns  map[string]*modelLUN
	hosts map[string]string // name → initiator
}

type modelLUN struct {
	kind       int
	blockBytes int
	blocks     int // of 4 KiB
	content    map[int][]byte
	maybe      map[int][][]byte
}

func newModel() *model { return &model{luns: map[string]*modelLUN{}, hosts: map[string]string{}} }

var zeros = make([]byte, blockBytes)

func (l *modelLUN) at(b int) []byte {
	if c := l.content[b]; c != nil {
		return c
	}
	return zeros
}

// set is an acknowledged write of a block: it is newer than all that was not acknowledged.
func (l *modelLUN) set(b int, data []byte) {
	l.content[b] = data
	delete(l.maybe, b)
}

// doubt is a write of a block that got no answer.
func (l *modelLUN) doubt(b int, data []byte) { l.maybe[b] = append(l.maybe[b], data) }

// saw checks a block that was read.
func (l *modelLUN) saw(b int, got []byte) error {
	if bytes.Equal(got, l.at(b)) {
		delete(l.maybe, b)
		return nil
	}
	for _, m := range l.maybe[b] {
		if bytes.Equal(got, m) {
			l.set(b, m)
			if bytes.Equal(m, zeros) {
				delete(l.content, b) // of a store LUN: may be written again
			}
			return nil
		}
	}
	return fmt.Errorf("block %d: read %s, want %s or one of %d not acknowledged", b, describe(got), describe(l.at(b)), len(l.maybe[b]))
}

// runs are {first, count} of blocks that say something: all that were written, as few reads, and somewhere else.
func (l *modelLUN) runs(rng *rand.Rand) (runs [][2]int) {
	of := slices.Collect(maps.Keys(l.content))
	of = slices.AppendSeq(of, maps.Keys(l.maybe))
	slices.Sort(of)
	for _, b := range of {
		if n := len(runs) - 1; n >= 0 && b < runs[n][0]+runs[n][1]+4 && b < runs[n][0]+100 {
			runs[n][1] = b + 1 - runs[n][0]
			continue
		}
		runs = append(runs, [2]int{b, 1})
	}
	return append(runs, [2]int{rng.IntN(l.blocks), 8})
}

// describe shows the first bytes of each distinct sector.
func describe(b []byte) string {
	s := ""
	var last []byte
	for i := 0; i < len(b); i += 512 {
		if x := b[i : i+16]; !bytes.Equal(x, last) {
			s += fmt.Sprintf("[%d]%x ", i/512, x)
			last = x
		}
	}
	return s
}
