package guest

import (
	"fmt"
	"strings"
	"testing"
)

// discover makes node records of the target, as an administrator does, and checks that both portals are found.
func (h *host) discover(t *testing.T, name string) {
	t.Helper()
	found := h.record(t, name, len(h.paths), "iscsiadm -m discovery -t sendtargets -p "+Portal(0))
	for i := range h.paths {
		if want := fmt.Sprintf("%s,%d %s", Portal(i), i+1, name); !strings.Contains(found, want) {
			t.Fatalf("discovery does not find %q:\n%s", want, found)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			h.try(t, "multipathd disablequeueing maps; umount /mnt; multipath -F")
		}
		h.try(t, "iscsiadm -m node -T "+name+" -u; iscsiadm -m node -T "+name+" -o delete")
	})
}

// record runs a command that makes node records of a target until there are as many as wanted, made of iscsid.conf. On
// a machine that is loaded iscsiadm waits a second for iscsid, then goes on without the file and says nothing.
func (h *host) record(t *testing.T, name string, want int, command string) (said string) {
	t.Helper()
	eventually(t, command, func() string {
		a := h.try(t, command)
		said = string(a.Output)
		n := h.try(t, "grep -rl 'auth.password_in = shelf-secret-0001' /etc/iscsi/nodes/"+name+" | wc -l")
		if got := strings.TrimSpace(string(n.Output)); a.Code != 0 || got != fmt.Sprint(want) {
			return fmt.Sprintf("exit %d, %s records with iscsid.conf's secrets, not %d: %s", a.Code, got, want, said)
		}
		return ""
	})
	return said
}

// disk is a unit as one session sees it.
type disk struct{ initiator, portal, lun, block, generic string }

// disks lists the units of all sessions, from sysfs: by-path links name a portal, but not which initiator came by it.
func (h *host) disks(t *testing.T) (all []disk) {
	t.Helper()
	out := h.sh(t, `for s in /sys/class/iscsi_session/session*; do
		c=/sys/class/iscsi_connection/connection${s##*session}:0
		for b in $s/device/target*/*:*:*:*/block/*; do
			[ -e $b ] || continue
			u=${b%/block/*}
			echo $(cat $s/initiatorname) $(cat $c/persistent_address):$(cat $c/persistent_port) ${u##*:} /dev/${b##*/} /dev/$(ls $u/scsi_generic)
		done
	done`)
	for _, line := range strings.Split(out, "\n") {
		if f := strings.Fields(line); len(f) == 5 {
			all = append(all, disk{f[0], f[1], f[2], f[3], f[4]})
		}
	}
	return all
}
