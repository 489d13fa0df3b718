package iscsi

import (
	"net"
	"slices"
	"strconv"
	"strings"
)

// textState is a text exchange (11.10) that takes several PDUs in either direction.
type textState struct {
	request []byte // of PDUs with the C bit
	answer  []byte // what has not been sent yet
	tag     uint32 // of the exchange that answer belongs to; 0: none
	serial  uint32
}

// textRequest serves 11.10: SendTargets, and the keys that may be negotiated late.
func (c *conn) textRequest(h *header) error {
	data, ok, err := c.data(h, maxReceive)
	if !ok {
		return err
	}
	if ok, err := c.admit(h); !ok {
		return err
	}
	s := &c.text
	if ttt := h.ttt(); ttt != noTag {
		if s.tag == 0 || ttt != s.tag {
			return c.rejectNow(h, rejectProtocol)
		}
	} else {
		*s = textState{serial: s.serial} // a new exchange ends the old one
	}
	if len(s.request)+len(data) > maxTextBytes {
		*s = textState{serial: s.serial}
		return c.rejectNow(h, rejectProtocol)
	}
	s.request = append(s.request, data...)
	if s.tag == 0 {
		s.serial = s.serial%0x7FFFFFFF + 1
		s.tag = s.serial
	}
	if more := h[1]&0x40 != 0; !more && len(s.request) > 0 {
		var answer []byte
		pairs, err := parseText(s.request)
		s.request = nil
		if err == nil {
			answer, err = c.textAnswer(pairs)
		}
		if err != nil {
			*s = textState{serial: s.serial}
			return c.rejectNow(h, rejectProtocol)
		}
		s.answer = append(s.answer, answer...)
	}
	n := min(len(s.answer), c.params.maxSend)
	part := s.answer[:n]
	s.answer = s.answer[n:]
	var r header
	r[0] = opTextResp
	r.put64(8, h.lun())
	r.put32(16, h.itt())
	r.put32(20, noTag)
	r.setDataLen(n)
	switch {
	case len(s.answer) > 0:
		r[1] = 0x40
		r.put32(20, s.tag)
	case !h.final():
		r.put32(20, s.tag)
	default:
		r[1] = 0x80
		*s = textState{serial: s.serial}
	}
	c.sendPDU(&r, part, true)
	return nil
}

// textAnswer serves the keys of the full feature phase. Keys of the login are rejected, twice the
// same key is a breach of protocol (6.2).
func (c *conn) textAnswer(pairs []pair) (b []byte, err error) {
	seen := make(map[string]bool, len(pairs))
	for _, p := range pairs {
		if seen[p.key] {
			return nil, errText
		}
		seen[p.key] = true
		_, known := keyRules[p.key]
		switch {
		case p.key == "SendTargets":
			b = c.sendTargets(b, p.value)
		case p.key == "MaxRecvDataSegmentLength":
			c.send.mu.Lock() // workers look at it when they answer
			a := c.params.negotiate(p.key, p.value)
			c.send.mu.Unlock()
			if a != "" {
				b = appendPair(b, p.key, a)
			}
		case p.key == "InitiatorAlias":
		case known || identityKey(p.key) || p.key == "AuthMethod" || strings.HasPrefix(p.key, "CHAP_"):
			b = appendPair(b, p.key, "Reject")
		default:
			b = appendPair(b, p.key, "NotUnderstood")
		}
	}
	return b, nil
}

// sendTargets answers SendTargets (appendix C) with what the initiator may see.
func (c *conn) sendTargets(b []byte, which string) []byte {
	s, ss := c.server, c.session
	switch {
	case which == "All" && !ss.discovery:
		return appendPair(b, "SendTargets", "Reject")
	case which == "":
		if ss.discovery {
			return appendPair(b, "SendTargets", "Reject")
		}
		which = ss.key.target
	}
	s.mu.Lock()
	var names []string
	for name, t := range s.targets {
		if (which == "All" || which == name) && t.VisibleTo(ss.key.initiator) {
			names = append(names, name)
		}
	}
	s.mu.Unlock()
	slices.Sort(names)
	for _, name := range names {
		b = appendPair(b, "TargetName", name)
		for _, a := range c.portals(name) {
			b = appendPair(b, "TargetAddress", a)
		}
	}
	return b
}

// portals are the addresses of a target, each with its portal group tag.
func (c *conn) portals(name string) []string {
	tag := "," + strconv.Itoa(int(c.server.opts.PortalGroupTag))
	var addresses []string
	if f := c.server.opts.Portals; f != nil {
		for _, a := range f(name) {
			if !strings.Contains(a, ",") {
				a += tag
			}
			addresses = append(addresses, a)
		}
	}
	if len(addresses) > 0 {
		return addresses
	}
	local := c.nc.LocalAddr()
	if t, ok := local.(*net.TCPAddr); ok {
		return []string{net.JoinHostPort(t.IP.String(), strconv.Itoa(t.Port)) + tag}
	}
	return []string{local.String() + tag}
}
