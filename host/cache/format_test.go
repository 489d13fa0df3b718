package cache

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		os.MkdirAll("testdata", 0o755)
		os.WriteFile(path, got, 0o644)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the format has changed", name)
	}
	return want
}

func exampleTable() table {
	t := table{region: 3, sequence: 77, stores: [][16]byte{storeA, storeB}, entries: make([]entry, maxEntries)}
	t.entries[0], t.entries[1], t.entries[maxEntries-1] = entry{1 << 27, 127, 0, 3}, entry{5, 0, 1, 0}, entry{6, 1, 1, 1}
	return t
}

func exampleLine() (*lineName, []byte) {
	c := &Cache{head: head{id: [16]byte{9, 8, 7}}}
	n := c.lineName(storeA, 5, 6)
	slot := make([]byte, 17*blockBytes)
	encodeLine(slot, &n, lineOf(LineBytes, storeA, 5, 6))
	return &n, slot
}

func TestGolden(t *testing.T) {
	h := head{[16]byte{9, 8, 7}, 32 << 20, LineBytes}
	if got, err := decodeHead(golden(t, "head.golden", h.encode())); err != nil || got != h {
		t.Errorf("%+v %v", got, err)
	}
	s := state{h.id, true, 1 << 40, 77}
	if got, err := decodeState(golden(t, "state.golden", s.encode())); err != nil || got != s {
		t.Errorf("%+v %v", got, err)
	}
	want, got := exampleTable(), table{}
	if err := got.decode(h.id, 3, golden(t, "table.golden", want.encode(h.id))); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v %v", got, err)
	}
	n, slot := exampleLine()
	golden(t, "line.golden", slot[:blockBytes])
	p := make([]byte, LineBytes)
	if err := decodeLine(p, slot, n, 0); err != nil || !bytes.Equal(p, lineOf(LineBytes, storeA, 5, 6)) {
		t.Errorf("line: %v", err)
	}
}

// A block of another line, however whole, is not this line's.
func TestLineProvesItsName(t *testing.T) {
	_, slot := exampleLine()
	c := &Cache{head: head{id: [16]byte{9, 8, 7}}}
	p := make([]byte, 100)
	for what, n := range map[string]lineName{
		"store":      c.lineName(storeB, 5, 6),
		"like store": c.lineName([16]byte{0: 1, 15: 1}, 5, 6),
		"segment":    c.lineName(storeA, 6, 6),
		"line":       c.lineName(storeA, 5, 7),
		"formatting": (&Cache{}).lineName(storeA, 5, 6),
	} {
		if err := decodeLine(p, slot, &n, 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("another %s: %v", what, err)
		}
	}
	n := c.lineName(storeA, 5, 6)
	if err := decodeLine(p, slot[blockBytes:], &n, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another block: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	h := head{[16]byte{9, 8, 7}, 1 << 20, LineBytes}
	s := state{h.id, true, 4, 5}
	tab := exampleTable()
	name, slot := exampleLine()
	f.Add(h.encode())
	f.Add(s.encode())
	f.Add(tab.encode(h.id))
	f.Add(slot[:blockBytes])
	f.Fuzz(func(t *testing.T, p []byte) {
		// Most inputs would fail at their checksum; give them one.
		for _, p := range [][]byte{p, sealedCopy(p)} {
			if got, err := decodeHead(p); err == nil && !bytes.Equal(got.encode(), p) {
				t.Error("head does not survive")
			} else if err != nil && !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			} else if err == nil {
				layoutOf(&got, int64(got.regionBytes)*1000)
			}
			if got, err := decodeState(p); err == nil && !bytes.Equal(got.encode(), p) {
				t.Error("state does not survive")
			} else if err != nil && !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
			var got table
			if err := got.decode(h.id, 3, p); err == nil {
				var again table
				if err := again.decode(h.id, 3, got.encode(h.id)); err != nil || !reflect.DeepEqual(got, again) {
					t.Error("table does not survive")
				}
			} else if !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
		}
		if len(p) == blockBytes {
			out := make([]byte, payloadBytes)
			if err := decodeLine(out, p, name, 0); err == nil && !bytes.Equal(p, slot[:blockBytes]) {
				t.Error("a line that was never written")
			}
		}
	})
}

func sealedCopy(p []byte) []byte {
	if len(p) != blockBytes {
		return p
	}
	return seal(bytes.Clone(p))
}
