package drive

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"github.com/ledge-storage/ledge/raid"
)

func pair(t *testing.T) (a, b Drive, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "drive")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	open := func(controller string) Drive {
		d, err := Open(path, Options{Controller: controller, Direct: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	return open("A"), open("B"), path
}

func aligned(n int, fill byte) []byte {
	b := make([]byte, n+4096)
	skip := 4096 - int(uintptr(unsafe.Pointer(&b[0]))%4096)
	b = b[skip : skip+n]
	for i := range b {
		b[i] = fill
	}
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFileReservation(t *testing.T) {
	a, b, _ := pair(t)
	write := func(d Drive, fill byte) error {
		_, err := d.WriteAt(aligned(4096, fill), 8192)
		return err
	}
	must(t, write(a, 1)) // no reservation: all may write
	must(t, write(b, 2))
	must(t, a.Register(0xA1))
	must(t, a.Reserve(0xA1))
	must(t, write(a, 3))
	for _, f := range []func() error{
		func() error { return write(b, 4) },
		func() error { return b.Reserve(0xB1) },
		func() error { return b.Preempt(0xB1, 0xA1) }, // not registered
		func() error { return b.Release(0xA1) },
	} {
		if err := f(); !errors.Is(err, raid.ErrReservation) {
			t.Fatalf("error %v", err)
		}
	}
	must(t, a.Register(0xA2)) // the holder changes its key
	must(t, b.Register(0xB1))
	must(t, write(b, 5)) // a registrant may write
	keys, holder, err := b.Keys()
	if err != nil || holder != 0xA2 || !slices.Equal(keys, []uint64{0xA2, 0xB1}) {
		t.Fatalf("%x %x %v", keys, holder, err)
	}
	must(t, b.Preempt(0xB1, 0xA2))
	if err := write(a, 6); !errors.Is(err, raid.ErrReservation) {
		t.Fatalf("fenced write: %v", err)
	}
	got := aligned(4096, 0)
	if _, err := a.ReadAt(got, 8192); err != nil || got[0] != 5 {
		t.Fatalf("read %d, %v", got[0], err)
	}
	must(t, b.Release(0xB1))
	must(t, b.Unregister(0xB1))
	if keys, holder, err := a.Keys(); err != nil || len(keys) != 0 || holder != 0 {
		t.Fatalf("%x %x %v", keys, holder, err)
	}
	must(t, write(a, 7))
}

// While writers of the victim run, a preempt comes through, and after it no byte of theirs lands.
func TestFenceUnderWriters(t *testing.T) {
	a, b, _ := pair(t)
	must(t, a.Register(1))
	must(t, a.Reserve(1))
	var stop atomic.Bool
	var wg sync.WaitGroup
	var refused atomic.Int64
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := aligned(4096, 'a')
			for !stop.Load() {
				if _, err := a.WriteAt(p, 0); errors.Is(err, raid.ErrReservation) {
					refused.Add(1)
				} else if err != nil {
					t.Error(err)
				}
			}
		}()
	}
	must(t, b.Register(2))
	must(t, b.Preempt(2, 1))
	_, err := b.WriteAt(aligned(4096, 'b'), 0)
	must(t, err)
	n := refused.Load()
	for refused.Load() < n+100 {
		got := aligned(4096, 0)
		if _, err := b.ReadAt(got, 0); err != nil || got[0] != 'b' {
			t.Fatalf("read %q after the fence, %v", got[0], err)
		}
	}
	stop.Store(true)
	wg.Wait()
}

// TestStoppedHolder is the victim's process below: it takes the write's lock and sleeps with it.
var holdLock = flag.String("hold-lock", "", "internal")

func TestStoppedHolder(t *testing.T) {
	if *holdLock == "" {
		t.Skip("helper of TestFenceStopped")
	}
	f, err := openFile(*holdLock, Options{Controller: "A"})
	must(t, err)
	w, err := f.now.writer(f)
	must(t, err)
	must(t, lock(int(w.Fd()), syscall.LOCK_SH))
	must(t, f.mayWrite())
	os.Stdout.WriteString("locked\n")
	os.Stdin.Read(make([]byte, 1)) // here it is stopped
	_, err = w.WriteAt(aligned(4096, 'a'), 0)
	must(t, err)
	if err := f.mayWrite(); !errors.Is(err, raid.ErrReservation) {
		t.Fatalf("after the fence: %v", err)
	}
	if _, err := f.WriteAt(aligned(4096, 'a'), 0); !errors.Is(err, raid.ErrReservation) {
		t.Fatalf("second write: %v", err)
	}
}

// A victim that is stopped between its check and its write is fenced all the same: not one byte of it is read.
func TestFenceStopped(t *testing.T) {
	a, b, path := pair(t)
	must(t, a.Register(1))
	must(t, a.Reserve(1))
	_, err := a.WriteAt(aligned(8192, 'x'), 65536)
	must(t, err)
	cmd := exec.Command(os.Args[0], "-test.run=TestStoppedHolder", "-hold-lock="+path)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	buf := make([]byte, 7)
	if _, err := out.Read(buf); err != nil || string(buf) != "locked\n" {
		t.Fatalf("%q %v", buf, err)
	}
	must(t, cmd.Process.Signal(syscall.SIGSTOP))
	must(t, b.Register(2))
	must(t, b.Preempt(2, 1))
	_, err = b.WriteAt(aligned(4096, 'b'), 0)
	must(t, err)
	must(t, cmd.Process.Signal(syscall.SIGCONT))
	in.Write([]byte{1})
	rest := new(bytes.Buffer)
	rest.ReadFrom(out)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("victim: %v\n%s", err, rest)
	}
	got := aligned(4096, 0)
	for off, want := range map[int64]byte{0: 'b', 65536: 'x', 69632: 'x', 131072: 0} {
		if _, err := b.ReadAt(got, off); err != nil || got[0] != want || got[4095] != want {
			t.Fatalf("at %d: %q, %v", off, got[0], err)
		}
	}
	fresh, err := Open(path, Options{Controller: "B"})
	must(t, err)
	defer fresh.Close()
	if _, err := fresh.ReadAt(got, 0); err != nil || got[0] != 'b' {
		t.Fatalf("reopened: %q, %v", got[0], err)
	}
}

