package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/host/api"
)

const imageLimitBytes = 32_000_000

// TestBootedSystem boots the image once and takes it through what issue 2 wants shown, in this order: each
// step leaves a whole system to the next.
func TestBootedSystem(t *testing.T) {
	needMachine(t)
	ctx := testContext(t, 22*time.Minute+time.Duration(*kills)*2*time.Minute)
	imageSize(t)
	l := newLab(t, Options{DriveBytes: 2 << 30})
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if !l.FirstRun {
		t.Error("the pool of a new directory was there already")
	}
	for _, c := range []*Controller{l.A, l.B} {
		t.Logf("controller %s: kernel to serving %.1f s", c.Name, c.BootSeconds())
		if c.BootSeconds() == 0 {
			t.Errorf("controller %s never said on its console that it serves", c.Name)
		}
	}
	for _, step := range []struct {
		name string
		test func(*testing.T, context.Context, *Lab)
	}{
		{"StandardInitiatorsSeeTheVolume", testStandardInitiators},
		{"Filesystem", testFilesystem},
		{"BadInput", testBadInput},
		{"WrongNames", testWrongNames},
		{"Kills", testKills},
		{"Fenced", testFenced},
		{"RandomKills", testRandomKills},
		{"Elsewhere", testElsewhere},
		{"Drives", testDrives},
		{"MembersRemoved", testMembersRemoved},
		{"NextRun", testNextRun},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.test(t, ctx, l) }) {
			t.Fatalf("%s failed: the steps after it would say nothing", step.name)
		}
	}
}

func imageSize(t *testing.T) {
	var total int64
	for _, name := range []string{"vmlinuz", "initramfs.zst"} {
		info, err := os.Stat(filepath.Join(build, "image", name))
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	t.Logf("image: %.1f MB", float64(total)/1e6)
	if total > imageLimitBytes {
		t.Errorf("the image has %d bytes, %d are allowed", total, imageLimitBytes)
	}
}

// testStandardInitiators: Debian's libiscsi programs and the operator's command agree on the volume.
func testStandardInitiators(t *testing.T, ctx context.Context, l *Lab) {
	l.must(t, ctx, "volume", "create", "demo", "16GiB")
	v := l.show(t, ctx, "demo")
	if v.Portal != l.AgentPortal() || v.SizeBytes != 16<<30 {
		t.Errorf("volume show: %+v", v)
	}
	list := command(t, ctx, "iscsi-ls", "-s", "iscsi://"+v.Portal)
	if !strings.Contains(list, v.IQN) || !regexp.MustCompile(`(?i)lun:? ?0`).MatchString(list) {
		t.Errorf("iscsi-ls -s does not list %s:\n%s", v.IQN, list)
	}
	t.Logf("iscsi-ls -s:\n%s", list)
	inquiry := command(t, ctx, "iscsi-inq", url(v))
	for _, want := range []string{"Vendor:", "DIRECT_ACCESS"} {
		if !strings.Contains(inquiry, want) {
			t.Errorf("iscsi-inq says no %q:\n%s", want, inquiry)
		}
	}
	// The shelf's LUNs are the host's, by the name that its claim gave it.
	var known struct {
		Hosts []control.Host `json:"hosts"`
	}
	if err := l.A.Do(ctx, "GET", "/v1/hosts", nil, &known); err != nil || len(known.Hosts) != 1 || !strings.HasPrefix(known.Hosts[0].Initiator, hostInitiator+":e") {
		t.Fatalf("hosts %+v: %v", known.Hosts, err)
	}
	// The name alone opens nothing, on either controller: it wants the secret of the claim.
	for _, c := range []*Controller{l.A, l.B} {
		out, err := exec.CommandContext(ctx, "iscsi-ls", "-i", known.Hosts[0].Initiator, "iscsi://"+c.Portal()).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "Authentication failure") {
			t.Errorf("controller %s lets in whoever knows the name of a claim: %v\n%s", c.Name, err, out)
		}
	}
	status := l.must(t, ctx, "shelf", "status")
	if !strings.Contains(status, "owner") || !strings.Contains(status, "standby") {
		t.Errorf("ledge shelf status:\n%s", status)
	}
}

