package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/zeebo/xxh3"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares with the file, or writes it. The files prove that stores written by earlier
// programs are read: when one has to change, the version has to, too.
func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		os.MkdirAll("testdata", 0o755)
		os.WriteFile(path, got, 0o644)
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the format has changed", name)
	}
	return want
}

// old is what an earlier version wrote.
func old(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile(filepath.Join("testdata", name))
	must(t, err)
	return p
}

// wantRecord decodes r from what this version writes and from what the versions before 4 wrote.
func wantRecord(t *testing.T, r record, written ...[]byte) {
	t.Helper()
	for _, p := range written {
		if got, err := decodeRecord(p); err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("%s: %v", p[:8], err)
		}
	}
}

func sampleSuper() superblock {
	return superblock{uuid: [16]byte{1, 2, 3}, key: [32]byte{4, 5, 6}, seq: 7, epoch: 8, jEpoch: 6, jStart: 9 * BlockBytes, jSeq: 10,
		ringSize: 1 << 20, reserved: 640, ckptSegs: 2, ckptID: 11, ckptFrom: 12}
}

func sampleRecord() (record, []byte) {
	v := Volume{uuid: [16]byte{7}, name: "demo", appliedName: "demo", applied: 1 << 20}
	describe := append(v.describe(), make([]byte, BlockBytes-len(v.describe()))...)
	r := record{uuid: [16]byte{1}, epoch: 2, seq: 3, ops: []op{
		{kind: opCreate, vol: 9, data: describe}, {kind: opWrite, vol: 9, lba: 5, count: 2, data: bytes.Repeat([]byte("ab"), BlockBytes)},
		{kind: opZero, vol: 9, lba: 100, count: 1 << 30, data: []byte{}}, {kind: opResize, vol: 9, lba: 1 << 21, data: []byte{}}, {kind: opDelete, vol: 8, data: []byte{}}}}
	n := recordBytes(len(r.ops), 3*BlockBytes)
	r.advance = uint64(n)
	p := make([]byte, n)
	r.encode(p)
	return r, p
}

func sampleTrailer() trailer {
	return trailer{kind: kindData, uuid: [16]byte{1}, epoch: 2, segment: 3, prev: 1, cover: position{4, 5}, payload: 6000, slots: 2, log: 70,
		table: 8, stripe: 9, ckptID: 10, index: 11, content: 12}
}

func sampleSlots() []slot {
	return []slot{{digest{1}, 0, 4101}, {digest{2}, 4101, 900}, {digest{3, 19: 9}, 5001, 10}}
}

func sampleLog() []byte {
	var w logWriter
	w.volume(logCreate, 1, 0, []byte("description"))
	w.store(1, 10, 0)
	w.store(1, 11, 0)
	w.ref(1, 12, makeLoc(2, 100, 50))
	w.ref(1, 13, makeLoc(2, 150, 60))
	w.zero(1, 14, 1000)
	w.zero(1, 1014, 1)
	w.move(1, 9, makeLoc(2, 100, 50), makeLoc(3, 5001, 10))
	w.volume(logResize, 1, 1<<30, nil)
	w.volume(logDelete, 1, 0, nil)
	w.flush()
	return w.p
}

func samplePlaces() *places {
	at := new(places)
	at[3], at[4], at[5] = makeLoc(2, 100, 50), makeLoc(2, 150, 60), makeLoc(3, 0, 4101)
	return at
}

// sampleItems are of version 1.
func sampleItems() []byte {
	p := []byte{itemHead, 9, 3, 4, 5}
	v := Volume{uuid: [16]byte{7}, name: "demo", appliedName: "demo", applied: 1 << 30}
	p = append(p, itemVolume, 7, byte(len(v.describe())))
	p = append(p, v.describe()...)
	p = appendRuns(append(p, itemPage, 7, 2), samplePlaces()[:])
	p = appendSegmentItem(p, 2, &segment{slots: 10, bytes: 5000, shares: []share{{7, 10, 4000}}})
	return append(p, itemFree, 1, itemEnd)
}

