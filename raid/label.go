package raid

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A label is one 4096-byte block, little-endian:
//
//	offset size field
//	0      8    magic "LEDGELBL"
//	8      4    version, 1 to 3
//	12     4    crc32c of the block, this field zero
//	16     16   pool UUID
//	32     16   array UUID
//	48     16   member UUID: this drive's own
//	64     1    member index
//	65     1    n, members
//	66     1    k, data strips
//	67     1    m, parity strips
//	68     1    spare columns
//	69     1    owner: 0 nobody, 'A', 'B'
//	70     1    kind of the block checksums (checksum.go): version 3 1, else 0
//	71     1    zero
//	72     8    seq: rises with every label write; seq%2 is the slot it is written to
//	80     8    epoch
//	88     8    flags: bit 0 solo, bit 1 replaying, bit 2 fresh
//	96     8    solo LSN
//	104    16   NVRAM id of the owner's log
//	120    8    failed members, bit i is member i
//	128    8    slots of each member
//	136    8    bytes that a member needs
//	144    8    spare of member: byte j is 1 + the member whose strips spare column j holds, 0 none
//	152    1    1 + the member being rebuilt, 0 none
//	153    1    1 + the spare column that it is rebuilt to, 0 none
//	154    6    zero
//	160    8    stripes below this one are rebuilt
//	168    2    length of opaque
//	170    6    zero
//	176    1024 opaque: the caller's own
//	1200   1024 64 × member UUID, by member: a drive that was replaced and comes back is not taken
//	2224   76   zero
//	2300   1    members before the growth that is under way, 0 none: n is what there will be (grow.go)
//	2301   3    zero
//	2304   8    slots of each member after the growth
//	2312   8    stripes below this one lie by the new layout
//	2320   8    stripes below this one, and not below that, are staged
//	2328   232  zero
//	2560   8    settled: the newest seq known to be on every member that is not failed; 0 unknown
//	2568   1    1 + the member being restored (copyback.go), 0 none
//	2569   1    1: its drive may hold current strips
//	2570   6    zero
//	2576   8    stripes below this one are restored
//	2584   128  4 × urgent pass of the rebuild
//	2712   128  4 × urgent pass of the restore
//	2840   …    zero
//
// An urgent pass (rebuild.go), 32 bytes: 8 stripes below this one were visited, 8 failed members, 8 spare of member,
// 1 strips that a stripe must have lost, 7 zero.
//
// Version 1: the first. Version 2: fields from 2300 on; written only while they say something, because who does not know
// them must not touch an array whose stripes lie by two layouts. Version 3: another kind of checksum, growing or not.
const (
	labelMagic   = "LEDGELBL"
	labelVersion = 1
	growVersion  = 2
	sumsVersion  = 3
	labelSlots   = 2
	// MaxOpaque bounds Label.Opaque.
	MaxOpaque = 1024
)

// Flags of a label.
const (
	// FlagSolo: since Label.SoloLSN only the owner's NVRAM has all acknowledged writes (P1).
	FlagSolo = 1 << iota
	// FlagReplaying: the owner is still replaying its partner's mirror.
	FlagReplaying
	// FlagFresh: all that was ever acknowledged is on the members: nothing was yet on the strength of the owner's log.
	FlagFresh
)

// UUID identifies pools, arrays, drives and logs (RFC 9562).
type UUID [16]byte

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// Label is what the members agree on. The fields above Owner are fixed when the array is created; the
// array itself maintains Seq, Failed, SpareOf and the rebuild fields; the rest is the caller's, through
// Array.WriteLabel.
type Label struct {
	Pool, Array UUID
	// MemberID and Member are of the drive that the label was read from. In Array.Label they are zero.
	MemberID        UUID
	Member          int
	N, K, M, Spares int
	Slots           uint64
	MemberBytes     int64
	// IDs are the drives that are the members now.
	IDs             [64]UUID
	Seq             uint64
	Failed          uint64
	SpareOf         [8]uint8
	RebuildMember   int // -1: none
	RebuildSpare    int // -1 when RebuildMember is
	RebuildProgress uint64
	Owner           byte
	Epoch           uint64
	Flags           uint64
	SoloLSN         uint64
	NVRAM           UUID
	Opaque          []byte
	// Settled is the newest seq that was known to be on every member that is not failed; the array's.
	Settled       uint64
	RebuildPasses [maxPasses]Pass
	Restore       Restore
	// GrowFrom is the number of members before the growth that is under way; 0: none. N is the number after it, Slots
	// still what it was, GrowSlots what it will be. Stripes below GrowDone lie by the new layout, those from there to
	// GrowStaged are staged.
	GrowFrom             int
	GrowSlots            uint64
	GrowDone, GrowStaged uint64
	// Checksums is the kind of the block checksums, fixed when the array is created.
	Checksums Checksums
}

