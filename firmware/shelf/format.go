package shelf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"unicode/utf8"
)

// The frozen numbers of the formats in doc.go.
const (
	formatVersion = 1
	grownVersion  = 2 // of a superblock with growths

	magicSuper  = "LGsb"
	magicLUN    = "LGlu"
	magicHost   = "LGho"
	magicTable  = "LGxt"
	magicDeltas = "LGdl"
	magicReserv = "LGpr"

	headBytes       = 16
	tableOffset     = 32
	tableEntryBytes = 24
	tableEntries    = (blockBytes - tableOffset) / tableEntryBytes
	deltaBytes      = 40
	maxDeltas       = (blockBytes - tableOffset) / deltaBytes

	maxName      = 64
	maxInitiator = 223
	maxHostLUNs  = 256

	reservationOffset = 32
	reservationBytes  = blockBytes - reservationOffset
)

// ErrCorrupt: a metadata block, or a record of the log, is not what this package wrote.
var ErrCorrupt = errors.New("shelf: corrupt")

var crcTable = crc32.MakeTable(crc32.Castagnoli)

var le = binary.LittleEndian

// seal completes a block: head and checksum.
func seal(b []byte, magic string, count int, index uint32) []byte {
	return sealVersion(b, magic, formatVersion, count, index)
}

func sealVersion(b []byte, magic string, version uint16, count int, index uint32) []byte {
	copy(b, magic)
	le.PutUint16(b[4:], version)
	le.PutUint16(b[6:], uint16(count))
	le.PutUint32(b[12:], index)
	le.PutUint32(b[8:], 0)
	le.PutUint32(b[8:], crc32.Checksum(b, crcTable))
	return b
}

// unseal verifies a block's head and returns its count.
func unseal(b []byte, magic string, index uint32) (count int, err error) {
	switch {
	case len(b) != blockBytes:
		return 0, fmt.Errorf("%w: block of %d bytes", ErrCorrupt, len(b))
	case string(b[:4]) != magic:
		return 0, fmt.Errorf("%w: magic %q, want %q", ErrCorrupt, b[:4], magic)
	case le.Uint32(b[8:]) != blockCRC(b):
		return 0, fmt.Errorf("%w: %q block: checksum", ErrCorrupt, magic)
	case le.Uint16(b[4:]) != formatVersion && !(magic == magicSuper && le.Uint16(b[4:]) == grownVersion):
		return 0, fmt.Errorf("%w: %q block: version %d", ErrCorrupt, magic, le.Uint16(b[4:]))
	case le.Uint32(b[12:]) != index:
		return 0, fmt.Errorf("%w: %q block: is metadata block %d, read as %d", ErrCorrupt, magic, le.Uint32(b[12:]), index)
	}
	return int(le.Uint16(b[6:])), nil
}

// blockCRC is the checksum of b with its crc field taken as zero.
func blockCRC(b []byte) uint32 {
	c := crc32.Update(0, crcTable, b[:8])
	c = crc32.Update(c, crcTable, []byte{0, 0, 0, 0})
	return crc32.Update(c, crcTable, b[12:])
}

type superblock struct {
	UUID          [16]byte
	Stripes       uint64
	K, M          int
	ExtentBlocks  uint32
	MaxLUNs       uint32
	MaxHosts      uint32
	Extents       uint32
	ExtentStripes int
	DataStripe    uint64
	GenCeiling    uint64
	// Reservations is the number of blocks for persistent reservations; 0 in a pool made before there were any.
	Reservations uint32
	// WarnPercent of the pool may be allocated before initiators are warned; 0: warnPercent.
	WarnPercent int
	// Scrub is where the scrub stands.
	Scrub scrubMark
	// regions are where extents and their table lie: regions[0] as the pool was made, then growths more (grow.go).
	regions [1 + maxGrowths]region
	growths int
}

func (s *superblock) encode() []byte {
	b := make([]byte, blockBytes)
	copy(b[16:], s.UUID[:])
	le.PutUint64(b[32:], s.Stripes)
	le.PutUint16(b[40:], uint16(s.K))
	le.PutUint16(b[42:], uint16(s.M))
	le.PutUint32(b[44:], s.ExtentBlocks)
	le.PutUint32(b[48:], s.MaxLUNs)
	le.PutUint32(b[52:], s.MaxHosts)
	le.PutUint32(b[56:], s.Extents)
	le.PutUint16(b[60:], uint16(s.ExtentStripes))
	le.PutUint64(b[64:], s.DataStripe)
	le.PutUint64(b[72:], s.GenCeiling)
	le.PutUint32(b[80:], s.Reservations)
	b[512] = byte(s.WarnPercent)
	s.Scrub.encode(b[scrubOffset:][:scrubBytes])
	if s.growths == 0 {
		return seal(b, magicSuper, 0, 0)
	}
	s.encodeGrowths(b)
	return sealVersion(b, magicSuper, grownVersion, 0, 0)
}

