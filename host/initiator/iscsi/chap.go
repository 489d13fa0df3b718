package iscsi

import (
	"bytes"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// chapAlgorithms are what we offer, MD5 and SHA-256 (IANA PPP authentication algorithms). MD5 comes first,
// because tgtd ends the login when the first of a list is one that it does not know; in CHAP, where the
// secret must be long and random anyway, the digest is not the weak point.
const chapAlgorithms = "5,7"

func chapDigest(algorithm string, id byte, secret string, challenge []byte) ([]byte, error) {
	b := append(append([]byte{id}, secret...), challenge...)
	switch algorithm {
	case "5":
		s := md5.Sum(b)
		return s[:], nil
	case "7":
		s := sha256.Sum256(b)
		return s[:], nil
	}
	return nil, fmt.Errorf("%w: target chose CHAP algorithm %.20q", ErrProtocol, algorithm)
}

// chapState is our side of one exchange.
type chapState struct {
	c         *CHAP
	algorithm string
	id        byte
	challenge []byte // ours to the target
}

// answer makes our response to the target's challenge, and our own challenge where the target
// has to prove itself.
func (s *chapState) answer(m map[string]string) ([]pair, error) {
	id, err := strconv.ParseUint(m["CHAP_I"], 0, 8)
	if err != nil {
		return nil, fmt.Errorf("%w: CHAP_I %.20q", ErrProtocol, m["CHAP_I"])
	}
	challenge, err := decodeBinary(m["CHAP_C"])
	if err != nil {
		return nil, err
	}
	s.algorithm = m["CHAP_A"]
	sum, err := chapDigest(s.algorithm, byte(id), s.c.Secret, challenge)
	if err != nil {
		return nil, err
	}
	out := []pair{{"CHAP_N", s.c.User}, {"CHAP_R", "0x" + hex.EncodeToString(sum)}}
	if s.c.TargetSecret != "" {
		var b [33]byte
		rand.Read(b[:])
		s.id, s.challenge = b[0], b[1:]
		if bytes.Equal(s.challenge, challenge) {
			return nil, fmt.Errorf("%w: target reflects the challenge", ErrAuth)
		}
		out = append(out, pair{"CHAP_I", strconv.Itoa(int(s.id))}, pair{"CHAP_C", "0x" + hex.EncodeToString(s.challenge)})
	}
	return out, nil
}

// verify checks the target's answer to our challenge.
func (s *chapState) verify(m map[string]string) error {
	if s.c.TargetSecret == "" {
		return nil
	}
	got, err := decodeBinary(m["CHAP_R"])
	if err != nil {
		return fmt.Errorf("%w: target gave no proof of its secret", ErrAuth)
	}
	want, err := chapDigest(s.algorithm, s.id, s.c.TargetSecret, s.challenge)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(got, want) != 1 || s.c.TargetUser != "" && m["CHAP_N"] != s.c.TargetUser {
		return fmt.Errorf("%w: target's proof is wrong", ErrAuth)
	}
	return nil
}

// decodeBinary reads a binary value of RFC 7143 6.1: 0x hex or 0b base64, 1 to 1024 bytes.
func decodeBinary(s string) ([]byte, error) {
	var b []byte
	var err error
	switch l := strings.ToLower(s); {
	case strings.HasPrefix(l, "0x"):
		h := s[2:]
		if len(h)%2 == 1 {
			h = "0" + h
		}
		b, err = hex.DecodeString(h)
	case strings.HasPrefix(l, "0b"):
		b, err = base64.StdEncoding.DecodeString(s[2:])
	default:
		err = fmt.Errorf("no prefix")
	}
	if err != nil || len(b) == 0 || len(b) > 1024 {
		return nil, fmt.Errorf("%w: binary value %.20q", ErrProtocol, s)
	}
	return b, nil
}
