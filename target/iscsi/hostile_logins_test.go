package iscsi

import (
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var loginCount = flag.Int("logins", 5000, "logins of TestHostileLogins; beyond 65535 the TSIHs go round by themselves")

// TestHostileLogins: logins by the thousand, of own and of shared names, ended in every way, while
// other sessions read back what they wrote. Memory and goroutines stay as they were, and no login
// is given the TSIH of a live session, though the numbers go round.
func TestHostileLogins(t *testing.T) {
	n := *loginCount
	if testing.Short() || raceEnabled {
		n = min(n, 2000)
	}
	l := newLab(t, Options{}, nil)
	stop := l.bystander(3)
	live := make(map[uint16]bool)
	for _, s := range l.srv.Sessions() {
		live[s.TSIH] = true
	}
	if n <= 1<<16 {
		l.srv.mu.Lock()
		l.srv.lastTSIH = 1<<16 - 1 - uint16(n/4) // they go round in this run too
		l.srv.mu.Unlock()
	}
	const workers = 4
	var (
		next    atomic.Int64
		wrapped atomic.Bool
		start   = time.Now()
	)
	batch := func(count int) {
		var wg sync.WaitGroup
		next.Store(0)
		for w := range workers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				r := rand.New(rand.NewPCG(uint64(count), uint64(w)))
				last := uint16(0)
				for next.Add(1) <= int64(count) {
					tsih, err := l.brief(byte(w/2+1), r) // two workers share a name, and reinstate each other
					if err != nil {
						t.Error(err)
						return
					}
					if live[tsih] {
						t.Errorf("TSIH %d belongs to a live session", tsih)
					}
					if tsih != 0 && tsih < last {
						wrapped.Store(true)
					}
					last = max(last, tsih)
				}
			}()
		}
		wg.Wait()
		l.quiet(t, 3)
	}
	warm := n / 10
	batch(warm)
	bytes, goroutines := l.footprint()
	batch(n - warm)
	bytes2, goroutines2 := l.footprint()
	elapsed := time.Since(start)
	blocks := stop()
	if bytes2 > bytes+1<<20 {
		t.Errorf("%d kB after %d logins, %d kB after %d", bytes>>10, warm, bytes2>>10, n)
	}
	if goroutines2 > goroutines+8 {
		t.Errorf("%d goroutines after %d logins, %d after %d", goroutines, warm, goroutines2, n)
	}
	if !wrapped.Load() {
		t.Error("the TSIHs did not go round")
	}
	t.Logf("%d logins in %v beside %d verified blocks; %d → %d kB, %d → %d goroutines", n, elapsed.Round(time.Millisecond), blocks, bytes>>10, bytes2>>10, goroutines, goroutines2)
}

// brief is a session that ends as soon as it began: by a logout, a close or a reset. A reinstatement
// may end it in the middle of its login.
func (l *lab) brief(isid byte, r *rand.Rand) (tsih uint16, err error) {
	nc, err := net.Dial("tcp", l.addr)
	if err != nil {
		return 0, err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(5 * time.Minute))
	c := &client{t: l.t, nc: nc, cmdSN: 1, itt: 1, isid: isid}
	p, err := c.loginStep(0x87, "InitiatorName="+testInitiator, "TargetName="+testTarget)
	if err != nil {
		return 0, nil // reinstated: the connection was closed
	}
	if status := binary.BigEndian.Uint16(p.h[36:]); status != 0 {
		return 0, fmt.Errorf("login: status %04X", status)
	}
	tsih = binary.BigEndian.Uint16(p.h[14:])
	if tsih == 0 {
		return 0, fmt.Errorf("a login was given TSIH 0")
	}
	switch r.IntN(3) {
	case 0:
		out := new(header)
		out[0], out[1] = opLogoutReq|0x40, 0x80
		out.put32(16, 7)
		out.put32(24, c.cmdSN)
		if c.send(out, nil) == nil {
			c.ended()
		}
	case 1:
		nc.(*net.TCPConn).SetLinger(0)
	}
	return tsih, nil
}
