package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/mirror"
	"github.com/ledge-storage/ledge/nvram/mirror/window"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/nvram/region"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/spin"
)

// rig is a pool on an array of files, its log on a file, and the log's mirror on another, reached over TCP.
type rig struct {
	pool  *shelf.Pool
	log   *nvram.Log
	lun   target.Device
	undo  []func() error // in reverse
	bytes int64
}

// newRig makes a pool with a LUN of lunBytes. wrap, if not nil, stands before each drive.
func newRig(ctx context.Context, dir string, logBytes, lunBytes int64, over linkMaker, spins time.Duration, wrap func(raid.Drive) raid.Drive) (r *rig, err error) {
	r = &rig{bytes: lunBytes}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	array, err := r.array(ctx, dir, lunBytes, wrap)
	if err != nil {
		return r, err
	}
	replicator, err := r.mirror(dir, logBytes, over, spins)
	if err != nil {
		return r, err
	}
	own, err := newRegion(filepath.Join(dir, "nvramA"), logBytes)
	if err != nil {
		return r, err
	}
	r.undo = append(r.undo, own.Close)
	area := nvram.Area{Size: logBytes}
	if err := nvram.Format(own, area, nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		return r, err
	}
	r.log, err = nvram.Open(ctx, own, area, nvram.Options{Epoch: 1, Replicator: replicator, Witness: &nvramtest.Witness{}})
	if err != nil {
		return r, err
	}
	r.undo = append(r.undo, r.log.Close)
	if r.pool, err = shelf.CreatePool(ctx, array, r.log, shelf.Options{MaxLUNs: 8, MaxHosts: 4, IdleAfter: -1}); err != nil {
		return r, err
	}
	r.undo = append(r.undo, func() error { r.pool.Abort(); return nil })
	l, err := r.pool.CreateLUN(ctx, shelf.LUNSpec{Name: "bench", Kind: shelf.KindPlain, Bytes: lunBytes, BlockBytes: 4096})
	if err != nil {
		return r, err
	}
	r.lun = l.Device()
	return r, r.inSync(ctx)
}

func (r *rig) array(ctx context.Context, dir string, lunBytes int64, wrap func(raid.Drive) raid.Drive) (*raid.Array, error) {
	var drives []raid.Drive
	slots := lunBytes/(arrayData*raid.StripBytes)*arrayMembers/(arrayMembers-arraySpares) + 40
	for i := range arrayMembers {
		if err := drive.Create(memberPath(dir, i), raid.DataOffset+slots*raid.SlotBytes); err != nil {
			return nil, err
		}
		d, err := drive.Open(memberPath(dir, i), drive.Options{Controller: "A"})
		if err != nil {
			return nil, err
		}
		if wrap == nil {
			drives = append(drives, d)
		} else {
			drives = append(drives, wrap(d))
		}
	}
	a, err := raid.Create(ctx, drives, raid.Options{K: arrayData, M: arrayParity, Spares: arraySpares})
	if err != nil {
		return nil, err
	}
	r.undo = append(r.undo, a.Close)
	return a, nil
}

// newRegion makes a region whose every page is there: an NVRAM has none that must be found and cleared when it is first written.
func newRegion(path string, size int64) (region.Region, error) {
	r, err := region.Open(path, region.Options{Create: true, Size: size})
	if err != nil {
		return nil, err
	}
	zeros := aligned(1 << 20)
	for at := int64(0); at < size; at += int64(len(zeros)) {
		if _, err := r.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	return r, nil
}

// A link is the two ends of a mirror link. close is for who did not give the listener away.
type link struct {
	listener net.Listener
	dial     func(ctx context.Context) (net.Conn, error)
	close    func() error
}

type linkMaker func(dir string) (link, error)

// overTCP makes a link over loopback.
func overTCP(string) (link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return link{}, err
	}
	return link{ln, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", ln.Addr().String())
	}, func() error { return nil }}, nil
}

// overWindow makes one through shared memory.
func overWindow(dir string) (link, error) {
	path := filepath.Join(dir, "window")
	a, err := window.Open(window.Options{Path: path, Side: 'A', Create: true})
	if err != nil {
		return link{}, err
	}
	b, err := window.Open(window.Options{Path: path, Side: 'B', Create: true})
	if err != nil {
		return link{}, errors.Join(err, a.Close())
	}
	return link{b.Listen(), a.Dial, a.Close}, nil
}

// mirror starts the partner's side, and returns the owner's.
func (r *rig) mirror(dir string, logBytes int64, over linkMaker, limit time.Duration) (nvram.Replicator, error) {
	other, err := newRegion(filepath.Join(dir, "nvramB"), logBytes)
	if err != nil {
		return nil, err
	}
	r.undo = append(r.undo, other.Close)
	if err := nvram.FormatMirror(other, nvram.Area{Size: logBytes}); err != nil {
		return nil, err
	}
	m, err := nvram.OpenMirror(other, nvram.Area{Size: logBytes})
	if err != nil {
		return nil, err
	}
	l, err := over(dir)
	if err != nil {
		return nil, err
	}
	r.undo = append(r.undo, l.close)
	secret := []byte("a benchmark keeps no secret at all")
	var spinner func() mirror.Spinner
	if limit > 0 {
		spinner = func() mirror.Spinner { return spin.Alone(limit) }
	}
	b, err := mirror.New(mirror.Options{Shelf: "bench", Self: 'B', Secret: secret, Listener: l.listener, Spinner: spinner})
	if err != nil {
		return nil, err
	}
	r.undo = append(r.undo, b.Close)
	b.Receive(m, 0)
	a, err := mirror.New(mirror.Options{Shelf: "bench", Self: 'A', Secret: secret, Dial: l.dial, Spinner: spinner})
	if err != nil {
		return nil, err
	}
	r.undo = append(r.undo, a.Close)
	return a.Replicator(), nil
}

// inSync waits for the mirror.
func (r *rig) inSync(ctx context.Context) error {
	for range 30000 {
		if r.log.Stats().Mirror == nvram.MirrorInSync {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return fmt.Errorf("the mirror is %s", r.log.Stats().Mirror)
}

// settle destages all and waits for the mirror, so that what comes next meets an empty log.
func (r *rig) settle(ctx context.Context) error {
	if err := r.pool.Drain(ctx); err != nil {
		return err
	}
	return r.inSync(ctx)
}

func (r *rig) close() error {
	var errs []error
	for i := len(r.undo) - 1; i >= 0; i-- {
		if err := r.undo[i](); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
