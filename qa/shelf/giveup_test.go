package shelf

import (
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"
)

// shelfStripe is the blocks of a stripe of 8+2.
const shelfStripe = 8 * 32

// An owner that is alone loses its NVRAM: what it acknowledged and did not destage is nowhere. Both controllers refuse, and say how
// an operator gives that up; then the pool serves what is on the members, which is whole blocks of what was written. Stripes that were
// being changed when the controller died may have blocks that cannot be read until they are written, or a scrub was told to take them as they are: never
// others in their place. It goes on as before: the other one follows, is in sync, and takes over. That is ordered of the partner, which has an old mirror, and of the owner, whose
// partner is gone.
func TestGiveUpWrites(t *testing.T) {
	for _, who := range []string{"B", "A"} {
		t.Run("by "+who, func(t *testing.T) {
			r := start(t)
			rng := rand.New(rand.NewPCG(7, uint64(who[0])))
			for round := range 3 {
				r.write()
				r.inSync("A")
				r.more(300)
				r.Kill("B")
				r.more(200)
				time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond) // destage is under way at times
				r.Kill("A")
				r.rest()
				if err := os.Remove(r.NVRAM("A")); err != nil {
					t.Fatal(err)
				}
				if who == "B" {
					r.up("A", "B")
				} else {
					r.up("A")
				}
				for _, c := range []string{who, "A"} {
					r.standby(c)
					deadline := time.Now().Add(20 * time.Second)
					for { // until it has looked at the members, and at its NVRAM
						_, err := r.Call(r.ctx, c, "POST", "/v1/takeover", nil, nil)
						if err == nil {
							t.Fatalf("controller %s took over without the log", c)
						}
						if strings.Contains(err.Error(), "--lose-writes") {
							break
						}
						if time.Now().After(deadline) {
							t.Fatal(err)
						}
						time.Sleep(100 * time.Millisecond)
					}
				}
				if who == "B" {
					r.must(r.Wait(r.ctx, "A", "connected", func(st Status) bool { return st.Partner.Connected }))
					if _, err := r.Call(r.ctx, "A", "POST", "/v1/takeover", map[string]bool{"lose_writes": true}, nil); err == nil {
						t.Fatal("controller A gave up what its partner may have")
					}
				}
				r.call(who, "POST", "/v1/takeover", map[string]bool{"lose_writes": true})
				r.owner(who)
				most := 4 * shelfStripe
				if round%2 == 1 { // blocks that were torn are lost, and told
					most = r.acceptOld(who)
				}
				lost, unreadable, err := r.w.GiveUp(r.ctx, r.dev)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("round %d: %d blocks are older than what was acknowledged, %d could not be read and were written", round, lost, unreadable)
				if unreadable > most {
					t.Errorf("%d blocks could not be read, of at most %d", unreadable, most)
				}
				if who == "A" {
					r.up("B")
				}
				r.write()
				r.more(100)
				r.inSync(who)
				r.more(100)
				r.check("writes after others were given up")
				if who == "B" {
					r.call("A", "POST", "/v1/takeover", nil)
					r.inSync("A")
					r.check("taken over again")
				}
			}
			r.acceptOld("A")
			r.check("scrubbed")
		})
	}
}

// acceptOld scrubs all, takes stripes that were being changed as they are, and returns how many blocks that lost.
func (r *rig) acceptOld(owner string) int {
	r.Helper()
	r.call(owner, "POST", "/v1/array/scrub", map[string]any{"action": "start", "accept_old": true})
	for {
		var a struct {
			Scrub struct {
				State string `json:"state"`
				Last  struct {
					Unrecoverable uint64 `json:"unrecoverable_stripes"`
					Lost          uint64 `json:"lost_blocks"`
				} `json:"last"`
			} `json:"scrub"`
		}
		if _, err := r.Call(r.ctx, owner, "GET", "/v1/array", nil, &a); err != nil {
			r.Fatal(err)
		}
		if a.Scrub.State == "idle" {
			if a.Scrub.Last.Unrecoverable > 0 {
				r.Errorf("%d stripes cannot be repaired", a.Scrub.Last.Unrecoverable)
			}
			return int(a.Scrub.Last.Lost)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-r.ctx.Done():
			r.Fatalf("the scrub does not end: %+v", a)
		}
	}
}