// Growing tells whether members are being added.
func (l *Label) Growing() bool { return l.GrowFrom != 0 }

// Solo tells whether FlagSolo is set.
func (l *Label) Solo() bool { return l.Flags&FlagSolo != 0 }

// Replaying tells whether FlagReplaying is set.
func (l *Label) Replaying() bool { return l.Flags&FlagReplaying != 0 }

// Fresh tells whether FlagFresh is set, and nothing that contradicts it.
func (l *Label) Fresh() bool { return l.Flags&(FlagFresh|FlagSolo|FlagReplaying) == FlagFresh }

// newer orders labels: an epoch's owner has the last word over every earlier epoch's, whatever its seq.
func (l *Label) newer(o *Label) bool {
	if l.Epoch != o.Epoch {
		return l.Epoch > o.Epoch
	}
	return l.Seq > o.Seq
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// blockSum is the crc32c of a metadata block with the 4 bytes at off taken as zero.
func blockSum(b []byte, off int) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, b[:off])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, b[off+4:])
}

// encode fills b, BlockBytes long.
func (l *Label) encode(b []byte) {
	clear(b[:BlockBytes])
	le := binary.LittleEndian
	copy(b, labelMagic)
	le.PutUint32(b[8:], labelVersion)
	l.encodeGrow(b)
	if b[70] = byte(l.Checksums); l.Checksums != 0 {
		le.PutUint32(b[8:], sumsVersion)
	}
	copy(b[16:], l.Pool[:])
	copy(b[32:], l.Array[:])
	copy(b[48:], l.MemberID[:])
	b[64], b[65], b[66], b[67], b[68] = byte(l.Member), byte(l.N), byte(l.K), byte(l.M), byte(l.Spares)
	b[69] = l.Owner
	le.PutUint64(b[72:], l.Seq)
	le.PutUint64(b[80:], l.Epoch)
	le.PutUint64(b[88:], l.Flags)
	le.PutUint64(b[96:], l.SoloLSN)
	copy(b[104:], l.NVRAM[:])
	le.PutUint64(b[120:], l.Failed)
	le.PutUint64(b[128:], l.Slots)
	le.PutUint64(b[136:], uint64(l.MemberBytes))
	copy(b[144:], l.SpareOf[:])
	b[152], b[153] = byte(l.RebuildMember+1), byte(l.RebuildSpare+1)
	le.PutUint64(b[160:], l.RebuildProgress)
	le.PutUint16(b[168:], uint16(len(l.Opaque)))
	copy(b[176:176+MaxOpaque], l.Opaque)
	le.PutUint64(b[2560:], l.Settled)
	l.Restore.encode(b[2568:])
	encodePasses(b[2584:], l.RebuildPasses)
	encodePasses(b[2712:], l.Restore.Passes)
	for i, id := range l.IDs {
		copy(b[1200+16*i:], id[:])
	}
	le.PutUint32(b[12:], blockSum(b[:BlockBytes], 12))
}

