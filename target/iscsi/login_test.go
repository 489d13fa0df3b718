package iscsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// TestLogin holds the login to its answers, good and bad.
func TestLogin(t *testing.T) {
	l := newLab(t, Options{}, nil)
	for _, x := range []struct {
		name   string
		change func(h *header, text *string)
		status uint16
	}{
		{"good", func(*header, *string) {}, 0},
		{"unknown key", func(_ *header, s *string) { *s += "X-com.example.key=1\x00" }, 0},
		{"no initiator", func(_ *header, s *string) { *s = "TargetName=" + testTarget + "\x00" }, 0x0207},
		{"no target", func(_ *header, s *string) { *s = "InitiatorName=" + testInitiator + "\x00" }, 0x0207},
		{"unknown target", func(_ *header, s *string) { *s = strings.Replace(*s, ":test", ":nothing", 1) }, 0x0203},
		{"not a name", func(_ *header, s *string) { *s = strings.Replace(*s, testInitiator, "../../etc", 1) }, 0x0200},
		{"session type", func(_ *header, s *string) { *s += "SessionType=Strange\x00" }, 0x0209},
		{"version", func(h *header, _ *string) { h[3] = 9 }, 0x0205},
		{"tsih of nobody", func(h *header, _ *string) { h[15] = 77 }, 0x020A},
		{"stage 2", func(h *header, _ *string) { h[1] = 0x8B }, 0x0200},
		{"backwards", func(h *header, _ *string) { h[1] = 0x84 }, 0x0200},
		{"no equals sign", func(_ *header, s *string) { *s += "rubbish\x00" }, 0x0200},
		{"a key twice", func(_ *header, s *string) { *s += "MaxBurstLength=512\x00MaxBurstLength=512\x00" }, 0x0200},
		{"CHAP in the wrong stage", func(_ *header, s *string) { *s += "CHAP_A=5\x00" }, 0x0200},
	} {
		c := l.dial()
		h := c.loginHeader(0x87)
		text := "InitiatorName=" + testInitiator + "\x00TargetName=" + testTarget + "\x00"
		x.change(h, &text)
		if err := c.send(h, []byte(text)); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil {
			t.Errorf("%s: %v", x.name, err)
			continue
		}
		if s := binary.BigEndian.Uint16(p.h[36:]); s != x.status {
			t.Errorf("%s: status %04X, want %04X", x.name, s, x.status)
		}
	}
	l.alive()
}

// TestLoginNotReady: a target whose units are not known yet refuses sessions with "service unavailable", and shows that it exists.
func TestLoginNotReady(t *testing.T) {
	var ready atomic.Bool
	l := newLab(t, Options{Ready: func(name string) error {
		if name != testTarget {
			t.Errorf("asked of %q", name)
		}
		if !ready.Load() {
			return errors.New("starting")
		}
		return nil
	}}, nil)
	session := []string{"InitiatorName=" + testInitiator, "TargetName=" + testTarget}
	if s := l.dial().login(session...); s != 0x0301 {
		t.Errorf("a session: status %04X", s)
	}
	if s := l.dial().login("InitiatorName="+testInitiator, "SessionType=Discovery"); s != 0 {
		t.Errorf("discovery: status %04X", s)
	}
	ready.Store(true)
	if s := l.dial().login(session...); s != 0 {
		t.Errorf("a session, ready: status %04X", s)
	}
	l.alive()
}

