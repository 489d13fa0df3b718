package scsi

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ledge-storage/ledge/target"
)

// Persistent reservations (SPC-4 5.13).
//
// A registration is the key of one initiator port, on one target port or on all. Whoever is
// registered may reserve. The state is a value: a command computes the next one, stores it where
// it must survive power loss, and only then puts it in the unit's place, so that a store that
// fails changes nothing.
//
// A unit that moves between targets (a shelf's takeover) keeps its state in a SharedReservations: all
// of it is saved with every change, and the target that is to serve next loads it before it does. What a
// target remembers of a unit that another serves is of no meaning: prepare looks at the access state
// first, and PERSISTENT RESERVE IN asks the store.

// Types of a persistent reservation (SPC-4 table 64).
const (
	prWriteExclusive     = 1
	prExclusiveAccess    = 3
	prWriteRegistrants   = 5
	prExclusiveRegistr   = 6
	prWriteAll           = 7
	prExclusiveAll       = 8
	maxRegistrations     = 1024
	maxTransportIDBytes  = 4096
	prVersion            = 1
	maxReservationsBytes = 1 << 20
)

// registration of an initiator port.
type registration struct {
	Port string `json:"port"` // SCSI port name of the initiator
	// Relative target port; of no meaning where All.
	Relative uint16 `json:"relative"`
	All      bool   `json:"all,omitempty"`
	Key      uint64 `json:"key"`
}

func (r *registration) is(n *Nexus) bool {
	return r.Port == n.Port && (r.All || r.Relative == n.RelativePort)
}

// reservations is the state of a unit. It is what a ReservationStore keeps, as JSON.
type reservations struct {
	Version int `json:"version"`
	// Generation returns to 0 with power (SPC-4 5.13.4), so only SharedReservations keep it: a move is no
	// loss of power.
	Generation uint32         `json:"generation,omitempty"`
	Regs       []registration `json:"registrations,omitempty"`
	// Holder is the index of the holder in Regs, -1 for none. In the all-registrants types
	// it is the one that reserved.
	Holder int  `json:"holder"`
	Type   byte `json:"type,omitempty"`
	APTPL  bool `json:"aptpl,omitempty"`
}

func (r *reservations) held() bool       { return r.Type != 0 }
func (r *reservations) registered() bool { return len(r.Regs) > 0 }
func (r *reservations) allRegistrants() bool {
	return r.Type == prWriteAll || r.Type == prExclusiveAll
}

func registrantsOnly(t byte) bool { return t >= prWriteRegistrants }

func (r *reservations) find(n *Nexus) int {
	return slices.IndexFunc(r.Regs, func(g registration) bool { return g.is(n) })
}

// holds says whether registration i holds the reservation.
func (r *reservations) holds(i int) bool {
	return r.held() && i >= 0 && (r.allRegistrants() || r.Holder == i)
}

// check refuses what the reservation forbids to n.
func (r *reservations) check(n *Nexus, flags opFlags) error {
	if !r.held() {
		return nil
	}
	i := r.find(n)
	if r.holds(i) || i >= 0 && registrantsOnly(r.Type) {
		return nil
	}
	exclusive := r.Type == prExclusiveAccess || r.Type == prExclusiveRegistr || r.Type == prExclusiveAll
	if flags&opReads != 0 && !exclusive {
		return nil
	}
	return errReservationConflict
}

func (r *reservations) clone() *reservations {
	c := *r
	c.Regs = slices.Clone(r.Regs)
	return &c
}

// remove drops registration i. It returns the type of a reservation that ended with it, or 0.
func (r *reservations) remove(i int) (released byte) {
	held := r.held() && (r.Holder == i && !r.allRegistrants() || r.allRegistrants() && len(r.Regs) == 1)
	r.Regs = slices.Delete(r.Regs, i, i+1)
	switch {
	case held:
		released = r.Type
		r.Type, r.Holder = 0, -1
	case r.Holder > i:
		r.Holder--
	case r.Holder == i:
		r.Holder = 0 // of all registrants, any
	}
	return released
}

// loadReservations fetches what a store kept through power loss, for a unit that nobody sees yet.
func (u *unit) loadReservations() error {
	r, err := u.storedReservations()
	if err != nil {
		return err
	}
	u.pr = *r
	u.updateRestricted()
	return nil
}

// storedReservations decodes what the store has.
func (u *unit) storedReservations() (*reservations, error) {
	r := &reservations{Holder: -1}
	if u.store == nil {
		return r, nil
	}
	b, err := u.store.Load()
	if err != nil || len(b) == 0 {
		return r, err
	}
	if len(b) > maxReservationsBytes {
		return nil, fmt.Errorf("%d bytes of reservations", len(b))
	}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	valid := r.Version == prVersion && len(r.Regs) <= maxRegistrations &&
		(r.Type == 0 && r.Holder == -1 || validType(r.Type) && r.Holder >= 0 && r.Holder < len(r.Regs))
	if !valid {
		return nil, fmt.Errorf("reservations of version %d are not understood", r.Version)
	}
	return r, nil
}

