package iscsi

import (
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"slices"
	"strconv"
	"strings"
)

// chap is the target's side of CHAP (RFC 7143 12.1.3, RFC 1994) in a login:
//
//	AuthMethod=CHAP,None      ──►    AuthMethod=CHAP
//	CHAP_A=5,7                ──►    CHAP_A=7 CHAP_I=n CHAP_C=0x…
//	CHAP_N=user CHAP_R=0x…    ──►    (CHAP_N=… CHAP_R=0x…, where CHAP_I and CHAP_C came too)
//
// Secrets and responses are never logged.
type chap struct {
	want      *CHAP
	chosen    bool // AuthMethod was answered
	algorithm int
	id        byte
	challenge []byte
	passed    bool
}

// The algorithms of the IANA registry that are offered, best first. MD5 stands for initiators
// that know no other.
const (
	chapMD5    = 5
	chapSHA256 = 7
)

// maxChallenge is the longest binary value (RFC 7143 12.1.3).
const maxChallenge = 1024

func chapHash(algorithm int) hash.Hash {
	if algorithm == chapSHA256 {
		return sha256.New()
	}
	return md5.New()
}

func chapResponse(algorithm int, id byte, secret string, challenge []byte) []byte {
	h := chapHash(algorithm)
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil)
}

// security serves the keys of the security stage. Ready says that the stage may be left.
func (l *login) security(pairs []pair) (ready bool, err error) {
	var m map[string]string
	for _, p := range pairs {
		if identityKey(p.key) {
			if err := l.once(p.key); err != nil {
				return false, err
			}
			continue
		}
		switch {
		case p.key == "AuthMethod":
			if err := l.once(p.key); err != nil {
				return false, err
			}
			if err := l.chooseMethod(p.value); err != nil {
				return false, err
			}
		case strings.HasPrefix(p.key, "CHAP_"):
			if m == nil {
				m = make(map[string]string)
			}
			if _, twice := m[p.key]; twice {
				return false, refuse(loginInitiatorError, "key %s twice", p.key)
			}
			m[p.key] = p.value
		case p.key == "MaxRecvDataSegmentLength":
			if a := l.params.negotiate(p.key, p.value); a != "" {
				l.answer(p.key, a)
			}
		case keyRules[p.key].kind == keyRefused:
			l.answer(p.key, "Reject")
		default:
			if _, known := keyRules[p.key]; known {
				return false, refuse(loginInitiatorError, "key %s out of its stage", p.key)
			}
			l.answer(p.key, "NotUnderstood")
		}
	}
	if l.auth.want == nil {
		return true, nil
	}
	if m == nil {
		return l.auth.passed, nil
	}
	return l.auth.passed, l.exchange(m)
}

func (l *login) chooseMethod(offered string) error {
	methods := strings.Split(offered, ",")
	l.auth.chosen = true
	switch {
	case l.auth.want == nil && slices.Contains(methods, "None"):
		l.answer("AuthMethod", "None")
	case l.auth.want != nil && slices.Contains(methods, "CHAP"):
		l.answer("AuthMethod", "CHAP")
	default:
		return refuse(loginAuthFailed, "no authentication method in common")
	}
	return nil
}

// exchange serves the CHAP keys of one request.
func (l *login) exchange(m map[string]string) error {
	a := &l.auth
	if offered, ok := m["CHAP_A"]; ok {
		if !a.chosen || a.algorithm != 0 {
			return refuse(loginInitiatorError, "CHAP_A out of order")
		}
		for v := range strings.SplitSeq(offered, ",") {
			if n, err := strconv.Atoi(v); err == nil && (n == chapSHA256 || n == chapMD5) {
				a.algorithm = n
				break
			}
		}
		if a.algorithm == 0 {
			return refuse(loginAuthFailed, "no CHAP algorithm in common")
		}
		random := make([]byte, 33)
		rand.Read(random)
		a.id, a.challenge = random[0], random[1:]
		l.answer("CHAP_A", strconv.Itoa(a.algorithm))
		l.answer("CHAP_I", strconv.Itoa(int(a.id)))
		l.answer("CHAP_C", "0x"+hex.EncodeToString(a.challenge))
		return nil
	}
	if a.algorithm == 0 || a.passed {
		return refuse(loginInitiatorError, "CHAP keys out of order")
	}
	response, ok := parseBinary(m["CHAP_R"])
	want := chapResponse(a.algorithm, a.id, a.want.Secret, a.challenge)
	right := subtle.ConstantTimeCompare(response, want) & subtle.ConstantTimeCompare([]byte(m["CHAP_N"]), []byte(a.want.User))
	if !ok || right != 1 {
		return refuse(loginAuthFailed, "wrong CHAP name or response of %s", l.initiator)
	}
	id, mutual := m["CHAP_I"]
	if mutual {
		challenge, ok := parseBinary(m["CHAP_C"])
		n, numeric := parseNumber(id)
		switch {
		case !ok || !numeric || n > 255 || len(challenge) == 0:
			return refuse(loginInitiatorError, "malformed challenge")
		case a.want.MutualSecret == "":
			return refuse(loginAuthFailed, "the target has no secret to prove")
		case subtle.ConstantTimeCompare(challenge, a.challenge) == 1:
			return refuse(loginAuthFailed, "our own challenge came back") // RFC 7143 9.2.1
		}
		l.answer("CHAP_N", a.want.MutualUser)
		l.answer("CHAP_R", "0x"+hex.EncodeToString(chapResponse(a.algorithm, byte(n), a.want.MutualSecret, challenge)))
	}
	a.passed = true
	return nil
}

// parseBinary reads a hexadecimal (0x) or base64 (0b) value.
func parseBinary(s string) ([]byte, bool) {
	if len(s) < 2 || s[0] != '0' || len(s) > 2+2*maxChallenge {
		return nil, false
	}
	switch s[1] {
	case 'x', 'X':
		s = s[2:]
		if len(s)%2 != 0 {
			s = "0" + s
		}
		b, err := hex.DecodeString(s)
		return b, err == nil
	case 'b', 'B':
		b, err := base64.StdEncoding.DecodeString(s[2:])
		return b, err == nil
	}
	return nil, false
}