func decodeSuperblock(b []byte) (superblock, error) {
	if _, err := unseal(b, magicSuper, 0); err != nil {
		return superblock{}, err
	}
	s := superblock{
		Stripes:       le.Uint64(b[32:]),
		K:             int(le.Uint16(b[40:])),
		M:             int(le.Uint16(b[42:])),
		ExtentBlocks:  le.Uint32(b[44:]),
		MaxLUNs:       le.Uint32(b[48:]),
		MaxHosts:      le.Uint32(b[52:]),
		Extents:       le.Uint32(b[56:]),
		ExtentStripes: int(le.Uint16(b[60:])),
		DataStripe:    le.Uint64(b[64:]),
		GenCeiling:    le.Uint64(b[72:]),
		Reservations:  le.Uint32(b[80:]),
	}
	copy(s.UUID[:], b[16:])
	if s.WarnPercent = int(b[512]); s.WarnPercent > 100 {
		return superblock{}, fmt.Errorf("%w: superblock: warning at %d %%", ErrCorrupt, s.WarnPercent)
	}
	s.Scrub = decodeScrubMark(b[scrubOffset:][:scrubBytes])
	want, err := layOut(s.Stripes, s.K, s.M, s.ExtentBlocks, s.MaxLUNs, s.MaxHosts, s.Reservations)
	if err != nil {
		return superblock{}, fmt.Errorf("%w: superblock: %v", ErrCorrupt, err)
	}
	if s.Extents != want.Extents || s.ExtentStripes != want.ExtentStripes || s.DataStripe != want.DataStripe {
		return superblock{}, fmt.Errorf("%w: superblock: layout does not add up", ErrCorrupt)
	}
	s.regions = want.regions
	if le.Uint16(b[4:]) == grownVersion {
		if err := s.decodeGrowths(b); err != nil {
			return superblock{}, err
		}
	}
	return s, nil
}

// layOut computes the derived fields of a superblock, and says what is wrong with the given ones.
func layOut(stripes uint64, k, m int, extentBlocks, maxLUNs, maxHosts, reservations uint32) (superblock, error) {
	s := superblock{Stripes: stripes, K: k, M: m, ExtentBlocks: extentBlocks, MaxLUNs: maxLUNs, MaxHosts: maxHosts, Reservations: reservations}
	switch {
	case k < 1 || k > 64 || m < 0 || m > 16:
		return s, fmt.Errorf("geometry %d+%d", k, m)
	case extentBlocks == 0 || extentBlocks > 1<<16:
		return s, fmt.Errorf("extents of %d blocks", extentBlocks)
	case maxLUNs == 0 || maxLUNs > 1<<14 || maxHosts > 1<<14:
		return s, fmt.Errorf("%d LUNs, %d hosts at most", maxLUNs, maxHosts)
	case reservations > 1<<16:
		return s, fmt.Errorf("%d blocks for reservations", reservations)
	case stripes > 1<<40:
		return s, fmt.Errorf("%d stripes", stripes)
	}
	sb := uint64(s.stripeBlocks())
	s.ExtentStripes = int((uint64(extentBlocks) + sb - 1) / sb)
	if s.ExtentStripes > 64 {
		return s, fmt.Errorf("%d stripes an extent, at most 64", s.ExtentStripes)
	}
	most := stripes / uint64(s.ExtentStripes)
	if most >= 1<<32-1 {
		return s, fmt.Errorf("%d extents", most)
	}
	table := (most + tableEntries - 1) / tableEntries
	meta := uint64(s.tableBlock()) + table
	s.DataStripe = (meta + sb - 1) / sb
	if s.DataStripe >= stripes || (stripes-s.DataStripe)/uint64(s.ExtentStripes) == 0 {
		return s, fmt.Errorf("%d stripes leave no room for data", stripes)
	}
	s.Extents = uint32((stripes - s.DataStripe) / uint64(s.ExtentStripes))
	s.regions[0] = region{stripes: stripes, end: s.Extents, block: s.tableBlock()}
	return s, nil
}

func (s *superblock) stripeBlocks() int { return s.K * stripBlocks }

