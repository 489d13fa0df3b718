// Command ratio measures what the host's store makes of real data: how much of what an exact oracle finds to be duplicate it
// finds, and what it stores against the oracle's unique blocks, compressed with the same codec in the same units.
//
//	go run ./qa/ratio [-index BYTES] NAME=FILE[,FILE…] …        each NAME is a store of its own; FILEs are written one after the other, as volumes
//	qa/ratio/data.sh DIR                         makes the data of README.md in DIR
//
// The oracle knows every 4 KiB block that it has seen by its whole SHA-256. Blocks of zeros count for neither.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/host/store"
)

func main() {
	index := flag.Int64("index", 0, "memory of the dedup index, bytes; 0: the store's default, 64 MiB, which finds 32 GiB of blocks")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: ratio [-index BYTES] NAME=FILE[,FILE…] …")
		flag.PrintDefaults()
	}
	if flag.Parse(); flag.NArg() == 0 || *index < 0 {
		flag.Usage()
		os.Exit(2)
	}
	fmt.Println("| data | MiB, without zeros | oracle's unique | dedup found | stored MiB | oracle's, S2 | stored/oracle | stored/data | MB/s |")
	fmt.Println("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for _, arg := range flag.Args() {
		name, files, ok := strings.Cut(arg, "=")
		if !ok {
			fmt.Fprintf(os.Stderr, "ratio: %q: want NAME=FILE[,FILE…]\n", arg)
			os.Exit(2)
		}
		r, err := measure(context.Background(), *index, strings.Split(files, ","))
		if err != nil {
			fmt.Fprintf(os.Stderr, "ratio: %s: %v\n", name, err)
			os.Exit(1)
		}
		fmt.Println(r.row(name))
	}
}

// lun is a sparse file.
type lun struct {
	f    *os.File
	size int64
}

func (l *lun) ReadAt(_ context.Context, p []byte, off int64) error {
	n, err := l.f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return err
}

func (l *lun) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := l.f.WriteAt(p, off)
	return err
}

func (l *lun) Unmap(_ context.Context, off, n int64) error {
	return unix.Fallocate(int(l.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (l *lun) Flush(context.Context) error { return nil }
func (l *lun) Size() int64                 { return l.size }

// oracle knows all blocks.
type oracle struct {
	seen                   map[[32]byte]struct{}
	blocks, unique, stored int64
	scratch                []byte
}

func (o *oracle) add(block []byte) {
	o.blocks++
	sum := sha256.Sum256(block)
	if _, ok := o.seen[sum]; ok {
		return
	}
	o.seen[sum] = struct{}{}
	o.unique++
	n := len(s2.Encode(o.scratch, block))
	if n > store.BlockBytes-store.BlockBytes/16 { // what the store keeps as it is
		n = store.BlockBytes
	}
	o.stored += int64(n)
}

// result is in bytes; of blocks of zeros nothing is in it.
type result struct {
	data, unique, found int64 // written; different by the oracle, and by the store
	stored, oracle      int64 // by the store, with all its metadata, and by the oracle
	seconds             float64
}

// dedup is the part of the oracle's duplicates that the store found; 1 where there are none.
func (r result) dedup() float64 {
	if r.data == r.unique {
		return 1
	}
	return float64(r.data-r.found) / float64(r.data-r.unique)
}

func (r result) row(name string) string {
	const mib = 1 << 20
	return fmt.Sprintf("| %s | %d | %d | %.2f %% | %.1f | %.1f | %.4f | %.4f | %.0f |", name, r.data/mib, r.unique/mib, 100*r.dedup(),
		float64(r.stored)/mib, float64(r.oracle)/mib, float64(r.stored)/float64(r.oracle), float64(r.stored)/float64(r.data), float64(r.data)/1e6/r.seconds)
}

func measure(ctx context.Context, index int64, files []string) (r result, err error) {
	dir, err := os.MkdirTemp("", "ratio-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	open := func(name string, size int64) (*lun, error) {
		f, err := os.Create(filepath.Join(dir, name))
		return &lun{f, size}, err
	}
	journal, err := open("journal", 256<<20)
	if err != nil {
		return r, err
	}
	defer journal.f.Close()
	segments, err := open("segments", 1<<40)
	if err != nil {
		return r, err
	}
	defer segments.f.Close()
	st, err := store.Open(ctx, store.Options{Journal: journal, Segments: segments, IndexBytes: index})
	if err != nil {
		return r, err
	}
	o := &oracle{seen: map[[32]byte]struct{}{}, scratch: make([]byte, s2.MaxEncodedLen(store.BlockBytes))}
	took := time.Duration(0)
	for i, path := range files {
		if err := write(ctx, st, fmt.Sprintf("v%d", i), path, o, &took); err != nil {
			return r, errors.Join(err, st.Close(ctx))
		}
	}
	began := time.Now()
	if err := st.Checkpoint(ctx); err != nil {
		return r, err
	}
	took += time.Since(began)
	s := st.Stats()
	if err := st.Close(ctx); err != nil {
		return r, err
	}
	return result{o.blocks * store.BlockBytes, o.unique * store.BlockBytes, s.Uniques * store.BlockBytes, s.StoredBytes, o.stored, took.Seconds()}, nil
}

// write makes a volume of a file. took counts the store's time, not the oracle's.
func write(ctx context.Context, st *store.Store, name, path string, o *oracle, took *time.Duration) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := st.CreateVolume(ctx, name, max(1, (size+store.BlockBytes-1)/store.BlockBytes)*store.BlockBytes); err != nil {
		return err
	}
	v, err := st.Volume(name)
	if err != nil {
		return err
	}
	var tickets []*store.Ticket
	buf, zero := make([]byte, 1<<20), make([]byte, store.BlockBytes)
	for off := int64(0); off < size; off += int64(len(buf)) {
		n, err := io.ReadFull(f, buf)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		part := buf[:(n+store.BlockBytes-1)/store.BlockBytes*store.BlockBytes]
		clear(part[n:])
		for i := 0; i < len(part); i += store.BlockBytes {
			if b := part[i : i+store.BlockBytes]; string(b) != string(zero) {
				o.add(b)
			}
		}
		began := time.Now()
		t, err := v.Stage(ctx, uint64(off/store.BlockBytes), part)
		if err != nil {
			return err
		}
		if tickets = append(tickets, t); len(tickets) > 16 {
			if err := tickets[0].Wait(ctx); err != nil {
				return err
			}
			tickets = tickets[1:]
		}
		*took += time.Since(began)
	}
	began := time.Now()
	for _, t := range tickets {
		if err := t.Wait(ctx); err != nil {
			return err
		}
	}
	*took += time.Since(began)
	return nil
}
