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

// TestTooManyOlderCopies: one drive more than parity allows for is an older copy of itself. The pool waits for them, and
// says so; with one of them as it was, it opens, and with all, everything reads as it was written last.
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
				r.copyFile(r.Drive(m), r.Drive(m)+".newest")
				r.older(m)
			}
			r.up("A", "B")
			st, err := r.Wait(r.ctx, "A", "waiting for members", func(st Status) bool { return strings.Contains(st.Trouble, "are missing") })
			r.must(st, err)
			if st.Phase != "starting" || !strings.Contains(st.Trouble, strings.Join(strings.Fields(strings.Trim(fmt.Sprint(copies), "[]")), ", ")+" are missing, parity stands for 2") {
				t.Fatalf("phase %s: %s", st.Phase, st.Trouble)
			}
			if code, err := r.Call(r.ctx, "A", "POST", "/v1/takeover", nil, nil); code != 409 {
				t.Fatalf("takeover of a pool that cannot be opened: %d %v", code, err)
			}
			// Once enough of them are what they were, it opens by itself.
			for _, m := range copies[2:] {
				r.copyFile(r.Drive(m)+".newest", r.Drive(m))
			}
			r.owner("A")
			r.check("two members are older copies")
		})
	}
}

// TestMissingMembers: the pool of a shelf that starts without more members than parity stands for waits for them, and
// nothing is given up meanwhile; neither does a standby that sees too few take over.
func TestMissingMembers(t *testing.T) {
	r := start(t)
	r.wrote(200)
	r.Kill("A")
	r.Kill("B")
	gone := []int{3, 8, 10}
	for _, m := range gone {
		r.rename(r.Drive(m), r.Drive(m)+".gone")
	}
	r.up("A", "B")
	for _, c := range []string{"A", "B"} {
		st, err := r.Wait(r.ctx, c, "waiting for members", func(st Status) bool {
			return strings.Contains(st.Trouble, "members 3, 8, 10 are missing, parity stands for 2")
		})
		r.must(st, err)
	}
	for _, m := range gone {
		r.rename(r.Drive(m)+".gone", r.Drive(m))
	}
	r.owner("A")
	r.inSync("A")
	r.lost()
	r.check("members came back")
}
