package iscsi

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// Users is a list of who may log in, for Options.Auth.
type Users []User

// User is one of them.
type User struct {
	// Initiator is the iSCSI name in lower case that the entry is for; "": any that no entry names.
	Initiator string
	// Targets are the names that it may log in to; nil: all. Discovery is never refused for them.
	Targets []string
	CHAP
}

// Bounds of a CHAP secret in bytes: RFC 7143 9.2.1 wants 96 bits at least where IPsec doesn't protect the exchange.
const (
	MinSecretBytes = 12
	MaxSecretBytes = 128
)

// ErrSecret: a secret that must not be used. The error never carries it.
var ErrSecret = errors.New("iscsi: unusable CHAP secret")

// Auth implements Options.Auth. Without users nobody proves anything; with some, whoever has no entry is refused.
func (u Users) Auth(initiator, target string) *CHAP {
	if len(u) == 0 {
		return nil
	}
	named := slices.ContainsFunc(u, func(e User) bool { return e.Initiator == initiator })
	for i := range u {
		e := &u[i]
		if e.Initiator != initiator && (named || e.Initiator != "") {
			continue
		}
		if target == "" || e.Targets == nil || slices.Contains(e.Targets, target) {
			return &e.CHAP
		}
	}
	return &CHAP{User: rand.Text(), Secret: rand.Text()} // which nobody can prove
}

// Check refuses what RFC 7143 9.2.1 forbids, and what cannot work.
func (u Users) Check() error {
	var errs []error
	for i, e := range u {
		wrong := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("user %d (%q): %w: %s", i, e.User, ErrSecret, fmt.Sprintf(format, args...)))
		}
		mutual := e.MutualSecret != ""
		switch {
		case e.User == "" || len(e.User) > 255 || strings.ContainsRune(e.User, 0):
			wrong("user name of %d bytes; 1 to 255", len(e.User))
		case !goodSecret(e.Secret):
			wrong("secret of %d bytes; %d to %d (RFC 7143 9.2.1)", len(e.Secret), MinSecretBytes, MaxSecretBytes)
		case mutual && !goodSecret(e.MutualSecret):
			wrong("mutual secret of %d bytes; %d to %d (RFC 7143 9.2.1)", len(e.MutualSecret), MinSecretBytes, MaxSecretBytes)
		case mutual && e.MutualSecret == e.Secret:
			wrong("the mutual secret is the same; who knows the one must not know the other")
		case mutual != (e.MutualUser != ""):
			wrong("mutual user and mutual secret belong together")
		}
		for _, f := range u[:i] {
			if f.Initiator == e.Initiator && (f.Targets == nil || e.Targets == nil || slices.ContainsFunc(f.Targets, func(t string) bool { return slices.Contains(e.Targets, t) })) {
				wrong("another entry is for the same initiator and target")
				break
			}
		}
	}
	return errors.Join(errs...)
}

func goodSecret(s string) bool { return len(s) >= MinSecretBytes && len(s) <= MaxSecretBytes }

// ReadSecret reads a secret from a file, without a line end. A file that others than its owner and group can read or
// write is refused.
func ReadSecret(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrSecret, err)
	}
	defer f.Close()
	if err := CheckPrivate(f); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxSecretBytes+3))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrSecret, err)
	}
	s := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if !goodSecret(s) || strings.ContainsAny(s, "\r\n\x00") {
		return "", fmt.Errorf("%w: %s: one line of %d to %d bytes is wanted", ErrSecret, path, MinSecretBytes, MaxSecretBytes)
	}
	return s, nil
}

// CheckPrivate refuses a file with secrets that everybody may read or write.
func CheckPrivate(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSecret, err)
	}
	if m := info.Mode(); m.IsRegular() && m.Perm()&0o007 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, open to everybody; chmod 600 it", ErrSecret, f.Name(), m.Perm())
	}
	return nil
}
