package crypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/crypto/xts"

	"github.com/ledge-storage/ledge/target"
)

// pieceBytes is how much is enciphered in one buffer.
const pieceBytes = 128 << 10

var pieces = sync.Pool{New: func() any { return new([pieceBytes]byte) }}

var zeros [4096]byte

func isZero(block []byte) bool { return bytes.Equal(block, zeros[:len(block)]) }

// encrypt enciphers the blocks of src, the first of which has address lba, into dst.
func encrypt(c *xts.Cipher, size int, dst, src []byte, lba uint64) {
	for ; len(src) > 0; dst, src, lba = dst[size:], src[size:], lba+1 {
		if isZero(src[:size]) {
			clear(dst[:size])
		} else {
			c.Encrypt(dst[:size], src[:size], lba)
		}
	}
}

// decrypt deciphers the blocks in place.
func decrypt(c *xts.Cipher, size int, b []byte, lba uint64) {
	for ; len(b) > 0; b, lba = b[size:], lba+1 {
		if !isZero(b[:size]) {
			c.Decrypt(b[:size], b[:size], lba)
		}
	}
}

// block returns the block size, or an error where no key is known. mu is held.
func (d *Device) block() (int, error) {
	if d.cipher == nil {
		return 0, fmt.Errorf("crypt: the key is not known: %w", target.ErrNotReady)
	}
	return int(d.Info().BlockBytes), nil
}

// Read implements target.Device.
func (d *Device) Read(ctx context.Context, lba uint64, dst [][]byte) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	size, err := d.block()
	if err != nil {
		return err
	}
	if err := d.Device.Read(ctx, lba, dst); err != nil {
		return err
	}
	for _, p := range dst {
		decrypt(d.cipher, size, p, lba)
		lba += uint64(len(p) / size)
	}
	return nil
}

// Write implements target.Device. All goes to the device below in one call, so that what it writes
// atomically stays so.
func (d *Device) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	size, err := d.block()
	if err != nil {
		return err
	}
	var out [][]byte
	var used []*[pieceBytes]byte
	defer func() {
		for _, p := range used {
			pieces.Put(p)
		}
	}()
	at := lba
	for _, p := range src {
		for len(p) > 0 {
			n := min(len(p), pieceBytes)
			b := pieces.Get().(*[pieceBytes]byte)
			used = append(used, b)
			encrypt(d.cipher, size, b[:n], p[:n], at)
			out = append(out, b[:n])
			p, at = p[n:], at+uint64(n/size)
		}
	}
	return d.Device.Write(ctx, lba, out, fua)
}

// WriteSame implements target.Device. Each block is stored differently, so that only zeros are short.
func (d *Device) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	if i := d.Info(); lba > i.Blocks || blocks > i.Blocks-lba {
		return fmt.Errorf("crypt: %d blocks at block %d: %w", blocks, lba, target.ErrRange)
	}
	if block == nil || isZero(block) {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return d.Device.WriteSame(ctx, lba, blocks, nil)
	}
	run := bytes.Repeat(block, int(min(blocks, pieceBytes/uint64(len(block)))))
	for blocks > 0 {
		n := min(blocks, uint64(len(run)/len(block)))
		if err := d.Write(ctx, lba, [][]byte{run[:n*uint64(len(block))]}, false); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		lba, blocks = lba+n, blocks-n
	}
	return nil
}

// Unmap implements target.Device.
func (d *Device) Unmap(ctx context.Context, ranges []target.Range) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.Device.Unmap(ctx, ranges)
}

// CompareAndWrite implements target.Device: the device below compares what is stored. Where that
// differs, the byte at which the data do is looked for here.
func (d *Device) CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	size, err := d.block()
	if err != nil {
		return err
	}
	old, next := make([]byte, len(compare)), make([]byte, len(write))
	encrypt(d.cipher, size, old, compare, lba)
	encrypt(d.cipher, size, next, write, lba)
	err = d.Device.CompareAndWrite(ctx, lba, old, next)
	var miss *target.MiscompareError
	if !errors.As(err, &miss) {
		return err
	}
	if err := d.Device.Read(ctx, lba, [][]byte{old}); err != nil {
		return err
	}
	decrypt(d.cipher, size, old, lba)
	for i := range old {
		if old[i] != compare[i] {
			return &target.MiscompareError{Offset: uint64(i)}
		}
	}
	return err
}
