package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	engine "github.com/ledge-storage/ledge/target/iscsi"
)

// client is an initiator port that sends commands as they are.
type client struct {
	t *testing.T
	s *iscsi.Session
}

func login(t *testing.T, v api.Volume, name string) *client {
	t.Helper()
	s, err := iscsi.Dial(t.Context(), iscsi.Config{Portal: v.Portal, Target: v.IQN, InitiatorName: "iqn.2026-11.test:" + name, ISID: [6]byte{0x80, 1}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &client{t, s}
}

// do returns the status, and of a CHECK CONDITION sense key and code.
func (c *client) do(out, in []byte, cdb ...byte) string {
	cmd := &iscsi.Command{Out: out, In: in}
	copy(cmd.CDB[:], cdb)
	if err := c.s.Do(context.Background(), cmd); err != nil {
		return err.Error()
	}
	if cmd.Status == 2 && len(cmd.Sense) > 13 {
		return fmt.Sprintf("%x/%02x%02x", cmd.Sense[2]&0xF, cmd.Sense[12], cmd.Sense[13])
	}
	return fmt.Sprintf("status %02x", cmd.Status)
}

// settled is do past unit attentions, which it returns too.
func (c *client) settled(out, in []byte, cdb ...byte) (got string, attentions []string) {
	for {
		got = c.do(out, in, cdb...)
		if len(got) < 2 || got[:2] != "6/" {
			return got, attentions
		}
		attentions = append(attentions, got)
	}
}

func (c *client) want(what, want string, out []byte, cdb ...byte) {
	c.t.Helper()
	if got, _ := c.settled(out, nil, cdb...); got != want {
		c.t.Errorf("%s: %s, want %s", what, got, want)
	}
}

func (c *client) prOut(what string, action, kind byte, key, serviceKey uint64) {
	c.t.Helper()
	list := make([]byte, 24)
	binary.BigEndian.PutUint64(list, key)
	binary.BigEndian.PutUint64(list[8:], serviceKey)
	c.want(what, "status 00", list, 0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0)
}

var writeOne = []byte{0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0}

// TestReservationsComeBack: who is fenced from a volume is fenced after a restart of the agent, and on another host;
// a volume of the same name made later knows nothing of it.
func TestReservationsComeBack(t *testing.T) {
	shelf, dir := standIn(t), t.TempDir()
	sector := make([]byte, 512)
	first, end := beginAgent(t, shelf, dir, "a.sock")
	first.wait(t, api.PhaseServing)
	v, err := first.create("demo", 256*mib)
	if err != nil {
		t.Fatal(err)
	}
	holder, other := login(t, v, "holder"), login(t, v, "other")
	holder.prOut("REGISTER", 0, 0, 0, 1)
	other.prOut("REGISTER", 0, 0, 0, 2)
	holder.prOut("RESERVE", 1, 5, 1, 0)
	other.want("a registrant's write", "status 00", sector, writeOne...)
	holder.prOut("PREEMPT", 4, 5, 1, 2)
	if list, err := first.volumes(); err != nil || len(list) != 1 {
		t.Errorf("what keeps the reservations is listed: %+v, %v", list, err)
	}
	holder.s.Close()
	other.s.Close()
	end()
	for _, name := range []string{"a.sock", "b.sock"} {
		again, end := beginAgent(t, shelf, dir, name)
		again.wait(t, api.PhaseServing)
		if v, err = again.volume("demo"); err != nil {
			t.Fatal(err)
		}
		holder, other := login(t, v, "holder"), login(t, v, "other")
		other.want(name+": a fenced one's write", "status 18", sector, writeOne...)
		holder.want(name+": the holder's write", "status 00", sector, writeOne...)
		holder.s.Close()
		other.s.Close()
		if name == "b.sock" {
			if err := again.client.Do(t.Context(), "DELETE", "/v1/volumes/demo?force=true", nil, nil); err != nil {
				t.Fatal(err)
			}
			if v, err = again.create("demo", 256*mib); err != nil {
				t.Fatal(err)
			}
			fresh := login(t, v, "other")
			fresh.want("a new volume of that name", "status 00", sector, writeOne...)
			fresh.s.Close()
		}
		end()
	}
}

// TestVolumesChangeUnderIO: volumes that come, grow and go disturb no session of another volume: no connection is
// lost, no command fails, no attention comes. Those of a volume that grows hear of it.
func TestVolumesChangeUnderIO(t *testing.T) {
	r := start(t, newMemory(), newFakeShelf(t, true))
	r.wait(t, api.PhaseServing)
	v, err := r.create("busy", 16*mib)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 4 {
		c := login(t, v, fmt.Sprint("c", i))
		c.settled(nil, nil, 0, 0, 0, 0, 0, 0)
		wg.Go(func() {
			sector := make([]byte, 512)
			for n := 0; ctx.Err() == nil; n++ {
				if got := c.do(sector, nil, writeOne...); got != "status 00" {
					t.Errorf("write %d of client %d: %s", n, i, got)
					return
				}
			}
		})
	}
	var grown *client
	for i := range 30 {
		name := fmt.Sprint("v", i)
		o, err := r.create(name, 8*mib)
		if err != nil {
			t.Fatal(err)
		}
		grown = login(t, o, "other")
		grown.settled(nil, nil, 0, 0, 0, 0, 0, 0)
		if err := r.client.Do(ctx, "POST", "/v1/volumes/"+name+"/resize", api.ResizeRequest{SizeBytes: 16 * mib}, nil); err != nil {
			t.Fatal(err)
		}
		if _, told := grown.settled(nil, nil, 0, 0, 0, 0, 0, 0); len(told) != 1 || told[0] != "6/2a09" {
			t.Errorf("a volume grew: its initiator is told %v, want CAPACITY DATA HAS CHANGED", told)
		}
		if err := r.client.Do(ctx, "DELETE", "/v1/volumes/"+name, nil, nil); status(err) != 409 {
			t.Errorf("a volume in use is deleted: %v", err)
		}
		if err := r.client.Do(ctx, "DELETE", "/v1/volumes/"+name+"?force=true", nil, nil); err != nil {
			t.Fatal(err)
		}
		select {
		case <-grown.s.Dead():
		case <-time.After(time.Minute):
			t.Error("a session of a deleted volume lives")
		}
	}
	cancel()
	wg.Wait()
}

// TestCHAP: with users in the configuration a volume opens to them only.
func TestCHAP(t *testing.T) {
	users := engine.Users{{Initiator: "iqn.2026-11.test:a", Targets: []string{IQN("demo")}, CHAP: engine.CHAP{User: "u", Secret: "a secret of the test", MutualUser: "t", MutualSecret: "the target's secret"}}}
	r := startWith(t, newMemory(), func(c *Config) { c.CHAP = users }, newFakeShelf(t, true))
	r.wait(t, api.PhaseServing)
	for _, name := range []string{"demo", "other"} {
		if _, err := r.create(name, mib); err != nil {
			t.Fatal(err)
		}
	}
	right := &iscsi.CHAP{User: "u", Secret: "a secret of the test", TargetUser: "t", TargetSecret: "the target's secret"}
	for _, c := range []struct {
		initiator, volume string
		chap              *iscsi.CHAP
		ok                bool
	}{
		{"a", "demo", right, true}, {"a", "demo", nil, false}, {"a", "demo", &iscsi.CHAP{User: "u", Secret: "another secret"}, false},
		{"b", "demo", right, false}, {"b", "demo", nil, false}, {"a", "other", right, false},
	} {
		s, err := iscsi.Dial(t.Context(), iscsi.Config{Portal: r.Portal(), Target: IQN(c.volume), InitiatorName: "iqn.2026-11.test:" + c.initiator, CHAP: c.chap})
		if err == nil {
			s.Close()
		}
		if (err == nil) != c.ok || err != nil && !errors.Is(err, iscsi.ErrAuth) {
			t.Errorf("%s to %s: %v", c.initiator, c.volume, err)
		}
	}
}
