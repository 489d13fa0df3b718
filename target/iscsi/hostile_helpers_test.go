package iscsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

const bystanderTarget = "iqn.2026-11.io.ledge:bystander"

// bystanderRest is between a bystander's writes: without it half of a test's time goes to them.
const bystanderRest = 200 * time.Microsecond

// bystander serves a second target and runs verified I/O on it until stop is called, which returns
// how many blocks were read back. Its target is its own, so that no reset or write of a hostile
// session can excuse an error, or other data.
func (l *lab) bystander(sessions int) (stop func() int) {
	l.t.Helper()
	tgt := scsi.NewTarget(bystanderTarget, scsi.Options{})
	dev, err := mem.New(mem.Options{Bytes: 64 << 20, Name: "bystander"})
	if err != nil {
		l.t.Fatal(err)
	}
	if err := tgt.Attach(0, dev, scsi.UnitOptions{}); err != nil {
		l.t.Fatal(err)
	}
	if err := l.srv.AddTarget(tgt); err != nil {
		l.t.Fatal(err)
	}
	var (
		wg   sync.WaitGroup
		over = make(chan struct{})
		done = make([]int, sessions)
	)
	for i := range sessions {
		c := l.dial()
		c.nc.SetDeadline(time.Now().Add(20 * time.Minute))
		c.isid = byte(i)
		if status := c.loginAs(testInitiator, bystanderTarget); status != 0 {
			l.t.Fatalf("login of a bystander: status %04X", status)
		}
		c.ready()
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer c.nc.Close()
			r := rand.New(rand.NewPCG(1, uint64(i)))
			for {
				select {
				case <-over:
					if done[i] > 0 {
						return
					}
				default:
				}
				l.pause.RLock()
				err := c.verify(uint32(i*1024+r.IntN(1016)), r.Uint32())
				l.pause.RUnlock()
				if err != nil {
					l.t.Errorf("bystander %d after %d blocks: %v", i, done[i], err)
					return
				}
				done[i] += 8
				time.Sleep(bystanderRest)
			}
		}()
	}
	return func() int {
		close(over)
		wg.Wait()
		all := 0
		for i, n := range done {
			if n == 0 {
				l.t.Errorf("bystander %d read nothing", i)
			}
			all += n
		}
		return all
	}
}

// verify writes 4 KiB and reads them back.
func (c *client) verify(lba, value uint32) error {
	data := bytes.Repeat(fill(value), 8)
	for _, h := range []*header{c.command(0xA0, 4096, write10(lba, 8)...), c.command(0xC0, 4096, read10(lba, 8)...)} {
		var out []byte
		if h[1]&0x20 != 0 {
			out = data
		}
		r, err := c.do(h, out, nil)
		if err != nil {
			return err
		}
		if r.status != 0 {
			return fmt.Errorf("status %02X, sense %X/%04X", r.status, r.key, r.asc)
		}
		if out == nil && !bytes.Equal(r.data, data) {
			return errors.New("other data came back")
		}
	}
	return nil
}

// loginAs goes straight to the full feature phase as any initiator, of any target; an empty one is
// a discovery session.
func (c *client) loginAs(initiator, target string, keys ...string) uint16 {
	c.t.Helper()
	first := []string{"InitiatorName=" + initiator, "SessionType=Discovery"}
	if target != "" {
		first = []string{"InitiatorName=" + initiator, "TargetName=" + target}
	}
	p, err := c.loginStep(0x87, append(first, keys...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.tsih = binary.BigEndian.Uint16(p.h[14:])
	return binary.BigEndian.Uint16(p.h[36:])
}

// loginStep sends one login request and takes its response.
func (c *client) loginStep(flags byte, keys ...string) (*pdu, error) {
	var text []byte
	for _, k := range keys {
		text = append(append(text, k...), 0)
	}
	if err := c.send(c.loginHeader(flags), text); err != nil {
		return nil, err
	}
	p, err := c.recv()
	if err == nil && p.h.opcode() != opLoginResp {
		err = fmt.Errorf("opcode %#x answers a login", p.h.opcode())
	}
	return p, err
}

// ping sends an immediate NOP-Out and wants it back, past whatever else arrives.
func (c *client) ping() error {
	c.itt++
	h := new(header)
	h[0], h[1] = opNopOut|0x40, 0x80
	h.put32(16, c.itt)
	h.put32(20, noTag)
	h.put32(24, c.cmdSN)
	if err := c.send(h, []byte("are you there")); err != nil {
		return err
	}
	for {
		p, err := c.recv()
		if err != nil {
			return err
		}
		if p.h.opcode() == opNopIn && p.h.itt() == c.itt {
			if string(p.data) != "are you there" {
				return fmt.Errorf("the ping came back as %q", p.data)
			}
			return nil
		}
	}
}

// ended reads until the target closes the connection. It fails when the target does not.
func (c *client) ended() error {
	for {
		_, err := c.recv()
		var late net.Error
		switch {
		case err == nil:
		case errors.As(err, &late) && late.Timeout():
			return errors.New("the connection stays open")
		default:
			return nil
		}
	}
}

// raw sends a PDU of opcode with an additional header segment and data, digests not counted.
func (c *client) raw(h *header, ahs, data []byte) error {
	h[4] = byte(len(ahs) / 4)
	h.setDataLen(len(data))
	b := append(append(append([]byte(nil), h[:]...), ahs...), data...)
	_, err := c.nc.Write(append(b, make([]byte, padded(len(data))-len(data))...))
	return err
}

// discard reads whatever comes, until the connection ends.
func (c *client) discard(wg *sync.WaitGroup) {
	wg.Add(1)
	go func() {
		defer wg.Done()
		io.Copy(io.Discard, c.nc)
	}()
}

// footprint is what the process holds, in bytes, and its goroutines.
func footprint() (bytes int64, goroutines int) {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse), runtime.NumGoroutine()
}

// footprint is that of the process while no bystander has I/O under way, whose buffers would count.
func (l *lab) footprint() (bytes int64, goroutines int) {
	l.pause.Lock()
	defer l.pause.Unlock()
	return footprint()
}

// quiet waits until the server holds this many sessions and connections, and no data.
func (l *lab) quiet(t *testing.T, sessions int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d sessions and no data", sessions), func() bool {
		s := l.srv.Stats()
		return s.Sessions == sessions && s.Connections == sessions && s.Memory == 0
	})
}
