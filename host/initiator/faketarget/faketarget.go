// Package faketarget is a small iSCSI target with two controllers over one disk in memory, for
// tests of initiators: it can be paused, killed, taken over, and told to answer badly. It believes
// whatever its client says, and knows only what package initiator sends.
package faketarget

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"sync"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/target"
)

// Target is the name of the target; LUN its only one.
const (
	Target = "iqn.2026-11.test:fake"
	LUN    = 3
)

// Answer is what a hook wants in place of the command's execution.
type Answer struct {
	Status byte
	Key    byte
	Code   uint16
	Drop   bool // close the connection in place of an answer
	Silent bool // no answer at all
}

// Shelf is two controllers and their disk.
type Shelf struct {
	BlockBytes, OptimalBlocks, MaxBlocks uint32
	// Window is how many commands a session may have in flight. R2T makes all data solicited.
	Window uint32
	R2T    bool

	mu     sync.Mutex
	before func(controller int, cdb []byte) *Answer
	disk   []byte
	states [2]target.AccessState // as each controller says of itself
	ctl    [2]*controller
}

type controller struct {
	s       *Shelf
	index   int
	addr    string
	l       net.Listener
	wg      sync.WaitGroup
	mu      sync.Mutex
	paused  chan struct{} // nil: running
	conns   map[net.Conn]*conn
	aborted int
	resets  int
}

// New starts both controllers on 127.0.0.1; the first is optimized.
func New(blocks int, blockBytes uint32) *Shelf {
	s := &Shelf{BlockBytes: blockBytes, Window: 32, disk: make([]byte, blocks*int(blockBytes))}
	s.states[1] = target.Standby
	for i := range s.ctl {
		s.ctl[i] = &controller{s: s, index: i, addr: "127.0.0.1:0"}
		s.Start(i)
	}
	return s
}

// Portals are the addresses of both controllers.
func (s *Shelf) Portals() []string { return []string{s.ctl[0].addr, s.ctl[1].addr} }

// Disk is a copy of the content.
func (s *Shelf) Disk() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]byte(nil), s.disk...)
}

// SetState changes what a controller says and does.
func (s *Shelf) SetState(i int, state target.AccessState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states[i] = state
}

// Before sets what is asked before each command is executed. It is called without locks and may block.
func (s *Shelf) Before(f func(controller int, cdb []byte) *Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = f
}

// Grow changes the capacity.
func (s *Shelf) Grow(blocks int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk = append(s.disk, make([]byte, blocks*int(s.BlockBytes)-len(s.disk))...)
}

// Start lets a controller listen (again, on the same address).
func (s *Shelf) Start(i int) {
	c := s.ctl[i]
	l, err := net.Listen("tcp", c.addr)
	if err != nil {
		panic(err)
	}
	c.mu.Lock()
	c.l, c.addr, c.conns = l, l.Addr().String(), map[net.Conn]*conn{}
	c.mu.Unlock()
	c.wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			k := &conn{c: c, nc: nc, br: bufio.NewReaderSize(nc, 64<<10), writes: map[uint32]*write{}}
			c.mu.Lock()
			if c.l != l {
				nc.Close()
			}
			c.conns[nc] = k
			c.mu.Unlock()
			c.wg.Go(k.serve)
		}
	})
}

// Stop ends a controller as kill -9 does. It waits for its goroutines, so Before must not block for ever.
func (s *Shelf) Stop(i int) {
	c := s.ctl[i]
	s.Resume(i)
	c.mu.Lock()
	c.l.Close()
	c.l = nil
	for nc := range c.conns {
		nc.Close()
	}
	c.mu.Unlock()
	c.wg.Wait()
}

// Pause makes a controller accept and then neither read nor answer, as SIGSTOP does.
func (s *Shelf) Pause(i int) {
	c := s.ctl[i]
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.paused == nil {
		c.paused = make(chan struct{})
	}
}

