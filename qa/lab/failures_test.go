package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/host/api"
	"golang.org/x/sys/unix"
)

const (
	verifyVolume = "verify"
	verifyBytes  = 32 << 20
	// someWrites is how far the writer must come between two failures.
	someWrites = 100
)

// testKills: the writer runs while the agent, the standby, the owner and then everything lose their power.
func testKills(t *testing.T, ctx context.Context, l *Lab) {
	w := newWriter(t, ctx, verified(t, ctx, l), 0x1edbe, 0, verifyBytes)
	defer w.dev.Close()

	// 1. The agent.
	w.begin()
	w.advance("before anything", someWrites)
	fatal(t, l.Agent.Kill())
	fatal(t, l.StartAgent(ctx))
	w.advance("after kill -9 of the agent", someWrites)
	w.check("agent killed")

	// 2. The standby: the owner goes on alone, having said so on the members first.
	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	standby := owner.Partner()
	w.begin()
	w.advance("again", someWrites)
	fatal(t, standby.Kill())
	w.advance("after kill -9 of controller "+standby.Name, someWrites)
	_, err = owner.WaitStatus(ctx, func(st control.Status) error {
		if st.Partner.Mirror != "solo" {
			return fmt.Errorf("the mirror is %q", st.Partner.Mirror)
		}
		return nil
	})
	fatal(t, err)
	w.check("standby killed")
	// A standby whose mirror is stale refuses to take over, and says so (P2).
	w.begin()
	fatal(t, standby.Start())
	_, err = standby.WaitAnswer(ctx)
	fatal(t, err)
	fatal(t, l.WaitMirrored(ctx))
	w.advance("after the resync of controller "+standby.Name, someWrites)

	// 3. The owner, then the operator's word.
	fatal(t, owner.Kill())
	out, err := l.ledge(t, ctx, "shelf", "takeover")
	fatal(t, err)
	t.Logf("ledge shelf takeover: %s", strings.TrimSpace(out))
	w.advance("after kill -9 of controller "+owner.Name+" and takeover on "+standby.Name, someWrites)
	w.check("owner killed")
	w.begin()
	fatal(t, owner.Start())
	_, err = owner.WaitAnswer(ctx)
	fatal(t, err)
	fatal(t, l.WaitMirrored(ctx))
	if now, err := l.WaitOwner(ctx); err != nil || now != standby {
		t.Fatalf("the owner is %v, %v after the old one came back", now, err)
	}
	w.advance("with the old owner back as standby", someWrites)

	// 4. Everything at once.
	killed := make(chan error, 4)
	for _, kill := range []func() error{l.Agent.Kill, l.A.Kill, l.B.Kill, l.Enclosure.Kill} {
		go func() { killed <- kill() }()
	}
	for range 4 {
		fatal(t, <-killed)
	}
	fatal(t, l.Start(ctx))
	w.advance("after kill -9 of everything", someWrites)
	w.check("everything killed")
}

