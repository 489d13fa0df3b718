package iscsi

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
)

// Stages of a login (RFC 7143 11.12.3).
const (
	stageSecurity    = 0
	stageOperational = 1
	stageFullFeature = 3
)

// maxLoginRounds bounds how often either stage may go to and fro.
const maxLoginRounds = 12

// params are what both sides agreed on. The values that newParams gives are the standard's
// defaults, for keys that a target leaves unanswered.
type params struct {
	digests    digests
	maxSend    int // target's MaxRecvDataSegmentLength
	maxBurst   int
	firstBurst int
	initialR2T bool
	immediate  bool
}

func newParams() params {
	return params{maxSend: 8192, maxBurst: 262144, firstBurst: 65536, initialR2T: true, immediate: true}
}

// login is one exchange on one connection.
//
//	we                                        target
//	security    names, AuthMethod       →
//	                                    ←     AuthMethod
//	            CHAP_A …                →          only with CHAP
//	                                    ←     CHAP_A, CHAP_I, CHAP_C
//	            CHAP_N, CHAP_R …        →
//	                                    ←     (CHAP_N, CHAP_R)
//	operational sizes, digests          →
//	                                    ←     sizes, digests; TSIH
//	full feature phase
type login struct {
	cfg     *Config
	conn    net.Conn
	br      *bufio.Reader
	par     params
	offered map[string]bool
	cmdSN   uint32
	// from the last response
	statSN, expCmdSN, maxCmdSN uint32
	tsih                       uint16
	portalGroup                int
}

func newISID() (id [6]byte) {
	rand.Read(id[:])
	id[0] = 0x80 | id[0]&0x3f // random format (RFC 7143 11.12.5)
	return id
}

// dial connects and logs in.
func dial(ctx context.Context, cfg *Config) (_ *login, err error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.LoginTimeout)
	defer cancel()
	conn, err := cfg.Dial(ctx, "tcp", cfg.Portal)
	if err != nil {
		return nil, fmt.Errorf("iscsi: connect %s: %w", cfg.Portal, err)
	}
	defer func() {
		if err != nil {
			conn.Close()
			if ctx.Err() != nil && errors.Is(err, net.ErrClosed) {
				err = fmt.Errorf("%w: %w", ErrTimeout, ctx.Err())
			}
			err = fmt.Errorf("iscsi: log in to %s at %s: %w", cfg.Target, cfg.Portal, err)
		}
	}()
	if t, ok := conn.(*net.TCPConn); ok {
		t.SetNoDelay(true)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })() // ends a read that the target leaves hanging
	l := &login{cfg: cfg, conn: conn, br: bufio.NewReaderSize(conn, 64<<10), par: newParams(), offered: map[string]bool{}, cmdSN: 1, portalGroup: -1}
	if err := l.security(); err != nil {
		return nil, err
	}
	if err := l.operational(); err != nil {
		return nil, err
	}
	if l.tsih == 0 {
		return nil, fmt.Errorf("%w: login ended without a session handle", ErrProtocol)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *login) security() error {
	method := "None"
	if l.cfg.CHAP != nil {
		method = "CHAP"
	}
	names := []pair{{"InitiatorName", l.cfg.InitiatorName}, {"SessionType", "Normal"}, {"TargetName", l.cfg.Target}, {"AuthMethod", method}}
	m, moved, err := l.round(stageSecurity, stageOperational, method == "None", names)
	if err != nil {
		return err
	}
	if v, ok := m["TargetPortalGroupTag"]; ok {
		if n, err := strconv.ParseUint(v, 0, 16); err == nil {
			l.portalGroup = int(n)
		}
	}
	if v, ok := m["AuthMethod"]; ok && v != method || !ok && method == "CHAP" {
		return fmt.Errorf("%w: we offer AuthMethod %s, target answers %.20q", ErrAuth, method, v)
	}
	if method == "CHAP" {
		if m, _, err = l.round(stageSecurity, stageOperational, false, []pair{{"CHAP_A", chapAlgorithms}}); err != nil {
			return err
		}
		chap := chapState{c: l.cfg.CHAP}
		answer, err := chap.answer(m)
		if err != nil {
			return err
		}
		if m, moved, err = l.round(stageSecurity, stageOperational, true, answer); err != nil {
			return err
		}
		if err := chap.verify(m); err != nil {
			return err
		}
	}
	for n := 0; !moved; n++ {
		if n == maxLoginRounds {
			return fmt.Errorf("%w: no end of the security stage", ErrProtocol)
		}
		if _, moved, err = l.round(stageSecurity, stageOperational, true, nil); err != nil {
			return err
		}
	}
	return nil
}

func (l *login) operational() error {
	digest := func(want bool) string {
		if want {
			return "CRC32C,None"
		}
		return "None"
	}
	out := []pair{
		{"HeaderDigest", digest(l.cfg.HeaderDigest)}, {"DataDigest", digest(l.cfg.DataDigest)},
		{"MaxConnections", "1"}, {"InitialR2T", "No"}, {"ImmediateData", "Yes"},
		{"MaxRecvDataSegmentLength", strconv.Itoa(maxRecvBytes)}, {"MaxBurstLength", strconv.Itoa(maxBurstBytes)},
		{"FirstBurstLength", strconv.Itoa(firstBurstBytes)}, {"DefaultTime2Wait", "0"}, {"DefaultTime2Retain", "0"},
		{"MaxOutstandingR2T", "1"}, {"DataPDUInOrder", "Yes"}, {"DataSequenceInOrder", "Yes"}, {"ErrorRecoveryLevel", "0"},
	}
	for _, p := range out {
		l.offered[p.key] = true
	}
	for n := 0; n < maxLoginRounds; n++ {
		m, moved, err := l.round(stageOperational, stageFullFeature, true, out)
		if err != nil {
			return err
		}
		if out, err = l.par.apply(l.cfg, m, l.offered); err != nil {
			return err
		}
		if moved {
			if l.par.firstBurst > l.par.maxBurst {
				l.par.firstBurst = l.par.maxBurst
			}
			return nil
		}
	}
	return fmt.Errorf("%w: no end of the operational stage", ErrProtocol)
}

