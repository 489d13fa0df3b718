package scsi

import (
	"cmp"
	"context"
	"encoding/binary"
	"math/bits"
	"slices"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// POPULATE TOKEN, WRITE USING TOKEN (SBC-3 5.8, 5.44), REPORT ALL ROD TOKENS (SPC-4 6.34).
//
// Parameter list of POPULATE TOKEN:
//
//	offset size
//	0      2    length of what follows
//	2      1    bit 1 RTV (the ROD type is named), bit 0 IMMED
//	4      4    inactivity time-out in seconds; 0: the default
//	8      4    ROD type
//	14     2    length of the descriptors
//	16     16n  descriptors: LBA (8), blocks (4), reserved (4)
//
// Parameter list of WRITE USING TOKEN:
//
//	0      2    length of what follows
//	2      1    bit 1 DEL_TKN, bit 0 IMMED
//	8      8    offset into the ROD, in blocks
//	16     512  token
//	534    2    length of the descriptors
//	536    16n  descriptors
const (
	populateHeaderBytes = 16
	useHeaderBytes      = 536
)

func decodePopulate(t *Task) error { return t.decodeTokenList(populateHeaderBytes) }

func decodeUseToken(t *Task) error {
	if err := t.checkWritable(); err != nil {
		return err
	}
	return t.decodeTokenList(useHeaderBytes)
}

func (t *Task) decodeTokenList(header int64) error {
	t.OutTotal = int64(t.be32(10))
	if t.OutTotal != 0 && t.OutTotal < header || t.OutTotal > header+16*maxTokenRanges {
		return illegal(ascParameterListLength)
	}
	return nil
}

// tokenRanges takes the descriptors after the header apart: at least one, within the unit, without
// overlaps.
func (t *Task) tokenRanges(list []byte, header int) (ranges []target.Range, total uint64, err error) {
	n := int(binary.BigEndian.Uint16(list[header-2:]))
	switch {
	case int(binary.BigEndian.Uint16(list))+2 < header+n/16*16:
		return nil, 0, badList(0)
	case n < 16:
		return nil, 0, badList(header - 2)
	case header+n/16*16 > len(list):
		return nil, 0, illegal(ascParameterListLength)
	case n/16 > maxTokenRanges:
		return nil, 0, illegal(ascTooManySegments)
	}
	for at := header; at < header+n/16*16; at += 16 {
		r := target.Range{LBA: binary.BigEndian.Uint64(list[at:]), Blocks: uint64(binary.BigEndian.Uint32(list[at+8:]))}
		if r.LBA > t.info.Blocks || r.Blocks > t.info.Blocks-r.LBA {
			return nil, 0, illegal(ascRange)
		}
		if r.Blocks > 0 {
			ranges = append(ranges, r)
			total += r.Blocks
		}
	}
	if total > maxTokenBytes/uint64(t.info.BlockBytes) {
		return nil, 0, badList(header + 8)
	}
	sorted := sortedRanges(ranges)
	for i := 1; i < len(sorted); i++ {
		if sorted[i-1].LBA+sorted[i-1].Blocks > sorted[i].LBA {
			return nil, 0, badList(header)
		}
	}
	return ranges, total, nil
}

func sortedRanges(ranges []target.Range) []target.Range {
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b target.Range) int { return cmp.Compare(a.LBA, b.LBA) })
	return sorted
}

// populateToken is POPULATE TOKEN. It is over as soon as the commands are that it waits for, so that
// IMMED makes no difference.
func populateToken(t *Task) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	ranges, total, err := t.tokenRanges(list, populateHeaderBytes)
	if err != nil {
		return err
	}
	kind := uint32(rodVulnerable)
	if list[2]&0x02 != 0 {
		switch kind = binary.BigEndian.Uint32(list[8:]); kind {
		case rodDefault, rodVulnerable:
		case rodAny:
			kind = rodVulnerable
		default:
			return badList(8)
		}
	}
	seconds := binary.BigEndian.Uint32(list[4:])
	if seconds > maxTokenTimeout {
		return badList(4)
	}
	if seconds == 0 {
		seconds = defaultTokenTimeout
	}
	k := &token{
		unit: t.unit, initiator: t.Nexus.Initiator, blocks: total, blockBytes: t.info.BlockBytes,
		ranges: ranges, sorted: sortedRanges(ranges), timeout: time.Duration(seconds) * time.Second,
	}
	k.describe(kind, t.info)
	o := &copyOp{list: uint32(t.be32(6)), listed: true, action: actionPopulate, units: countBlocks}
	return t.operate(o, func(o *copyOp) error {
		if err := t.unit.enterToken(o, k); err != nil {
			return err
		}
		o.mu.Lock()
		o.token = k.b[:]
		o.mu.Unlock()
		o.add(total)
		return nil
	})
}

// describe fills in all of the token but its identifier and what is random.
func (k *token) describe(kind uint32, i target.Info) {
	b := k.b[:]
	binary.BigEndian.PutUint32(b, kind)
	binary.BigEndian.PutUint16(b[6:], tokenLength)
	id := naa(i)
	b[16], b[20], b[21], b[23] = copyTargetType, 1, 3, byte(len(id))
	copy(b[24:], id[:])
	b[45], b[46], b[47] = byte(i.BlockBytes>>16), byte(i.BlockBytes>>8), byte(i.BlockBytes)
	high, low := bits.Mul64(k.blocks, uint64(i.BlockBytes))
	binary.BigEndian.PutUint64(b[48:], high)
	binary.BigEndian.PutUint64(b[56:], low)
	binary.BigEndian.PutUint32(b[96:], i.BlockBytes)
	b[101] = i.PhysicalExponent & 0x0F
	if i.Thin {
		b[102] = 0xC0
	}
}

