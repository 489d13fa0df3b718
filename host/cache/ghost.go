package cache

import (
	"math/bits"
	"sync"
)

// ghost remembers the names that were missed lately, about as many as the cache has lines, and so
// tells what is worth its place: a line that is missed again while its name is remembered. What
// passes once, as a backup does, is never written. This is the filter of LARC (Huang et al., MSST
// 2013), with the ghost queue's length fixed, and S3-FIFO's (Yang et al., SOSP 2023) where its
// small queue holds no data.
//
// The queue is cut into rows of 16, in which a name is found by its hash; a row forgets its
// oldest. 4 bytes for each name.
type ghost struct {
	rows  [][16]uint32 // newest first: 31 bits of the hash, and whether it was missed again; 0: none
	locks [64]sync.Mutex
}

func newGhost(names uint32) *ghost { return &ghost{rows: make([][16]uint32, max(1, names/16))} }

func (g *ghost) row(n name) (row *[16]uint32, tag uint32, mu *sync.Mutex) {
	h := n.hash()
	i, rest := bits.Mul64(h, uint64(len(g.rows)))
	return &g.rows[i], uint32(rest>>32) | 1, &g.locks[i%64]
}

const missedAgain = 1 << 31

// place returns where in the row the tag stands, or -1.
func place(row *[16]uint32, tag uint32) int {
	for i, e := range row {
		if e&^missedAgain == tag&^missedAgain {
			return i
		}
	}
	return -1
}

func push(row *[16]uint32, tag uint32) {
	copy(row[1:], row[:15])
	row[0] = tag &^ missedAgain
}

// miss notes that a name was asked for in vain.
func (g *ghost) miss(n name) {
	row, tag, mu := g.row(n)
	mu.Lock()
	defer mu.Unlock()
	if i := place(row, tag); i >= 0 {
		row[i] |= missedAgain
	} else {
		push(row, tag)
	}
}

// remember puts a name that leaves the cache, though it was read, where its next miss lets it in.
func (g *ghost) remember(n name) {
	row, tag, mu := g.row(n)
	mu.Lock()
	defer mu.Unlock()
	if place(row, tag) < 0 {
		push(row, tag)
	}
}

// admit says whether a line that is offered deserves a place. One that nobody asked for, as those
// of a segment just sealed, counts as missed once.
func (g *ghost) admit(n name) bool {
	row, tag, mu := g.row(n)
	mu.Lock()
	defer mu.Unlock()
	i := place(row, tag)
	switch {
	case i < 0:
		push(row, tag)
		return false
	case row[i]&missedAgain == 0:
		return false
	}
	copy(row[i:], row[i+1:])
	row[15] = 0
	return true
}