// Resume ends a pause.
func (s *Shelf) Resume(i int) {
	c := s.ctl[i]
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.paused != nil {
		close(c.paused)
		c.paused = nil
	}
}

// DropConnections closes the connections of a controller that goes on.
func (s *Shelf) DropConnections(i int) {
	c := s.ctl[i]
	c.mu.Lock()
	defer c.mu.Unlock()
	for nc := range c.conns {
		nc.Close()
	}
}

// Resets and Aborts count the task management functions.
func (s *Shelf) Resets(i int) int {
	s.ctl[i].mu.Lock()
	defer s.ctl[i].mu.Unlock()
	return s.ctl[i].resets
}
func (s *Shelf) Aborts(i int) int {
	s.ctl[i].mu.Lock()
	defer s.ctl[i].mu.Unlock()
	return s.ctl[i].aborted
}

// Close stops both.
func (s *Shelf) Close() {
	for i, c := range s.ctl {
		c.mu.Lock()
		up := c.l != nil
		c.mu.Unlock()
		if up {
			s.Stop(i)
		}
	}
}

func (c *controller) wait() {
	c.mu.Lock()
	paused := c.paused
	c.mu.Unlock()
	if paused != nil {
		<-paused
	}
}

// conn is one connection and its session.
type conn struct {
	c   *controller
	nc  net.Conn
	br  *bufio.Reader
	run sync.WaitGroup // commands that are executed

	mu             sync.Mutex
	statSN, expCmd uint32
	writes         map[uint32]*write
}

// write is a command that waits for its data.
type write struct {
	h    iscsi.Header
	data []byte
	have int
	r2t  uint32
}

const burst = 64 << 10

func (k *conn) serve() {
	defer func() {
		k.nc.Close()
		k.run.Wait()
		k.c.mu.Lock()
		delete(k.c.conns, k.nc)
		k.c.mu.Unlock()
	}()
	for {
		var h iscsi.Header
		data, err := iscsi.ReadPDU(k.br, &h, 1<<20)
		k.c.wait()
		if err != nil {
			return
		}
		switch h.Opcode() {
		case iscsi.OpLogin:
			k.login(&h)
		case iscsi.OpNopOut:
			if h.TaskTag() != 0xffffffff {
				var r iscsi.Header
				r[0], r[1] = iscsi.OpNopIn, 0x80
				r.SetWord(20, 0xffffffff)
				k.send(&r, h.TaskTag(), nil, true)
			}
		case iscsi.OpLogout:
			var r iscsi.Header
			r[0], r[1] = iscsi.OpLogoutResponse, 0x80
			k.send(&r, h.TaskTag(), nil, true)
			return
		case iscsi.OpTaskRequest:
			k.manage(&h)
		case iscsi.OpCommand:
			k.mu.Lock()
			k.expCmd = h.Word(24) + 1
			k.mu.Unlock()
			k.command(&h, data)
		case iscsi.OpDataOut:
			k.dataOut(&h, data)
		default:
			panic(fmt.Sprintf("faketarget: opcode %#x", h.Opcode()))
		}
	}
}

// send fills in tag and numbers, and writes.
func (k *conn) send(h *iscsi.Header, tag uint32, data []byte, status bool) {
	k.c.wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	h.SetWord(16, tag)
	h.SetWord(24, k.statSN)
	if status {
		k.statSN++
	}
	h.SetWord(28, k.expCmd)
	h.SetWord(32, k.expCmd+k.c.s.Window-1)
	k.nc.Write(iscsi.AppendPDU(nil, h, data))
}

