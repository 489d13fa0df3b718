package scsi

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Persistent reservations (SPC-4 5.13).
//
// A registration is the key of one initiator port, on one target port or on all. Whoever is
// registered may reserve. The state is a value: a command computes the next one, stores it where
// it must survive power loss, and only then puts it in the unit's place, so that a store that
// fails changes nothing.

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
	Version    int            `json:"version"`
	Generation uint32         `json:"-"` // returns to 0 with power, SPC-4 5.13.4
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

// loadReservations fetches what a store kept through power loss.
func (u *unit) loadReservations() error {
	u.pr.Holder = -1
	if u.store == nil {
		return nil
	}
	b, err := u.store.Load()
	if err != nil || len(b) == 0 {
		return err
	}
	if len(b) > maxReservationsBytes {
		return fmt.Errorf("%d bytes of reservations", len(b))
	}
	var r reservations
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	valid := r.Version == prVersion && len(r.Regs) <= maxRegistrations &&
		(r.Type == 0 && r.Holder == -1 || validType(r.Type) && r.Holder >= 0 && r.Holder < len(r.Regs))
	if !valid {
		return fmt.Errorf("reservations of version %d are not understood", r.Version)
	}
	u.pr = r
	u.updateRestricted()
	return nil
}

// put makes next the unit's state, and durable where it is to survive power loss.
func (u *unit) put(next *reservations) error {
	if u.store != nil && (next.APTPL || u.pr.APTPL) {
		keep := *next
		keep.Version = prVersion
		if !next.APTPL {
			keep = reservations{Version: prVersion, Holder: -1}
		}
		b, err := json.Marshal(keep)
		if err == nil {
			err = u.store.Save(b)
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
	r := t.prState()
	b := binary.BigEndian.AppendUint32(t.reply[:0], r.Generation)
	b = binary.BigEndian.AppendUint32(b, uint32(8*len(r.Regs)))
	for _, g := range r.Regs {
		b = binary.BigEndian.AppendUint64(b, g.Key)
	}
	t.reply = b
	return t.answer(b, t.be16(7))
}

func prInReadReservation(t *Task) error {
	r := t.prState()
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
		if r := t.prState(); r.APTPL {
			b[3] |= 0x01 // PTPL_A
		}
	}
	t.reply = b
	return t.answer(b, t.be16(7))
}

func prInFullStatus(t *Task) error {
	r := t.prState()
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

// PERSISTENT RESERVE OUT (SPC-4 6.17).

func decodePROut(t *Task) error {
	t.OutTotal = int64(t.be32(5))
	move := t.CDB[1]&0x1F == 0x07
	if t.OutTotal < 24 || t.OutTotal > maxTransportIDBytes+28 {
		return illegal(ascParameterListLength)
	}
	if !move && t.OutTotal > 24 && t.CDB[1]&0x1F != 0 {
		return illegal(ascParameterListLength)
	}
	return nil
}

// prOut is the parameter list that all actions but REGISTER AND MOVE share, and what they do it to.
type prOut struct {
	t           *Task
	r           *reservations // the next state
	me          int           // my registration, or -1
	key, action uint64        // RESERVATION KEY, SERVICE ACTION RESERVATION KEY
	flags       byte
	list        []byte
	attentions  []func()
	abort       []registration
}

// prOutRun runs one service action: body changes the next state, which is then made durable,
// then told to the others.
func prOutRun(body func(*prOut) error) func(*Task) error {
	return func(t *Task) error {
		list, err := t.list()
		if err != nil {
			return err
		}
		p, err := prChange(t, list, body)
		if err != nil {
			return err
		}
		for _, f := range p.attentions {
			f()
		}
		// Without prMu: what is waited for may be a PERSISTENT RESERVE OUT that waits for it.
		if len(p.abort) > 0 {
			t.unit.abort(func(o *Task) bool {
				return o != t && slices.ContainsFunc(p.abort, func(g registration) bool { return g.is(o.Nexus) })
			})
		}
		return nil
	}
}

// prChange computes the next state and puts it in place.
func prChange(t *Task, list []byte, body func(*prOut) error) (*prOut, error) {
	u := t.unit
	u.prMu.Lock()
	defer u.prMu.Unlock()
	p := &prOut{
		t: t, r: t.prState(), list: list, flags: list[20],
		key: binary.BigEndian.Uint64(list), action: binary.BigEndian.Uint64(list[8:]),
	}
	p.me = p.r.find(t.Nexus)
	if err := body(p); err != nil {
		return nil, err
	}
	return p, u.put(p.r)
}

// tell queues an attention for the nexuses of g, once the change is durable.
func (p *prOut) tell(g registration, a asc) {
	u, me := p.t.unit, p.t.Nexus
	p.attentions = append(p.attentions, func() {
		u.attentionWhere(a, func(n *Nexus) bool { return n != me && g.is(n) })
	})
}

// owner refuses an action of one who is not registered, or has another key.
func (p *prOut) owner() error {
	if p.me < 0 || p.r.Regs[p.me].Key != p.key {
		return errReservationConflict
	}
	return nil
}

// scopeType checks the CDB's scope and type.
func (p *prOut) scopeType() (byte, error) {
	if p.t.CDB[2]>>4 != 0 || !validType(p.t.CDB[2]&0x0F) {
		return 0, badCDB(2, 7)
	}
	return p.t.CDB[2] & 0x0F, nil
}

func prRegister(p *prOut) error {
	if p.me >= 0 && p.r.Regs[p.me].Key != p.key || p.me < 0 && p.key != 0 {
		return errReservationConflict
	}
	return p.register()
}

func prRegisterAndIgnore(p *prOut) error {
	if p.flags&0x08 != 0 {
		return badList(20) // SPEC_I_PT belongs to REGISTER
	}
	return p.register()
}

// register registers, changes or drops the key of this nexus, and of the ports that the list names.
func (p *prOut) register() error {
	const specIPT, allTGPT, aptpl = 0x08, 0x04, 0x01
	if p.flags&aptpl != 0 && p.t.unit.store == nil {
		return badList(20)
	}
	if p.flags&specIPT == 0 && len(p.list) > 24 {
		return illegal(ascParameterListLength)
	}
	all := p.flags&allTGPT != 0
	ports := []string{p.t.Nexus.Port}
	if p.flags&specIPT != 0 {
		if p.me >= 0 {
			return badList(20)
		}
		more, err := transportIDs(p.list)
		if err != nil {
			return err
		}
		ports = append(ports, more...)
	}
	if p.me < 0 && p.action == 0 {
		return nil
	}
	switch {
	case p.me < 0:
		if len(p.r.Regs)+len(ports) > maxRegistrations {
			return illegal(ascInsufficientRegister)
		}
		for _, port := range ports {
			g := registration{Port: port, Relative: p.t.Nexus.RelativePort, All: all, Key: p.action}
			if slices.ContainsFunc(p.r.Regs, func(o registration) bool {
				return o.Port == port && (o.All || all || o.Relative == g.Relative)
			}) && port != p.t.Nexus.Port {
				return errReservationConflict
			}
			p.r.Regs = append(p.r.Regs, g)
		}
	case p.action == 0:
		if released := p.r.remove(p.me); registrantsOnly(released) {
			for _, g := range p.r.Regs {
				p.tell(g, uaReservationsReleased)
			}
		}
	default:
		p.r.Regs[p.me].Key = p.action
	}
	p.r.APTPL = p.flags&aptpl != 0
	p.r.Generation++
	return nil
}

func transportIDs(list []byte) (ports []string, err error) {
	if len(list) < 28 {
		return nil, illegal(ascParameterListLength)
	}
	if int64(binary.BigEndian.Uint32(list[24:])) != int64(len(list)-28) {
		return nil, illegal(ascParameterListLength)
	}
	for rest := list[28:]; len(rest) > 0; {
		port, next, ok := parseTransportID(rest)
		if !ok {
			return nil, badList(len(list) - len(rest))
		}
		if !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
		rest = next
	}
	return ports, nil
}

func prReserve(p *prOut) error {
	kind, err := p.scopeType()
	if err != nil {
		return err
	}
	if err := p.owner(); err != nil {
		return err
	}
	if p.r.held() {
		if p.r.holds(p.me) && p.r.Type == kind {
			return nil
		}
		return errReservationConflict
	}
	p.r.Holder, p.r.Type = p.me, kind
	return nil
}

func prRelease(p *prOut) error {
	if err := p.owner(); err != nil {
		return err
	}
	if !p.r.holds(p.me) {
		return nil
	}
	if p.t.CDB[2] != p.r.Type {
		return illegal(ascInvalidReleasePR)
	}
	if registrantsOnly(p.r.Type) {
		for i, g := range p.r.Regs {
			if i != p.me {
				p.tell(g, uaReservationsReleased)
			}
		}
	}
	p.r.Holder, p.r.Type = -1, 0
	return nil
}

func prClear(p *prOut) error {
	if err := p.owner(); err != nil {
		return err
	}
	for _, g := range p.r.Regs {
		p.tell(g, uaReservationsPreempted)
	}
	p.r.Regs, p.r.Holder, p.r.Type = nil, -1, 0
	p.r.Generation++
	return nil
}

func prPreempt(p *prOut) error         { return p.preempt(false) }
func prPreemptAndAbort(p *prOut) error { return p.preempt(true) }

// preempt is PREEMPT and PREEMPT AND ABORT (SPC-4 5.13.11.4, 5.13.11.5).
func (p *prOut) preempt(abort bool) error {
	kind, err := p.scopeType()
	if err != nil {
		return err
	}
	if err := p.owner(); err != nil {
		return err
	}
	r, me := p.r, p.r.Regs[p.me]
	everybody := r.allRegistrants() && p.action == 0
	if p.action == 0 && !everybody {
		return badList(8)
	}
	takesOver := everybody || r.held() && !r.allRegistrants() && r.Regs[r.Holder].Key == p.action
	victim := func(g registration) bool { return everybody || g.Key == p.action }
	if !slices.ContainsFunc(r.Regs, victim) {
		return errReservationConflict
	}
	oldType, holder := r.Type, registration{}
	if r.held() {
		holder = r.Regs[r.Holder]
	}
	var kept []registration
	for _, g := range r.Regs {
		switch {
		case g == me && (takesOver || !victim(g)):
			kept = append(kept, g)
		case victim(g):
			if g != me {
				p.tell(g, uaRegistrationsPreempted)
			}
			if abort {
				p.abort = append(p.abort, g)
			}
		default:
			kept = append(kept, g)
			if takesOver && oldType != kind && registrantsOnly(oldType) {
				p.tell(g, uaReservationsReleased)
			}
		}
	}
	r.Regs = kept
	switch {
	case takesOver:
		r.Holder, r.Type = slices.Index(kept, me), kind
	case r.held():
		r.Holder = slices.Index(kept, holder)
		if r.Holder < 0 && r.allRegistrants() && len(kept) > 0 {
			r.Holder = 0
		}
		if r.Holder < 0 {
			r.Type = 0
		}
	}
	r.Generation++
	return nil
}

// prMove is REGISTER AND MOVE (SPC-4 6.17.4). Its list differs from byte 16 on:
//
//	17     bit 1 UNREG, bit 0 APTPL
//	18..19 relative target port
//	20..23 length of the TransportID
//	24     TransportID
func prMove(p *prOut) error {
	if err := p.owner(); err != nil {
		return err
	}
	if !p.r.holds(p.me) || p.r.allRegistrants() {
		return errReservationConflict
	}
	kind, err := p.scopeType()
	if err != nil {
		return err
	}
	if kind != p.r.Type {
		return errReservationConflict
	}
	if p.action == 0 {
		return badList(8)
	}
	unregister, aptpl := p.list[17]&0x02 != 0, p.list[17]&0x01 != 0
	if aptpl && p.t.unit.store == nil {
		return badList(17)
	}
	relative := binary.BigEndian.Uint16(p.list[18:])
	if int64(binary.BigEndian.Uint32(p.list[20:])) != int64(len(p.list)-24) {
		return illegal(ascParameterListLength)
	}
	port, rest, ok := parseTransportID(p.list[24:])
	if !ok || len(rest) > 0 {
		return badList(24)
	}
	if port == p.t.Nexus.Port && relative == p.t.Nexus.RelativePort {
		return badList(24) // to itself
	}
	to := slices.IndexFunc(p.r.Regs, func(g registration) bool {
		return g.Port == port && (g.All || g.Relative == relative)
	})
	if to < 0 {
		if len(p.r.Regs) >= maxRegistrations {
			return illegal(ascInsufficientRegister)
		}
		p.r.Regs = append(p.r.Regs, registration{Port: port, Relative: relative, Key: p.action})
		to = len(p.r.Regs) - 1
	} else {
		p.r.Regs[to].Key = p.action
	}
	p.r.Holder = to
	if unregister {
		p.r.remove(p.me)
	}
	p.r.APTPL = aptpl
	p.r.Generation++
	return nil
}
