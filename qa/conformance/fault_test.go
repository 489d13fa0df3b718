package conformance

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os/exec"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// tap is a proxy that keeps what the client sends.
func tap(t *testing.T, portal string) (addr string, sent func() []byte) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var (
		mu      sync.Mutex
		streams []*bytes.Buffer
		wg      sync.WaitGroup
	)
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", portal)
			if err != nil {
				c.Close()
				return
			}
			b := new(bytes.Buffer)
			mu.Lock()
			streams = append(streams, b)
			mu.Unlock()
			wg.Add(2)
			go func() {
				defer wg.Done()
				io.Copy(io.MultiWriter(s, b), c)
				s.Close()
			}()
			go func() {
				defer wg.Done()
				io.Copy(c, s)
				c.Close()
			}()
		}
	}()
	return l.Addr().String(), func() []byte {
		l.Close()
		wg.Wait()
		var all []byte
		for _, b := range streams {
			all = append(all, b.Bytes()...)
		}
		return all
	}
}

// TestClientsFaultUnmapUntilEnd shows that WriteSame10.UnmapUntilEnd asks, with UNMAP=1, for
// blocks of FFh. SBC-4 5.51 lets a device unmap only where reads afterwards return what was in
// the data-out buffer; ours then writes it. The suite wants zeros.
func TestClientsFaultUnmapUntilEnd(t *testing.T) {
	if _, err := exec.LookPath(Tool); err != nil {
		t.Skip(Tool + " is not installed (Debian: libiscsi-bin)")
	}
	portal := start(t, iscsi.Options{}, unit{lun: 0, mem: mem.Options{Bytes: 64 << 20, Name: "fault"}})
	addr, sent := tap(t, portal)
	results, err := Run(t.Context(), fmt.Sprintf("iscsi://%s/%s/0", addr, targetName), "SCSI.WriteSame10.UnmapUntilEnd")
	if err != nil {
		t.Fatal(err)
	}
	if results[0].Outcome != Failed {
		t.Errorf("it %s: the client has been mended, take it from the list", results[0].Outcome)
	}
	found := 0
	for b := sent(); len(b) >= 48; {
		n := int(b[5])<<16 | int(binary.BigEndian.Uint16(b[6:]))
		size := 48 + int(b[4])*4 + (n+3)&^3
		if size > len(b) {
			break
		}
		const command, writeSame10, unmap = 0x01, 0x41, 0x08
		if b[0]&0x3F == command && b[32] == writeSame10 && b[33]&unmap != 0 {
			data := b[48 : 48+n]
			if n != 512 || !bytes.Equal(data, bytes.Repeat([]byte{0xFF}, 512)) {
				t.Errorf("WRITE SAME(10) with UNMAP=1 and %d bytes % x...", n, data[:min(n, 8)])
			}
			found++
		}
		b = b[size:]
	}
	if found == 0 {
		t.Error("no WRITE SAME(10) with UNMAP=1 was sent")
	}
}