func (k *conn) login(h *iscsi.Header) {
	if h[1]>>2&3 == 0 {
		k.mu.Lock()
		k.expCmd, k.statSN = h.Word(24), 1
		k.mu.Unlock()
	}
	var r iscsi.Header
	r[0], r[1] = iscsi.OpLoginResponse, h[1]
	copy(r[8:14], h[8:14])
	var text string
	if h[1]>>2&3 == 0 {
		text = fmt.Sprintf("TargetPortalGroupTag=%d\x00AuthMethod=None\x00", k.c.index+1)
	} else {
		r[15] = 1
		text = fmt.Sprintf("HeaderDigest=None\x00DataDigest=None\x00InitialR2T=%s\x00ImmediateData=%s\x00MaxRecvDataSegmentLength=16384\x00MaxBurstLength=%d\x00FirstBurstLength=32768\x00",
			yes(k.c.s.R2T), yes(!k.c.s.R2T), burst)
	}
	k.send(&r, h.TaskTag(), []byte(text), true)
}

func yes(b bool) string {
	if b {
		return "Yes"
	}
	return "No"
}

func (k *conn) manage(h *iscsi.Header) {
	k.c.mu.Lock()
	if h[1]&0x7f == 5 {
		k.c.resets++
	} else {
		k.c.aborted++
	}
	k.c.mu.Unlock()
	tag := h.TaskTag()
	k.run.Go(func() { // answered while commands run: the hooks decide what is still applied
		var r iscsi.Header
		r[0], r[1] = iscsi.OpTaskResponse, 0x80
		k.send(&r, tag, nil, true)
	})
}

func (k *conn) command(h *iscsi.Header, data []byte) {
	if h[1]&0x20 == 0 {
		hh := *h
		k.run.Go(func() { k.execute(&hh, nil) })
		return
	}
	w := &write{h: *h, data: make([]byte, h.Word(20))}
	w.have = copy(w.data, data)
	if w.have == len(w.data) {
		k.run.Go(func() { k.execute(&w.h, w.data) })
		return
	}
	k.writes[h.TaskTag()] = w
	if h.Final() {
		k.askMore(w)
	}
}

func (k *conn) dataOut(h *iscsi.Header, data []byte) {
	w := k.writes[h.TaskTag()]
	if w == nil || int(h.Word(40)) != w.have {
		panic("faketarget: Data-Out out of order")
	}
	w.have += copy(w.data[w.have:], data)
	switch {
	case w.have == len(w.data):
		delete(k.writes, h.TaskTag())
		k.run.Go(func() { k.execute(&w.h, w.data) })
	case h.Final():
		k.askMore(w)
	}
}

func (k *conn) askMore(w *write) {
	var r iscsi.Header
	r[0], r[1] = iscsi.OpR2T, 0x80
	r.SetLUN(LUN)
	r.SetWord(20, 7)
	r.SetWord(36, w.r2t)
	r.SetWord(40, uint32(w.have))
	r.SetWord(44, uint32(min(burst, len(w.data)-w.have)))
	w.r2t++
	k.send(&r, w.h.TaskTag(), nil, false)
}

func (k *conn) execute(h *iscsi.Header, out []byte) {
	s, cdb := k.c.s, h[32:48]
	k.c.wait()
	s.mu.Lock()
	before := s.before
	s.mu.Unlock()
	if before != nil {
		if a := before(k.c.index, cdb); a != nil {
			k.refuse(h, a)
			return
		}
	}
	in, bad := s.scsi(k.c.index, h[9], cdb, out)
	if bad != nil {
		k.refuse(h, bad)
		return
	}
	tag, want := h.TaskTag(), int(h.Word(20))
	if h[1]&0x40 == 0 {
		var r iscsi.Header
		r[0], r[1] = iscsi.OpResponse, 0x80
		k.send(&r, tag, nil, true)
		return
	}
	in = in[:min(len(in), want)]
	for off, sn := 0, uint32(0); ; sn++ {
		n := min(len(in)-off, 8192)
		var r iscsi.Header
		r[0] = iscsi.OpDataIn
		r.SetWord(20, 0xffffffff)
		r.SetWord(36, sn)
		r.SetWord(40, uint32(off))
		last := off+n == len(in)
		if last {
			r[1] = 0x81
			if short := want - len(in); short > 0 {
				r[1] |= 2
				r.SetWord(44, uint32(short))
			}
		}
		k.send(&r, tag, in[off:off+n], last)
		if off += n; last {
			return
		}
	}
}

