package iscsi

import (
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/scsi"
)

// hostileSeed is that of the random contents below; a failure names what it was drawn for.
const hostileSeed = 20261125

// phases of a connection, and how to get there.
var phases = []struct {
	name  string
	enter func(c *client) error
}{
	{"before login", func(*client) error { return nil }},
	{"in security negotiation", func(c *client) error {
		_, err := c.loginStep(0x00, "InitiatorName="+testInitiator, "TargetName="+testTarget, "AuthMethod=None")
		return err
	}},
	{"in operational negotiation", func(c *client) error {
		_, err := c.loginStep(0x04, "InitiatorName="+testInitiator, "TargetName="+testTarget, "MaxBurstLength=4096")
		return err
	}},
	{"in a text that goes on", func(c *client) error {
		_, err := c.loginStep(0x44, "InitiatorName="+testInitiator)
		return err
	}},
	{"in a session", func(c *client) error { return c.in(testTarget, "InitialR2T=No") }},
	{"in a discovery session", func(c *client) error { return c.in("") }},
	{"with commands under way", func(c *client) error {
		if err := c.in(testTarget, "InitialR2T=No"); err != nil {
			return err
		}
		for range 4 {
			if err := c.send(c.command(0x20, 8192, write10(0, 16)...), make([]byte, 512)); err != nil {
				return err
			}
		}
		return nil
	}},
	{"after a logout", func(c *client) error {
		if err := c.in(testTarget); err != nil {
			return err
		}
		h := new(header)
		h[0], h[1] = opLogoutReq|0x40, 0x80
		h.put32(24, c.cmdSN)
		return c.send(h, nil)
	}},
}

// in logs in.
func (c *client) in(target string, keys ...string) error {
	first := []string{"InitiatorName=" + testInitiator, "SessionType=Discovery"}
	if target != "" {
		first[1] = "TargetName=" + target
	}
	p, err := c.loginStep(0x87, append(first, keys...)...)
	if err == nil && p.h[36] != 0 {
		err = fmt.Errorf("login: status %02X%02X", p.h[36], p.h[37])
	}
	return err
}

var opcodeRounds = flag.Int("rounds", 2, "rounds of TestHostileOpcodes; memory is compared from the first to the last")

// TestHostileOpcodes sends every opcode, immediate and not, in every phase of a connection, with
// random contents: plausible ones and none. The process lives, another session's blocks are right,
// and nothing of it all stays.
func TestHostileOpcodes(t *testing.T) {
	rounds := *opcodeRounds
	if testing.Short() || raceEnabled {
		rounds = 1
	}
	for _, kind := range []string{"inline", "in workers"} {
		t.Run(kind, func(t *testing.T) {
			l := newLab(t, Options{LoginTimeout: time.Minute}, nil)
			if kind != "inline" {
				l = newLab(t, Options{LoginTimeout: time.Minute}, newBlocking(t, nil))
			}
			stop := l.bystander(1)
			r := rand.New(rand.NewPCG(hostileSeed, 0))
			connections := 0
			bytes, goroutines := int64(0), 0
			for round := range rounds {
				for _, phase := range phases {
					for opcode := range byte(64) {
						for _, immediate := range []byte{0, 0x40} {
							// A TARGET COLD RESET that an earlier connection sent closes those of
							// its target when it comes to be served, perhaps this one.
							var c *client
							isid := byte(r.IntN(3))
							for tries := 1; ; tries++ {
								c = l.dial()
								c.isid = isid
								connections++
								err := phase.enter(c)
								if err == nil {
									break
								}
								if tries == 5 {
									t.Fatalf("%s: %v", phase.name, err)
								}
							}
							var wg sync.WaitGroup
							c.discard(&wg)
							for range 1 + r.IntN(4) {
								if c.nasty(r, opcode|immediate) != nil {
									break // closed, as it should be
								}
							}
							if r.IntN(4) == 0 {
								c.ping0()
							}
							c.nc.Close()
							wg.Wait()
						}
					}
				}
				if round == 0 {
					l.quiet(t, 1)
					bytes, goroutines = l.footprint()
				}
			}
			l.quiet(t, 1)
			bytes2, goroutines2 := l.footprint()
			if bytes2 > bytes+16<<20 || goroutines2 > goroutines+idleWorkers+8 {
				t.Errorf("%d → %d kB, %d → %d goroutines", bytes>>10, bytes2>>10, goroutines, goroutines2)
			}
			t.Logf("%d connections beside %d verified blocks; %d → %d kB", connections, stop(), bytes>>10, bytes2>>10)
		})
	}
}

