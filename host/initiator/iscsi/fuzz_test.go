package iscsi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// loginAnswers are the two responses of the shortest login, and the header of what follows.
func loginAnswers(op string) []byte {
	var h Header
	h[0], h[1] = OpLoginResponse, flagFinal|stageOperational
	h[15] = 1
	h.SetWord(28, 1)
	h.SetWord(32, 40)
	b := AppendPDU(nil, &h, []byte("AuthMethod=None\x00TargetPortalGroupTag=2\x00"))
	h[1] = stageOperational<<2 | flagFinal | stageFullFeature
	h.SetWord(24, 1)
	return AppendPDU(b, &h, []byte(op))
}

// script is a connection whose other side says what it was given, and takes everything.
func script(said []byte) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		us, them := net.Pipe()
		go io.Copy(io.Discard, them)
		go func() {
			them.Write(said)
			them.Close()
		}()
		return us, nil
	}
}

// A target that says anything at all, in the login and after it: the session ends with an error, nobody
// hangs, nothing panics, and no buffer is touched after Do returned.
func FuzzSession(f *testing.F) {
	answers := loginAnswers("InitialR2T=Yes\x00ImmediateData=Yes\x00")
	var in, r2t, resp, nop, async Header
	in[0], in[1] = OpDataIn, flagFinal|flagStatus
	in.SetWord(24, 2)
	in.SetWord(16, 1<<16)
	in.SetWord(20, reservedTag)
	r2t[0], r2t[1] = OpR2T, flagFinal
	r2t.SetWord(16, 2<<16|1)
	r2t.SetWord(44, 4096)
	resp[0], resp[1], resp[3] = OpResponse, flagFinal, StatusCheckCondition
	resp.SetWord(24, 2)
	resp.SetWord(16, 1<<16)
	nop[0], nop[1] = OpNopIn, flagFinal
	nop.SetWord(16, reservedTag)
	async[0], async[1], async[36] = OpAsync, flagFinal, 1
	async.SetWord(24, 2)
	for _, pdu := range [][]byte{AppendPDU(nil, &in, make([]byte, 4096)), AppendPDU(nil, &r2t, nil), AppendPDU(nil, &resp, []byte{0, 4, 0x72, 5, 0x21, 0}), AppendPDU(nil, &nop, nil), AppendPDU(nil, &async, nil)} {
		f.Add(append(bytes.Clone(answers), pdu...))
	}
	f.Add(loginAnswers("MaxRecvDataSegmentLength=1\x00"))
	f.Add(loginAnswers("HeaderDigest=CRC32C\x00"))
	f.Add(answers[:100])
	f.Fuzz(func(t *testing.T, said []byte) {
		cfg := Config{Portal: "p:1", Target: "iqn.t:x", InitiatorName: "iqn.t:y", Dial: script(said), QueueDepth: 4,
			PingInterval: time.Minute, LoginTimeout: 5 * time.Second}
		s, err := Dial(context.Background(), cfg)
		if err != nil {
			return
		}
		c := Command{In: make([]byte, 4096)}
		done := make(chan struct{})
		go func() {
			w := Command{Out: make([]byte, 20000)}
			s.Do(context.Background(), &w)
			close(done)
		}()
		if err := s.Do(context.Background(), &c); err == nil && c.Status == StatusGood && c.Transferred < len(c.In) && c.Transferred > len(c.In) {
			t.Fatal("good without data")
		} else if err != nil && !errors.Is(err, ErrSessionLost) {
			t.Fatal(err)
		}
		<-done
		<-s.Dead() // what was said ends, and so does the session
	})
}

// The login's requests are a format too: byte for byte what they were when tgtd took them.
func TestGoldenLogin(t *testing.T) {
	var asked bytes.Buffer
	done := make(chan struct{})
	cfg := Config{Portal: "p:1", Target: "iqn.2026-11.test:disk", InitiatorName: "iqn.2026-11.test:host", ISID: [6]byte{0x80, 1, 2, 3, 4, 5}, HeaderDigest: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		us, them := net.Pipe()
		go func() {
			defer close(done)
			r := bufio.NewReader(io.TeeReader(them, &asked))
			answers := loginAnswers("")
			first := HeaderBytes + (40+3)&^3
			for _, a := range [][]byte{answers[:first], answers[first:]} {
				var h Header
				if _, err := ReadPDU(r, &h, 1<<16); err != nil {
					t.Error(err)
				}
				them.Write(a)
			}
			them.Close()
		}()
		return us, nil
	}}
	s, err := Dial(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	<-done
	<-s.Dead()
	const golden = "testdata/login.bin"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		os.WriteFile(golden, asked.Bytes(), 0o644)
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(asked.Bytes(), want) {
		t.Fatalf("login requests changed:\n%q\n%q", asked.Bytes(), want)
	}
	if s.PortalGroup() != 2 {
		t.Fatalf("portal group %d", s.PortalGroup())
	}
}

