package store

import "slices"

// near has the tables of segments in which duplicates were found lately, by fingerprint. An index that is too small for all blocks has
// a sample of them; who finds one block of a run by it finds the others here. It belongs to the packer.
type near struct {
	tables []*nearTable // last hit first
}

// nearTables are kept: with 8,000 blocks each, 2 MiB of memory.
const nearTables = 16

type nearTable struct {
	segment uint32
	slots   []slot
	at      map[uint64]uint16 // by the beginning of the fingerprint
}

// hit makes the segment, whose table is slots, the one that is looked in first.
func (x *near) hit(segment uint32, slots []slot) {
	i := slices.IndexFunc(x.tables, func(t *nearTable) bool { return t.segment == segment })
	if i >= 0 && len(slots) <= len(x.tables[i].slots)*5/4 { // that of an open segment grows
		x.first(i)
		return
	}
	t := &nearTable{segment, slots, make(map[uint64]uint16, len(slots))}
	for i := range slots {
		t.at[le.Uint64(slots[i].fp[:])] = uint16(i)
	}
	if i < 0 {
		if len(x.tables) < nearTables {
			x.tables = append(x.tables, nil)
		}
		i = len(x.tables) - 1
	}
	x.tables[i] = t
	x.first(i)
}

func (x *near) first(i int) {
	t := x.tables[i]
	copy(x.tables[1:i+1], x.tables[:i])
	x.tables[0] = t
}

// find returns where a block with this fingerprint lies, or 0. Tables of segments that are not usable are forgotten.
func (x *near) find(d *digest, usable func(segment uint32) bool) loc {
	key := le.Uint64(d[:])
	for i := 0; i < len(x.tables); i++ {
		t := x.tables[i]
		n, ok := t.at[key]
		if !ok || t.slots[n].fp != *d {
			continue
		}
		if !usable(t.segment) {
			x.tables = slices.Delete(x.tables, i, i+1)
			i--
			continue
		}
		x.first(i)
		return makeLoc(t.segment, int(t.slots[n].off), int(t.slots[n].len))
	}
	return 0
}
