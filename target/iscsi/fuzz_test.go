package iscsi

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// canned is a connection whose peer has said all it will say and reads everything.
type canned struct {
	io.Reader
	out int
}

func (c *canned) Write(p []byte) (int, error)      { c.out += len(p); return len(p), nil }
func (c *canned) Close() error                     { return nil }
func (c *canned) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 3260} }
func (c *canned) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9} }
func (c *canned) SetDeadline(time.Time) error      { return nil }
func (c *canned) SetReadDeadline(time.Time) error  { return nil }
func (c *canned) SetWriteDeadline(time.Time) error { return nil }

// fuzzServer is a server that fuzzing feeds connections to.
func fuzzServer(f *testing.F) *Server {
	srv, err := NewServer(Options{Auth: func(initiator, target string) *CHAP {
		if initiator == testInitiator {
			return nil
		}
		return &CHAP{User: "u", Secret: "s", MutualUser: "m", MutualSecret: "t"}
	}})
	if err != nil {
		f.Fatal(err)
	}
	tgt := scsi.NewTarget(testTarget, scsi.Options{MaxTransferBytes: 1 << 20})
	for lun, dev := range []mem.Options{{Bytes: 1 << 20, Name: "0"}, {Bytes: 1 << 20, BlockBytes: 4096, Name: "1"}} {
		d, err := mem.New(dev)
		if err != nil {
			f.Fatal(err)
		}
		if err := tgt.Attach(uint64(lun), d, scsi.UnitOptions{}); err != nil {
			f.Fatal(err)
		}
	}
	if err := srv.AddTarget(tgt); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { srv.Close() })
	return srv
}

// wire is a PDU as it travels.
func wire(h *header, data string) []byte {
	h.setDataLen(len(data))
	b := append(append([]byte(nil), h[:]...), data...)
	return append(b, make([]byte, padded(len(data))-len(data))...)
}

func goodLogin(keys string) []byte {
	c := &client{isid: 1, cmdSN: 1, itt: 1}
	return wire(c.loginHeader(0x87), "InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00"+keys)
}

// FuzzLogin feeds a connection from its first byte.
func FuzzLogin(f *testing.F) {
	f.Add(goodLogin(""))
	f.Add(goodLogin("HeaderDigest=CRC32C\x00DataDigest=CRC32C\x00MaxBurstLength=0x200\x00"))
	c := &client{isid: 2, cmdSN: 1}
	start := wire(c.loginHeader(0x00), "InitiatorName=iqn.x\x00TargetName="+testTarget+"\x00AuthMethod=CHAP\x00")
	f.Add(append(start, wire(c.loginHeader(0x00), "CHAP_A=5,7\x00")...))
	f.Add(wire(c.loginHeader(0x44), "InitiatorName=iqn.x\x00SessionType=Dis"))
	join := &client{isid: 9, cmdSN: 1, tsih: 1}
	for _, cid := range []uint16{0, 1} {
		join.cid = cid
		f.Add(wire(join.loginHeader(0x87), "InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00MaxConnections=4\x00"))
	}
	srv := fuzzServer(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		// A session with TSIH 1 is there to be joined, and replaced.
		srv.mu.Lock()
		srv.lastTSIH = 0
		srv.mu.Unlock()
		l := &client{isid: 9, cmdSN: 1, itt: 1}
		there, done := net.Pipe()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			newConn(srv, there).serve()
		}()
		go io.Copy(io.Discard, done)
		done.Write(wire(l.loginHeader(0x87), "InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00MaxConnections=4\x00"))
		newConn(srv, &canned{Reader: bytes.NewReader(in)}).serve()
		done.Close()
		<-ended
		idle(t, srv)
	})
}

// FuzzConnections feeds the two connections of one session at once; the byte at split cuts the
// input in two. The first connection's login is complete before the second one's begins.
func FuzzConnections(f *testing.F) {
	lead := &client{cmdSN: 1}
	tur := wire(lead.command(0x80, 0, 0, 0, 0, 0, 0, 0), "")
	w := &client{cmdSN: 2, itt: 50}
	h := w.command(0x20, 1024, write10(0, 2)...)
	second := append(wire(h, string(make([]byte, 512))), wire(dataOut(h, noTag, 0, 512), string(make([]byte, 512)))...)
	f.Add(uint16(len(tur)), append(append([]byte(nil), tur...), second...))
	abort := w.function(tmfAbortTask, 0, 7, 1)
	out := w.logout(logoutConnection, 0)
	f.Add(uint16(0), append(second, append(wire(abort, ""), wire(out, "")...)...))
	f.Add(uint16(headerBytes), append(wire(w.function(tmfResetUnit, 0, noTag, 0), ""), wire(w.logout(logoutConnection, 0), "")...))
	srv := fuzzServer(f)
	f.Fuzz(func(t *testing.T, split uint16, in []byte) {
		cut := min(int(split), len(in))
		watchdog := time.AfterFunc(time.Minute, func() {
			debug.SetTraceback("all")
			panic("the connections wait for each other")
		})
		defer watchdog.Stop()
		lead := newStaying(io.MultiReader(bytes.NewReader(goodLogin("MaxConnections=2\x00InitialR2T=No\x00iSCSIProtocolLevel=2\x00")), bytes.NewReader(in[:cut])))
		serve := func(s *staying) {
			newConn(srv, s).serve()
			close(s.ended)
		}
		go serve(lead)
		<-lead.begun
		c := &client{isid: 1, cmdSN: 1, itt: 1, tsih: lead.tsih, cid: 1}
		login := wire(c.loginHeader(0x87), "InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00")
		other := newStaying(io.MultiReader(bytes.NewReader(login), bytes.NewReader(in[cut:])))
		go serve(other)
		for _, s := range []*staying{lead, other} {
			select {
			case <-s.drained:
			case <-s.ended:
			}
		}
		lead.Close()
		other.Close()
		<-lead.ended
		<-other.ended
		idle(t, srv)
		if m := srv.memory.Load(); m != 0 {
			t.Fatalf("%d bytes are still counted", m)
		}
	})
}

