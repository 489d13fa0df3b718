package iscsi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// known is a command as REPORT SUPPORTED OPERATION CODES describes it, from the table that
// commands are served from.
type known struct {
	code   byte
	action int // -1: none
	usage  []byte
}

func (k known) String() string {
	if k.action < 0 {
		return fmt.Sprintf("%02X", k.code)
	}
	return fmt.Sprintf("%02X/%02X", k.code, k.action)
}

// cdb is the command with its other bytes filled by fill, as far as the usage map has bits for it.
func (k known) cdb(fill func(i int) byte) []byte {
	b := make([]byte, len(k.usage))
	for i := range b {
		b[i] = k.usage[i] & fill(i)
	}
	b[0], b[len(b)-1] = k.code, 0
	if k.action >= 0 {
		b[1] = b[1]&^0x1F | byte(k.action)
	}
	return b
}

// commands asks the target for all it serves.
func (c *client) commands() (all []known) {
	c.t.Helper()
	ask := func(options, code byte, action int) []byte {
		return c.must(c.command(0xC0, 8192, 0xA3, 0x0C, options, code, 0, byte(max(action, 0)), 0, 0, 0x20, 0, 0, 0), nil, nil).data
	}
	list := ask(0, 0, -1)
	for d := list[4:]; len(d) >= 8; d = d[8:] {
		k, options := known{code: d[0], action: -1}, byte(1)
		if d[5]&1 != 0 {
			k.action, options = int(binary.BigEndian.Uint16(d[2:])), 2
		}
		one := ask(options, k.code, k.action)
		k.usage = one[4 : 4+binary.BigEndian.Uint16(one[2:])]
		all = append(all, k)
	}
	if len(all) < 60 {
		c.t.Fatalf("only %d commands are known", len(all))
	}
	return all
}

// TestHostileAllocationLengths sends every command of the table with expected data transfer lengths
// of nothing, a byte, less and more than the command's own lengths, and 4 GiB - 1, in every
// direction. Each is answered, with no byte more than was expected and residuals that add up.
func TestHostileAllocationLengths(t *testing.T) {
	main := newLab(t, Options{}, nil)
	stop := main.bystander(1)
	all := main.session().ready().commands()
	zeros := make([]byte, 64<<20)
	fills := map[string]func(int) byte{
		"zeros": func(int) byte { return 0 },
		"ones":  func(int) byte { return 0xFF },
		"small": func(i int) byte { return [4]byte{0, 0, 0, 4}[i%4] },
		"pages": func(i int) byte { return [3]byte{0x3F, 0xFF, 0x08}[i%3] },
	}
	sent := 0
	for _, k := range all {
		dev, err := mem.New(mem.Options{Bytes: 1 << 20, Name: "lengths"})
		if err != nil {
			t.Fatal(err)
		}
		l := newLab(t, Options{}, dev)
		c := l.session("MaxRecvDataSegmentLength=65536").ready()
		for name, fill := range fills {
			for _, flags := range []byte{0x80, 0xC0, 0xA0} {
				for _, edtl := range []uint32{0, 1, 3, 252, 512, 0xFFFF, 0x10000, 0xFFFFFFFF} {
					what := fmt.Sprintf("%v %s flags %02X EDTL %d", k, name, flags, edtl)
					r, err := c.do(c.command(flags, edtl, k.cdb(fill)...), nil, zeros)
					sent++
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					if flags != 0xC0 && len(r.data) > 0 {
						t.Errorf("%s: %d bytes without the R bit", what, len(r.data))
					}
					if uint64(len(r.data)) > uint64(edtl) {
						t.Errorf("%s: %d bytes", what, len(r.data))
					}
					// WRITE(6), with the one length that is never 0, counts what it did not get.
					if flags != 0xC0 || k.code == 0x0A || r.status != scsi.StatusGood {
						continue
					}
					switch under := r.flags&2 != 0; {
					case under && uint64(len(r.data))+uint64(r.residual) != uint64(edtl):
						t.Errorf("%s: %d bytes, underflow %d", what, len(r.data), r.residual)
					case !under && uint64(len(r.data)) != uint64(edtl):
						t.Errorf("%s: %d bytes without underflow", what, len(r.data))
					}
				}
			}
		}
		if err := c.ping(); err != nil {
			t.Fatalf("after %v: %v", k, err)
		}
		c.nc.Close()
		l.quiet(t, 0)
	}
	t.Logf("%d commands, %d answers beside %d verified blocks", len(all), sent, stop())
}

// TestHostileModeSense: MODE SENSE of every page, with and without R bit, with no room and with
// room smaller and larger than the allocation length (gotgt dies of an EDTL of 0).
func TestHostileModeSense(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session().ready()
	for page := range 0x40 {
		whole := c.modeSense(t, 0xC0, 0xFFFF, byte(page), 0xFFFF)
		for _, flags := range []byte{0x80, 0xC0, 0xA0} {
			for _, edtl := range []uint32{0, 1, 4, 8, 255} {
				for _, allocation := range []uint16{0, 1, 4, 8, 255} {
					r := c.modeSense(t, flags, edtl, byte(page), allocation)
					room := 0
					if flags == 0xC0 && whole.status == 0 {
						room = min(int(edtl), int(allocation), len(whole.data))
					}
					if r.status != whole.status || !bytes.Equal(r.data, whole.data[:room]) {
						t.Errorf("page %02X flags %02X EDTL %d allocation %d: status %02X, % X", page, flags, edtl, allocation, r.status, r.data)
					}
				}
			}
		}
	}
	l.alive()
}

