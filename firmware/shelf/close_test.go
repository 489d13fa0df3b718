package shelf_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/target"
)

// TestCloseWaitsForWrites: a write that is in the log's hands while the pool is closed, and is acknowledged, is on the
// members afterwards: who takes a pool that was handed over reads no log. A write that comes later is told to try again.
func TestCloseWaitsForWrites(t *testing.T) {
	r := newRig(t, 3<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
	r.drain()
	held, release := make(chan struct{}, 1), make(chan struct{})
	want := pattern(1, 64*kib)
	r.region.Hold = func(_ int64, n int) {
		if n < len(want) {
			return // not a write's record
		}
		select {
		case held <- struct{}{}:
		default:
		}
		<-release
	}
	wrote, closed := make(chan error, 1), make(chan error, 1)
	go func() { wrote <- d.Write(context.Background(), 5, [][]byte{want}, false) }()
	<-held
	p := r.Pool
	go func() { closed <- p.Close(context.Background()) }()
	lba := uint64(100)
	eventually(t, "a later write is refused", func() bool {
		later, at := make(chan error, 1), lba
		lba += 20 // one that hangs keeps its blocks locked
		go func() { later <- d.Write(context.Background(), at, [][]byte{want}, false) }()
		select {
		case err := <-later:
			return errors.Is(err, target.ErrTransition)
		case <-time.After(100 * time.Millisecond): // it came before the pool was closed: it is held too
			return false
		}
	})
	select {
	case err := <-closed:
		t.Fatalf("closed with a write under way: %v", err)
	default:
	}
	close(release)
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := nvram.Format(r.region, r.area(), nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	r.open()
	mustEqual(t, "the write", read(t, r.device("v"), 5, len(want)), want)
}
