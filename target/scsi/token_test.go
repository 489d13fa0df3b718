package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

func ranges(list []byte, r ...target.Range) []byte {
	binary.BigEndian.PutUint16(list[len(list)-2:], uint16(16*len(r)))
	for _, x := range r {
		d := make([]byte, 16)
		binary.BigEndian.PutUint64(d, x.LBA)
		binary.BigEndian.PutUint32(d[8:], uint32(x.Blocks))
		list = append(list, d...)
	}
	binary.BigEndian.PutUint16(list, uint16(len(list)-2))
	return list
}

func populateList(seconds uint32, kind uint32, r ...target.Range) []byte {
	b := make([]byte, populateHeaderBytes)
	binary.BigEndian.PutUint32(b[4:], seconds)
	if kind != 0 {
		b[2] = 2
		binary.BigEndian.PutUint32(b[8:], kind)
	}
	return ranges(b, r...)
}

func useList(token []byte, offset uint64, flags byte, r ...target.Range) []byte {
	b := make([]byte, useHeaderBytes)
	b[2] = flags
	binary.BigEndian.PutUint64(b[8:], offset)
	copy(b[16:], token)
	return ranges(b, r...)
}

func tokenCDB(action byte, id uint32, list []byte) []byte {
	b := copyCDB(action, list)
	binary.BigEndian.PutUint32(b[6:], id)
	return b
}

func populate(t testing.TB, n *Nexus, lun uint64, id uint32, seconds uint32, r ...target.Range) []byte {
	t.Helper()
	l := populateList(seconds, 0, r...)
	if a := run(n, lun, 0, l, tokenCDB(0x10, id, l)...); a.status != StatusGood {
		t.Fatalf("POPULATE TOKEN: %+v", a)
	}
	return tokenOf(t, n, lun, id)
}

func tokenOf(t testing.TB, n *Nexus, lun uint64, id uint32) []byte {
	t.Helper()
	r := run(n, lun, 4096, nil, listCDB(0x84, 7, id)...)
	if len(r.data) != 32+4+2+512 || int(binary.BigEndian.Uint32(r.data)) != len(r.data)-4 || r.data[4] != 0x10 || r.data[5] != copyDone || binary.BigEndian.Uint32(r.data[32:]) != 514 {
		t.Fatalf("RECEIVE ROD TOKEN INFORMATION %+v", r)
	}
	return r.data[38:]
}

func use(n *Nexus, lun uint64, list []byte) answer {
	return run(n, lun, 0, list, tokenCDB(0x11, 77, list)...)
}

func rodStatus(n *Nexus, lun uint64, id uint32) []byte {
	return run(n, lun, 4096, nil, listCDB(0x84, 7, id)...).data
}

// TestTokens: what a token stands for is written on any unit, nexus and target that knows it, from any
// offset, as far as it goes.
func TestTokens(t *testing.T) {
	for name, dev := range map[string]target.Device{"by the device": memory8(t, "a"), "through memory": plainCopy{memory8(t, "a")}} {
		tgt, other := pair(t, dev)
		a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
		one, two := fill(t, dev, 10, 100, 1), fill(t, dev, 5000, 50, 2)
		all := append(bytes.Clone(one), two...)
		token := populate(t, a, 0, 1, 0, target.Range{LBA: 10, Blocks: 100}, target.Range{LBA: 5000, Blocks: 50})
		if binary.BigEndian.Uint32(token) != rodVulnerable || binary.BigEndian.Uint16(token[6:]) != 0x01F8 || binary.BigEndian.Uint64(token[56:]) != 150*512 || token[16] != 0xE4 {
			t.Errorf("%s: token % x", name, token[:128])
		}
		if r := use(b, 1, useList(token, 0, 0, target.Range{LBA: 7, Blocks: 120}, target.Range{LBA: 400, Blocks: 30})); r.status != StatusGood {
			t.Fatalf("%s: %+v", name, r)
		}
		if !bytes.Equal(content(t, other, 7, 120), all[:120*512]) || !bytes.Equal(content(t, other, 400, 30), all[120*512:]) {
			t.Errorf("%s: other data were written", name)
		}
		if s := rodStatus(b, 1, 77); s[4] != 0x11 || s[5] != copyDone || s[15] != 0xF1 || binary.BigEndian.Uint64(s[16:]) != 150 || binary.BigEndian.Uint32(s[32:]) != 0 {
			t.Errorf("%s: status % x", name, s)
		}
		// On its own unit, from an offset, and further than it goes.
		if r := use(a, 0, useList(token, 95, 0, target.Range{LBA: 9000, Blocks: 100})); r.status != StatusGood {
			t.Fatalf("%s: %+v", name, r)
		}
		if s := rodStatus(a, 0, 77); s[5] != copyPartial || binary.BigEndian.Uint64(s[16:]) != 55 {
			t.Errorf("%s: status of a partial transfer % x", name, s)
		}
		if !bytes.Equal(content(t, dev, 9000, 55), all[95*512:]) || !bytes.Equal(content(t, dev, 9055, 45), make([]byte, 45*512)) {
			t.Errorf("%s: a partial transfer wrote other data", name)
		}
		// IMMED, and DEL_TKN.
		if r := use(a, 0, useList(token, 0, 3, target.Range{LBA: 12000, Blocks: 100})); r.status != StatusGood {
			t.Fatalf("%s: %+v", name, r)
		}
		u, _ := a.unit(0)
		<-u.copies.find(a, 77).done
		if !bytes.Equal(content(t, dev, 12000, 100), one) {
			t.Errorf("%s: IMMED wrote other data", name)
		}
		if r := use(a, 0, useList(token, 0, 0, target.Range{LBA: 0, Blocks: 1})); r.code != ascTokenDeleted {
			t.Errorf("%s: a deleted token: %+v", name, r)
		}
	}
}