// hostBlock, reservationBlock and tableBlock are the first metadata blocks of the host records, of the
// reservations and of the extent table.
func (s *superblock) hostBlock() uint32        { return 1 + s.MaxLUNs }
func (s *superblock) reservationBlock() uint32 { return s.hostBlock() + s.MaxHosts }
func (s *superblock) tableBlock() uint32       { return s.reservationBlock() + s.Reservations }

// tableBlocks is the number of blocks of the extent table at the front.
func (s *superblock) tableBlocks() uint32 { return (s.Extents + tableEntries - 1) / tableEntries }

// usable is the number of blocks of stripe i of an extent that an extent uses.
func (s *superblock) usable(i int) int {
	return min(s.stripeBlocks(), int(s.ExtentBlocks)-i*s.stripeBlocks())
}

type lunState uint8

const (
	lunLive     lunState = 1
	lunDeleting lunState = 2
)

type lunRecord struct {
	ID         uint32
	UUID       [16]byte
	Blocks     uint64
	BlockBytes uint32
	Kind       Kind
	State      lunState
	Name       string
}

func (r *lunRecord) encode() []byte {
	b := make([]byte, blockBytes)
	copy(b[16:], r.UUID[:])
	le.PutUint64(b[32:], r.Blocks)
	le.PutUint32(b[40:], r.BlockBytes)
	b[44] = byte(r.Kind)
	b[45] = byte(r.State)
	putString(b[46:], r.Name)
	return seal(b, magicLUN, 0, r.ID)
}

func decodeLUN(b []byte, id uint32) (lunRecord, error) {
	if _, err := unseal(b, magicLUN, id); err != nil {
		return lunRecord{}, err
	}
	r := lunRecord{ID: id, Blocks: le.Uint64(b[32:]), BlockBytes: le.Uint32(b[40:]), Kind: Kind(b[44]), State: lunState(b[45])}
	copy(r.UUID[:], b[16:])
	var ok bool
	if r.Name, ok = getString(b[46:], maxName); !ok {
		return lunRecord{}, fmt.Errorf("%w: LUN %d: name", ErrCorrupt, id)
	}
	if err := r.validate(); err != nil {
		return lunRecord{}, fmt.Errorf("%w: LUN %d: %v", ErrCorrupt, id, err)
	}
	return r, nil
}

func (r *lunRecord) validate() error {
	switch {
	case r.State != lunLive && r.State != lunDeleting:
		return fmt.Errorf("state %d", r.State)
	case r.Kind < KindPlain || r.Kind > KindStore:
		return fmt.Errorf("kind %d", r.Kind)
	case r.BlockBytes != 4096 && (r.BlockBytes != 512 || r.Kind != KindPlain):
		return fmt.Errorf("%s LUN of %d-byte blocks", r.Kind, r.BlockBytes)
	case r.Blocks == 0 || r.Blocks > maxLUNBlocks:
		return fmt.Errorf("%d blocks", r.Blocks)
	}
	return nil
}

// encodeHost and decodeHost: slot is the metadata block.
func encodeHost(h Host, slot uint32) []byte {
	b := make([]byte, blockBytes)
	putString(b[16:], h.Name)
	putString(b[82:], h.Initiator)
	for i, id := range h.LUNs {
		le.PutUint32(b[308+4*i:], id)
	}
	return seal(b, magicHost, len(h.LUNs), slot)
}

func decodeHost(b []byte, slot uint32) (Host, error) {
	n, err := unseal(b, magicHost, slot)
	if err != nil {
		return Host{}, err
	}
	name, ok1 := getString(b[16:], maxName)
	ini, ok2 := getString(b[82:], maxInitiator)
	if !ok1 || !ok2 || n > maxHostLUNs {
		return Host{}, fmt.Errorf("%w: host record %d", ErrCorrupt, slot)
	}
	h := Host{Name: name, Initiator: ini}
	for i := range n {
		h.LUNs = append(h.LUNs, le.Uint32(b[308+4*i:]))
	}
	return h, nil
}

func encodeReservation(r reservationBlock, block uint32) []byte {
	b := make([]byte, blockBytes)
	le.PutUint32(b[16:], r.lun)
	le.PutUint16(b[20:], uint16(r.part))
	le.PutUint16(b[22:], uint16(r.parts))
	copy(b[reservationOffset:], r.data)
	return seal(b, magicReserv, len(r.data), block)
}

