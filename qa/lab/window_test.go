package lab

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/qa/verify"
)

// TestBootedWindow: the link through memory that both virtual controllers see, a PCI device's; what was acknowledged through it is there
// after kill -9 of the owner, of the standby, and of both, and the link goes through it again.
func TestBootedWindow(t *testing.T) {
	needMachine(t)
	ctx := testContext(t, 10*time.Minute)
	l := newLab(t, Options{DriveBytes: 128 << 20, NVRAMBytes: 64 << 20, Drives: 12, Window: true})
	fatal(t, l.StartShelf(ctx))
	l.overWindow(t, ctx)
	const lunBytes = 8 << 20
	w := &writer{t: t, ctx: ctx}
	w.dev = l.openLUN(t, ctx, "window", lunBytes)
	defer w.dev.Close()
	var err error
	w.w, err = verify.New(verify.Options{Seed: 0x317d, Bytes: lunBytes})
	fatal(t, err)
	w.begin()
	w.advance("through the window", someWrites)

	owner, err := l.WaitOwner(ctx)
	fatal(t, err)
	fatal(t, owner.Kill())
	out, err := l.ledge(t, ctx, "shelf", "takeover")
	fatal(t, err)
	t.Logf("ledge shelf takeover: %s", strings.TrimSpace(out))
	w.advance("after kill -9 of the owner", someWrites)
	w.check("owner killed")
	w.begin()
	again := func(what string, cs ...*Controller) {
		t.Helper()
		for _, c := range cs {
			fatal(t, c.Start())
		}
		for _, c := range cs {
			_, err := c.WaitAnswer(ctx)
			fatal(t, err)
		}
		fatal(t, l.WaitMirrored(ctx))
		l.overWindow(t, ctx)
		w.advance(what, someWrites)
	}
	again("with the old owner back", owner)
	fatal(t, owner.Kill()) // it is the standby now
	w.advance("alone", someWrites)
	again("with the standby back", owner)
	fatal(t, owner.Kill())
	fatal(t, owner.Partner().Kill())
	again("after kill -9 of both", l.A, l.B)
	w.check("both killed")
}

// overWindow waits until both ends of the link say that it goes through the window. A controller that comes back just after the other one tried
// the window, and just before it tries TCP, is on TCP at first, and goes back by itself.
func (l *Lab) overWindow(t *testing.T, ctx context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for _, c := range []*Controller{l.A, l.B} {
		_, err := c.WaitStatus(ctx, func(st control.Status) error {
			if st.Partner.Transport != "window" {
				return fmt.Errorf("the link goes over %q", st.Partner.Transport)
			}
			return nil
		})
		fatal(t, err)
	}
}
