package raidtest

import (
	"fmt"
	"slices"

	"github.com/ledge-storage/ledge/raid"
)

// Port is one controller's path to a drive; it implements raid.Drive and raid.Reserver.
type Port struct {
	disk       *Disk
	controller string
}

var (
	_ raid.Drive        = (*Port)(nil)
	_ raid.VectorWriter = (*Port)(nil)
	_ raid.Reserver     = (*Port)(nil)
)

// Port returns a port for a controller.
func (d *Disk) Port(controller string) *Port { return &Port{d, controller} }

// Disk returns what the port leads to.
func (p *Port) Disk() *Disk { return p.disk }

func (p *Port) ReadAt(b []byte, off int64) (int, error) {
	if err := p.disk.read(b, off); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *Port) WriteAt(b []byte, off int64) (int, error) {
	if err := p.disk.write(p.controller, b, off); err != nil {
		return 0, err
	}
	return len(b), nil
}

// WriteVAt implements raid.VectorWriter: one write, as Disk.OnWrite sees it.
func (p *Port) WriteVAt(bufs [][]byte, off int64) (int, error) {
	return p.WriteAt(slices.Concat(bufs...), off)
}

func (p *Port) Flush() error { return p.disk.flush() }
func (p *Port) Size() int64  { return p.disk.size }
func (p *Port) Name() string { return fmt.Sprintf("%s:disk%d", p.controller, p.disk.index) }
func (p *Port) Close() error { return nil }

// locked runs f on a drive that answers.
func (p *Port) locked(f func(d *Disk) error) error {
	d := p.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.ready(); err != nil {
		return err
	}
	return f(d)
}

func (p *Port) Register(key uint64) error {
	return p.locked(func(d *Disk) error {
		if old := d.keys[p.controller]; old != 0 && old == d.holder {
			d.holder = key // the holder changes its key (SPC-4 5.13.7)
		}
		d.keys[p.controller] = key
		return nil
	})
}

func (p *Port) Reserve(key uint64) error {
	return p.locked(func(d *Disk) error {
		if key == 0 || d.keys[p.controller] != key || d.holder != 0 && d.holder != key {
			return raid.ErrReservation
		}
		d.holder = key
		return nil
	})
}

func (p *Port) Preempt(key, victim uint64) error {
	return p.locked(func(d *Disk) error {
		if key == 0 || d.keys[p.controller] != key {
			return raid.ErrReservation
		}
		found := false
		for c, k := range d.keys {
			if k == victim && c != p.controller {
				delete(d.keys, c)
				found = true
			}
		}
		if !found && victim != key {
			return raid.ErrReservation // no such registration (SPC-4 5.13.11.3)
		}
		if d.holder == victim {
			d.holder = key
		}
		return nil
	})
}

func (p *Port) Release(key uint64) error {
	return p.locked(func(d *Disk) error {
		if d.keys[p.controller] != key {
			return raid.ErrReservation
		}
		if d.holder == key {
			d.holder = 0
		}
		return nil
	})
}

func (p *Port) Unregister(key uint64) error {
	return p.locked(func(d *Disk) error {
		if d.keys[p.controller] != key {
			return raid.ErrReservation
		}
		if d.holder == key {
			d.holder = 0
		}
		delete(d.keys, p.controller)
		return nil
	})
}

func (p *Port) Keys() (registered []uint64, holder uint64, err error) {
	err = p.locked(func(d *Disk) error {
		for _, k := range d.keys {
			registered = append(registered, k)
		}
		slices.Sort(registered)
		holder = d.holder
		return nil
	})
	return registered, holder, err
}