func TestFileRemoved(t *testing.T) {
	a, _, path := pair(t)
	must(t, os.Remove(path))
	if _, err := a.WriteAt(aligned(4096, 1), 0); !errors.Is(err, ErrGone) {
		t.Fatalf("write: %v", err)
	}
	if _, err := a.ReadAt(aligned(4096, 1), 0); !errors.Is(err, ErrGone) {
		t.Fatalf("read: %v", err)
	}
	if err := a.Flush(); !errors.Is(err, ErrGone) {
		t.Fatalf("flush: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{dir, filepath.Join(dir, "absent"), "/dev/null"} {
		if d, err := Open(p, Options{}); err == nil {
			d.Close()
			t.Errorf("%s opened", p)
		}
	}
	p := filepath.Join(dir, "d")
	must(t, Create(p, 8192))
	if err := Create(p, 8192); err == nil {
		t.Error("created twice")
	}
	d, err := Open(p, Options{})
	must(t, err)
	defer d.Close()
	if _, err := d.WriteAt(aligned(4096, 1), 8192); err == nil {
		t.Error("grew")
	}
}

// The CDBs and parameter lists of SPC-4 6.15 and 6.16, written out by hand.
func TestCommands(t *testing.T) {
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"read keys", reserveInCDB(prReadKeys, 4096), "5e000000000000100000"},
		{"read reservation", reserveInCDB(prReadReservation, 24), "5e010000000000001800"},
		{"register", reserveOutCDB(prRegister), "5f000000000000001800"},
		{"reserve", reserveOutCDB(prReserve), "5f010500000000001800"},
		{"release", reserveOutCDB(prRelease), "5f020500000000001800"},
		{"preempt", reserveOutCDB(prPreempt), "5f040500000000001800"},
		{"register and ignore", reserveOutCDB(prRegisterIgnore), "5f060000000000001800"},
		{"keys", reserveOutData(0x0102030405060708, 0x1112131415161718, false), "010203040506070811121314151617180000000000000000"},
		{"aptpl", reserveOutData(0, 0xff, true), "000000000000000000000000000000ff0000000001000000"},
	} {
		if h := hex.EncodeToString(c.got); h != c.want {
			t.Errorf("%s: %s, want %s", c.name, h, c.want)
		}
	}
	if n := unsafe.Sizeof(sgHeader{}); n != 88 {
		t.Errorf("sg_io_hdr of %d bytes", n)
	}
	var h sgHeader
	for _, o := range []struct {
		name      string
		got, want uintptr
	}{{"dxferp", unsafe.Offsetof(h.data), 16}, {"cmdp", unsafe.Offsetof(h.cdb), 24}, {"sbp", unsafe.Offsetof(h.sense), 32},
		{"timeout", unsafe.Offsetof(h.timeoutMs), 40}, {"usr_ptr", unsafe.Offsetof(h.user), 56}, {"status", unsafe.Offsetof(h.status), 64},
		{"host_status", unsafe.Offsetof(h.hostStatus), 68}, {"resid", unsafe.Offsetof(h.residual), 72}} {
		if o.got != o.want {
			t.Errorf("%s at %d, want %d", o.name, o.got, o.want)
		}
	}
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func TestAnswers(t *testing.T) {
	keys, err := decodeKeys(unhex("00000007000000100000000000000001fffffffffffffffe"))
	if err != nil || !slices.Equal(keys, []uint64{1, 0xfffffffffffffffe}) {
		t.Errorf("%x %v", keys, err)
	}
	if keys, err := decodeKeys(unhex("0000000700000000")); err != nil || len(keys) != 0 {
		t.Errorf("%x %v", keys, err)
	}
	if keys, err := decodeKeys(unhex("00000007ffffffff0000000000000001")); err != nil || len(keys) != 1 {
		t.Errorf("cut: %x %v", keys, err)
	}
	for _, c := range []struct {
		in   string
		want uint64
		ok   bool
	}{
		{"0000000700000000", 0, true},
		{"0000000700000010" + "00000000000000ab" + "00000000" + "00" + "05" + "0000", 0xab, true},
		{"0000000700000010" + "00000000000000ab" + "00000000" + "00" + "01" + "0000", 0, false}, // Write Exclusive
		{"0000000700000010" + "00000000000000ab", 0, false},
		{"00", 0, false},
	} {
		h, err := decodeReservation(unhex(c.in))
		if h != c.want || (err == nil) != c.ok {
			t.Errorf("%s: %x %v", c.in, h, err)
		}
	}
	ua := unhex("700006000000000a00000000290000000000")
	for _, c := range []struct {
		name   string
		status byte
		host   uint16
		driver uint16
		sense  []byte
		want   func(error) bool
	}{
		{"good", 0, 0, 0, nil, func(e error) bool { return e == nil }},
		{"conflict", 0x18, 0, 0, nil, func(e error) bool { return errors.Is(e, raid.ErrReservation) }},
		{"busy", 8, 0, 0, nil, func(e error) bool { return errors.Is(e, errAgain) && !isUnitAttention(e) }},
		{"unit attention", 2, 0, 8, ua, func(e error) bool { return errors.Is(e, errAgain) && isUnitAttention(e) }},
		{"illegal request", 2, 0, 8, unhex("72052600"), func(e error) bool {
			var s *SenseError
			return errors.As(e, &s) && *s == SenseError{5, 0x26, 0} && !errors.Is(e, errAgain)
		}},
		{"transport", 0, 1, 0, nil, func(e error) bool { return e != nil && !errors.Is(e, errAgain) }},
		{"no sense", 2, 0, 8, nil, func(e error) bool { return e != nil && !errors.Is(e, errAgain) }},
	} {
		if err := outcome(c.status, c.host, c.driver, c.sense); !c.want(err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

var update = flag.Bool("update", false, "write golden files")

func TestSidecarGolden(t *testing.T) {
	s := &sidecar{generation: 7, holder: 0xB, entries: []registration{{"A", 0xA}, {"controller-B-xyz", 0xB}}}
	got := s.encode()
	const path = "testdata/sidecar.golden"
	if *update {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatal("the sidecar's format changed")
	}
}

func FuzzSidecar(f *testing.F) {
	golden, err := os.ReadFile("testdata/sidecar.golden")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSidecar(b)
		if err != nil {
			if !errors.Is(err, raid.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		again, err := decodeSidecar(s.encode())
		if err != nil || again.holder != s.holder || !slices.Equal(again.entries, s.entries) {
			t.Fatalf("%+v, then %+v, %v", s, again, err)
		}
	})
}

func FuzzAnswers(f *testing.F) {
	f.Add(unhex("00000007000000100000000000000001fffffffffffffffe"))
	f.Fuzz(func(t *testing.T, b []byte) {
		decodeKeys(b)
		decodeReservation(b)
		decodeSense(b)
	})
}
