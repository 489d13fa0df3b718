package iscsi

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// blockOp is an operation on one block, whose value is the number that fills it.
type blockOp struct {
	kind     byte // 'r', 'w', 'c': compare with old, write value
	lba      uint32
	old, new uint32
}

type blockResult struct {
	value   uint32
	swapped bool
}

// device is a block device as each of its blocks must look: a register with compare-and-swap.
var device = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		by := make(map[uint32][]porcupine.Operation)
		for _, o := range history {
			lba := o.Input.(blockOp).lba
			by[lba] = append(by[lba], o)
		}
		var parts [][]porcupine.Operation
		for _, p := range by {
			parts = append(parts, p)
		}
		return parts
	},
	Init: func() any { return uint32(0) },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(uint32), input.(blockOp), output.(blockResult)
		switch in.kind {
		case 'r':
			return out.value == s, s
		case 'w':
			return true, in.new
		}
		if out.swapped != (s == in.old) {
			return false, s
		}
		if out.swapped {
			return true, in.new
		}
		return true, s
	},
}

func fill(v uint32) []byte {
	b := make([]byte, 512)
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], v)
	}
	return b
}

// TestLinearizable runs random reads, writes and compare-and-writes on a few blocks over several
// sessions at once, on devices of both kinds, and checks that some order explains all answers.
func TestLinearizable(t *testing.T) {
	for name, dev := range map[string]target.Device{"inline": nil, "in workers": newBlocking(t, nil)} {
		t.Run(name, func(t *testing.T) {
			const seed, sessions, each, blocks = 7, 5, 200, 3
			l := newLab(t, Options{}, dev)
			var (
				mu      sync.Mutex
				history []porcupine.Operation
				wg      sync.WaitGroup
				start   = time.Now()
			)
			for id := range sessions {
				c := l.dial()
				c.isid = byte(id + 1)
				if c.login() != 0 {
					t.Fatal("login")
				}
				c.ready()
				wg.Add(1)
				go func() {
					defer wg.Done()
					r := rand.New(rand.NewPCG(seed, uint64(id)))
					for range each {
						in := blockOp{kind: "rwc"[r.IntN(3)], lba: uint32(r.IntN(blocks)), old: uint32(r.IntN(4)), new: uint32(r.IntN(4))}
						call := time.Since(start)
						out, err := c.block(in)
						back := time.Since(start)
						if err != nil {
							t.Errorf("session %d, %c: %v", id, in.kind, err)
							return
						}
						mu.Lock()
						history = append(history, porcupine.Operation{ClientId: id, Input: in, Call: call.Nanoseconds(), Output: out, Return: back.Nanoseconds()})
						mu.Unlock()
					}
				}()
			}
			wg.Wait()
			if !porcupine.CheckOperations(device, history) {
				t.Errorf("seed %d: no order explains the %d answers", seed, len(history))
			}
		})
	}
}

func (c *client) block(in blockOp) (out blockResult, err error) {
	var r *result
	switch in.kind {
	case 'r':
		r, err = c.do(c.command(0xC0, 512, read10(in.lba, 1)...), nil, nil)
		if err == nil && r.status == 0 {
			out.value = binary.BigEndian.Uint32(r.data)
			if !bytes.Equal(r.data, fill(out.value)) {
				c.t.Error("a torn block")
			}
		}
	case 'w':
		r, err = c.do(c.command(0xA0, 512, write10(in.lba, 1)...), fill(in.new), nil)
	default:
		cdb := make([]byte, 16)
		cdb[0], cdb[13] = 0x89, 1
		binary.BigEndian.PutUint64(cdb[2:], uint64(in.lba))
		r, err = c.do(c.command(0xA0, 1024, cdb...), append(fill(in.old), fill(in.new)...), nil)
		if err == nil && r.status == scsi.StatusCheckCondition && r.key == 0xE {
			return out, nil
		}
		out.swapped = true
	}
	if err == nil && r.status != 0 {
		c.t.Errorf("status %02X, sense %X/%04X", r.status, r.key, r.asc)
	}
	return out, err
}
