package iscsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// tryLogin goes through a login, from the stage that flags name on, and returns the status that ends it.
func (c *client) tryLogin(flags byte, keys ...string) (uint16, error) {
	for range 5 {
		p, err := c.loginStep(flags, keys...)
		if err != nil {
			return 0, err
		}
		status := binary.BigEndian.Uint16(p.h[36:])
		if status != 0 || p.h[1]&0x83 == 0x83 {
			return status, nil
		}
		keys = nil
		if flags = 0x83; p.h[1]&0x81 == 0x81 || p.h[1]&0x0C == 0x04 {
			flags = 0x87
		}
	}
	return 0, errors.New("the login does not end")
}

// TestHostileTSIH: a login that names a session, of nobody, of another initiator, of its own, in
// every stage, before any authentication (one such PDU ends gotgt's process). It is refused, and
// neither the session it names nor any other notices.
func TestHostileTSIH(t *testing.T) {
	const other = "iqn.2026-11.test:other"
	for _, locked := range []bool{false, true} {
		var ask atomic.Bool
		l := newLab(t, Options{Auth: func(_, target string) *CHAP {
			if ask.Load() && target == testTarget {
				return &CHAP{User: "u", Secret: "s"}
			}
			return nil
		}}, nil)
		stop := l.bystander(1)
		victim := l.session().ready() // ISID 1 of testInitiator
		ask.Store(locked)
		for _, x := range []struct {
			name, initiator string
			tsih            uint16
			isid            byte
		}{
			{"of nobody", testInitiator, 0x7777, 1},
			{"the highest", testInitiator, 0xFFFF, 1},
			{"of another initiator", other, victim.tsih, 1},
			{"of another ISID", testInitiator, victim.tsih, 2},
			{"of its own", testInitiator, victim.tsih, 1},
		} {
			for _, flags := range []byte{0x00, 0x81, 0x83, 0x04, 0x87, 0x40, 0x44} {
				for _, cid := range []uint16{0, 1} {
					if x.tsih == victim.tsih && x.isid == 1 && x.initiator == testInitiator && cid == 0 && !locked {
						continue // its own connection, which it may begin anew (RFC 7143 6.3.4)
					}
					c := l.dial()
					c.tsih, c.isid = x.tsih, x.isid
					h := c.loginHeader(flags)
					binary.BigEndian.PutUint16(h[20:], cid)
					text := "InitiatorName=" + x.initiator + "\x00TargetName=" + testTarget + "\x00"
					if flags&0x0C == 0 {
						text += "AuthMethod=None,CHAP\x00"
					}
					if err := c.send(h, []byte(text)); err != nil {
						t.Fatal(err)
					}
					p, err := c.recv()
					for n := 0; err == nil && p.h[36] == 0 && n < 5; n++ {
						if p.h[1]&0x83 == 0x83 {
							t.Fatalf("%s, flags %02X: let in", x.name, flags)
						}
						next := c.loginHeader(0x83)
						if p.h[1]&0x81 == 0x81 || p.h[1]&0x0C == 0x04 {
							next[1] = 0x87
						}
						binary.BigEndian.PutUint16(next[20:], cid)
						if c.send(next, nil) != nil {
							break
						}
						p, err = c.recv()
					}
					if err == nil && p.h[36] == 0 && locked {
						c.nc.Close() // it would go on for as long as it does not prove itself
						continue
					}
					if err == nil && p.h[36] != 2 {
						t.Errorf("%s, flags %02X: status %02X%02X", x.name, flags, p.h[36], p.h[37])
					}
					if err := c.ended(); err != nil {
						t.Errorf("%s, flags %02X: %v", x.name, flags, err)
					}
				}
			}
		}
		// One that changes while the login goes on.
		for _, flags := range []byte{0x00, 0x04} {
			c := l.dial()
			c.isid = 9
			p, err := c.loginStep(flags, "InitiatorName="+testInitiator, "TargetName="+testTarget)
			if locked && flags != 0 {
				continue
			}
			if err != nil || p.h[36] != 0 {
				t.Fatal(p, err)
			}
			c.tsih = victim.tsih
			if status, err := c.tryLogin(flags | 0x83); err != nil || status != 0x0200 {
				t.Errorf("a TSIH that changes: status %04X, %v", status, err)
			}
		}
		if err := victim.ping(); err != nil {
			t.Errorf("the session that was named: %v", err)
		}
		victim.ready()
		stop()
		l.quiet(t, 1)
	}
}

