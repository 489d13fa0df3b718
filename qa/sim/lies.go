package sim

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/layout"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// What drives do, and what is done about it. No more members than parity stands for are sick at a time: then every
// read must be right. A member is sick from its first lie until a scrub of everything has passed with no lie in
// between, or until it was rebuilt to spare space.

type sick struct {
	// members that parity must make good.
	members map[int]bool
	gone    map[int]bool // not there when the array is opened
	dead    map[int]bool
	stalled map[int]func() // resumes
	spared  map[int]bool   // rebuilt: lost, and no longer sick
	old     map[int]map[int64][]byte
}

func newSick() sick {
	return sick{map[int]bool{}, map[int]bool{}, map[int]bool{}, map[int]func(){}, map[int]bool{}, map[int]map[int64][]byte{}}
}

// victim picks a member that may be sick: one that is, or another while parity has room. -1: none.
func (w *world) victim(rng *rand.Rand) int {
	var from []int
	for i := range w.shape.members {
		usable := !w.sick.gone[i] && !w.sick.dead[i] && w.sick.stalled[i] == nil && !w.sick.spared[i]
		if usable && (w.sick.members[i] || len(w.sick.members) < w.shape.parity) {
			from = append(from, i)
		}
	}
	if len(from) == 0 {
		return -1
	}
	return from[rng.IntN(len(from))]
}

var lieKinds = []weighted{{"lose", 6}, {"tear", 6}, {"misdirect", 6}, {"rot", 8}, {"unreadable", 4}, {"fail", 2}, {"die", 2}, {"stall", 2}, {"remember", 4}}

// lie makes a drive do one of the things that drives do once a year.
func (w *world) lie(rng *rand.Rand) (string, int) {
	i := w.victim(rng)
	if i < 0 {
		return "", i
	}
	d := w.disks.Disks[i]
	kind := pick(rng, lieKinds)
	if kind == "remember" { // an older copy for later; nothing is wrong yet
		if w.sick.old[i] == nil {
			w.sick.old[i] = d.Snapshot()
		}
		return kind, i
	}
	w.sick.members[i] = true
	next := func(v raidtest.Verdict) {
		n := 1 + rng.IntN(6)
		behind := n%2 == 0 // only blocks behind the checksum blocks, which land
		d.MisdirectBy(blockBytes * int64(1+rng.IntN(40)))
		d.OnWrite(func(x raidtest.Write) raidtest.Verdict {
			if n == 0 || x.Off < raid.DataOffset || behind && (x.Off-raid.DataOffset)%raid.SlotBytes == 0 {
				return raidtest.Land
			}
			n--
			w.count("write: " + kind)
			return v
		})
	}
	switch kind {
	case "lose":
		next(raidtest.Lose)
	case "tear":
		next(raidtest.Tear)
	case "misdirect":
		next(raidtest.Misdirect)
	case "fail":
		next([]raidtest.Verdict{raidtest.Fail, raidtest.FailTorn}[rng.IntN(2)])
	case "rot":
		w.rot(rng, i)
	case "unreadable":
		for range 1 + rng.IntN(4) {
			d.Unreadable(raid.DataOffset + rng.Int64N(w.shape.driveBytes()-raid.DataOffset))
			w.count("unreadable block")
		}
	case "die":
		d.Die()
		w.sick.dead[i] = true
		w.count("drive died")
	case "stall":
		w.sick.stalled[i] = d.Stall()
		w.count("drive stalled")
	}
	return kind, i
}

// rot flips bits in some blocks of a member.
func (w *world) rot(rng *rand.Rand, i int) {
	for range 1 + rng.IntN(8) {
		off := raid.DataOffset + rng.Int64N(w.shape.driveBytes()-raid.DataOffset)
		if rng.IntN(4) == 0 { // a checksum block
			off = raid.DataOffset + rng.Int64N(int64(w.shape.slots))*raid.SlotBytes + rng.Int64N(512)
		}
		w.disks.Disks[i].Rot(off)
		w.count("rotten block")
	}
}

// wake ends what hangs.
func (w *world) wake() {
	for i, resume := range w.sick.stalled {
		resume()
		delete(w.sick.stalled, i)
	}
}