// testFilesystem writes a real ext4 image with qemu-img, twice, and reads it back.
func testFilesystem(t *testing.T, ctx context.Context, l *Lab) {
	dir := t.TempDir()
	image := filepath.Join(dir, "ext4.img")
	const imageBytes = 256 << 20
	command(t, ctx, "mke2fs", "-q", "-t", "ext4", "-d", filepath.Join(runtime.GOROOT(), "src"), image, fmt.Sprint(imageBytes>>10)+"k")
	used := dataBytes(t, image)
	t.Logf("ext4 of %s/src: %.0f MB of data", runtime.GOROOT(), float64(used)/1e6)
	if used < 100e6 {
		t.Fatalf("the file system holds only %d bytes", used)
	}
	l.must(t, ctx, "volume", "create", "fs", "1GiB")
	v := l.show(t, ctx, "fs")

	began := time.Now()
	command(t, ctx, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, url(v))
	t.Logf("written in %.1f s", time.Since(began).Seconds())
	first := l.show(t, ctx, "fs")
	t.Logf("first copy: logical %d, unique %d, stored %d (%.2f of logical)", first.LogicalBytes, first.UniqueBytes, first.StoredBytes,
		float64(first.StoredBytes)/float64(first.LogicalBytes))
	if first.LogicalBytes < used/2 || first.StoredBytes*2 >= first.LogicalBytes {
		t.Errorf("stored %d bytes of %d logical: not under half", first.StoredBytes, first.LogicalBytes)
	}

	back := filepath.Join(dir, "back.img")
	began = time.Now()
	command(t, ctx, "qemu-img", "convert", "-O", "raw", "--image-opts", part(v, 0, imageBytes), back)
	t.Logf("read back in %.1f s", time.Since(began).Seconds())
	sameFiles(t, image, back)
	command(t, ctx, "e2fsck", "-fn", back)

	const second = 512 << 20
	command(t, ctx, "qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", image, part(v, second, imageBytes))
	both := l.show(t, ctx, "fs")
	added := both.StoredBytes - first.StoredBytes
	t.Logf("second copy: logical %d, unique %d, stored %d: %.2f %% of the copy added; cache hit rate %.2f", both.LogicalBytes, both.UniqueBytes,
		both.StoredBytes, 100*float64(added)/float64(first.LogicalBytes), both.Cache.HitRate)
	if both.LogicalBytes < 2*first.LogicalBytes-used/50 {
		t.Errorf("logical bytes %d after the second copy, %d after the first", both.LogicalBytes, first.LogicalBytes)
	}
	if float64(added) >= 0.03*float64(first.LogicalBytes) {
		t.Errorf("the second copy of %d bytes added %d stored bytes: 3 %% or more", first.LogicalBytes, added)
	}
	os.Remove(back)
	command(t, ctx, "qemu-img", "convert", "-O", "raw", "--image-opts", part(v, second, imageBytes), back)
	sameFiles(t, image, back)
	// The whole path again without this host's cache being warm: kept for testNextRun.
	sum := fileSum(t, image)
	if err := os.WriteFile(l.path("fs.sha256"), sum, 0o644); err != nil {
		t.Fatal(err)
	}
}

// part is a piece of a volume as QEMU's --image-opts wants it.
func part(v api.Volume, off, size int64) string {
	return fmt.Sprintf("driver=raw,offset=%d,size=%d,file.driver=iscsi,file.transport=tcp,file.portal=%s,file.target=%s,file.lun=%d",
		off, size, v.Portal, v.IQN, v.LUN)
}

func dataBytes(t *testing.T, path string) (n int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, zero := make([]byte, 4096), make([]byte, 4096)
	for {
		m, err := io.ReadFull(f, buf)
		if m > 0 && !bytes.Equal(buf[:m], zero[:m]) {
			n += int64(m)
		}
		if err != nil {
			return n
		}
	}
}

func fileSum(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return h.Sum(nil)
}

func sameFiles(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("cmp", a, b).CombinedOutput(); err != nil {
		t.Fatalf("%s differs from %s: %v: %s", b, a, err, out)
	}
}