// reloadReservations puts what the store has in the place of what this target remembers. Commands that
// came before and that the reservation forbids are aborted: they may have waited for their data since this
// target served the unit last.
func (u *unit) reloadReservations() error {
	u.prMu.Lock()
	defer u.prMu.Unlock()
	next, err := u.storedReservations()
	if err != nil {
		return err
	}
	u.mu.Lock()
	old := u.pr.Regs
	u.pr = *next
	u.updateRestricted()
	u.mu.Unlock()
	for _, g := range old {
		if !slices.ContainsFunc(next.Regs, func(o registration) bool {
			return o.Port == g.Port && o.Relative == g.Relative && o.All == g.All
		}) {
			u.attentionWhere(uaRegistrationsPreempted, g.is)
		}
	}
	cleared := make(map[*Nexus]bool)
	u.abort(func(t *Task) bool {
		// Not t.op, which prepare may be changing.
		op := u.target.ops.lookup(t.CDB[0], t.CDB[1])
		if op == nil || op.flags&opAnyHolder != 0 || next.check(t.Nexus, op.flags) == nil {
			return false
		}
		cleared[t.Nexus] = true
		return true
	})
	u.attentionWhere(uaCommandsCleared, func(n *Nexus) bool { return cleared[n] })
	return nil
}

// put makes next the unit's state, and durable where it is to survive.
func (u *unit) put(next *reservations) error {
	if u.store != nil && (u.shared != nil || next.APTPL || u.pr.APTPL) {
		keep := *next
		switch {
		case u.shared != nil:
		case next.APTPL:
			keep.Generation = 0
		default:
			keep = reservations{Holder: -1}
		}
		keep.Version = prVersion
		b, err := json.Marshal(keep)
		if err == nil {
			err = u.store.Save(b)
		}
		if errors.Is(err, target.ErrNoSpace) {
			return illegal(ascInsufficientRegister)
		}
		if err != nil {
			return fmt.Errorf("scsi: store reservations of lun %d: %w", u.lun, err)
		}
	}
	u.mu.Lock()
	u.pr = *next
	u.updateRestricted()
	u.mu.Unlock()
	return nil
}

func validType(t byte) bool {
	switch t {
	case prWriteExclusive, prExclusiveAccess, prWriteRegistrants, prExclusiveRegistr, prWriteAll, prExclusiveAll:
		return true
	}
	return false
}

// PERSISTENT RESERVE IN (SPC-4 6.16).

func prInReadKeys(t *Task) error {
	r, err := t.prCurrent()
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32(t.reply[:0], r.Generation)
	b = binary.BigEndian.AppendUint32(b, uint32(8*len(r.Regs)))
	for _, g := range r.Regs {
		b = binary.BigEndian.AppendUint64(b, g.Key)
	}
	t.reply = b
	return t.answer(b, t.be16(7))
}

func prInReadReservation(t *Task) error {
	r, err := t.prCurrent()
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32(t.reply[:0], r.Generation)
	if !r.held() {
		b = append(b, 0, 0, 0, 0)
	} else {
		key := r.Regs[r.Holder].Key
		if r.allRegistrants() {
			key = 0
		}
		b = append(b, 0, 0, 0, 16)
		b = binary.BigEndian.AppendUint64(b, key)
		b = append(b, 0, 0, 0, 0, 0, r.Type, 0, 0)
	}
	t.reply = b
	return t.answer(b, t.be16(7))
}

func prInCapabilities(t *Task) error {
	b := append(t.reply[:0], 0, 8, 0x0C, 0x80, 0xEA, 0x01, 0, 0) // SIP_C, ATP_C; TMV; the six types
	if t.unit.store != nil {
		b[2] |= 0x01 // PTPL_C
		r, err := t.prCurrent()
		if err != nil {
			return err
		}
		if r.APTPL {
			b[3] |= 0x01 // PTPL_A
		}
	}
	t.reply = b
	return t.answer(b, t.be16(7))
}

func prInFullStatus(t *Task) error {
	r, err := t.prCurrent()
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32(t.reply[:0], r.Generation)
	b = append(b, 0, 0, 0, 0)
	for i, g := range r.Regs {
		b = binary.BigEndian.AppendUint64(b, g.Key)
		b = append(b, 0, 0, 0, 0)
		flags, kind := byte(0), byte(0)
		if g.All {
			flags |= 0x02
		}
		if r.holds(i) {
			flags |= 0x01
			kind = r.Type
		}
		b = append(b, flags, kind, 0, 0, 0, 0, byte(g.Relative>>8), byte(g.Relative))
		id := transportID(g.Port)
		b = binary.BigEndian.AppendUint32(b, uint32(len(id)))
		b = append(b, id...)
	}
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	t.reply = b
	return t.answer(b, t.be16(7))
}

// prCurrent is the state for an answer: it is taken first and confirmed then, so that a target that lost the
// unit without noticing tells nothing old.
func (t *Task) prCurrent() (*reservations, error) {
	r := t.prState()
	if s := t.unit.shared; s != nil {
		if err := s.Current(t.ctx); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (t *Task) prState() *reservations {
	t.unit.mu.Lock()
	defer t.unit.mu.Unlock()
	return t.unit.pr.clone()
}

// transportID is the TransportID of an iSCSI initiator port (SPC-4 7.6.4.6): format 1, with ISID.
func transportID(port string) []byte {
	name := append([]byte(port), 0)
	for len(name)%4 != 0 || len(name) < 20 {
		name = append(name, 0)
	}
	return append([]byte{0x45, 0, byte(len(name) >> 8), byte(len(name))}, name...)
}

// parseTransportID takes the first TransportID of b apart.
func parseTransportID(b []byte) (port string, rest []byte, ok bool) {
	if len(b) < 4 || b[0] != 0x45 {
		return "", nil, false // another protocol, or a name without an ISID
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n < 20 || n%4 != 0 || n > len(b)-4 {
		return "", nil, false
	}
	name, _, _ := strings.Cut(string(b[4:4+n]), "\x00")
	name = strings.ToLower(name)
	if !strings.Contains(name, ",i,0x") {
		return "", nil, false
	}
	return name, b[4+n:], true
}
