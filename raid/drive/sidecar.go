package drive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/raid"
)

// The sidecar of a file is one 4096-byte block, little-endian, changed under an exclusive flock on itself:
//
//	offset size field
//	0      8    magic "LEDGEPRS"
//	8      4    crc32c of the block, this field zero
//	12     4    number of registrations, at most 64
//	16     8    generation: rises with every change
//	24     8    key of the holder of the reservation, 0 none
//	32     24×  registrations: controller (16 bytes, zero-padded), key (8)
//	…           zero
//
// An empty or absent sidecar means no registrations. Version 1 is in the magic.
const (
	sidecarMagic    = "LEDGEPRS"
	sidecarBytes    = 4096
	sidecarHead     = 32 // magic, checksum, number, generation, holder
	controllerBytes = 16
	maxRegistrants  = 64
)

type sidecar struct {
	generation uint64
	holder     uint64
	entries    []registration
}

type registration struct {
	controller string
	key        uint64
}

func (s *sidecar) keyOf(controller string) uint64 {
	for _, e := range s.entries {
		if e.controller == controller {
			return e.key
		}
	}
	return 0
}

// register sets a controller's key; 0 removes it.
func (s *sidecar) register(controller string, key uint64) error {
	for i := range s.entries {
		if s.entries[i].controller == controller {
			if key == 0 {
				s.entries = append(s.entries[:i], s.entries[i+1:]...)
			} else {
				s.entries[i].key = key
			}
			return nil
		}
	}
	if key == 0 {
		return nil
	}
	if len(s.entries) == maxRegistrants {
		return fmt.Errorf("drive: more than %d registrants", maxRegistrants)
	}
	s.entries = append(s.entries, registration{controller, key})
	return nil
}

// preempt removes others' registrations of a key, and says whether there was one.
func (s *sidecar) preempt(controller string, victim uint64) bool {
	kept := s.entries[:0:0]
	for _, e := range s.entries {
		if e.key != victim || e.controller == controller {
			kept = append(kept, e)
		}
	}
	found := len(kept) != len(s.entries)
	s.entries = kept
	return found
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (s *sidecar) encode() []byte {
	b := make([]byte, sidecarBytes)
	le := binary.LittleEndian
	copy(b, sidecarMagic)
	le.PutUint32(b[12:], uint32(len(s.entries)))
	le.PutUint64(b[16:], s.generation)
	le.PutUint64(b[24:], s.holder)
	for i, e := range s.entries {
		copy(b[32+24*i:], e.controller)
		le.PutUint64(b[48+24*i:], e.key)
	}
	le.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// decodeSidecar returns raid.ErrCorrupt for anything that encode did not make.
func decodeSidecar(b []byte) (*sidecar, error) {
	if len(b) == 0 {
		return new(sidecar), nil
	}
	if len(b) != sidecarBytes || !bytes.Equal(b[:8], []byte(sidecarMagic)) {
		return nil, fmt.Errorf("drive: no sidecar: %w", raid.ErrCorrupt)
	}
	le := binary.LittleEndian
	var zero [4]byte
	sum := crc32.Update(crc32.Checksum(b[:8], castagnoli), castagnoli, zero[:])
	if crc32.Update(sum, castagnoli, b[12:]) != le.Uint32(b[8:]) {
		return nil, fmt.Errorf("drive: sidecar checksum: %w", raid.ErrCorrupt)
	}
	n := le.Uint32(b[12:])
	if n > maxRegistrants {
		return nil, fmt.Errorf("drive: sidecar of %d registrants: %w", n, raid.ErrCorrupt)
	}
	s := &sidecar{generation: le.Uint64(b[16:]), holder: le.Uint64(b[24:])}
	for i := range int(n) {
		e := b[32+24*i:]
		s.entries = append(s.entries, registration{string(bytes.TrimRight(e[:controllerBytes], "\x00")), le.Uint64(e[controllerBytes:])})
	}
	return s, nil
}

// readSidecar reads it without a lock. A reader may meet a change in the middle: then the checksum fails, and it
// reads again.
func (f *File) readSidecar() (*sidecar, error) {
	var err error
	for range 100 {
		file, oerr := f.openSidecar()
		if file == nil || oerr != nil {
			return new(sidecar), oerr
		}
		var b [sidecarBytes]byte
		n, rerr := file.ReadAt(b[:], 0)
		if rerr != nil && rerr != io.EOF {
			return nil, fmt.Errorf("drive: %w", rerr)
		}
		var s *sidecar
		if s, err = decodeSidecar(b[:n]); err == nil {
			return s, nil
		}
	}
	return nil, fmt.Errorf("drive: %s.pr: %w", f.path, err)
}

// openSidecar returns nil while there is none.
func (f *File) openSidecar() (*os.File, error) {
	if file := f.sidecar.Load(); file != nil {
		return file, nil
	}
	file, err := os.Open(f.path + ".pr")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("drive: %w", err)
	}
	if !f.sidecar.CompareAndSwap(nil, file) {
		file.Close()
	}
	return f.sidecar.Load(), nil
}

// change replaces the sidecar under its lock. It is durable when change returns: a fence must outlive a crash.
func (f *File) change(what string, edit func(*sidecar) error) error {
	err := func() error {
		file, err := os.OpenFile(f.path+".pr", os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := lock(int(file.Fd()), unix.LOCK_EX); err != nil {
			return err
		}
		s, err := f.readSidecar()
		if err != nil {
			return err
		}
		if err := edit(s); err != nil {
			return err
		}
		s.generation++
		if _, err := file.WriteAt(s.encode(), 0); err != nil {
			return err
		}
		return file.Sync()
	}()
	if err != nil {
		return fmt.Errorf("drive: %s: %s: %w", f.path, what, err)
	}
	return nil
}