// apply takes over the target's answers, and gives ours to what it asks on its own.
func (p *params) apply(cfg *Config, m map[string]string, offered map[string]bool) (answers []pair, err error) {
	number := func(key, v string, lo, hi int) int {
		n, e := strconv.ParseUint(v, 0, 32)
		if e != nil || int(n) < lo || int(n) > 1<<24-1 {
			err = fmt.Errorf("%w: %s=%.20q", ErrProtocol, key, v)
			return lo
		}
		return min(int(n), hi)
	}
	yes := func(key, v string) bool {
		if v != "Yes" && v != "No" {
			err = fmt.Errorf("%w: %s=%.20q", ErrProtocol, key, v)
		}
		return v == "Yes"
	}
	digest := func(key, v string, asked bool) bool {
		if v != "None" && !(v == "CRC32C" && asked) {
			err = fmt.Errorf("%w: %s=%.20q was not offered", ErrProtocol, key, v)
		}
		return v == "CRC32C"
	}
	for k, v := range m {
		switch k {
		case "HeaderDigest":
			p.digests.header = digest(k, v, cfg.HeaderDigest)
		case "DataDigest":
			p.digests.data = digest(k, v, cfg.DataDigest)
		case "MaxRecvDataSegmentLength":
			p.maxSend = number(k, v, 512, 1<<20)
		case "MaxBurstLength":
			p.maxBurst = number(k, v, 512, maxBurstBytes)
		case "FirstBurstLength":
			p.firstBurst = number(k, v, 512, firstBurstBytes)
		case "InitialR2T":
			p.initialR2T = yes(k, v)
		case "ImmediateData":
			p.immediate = yes(k, v)
		case "TargetAlias", "TargetAddress", "TargetPortalGroupTag":
		case "ErrorRecoveryLevel":
			number(k, v, 0, 0)
		case "DataPDUInOrder", "DataSequenceInOrder":
			if !yes(k, v) {
				err = fmt.Errorf("%w: %s=No was not offered", ErrProtocol, k)
			}
		default:
			if !offered[k] {
				answers = append(answers, pair{k, "NotUnderstood"})
				offered[k] = true
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return answers, nil
}

// round sends one login request and reads its response, with the text of all the PDUs that it
// is spread over. moved says that the target went to the next stage with us.
func (l *login) round(stage, next byte, transit bool, out []pair) (m map[string]string, moved bool, err error) {
	text := encodeText(out)
	var all []byte
	for n := 0; ; n++ {
		if n == maxLoginRounds {
			return nil, false, fmt.Errorf("%w: text without end", ErrProtocol)
		}
		h := l.request(stage, next, transit)
		if _, err := l.conn.Write(AppendPDU(nil, &h, text)); err != nil {
			return nil, false, err
		}
		data, more, m, err := l.response(stage, next, transit)
		if err != nil {
			return nil, false, err
		}
		if all = append(all, data...); len(all) > maxTextBytes {
			return nil, false, fmt.Errorf("%w: more than %d bytes of text", ErrProtocol, maxTextBytes)
		}
		if !more {
			kv, err := decodeText(all)
			return kv, m, err
		}
		text, transit = nil, false // RFC 7143 6.2: an empty request asks for the rest
	}
}

func (l *login) request(stage, next byte, transit bool) (h Header) {
	h[0] = OpLogin | flagImmediate
	h[1] = stage << 2
	if transit {
		h[1] |= flagFinal | next
	}
	copy(h[8:], l.cfg.ISID[:])
	h.SetWord(24, l.cmdSN)
	h.SetWord(28, l.statSN)
	return h
}

func (l *login) response(stage, next byte, transit bool) (data []byte, more, moved bool, err error) {
	var h Header
	data, err = ReadPDU(l.br, &h, maxTextBytes)
	switch {
	case err == io.EOF:
		return nil, false, false, fmt.Errorf("target closed the connection: %w", io.ErrUnexpectedEOF)
	case err != nil:
		return nil, false, false, err
	case h.Opcode() != OpLoginResponse || h.TaskTag() != 0:
		return nil, false, false, fmt.Errorf("%w: opcode %#02x in place of a login response", ErrProtocol, h.Opcode())
	case h[36] != 0:
		return nil, false, false, &LoginError{Class: h[36], Detail: h[37]}
	case h[1]>>2&3 != stage:
		return nil, false, false, fmt.Errorf("%w: stage %d answered with %d", ErrProtocol, stage, h[1]>>2&3)
	}
	moved, more = h.Final(), h[1]&flagContinue != 0
	if moved && (more || !transit || h[1]&3 != next) {
		return nil, false, false, fmt.Errorf("%w: login flags %#02x", ErrProtocol, h[1])
	}
	l.statSN = h.Word(24) + 1
	l.expCmdSN, l.maxCmdSN = h.Word(28), h.Word(32)
	l.tsih = uint16(h[14])<<8 | uint16(h[15])
	return data, more, moved, nil
}
