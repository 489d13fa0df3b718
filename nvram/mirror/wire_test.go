package mirror

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

var update = flag.Bool("update", false, "write the golden files")

func encodeMessage(t messageType, seq uint64, payload []byte) []byte {
	b := make([]byte, headerBytes, headerBytes+len(payload))
	covered := payload
	if t == msgFrame {
		covered = payload[:min(frameHead, len(payload))]
	}
	putHeader(b, t, seq, len(payload), covered)
	return append(b, payload...)
}

func sampleStart() nvram.Start {
	return nvram.Start{
		ID: testID, Epoch: 3, Run: 4, RunLSN: 5, Bytes: [2]uint64{6 << 12, 7 << 12}, Full: true, Resume: 8,
		Tail: [2]nvram.Position{{LSN: 9, Off: 10 << 12, Seq: 11}, {LSN: 12, Off: 13 << 12, Seq: 14}},
		Head: [2]nvram.Position{{LSN: 15, Off: 16 << 12, Seq: 17}, {LSN: 18, Off: 19 << 12, Seq: 20}},
	}
}

// TestGoldenWire: one message of each type, as version 1 writes them for ever.
func TestGoldenWire(t *testing.T) {
	h := hello{controller: 'B', role: roleStandby, epoch: 6, nonce: [32]byte{1, 31: 2}, shelf: "lab"}
	offer := nvram.MirrorState{ID: testID, Epoch: 1, Run: 2, RunLSN: 3, Bytes: [2]uint64{4, 5}, Next: 6, Complete: true}
	start := sampleStart()
	frame := append(make([]byte, frameHead), bytes.Repeat([]byte{7}, block)...)
	frame[0], frame[8] = 99, 1
	payloads := map[messageType][]byte{
		msgHello: h.encode(), msgProof: bytes.Repeat([]byte{9}, 32), msgHeartbeat: nil, msgControl: []byte("\x04luns{}"),
		msgOffer: encodeOffer(offer), msgStart: encodeStart(start), msgReady: nil, msgFrame: frame,
		msgTrim: appendPositions(nil, start.Tail), msgComplete: le.AppendUint64(nil, 5), msgAck: le.AppendUint64(nil, 6),
		msgCompleted: le.AppendUint64(nil, 7), msgRefuse: []byte("\x02stale"),
	}
	var wire []byte
	for k := msgHello; k < msgTypes; k++ {
		wire = append(wire, encodeMessage(k, uint64(k), payloads[k])...)
	}
	if *update {
		if err := os.WriteFile("testdata/wire-1", wire, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/wire-1")
	if err != nil || !bytes.Equal(want, wire) {
		t.Fatalf("the bytes that this build sends differ (%v)", err)
	}
	d := decoder{r: bytes.NewReader(want)}
	for k := msgHello; k < msgTypes; k++ {
		d.open = k > msgProof
		m, err := d.next()
		if err != nil || m.kind != k || k != msgFrame && !bytes.Equal(m.payload, payloads[k]) {
			t.Fatalf("type %d: %+v, %v", k, m, err)
		}
		if k == msgFrame && (m.lsn != 99 || m.off != 1 || !bytes.Equal(m.frame.Bytes(), frame[frameHead:])) {
			t.Fatalf("frame: %+v", m)
		}
	}
	if _, err := d.next(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if got, err := decodeHello(payloads[msgHello]); err != nil || got != h {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := decodeOffer(payloads[msgOffer]); err != nil || got != offer {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := decodeStart(payloads[msgStart]); err != nil || got != start {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range headerBytes + 49 { // a bit of the first message changed
		w := bytes.Clone(want)
		w[i] ^= 4
		d := decoder{r: bytes.NewReader(w)}
		if _, err := d.next(); !errors.Is(err, ErrProtocol) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
}

// FuzzDecoder: any stream is messages, or an error that names the protocol, or the stream's end.
func FuzzDecoder(f *testing.F) {
	f.Add(uint8(msgFrame), true, append(make([]byte, frameHead), make([]byte, 64)...), []byte{})
	f.Add(uint8(msgStart), true, encodeStart(sampleStart()), []byte("LMR1"))
	f.Add(uint8(msgHello), false, make([]byte, 52), []byte{})
	f.Add(uint8(msgControl), true, []byte("\xffx"), []byte{})
	f.Fuzz(func(t *testing.T, kind uint8, open bool, payload, rest []byte) {
		wire := append(encodeMessage(messageType(kind), 1, payload), rest...)
		d := decoder{r: bytes.NewReader(wire), open: open}
		for {
			m, err := d.next()
			if err != nil {
				if !errors.Is(err, ErrProtocol) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatal(err)
				}
				return
			}
			switch m.kind {
			case msgHello:
				_, err = decodeHello(m.payload)
			case msgControl:
				_, _, err = decodeControl(m.payload)
			case msgOffer:
				_, err = decodeOffer(m.payload)
			case msgStart:
				_, err = decodeStart(m.payload)
			}
			m.release()
			if err != nil && !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
		}
	})
}

// hostile is a partner that knows the secret and then sends nonsense.
func hostile(t *testing.T, nc net.Conn, self byte, r role, rng *rand.Rand) {
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(5 * time.Second))
	c := &conn{link: &Link{opts: options(self)}, nc: nc, self: hello{controller: self, role: r, epoch: uint64(rng.IntN(5)), shelf: "lab"}}
	c.in.r = nc
	mine := c.self.encode()
	if c.send(msgHello, mine) != nil {
		return
	}
	m, err := c.in.next()
	if err != nil {
		return
	}
	if c.send(msgProof, c.proof(self, mine, m.payload)) != nil {
		return
	}
	if _, err := c.in.next(); err != nil {
		return
	}
	for range 1 + rng.IntN(4) {
		k := messageType(1 + rng.IntN(int(msgTypes)))
		var p []byte
		if k < msgTypes {
			least, most := limits[k].least, min(limits[k].most, limits[k].least+3*block+1)
			p = make([]byte, int(least)+rng.IntN(int(most-least)+1))
		}
		switch {
		case k == msgStart && len(p) == startBytes && rng.IntN(3) > 0:
			s := sampleStart()
			s.Bytes = [2]uint64{uint64(rng.IntN(64)) * block, uint64(rng.IntN(64)) * block}
			p = encodeStart(s)
		case rng.IntN(2) == 0:
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
		}
		b := encodeMessage(k, c.sent+1, p)
		c.sent++
		if rng.IntN(4) == 0 {
			b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
		}
		if _, err := nc.Write(b); err != nil {
			return
		}
	}
	if rng.IntN(2) == 0 {
		io.Copy(io.Discard, io.LimitReader(nc, 1<<10))
	}
}

// Malformed and hostile partners, as owner and as standby: each costs a connection, the log goes on, and the real
// standby is in sync afterwards.
func TestMalformedPartner(t *testing.T) {
	p := newPair(t)
	rng := rand.New(rand.NewPCG(5, 5))
	l := p.open(nvram.Options{MirrorTimeout: 20 * time.Millisecond})
	defer l.Close()
	for i := range 60 {
		nc, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		hostile(t, nc, 'B', role(rng.IntN(int(roles))), rng)
		if i%20 == 0 {
			if _, err := l.Append(t.Context(), set(uint64(i+1), 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	m := p.mirror()
	p.b.Receive(m, 0)
	until(t, "in sync", inSync(l))
	p.b.StopReceiving()
	if got := names(t, m); len(got) != 3 {
		t.Fatal(got)
	}
}

func TestMalformedOwner(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := options('A')
	o.Listener = ln
	b := start(t, o)
	p := newPair(t)
	m := p.mirror()
	b.Receive(m, 0)
	rng := rand.New(rand.NewPCG(6, 6))
	for range 60 {
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		hostile(t, nc, 'B', roleOwner, rng)
	}
	b.StopReceiving()
	if m.Complete(testID, 3) {
		t.Fatal("nonsense made a mirror complete")
	}
}
