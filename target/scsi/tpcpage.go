package scsi

import (
	"encoding/binary"
)

// thirdPartyCopyPage appends the body of the third-party copy page (SPC-4 7.8.17, SBC-3 6.6.6):
// descriptors of a type (2), a length (2), and a body that is padded to a multiple of four.
func (t *Task) thirdPartyCopyPage(b []byte) []byte {
	one := func(kind uint16, body []byte) {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		b = binary.BigEndian.AppendUint16(b, kind)
		b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
		b = append(b, body...)
	}
	size := uint64(t.info.BlockBytes)
	limits := make([]byte, 32) // block device ROD limits
	binary.BigEndian.PutUint16(limits[6:], maxTokenRanges)
	binary.BigEndian.PutUint32(limits[8:], maxTokenTimeout)
	binary.BigEndian.PutUint32(limits[12:], defaultTokenTimeout)
	binary.BigEndian.PutUint64(limits[16:], maxTokenBytes/size)
	binary.BigEndian.PutUint64(limits[24:], optimalTransfer/size)
	one(0x0000, limits)

	one(0x0001, t.copyCommands()) // supported commands

	p := make([]byte, 28) // parameter data
	binary.BigEndian.PutUint16(p[4:], maxCopyTargets)
	binary.BigEndian.PutUint16(p[6:], maxCopySegments)
	binary.BigEndian.PutUint32(p[8:], maxCopyDescriptors)
	one(0x0004, p)
	one(0x0008, []byte{2, copySegmentType, copyTargetType}) // supported descriptors
	one(0x000C, []byte{0, 0})                               // supported CSCD ids: none but those of the list

	f := make([]byte, 44+48) // ROD token features, with those of block devices
	// MINIMUM TOKEN LIFETIME stays zero: a write ends a token at any time.
	binary.BigEndian.PutUint32(f[16:], 0xFFFFFFFF) // as long as it is used
	binary.BigEndian.PutUint32(f[20:], maxTokenTimeout)
	binary.BigEndian.PutUint16(f[42:], 48)
	d := f[44:]
	binary.BigEndian.PutUint16(d[2:], 44)
	binary.BigEndian.PutUint16(d[6:], 1) // granularity of a ROD: a block
	binary.BigEndian.PutUint64(d[8:], maxTokenBytes)
	binary.BigEndian.PutUint64(d[16:], optimalTransfer)
	binary.BigEndian.PutUint64(d[24:], optimalTransfer)
	binary.BigEndian.PutUint64(d[32:], optimalTransfer)
	// REMOTE TOKENS stays zero: tokens of other copy managers are not known.
	one(0x0106, f)

	const tokenOut, tokenIn = 0x01, 0x02
	kinds := make([]byte, 4, 4+3*64)
	for i, k := range []struct {
		kind  uint32
		flags byte
	}{{rodVulnerable, tokenOut | tokenIn}, {rodDefault, tokenOut | tokenIn}, {rodZero, tokenIn}} {
		r := make([]byte, 64)
		binary.BigEndian.PutUint32(r, k.kind)
		r[4] = k.flags
		binary.BigEndian.PutUint16(r[6:], uint16(i+1)) // preference
		kinds = append(kinds, r...)
	}
	binary.BigEndian.PutUint16(kinds[2:], uint16(len(kinds)-4))
	one(0x0108, kinds)

	g := make([]byte, 32) // general copy operations
	binary.BigEndian.PutUint32(g, maxCopyOps)
	binary.BigEndian.PutUint32(g[4:], maxCopyOps)
	binary.BigEndian.PutUint32(g[8:], maxCopySegmentBytes)
	g[12] = 9
	one(0x8001, g)
	return b
}

// copyCommands lists the service actions of the two operation codes, as the CDB table has them.
func (t *Task) copyCommands() []byte {
	b := []byte{0}
	for _, code := range []byte{0x83, 0x84} {
		b = append(b, code, 0)
		count := len(b) - 1
		for _, o := range t.Nexus.Target.ops.ops {
			if o.code == code {
				b = append(b, byte(o.action))
				b[count]++
			}
		}
	}
	b[0] = byte(len(b) - 1)
	return b
}
