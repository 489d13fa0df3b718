package sim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// The shape of the shelf world.
const (
	shelfMembers = 5
	shelfSlots   = 16
	shelfBlocks  = 512 // of its one LUN
	shelfLUN     = "lun"
	moduleBytes  = 2 * 352 * blockBytes
)

// shelfWorld is an enclosure of drives, two controllers and the link between them.
type shelfWorld struct {
	*base
	mutation Mutation
	disks    *raidtest.Set
	wire     *wire
	nodes    [2]*node
	pools    []shelf.Counters // of pools that are closed

	cmu sync.Mutex // guards counts and duplicates
	// duplicates: so many of the controllers' next messages are lost (negative) or sent twice (positive).
	duplicates int
	// sick members: dead or rotten, no more than parity stands for.
	sick map[int]bool
	// hurt: an NVRAM lost what it held, and the log is not known to be in sync since.
	hurt bool
	// old copies of the modules.
	old [2]*nvramtest.Image
	// slow is what the seed adds to the link's latency.
	slow time.Duration
}

func (s *shelfWorld) count(what string) {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	s.counts[what]++
}

// copies is how often the next message between the drivers is sent.
func (s *shelfWorld) copies() int {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	switch {
	case s.duplicates > 0:
		s.duplicates--
		s.counts["message sent twice"]++
		return 2
	case s.duplicates < 0:
		s.duplicates++
		s.counts["message lost"]++
		return 0
	}
	return 1
}

func (s *shelfWorld) repairs(st raid.Status) {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	s.counts["degraded read"] += int(st.Counters.DegradedReads)
	s.counts["strip repaired"] += int(st.Counters.Repairs)
	s.counts["checksum error found"] += int(st.Counters.ChecksumErrors)
	s.counts["lost write found"] += int(st.Counters.StaleStrips)
}

// shelfTemplate is a formed shelf that was shut down.
type shelfTemplate struct {
	disks   *raidtest.Set
	modules [2]nvramtest.Image
}

var shelfTemplates struct {
	sync.Mutex
	made *shelfTemplate
}

// bareShelf is a shelf of blank hardware.
func bareShelf(b *base) *shelfWorld {
	s := &shelfWorld{base: b, sick: map[int]bool{}}
	sent := uint64(0)
	s.wire = newWire(s.count, func() time.Duration {
		sent++
		return 20*time.Microsecond + s.slow + time.Duration(hash(s.seed, sent)%uint64(200*time.Microsecond))
	})
	for i := range s.nodes {
		s.nodes[i] = &node{s: s, self: ha.A + ha.Controller(i), module: nvramtest.NewRegion(moduleBytes, 512, b.seed+uint64(i))}
	}
	return s
}

// shelfTemplateOf makes the template, once.
func shelfTemplateOf() (*shelfTemplate, error) {
	shelfTemplates.Lock()
	defer shelfTemplates.Unlock()
	if shelfTemplates.made != nil {
		return shelfTemplates.made, nil
	}
	s := bareShelf(&base{seed: 1, counts: Counts{}})
	s.disks = raidtest.NewSet(1, shelfMembers, raid.DataOffset+shelfSlots*raid.SlotBytes)
	if err := s.form(); err != nil {
		return nil, fmt.Errorf("form: %w", err)
	}
	t := &shelfTemplate{disks: s.disks}
	for i, n := range s.nodes {
		t.modules[i] = n.module.Image()
	}
	shelfTemplates.made = t
	return t, nil
}

func newShelfWorld(b *base) (*shelfWorld, error) {
	s := bareShelf(b)
	t, err := shelfTemplateOf()
	if err != nil {
		return s, err
	}
	s.mutation = b.o.Mutation
	s.disks = t.disks.Clone()
	s.disks.Reseed(b.seed)
	for i, n := range s.nodes {
		n.module.Show(t.modules[i])
	}
	return s, nil
}

