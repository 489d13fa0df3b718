package iscsi

import (
	"fmt"
	"strings"
)

const (
	maxTextBytes = 64 << 10
	maxTextKeys  = 128
	maxKeyBytes  = 63   // RFC 7143 6.1
	maxValBytes  = 8191 // a CHAP value of 1024 bytes in hex, and room
)

type pair struct{ key, value string }

// encodeText makes the key=value pairs of a login's data segment, each ended by a zero byte.
func encodeText(pairs []pair) []byte {
	var b []byte
	for _, p := range pairs {
		b = append(append(append(append(b, p.key...), '='), p.value...), 0)
	}
	return b
}

// decodeText parses such a segment. A key that comes twice is refused, as RFC 7143 6.1 asks.
func decodeText(b []byte) (map[string]string, error) {
	if len(b) > maxTextBytes {
		return nil, fmt.Errorf("%w: %d bytes of text", ErrProtocol, len(b))
	}
	m := make(map[string]string)
	for _, s := range strings.Split(string(b), "\x00") {
		if s == "" {
			continue // padding, or the end
		}
		k, v, ok := strings.Cut(s, "=")
		switch {
		case !ok || k == "" || len(k) > maxKeyBytes || len(v) > maxValBytes:
			return nil, fmt.Errorf("%w: text %.40q is no key=value", ErrProtocol, s)
		case len(m) == maxTextKeys:
			return nil, fmt.Errorf("%w: more than %d keys", ErrProtocol, maxTextKeys)
		}
		if _, twice := m[k]; twice {
			return nil, fmt.Errorf("%w: key %.40q came twice", ErrProtocol, k)
		}
		m[k] = v
	}
	return m, nil
}
