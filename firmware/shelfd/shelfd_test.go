package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestKeys(t *testing.T) {
	for _, c := range []struct {
		self  ha.Controller
		epoch uint64
		want  uint64
	}{{ha.A, 1, 0x4c45444745000141}, {ha.B, 0x1ffff, 0x4c45444745ffff42}} {
		if got := keyOf(c.self, c.epoch); got != c.want || controllerOf(got) != c.self {
			t.Errorf("key of %v at %d: %016x, want %016x", c.self, c.epoch, got, c.want)
		}
	}
	for _, foreign := range []uint64{0, 1, 0x4c45444745000143, 0x4d45444745000141, 0xffffffffffffffff} {
		if c := controllerOf(foreign); c != ha.None {
			t.Errorf("%016x is said to be of %v", foreign, c)
		}
	}
}

func TestExitCodes(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good.json")
	text := `{"shelf":"s1","controller":"A","secret":"0123456789abcdef","api_listen":"unix:/nowhere/api","portals":{"A":["a:1"],"B":["b:1"]},
		"drives":["/dev/null*"],"nvram":{"path":"/nowhere/nvram"},"mirror":{"dial":"a:2"}}`
	if err := os.WriteFile(good, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		want int
	}{
		{"--help", exitOK}, {"", exitConfig}, {"--nonsense", exitConfig}, {"--config /nowhere", exitConfig},
		{"--config " + good + " --check", exitOK}, {"--config " + good + " extra", exitConfig},
		{"--config " + good, exitRefused}, // there is no NVRAM
	} {
		if got := run(strings.Fields(c.args)); got != c.want {
			t.Errorf("shelfd %s: %d, want %d", c.args, got, c.want)
		}
	}
}

// memory is a device that answers with its name.
type memory struct {
	target.Device
	info target.Info
}

func (m *memory) Info() target.Info { return m.info }
func (m *memory) Read(_ context.Context, _ uint64, dst [][]byte) error {
	dst[0][0] = byte(m.info.Blocks)
	return nil
}

func unit(lun uint32, blocks uint64, initiators []string, dev bool) unitInfo {
	u := unitInfo{LUN: lun, Name: fmt.Sprint("lun", lun), Kind: "plain", Size: int64(blocks) * 4096,
		Info: target.Info{Blocks: blocks, BlockBytes: 4096, UUID: [16]byte{byte(lun)}}, Initiators: initiators}
	if dev {
		u.device = &memory{info: u.Info}
	}
	return u
}

// TestFront: units stay while devices come and go; numbers that are given to other LUNs become other units.
func TestFront(t *testing.T) {
	f := newFront(ha.B, targetName("s1"), slog.New(slog.DiscardHandler))
	luns := func() (out []string) {
		for _, u := range f.units() {
			out = append(out, fmt.Sprintf("%d:%d:%v", u.LUN, u.Info.Blocks, u.Initiators))
		}
		return out
	}
	for p, want := range map[ha.Phase]bool{ha.Starting: false, ha.Standby: false, ha.Owner: false, ha.Refused: false, ha.NoPool: true, ha.Forming: true} {
		if err := f.ready(p); (err == nil) != want {
			t.Errorf("%s, and no unit was shown: %v", p, err)
		}
	}
	f.show([]unitInfo{unit(1, 10, nil, false), unit(2, 20, []string{"x"}, false)})
	if err := f.ready(ha.Standby); err != nil {
		t.Error(err)
	}
	f.states(roleStandby, true)
	s := f.slots[1]
	buf := [][]byte{make([]byte, 4096)}
	if err := s.Read(t.Context(), 0, buf); !errors.Is(err, target.ErrStandby) {
		t.Fatalf("a unit without device: %v", err)
	}
	if s.Info().Blocks != 10 {
		t.Fatal(s.Info())
	}
	f.show([]unitInfo{unit(1, 11, nil, true), unit(3, 30, []string{}, true)})
	if want := []string{"1:11:[]", "3:30:[]"}; !slices.Equal(luns(), want) {
		t.Fatalf("%v, want %v", luns(), want)
	}
	if f.slots[1] != s {
		t.Fatal("the unit was replaced when its device came")
	}
	if err := s.Read(t.Context(), 0, buf); err != nil || buf[0][0] != 11 {
		t.Fatal(err, buf[0][0])
	}
	f.withdraw()
	if err := s.Read(t.Context(), 0, buf); !errors.Is(err, target.ErrStandby) {
		t.Fatalf("after withdraw: %v", err)
	}
	other := unit(1, 11, nil, true)
	other.Info.UUID = [16]byte{99}
	f.show([]unitInfo{other})
	if f.slots[1] == s || len(f.slots) != 1 {
		t.Fatal("another LUN of the same number is the same unit")
	}
}

