package scsi

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/crypt"
	"github.com/ledge-storage/ledge/target/file"
	"github.com/ledge-storage/ledge/target/mem"
)

var (
	modelSeed  = flag.Uint64("model.seed", 0, "replay one seed of TestModel")
	modelSteps = flag.Int("model.steps", 300, "commands of each run of TestModel")
)

const (
	modelBlocks = 512
	modelUnits  = 3
	modelTail   = 48 // the longest range
)

// model is what the units must hold and what the tokens must stand for, in the plainest way.
type model struct {
	t       *testing.T
	r       *rand.Rand
	now     time.Time
	tgt     *Target
	devices []target.Device
	size    int
	units   [modelUnits][]byte
	nexuses []*Nexus
	tokens  []*modelToken
	// holder is the nexus with a WRITE EXCLUSIVE persistent reservation on unit 0, or nil.
	holder  *Nexus
	step    int
	last    string
	touched [modelUnits]bool
}

// modelToken is a token and the bytes that it stands for.
type modelToken struct {
	b       []byte
	unit    int
	ranges  []target.Range
	data    []byte
	revoked bool
	expires time.Time
}

// TestModel drives the whole command set from a seed, on several nexuses and units, against a model in
// memory: after each command its units hold what the model says (all of them after every sixteenth), every read returned it, and every
// token yields what it stood for or nothing. -model.seed replays.
func TestModel(t *testing.T) {
	seeds := []uint64{1, 2, 3, 4, 5, 6}
	if *modelSeed != 0 {
		seeds = []uint64{*modelSeed}
	} else {
		seeds = append(seeds, rand.Uint64())
	}
	for i, seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runModel(t, seed, i%3) })
	}
}

func runModel(t *testing.T, seed uint64, kind int) {
	t.Logf("replay: go test -run TestModel -model.seed=%d", seed)
	m := &model{t: t, r: rand.New(rand.NewPCG(seed, 3)), now: time.Unix(1e9, 0), size: 512}
	if seed%2 == 0 {
		m.size = 4096
	}
	m.tgt = NewTarget("iqn.2026-11.io.ledge:model", Options{Tokens: NewTokens(func() time.Time { return m.now })})
	for i := range modelUnits {
		d := m.device(kind, i)
		m.devices = append(m.devices, d)
		m.units[i] = make([]byte, modelBlocks*m.size)
		if err := m.tgt.Attach(uint64(i), d, UnitOptions{AllowSanitize: true}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		n := m.tgt.Connect(fmt.Sprintf("iqn.test:%c", 'a'+i), [6]byte{0x80, byte(i)}, uint16(i+1))
		m.nexuses = append(m.nexuses, n)
	}
	for m.step = range *modelSteps {
		m.command()
		m.check(m.step%16 == 0)
	}
	m.check(true)
}

// device is memory, memory that does not copy by itself, or an encrypted file.
func (m *model) device(kind, i int) target.Device {
	bytes := int64(modelBlocks * m.size)
	if kind < 2 {
		d, err := mem.New(mem.Options{Bytes: bytes, BlockBytes: uint32(m.size), Name: fmt.Sprint(i)})
		if err != nil {
			m.t.Fatal(err)
		}
		if kind == 1 {
			return plainCopy{d}
		}
		return d
	}
	f, err := file.Open(file.Options{Path: filepath.Join(m.t.TempDir(), fmt.Sprint(i)), Bytes: bytes, BlockBytes: uint32(m.size), Volatile: true})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { f.Close() })
	if i > 0 {
		return f
	}
	d, err := crypt.New(f, &keys{})
	if err != nil {
		m.t.Fatal(err)
	}
	return d
}

func (m *model) fail(format string, a ...any) {
	m.t.Helper()
	m.t.Fatalf("step %d (%s): %s", m.step, m.last, fmt.Sprintf(format, a...))
}

// at is a range of a unit in the model.
func (m *model) at(unit int, lba, blocks uint64) []byte {
	return m.units[unit][lba*uint64(m.size) : (lba+blocks)*uint64(m.size)]
}

// check compares the units that commands named since the last time, or all.
func (m *model) check(all bool) {
	m.t.Helper()
	for i, d := range m.devices {
		if !all && !m.touched[i] {
			continue
		}
		m.touched[i] = false
		if got := content(m.t, d, 0, modelBlocks); !bytes.Equal(got, m.units[i]) {
			at := 0
			for got[at] == m.units[i][at] {
				at++
			}
			m.fail("unit %d differs at block %d", i, at/m.size)
		}
	}
}

