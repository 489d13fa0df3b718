package scsi

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// TestTokenFields: what the lists may hold, and what no token is.
func TestTokenFields(t *testing.T) {
	dev := memory8(t, "a")
	tgt, _ := pair(t, dev)
	n := connectAll(tgt, "a")
	last := dev.Info().Blocks
	at := func(lba, blocks uint64) target.Range { return target.Range{LBA: lba, Blocks: blocks} }
	for _, x := range []struct {
		name string
		list []byte
		code asc
	}{
		{"no descriptors", populateList(0, 0), ascInvalidFieldParameter},
		{"length", append([]byte{0, 10}, populateList(0, 0, at(0, 1))[2:]...), ascInvalidFieldParameter},
		{"beyond the unit", populateList(0, 0, at(last, 1)), ascRange},
		{"ranges that overlap", populateList(0, 0, at(8, 8), at(0, 9)), ascInvalidFieldParameter},
		{"time-out", populateList(maxTokenTimeout+1, 0, at(0, 1)), ascInvalidFieldParameter},
		{"type", populateList(0, 0x00010000, at(0, 1)), ascInvalidFieldParameter},
		{"the zero type", populateList(0, rodZero, at(0, 1)), ascInvalidFieldParameter},
		{"shorter than the header", make([]byte, 8), ascParameterListLength},
	} {
		if r := run(n, 0, 0, x.list, tokenCDB(0x10, 1, x.list)...); r.code != x.code || r.key != keyIllegalRequest {
			t.Errorf("POPULATE TOKEN, %s: %+v", x.name, r)
		}
	}
	for kind, want := range map[uint32]uint32{rodAny: rodVulnerable, rodDefault: rodDefault, rodVulnerable: rodVulnerable} {
		l := populateList(0, kind, at(0, 8))
		run(n, 0, 0, l, tokenCDB(0x10, 1, l)...)
		if got := binary.BigEndian.Uint32(tokenOf(t, n, 0, 1)); got != want {
			t.Errorf("a ROD type of %08X is made %08X", kind, got)
		}
	}
	token := populate(t, n, 0, 1, 0, at(0, 8))
	with := func(i int, v byte) []byte {
		b := bytes.Clone(token)
		b[i] ^= v
		return b
	}
	for _, x := range []struct {
		name string
		list []byte
		code asc
	}{
		{"type", useList(with(1, 1), 0, 0, at(100, 8)), ascTokenType},
		{"length", useList(with(7, 1), 0, 0, at(100, 8)), ascTokenLength},
		{"identifier", useList(with(8, 1), 0, 0, at(100, 8)), ascTokenUnknown},
		{"a guess", useList(with(511, 1), 0, 0, at(100, 8)), ascTokenCorrupt},
		{"offset", useList(token, 8, 0, at(100, 1)), ascInvalidFieldParameter},
		{"beyond the unit", useList(token, 0, 0, at(last-4, 8)), ascRange},
		{"onto itself", useList(token, 0, 0, at(4, 8)), ascTokenRevoked},
	} {
		if r := use(n, 0, x.list); r.code != x.code || r.key != keyIllegalRequest {
			t.Errorf("WRITE USING TOKEN, %s: %+v", x.name, r)
		}
	}
}

// TestTokensEnd: a token is forgotten when nobody used it for its time-out, use keeps it, their number is
// bounded, and REPORT ALL ROD TOKENS tells those that stand without giving them away.
func TestTokensEnd(t *testing.T) {
	now := time.Unix(1e9, 0)
	set := NewTokens(func() time.Time { return now })
	tgt := NewTarget("iqn.2026-11.io.ledge:x", Options{Tokens: set})
	if err := tgt.Attach(0, memory8(t, "a"), UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	n := connect(tgt, "a", 1)
	at := target.Range{LBA: 0, Blocks: 8}
	token := populate(t, n, 0, 1, 10, at)
	l := useList(token, 0, 0, target.Range{LBA: 100, Blocks: 8})
	reported := func() int {
		r := run(n, 0, 1<<20, nil, 0x84, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0)
		if (len(r.data)-8)%tokenPublicBytes != 0 || bytes.Contains(r.data, token[tokenRandomAt:tokenRandomAt+8]) {
			t.Error("more than management tokens is told")
		}
		return (len(r.data) - 8) / tokenPublicBytes
	}
	if reported() != 1 {
		t.Errorf("%d tokens are reported", reported())
	}
	for range 3 {
		now = now.Add(9 * time.Second)
		if r := use(n, 0, l); r.status != StatusGood {
			t.Errorf("used in time: %+v", r)
		}
	}
	now = now.Add(10 * time.Second)
	if r := use(n, 0, l); r.code != ascTokenExpired {
		t.Errorf("used too late: %+v", r)
	}
	for i := range maxUnitTokens {
		populate(t, n, 0, uint32(i), 10, at)
	}
	p := populateList(10, 0, at)
	if r := run(n, 0, 0, p, tokenCDB(0x10, 1, p)...); r.code != ascNoTokenResources {
		t.Errorf("one too many: %+v", r)
	}
	if reported() != maxUnitTokens {
		t.Errorf("%d tokens are reported", reported())
	}
	now = now.Add(10 * time.Second)
	if reported() != 0 {
		t.Errorf("%d tokens are reported when all have expired", reported())
	}
	populate(t, n, 0, 1, 10, at)
	if len(set.byID) != 1 {
		t.Errorf("%d tokens are kept", len(set.byID))
	}
}

// TestThirdPartyCopyPage walks the page: every descriptor is where its length says.
func TestThirdPartyCopyPage(t *testing.T) {
	tgt, _ := pair(t, memory8(t, "a"))
	n := connectAll(tgt, "a")
	page := run(n, 0, 1024, nil, 0x12, 1, 0x8F, 4, 0, 0).data
	if int(binary.BigEndian.Uint16(page[2:])) != len(page)-4 {
		t.Fatalf("% x", page)
	}
	found := make(map[uint16][]byte)
	for b := page[4:]; len(b) > 0; {
		size := int(binary.BigEndian.Uint16(b[2:]))
		if size%4 != 0 {
			t.Errorf("a descriptor of %d bytes", size)
		}
		found[binary.BigEndian.Uint16(b)] = b[4:][:size]
		b = b[4+size:]
	}
	for kind, size := range map[uint16]int{0x0000: 32, 0x0001: 20, 0x0004: 28, 0x0008: 4, 0x000C: 4, 0x0106: 92, 0x0108: 196, 0x8001: 32} {
		if len(found[kind]) != size {
			t.Errorf("descriptor %04X has %d bytes, want %d", kind, len(found[kind]), size)
		}
	}
	if got := found[0x0001][:17]; !bytes.Equal(got, []byte{16, 0x83, 5, 0, 1, 0x10, 0x11, 0x1C, 0x84, 7, 0, 3, 4, 5, 6, 7, 8}) {
		t.Errorf("supported commands % x", got)
	}
	l := found[0x0000]
	if binary.BigEndian.Uint16(l[6:]) != maxTokenRanges || binary.BigEndian.Uint64(l[16:]) != maxTokenBytes/512 || binary.BigEndian.Uint64(l[24:]) != optimalTransfer/512 {
		t.Errorf("block device ROD limits % x", l)
	}
}
