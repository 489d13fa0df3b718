// Volumes compares what a volume with compression, deduplication and snapshots costs with what a user has without Ledge, on the same files, in one run:
// qcow2 images behind qemu-storage-daemon, without and with its compression (issue 5, "Speed").
//
// Usage:
//
//	go run ./qa/bench/volumes [-dir DIR] [-mib 256] [-seconds 2] [-rounds 3] [-only REGEXP]
//
// Contestants, each a process of its own whose CPU time is counted; all keep their files in DIR, in the page cache, and none
// forces them to the medium, so that what is compared is the programs and not the disk:
//
//	ledge        the agent's store (S2) on two sparse files, served by the target engine over iSCSI
//	ledge-zstd   the same, the volume compressed with Zstandard
//	qcow2        a qcow2 image over NBD
//	qcow2-zstd   the same behind QEMU's compress filter, compression_type=zstd: what is written is compressed, a cluster of 64 KiB at a time. It
//	             cannot write a cluster twice (EIO), so that it has no random overwrites
//	raw          a sparse file over NBD: neither compression nor snapshots, the floor
//
// The clients are this process's: host/initiator, and an NBD client (nbd.go) with as many requests on their way. ZFS and dm-vdo, which are
// the nearest in what they do, are not in Debian 12's main archive (zfs-dkms is in contrib, and builds a kernel module; of dm-vdo the module is there, with Linux
// 6.12, and vdoformat is not).
//
// In each round every contestant begins with new files, in an order that turns from round to round; a figure is the median of the rounds.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

type settings struct {
	dir     string
	data    []byte // that are written, whole chunks
	seconds time.Duration
	rounds  int
	only    *regexp.Regexp
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "serve" { // a contestant
		if err := serve(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "volumes: serve:", err)
			os.Exit(1)
		}
		return
	}
	dir := flag.String("dir", os.TempDir(), "where the contestants' files are")
	mib := flag.Int("mib", 256, "size of the data that are written, MiB")
	seconds := flag.Float64("seconds", 2, "length of a measurement of random I/O")
	rounds := flag.Int("rounds", 3, "rounds")
	only := flag.String("only", "", "contestants whose name this matches")
	flag.Parse()
	re, err := regexp.Compile(*only)
	if err != nil || flag.NArg() > 0 || *mib < 16 || *rounds < 1 || *seconds <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	s := settings{*dir, content(*mib << 20), time.Duration(*seconds * float64(time.Second)), *rounds, re}
	figures, err := s.run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "volumes:", err)
		os.Exit(1)
	}
	fmt.Printf("Volumes: %s, %d cores, %s, %s; %d MiB of data that compress to half, %v of random I/O, %d rounds.\n\n", time.Now().Format(time.DateOnly), runtime.NumCPU(), runtime.Version(), qemuVersion(ctx), *mib, s.seconds, *rounds)
	printTable(figures)
}

func qemuVersion(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "qemu-storage-daemon", "--version").Output()
	if err != nil {
		return "no qemu-storage-daemon"
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(line, "qemu-storage-daemon version ")
}

// contestants in the order of the table.
var contestants = []struct {
	name  string
	start func(ctx context.Context, dir, self string) (*contestant, error)
}{
	{"ledge", func(ctx context.Context, dir, self string) (*contestant, error) {
		return startLedge(ctx, dir, self, "s2")
	}},
	{"ledge-zstd", func(ctx context.Context, dir, self string) (*contestant, error) {
		return startLedge(ctx, dir, self, "zstd")
	}},
	{"qcow2", func(ctx context.Context, dir, _ string) (*contestant, error) {
		return startQEMU(ctx, dir, "qcow2", false)
	}},
	{"qcow2-zstd", func(ctx context.Context, dir, _ string) (*contestant, error) {
		return startQEMU(ctx, dir, "qcow2", true)
	}},
	{"raw", func(ctx context.Context, dir, _ string) (*contestant, error) {
		return startQEMU(ctx, dir, "raw", false)
	}},
}