func TestNegotiate(t *testing.T) {
	for _, x := range []struct{ key, value, want string }{
		{"HeaderDigest", "CRC32C,None", "CRC32C"},
		{"HeaderDigest", "None", "None"},
		{"HeaderDigest", "MD5", "Reject"},
		{"InitialR2T", "No", "No"},
		{"InitialR2T", "Yes", "Yes"},
		{"InitialR2T", "Perhaps", "Reject"},
		{"ImmediateData", "No", "No"},
		{"MaxBurstLength", "16776192", "1048576"},
		{"MaxBurstLength", "0x10000", "65536"},
		{"MaxBurstLength", "100", "Reject"},
		{"MaxBurstLength", "-1", "Reject"},
		{"MaxBurstLength", "99999999999999999999", "Reject"},
		{"FirstBurstLength", "65536", "65536"},
		{"MaxOutstandingR2T", "0", "Reject"},
		{"MaxConnections", "8", "8"},
		{"ErrorRecoveryLevel", "2", "0"},
		{"DefaultTime2Wait", "0", "2"},
		{"DataPDUInOrder", "No", "Yes"},
		{"OFMarker", "Yes", "No"},
		{"MaxRecvDataSegmentLength", "262144", ""},
		{"MaxRecvDataSegmentLength", "1", "Reject"},
		{"Nonsense", "", "NotUnderstood"},
	} {
		p := defaultParams()
		if got := p.negotiate(x.key, x.value); got != x.want {
			t.Errorf("%s=%s: %q, want %q", x.key, x.value, got, x.want)
		}
	}
}

func TestDiscovery(t *testing.T) {
	l := newLab(t, Options{Portals: func(string) []string { return []string{"10.0.0.1:3260", "10.0.0.2:3260,2"} }}, nil)
	hidden := scsi.NewTarget("iqn.2026-11.io.ledge:hidden", scsi.Options{})
	d, _ := mem.New(mem.Options{Bytes: 1 << 20, Name: "hidden"})
	if err := hidden.Attach(0, d, scsi.UnitOptions{Initiators: []string{"iqn.2026-11.test:other"}}); err != nil {
		t.Fatal(err)
	}
	if err := l.srv.AddTarget(hidden); err != nil {
		t.Fatal(err)
	}
	c := l.dial()
	h := c.loginHeader(0x87)
	if err := c.send(h, []byte("InitiatorName="+testInitiator+"\x00SessionType=Discovery\x00")); err != nil {
		t.Fatal(err)
	}
	if p, err := c.recv(); err != nil || p.h[36] != 0 {
		t.Fatal(p, err)
	}
	r := new(header)
	r[0], r[1] = opTextReq, 0x80
	r.put32(16, 5)
	r.put32(20, noTag)
	r.put32(24, c.cmdSN)
	if err := c.send(r, []byte("SendTargets=All\x00")); err != nil {
		t.Fatal(err)
	}
	p, err := c.recv()
	if err != nil {
		t.Fatal(err)
	}
	want := "TargetName=" + testTarget + "\x00TargetAddress=10.0.0.1:3260,1\x00TargetAddress=10.0.0.2:3260,2\x00"
	if string(p.data) != want {
		t.Errorf("answer %q, want %q", p.data, want)
	}
}

// TestCHAP proves that only the right secret opens the door, and that the target proves its own.
func TestCHAP(t *testing.T) {
	secret := &CHAP{User: "host", Secret: "correct horse", MutualUser: "shelf", MutualSecret: "battery staple"}
	l := newLab(t, Options{Auth: func(string, string) *CHAP { return secret }}, nil)
	for _, x := range []struct {
		user, secret string
		algorithm    int
		mutual       bool
		status       uint16
	}{
		{"host", "correct horse", chapSHA256, false, 0},
		{"host", "correct horse", chapMD5, true, 0},
		{"host", "wrong", chapMD5, false, 0x0201},
		{"nobody", "correct horse", chapMD5, false, 0x0201},
	} {
		c := l.dial()
		exchange := func(flags byte, text string) (map[string]string, uint16) {
			t.Helper()
			if err := c.send(c.loginHeader(flags), []byte(text)); err != nil {
				t.Fatal(err)
			}
			p, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			m := make(map[string]string)
			pairs, _ := parseText(p.data)
			for _, kv := range pairs {
				m[kv.key] = kv.value
			}
			return m, binary.BigEndian.Uint16(p.h[36:])
		}
		exchange(0, "InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00AuthMethod=CHAP,None\x00")
		m, _ := exchange(0, fmt.Sprintf("CHAP_A=%d\x00", x.algorithm))
		challenge, ok := parseBinary(m["CHAP_C"])
		id, _ := parseNumber(m["CHAP_I"])
		if !ok || len(challenge) == 0 {
			t.Fatalf("no challenge in %v", m)
		}
		answer := fmt.Sprintf("CHAP_N=%s\x00CHAP_R=0x%x\x00", x.user, chapResponse(x.algorithm, byte(id), x.secret, challenge))
		if x.mutual {
			answer += "CHAP_I=9\x00CHAP_C=0x00112233445566778899\x00"
		}
		m, status := exchange(0x83, answer)
		if status != x.status {
			t.Errorf("%s/%s: status %04X, want %04X", x.user, x.secret, status, x.status)
		}
		if x.mutual {
			mine, _ := parseBinary("0x00112233445566778899")
			if got, _ := parseBinary(m["CHAP_R"]); m["CHAP_N"] != "shelf" || !bytes.Equal(got, chapResponse(x.algorithm, 9, "battery staple", mine)) {
				t.Errorf("the target did not prove itself: %v", m)
			}
		}
	}
	c := l.dial()
	if status := c.login(); status != 0x0201 {
		t.Errorf("login without authentication: status %04X", status)
	}
}