// form makes the pool, brings the mirror into sync, and shuts the shelf down.
func (s *shelfWorld) form() error {
	for _, n := range s.nodes {
		if err := s.powerOn(n); err != nil {
			return err
		}
	}
	defer s.shutDown()
	time.Sleep(10 * time.Second)
	if err := s.nodes[0].driver.Create(context.Background(), shelf.LUNSpec{Name: shelfLUN, Kind: shelf.KindPlain, Bytes: shelfBlocks * blockBytes, BlockBytes: blockBytes}); err != nil {
		return err
	}
	dev, err := s.nodes[0].device(shelfLUN)
	if err != nil {
		return err
	}
	if err := dev.Write(context.Background(), 0, [][]byte{make([]byte, blockBytes)}, false); err != nil {
		return err
	}
	if !s.within(time.Minute, func() bool { return s.inSync() != nil }) {
		return errors.New("the mirror does not come into sync")
	}
	return nil
}

// shutDown stops both controllers as an operator would.
func (s *shelfWorld) shutDown() {
	for _, n := range s.nodes {
		n.resume()
		n.end()
	}
}

// within waits until cond holds, looking every quarter of a second.
func (s *shelfWorld) within(limit time.Duration, cond func() bool) bool {
	for began := time.Now(); time.Since(began) < limit; time.Sleep(250 * time.Millisecond) {
		if cond() {
			return true
		}
	}
	return false
}

// powerOn starts a controller.
func (s *shelfWorld) powerOn(n *node) error {
	n.mu.Lock()
	was := n.on
	n.on = true
	n.mu.Unlock()
	if was {
		return nil
	}
	n.end()
	n.module.Restore()
	if s.mutation == ReplayNoChecksum {
		believe(n.module)
	}
	s.disks.PowerOn()
	return n.start()
}

// powerCut takes the power of the whole shelf: the drives' caches too.
func (s *shelfWorld) powerCut() {
	s.disks.PowerCut()
	for _, n := range s.nodes {
		n.kill()
	}
	s.count("site without power")
}

// supervise is what firmware/init does: a process that ended is started again.
func (s *shelfWorld) supervise() error {
	for _, n := range s.nodes {
		n.mu.Lock()
		on, stopped := n.on, n.paused != nil
		n.mu.Unlock()
		if n.process == nil || stopped {
			continue
		}
		if !on {
			n.end()
			continue
		}
		select {
		case code := <-n.exited:
			n.exited <- code
			s.trace("%s exited with %d", n.self, code)
			s.count(fmt.Sprintf("exit with code %d", code))
			n.end()
			if err := n.start(); err != nil {
				return err
			}
		default:
		}
	}
	return nil
}

// owner is the controller that serves, or nil.
func (s *shelfWorld) owner() *node {
	for _, n := range s.nodes {
		if s.serves(n) {
			return n
		}
	}
	return nil
}

// serves tells whether a controller believes that it owns the pool.
func (s *shelfWorld) serves(n *node) bool {
	if n.process == nil {
		return false
	}
	st, _, _ := n.driver.State()
	return st.Phase == ha.Owner
}

// inSync is the owner whose log says that its mirror has everything, or nil.
func (s *shelfWorld) inSync() *node {
	n := s.owner()
	if n == nil {
		return nil
	}
	n.pmu.Lock()
	l := n.nvlog
	n.pmu.Unlock()
	if l == nil || l.Stats().Mirror != nvram.MirrorInSync {
		return nil
	}
	// The owner finds out only after a while that its partner is gone.
	p := s.nodes[1-int(n.self-ha.A)]
	p.mu.Lock()
	on := p.on && p.paused == nil // the mirror of one that is stopped may be locked
	p.mu.Unlock()
	if !on || p.process == nil || !p.process.mirror.Complete(l.ID(), l.Epoch()) {
		return nil
	}
	return n
}

// truth is the members' label.
func (s *shelfWorld) truth() (raid.Label, error) {
	sv, err := raid.ReadLabels(context.Background(), s.disks.Drives("looker"), raid.UUID{})
	return sv.Label, err
}

type shelfLog struct {
	*nvram.Log
	n *node
}

func (l *shelfLog) Replay(fn func(uint64, nvram.Set) error) error {
	if err := l.n.pass(); err != nil {
		return err
	}
	return l.Log.Replay(fn)
}

// Trim gives the log's trimmer a moment: with destage inline, who waits for room asks again at once, and on one processor
// nobody else would run.
func (l *shelfLog) Trim(lsn uint64) {
	l.Log.Trim(lsn)
	time.Sleep(2 * time.Millisecond)
}

func (s *shelfWorld) logOf(n *node, l *nvram.Log) shelf.Log { return &shelfLog{l, n} }
