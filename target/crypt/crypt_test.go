package crypt

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/devicetest"
	"github.com/ledge-storage/ledge/target/mem"
)

// vault is a Keys whose power may be cut before or after a replacement is durable.
type vault struct {
	key         []byte
	cut         error // what Replace returns
	beforeStore bool
}

func (v *vault) Load() ([]byte, error) { return bytes.Clone(v.key), nil }
func (v *vault) Replace(key []byte) error {
	if v.cut != nil && v.beforeStore {
		return v.cut
	}
	v.key = bytes.Clone(key)
	return v.cut
}

func inner(t *testing.T, size uint32) *mem.Device {
	t.Helper()
	m, err := mem.New(mem.Options{Bytes: 2 << 20, BlockBytes: size, Name: "inner"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func open(t *testing.T, m target.Device, v *vault) target.Eraser {
	t.Helper()
	d, err := New(m, v)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func read(t *testing.T, d target.Device, lba uint64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if err := d.Read(context.Background(), lba, [][]byte{b}); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDevice(t *testing.T) {
	for _, size := range []uint32{512, 4096} {
		m, err := mem.New(mem.Options{Bytes: 192 << 10, BlockBytes: size, Name: "small"}) // XTS is slow under the race detector
		if err != nil {
			t.Fatal(err)
		}
		devicetest.Run(t, open(t, m, &vault{}), 5)
	}
}

// TestStored: nothing of the data is below, each block is stored differently, zeros take no room, and
// the same key reads it all again.
func TestStored(t *testing.T) {
	m, v, ctx := inner(t, 512), &vault{}, context.Background()
	d := open(t, m, v)
	if _, ok := d.(target.Provisioned); !ok {
		t.Error("the pool is hidden")
	}
	block := bytes.Repeat([]byte("secret! "), 64)
	if err := d.Write(ctx, 8, [][]byte{block, block}, false); err != nil {
		t.Fatal(err)
	}
	raw := read(t, m, 8, 1024)
	if bytes.Contains(raw, []byte("secret")) || bytes.Equal(raw[:512], raw[512:]) || bytes.Equal(raw[:16], raw[16:32]) {
		t.Errorf("stored % x", raw[:32])
	}
	if err := d.Write(ctx, 8, [][]byte{make([]byte, 1024)}, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, m, 8, 1024), make([]byte, 1024)) {
		t.Error("zeros are stored as something else")
	}
	if err := d.Write(ctx, 9, [][]byte{block}, false); err != nil {
		t.Fatal(err)
	}
	if got := read(t, open(t, m, v), 9, 512); !bytes.Equal(got, block) {
		t.Errorf("after a restart % x", got[:16])
	}
}

// TestEraseKey: wherever the power is cut, the old data are either all there or all gone; once EraseKey
// returned nil they are gone, whatever the medium still holds.
func TestEraseKey(t *testing.T) {
	cut := errors.New("power cut")
	for _, x := range []struct {
		name        string
		err         error
		beforeStore bool
		survives    bool
	}{
		{"done", nil, false, false},
		{"cut before the new key is stored", cut, true, true},
		{"cut after the new key is stored", cut, false, false},
	} {
		m, v, ctx := inner(t, 512), &vault{}, context.Background()
		d := open(t, m, v)
		block := bytes.Repeat([]byte{0xA5}, 512)
		for lba := uint64(0); lba < 4096; lba += 512 {
			if err := d.Write(ctx, lba, [][]byte{block}, true); err != nil {
				t.Fatal(err)
			}
		}
		stored := read(t, m, 512, 512)
		v.cut, v.beforeStore = x.err, x.beforeStore
		if err := d.EraseKey(ctx); !errors.Is(err, x.err) {
			t.Errorf("%s: %v", x.name, err)
		}
		v.cut = nil
		if !x.survives { // an attacker puts back what the medium held
			if err := m.Write(ctx, 512, [][]byte{stored}, true); err != nil {
				t.Fatal(err)
			}
		}
		for name, again := range map[string]target.Device{"running": d, "restarted": open(t, m, v)} {
			for _, lba := range []uint64{512, 1024} {
				if got := read(t, again, lba, 512); bytes.Equal(got, block) != x.survives {
					t.Errorf("%s, %s: block %d % x", x.name, name, lba, got[:16])
				}
			}
			if err := again.Write(ctx, 7, [][]byte{block}, true); err != nil {
				t.Error(err)
			}
		}
		if got := read(t, open(t, m, v), 7, 512); !bytes.Equal(got, block) {
			t.Errorf("%s: what was written after it % x", x.name, got[:16])
		}
	}
}

func TestBadKeys(t *testing.T) {
	for _, key := range [][]byte{make([]byte, 32), make([]byte, 64)} {
		if _, err := New(inner(t, 512), &vault{key: key}); err == nil {
			t.Errorf("a key of %d equal bytes is taken", len(key))
		}
	}
}
