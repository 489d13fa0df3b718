package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/boards"
)

func exited(code int) syscall.WaitStatus         { return syscall.WaitStatus(code << 8) }
func killed(s syscall.Signal) syscall.WaitStatus { return syscall.WaitStatus(s) }

// TestExitCodeContract is the table of the package comment.
func TestExitCodeContract(t *testing.T) {
	for _, c := range []struct {
		status  syscall.WaitStatus
		crashes int
		restart bool
		pause   time.Duration
		why     string
	}{
		{exited(0), 1, false, 0, "stopped"},
		{exited(1), 1, false, 0, "configuration"},
		{exited(3), 1, true, 0, "fenced"},
		{exited(3), 50, true, 0, "fenced"},
		{exited(4), 1, true, 30 * time.Second, "refused"},
		{exited(2), 1, true, 1 * time.Second, "code 2"},
		{exited(2), 2, true, 2 * time.Second, "code 2"},
		{exited(2), 5, true, 16 * time.Second, "code 2"},
		{exited(2), 6, true, 30 * time.Second, "code 2"},
		{exited(2), 1 << 40, true, 30 * time.Second, "code 2"},
		{exited(99), 1, true, 1 * time.Second, "code 99"},
		{killed(syscall.SIGSEGV), 3, true, 4 * time.Second, "segmentation fault"},
	} {
		d := decide(c.status, c.crashes)
		if d.restart != c.restart || d.pause != c.pause || !strings.Contains(d.why, c.why) {
			t.Errorf("status %#x, crash %d: %+v", c.status, c.crashes, d)
		}
	}
}

// children is the one reaper of the process: two would take each other's children.
var children = sync.OnceValue(func() *reaper {
	r := newReaper()
	go r.reap()
	return r
})

func testConsole(out *bytes.Buffer) *console {
	return &console{out: out, now: func() time.Duration { return 0 }}
}

// TestSupervise runs a child that exits with each code in turn and checks the pauses; then one that must
// be stopped.
func TestSupervise(t *testing.T) {
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	var out bytes.Buffer
	r := children()
	s := newSupervisor(testConsole(&out), r)
	var pauses []time.Duration
	s.sleep = func(d time.Duration) { pauses = append(pauses, d) }
	count := t.TempDir() + "/count"
	// Crash, crash, fenced, crash, refused, stopped.
	script := `n=$(cat ` + count + ` 2>/dev/null || echo 0); echo $((n+1)) > ` + count + `
echo "run $n"; set -- 2 2 3 2 4 0; shift $n; exit $1`
	s.serve(shell, "-c", script)
	want := []time.Duration{time.Second, 2 * time.Second, 0, time.Second, 30 * time.Second}
	if !slices.Equal(pauses, want) {
		t.Errorf("pauses %v, want %v\n%s", pauses, want, out.String())
	}
	for n := range 6 {
		if line := "run " + string(rune('0'+n)) + "\n"; !strings.Contains(out.String(), line) {
			t.Errorf("%q did not reach the console:\n%s", line, out.String())
		}
	}
}

func TestStopKillsWhatDoesNotStop(t *testing.T) {
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	for _, c := range []struct{ script, want string }{
		{"echo up; exec sleep 1000", "stopped"},
		{"trap '' TERM; echo up; while :; do sleep 0.05; done", "killed"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		s := newSupervisor(&console{out: w, now: sinceKernelStart}, children())
		go s.serve(shell, "-c", c.script)
		var said bytes.Buffer
		buf := make([]byte, 4096)
		for !strings.Contains(said.String(), "up\n") {
			n, err := r.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			said.Write(buf[:n])
		}
		s.stop(300 * time.Millisecond)
		w.Close()
		for {
			n, err := r.Read(buf)
			said.Write(buf[:n])
			if err != nil {
				break
			}
		}
		if !strings.Contains(said.String(), c.want) {
			t.Errorf("%s: %q not in\n%s", c.script, c.want, said.String())
		}
	}
}

// TestReaperHandsOnStatus: every status reaches the one who started the child, and no zombie stays.
func TestReaperHandsOnStatus(t *testing.T) {
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	r := children()
	var pids []int
	for code := range 20 {
		pid, done, err := r.start(shell, []string{"-c", "exit " + string(rune('0'+code%10))}, &syscall.ProcAttr{})
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
		if st := <-done; st.ExitStatus() != code%10 {
			t.Errorf("code %d: %v", code%10, st.ExitStatus())
		}
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("pid %d is still there: %v", pid, err)
		}
	}
	if _, _, err := r.start("/nonexistent", nil, &syscall.ProcAttr{}); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("a missing binary: %v", err)
	}
}

func TestForeverOutlivesAPanic(t *testing.T) {
	survived := make(chan struct{})
	go forever(func() { defer close(survived); panic("x") }) // the goroutine stays: that is the promise
	<-survived
}

