// Package speed measures a mirrored log against what its link and its medium can do, alternating in one run.
//
// It owns both ends of a link in this process: two regions in one directory, a log on one, its mirror on the other, TCP
// over loopback between them. It promises only that each pair of figures was taken within the same
// second or so, on the same medium: on a loaded machine the ratios mean something, the figures do not.
//
//	queue depth 1   floor: a 4 KiB message to the other end and its answer, and then one durable write of 4 KiB;
//	                ours: Log.Append of one 4 KiB block, durable in both regions
//	queue depth 32  link: 4 KiB messages, 32 unanswered at most, answered as they come, all that is there at once;
//	                ours: Log.Append of one 4 KiB block by 32 goroutines
package speed

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/mirror"
	"github.com/ledge-storage/ledge/nvram/region"
)

// Options of Measure. The zero value of each field is given in brackets.
type Options struct {
	// Dir is where the regions are made, on the medium to measure; removed afterwards. Required.
	Dir string
	// Rounds of Time each, floor and ours in turn. [9 of 200 ms]
	Rounds int
	Time   time.Duration
	// RegionBytes of each of the two. [64 MiB]
	RegionBytes int64
}

// Result has a figure a round, in the order they were taken.
type Result struct {
	Medium string // what the region is written with
	// RoundTrip, Persist and Append are the mean times at queue depth 1.
	RoundTrip, Persist, Append []time.Duration
	// Link and Log are messages and Appends a second at queue depth 32.
	Link, Log []float64
}

// Latency is the median of the rounds' ratios: Append to one round trip and one persist.
func (r *Result) Latency() float64 {
	var q []float64
	for i := range r.Append {
		q = append(q, float64(r.Append[i])/float64(r.RoundTrip[i]+r.Persist[i]))
	}
	return median(q)
}

// Throughput is the median of the rounds' ratios: Appends to messages on the bare link.
func (r *Result) Throughput() float64 {
	var q []float64
	for i := range r.Log {
		q = append(q, r.Log[i]/r.Link[i])
	}
	return median(q)
}

func (r *Result) String() string {
	return fmt.Sprintf("%s: QD 1 append %v, round trip %v + persist %v: ratio %.2f; QD 32 %.0f appends/s of %.0f messages/s: %.0f %%",
		r.Medium, median(r.Append), median(r.RoundTrip), median(r.Persist), r.Latency(), median(r.Log), median(r.Link), 100*r.Throughput())
}

func median[T float64 | time.Duration](v []T) T {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

const depth = 32

// Measure runs all rounds.
func Measure(ctx context.Context, o Options) (res Result, err error) {
	if o.Rounds <= 0 {
		o.Rounds = 9
	}
	if o.Time <= 0 {
		o.Time = 200 * time.Millisecond
	}
	if o.RegionBytes <= 0 {
		o.RegionBytes = 64 << 20
	}
	dir, err := os.MkdirTemp(o.Dir, "speed")
	if err != nil {
		return res, err
	}
	defer os.RemoveAll(dir)
	b := bench{ctx: ctx, dir: dir, size: o.RegionBytes}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.open(); err != nil {
		return res, err
	}
	res.Medium = b.raw.Medium()
	for range o.Rounds {
		n, d, err := b.run(1, o.Time, func(int) error { return b.link.ping() })
		if err != nil {
			return res, err
		}
		res.RoundTrip = append(res.RoundTrip, d/time.Duration(n))
		if n, d, err = b.run(1, o.Time, func(int) error { return b.persist() }); err != nil {
			return res, err
		}
		res.Persist = append(res.Persist, d/time.Duration(n))
		if n, d, err = b.run(1, o.Time, b.append); err != nil {
			return res, err
		}
		res.Append = append(res.Append, d/time.Duration(n))
		if n, d, err = b.link.stream(o.Time); err != nil {
			return res, err
		}
		res.Link = append(res.Link, float64(n)/d.Seconds())
		if n, d, err = b.run(depth, o.Time, b.append); err != nil {
			return res, err
		}
		res.Log = append(res.Log, float64(n)/d.Seconds())
	}
	return res, nil
}

// bench is all that is measured.
type bench struct {
	ctx  context.Context
	dir  string
	size int64

	raw      region.Region
	at       int64
	link     *bare
	log      *nvram.Log
	closers  []func() error
	payloads [depth][]byte
}

func (b *bench) close() (err error) {
	for _, f := range slices.Backward(b.closers) {
		err = errors.Join(err, f())
	}
	return err
}

func (b *bench) open() error {
	var regions [3]region.Region
	for i, name := range []string{"raw", "own", "mirror"} {
		r, err := region.Open(filepath.Join(b.dir, name), region.Options{Create: true, Size: b.size})
		if err != nil {
			return err
		}
		b.closers = append(b.closers, r.Close)
		regions[i] = r
	}
	b.raw = regions[0]
	for i := range b.payloads {
		b.payloads[i] = nvram.AlignedBlocks(1)
	}
	var err error
	if b.link, err = newBare(b.ctx); err != nil {
		return err
	}
	b.closers = append(b.closers, b.link.close)
	area := nvram.Area{Size: b.size}
	id := nvram.NewID()
	if err := nvram.Format(regions[1], area, nvram.FormatOptions{ID: id, Epoch: 1}); err != nil {
		return err
	}
	m, err := nvram.OpenMirror(regions[2], area)
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(b.ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	secret := []byte("a secret of this measurement")
	owner, err := mirror.New(mirror.Options{Shelf: "speed", Self: 'A', Secret: secret, Listener: l})
	if err != nil {
		return err
	}
	b.closers = append(b.closers, owner.Close)
	standby, err := mirror.New(mirror.Options{Shelf: "speed", Self: 'B', Secret: secret,
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		}})
	if err != nil {
		return err
	}
	b.closers = append(b.closers, standby.Close)
	standby.Receive(m, 1)
	if b.log, err = nvram.Open(b.ctx, regions[1], area, nvram.Options{ID: id, Epoch: 1, Replicator: owner.Replicator()}); err != nil {
		return err
	}
	b.closers = append(b.closers, b.log.Close)
	for b.log.Stats().Mirror != nvram.MirrorInSync {
		if _, err := b.log.Append(b.ctx, nvram.Set{Extents: []nvram.Extent{{LUN: 1, Blocks: 1}}, Payload: [][]byte{b.payloads[0]}}); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// run calls f from so many goroutines for about the time, and returns how often and how long.
func (b *bench) run(workers int, d time.Duration, f func(worker int) error) (n int, took time.Duration, err error) {
	start := time.Now()
	end := start.Add(d)
	var wg sync.WaitGroup
	counts, errs := make([]int, workers), make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for counts[w]%16 != 0 || counts[w] == 0 || time.Now().Before(end) {
				if errs[w] = f(w); errs[w] != nil {
					return
				}
				counts[w]++
			}
		})
	}
	wg.Wait()
	for _, c := range counts {
		n += c
	}
	return n, time.Since(start), errors.Join(errs...)
}

