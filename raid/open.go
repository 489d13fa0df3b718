package raid

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"github.com/klauspost/reedsolomon"

	"github.com/ledge-storage/ledge/raid/layout"
)

func (o *Options) withDefaults() {
	if o.CacheBytes == 0 {
		o.CacheBytes = 64 << 20
	}
	if o.QueueDepth == 0 {
		o.QueueDepth = 32
	}
	if o.ReadTimeout == 0 {
		o.ReadTimeout = 4 * time.Second
	}
	if o.WriteTimeout == 0 {
		o.WriteTimeout = 30 * time.Second
	}
	o.Suspicion.withDefaults()
	if o.Random == nil {
		o.Random = func(b []byte) { rand.Read(b) } // never fails (crypto/rand)
	}
}

func (o *Options) uuid() (u UUID) {
	o.Random(u[:])
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80 // version 4 (RFC 9562 5.4)
	return u
}

// Create makes a new array of all the drives, in their order, and opens it. Drives that are not blank (the first
// 64 KiB are zeros) are refused without Options.Force, before anything is written. The label has epoch 0 and no owner.
func Create(ctx context.Context, drives []Drive, opts Options) (*Array, error) {
	opts.withDefaults()
	n := len(drives)
	if opts.K == 0 {
		opts.K, opts.M = 8, 2
	}
	if opts.Spares == 0 && !opts.NoSpares {
		opts.Spares = max(0, min(2, n-opts.K-opts.M))
	}
	if err := checkGeometry(n, opts.K, opts.M, opts.Spares); err != nil {
		return nil, fmt.Errorf("raid: create: %w", err)
	}
	lay, err := layout.New(n, opts.K, opts.M, opts.Spares)
	if err != nil {
		return nil, fmt.Errorf("raid: create: %w", err)
	}
	slots, err := createChecks(ctx, drives, lay, opts.Force)
	if err != nil {
		return nil, err
	}
	if opts.Pool == (UUID{}) {
		opts.Pool = opts.uuid()
	}
	l := Label{Pool: opts.Pool, Array: opts.uuid(), N: n, K: opts.K, M: opts.M, Spares: opts.Spares, Slots: slots,
		MemberBytes: DataOffset + int64(slots)*SlotBytes, RebuildMember: -1, RebuildSpare: -1, Checksums: ChecksumsXXH3}
	if opts.OldChecksums {
		l.Checksums = ChecksumsCRC32C
	}
	a, err := newArray(&l, lay, opts)
	if err != nil {
		return nil, err
	}
	for i, d := range drives {
		m := newMember(i, d, opts.QueueDepth)
		m.id, m.state = opts.uuid(), Online
		a.members[i], l.IDs[i] = m, m.id
	}
	l.Seq = 1
	// Both slots: an old label of a higher seq must not outlive this in the other slot.
	for range labelSlots {
		missed, err := a.writeLabels(&l)
		if err == nil && missed != 0 {
			err = fmt.Errorf("%d members could not be written: %w", bits.OnesCount64(missed), ErrNoMajority)
		}
		if err != nil {
			return nil, fmt.Errorf("raid: create: %w", err)
		}
		a.adopt(&l)
		a.settled, l.Settled = l.Seq, l.Seq
		l.Seq++
	}
	a.ready.Store(true)
	return a, nil
}

// createChecks looks at every drive before any is written, and returns the slots that fit on the smallest.
func createChecks(ctx context.Context, drives []Drive, lay *layout.Layout, force bool) (uint64, error) {
	const head = 64 << 10
	smallest := int64(1<<63 - 1)
	buf := alignedBytes(head)
	for i, d := range drives {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if d == nil {
			return 0, fmt.Errorf("raid: create: drive %d is absent: %w", i, ErrRange)
		}
		smallest = min(smallest, d.Size())
		if d.Size() < DataOffset || force {
			continue
		}
		if _, err := d.ReadAt(buf, 0); err != nil {
			return 0, fmt.Errorf("raid: create: %s: %w", d.Name(), err)
		}
		for _, b := range buf {
			if b != 0 {
				return 0, fmt.Errorf("raid: create: %s: %w", d.Name(), ErrNotBlank)
			}
		}
	}
	slots := lay.Slots(uint64(max(0, smallest-DataOffset)) / SlotBytes)
	if slots == 0 {
		return 0, fmt.Errorf("raid: create: drives of %d bytes hold no stripe: %w", smallest, ErrSize)
	}
	return slots, nil
}

func newArray(l *Label, lay *layout.Layout, opts Options) (*Array, error) {
	code, err := reedsolomon.New(l.K, l.M)
	if err != nil {
		return nil, fmt.Errorf("raid: %d+%d: %w", l.K, l.M, err)
	}
	return &Array{id: l.Array, sums: l.Checksums, opts: opts, layout: lay, at: lay, code: code, label: l.clone(), members: make([]*member, l.N),
		cache: newSumCache(opts.CacheBytes, l.K, l.M)}, nil
}

