package main

import (
	"bytes"
	"context"
	"debug/pe"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"github.com/diskfs/go-diskfs/partition/gpt"
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
	parts := []section{{".cmdline", []byte("quiet")}, {".linux", bytes.Repeat([]byte("k"), 5000)}, {".initrd", []byte("i")}}
	out, err := unify(testStub(), parts)
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
		if err != nil || s.Name != p.name || !bytes.Equal(data[:s.VirtualSize], p.data) {
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
		if _, err := unify(good[:n], []section{{".x", []byte("x")}}); !errors.Is(err, errStub) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	many := make([]section, 15) // the headers have room for 14 more
	for i := range many {
		many[i] = section{".x", []byte("x")}
	}
	for _, sections := range [][]section{many, {{".toolongname", []byte("x")}}, {{".empty", nil}}} {
		if _, err := unify(good, sections); err == nil {
			t.Errorf("%d sections, first %s: accepted", len(sections), sections[0].name)
		}
	}
}

func FuzzUnify(f *testing.F) {
	f.Add(testStub())
	f.Fuzz(func(t *testing.T, stub []byte) {
		out, err := unify(stub, []section{{".linux", []byte("kernel")}})
		if err == nil && !bytes.Contains(out, []byte("kernel")) {
			t.Error("the section is missing")
		}
	})
}

// TestDisk reads a disk back, and compares two of the same inputs, one made with another idea of the time.
func TestDisk(t *testing.T) {
	uki := bytes.Repeat([]byte("unified kernel image "), 100000)
	var made [2][]byte
	for i := range made {
		t.Setenv("SOURCE_DATE_EPOCH", []string{"", "1"}[i])
		path := filepath.Join(t.TempDir(), "disk.img")
		if err := writeDisk(path, "qemu-q35", uki); err != nil {
			t.Fatal(err)
		}
		var err error
		if made[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		table, err := gpt.Read(f, sectorBytes, sectorBytes)
		if err != nil {
			t.Fatal(err)
		}
		if err := table.Verify(f, diskBytes); err != nil {
			t.Error(err)
		}
		names := ""
		for _, p := range table.Partitions {
			if p.Type != gpt.Unused {
				names += p.Name + " "
			}
		}
		if names != "ledge-A ledge-B ledge-state " {
			t.Errorf("partitions %s", names)
		}
		slot, err := fat32.Read(file.New(f, true), slotBytes, mib, sectorBytes)
		if err != nil {
			t.Fatal(err)
		}
		if data, err := slot.ReadFile(slotFile); err != nil || !bytes.Equal(data, uki) {
			t.Errorf("slot A has %d bytes of %d, %v", len(data), len(uki), err)
		}
		state, err := fat32.Read(file.New(f, true), stateBytes, mib+2*slotBytes, sectorBytes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := state.ReadDir(stateDir[1:]); err != nil {
			t.Errorf("state: %v", err)
		}
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("two disks of the same inputs differ")
	}
}

// TestUnifiedImageOfAStubFromDebian is skipped where no build fetched the stub.
func TestUnifiedImageOfAStubFromDebian(t *testing.T) {
	o := Options{Cache: "../build/cache", Say: t.Logf}
	if _, err := os.Stat(filepath.Join(o.Cache, stubPackage, stubPath)); err != nil {
		t.Skip("build/cache has no stub")
	}
	stub, err := fetchStub(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	out, err := unify(stub, []section{{".linux", []byte("kernel")}})
	if err != nil {
		t.Fatal(err)
	}
	if f, err := pe.NewFile(bytes.NewReader(out)); err != nil || f.Section(".linux") == nil || f.Section(".sdmagic") == nil {
		t.Errorf("%v", err)
	}
}
