package store

import (
	"fmt"

	"github.com/zeebo/xxh3"
)

// opKind is what an entry of a record, or of a segment's log, does. Numbers are never reused.
type opKind uint8

const (
	opWrite  opKind = 1 // count blocks of data from lba on
	opZero   opKind = 2 // count blocks from lba on read as zeros
	opCreate opKind = 3 // a volume; payload: one block with its description
	opDelete opKind = 4 // the volume
	opResize opKind = 5 // the volume, to lba bytes
	// Since version 2:
	opCopy     opKind = 6 // a volume as volume number lba is at this place of the log; payload: one block with its description
	opRollback opKind = 7 // the volume becomes as volume number lba is
	opDescribe opKind = 8 // the volume's description, but for its size; payload: one block
)

// op is one entry: data is a view of the payload (opWrite: count blocks; opCreate, opCopy, opDescribe: a description).
type op struct {
	kind  opKind
	vol   uint32
	lba   uint64
	count uint64
	data  []byte
}

// units is how many positions the op takes in the log.
func (o *op) units() uint64 {
	if o.kind == opWrite {
		return o.count
	}
	return 1
}

// payload is how many bytes the op adds to a record beside its entry.
func (o *op) payload() int {
	switch o.kind {
	case opWrite:
		return int(o.count) * BlockBytes
	case opCreate, opCopy, opDescribe:
		return BlockBytes
	}
	return 0
}

const (
	recordMagic  = "LEDGEJR2"
	recordMagic1 = "LEDGEJR1" // with a CRC-32C, which is blind to blocks that end in their own: see doc.go
	recordHeader = 64
	entryBytes   = 24
	maxEntries   = 1000
)

// record is one write to the ring. A pad has no entries, and fills the end of the ring that is
// too short for the next record: only its first block is written.
type record struct {
	uuid    [16]byte
	epoch   uint64
	seq     uint64
	advance uint64 // bytes from this record to the next
	ops     []op
}

// recordBytes is the length of a record with entries entries and payload bytes of payload.
func recordBytes(entries, payload int) int {
	return roundUp(recordHeader+entries*entryBytes, BlockBytes) + payload
}

// encode appends nothing: it fills p, which must have the record's length.
func (r *record) encode(p []byte) {
	at := roundUp(recordHeader+len(r.ops)*entryBytes, BlockBytes)
	clear(p[:at])
	copy(p, recordMagic)
	copy(p[16:], r.uuid[:])
	le.PutUint64(p[32:], r.epoch)
	le.PutUint64(p[40:], r.seq)
	le.PutUint32(p[48:], uint32(len(r.ops)))
	le.PutUint32(p[52:], uint32(len(p)))
	le.PutUint64(p[56:], r.advance)
	for i := range r.ops {
		o, e := &r.ops[i], p[recordHeader+i*entryBytes:]
		e[0] = byte(o.kind)
		le.PutUint32(e[4:], o.vol)
		le.PutUint64(e[8:], o.lba)
		le.PutUint64(e[16:], o.count)
		n := o.payload()
		clear(p[at+copy(p[at:at+n], o.data) : at+n])
		at += n
	}
	le.PutUint64(p[8:], xxh3.Hash(p[16:]))
}

// recordLength tells from a record's first block how many bytes must be read to decode it.
func recordLength(p []byte) (int, error) {
	if len(p) < BlockBytes || string(p[:8]) != recordMagic && string(p[:8]) != recordMagic1 {
		return 0, fmt.Errorf("record: %w", ErrCorrupt)
	}
	n := int(le.Uint32(p[52:]))
	if string(p[:8]) == recordMagic1 {
		n = int(le.Uint32(p[12:]))
	}
	if n < BlockBytes || n%BlockBytes != 0 || n > maxRecordBytes {
		return 0, fmt.Errorf("record of %d bytes: %w", n, ErrCorrupt)
	}
	return n, nil
}

// decodeRecord checks p, which is the whole record; the ops' data are views of it.
func decodeRecord(p []byte) (record, error) {
	var r record
	n, err := recordLength(p)
	if err != nil {
		return r, err
	}
	good := n == len(p)
	if old := string(p[:8]) == recordMagic1; good && old {
		good = le.Uint32(p[8:]) == crc(p[12:]) && le.Uint32(p[52:]) == 0
	} else if good {
		good = le.Uint64(p[8:]) == xxh3.Hash(p[16:])
	}
	if !good {
		return r, fmt.Errorf("record checksum: %w", ErrCorrupt)
	}
	copy(r.uuid[:], p[16:])
	r.epoch, r.seq, r.advance = le.Uint64(p[32:]), le.Uint64(p[40:]), le.Uint64(p[56:])
	entries := int(le.Uint32(p[48:]))
	if entries > maxEntries || r.advance%BlockBytes != 0 || r.advance < uint64(n) || r.advance > 1<<50 ||
		entries > 0 && r.advance != uint64(n) {
		return r, fmt.Errorf("record header: %w", ErrCorrupt)
	}
	at := roundUp(recordHeader+entries*entryBytes, BlockBytes)
	if at > n {
		return r, fmt.Errorf("record entries: %w", ErrCorrupt)
	}
	r.ops = make([]op, entries)
	for i := range r.ops {
		e := p[recordHeader+i*entryBytes:]
		o := op{kind: opKind(e[0]), vol: le.Uint32(e[4:]), lba: le.Uint64(e[8:]), count: le.Uint64(e[16:])}
		if !o.sane() || e[1]|e[2]|e[3] != 0 || o.kind == opWrite && o.count > uint64(n)/BlockBytes || at+o.payload() > n {
			return r, fmt.Errorf("record entry %d: %w", i, ErrCorrupt)
		}
		o.data = p[at : at+o.payload()]
		at += o.payload()
		r.ops[i] = o
	}
	if at != n {
		return r, fmt.Errorf("record length: %w", ErrCorrupt)
	}
	return r, nil
}

// sane says whether the op's fields are within the limits of the format.
func (o *op) sane() bool {
	const most = MaxVolume / BlockBytes
	switch o.kind {
	case opWrite, opZero:
		return o.vol != 0 && o.count > 0 && o.lba <= most && o.count <= most && o.lba+o.count <= most
	case opCreate, opDelete, opDescribe:
		return o.vol != 0 && o.lba == 0 && o.count == 0
	case opCopy, opRollback:
		return o.vol != 0 && o.lba != 0 && o.lba <= 1<<32-1 && o.lba != uint64(o.vol) && o.count == 0
	case opResize:
		return o.vol != 0 && o.lba <= MaxVolume && o.lba%BlockBytes == 0 && o.count == 0
	}
	return false
}