// run has all rounds.
func (s *settings) run(ctx context.Context) (map[string]map[string][]float64, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	figures := map[string]map[string][]float64{}
	for round := range s.rounds {
		for i := range contestants {
			c := contestants[(i+round)%len(contestants)]
			if !s.only.MatchString(c.name) {
				continue
			}
			if figures[c.name] == nil {
				figures[c.name] = map[string][]float64{}
			}
			began := time.Now()
			if err := s.one(ctx, c.name, self, c.start, figures[c.name]); err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s, %.0f s\n", round+1, s.rounds, c.name, time.Since(began).Seconds())
		}
	}
	return figures, nil
}

func (s *settings) one(ctx context.Context, name, self string, start func(context.Context, string, string) (*contestant, error), figures map[string][]float64) (err error) {
	dir, err := os.MkdirTemp(s.dir, "volumes-"+name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c, err := start(ctx, dir, self)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	return s.load(ctx, c, func(what string, v float64) { figures[what] = append(figures[what], v) })
}

// rows of the table.
var rows = []struct{ figure, what, unit string }{
	{"write", "sequential write, new data", "MB/s"},
	{"write cpu", "its CPU time", "ms/GB"},
	{"stored", "stored of 1 GB written", "GB"},
	{"again", "the same data written again, elsewhere", "MB/s"},
	{"stored again", "stored of 1 GB then", "GB"},
	{"read", "sequential read", "MB/s"},
	{"random read", "random 4 KiB reads, 32 at a time", "IOPS"},
	{"random write", "random 4 KiB overwrites, 32 at a time", "IOPS"},
	{"random write cpu", "its CPU time", "µs each"},
	{"snapshot", "a snapshot", "ms"},
	{"after snapshot", "random 4 KiB overwrites behind it", "IOPS"},
	{"delete snapshot", "to delete the snapshot", "ms"},
}

func printTable(figures map[string]map[string][]float64) {
	fmt.Print("| |")
	line := "| --- |"
	for _, c := range contestants {
		if figures[c.name] != nil {
			fmt.Printf(" %s |", c.name)
			line += " --- |"
		}
	}
	fmt.Printf("\n%s\n", line)
	for _, r := range rows {
		fmt.Printf("| %s, %s |", r.what, r.unit)
		for _, c := range contestants {
			f := figures[c.name]
			if f == nil {
				continue
			}
			if len(f[r.figure]) == 0 {
				fmt.Print(" – |")
				continue
			}
			fmt.Printf(" %s |", measure.Number(measure.SpreadOf(f[r.figure]).Median))
		}
		fmt.Println()
	}
}

// disk is what a contestant serves. Any number of calls at a time; offsets and lengths are multiples of 4 KiB.
type disk interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	Flush(ctx context.Context) error
	Close() error
}

// contestant is one that runs.
type contestant struct {
	disk
	dir  string
	pid  int
	once bool // no block can be written twice
	// snapshot and its end; nil: it has none.
	snapshot, delete func(ctx context.Context) error
	stop             func() error
}

// stored is what its files take.
func (c *contestant) stored() (bytes float64, err error) {
	err = filepath.WalkDir(c.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			return err
		}
		if !strings.HasPrefix(d.Name(), "journal") { // of a fixed size, and used again
			bytes += float64(st.Blocks) * 512
		}
		return nil
	})
	return bytes, err
}

// process starts a command and returns its first line of output.
func process(ctx context.Context, name string, args ...string) (cmd *exec.Cmd, in *os.File, line string, out *bufio.Reader, err error) {
	cmd = exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, nil, "", nil, err
	}
	cmd.Stdin = inR
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	inR.Close()
	if err != nil {
		inW.Close()
		return nil, nil, "", nil, err
	}
	out = bufio.NewReader(stdout)
	line, err = out.ReadString('\n')
	if err != nil {
		inW.Close()
		cmd.Process.Kill()
		return nil, nil, "", nil, errors.Join(fmt.Errorf("%s said nothing: %w", name, err), cmd.Wait())
	}
	return cmd, inW, strings.TrimSpace(line), out, nil
}
