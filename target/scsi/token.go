package scsi

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// ROD tokens (SPC-4 5.17.6, SBC-3 4.29): a token stands for what blocks of a unit held when POPULATE
// TOKEN made it. Whoever has one may have that written elsewhere, without reading it.
//
// The rule: a token stands for its blocks only as long as none of them is changed. No copy is kept.
// The first command that is going to change one of them revokes the token before it touches the
// device, whether it then succeeds or not (in the standard's words, a point in time copy that is
// change vulnerable). So a token yields what it stood for, or nothing:
//
//   - A command that changes blocks revokes as it begins (unit.begin), or before it calls the device,
//     where its blocks are in a parameter list (unit.changes). Both happen under unit.mu.
//   - POPULATE TOKEN enters the token first, then waits for every command that began before and may
//     change blocks. Those that begin later revoke.
//   - WRITE USING TOKEN looks between reading a piece and writing it whether the token still stands. What
//     was read from blocks that a writer had touched is thereby never written. Where a device copies by
//     itself the look comes after, and the command fails with an undefined destination.
//
// Everything else that takes the basis away revokes all tokens of the unit: SANITIZE, FORMAT UNIT, a
// change of the access state (the partner may have written since), Detach; and SetInitiators those that
// were made by an initiator that sees the unit no more. Snapshots would spare the copies that writers
// disturb; Windows and clusters treat a token as short-lived and read and write instead.
//
// A token is good on every nexus and every target that shares a Tokens, by whoever holds its 512 bytes,
// of which 384 are random. It is forgotten when it was not used for its time-out, and with the process.
//
// Token:
//
//	offset size
//	0      4    ROD type
//	6      2    length of what follows: 504
//	8      8    identifier
//	16     32   creator: CSCD descriptor with the NAA designator of the unit
//	48     16   bytes that it stands for
//	96     4    block size
//	101    1    log2 of the physical block in logical blocks
//	102    1    bits 7 LBPME and 6 LBPRZ of a thin unit
//	128    384  random
const (
	tokenBytes       = 512
	tokenLength      = tokenBytes - 8
	tokenPublicBytes = 96 // a management token: what REPORT ALL ROD TOKENS tells
	tokenRandomAt    = 128

	rodDefault    = 0x00800000
	rodVulnerable = 0x00800001
	rodAny        = 0x0080FFFF
	rodZero       = 0xFFFF0001

	maxTokens       = 1024 // of a Tokens
	maxUnitTokens   = 256  // of one unit
	maxTokenRanges  = 256
	maxTokenBytes   = 64 << 30
	optimalTransfer = 64 << 20

	defaultTokenTimeout = 60   // seconds
	maxTokenTimeout     = 3600 // seconds
)

// Tokens are the ROD tokens of the targets that share them (Options.Tokens).
type Tokens struct {
	now func() time.Time

	mu   sync.Mutex // a leaf
	byID map[uint64]*token
}

// NewTokens returns an empty set. now is the clock of inactivity time-outs; nil: time.Now.
func NewTokens(now func() time.Time) *Tokens {
	if now == nil {
		now = time.Now
	}
	return &Tokens{now: now, byID: make(map[uint64]*token)}
}

type tokenState int32

const (
	tokenStands tokenState = iota
	tokenRevoked
	tokenDeleted
	tokenExpired
)

// token is one ROD token. It is kept after it was revoked, so that its user learns why.
type token struct {
	b          [tokenBytes]byte
	unit       *unit
	initiator  string
	ranges     []target.Range // in the order of the ROD
	sorted     []target.Range // by address
	blocks     uint64
	blockBytes uint32
	timeout    time.Duration
	state      atomic.Int32
	lastUsed   atomic.Int64 // UnixNano
}

func (k *token) id() uint64 { return binary.BigEndian.Uint64(k.b[8:]) }

func (k *token) expired(now time.Time) bool {
	return now.Sub(time.Unix(0, k.lastUsed.Load())) >= k.timeout
}

func (k *token) leave(s tokenState) { k.state.CompareAndSwap(int32(tokenStands), int32(s)) }

