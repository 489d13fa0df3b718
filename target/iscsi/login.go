package iscsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A login (RFC 7143 6.3):
//
//	          AuthMethod, CHAP_*           operational keys
//	 ──► security negotiation ──T──► operational negotiation ──T──► full feature
//	       │        └──────────────────────T────────────────────────────▲
//	       └ an initiator may begin here ───┘ or there, where no authentication is asked
//
// Each request is answered by one response; a request whose C bit is set is answered by an empty
// one until its text is whole. What can go wrong has a status of its own, and ends the connection.

const (
	stageSecurity    = 0
	stageOperational = 1
	stageFull        = 3
)

// maxLoginPDUs bounds the requests of one login.
const maxLoginPDUs = 64

// loginStatus is a status class and detail (11.13.5).
type loginStatus uint16

const (
	loginInitiatorError loginStatus = 0x0200
	loginAuthFailed     loginStatus = 0x0201
	loginForbidden      loginStatus = 0x0202
	loginNotFound       loginStatus = 0x0203
	loginBadVersion     loginStatus = 0x0205
	loginTooManyConns   loginStatus = 0x0206
	loginMissing        loginStatus = 0x0207
	loginBadSessionType loginStatus = 0x0209
	loginNoSession      loginStatus = 0x020A
	loginInvalid        loginStatus = 0x020B
	loginTargetError    loginStatus = 0x0300
	loginUnavailable    loginStatus = 0x0301
	loginOutOfResources loginStatus = 0x0302
)

// loginError is a login that failed: what the initiator is told, and why.
type loginError struct {
	status loginStatus
	reason string
}

func (e *loginError) Error() string {
	return fmt.Sprintf("iscsi: login refused with %04X: %s", uint16(e.status), e.reason)
}

func refuse(s loginStatus, format string, args ...any) error {
	return &loginError{s, fmt.Sprintf(format, args...)}
}

// login is the state of one.
type login struct {
	c         *conn
	first     bool
	stage     byte
	isid      [6]byte
	tsih      uint16
	cid       uint16
	initiator string
	alias     string // the initiator's
	target    string
	session   *session // that the login adds a connection to, by its TSIH
	discovery bool
	named     bool // the keys of the first request have been read
	seen      map[string]bool
	params    params
	text      []byte // of requests with the C bit
	declared  bool   // our MaxRecvDataSegmentLength was told
	auth      chap
	answered  []byte
	unsent    []byte // of an answer longer than one response
}

// login serves login requests until the session is in its full feature phase.
func (c *conn) login() error {
	c.nc.SetReadDeadline(time.Now().Add(c.server.opts.LoginTimeout))
	l := &login{c: c, first: true, params: defaultParams(), seen: make(map[string]bool)}
	for range maxLoginPDUs {
		h, data, err := c.loginRequest()
		if err != nil {
			return err
		}
		done, err := l.step(h, data)
		if err != nil {
			var le *loginError
			if !errors.As(err, &le) {
				le = &loginError{loginTargetError, err.Error()}
			}
			l.respond(h, 0, nil, le.status)
			c.send.flush()
			return err
		}
		if done {
			c.params = l.params
			c.nc.SetReadDeadline(time.Time{})
			return nil
		}
	}
	return refuse(loginInitiatorError, "more than %d requests", maxLoginPDUs)
}

// loginRequest reads one PDU, which must be a login request of bounded size.
func (c *conn) loginRequest() (*header, []byte, error) {
	b, err := c.rd.next(headerBytes)
	if err != nil {
		return nil, nil, err
	}
	h := new(header)
	copy(h[:], b)
	if h.opcode() != opLoginReq {
		return nil, nil, fmt.Errorf("iscsi: opcode %#x before login", h.opcode())
	}
	if h.dataLen() > loginReceive {
		return nil, nil, fmt.Errorf("iscsi: login request with %d bytes of text", h.dataLen())
	}
	if err := c.rd.skip(h.ahs()); err != nil {
		return nil, nil, err
	}
	data := make([]byte, padded(h.dataLen()))
	if err := c.rd.read(data); err != nil {
		return nil, nil, err
	}
	return h, data[:h.dataLen()], nil
}

