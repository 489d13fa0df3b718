package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/nvram/region"
	"github.com/ledge-storage/ledge/raid"
)

// The beds of acknowledged writes: random 4 KiB writes of a LUN, through the pool and the log to the own region and the partner's,
// over TCP on 127.0.0.1 (path), or through shared memory (path-window). The log is drained before each measurement, so that none meets destage.
//
// The bare programs have the same link and a region of the same kind. "bare link and persist, QD 1": a block with a header goes to the
// other end, which answers, and then the same bytes are persisted: one round trip of the link and one persist. "link,
// QD 32": 32 blocks with headers are on their way at a time, and each is answered; what has come together is written, and
// answered, together. Nothing is persisted. "bare link and persist, QD 32" is the same, with what goes together persisted by one
// write at both ends before it counts: what any mirror on this machine must do.

const (
	pathDepth  = 32
	frameBytes = 48 + 4096 // header and block on the wire
	ackBytes   = 32
)

var pathAsks = []ask{
	{what: "4 KiB write, QD 1, latency to round trip + persist", a: "write QD 1", b: "bare QD 1", bound: 1.5, atMost: true},
	{what: "4 KiB write, QD 32, to the link's throughput", a: "write QD 32", b: "link QD 32", bound: .7, comment: "the link alone persists nothing"},
	{what: "4 KiB write, QD 32, to link and persist", a: "write QD 32", b: "bare QD 32", bound: .7, comment: "both ends persist each batch with one write"},
}

func openPathTCP(ctx context.Context, s settings, dir string) (*contest, error) {
	return openPath(ctx, s, dir, overTCP, 0)
}

// openPathSpin has the log's link look for the next message before it sleeps, as shelfd's spin_us does; the bare programs sleep.
func openPathSpin(ctx context.Context, s settings, dir string) (*contest, error) {
	return openPath(ctx, s, dir, overTCP, 50*time.Microsecond)
}

func openPathWindow(ctx context.Context, s settings, dir string) (*contest, error) {
	return openPath(ctx, s, dir, overWindow, 0)
}

func openPath(ctx context.Context, s settings, dir string, over linkMaker, spins time.Duration) (*contest, error) {
	const lunBytes = 64 << 20
	r, err := newRig(ctx, dir, s.logBytes, lunBytes, over, spins, nil)
	if err != nil {
		return nil, err
	}
	l, err := newBareLink(ctx, filepath.Join(dir, "bare"), over, false)
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	both, err := newBareLink(ctx, filepath.Join(dir, "both"), over, true)
	if err != nil {
		return nil, errors.Join(err, l.close(), r.close())
	}
	blocks := uint64(lunBytes / raid.BlockBytes)
	bufs := make([][]byte, pathDepth)
	for i := range bufs {
		bufs[i] = randomBytes(raid.BlockBytes, i)
	}
	return &contest{
		close: func() error { return errors.Join(both.close(), l.close(), r.close()) },
		contestants: []contestant{
			{name: "write QD 1", unit: "µs", before: r.settle, run: latency(func(int) error {
				return r.lun.Write(ctx, rand.Uint64N(blocks), bufs[:1], false)
			})},
			{name: "bare QD 1", unit: "µs", run: latency(l.roundTripAndPersist)},
			{name: "link QD 1", unit: "µs", run: latency(func(int) error { return l.roundTrip() })},
			{name: "persist QD 1", unit: "µs", run: latency(l.persist)},
			{name: "write QD 32", unit: "IOPS", before: r.settle, run: func(ctx context.Context, d time.Duration) (float64, error) {
				return pump(ctx, pathDepth, d, func(worker, _ int) (int, error) {
					return 1, r.lun.Write(ctx, rand.Uint64N(blocks), bufs[worker:worker+1], false)
				})
			}},
			{name: "link QD 32", unit: "IOPS", run: func(ctx context.Context, d time.Duration) (float64, error) { return l.stream(ctx, d, nil) }},
			{name: "bare QD 32", unit: "IOPS", run: func(ctx context.Context, d time.Duration) (float64, error) {
				return both.stream(ctx, d, both.persistBatch)
			}},
		},
	}, nil
}

// bareLink is a connection to an end that answers each frame, and a region.
type bareLink struct {
	c      net.Conn
	region region.Region
	far    region.Region // the other end's, if it persists
	at     int64
	batch  []byte // a record of as many blocks as may be on their way, and its header
	frame  []byte
	record []byte
	ack    []byte
	done   sync.WaitGroup
	end    func() error
}

