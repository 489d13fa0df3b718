package guest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/qa/guest/agent"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

const multipathTarget = "iqn.2026-11.io.ledge.qa:multipath"

// TestMultipath is a host's life with a shelf: open-iscsi logs in at both controllers with digests and CHAP both ways,
// dm-multipath makes one disk of the two paths by their access states, ext4 is put on it, and fio writes and verifies
// while paths are cut, broken and restored, bytes on them are changed, and the controllers exchange the unit. Then the
// file system is whole, and after a new login every file is what it was.
func TestMultipath(t *testing.T) {
	h := sharedHost(t)
	s := newShelf(t, multipathTarget)
	s.attach(t, 0, mem.Options{Bytes: 128 << 20, Name: "multipath"}, "MEMORY")
	s.connect(h)

	// 1. Two sessions, one map.
	h.discover(t, multipathTarget)
	h.sh(t, "iscsiadm -m node -T "+multipathTarget+" -l && udevadm settle --timeout=120")
	sessions := h.sh(t, "iscsiadm -m session -P 2")
	for _, want := range []string{"HeaderDigest: CRC32C", "DataDigest: CRC32C", "username: guest", "username_in: shelf", "iSCSI Session State: LOGGED_IN"} {
		if n := strings.Count(sessions, want); n != 2 {
			t.Errorf("%d sessions say %q:\n%s", n, want, sessions)
		}
	}
	m := &multipathMap{host: h, shelf: s}
	m.wait(t, "after the login", "50 active ready", "10 active ready")
	t.Logf("%s", h.sh(t, "multipath -ll"))

	// 2. A file system, and a writer that verifies.
	h.sh(t, "mkfs.ext4 -q "+m.device()+" && mount "+m.device()+" /mnt")
	m.startWriter(t)

	// 3. What may happen. After each fault I/O goes on where it can, and when it is over all is as before.
	m.flows(t, 0)
	t.Run("cut the preferred path", func(t *testing.T) {
		h.paths[0].Cut()
		m.flows(t, 1)
		m.wait(t, "path 0 is cut", "failed faulty", "10 active ready")
		h.paths[0].Mend()
		m.wait(t, "path 0 is mended", "50 active ready", "10 active ready")
		m.flows(t, 0)
	})
	t.Run("cut the other path", func(t *testing.T) {
		h.paths[1].Cut()
		m.wait(t, "path 1 is cut", "50 active ready", "failed faulty")
		m.flows(t, 0)
		h.paths[1].Mend()
		m.wait(t, "path 1 is mended", "50 active ready", "10 active ready")
	})
	t.Run("reset the preferred path", func(t *testing.T) {
		logins := s.servers[0].Stats().Logins
		h.paths[0].Break()
		eventually(t, "a new login", func() string {
			if now := s.servers[0].Stats().Logins; now == logins {
				return fmt.Sprintf("still %d logins", now)
			}
			return ""
		})
		m.wait(t, "path 0 is back", "50 active ready", "10 active ready")
		m.flows(t, 0)
	})
	t.Run("change a byte each way", func(t *testing.T) {
		// One at a time: a connection that ends by the second would have the command of the first sent again.
		for _, flip := range []func(){h.paths[0].FlipTowardsTarget, h.paths[0].FlipTowardsGuest} {
			before := s.servers[0].Stats()
			flip()
			eventually(t, "a byte is changed and noticed", func() string {
				m.alive(t)
				now := s.servers[0].Stats()
				switch {
				case !h.paths[0].Flipped():
					return "no piece of data was long enough"
				case now.Rejects == before.Rejects && now.Logins == before.Logins:
					return "the target rejected nothing, the host did not log in again"
				}
				return ""
			})
			m.wait(t, "path 0 is back", "50 active ready", "10 active ready")
			m.flows(t, 0)
		}
	})
	t.Run("takeover and giveback", func(t *testing.T) {
		s.states(target.Transitioning, target.Transitioning)
		time.Sleep(time.Second)
		s.states(target.Standby, target.Optimized)
		m.flows(t, 1)
		m.wait(t, "B owns", "1 active ghost", "50 active ready")
		s.states(target.Transitioning, target.Transitioning)
		time.Sleep(time.Second)
		s.states(target.Optimized, target.Standby)
		m.flows(t, 0)
		m.wait(t, "A owns", "50 active ready", "1 active ghost")
		s.states(target.Optimized, target.NonOptimized)
		m.wait(t, "B helps", "50 active ready", "10 active ready")
	})
	t.Run("cut both", func(t *testing.T) {
		h.paths[0].Cut()
		h.paths[1].Cut()
		m.wait(t, "both are cut", "failed faulty", "failed faulty")
		h.paths[1].Mend()
		m.flows(t, 1)
		h.paths[0].Mend()
		m.wait(t, "both are mended", "50 active ready", "10 active ready")
		m.flows(t, 0)
	})

	// 4. The reckoning.
	m.endWriter(t)
	before := h.sh(t, "sync && cd /mnt && sha256sum f*")
	h.sh(t, "umount /mnt && e2fsck -fn "+m.device())
	h.sh(t, "multipath -f "+m.device())
	h.sh(t, "iscsiadm -m node -T "+multipathTarget+" -u")
	for i, server := range s.servers {
		eventually(t, "logout", func() string {
			if n := server.Stats().Sessions; n != 0 {
				return fmt.Sprintf("controller %d has %d sessions", i, n)
			}
			return ""
		})
	}
	h.sh(t, "iscsiadm -m node -T "+multipathTarget+" -l && udevadm settle --timeout=120")
	m.wait(t, "after the second login", "50 active ready", "10 active ready")
	h.sh(t, "mount "+m.device()+" /mnt")
	if after := h.sh(t, "cd /mnt && sha256sum f*"); after != before || after == "" {
		t.Errorf("the files changed; before:\n%safter:\n%s", before, after)
	}
	last := m.rounds - 1 // and its file, by the checksums that are in it
	h.sh(t, fmt.Sprintf("%s --filename=/mnt/f%d --randseed=%d --verify_only && umount /mnt && multipath -f %s", fio, last%3, last, m.device()))
	for i, server := range s.servers {
		st := server.Stats()
		t.Logf("controller %d: %d logins, %d refused, %d MB written, %d MB read, %d rejects", i, st.Logins, st.FailedLogins, st.WriteBytes>>20, st.ReadBytes>>20, st.Rejects)
	}
}