// ping0 sends a ping whose answer somebody else reads away.
func (c *client) ping0() {
	h := new(header)
	h[0], h[1] = opNopOut|0x40, 0x80
	h.put32(20, noTag)
	c.send(h, nil)
}

// nasty sends one PDU of an opcode, with contents that are random but for what r lets be right.
func (c *client) nasty(r *rand.Rand, first byte) error {
	h := new(header)
	for i := range h {
		h[i] = byte(r.Uint32())
	}
	h[0] = first
	if r.IntN(2) == 0 { // plausible
		clear(h[8:16])
		h[1] = []byte{0x80, 0xC0, 0xA0, 0x20, 0x87, 0x81}[r.IntN(6)]
		h.put32(16, uint32(r.IntN(6)))
		h.put32(20, []uint32{0, 1, 512, 8192, noTag, 1 << 31}[r.IntN(6)])
		h.put32(24, c.cmdSN)
		if first&0x40 == 0 {
			c.cmdSN++
		}
		h.put32(36, uint32(r.IntN(2)))
		h.put32(40, uint32(r.IntN(3)*512))
	}
	ahs := make([]byte, 4*[]int{0, 0, 0, 1, 5, 255}[r.IntN(6)])
	data := make([]byte, []int{0, 0, 1, 48, 512, 4096, 9000}[r.IntN(7)])
	for _, b := range [][]byte{ahs, data} {
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	}
	return c.raw(h, ahs, data)
}

// TestHostileAHS sends additional header segments of every type, with lengths that are right, too
// short, too long and none, with a command and with PDUs that take none. The connection keeps its
// place in the stream: it answers a ping after each.
func TestHostileAHS(t *testing.T) {
	l := newLab(t, Options{}, nil)
	stop := l.bystander(1)
	c := l.session().ready()
	c.nc.SetDeadline(time.Now().Add(5 * time.Minute))
	sent := 0
	for kind := range 256 {
		for _, words := range []int{1, 2, 5, 255} {
			for _, named := range []int{0, 1, 4, 5, 4*words - 4, 4*words - 3, 4*words - 2, 4 * words, 17, 1020, 0xFFFF} {
				if named < 0 {
					continue
				}
				ahs := make([]byte, 4*words)
				binary.BigEndian.PutUint16(ahs, uint16(named))
				ahs[2] = byte(kind)
				h := c.command(0x80, 0, 0, 0, 0, 0, 0, 0)
				if err := c.raw(h, ahs, nil); err != nil {
					t.Fatal(err)
				}
				sent++
			}
			if err := c.ping(); err != nil {
				t.Fatalf("type %d, %d words: %v", kind, words, err)
			}
		}
	}
	for _, opcode := range []byte{opNopOut, opTaskReq, opTextReq, opDataOut, opSNACK, 0x1F} {
		ahs := make([]byte, 1020)
		binary.BigEndian.PutUint16(ahs, 1017)
		h := new(header)
		h[0], h[1] = opcode|0x40, 0x80
		h.put32(16, 500)
		h.put32(20, noTag)
		h.put32(24, c.cmdSN)
		if err := c.raw(h, ahs, []byte("X-a=b\x00")); err != nil {
			t.Fatal(err)
		}
		if err := c.ping(); err != nil {
			t.Fatalf("opcode %#x with an additional header: %v", opcode, err)
		}
		sent++
	}
	c.ready()
	c.nc.Close()
	t.Logf("%d additional headers beside %d verified blocks", sent, stop())
	l.quiet(t, 0)
}