func newBareLink(ctx context.Context, dir string, over linkMaker, persists bool) (*bareLink, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	ends, err := over(dir)
	if err != nil {
		return nil, err
	}
	l := &bareLink{frame: make([]byte, frameBytes), ack: make([]byte, ackBytes), record: aligned(2 * raid.BlockBytes),
		batch: aligned((pathDepth + 1) * raid.BlockBytes)}
	var persist func(frames int) error
	if persists {
		if l.far, err = newRegion(filepath.Join(dir, "far"), 64<<20); err != nil {
			return nil, errors.Join(err, ends.listener.Close(), ends.close())
		}
		at, batch := int64(0), aligned((pathDepth+1)*raid.BlockBytes)
		persist = func(frames int) error { return persistAt(l.far, &at, batch, frames) }
	}
	l.done.Go(func() {
		if c, err := ends.listener.Accept(); err == nil {
			echo(c, persist)
		}
	})
	l.end = func() error {
		err := errors.Join(ends.listener.Close(), ends.close())
		l.done.Wait()
		if l.far != nil {
			err = errors.Join(err, l.far.Close())
		}
		return err
	}
	if l.c, err = ends.dial(ctx); err != nil {
		return nil, errors.Join(err, l.end())
	}
	if l.region, err = newRegion(filepath.Join(dir, "region"), 64<<20); err != nil {
		return nil, errors.Join(err, l.c.Close(), l.end())
	}
	return l, nil
}

// persistAt writes a record of so many blocks, and its header, behind the last one.
func persistAt(r region.Region, at *int64, batch []byte, blocks int) error {
	for blocks > 0 {
		n := min(blocks, pathDepth)
		b := batch[:(n+1)*raid.BlockBytes]
		if *at+int64(len(b)) > r.Size() {
			*at = 0
		}
		if _, err := r.WriteAt(b, *at); err != nil {
			return err
		}
		*at += int64(len(b))
		blocks -= n
	}
	return nil
}

func (l *bareLink) persistBatch(blocks int) error { return persistAt(l.region, &l.at, l.batch, blocks) }

// echo answers each frame, all that have come together, when persist, if it is not nil, has them.
func echo(c net.Conn, persist func(frames int) error) {
	defer c.Close()
	buf := make([]byte, 64*frameBytes)
	acks := make([]byte, 64*ackBytes)
	for have := 0; ; {
		n, err := c.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		if frames := have / frameBytes; frames > 0 {
			if persist != nil && persist(frames) != nil {
				return
			}
			if _, err := c.Write(acks[:frames*ackBytes]); err != nil {
				return
			}
			have = copy(buf, buf[frames*frameBytes:have])
		}
	}
}

func (l *bareLink) roundTrip() error {
	if _, err := l.c.Write(l.frame); err != nil {
		return err
	}
	_, err := io.ReadFull(l.c, l.ack)
	return err
}

func (l *bareLink) persist(i int) error {
	_, err := l.region.WriteAt(l.record, int64(i)*int64(len(l.record))%(l.region.Size()))
	return err
}

func (l *bareLink) roundTripAndPersist(i int) error {
	if err := l.roundTrip(); err != nil {
		return err
	}
	return l.persist(i)
}

// stream keeps pathDepth frames on their way, and persists what it sends if persist is not nil.
func (l *bareLink) stream(ctx context.Context, d time.Duration, persist func(frames int) error) (float64, error) {
	frames := make([]byte, pathDepth*frameBytes)
	acks := make([]byte, pathDepth*ackBytes)
	begin, acked, have := time.Now(), 0, 0
	send := func(n int) error {
		_, err := l.c.Write(frames[:n*frameBytes])
		if err == nil && persist != nil {
			err = persist(n)
		}
		return err
	}
	if err := send(pathDepth); err != nil {
		return 0, err
	}
	flying := pathDepth
	for flying > 0 {
		n, err := l.c.Read(acks[have:])
		if err != nil {
			return 0, fmt.Errorf("bare link: %w", err)
		}
		have += n
		got := have / ackBytes
		have -= got * ackBytes
		acked, flying = acked+got, flying-got
		if time.Since(begin) < d && ctx.Err() == nil && got > 0 {
			if err := send(got); err != nil {
				return 0, err
			}
			flying += got
		}
	}
	return float64(acked) / time.Since(begin).Seconds(), ctx.Err()
}

func (l *bareLink) close() error {
	return errors.Join(l.c.Close(), l.end(), l.region.Close())
}