// revive brings the dead back: too late, where a write missed them.
func (w *world) revive() {
	for i := range w.sick.dead {
		w.disks.Disks[i].Revive()
		w.count("drive came back")
	}
	clear(w.sick.dead)
}

// lose takes members away, or exchanges one for the older copy of itself that was kept. The power is off.
func (w *world) lose(rng *rand.Rand) (what string, i int) {
	i = w.victim(rng)
	if i < 0 {
		return "", i
	}
	if old := w.sick.old[i]; old != nil && rng.IntN(2) == 0 {
		w.disks.Disks[i].Restore(old)
		delete(w.sick.old, i)
		w.sick.members[i] = true
		w.count("older copy came back")
		return "old", i
	}
	w.sick.members[i], w.sick.gone[i] = true, true
	w.count("member lost")
	return "gone", i
}

// scrub drains, reads everything on the media and repairs it. When it passed, who only lied is well.
func (w *world) scrub(ctx context.Context) error {
	if err := w.pool.Drain(ctx); err != nil {
		return err
	}
	for _, d := range w.disks.Disks {
		d.OnWrite(nil)
	}
	for stripe := range w.array.Geometry().Stripes {
		err := (&array{w.array, w}).do("a repair", func() error {
			r, err := w.array.Scrub(ctx, stripe)
			w.counted("strip scrubbed well", r.Repaired)
			return err
		})
		// A stripe that nothing maps may have been cut in its first write.
		if err != nil && !errors.Is(err, raid.ErrUnrecoverable) {
			return err
		}
	}
	if err := (&array{w.array, w}).do("a flush", func() error { return w.array.Flush(ctx) }); err != nil {
		return err
	}
	failed := w.array.Label().Failed
	for i := range w.sick.members {
		if !w.sick.gone[i] && !w.sick.dead[i] && w.sick.stalled[i] == nil && failed>>i&1 == 0 {
			delete(w.sick.members, i)
		}
	}
	w.count("scrub of everything")
	return nil
}

// rebuild rebuilds a failed member to spare space, with operations in between, and the power cut within where the
// seed says so. during is called before some of the stripes.
func (w *world) rebuild(ctx context.Context, during func() error) (int, error) {
	w.wake() // several workers may fail a member at once: one holds a mutex then, and virtual time stands still
	label := w.array.Label()
	for _, of := range label.SpareOf { // the power went just after the end of a rebuild
		if i := int(of) - 1; of != 0 && !w.sick.spared[i] {
			w.sick.spared[i] = true
			delete(w.sick.members, i)
		}
	}
	member := -1
	for i := range w.shape.members {
		if label.Failed>>i&1 != 0 && !w.sick.spared[i] && (label.RebuildMember < 0 || label.RebuildMember == i) {
			member = i
			break
		}
	}
	if w.shape.spares == 0 || member < 0 || len(w.sick.spared) == w.shape.spares {
		return -1, nil
	}
	if label.RebuildMember == member {
		w.count("rebuild went on")
	}
	var broken error
	stripes := 0
	pace := func(context.Context) error {
		if w.cutting.Load() || w.off.Load() {
			return errPower
		}
		if stripes++; stripes%8 == 0 {
			if broken = during(); broken != nil || w.off.Load() {
				return errPower
			}
		}
		if w.step() {
			w.count("cut in a rebuild")
			w.cutting.Store(true)
		}
		return nil
	}
	err := w.array.Rebuild(ctx, member, pace, nil)
	if w.cutting.Swap(false) {
		w.off.Store(true)
	}
	if broken != nil {
		return member, broken
	}
	if err == nil && !w.off.Load() {
		w.sick.spared[member] = true
		delete(w.sick.members, member)
		w.count("member rebuilt")
	}
	return member, err
}

