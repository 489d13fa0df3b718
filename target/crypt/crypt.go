// Package crypt encrypts what another target.Device stores, so that all of it can be destroyed at
// once by forgetting a key (SANITIZE, CRYPTOGRAPHIC ERASE; SBC-3 4.11).
//
// Each logical block is enciphered by AES-256 in XTS mode (IEEE 1619) with its LBA as the tweak. A
// block of zeros is not enciphered: zeros are stored, and stored zeros are read as zeros. So unmapped
// blocks need no map of their own and thin provisioning lives on; whoever reads the medium learns which
// blocks are zeros, as the map of a thin unit tells anyhow. That each content of a block has one stored
// form is also what lets the device below compare and write.
//
// The key is kept by a Keys, never beside the data. The package promises that after EraseKey nothing
// stored before can be deciphered; it does not protect against one who changes the medium (XTS has no
// checksum) nor against one who reads the process's memory.
package crypt

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/crypto/xts"

	"github.com/ledge-storage/ledge/target"
)

// KeyBytes is the length of a key: two of AES-256.
const KeyBytes = 64

// Keys keeps the key of one device. Its calls may block.
type Keys interface {
	// Load returns the key, or nothing where Replace was never called.
	Load() ([]byte, error)
	// Replace stores key in the place of any other, atomically and durably: after a power cut Load
	// returns the one or the other, and after Replace returned nil the old one is nowhere.
	Replace(key []byte) error
}

// Device is the encrypted view of a device.
type Device struct {
	target.Device
	keys Keys

	// mu is held shared while blocks are read or written, exclusively by CompareAndWrite and EraseKey.
	mu     sync.RWMutex
	cipher *xts.Cipher
}

// pooled is a Device whose inner one knows its pool.
type pooled struct {
	*Device
	pool target.Provisioned
}

// Space implements target.Provisioned.
func (p pooled) Space() target.Space { return p.pool.Space() }

// New returns the encrypted view of inner, which must be used through it alone. Where keys has no key
// yet, one is made; inner must be blank then. The result knows its pool where inner does.
func New(inner target.Device, keys Keys) (target.Eraser, error) {
	d := &Device{Device: inner, keys: keys}
	key, err := keys.Load()
	if err != nil {
		return nil, fmt.Errorf("crypt: load key: %w", err)
	}
	if len(key) == 0 {
		key = newKey()
		if err := keys.Replace(key); err != nil {
			return nil, fmt.Errorf("crypt: store key: %w", err)
		}
	}
	if d.cipher, err = newCipher(key); err != nil {
		return nil, err
	}
	if pool, ok := inner.(target.Provisioned); ok {
		return pooled{d, pool}, nil
	}
	return d, nil
}

func newKey() []byte {
	key := make([]byte, KeyBytes)
	rand.Read(key) // never fails
	return key
}

func newCipher(key []byte) (*xts.Cipher, error) {
	if len(key) != KeyBytes {
		return nil, fmt.Errorf("crypt: key of %d bytes, want %d", len(key), KeyBytes)
	}
	if bytes.Equal(key[:KeyBytes/2], key[KeyBytes/2:]) {
		return nil, errors.New("crypt: the halves of the key are equal")
	}
	c, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		return nil, fmt.Errorf("crypt: %w", err)
	}
	return c, nil
}

// EraseKey implements target.Eraser. Where the unit is thin its blocks are unmapped afterwards, so that
// they read as zeros and not as noise; the data are gone before that and whatever becomes of it.
func (d *Device) EraseKey(ctx context.Context) error {
	key := newKey()
	c, err := newCipher(key)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.keys.Replace(key); err != nil {
		// Which of the two is stored is not known: neither may serve a write that a restart could not read.
		if err := d.reload(); err != nil {
			return err
		}
		return fmt.Errorf("crypt: replace key: %w", err)
	}
	d.cipher = c
	if i := d.Info(); i.Thin {
		return d.Device.Unmap(ctx, []target.Range{{LBA: 0, Blocks: i.Blocks}})
	}
	return nil
}

// reload makes the stored key the one in use. mu is held.
func (d *Device) reload() error {
	key, err := d.keys.Load()
	if err == nil {
		var c *xts.Cipher
		if c, err = newCipher(key); err == nil {
			d.cipher = c
			return nil
		}
	}
	d.cipher = nil
	return fmt.Errorf("crypt: the key is not known: %w: %w", target.ErrNotReady, err)
}