func (c *client) modeSense(t *testing.T, flags byte, edtl uint32, page byte, allocation uint16) *result {
	t.Helper()
	r, err := c.do(c.command(flags, edtl, 0x5A, 0, page, 0, 0, 0, 0, byte(allocation>>8), byte(allocation), 0), nil, make([]byte, 256))
	if err != nil {
		t.Fatalf("page %02X: %v", page, err)
	}
	return r
}

func read16(code byte, lba uint64, blocks uint32) []byte {
	b := make([]byte, 16)
	b[0] = code
	binary.BigEndian.PutUint64(b[2:], lba)
	binary.BigEndian.PutUint32(b[10:], blocks)
	return b
}

// TestHostileRead4G: reads of the longest transfer there is, with room for 4 GiB - 1, as many at
// once as the window takes, by an initiator that takes nothing. The server holds two pieces of each.
func TestHostileRead4G(t *testing.T) {
	const window = 128
	most := uint32(32 << 20 / 512)
	for name, dev := range map[string]*blocking{"inline": nil, "in workers": newBlocking(t, nil)} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, Options{Window: window}, nil)
			if dev != nil {
				l = newLab(t, Options{Window: window}, dev)
			}
			c := l.session("MaxRecvDataSegmentLength=262144").ready()
			r := c.must(c.command(0xC0, 0xFFFFFFFF, read16(0x88, 0, most)...), nil, nil)
			if len(r.data) != 32<<20 || r.flags != 2 || r.residual != 0xFFFFFFFF-32<<20 {
				t.Errorf("%d bytes, flags %d, residual %d", len(r.data), r.flags, r.residual)
			}
			r = nil
			before, _ := footprint()
			for range window {
				if err := c.send(c.command(0xC0, 0xFFFFFFFF, read16(0x88, 0, most)...), nil); err != nil {
					t.Fatal(err)
				}
			}
			want := int64(window)
			if dev == nil {
				want = 1 // the reader itself waits
			}
			eventually(t, "the reads wait for the initiator", func() bool { return l.srv.Stats().Memory == want*2*scsi.ReadPiece })
			held, goroutines := footprint()
			if room := want*2*scsi.ReadPiece + 8<<20; held-before > room {
				t.Errorf("%d kB held for %d reads, more than %d kB", (held-before)>>10, window, room>>10)
			}
			if goroutines > window+64 {
				t.Errorf("%d goroutines", goroutines)
			}
			t.Logf("%d reads of 32 MiB at once: %d kB, %d goroutines", window, (held-before)>>10, goroutines)
			l.alive()
			c.nc.Close()
			l.quiet(t, 0)
		})
	}
}

// TestHostileWrite4G: writes that promise 4 GiB - 1 and want the longest transfer there is. What
// the server reserves stays within Memory, what it allocates within WriteMemory; other sessions,
// whose share of Memory is their own, read and write; one that is fed ends well.
func TestHostileWrite4G(t *testing.T) {
	const window = 128
	most := uint32(32 << 20 / 512)
	l := newLab(t, Options{Window: window}, nil)
	stop := l.bystander(1)
	c := l.session("InitialR2T=Yes", "ImmediateData=No").ready()
	before, _ := l.footprint()
	var first *header
	for range window {
		h := c.command(0xA0, 0xFFFFFFFF, read16(0x8A, 0, most)...)
		if first == nil {
			first = h
		}
		if err := c.send(h, nil); err != nil {
			t.Fatal(err)
		}
	}
	full, asked := 0, make(map[uint32]bool)
	for full < window-1<<30/(32<<20) {
		p, err := c.recv()
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case p.h.opcode() == opResponse && p.h[3] == scsi.StatusTaskSetFull:
			full++
		case p.h.opcode() == opR2T:
			asked[p.h.itt()] = true
		default:
			t.Fatalf("opcode %#x, status %02X", p.h.opcode(), p.h[3])
		}
	}
	if m := l.srv.Stats().Memory; m > 1<<30+1<<20 {
		t.Errorf("%d bytes reserved", m)
	}
	held, _ := l.footprint()
	if held-before > 64<<20+8<<20 {
		t.Errorf("%d kB held", (held-before)>>10)
	}
	if len(asked) != 2 {
		t.Errorf("%d writes were asked for data, where there is room for 2", len(asked))
	}
	t.Logf("%d kB for %d writes of 4 GiB - 1", (held-before)>>10, window)
	var wg sync.WaitGroup
	c.discard(&wg)
	l.alive()
	t.Logf("%d verified blocks beside them", stop())
	c.nc.Close()
	wg.Wait()
	l.quiet(t, 0)

	c = l.session("InitialR2T=Yes", "ImmediateData=No").ready()
	data := bytes.Repeat(fill(0xABCD), int(most))
	r := c.must(c.command(0xA0, 0xFFFFFFFF, read16(0x8A, 0, most)...), nil, data)
	if r.flags != 2 || r.residual != 0xFFFFFFFF-32<<20 {
		t.Errorf("flags %d, residual %d", r.flags, r.residual)
	}
	if got := c.must(c.command(0xC0, 512, read16(0x88, uint64(most)-1, 1)...), nil, nil); !bytes.Equal(got.data, fill(0xABCD)) {
		t.Error("the last block was not written")
	}
	runtime.KeepAlive(data)
}