func TestGolden(t *testing.T) {
	s := sampleSuper()
	s.ckptCopy, s.logTo = 3, 600
	if got, err := decodeSuperblock(golden(t, "superblock5.golden", s.encode())); err != nil || got != s {
		t.Errorf("%+v %v", got, err)
	}
	s.ckptCopy, s.logTo = 0, 0
	for version, name := range []string{"superblock.golden", "superblock2.golden", "superblock3.golden", "superblock4.golden"} {
		if got, err := decodeSuperblock(old(t, name)); err != nil || got != s {
			t.Errorf("version %d: %+v %v", version+1, got, err)
		}
	}
	r, p := sampleRecord()
	wantRecord(t, r, golden(t, "record4.golden", p), old(t, "record.golden"))
	tr, p := sampleTrailer(), make([]byte, BlockBytes)
	tr.encode(p)
	if got, err := decodeTrailer(golden(t, "trailer2.golden", p)); err != nil || got != tr {
		t.Errorf("%+v %v", got, err)
	}
	p = make([]byte, 3*slotBytes)
	encodeSlots(p, sampleSlots())
	if got, err := tr.decodeSlots(golden(t, "slots2.golden", p)); err != nil || !reflect.DeepEqual(got, sampleSlots()) {
		t.Errorf("%+v %v", got, err)
	}
	wide := old(t, "slots.golden")
	want := sampleSlots()
	want[2].fp[19] = 0
	if got, err := (&trailer{kind: kindWide, payload: 6000}).decodeSlots(wide); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("wide: %+v %v", got, err)
	}
	wide = old(t, "trailer.golden")
	if got, err := decodeTrailer(wide); err != nil || got.kind != kindWide || got.slots != 2 || !got.isData() {
		t.Errorf("wide: %+v %v", got, err)
	}
	var kinds []uint8
	err := decodeLog(3, sampleSlots(), golden(t, "log.golden", sampleLog()), func(c *change) error {
		kinds = append(kinds, c.kind)
		return nil
	})
	if want := []uint8{logCreate, logStore, logRef, logZero, logMove, logResize, logDelete}; err != nil || !bytes.Equal(kinds, want) {
		t.Errorf("log: kinds %v, %v", kinds, err)
	}
	st := state{volumes: map[uint32]*Volume{}, segs: map[uint32]*segment{}}
	if err := st.decodeItems(golden(t, "checkpoint.golden", sampleItems())); err != nil || !st.end || st.volumes[7].m.get(1028) != makeLoc(2, 150, 60) ||
		st.volumes[7].m.mapped != 3 || st.segs[2].shares[0].bytes != 4000 || len(st.free) != 1 || st.cover != (position{4, 5}) {
		t.Errorf("checkpoint %+v %v", st, err)
	}
}

// What version 5 added.
func TestGoldenAside(t *testing.T) {
	var w logWriter
	w.store(1, 10, 0)
	w.put(1, 11, makeLoc(2, 100, 50))
	w.put(1, 12, makeLoc(2, 150, 60))
	w.ref(1, 13, makeLoc(2, 210, 70))
	w.put(1, 14, makeLoc(4, 0, 4101))
	w.flush()
	var got []change
	err := decodeLog(3, sampleSlots(), golden(t, "log5.golden", w.p), func(c *change) error {
		got = append(got, *c)
		return nil
	})
	if err != nil || len(got) != 4 || got[1].kind != logPut || got[1].lba != 11 || !slices.Equal(got[1].places, []loc{makeLoc(2, 100, 50), makeLoc(2, 150, 60)}) ||
		got[2].kind != logRef || got[3].kind != logPut || got[3].places[0] != makeLoc(4, 0, 4101) {
		t.Errorf("log: %+v, %v", got, err)
	}
}

