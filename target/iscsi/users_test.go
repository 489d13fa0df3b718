package iscsi

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUsers: who needs what secret, and who is refused whatever it knows.
func TestUsers(t *testing.T) {
	entry := func(initiator, user string, targets ...string) User {
		return User{Initiator: initiator, Targets: targets, CHAP: CHAP{User: user, Secret: "secret of " + user}}
	}
	u := Users{entry("iqn.a", "a"), entry("iqn.b", "b1", "iqn.t1"), entry("iqn.b", "b2", "iqn.t2"), entry("", "others", "iqn.t1")}
	if err := u.Check(); err == nil {
		t.Error("a secret of 11 bytes is taken") // "secret of a"
	}
	for i := range u {
		u[i].Secret += ", long enough"
	}
	if err := u.Check(); err != nil {
		t.Error(err)
	}
	for _, c := range []struct{ initiator, target, want string }{
		{"iqn.a", "iqn.t1", "a"}, {"iqn.a", "iqn.t9", "a"}, {"iqn.a", "", "a"},
		{"iqn.b", "iqn.t1", "b1"}, {"iqn.b", "iqn.t2", "b2"}, {"iqn.b", "iqn.t3", ""}, {"iqn.b", "", "b1"},
		{"iqn.c", "iqn.t1", "others"}, {"iqn.c", "iqn.t2", ""},
	} {
		got := u.Auth(c.initiator, c.target)
		if got == nil {
			t.Fatalf("%s to %q proves nothing", c.initiator, c.target)
		}
		if c.want != "" && got.User != c.want {
			t.Errorf("%s to %q is user %q, want %q", c.initiator, c.target, got.User, c.want)
		}
		if c.want == "" && (strings.HasPrefix(got.Secret, "secret") || len(got.Secret) < 20) {
			t.Errorf("%s to %q is not refused", c.initiator, c.target)
		}
	}
	if Users(nil).Auth("iqn.a", "iqn.t1") != nil {
		t.Error("without users somebody must prove something")
	}
	good := User{CHAP: CHAP{User: "u", Secret: strings.Repeat("s", 12), MutualUser: "t", MutualSecret: strings.Repeat("m", 12)}}
	for name, bad := range map[string]func(*User){
		"no user":            func(e *User) { e.User = "" },
		"short":              func(e *User) { e.Secret = strings.Repeat("s", 11) },
		"long":               func(e *User) { e.Secret = strings.Repeat("s", 129) },
		"short mutual":       func(e *User) { e.MutualSecret = "m" },
		"same":               func(e *User) { e.MutualSecret = e.Secret },
		"mutual user alone":  func(e *User) { e.MutualSecret = "" },
		"mutual secret only": func(e *User) { e.MutualUser = "" },
	} {
		e := good
		bad(&e)
		err := Users{e}.Check()
		if !errors.Is(err, ErrSecret) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "sssss") || strings.Contains(err.Error(), "mmmmm") {
			t.Errorf("%s: the error has the secret: %v", name, err)
		}
	}
	if err := (Users{good, good}).Check(); err == nil {
		t.Error("two entries for the same")
	}
}

// TestReadSecret: a secret that everybody can read is none.
func TestReadSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("a secret of the test\n", 0o600)
	if s, err := ReadSecret(path); err != nil || s != "a secret of the test" {
		t.Errorf("%q %v", s, err)
	}
	for text, mode := range map[string]os.FileMode{"a secret of the test": 0o644, "a secret of the test\r\n": 0o602, "short": 0o600, "two lines of\na secret": 0o600, strings.Repeat("x", 200): 0o600} {
		write(text, mode)
		if s, err := ReadSecret(path); !errors.Is(err, ErrSecret) || s != "" || strings.Contains(err.Error(), "of the test") {
			t.Errorf("%q, %04o: %q %v", text, mode, s, err)
		}
	}
	if _, err := ReadSecret(path + ".none"); !errors.Is(err, ErrSecret) {
		t.Error(err)
	}
}
