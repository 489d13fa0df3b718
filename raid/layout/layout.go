// Package layout computes where each strip of an array lies: (stripe, strip) → (member, slot), and
// back. It is arithmetic: no state, no I/O, nothing stored but n, k, m and the number of spares.
//
// # The arrangement
//
// A row is the same slot of all n members. Its first c = n - spares columns hold strips, the last ones are
// spare space. Stripes of w = k+m strips are laid one behind the other over the rows' strip columns, so that
// a stripe may end in the row after the one where it began. A group is the fewest rows that hold whole
// stripes only: w/gcd(w,c) rows, c/gcd(w,c) stripes. Within a group one permutation maps columns to members;
// since w ≤ c, no member holds two strips of a stripe.
//
// # The permutations
//
// Base permutation b, shuffled from a fixed seed, is developed over n groups: group b*n+i maps column x to
// member (base[b][x] + i) mod n. So in every n consecutive groups (counted from a multiple of n) each member
// is each column exactly once: data, parity and spare space are balanced exactly. How evenly a rebuild spreads
// depends on the base permutations; there are Bases of them, then they repeat, and the package's test holds the
// worst member's share of a rebuild to 5 % above the mean for every geometry it tries.
//
// This is OpenZFS dRAID's arrangement (vdev_draid.c) with its development by rotation. Its table of hand-picked
// seeds is not needed: with 256 bases of 64 members the shuffles average out.
//
// The seed and Bases are part of the on-media format: changing them moves every strip of every array.
package layout

import (
	"errors"
	"fmt"
)

// Limits of an array.
const (
	MaxMembers = 64
	MaxData    = 32
	MaxParity  = 4
	MaxSpares  = 8
	// Bases is the number of base permutations.
	Bases = 256
)

// ErrGeometry: the numbers do not make an array.
var ErrGeometry = errors.New("layout: impossible geometry")

// Layout is the arithmetic of one geometry. It is immutable and safe for concurrent use.
type Layout struct {
	n, k, m, spares int
	width, columns  int // strips of a stripe; strip columns of a row
	groupRows       uint64
	groupStripes    uint64
	base            [Bases][MaxMembers]uint8 // column → member
	inverse         [Bases][MaxMembers]uint8 // member → column
}

// Check tells whether n members can carry k data and m parity strips and spares columns of spare space.
func Check(n, k, m, spares int) error {
	switch {
	case k < 1 || k > MaxData:
		return fmt.Errorf("%w: %d data strips (1 to %d)", ErrGeometry, k, MaxData)
	case m < 1 || m > MaxParity:
		return fmt.Errorf("%w: %d parity strips (1 to %d)", ErrGeometry, m, MaxParity)
	case spares < 0 || spares > MaxSpares:
		return fmt.Errorf("%w: %d spares (0 to %d)", ErrGeometry, spares, MaxSpares)
	case n > MaxMembers:
		return fmt.Errorf("%w: %d members (at most %d)", ErrGeometry, n, MaxMembers)
	case n < k+m+spares:
		return fmt.Errorf("%w: %d members hold no %d+%d and %d spares", ErrGeometry, n, k, m, spares)
	}
	return nil
}

// New makes the layout of n members, k data and m parity strips, and spares columns of spare space.
func New(n, k, m, spares int) (*Layout, error) {
	if err := Check(n, k, m, spares); err != nil {
		return nil, err
	}
	l := &Layout{n: n, k: k, m: m, spares: spares, width: k + m, columns: n - spares}
	g := gcd(l.width, l.columns)
	l.groupRows = uint64(l.width / g)
	l.groupStripes = uint64(l.columns / g)
	for b := range l.base {
		shuffle(&l.base[b], n, uint64(b))
		for c := range n {
			l.inverse[b][l.base[b][c]] = uint8(c)
		}
	}
	return l, nil
}

// Strip returns the member and slot of a strip of a stripe, before any sparing.
func (l *Layout) Strip(stripe uint64, strip int) (member int, slot uint64) {
	group, at := stripe/l.groupStripes, stripe%l.groupStripes
	pos := at*uint64(l.width) + uint64(strip)
	column := int(pos % uint64(l.columns))
	return l.member(group, column), group*l.groupRows + pos/uint64(l.columns)
}

// Spare returns the member whose slot is spare space number spare in the row of that slot.
func (l *Layout) Spare(slot uint64, spare int) (member int) {
	return l.member(slot/l.groupRows, l.columns+spare)
}

// Locate is the inverse of Strip: what a slot of a member holds. A spare slot answers strip -1 and
// the number of the spare in stripe.
func (l *Layout) Locate(member int, slot uint64) (stripe uint64, strip int) {
	group, row := slot/l.groupRows, slot%l.groupRows
	column := l.column(group, member)
	if column >= l.columns {
		return uint64(column - l.columns), -1
	}
	pos := row*uint64(l.columns) + uint64(column)
	return group*l.groupStripes + pos/uint64(l.width), int(pos % uint64(l.width))
}

// Stripes returns how many stripes fit in slots slots of each member.
func (l *Layout) Stripes(slots uint64) uint64 {
	return slots / l.groupRows * l.groupStripes
}

// Slots returns how many slots of each member are in use when there are slots of them: whole groups.
func (l *Layout) Slots(slots uint64) uint64 { return slots / l.groupRows * l.groupRows }

// Members, Data, Parity, Spares and Width return n, k, m, the spare columns and k+m.
func (l *Layout) Members() int { return l.n }
func (l *Layout) Data() int    { return l.k }
func (l *Layout) Parity() int  { return l.m }
func (l *Layout) Spares() int  { return l.spares }
func (l *Layout) Width() int   { return l.width }

// GroupStripes and GroupRows are the size of a group: the stripes, and the slots of each member that hold them.
func (l *Layout) GroupStripes() uint64 { return l.groupStripes }
func (l *Layout) GroupRows() uint64    { return l.groupRows }

// CycleStripes is the number of stripes after which the arrangement repeats.
func (l *Layout) CycleStripes() uint64 { return uint64(Bases*l.n) * l.groupStripes }

func (l *Layout) member(group uint64, column int) int {
	turn, b := int(group%uint64(l.n)), group/uint64(l.n)%Bases
	return (int(l.base[b][column]) + turn) % l.n
}

func (l *Layout) column(group uint64, member int) int {
	turn, b := int(group%uint64(l.n)), group/uint64(l.n)%Bases
	return int(l.inverse[b][(member+l.n-turn)%l.n])
}

// shuffle is Fisher–Yates driven by splitmix64 (Steele, Lea, Flood 2014), written out because the sequence
// is part of the format and must not follow a library's.
func shuffle(p *[MaxMembers]uint8, n int, b uint64) {
	for i := range n {
		p[i] = uint8(i)
	}
	state := 0x4c65646765 ^ b*0x9e3779b97f4a7c15 ^ uint64(n)<<56
	for i := n - 1; i > 0; i-- {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		z ^= z >> 31
		j := int(z % uint64(i+1))
		p[i], p[j] = p[j], p[i]
	}
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
