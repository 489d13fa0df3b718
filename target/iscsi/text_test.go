package iscsi

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestLongText sends a login in pieces, and takes an answer to SendTargets in pieces.
func TestLongText(t *testing.T) {
	l := newLab(t, Options{}, nil)
	for i := range 60 {
		d, err := mem.New(mem.Options{Bytes: 1 << 20, Name: fmt.Sprint(i)})
		if err != nil {
			t.Fatal(err)
		}
		tgt := scsi.NewTarget(fmt.Sprintf("iqn.2026-11.io.ledge:volume-%02d", i), scsi.Options{})
		if err := tgt.Attach(0, d, scsi.UnitOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := l.srv.AddTarget(tgt); err != nil {
			t.Fatal(err)
		}
	}
	c := l.dial()
	text := "InitiatorName=" + testInitiator + "\x00SessionType=Discovery\x00MaxRecvDataSegmentLength=512\x00"
	for i, part := range []string{text[:20], text[20:37], text[37:]} {
		flags := byte(0x44) // C, operational stage
		if i == 2 {
			flags = 0x87
		}
		if err := c.send(c.loginHeader(flags), []byte(part)); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil || p.h[36] != 0 || i < 2 && (len(p.data) != 0 || p.h[1]&0x80 != 0) {
			t.Fatalf("part %d: %v %v", i, p, err)
		}
	}
	var all []byte
	request, ttt := []byte("SendTargets=All\x00"), uint32(noTag)
	for n := 0; ; n++ {
		h := new(header)
		h[0], h[1] = opTextReq, 0x80
		h.put32(16, 9)
		h.put32(20, ttt)
		h.put32(24, c.cmdSN)
		c.cmdSN++
		if err := c.send(h, request); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil || p.h.opcode() != opTextResp || len(p.data) > 512 {
			t.Fatal(p, err)
		}
		all = append(all, p.data...)
		if p.h.final() {
			break
		}
		request, ttt = nil, p.h.ttt()
		if ttt == noTag || n > 100 {
			t.Fatalf("part %d has no tag to go on with", n)
		}
	}
	if n := bytes.Count(all, []byte("TargetName=")); n != 61 {
		t.Errorf("%d targets", n)
	}
}

// golden is a session as it was agreed: what the initiator sends, and what must come back.
func golden() []byte {
	c := &client{isid: 1, cmdSN: 1, itt: 1}
	in := goodLogin("HeaderDigest=None\x00MaxBurstLength=262144\x00X-unknown=1\x00")
	tur := []byte{0, 0, 0, 0, 0, 0}
	in = append(in, wire(c.command(0x80, 0, tur...), "")...) // unit attention
	in = append(in, wire(c.command(0x80, 0, tur...), "")...)
	in = append(in, wire(c.command(0xC0, 36, 0x12, 0, 0, 0, 36, 0), "")...)
	in = append(in, wire(c.command(0xC0, 255, 0x12, 1, 0x83, 0, 255, 0), "")...)
	in = append(in, wire(c.command(0xC0, 32, 0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0), "")...)
	in = append(in, wire(c.command(0xA0, 512, write10(1, 1)...), strings.Repeat("ledge-1 ", 64))...)
	in = append(in, wire(c.command(0xC0, 512, read10(1, 1)...), "")...)
	in = append(in, wire(c.command(0xC0, 512, read10(1<<31, 1)...), "")...) // out of range
	r2t := c.command(0xA0, 512, write10(2, 1)...)
	in = append(in, wire(r2t, "")...)
	data := new(header)
	data[0], data[1] = opDataOut, 0x80
	data.put32(16, r2t.itt())
	data.put32(20, 1)
	in = append(in, wire(data, strings.Repeat("ledge-2 ", 64))...)
	nop := new(header)
	nop[0], nop[1] = opNopOut|0x40, 0x80
	nop.put32(16, 70)
	nop.put32(20, noTag)
	nop.put32(24, c.cmdSN)
	in = append(in, wire(nop, "ping!")...)
	out := new(header)
	out[0], out[1] = opLogoutReq|0x40, 0x80
	out.put32(16, 71)
	out.put32(24, c.cmdSN)
	return append(in, wire(out, "")...)
}

// TestGolden holds every PDU that the target sends to the bytes in testdata.
func TestGolden(t *testing.T) {
	l := newLab(t, Options{}, nil)
	rec := &recorder{canned: canned{Reader: bytes.NewReader(golden())}}
	newConn(l.srv, rec).serve()
	got := dump(rec.out.Bytes())
	path := filepath.Join("testdata", "session.golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the target sends\n%s\nand not\n%s", got, want)
	}
}

type recorder struct {
	canned
	out bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) { return r.out.Write(p) }

// dump writes each PDU as its header and its data, in hexadecimal.
func dump(b []byte) string {
	var s strings.Builder
	for len(b) >= headerBytes {
		h := (*header)(b)
		n := h.dataLen()
		fmt.Fprintf(&s, "opcode %02x\n%s\n", h.opcode(), strings.TrimRight(hex.Dump(b[:headerBytes]), "\n"))
		b = b[headerBytes:]
		if n > 0 {
			fmt.Fprintf(&s, "data\n%s\n", strings.TrimRight(hex.Dump(b[:n]), "\n"))
		}
		b = b[padded(n):]
	}
	return s.String()
}
