package iscsi

import (
	"bytes"
	"cmp"
	"fmt"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/target/scsi"
)

// out is a Data-Out PDU.
type out struct {
	ttt    int64 // added to the R2T's; unsolicited: as if it were not asked for
	offset uint32
	bytes  int
	sn     uint32
	final  bool
}

const unsolicited = -1 << 40

func (c *client) dataOut(itt, ttt uint32, o out) error {
	h := new(header)
	h[0] = opDataOut
	if o.final {
		h[1] = 0x80
	}
	h.put32(16, itt)
	h.put32(20, uint32(int64(ttt)+o.ttt))
	if o.ttt == unsolicited {
		h.put32(20, noTag)
	}
	h.put32(36, o.sn)
	h.put32(40, o.offset)
	return c.send(h, bytes.Repeat([]byte{0xEE}, o.bytes))
}

// TestHostileDataOut: Data-Out beyond the command, beyond what was asked for, out of place, out of
// order, of another tag, with the F bit too early and too late. The command fails or is done, the
// blocks hold the old data or, where it was done, the new; the session goes on; nothing stays.
func TestHostileDataOut(t *testing.T) {
	l := newLab(t, Options{}, nil)
	stop := l.bystander(1)
	const edtl = 4096
	for _, x := range []struct {
		name string
		pdus []out
		good bool // it may be done: nothing was wrong that matters
	}{
		{name: "beyond the command", pdus: []out{{bytes: 8192, final: true}}},
		{name: "far beyond the command", pdus: []out{{bytes: 256 << 10, final: true}}},
		{name: "behind the command's end", pdus: []out{{offset: 4096, bytes: 512, final: true}}},
		{name: "at the end of 4 GiB", pdus: []out{{offset: 0xFFFFFE00, bytes: 512, final: true}}},
		{name: "a hole", pdus: []out{{offset: 512, bytes: 3584, final: true}}},
		{name: "an overlap", pdus: []out{{bytes: 1024}, {offset: 512, bytes: 3584, sn: 1, final: true}}},
		{name: "the same again", pdus: []out{{bytes: 2048}, {bytes: 2048, sn: 1, final: true}}},
		{name: "one byte too many, later", pdus: []out{{bytes: 2048}, {offset: 2048, bytes: 2049, sn: 1, final: true}}},
		{name: "another tag", pdus: []out{{ttt: 1, bytes: 4096, final: true}}},
		{name: "tag 0", pdus: []out{{ttt: -1, bytes: 4096, final: true}}},
		{name: "unasked", pdus: []out{{ttt: unsolicited, bytes: 4096, final: true}}},
		{name: "DataSN 1 first", pdus: []out{{bytes: 4096, sn: 1, final: true}}},
		{name: "DataSN twice", pdus: []out{{bytes: 2048}, {offset: 2048, bytes: 2048, final: true}}},
		{name: "DataSN skipped", pdus: []out{{bytes: 2048}, {offset: 2048, bytes: 2048, sn: 2, final: true}}},
		{name: "DataSN of 32 bits", pdus: []out{{bytes: 4096, sn: 0xFFFFFFFF, final: true}}},
		{name: "F bit early", pdus: []out{{bytes: 2048, final: true}}},
		{name: "F bit early, the rest after it", pdus: []out{{bytes: 2048, final: true}, {offset: 2048, bytes: 2048, sn: 1, final: true}}},
		{name: "F bit without data", pdus: []out{{final: true}}},
		{name: "F bit late", pdus: []out{{bytes: 4096}, {offset: 4096, sn: 1, final: true}}, good: true},
		{name: "no data, then all", pdus: []out{{}, {sn: 1, bytes: 4096, final: true}}, good: true},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := l.session("InitialR2T=Yes", "ImmediateData=No").ready()
			old := bytes.Repeat(fill(0x01D), 8)
			c.must(c.command(0xA0, edtl, write10(0, 8)...), nil, old)
			h := c.command(0xA0, edtl, write10(0, 8)...)
			if err := c.send(h, nil); err != nil {
				t.Fatal(err)
			}
			p, err := c.recv()
			if err != nil || p.h.opcode() != opR2T {
				t.Fatal(p, err)
			}
			for _, o := range x.pdus {
				if err := c.dataOut(h.itt(), p.h.ttt(), o); err != nil {
					t.Fatal(err)
				}
			}
			r, err := c.finish(h, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := old
			switch {
			case r.status == 0 && x.good:
				want = bytes.Repeat([]byte{0xEE}, edtl)
			case r.status != scsi.StatusCheckCondition || r.key != 0xB:
				t.Errorf("status %02X, sense %X/%04X", r.status, r.key, r.asc)
			}
			if got := c.must(c.command(0xC0, edtl, read10(0, 8)...), nil, nil); !bytes.Equal(got.data, want) {
				t.Error("the blocks hold what they should not")
			}
			if err := c.ping(); err != nil {
				t.Error(err)
			}
			c.nc.Close()
		})
	}
	stop()
	l.quiet(t, 0)
}

