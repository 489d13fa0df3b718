package store

import "sync/atomic"

// blockMap is a volume's map: block → where it is stored. It is a tree of two levels, nodes of pages, shared copy-on-write
// with the maps of snapshots and clones: a node or a page that more than one has is copied by who changes it, so
// that a snapshot is a copy of the list of nodes. Only the packer, and recovery before it, change maps.
//
// Which pages are shared follows from the log's order alone. So a block that the cleaner moved is pointed elsewhere
// in the shared page itself, once for all who have it, and replay does the same.
//
// Of a page the content is in memory only while it is wanted; paging.go brings it there and takes it away.
const (
	pageBytes  = pageEntries * 8 // of a page's content in memory
	stubBytes  = 64              // of what stays there of each page, its place in the node included
	nodeBlocks = pageEntries * nodePages
)

// places are the content of a page.
type places [pageEntries]loc

type page struct {
	at    *places // nil: not in memory; changed by who brings it or takes it away, too
	rest  loc     // where it is stored as it is; 0: nowhere, it has changed since
	refs  int32   // nodes that have it
	count uint16  // blocks that it knows a place of
	// The last pass over all maps (Store.pass) that met this page, and in which volume: each is dealt with once.
	vol  uint32
	pass uint64
	// hot: it was read since the clock came by.
	hot atomic.Bool
}

type node struct {
	pages [nodePages]*page
	used  int
	refs  int32  // maps that have it
	pass  uint64 // as of a page
}

type blockMap struct {
	nodes  []*node
	mapped int64 // blocks that are stored
}

func (m *blockMap) page(lba uint64) *page {
	n := lba / nodeBlocks
	if n >= uint64(len(m.nodes)) || m.nodes[n] == nil {
		return nil
	}
	return m.nodes[n].pages[lba/pageEntries%nodePages]
}

// absent returns the page of lba if it is there and its content is not in memory, which it must be for get and for a change.
func (m *blockMap) absent(lba uint64) *page {
	if p := m.page(lba); p != nil && p.at == nil {
		return p
	}
	return nil
}

func (m *blockMap) get(lba uint64) loc {
	p := m.page(lba)
	if p == nil {
		return 0
	}
	if !p.hot.Load() {
		p.hot.Store(true)
	}
	return p.at[lba%pageEntries]
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
		p = u.made(new(places), 0)
		n.used++
	case p.refs > 1:
		p.refs--
		at := *p.at
		p = u.made(&at, p.count)
		for _, l := range at {
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
	u.touch(p)
	old := p.at[lba%pageEntries]
	p.at[lba%pageEntries] = l
	u.hold(l)
	if old != 0 {
		u.release(old)
	} else {
		m.mapped++
		p.count++
	}
}

// move changes from to to at lba, for all maps that share the page. False: something else is there.
func (m *blockMap) move(u *mapUse, lba uint64, from, to loc) bool {
	p := m.page(lba)
	if p == nil || p.at[lba%pageEntries] != from {
		return false
	}
	u.touch(p)
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
	m.mapped += int64(p.count)
	return true
}

// edges returns the pages that zero changes only in part and whose content is not in memory.
func (m *blockMap) edges(lba, n uint64) (absent []*page) {
	if lba%pageEntries != 0 || n < pageEntries {
		if p := m.absent(lba); p != nil {
			absent = append(absent, p)
		}
	}
	if end := lba + n; end%pageEntries != 0 && end/pageEntries != lba/pageEntries {
		if p := m.absent(end); p != nil {
			absent = append(absent, p)
		}
	}
	return absent
}

// zero forgets n blocks from lba on. late gets whole pages that are to be taken apart when their content is in memory.
func (m *blockMap) zero(u *mapUse, lba, n uint64, late func(*page)) {
	end := min(lba+n, uint64(len(m.nodes))*nodeBlocks)
	for lba < end {
		i, j := lba/nodeBlocks, lba/pageEntries%nodePages
		if m.nodes[i] == nil {
			lba = (i + 1) * nodeBlocks
			continue
		}
		first := lba % pageEntries
		last := min(pageEntries, first+end-lba)
		switch p := m.nodes[i].pages[j]; {
		case p == nil:
		case last-first == pageEntries:
			n := m.ownNode(i)
			n.pages[j] = nil
			m.mapped -= int64(p.count)
			if p.refs > 1 || p.at != nil {
				u.drop(p)
			} else {
				p.refs--
				late(p)
			}
			if n.used--; n.used == 0 {
				m.nodes[i] = nil
			}
		case p.count > 0:
			var own *page
			for k := first; k < last; k++ {
				if p.at[k] == 0 {
					continue
				}
				if own == nil {
					own = m.own(u, lba)
					u.touch(own)
				}
				u.release(own.at[k])
				own.at[k] = 0
				own.count--
				m.mapped--
			}
		}
		lba += last - first
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
// there may be something left. It stops at pages that nobody else has and whose content is not in memory, and returns them.
func (m *blockMap) discard(u *mapUse, most int) (left int, absent []*page) {
	for most > 0 && len(m.nodes) > 0 {
		i := len(m.nodes) - 1
		n := m.nodes[i]
		if n != nil && n.refs == 1 {
			for j := nodePages - 1; j >= 0 && n.used > 0 && most > 0; j-- {
				p := n.pages[j]
				if p == nil {
					continue
				}
				most--
				if p.refs == 1 && p.at == nil {
					absent = append(absent, p)
					continue
				}
				u.drop(p)
				n.pages[j] = nil
				n.used--
			}
			if n.used > 0 {
				return 0, absent
			}
		} else if n != nil {
			n.refs--
		}
		m.nodes = m.nodes[:i]
		most--
	}
	return max(most, 0), absent
}

// each calls f with every page, in order.
func (m *blockMap) each(f func(first uint64, p *page)) {
	for i := range m.nodes {
		m.eachOf(i, f)
	}
}

// eachOf calls f with every page of node i.
func (m *blockMap) eachOf(i int, f func(first uint64, p *page)) { m.eachIn(i, 0, nodePages, f) }

// eachIn calls f with the pages from to to of node i.
func (m *blockMap) eachIn(i, from, to int, f func(first uint64, p *page)) {
	if i >= len(m.nodes) || m.nodes[i] == nil {
		return
	}
	for j := from; j < min(to, nodePages); j++ {
		if p := m.nodes[i].pages[j]; p != nil {
			f((uint64(i)*nodePages+uint64(j))*pageEntries, p)
		}
	}
}

// pagesLocked is how many pages are looked through with the lock held, for reading: some 0.3 ms.
const pagesLocked = 64