// change revokes the tokens of a range and says whether nexus n may write there.
func (m *model) change(n *Nexus, unit int, r ...target.Range) bool {
	if unit == 0 && m.holder != nil && m.holder != n {
		return false
	}
	for _, k := range m.tokens {
		for _, a := range k.ranges {
			for _, b := range r {
				if k.unit == unit && a.LBA < b.LBA+b.Blocks && b.LBA < a.LBA+a.Blocks {
					k.revoked = true
				}
			}
		}
	}
	return true
}

// do carries a command out, attentions aside, and compares its status with what is expected.
func (m *model) do(n *Nexus, unit int, in int64, out []byte, want byte, cdb ...byte) answer {
	m.t.Helper()
	m.touched[unit] = true
	m.last = fmt.Sprintf("nexus %s, unit %d, cdb % x", n.Initiator, unit, cdb)
	for {
		r := run(n, uint64(unit), in, out, cdb...)
		if r.key == keyUnitAttention {
			continue
		}
		if r.status != want {
			m.fail("%+v, want status %02X", r, want)
		}
		return r
	}
}

func (m *model) block(pattern bool) []byte {
	b := make([]byte, m.size)
	if pattern {
		for i := range b {
			b[i] = byte(m.r.Uint32())
		}
	}
	return b
}

func (m *model) data(blocks uint64) []byte {
	b := make([]byte, blocks*uint64(m.size))
	if m.r.IntN(8) > 0 {
		for i := range b {
			b[i] = byte(m.r.Uint32())
		}
	}
	return b
}

// cdb16 is a CDB with an LBA in bytes 2 to 9 and a length in 10 to 13.
func cdb16(code, second byte, lba, blocks uint64) []byte {
	b := make([]byte, 16)
	b[0], b[1] = code, second
	binary.BigEndian.PutUint64(b[2:], lba)
	binary.BigEndian.PutUint32(b[10:], uint32(blocks))
	return b
}

