// Package dedup names blocks by their content and remembers where a name was stored.
//
// It owns the fingerprint (SHA-256, keyed per store, so that fingerprints tell an outsider
// nothing about the content, not even that two stores hold the same block) and the index from
// fingerprint to place. The index is a hint: it may forget an entry, and it may give a place
// whose content is another; whoever uses a hit verifies it against the fingerprint kept beside
// the data. So the index needs no persistence and no transaction, and its memory is one number
// given at the start.
//
// It never reads or writes a device. It is the only importer of sha256-simd.
package dedup

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/cpuid/v2"
	simd "github.com/minio/sha256-simd"
)

// BlockBytes is the size of the blocks that are fingerprinted.
const BlockBytes = 4096

// Fingerprint is SHA-256 over the block followed by the store's key. All messages have one
// length, so that the order of the two allows no extension; this one keeps the block aligned.
type Fingerprint [sha256.Size]byte

// Key makes the fingerprints of one store incomparable with those of another.
type Key [32]byte

// Engine is an implementation of SHA-256.
type Engine uint8

const (
	// Standard is crypto/sha256: the fastest where the CPU has SHA extensions.
	Standard Engine = iota
	// Stream is sha256-simd's single stream.
	Stream
	// Lanes is sha256-simd's AVX-512 server: sixteen blocks at once.
	Lanes
)

func (e Engine) String() string {
	switch e {
	case Standard:
		return "crypto/sha256"
	case Stream:
		return "sha256-simd"
	case Lanes:
		return "sha256-simd avx512 server"
	}
	return "unknown"
}

// laneCount is how many blocks the AVX-512 server hashes at once; fewer callers leave lanes idle.
const laneCount = 16

// Hasher computes fingerprints; it may be used by many goroutines at once.
type Hasher struct {
	key    Key
	engine Engine
	pool   sync.Pool // of hash.Hash; for Lanes of *[laneBytes]byte
	server *simd.Avx512Server
}

// laneBytes is the length of a message with its padding: block, key, 0x80, zeros, bit length.
const laneBytes = BlockBytes + 64

// laneSession numbers the messages of the AVX-512 server: its lane is the number modulo 16.
var laneSession atomic.Uint64

// NewHasher returns a hasher with the engine that Fastest found.
func NewHasher(key Key) *Hasher { return NewHasherWith(key, Fastest()) }

// NewHasherWith returns a hasher with the given engine. Lanes must only be asked for where
// Fastest may return it: on a CPU with AVX-512.
func NewHasherWith(key Key, engine Engine) *Hasher {
	h := &Hasher{key: key, engine: engine}
	switch engine {
	case Stream:
		h.pool.New = func() any { return simd.New() }
	case Lanes:
		h.server = laneServer()
		h.pool.New = func() any {
			var m [laneBytes]byte
			copy(m[BlockBytes:], key[:])
			m[BlockBytes+len(key)] = 0x80
			binary.BigEndian.PutUint64(m[laneBytes-8:], 8*uint64(BlockBytes+len(key)))
			return &m
		}
	default:
		h.pool.New = func() any { return sha256.New() }
	}
	return h
}

// Engine tells which implementation the hasher uses.
func (h *Hasher) Engine() Engine { return h.engine }

// Sum fills dst[i] with the fingerprint of blocks[i].
func (h *Hasher) Sum(dst []Fingerprint, blocks [][]byte) {
	if h.engine == Lanes {
		h.sumLanes(dst, blocks)
		return
	}
	d := h.pool.Get().(hash.Hash)
	for i, b := range blocks {
		d.Reset()
		d.Write(b)
		d.Write(h.key[:])
		d.Sum(dst[i][:0])
	}
	h.pool.Put(d)
}

// sumLanes gives the server whole padded messages of one length, sixteen at a time. Its
// hash.Hash is not used: it keeps references to buffers that its next Write changes, and sums
// of messages sent in pieces of different lengths came out wrong here.
func (h *Hasher) sumLanes(dst []Fingerprint, blocks [][]byte) {
	session := laneSession.Add(1) * laneCount
	var wg sync.WaitGroup
	for lane := 0; lane < laneCount && lane < len(blocks); lane++ {
		wg.Go(func() {
			m := h.pool.Get().(*[laneBytes]byte)
			for i := lane; i < len(blocks); i += laneCount {
				copy(m[:BlockBytes], blocks[i])
				dst[i] = h.server.Sum(session+uint64(lane), m[:])
			}
			h.pool.Put(m)
		})
	}
	wg.Wait()
}

// laneServer is one for the process: sha256-simd has no way to stop its goroutine, which wakes
// every microsecond for as long as the process lives.
var laneServer = sync.OnceValue(simd.NewAvx512Server)

// Fastest measures the engines on this CPU, once for the process (some milliseconds), and returns
// the one that hashes most blocks per second. The AVX-512 server takes part only where the CPU
// has no SHA extensions: with them it was slower here (1.1 against 1.6 GB/s), and once started,
// if only to be measured, it keeps a core awake for ever.
var Fastest = sync.OnceValue(func() Engine {
	engines := []Engine{Standard, Stream}
	if runtime.GOARCH == "amd64" && cpuid.CPU.Supports(cpuid.AVX512F, cpuid.AVX512BW, cpuid.AVX512VL) && !cpuid.CPU.Supports(cpuid.SHA) {
		engines = append(engines, Lanes)
	}
	blocks := make([][]byte, 256)
	for i := range blocks {
		blocks[i] = make([]byte, BlockBytes)
		blocks[i][0], blocks[i][1] = byte(i), byte(i>>8)
	}
	sums := make([]Fingerprint, len(blocks))
	best, bestTime := Standard, time.Duration(0)
	for _, e := range engines {
		h := NewHasherWith(Key{}, e)
		h.Sum(sums[:laneCount], blocks[:laneCount]) // start what must be started
		took := time.Duration(1 << 62)
		for range 3 { // the least of three: the rest is the scheduler's
			start := time.Now()
			h.Sum(sums, blocks)
			took = min(took, time.Since(start))
		}
		if bestTime == 0 || took < bestTime*9/10 { // a tie goes to the standard library
			best, bestTime = e, took
		}
	}
	return best
})