// TestTokensAcrossTargets: targets that share a set take each other's tokens, others do not.
func TestTokensAcrossTargets(t *testing.T) {
	set := NewTokens(nil)
	var nexuses []*Nexus
	var devices []*mem.Device
	for i, o := range []Options{{Tokens: set}, {Tokens: set}, {}} {
		d := memory8(t, string(rune('a'+i)))
		tgt := NewTarget("iqn.2026-11.io.ledge:x", o)
		if err := tgt.Attach(0, d, UnitOptions{}); err != nil {
			t.Fatal(err)
		}
		nexuses, devices = append(nexuses, connect(tgt, "a", 1)), append(devices, d)
	}
	want := fill(t, devices[0], 0, 64, 9)
	token := populate(t, nexuses[0], 0, 1, 0, target.Range{LBA: 0, Blocks: 64})
	l := useList(token, 0, 0, target.Range{LBA: 8, Blocks: 64})
	if r := use(nexuses[1], 0, l); r.status != StatusGood || !bytes.Equal(content(t, devices[1], 8, 64), want) {
		t.Errorf("a target of the set: %+v", r)
	}
	if r := use(nexuses[2], 0, l); r.code != ascTokenUnknown {
		t.Errorf("another target: %+v", r)
	}
}

// TestZeroToken: the block device zero token needs no POPULATE TOKEN and unmaps.
func TestZeroToken(t *testing.T) {
	dev := memory8(t, "a")
	tgt, _ := pair(t, dev)
	n := connectAll(tgt, "a")
	fill(t, dev, 0, 512, 1)
	token := make([]byte, 512)
	binary.BigEndian.PutUint32(token, rodZero)
	token[6], token[7] = 1, 0xF8
	if r := use(n, 0, useList(token, 1<<40, 0, target.Range{LBA: 0, Blocks: 100}, target.Range{LBA: 100, Blocks: 412})); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	if dev.Held() != 0 {
		t.Errorf("%d bytes are held", dev.Held())
	}
	if s := rodStatus(n, 0, 77); s[5] != copyDone || binary.BigEndian.Uint64(s[16:]) != 512 {
		t.Errorf("status % x", s)
	}
}

