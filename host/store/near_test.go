package store

import "testing"

// A store of which the index has room for an eighth finds nearly all duplicates that come in runs, also those of what is old, and after
// an opening that filled the index from the segments. Given room while it works, it finds those that come alone.
func TestIndexTooSmall(t *testing.T) {
	const blocks, run = 1 << 15, 128
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.IndexBytes, o.CapacityBytes = blocks, 0 // 8 bytes an entry
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 64<<30)
	must(t, err)
	v := volume(t, st, "a")
	for i := range uint64(blocks / run) {
		must(t, v.Write(ctx, i*run, noise(i, run)))
	}
	must(t, st.Sync(ctx))
	at := uint64(1 << 20)
	found := func(what string, least, most float64, of int, step uint64, n int) {
		t.Helper()
		before := st.Stats()
		for i := uint64(0); i < blocks/run; i += step {
			p := noise(i*7%(blocks/run), run)
			must(t, v.Write(ctx, at, p[of*BlockBytes:(of+n)*BlockBytes]))
			at += uint64(n)
		}
		must(t, st.Sync(ctx))
		after := st.Stats()
		dup, all := after.Duplicates-before.Duplicates, after.Duplicates+after.Uniques-before.Duplicates-before.Uniques
		share := float64(dup) / float64(all)
		t.Logf("%s: %.3f of %d, index of %d entries", what, share, all, after.IndexEntries)
		if share < least || share > most {
			t.Errorf("%s: %.3f of %d are found, asked %.2f to %.2f", what, share, all, least, most)
		}
	}
	// Measured: 0.94 to 0.99, by the store's key, which is drawn, and by how the journal cuts a run; 0.08 without the tables.
	found("runs", 0.85, 1, 0, 2, run)
	found("blocks alone", 0.02, 1, 77, 3, 1)
	st.stop()
	st = open(t, o)
	v = volume(t, st, "a")
	warmed(t, st)
	st.near = near{}
	found("runs, filled at the opening", 0.85, 1, 0, 3, run)
	must(t, st.ResizeIndex(16<<20))
	warmed(t, st)
	st.near = near{}
	found("blocks alone, with room", 0.99, 1, 99, 1, 1)
	if err := st.ResizeIndex(1 << 20); err == nil {
		t.Error("an index of 1 MiB")
	}
	must(t, st.ResizeIndex(4<<20)) // while it is filled, it is closed
	must(t, st.Close(ctx))
	if st.ResizeIndex(8<<20) == nil {
		t.Error("a store that is closed took an index")
	}
}
