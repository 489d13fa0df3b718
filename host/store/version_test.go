package store

import (
	"bytes"
	"compress/gzip"
	"encoding/gob"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// asVersion1 makes what a store wrote what version 1 would have written: wide slots, and a superblock that says so.
// It returns how many segments with blocks there are.
func asVersion1(t *testing.T, sh *shelf) (segments int) {
	t.Helper()
	sh.p.mu.Lock()
	defer sh.p.mu.Unlock()
	read := func(m *memory, at int64, n int) []byte {
		p := make([]byte, n)
		for i := 0; i < n; i += BlockBytes {
			copy(p[i:], m.pages[at+int64(i)])
		}
		return p
	}
	for n := range uint32(64) {
		base := int64(n) * SegmentBytes
		p := read(sh.segments, base, SegmentBytes)
		tr, err := decodeTrailer(p[trailerOffset:])
		if err != nil || tr.kind != kindData {
			continue
		}
		at := tr.tableOffset()
		end := at + int(tr.slots)*slotBytes
		slots, err := tr.decodeSlots(p[at:end])
		must(t, err)
		log := append([]byte(nil), p[end:trailerOffset]...)
		clear(p[at:trailerOffset])
		tr.kind = kindWide
		at = tr.tableOffset()
		if at < int(tr.payload) || at < SegmentBytes-StripeBytes {
			t.Fatalf("segment %d is too full for wide slots in its last stripe", n)
		}
		for i, s := range slots {
			e := p[at+i*wideBytes:]
			copy(e, s.fp[:])
			le.PutUint32(e[32:], s.off)
			le.PutUint16(e[36:], s.len)
		}
		copy(p[at+len(slots)*wideBytes:], log)
		tr.table = crc(p[at:trailerOffset])
		tr.stripe = crc(p[SegmentBytes-StripeBytes : trailerOffset])
		tr.encode(p[trailerOffset:])
		for i := 0; i < SegmentBytes; i += BlockBytes {
			if b := p[i : i+BlockBytes]; !isZero(b) {
				sh.segments.pages[base+int64(i)] = b
			}
		}
		segments++
	}
	for at := int64(0); at < 2*BlockBytes; at += BlockBytes {
		if p := read(sh.journal, at, BlockBytes); !isZero(p) {
			le.PutUint32(p[12:], 1)
			le.PutUint32(p[8:], crc(p[12:]))
			sh.journal.pages[at] = p
		}
	}
	return segments
}

// A store of version 1 is read, from its checkpoint and from its segments' logs, finds duplicates of what it has, is cleaned, and goes on as
// version 2.
func TestVersion1(t *testing.T) {
	for _, well := range []bool{true, false} {
		t.Run(fmt.Sprintf("closed %v", well), func(t *testing.T) {
			sh := newShelf(t, 1)
			ctx := t.Context()
			st := open(t, sh.options())
			_, err := st.CreateVolume(ctx, "v", 1<<30)
			must(t, err)
			v := volume(t, st, "v")
			one, two := text(1, 600), text(2, 600)
			must(t, v.Write(ctx, 0, one))
			must(t, st.Checkpoint(ctx))
			must(t, v.Write(ctx, 5000, two))
			must(t, st.Sync(ctx))
			if well {
				must(t, st.Close(ctx))
			} else {
				st.stop()
			}
			if n := asVersion1(t, sh); n == 0 {
				t.Fatal("no segment")
			}
			o := sh.options()
			o.CapacityBytes = 64 * SegmentBytes
			st = open(t, o)
			v = volume(t, st, "v")
			wantBlocks(t, v, 0, one)
			wantBlocks(t, v, 5000, two)
			warmed(t, st)
			before := v.Info()
			must(t, v.Write(ctx, 100000, one))
			must(t, st.Sync(ctx))
			if added := v.Info().UniqueBytes - before.UniqueBytes; added != 0 {
				t.Errorf("%d bytes were stored again", added)
			}
			if _, err := st.Snapshot(ctx, "now", "v"); err != nil {
				t.Error(err)
			}
			place := func() loc {
				return placeOf(t, v, 5000)
			}
			first := place()
			for i := uint64(0); place() == first && i < 400; i++ { // until the cleaner has been there
				if err := v.Write(ctx, 1<<17, noise(1000+i, 500)); errors.Is(err, target.ErrNoSpace) {
					must(t, st.Checkpoint(ctx))
				} else {
					must(t, err)
				}
			}
			if place() == first {
				t.Errorf("it was not moved: %+v", st.Stats())
			}
			st = reopen(t, st, sh, false)
			v = volume(t, st, "v")
			wantBlocks(t, v, 5000, two)
			wantBlocks(t, v, 100000, one)
			wantBlocks(t, snapshotOf(t, st, "v", "now"), 0, one)
			must(t, st.Close(ctx))
			sh.p.mu.Lock()
			s, err := decodeSuperblock(sh.journal.pages[0])
			version := le.Uint32(sh.journal.pages[0][12:])
			sh.p.mu.Unlock()
			if err != nil || version != superVersion {
				t.Errorf("version %d, %v, %+v", version, err, s)
			}
		})
	}
}

// A store that an agent of version 2 wrote and left without closing: checkpoint with whole maps, then a log of segments and records.
// Volume v has a snapshot s and a clone c; "gone" was deleted.
func TestVersion2(t *testing.T) {
	data, err := os.ReadFile("testdata/version2.gz")
	must(t, err)
	z, err := gzip.NewReader(bytes.NewReader(data))
	must(t, err)
	var luns []map[int64][]byte
	must(t, gob.NewDecoder(z).Decode(&luns))
	sh, ctx := newShelf(t, 1), t.Context()
	sh.journal.pages, sh.segments.pages = luns[0], luns[1]
	o := sh.options()
	o.MapBytes = 1
	o.CapacityBytes = 64 * SegmentBytes
	const step = 170001
	one := func(seed uint64) []byte { return bytes.Repeat(text(seed, 1)[:128], 32) }
	for round := range 3 {
		st := open(t, o)
		if len(st.Volumes()) != 2 {
			t.Fatalf("%+v", st.Volumes())
		}
		v, c, s := volume(t, st, "v"), volume(t, st, "c"), snapshotOf(t, st, "v", "s")
		for i := range uint64(16) {
			wantBlocks(t, s, i*step, one(i))
			wantBlocks(t, c, i*step, one(i))
			switch {
			case i < 5:
				wantBlocks(t, v, i*step, one(100+i))
				wantBlocks(t, c, i*step+1, one(200+i))
			case i == 7:
				wantBlocks(t, v, i*step, make([]byte, 600*BlockBytes))
			default:
				wantBlocks(t, v, i*step, one(i))
			}
		}
		must(t, c.Write(ctx, 3000, noise(uint64(round), 300)))
		if round == 1 {
			st.stop()
			continue
		}
		must(t, st.Checkpoint(ctx))
		checkCounts(t, st)
		must(t, st.Close(ctx))
		if got := le.Uint32(sh.journal.pages[0][12:]); got != superVersion {
			t.Errorf("version %d", got)
		}
	}
}
