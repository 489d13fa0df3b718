package shelf

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
)

// operator runs the ledge command against the shelf.
type operator struct {
	*rig
	binary string
}

func (r *rig) operator() *operator {
	r.Helper()
	o := &operator{r, filepath.Join(filepath.Dir(build(r.T)), "ledge")}
	if _, err := os.Stat(o.binary); err != nil {
		if out, err := exec.CommandContext(r.ctx, "go", "build", "-o", o.binary, "github.com/ledge-storage/ledge/host/ledge").CombinedOutput(); err != nil {
			r.Fatalf("%v: %s", err, out)
		}
	}
	text, err := json.Marshal(map[string]any{"apis": map[string]string{"A": "unix:" + r.socket("A"), "B": "unix:" + r.socket("B")}})
	if err != nil {
		r.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Dir, "shelf.json"), text, 0o600); err != nil {
		r.Fatal(err)
	}
	return o
}

// run returns what a command printed, and its exit code.
func (o *operator) run(args string) (string, int) {
	o.Helper()
	cmd := exec.CommandContext(o.ctx, o.binary, append(strings.Fields(args), "--shelf", filepath.Join(o.Dir, "shelf.json"))...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		o.Fatalf("ledge %s: %v", args, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// does runs a command that must succeed and say something.
func (o *operator) does(args string, says ...string) string {
	o.Helper()
	out, code := o.run(args)
	if code != 0 {
		o.Fatalf("ledge %s: exit code %d: %s", args, code, out)
	}
	for _, s := range says {
		if !strings.Contains(out, s) {
			o.Fatalf("ledge %s does not say %q: %s", args, s, out)
		}
	}
	return out
}

// refused runs a command that must fail, and say why.
func (o *operator) refused(args string, says ...string) {
	o.Helper()
	out, code := o.run(args)
	if code != 1 {
		o.Fatalf("ledge %s: exit code %d, want 1: %s", args, code, out)
	}
	for _, s := range append(says, "→") {
		if !strings.Contains(out, s) {
			o.Fatalf("ledge %s does not say %q: %s", args, s, out)
		}
	}
}

// array waits until the array is as ok wants it.
func (o *operator) array(what string, ok func(api.ArrayInfo) bool) api.ArrayInfo {
	o.Helper()
	for {
		var a api.ArrayInfo
		out, code := o.run("array show --json")
		if code == 0 {
			if err := json.Unmarshal([]byte(out), &a); err != nil {
				o.Fatalf("%v: %s", err, out)
			}
			if ok(a) {
				return a
			}
		}
		select {
		case <-o.ctx.Done():
			o.Fatalf("the array is not %s: %s", what, out)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (o *operator) plug(i int) {
	o.Helper()
	if err := os.WriteFile(o.Drive(i), nil, 0o600); err != nil {
		o.Fatal(err)
	}
	if err := os.Truncate(o.Drive(i), 64<<20); err != nil {
		o.Fatal(err)
	}
}

// TestCommands: pool and LUNs by the command, on a shelf that serves; after a takeover it finds the new owner.
func TestCommands(t *testing.T) {
	r := start(t)
	o := r.operator()
	r.write()
	r.more(50)
	o.does("pool show", "state", "ok", "controller A", "in-sync")
	o.does("pool set --warn 60", "60 %")
	o.does("array show", "OPTIMAL: 8+2 over 12 members", "[O]", "O=online", "have all their strips", "0 of 2 columns used")
	o.does("drive list", "see the same 12 drives", "member 11")
	o.refused("pool create", "refused")

	o.does("lun create scratch 64MiB", "created scratch, 64 MiB, as LUN 2")
	o.refused("lun create scratch 64MiB", "taken")
	o.does("lun resize scratch 128MiB", "128 MiB")
	o.refused("lun resize scratch 64MiB", "never shrinks")
	o.does("lun rename scratch db")
	o.does("lun list", "db", "plain", "128 MiB", "online")
	o.does("lun show v", "writes", "every initiator")
	var l api.LUNInfo
	if err := json.Unmarshal([]byte(o.does("lun show v --json")), &l); err != nil || l.Stats.Writes == 0 || l.Stats.WriteBytes == 0 || l.AllocatedBytes == 0 {
		t.Fatalf("%+v %v", l, err)
	}
	if out, code := o.run("lun delete db"); code != 2 || !strings.Contains(out, "--yes") {
		t.Fatalf("delete without --yes: %d %s", code, out)
	}
	o.does("lun delete db --yes --wait", "its space is free")
	o.refused("lun show db", "no LUN")

	// Drives appear without a restart, at both controllers.
	o.plug(12)
	if err := os.WriteFile(o.Drive(13), []byte("something that nobody knows"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(o.Drive(13), 64<<20); err != nil {
		t.Fatal(err)
	}
	o.does("drive rescan", "see the same 14 drives", "blank", "data")
	o.refused("drive wipe "+o.Drive(3)+" --yes", "living member")
	o.does("drive wipe "+o.Drive(13)+" --yes", "is blank now")
	o.refused("drive wipe "+filepath.Join(o.Dir, "none")+" --yes", "no drive")
	o.refused("drive replace 3 --with "+o.Drive(12), "member 3 is online", "ledge drive fail 3")
	o.refused("drive replace 12 --with "+o.Drive(12), "members 0 to 11")
	o.refused("drive readd 3", "online already")

	r.rest()
	o.does("pool drain", "all of the log is on the members")
	r.write()
	o.does("shelf takeover B", "controller B owns")
	o.does("pool show", "controller B", "60 % allocated")
	o.does("array show", "[O]")
	o.does("lun create again 64MiB", "LUN 2")
	r.more(50)
	r.inSync("B")
	r.check("after all commands")
}

// TestDriveCommands: members are failed, pulled, put into other slots, replaced and taken back under the writer, without
// a restart of anything, and the array is whole again each time.
func TestDriveCommands(t *testing.T) {
	r := start(t)
	o := r.operator()
	member := func(i int, state string) func(api.ArrayInfo) bool {
		return func(a api.ArrayInfo) bool { return len(a.Members) == drives && a.Members[i].State == state }
	}
	r.write()
	r.more(50)

	// Failed by hand, and replaced.
	if out, code := o.run("drive fail 3"); code != 2 || !strings.Contains(out, "--yes") {
		t.Fatalf("fail without --yes: %d %s", code, out)
	}
	o.does("drive fail 3 --yes", "member 3 is failed", "degraded")
	o.does("array show", "DEGRADED", "[F]", "lost 1, bear 1 more")
	r.more(50)
	o.plug(12)
	o.refused("drive replace 3 --with "+o.Drive(5), "member 5")
	o.refused("drive replace 3 --with "+o.Drive(3), "older state of member 3")
	o.does("drive replace 3 --with "+o.Drive(12)+" --wait", "member 3 is on "+o.Drive(12))
	o.array("whole", func(a api.ArrayInfo) bool { return a.State == "optimal" && a.Members[3].Path == o.Drive(12) })
	o.does("drive list", "stale 3")
	o.refused("drive readd 3 --drive "+o.Drive(3), "online already")
	o.does("drive wipe "+o.Drive(3)+" --yes", "blank")
	r.more(50)

	// Pulled, and put into another slot: taken back by itself.
	r.rename(o.Drive(7), filepath.Join(o.Dir, "away"))
	o.array("without member 7", func(a api.ArrayInfo) bool { return a.Members[7].State != "online" })
	r.more(50)
	r.rename(filepath.Join(o.Dir, "away"), o.Drive(20))
	a := o.array("whole", member(7, "online"))
	if a.Members[7].Path != o.Drive(20) {
		t.Fatalf("member 7 is at %s", a.Members[7].Path)
	}
	r.more(50)

	// Failed by hand, and taken back by hand.
	o.does("drive fail 0 --yes")
	o.does("drive readd 0 --wait", "member 0 is back")
	o.array("whole", func(a api.ArrayInfo) bool { return a.State == "optimal" })

	// Two may fail; the third is refused, whatever is said.
	o.does("drive fail 1 --yes")
	o.refused("drive fail 2 --yes", "force")
	o.does("drive fail 2 --yes --force", "degraded")
	o.refused("drive fail 4 --yes --force")
	r.more(50)
	o.does("drive readd 1 --wait")
	o.does("drive readd 2 --wait")
	o.array("whole", func(a api.ArrayInfo) bool { return a.State == "optimal" })
	r.inSync("A")
	r.check("after all drives")

	// The other controller finds the same members.
	o.does("shelf takeover B")
	if a := o.array("whole at B", func(a api.ArrayInfo) bool { return a.State == "optimal" }); a.Members[3].Path != o.Drive(12) {
		t.Fatalf("member 3 is at %s", a.Members[3].Path)
	}
	r.check("at the other controller")
}