// TestHostileLUNs: every command of the table, to numbers without a unit in every form of address,
// and to forms that are none. Only the commands that SPC-4 table 38 lists answer, and only that
// there is no unit; no block changes.
func TestHostileLUNs(t *testing.T) {
	l := newLab(t, Options{}, nil)
	stop := l.bystander(1)
	c := l.session().ready()
	c.nc.SetDeadline(time.Now().Add(5 * time.Minute))
	all := c.commands()
	old := fill(0xFEED)
	for lba := range uint32(16) {
		c.must(c.command(0xA0, 512, write10(lba, 1)...), old, nil)
	}
	zeros := make([]byte, 1<<20)
	answers := 0
	for _, lun := range []uint64{
		0x0001 << 48, 0x00FF << 48, 0x0100 << 48, 0x3F00 << 48, 0x3FFF << 48, // peripheral: other numbers, other buses
		0x4001 << 48, 0x40FF << 48, 0x4100 << 48, 0x7FFF << 48, // flat
		0x8000 << 48, 0x80FF << 48, 0xBFFF << 48, // logical unit: a bus and a target
		0xC101 << 48, 0xC102 << 48, 0xC103 << 48, 0xC000 << 48, // well known
		0xD2000001_00000000, 0xD2FFFFFF_00000000, 0xD2000000_00000001, 0xD1000000_00000000, // extended flat
		0xE2000000_00000000, 0xE2000000_00000001, 0xF0000000_00000000, 0xFF000000_00000000, 0xFFFFFFFF_FFFFFFFF, // longer ones; none
		0x0000_0001_0000_0000, 0x0000_0000_0000_0001, 0x0000_4000_0000_0000, 0x4000_0001_0000_0000, // more levels
		0x0100_0000_0000_0000, 1,
	} {
		for _, k := range all {
			for _, flags := range []byte{0x80, 0xC0, 0xA0} {
				what := fmt.Sprintf("LUN %016X, %v, flags %02X", lun, k, flags)
				h := c.command(flags, 4096, k.cdb(func(i int) byte { return [4]byte{0, 0, 0, 8}[i%4] })...)
				h.put64(8, lun)
				r, err := c.do(h, nil, zeros)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				answers++
				switch {
				case k.code == 0x12 && r.status == 0: // INQUIRY: no device here
					if len(r.data) > 0 && r.data[0] != 0x7F {
						t.Errorf("%s: a device of type %02X", what, r.data[0])
					}
				case k.code == 0x03 && r.status == 0: // REQUEST SENSE
					if len(r.data) > 13 && (r.data[2]&0xF != 5 || r.data[12] != 0x25) {
						t.Errorf("%s: sense % X", what, r.data)
					}
				case k.code == 0xA0: // REPORT LUNS: the same everywhere
				case r.status != scsi.StatusCheckCondition || r.key != 5:
					t.Errorf("%s: status %02X, sense %X/%04X", what, r.status, r.key, r.asc)
				case k.code != 0x12 && k.code != 0x03 && r.asc != 0x2500:
					t.Errorf("%s: sense %X/%04X", what, r.key, r.asc)
				}
			}
		}
		for _, f := range []byte{tmfAbortTask, tmfAbortTaskSet, tmfClearTaskSet, tmfResetUnit} {
			m := new(header)
			m[0], m[1] = opTaskReq|0x40, 0x80|f
			m.put64(8, lun)
			m.put32(16, 1<<20)
			m.put32(24, c.cmdSN)
			if err := c.send(m, nil); err != nil {
				t.Fatal(err)
			}
			if p, err := c.recv(); err != nil || p.h.opcode() != opTaskResp || p.h[2] != tmrNoLUN {
				t.Errorf("LUN %016X, task management %d: %v %v", lun, f, p, err)
			}
		}
	}
	for _, lun := range []uint64{0, 0x4000 << 48, 0xD2000000_00000000} { // the unit, in each form that may name it
		h := c.command(0xC0, 16*512, read10(0, 16)...)
		h.put64(8, lun)
		r, err := c.do(h, nil, nil)
		if err != nil || r.status != 0 {
			t.Fatalf("LUN %016X: %v %v", lun, r, err)
		}
		for i := range 16 {
			if string(r.data[i*512:][:512]) != string(old) {
				t.Fatalf("block %d was changed", i)
			}
		}
	}
	c.nc.Close()
	t.Logf("%d answers beside %d verified blocks", answers, stop())
	l.quiet(t, 0)
}
