package scsi

import (
	"encoding/binary"
	"slices"
)

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
			cleared := make(map[*Nexus]bool)
			tas := t.unit.mode.Load()&modeTaskAborted != 0
			t.unit.abortBy(t.Nexus, func(o *Task) bool {
				match := o != t && slices.ContainsFunc(p.abort, func(g registration) bool { return g.is(o.Nexus) })
				if match {
					cleared[o.Nexus] = true
				}
				return match
			})
			t.unit.evict(func(n *Nexus) bool {
				return slices.ContainsFunc(p.abort, func(g registration) bool { return g.is(n) })
			})
			// With TAS clear the commands get no status, and their initiators learn of it so (SAM-5 5.14.3).
			if !tas {
				t.unit.attentionWhere(uaCommandsCleared, func(n *Nexus) bool { return n != t.Nexus && cleared[n] })
			}
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
