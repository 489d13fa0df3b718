package nvram_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	. "github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// resized is a region seen with another size.
type resized struct {
	*nvramtest.Region
	size int64
}

func (r resized) Size() int64 { return r.size }

// A region that is another's, or not of its size, is told so in words that say what to do; one that was made before
// identities passes, and takes one with the next opening.
func TestIdentity(t *testing.T) {
	ctx := context.Background()
	a := Identity{"s1", 'A'}
	const size = 4 << 20
	own, mirror := Areas(size)
	id := NewID()
	format := func(of Identity) *nvramtest.Region {
		r := nvramtest.NewRegion(2*size, 512, 1)
		if err := Format(resized{r, size}, own, FormatOptions{ID: id, Epoch: 3, Identity: of}); err != nil {
			t.Fatal(err)
		}
		return r
	}
	open := func(r Region, of Identity) {
		t.Helper()
		l, err := Open(ctx, r, own, Options{ID: id, Epoch: 3, Identity: of})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	known, old := format(a), format(Identity{})
	grown := format(a)
	for _, c := range []struct {
		what string
		r    Region
		id   Identity
		want error
		text string
	}{
		{"own", resized{known, size}, a, nil, ""},
		{"another shelf's", resized{known, size}, Identity{"s2", 'A'}, ErrForeign, "of shelf s1, controller A; this is shelf s2, controller A"},
		{"the partner's", resized{known, size}, Identity{"s1", 'B'}, ErrSwapped, "of controller A, this is controller B"},
		{"truncated", resized{known, size / 2}, a, ErrResized, "it had 4194304 bytes, and has 2097152"},
		{"grown", resized{grown, 2 * size}, a, ErrResized, "Set its size to 4194304"},
		{"empty", nvramtest.NewRegion(size, 512, 1), a, nil, ""},
		{"from before identities", resized{old, size}, Identity{"s9", 'B'}, nil, ""},
	} {
		err := CheckIdentity(c.r, c.id)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
	// An opening without an identity keeps the one that is there; one with it gives it.
	open(resized{known, size}, Identity{})
	if of, n, err := Identify(resized{known, size}); of != a || n != size || err != nil {
		t.Fatal(of, n, err)
	}
	open(resized{old, size}, a)
	if of, n, err := Identify(resized{old, size}); of != a || n != size || err != nil {
		t.Fatal(of, n, err)
	}
	// A standby's region has the mirror only.
	r := nvramtest.NewRegion(size, 512, 1)
	m, err := OpenMirror(r, mirror)
	if err != nil {
		t.Fatal(err)
	}
	m.Identify(Identity{"s1", 'B'})
	room := uint64(mirror.Size - 2*BlockBytes)
	st := Start{ID: id, Epoch: 3, Run: 1, RunLSN: 1, Bytes: [2]uint64{room / 2, room / 2}, Full: true, Resume: 1}
	for i := range st.Tail {
		st.Tail[i] = Position{LSN: 1, Off: uint64(i) * (room / 2), Seq: 1}
		st.Head[i] = st.Tail[i]
	}
	if err := m.Begin(st); err != nil {
		t.Fatal(err)
	}
	if err := CheckIdentity(r, a); !errors.Is(err, ErrSwapped) {
		t.Fatalf("the partner's mirror: %v", err)
	}
	if err := m.Trim(st.Tail); err != nil { // the next superblock says it, too
		t.Fatal(err)
	}
	if of, _, err := Identify(r); of != (Identity{"s1", 'B'}) || err != nil {
		t.Fatal(of, err)
	}
	// Erase takes the right name only.
	for _, as := range []string{"", "unknown", "s1/A", "s2/B"} {
		if err := Erase(r, as); !errors.Is(err, ErrForeign) {
			t.Fatalf("erased as %q: %v", as, err)
		}
	}
	if err := Erase(r, "s1/B"); err != nil {
		t.Fatal(err)
	}
	if m, err = OpenMirror(r, mirror); err != nil || m.State() != (MirrorState{}) {
		t.Fatal(m.State(), err)
	}
	if err := Erase(resized{grown, 2 * size}, "s1/A"); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(resized{grown, 2 * size}, Area{Size: size}); !errors.Is(err, ErrEmpty) {
		t.Fatalf("after erase: %v", err)
	}
	// Names are bounded.
	for _, bad := range []Identity{{strings.Repeat("x", MaxShelfName+1), 'A'}, {"", 'A'}, {"s", 'C'}, {"s", 0}} {
		if err := Format(r, own, FormatOptions{ID: id, Identity: bad}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if err := Format(r, own, FormatOptions{ID: id, Identity: Identity{strings.Repeat("x", MaxShelfName), 'A'}}); err != nil {
		t.Fatal(err)
	}
	if of, _, _ := Identify(r); of.Shelf != strings.Repeat("x", MaxShelfName) {
		t.Fatal(of)
	}
}
