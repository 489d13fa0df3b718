package conformance

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// The suite of this version has no test of discovery, CHAP or digests: libiscsi's and QEMU's own
// programs stand in.

func program(t *testing.T, wantFailure bool, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skip(name + " is not installed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if (err != nil) != wantFailure {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// locked serves one unit behind CHAP.
func locked(t *testing.T) (portal string) {
	t.Helper()
	auth := func(_, target string) *iscsi.CHAP {
		if target == "" {
			return nil // discovery is open
		}
		return &iscsi.CHAP{User: "host1", Secret: "a long secret", MutualUser: "shelf", MutualSecret: "another secret"}
	}
	return start(t, iscsi.Options{Auth: auth}, unit{lun: 3, mem: mem.Options{Bytes: 64 << 20, Name: "locked"}})
}

func TestCHAPWithLibiscsi(t *testing.T) {
	portal := locked(t)
	url := func(login, query string) string {
		return fmt.Sprintf("iscsi://%s%s/%s/3%s", login, portal, targetName, query)
	}
	if out := program(t, false, "iscsi-inq", url("host1%a long secret@", "")); !strings.Contains(out, "DIRECT_ACCESS") {
		t.Errorf("with the secret: %s", out)
	}
	program(t, true, "iscsi-inq", url("host1%a wrong secret@", ""))
	program(t, true, "iscsi-inq", url("", ""))
	program(t, false, "iscsi-inq", url("host1%a long secret@", "?target_user=shelf&target_password=another secret"))
	program(t, true, "iscsi-inq", url("host1%a long secret@", "?target_user=shelf&target_password=not it"))
}

func TestDiscoveryWithLibiscsi(t *testing.T) {
	portal := serve(t)
	out := program(t, false, "iscsi-ls", "-s", "iscsi://"+portal)
	for _, want := range []string{"Target:" + targetName, "Portal:" + portal + ",1", "Lun:0", "Lun:2"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// TestDigestsWithQEMU writes and reads an image with CRC32C on headers.
func TestDigestsWithQEMU(t *testing.T) {
	portal := start(t, iscsi.Options{}, unit{lun: 0, mem: mem.Options{Bytes: 16 << 20, Name: "digests"}})
	dir := t.TempDir()
	image := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{9}).Read(image)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, image, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, digest := range []string{"crc32c", "none"} {
		spec := fmt.Sprintf("driver=raw,file.driver=iscsi,file.transport=tcp,file.portal=%s,file.target=%s,file.lun=0,file.header-digest=%s", portal, targetName, digest)
		program(t, false, "qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", in, spec)
		program(t, false, "qemu-img", "convert", "--image-opts", "-O", "raw", spec, out)
		back, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		if len(back) < len(image) || !bytes.Equal(back[:len(image)], image) {
			t.Errorf("header-digest=%s: other data came back", digest)
		}
		os.Remove(out)
	}
}
