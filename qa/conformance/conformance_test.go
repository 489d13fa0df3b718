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

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/crypt"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// The suite is run several times, because what some tests need excludes what others need: units
// with 512-byte physical blocks, with 4096-byte ones, write-protected, one that may be sanitized and
// has a key to forget, and one whose atomic writes are bound to an alignment.
var runs = []struct {
	name  string
	lun   uint64
	unit  mem.Options
	make  func(mem.Options) (target.Device, error) // nil: memory as it is
	tests []string
	flags []string
}{
	{"512n", 0, mem.Options{Bytes: 1 << 30, Name: "512n"}, nil, []string{"ALL"}, nil},
	{"512e", 1, mem.Options{Bytes: 1 << 30, Name: "512e", PhysicalExponent: 3}, nil, []string{
		"SCSI.CompareAndWrite.InvalidDataOutSize", "SCSI.WriteSame10.InvalidDataOutSize", "SCSI.WriteSame16.InvalidDataOutSize",
		"SCSI.WriteSame10.UnmapUnaligned", "SCSI.WriteSame16.UnmapUnaligned",
	}, nil},
	{"read-only", 2, mem.Options{Bytes: 1 << 30, Name: "ro", ReadOnly: true}, nil, []string{"SCSI.ReadOnly"}, nil},
	{"sanitize", 4, mem.Options{Bytes: 32 << 20, Name: "sanitize"}, encrypted, []string{
		"SCSI.Sanitize.BlockErase", "SCSI.Sanitize.BlockEraseReserved", "SCSI.Sanitize.CryptoErase", "SCSI.Sanitize.CryptoEraseReserved",
		"SCSI.Sanitize.ExitFailureMode", "SCSI.Sanitize.InvalidServiceAction", "SCSI.Sanitize.Overwrite", "SCSI.Sanitize.OverwriteReserved",
		"SCSI.Sanitize.Readonly", "SCSI.Sanitize.Reservations",
	}, []string{"--allow-sanitize"}},
	{"atomic", 5, mem.Options{Bytes: 64 << 20, Name: "atomic", PhysicalExponent: 3}, aligned, []string{"SCSI.WriteAtomic16"}, nil},
}

// keys keeps a key in memory.
type keys struct{ key []byte }

func (k *keys) Load() ([]byte, error)    { return k.key, nil }
func (k *keys) Replace(key []byte) error { k.key = key; return nil }

// encrypted is a unit that CRYPTO ERASE can serve.
func encrypted(o mem.Options) (target.Device, error) {
	d, err := mem.New(o)
	if err != nil {
		return nil, err
	}
	return crypt.New(d, new(keys))
}

// alignedDevice is one that writes atomically in whole physical blocks only.
type alignedDevice struct{ *mem.Device }

func aligned(o mem.Options) (target.Device, error) {
	d, err := mem.New(o)
	return alignedDevice{d}, err
}

func (d alignedDevice) Info() target.Info {
	i := d.Device.Info()
	i.AtomicAlignmentBlocks, i.AtomicGranularityBlocks = 8, 8
	return i
}

// clientsFault are the tests that fail for a reason of their own, each with the reason, which a
// test in fault_test.go shows packet by packet.
var clientsFault = map[string]string{
	"WriteSame10.UnmapUntilEnd": "sends a block of FFh with UNMAP=1 and wants zeros read back",
}

// allowedSkips are the reasons for which a test may be skipped: what a disk cannot be.
var allowedSkips = []string{
	"not removable", // no tray to eject, no lock on it
	"Media is not removable",
}

const targetName = "iqn.2026-11.io.ledge:conformance"

// unit is a unit to serve: dev, or memory.
type unit struct {
	lun      uint64
	mem      mem.Options
	dev      target.Device
	sanitize bool
	// initiators that see it; nil: all.
	initiators []string
}

// serve starts our engine with the units of all runs.
func serve(t *testing.T) (portal string) {
	t.Helper()
	var units []unit
	for _, r := range runs {
		u := unit{lun: r.lun, mem: r.unit, sanitize: r.flags != nil}
		if r.make != nil {
			d, err := r.make(r.unit)
			if err != nil {
				t.Fatal(err)
			}
			u.dev = d
		}
		units = append(units, u)
	}
	return start(t, iscsi.Options{}, units...)
}

// start starts our engine with one target of these units.
func start(t *testing.T, o iscsi.Options, units ...unit) (portal string) {
	t.Helper()
	srv := server(t, o)
	if err := srv.AddTarget(newTarget(t, targetName, units...)); err != nil {
		t.Fatal(err)
	}
	return listen(t, srv, "127.0.0.1:0")
}

func newTarget(t *testing.T, name string, units ...unit) *scsi.Target {
	t.Helper()
	tgt := scsi.NewTarget(name, scsi.Options{})
	for _, u := range units {
		if u.dev == nil {
			d, err := mem.New(u.mem)
			if err != nil {
				t.Fatal(err)
			}
			u.dev = d
		}
		if err := tgt.Attach(u.lun, u.dev, scsi.UnitOptions{AllowSanitize: u.sanitize, Initiators: u.initiators}); err != nil {
			t.Fatal(err)
		}
	}
	return tgt
}

func server(t *testing.T, o iscsi.Options) *iscsi.Server {
	t.Helper()
	srv, err := iscsi.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	return srv
}

// listen makes an address a portal of srv.
func listen(t *testing.T, srv *iscsi.Server, address string) (portal string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
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
	t.Parallel()
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
			results, err := Run(ctx, url, tests, r.flags...)
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
		if x.Outcome != Skipped || x.Name == sanitizeReset { // TestSanitizeReset runs that one
			continue
		}
		skips[x.Reason]++
		if !allowed(x.Reason) {
			t.Errorf("%s skipped: %s", x.Name, x.Reason)
		}
	}
	if len(all) < 230 {
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

const sanitizeReset = "Sanitize.Reset"

// slow is a device that takes seconds to be overwritten, and stores nothing of it.
type slow struct{ *mem.Device }

func (slow) NeverBlocks() bool { return false }

func (slow) WriteSame(ctx context.Context, _, _ uint64, _ []byte) error {
	select {
	case <-time.After(2 * time.Second):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestSanitizeReset runs the test that needs a SANITIZE of at least five seconds, and then sleeps
// for a minute, beside the others.
func TestSanitizeReset(t *testing.T) {
	if _, err := exec.LookPath(Tool); err != nil {
		t.Skip(Tool + " is not installed (Debian: libiscsi-bin)")
	}
	if testing.Short() {
		t.Skip("sleeps for a minute")
	}
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	d, err := mem.New(mem.Options{Bytes: 64 << 20, Name: "slow"})
	if err != nil {
		t.Fatal(err)
	}
	portal := start(t, iscsi.Options{}, unit{dev: slow{d}, sanitize: true})
	results, err := Run(ctx, fmt.Sprintf("iscsi://%s/%s/0", portal, targetName), "SCSI."+sanitizeReset, "--allow-sanitize")
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 1 || results[0].Name != sanitizeReset || results[0].Outcome != Passed {
		t.Errorf("%+v", results)
	}
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
