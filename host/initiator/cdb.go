package initiator

import "encoding/binary"

// Command descriptor blocks: SPC-4 clause 6 and SBC-3 clause 5.

type cdb = [16]byte

func cdbInquiry(allocation uint16) (c cdb) {
	c[0] = 0x12
	binary.BigEndian.PutUint16(c[3:], allocation)
	return c
}

func cdbVitalPage(page byte, allocation uint16) cdb {
	c := cdbInquiry(allocation)
	c[1], c[2] = 1, page
	return c
}

func cdbReadCapacity(allocation uint32) (c cdb) {
	c[0], c[1] = 0x9e, 0x10
	binary.BigEndian.PutUint32(c[10:], allocation)
	return c
}

func cdbPortGroups(allocation uint32) (c cdb) {
	c[0], c[1] = 0xa3, 0x0a
	binary.BigEndian.PutUint32(c[6:], allocation)
	return c
}

func cdbReadWrite(opcode byte, lba uint64, blocks uint32) (c cdb) {
	c[0] = opcode
	binary.BigEndian.PutUint64(c[2:], lba)
	binary.BigEndian.PutUint32(c[10:], blocks)
	return c
}

const (
	opRead16  = 0x88
	opWrite16 = 0x8a
)

func cdbSynchronize() (c cdb) { // all blocks
	c[0] = 0x91
	return c
}

// cdbUnmap goes with the parameter list of unmapList (SBC-3 5.28).
func cdbUnmap(list int) (c cdb) {
	c[0] = 0x42
	binary.BigEndian.PutUint16(c[7:], uint16(list))
	return c
}

type blockRange struct{ lba, blocks uint64 }

func unmapList(ranges []blockRange) []byte {
	b := make([]byte, 8, 8+16*len(ranges))
	binary.BigEndian.PutUint16(b[0:], uint16(6+16*len(ranges)))
	binary.BigEndian.PutUint16(b[2:], uint16(16*len(ranges)))
	for _, r := range ranges {
		b = binary.BigEndian.AppendUint64(b, r.lba)
		b = binary.BigEndian.AppendUint32(b, uint32(r.blocks))
		b = append(b, 0, 0, 0, 0)
	}
	return b
}
