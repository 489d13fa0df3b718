package shelf

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/qa/verify"
)

var (
	elsewhere     = flag.Int("elsewhere", 15, "hosts that are lost in TestAgentElsewhere")
	elsewhereSeed = flag.Uint64("elsewhere-seed", 1, "when they are lost")
)

// agentBinary is hostd.
var agentBinary program

// moments are when a host is lost. All but the volumes that a snapshot is taken of are written to.
var moments = []struct {
	name string
	wait func(*hosts)
}{
	{"in mid-write", func(h *hosts) { h.pause(300 * time.Millisecond) }},
	{"at a checkpoint or in the cleaner's round", func(h *hosts) {
		began := h.checkpoint(time.Now())
		h.pause(max(h.checkpoint(began).Sub(began), 10*time.Millisecond))
	}},
	{"right after a snapshot", func(h *hosts) {
		if s := h.snapshot(func() {}); !s.acked {
			h.Fatalf("snapshot %s was refused", s.name)
		}
	}},
	{"while a snapshot is taken", func(h *hosts) { h.snapshot(func() { h.pause(20 * time.Millisecond); h.kill() }) }},
	{"while it opens what another one left", func(h *hosts) {
		h.pause(300 * time.Millisecond)
		for range 2 {
			h.lose()
			h.start()
			h.pause(400 * time.Millisecond)
		}
	}},
}

// TestAgentElsewhere: hosts hold nothing that matters (P6). The agent is killed, all that its host had is deleted, and one starts on
// another host, with another initiator name, portal and cache, of which it has only what an operator gives each: the host's name at
// the shelf and the shelf's addresses. Volumes, snapshots and clones have what was acknowledged. That an agent which still ran would
// be shut out is TestEarlierAgentIsShutOut in host/agent.
func TestAgentElsewhere(t *testing.T) {
	h := &hosts{rig: start(t), rng: rand.New(rand.NewPCG(*elsewhereSeed, 1)), bin: agentBinary.build(t, "./host/hostd")}
	t.Logf("%d hosts are lost, seed %d", *elsewhere, *elsewhereSeed)
	defer h.end()
	h.start()
	h.serves()
	for i, name := range []string{"a", "b", "held"} {
		h.ok(h.do("POST", "/v1/volumes", api.CreateRequest{Name: name, SizeBytes: 64 << 20}, nil))
		h.add(name, uint64(i), 0)
	}
	for round := range *elsewhere {
		m := moments[round%len(moments)]
		what := fmt.Sprintf("round %d of seed %d, lost %s", round, *elsewhereSeed, m.name)
		for _, w := range h.written {
			w.connect(h)
			w.write(h.ctx)
		}
		for _, w := range h.written {
			w.more(h, 100)
		}
		if strings.Contains(m.name, "snapshot") { // what it is to hold is known
			h.written[held].rest()
		}
		m.wait(h)
		h.lose()
		acked := uint64(0)
		for _, w := range h.written {
			w.rest()
			acked += w.Acked()
		}
		began := time.Now()
		h.start()
		serves := h.serves().Sub(began)
		var first time.Duration
		for _, w := range h.written {
			w.connect(h)
			if first == 0 {
				if err := w.ReadOne(h.ctx, w.dev); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				first = time.Since(began)
			}
		}
		connected := time.Since(began)
		for _, w := range h.written {
			if _, err := w.Check(h.ctx, w.dev); err != nil {
				_, again := w.Check(h.ctx, w.dev)
				h.lose()
				h.start()
				h.serves()
				w.connect(h)
				_, other := w.Check(h.ctx, w.dev)
				t.Fatalf("%s: volume %s: %v\nread again: %v\nby an agent on one more host: %v", what, w.name, err, again, other)
			}
		}
		h.snapshotsHold(what)
		t.Logf("%s: %d writes acknowledged so far, %d checkpoints of the lost; elsewhere it serves after %.2f s, a block is read after %.2f s, all volumes are connected after %.2f s",
			what, acked, h.lost, serves.Seconds(), first.Seconds(), connected.Seconds())
	}
}

// held is the volume that snapshots are taken of, in hosts.written.
const held = 2

// hosts are those that the agent is on, one after the other.
type hosts struct {
	*rig
	rng     *rand.Rand
	bin     string
	n, lost int
	cmd     *exec.Cmd
	ended   chan struct{}

	written   []*written
	snapshots []snapshotTaken
	taken     int
}