// testFenced: the owner hangs (SIGSTOP) in the middle of its writes, the other one takes over, the old one goes
// on. No byte of it may reach a member: the members' files are compared over the time in which it wakes. The
// cable is cut before, so that the new owner, quiet, has no resync and nothing else to record.
func testFenced(t *testing.T, ctx context.Context, l *Lab) {
	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	other := owner.Partner()
	w := newWriter(t, ctx, verified(t, ctx, l), 0xfe2ce, verifyBytes, verifyBytes)
	defer w.dev.Close()
	w.begin()
	w.advance("before the hang", someWrites)
	fatal(t, owner.Stop())
	began := time.Now()
	out, err := l.ledge(t, ctx, "shelf", "takeover")
	fatal(t, err)
	t.Logf("ledge shelf takeover in %.1f s: %s", time.Since(began).Seconds(), strings.TrimSpace(out))
	w.advance("with controller "+owner.Name+" hung and taken over", someWrites)
	w.check("taken over")

	l.Cable.Cut()
	defer l.Cable.Mend()
	// Quiet: no host, and the new owner has destaged what it had.
	fatal(t, l.Agent.End())
	before := quiet(t, ctx, l)
	console, err := os.Stat(owner.ConsoleLog())
	fatal(t, err)
	fatal(t, owner.Cont())
	st, err := owner.WaitStatus(ctx, func(st control.Status) error {
		if st.Role != "standby" {
			return fmt.Errorf("it is %s", st.Role)
		}
		return nil
	})
	fatal(t, err)
	newOwner, err := other.Status(ctx)
	fatal(t, err)
	if st.Epoch != newOwner.Epoch || newOwner.Role != "owner" {
		t.Errorf("old owner: epoch %d; new owner: %s, epoch %d", st.Epoch, newOwner.Role, newOwner.Epoch)
	}
	after, err := members(l)
	fatal(t, err)
	for path, sum := range before {
		if after[path] != sum {
			t.Errorf("member %s changed while the fenced controller woke", filepath.Base(path))
		}
	}
	text, err := os.ReadFile(owner.ConsoleLog())
	fatal(t, err)
	woke := string(text[console.Size():])
	if !strings.Contains(woke, "fenced") {
		t.Errorf("controller %s never said that it was fenced:\n%s", owner.Name, woke)
	}
	l.Cable.Mend()
	fatal(t, l.WaitMirrored(ctx))
	fatal(t, l.StartAgent(ctx))
	w.begin()
	w.advance("with everything back", someWrites)
	w.check("after the fence")
}

// quiet waits until the members no longer change, and returns their sums.
func quiet(t *testing.T, ctx context.Context, l *Lab) map[string][sha256.Size]byte {
	t.Helper()
	last, err := members(l)
	fatal(t, err)
	err = poll(ctx, func() error {
		// Longer than any period in which an idle owner records something.
		time.Sleep(3 * time.Second)
		now, err := members(l)
		if err != nil {
			return permanent{err}
		}
		changed := 0
		for path, sum := range now {
			if last[path] != sum {
				changed++
			}
		}
		last = now
		if changed > 0 {
			return fmt.Errorf("%d members still change", changed)
		}
		return nil
	})
	fatal(t, err)
	return last
}

// members is the SHA-256 of each member's data: offsets and bytes of what is not a hole.
func members(l *Lab) (map[string][sha256.Size]byte, error) {
	paths, err := l.Members()
	if err != nil {
		return nil, err
	}
	sums := map[string][sha256.Size]byte{}
	for _, path := range paths {
		if sums[path], err = sparseSum(path); err != nil {
			return nil, err
		}
	}
	return sums, nil
}

func sparseSum(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	for off := int64(0); ; {
		from, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			h.Sum(sum[:0])
			return sum, nil
		}
		if err != nil {
			return sum, err
		}
		to, err := f.Seek(from, unix.SEEK_HOLE)
		if err != nil {
			return sum, err
		}
		fmt.Fprintf(h, "%d+%d\n", from, to-from)
		if _, err := io.Copy(h, io.NewSectionReader(f, from, to-from)); err != nil {
			return sum, err
		}
		off = to
	}
}

// testMembersRemoved: with two members gone, everything written so far reads back, and writing goes on.
func testMembersRemoved(t *testing.T, ctx context.Context, l *Lab) {
	w := newWriter(t, ctx, verified(t, ctx, l), 0x2905, 2*verifyBytes, verifyBytes)
	defer w.dev.Close()
	w.begin()
	w.advance("with all members", someWrites)
	for _, n := range []int{3, 8} {
		fatal(t, l.RemoveMember(n))
		w.advance(fmt.Sprintf("after the loss of member %d", n), someWrites)
	}
	// Until destage has met both: what is in NVRAM alone would prove nothing.
	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	_, err = owner.WaitStatus(ctx, func(st control.Status) error {
		lost := 0
		for _, m := range st.Members {
			if m.State != "online" {
				lost++
			}
		}
		if lost != 2 || st.Pool == nil || st.Pool.State != "degraded" {
			return fmt.Errorf("%d members are known to be lost, pool %+v", lost, st.Pool)
		}
		return nil
	})
	fatal(t, err)
	w.advance("degraded", someWrites)
	w.check("two members lost")
}

