package qcow2

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
)

// Source is a disk to make an image of. It does not change meanwhile.
type Source interface {
	// Size in bytes.
	Size() int64
	// Next tells whether there is data at off, below Size, and for how many bytes at least, more than zero, that stays so.
	Next(ctx context.Context, off int64) (data bool, n int64, err error)
	// ReadAt fills p, which may reach beyond the disk's end: zeros.
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// bitmap says which of the clusters of an L2 table hold data.
type bitmap [tableEntries / 64]uint64

func (b *bitmap) has(i int) bool { return b[i/64]>>(i%64)&1 != 0 }
func (b *bitmap) add(i int)      { b[i/64] |= 1 << (i % 64) }

// Plan is the image of a source. It takes an 8192th of a bit of memory for each byte of those 512 MiB that hold something.
type Plan struct {
	src    Source
	size   int64
	tables []int // indices of the L2 tables that are there
	used   map[int]*bitmap
	data   int64 // clusters

	refTable, refBlocks, l1, total int64 // clusters; total is of the image
}

// NewPlan looks where src holds data.
func NewPlan(ctx context.Context, src Source) (*Plan, error) {
	p := &Plan{src: src, size: src.Size(), used: map[int]*bitmap{}}
	if p.size < 0 || p.size > MaxSize {
		return nil, fmt.Errorf("%w: a disk of %d bytes; at most %d", ErrUnsupported, p.size, int64(MaxSize))
	}
	for off := int64(0); off < p.size; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		data, n, err := src.Next(ctx, off)
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			return nil, fmt.Errorf("qcow2: source says %d bytes at %d", n, off)
		}
		n = min(n, p.size-off)
		if data {
			for c := off / clusterBytes; c <= (off+n-1)/clusterBytes; c++ {
				p.add(c)
			}
		}
		off += n
	}
	slices.Sort(p.tables)
	p.layOut()
	return p, nil
}

func (p *Plan) add(cluster int64) {
	t, i := int(cluster/tableEntries), int(cluster%tableEntries)
	b := p.used[t]
	if b == nil {
		b = new(bitmap)
		p.used[t] = b
		p.tables = append(p.tables, t)
	}
	if !b.has(i) {
		b.add(i)
		p.data++
	}
}

func clusters(bytes int64) int64 { return (bytes + clusterBytes - 1) / clusterBytes }

func (p *Plan) l1Entries() int64 { return (clusters(p.size) + tableEntries - 1) / tableEntries }

// layOut computes how many clusters everything takes: the reference counts count themselves.
func (p *Plan) layOut() {
	p.l1 = clusters(p.l1Entries() * 8)
	for {
		p.total = 1 + p.refTable + p.refBlocks + p.l1 + int64(len(p.tables)) + p.data
		blocks := (p.total + countsABlock - 1) / countsABlock
		table := clusters(blocks * 8)
		if blocks == p.refBlocks && table == p.refTable {
			return
		}
		p.refBlocks, p.refTable = blocks, table
	}
}

// Bytes is the length of the image.
func (p *Plan) Bytes() int64 { return p.total * clusterBytes }

// DataBytes is how much of the disk it holds.
func (p *Plan) DataBytes() int64 { return p.data * clusterBytes }

// Write writes the image; progress, if not nil, is told now and then how many bytes went out.
func (p *Plan) Write(ctx context.Context, w io.Writer, progress func(bytes int64)) error {
	out := bufio.NewWriterSize(w, 1<<20)
	if err := p.writeTables(out); err != nil {
		return err
	}
	written := (p.total - p.data) * clusterBytes
	buf := make([]byte, 16*clusterBytes)
	for _, t := range p.tables {
		for i := 0; i < tableEntries; {
			if !p.used[t].has(i) {
				i++
				continue
			}
			n := 1
			for n < len(buf)/clusterBytes && i+n < tableEntries && p.used[t].has(i+n) {
				n++
			}
			part := buf[:n*clusterBytes]
			if err := p.src.ReadAt(ctx, part, (int64(t)*tableEntries+int64(i))*clusterBytes); err != nil {
				return err
			}
			if _, err := out.Write(part); err != nil {
				return err
			}
			i += n
			written += int64(len(part))
			if progress != nil {
				progress(written)
			}
		}
	}
	return out.Flush()
}

// writeTables writes all that comes before the data.
func (p *Plan) writeTables(out *bufio.Writer) error {
	head := make([]byte, clusterBytes)
	be.PutUint32(head, magic)
	be.PutUint32(head[4:], 3)
	be.PutUint32(head[20:], clusterBits)
	be.PutUint64(head[24:], uint64(p.size))
	be.PutUint32(head[36:], uint32(p.l1Entries()))
	be.PutUint64(head[40:], uint64(1+p.refTable+p.refBlocks)*clusterBytes)
	be.PutUint64(head[48:], clusterBytes)
	be.PutUint32(head[56:], uint32(p.refTable))
	be.PutUint32(head[96:], 4) // counts of 2^4 bits
	be.PutUint32(head[100:], headerBytes)
	if _, err := out.Write(head); err != nil {
		return err
	}
	entries := func(n, room int64, entry func(i int64) uint64) (err error) {
		var b [8]byte
		for i := range room * tableEntries {
			be.PutUint64(b[:], 0)
			if i < n {
				be.PutUint64(b[:], entry(i))
			}
			if _, err = out.Write(b[:]); err != nil {
				return err
			}
		}
		return nil
	}
	if err := entries(p.refBlocks, p.refTable, func(i int64) uint64 { return uint64(1+p.refTable+i) * clusterBytes }); err != nil {
		return err
	}
	for i := range p.refBlocks * countsABlock {
		b := [2]byte{}
		if i < p.total {
			b[1] = 1
		}
		if _, err := out.Write(b[:]); err != nil {
			return err
		}
	}
	at, next := 1+p.refTable+p.refBlocks+p.l1, 0
	if err := entries(p.l1Entries(), p.l1, func(i int64) uint64 {
		if next == len(p.tables) || p.tables[next] != int(i) {
			return 0
		}
		next++
		return uint64(at+int64(next)-1)*clusterBytes | copied
	}); err != nil {
		return err
	}
	at += int64(len(p.tables))
	for _, t := range p.tables {
		if err := entries(tableEntries, 1, func(i int64) uint64 {
			if !p.used[t].has(int(i)) {
				return 0
			}
			at++
			return uint64(at-1)*clusterBytes | copied
		}); err != nil {
			return err
		}
	}
	return nil
}