// TestHostileNegotiation: logins and text exchanges that never come to an end, and that say too
// much. Each ends at a bound, and not with the process.
func TestHostileNegotiation(t *testing.T) {
	l := newLab(t, Options{}, nil)
	stop := l.bystander(1)
	name := []string{"InitiatorName=" + testInitiator, "TargetName=" + testTarget}
	many := func(n int) (keys []string) {
		for i := range n {
			keys = append(keys, fmt.Sprintf("X-k%d=1", i))
		}
		return keys
	}
	endless := func(flags byte, keys func(i int) []string) func(*testing.T, *client) {
		return func(t *testing.T, c *client) {
			for i := range 10000 {
				p, err := c.loginStep(flags, keys(i)...)
				if err != nil {
					if i == 0 {
						t.Error("the first request was not answered")
					}
					return
				}
				if p.h[36] != 0 {
					return
				}
			}
			t.Error("it goes on for ever")
		}
	}
	for what, f := range map[string]func(*testing.T, *client){
		"C bit, no text":            endless(0x44, func(int) []string { return nil }),
		"C bit, text":               endless(0x44, func(int) []string { return []string{"X-a=" + strings.Repeat("b", 1000)} }),
		"C bit in security":         endless(0x40, func(int) []string { return []string{"X-a=b"} }),
		"no transit":                endless(0x04, func(i int) []string { return append(name, fmt.Sprintf("X-%d=1", i))[min(i, 1)*2:] }),
		"no transit, security":      endless(0x00, func(i int) []string { return append(name, "X-a=1")[min(i, 1)*2:] }),
		"new keys for ever":         endless(0x04, func(i int) []string { return append(name, many(60)...)[min(i, 1)*2:] }),
		"65 keys":                   endless(0x87, func(int) []string { return append(many(63), name...) }),
		"a key of 64 bytes":         endless(0x87, func(int) []string { return append([]string{strings.Repeat("k", 64) + "=1"}, name...) }),
		"no key":                    endless(0x87, func(int) []string { return append([]string{"=1"}, name...) }),
		"a thousand CHAP responses": endless(0x00, func(i int) []string { return append(name, "CHAP_R=0x00")[min(i, 1)*2:] }),
	} {
		t.Run(what, func(t *testing.T) {
			c := l.dial()
			f(t, c)
			if err := c.ended(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("more than 8 KiB at once", func(t *testing.T) {
		c := l.dial()
		if _, err := c.loginStep(0x87, append([]string{"X-a=" + strings.Repeat("v", 8192)}, name...)...); err == nil {
			t.Error("it was answered")
		}
	})
	t.Run("text", func(t *testing.T) {
		c := l.session()
		before, _ := l.footprint()
		request := func(flags byte, ttt uint32, text string) *pdu {
			t.Helper()
			h := new(header)
			h[0], h[1] = opTextReq|0x40, flags
			h.put32(16, 5)
			h.put32(20, ttt)
			h.put32(24, c.cmdSN)
			if err := c.send(h, []byte(text)); err != nil {
				t.Fatal(err)
			}
			p, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		rejected := 0
		ttt := uint32(noTag)
		for range 2000 { // C bit for ever
			p := request(0x40, ttt, "X-a="+strings.Repeat("b", 996))
			if ttt = p.h.ttt(); p.h.opcode() == opReject {
				rejected++
				ttt = noTag
			}
		}
		if rejected < 100 {
			t.Errorf("%d rejects of endless text", rejected)
		}
		ttt = noTag
		for range 2000 { // neither side ever ends
			p := request(0x00, ttt, "")
			if p.h.opcode() != opTextResp || len(p.data) != 0 {
				t.Fatalf("opcode %#x, %q", p.h.opcode(), p.data)
			}
			ttt = p.h.ttt()
		}
		for _, text := range []string{strings.Repeat("a", 256<<10), strings.Join(many(65), "\x00"), strings.Repeat("=\x00", 100), "SendTargets=" + strings.Repeat("x", 8192)} {
			request(0x80, noTag, text)
		}
		if p := request(0x80, 0xABCD, ""); p.h.opcode() != opReject {
			t.Errorf("opcode %#x answers a tag of no exchange", p.h.opcode())
		}
		if after, _ := l.footprint(); after > before+2<<20 {
			t.Errorf("%d kB held by text", (after-before)>>10)
		}
		c.ready()
		c.nc.Close()
	})
	stop()
	l.quiet(t, 0)
}

// TestHostileFlood: strangers who connect and say nothing, or a byte at a time, on more connections
// than there may be. Whoever has a session keeps it, and whoever wants one gets it.
func TestHostileFlood(t *testing.T) {
	const most = 40
	l := newLab(t, Options{MaxSessions: 30, MaxConnections: most, LoginTimeout: time.Hour}, nil)
	stop := l.bystander(2)
	var (
		wg   sync.WaitGroup
		over = make(chan struct{})
		text = goodLogin("")
	)
	for w := range most + 20 {
		wg.Add(1)
		go func() { // a slow one, that comes again when it is dropped
			defer wg.Done()
			for {
				nc, err := net.Dial("tcp", l.addr)
				if err != nil {
					t.Error(err)
					return
				}
				for i := 0; i < len(text)-1; i++ {
					if _, err = nc.Write(text[i : i+1]); err != nil {
						break
					}
					select {
					case <-over:
						nc.Close()
						return
					case <-time.After(time.Duration(5+w%7) * time.Millisecond):
					}
				}
				nc.Close()
			}
		}()
	}
	ended := sync.OnceFunc(func() {
		close(over)
		wg.Wait()
	})
	defer ended()
	eventually(t, "all connections are taken", func() bool { return l.srv.Stats().RefusedConnections > 100 })
	// One that takes longer than a whole turn of the flood may itself have to make room; it comes
	// again, as initiators do.
	tries := 0
	for i := range 50 {
		for {
			if tries++; tries > 200 {
				t.Fatalf("%d tries for %d logins", tries, i)
			}
			c := l.dial()
			c.isid = byte(i)
			p, err := c.loginStep(0x87, "InitiatorName="+testInitiator, "TargetName="+testTarget)
			if err != nil {
				c.nc.Close()
				continue
			}
			if p.h[36] != 0 {
				t.Fatalf("login %d in the flood: status %02X%02X", i, p.h[36], p.h[37])
			}
			c.ready()
			c.nc.Close()
			break
		}
	}
	if n := l.srv.Stats().Connections; n > most+maxLeaving {
		t.Errorf("%d connections", n)
	}
	blocks := stop()
	ended()
	l.quiet(t, 0)
	t.Logf("%d blocks, 50 logins in %d tries beside %d connections refused", blocks, tries, l.srv.Stats().RefusedConnections)
}

// TestHostileSlowLogin: a login has a time, however regularly its bytes come.
func TestHostileSlowLogin(t *testing.T) {
	l := newLab(t, Options{LoginTimeout: 2 * time.Second}, nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c := l.dial()
			for _, b := range goodLogin("") {
				if _, err := c.nc.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
			t.Error("a login of many seconds was taken")
		}()
	}
	for range 20 {
		l.alive()
	}
	wg.Wait()
	l.quiet(t, 0)
}
