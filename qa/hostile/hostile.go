// Package hostile sends what a stranger may send (promise P9): random bytes, well-formed messages with some
// bytes changed, cut or repeated, and lengths that lie. Everything comes from a seed, so that what
// stopped a process once stops it again.
//
// It only sends, and drains what is answered; whether the other side lives and still serves honest
// users is for the caller to see.
package hostile

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// A Report counts what was sent.
type Report struct {
	Connections int
	PDUs        int
	Bytes       int64
	// Dropped counts connections that the other side closed before all was sent.
	Dropped int
}

// Options say where and how much.
type Options struct {
	Network, Address string // as for net.Dial
	Seed             uint64
	PDUs             int // in all
	Workers          int // connections at once; zero: 4
}

// conversation yields the messages of one connection; a nil message ends it.
type conversation func(rng *rand.Rand) [][]byte

// ISCSI attacks an iSCSI portal: before login, in login, and in full-feature phase of target.
func ISCSI(ctx context.Context, o Options, target string) (Report, error) {
	return attack(ctx, o, func(rng *rand.Rand) [][]byte {
		var m [][]byte
		logged := rng.IntN(4) > 0
		if logged {
			m = append(m, login(target, "iqn.2026-11.io.ledge:hostile"))
		}
		for range 1 + rng.IntN(12) {
			switch rng.IntN(8) {
			case 0:
				m = append(m, noise(rng, 1+rng.IntN(4096)))
			case 1:
				m = append(m, mutate(rng, login(target, "iqn.2026-11.io.ledge:hostile")))
			default:
				m = append(m, mutate(rng, pdu(rng)))
			}
		}
		return m
	})
}

// Messages attacks with mutations of the given well-formed messages: HTTP requests, frames of the mirror.
func Messages(ctx context.Context, o Options, valid [][]byte) (Report, error) {
	return attack(ctx, o, func(rng *rand.Rand) [][]byte {
		var m [][]byte
		for range 1 + rng.IntN(6) {
			if len(valid) == 0 || rng.IntN(4) == 0 {
				m = append(m, noise(rng, 1+rng.IntN(4096)))
				continue
			}
			m = append(m, mutate(rng, valid[rng.IntN(len(valid))]))
		}
		return m
	})
}

