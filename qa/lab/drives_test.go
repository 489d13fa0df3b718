package lab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/qa/verify"
)

// What may become of drives between two runs, and in one. qa/shelf has more of it, without a boot for each.

// drivesWritten is how far the writer comes between two of them: some of it on every member.
const drivesWritten = 60

// allDrives runs TestDrives, which takes a quarter of an hour under emulation:
//
//	go test -v -count=1 -timeout 1h ./qa/lab -run 'TestDrives$' -all-drives
var allDrives = flag.Bool("all-drives", false, "run TestDrives")

// TestDrives is testReplaced and all of testDrives on the booted image, with drives so small that a rebuild has an end;
// it loses data at the end, as it should.
func TestDrives(t *testing.T) {
	needMachine(t)
	if !*allDrives {
		t.Skip("only with -all-drives")
	}
	ctx := testContext(t, 55*time.Minute)
	l := newLab(t, Options{DriveBytes: 256 << 20, RebuildDelay: 2 * time.Second, Patience: 10 * time.Minute})
	fatal(t, l.Start(ctx))
	for _, step := range []struct {
		name string
		test func(*testing.T, context.Context, *Lab)
	}{{"Replaced", testReplaced}, {"Drives", testDrives}} {
		if !t.Run(step.name, func(t *testing.T) { step.test(t, ctx, l) }) {
			t.Fatalf("%s failed: the steps after it would say nothing", step.name)
		}
	}
}

// testDrives: drives in other slots, older copies of themselves, and blank: known by their labels, found out by their
// generations, and everything reads back.
func testDrives(t *testing.T, ctx context.Context, l *Lab) {
	const lunBytes = 16 << 20
	fatal(t, l.Agent.End())
	w := &writer{t: t, ctx: ctx}
	var err error
	w.w, err = verify.New(verify.Options{Seed: 0xd217e5, Bytes: lunBytes})
	fatal(t, err)
	w.dev = l.openLUN(t, ctx, "drives", lunBytes)
	defer w.dev.Close()
	write := func(what string) {
		t.Helper()
		w.begin()
		w.advance(what, drivesWritten)
		w.check(what)
	}
	write("at first")

	// 1. Power lost everywhere; two drives change places. Of others copies are kept.
	l.down(t, "kill -9")
	l.swap(t, 1, 12)
	l.keep(t, 9)
	fatal(t, l.StartShelf(ctx))
	w.reads("drives 1 and 12 in each other's slots")
	l.lost(t, ctx)
	write("after that")

	if !*allDrives {
		fatal(t, l.StartAgent(ctx))
		return
	}

	// 2. One becomes blank under the pool's hands.
	w.begin()
	w.advance("before the drive is zeroed", someWrites)
	fatal(t, l.zero(6))
	w.advance("with a drive zeroed", someWrites)
	w.check("drive 6 zeroed in use")

	// 3. A stop in order, so that the members hold everything and no log hides what they hold; one comes back as it was
	// before all this. With the blank one that makes two: as many as parity stands for.
	l.down(t, "stop")
	l.older(t, 9)
	fatal(t, l.StartShelf(ctx))
	w.reads("drive 9 as it was, and 6 blank")
	write("after that")

	l.array(t, ctx, "what drives 6 and 9 should hold is in spare space", func(a api.ArrayInfo) bool { return a.AtRisk[0] == a.Stripes })
	l.down(t, "stop")
	fatal(t, l.zero(2))
	fatal(t, l.StartShelf(ctx))
	w.reads("drive 2 zeroed while all was down")
	l.tooManyOlder(t, ctx, w)
}

