package guest

import (
	"net"
	"sync"
	"sync/atomic"
)

// Path is the way from a guest's portal address to a target's, a TCP listener on loopback. What goes wrong with a
// way is done here: it is cut silently, as when a cable is pulled and nobody is told; broken, as when the far end
// resets; or a byte on it is changed.
type Path struct {
	listener net.Listener
	done     sync.WaitGroup
	flip     [2]atomic.Bool // towards the target, towards the guest

	mu     sync.Mutex // guards what follows
	mended *sync.Cond
	target string
	cut    bool
	closed bool
	conns  map[net.Conn]struct{}
}

const (
	// maxCarried connections at once; more are closed.
	maxCarried = 64
	pumpBytes  = 64 << 10
	// flippable is how long a piece must be before a byte in its middle is changed: longer than a login or an
	// answer without data, so that it is data that is hit.
	flippable = 4 << 10
)

// NewPath listens. Until To is called connections find nobody.
func NewPath() (*Path, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Path{listener: l, conns: map[net.Conn]struct{}{}}
	p.mended = sync.NewCond(&p.mu)
	p.done.Add(1)
	go p.accept()
	return p, nil
}

// Address is where it listens.
func (p *Path) Address() string { return p.listener.Addr().String() }

// To says where new connections go.
func (p *Path) To(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// Cut stops every byte, both ways, without a word. New connections are made, by the machines on the way, and hear nothing.
func (p *Path) Cut() { p.setCut(true) }

// Mend undoes Cut. Connections whose ends did not give up go on where they were, as TCP's do.
func (p *Path) Mend() { p.setCut(false) }

func (p *Path) setCut(cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = cut
	p.mended.Broadcast()
}

// Break closes every connection.
func (p *Path) Break() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

// FlipTowardsTarget changes one byte of the data that passes next towards the target; Flipped tells when it did.
func (p *Path) FlipTowardsTarget() { p.flip[0].Store(true) }

// FlipTowardsGuest is the same in the other direction.
func (p *Path) FlipTowardsGuest() { p.flip[1].Store(true) }

// Flipped says that no byte waits to be changed.
func (p *Path) Flipped() bool { return !p.flip[0].Load() && !p.flip[1].Load() }

// Close ends everything and waits for it.
func (p *Path) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mended.Broadcast()
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	err := p.listener.Close()
	p.done.Wait()
	return err
}

func (p *Path) accept() {
	defer p.done.Done()
	for {
		guest, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.mu.Lock()
		to, ok := p.target, p.target != "" && !p.closed && len(p.conns) <= 2*maxCarried-2
		p.mu.Unlock()
		// Behind a cut nobody answers, nor refuses: a connection that is made and closed at once is more than
		// iscsid 2.1.8 always survives (see TestTakeover), and what is beyond the cut may be dead.
		if !ok || !p.open() {
			guest.Close()
			continue
		}
		target, err := net.Dial("tcp", to)
		if err != nil {
			guest.Close()
			continue
		}
		p.carry(guest, target)
	}
}

// carry starts the two directions of a connection.
func (p *Path) carry(guest, target net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		guest.Close()
		target.Close()
		return
	}
	p.conns[guest], p.conns[target] = struct{}{}, struct{}{}
	p.done.Add(2)
	go p.pump(target, guest, &p.flip[0])
	go p.pump(guest, target, &p.flip[1])
}

// pump carries one direction. The end of one ends the other.
func (p *Path) pump(to, from net.Conn, flip *atomic.Bool) {
	defer p.done.Done()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, c := range []net.Conn{to, from} {
			c.Close()
			delete(p.conns, c)
		}
	}()
	b := make([]byte, pumpBytes)
	for {
		n, err := from.Read(b)
		if !p.open() {
			return
		}
		if n >= flippable && flip.CompareAndSwap(true, false) {
			b[n/2] ^= 0x10
		}
		if _, werr := to.Write(b[:n]); err != nil || werr != nil {
			return
		}
	}
}

// open waits while the path is cut; false: it was closed. The end of a connection, too, is not heard through a cut.
func (p *Path) open() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.cut && !p.closed {
		p.mended.Wait()
	}
	return !p.closed
}