// grow adds a drive or two to the array, or goes on with a growth that was cut.
func (w *world) grow(ctx context.Context, rng *rand.Rand) error {
	w.wake() // see rebuild
	l := w.array.Label()
	var drives []raid.Drive
	switch {
	case l.Growing():
		w.count("growth went on")
	case w.grown || l.RebuildMember >= 0:
		return nil
	default:
		if err := w.pool.Drain(ctx); err != nil {
			return err
		}
		from := len(w.disks.Disks)
		w.disks.Add(w.seed, 1+rng.IntN(2), w.shape.driveBytes())
		for i, d := range w.drives()[from:] {
			if w.sick.gone[from+i] {
				return nil
			}
			drives = append(drives, d)
		}
		w.grown = true
	}
	pace := func(context.Context) error {
		if w.cutting.Load() || w.off.Load() {
			return errPower
		}
		if w.step() {
			w.count("cut in a growth")
			w.cutting.Store(true)
		}
		return nil
	}
	err := w.array.Grow(ctx, drives, raid.GrowOptions{Pace: pace})
	if w.cutting.Swap(false) {
		w.off.Store(true)
	}
	switch {
	case w.off.Load():
		return errPower
	case err == nil:
		w.count("array grown")
	case errors.Is(err, raid.ErrDegraded), errors.Is(err, raid.ErrBusy), errors.Is(err, raid.ErrUnrecoverable), errors.Is(err, raid.ErrSize):
		w.count("growth put off")
		return nil
	}
	return err
}

// beyond breaks one member more than parity stands for, in some slots, and looks at every stripe: exactly those that
// lost more than parity may fail, and none may be wrong. The pool is drained.
func (w *world) beyond(ctx context.Context, rng *rand.Rand) error {
	if w.grown || len(w.sick.spared) > 0 || w.array.Label().RebuildMember >= 0 {
		return nil // which strip lies where is then the array's to know
	}
	lay, err := layout.New(w.shape.members, w.shape.data, w.shape.parity, w.shape.spares)
	if err != nil {
		return err
	}
	before := map[uint64]uint32{}
	buf := make([]byte, w.shape.data*raid.StripBytes)
	for stripe := range w.array.Geometry().Stripes {
		// A stripe of a freed extent may be torn, and read by chance.
		if w.pool.Written(stripe) && w.array.Read(ctx, stripe, 0, [][]byte{buf}) == nil {
			before[stripe] = crc32.ChecksumIEEE(buf)
		}
	}
	broken := map[[2]int]bool{}
	for len(w.sick.members) <= w.shape.parity {
		i := rng.IntN(w.shape.members)
		if w.sick.members[i] {
			continue
		}
		w.sick.members[i] = true
		for slot := range w.shape.slots {
			if rng.IntN(2) == 0 {
				continue
			}
			broken[[2]int{i, slot}] = true
			for b := range int64(raid.StripBlocks) { // every column, so that it is lost as a whole
				w.disks.Disks[i].Rot(raid.DataOffset + int64(slot)*raid.SlotBytes + (1+b)*blockBytes)
			}
		}
	}
	wasSick := func(i int) bool { return w.sick.gone[i] || w.sick.dead[i] || w.array.Label().Failed>>i&1 != 0 }
	for _, stripe := range slices.Sorted(func(yield func(uint64) bool) {
		for s := range before {
			if !yield(s) {
				return
			}
		}
	}) {
		bad, doubtful := 0, false
		for strip := range lay.Width() {
			member, slot := lay.Strip(stripe, strip)
			switch {
			case wasSick(member), broken[[2]int{member, int(slot)}]:
				bad++
			case w.sick.members[member]:
				doubtful = true // may have lied before about this strip
			}
		}
		err := w.array.Read(ctx, stripe, 0, [][]byte{buf})
		switch {
		case err == nil && crc32.ChecksumIEEE(buf) != before[stripe]:
			return fmt.Errorf("%w: stripe %d with %d bad strips reads as something else", errLoss, stripe, bad)
		case err == nil:
		case !errors.Is(err, raid.ErrUnrecoverable):
			return fmt.Errorf("%w: stripe %d with %d bad strips: %w", errLoss, stripe, bad, err)
		case bad <= w.shape.parity && !doubtful:
			return fmt.Errorf("%w: stripe %d with %d bad strips cannot be read: %w", errLoss, stripe, bad, err)
		default:
			w.count("stripe beyond parity")
		}
	}
	return nil
}