func decodeReservation(b []byte, block uint32) (reservationBlock, error) {
	n, err := unseal(b, magicReserv, block)
	if err != nil {
		return reservationBlock{}, err
	}
	r := reservationBlock{lun: le.Uint32(b[16:]), part: int(le.Uint16(b[20:])), parts: int(le.Uint16(b[22:]))}
	if r.lun == 0 || r.parts > maxReservationParts || r.part >= r.parts || n == 0 || n > reservationBytes {
		return reservationBlock{}, fmt.Errorf("%w: reservations block %d", ErrCorrupt, block)
	}
	r.data = bytes.Clone(b[reservationOffset : reservationOffset+n])
	return r, nil
}

func putString(b []byte, s string) {
	le.PutUint16(b, uint16(len(s)))
	copy(b[2:], s)
}

func getString(b []byte, most int) (string, bool) {
	n := int(le.Uint16(b))
	if n == 0 || n > most || !utf8.Valid(b[2:2+n]) {
		return "", false
	}
	return string(b[2 : 2+n]), true
}

// extentEntry is one allocation of the extent table. lun is 0 when the extent is free.
type extentEntry struct {
	lun, ext uint32
	birth    uint64
	written  uint64
}

func encodeTable(entries []extentEntry, block uint32) []byte {
	b := make([]byte, blockBytes)
	for i, e := range entries {
		o := b[tableOffset+i*tableEntryBytes:]
		le.PutUint32(o, e.lun)
		le.PutUint32(o[4:], e.ext)
		le.PutUint64(o[8:], e.birth)
		le.PutUint64(o[16:], e.written)
	}
	return seal(b, magicTable, len(entries), block)
}

// decodeTable fills entries, whose number the block must carry.
func decodeTable(b []byte, block uint32, entries []extentEntry) error {
	n, err := unseal(b, magicTable, block)
	if err != nil {
		return err
	}
	if n != len(entries) || n > tableEntries {
		return fmt.Errorf("%w: extent table block %d: %d entries, want %d", ErrCorrupt, block, n, len(entries))
	}
	for i := range entries {
		o := b[tableOffset+i*tableEntryBytes:]
		entries[i] = extentEntry{lun: le.Uint32(o), ext: le.Uint32(o[4:]), birth: le.Uint64(o[8:]), written: le.Uint64(o[16:])}
	}
	return nil
}

type deltaOp uint8

const (
	opAlloc   deltaOp = 1
	opFree    deltaOp = 2
	opWritten deltaOp = 3
)

// delta is one change of the extent table.
type delta struct {
	op       deltaOp
	extent   uint32
	lun, ext uint32
	birth    uint64
	written  uint64
}

// deltaBlock is what one logged delta block says.
type deltaBlock struct {
	dataStripe    uint64
	extentStripes int
	deltas        []delta
}

func (d *deltaBlock) encode() []byte {
	b := make([]byte, blockBytes)
	le.PutUint64(b[16:], d.dataStripe)
	le.PutUint16(b[24:], uint16(d.extentStripes))
	for i, x := range d.deltas {
		o := b[tableOffset+i*deltaBytes:]
		o[0] = byte(x.op)
		le.PutUint32(o[4:], x.extent)
		le.PutUint32(o[8:], x.lun)
		le.PutUint32(o[12:], x.ext)
		le.PutUint64(o[16:], x.birth)
		le.PutUint64(o[24:], x.written)
	}
	return seal(b, magicDeltas, len(d.deltas), 0)
}

func decodeDeltas(b []byte) (deltaBlock, error) {
	n, err := unseal(b, magicDeltas, 0)
	if err != nil {
		return deltaBlock{}, err
	}
	d := deltaBlock{dataStripe: le.Uint64(b[16:]), extentStripes: int(le.Uint16(b[24:]))}
	if n > maxDeltas || d.extentStripes < 1 || d.extentStripes > 64 {
		return deltaBlock{}, fmt.Errorf("%w: delta block: %d entries, %d stripes an extent", ErrCorrupt, n, d.extentStripes)
	}
	for i := range n {
		o := b[tableOffset+i*deltaBytes:]
		x := delta{op: deltaOp(o[0]), extent: le.Uint32(o[4:]), lun: le.Uint32(o[8:]), ext: le.Uint32(o[12:]),
			birth: le.Uint64(o[16:]), written: le.Uint64(o[24:])}
		if x.op < opAlloc || x.op > opWritten || x.lun == 0 {
			return deltaBlock{}, fmt.Errorf("%w: delta %d: op %d of LUN %d", ErrCorrupt, i, x.op, x.lun)
		}
		d.deltas = append(d.deltas, x)
	}
	return d, nil
}