// decodeLabel parses one label block. Every error is ErrCorrupt, or ErrBlank when there is no label at all.
func decodeLabel(b []byte) (*Label, error) {
	if len(b) != BlockBytes {
		return nil, fmt.Errorf("label of %d bytes: %w", len(b), ErrCorrupt)
	}
	if !bytes.Equal(b[:8], []byte(labelMagic)) {
		return nil, ErrBlank
	}
	le := binary.LittleEndian
	if got, want := blockSum(b, 12), le.Uint32(b[12:]); got != want {
		return nil, fmt.Errorf("label checksum %08x, computed %08x: %w", want, got, ErrCorrupt)
	}
	v := le.Uint32(b[8:])
	if v < labelVersion || v > sumsVersion {
		return nil, fmt.Errorf("label version %d: %w", v, ErrCorrupt)
	}
	l := &Label{
		Member: int(b[64]), N: int(b[65]), K: int(b[66]), M: int(b[67]), Spares: int(b[68]), Owner: b[69],
		Seq: le.Uint64(b[72:]), Epoch: le.Uint64(b[80:]), Flags: le.Uint64(b[88:]), SoloLSN: le.Uint64(b[96:]),
		Failed: le.Uint64(b[120:]), Slots: le.Uint64(b[128:]), MemberBytes: int64(le.Uint64(b[136:])),
		RebuildMember: int(b[152]) - 1, RebuildSpare: int(b[153]) - 1, RebuildProgress: le.Uint64(b[160:]),
	}
	copy(l.Pool[:], b[16:])
	copy(l.Array[:], b[32:])
	copy(l.MemberID[:], b[48:])
	copy(l.NVRAM[:], b[104:])
	copy(l.SpareOf[:], b[144:])
	l.Settled = le.Uint64(b[2560:])
	l.Restore.decode(b[2568:])
	l.RebuildPasses, l.Restore.Passes = decodePasses(b[2584:]), decodePasses(b[2712:])
	for i := range l.IDs {
		copy(l.IDs[i][:], b[1200+16*i:])
	}
	n := int(le.Uint16(b[168:]))
	if n > MaxOpaque {
		return nil, fmt.Errorf("label with %d opaque bytes: %w", n, ErrCorrupt)
	}
	if n > 0 {
		l.Opaque = bytes.Clone(b[176 : 176+n])
	}
	if v == sumsVersion {
		if l.Checksums = Checksums(b[70]); l.Checksums == 0 || l.Checksums >= checksumKinds {
			return nil, fmt.Errorf("label with %s: %w", l.Checksums, ErrCorrupt)
		}
	}
	if v == growVersion || v == sumsVersion && b[2300] != 0 {
		if err := l.decodeGrow(b); err != nil {
			return nil, err
		}
	}
	if err := l.validate(); err != nil {
		return nil, err
	}
	return l, nil
}

// validate bounds what later code computes with, so that a label which was written wrong, though its checksum
// is right, is refused and not believed.
func (l *Label) validate() error {
	bad := func(what string, v any) error { return fmt.Errorf("label with %s %v: %w", what, v, ErrCorrupt) }
	if err := checkGeometry(l.N, l.K, l.M, l.Spares); err != nil {
		return fmt.Errorf("label: %w: %w", err, ErrCorrupt)
	}
	switch {
	case l.Member >= l.N:
		return bad("member", l.Member)
	case l.Slots == 0 || l.Slots > 1<<48:
		return bad("slots", l.Slots)
	case l.MemberBytes != DataOffset+int64(max(l.Slots, l.GrowSlots))*SlotBytes:
		return bad("member bytes", l.MemberBytes)
	case l.N < 64 && l.Failed>>l.N != 0:
		return bad("failed members", l.Failed)
	case l.RebuildMember >= l.N || l.RebuildSpare >= l.Spares || (l.RebuildMember < 0) != (l.RebuildSpare < 0):
		return bad("rebuild of", l.RebuildMember)
	case l.Restore.Member() >= l.N || l.Restore.Member() >= 0 && l.Failed>>l.Restore.Member()&1 == 0:
		return bad("restore of", l.Restore.Member())
	case l.Settled > l.Seq:
		return bad("settled seq", l.Settled)
	case len(l.Opaque) > MaxOpaque:
		return bad("opaque bytes", len(l.Opaque))
	}
	for j, s := range l.SpareOf {
		if int(s) > l.N || (s != 0 && j >= l.Spares) {
			return bad("spare of", s)
		}
	}
	return l.validateGrow()
}

// clone copies the label, Opaque included.
func (l *Label) clone() Label {
	c := *l
	c.Opaque = bytes.Clone(l.Opaque)
	return c
}
