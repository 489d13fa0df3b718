package gotgt

import (
	"context"
	"fmt"

	"github.com/gostor/gotgt/pkg/api"

	"github.com/ledge-storage/ledge/target"
)

// Store is the other direction: a target.Device as a backing store of gotgt. gotgt passes no
// context, so a command that it abandons runs to its end.
type Store struct{ dev target.Device }

// NewStore returns dev as a backing store. Closing it does not close dev.
func NewStore(dev target.Device) *Store { return &Store{dev} }

var _ api.BackingStore = (*Store)(nil)

// Open implements api.BackingStore.
func (s *Store) Open(*api.SCSILu, string) error { return nil }

// Close implements api.BackingStore.
func (s *Store) Close(*api.SCSILu) error { return nil }

// Init implements api.BackingStore.
func (s *Store) Init(*api.SCSILu, string) error { return nil }

// Exit implements api.BackingStore.
func (s *Store) Exit(*api.SCSILu) error { return nil }

// Size implements api.BackingStore.
func (s *Store) Size(*api.SCSILu) uint64 {
	i := s.dev.Info()
	return i.Blocks * uint64(i.BlockBytes)
}

// blocks turns bytes into blocks; gotgt's offsets and lengths are multiples of its own block size,
// which must be the device's.
func (s *Store) blocks(off, n int64) (lba, blocks uint64, err error) {
	size := int64(s.dev.Info().BlockBytes)
	if off < 0 || n < 0 || off%size != 0 || n%size != 0 {
		return 0, 0, fmt.Errorf("gotgt: %d bytes at %d: %w", n, off, target.ErrAlignment)
	}
	return uint64(off / size), uint64(n / size), nil
}

// Read implements api.BackingStore.
func (s *Store) Read(off, n int64) ([]byte, error) {
	lba, blocks, err := s.blocks(off, n)
	if err != nil {
		return nil, err
	}
	if i := s.dev.Info(); lba > i.Blocks || blocks > i.Blocks-lba {
		return nil, fmt.Errorf("gotgt: %d bytes at %d: %w", n, off, target.ErrRange)
	}
	b := make([]byte, n)
	if n == 0 {
		return b, nil
	}
	return b, s.dev.Read(context.Background(), lba, [][]byte{b})
}

// Write implements api.BackingStore.
func (s *Store) Write(b []byte, off int64) error {
	lba, _, err := s.blocks(off, int64(len(b)))
	if err != nil || len(b) == 0 {
		return err
	}
	return s.dev.Write(context.Background(), lba, [][]byte{b}, false)
}

// DataSync implements api.BackingStore.
func (s *Store) DataSync(int64, int64) error { return s.dev.Flush(context.Background()) }

// DataAdvise implements api.BackingStore.
func (s *Store) DataAdvise(int64, int64, uint32) error { return nil }

// Unmap implements api.BackingStore.
func (s *Store) Unmap(descriptors []api.UnmapBlockDescriptor) error {
	var ranges []target.Range
	for _, d := range descriptors {
		lba, blocks, err := s.blocks(int64(d.Offset), int64(d.TL))
		if err != nil {
			return err
		}
		ranges = append(ranges, target.Range{LBA: lba, Blocks: blocks})
	}
	return s.dev.Unmap(context.Background(), ranges)
}