// still says whether the token stands, as sense data.
func (k *token) still() error {
	switch tokenState(k.state.Load()) {
	case tokenStands:
		return nil
	case tokenDeleted:
		return illegal(ascTokenDeleted)
	case tokenExpired:
		return illegal(ascTokenExpired)
	}
	return illegal(ascTokenRevoked)
}

// overlaps says whether any of blocks blocks from lba on is one of the token's.
func (k *token) overlaps(lba, blocks uint64) bool {
	// The ranges do not overlap each other, so that their ends are sorted as they are.
	i, _ := slices.BinarySearchFunc(k.sorted, lba, func(r target.Range, lba uint64) int {
		if r.LBA+r.Blocks <= lba {
			return -1
		}
		return 1
	})
	return i < len(k.sorted) && k.sorted[i].LBA < lba+blocks
}

// add enters a new token of the task's unit. Expired ones are forgotten first.
func (s *Tokens) add(k *token) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	for id, o := range s.byID {
		if o.expired(now) {
			o.leave(tokenExpired)
			delete(s.byID, id)
		}
	}
	for id, o := range s.byID {
		if len(s.byID) < maxTokens {
			break
		}
		if tokenState(o.state.Load()) != tokenStands {
			delete(s.byID, id)
		}
	}
	if len(s.byID) >= maxTokens {
		return illegal(ascNoTokenResources)
	}
	for {
		rand.Read(k.b[8:16])
		if _, used := s.byID[k.id()]; !used {
			break
		}
	}
	rand.Read(k.b[tokenRandomAt:])
	k.lastUsed.Store(now.UnixNano())
	s.byID[k.id()] = k
	return nil
}

// find returns the token whose bytes b are, or why it cannot be used.
func (s *Tokens) find(b []byte) (*token, error) {
	s.mu.Lock()
	k := s.byID[binary.BigEndian.Uint64(b[8:])]
	s.mu.Unlock()
	if k == nil {
		return nil, illegal(ascTokenUnknown)
	}
	if subtle.ConstantTimeCompare(k.b[:], b) != 1 {
		return nil, illegal(ascTokenCorrupt)
	}
	if k.expired(s.now()) {
		k.leave(tokenExpired)
	}
	if err := k.still(); err != nil {
		return nil, err
	}
	return k, nil
}

// of returns the public part of the tokens of a unit that stand.
func (s *Tokens) of(u *unit) (out [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	for _, k := range s.byID {
		if k.unit == u && tokenState(k.state.Load()) == tokenStands && !k.expired(now) {
			out = append(out, k.b[:tokenPublicBytes])
		}
	}
	return out
}

// forget drops every token of a unit that goes away.
func (s *Tokens) forget(u *unit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, k := range s.byID {
		if k.unit == u {
			k.leave(tokenRevoked)
			delete(s.byID, id)
		}
	}
}

// The side of the unit.

// revoke ends the tokens of blocks that are going to change. unit.mu is held, and the device is not
// touched before it is given up.
func (u *unit) revoke(lba, blocks uint64) {
	if len(u.tokens) == 0 {
		return
	}
	now := u.target.tokens.now()
	kept := u.tokens[:0]
	for _, k := range u.tokens {
		switch {
		case k.expired(now):
			k.leave(tokenExpired)
		case blocks > 0 && k.overlaps(lba, blocks):
			k.leave(tokenRevoked)
		}
		if tokenState(k.state.Load()) == tokenStands {
			kept = append(kept, k)
		}
	}
	clear(u.tokens[len(kept):])
	u.tokens = kept
}

// changes is revoke, with the lock taken, for commands whose blocks are in a parameter list.
func (u *unit) changes(ranges []target.Range) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, r := range ranges {
		u.revoke(r.LBA, r.Blocks)
	}
}

// revokeAll ends the unit's tokens that match picks.
func (u *unit) revokeAll(match func(*token) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, k := range u.tokens {
		if match(k) {
			k.leave(tokenRevoked)
		}
	}
	u.revoke(0, 0)
}

func everyToken(*token) bool { return true }
