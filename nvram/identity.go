package nvram

import (
	"errors"
	"fmt"
)

// Identity says whose NVRAM a region is: of which shelf, and of which of its controllers. The log ID already keeps a
// strange log from being replayed; the identity says, before anything is opened, which module a technician
// put into the wrong slot.
type Identity struct {
	Shelf      string // at most MaxShelfName bytes
	Controller byte   // 'A' or 'B'; 0: not known
}

// MaxShelfName is the longest shelf name, in bytes.
const MaxShelfName = 64

func (id Identity) String() string {
	if id == (Identity{}) {
		return "unknown"
	}
	return id.Shelf + "/" + string(id.Controller)
}

func (id Identity) valid() bool {
	return id == Identity{} || len(id.Shelf) > 0 && len(id.Shelf) <= MaxShelfName && (id.Controller == 'A' || id.Controller == 'B')
}

var (
	// ErrSwapped: the region is the partner's, of the same shelf.
	ErrSwapped = errors.New("nvram: region belongs to the partner controller")
	// ErrResized: the region is shorter or longer than it was.
	ErrResized = errors.New("nvram: region changed its size")
)

// Identify reads whose region r is, from its own log's area or else its mirror's. It is not known for one that is
// empty, or was last written before identities were (2026-11-26). size is what the region's was, 0 if not known.
func Identify(r Region) (id Identity, size int64, err error) {
	own, mirror := Areas(r.Size())
	for _, a := range []Area{own, mirror} {
		buf := AlignedBlocks(superBlocks)
		if _, err := r.ReadAt(buf, a.Off); err != nil {
			return Identity{}, 0, fmt.Errorf("nvram: read superblock: %w", err)
		}
		var best super
		for i := range superBlocks {
			// A geometry that does not fit the area is no reason not to read whose it is.
			s, _ := decodeSuper(buf[i*BlockBytes:][:BlockBytes], a.Size)
			if s.of != (Identity{}) && s.seq >= best.seq {
				best = s
			}
		}
		if best.of != (Identity{}) {
			return best.of, int64(best.regionBytes), nil
		}
	}
	return Identity{}, 0, nil
}

// CheckIdentity tells whether r is id's region, of the size that it had. ErrForeign: another shelf's; ErrSwapped: the
// partner's; ErrResized. A region whose identity is not known passes: it is empty, which the log's or mirror's
// opening says, or it takes the identity with the next superblock.
func CheckIdentity(r Region, id Identity) error {
	found, size, err := Identify(r)
	switch {
	case err != nil:
		return err
	case found == Identity{}:
		return nil
	case found.Shelf != id.Shelf:
		return fmt.Errorf("%w: it is of shelf %s, controller %c; this is shelf %s, controller %c. Put it back there. To use it here, and "+
			"lose what it holds, erase it as %s", ErrForeign, found.Shelf, found.Controller, id.Shelf, id.Controller, found)
	case found.Controller != id.Controller:
		return fmt.Errorf("%w: it is of controller %c, this is controller %c. Exchange the two modules, or the controllers' "+
			"configurations, so that each controller has its own", ErrSwapped, found.Controller, id.Controller)
	case size > r.Size():
		return fmt.Errorf("%w: it had %d bytes, and has %d: the end of it is cut off. Give it back its size; if that is lost, "+
			"order a takeover on the partner, then erase it as %s", ErrResized, size, r.Size(), found)
	case size < r.Size():
		return fmt.Errorf("%w: it had %d bytes, and has %d. Set its size to %d, or order a takeover on the partner and erase it as %s",
			ErrResized, size, r.Size(), size, found)
	}
	return nil
}

// Erase makes r empty: its logs are gone for good. as must be its identity, so that the wrong module is not erased by a
// habit; "unknown" where it has none.
func Erase(r Region, as string) error {
	found, size, err := Identify(r)
	if err != nil {
		return err
	}
	if as != found.String() {
		return fmt.Errorf("nvram: erase: the region is %s, not %s: %w", found, as, ErrForeign)
	}
	own, mirror := Areas(r.Size())
	areas := []Area{own, mirror}
	if _, was := Areas(size); size > 0 && was.Off+superBlocks*BlockBytes <= r.Size() {
		areas = append(areas, was) // where the mirror was before the region grew
	}
	for _, a := range areas {
		if _, err := r.WriteAt(AlignedBlocks(superBlocks), a.Off); err != nil {
			return fmt.Errorf("nvram: erase: %w", err)
		}
	}
	return nil
}
