package main

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// A memory holds the LUN's bytes, as -memory asks: the floor of a target that keeps what it is given. A read is sent from
// its place without a copy by us; a write is copied there once, as its place is not known before its header is read.
type memory []byte

// newMemory takes bytes from the system, in huge pages where it has them, and touches all.
func newMemory(bytes uint64) (memory, error) {
	m, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("memory of %d bytes: %w", bytes, err)
	}
	for _, advice := range []int{unix.MADV_HUGEPAGE, unix.MADV_POPULATE_WRITE} {
		if err := unix.Madvise(m, advice); err != nil {
			return nil, fmt.Errorf("memory of %d bytes: %w", bytes, err)
		}
	}
	return m, nil
}

// place is where the data of a READ or WRITE with header h lie, n bytes at most; ok is false for another command
// and for what is beyond the end.
func (m memory) place(h *[bhsBytes]byte, n int) (at uint64, ok bool) {
	cdb := h[32:]
	switch cdb[0] {
	case 0x28, 0x2a:
		at = uint64(binary.BigEndian.Uint32(cdb[2:]))
	case 0x88, 0x8a:
		at = binary.BigEndian.Uint64(cdb[2:])
	default:
		return 0, false
	}
	if at > uint64(len(m))/512 || at*512+uint64(n) > uint64(len(m)) {
		return 0, false
	}
	return at * 512, true
}

// into is where the data segment that follows h is to be stored, nil for nowhere.
func (s *session) into(h *[bhsBytes]byte) []byte {
	if s.memory == nil {
		return nil
	}
	n := uint64(segment(h))
	switch h[0] & 0x3f {
	case command:
		if at, ok := s.memory.place(h, int(binary.BigEndian.Uint32(h[20:]))); ok && h[1]&writes != 0 {
			return s.memory[at : at+n]
		}
	case dataOut:
		for _, w := range s.writes {
			if w.tag != binary.BigEndian.Uint32(h[16:]) || !w.stored {
				continue
			}
			if at := w.at + uint64(binary.BigEndian.Uint32(h[40:])); at+n <= uint64(len(s.memory)) {
				return s.memory[at : at+n]
			}
		}
	}
	return nil
}