func attack(ctx context.Context, o Options, talk conversation) (Report, error) {
	if o.Workers == 0 {
		o.Workers = 4
	}
	var (
		mu    sync.Mutex
		total Report
		errs  []error
		wg    sync.WaitGroup
	)
	for worker := range o.Workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(o.Seed, uint64(worker)))
			for ctx.Err() == nil {
				mu.Lock()
				done := total.PDUs >= o.PDUs || len(errs) > 0
				mu.Unlock()
				if done {
					return
				}
				r, err := converse(ctx, o, talk(rng))
				mu.Lock()
				total.Connections++
				total.PDUs += r.PDUs
				total.Bytes += r.Bytes
				total.Dropped += r.Dropped
				if err != nil {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	return total, errors.Join(append(errs, ctx.Err())...)
}

// converse sends the messages on one connection. That nobody accepts is an error; that the other side hangs up is not.
func converse(ctx context.Context, o Options, messages [][]byte) (Report, error) {
	var r Report
	d := net.Dialer{Timeout: 20 * time.Second}
	c, err := d.DialContext(ctx, o.Network, o.Address)
	if err != nil {
		return r, fmt.Errorf("hostile: seed %d: nobody answers: %w", o.Seed, err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_, _ = io.Copy(io.Discard, c)
	}()
	for _, m := range messages {
		n, err := c.Write(m)
		r.Bytes += int64(n)
		r.PDUs++
		if err != nil {
			r.Dropped++
			break
		}
	}
	// A moment for the answers, so that the other side also works on what it accepted.
	select {
	case <-drained:
	case <-time.After(2 * time.Millisecond):
	}
	_ = c.Close()
	<-drained
	return r, nil
}

func noise(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// mutate changes, cuts, repeats or grows a copy of m; once in eight it leaves it as it is.
func mutate(rng *rand.Rand, m []byte) []byte {
	p := append([]byte(nil), m...)
	switch rng.IntN(8) {
	case 0:
	case 1:
		p = p[:rng.IntN(len(p)+1)]
	case 2:
		p = append(p, noise(rng, 1+rng.IntN(512))...)
	case 3: // the length fields of a header
		if len(p) >= 24 {
			at := []int{4, 5, 6, 7, 20, 21, 22, 23}[rng.IntN(8)]
			p[at] = byte(rng.Uint32())
		}
	default:
		for range 1 + rng.IntN(8) {
			if len(p) > 0 {
				p[rng.IntN(min(len(p), 64))] = []byte{0, 1, 0x7f, 0x80, 0xff, byte(rng.Uint32())}[rng.IntN(6)]
			}
		}
	}
	if len(p) == 0 {
		p = []byte{0}
	}
	return p
}

const bhsBytes = 48

// login is a one-step login request without authentication (RFC 7143, 11.12).
func login(target, initiator string) []byte {
	text := "InitiatorName=" + initiator + "\x00TargetName=" + target + "\x00SessionType=Normal\x00AuthMethod=None\x00HeaderDigest=None\x00" +
		"DataDigest=None\x00MaxRecvDataSegmentLength=65536\x00InitialR2T=No\x00ImmediateData=Yes\x00"
	p := make([]byte, bhsBytes, bhsBytes+len(text)+3)
	p[0], p[1] = 0x43, 0x87 // immediate; transit, operational negotiation to full feature
	length(p, len(text))
	p[8] = 0x80 // a random ISID, always the same: sessions are reinstated
	p[47] = 0
	p = append(p, text...)
	return append(p, make([]byte, -len(p)&3)...)
}

// pdu is a well-formed PDU of full-feature phase with random, mostly plausible, fields.
func pdu(rng *rand.Rand) []byte {
	ops := []byte{0x00, 0x01, 0x01, 0x01, 0x01, 0x02, 0x04, 0x05, 0x05, 0x06, 0x10}
	p := make([]byte, bhsBytes)
	p[0] = ops[rng.IntN(len(ops))]
	if rng.IntN(2) == 0 {
		p[0] |= 0x40
	}
	p[1] = 0x80
	data := 0
	switch p[0] & 0x3f {
	case 0x01:
		cdbs := []byte{0x00, 0x03, 0x12, 0x15, 0x1a, 0x25, 0x28, 0x2a, 0x2f, 0x35, 0x41, 0x42, 0x5a, 0x5e, 0x5f, 0x88, 0x89, 0x8a, 0x8f, 0x91, 0x93, 0x9e, 0xa0, 0xa3, 0xa8, 0xaa}
		p[1] |= byte(rng.IntN(4)) << 5 & 0x60
		p[32] = cdbs[rng.IntN(len(cdbs))]
		for i := 33; i < bhsBytes; i++ {
			if rng.IntN(3) == 0 {
				p[i] = byte(rng.Uint32())
			}
		}
		binary.BigEndian.PutUint32(p[20:], []uint32{0, 1, 512, 4096, 65536, 1 << 24, 1<<32 - 1}[rng.IntN(7)])
		if p[1]&0x20 != 0 {
			data = []int{0, 512, 4096}[rng.IntN(3)]
		}
	case 0x02:
		p[1] |= byte(1 + rng.IntN(8))
	case 0x04, 0x05:
		data = rng.IntN(600)
	}
	p[9] = byte(rng.IntN(4)) // a LUN
	binary.BigEndian.PutUint32(p[16:], uint32(rng.IntN(8)))
	binary.BigEndian.PutUint32(p[24:], uint32(rng.IntN(8)))
	length(p, data)
	return append(p, noise(rng, (data+3)&^3)...)
}

func length(p []byte, n int) { p[5], p[6], p[7] = byte(n>>16), byte(n>>8), byte(n) }
