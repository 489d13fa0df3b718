package scsi

import (
	"encoding/binary"
	"maps"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// stateError is what a command gets that the access state does not allow (SPC-4 5.15.2.4).
func stateError(s target.AccessState) error {
	switch s {
	case target.Optimized, target.NonOptimized:
		return nil
	case target.Standby:
		return &sense{key: keyNotReady, code: ascStandby}
	case target.Transitioning:
		return &sense{key: keyNotReady, code: ascTransition}
	}
	return &sense{key: keyNotReady, code: ascUnavailable}
}

// reportTargetPortGroups is REPORT TARGET PORT GROUPS (SPC-4 6.37).
func reportTargetPortGroups(t *Task) error {
	extended := t.CDB[1]>>5 == 1
	if t.CDB[1]>>5 > 1 {
		return badCDB(1, 7)
	}
	tgt := t.Nexus.Target
	groups, explicit := tgt.PortGroups(), *tgt.explicit.Load()
	if len(groups) == 0 {
		groups = []target.PortGroup{{ID: 1, State: target.Optimized, Ports: []uint16{t.Nexus.RelativePort}}}
	}
	b := append(t.reply[:0], 0, 0, 0, 0)
	if extended {
		seconds := (tgt.opts.TransitionTime + time.Second - 1) / time.Second
		b = append(b, 0x10, byte(min(seconds, 255)), 0, 0) // format 001b, implicit transition time
	}
	for _, g := range groups {
		state := byte(g.State) & 0x0F
		if g.Preferred {
			state |= 0x80
		}
		const bySet, implicitly = 0x01, 0x02
		how := byte(implicitly)
		if s, ok := explicit[g.ID]; ok && s == g.State {
			how = bySet
		}
		// Supported: transitioning, unavailable, standby, non-optimized, optimized.
		b = append(b, state, 0x80|0x08|0x04|0x02|0x01, byte(g.ID>>8), byte(g.ID), 0, how, 0, byte(len(g.Ports)))
		for _, p := range g.Ports {
			b = append(b, 0, 0, byte(p>>8), byte(p))
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, t.be32(6))
}

// maxSetGroups bounds the parameter list of SET TARGET PORT GROUPS.
const maxSetGroups = 64

func decodeSetGroups(t *Task) error {
	t.OutTotal = int64(t.be32(6))
	if t.OutTotal != 0 && (t.OutTotal < 4 || t.OutTotal%4 != 0) || t.OutTotal > 4+4*maxSetGroups {
		return illegal(ascParameterListLength)
	}
	return nil
}

// setTargetPortGroups is SET TARGET PORT GROUPS (SPC-4 6.45): reserved (4), then descriptors of a state (1),
// reserved (1), group (2). It asks Options.SetPortGroups, all groups at once.
func setTargetPortGroups(t *Task) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	tgt := t.Nexus.Target
	known := make(map[uint16]target.PortGroup)
	for _, g := range tgt.PortGroups() {
		known[g.ID] = g
	}
	var wanted []target.PortGroup
	for at := 4; at < len(list); at += 4 {
		id := binary.BigEndian.Uint16(list[at+2:])
		g, ok := known[id]
		if !ok {
			return badList(at + 2) // unknown, or named twice
		}
		delete(known, id)
		if g.State = target.AccessState(list[at] & 0x0F); g.State > target.Unavailable {
			return badList(at)
		}
		wanted = append(wanted, g)
	}
	if len(wanted) == 0 {
		return nil
	}
	if err := tgt.opts.SetPortGroups(t.ctx, wanted); err != nil {
		if status, s := toStatus(err); status != StatusCheckCondition || s.code != ascInternal {
			return err
		}
		return &sense{key: keyHardwareError, code: ascSetGroupsFailed}
	}
	tgt.mu.Lock()
	defer tgt.mu.Unlock()
	next := maps.Clone(*tgt.explicit.Load())
	for _, g := range wanted {
		next[g.ID] = g.State
	}
	tgt.explicit.Store(&next)
	return nil
}
