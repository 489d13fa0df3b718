package raid_test

import (
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// nexusDrive is a port of a drive that tells its holder from others with the same key, as drives do.
type nexusDrive struct {
	*raidtest.Port
	nexus  string
	holder *string // of the drive; "": nobody
}

func (d nexusDrive) Reserve(key uint64) error {
	if *d.holder != "" && *d.holder != d.nexus {
		return raid.ErrReservation
	}
	err := d.Port.Reserve(key)
	if err == nil {
		*d.holder = d.nexus
	}
	return err
}

func (d nexusDrive) Preempt(key, victim uint64) error {
	_, held, err := d.Port.Keys()
	if err == nil {
		err = d.Port.Preempt(key, victim)
	}
	if err == nil && held == victim {
		*d.holder = d.nexus
	}
	return err
}

// A controller that lost its power comes back with other ports: it finds its own key holding the members, gets them
// back, and its former self, should it still live, writes nothing more. A stranger with another key is refused as ever.
func TestOwnKeyFromAnotherPort(t *testing.T) {
	for _, how := range []string{"acquire", "preempt"} {
		t.Run(how, func(t *testing.T) {
			b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
			b.a.Close()
			holders := make([]string, len(b.set.Disks))
			open := func(nexus string) *raid.Array {
				t.Helper()
				var drives []raid.Drive
				for i, d := range b.set.Disks {
					drives = append(drives, nexusDrive{d.Port(nexus), nexus, &holders[i]})
				}
				a, err := raid.Open(ctx, drives, raid.Options{})
				must(t, err)
				t.Cleanup(func() { a.Close() })
				return a
			}
			data := [][]byte{b.random(b.blocks())}
			before := open("A, first life")
			must(t, before.Acquire(ctx, 0xA))
			must(t, before.WriteStripe(ctx, 0, 1, data))

			after := open("A, second life")
			if how == "acquire" {
				must(t, after.Acquire(ctx, 0xA))
			} else {
				must(t, after.Preempt(ctx, 0xA))
			}
			for i, h := range holders {
				if h != "A, second life" {
					t.Errorf("disk %d is held by %q", i, h)
				}
			}
			must(t, after.WriteStripe(ctx, 0, 2, data))
			wantErr(t, before.WriteStripe(ctx, 0, 3, data), raid.ErrReservation)

			stranger := open("B")
			wantErr(t, stranger.Acquire(ctx, 0xB), raid.ErrReservation)
			must(t, after.WriteStripe(ctx, 0, 3, data))
		})
	}
}
