package iscsi

import (
	"cmp"
	"slices"
	"testing"

	"github.com/ledge-storage/ledge/target/scsi"
)

// TestSessionStats: each session's commands are told apart.
func TestSessionStats(t *testing.T) {
	l := newLab(t, Options{}, nil)
	a, b := l.dial(), l.dial()
	b.isid = 7
	for _, c := range []*client{a, b} {
		if status := c.login(); status != 0 {
			t.Fatalf("login: status %04X", status)
		}
		c.ready()
	}
	a.must(a.command(0xC0, 4096, read10(0, 8)...), nil, nil)
	b.must(b.command(0xA0, 4096, write10(0, 8)...), make([]byte, 4096), nil)
	b.must(b.command(0xA0, 4096, write10(0, 8)...), make([]byte, 4096), nil)
	sessions := l.srv.Sessions()
	slices.SortFunc(sessions, func(a, b Session) int { return cmp.Compare(a.TSIH, b.TSIH) })
	var s []scsi.Stats
	for _, x := range sessions {
		s = append(s, x.Stats)
	}
	if len(s) != 2 {
		t.Fatalf("%d sessions", len(s))
	}
	if s[0].Reads != 1 || s[0].ReadBytes != 4096 || s[0].Writes != 0 || s[1].Writes != 2 || s[1].WriteBytes != 8192 || s[1].Reads != 0 {
		t.Errorf("%+v\n%+v", s[0], s[1])
	}
}