// staying is canned, but its peer stays when it has said all, until the connection is closed.
type staying struct {
	canned
	once                          sync.Once
	closing                       sync.Once
	begun, drained, closed, ended chan struct{}
	tsih                          uint16 // from the first answer, when begun is closed
}

func newStaying(r io.Reader) *staying {
	return &staying{canned: canned{Reader: r}, begun: make(chan struct{}), drained: make(chan struct{}), closed: make(chan struct{}), ended: make(chan struct{})}
}

func (s *staying) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if n > 0 || err == nil {
		return n, nil
	}
	close(s.drained)
	<-s.closed
	return 0, io.EOF
}

func (s *staying) Write(p []byte) (int, error) {
	s.once.Do(func() {
		s.tsih = binary.BigEndian.Uint16(p[14:])
		close(s.begun)
	})
	return len(p), nil
}

func (s *staying) Close() error {
	s.closing.Do(func() { close(s.closed) })
	return nil
}

// FuzzConnection feeds a session in its full feature phase.
func FuzzConnection(f *testing.F) {
	c := &client{isid: 1, cmdSN: 1}
	var all []byte
	all = append(all, wire(c.command(0x80, 0, 0, 0, 0, 0, 0, 0), "")...)
	all = append(all, wire(c.command(0xC0, 4096, read10(0, 8)...), "")...)
	all = append(all, wire(c.command(0xA0, 512, write10(0, 1)...), string(make([]byte, 512)))...)
	f.Add(all)
	h := c.command(0x20, 1024, write10(0, 2)...)
	d := new(header)
	d[0], d[1] = opDataOut, 0x80
	d.put32(16, h.itt())
	d.put32(20, noTag)
	f.Add(append(wire(h, ""), wire(d, string(make([]byte, 1024)))...))
	n := new(header)
	n[0], n[1] = opNopOut|0x40, 0x80
	n.put32(16, 9)
	n.put32(20, noTag)
	m := new(header)
	m[0], m[1] = opTaskReq|0x40, 0x80|tmfResetUnit
	x := new(header)
	x[0], x[1] = opTextReq|0x40, 0x80
	x.put32(20, noTag)
	l := new(header)
	l[0], l[1] = opLogoutReq|0x40, 0x80
	f.Add(append(append(append(wire(n, "ping"), wire(m, "")...), wire(x, "SendTargets=\x00")...), wire(l, "")...))
	srv := fuzzServer(f)
	login := goodLogin("InitialR2T=No\x00")
	f.Fuzz(func(t *testing.T, in []byte) {
		newConn(srv, &canned{Reader: io.MultiReader(bytes.NewReader(login), bytes.NewReader(in))}).serve()
		idle(t, srv)
	})
}

// idle checks that a connection that has ended left nothing behind.
func idle(t *testing.T, srv *Server) {
	if st := srv.Stats(); st.Sessions != 0 {
		t.Fatalf("%d sessions are left", st.Sessions)
	}
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if len(srv.tsihs) != 0 {
		t.Fatalf("%d TSIHs are left", len(srv.tsihs))
	}
}

// FuzzText takes text apart and negotiates it.
func FuzzText(f *testing.F) {
	f.Add([]byte("HeaderDigest=CRC32C,None\x00MaxBurstLength=0x1000\x00InitialR2T=Yes\x00"))
	f.Add([]byte("=\x00a=\x00\x00\x00X=Y"))
	f.Fuzz(func(t *testing.T, in []byte) {
		pairs, err := parseText(in)
		if err != nil {
			return
		}
		p := defaultParams()
		for _, kv := range pairs {
			p.negotiate(kv.key, kv.value)
			parseBinary(kv.value)
			validName(kv.value)
		}
		if p.maxSend < 512 || p.maxBurst < 512 || p.maxBurst > ourMaxBurst && p.maxBurst != 262144 || p.firstBurst > ourFirstBurst || p.maxOutstandingR2T < 1 {
			t.Fatalf("negotiated %+v", p)
		}
	})
}