// testReplaced: two members are pulled out, one after the other, and rebuilt to spare space by themselves, while
// everything written so far reads back and writing goes on. New drives come into their places, and the operator has
// them filled: the array is whole again, and everything still reads back.
func testReplaced(t *testing.T, ctx context.Context, l *Lab) {
	w := newWriter(t, ctx, verified(t, ctx, l), 0x2905, 2*verifyBytes, verifyBytes)
	defer w.dev.Close()
	w.begin()
	w.advance("with all members", someWrites)
	began := time.Now()
	pulled := []int{3, 8}
	index := map[int]int{}
	for i, n := range pulled {
		index[n] = l.indexOf(t, ctx, n)
		fatal(t, l.RemoveMember(n))
		w.advance(fmt.Sprintf("after the loss of member %d", n), someWrites)
		a := l.array(t, ctx, fmt.Sprintf("member %d is rebuilt to spare space", index[n]), func(a api.ArrayInfo) bool {
			return a.Members[index[n]].State == "spared" && a.Spare.Used == i+1
		})
		t.Logf("member %d spared %.1f s after the first was pulled: %s, at risk %v", index[n], time.Since(began).Seconds(), a.State, a.AtRisk)
		w.check("rebuilt to spare space")
		w.begin()
	}
	for i, n := range pulled {
		fatal(t, l.PlugMember(n))
		path := l.blank(t, ctx)
		out := l.must(t, ctx, "drive", "replace", fmt.Sprint(index[n]), "--with", path, "--wait")
		t.Logf("ledge drive replace %d --with %s: %s", index[n], path, strings.TrimSpace(out))
		l.array(t, ctx, fmt.Sprintf("member %d is on its new drive", index[n]), func(a api.ArrayInfo) bool {
			return a.Members[index[n]].State == "online" && a.Spare.Used == len(pulled)-1-i
		})
	}
	a := l.array(t, ctx, "the array is whole", func(a api.ArrayInfo) bool { return a.State == "optimal" })
	t.Logf("%s %.1f s after the first was pulled, at risk %v", a.State, time.Since(began).Seconds(), a.AtRisk)
	w.advance("whole again", someWrites)
	w.check("two members replaced")
	t.Logf("ledge array show:\n%s", l.must(t, ctx, "array", "show"))
}

// array waits until the owner's array is as ok wants it.
func (l *Lab) array(t *testing.T, ctx context.Context, what string, ok func(api.ArrayInfo) bool) (a api.ArrayInfo) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	fatal(t, poll(ctx, func() error {
		a = api.ArrayInfo{}
		if err := owner.Do(ctx, "GET", "/v1/array", nil, &a); err != nil {
			return err
		}
		if !ok(a) {
			return fmt.Errorf("waiting until %s: %+v", what, a)
		}
		return nil
	}))
	return a
}

// drives are what the owner sees.
func (l *Lab) drives(t *testing.T, ctx context.Context) []api.Drive {
	t.Helper()
	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	var list api.DriveList
	fatal(t, owner.Do(ctx, "GET", "/v1/drives", nil, &list))
	return list.Drives
}

// indexOf is the place in the array that the drive in slot n, counted from 1, fills.
func (l *Lab) indexOf(t *testing.T, ctx context.Context, n int) int {
	t.Helper()
	for _, d := range l.drives(t, ctx) {
		if d.Member != nil && (d.Serial == fmt.Sprintf("lab-drive-%02d", n) || d.Path == l.memberPath(n)) {
			return *d.Member
		}
	}
	t.Fatalf("no member on drive %d: %+v", n, l.drives(t, ctx))
	return 0
}

// blank waits for a blank drive that the owner sees, and returns its path.
func (l *Lab) blank(t *testing.T, ctx context.Context) (path string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	fatal(t, poll(ctx, func() error {
		all := l.drives(t, ctx)
		for _, d := range all {
			if d.Label == api.DriveBlank {
				path = d.Path
				return nil
			}
		}
		return fmt.Errorf("no blank drive: %+v", all)
	}))
	return path
}

// verified is the volume of the steps with a writer; each step can run alone (go test -run).
func verified(t *testing.T, ctx context.Context, l *Lab) api.Volume {
	t.Helper()
	v, _, err := l.EnsureVolume(ctx, verifyVolume, 1<<30)
	fatal(t, err)
	return v
}

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
