package initiator

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// answers are parameter data of real targets (tgtd 1.0.85, and our own engine), kept as hex in testdata/answers.json with
// what they mean.
type goldenAnswer struct {
	Name, Kind, Hex, Means string
}

func decodeAny(kind string, b []byte) (string, error) {
	switch kind {
	case "identity":
		id, err := decodeIdentity(b)
		return fmt.Sprintf("unit %s group %d port %d", id.unit, id.group, id.port), err
	case "limits":
		l, err := decodeLimits(b)
		return fmt.Sprintf("%+v", l), err
	case "capacity":
		n, bs, err := decodeCapacity(b)
		return fmt.Sprintf("%d blocks of %d", n, bs), err
	case "groups":
		g, err := decodePortGroups(b)
		return fmt.Sprint(g), err
	case "sense":
		key, code, ok := decodeSense(b)
		return fmt.Sprintf("key %x code %04x known %v", key, code, ok), nil
	}
	return "", errors.New("kind " + kind)
}

func TestGolden(t *testing.T) {
	b, err := os.ReadFile("testdata/answers.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []goldenAnswer
	if err := json.Unmarshal(b, &all); err != nil || len(all) == 0 {
		t.Fatal(err, len(all))
	}
	for _, g := range all {
		raw, err := hex.DecodeString(g.Hex)
		if err != nil {
			t.Fatal(g.Name, err)
		}
		if got, err := decodeAny(g.Kind, raw); err != nil || got != g.Means {
			t.Errorf("%s: %q, %v; want %q", g.Name, got, err, g.Means)
		}
		if g.Kind == "sense" {
			continue
		}
		// What is cut short is an error or means less, and never a crash.
		for n := range raw {
			if _, err := decodeAny(g.Kind, raw[:n]); err != nil && !errors.Is(err, ErrMalformed) {
				t.Errorf("%s cut to %d: %v", g.Name, n, err)
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, _ := os.ReadFile("testdata/answers.json")
	var all []goldenAnswer
	json.Unmarshal(b, &all)
	for _, g := range all {
		raw, _ := hex.DecodeString(g.Hex)
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, kind := range []string{"identity", "limits", "capacity", "groups", "sense"} {
			if _, err := decodeAny(kind, b); err != nil && !errors.Is(err, ErrMalformed) {
				t.Fatalf("%s: %v", kind, err)
			}
		}
		if n, bs, err := decodeCapacity(b); err == nil && (int64(n) <= 0 || int64(n)*int64(bs) <= 0) {
			t.Fatalf("capacity of %d blocks of %d", n, bs)
		}
	})
}

// Pieces never cross a multiple of the optimal length that fits, and never exceed any limit.
func TestUnitBytes(t *testing.T) {
	for _, c := range []struct {
		max, optimal uint32
		config       int
		want         int64
	}{{0, 0, 0, 1 << 20}, {0, 256, 0, 1 << 20}, {0, 192, 0, 786432}, {0, 512, 0, 2 << 20}, {128, 256, 0, 512 << 10}, {2048, 192, 0, 786432}, {0, 0, 64 << 10, 64 << 10}, {0, 192, 2 << 20, 2 * 786432}, {0, 8192, 0, 16 << 20}, {1, 0, 0, 4096}} {
		d := Device{cfg: Config{MaxTransfer: c.config}}
		if got := d.unitBytes(shape{blockBytes: 4096, limits: limits{maxTransfer: c.max, optimal: c.optimal}}); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// Our table is the reverse of the engine's: each sentinel survives the wire.
func TestSentinelsSurvive(t *testing.T) {
	for code, want := range map[[2]uint16]error{{7, 0x2707}: target.ErrNoSpace, {7, 0x2700}: target.ErrReadOnly, {7, 0x2702}: target.ErrOverwrite, {3, 0x1100}: target.ErrMediumRead, {3, 0x0c00}: target.ErrMediumWrite, {5, 0x2100}: target.ErrRange, {5, 0x2400}: target.ErrAlignment} {
		if err := definite("x", byte(code[0]), code[1]); !errors.Is(err, want) {
			t.Errorf("%x: %v, want %v", code, err, want)
		}
	}
}