// Open finds the members among the drives by their labels, whatever the order, and opens the array. It writes
// nothing. Drives that it refuses are in Status().Refused; it fails with ErrBlank when no drive has a label, with
// ErrForeign when only others' members are there, and with ErrNoMajority. The drives are the array's from now on,
// refused ones too; when Open fails they remain the caller's.
func Open(ctx context.Context, drives []Drive, opts Options) (*Array, error) {
	opts.withDefaults()
	found, err := survey(ctx, drives, opts.Pool, opts.Array, opts.WriteTimeout)
	if err != nil {
		return nil, fmt.Errorf("raid: open: %w", err)
	}
	l := &found.Label
	lay, err := layout.New(l.N, l.K, l.M, l.Spares)
	if err != nil {
		return nil, fmt.Errorf("raid: open: %w", err)
	}
	a, err := newArray(l, lay, opts)
	if err != nil {
		return nil, err
	}
	if l.Growing() {
		if err := a.openGrowing(l); err != nil {
			return nil, fmt.Errorf("raid: open: %w", err)
		}
	}
	for i := range a.members {
		a.members[i] = newMember(i, nil, opts.QueueDepth)
		if l.Failed>>i&1 != 0 {
			a.members[i].state = Failed
		}
	}
	// Absent members are recorded, and a label seen on a minority is settled, before the first write: see Array.ready.
	for i, d := range drives {
		if d == nil {
			continue
		}
		dl := found.Drives[i]
		if dl.Err != nil {
			a.refused = append(a.refused, Refusal{dl.Path, dl.Err})
			a.unused = append(a.unused, d)
			continue
		}
		m := a.members[dl.Label.Member]
		m.drive, m.id, m.state = d, dl.Label.MemberID, Online
		if l.Restore.Member() == m.index {
			m.state = Restoring
		}
	}
	return a, nil
}

// Survey is what ReadLabels finds.
type Survey struct {
	// Label is what a majority of the members of one array says.
	Label Label
	// Members counts the drives that are good members of it. Drives has an entry for each drive that was
	// asked (Err: why it is not a member that can be used).
	Members int
	// Absent are the members of Label that are not among them, failed ones too (bit i is member i), and Lost is how many of these no
	// spare column stands for: beyond M, stripes are lost, and nothing can be written.
	Absent uint64
	Lost   int
	Drives []DriveLabel
	// Holder is the key that holds the reservation on most members, HolderMembers on how many; Registered are
	// all keys seen on any member.
	Holder        uint64
	HolderMembers int
	Registered    []uint64
}

// ReadLabels looks at drives without opening them as an array: array picks one, the zero UUID the one that has a
// majority. Entries of drives may be nil.
func ReadLabels(ctx context.Context, drives []Drive, array UUID) (Survey, error) {
	var opts Options
	opts.withDefaults()
	s, err := survey(ctx, drives, UUID{}, array, opts.WriteTimeout)
	if err != nil {
		return Survey{Drives: s.Drives}, err
	}
	var keys []keyring
	for i, d := range drives {
		if d != nil && s.Drives[i].Err == nil {
			keys = append(keys, readKeys(d))
		}
	}
	s.Registered, s.Holder, s.HolderMembers = tally(keys)
	return s, nil
}

// survey reads the labels and judges every drive. A drive that does not answer within the limit is left out;
// its goroutine ends when the drive answers.
func survey(ctx context.Context, drives []Drive, pool, array UUID, limit time.Duration) (Survey, error) {
	s := Survey{Drives: make([]DriveLabel, len(drives))}
	if err := ctx.Err(); err != nil {
		return s, err
	}
	readAll(drives, s.Drives, limit)
	id, err := choose(s.Drives, pool, array)
	if err != nil {
		return s, err
	}
	var labels []DriveLabel
	for i := range s.Drives {
		d := &s.Drives[i]
		if d.Err == nil && d.Label.Array != id {
			d.Err = fmt.Errorf("raid: %s: member of array %v of pool %v: %w", d.Path, d.Label.Array, d.Label.Pool, ErrForeign)
		}
		if d.Err == nil {
			labels = append(labels, *d)
		}
	}
	l, err := truth(labels)
	if err != nil {
		return s, err
	}
	s.Label = *l
	for i := range s.Drives {
		if d := &s.Drives[i]; d.Err == nil {
			d.Err = judgeDrive(d, drives[i].Size(), &s.Label)
		}
	}
	refuseDuplicates(s.Drives)
	s.Absent = memberSet(s.Label.N)
	for i := range s.Drives {
		if s.Drives[i].Err == nil {
			s.Members++
			s.Absent &^= 1 << s.Drives[i].Label.Member
		}
	}
	s.Absent |= s.Label.Failed
	s.Lost = s.Label.lost(s.Absent)
	return s, nil
}

