package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// enclosureTarget is the drives' target; each controller attaches them under an initiator name of its own, so
// that the persistent reservations tell the controllers apart.
const enclosureTarget = "iqn.2026-11.lab:enclosure"

// newEnclosure is a tgtd of our own: its own control port, so that one that the machine runs is not touched.
func (l *Lab) newEnclosure() *Part {
	return &Part{
		Name: "enclosure", lab: l, dir: l.o.Dir, log: l.path("enclosure.log"), patience: 5 * time.Second,
		command: func() ([]string, error) {
			return []string{"tgtd", "-f", "-C", l.controlPort(), "--iscsi", "portal=" + loopback(l.o.Ports.Enclosure)}, nil
		},
		// tgtd ignores SIGTERM; it leaves by command, when it has no target any more.
		gently: func() error {
			if err := l.tgtadm("--op", "delete", "--mode", "target", "--tid", "1", "--force"); err != nil {
				return err
			}
			return l.tgtadm("--op", "delete", "--mode", "system")
		},
	}
}

// controlPort is tgtd's: made of the TCP port's number, which is ours on this machine; tgtd takes 15 bits of it.
func (l *Lab) controlPort() string { return strconv.Itoa(l.o.Ports.Enclosure & (1<<15 - 1)) }

// sweepEnclosure removes the control socket of a tgtd that was killed.
func (l *Lab) sweepEnclosure() {
	os.Remove("/var/run/tgtd/socket." + l.controlPort())
	os.Remove("/var/run/tgtd/socket." + l.controlPort() + ".lock")
}

func (l *Lab) tgtadm(args ...string) error {
	args = append([]string{"-C", l.controlPort(), "--lld", "iscsi"}, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "tgtadm", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("tgtadm %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// startEnclosure starts tgtd and gives it the members that are there.
func (l *Lab) startEnclosure(ctx context.Context) error {
	if err := l.Enclosure.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err := poll(ctx, func() error {
		if !l.Enclosure.Running() {
			return permanent{fmt.Errorf("lab: the enclosure ended: %s; see %s", l.Enclosure.Ended(), l.Enclosure.Log())}
		}
		return l.tgtadm("--op", "new", "--mode", "target", "--tid", "1", "-T", enclosureTarget)
	})
	if err != nil {
		return err
	}
	members, err := l.Members()
	if err != nil {
		return err
	}
	for _, path := range members {
		n, err := member(path)
		if err != nil {
			return fmt.Errorf("lab: %s: %w", path, err)
		}
		if err := l.addMember(n); err != nil {
			return err
		}
	}
	if err := l.tgtadm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"); err != nil {
		return err
	}
	l.o.Say("enclosure serves %d drives (pid %d)", len(members), l.Enclosure.PID())
	return nil
}

// RestartEnclosure starts an enclosure that was killed.
func (l *Lab) RestartEnclosure(ctx context.Context) error { return l.startEnclosure(ctx) }

func (l *Lab) addMember(n int) error {
	lun := strconv.Itoa(n)
	if err := l.tgtadm("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", lun, "-b", l.memberPath(n)); err != nil {
		return err
	}
	// A serial number of its own, as a drive has.
	return l.tgtadm("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", lun,
		"--params", fmt.Sprintf("vendor_id=LAB,product_id=DRIVE,scsi_sn=lab-drive-%02d,scsi_id=lab-drive-%02d", n, n))
}

// RemoveMember pulls member n (1 and up) out of the running enclosure: its LUN goes, its file moves to
// drives/removed. In form local the file alone goes; a process that has it open keeps it until it opens it anew,
// so the file is also truncated to nothing: every read beyond fails.
func (l *Lab) RemoveMember(n int) error {
	if l.Enclosure != nil && l.Enclosure.Running() {
		if err := l.tgtadm("--op", "delete", "--mode", "logicalunit", "--tid", "1", "--lun", strconv.Itoa(n)); err != nil {
			return err
		}
	}
	path := l.memberPath(n)
	removed := l.path("drives", "removed", filepath.Base(path))
	if err := os.Rename(path, removed); err != nil {
		return err
	}
	if l.o.Local {
		return os.Truncate(removed, 0)
	}
	return nil
}

// PlugMember puts a new, blank drive into the place of member n, which RemoveMember has emptied, while everything runs.
// The controllers see the old drive go and another one come.
func (l *Lab) PlugMember(n int) error {
	if err := sparse(l.memberPath(n), l.o.DriveBytes); err != nil || l.Enclosure == nil {
		return err
	}
	if err := l.addMember(n); err != nil {
		return err
	}
	for _, c := range []*Controller{l.A, l.B} {
		if !c.Running() {
			continue // it finds the drive when it starts
		}
		socket := l.path(c.Name, "qmp.sock")
		// The drive behind it goes with the device; a controller that was started since has neither.
		if err := qmp(socket, fmt.Sprintf(`{"execute":"device_del","arguments":{"id":"tray%d"}}`, n)); err != nil && !strings.Contains(err.Error(), "DeviceNotFound") {
			return fmt.Errorf("lab: controller %s: drive %d: %w", c.Name, n, err)
		}
		err := qmp(socket,
			fmt.Sprintf(`{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"new%d","cache":{"direct":true},"file":{"driver":"iscsi","transport":"tcp","portal":"%s","target":"%s","lun":%d,"initiator-name":"%s"}}}`,
				n, loopback(l.o.Ports.Enclosure), enclosureTarget, n, l.driveInitiator(c.Name)),
			fmt.Sprintf(`{"execute":"device_add","arguments":{"driver":"scsi-block","id":"tray%d","drive":"new%d","share-rw":true,"bus":"scsi0.0","scsi-id":%d}}`, n, n, n))
		if err != nil {
			return fmt.Errorf("lab: controller %s: drive %d: %w", c.Name, n, err)
		}
	}
	return nil
}
