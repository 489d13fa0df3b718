package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/host/volume"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/scsi"
)

const iqn = "iqn.2026-11.io.ledge:volumes"

// file is a LUN of the shelf: sparse, and thin.
type file struct {
	*os.File
	size int64
}

func openFile(path string, size int64) (*file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	return &file{f, size}, nil
}

func (f *file) ReadAt(_ context.Context, p []byte, off int64) error {
	n, err := f.File.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		err = nil
	}
	return err
}

func (f *file) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := f.File.WriteAt(p, off)
	return err
}

func (f *file) Unmap(_ context.Context, off, n int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *file) Flush(context.Context) error { return nil }
func (f *file) Size() int64                 { return f.size }

// serve is the contestant's process: serve DIR COMPRESSION. It prints its address, and performs the orders that it reads: sync, snapshot, delete.
func serve(args []string) error {
	if len(args) != 2 {
		return errors.New("want DIR COMPRESSION")
	}
	how, err := store.ParseCompression(args[1])
	if err != nil {
		return err
	}
	ctx := context.Background()
	journal, err := openFile(filepath.Join(args[0], "journal"), 256<<20)
	if err != nil {
		return err
	}
	defer journal.Close()
	segments, err := openFile(filepath.Join(args[0], "segments"), 1<<40)
	if err != nil {
		return err
	}
	defer segments.Close()
	st, err := store.Open(ctx, store.Options{Journal: journal, Segments: segments})
	if err != nil {
		return err
	}
	if _, err := st.CreateCompressed(ctx, "a", diskBytes, how); err != nil {
		return err
	}
	dev, err := volume.Open(st, "a", volume.Options{BlockBytes: block})
	if err != nil {
		return err
	}
	t := scsi.NewTarget(iqn, scsi.Options{})
	if err := t.Attach(0, dev, scsi.UnitOptions{}); err != nil {
		return err
	}
	srv, err := iscsi.NewServer(iscsi.Options{})
	if err != nil {
		return err
	}
	if err := srv.AddTarget(t); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	fmt.Println(l.Addr())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var err error
		switch in.Text() {
		case "sync":
			err = st.Checkpoint(ctx)
		case "snapshot":
			_, err = st.Snapshot(ctx, "s", "a")
		case "delete":
			err = st.DeleteSnapshot(ctx, "a", "s")
		default:
			err = fmt.Errorf("no order %q", in.Text())
		}
		if err != nil {
			fmt.Println("error:", err)
		} else {
			fmt.Println("ok")
		}
	}
	err = srv.Close()
	<-served
	return errors.Join(err, st.Close(ctx))
}

// ledgeDisk flushes by a checkpoint, so that all that was written is packed, and the files hold what they will.
type ledgeDisk struct {
	*initiator.Device
	order func(string) error
}

func (d *ledgeDisk) Flush(context.Context) error { return d.order("sync") }

func startLedge(ctx context.Context, dir, self, compression string) (*contestant, error) {
	cmd, in, addr, out, err := process(ctx, self, "serve", dir, compression)
	if err != nil {
		return nil, err
	}
	end := func() error { in.Close(); return cmd.Wait() }
	order := func(what string) error {
		if _, err := fmt.Fprintln(in, what); err != nil {
			return err
		}
		line, err := out.ReadString('\n')
		if err == nil && strings.TrimSpace(line) != "ok" {
			err = errors.New(strings.TrimSpace(line))
		}
		return err
	}
	dev, err := initiator.Open(ctx, initiator.Config{Portals: []string{addr}, Target: iqn, Initiator: "iqn.2026-11.io.ledge:bench"})
	if err != nil {
		return nil, errors.Join(err, end())
	}
	return &contestant{disk: &ledgeDisk{dev, order}, dir: dir, pid: cmd.Process.Pid,
		snapshot: func(context.Context) error { return order("snapshot") },
		delete:   func(context.Context) error { return order("delete") },
		stop:     func() error { return errors.Join(dev.Close(), end()) }}, nil
}
