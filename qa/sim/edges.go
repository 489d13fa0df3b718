package sim

import (
	"context"
	"errors"

	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// The edges of a controller: its ways to drives, NVRAM and array. What is asked there passes, waits, fails or happens in
// part as the node says.

// nodePort is a controller's port to a drive.
type nodePort struct {
	*raidtest.Port
	n      *node
	member int
}

// do does what may be done in part.
func (p *nodePort) do(off int64, f func() error) error {
	arrives, answers := p.n.part(p.member, off)
	var err error
	if arrives {
		err = f()
	}
	if !answers {
		return errPower
	}
	return err
}

func (p *nodePort) ReadAt(b []byte, off int64) (int, error) {
	p.n.mu.Lock()
	on := p.n.on
	p.n.mu.Unlock()
	if !on {
		return 0, errPower
	}
	return p.Port.ReadAt(b, off)
}

func (p *nodePort) WriteAt(b []byte, off int64) (int, error) {
	err := p.do(off, func() error {
		_, err := p.Port.WriteAt(b, off)
		if errors.Is(err, raid.ErrReservation) && p.n.s.mutation == OldOwnerWrites {
			_, err = p.Disk().Port(p.n.self.Partner().String()).WriteAt(b, off)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *nodePort) Flush() error { return p.do(-1, p.Port.Flush) }
func (p *nodePort) Register(key uint64) error {
	return p.do(-2, func() error { return p.Port.Register(key) })
}
func (p *nodePort) Reserve(key uint64) error {
	if p.n.s.mutation == NoFence {
		return p.Port.Register(key)
	}
	return p.do(-3, func() error { return p.Port.Reserve(key) })
}
func (p *nodePort) Preempt(key, victim uint64) error {
	return p.do(-4, func() error { return p.Port.Preempt(key, victim) })
}
func (p *nodePort) Release(key uint64) error {
	return p.do(-5, func() error { return p.Port.Release(key) })
}
func (p *nodePort) Unregister(key uint64) error {
	return p.do(-6, func() error { return p.Port.Unregister(key) })
}

// nodeRegion is a controller's way to its NVRAM.
type nodeRegion struct {
	*nvramtest.Region
	n *node
	// MirrorAcksEarly: what the partner was told is here, and is not yet.
	late    []byte
	lateOff int64
}

// settle writes what is late.
func (r *nodeRegion) settle() error {
	if r.late == nil {
		return nil
	}
	_, err := r.Region.WriteAt(r.late, r.lateOff)
	r.late = nil
	return err
}

func (r *nodeRegion) ReadAt(b []byte, off int64) (int, error) {
	if err := r.n.pass(); err != nil {
		return 0, err
	}
	if err := r.settle(); err != nil {
		return 0, err
	}
	return r.Region.ReadAt(b, off)
}

func (r *nodeRegion) WriteAt(b []byte, off int64) (k int, err error) {
	if r.n.s.mutation == MirrorAcksEarly && off >= r.Size()/2 {
		if err := errors.Join(r.n.pass(), r.settle()); err != nil {
			return 0, err
		}
		r.late, r.lateOff = append([]byte{}, b...), off
		return len(b), nil
	}
	err = r.n.op("a region write", func() error { k, err = r.Region.WriteAt(b, off); return err })
	return k, err
}

// nodeArray is the pool's array.
type nodeArray struct {
	*raid.Array
	n *node
}

func (a *nodeArray) Read(ctx context.Context, stripe uint64, block int, dst [][]byte) error {
	if err := a.n.pass(); err != nil {
		return err
	}
	return a.Array.Read(ctx, stripe, block, dst)
}

func (a *nodeArray) Fetch(ctx context.Context, stripe uint64, block, count int, dst [][]byte, loan *raid.Loan) ([][]byte, error) {
	if err := a.n.pass(); err != nil {
		return dst, err
	}
	return a.Array.Fetch(ctx, stripe, block, count, dst, loan)
}

func (a *nodeArray) PrepareUpdate(ctx context.Context, stripe, gen uint64, blocks []raid.BlockWrite) (*raid.Update, error) {
	if err := a.n.pass(); err != nil {
		return nil, err
	}
	return a.Array.PrepareUpdate(ctx, stripe, gen, blocks)
}

func (a *nodeArray) WriteStripe(ctx context.Context, stripe, gen uint64, data [][]byte) error {
	return a.n.op("a stripe write", func() error { return a.Array.WriteStripe(ctx, stripe, gen, data) })
}

func (a *nodeArray) Apply(ctx context.Context, u *raid.Update) error {
	return a.n.op("an update", func() error { return a.Array.Apply(ctx, u) })
}

func (a *nodeArray) Flush(ctx context.Context) error {
	return a.n.op("a flush", func() error { return a.Array.Flush(ctx) })
}

func (n *node) drives() []raid.Drive {
	ds := make([]raid.Drive, len(n.s.disks.Disks))
	for i, d := range n.s.disks.Disks {
		ds[i] = &nodePort{d.Port(n.self.String()), n, i}
	}
	return ds
}
