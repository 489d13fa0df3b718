package iscsi

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// pump is an initiator that allocates nothing: it sends a batch of equal commands at once and
// reads as many answers.
type pump struct {
	nc     net.Conn
	out    []byte // the batch
	each   int    // bytes of one request
	in     []byte
	answer int // bytes of one answer
	depth  int
	cmdSN  uint32
}

func newPump(t testing.TB, l *lab, depth int, write bool, blocks int, keys ...string) *pump {
	c := l.session(append([]string{"MaxRecvDataSegmentLength=262144", "InitialR2T=No", "FirstBurstLength=262144"}, keys...)...).ready()
	c.nc.SetDeadline(time.Now().Add(5 * time.Minute))
	p := &pump{nc: c.nc, depth: depth, cmdSN: c.cmdSN}
	for i := range depth {
		var one []byte
		if write {
			one = wire(c.command(0xA0, uint32(blocks*512), write10(uint32(i*blocks), uint16(blocks))...), string(make([]byte, blocks*512)))
			p.answer = headerBytes
		} else {
			one = wire(c.command(0xC0, uint32(blocks*512), read10(uint32(i*blocks), uint16(blocks))...), "")
			p.answer = headerBytes + blocks*512
		}
		p.each = len(one)
		p.out = append(p.out, one...)
	}
	p.in = make([]byte, p.answer*depth)
	return p
}

func (p *pump) batch() error {
	for i := range p.depth {
		h := (*header)(p.out[i*p.each:])
		h.put32(24, p.cmdSN)
		p.cmdSN++
	}
	if _, err := p.nc.Write(p.out); err != nil {
		return err
	}
	_, err := io.ReadFull(p.nc, p.in)
	return err
}

// TestNoAllocations holds the whole way of a command, from socket to socket, to none.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools forget")
	}
	for _, x := range []struct {
		name  string
		write bool
		dev   target.Device
		keys  []string
	}{
		{"read", false, nil, nil}, {"write", true, nil, nil},
		{"read in a worker", false, newBlocking(t, nil), nil}, {"write in a worker", true, newBlocking(t, nil), nil},
		{"read, of several connections", false, nil, []string{"MaxConnections=4"}},
		{"write in a worker, of several connections", true, newBlocking(t, nil), []string{"MaxConnections=4"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			p := newPump(t, newLab(t, Options{}, x.dev), 32, x.write, 8, x.keys...)
			run := func() {
				if err := p.batch(); err != nil {
					t.Fatal(err)
				}
			}
			for range 100 {
				run()
			}
			// A collection empties the pools, so that a few allocations are left in thousands
			// of commands.
			if a := testing.AllocsPerRun(500, run) / 32; a > 0.05 {
				t.Errorf("%.3f allocations a command", a)
			}
		})
	}
}

func benchmark(b *testing.B, depth int, write bool, blocks int, dev target.Device, keys ...string) {
	p := newPump(b, newLab(b, Options{}, dev), depth, write, blocks, keys...)
	b.SetBytes(int64(blocks * 512))
	b.ReportAllocs()
	b.ResetTimer()
	for n := 0; n < b.N; n += depth {
		if err := p.batch(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead4KQD1(b *testing.B)        { benchmark(b, 1, false, 8, nil) }
func BenchmarkRead4KQD32(b *testing.B)       { benchmark(b, 32, false, 8, nil) }
func BenchmarkWrite4KQD32(b *testing.B)      { benchmark(b, 32, true, 8, nil) }
func BenchmarkRead128KQD8(b *testing.B)      { benchmark(b, 8, false, 256, nil) }
func BenchmarkWrite128KQD8(b *testing.B)     { benchmark(b, 8, true, 256, nil) }
func BenchmarkWorkerRead4KQD32(b *testing.B) { benchmark(b, 32, false, 8, newBlocking(b, nil)) }

// BenchmarkSharedRead4KQD32 is what a session pays that may have several connections and has one.
func BenchmarkSharedRead4KQD32(b *testing.B) { benchmark(b, 32, false, 8, nil, "MaxConnections=4") }