// enterToken makes k stand, and returns when nothing that began before can change its blocks any more.
func (u *unit) enterToken(o *copyOp, k *token) error {
	if err := u.target.tokens.add(k); err != nil {
		return err
	}
	defer context.AfterFunc(o.ctx, func() {
		u.mu.Lock()
		u.left.Broadcast()
		u.mu.Unlock()
	})()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.revoke(0, 0) // forgets what has expired
	if len(u.tokens) >= maxUnitTokens || u.removed {
		k.leave(tokenDeleted)
		return illegal(ascNoTokenResources)
	}
	u.tokens = append(u.tokens, k)
	before := u.turns
	for o.ctx.Err() == nil && u.changing(k, before) {
		u.left.Wait()
	}
	if err := o.ctx.Err(); err != nil {
		k.leave(tokenDeleted)
		return err
	}
	return nil
}

// changing says whether a task that began up to that turn, or a visit, may change blocks of k. unit.mu
// is held.
func (u *unit) changing(k *token, turn uint64) bool {
	for t := u.first; t != nil; t = t.next {
		if t.state != taskRunning || t.turn > turn {
			continue
		}
		if t.op.flags&opChanges != 0 || t.op.flags&opRange != 0 && k.overlaps(t.lba, t.blocks) {
			return true
		}
	}
	for v := range u.visits {
		if v.write && k.overlaps(v.lba, v.n) {
			return true
		}
	}
	return false
}

// writeUsingToken is WRITE USING TOKEN.
func writeUsingToken(t *Task) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	ranges, total, err := t.tokenRanges(list, useHeaderBytes)
	if err != nil {
		return err
	}
	o := &copyOp{list: uint32(t.be32(6)), listed: true, action: actionUseToken, units: countBlocks, background: list[2]&0x01 != 0}
	b := list[16:][:tokenBytes]
	if binary.BigEndian.Uint16(b[6:]) != tokenLength {
		return illegal(ascTokenLength)
	}
	switch binary.BigEndian.Uint32(b) {
	case rodDefault, rodVulnerable:
	case rodZero:
		u := t.unit
		return t.operate(o, func(o *copyOp) error { return o.zero(u, ranges) })
	default:
		return illegal(ascTokenType)
	}
	tokens := t.Nexus.Target.tokens
	k, err := tokens.find(b)
	if err != nil {
		return err
	}
	offset := binary.BigEndian.Uint64(list[8:])
	if offset >= k.blocks && total > 0 {
		return badList(8)
	}
	if k.blockBytes != t.info.BlockBytes {
		return badList(16) // blocks of another size
	}
	u, remove := t.unit, list[2]&0x02 != 0
	return t.operate(o, func(o *copyOp) error {
		still := func() error {
			k.lastUsed.Store(tokens.now().UnixNano()) // however long it takes
			return k.still()
		}
		if err := o.useToken(k, u, offset, ranges, still); err != nil {
			return err
		}
		if remove {
			k.leave(tokenDeleted)
		}
		return nil
	})
}

// useToken writes what the token stands for, from offset on, to the ranges, until either ends.
func (o *copyOp) useToken(k *token, to *unit, offset uint64, ranges []target.Range, still func() error) error {
	source := k.ranges
	for len(source) > 0 && offset >= source[0].Blocks {
		offset -= source[0].Blocks
		source = source[1:]
	}
	for _, r := range ranges {
		for r.Blocks > 0 {
			if len(source) == 0 {
				o.partial()
				return nil
			}
			n := min(r.Blocks, source[0].Blocks-offset)
			from := extent{k.unit, source[0].LBA + offset}
			if err := o.transfer(from, extent{to, r.LBA}, n, still); err != nil {
				return err
			}
			r.LBA, r.Blocks = r.LBA+n, r.Blocks-n
			if offset += n; offset == source[0].Blocks {
				source, offset = source[1:], 0
			}
		}
		o.segmentDone()
	}
	return nil
}

// zero is what the block device zero token (SBC-3 4.29.4) stands for: as many zeros as there is room for.
func (o *copyOp) zero(u *unit, ranges []target.Range) error {
	size := uint64(u.dev.Info().BlockBytes)
	for _, r := range ranges {
		v, err := u.enterVisit(o, true, r.LBA, r.Blocks)
		if err != nil {
			return err
		}
		for r.Blocks > 0 && err == nil {
			n := min(r.Blocks, eraseStepBytes/size)
			if err = v.check(); err == nil {
				err = u.dev.WriteSame(o.ctx, r.LBA, n, nil)
			}
			if err == nil {
				err = o.ctx.Err()
			}
			if err == nil {
				o.add(n)
				r.LBA, r.Blocks = r.LBA+n, r.Blocks-n
			}
		}
		v.leave()
		if err != nil {
			return err
		}
		o.segmentDone()
	}
	return nil
}

// reportAllTokens is REPORT ALL ROD TOKENS: the management tokens of those that this unit's copy manager
// made and that stand. They are not enough to use one.
func reportAllTokens(t *Task) error {
	b := append(t.reply[:0], 0, 0, 0, 0, 0, 0, 0, 0)
	for _, k := range t.Nexus.Target.tokens.of(t.unit) {
		b = append(b, k...)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, t.be32(10))
}