// written is a volume with its writer.
type written struct {
	*verify.Writer
	name string
	of   snapshotTaken // a clone
	dev  *initiator.Device
	stop context.CancelFunc
	over chan error
}

// snapshotTaken is what a snapshot must hold, if it is there; it must be there if its order was acknowledged.
type snapshotTaken struct {
	name  string
	sum   [sha256.Size]byte
	acked bool
}

const writtenBytes = 4 << 20

func (h *hosts) add(name string, seed uint64, off int64) {
	h.Helper()
	w, err := verify.New(verify.Options{Seed: 0xe15e<<16 + *elsewhereSeed<<8 + seed, Offset: off, Bytes: writtenBytes})
	h.ok(err)
	h.written = append(h.written, &written{Writer: w, name: name})
}

func (h *hosts) path(name string) string {
	return filepath.Join(h.Dir, fmt.Sprintf("host%d", h.n), name)
}

// start runs an agent on a host that has nothing but what the operator wrote.
func (h *hosts) start() {
	h.Helper()
	text, err := json.Marshal(map[string]any{
		"name": "h1", "initiator": fmt.Sprintf("iqn.2026-11.io.ledge:qa%d", h.n), "shelf": map[string]any{"apis": []string{"unix:" + h.socket("A"), "unix:" + h.socket("B")}},
		"listen": "127.0.0.1:0", "api": h.path("hostd.sock"), "cache": map[string]any{"path": h.path("cache.img"), "size": 64 << 20},
		"journal_bytes": 64 << 20, "memory": map[string]any{"buffer": 8 << 20}, "log_level": "debug",
	})
	h.ok(err)
	h.ok(os.Mkdir(h.path("."), 0o700))
	h.ok(os.WriteFile(h.path("hostd.json"), text, 0o600))
	log, err := os.Create(h.path("hostd.log"))
	h.ok(err)
	defer log.Close()
	cmd, ended := exec.Command(h.bin, "--config", h.path("hostd.json")), make(chan struct{})
	cmd.Dir, cmd.Stdout, cmd.Stderr = h.path("."), log, log
	h.ok(cmd.Start())
	go func() { cmd.Wait(); close(ended) }()
	h.cmd, h.ended = cmd, ended
}

// kill ends the agent as a power loss of its host does.
func (h *hosts) kill() {
	h.cmd.Process.Kill() // an error says that it has ended already
	<-h.ended
}

// lose kills the agent and deletes all that its host has.
func (h *hosts) lose() {
	h.Helper()
	h.kill()
	h.lost = len(h.checkpoints())
	h.ok(os.RemoveAll(h.path(".")))
	h.n++
}

func (h *hosts) end() {
	for _, w := range h.written {
		w.rest()
		if w.dev != nil {
			w.dev.Close()
		}
	}
	if h.cmd != nil {
		h.kill()
	}
	if h.Failed() {
		text, _ := os.ReadFile(h.path("hostd.log"))
		h.Logf("log of the agent on host %d:\n%s", h.n, text[max(0, len(text)-8<<10):])
	}
}

// pause is a random one.
func (h *hosts) pause(most time.Duration) { time.Sleep(time.Duration(h.rng.Int64N(int64(most)))) }

func (h *hosts) do(method, path string, in, out any) error {
	c, err := api.New("unix:"+h.path("hostd.sock"), "")
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Do(h.ctx, method, path, in, out)
}

