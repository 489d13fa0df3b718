package iscsi

import (
	"fmt"
	"testing"

	"github.com/ledge-storage/ledge/target/scsi"
)

// TestTaskAborted: with TAS set, a command that another session's reset ends is answered with TASK
// ABORTED, whether it ran or waited for its data; one's own are not answered.
func TestTaskAborted(t *testing.T) {
	for _, waiting := range []bool{false, true} {
		t.Run(fmt.Sprint("waiting ", waiting), func(t *testing.T) {
			dev := newBlocking(t, make(chan struct{}))
			l := newLab(t, Options{}, dev)
			victim := l.session("InitialR2T=Yes", "ImmediateData=Yes").ready()
			other := l.dial()
			other.isid = 2
			if status := other.login(); status != 0 {
				t.Fatalf("login: status %04X", status)
			}
			other.ready()
			page := []byte{0, 0, 0, 0, 0x0A, 10, 0x20, 0x10, 0, 0x40, 0, 0, 0xFF, 0xFF, 0, 0}
			if r := other.must(other.command(0xA0, 16, 0x15, 0x10, 0, 0, 16, 0), page, nil); r.status != 0 {
				t.Fatalf("MODE SELECT: %+v", r)
			}
			victim.do(victim.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil) // mode parameters changed
			w := victim.command(0xA0, 512, write10(0, 1)...)
			var data []byte
			if !waiting {
				data = make([]byte, 512)
			}
			if err := victim.send(w, data); err != nil {
				t.Fatal(err)
			}
			if waiting {
				if p, err := victim.recv(); err != nil || p.h.opcode() != opR2T {
					t.Fatal(p, err)
				}
			} else {
				eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
			}
			m := new(header)
			m[0], m[1] = opTaskReq|0x40, 0x80|tmfResetUnit
			m.put32(16, 1000)
			m.put32(20, noTag)
			m.put32(24, other.cmdSN)
			if err := other.send(m, nil); err != nil {
				t.Fatal(err)
			}
			if p, err := other.recv(); err != nil || p.h.opcode() != opTaskResp || p.h[2] != tmrDone {
				t.Fatal(p, err)
			}
			p, err := victim.recv()
			if err != nil || p.h.opcode() != opResponse || p.h.itt() != w.itt() || p.h[3] != scsi.StatusTaskAborted || len(p.data) != 0 {
				t.Fatalf("%+v %v", p, err)
			}
			victim.ready()
			if ss := l.srv.sessionOf(victim.tsih); ss.underWay() != 0 {
				t.Errorf("%d commands under way", ss.underWay())
			}
		})
	}
}
