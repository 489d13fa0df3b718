package store

// blockMap is a volume's map: block → where it is stored. Pages are made when something in them
// is written and freed when a zeroed range covers them wholly or the volume goes.
const (
	pageEntries = 512
	pageBytes   = pageEntries * 8
	nodePages   = 1024
)

type (
	page [pageEntries]loc
	node struct {
		pages [nodePages]*page
		used  int
	}
	blockMap struct {
		nodes  []*node
		pages  int64 // in use
		mapped int64 // blocks that are stored
	}
)

func (m *blockMap) page(lba uint64) *page {
	n := lba / (pageEntries * nodePages)
	if n >= uint64(len(m.nodes)) || m.nodes[n] == nil {
		return nil
	}
	return m.nodes[n].pages[lba/pageEntries%nodePages]
}

func (m *blockMap) get(lba uint64) loc {
	if p := m.page(lba); p != nil {
		return p[lba%pageEntries]
	}
	return 0
}

// ensure makes the page of lba.
func (m *blockMap) ensure(lba uint64) *page {
	i := lba / (pageEntries * nodePages)
	for uint64(len(m.nodes)) <= i {
		m.nodes = append(m.nodes, nil)
	}
	if m.nodes[i] == nil {
		m.nodes[i] = new(node)
	}
	n, j := m.nodes[i], lba/pageEntries%nodePages
	if n.pages[j] == nil {
		n.pages[j] = new(page)
		n.used++
		m.pages++
	}
	return n.pages[j]
}

// set stores l for lba and returns what was there.
func (m *blockMap) set(lba uint64, l loc) (old loc) {
	p := m.ensure(lba)
	old, p[lba%pageEntries] = p[lba%pageEntries], l
	if old == 0 && l != 0 {
		m.mapped++
	} else if old != 0 && l == 0 {
		m.mapped--
	}
	return old
}

// zero forgets n blocks from lba on, calling f for each that was stored.
func (m *blockMap) zero(lba, n uint64, f func(old loc)) {
	end := min(lba+n, uint64(len(m.nodes))*pageEntries*nodePages)
	for lba < end {
		i, j := lba/(pageEntries*nodePages), lba/pageEntries%nodePages
		if m.nodes[i] == nil {
			lba = (i + 1) * pageEntries * nodePages
			continue
		}
		first := lba % pageEntries
		last := min(pageEntries, first+end-lba)
		if p := m.nodes[i].pages[j]; p != nil {
			for k := first; k < last; k++ {
				if p[k] != 0 {
					f(p[k])
					p[k] = 0
					m.mapped--
				}
			}
			if last-first == pageEntries {
				m.nodes[i].pages[j] = nil
				m.pages--
				if m.nodes[i].used--; m.nodes[i].used == 0 {
					m.nodes[i] = nil
				}
			}
		}
		lba += last - first
	}
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