func (k *conn) refuse(h *iscsi.Header, a *Answer) {
	switch {
	case a.Silent:
		return
	case a.Drop:
		k.nc.Close()
		return
	}
	var r iscsi.Header
	r[0], r[1], r[3] = iscsi.OpResponse, 0x80, a.Status
	var data []byte
	if a.Status == iscsi.StatusCheckCondition {
		data = append(make([]byte, 2), 0x72, a.Key, byte(a.Code>>8), byte(a.Code), 0, 0, 0, 0)
		data[1] = 8
	}
	k.send(&r, h.TaskTag(), data, true)
}

// Sense makes a CHECK CONDITION.
func Sense(key byte, code uint16) *Answer {
	return &Answer{Status: iscsi.StatusCheckCondition, Key: key, Code: code}
}

// scsi executes one command.
func (s *Shelf) scsi(controller int, lun byte, cdb, out []byte) (in []byte, bad *Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	be := binary.BigEndian
	switch cdb[0] {
	case 0x12:
		return s.inquiry(controller, lun, cdb)
	case 0xa3:
		in = be.AppendUint32(nil, 24)
		for i := range 2 {
			g := [12]byte{0: byte(s.states[i]), 1: 0xcf, 3: byte(i + 1), 7: 1, 11: byte(i + 1)}
			in = append(in, g[:]...)
		}
		return in, nil
	}
	if lun != LUN {
		return nil, Sense(5, 0x2500)
	}
	switch s.states[controller] {
	case target.Standby:
		return nil, Sense(2, 0x040b)
	case target.Transitioning:
		return nil, Sense(2, 0x040a)
	case target.Unavailable:
		return nil, Sense(2, 0x040c)
	}
	bs := uint64(s.BlockBytes)
	blocks := uint64(len(s.disk)) / bs
	switch cdb[0] {
	case 0x9e:
		in = be.AppendUint64(nil, blocks-1)
		in = be.AppendUint32(in, s.BlockBytes)
		return append(in, make([]byte, 20)...), nil
	case 0x88, 0x8a:
		lba, n := be.Uint64(cdb[2:]), uint64(be.Uint32(cdb[10:]))
		if lba+n > blocks {
			return nil, Sense(5, 0x2100)
		}
		if cdb[0] == 0x88 {
			return append(in, s.disk[lba*bs:(lba+n)*bs]...), nil
		}
		copy(s.disk[lba*bs:], out)
	case 0x42:
		for l := out[8:]; len(l) >= 16; l = l[16:] {
			lba, n := be.Uint64(l), uint64(be.Uint32(l[8:]))
			clear(s.disk[lba*bs : (lba+n)*bs])
		}
	case 0x91, 0x00:
	default:
		return nil, Sense(5, 0x2000)
	}
	return nil, nil
}

func (s *Shelf) inquiry(controller int, lun byte, cdb []byte) ([]byte, *Answer) {
	if cdb[1]&1 == 0 {
		std := make([]byte, 96)
		std[2], std[3], std[4], std[5] = 6, 2, 91, 0x10
		if lun != LUN {
			std[0] = 0x7f
		}
		return std, nil
	}
	var body []byte
	switch cdb[2] {
	case 0x83:
		body = append(body, 1, 3, 0, 8, 0x60, 1, 2, 3, 4, 5, 6, 7)
		body = append(body, 1, 0x14, 0, 4, 0, 0, 0, byte(controller+1), 1, 0x15, 0, 4, 0, 0, 0, byte(controller+1))
	case 0xb0:
		body = make([]byte, 60)
		binary.BigEndian.PutUint32(body[4:], s.MaxBlocks)
		binary.BigEndian.PutUint32(body[8:], s.OptimalBlocks)
	default:
		return nil, Sense(5, 0x2400)
	}
	page := []byte{0, cdb[2], 0, byte(len(body))}
	return append(page, body...), nil
}