// step takes one request and answers it.
func (l *login) step(h *header, data []byte) (done bool, err error) {
	transit, more := h[1]&0x80 != 0, h[1]&0x40 != 0
	csg, nsg := h[1]>>2&3, h[1]&3
	if err := l.header(h, csg); err != nil {
		return false, err
	}
	if transit && (more || csg >= nsg || nsg == 2) {
		return false, refuse(loginInitiatorError, "stage %d to %d", csg, nsg)
	}
	if len(l.text)+len(data) > maxTextBytes {
		return false, refuse(loginInitiatorError, "text of more than %d bytes", maxTextBytes)
	}
	l.text = append(l.text, data...)
	if more {
		l.respond(h, 0, nil, 0)
		return false, nil
	}
	pairs, err := parseText(l.text)
	if err != nil {
		return false, refuse(loginInitiatorError, "%v", err)
	}
	l.text = l.text[:0]
	l.answered = append(l.answered[:0], l.unsent...)
	l.unsent = nil
	if !l.named {
		if err := l.identify(pairs); err != nil {
			return false, err
		}
	}
	ready := true
	switch csg {
	case stageSecurity:
		ready, err = l.security(pairs)
	case stageOperational:
		err = l.operational(pairs)
	}
	if err != nil {
		return false, err
	}
	if len(l.answered) > loginReceive {
		l.unsent = append([]byte(nil), l.answered[loginReceive:]...)
		l.respond(h, 0x40, l.answered[:loginReceive], 0)
		return false, nil
	}
	if !transit || !ready {
		l.respond(h, 0, l.answered, 0)
		return false, nil
	}
	if nsg == stageOperational {
		l.stage = stageOperational
		l.respond(h, 0x81, l.answered, 0)
		return false, nil
	}
	return l.finish(h)
}

// header checks what every request repeats.
func (l *login) header(h *header, csg byte) error {
	if h[3] > 0 {
		return refuse(loginBadVersion, "lowest version %d", h[3])
	}
	if csg > stageOperational {
		return refuse(loginInitiatorError, "stage %d", csg)
	}
	if l.first {
		l.first = false
		copy(l.isid[:], h[8:14])
		l.tsih = binary.BigEndian.Uint16(h[14:])
		l.cid = binary.BigEndian.Uint16(h[20:])
		l.stage = csg
		l.c.firstCmdSN, l.c.cid = h.cmdSN(), l.cid
		return nil
	}
	if [6]byte(h[8:14]) != l.isid || binary.BigEndian.Uint16(h[14:]) != l.tsih || binary.BigEndian.Uint16(h[20:]) != l.cid {
		return refuse(loginInitiatorError, "ISID, TSIH or CID changed")
	}
	if csg != l.stage {
		return refuse(loginInitiatorError, "stage %d while in %d", csg, l.stage)
	}
	return nil
}

// identify reads who wants what, from the keys of the first request.
func (l *login) identify(pairs []pair) error {
	l.named = true
	session := "Normal"
	for _, p := range pairs {
		switch p.key {
		case "InitiatorName":
			l.initiator = strings.ToLower(p.value)
		case "TargetName":
			l.target = strings.ToLower(p.value)
		case "SessionType":
			session = p.value
		case "InitiatorAlias":
			l.alias = p.value[:min(len(p.value), maxAlias)]
		}
	}
	if l.initiator == "" {
		return refuse(loginMissing, "no InitiatorName")
	}
	if !validName(l.initiator) {
		return refuse(loginInitiatorError, "InitiatorName is no iSCSI name")
	}
	switch session {
	case "Discovery":
		l.discovery = true
		l.target = ""
	case "Normal":
		if l.target == "" {
			return refuse(loginMissing, "no TargetName")
		}
	default:
		return refuse(loginBadSessionType, "SessionType %.20q", session)
	}
	if l.tsih != 0 {
		ss := l.c.server.sessionOf(l.tsih)
		if ss == nil || ss.key != (sessionKey{l.target, l.initiator, l.isid}) {
			return refuse(loginNoSession, "no session with TSIH %d", l.tsih)
		}
		l.session = ss
		l.params = ss.params.connection()
	}
	if !l.discovery {
		t := l.c.server.target(l.target)
		if t == nil {
			return refuse(loginNotFound, "no target %q", l.target)
		}
		if !t.VisibleTo(l.initiator) {
			return refuse(loginForbidden, "%s may not see %s", l.initiator, l.target)
		}
		l.answer("TargetPortalGroupTag", strconv.Itoa(int(l.c.server.opts.PortalGroupTag)))
		if f := l.c.server.opts.TargetAlias; f != nil {
			if a := f(l.target); a != "" && len(a) <= maxAlias {
				l.answer("TargetAlias", a)
			}
		}
	}
	if f := l.c.server.opts.Auth; f != nil {
		l.auth.want = f(l.initiator, l.target)
	}
	if l.auth.want != nil && l.stage != stageSecurity {
		return refuse(loginAuthFailed, "authentication was skipped")
	}
	return nil
}

