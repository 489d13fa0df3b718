package conformance

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// The suite is run three times, because what some tests need excludes what others need: units
// with 512-byte physical blocks, with 4096-byte ones, and write-protected.
var runs = []struct {
	name  string
	lun   uint64
	unit  mem.Options
	tests []string
}{
	{"512n", 0, mem.Options{Bytes: 1 << 30, Name: "512n"}, []string{"ALL"}},
	{"512e", 1, mem.Options{Bytes: 1 << 30, Name: "512e", PhysicalExponent: 3}, []string{
		"SCSI.CompareAndWrite.InvalidDataOutSize", "SCSI.WriteSame10.InvalidDataOutSize", "SCSI.WriteSame16.InvalidDataOutSize",
		"SCSI.WriteSame10.UnmapUnaligned", "SCSI.WriteSame16.UnmapUnaligned",
	}},
	{"read-only", 2, mem.Options{Bytes: 1 << 30, Name: "ro", ReadOnly: true}, []string{"SCSI.ReadOnly"}},
}

// clientsFault are the tests that fail for a reason of their own, each with the reason, which a
// test in fault_test.go shows packet by packet.
var clientsFault = map[string]string{
	"WriteSame10.UnmapUntilEnd": "sends a block of FFh with UNMAP=1 and wants zeros read back",
}

// allowedSkips are the reasons for which a test may be skipped: what a disk cannot be.
var allowedSkips = []string{
	"not removable",         // no tray to eject, no lock on it
	"--allow-sanitize flag", // the run does not ask for SANITIZE
	"Media is not removable",
	"No alignment restrictions", // on atomic writes, nor granularity
}

const targetName = "iqn.2026-11.io.ledge:conformance"

// unit is a memory-backed unit to serve.
type unit struct {
	lun uint64
	mem mem.Options
}

// serve starts our engine with the units of all runs.
func serve(t *testing.T) (portal string) {
	t.Helper()
	var units []unit
	for _, r := range runs {
		units = append(units, unit{r.lun, r.unit})
	}
	return start(t, iscsi.Options{}, units...)
}

// start starts our engine.
func start(t *testing.T, o iscsi.Options, units ...unit) (portal string) {
	t.Helper()
	tgt := scsi.NewTarget(targetName, scsi.Options{})
	for _, u := range units {
		d, err := mem.New(u.mem)
		if err != nil {
			t.Fatal(err)
		}
		if err := tgt.Attach(u.lun, d, scsi.UnitOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	srv, err := iscsi.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.AddTarget(tgt); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return l.Addr().String()
}

// TestConformance holds our engine to: no failure, no crash, no hang, no skip but the allowed.
func TestConformance(t *testing.T) {
	if _, err := exec.LookPath(Tool); err != nil {
		t.Skip(Tool + " is not installed (Debian: libiscsi-bin)")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	portal := serve(t)
	best := make(map[string]Result)
	for _, r := range runs {
		url := fmt.Sprintf("iscsi://%s/%s/%d", portal, targetName, r.lun)
		for _, tests := range r.tests {
			results, err := Run(ctx, url, tests)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range results {
				if x.Outcome == Failed || x.Outcome == Unfinished {
					if reason, ok := clientsFault[x.Name]; ok {
						t.Logf("%s on %s fails for the client's reason: %s", x.Name, r.name, reason)
						x.Reason = reason
					} else {
						t.Errorf("%s on %s %s: %s\n%s", x.Name, r.name, x.Outcome, x.Reason, x.Log)
					}
				}
				if old, seen := best[x.Name]; !seen || old.Outcome == Skipped {
					best[x.Name] = x
				}
			}
		}
	}
	var all []Result
	skips := make(map[string]int)
	for _, x := range best {
		all = append(all, x)
		if x.Outcome != Skipped {
			continue
		}
		skips[x.Reason]++
		if !allowed(x.Reason) {
			t.Errorf("%s skipped: %s", x.Name, x.Reason)
		}
	}
	if len(all) < 225 {
		t.Errorf("only %d tests ran", len(all))
	}
	t.Logf("%d tests: %d passed, %d failed for the client's reason, %d skipped %v",
		len(all), Count(all, Passed), Count(all, Failed), Count(all, Skipped), skips)
}

func allowed(reason string) bool {
	for _, a := range allowedSkips {
		if strings.Contains(reason, a) {
			return true
		}
	}
	return false
}

// TestOther runs the suite against the target that LEDGE_CONFORMANCE_URL names and prints its line
// of the table in README.md.
func TestOther(t *testing.T) {
	url := os.Getenv("LEDGE_CONFORMANCE_URL")
	if url == "" {
		t.Skip("LEDGE_CONFORMANCE_URL names no other target")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	results, err := Run(ctx, url, "ALL")
	if err != nil {
		t.Log(err)
	}
	var failed []string
	for _, r := range results {
		if r.Outcome == Failed || r.Outcome == Unfinished {
			failed = append(failed, r.Name)
		}
	}
	sort.Strings(failed)
	t.Logf("%d passed, %d failed, %d skipped, %d unfinished: %v", Count(results, Passed), Count(results, Failed), Count(results, Skipped), Count(results, Unfinished), failed)
}