// TestTokenIsRevoked: every way to change a block that a token stands for ends the token, and no change of
// another block does.
func TestTokenIsRevoked(t *testing.T) {
	small := func(cdb ...byte) []byte { return cdb }
	unmapList := func(lba byte) []byte {
		l := make([]byte, 24)
		l[1], l[3], l[15], l[19] = 22, 16, lba, 1
		return l
	}
	twice := append(bytes.Clone(block), block...)
	for _, x := range []struct {
		name string
		// do changes the block at lba.
		do func(tgt *Target, n *Nexus, lba byte) answer
	}{
		{"write", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, block, small(0x2A, 0, 0, 0, 0, lba, 0, 0, 1, 0)...)
		}},
		{"write and verify", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, block, small(0x2E, 0, 0, 0, 0, lba, 0, 0, 1, 0)...)
		}},
		{"write same", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, block, small(0x41, 0, 0, 0, 0, lba, 0, 0, 1, 0)...)
		}},
		{"orwrite", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, block, small(0x8B, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, 1, 0, 0)...)
		}},
		{"write atomic", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, block, small(0x9C, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, 1, 0, 0)...)
		}},
		{"compare and write", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, twice, small(0x89, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, 1, 0, 0)...)
		}},
		{"unmap", func(_ *Target, n *Nexus, lba byte) answer {
			return run(n, 0, 0, unmapList(lba), small(0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0)...)
		}},
		{"extended copy", func(tgt *Target, n *Nexus, lba byte) answer {
			dev := (*tgt.units.Load())[0].dev
			l := list1(1, []target.Device{dev, dev}, segment{0, 1, 200, uint64(lba), 1})
			return run(n, 0, 0, l, copyCDB(0, l)...)
		}},
		{"write using token", func(_ *Target, n *Nexus, lba byte) answer {
			zero := make([]byte, 512)
			binary.BigEndian.PutUint32(zero, rodZero)
			zero[6], zero[7] = 1, 0xF8
			return use(n, 0, useList(zero, 0, 0, target.Range{LBA: uint64(lba), Blocks: 1}))
		}},
	} {
		dev := memory8(t, "a")
		tgt, other := pair(t, dev)
		a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
		token := populate(t, a, 0, 1, 0, target.Range{LBA: 10, Blocks: 4}, target.Range{LBA: 100, Blocks: 4})
		l := useList(token, 0, 0, target.Range{LBA: 0, Blocks: 8})
		for _, lba := range []byte{9, 14, 99, 104} {
			if r := x.do(tgt, b, lba); r.status != StatusGood && r.key != keyMiscompare {
				t.Fatalf("%s at %d: %+v", x.name, lba, r)
			}
			if r := use(a, 1, l); r.status != StatusGood {
				t.Errorf("%s at %d, beside the token's blocks: %+v", x.name, lba, r)
			}
		}
		fill(t, other, 0, 8, 7)
		before := content(t, other, 0, 8)
		x.do(tgt, b, 103)
		if r := use(a, 1, l); r.code != ascTokenRevoked || !bytes.Equal(content(t, other, 0, 8), before) {
			t.Errorf("%s of a block of the token: %+v", x.name, r)
		}
		u, _ := a.unit(0)
		if len(u.tokens) != 0 {
			t.Errorf("%s: the unit looks after %d tokens", x.name, len(u.tokens))
		}
	}
}

// TestTokensOfAUnitEnd: what takes away the ground that tokens stand on.
func TestTokensOfAUnitEnd(t *testing.T) {
	for _, x := range []struct {
		name string
		do   func(*Target, *Nexus)
		code asc
	}{
		{"format", func(_ *Target, n *Nexus) { run(n, 0, 0, nil, 0x04, 0, 0, 0, 0, 0) }, ascTokenRevoked},
		{"access state", func(tgt *Target, _ *Nexus) {
			tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: target.NonOptimized, Ports: []uint16{1}}})
		}, ascTokenRevoked},
		{"detach", func(tgt *Target, _ *Nexus) { tgt.Detach(0) }, ascTokenUnknown},
		{"initiators", func(tgt *Target, _ *Nexus) { tgt.SetInitiators(0, []string{"iqn.test:b"}) }, ascTokenRevoked},
	} {
		tgt, _ := pair(t, memory8(t, "a"))
		tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: target.Optimized, Ports: []uint16{1}}})
		a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
		token := populate(t, a, 0, 1, 0, target.Range{LBA: 10, Blocks: 4})
		x.do(tgt, b)
		for run(b, 1, 0, nil, tur...).key == keyUnitAttention {
		}
		if r := use(b, 1, useList(token, 0, 0, target.Range{LBA: 0, Blocks: 4})); r.code != x.code {
			t.Errorf("%s: %+v", x.name, r)
		}
	}
}

// TestTokenRace: a write that comes between the read and the write of a transfer: what was read is not
// written.
func TestTokenRace(t *testing.T) {
	dev := newGated(memory8(t, "a"))
	tgt, other := pair(t, dev)
	a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
	fill(t, dev.Device, 0, 8, 1)
	token := populate(t, a, 0, 1, 0, target.Range{LBA: 0, Blocks: 8})
	done := make(chan answer)
	go func() { done <- use(a, 1, useList(token, 0, 0, target.Range{LBA: 0, Blocks: 8})) }()
	<-dev.in
	if r := run(b, 0, 0, block, wrOne...); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	dev.steps <- nil
	if r := <-done; r.code != ascTokenRevoked {
		t.Errorf("%+v", r)
	}
	if !bytes.Equal(content(t, other, 0, 8), make([]byte, 8*512)) {
		t.Error("changed blocks were written")
	}
}

