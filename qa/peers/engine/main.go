// Engine serves memory, or a file, through Ledge's own target engine, to be measured and tested beside its peers.
//
// Usage: engine [-file FILE] [-spin DURATION] PORT BYTES IQN
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/file"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

func main() {
	path := flag.String("file", "", "serve this file; empty: memory")
	spin := flag.Duration("spin", 0, "look for the next command this long before sleeping (iscsi.Options.Spin)")
	flag.Parse()
	if flag.NArg() != 3 {
		fmt.Fprintln(os.Stderr, "usage: engine [-file FILE] [-spin DURATION] PORT BYTES IQN")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *path, *spin, flag.Arg(0), flag.Arg(1), flag.Arg(2)); err != nil {
		fmt.Fprintln(os.Stderr, "engine:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, path string, spin time.Duration, port, size, iqn string) error {
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return fmt.Errorf("size %q: %w", size, err)
	}
	dev, err := device(path, n)
	if err != nil {
		return err
	}
	t := scsi.NewTarget(iqn, scsi.Options{})
	if err := t.Attach(0, dev, scsi.UnitOptions{}); err != nil {
		return err
	}
	srv, err := iscsi.NewServer(iscsi.Options{MaxSessionsPerInitiator: 1024, Spin: spin})
	if err != nil {
		return err
	}
	if err := srv.AddTarget(t); err != nil {
		return err
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	<-ctx.Done()
	err = srv.Close()
	<-served
	return err
}

func device(path string, n int64) (target.Device, error) {
	if path == "" {
		return mem.New(mem.Options{Bytes: n, Name: "engine", Huge: true})
	}
	return file.Open(file.Options{Path: path, Bytes: n, Volatile: true})
}