// fio writes 12 MiB once, in blocks of many sizes at random places, and reads each back, a while after it was written.
const fio = "fio --name=verify --size=12M --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=8 --direct=1 " +
	"--verify=crc32c --verify_fatal=1 --verify_backlog=64 --output-format=normal"

// multipathMap is the one map that the host has; shelf is nil where the target is another process.
type multipathMap struct {
	host   *host
	shelf  *shelf
	name   string
	writer chan agent.Answer // gets the writer's end
	rounds int               // where the writer's count, from 1, ended
}

func (m *multipathMap) device() string { return "/dev/mapper/" + m.name }

// wait waits until there is one map and its paths are as said: priority (of a path that works), state by the kernel,
// state by multipathd's checker.
func (m *multipathMap) wait(t *testing.T, when string, want ...string) {
	t.Helper()
	eventually(t, when, func() string {
		maps := strings.Fields(m.host.sh(t, `multipathd show maps raw format "%n"`))
		if len(maps) != 1 {
			return fmt.Sprintf("there are maps %q", maps)
		}
		m.name = maps[0]
		if a := m.host.try(t, "test -b "+m.device()); a.Code != 0 {
			return m.device() + " is not there" // udev makes it, after multipathd's map
		}
		said := map[string]string{}
		for _, line := range strings.Split(m.host.sh(t, `multipathd show paths raw format "%d %m %p %t %T"`), "\n") {
			if f := strings.Fields(line); len(f) == 5 && f[1] == m.name {
				said["/dev/"+f[0]] = strings.Join(f[2:], " ")
			}
		}
		for _, d := range m.host.disks(t) {
			for i := range want {
				if d.portal != Portal(i) {
					continue
				}
				if !strings.HasSuffix(" "+said[d.block], " "+want[i]) {
					return fmt.Sprintf("path %d, %s, is %q, not %q; all: %v", i, d.block, said[d.block], want[i], said)
				}
				delete(said, d.block)
			}
		}
		if len(said) != 0 {
			return fmt.Sprintf("more paths than two: %v", said)
		}
		return ""
	})
}