// testWrongNames: who asks for something that is not there, or not his, gets a precise answer.
func testWrongNames(t *testing.T, ctx context.Context, l *Lab) {
	for _, c := range []struct{ url, want string }{
		{"iscsi://" + l.AgentPortal() + "/iqn.2026-11.io.ledge:nothing/0", "Target not found"},
		{"iscsi://" + l.A.Portal() + "/iqn.2026-11.io.ledge:shelf.other/0", "Target not found"},
	} {
		out, err := exec.CommandContext(ctx, "iscsi-inq", c.url).CombinedOutput()
		if err == nil || !strings.Contains(strings.ToLower(string(out)), strings.ToLower(c.want)) {
			t.Errorf("%s: %v, want %q:\n%s", c.url, err, c.want, out)
		}
	}
	// P5: an initiator that is not a registered host sees no LUN of the shelf.
	out := command(t, ctx, "iscsi-ls", "-s", "-i", "iqn.2026-11.lab:stranger", "iscsi://"+l.A.Portal())
	if regexp.MustCompile(`(?i)\blun:? ?[1-9]`).MatchString(out) {
		t.Errorf("a stranger sees a host's LUNs:\n%s", out)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"volume", "create", "huge", "8EiB"}, "size"},
		{[]string{"volume", "create", "huge", "4096PiB"}, ""},
		{[]string{"volume", "create", "demo", "1GiB"}, "exists"},
		{[]string{"volume", "create", "Bad Name", "1GiB"}, "name"},
		{[]string{"volume", "create", "odd", "1000"}, ""},
		{[]string{"volume", "show", "nothing"}, "nothing"},
		{[]string{"volume", "delete", "nothing"}, "nothing"},
	} {
		out, err := l.ledge(t, ctx, c.args...)
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), c.want) {
			t.Errorf("ledge %s: %v, want an error with %q; output %s", strings.Join(c.args, " "), err, c.want, out)
		}
	}
}

// testNextRun ends everything as Ctrl-C does, and starts again on the same directory: the data are there.
func testNextRun(t *testing.T, ctx context.Context, l *Lab) {
	began := time.Now()
	for _, end := range []func() error{l.Agent.End, l.B.End, l.A.End, l.Enclosure.End} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("all ended in %.1f s", time.Since(began).Seconds())
	// A host holds nothing that matters (P6): its cache goes, too.
	if err := os.Remove(l.hostPath("cache.img")); err != nil {
		t.Error(err)
	}
	began = time.Now()
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("second start: %.1f s", time.Since(began).Seconds())
	var list struct{ Volumes []api.Volume }
	if err := json.Unmarshal([]byte(l.must(t, ctx, "volume", "list", "--json")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Volumes) < 3 {
		t.Errorf("volumes after the restart: %+v", list.Volumes)
	}
	v := l.show(t, ctx, "fs")
	back := filepath.Join(t.TempDir(), "back.img")
	command(t, ctx, "qemu-img", "convert", "-O", "raw", "--image-opts", part(v, 0, 256<<20), back)
	want, err := os.ReadFile(l.path("fs.sha256"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fileSum(t, back), want) {
		t.Error("the file system is another one after the restart")
	}
	owner, err := l.WaitOwner(ctx)
	if err != nil {
		t.Fatal(err)
	}
	st, err := owner.Status(ctx)
	if err != nil || st.Pool == nil {
		t.Fatal(st, err)
	}
	t.Logf("pool %s, %d of %d bytes allocated, epoch %d", st.Pool.State, st.Pool.AllocatedBytes, st.Pool.CapacityBytes, st.Epoch)
	if err := checkRoles(ctx, l); err != nil {
		t.Error(err)
	}
}

// checkRoles: one owner, one standby, one epoch.
func checkRoles(ctx context.Context, l *Lab) error {
	a, err := l.A.Status(ctx)
	if err != nil {
		return err
	}
	b, err := l.B.Status(ctx)
	if err != nil {
		return err
	}
	roles := map[string]control.Status{a.Role: a, b.Role: b}
	if _, ok := roles["owner"]; !ok || len(roles) != 2 || a.Epoch != b.Epoch {
		return fmt.Errorf("A is %s at epoch %d, B is %s at epoch %d", a.Role, a.Epoch, b.Role, b.Epoch)
	}
	return nil
}