// sampleCopies is what version 2 added: a snapshot and a clone.
func sampleCopies() (snapshot, clone Volume, r record, log, items []byte) {
	snapshot = Volume{uuid: [16]byte{8}, name: "monday", appliedName: "monday", applied: 1 << 30, snapshot: true, from: 7, appliedFrom: 7, taken: 1e18, group: [16]byte{9}}
	clone = Volume{uuid: [16]byte{10}, name: "copy", appliedName: "copy", applied: 1 << 30, from: 8, appliedFrom: 8, taken: 2e18}
	block := func(v *Volume) []byte { return append(v.describe(), make([]byte, BlockBytes-len(v.describe()))...) }
	r = record{uuid: [16]byte{1}, epoch: 2, seq: 3, ops: []op{{kind: opCopy, vol: 8, lba: 7, data: block(&snapshot)},
		{kind: opRollback, vol: 7, lba: 8, data: []byte{}}, {kind: opDescribe, vol: 9, data: block(&clone)}}}
	r.advance = uint64(recordBytes(len(r.ops), 2*BlockBytes))
	var w logWriter
	w.volume(logCopy, 8, 7, snapshot.describe())
	w.volume(logRollback, 7, 8, nil)
	w.volume(logDescribe, 9, 0, clone.describe())
	w.flush()
	items = sampleItems()
	items = items[:len(items)-1]
	items[1] = 10 // the next volume
	items = append(append(items, itemVolume, 8, byte(len(snapshot.describe()))), snapshot.describe()...)
	return snapshot, clone, r, w.p, append(items, itemShared, 8, 7, 2, 1, itemEnd)
}

func TestGoldenCopies(t *testing.T) {
	snapshot, clone, r, log, items := sampleCopies()
	p := make([]byte, r.advance)
	r.encode(p)
	wantRecord(t, r, golden(t, "record4-copies.golden", p), old(t, "record2.golden"))
	var got []change
	err := decodeLog(3, nil, golden(t, "log2.golden", log), func(c *change) error {
		got = append(got, *c)
		return nil
	})
	if err != nil || len(got) != 3 || got[0].kind != logCopy || got[0].n != 7 || got[1].kind != logRollback || got[1].n != 8 || got[2].kind != logDescribe {
		t.Errorf("log: %+v, %v", got, err)
	}
	for i, want := range []Volume{snapshot, {}, clone} {
		if i == 1 {
			continue
		}
		v, err := parseDescription(got[i].describe)
		if err != nil || v.name != want.name || v.snapshot != want.snapshot || v.from != want.from || v.taken != want.taken || v.group != want.group {
			t.Errorf("%+v %v", v, err)
		}
	}
	st := state{volumes: map[uint32]*Volume{}, segs: map[uint32]*segment{}}
	if err := st.decodeItems(golden(t, "checkpoint2.golden", items)); err != nil || st.volumes[8].m.page(1024) != st.volumes[7].m.page(1024) || st.volumes[8].m.mapped != 3 {
		t.Errorf("checkpoint %+v %v", st, err)
	}
}

// sampleNodes is what version 3 has instead of pages: a volume, a snapshot that shares one of its two pages, and a map that is taken apart.
func sampleNodes() []byte {
	p := []byte{itemHead, 10, 3, 4, 5}
	v := Volume{uuid: [16]byte{7}, name: "demo", appliedName: "demo", applied: 1 << 30, appliedCompression: CompressZstd}
	p = append(append(p, itemVolume, 7, byte(len(v.describe()))), v.describe()...)
	var at [nodePages]loc
	at[0], at[2] = makeLoc(5, 0, 100), makeLoc(5, 100, 4101)
	p = append(appendRuns(append(p, itemNode, 7, 1), at[:]), 3, 32)
	s := Volume{uuid: [16]byte{8}, name: "monday", appliedName: "monday", applied: 1 << 30, snapshot: true, from: 7, appliedFrom: 7, taken: 1e18}
	p = append(append(p, itemVolume, 8, byte(len(s.describe()))), s.describe()...)
	p = append(binary.AppendUvarint(append(p, itemShared, 8, 7), nodePages+2), 1)
	at[0], at[2] = 0, makeLoc(6, 0, 50)
	p = appendRuns(append(binary.AppendUvarint(append(p, itemNode), lastDying), 0), at[:])
	p = append(p, 1)
	p = appendSegmentItem(p, 2, &segment{slots: 10, bytes: 5000, shares: []share{{7, 10, 4000}}})
	return append(p, itemLive, 2, 36, itemEnd)
}