// TestHostileUnasked is the same of immediate and unsolicited data.
func TestHostileUnasked(t *testing.T) {
	l := newLab(t, Options{}, nil)
	stop := l.bystander(1)
	for _, x := range []struct {
		name      string
		keys      []string
		flags     byte
		edtl      uint32
		immediate int
		pdus      []out
		reject    bool
		key       byte // of the sense data; zero: ABORTED COMMAND
	}{
		{name: "immediate beyond the command", flags: 0xA0, edtl: 512, immediate: 1024, reject: true},
		{name: "immediate with a length of 0", flags: 0xA0, edtl: 0, immediate: 512, reject: true},
		{name: "immediate beyond the first burst", flags: 0xA0, edtl: 16384, immediate: 8192, reject: true},
		{name: "immediate, not agreed", keys: []string{"ImmediateData=No"}, flags: 0xA0, edtl: 512, immediate: 512, reject: true},
		{name: "immediate with a read", flags: 0xC0, edtl: 512, immediate: 512, reject: true},
		{name: "immediate with neither", flags: 0x80, edtl: 512, immediate: 512, reject: true},
		{name: "both directions", flags: 0xE0, edtl: 512, immediate: 512, key: 5},
		{name: "unsolicited, not agreed", keys: []string{"InitialR2T=Yes"}, flags: 0x20, edtl: 512, reject: true},
		{name: "more announced, of a read", flags: 0x40, edtl: 512, reject: true},
		{name: "unsolicited beyond the command", flags: 0x20, edtl: 512, pdus: []out{{ttt: unsolicited, bytes: 1024, final: true}}},
		{name: "unsolicited after immediate, beyond the command", flags: 0x20, edtl: 4096, immediate: 2048, pdus: []out{{ttt: unsolicited, offset: 2048, bytes: 4096, final: true}}},
		{name: "unsolicited beyond the first burst", flags: 0x20, edtl: 16384, pdus: []out{{ttt: unsolicited, bytes: 8192, final: true}}},
		{name: "unsolicited at a wrong offset", flags: 0x20, edtl: 4096, immediate: 1024, pdus: []out{{ttt: unsolicited, bytes: 3072, final: true}}},
		{name: "unsolicited with a tag", flags: 0x20, edtl: 4096, pdus: []out{{ttt: 5, bytes: 4096, final: true}, {ttt: unsolicited, final: true}}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := l.session(append([]string{"FirstBurstLength=4096"}, append(x.keys, "InitialR2T=No")[:1]...)...).ready()
			old := bytes.Repeat(fill(0x01D), 32)
			c.must(c.command(0xA0, 16384, write10(0, 32)...), nil, old)
			cdb := write10(0, 32)
			if x.flags&0x20 == 0 {
				cdb = read10(0, 32)
			}
			h := c.command(x.flags, x.edtl, cdb...)
			if err := c.send(h, bytes.Repeat([]byte{0xEE}, x.immediate)); err != nil {
				t.Fatal(err)
			}
			for _, o := range x.pdus {
				if err := c.dataOut(h.itt(), 0, o); err != nil {
					t.Fatal(err)
				}
			}
			r, err := c.finish(h, nil)
			switch {
			case x.reject:
				if err == nil {
					t.Errorf("it was not rejected: %+v", r)
				}
			case err != nil:
				t.Fatal(err)
			case r.status != scsi.StatusCheckCondition || r.key != cmp.Or(x.key, 0xB):
				t.Errorf("status %02X, sense %X/%04X", r.status, r.key, r.asc)
			}
			if got := c.must(c.command(0xC0, 16384, read10(0, 32)...), nil, nil); !bytes.Equal(got.data, old) {
				t.Error("the blocks were changed")
			}
			c.nc.Close()
		})
	}
	t.Run("for no task", func(t *testing.T) {
		c := l.session().ready()
		for i := range 100 {
			if err := c.dataOut(uint32(i), uint32(i), out{bytes: 4096, offset: uint32(i) << 20, final: i%2 == 0}); err != nil {
				t.Fatal(err)
			}
		}
		c.ready()
		c.nc.Close()
	})
	t.Run("announced, and never sent", func(t *testing.T) {
		c := l.session("InitialR2T=No").ready()
		for range 64 {
			if err := c.send(c.command(0x20, 32<<20, read16(0x8A, 0, 65536)...), nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.ping(); err != nil {
			t.Fatal(err)
		}
		l.alive()
		var wg sync.WaitGroup
		c.discard(&wg)
		c.nc.Close()
		wg.Wait()
	})
	stop()
	l.quiet(t, 0)
}

// TestHostileImmediateFlood: commands with the I bit are outside the window, and bounded all the
// same: neither those that wait for data nor those that a slow device holds pile up.
func TestHostileImmediateFlood(t *testing.T) {
	hold := make(chan struct{})
	dev := newBlocking(t, hold)
	l := newLab(t, Options{}, dev)
	for _, data := range [][]byte{nil, make([]byte, 512)} {
		c := l.session("InitialR2T=Yes").ready()
		before, goroutines := footprint()
		var wg sync.WaitGroup
		c.discard(&wg)
		for i := range 5000 {
			h := c.command(0xA0, 512, write10(uint32(i), 1)...)
			h[0] |= 0x40
			c.cmdSN--
			h.put32(24, c.cmdSN)
			if err := c.send(h, data); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "most are rejected", func() bool { return l.srv.Stats().Rejects >= 5000-maxImmediates })
		held, now := footprint()
		if now > goroutines+maxImmediates+8 || held > before+4<<20 {
			t.Errorf("%d → %d goroutines, %d → %d kB", goroutines, now, before>>10, held>>10)
		}
		l.srv.counters.rejects.Store(0)
		c.nc.Close()
		wg.Wait()
		l.quiet(t, 0)
	}
	close(hold)
	l.alive()
	// Those that end make room for others.
	c := l.session().ready()
	for i := range 10 * maxImmediates {
		h := c.command(0xA0, 512, write10(uint32(i), 1)...)
		h[0] |= 0x40
		c.cmdSN--
		h.put32(24, c.cmdSN)
		if r, err := c.do(h, make([]byte, 512), nil); err != nil || r.status != 0 {
			t.Fatal(fmt.Sprint(i), r, err)
		}
	}
}