func (m *model) command() {
	n, unit := m.nexuses[m.r.IntN(len(m.nexuses))], m.r.IntN(modelUnits)
	lba := m.r.Uint64N(modelBlocks - modelTail)
	blocks := 1 + m.r.Uint64N(modelTail)
	here := target.Range{LBA: lba, Blocks: blocks}
	// written is the status of a command that writes, for which the model then changes or not.
	written := func(r ...target.Range) (byte, bool) {
		if m.change(n, unit, r...) {
			return StatusGood, true
		}
		return StatusReservationConflict, false
	}
	switch k := m.r.IntN(100); {
	case k < 16: // READ(10), READ(16)
		cdb := cdb16(0x88, 0, lba, blocks)
		if k%2 == 0 {
			cdb = []byte{0x28, 0, 0, 0, byte(lba >> 8), byte(lba), 0, 0, byte(blocks), 0}
		}
		r := m.do(n, unit, int64(blocks)*int64(m.size), nil, StatusGood, cdb...)
		if !bytes.Equal(r.data, m.at(unit, lba, blocks)) {
			m.fail("other data were read")
		}
	case k < 32: // WRITE(16), WRITE AND VERIFY(16)
		d := m.data(blocks)
		status, ok := written(here)
		m.do(n, unit, 0, d, status, cdb16([]byte{0x8A, 0x8E}[k%2], 0, lba, blocks)...)
		if ok {
			copy(m.at(unit, lba, blocks), d)
		}
	case k < 36: // ORWRITE(16)
		d := m.data(blocks)
		status, ok := written(here)
		m.do(n, unit, 0, d, status, cdb16(0x8B, 0, lba, blocks)...)
		if part := m.at(unit, lba, blocks); ok {
			for i := range part {
				part[i] |= d[i]
			}
		}
	case k < 40: // WRITE ATOMIC(16)
		d := m.data(1)
		status, ok := written(target.Range{LBA: lba, Blocks: 1})
		m.do(n, unit, 0, d, status, append(cdb16(0x9C, 0, lba, 0)[:12], 0, 1, 0, 0)...)
		if ok {
			copy(m.at(unit, lba, 1), d)
		}
	case k < 46: // COMPARE AND WRITE, equal or not
		d := append(bytes.Clone(m.at(unit, lba, blocks)), m.data(blocks)...)
		cdb := cdb16(0x89, 0, lba, 0)
		cdb[13] = byte(blocks)
		status, ok := written(here)
		if k%2 == 0 {
			d[m.r.IntN(len(d)/2)] ^= 4
			if ok {
				status, ok = StatusCheckCondition, false
			}
		}
		m.do(n, unit, 0, d, status, cdb...)
		if ok {
			copy(m.at(unit, lba, blocks), d[len(d)/2:])
		}
	case k < 54: // WRITE SAME(16): a block, zeros, none (NDOB), unmapped
		var d []byte
		second := []byte{0, 0, 1, 8, 9}[m.r.IntN(5)]
		same := m.block(second == 0)
		if second&1 == 0 {
			d = same
		}
		status, ok := written(here)
		m.do(n, unit, 0, d, status, cdb16(0x93, second, lba, blocks)...)
		if ok {
			copy(m.at(unit, lba, blocks), bytes.Repeat(same, int(blocks)))
		}
	case k < 60: // UNMAP of two ranges
		other := target.Range{LBA: m.r.Uint64N(modelBlocks - modelTail), Blocks: m.r.Uint64N(modelTail)}
		l := ranges(make([]byte, 8), here, other)
		binary.BigEndian.PutUint16(l[2:], 32)
		clear(l[6:8])
		status, ok := written(here, other)
		m.do(n, unit, 0, l, status, 0x42, 0, 0, 0, 0, 0, 0, 0, byte(len(l)), 0)
		if ok {
			clear(m.at(unit, here.LBA, here.Blocks))
			clear(m.at(unit, other.LBA, other.Blocks))
		}
	case k < 64: // VERIFY(16) with BYTCHK, equal or not
		d := bytes.Clone(m.at(unit, lba, blocks))
		status := byte(StatusGood)
		if k%2 == 0 {
			d[m.r.IntN(len(d))] ^= 8
			status = StatusCheckCondition
		}
		m.do(n, unit, 0, d, status, cdb16(0x8F, 2, lba, blocks)...)
	case k < 68: // GET LBA STATUS: what is not mapped is zeros
		r := m.do(n, unit, 4096, nil, StatusGood, cdb16(0x9E, 0x12, lba, 4096)...)
		for d := r.data[8:]; len(d) > 0; d = d[16:] {
			at, count := binary.BigEndian.Uint64(d), uint64(binary.BigEndian.Uint32(d[8:]))
			if d[12] != 0 && !isZero(m.at(unit, at, count)) {
				m.fail("blocks %d+%d hold data and are not mapped", at, count)
			}
		}
	case k < 76:
		m.extendedCopy(n, unit, here)
	case k < 82:
		m.populate(n, unit)
	case k < 92:
		m.useToken(n, unit, here)
	case k < 94:
		m.reserve(n)
	case k < 95: // FORMAT UNIT, SANITIZE
		cdb := [][]byte{{0x04, 0, 0, 0, 0, 0}, {0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0}}[m.r.IntN(2)]
		status, ok := written(target.Range{Blocks: modelBlocks})
		m.do(n, unit, 0, nil, status, cdb...)
		if ok {
			clear(m.units[unit])
		}
	case k < 97: // time passes, resets come
		m.now = m.now.Add(time.Duration(m.r.IntN(20)) * time.Second)
		n.ResetUnit(EncodeLUN(uint64(unit)))
	case k < 98: // beyond the end: nothing changes
		m.do(n, 1, 0, m.data(2), StatusCheckCondition, cdb16(0x8A, 0, modelBlocks-1, 2)...)
	default: // the rest of the commands change nothing
		for _, cdb := range [][]byte{tur, {0x12, 1, 0x8F, 4, 0, 0}, cdb16(0x9E, 0x10, 0, 32), {0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0}, cdb16(0x90, 0, lba, blocks), {0x1A, 8, 0x3F, 0xFF, 255, 0}, {0xA3, 0x0C, 0x80, 0, 0, 0, 0, 0, 16, 0, 0, 0}} {
			want := byte(StatusGood)
			if cdb[0] == 0x90 {
				want = StatusConditionMet
			}
			if cdb[0] == 0x35 && unit == 0 && m.holder != nil && m.holder != n {
				want = StatusReservationConflict
			}
			m.do(n, unit, 4096, nil, want, cdb...)
		}
	}
}

// extendedCopy copies a range to a random place, by LID1 or LID4, in the command or behind it.
func (m *model) extendedCopy(n *Nexus, unit int, from target.Range) {
	to, at := m.r.IntN(modelUnits), m.r.Uint64N(modelBlocks-modelTail)
	units := []target.Device{m.devices[unit], m.devices[to]}
	s := segment{0, 1, from.LBA, at, uint16(from.Blocks)}
	immed := m.r.IntN(2) == 0
	l, action := list4(uint32(m.step), immed, units, s), byte(1)
	if m.r.IntN(2) == 0 {
		l, action, immed = list1(byte(m.step), units, s), 0, false
	}
	status := byte(StatusGood)
	if unit == 0 && m.holder != nil && m.holder != n { // the command itself conflicts
		m.do(n, unit, 0, l, StatusReservationConflict, copyCDB(action, l)...)
		return
	}
	ok := m.change(n, to, target.Range{LBA: at, Blocks: from.Blocks})
	if !ok && !immed {
		status = StatusReservationConflict
	}
	m.do(n, unit, 0, l, status, copyCDB(action, l)...)
	if immed {
		u, _ := n.unit(uint64(unit))
		<-u.copies.find(n, uint32(m.step)).done
		if got := run(n, uint64(unit), 4096, nil, listCDB(0x84, 5, uint32(m.step))...).data[5]; (got == copyDone) != ok {
			m.fail("it ended with status %02X", got)
		}
	}
	m.touched[to] = true
	if ok {
		copy(m.at(to, at, from.Blocks), bytes.Clone(m.at(unit, from.LBA, from.Blocks)))
	}
}