// serves waits until the agent does.
func (h *hosts) serves() time.Time {
	h.Helper()
	for {
		var st api.Status
		err := h.do("GET", "/v1/status", nil, &st)
		if err == nil && st.Phase == api.PhaseServing {
			return time.Now()
		}
		select {
		case <-h.ended:
			h.Fatalf("the agent ended: %v", h.cmd.ProcessState)
		case <-h.ctx.Done():
			h.Fatalf("the agent does not serve: %+v, %v", st, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (h *hosts) checkpoints() (lines []string) {
	text, _ := os.ReadFile(h.path("hostd.log"))
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "msg=checkpoint") {
			lines = append(lines, line)
		}
	}
	return lines
}

// checkpoint waits for the end of one that comes after now, at most some seconds, and returns when that was.
func (h *hosts) checkpoint(now time.Time) time.Time {
	for before := len(h.checkpoints()); len(h.checkpoints()) == before && time.Since(now) < 10*time.Second; {
		time.Sleep(2 * time.Millisecond)
	}
	return time.Now()
}

// snapshot orders one of the volume that rests, and does something meanwhile.
func (h *hosts) snapshot(meanwhile func()) snapshotTaken {
	h.Helper()
	s, w := snapshotTaken{name: fmt.Sprintf("s%d", h.taken)}, h.written[held]
	h.taken++
	var err error
	s.sum, err = sum(h.ctx, w.dev)
	h.ok(err)
	answered := make(chan error, 1)
	go func() {
		answered <- h.do("POST", "/v1/snapshots", api.SnapshotRequest{Name: s.name, Volumes: []string{w.name}}, nil)
	}()
	meanwhile()
	s.acked = <-answered == nil
	h.snapshots = append(h.snapshots, s)
	return s
}

// snapshotsHold looks at all snapshots, by clones. The first clone of the oldest one stays, and is written to behind what it shares.
func (h *hosts) snapshotsHold(what string) {
	h.Helper()
	var list struct{ Snapshots []api.Snapshot }
	h.ok(h.do("GET", "/v1/snapshots?volume="+h.written[held].name, nil, &list))
	there := map[string]bool{}
	for _, s := range list.Snapshots {
		there[s.Name] = true
	}
	kept := h.snapshots[:0]
	for _, s := range h.snapshots {
		if !there[s.name] {
			if s.acked {
				h.Errorf("%s: snapshot %s is gone", what, s.name)
			}
			continue
		}
		s.acked = true
		kept = append(kept, s)
		name := fmt.Sprintf("of-%s-on-host%d", s.name, h.n)
		h.ok(h.do("POST", fmt.Sprintf("/v1/volumes/%s/snapshots/%s/clone", h.written[held].name, s.name), api.CloneRequest{Name: name}, nil))
		w := &written{name: name}
		w.connect(h)
		h.holds(what, w, s)
		w.dev.Close()
		if len(h.written) == held+1 {
			h.add(name, held+1, writtenBytes)
			h.written[held+1].of = s
			h.written[held+1].connect(h)
			continue
		}
		h.ok(h.do("DELETE", "/v1/volumes/"+name+"?force=true", nil, nil))
	}
	h.snapshots = kept
	if len(h.written) > held+1 {
		h.holds(what, h.written[held+1], h.written[held+1].of)
	}
}

func (h *hosts) holds(what string, clone *written, s snapshotTaken) {
	h.Helper()
	if got, err := sum(h.ctx, clone.dev); err != nil || got != s.sum {
		h.Errorf("%s: clone %s of snapshot %s holds something else than the volume did: %v", what, clone.name, s.name, err)
	}
}

// connect opens the volume where it is now.
func (w *written) connect(h *hosts) {
	h.Helper()
	if w.dev != nil {
		w.dev.Close()
	}
	var v api.Volume
	h.ok(h.do("GET", "/v1/volumes/"+w.name, nil, &v))
	var err error
	w.dev, err = initiator.Open(h.ctx, initiator.Config{Portals: []string{v.Portal}, Target: v.IQN, LUN: v.LUN, Initiator: "iqn.2026-11.io.ledge:qa"})
	h.ok(err)
}

// write begins, rest ends it: a write that had no answer by then may have been done or not.
func (w *written) write(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	w.stop, w.over = cancel, make(chan error, 1)
	go func() { w.over <- w.Run(ctx, w.dev) }()
}

func (w *written) rest() {
	if w.stop != nil {
		w.stop()
		<-w.over
		w.stop = nil
	}
}

// more waits for n more writes.
func (w *written) more(h *hosts, n uint64) {
	h.Helper()
	began := time.Now()
	for want := w.Acked() + n; w.Acked() < want; time.Sleep(5 * time.Millisecond) {
		select {
		case <-h.ended:
			h.Fatalf("the agent ended: %v", h.cmd.ProcessState)
		default:
		}
		if time.Since(began) > time.Minute {
			h.Fatalf("volume %s: no more writes are acknowledged; %+v", w.name, w.dev.Paths())
		}
	}
}

func (h *hosts) ok(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// sum is of what the writers of volumes that are no clones write to.
func sum(ctx context.Context, dev *initiator.Device) ([sha256.Size]byte, error) {
	p := make([]byte, writtenBytes)
	err := dev.ReadAt(ctx, p, 0)
	return sha256.Sum256(p), err
}