func readAll(drives []Drive, out []DriveLabel, limit time.Duration) {
	type answer struct {
		i int
		l *Label
		t bool
		e error
	}
	answers := make(chan answer, len(drives))
	asked := 0
	for i, d := range drives {
		if d == nil {
			out[i].Err = fmt.Errorf("raid: no drive: %w", ErrBlank)
			continue
		}
		out[i] = DriveLabel{Path: d.Name(), Err: fmt.Errorf("raid: %s: %w", d.Name(), ErrTimeout)}
		asked++
		go func() {
			l, torn, err := readDriveLabel(d)
			answers <- answer{i, l, torn, err}
		}()
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for range asked {
		select {
		case r := <-answers:
			out[r.i].Label, out[r.i].torn, out[r.i].Err = r.l, r.t, r.e
		case <-timer.C:
			return
		}
	}
}

// choose picks the array to open: the one asked for, or the one with a majority, or, so that the error
// tells most, the one with most members.
func choose(drives []DriveLabel, pool, array UUID) (UUID, error) {
	seen := make(map[UUID]uint64)
	newest := make(map[UUID]*Label)
	foreign := 0
	for i := range drives {
		l := drives[i].Label
		if drives[i].Err != nil {
			continue
		}
		if pool != (UUID{}) && l.Pool != pool || array != (UUID{}) && l.Array != array {
			foreign++
			continue
		}
		seen[l.Array] |= 1 << l.Member
		if n := newest[l.Array]; n == nil || l.newer(n) {
			newest[l.Array] = l
		}
	}
	var best UUID
	most := 0
	for id, set := range seen {
		size := newest[id].N
		n := bits.OnesCount64(set & memberSet(size))
		if n >= majority(size) {
			n += layout.MaxMembers
		}
		if n > most || n == most && string(id[:]) < string(best[:]) {
			best, most = id, n
		}
	}
	switch {
	case most > 0:
		return best, nil
	case foreign > 0:
		return best, fmt.Errorf("%d drives are of other pools or arrays: %w", foreign, ErrForeign)
	}
	for i := range drives {
		if e := drives[i].Err; e != nil && !errors.Is(e, ErrBlank) {
			return best, fmt.Errorf("no label can be read: %w: %w", ErrNoMajority, e)
		}
	}
	return best, fmt.Errorf("no drive carries a label: %w", ErrBlank)
}

// judgeDrive says why a drive of the right array cannot be used.
func judgeDrive(d *DriveLabel, size int64, l *Label) error {
	own := d.Label
	switch {
	case own.K != l.K || own.M != l.M || own.Spares != l.Spares || (own.N != l.N || own.Slots != l.Slots) && !l.grownFrom(own):
		return fmt.Errorf("raid: %s: label of another geometry: %w", d.Path, ErrForeign)
	case size < l.MemberBytes:
		return fmt.Errorf("raid: %s: %d bytes, member %d needs %d: %w", d.Path, size, own.Member, l.MemberBytes, ErrSize)
	case own.MemberID != l.IDs[own.Member]:
		return fmt.Errorf("raid: %s: member %d is drive %v now: %w", d.Path, own.Member, l.IDs[own.Member], ErrStaleMember)
	case d.older(l):
		return fmt.Errorf("raid: %s: an older copy of member %d: its label is of seq %d, every member had %d: %w",
			d.Path, own.Member, own.Seq, l.Settled, ErrStaleMember)
	case l.Failed>>own.Member&1 != 0 && l.Restore.Member() != own.Member:
		return fmt.Errorf("raid: %s: member %d was failed at epoch %d seq %d, this label is of epoch %d seq %d: %w",
			d.Path, own.Member, l.Epoch, l.Seq, own.Epoch, own.Seq, ErrStaleMember)
	}
	return nil
}

// refuseDuplicates: of several drives that claim to be one member the one with the newest label is it. When
// two are equally new nobody can tell the copy, and none is taken: parity knows better.
func refuseDuplicates(drives []DriveLabel) {
	best := make(map[int]int)
	tie := make(map[int]bool)
	for i := range drives {
		if drives[i].Err != nil {
			continue
		}
		l := drives[i].Label
		j, ok := best[l.Member]
		switch {
		case !ok || l.newer(drives[j].Label):
			best[l.Member], tie[l.Member] = i, false
		case !drives[j].Label.newer(l):
			tie[l.Member] = true
		}
	}
	for i := range drives {
		d := &drives[i]
		if d.Err == nil && (best[d.Label.Member] != i || tie[d.Label.Member]) {
			d.Err = fmt.Errorf("raid: %s: another drive is member %d too: %w", d.Path, d.Label.Member, ErrDuplicate)
		}
	}
}
