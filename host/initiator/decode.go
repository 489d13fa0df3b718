package initiator

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"

	"github.com/ledge-storage/ledge/target"
)

// What the target says of itself. Every length in it is checked against the bytes that came: the
// target is a stranger too.

// identity is the device identification page (SPC-4 7.8.6).
type identity struct {
	unit        string // the LUN's best designator, type and bytes
	group, port uint16 // zero: the page names none
}

// decodeIdentity reads VPD page 83h: a 4-byte header with the length, then designators of 4 bytes
// {protocol and code set, association and type, reserved, length} and the designator.
func decodeIdentity(b []byte) (id identity, err error) {
	b, err = vitalPage(b, 0x83)
	if err != nil {
		return id, err
	}
	best := 0
	for len(b) > 0 {
		if len(b) < 4 || len(b)-4 < int(b[3]) {
			return id, fmt.Errorf("%w: designator of VPD page 83h ends beyond the page", ErrMalformed)
		}
		kind, association, d := b[1]&0xf, b[1]>>4&3, b[4:4+int(b[3])]
		b = b[4+len(d):]
		switch {
		case association == 1 && kind == 4 && len(d) == 4:
			id.port = binary.BigEndian.Uint16(d[2:])
		case association == 1 && kind == 5 && len(d) == 4:
			id.group = binary.BigEndian.Uint16(d[2:])
		case association == 0 && len(d) > 0:
			// NAA before UUID before EUI-64 before T10: any of them is the same on all paths.
			if rank := map[byte]int{3: 4, 10: 3, 2: 2, 1: 1}[kind]; rank > best {
				best, id.unit = rank, fmt.Sprintf("%d:%s", kind, hex.EncodeToString(d))
			}
		}
	}
	return id, nil
}

// vitalPage checks the header of a VPD page and returns its body.
func vitalPage(b []byte, page byte) ([]byte, error) {
	if len(b) < 4 || b[1] != page {
		return nil, fmt.Errorf("%w: no VPD page %02Xh", ErrMalformed, page)
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n > len(b)-4 {
		return nil, fmt.Errorf("%w: VPD page %02Xh of %d bytes, %d came", ErrMalformed, page, n, len(b)-4)
	}
	return b[4 : 4+n], nil
}

// limits are the Block Limits page (SBC-3 6.6.3), in blocks; zero: not told.
type limits struct {
	maxTransfer, optimal         uint32
	unmapBlocks, unmapRanges     uint32
	unmapGranularity, unmapAlign uint32
}

func decodeLimits(b []byte) (l limits, err error) {
	if b, err = vitalPage(b, 0xb0); err != nil {
		return l, err
	}
	at := func(i int) uint32 { // offsets of the standard, from the page's start
		if i-4+4 > len(b) {
			return 0
		}
		return binary.BigEndian.Uint32(b[i-4:])
	}
	l = limits{maxTransfer: at(8), optimal: at(12), unmapBlocks: at(20), unmapRanges: at(24), unmapGranularity: at(28)}
	if a := at(32); a>>31 == 1 {
		l.unmapAlign = a &^ (1 << 31)
	}
	return l, nil
}

// decodeCapacity reads READ CAPACITY (16) parameter data (SBC-3 5.16.2).
func decodeCapacity(b []byte) (blocks uint64, blockBytes int, err error) {
	if len(b) < 12 {
		return 0, 0, fmt.Errorf("%w: capacity of %d bytes", ErrMalformed, len(b))
	}
	last, size := binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
	if size != 512 && size != 4096 || last >= uint64(math.MaxInt64)/uint64(size) {
		return 0, 0, fmt.Errorf("%w: last block %d of %d bytes", ErrMalformed, last, size)
	}
	return last + 1, int(size), nil
}

// decodePortGroups reads REPORT TARGET PORT GROUPS parameter data (SPC-4 6.36): a length of 4
// bytes, then groups of 8 bytes {preference and state, supported, group (2), reserved, status,
// vendor, port count} and 4 bytes for each port.
func decodePortGroups(b []byte) (map[uint16]target.AccessState, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("%w: %d bytes of port groups", ErrMalformed, len(b))
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, fmt.Errorf("%w: port groups of %d bytes, %d came", ErrMalformed, n, len(b)-4)
	}
	groups := map[uint16]target.AccessState{}
	for b = b[4 : 4+n]; len(b) > 0; {
		if len(b) < 8 || len(b)-8 < 4*int(b[7]) {
			return nil, fmt.Errorf("%w: port group ends beyond the data", ErrMalformed)
		}
		groups[binary.BigEndian.Uint16(b[2:])] = target.AccessState(b[0] & 0xf)
		b = b[8+4*int(b[7]):]
	}
	return groups, nil
}
