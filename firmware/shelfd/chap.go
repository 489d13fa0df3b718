package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strings"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/target/iscsi"
)

// A host's agent proves by CHAP that it is who claimed the host (control/claim.go). The secrets of a claim are made
// of the controllers' common secret and the claim's name:
//
//	key                    SHA-256("ledge claims" 00 secret)
//	the initiator's secret base64url(HMAC-SHA-256(key, "initiator" 00 name)), 43 characters
//	the target's secret    base64url(HMAC-SHA-256(key, "target" 00 name))
//
// so they need no place to be kept in: both controllers know them, before the first message of the link and after any
// takeover, and no standby has to be told. The price: another secret in the configurations is other secrets of
// the claims, and agents must be restarted then to claim anew.

// claimSecrets derives the secrets of a claim's name.
func claimSecrets(secret, initiator string) control.CHAP {
	key := sha256.Sum256([]byte("ledge claims\x00" + secret))
	name := strings.ToLower(initiator) // as the engine has names
	derive := func(role string) string {
		m := hmac.New(sha256.New, key[:])
		m.Write([]byte(role + "\x00" + name))
		return base64.RawURLEncoding.EncodeToString(m.Sum(nil))
	}
	return control.CHAP{User: name, Secret: derive("initiator"), TargetUser: "ledge", TargetSecret: derive("target")}
}

// auth is what an initiator must prove: one that uses a claim's name, for discovery too, that the claim is its own;
// another what the configuration asks.
func (c *Config) auth(initiator, target string) *iscsi.CHAP {
	if !control.IsClaim(initiator) {
		return c.users.Auth(initiator, target)
	}
	s := claimSecrets(c.Secret, initiator)
	return &iscsi.CHAP{User: s.User, Secret: s.Secret, MutualUser: s.TargetUser, MutualSecret: s.TargetSecret}
}