func TestModuleOrder(t *testing.T) {
	dep, err := parseModulesDep("k/nd_pmem.ko: k/libnvdimm.ko k/nd_btt.ko\nk/nd_btt.ko: k/libnvdimm.ko\nk/libnvdimm.ko:\nk/crc32c-intel.ko:\nk/a.ko: k/b.ko\nk/b.ko: k/a.ko\n")
	if err != nil {
		t.Fatal(err)
	}
	files, unknown := dep.order([]string{"crc32c-intel", "nd_pmem", "nd_btt", "virtio_pci", "ghost", "a"}, map[string]bool{"virtio_pci": true})
	if want := []string{"k/crc32c-intel.ko", "k/libnvdimm.ko", "k/nd_btt.ko", "k/nd_pmem.ko", "k/b.ko", "k/a.ko"}; !slices.Equal(files, want) {
		t.Errorf("files %v, want %v", files, want)
	}
	if !slices.Equal(unknown, []string{"ghost"}) {
		t.Errorf("unknown %v", unknown)
	}
	if _, err := parseModulesDep("no colon here\n"); err == nil {
		t.Error("a line without a colon was accepted")
	}
}

func TestArguments(t *testing.T) {
	a := parseArguments("console=ttyS0 quiet ledge.board=qemu-q35 ledge.controller=B panic=-1\n")
	if a != (arguments{Board: "qemu-q35", Controller: "B"}) {
		t.Errorf("%+v", a)
	}
	if !parseArguments("ledge.rescue").Rescue {
		t.Error("ledge.rescue was not seen")
	}
	for _, c := range []struct {
		a     arguments
		want  string
		board bool
	}{
		{arguments{}, "ledge.board=", false},
		{arguments{Board: "pdp-11", Controller: "A"}, "pdp-11", false},
		{arguments{Board: "qemu-q35", Controller: "C"}, `"C"`, true},
	} {
		b, err := c.a.board()
		if err == nil || !strings.Contains(err.Error(), c.want) || (b != nil) != c.board {
			t.Errorf("%+v: %v, %v", c.a, b != nil, err)
		}
	}
}

// TestControllerOf: the command line's letter counts; a burnt image has none, and the configuration says it.
func TestControllerOf(t *testing.T) {
	for _, c := range []struct{ data, boot, want string }{
		{`{"controller":"A"}`, "", "A"},
		{`{"controller":"B","colour":1}`, "", "B"},
		{`{}`, "B", "B"},
		{`{}`, "", ""},
		{`{"controller":"a"}`, "", ""},
		{`{"controller":7}`, "", ""},
		{`{"controller":"A"}`, "C", ""},
		{`{`, "", ""},
		{``, "", ""},
	} {
		got, err := controllerOf([]byte(c.data), c.boot)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s, command line %q: %q, %v; want %q", c.data, c.boot, got, err, c.want)
		}
	}
}

func TestCompleteConfig(t *testing.T) {
	b, err := boards.Load("qemu-q35")
	if err != nil {
		t.Fatal(err)
	}
	for _, side := range []string{"A", "B"} {
		data, added, err := completeConfig([]byte(`{"shelf":"s","colour":1}`), b, side)
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Shelf, Controller string
			Colour            int
			Drives            []string
			NVRAM             struct{ Path string }
			Mirror            struct{ Listen, Dial string }
		}
		if err := json.Unmarshal(data, &got); err != nil {
			t.Fatal(err)
		}
		if got.Shelf != "s" || got.Colour != 1 || got.Controller != side || got.NVRAM.Path != "/dev/pmem0" || len(got.Drives) != 1 {
			t.Errorf("%s: %s", side, data)
		}
		if at := got.Mirror.Listen + got.Mirror.Dial; at != "169.254.77.1:7700" || (got.Mirror.Listen != "") != (side == "A") {
			t.Errorf("%s: mirror %+v", side, got.Mirror)
		}
		if added != "controller, drives, nvram, mirror" {
			t.Errorf("added %q", added)
		}
	}
	w := *b
	w.MirrorWindow = "/sys/bus/pci/devices/0000:00:09.0/resource2"
	for side, want := range map[string]string{"A": "listen", "B": "dial"} {
		data, _, err := completeConfig([]byte(`{"shelf":"s"}`), &w, side)
		var got struct{ Mirror map[string]string }
		if err == nil {
			err = json.Unmarshal(data, &got)
		}
		if m := got.Mirror; err != nil || len(m) != 2 || m["window"] != w.MirrorWindow || m[want] != "169.254.77.1:7700" {
			t.Errorf("%s: %s, %v", side, data, err)
		}
	}
	// What is given is kept; what contradicts or is no JSON is refused.
	data, added, err := completeConfig([]byte(`{"controller":"A","drives":["/dev/vda"],"nvram":{"path":"/x"},"mirror":{}}`), b, "A")
	if err != nil || added != "nothing" || !bytes.Contains(data, []byte("/dev/vda")) {
		t.Errorf("%s %q %v", data, added, err)
	}
	for _, bad := range []string{`{"controller":"B"}`, `{"controller":7}`, `{`, ``, `[]`} {
		if _, _, err := completeConfig([]byte(bad), b, "A"); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

func TestPowerPressed(t *testing.T) {
	event := func(kind, code uint16, value uint32) []byte {
		e := make([]byte, inputEventBytes)
		binary.NativeEndian.PutUint16(e[16:], kind)
		binary.NativeEndian.PutUint16(e[18:], code)
		binary.NativeEndian.PutUint32(e[20:], value)
		return e
	}
	for _, c := range []struct {
		e    []byte
		want bool
	}{
		{event(1, 116, 1), true}, {event(1, 116, 0), false}, {event(1, 30, 1), false}, {event(0, 116, 1), false}, {nil, false}, {make([]byte, 23), false},
	} {
		if got := powerPressed(c.e); got != c.want {
			t.Errorf("%v: %v", c.e, got)
		}
	}
}
