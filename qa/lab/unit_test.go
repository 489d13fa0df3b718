package lab

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestOrphans: what a killed lab left is ended by pid and start time together; a process that has the pid but
// another start time is somebody else's.
func TestOrphans(t *testing.T) {
	l := &Lab{o: Options{Dir: t.TempDir(), Say: t.Logf}, running: map[string]process{}}
	sleeper := func() *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill() })
		return cmd
	}
	ours, others := sleeper(), sleeper()
	ended := make(chan error, 1)
	go func() { ended <- ours.Wait() }()
	start, _, err := procStat(ours.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.note(process{"ours", ours.Process.Pid, start}); err != nil {
		t.Fatal(err)
	}
	if err := l.note(process{"others", others.Process.Pid, "1"}); err != nil {
		t.Fatal(err)
	}
	if err := l.endOrphans(); err != nil {
		t.Fatal(err)
	}
	<-ended
	if err := others.Process.Signal(os.Interrupt); err != nil {
		t.Errorf("a process that was not ours was ended: %v", err)
	}
	others.Wait()
	if _, err := os.Stat(l.path("processes.json")); !os.IsNotExist(err) {
		t.Errorf("processes.json stayed: %v", err)
	}
}

func TestOneLabPerDirectory(t *testing.T) {
	o := Options{Dir: t.TempDir(), Binaries: t.TempDir(), Local: true, DriveBytes: 64 << 20}
	l, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second lab on the directory: %v", err)
	}
	first, err := os.ReadFile(l.path("secrets.json"))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(l.path("secrets.json")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("secrets.json: %v, %v", info.Mode(), err)
	}
	if err := os.Remove(l.memberPath(5)); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	again, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if second, _ := os.ReadFile(l.path("secrets.json")); !bytes.Equal(first, second) {
		t.Error("the second run has other secrets")
	}
	if _, err := os.Stat(l.memberPath(5)); err == nil {
		t.Error("a member that was removed came back blank")
	}
}

func TestBadOptions(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{}, "no run directory"},
		{Options{Dir: "x"}, "binaries"},
		{Options{Dir: "x", Binaries: "y"}, "image"},
		{Options{Dir: "x", Binaries: "y", Local: true, Drives: 2}, "2 drives"},
		{Options{Dir: "x", Binaries: "y", Local: true, DriveBytes: 1000}, "1000 bytes"},
	} {
		if _, err := New(c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
}

// end is one QEMU's side of the cable.
type end struct {
	t  *testing.T
	ln net.Listener
	c  net.Conn
}

func newEnd(t *testing.T, path string) *end {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return &end{t: t, ln: ln}
}

func (e *end) accept() {
	e.t.Helper()
	c, err := e.ln.Accept()
	if err != nil {
		e.t.Fatal(err)
	}
	e.c = c
}

func (e *end) die() { e.c.Close(); e.ln.Close() }

func (e *end) send(frame string) {
	e.t.Helper()
	if _, err := e.c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
		e.t.Fatal(err)
	}
}

func (e *end) expect(frame string) {
	e.t.Helper()
	e.c.SetReadDeadline(time.Now().Add(20 * time.Second))
	got := make([]byte, 4+len(frame))
	if _, err := io.ReadFull(e.c, got); err != nil || string(got[4:]) != frame {
		e.t.Fatalf("got %q, %v; want %q", got, err, frame)
	}
}

func TestCable(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := t.TempDir()
	pathA, pathB := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	a := newEnd(t, pathA)
	c := newCable(pathA, pathB)
	defer c.close()
	a.accept()
	b := newEnd(t, pathB)
	b.accept()
	for range 3 { // both ways, many frames
		a.send("to b")
		b.expect("to b")
		b.send(strings.Repeat("x", 1500))
		a.expect(strings.Repeat("x", 1500))
	}
	// A loses its power and comes back: B notices nothing, and the cable works again.
	a.die()
	a = newEnd(t, pathA)
	a.accept()
	b.send("again")
	a.expect("again")
	// B sends what is no frame: its connection goes, A's stays.
	b.c.Write([]byte{0xff, 0xff, 0xff, 0xff})
	b.accept()
	a.send("still here")
	b.expect("still here")
	// B freezes: A may send as much as it likes.
	for range 4 * cableQueue {
		a.send(strings.Repeat("y", 1500))
	}
	b.die()
	b = newEnd(t, pathB)
	b.accept()
	a.die()
	b.die()
}

func TestContract(t *testing.T) {
	for code, want := range map[int]bool{0: false, 1: false, 2: true, 3: true, 4: true, -1: true, 77: true} {
		if got, _ := contract(code); got != want {
			t.Errorf("code %d: restart %v", code, got)
		}
	}
}