func TestGoldenNodes(t *testing.T) {
	st := state{volumes: map[uint32]*Volume{}, segs: map[uint32]*segment{}}
	err := st.decodeItems(golden(t, "checkpoint3.golden", sampleNodes()))
	if err != nil || !st.end {
		t.Fatal(err)
	}
	a, b := &st.volumes[7].m, &st.volumes[8].m
	shared := a.page((nodePages + 2) * pageEntries)
	if v := st.volumes[7]; v.compression != CompressZstd || v.appliedCompression != CompressZstd || v.snapshot || st.volumes[8].compression != CompressS2 {
		t.Errorf("volumes %+v", st.volumes)
	}
	if shared == nil || shared.rest != makeLoc(5, 100, 4101) || shared.count != 32 || shared.refs != 2 || b.page((nodePages+2)*pageEntries) != shared || a.mapped != 35 || b.mapped != 32 ||
		st.dying[lastDying].page(2*pageEntries).rest != makeLoc(6, 0, 50) || st.segs[2].live != 36 {
		t.Errorf("%+v", st)
	}
	for name, at := range map[string]*places{"page": samplePlaces(), "page-full": func() *places {
		at := new(places)
		for i := range at {
			at[i] = makeLoc(uint32(100000+i*7), i*8191%SegmentBytes/2, 4101)
		}
		return at
	}()} {
		p := make([]byte, pageScratch)
		p = p[:encodePage(p, at)]
		rest := makeLoc(9, 4096, len(p))
		sealBlock(9, 4096, p)
		got, err := decodePage(rest, golden(t, name+".golden", p), func(n uint32) bool { return n != 3 || name != "page" })
		if name == "page" { // it names segment 3
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: a page that names what is not there: %v", name, err)
			}
			got, err = decodePage(rest, p, func(uint32) bool { return true })
		}
		if err != nil || *got != *at || len(p) > blockHeader+pageBytes {
			t.Errorf("%s: %d bytes, %v", name, len(p), err)
		}
		for i := range p {
			p[i] ^= 4
			if _, err := decodePage(rest, p, func(uint32) bool { return true }); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: byte %d is wrong: %v", name, i, err)
			}
			p[i] ^= 4
		}
	}
}

// Two runs of 1000 blocks take a byte for each that was stored before, and next to none for the others.
func TestLogJoinsRuns(t *testing.T) {
	var w logWriter
	for i := range uint64(1000) {
		w.store(1, i, 0)
	}
	for i := range 1000 {
		w.ref(1, uint64(1000+i), makeLoc(2, i*50, 50))
	}
	bound := w.bytes()
	if w.flush(); bound < len(w.p) || len(w.p) > 1100 {
		t.Errorf("%d bytes, bound %d", len(w.p), bound)
	}
}