// tooManyOlder: one drive more than parity allows for is an older copy of itself. What is lost says so.
func (l *Lab) tooManyOlder(t *testing.T, ctx context.Context, w *writer) {
	l.down(t, "stop")
	copies := []int{4, 7, 10}
	l.keep(t, copies...)
	fatal(t, l.StartShelf(ctx))
	w.begin()
	w.advance("before all of it is lost", drivesWritten)
	w.check("before all of it is lost")
	l.down(t, "stop")
	l.older(t, copies...)
	said := map[string]int{}
	for _, c := range []*Controller{l.A, l.B} {
		text, err := os.ReadFile(c.ConsoleLog())
		fatal(t, err)
		said[c.Name] = refusals(text)
	}
	if l.Enclosure != nil {
		fatal(t, l.startEnclosure(ctx))
	}
	for _, c := range []*Controller{l.A, l.B} {
		fatal(t, c.Start())
	}
	// Either of them serves what it can, or it says why it does not.
	refuses := 0
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	fatal(t, poll(ctx, func() error {
		for _, c := range []*Controller{l.A, l.B} {
			text, err := os.ReadFile(c.ConsoleLog())
			if err != nil {
				return permanent{err}
			}
			if refusals(text) > said[c.Name] {
				refuses++
				return nil
			}
		}
		owner, err := l.A.Status(ctx)
		if err == nil && (owner.Role != "owner" || owner.ServingSince == nil) {
			err = fmt.Errorf("A is %s, %s; %s", owner.Role, owner.Phase, owner.Trouble)
		}
		return err
	}))
	if refuses > 0 {
		t.Logf("drives %v as they were: the pool does not start, and says that too many members are missing", copies)
		return
	}
	r, err := w.w.CheckReadable(ctx, w.dev)
	if err != nil {
		t.Fatalf("more older copies than parity allows for read as data: %v", err)
	}
	t.Logf("drives %v as they were: %d of %d blocks answer with an error, the others are right", copies, r.Unreadable, r.Blocks)
}

// refusals counts how often a console says that too many members are missing: at the first write, or before the pool
// is opened.
func refusals(console []byte) int {
	return strings.Count(string(console), "too many members missing") + strings.Count(string(console), "are needed at least")
}

// down ends everything but the agent: "stop" in order, "kill -9" as a loss of power does.
func (l *Lab) down(t *testing.T, how string) {
	t.Helper()
	parts := []*Part{l.B.Part, l.A.Part}
	if l.Enclosure != nil {
		parts = append(parts, l.Enclosure)
	}
	for _, p := range parts {
		if how == "kill -9" {
			fatal(t, p.Kill())
		} else {
			fatal(t, p.End())
		}
	}
}

// swap exchanges the slots of two drives; nothing has them open.
func (l *Lab) swap(t *testing.T, a, b int) {
	t.Helper()
	for _, suffix := range []string{"", ".pr"} { // form local: the reservation is in the drive
		from, to, moved := l.memberPath(a)+suffix, l.memberPath(b)+suffix, l.memberPath(a)+suffix+".moved"
		if _, err := os.Stat(from); err == nil {
			fatal(t, errors.Join(os.Rename(from, moved), os.Rename(to, from), os.Rename(moved, to)))
		}
	}
}

// keep copies drives; older makes them what they were then; nothing has them open.
func (l *Lab) keep(t *testing.T, members ...int) {
	t.Helper()
	for _, n := range members {
		copyDrive(t, l.memberPath(n), l.memberPath(n)+".copy")
	}
}

func (l *Lab) older(t *testing.T, members ...int) {
	t.Helper()
	for _, n := range members {
		copyDrive(t, l.memberPath(n)+".copy", l.memberPath(n))
	}
}

func copyDrive(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy of %s: %v: %s", filepath.Base(from), err, out)
	}
}

// zero makes a drive blank in place, whoever has it open.
func (l *Lab) zero(n int) error {
	return errors.Join(os.Truncate(l.memberPath(n), 0), os.Truncate(l.memberPath(n), l.o.DriveBytes))
}

// lost waits until the owner knows exactly these members, counted from 0, as not in order.
func (l *Lab) lost(t *testing.T, ctx context.Context, members ...int) {
	t.Helper()
	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	_, err = owner.WaitStatus(ctx, func(st control.Status) error {
		var lost []int
		for _, m := range st.Members {
			if m.State != "online" {
				lost = append(lost, m.Index)
			}
		}
		if fmt.Sprint(lost) != fmt.Sprint(members) {
			return fmt.Errorf("members %v are lost, not %v", lost, members)
		}
		return nil
	})
	fatal(t, err)
}