func (b *bench) persist() error {
	_, err := b.raw.WriteAt(b.payloads[0], b.at)
	if b.at += nvram.BlockBytes; b.at == b.size {
		b.at = 0
	}
	return err
}

func (b *bench) append(w int) error {
	lsn, err := b.log.Append(b.ctx, nvram.Set{Extents: []nvram.Extent{{LUN: 1, LBA: uint64(w), Blocks: 1}}, Payload: [][]byte{b.payloads[w]}})
	if err == nil && lsn%256 == 0 {
		b.log.Trim(lsn)
	}
	return err
}

// bare is a TCP connection with an echo of counts at its other end: of each read, how many whole messages came. Its two
// ends are threads that block in system calls, as two programs on two machines would.
type bare struct {
	client, server *os.File
	done           sync.WaitGroup
	msg            []byte
	answer         [4]byte
}

func newBare(ctx context.Context) (*bare, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	c := &bare{msg: make([]byte, nvram.BlockBytes)}
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	other, err := l.Accept()
	if err != nil {
		return nil, err
	}
	defer other.Close()
	if c.client, err = nc.(*net.TCPConn).File(); err != nil {
		return nil, err
	}
	if c.server, err = other.(*net.TCPConn).File(); err != nil {
		c.client.Close()
		return nil, err
	}
	for _, f := range []*os.File{c.client, c.server} {
		if err := syscall.SetNonblock(int(f.Fd()), false); err != nil {
			return nil, errors.Join(err, c.client.Close(), c.server.Close())
		}
	}
	c.done.Go(c.serve)
	return c, nil
}

// close ends the server by the end of its input.
func (c *bare) close() error {
	err := c.client.Close()
	c.done.Wait()
	return errors.Join(err, c.server.Close())
}

func (c *bare) read(f *os.File, p []byte) (n int, err error) {
	for {
		if n, err = syscall.Read(int(f.Fd()), p); err != syscall.EINTR {
			break
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (c *bare) write(f *os.File, p []byte) error {
	for len(p) > 0 {
		n, err := syscall.Write(int(f.Fd()), p)
		if err != nil && err != syscall.EINTR {
			return err
		}
		p = p[max(n, 0):]
	}
	return nil
}

// serve answers until the connection ends.
func (c *bare) serve() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 1<<20)
	have := 0
	var answer [4]byte
	for {
		n, err := c.read(c.server, buf)
		if err != nil {
			return
		}
		have += n
		whole := have / nvram.BlockBytes
		have %= nvram.BlockBytes
		if whole == 0 {
			continue
		}
		binary.LittleEndian.PutUint32(answer[:], uint32(whole))
		if c.write(c.server, answer[:]) != nil {
			return
		}
	}
}

// ping is one message and its answer.
func (c *bare) ping() error {
	if err := c.write(c.client, c.msg); err != nil {
		return err
	}
	_, err := c.take()
	return err
}

// take reads an answer.
func (c *bare) take() (int, error) {
	for have := 0; have < len(c.answer); {
		n, err := c.read(c.client, c.answer[have:])
		if err != nil {
			return 0, err
		}
		have += n
	}
	return int(binary.LittleEndian.Uint32(c.answer[:])), nil
}

// stream sends for the time, as many messages at once as may be unanswered.
func (c *bare) stream(d time.Duration) (n int, took time.Duration, err error) {
	start := time.Now()
	end := start.Add(d)
	batch := make([]byte, depth*nvram.BlockBytes)
	for flying := 0; ; {
		if more := depth - flying; more > 0 && time.Now().Before(end) {
			if err := c.write(c.client, batch[:more*nvram.BlockBytes]); err != nil {
				return n, time.Since(start), err
			}
			flying = depth
		}
		if flying == 0 {
			return n, time.Since(start), nil
		}
		k, err := c.take()
		if err != nil {
			return n, time.Since(start), err
		}
		flying -= k
		n += k
	}
}
