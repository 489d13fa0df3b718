package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

const tgtdTarget = "iqn.2026-11.test:disk"

// startTgtd serves a 16 MiB file as LUN 1 with Debian's tgtd, and ends it with the test.
func startTgtd(t *testing.T, admin ...[]string) (portal string) {
	t.Helper()
	bin, err := exec.LookPath("tgtd")
	if err != nil {
		t.Skip("tgtd is not installed")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	portal = l.Addr().String()
	l.Close()
	// tgtd's control socket is named by a number for the whole machine.
	control := fmt.Sprint(1000 + rand.IntN(20000))
	cmd := exec.Command(bin, "-f", "-C", control, "--iscsi", "portal="+portal)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(file, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	tgtadm := func(args ...string) {
		t.Helper()
		var out []byte
		for range 50 {
			if out, err = exec.Command("tgtadm", append([]string{"-C", control, "--lld", "iscsi"}, args...)...).CombinedOutput(); err == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Skipf("tgtadm %v: %v %s", args, err, out)
	}
	tgtadm("--op", "new", "--mode", "target", "--tid", "1", "-T", tgtdTarget)
	tgtadm("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", file)
	tgtadm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
	for _, a := range admin {
		tgtadm(a...)
	}
	return portal
}

func rw(write bool, blocks int, lba uint64) (cdb [16]byte) {
	cdb[0] = 0x88
	if write {
		cdb[0] = 0x8a
	}
	binary.BigEndian.PutUint64(cdb[2:], lba)
	binary.BigEndian.PutUint32(cdb[10:], uint32(blocks))
	return cdb
}

// must runs a command and drains unit attentions first.
func must(t *testing.T, s *Session, c *Command) {
	t.Helper()
	for range 5 {
		if err := s.Do(context.Background(), c); err != nil {
			t.Fatal(err)
		}
		if c.Status == StatusGood {
			return
		}
	}
	t.Fatalf("status %#02x, sense % x", c.Status, c.Sense)
}

// Writes of all sizes around the bursts, many at a time, with and without digests and CHAP, read back
// through another session.
func TestTgtd(t *testing.T) {
	portal := startTgtd(t,
		[]string{"--op", "update", "--mode", "target", "--tid", "1", "--name", "HeaderDigest", "--value", "CRC32C,None"},
		[]string{"--op", "update", "--mode", "target", "--tid", "1", "--name", "DataDigest", "--value", "CRC32C,None"},
		[]string{"--op", "new", "--mode", "account", "--user", "host", "--password", "hostsecret123"},
		[]string{"--op", "new", "--mode", "target", "--tid", "2", "-T", tgtdTarget + "-chap"},
		[]string{"--op", "bind", "--mode", "account", "--tid", "2", "--user", "host"},
		[]string{"--op", "bind", "--mode", "target", "--tid", "2", "-I", "ALL"})
	for _, digest := range []bool{false, true} {
		t.Run(fmt.Sprintf("digest=%v", digest), func(t *testing.T) {
			cfg := Config{Portal: portal, Target: tgtdTarget, InitiatorName: "iqn.2026-11.test:host", HeaderDigest: digest, DataDigest: digest, QueueDepth: 32}
			s, err := Dial(context.Background(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if s.par.digests != (digests{digest, digest}) {
				t.Fatalf("digests %+v", s.par.digests)
			}
			must(t, s, &Command{LUN: 1})
			want := make([]byte, 16<<20)
			random := rand.New(rand.NewPCG(1, 2))
			type piece struct{ off, n int }
			var pieces []piece
			for off := 0; off < len(want); {
				n := min(512*(1+random.IntN(1<<random.IntN(13))), len(want)-off)
				pieces = append(pieces, piece{off, n})
				off += n
			}
			for i := range want {
				want[i] = byte(random.Uint32())
			}
			work := make(chan piece)
			var wg sync.WaitGroup
			for range 48 {
				wg.Go(func() {
					for p := range work {
						c := Command{LUN: 1, CDB: rw(true, p.n/512, uint64(p.off/512)), Out: want[p.off : p.off+p.n]}
						if err := s.Do(context.Background(), &c); err != nil || c.Status != 0 {
							t.Errorf("write %+v: %v, status %d", p, err, c.Status)
						}
						back := make([]byte, p.n)
						r := Command{LUN: 1, CDB: rw(false, p.n/512, uint64(p.off/512)), In: back}
						if err := s.Do(context.Background(), &r); err != nil || r.Status != 0 || r.Transferred != p.n {
							t.Errorf("read %+v: %v, status %d, %d bytes", p, err, r.Status, r.Transferred)
						} else if !bytes.Equal(back, want[p.off:p.off+p.n]) {
							t.Errorf("read %+v differs", p)
						}
					}
				})
			}
			for _, p := range pieces {
				work <- p
			}
			close(work)
			wg.Wait()
			cfg.ISID = [6]byte{}
			other, err := Dial(context.Background(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			must(t, other, &Command{LUN: 1})
			all := make([]byte, len(want))
			must(t, other, &Command{LUN: 1, CDB: rw(false, len(all)/512, 0), In: all})
			if !bytes.Equal(all, want) {
				t.Fatal("the other session reads other data")
			}
			// A read beyond the end is the target's answer, not the session's end.
			c := Command{LUN: 1, CDB: rw(false, 1, 1<<40), In: make([]byte, 512)}
			if err := s.Do(context.Background(), &c); err != nil || c.Status != StatusCheckCondition || len(c.Sense) < 14 {
				t.Fatalf("beyond the end: %v, status %d, sense % x", err, c.Status, c.Sense)
			}
			if err := s.ResetLUN(context.Background(), 1); err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("chap", func(t *testing.T) {
		cfg := Config{Portal: portal, Target: tgtdTarget + "-chap", InitiatorName: "iqn.2026-11.test:host", CHAP: &CHAP{User: "host", Secret: "hostsecret123"}}
		s, err := Dial(context.Background(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		cfg.CHAP = &CHAP{User: "host", Secret: "wrong"}
		if s, err := Dial(context.Background(), cfg); err == nil {
			s.Close()
			t.Fatal("a wrong secret logs in")
		}
		cfg.CHAP = nil
		if s, err := Dial(context.Background(), cfg); err == nil {
			s.Close()
			t.Fatal("no secret logs in")
		}
	})
}
