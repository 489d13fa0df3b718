package shelf

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// What may become of drives while nobody looks, and while somebody does. A drive's reservation is in the drive, so
// its sidecar goes where it goes; an older copy of a drive's content has the drive's present reservation.

// shut ends both controllers as the power button does: everything is on the members then, nothing in the logs that
// would hide what they hold.
func (r *rig) shut() {
	r.Helper()
	for _, c := range []string{"B", "A"} {
		if err := r.Signal(c, syscall.SIGTERM); err != nil {
			r.Fatal(err)
		}
		if code, err := r.Exit(r.ctx, c); code != 0 || err != nil {
			r.Fatalf("controller %s told to stop: %d %v", c, code, err)
		}
	}
}

// on starts both and waits until A owns the pool.
func (r *rig) on() {
	r.Helper()
	r.up("A", "B")
	r.owner("A")
	r.inSync("A")
}

// wrote lets the writer come n writes further and stop.
func (r *rig) wrote(n uint64) {
	r.Helper()
	r.write()
	r.more(n)
	r.rest()
}

func (r *rig) rename(from, to string) {
	r.Helper()
	for _, suffix := range []string{"", ".pr"} {
		if err := os.Rename(from+suffix, to+suffix); err != nil && !(suffix != "" && errors.Is(err, os.ErrNotExist)) {
			r.Fatal(err)
		}
	}
}

// copyOf keeps a drive's content beside it; older puts it back.
func (r *rig) copyOf(i int) { r.copyFile(r.Drive(i), r.Drive(i)+".copy") }
func (r *rig) older(i int)  { r.copyFile(r.Drive(i)+".copy", r.Drive(i)) }

func (r *rig) copyFile(from, to string) {
	r.Helper()
	// The same inode, whoever has it open.
	if out, err := exec.Command("dd", "if="+from, "of="+to, "bs=1M", "conv=notrunc,fsync").CombinedOutput(); err != nil {
		r.Fatalf("%v: %s", err, out)
	}
}

// zero makes a drive blank in place, whoever has it open.
func (r *rig) zero(i int) {
	r.Helper()
	info, err := os.Stat(r.Drive(i))
	if err == nil {
		err = errors.Join(os.Truncate(r.Drive(i), 0), os.Truncate(r.Drive(i), info.Size()))
	}
	if err != nil {
		r.Fatal(err)
	}
}

// lost waits until the owner knows that exactly these members are not in order.
func (r *rig) lost(members ...int) {
	r.Helper()
	want := map[int]bool{}
	for _, m := range members {
		want[m] = true
	}
	r.must(r.Wait(r.ctx, "A", fmt.Sprintf("without members %v", members), func(st Status) bool {
		for i, m := range st.Members {
			if (m.State != "online") != want[i] {
				return false
			}
		}
		return len(st.Members) == drives
	}))
}

// TestDrivesZeroed: two drives become blank, one while the shelf is down, one under the writer's hands.
func TestDrivesZeroed(t *testing.T) {
	r := start(t)
	r.wrote(200)
	r.shut()
	r.zero(3)
	r.on()
	r.check("a drive came back blank")
	r.lost(3)

	r.write()
	r.more(100)
	r.zero(7)
	r.more(200)
	r.check("another was zeroed in use")
	r.shut()
	r.on()
	r.check("and after a restart")
	r.wrote(100)
	r.check("and after more")
}

// TestDrivesSwapped: drives change places; they are known by their labels, and all of them are in order.
func TestDrivesSwapped(t *testing.T) {
	r := start(t)
	r.wrote(200)
	r.shut()
	r.rename(r.Drive(2), r.Drive(2)+".moved")
	r.rename(r.Drive(9), r.Drive(2))
	r.rename(r.Drive(2)+".moved", r.Drive(9))
	r.rename(r.Drive(0), r.Drive(0)+".moved")
	r.rename(r.Drive(5), r.Drive(0))
	r.rename(r.Drive(11), r.Drive(5))
	r.rename(r.Drive(0)+".moved", r.Drive(11))
	r.on()
	r.check("five drives in other slots")
	r.lost()
	r.write()
	r.more(100)
	r.Kill("A")
	r.Kill("B")
	r.on()
	r.more(100)
	r.check("and after kill -9")
}

// TestOlderCopies: two drives come back as they were some writes ago, label and all: under the shelf's hands, after a
// stop in order, and after kill -9. Whether they are taken and repaired or refused, what is read is right.
func TestOlderCopies(t *testing.T) {
	r := start(t)
	copies := []int{1, 8}
	for _, c := range []struct {
		how string
		do  func()
	}{{"in use", func() {}}, {"a stop", r.shut}, {"kill -9", func() { r.Kill("A"); r.Kill("B") }}} {
		r.wrote(150)
		r.shut()
		for _, m := range copies {
			r.copyOf(m)
		}
		r.on()
		r.wrote(150)
		c.do()
		for _, m := range copies {
			r.older(m)
		}
		if c.how == "in use" {
			r.check("older copies in use")
			r.shut()
		}
		r.on()
		r.check("older copies after " + c.how)
		r.wrote(100)
		r.check("and after more writes")
	}
}

// TestTooManyOlderCopies: one drive more than parity allows for is an older copy of itself. Then blocks may be lost;
// every one that is says so, or the pool does not start. None may read as something else than was written last.
func TestTooManyOlderCopies(t *testing.T) {
	for _, copies := range [][]int{{0, 1, 2}, {2, 5, 7, 11}} {
		t.Run(fmt.Sprint(copies), func(t *testing.T) {
			r := start(t)
			r.wrote(200)
			r.shut()
			for _, m := range copies {
				r.copyOf(m)
			}
			r.on()
			r.wrote(200)
			r.shut()
			for _, m := range copies {
				r.older(m)
			}
			r.up("A", "B")
			if _, err := r.Wait(r.ctx, "A", "owner", func(st Status) bool { return st.Role == "owner" }); err != nil {
				// It ends when it cannot write, and PID 1 would start it again.
				code, xerr := r.Exit(r.ctx, "A")
				text, rerr := os.ReadFile(r.Log("A"))
				if code != 2 || xerr != nil || rerr != nil || !strings.Contains(string(text), "too many members missing") {
					t.Fatal(err, code, xerr, rerr)
				}
				t.Logf("the pool does not start: too many members missing")
				return
			}
			rep, err := r.w.CheckReadable(r.ctx, r.dev)
			if err != nil {
				t.Fatalf("wrong data: %v", err)
			}
			t.Logf("%+v", rep)
		})
	}
}