// TestTokenUnderWrites: writers run against POPULATE TOKEN and WRITE USING TOKEN. What a token wrote when
// it ended well is the same each time, and one version of the blocks: never a mixture, never another.
func TestTokenUnderWrites(t *testing.T) {
	for name, dev := range map[string]target.Device{"by the device": memory8(t, "a"), "through memory": plainCopy{memory8(t, "a")}} {
		tgt, other := pair(t, dev)
		a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
		at := target.Range{LBA: 0, Blocks: 64}
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for version := byte(1); ; version++ {
				select {
				case <-stop:
					return
				default:
				}
				run(b, 0, 0, bytes.Repeat([]byte{version}, 64*512), 0x2A, 0, 0, 0, 0, 0, 0, 0, 64, 0)
			}
		}()
		used, revoked := 0, 0
		for range 300 {
			token := populate(t, a, 0, 1, 0, at)
			var first []byte
			for range 3 {
				r := use(a, 1, useList(token, 0, 0, at))
				if r.status != StatusGood {
					if r.code != ascTokenRevoked {
						t.Fatalf("%s: %+v", name, r)
					}
					revoked++
					break
				}
				used++
				got := content(t, other, 0, 64)
				if first == nil {
					first = got
				}
				if !bytes.Equal(got, first) || !bytes.Equal(got, bytes.Repeat(got[:1], len(got))) {
					t.Fatalf("%s: a token wrote a mixture, or another version than before", name)
				}
			}
		}
		close(stop)
		<-stopped
		t.Logf("%s: %d uses, %d revoked", name, used, revoked)
	}
}

// TestPopulateWaits: a token stands only when no write that began before it can change its blocks.
func TestPopulateWaits(t *testing.T) {
	dev := &slowWrites{memory8(t, "a"), make(chan struct{}), make(chan struct{})}
	tgt, _ := pair(t, dev)
	a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
	wrote := make(chan answer)
	go func() { wrote <- run(b, 0, 0, block, wrOne...) }()
	<-dev.in
	made := make(chan answer)
	l := populateList(0, 0, target.Range{LBA: 0, Blocks: 8})
	go func() { made <- run(a, 0, 0, l, tokenCDB(0x10, 1, l)...) }()
	u, _ := a.unit(0)
	for entered := false; !entered; {
		u.mu.Lock()
		entered = len(u.tokens) == 1
		if entered && !u.changing(u.tokens[0], u.turns) {
			t.Error("the write is not waited for")
		}
		u.mu.Unlock()
	}
	time.Sleep(20 * time.Millisecond) // for it to be over, if it does not wait
	select {
	case r := <-made:
		t.Errorf("it did not wait: %+v", r)
	default:
	}
	close(dev.leave)
	if r := <-wrote; r.status != StatusGood {
		t.Errorf("%+v", r)
	}
	if r := <-made; r.status != StatusGood {
		t.Errorf("%+v", r)
	}
}

// TestPopulateIsAborted: COPY OPERATION ABORT ends a POPULATE TOKEN that waits; nothing stands then.
func TestPopulateIsAborted(t *testing.T) {
	dev := &slowWrites{memory8(t, "a"), make(chan struct{}), make(chan struct{})}
	tgt, _ := pair(t, dev)
	a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
	wrote, made := make(chan answer), make(chan answer)
	go func() { wrote <- run(b, 0, 0, block, wrOne...) }()
	<-dev.in
	beside := populateList(0, 0, target.Range{LBA: 1, Blocks: 8}) // nothing to wait for
	if r := run(a, 0, 0, beside, tokenCDB(0x10, 2, beside)...); r.status != StatusGood {
		t.Errorf("beside the write: %+v", r)
	}
	l := populateList(0, 0, target.Range{LBA: 0, Blocks: 8})
	go func() { made <- run(a, 0, 0, l, tokenCDB(0x10, 1, l)...) }()
	u, _ := a.unit(0)
	for u.copies.find(a, 1) == nil {
		time.Sleep(time.Millisecond)
	}
	if r := run(a, 0, 0, nil, listCDB(0x83, 0x1C, 1)...); r.status != StatusGood {
		t.Errorf("COPY OPERATION ABORT: %+v", r)
	}
	if r := <-made; r.key != keyCopyAborted {
		t.Errorf("%+v", r)
	}
	close(dev.leave)
	<-wrote
	if n := len(tgt.tokens.of(u)); n != 1 {
		t.Errorf("%d tokens stand", n)
	}
}

// slowWrites is a device whose writes wait for leave.
type slowWrites struct {
	*mem.Device
	in, leave chan struct{}
}

func (s *slowWrites) NeverBlocks() bool { return false }
func (s *slowWrites) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	s.in <- struct{}{}
	<-s.leave
	return s.Device.Write(ctx, lba, src, fua)
}
