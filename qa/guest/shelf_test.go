package guest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// The secrets of etc/iscsi/iscsid.conf.
var secrets = iscsi.CHAP{User: "guest", Secret: "guest-secret-0001", MutualUser: "shelf", MutualSecret: "shelf-secret-0001"}

// shelf is the target engine as a shelf uses it: one target, two controllers, each a server with a portal of its own
// and a target port group.
type shelf struct {
	target  *scsi.Target
	servers [2]*iscsi.Server
	address [2]string
}

// newShelf serves a target without units until the test ends. What a session says of itself goes to the test's log.
func newShelf(t *testing.T, name string) *shelf {
	t.Helper()
	s := &shelf{target: scsi.NewTarget(name, scsi.Options{})}
	s.states(target.Optimized, target.NonOptimized)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, len(s.servers))
	for i := range s.servers {
		server, err := iscsi.NewServer(iscsi.Options{
			Logger:         slog.New(slog.NewTextHandler(logTo{t}, nil)),
			PortalGroupTag: uint16(i + 1),
			Portals:        func(string) []string { return []string{Portal(0) + ",1", Portal(1) + ",2"} },
			Auth:           func(string, string) *iscsi.CHAP { return &secrets },
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := server.AddTarget(s.target); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.servers[i], s.address[i] = server, l.Addr().String()
		go func() { ended <- server.Serve(ctx, l) }()
	}
	t.Cleanup(func() {
		cancel()
		for _, server := range s.servers {
			if err := errors.Join(server.Close(), <-ended); err != nil && !errors.Is(err, iscsi.ErrServerClosed) {
				t.Error(err)
			}
		}
	})
	return s
}

// connect makes the guest's paths lead here.
func (s *shelf) connect(h *host) {
	for i, p := range h.paths {
		p.To(s.address[i])
	}
}

// states sets the access states of the two controllers. Neither is preferred: multipath-tools' prioritizer adds 80 to
// a preferred group that is not optimized, so that it would choose a preferred controller in standby (81) before the
// optimized one (50).
func (s *shelf) states(a, b target.AccessState) {
	s.target.SetPortGroups([]target.PortGroup{{ID: 1, State: a, Ports: []uint16{1}}, {ID: 2, State: b, Ports: []uint16{2}}})
}

// attach adds a thin unit of memory.
func (s *shelf) attach(t *testing.T, lun uint64, o mem.Options, product string) *mem.Device {
	t.Helper()
	d, err := mem.New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.target.Attach(lun, named{d, product}, scsi.UnitOptions{AllowSanitize: true, Reservations: &kept{}}); err != nil {
		t.Fatal(err)
	}
	return d
}

// named is a device under another product's name: multipath.conf tells SCRATCH from the rest.
type named struct {
	*mem.Device
	product string
}

func (n named) Info() target.Info {
	i := n.Device.Info()
	i.Product = n.product
	return i
}

// kept keeps reservations as long as the test.
type kept struct{ state []byte }

func (k *kept) Load() ([]byte, error)   { return k.state, nil }
func (k *kept) Save(state []byte) error { k.state = append([]byte(nil), state...); return nil }

type logTo struct{ t *testing.T }

func (l logTo) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}
