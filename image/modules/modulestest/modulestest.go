// Package modulestest makes kernel modules for tests.
package modulestest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// ELF is a relocatable object with three sections: none, .modinfo, which holds modinfo, and the section names.
func ELF(modinfo string) []byte {
	names := "\x00.modinfo\x00.shstrtab\x00"
	const headerBytes, sectionBytes = 64, 64
	infoAt := uint64(headerBytes)
	namesAt := infoAt + uint64(len(modinfo))
	sectionsAt := namesAt + uint64(len(names))
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Shoff: sectionsAt, Ehsize: headerBytes, Shentsize: sectionBytes, Shnum: 3, Shstrndx: 2,
	})
	b.WriteString(modinfo)
	b.WriteString(names)
	for _, s := range []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: infoAt, Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))},
	} {
		binary.Write(&b, binary.LittleEndian, s)
	}
	return b.Bytes()
}