// Every bit of a superblock, a record, a trailer counts.
func TestEveryBitCounts(t *testing.T) {
	s := sampleSuper()
	_, rec := sampleRecord()
	tr, trail := sampleTrailer(), make([]byte, BlockBytes)
	tr.encode(trail)
	for name, c := range map[string]struct {
		p      []byte
		decode func([]byte) error
	}{
		"superblock": {s.encode(), func(p []byte) error { _, err := decodeSuperblock(p); return err }},
		"record":     {rec, func(p []byte) error { _, err := decodeRecord(p); return err }},
		"trailer":    {trail, func(p []byte) error { _, err := decodeTrailer(p); return err }},
	} {
		for bit := 0; bit < len(c.p)*8; bit += 1 + bit/512 {
			c.p[bit/8] ^= 1 << (bit % 8)
			if c.decode(c.p) == nil {
				t.Errorf("%s: bit %d does not count", name, bit)
			}
			c.p[bit/8] ^= 1 << (bit % 8)
		}
		if err := c.decode(c.p); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A record whose blocks are in part those that were there before is torn, whatever the blocks are: also where each ends in its
// own CRC-32C, which makes a CRC-32C over all of them blind to what they hold.
func TestTornRecord(t *testing.T) {
	block := func(seed uint64) []byte {
		p := noise(seed, 1)
		le.PutUint32(p[BlockBytes-4:], crc(p[:BlockBytes-4]))
		return p
	}
	sealed := func(seed uint64) []byte {
		r := record{uuid: [16]byte{1}, epoch: 2, seq: 3, ops: []op{{kind: opWrite, vol: 9, lba: 5, count: 2, data: append(block(seed), block(seed+1)...)}}}
		r.advance = uint64(recordBytes(1, 2*BlockBytes))
		p := make([]byte, r.advance)
		r.encode(p)
		return p
	}
	one, two := sealed(1), sealed(3)
	if crc(one[BlockBytes:]) != crc(two[BlockBytes:]) {
		t.Fatal("they are no such blocks")
	}
	for mixed := range 1 << 3 {
		p := bytes.Clone(two)
		for i := range 3 {
			if mixed>>i&1 == 0 {
				copy(p[i*BlockBytes:(i+1)*BlockBytes], one[i*BlockBytes:])
			}
		}
		if _, err := decodeRecord(p); (err == nil) != (mixed == 0 || mixed == 7) {
			t.Errorf("blocks %03b of the one, others of the other: %v", mixed, err)
		}
	}
}

// A stored block is refused at another address, with any bit changed, and cut short.
func TestBlock(t *testing.T) {
	for _, data := range [][]byte{text(1, 1), noise(1, 1)} {
		p := make([]byte, encodeScratch)
		p = p[:encodeBlock(p, data, CompressS2)]
		sealBlock(5, 1000, p)
		at := makeLoc(5, 1000, len(p))
		got := make([]byte, BlockBytes)
		if err := decodeBlock(at, got, p); err != nil || !bytes.Equal(got, data) {
			t.Fatal(err)
		}
		for _, wrong := range []loc{makeLoc(6, 1000, len(p)), makeLoc(5, 1001, len(p)), makeLoc(5, 1000, len(p)-1)} {
			if err := decodeBlock(wrong, got, p); !errors.Is(err, ErrCorrupt) {
				t.Errorf("at %x: %v", wrong, err)
			}
		}
		for bit := range len(p) * 8 {
			p[bit/8] ^= 1 << (bit % 8)
			if decodeBlock(at, got, p) == nil {
				t.Fatalf("bit %d does not count", bit)
			}
			p[bit/8] ^= 1 << (bit % 8)
		}
	}
}

// reseal makes the checksum right, so that the fuzzer reaches the checks behind it.
func reseal(p []byte) []byte {
	p = append([]byte(nil), p...)
	switch {
	case len(p) >= 16 && string(p[:8]) == recordMagic:
		le.PutUint64(p[8:], xxh3.Hash(p[16:]))
	case len(p) >= 12:
		le.PutUint32(p[8:], crc(p[12:]))
	}
	return p
}

func fuzz(f *testing.F, seed []byte, decode func(t *testing.T, p []byte) error) {
	f.Add(seed)
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, p := range [][]byte{p, reseal(p)} {
			if err := decode(t, p); err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Error(err)
			}
		}
	})
}

func FuzzSuperblock(f *testing.F) {
	s := sampleSuper()
	fuzz(f, s.encode(), func(t *testing.T, p []byte) error {
		s, err := decodeSuperblock(p)
		if err == nil && le.Uint32(p[12:]) == superVersion && !bytes.Equal(s.encode(), p) {
			t.Error("does not survive")
		}
		return err
	})
}