// What breaks the rules after a good login ends the session with ErrProtocol.
func TestBrokenTargets(t *testing.T) {
	pdu := func(data int, set ...uint32) []byte {
		var h Header
		h[0], h[1] = byte(set[0]), byte(set[1])
		for i := 2; i+1 < len(set); i += 2 {
			h.SetWord(int(set[i]), set[i+1])
		}
		return AppendPDU(nil, &h, make([]byte, data))
	}
	const tag = 1 << 16 // of the first command
	for name, said := range map[string][]byte{
		"data for nothing":         pdu(8, OpDataIn, 0x80, 16, 99),
		"more data than asked for": pdu(8192, OpDataIn, 0x80, 16, tag),
		"data at another place":    pdu(512, OpDataIn, 0x80, 16, tag, 40, 512),
		"data out of turn":         pdu(512, OpDataIn, 0x80, 16, tag, 36, 1),
		"good with half the data":  pdu(2048, OpDataIn, 0x81, 16, tag, 24, 2),
		"good without data":        pdu(0, OpResponse, 0x80, 16, tag, 24, 2),
		"a wrong residual":         pdu(2048, OpDataIn, 0x83, 16, tag, 24, 2, 44, 1),
		"a lost status":            pdu(0, OpResponse, 0x80, 16, tag, 24, 3),
		"response to nothing":      pdu(0, OpResponse, 0x80, 16, tag+1, 24, 2),
		"R2T for a read":           pdu(0, OpR2T, 0x80, 16, tag, 20, 1, 44, 512),
		"NOP-In to nothing":        pdu(0, OpNopIn, 0x80, 16, 5, 24, 2),
		"too long a segment":       pdu(maxRecvBytes+4, OpDataIn, 0x80, 16, tag),
		"a request":                pdu(0, OpCommand, 0x80, 24, 2),
		"a rejection":              pdu(48, OpReject, 0x80, 24, 2),
		"task response to nothing": pdu(0, OpTaskResponse, 0x80, 16, tag, 24, 2),
	} {
		s, err := Dial(context.Background(), Config{Portal: "p:1", Target: "iqn.t:x", InitiatorName: "iqn.t:y", QueueDepth: 4, PingInterval: time.Minute, Dial: func(context.Context, string, string) (net.Conn, error) {
			us, them := net.Pipe()
			go func() {
				defer them.Close()
				r := bufio.NewReader(them)
				answers := loginAnswers("InitialR2T=Yes\x00")
				first := HeaderBytes + (40+3)&^3
				var h Header
				for _, a := range [][]byte{answers[:first], answers[first:], said} {
					if _, err := ReadPDU(r, &h, 1<<16); err != nil {
						return
					}
					them.Write(a)
				}
				io.Copy(io.Discard, r)
			}()
			return us, nil
		}})
		if err != nil {
			t.Fatal(name, err)
		}
		c := Command{In: make([]byte, 4096)}
		if err := s.Do(context.Background(), &c); !errors.Is(err, ErrSessionLost) || !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
		<-s.Dead()
	}
}

func FuzzText(f *testing.F) {
	f.Add([]byte("AuthMethod=None\x00A=B\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeText(b)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		p := newParams()
		p.apply(&Config{}, m, map[string]bool{})
		if p.maxSend < 512 || p.maxSend > 1<<20 || p.maxBurst > maxBurstBytes || p.firstBurst > firstBurstBytes {
			t.Fatalf("%+v from %q", p, b)
		}
		c := chapState{c: &CHAP{User: "u", Secret: "s", TargetSecret: "t"}}
		c.answer(m)
		c.verify(m)
	})
}
