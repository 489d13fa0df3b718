package raid

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// What is this drive? By its label alone: a path says nothing.
//
// # Older copies
//
// A drive may be an older copy of itself: an image written back, a snapshot rolled back. Up to m of them at once are found by
// the generations, strip by strip; labels find any number, at once. Each label carries Settled, the newest seq of which
// its writer knew that every member that was not failed had it on its media. A drive only ever gets newer labels. So a
// member that is not failed, and shows a label older than the newest Settled, is not what that member was: it is an
// older copy. The reverse does not hold for seq itself: a crash in the middle of a label change leaves members behind, by
// one or, when starts are cut one after the other, by more; they hold all data, and refusing them could cost
// more members than parity stands for. Settled never refuses these: what a cut change did not reach it does not call
// settled.
//
// Settled lags one label change behind. So the first write after Open waits for two changes (prepareToWrite), and what was
// copied before the array was opened last is always found. A copy made while the array was open, put back before
// anything changed the label twice, is found by generations only; SettleLabel is for whoever cannot live with that.
//
// When one of the two slots of a label cannot be read the other may be the older: one seq is forgiven then.

// older tells whether a drive with this label is an older copy, by the newest label.
//
// A member that joins a growing array has a label of sequence 0 or 1 until the growth begins (grow.go). While nothing has
// moved there is nothing on it to be old.
func (d *DriveLabel) older(l *Label) bool {
	seq := d.Label.Seq
	if l.Growing() && l.GrowStaged == 0 && d.Label.Member >= l.GrowFrom && d.Label.Epoch == 0 && seq < labelSlots {
		return false
	}
	if d.torn {
		seq++
	}
	return seq < l.Settled
}

// Offer says what a drive that showed up is to this array. It only reads, and does not take the drive. The error is the
// drive's.
func (a *Array) Offer(ctx context.Context, d Drive) (Offer, error) {
	if err := a.enter(); err != nil {
		return Offer{}, err
	}
	defer a.leave()
	return a.look(ctx, d)
}

func (a *Array) look(ctx context.Context, d Drive) (Offer, error) {
	if err := ctx.Err(); err != nil {
		return Offer{}, err
	}
	found := make([]DriveLabel, 1)
	readAll([]Drive{d}, found, a.opts.WriteTimeout)
	dl := &found[0]
	o := Offer{Member: -1}
	if dl.Label != nil {
		o.Pool, o.Array = dl.Label.Pool, dl.Label.Array
		if dl.Label.Array == a.id {
			o.Member = dl.Label.Member
		}
	}
	blank := false
	if dl.Err != nil && (errors.Is(dl.Err, ErrBlank) || errors.Is(dl.Err, ErrCorrupt)) && d.Size() >= DataOffset {
		var err error
		if blank, err = isBlank(d, a.opts.WriteTimeout); err != nil {
			return o, err
		}
	} else if dl.Err != nil && !errors.Is(dl.Err, ErrBlank) {
		return o, dl.Err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	o.Kind, o.Detail = a.judgeOffer(dl, d, blank)
	return o, nil
}

// judgeOffer is the table of what a drive can be; Array.mu is held.
func (a *Array) judgeOffer(dl *DriveLabel, d Drive, blank bool) (OfferKind, string) {
	l := &a.label
	if own := dl.Label; own != nil && own.Array == a.id && own.Member < len(a.members) {
		m := a.members[own.Member]
		failed := l.Failed>>own.Member&1 != 0
		same := own.MemberID == l.IDs[own.Member]
		switch {
		case !same:
			return OfferOldCopy, fmt.Sprintf("it was member %d, which is another drive now", own.Member)
		case m.state == Online || m.state == Restoring:
			if own.newer(l) || own.Seq == l.Seq {
				return OfferDuplicate, fmt.Sprintf("member %d is there already", own.Member)
			}
			return OfferOldCopy, fmt.Sprintf("an older copy of member %d, which is there", own.Member)
		case d.Size() < l.MemberBytes:
			return OfferSmall, fmt.Sprintf("%d bytes, member %d needs %d", d.Size(), own.Member, l.MemberBytes)
		case failed || dl.older(l) || m.drive != nil:
			return OfferStale, fmt.Sprintf("member %d as of seq %d, the array is at %d", own.Member, own.Seq, l.Seq)
		default:
			return OfferReturned, fmt.Sprintf("member %d; no write missed it", own.Member)
		}
	}
	switch {
	case d.Size() < l.MemberBytes:
		return OfferSmall, fmt.Sprintf("%d bytes, a member needs %d", d.Size(), l.MemberBytes)
	case dl.Label != nil:
		return OfferForeign, fmt.Sprintf("member %d of array %v of pool %v", dl.Label.Member, dl.Label.Array, dl.Label.Pool)
	case blank:
		return OfferBlank, "no label"
	default:
		return OfferUsed, "no label, but not empty"
	}
}

// refusal is why Replace does not take the drive; nil if it does.
func (o *Offer) refusal(force bool) error {
	var err error
	switch o.Kind {
	case OfferBlank:
		return nil
	case OfferSmall:
		return fmt.Errorf("%s: %w", o.Detail, ErrSize)
	case OfferDuplicate:
		return fmt.Errorf("%s: %w", o.Detail, ErrDuplicate)
	case OfferUsed:
		err = ErrNotBlank
	case OfferForeign:
		err = ErrForeign
	default:
		err = ErrStaleMember
	}
	if force {
		return nil
	}
	return fmt.Errorf("%s: %w", o.Detail, err)
}

// blankBytes at the start of a drive are zeros when it counts as blank.
const blankBytes = 64 << 10

// isBlank waits no longer than limit; a read that hangs ends when the drive answers.
func isBlank(d Drive, limit time.Duration) (bool, error) {
	type answer struct {
		blank bool
		err   error
	}
	done := make(chan answer, 1)
	go func() {
		buf := alignedBytes(blankBytes)
		if _, err := d.ReadAt(buf, 0); err != nil {
			done <- answer{err: fmt.Errorf("raid: %s: %w", d.Name(), err)}
			return
		}
		blank := true
		for _, b := range buf {
			blank = blank && b == 0
		}
		done <- answer{blank: blank}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.blank, r.err
	case <-timer.C:
		return false, fmt.Errorf("raid: %s: %w", d.Name(), ErrTimeout)
	}
}
