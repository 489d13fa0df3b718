package uki

import (
	"bytes"
	"debug/pe"
	"errors"
	"testing"
)

// testStub is a PE32+ program of one section, with symbols behind it, made by hand.
func testStub() []byte {
	stub := make([]byte, 0x400+0x200, 0x700)
	copy(stub, "MZ")
	stub[60] = 0x80
	h := stub[0x80:]
	copy(h, "PE\x00\x00")
	put := func(off int, values ...byte) { copy(h[off:], values) }
	put(4, 0x64, 0x86)        // machine: x86-64
	put(6, 1)                 // one section
	put(12, 0x00, 0x06, 0, 0) // symbols at 0x600
	put(16, 1)
	put(20, 0xf0)       // optional header
	put(24, 0x0b, 0x02) // PE32+
	put(24+32, 0, 2)    // section alignment 512
	put(24+36, 0, 2)    // file alignment 512
	put(24+56, 0, 0x12) // image: 0x1200
	put(24+60, 0, 4)    // headers: 0x400
	put(24+64, 1, 2, 3, 4)
	put(24+108, 16)                        // data directories
	s := h[24+0xf0:]                       // section table
	copy(s, ".text\x00\x00\x00")           //
	copy(s[8:], []byte{0x34, 1, 0, 0})     // 0x134 bytes
	copy(s[12:], []byte{0, 0x10, 0, 0})    // at 0x1000
	copy(s[16:], []byte{0, 2, 0, 0})       // 0x200 in the file
	copy(s[20:], []byte{0, 4, 0, 0})       // at 0x400
	copy(s[36:], []byte{0x20, 0, 0, 0x60}) // code
	copy(stub[0x400:], "code")
	return append(stub, "symbols and strings"...)
}

// TestUnify reads the result back with the standard library's reader.
func TestUnify(t *testing.T) {
	parts := []Section{{".cmdline", []byte("quiet")}, {".linux", bytes.Repeat([]byte("k"), 5000)}, {".initrd", []byte("i")}}
	out, err := Unify(testStub(), parts)
	if err != nil {
		t.Fatal(err)
	}
	f, err := pe.NewFile(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	h := f.OptionalHeader.(*pe.OptionalHeader64)
	if len(f.Sections) != 4 || h.CheckSum != 0 || f.PointerToSymbolTable != 0 || bytes.Contains(out, []byte("symbols")) {
		t.Errorf("%d sections, checksum %x, symbols at %x", len(f.Sections), h.CheckSum, f.PointerToSymbolTable)
	}
	end := f.Sections[0].VirtualAddress + f.Sections[0].VirtualSize
	for i, p := range parts {
		s := f.Sections[i+1]
		data, err := s.Data()
		if err != nil || s.Name != p.Name || !bytes.Equal(data[:s.VirtualSize], p.Data) {
			t.Errorf("section %s: %d bytes, %v", s.Name, len(data), err)
		}
		if s.VirtualAddress < end || s.VirtualAddress%pageBytes != 0 || s.Offset%h.FileAlignment != 0 {
			t.Errorf("section %s lies at %x, in the file at %x; the one before ends at %x", s.Name, s.VirtualAddress, s.Offset, end)
		}
		end = s.VirtualAddress + s.VirtualSize
	}
	if h.SizeOfImage < end {
		t.Errorf("an image of %x bytes with a section that ends at %x", h.SizeOfImage, end)
	}
}

func TestUnifyRefuses(t *testing.T) {
	good := testStub()
	for n := range len(good) - len("symbols and strings") {
		if _, err := Unify(good[:n], []Section{{".x", []byte("x")}}); !errors.Is(err, ErrStub) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	many := make([]Section, 15) // the headers have room for 14 more
	for i := range many {
		many[i] = Section{".x", []byte("x")}
	}
	for _, sections := range [][]Section{many, {{".toolongname", []byte("x")}}, {{".empty", nil}}} {
		if _, err := Unify(good, sections); err == nil {
			t.Errorf("%d sections, first %s: accepted", len(sections), sections[0].Name)
		}
	}
}

func FuzzUnify(f *testing.F) {
	f.Add(testStub())
	f.Fuzz(func(t *testing.T, stub []byte) {
		out, err := Unify(stub, []Section{{".linux", []byte("kernel")}})
		if err == nil && !bytes.Contains(out, []byte("kernel")) {
			t.Error("the section is missing")
		}
	})
}