func FuzzRecord(f *testing.F) {
	_, p := sampleRecord()
	_, _, r, _, _ := sampleCopies()
	q := make([]byte, r.advance)
	r.encode(q)
	f.Add(q)
	for _, name := range []string{"record.golden", "record2.golden"} {
		p, err := os.ReadFile("testdata/" + name)
		must(f, err)
		f.Add(p)
	}
	fuzz(f, p, func(t *testing.T, p []byte) error {
		r, err := decodeRecord(p)
		if err == nil && string(p[:8]) == recordMagic {
			q := make([]byte, len(p))
			if r.encode(q); !bytes.Equal(p, q) {
				t.Error("does not survive")
			}
		}
		return err
	})
}

func FuzzTrailer(f *testing.F) {
	tr, p := sampleTrailer(), make([]byte, BlockBytes)
	tr.encode(p)
	fuzz(f, p, func(t *testing.T, p []byte) error {
		tr, err := decodeTrailer(p)
		if q := make([]byte, BlockBytes); err == nil {
			if tr.encode(q); !bytes.Equal(p, q) {
				t.Error("does not survive")
			}
		}
		return err
	})
}

func FuzzLog(f *testing.F) {
	_, _, _, log, _ := sampleCopies()
	f.Add(log)
	f.Add(old(f, "log5.golden"))
	fuzz(f, sampleLog(), func(t *testing.T, p []byte) error {
		return decodeLog(3, sampleSlots(), p, func(c *change) error {
			for _, l := range c.places {
				if !l.valid() {
					t.Errorf("place %x", l)
				}
			}
			return nil
		})
	})
}

func FuzzSlots(f *testing.F) {
	p := make([]byte, 3*slotBytes)
	encodeSlots(p, sampleSlots())
	fuzz(f, p, func(t *testing.T, p []byte) error {
		_, wide := (&trailer{kind: kindWide, payload: 6000}).decodeSlots(p[:len(p)/wideBytes*wideBytes])
		tr := trailer{kind: kindData, payload: 6000}
		slots, err := tr.decodeSlots(p[:len(p)/slotBytes*slotBytes])
		if q := make([]byte, len(slots)*slotBytes); err == nil {
			if encodeSlots(q, slots); !bytes.HasPrefix(p, q) {
				t.Error("does not survive")
			}
		}
		return errors.Join(err, wide)
	})
}

func FuzzCheckpoint(f *testing.F) {
	_, _, _, _, items := sampleCopies()
	f.Add(items)
	f.Add(sampleNodes())
	fuzz(f, sampleItems(), func(t *testing.T, p []byte) error {
		s := state{volumes: map[uint32]*Volume{}, segs: map[uint32]*segment{}}
		return s.decodeItems(p)
	})
}

func FuzzPage(f *testing.F) {
	for _, name := range []string{"page", "page-full"} {
		p, err := os.ReadFile("testdata/" + name + ".golden")
		must(f, err)
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if p = append([]byte(nil), p...); len(p) <= blockHeader || len(p) > blockHeader+BlockBytes {
			return
		}
		rest := makeLoc(1, 0, len(p))
		sealBlock(1, 0, p)
		at, err := decodePage(rest, p, func(n uint32) bool { return n != 3 })
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
			return
		}
		for i, l := range at {
			if l != 0 && (!l.valid() || l.segment() == 3) {
				t.Errorf("entry %d: %x", i, l)
			}
		}
		q := make([]byte, pageScratch)
		n := encodePage(q, at)
		sealBlock(1, 0, q[:n])
		if again, err := decodePage(makeLoc(1, 0, n), q[:n], func(uint32) bool { return true }); err != nil || *again != *at {
			t.Errorf("it does not survive: %v", err)
		}
	})
}

func FuzzBlock(f *testing.F) {
	p := make([]byte, encodeScratch)
	for c := range compressions {
		f.Add(bytes.Clone(p[:encodeBlock(p, text(1, 1), c)]))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		p = append([]byte(nil), p...)
		at := makeLoc(1, 0, min(len(p), 1<<13-1))
		if len(p) > blockHeader {
			sealBlock(1, 0, p)
		}
		if err := decodeBlock(at, make([]byte, BlockBytes), p); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Error(err)
		}
	})
}