// TestReinstatement logs in again while a write of the first session is held: the new session
// begins when the write has ended, and the old one is gone.
func TestReinstatement(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{}, dev)
	old := l.session().ready()
	if err := old.send(old.command(0xA0, 512, write10(0, 1)...), make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
	c := l.session()
	if dev.in.Load() != 0 {
		t.Error("the old session's write runs in the new session")
	}
	c.ready()
	if _, err := old.recv(); err == nil {
		t.Error("the old session was answered")
	}
	if n := l.srv.Stats().Sessions; n != 1 {
		t.Errorf("%d sessions", n)
	}
}

// TestLoginsRacingIO: logins of the same and of other names, during I/O, with memory that stays flat.
func TestLoginsRacingIO(t *testing.T) {
	n := 3000
	if testing.Short() {
		n = 300
	}
	l := newLab(t, Options{}, nil)
	stop := make(chan struct{})
	var io sync.WaitGroup
	io.Add(1)
	go func() {
		defer io.Done()
		c := l.dial()
		c.nc.SetDeadline(time.Now().Add(5 * time.Minute))
		c.isid = 50
		if c.login() != 0 {
			t.Error("login of the I/O session")
			return
		}
		c.ready()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if r, err := c.do(c.command(0xC0, 4096, read10(8, 8)...), nil, nil); err != nil || r.status != 0 {
				t.Errorf("I/O: %v %v", r, err)
				return
			}
		}
	}()
	var before runtime.MemStats
	var logins sync.WaitGroup
	for w := range 4 {
		logins.Add(1)
		go func() {
			defer logins.Done()
			for i := range n / 4 {
				c := l.dial()
				c.isid = byte(w/2 + 1) // two workers share each name and reinstate each other
				if err := c.send(c.loginHeader(0x87), []byte("InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00")); err == nil {
					c.recv()
				}
				c.nc.Close()
				if w == 0 && i == n/8 {
					runtime.GC()
					runtime.ReadMemStats(&before)
				}
			}
		}()
	}
	logins.Wait()
	close(stop)
	io.Wait()
	eventually(t, "no session is left", func() bool { return l.srv.Stats().Sessions <= 1 })
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	if after.HeapAlloc > before.HeapAlloc+8<<20 {
		t.Errorf("heap %d kB at half, %d kB at the end", before.HeapAlloc>>10, after.HeapAlloc>>10)
	}
	l.alive()
}

// TestManyLogins: the 16 bits of a TSIH go round, past those in use.
func TestManyLogins(t *testing.T) {
	l := newLab(t, Options{}, nil)
	kept := l.dial()
	kept.isid = 200
	if kept.login() != 0 {
		t.Fatal("login")
	}
	l.srv.mu.Lock()
	l.srv.lastTSIH = 65533
	l.srv.mu.Unlock()
	for range 5 {
		c := l.session()
		if c.tsih == 0 || c.tsih == kept.tsih {
			t.Errorf("TSIH %d", c.tsih)
		}
	}
	kept.ready()
}
