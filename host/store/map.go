package store

// blockMap is a volume's map: block → where it is stored. It is a tree of two levels, nodes of pages, shared copy-on-write
// with the maps of snapshots and clones: a node or a page that more than one has is copied by who changes it, so
// that a snapshot is a copy of the list of nodes. Only the packer, and recovery before it, change maps.
//
// Which pages are shared follows from the log's order alone. So a block that the cleaner moved is pointed elsewhere
// in the shared page itself, once for all who have it, and replay does the same.
const (
	pageBytes  = pageEntries*8 + 32 // in memory
	nodeBlocks = pageEntries * nodePages
)

type page struct {
	at   [pageEntries]loc
	refs int32 // nodes that have it
	// The last pass over all maps (Store.pass) that met this page, and in which volume: each is dealt with once.
	pass uint64
	vol  uint32
}

type node struct {
	pages [nodePages]*page
	used  int
	refs  int32 // maps that have it
}

type blockMap struct {
	nodes  []*node
	mapped int64 // blocks that are stored
}

// mapUse is what the maps of a store have in common.
type mapUse struct {
	pages         int64     // that exist; a shared one counts once
	hold, release func(loc) // called for each reference that a page gains or loses
}

func (m *blockMap) page(lba uint64) *page {
	n := lba / nodeBlocks
	if n >= uint64(len(m.nodes)) || m.nodes[n] == nil {
		return nil
	}
	return m.nodes[n].pages[lba/pageEntries%nodePages]
}

func (m *blockMap) get(lba uint64) loc {
	if p := m.page(lba); p != nil {
		return p.at[lba%pageEntries]
	}
	return 0
}

// owns says whether a change at lba needs no new page.
func (m *blockMap) owns(lba uint64) bool {
	p := m.page(lba)
	return p != nil && p.refs == 1 && m.nodes[lba/nodeBlocks].refs == 1
}

// ownNode returns node i, made or copied where it is not this map's alone.
func (m *blockMap) ownNode(i uint64) *node {
	for uint64(len(m.nodes)) <= i {
		m.nodes = append(m.nodes, nil)
	}
	n := m.nodes[i]
	switch {
	case n == nil:
		n = &node{refs: 1}
	case n.refs > 1:
		c := *n
		c.refs = 1
		n.refs--
		for _, p := range c.pages {
			if p != nil {
				p.refs++
			}
		}
		n = &c
	}
	m.nodes[i] = n
	return n
}

// own returns the page of lba, made or copied where it is not this map's alone.
func (m *blockMap) own(u *mapUse, lba uint64) *page {
	n, j := m.ownNode(lba/nodeBlocks), lba/pageEntries%nodePages
	p := n.pages[j]
	switch {
	case p == nil:
		p = &page{refs: 1}
		n.used++
		u.pages++
	case p.refs > 1:
		p.refs--
		p = &page{at: p.at, refs: 1}
		u.pages++
		for _, l := range p.at {
			if l != 0 {
				u.hold(l)
			}
		}
	}
	n.pages[j] = p
	return p
}

// set stores l, which is not 0, for lba.
func (m *blockMap) set(u *mapUse, lba uint64, l loc) {
	p := m.own(u, lba)
	old := p.at[lba%pageEntries]
	p.at[lba%pageEntries] = l
	u.hold(l)
	if old != 0 {
		u.release(old)
	} else {
		m.mapped++
	}
}

// move changes from to to at lba, for all maps that share the page. False: something else is there.
func (m *blockMap) move(u *mapUse, lba uint64, from, to loc) bool {
	p := m.page(lba)
	if p == nil || p.at[lba%pageEntries] != from {
		return false
	}
	p.at[lba%pageEntries] = to
	u.hold(to)
	u.release(from)
	return true
}

// put makes p, which comes from a checkpoint, page number number. False: there is one.
func (m *blockMap) put(number uint64, p *page) bool {
	n, j := m.ownNode(number/nodePages), number%nodePages
	if n.pages[j] != nil {
		return false
	}
	n.pages[j] = p
	n.used++
	p.refs++
	for _, l := range p.at {
		if l != 0 {
			m.mapped++
		}
	}
	return true
}

// zero forgets n blocks from lba on.
func (m *blockMap) zero(u *mapUse, lba, n uint64) {
	end := min(lba+n, uint64(len(m.nodes))*nodeBlocks)
	for lba < end {
		i, j := lba/nodeBlocks, lba/pageEntries%nodePages
		if m.nodes[i] == nil {
			lba = (i + 1) * nodeBlocks
			continue
		}
		first := lba % pageEntries
		last := min(pageEntries, first+end-lba)
		p, stored := m.nodes[i].pages[j], int64(0)
		if p != nil {
			for _, l := range p.at[first:last] {
				if l != 0 {
					stored++
				}
			}
		}
		switch {
		case p != nil && last-first == pageEntries:
			n := m.ownNode(i)
			n.pages[j] = nil
			u.drop(p)
			if n.used--; n.used == 0 {
				m.nodes[i] = nil
			}
		case stored > 0:
			own := m.own(u, lba)
			for k := first; k < last; k++ {
				if own.at[k] != 0 {
					u.release(own.at[k])
					own.at[k] = 0
				}
			}
		}
		m.mapped -= stored
		lba += last - first
	}
}

// drop takes one reference to p away.
func (u *mapUse) drop(p *page) {
	if p.refs--; p.refs > 0 {
		return
	}
	u.pages--
	for _, l := range p.at {
		if l != 0 {
			u.release(l)
		}
	}
}

// share returns a map that is equal now, and changes by itself from now on.
func (m *blockMap) share() blockMap {
	s := blockMap{nodes: make([]*node, len(m.nodes)), mapped: m.mapped}
	for i, n := range m.nodes {
		if n != nil {
			n.refs++
			s.nodes[i] = n
		}
	}
	return s
}

// discard takes the map apart, at most most pages and nodes of it, and returns how many it could have done besides: 0 says that
// there may be something left.
func (m *blockMap) discard(u *mapUse, most int) int {
	for most > 0 && len(m.nodes) > 0 {
		i := len(m.nodes) - 1
		n := m.nodes[i]
		if n != nil && n.refs == 1 {
			for j := nodePages - 1; j >= 0 && n.used > 0 && most > 0; j-- {
				if p := n.pages[j]; p != nil {
					u.drop(p)
					n.pages[j] = nil
					n.used--
					most--
				}
			}
			if n.used > 0 {
				return 0
			}
		} else if n != nil {
			n.refs--
		}
		m.nodes = m.nodes[:i]
		most--
	}
	return max(most, 0)
}

// each calls f with every page, in order.
func (m *blockMap) each(f func(first uint64, p *page)) {
	for i := range m.nodes {
		m.eachOf(i, f)
	}
}

// eachOf calls f with every page of node i.
func (m *blockMap) eachOf(i int, f func(first uint64, p *page)) {
	if m.nodes[i] == nil {
		return
	}
	for j, p := range m.nodes[i].pages {
		if p != nil {
			f((uint64(i)*nodePages+uint64(j))*pageEntries, p)
		}
	}
}
