package sim

import (
	"bytes"
	"testing"
)

func filled(c byte) []byte { return bytes.Repeat([]byte{c}, blockBytes) }

func TestHistory(t *testing.T) {
	see := func(h *history, c byte) error { return h.saw(h.look(0, 1), filled(c)) }
	put := func(h *history, c byte) *command { return h.begin(0, [][]byte{filled(c)}) }
	for _, x := range []struct {
		name string
		do   func(h *history) error
		ok   bool
	}{
		{"what is under way is seen, or not", func(h *history) error { put(h, 1); return see(h, 0) }, true},
		{"what was never written", func(h *history) error { put(h, 1); return see(h, 2) }, false},
		{"what was acknowledged stays", func(h *history) error { h.answered(put(h, 1), true); return see(h, 0) }, false},
		{"what was seen stays", func(h *history) error {
			put(h, 1)
			if err := see(h, 1); err != nil {
				return err
			}
			return see(h, 0)
		}, false},
		{"what failed may come later", func(h *history) error {
			h.answered(put(h, 1), false)
			return see(h, 1)
		}, true},
		{"what failed and is not seen then never comes", func(h *history) error {
			h.answered(put(h, 1), false)
			if err := see(h, 0); err != nil {
				return err
			}
			return see(h, 1)
		}, false},
		{"of two at a time either is the later one", func(h *history) error {
			a, b := put(h, 1), put(h, 2)
			h.answered(a, true)
			h.answered(b, true)
			return see(h, 1)
		}, true},
		{"zeros that are seen may be the old ones", func(h *history) error { // seed 2057234
			write, unmap := put(h, 1), put(h, 0)
			if err := see(h, 0); err != nil {
				return err
			}
			h.answered(write, true)
			h.answered(unmap, true)
			return see(h, 0)
		}, true},
		{"of two with the same data one was seen, and the other is to come", func(h *history) error {
			h.answered(put(h, 1), false)
			late := put(h, 1)
			if err := see(h, 1); err != nil {
				return err
			}
			h.answered(put(h, 2), true)
			_ = late
			return see(h, 1)
		}, true},
		{"after an answer what was answered before its begin does not come", func(h *history) error {
			h.answered(put(h, 1), false)
			h.answered(put(h, 2), true)
			return see(h, 1)
		}, false},
	} {
		if err := x.do(newHistory()); (err == nil) != x.ok {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}
