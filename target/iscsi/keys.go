package iscsi

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Limits of text negotiation.
const (
	maxTextBytes = 16 << 10 // of all PDUs of one request
	maxKeys      = 64
	maxKeyBytes  = 63 // RFC 7143 6.1
	maxValue     = 8192
)

var errText = errors.New("iscsi: malformed text")

// pair is a key=value of a text or login PDU.
type pair struct{ key, value string }

// parseText takes a data segment apart: key=value, each ended by a zero byte.
func parseText(b []byte) ([]pair, error) {
	if len(b) > maxTextBytes {
		return nil, fmt.Errorf("%w: %d bytes", errText, len(b))
	}
	var pairs []pair
	for len(b) > 0 {
		var item []byte
		if i := bytes.IndexByte(b, 0); i >= 0 {
			item, b = b[:i], b[i+1:]
		} else {
			item, b = b, nil
		}
		if len(item) == 0 {
			continue // padding
		}
		key, value, ok := bytes.Cut(item, []byte{'='})
		if !ok || len(key) == 0 || len(key) > maxKeyBytes || len(value) > maxValue {
			return nil, fmt.Errorf("%w: no key=value", errText)
		}
		if len(pairs) == maxKeys {
			return nil, fmt.Errorf("%w: more than %d keys", errText, maxKeys)
		}
		pairs = append(pairs, pair{string(key), string(value)})
	}
	return pairs, nil
}

func appendPair(b []byte, key, value string) []byte {
	b = append(b, key...)
	b = append(b, '=')
	b = append(b, value...)
	return append(b, 0)
}

// params is what login negotiates for a session and its connection.
type params struct {
	headerDigest, dataDigest bool
	initialR2T               bool
	immediateData            bool
	maxSend                  int // the initiator's MaxRecvDataSegmentLength
	maxBurst, firstBurst     int
	maxOutstandingR2T        int
	time2Wait, time2Retain   int
	protocolLevel            int
	maxConnections           int
}

// What this target offers. A received segment is at most maxReceive long.
const (
	maxReceive        = 256 << 10
	ourMaxBurst       = 1 << 20
	ourFirstBurst     = 256 << 10
	ourOutstandingR2T = 4
	loginReceive      = 8192 // until login is done (RFC 7143 13.12)
	// maxSessionConnections is the most that Options.SessionConnections may be.
	maxSessionConnections = 16
	maxAlias              = 255
)

func defaultParams() params {
	return params{
		initialR2T: true, immediateData: true, maxSend: 8192,
		maxBurst: 262144, firstBurst: 65536, maxOutstandingR2T: 1, time2Wait: 2, time2Retain: 20,
		protocolLevel: 1, maxConnections: 1,
	}
}

// connection returns what a further connection of the session begins its login with: the
// session's parameters as they are, its own as the standard has them.
func (p params) connection() params {
	d := defaultParams()
	p.headerDigest, p.dataDigest, p.maxSend = d.headerDigest, d.dataDigest, d.maxSend
	return p
}

type keyKind uint8

const (
	keyList    keyKind = iota // the first of the offered values that is ours
	keyAnd                    // Yes where both say so
	keyOr                     // Yes where one says so
	keyMin                    // the smaller number
	keyMax                    // the larger number
	keyDeclare                // a number that is told, not negotiated
	keyRefused                // answered Reject
)

// keyRule says how a key is negotiated (RFC 7143 section 13).
type keyRule struct {
	kind       keyKind
	lo, hi     int
	ours       int    // the number, or 1 for Yes
	values     string // of a list, comma-separated
	leading    bool   // leading connection only
	anySession bool   // meaningful in a discovery session too
	set        func(*params, int)
}