// populate makes a token of two ranges.
func (m *model) populate(n *Nexus, unit int) {
	k := &modelToken{unit: unit, expires: m.now.Add(30 * time.Second)}
	for half := range uint64(2) {
		r := target.Range{LBA: half*modelBlocks/2 + m.r.Uint64N(modelBlocks/2-modelTail), Blocks: 1 + m.r.Uint64N(modelTail)}
		k.ranges = append(k.ranges, r)
		k.data = append(k.data, m.at(unit, r.LBA, r.Blocks)...)
	}
	l := populateList(30, 0, k.ranges...)
	m.do(n, unit, 0, l, StatusGood, tokenCDB(0x10, 7, l)...)
	k.b = bytes.Clone(tokenOf(m.t, n, uint64(unit), 7))
	m.tokens = append(m.tokens, k)
}

// useToken writes what a token, or the zero token, stands for.
func (m *model) useToken(n *Nexus, unit int, to target.Range) {
	ok := unit != 0 || m.holder == nil || m.holder == n
	zero := len(m.tokens) == 0 || m.r.IntN(6) == 0
	if zero {
		b := make([]byte, tokenBytes)
		binary.BigEndian.PutUint32(b, rodZero)
		b[6], b[7] = 1, 0xF8
		l := useList(b, 0, 0, to)
		if !ok {
			m.do(n, unit, 0, l, StatusReservationConflict, tokenCDB(0x11, 8, l)...)
			return
		}
		m.change(n, unit, to)
		m.do(n, unit, 0, l, StatusGood, tokenCDB(0x11, 8, l)...)
		clear(m.at(unit, to.LBA, to.Blocks))
		return
	}
	i := m.r.IntN(len(m.tokens))
	k := m.tokens[i]
	size := uint64(m.size)
	offset := m.r.Uint64N(uint64(len(k.data)) / size)
	n1 := min(to.Blocks, uint64(len(k.data))/size-offset)
	l := useList(k.b, offset, 0, to)
	switch {
	case !ok:
		m.do(n, unit, 0, l, StatusReservationConflict, tokenCDB(0x11, 8, l)...)
		return
	case k.revoked || !m.now.Before(k.expires):
		m.do(n, unit, 0, l, StatusCheckCondition, tokenCDB(0x11, 8, l)...)
		m.tokens = append(m.tokens[:i], m.tokens[i+1:]...)
		return
	}
	// Piece by piece, as the ranges of the token end: a piece that lands on blocks of the token ends it.
	want, at, done := uint64(0), offset, true
	for _, r := range k.ranges {
		if at >= r.Blocks {
			at -= r.Blocks
			continue
		}
		piece := min(r.Blocks-at, n1-want)
		if piece == 0 {
			break
		}
		m.change(n, unit, target.Range{LBA: to.LBA + want, Blocks: piece})
		if k.revoked {
			done = false
			break
		}
		want, at = want+piece, 0
	}
	status := byte(StatusGood)
	if !done {
		status = StatusCheckCondition
	}
	m.do(n, unit, 0, l, status, tokenCDB(0x11, 8, l)...)
	copy(m.at(unit, to.LBA, want), k.data[offset*size:])
	k.expires = m.now.Add(30 * time.Second)
	if s := rodStatus(n, uint64(unit), 8); binary.BigEndian.Uint64(s[16:]) != want {
		m.fail("%d blocks are told, want %d", binary.BigEndian.Uint64(s[16:]), want)
	}
}

// reserve takes or drops a WRITE EXCLUSIVE reservation of unit 0.
func (m *model) reserve(n *Nexus) {
	key := uint64(len(n.Initiator)) + uint64(n.RelativePort)
	if m.holder == n {
		m.do(n, 0, 0, prList(key, 0, 0), StatusGood, prOutCDB(3, 0)...) // CLEAR
		m.holder = nil
		return
	}
	if m.holder != nil {
		return
	}
	m.do(n, 0, 0, prList(0, key, 0), StatusGood, prOutCDB(6, 0)...)
	m.do(n, 0, 0, prList(key, 0, 0), StatusGood, prOutCDB(1, prWriteExclusive)...)
	m.holder = n
}