func (l *login) answer(key, value string) { l.answered = appendPair(l.answered, key, value) }

// once refuses a key that came before.
func (l *login) once(key string) error {
	if l.seen[key] {
		return refuse(loginInitiatorError, "key %s twice", key)
	}
	if len(l.seen) >= 4*maxKeys {
		return refuse(loginInitiatorError, "too many keys")
	}
	l.seen[key] = true
	return nil
}

// identityKey says that a key was read by identify.
func identityKey(key string) bool {
	switch key {
	case "InitiatorName", "TargetName", "SessionType", "InitiatorAlias":
		return true
	}
	return false
}

func (l *login) operational(pairs []pair) error {
	for _, p := range pairs {
		if err := l.once(p.key); err != nil {
			return err
		}
		if identityKey(p.key) {
			continue
		}
		if p.key == "AuthMethod" || strings.HasPrefix(p.key, "CHAP_") {
			return refuse(loginInitiatorError, "key %s out of its stage", p.key)
		}
		r, ok := keyRules[p.key]
		switch {
		case ok && l.discovery && !r.anySession:
			l.answer(p.key, "Irrelevant")
			continue
		case ok && r.leading && l.session != nil:
			l.answer(p.key, "Reject") // agreed by the leading connection, for all
			continue
		}
		a := l.params.negotiate(p.key, p.value)
		if limit := l.c.server.opts.SessionConnections; l.params.maxConnections > limit {
			l.params.maxConnections = limit
			a = strconv.Itoa(limit)
		}
		if a != "" {
			if a == "Reject" {
				l.c.log.Info("iscsi: login key rejected", "key", p.key)
			}
			l.answer(p.key, a)
		}
	}
	if !l.declared {
		l.declared = true
		l.answer("MaxRecvDataSegmentLength", strconv.Itoa(maxReceive))
	}
	return nil
}

// finish makes the session and answers the last request.
func (l *login) finish(h *header) (bool, error) {
	if l.auth.want != nil && !l.auth.passed {
		return false, refuse(loginAuthFailed, "authentication is not done")
	}
	if l.params.firstBurst > l.params.maxBurst {
		l.params.firstBurst = l.params.maxBurst
	}
	s := l.c.server
	enter := s.open
	if l.session != nil {
		enter = s.join
	}
	if f := s.opts.Ready; f != nil && !l.discovery {
		if err := f(l.target); err != nil {
			return false, refuse(loginUnavailable, "%s: %v", l.target, err)
		}
	}
	ss, err := enter(l.c, l)
	switch {
	case errors.Is(err, errTooManySessions):
		return false, refuse(loginOutOfResources, "the server has %d sessions", s.opts.MaxSessions)
	case errors.Is(err, errTooManyOfOne):
		return false, refuse(loginOutOfResources, "%s has %d sessions", l.initiator, s.opts.MaxSessionsPerInitiator)
	case errors.Is(err, errTooManyConns):
		return false, refuse(loginTooManyConns, "session %d has all its connections", l.tsih)
	case errors.Is(err, errNoSession):
		return false, refuse(loginNoSession, "session %d has ended", l.tsih)
	case errors.Is(err, errTargetGone):
		return false, refuse(loginNotFound, "target %s was removed", l.target)
	case err != nil:
		return false, refuse(loginUnavailable, "%v", err)
	}
	l.c.log = l.c.log.With("initiator", l.initiator, "target", l.target)
	l.tsih = ss.tsih
	s.counters.logins.Add(1)
	l.respond(h, 0x83, l.answered, 0)
	return true, nil
}

// respond answers a login request. Flags are T, C and NSG.
func (l *login) respond(h *header, flags byte, text []byte, status loginStatus) {
	var r header
	r[0] = opLoginResp
	r[1] = flags | h[1]&0x0C
	r.setDataLen(len(text))
	copy(r[8:14], h[8:14])
	binary.BigEndian.PutUint16(r[14:], l.tsih)
	r.put32(16, h.itt())
	exp, maximum := h.cmdSN(), h.cmdSN()
	ss := l.session
	if l.c.session != nil {
		ss = l.c.session
	}
	if ss != nil {
		exp, maximum = ss.expCmdSN.Load(), ss.maxCmdSN.Load()
	}
	r.put32(28, exp)
	r.put32(32, maximum)
	binary.BigEndian.PutUint16(r[36:], uint16(status))
	l.c.sendText(&r, text)
}