func TestGroups(t *testing.T) {
	for _, c := range []struct {
		self    ha.Controller
		role    role
		partner bool
		a, b    target.AccessState
	}{
		{ha.A, roleOwner, true, target.Optimized, target.Standby},
		{ha.A, roleOwner, false, target.Optimized, target.Unavailable},
		{ha.B, roleOwner, true, target.Standby, target.Optimized},
		{ha.B, roleStandby, true, target.Optimized, target.Standby},
		{ha.B, roleStandby, false, target.Unavailable, target.Standby},
		{ha.B, roleMoving, true, target.Transitioning, target.Transitioning},
		{ha.A, roleGone, true, target.Unavailable, target.Unavailable},
	} {
		g := groups(c.self, c.role, c.partner)
		if g[0].State != c.a || g[1].State != c.b || g[0].ID != 1 || g[1].Ports[0] != 2 {
			t.Errorf("%v role %d partner %t: %v", c.self, c.role, c.partner, g)
		}
	}
}

func TestInventory(t *testing.T) {
	in := []unitInfo{unit(1, 10, nil, false), unit(7, 20, []string{"iqn.x"}, false), unit(8, 20, []string{}, false)}
	body, err := encodeInventory(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := decodeInventory(body)
	if err != nil || !reflect.DeepEqual(in, out) {
		t.Fatalf("%v %v", out, err)
	}
	for _, bad := range []string{"", "[]", `{"units":[{"lun":0,"info":{"BlockBytes":512}}]}`, `{"units":[{"lun":1}]}`,
		`{"units":[{"lun":1,"info":{"BlockBytes":512}},{"lun":1,"info":{"BlockBytes":512}}]}`} {
		if _, err := decodeInventory([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", bad)
		}
	}
}

func FuzzInventory(f *testing.F) {
	body, _ := encodeInventory([]unitInfo{unit(1, 10, nil, false), unit(7, 20, []string{"iqn.x"}, false)})
	f.Add(body)
	f.Add([]byte(`{"units":[{"lun":1,"info":{"BlockBytes":513}}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		inv, err := decodeInventory(body)
		if err != nil {
			return
		}
		fr := newFront(ha.A, "iqn.x", slog.New(slog.DiscardHandler))
		fr.show(inv)
		if len(fr.slots) != len(inv) {
			t.Fatalf("%d units of %d shown", len(fr.slots), len(inv))
		}
	})
}

// fakePort is a drive with a reservation.
type fakePort struct {
	name             string
	registered, held map[string]uint64 // shared by both controllers: who → key
	self             string
	hang             chan struct{}
}

func (p *fakePort) ReadAt([]byte, int64) (int, error)  { return 0, io.EOF }
func (p *fakePort) WriteAt([]byte, int64) (int, error) { return 0, io.EOF }
func (p *fakePort) Flush() error                       { return nil }
func (p *fakePort) Size() int64                        { return 0 }
func (p *fakePort) Name() string                       { return p.name }
func (p *fakePort) Close() error                       { return nil }
func (p *fakePort) Register(k uint64) error            { p.registered[p.self] = k; return nil }
func (p *fakePort) Preempt(uint64, uint64) error       { return nil }
func (p *fakePort) Release(uint64) error               { delete(p.held, p.self); return nil }
func (p *fakePort) Unregister(uint64) error            { delete(p.registered, p.self); return nil }
func (p *fakePort) Reserve(k uint64) error {
	for who := range p.held {
		if who != p.self {
			return raid.ErrReservation
		}
	}
	p.held[p.self] = k
	return nil
}

func (p *fakePort) Keys() (all []uint64, holder uint64, err error) {
	if p.hang != nil {
		<-p.hang
	}
	for _, k := range p.registered {
		all = append(all, k)
	}
	for _, k := range p.held {
		holder = k
	}
	return all, holder, nil
}

func every(string) bool { return true }

func TestDrives(t *testing.T) {
	dir := t.TempDir()
	ports := map[string]*fakePort{}
	for _, n := range []string{"sdb", "sda", "sdaa", "sdc", "sda.pr"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	broken := map[string]bool{"sdc": true}
	d := newDrives([]string{filepath.Join(dir, "sd*"), filepath.Join(dir, "sda")}, func(path string) (port, error) {
		name := filepath.Base(path)
		if broken[name] {
			return nil, errors.New("no medium")
		}
		ports[name] = &fakePort{name: name, self: "A", registered: map[string]uint64{}, held: map[string]uint64{}}
		return ports[name], nil
	}, slog.New(slog.DiscardHandler))
	names := func() (out []string) {
		for _, x := range d.scan() {
			out = append(out, x.Name())
		}
		return out
	}
	if got := strings.Join(names(), " "); got != "sda sdb sdaa" {
		t.Fatal(got)
	}
	broken["sdc"] = false // it appears later
	if got := strings.Join(names(), " "); got != "sda sdb sdc sdaa" {
		t.Fatal(got)
	}
	mine := func(k uint64) bool { return controllerOf(k) == ha.A }
	key, theirs := keyOf(ha.A, 1), keyOf(ha.B, 1)
	// All or nothing: the partner holds one.
	ports["sdc"].held["B"], ports["sdc"].registered["B"] = theirs, theirs
	if err := d.reserveAll(t.Context(), d.scan(), key, mine); !errors.Is(err, raid.ErrReservation) {
		t.Fatal(err)
	}
	for n, p := range ports {
		if _, ok := p.held["A"]; ok || p.registered["A"] != 0 {
			t.Fatalf("%s: something is left: %v %v", n, p.held, p.registered)
		}
	}
	delete(ports["sdc"].held, "B")
	if err := d.reserveAll(t.Context(), d.scan(), key, mine); err != nil {
		t.Fatal(err)
	}
	if got := d.holders(t.Context(), confirmLimit, every); got[key] != 4 || len(got) != 1 {
		t.Fatal(got)
	}
	if ports["sdc"].registered["B"] != theirs {
		t.Fatal("the partner's registration was dropped")
	}
	// A drive that hangs holds nobody up, and is asked once only.
	hang := make(chan struct{})
	ports["sdb"].hang = hang
	for range 3 {
		if got := d.holders(t.Context(), 1, every); got[key] > 4 {
			t.Fatal(got)
		}
	}
	close(hang)
	d.asked.Wait()
	ports["sdb"].hang = nil
	if err := d.release(t.Context(), mine); err != nil {
		t.Fatal(err)
	}
	if got := d.holders(t.Context(), confirmLimit, every); got[0] != 4 || len(got) != 1 {
		t.Fatal(got)
	}
	d.close()
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st, err)
	}
	if _, err := listen(t.Context(), "unix:"+path); err == nil {
		t.Fatal("a socket that is in use was taken")
	}
	// A process that was killed leaves its socket behind.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if l, err = listen(t.Context(), "unix:"+path); err != nil {
		t.Fatal(err)
	}
	l.Close()
}
