// Package uki makes unified kernel images. One is one program of UEFI: systemd-boot's stub with the kernel, the initramfs and the
// command line as further PE sections, which the stub finds by name. What objcopy would do is here
// because it is little: append the bytes, name them in the section table, enlarge the image.
//
//	PE header, counted from "PE\0\0"     size  what is read or changed (little endian; PE format, Microsoft)
//	  6   number of sections             2     raised
//	  8   time, 12 symbols, 16 symbols   4     set to 0: the stub's symbols are left out
//	  20  size of the optional header    2     read
//	  24  optional header: magic         2     must be 0x20b, PE32+
//	  24+32 section alignment            4     read
//	  24+36 file alignment               4     read
//	  24+56 size of the image in memory  4     raised
//	  24+60 size of the headers          4     read: the section table must stay within
//	  24+64 checksum                     4     set to 0: not used by UEFI
//	  24+size of the optional header     40×n  section table: name 8, size 4, address 4, size in file 4,
//	                                           place in file 4, 12 unused, flags 4
package uki

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	peOptional  = 24
	peSection   = 40
	peReadData  = 0x40000040 // initialized data, readable
	pageBytes   = 4096       // the kernel wants to lie on a page, and the initramfs likes it
	maxUKIBytes = 1 << 30
)

// ErrStub: what was given as a stub is none.
var ErrStub = errors.New("not a PE32+ stub that can be extended")

// Section is one named part of a unified kernel image.
type Section struct {
	Name string // at most 8 bytes
	Data []byte
}

// Unify appends the sections to the stub. Its error is ErrStub, or names the section that is too long.
func Unify(stub []byte, sections []Section) ([]byte, error) {
	le := binary.LittleEndian
	// 1. Find the headers; every place is checked before it is used.
	if len(stub) < 64 || stub[0] != 'M' || stub[1] != 'Z' {
		return nil, fmt.Errorf("%w: no MZ", ErrStub)
	}
	pe := int(le.Uint32(stub[60:]))
	if pe < 64 || pe > len(stub)-peOptional-68 || !bytes.Equal(stub[pe:pe+4], []byte("PE\x00\x00")) {
		return nil, fmt.Errorf("%w: no PE header", ErrStub)
	}
	count, optional := int(le.Uint16(stub[pe+6:])), pe+peOptional
	table := optional + int(le.Uint16(stub[pe+20:]))
	sectionAlign, fileAlign := int(le.Uint32(stub[optional+32:])), int(le.Uint32(stub[optional+36:]))
	headerBytes := int(le.Uint32(stub[optional+60:]))
	switch {
	case le.Uint16(stub[optional:]) != 0x20b:
		return nil, fmt.Errorf("%w: not PE32+", ErrStub)
	case sectionAlign < 1 || sectionAlign > 1<<20 || fileAlign < 1 || fileAlign > 1<<20:
		return nil, fmt.Errorf("%w: alignments %d and %d", ErrStub, sectionAlign, fileAlign)
	case headerBytes > len(stub) || table+(count+len(sections))*peSection > headerBytes:
		return nil, fmt.Errorf("%w: no room for %d more sections", ErrStub, len(sections))
	}
	// 2. Where its sections end, in memory and in the file: symbols behind them are dropped.
	address, end := 0, headerBytes
	for i := range count {
		s := stub[table+i*peSection:]
		address = max(address, int(le.Uint32(s[12:]))+int(le.Uint32(s[8:])))
		end = max(end, int(le.Uint32(s[20:]))+int(le.Uint32(s[16:])))
	}
	if end > len(stub) || address > maxUKIBytes {
		return nil, fmt.Errorf("%w: it is cut off", ErrStub)
	}
	out := append([]byte(nil), stub[:end]...)
	// 3. Append.
	for i, s := range sections {
		if len(s.Name) > 8 || len(s.Data) == 0 || len(out)+len(s.Data) > maxUKIBytes {
			return nil, fmt.Errorf("section %s: %d bytes", s.Name, len(s.Data))
		}
		address = roundUp(address, max(sectionAlign, pageBytes))
		out = append(out, make([]byte, roundUp(len(out), fileAlign)-len(out))...)
		entry := out[table+(count+i)*peSection:][:peSection]
		clear(entry)
		copy(entry, s.Name)
		le.PutUint32(entry[8:], uint32(len(s.Data)))
		le.PutUint32(entry[12:], uint32(address))
		le.PutUint32(entry[16:], uint32(roundUp(len(s.Data), fileAlign)))
		le.PutUint32(entry[20:], uint32(len(out)))
		le.PutUint32(entry[36:], peReadData)
		address += len(s.Data)
		out = append(out, s.Data...)
		out = append(out, make([]byte, roundUp(len(out), fileAlign)-len(out))...)
	}
	// 4. The header says so.
	le.PutUint16(out[pe+6:], uint16(count+len(sections)))
	clear(out[pe+8 : pe+20])
	le.PutUint32(out[optional+56:], uint32(roundUp(address, sectionAlign)))
	le.PutUint32(out[optional+64:], 0)
	return out, nil
}

// roundUp rounds n up to a multiple of to.
func roundUp(n, to int) int { return (n + to - 1) / to * to }
