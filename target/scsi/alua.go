package scsi

import (
	"encoding/binary"

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
	groups := t.Nexus.Target.PortGroups()
	if len(groups) == 0 {
		groups = []target.PortGroup{{ID: 1, State: target.Optimized, Ports: []uint16{t.Nexus.RelativePort}}}
	}
	b := append(t.reply[:0], 0, 0, 0, 0)
	if extended {
		b = append(b, 0x10, 60, 0, 0) // implicit transition time in seconds
	}
	for _, g := range groups {
		state := byte(g.State) & 0x0F
		if g.Preferred {
			state |= 0x80
		}
		// Supported: transitioning, unavailable, standby, non-optimized, optimized.
		b = append(b, state, 0x80|0x08|0x04|0x02|0x01, byte(g.ID>>8), byte(g.ID), 0, 0x02, 0, byte(len(g.Ports)))
		for _, p := range g.Ports {
			b = append(b, 0, 0, byte(p>>8), byte(p))
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, t.be32(6))
}
