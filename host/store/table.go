package store

import (
	"container/list"
	"context"
	"fmt"
)

// tableCache keeps tables of segments, against which dedup hits are verified. Duplicates come in
// runs, so that one table serves many lookups. It belongs to the packer.
type tableCache struct {
	limit, bytes int64
	tables       map[uint32]*list.Element
	order        list.List // of *table, last used first
}

type table struct {
	segment uint32
	slots   []slot
}

const slotMemory = 28

func (c *tableCache) get(n uint32) []slot {
	if e := c.tables[n]; e != nil {
		c.order.MoveToFront(e)
		return e.Value.(*table).slots
	}
	return nil
}

func (c *tableCache) put(n uint32, slots []slot) {
	if c.tables == nil {
		c.tables = map[uint32]*list.Element{}
	}
	c.drop(n)
	c.tables[n] = c.order.PushFront(&table{n, slots})
	c.bytes += int64(len(slots)) * slotMemory
	for c.bytes > c.limit && c.order.Len() > 1 {
		c.drop(c.order.Back().Value.(*table).segment)
	}
}

func (c *tableCache) drop(n uint32) {
	if e := c.tables[n]; e != nil {
		c.order.Remove(e)
		delete(c.tables, n)
		c.bytes -= int64(len(e.Value.(*table).slots)) * slotMemory
	}
}

// table returns the slots of segment n. Only the packer calls it.
func (st *Store) table(ctx context.Context, n uint32) ([]slot, error) {
	st.mu.RLock()
	b := st.inMemory[n]
	st.mu.RUnlock()
	if b != nil {
		return b.slots, nil // of a sealed builder nothing changes; the open one is the packer's own
	}
	if slots := st.tables.get(n); slots != nil {
		return slots, nil
	}
	_, slots, _, err := st.readTable(ctx, n)
	if err != nil {
		return nil, err
	}
	st.tables.put(n, slots)
	return slots, nil
}

// readTable reads trailer, slots and log of data segment n from the LUN.
func (st *Store) readTable(ctx context.Context, n uint32) (t trailer, slots []slot, log []byte, err error) {
	end := int64(n+1) * SegmentBytes
	p := make([]byte, tableGuess)
	if err = st.opt.Segments.ReadAt(ctx, p, end-tableGuess); err != nil {
		return t, nil, nil, fmt.Errorf("store: read table of segment %d: %w", n, err)
	}
	if t, err = st.checkTrailer(n, p[tableGuess-BlockBytes:]); err != nil {
		return t, nil, nil, err
	}
	if !t.isData() {
		return t, nil, nil, fmt.Errorf("store: segment %d is no data segment: %w", n, ErrCorrupt)
	}
	if from := t.tableOffset() / BlockBytes * BlockBytes; SegmentBytes-from > tableGuess {
		p = make([]byte, SegmentBytes-from)
		if err = st.opt.Segments.ReadAt(ctx, p, end-int64(len(p))); err != nil {
			return t, nil, nil, fmt.Errorf("store: read table of segment %d: %w", n, err)
		}
	}
	p = p[len(p)-(SegmentBytes-t.tableOffset()) : len(p)-BlockBytes]
	if crc(p) != t.table {
		return t, nil, nil, fmt.Errorf("store: table of segment %d: %w", n, ErrCorrupt)
	}
	tail := int(t.slots) * t.slotBytes()
	if slots, err = t.decodeSlots(p[:tail]); err != nil {
		return t, nil, nil, fmt.Errorf("store: segment %d: %w", n, err)
	}
	return t, slots, p[tail:], nil
}

// checkTrailer decodes p as the trailer of segment n of this store.
func (st *Store) checkTrailer(n uint32, p []byte) (trailer, error) {
	t, err := decodeTrailer(p)
	if err != nil {
		return t, fmt.Errorf("store: segment %d: %w", n, err)
	}
	if t.uuid != st.uuid || t.segment != n {
		return t, fmt.Errorf("store: the trailer of segment %d says segment %d of store %x: %w", n, t.segment, t.uuid, ErrCorrupt)
	}
	return t, nil
}