// startWriter writes and verifies, round after round, until endWriter. Each round has other data in another order, so
// that a write that was lost is not hidden by an earlier one of the same.
func (m *multipathMap) startWriter(t *testing.T) {
	t.Helper()
	m.host.sh(t, "rm -f /run/stop /run/fio.*")
	m.writer = make(chan agent.Answer, 1)
	script := `i=1; while [ ! -e /run/stop ]; do ` + fio + ` --filename=/mnt/f$((i%3)) --randseed=$i --output=/run/fio.$i || exit 1; i=$((i+1)); done; echo $i`
	go func() {
		a, err := m.host.Do(context.Background(), agent.Request{Argv: []string{"sh", "-c", script}})
		if err != nil {
			a = agent.Answer{Code: -1, Error: err.Error()}
		}
		m.writer <- a
	}()
}

// alive fails where the writer has ended.
func (m *multipathMap) alive(t *testing.T) {
	t.Helper()
	select {
	case a := <-m.writer:
		m.writer <- a
		t.Fatalf("the writer ended: code %d, %s %s\n%s", a.Code, a.Output, a.Error, m.host.try(t, "tail -n 40 /run/fio.*").Output)
	default:
	}
}

// flows waits until some MiB were written and read through a controller.
func (m *multipathMap) flows(t *testing.T, controller int) {
	t.Helper()
	const some = 2 << 20
	count := m.carried
	if m.shelf != nil {
		count = func(*testing.T, int) (read, written uint64) {
			st := m.shelf.servers[controller].Stats()
			return st.ReadBytes, st.WriteBytes
		}
	}
	read, written := count(t, controller)
	eventually(t, fmt.Sprintf("I/O at controller %d", controller), func() string {
		m.alive(t)
		r, w := count(t, controller)
		if r-read < some || w-written < some {
			return fmt.Sprintf("%d bytes written and %d read", w-written, r-read)
		}
		return ""
	})
}

// carried is what the guest's kernel has read and written on a path: the bytes of commands that were answered, for a
// target that is not in this process.
func (m *multipathMap) carried(t *testing.T, path int) (read, written uint64) {
	t.Helper()
	for _, d := range m.host.disks(t) {
		if d.portal != Portal(path) {
			continue
		}
		// Documentation/block/stat.rst: the third number is sectors read, the seventh sectors written.
		f := strings.Fields(m.host.sh(t, "cat /sys/block/"+strings.TrimPrefix(d.block, "/dev/")+"/stat"))
		if len(f) < 7 {
			t.Fatalf("%s: %q", d.block, f)
		}
		for i, v := range map[int]*uint64{2: &read, 6: &written} {
			if _, err := fmt.Sscan(f[i], v); err != nil {
				t.Fatal(err)
			}
		}
	}
	return read * 512, written * 512
}

// endWriter lets the round end, and it must have ended well.
func (m *multipathMap) endWriter(t *testing.T) {
	t.Helper()
	m.host.sh(t, "touch /run/stop")
	a := <-m.writer
	if a.Code != 0 {
		t.Fatalf("the writer: code %d, %s %s\n%s", a.Code, a.Output, a.Error, m.host.try(t, "tail -n 40 /run/fio.*").Output)
	}
	if bad := m.host.try(t, `grep -L 'err= 0' /run/fio.*`); len(bad.Output) != 0 {
		t.Errorf("fio had errors: %s", bad.Output)
	}
	if _, err := fmt.Sscan(string(a.Output), &m.rounds); err != nil || m.rounds < 2 {
		t.Fatalf("the writer said %q", a.Output)
	}
	t.Logf("the writer wrote and verified 12 MiB %d times", m.rounds-1)
}