// keyRules are the operational keys. MaxConnections is bounded by Options too.
var keyRules = map[string]keyRule{
	"HeaderDigest":             {kind: keyList, values: "None,CRC32C", anySession: true, set: func(p *params, v int) { p.headerDigest = v == 1 }},
	"DataDigest":               {kind: keyList, values: "None,CRC32C", anySession: true, set: func(p *params, v int) { p.dataDigest = v == 1 }},
	"MaxConnections":           {kind: keyMin, lo: 1, hi: 65535, ours: maxSessionConnections, leading: true, set: func(p *params, v int) { p.maxConnections = v }},
	"InitialR2T":               {kind: keyOr, ours: 0, leading: true, set: func(p *params, v int) { p.initialR2T = v == 1 }},
	"ImmediateData":            {kind: keyAnd, ours: 1, leading: true, set: func(p *params, v int) { p.immediateData = v == 1 }},
	"MaxRecvDataSegmentLength": {kind: keyDeclare, lo: 512, hi: 1<<24 - 1, anySession: true, set: func(p *params, v int) { p.maxSend = v }},
	"MaxBurstLength":           {kind: keyMin, lo: 512, hi: 1<<24 - 1, ours: ourMaxBurst, leading: true, set: func(p *params, v int) { p.maxBurst = v }},
	"FirstBurstLength":         {kind: keyMin, lo: 512, hi: 1<<24 - 1, ours: ourFirstBurst, leading: true, set: func(p *params, v int) { p.firstBurst = v }},
	"DefaultTime2Wait":         {kind: keyMax, lo: 0, hi: 3600, ours: 2, leading: true, anySession: true, set: func(p *params, v int) { p.time2Wait = v }},
	"DefaultTime2Retain":       {kind: keyMin, lo: 0, hi: 3600, ours: 0, leading: true, anySession: true, set: func(p *params, v int) { p.time2Retain = v }},
	"MaxOutstandingR2T":        {kind: keyMin, lo: 1, hi: 65535, ours: ourOutstandingR2T, leading: true, set: func(p *params, v int) { p.maxOutstandingR2T = v }},
	"DataPDUInOrder":           {kind: keyOr, ours: 1, leading: true},
	"DataSequenceInOrder":      {kind: keyOr, ours: 1, leading: true},
	"ErrorRecoveryLevel":       {kind: keyMin, lo: 0, hi: 2, ours: 0, anySession: true, leading: true},
	"TaskReporting":            {kind: keyList, values: "RFC3720,ResponseFence", leading: true},
	"iSCSIProtocolLevel":       {kind: keyMin, lo: 0, hi: 31, ours: levelQueries, leading: true, set: func(p *params, v int) { p.protocolLevel = v }},

	// Obsolete, but never NotUnderstood (13.25).
	"IFMarker":  {kind: keyAnd, ours: 0, anySession: true},
	"OFMarker":  {kind: keyAnd, ours: 0, anySession: true},
	"IFMarkInt": {kind: keyRefused, anySession: true},
	"OFMarkInt": {kind: keyRefused, anySession: true},

	// An initiator has no business with these in a login: they are the target's, or of the full
	// feature phase.
	"SendTargets":          {kind: keyRefused, anySession: true},
	"TargetAddress":        {kind: keyRefused, anySession: true},
	"TargetAlias":          {kind: keyRefused, anySession: true},
	"TargetPortalGroupTag": {kind: keyRefused, anySession: true},
}

// negotiate answers one operational key. A key that is not to be answered gives "".
func (p *params) negotiate(key, value string) (answer string) {
	r, ok := keyRules[key]
	if !ok {
		return "NotUnderstood"
	}
	switch r.kind {
	case keyRefused:
		return "Reject"
	case keyList:
		ours := strings.Split(r.values, ",")
		for v := range strings.SplitSeq(value, ",") {
			if i := slices.Index(ours, v); i >= 0 {
				if r.set != nil {
					r.set(p, i)
				}
				return v
			}
		}
		return "Reject"
	case keyAnd, keyOr:
		theirs := 0
		switch value {
		case "Yes":
			theirs = 1
		case "No":
		default:
			return "Reject"
		}
		v := theirs & r.ours
		if r.kind == keyOr {
			v = theirs | r.ours
		}
		if r.set != nil {
			r.set(p, v)
		}
		return [2]string{"No", "Yes"}[v]
	}
	n, ok := parseNumber(value)
	if !ok || n < r.lo || n > r.hi {
		return "Reject"
	}
	switch r.kind {
	case keyMin:
		n = min(n, r.ours)
	case keyMax:
		n = max(n, r.ours)
	}
	if r.set != nil {
		r.set(p, n)
	}
	if r.kind == keyDeclare {
		return ""
	}
	return strconv.Itoa(n)
}

// parseNumber reads a decimal or 0x number (RFC 7143 6.1) of at most 31 bits.
func parseNumber(s string) (int, bool) {
	base := 10
	if len(s) > 2 && s[0] == '0' && s[1]|0x20 == 'x' {
		base, s = 16, s[2:]
	}
	if s == "" || s[0] == '+' || s[0] == '-' {
		return 0, false
	}
	v, err := strconv.ParseUint(s, base, 31)
	return int(v), err == nil
}

// maxName is the length limit of an iSCSI name (RFC 7143 4.2.7.1).
const maxName = 223

// validName says whether s is a well-formed iSCSI name, in its canonical form.
func validName(s string) bool {
	if len(s) > maxName {
		return false
	}
	if !strings.HasPrefix(s, "iqn.") && !strings.HasPrefix(s, "eui.") && !strings.HasPrefix(s, "naa.") {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c == 0x7F || c == ',' || c == '=' || 'A' <= c && c <= 'Z' {
			return false
		}
	}
	return true
}
