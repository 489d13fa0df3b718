package agent

import (
	"encoding/json"
	"fmt"

	"github.com/ledge-storage/ledge/target/iscsi"
)

// maxUsers bounds the entries of "chap".
const maxUsers = 256

// users reads the entries of "chap". Errors never show a secret.
func (o *object) users(field string) (users iscsi.Users) {
	v, ok := o.take(field)
	if !ok {
		return nil
	}
	before := len(*o.errs)
	var list []json.RawMessage
	if json.Unmarshal(v, &list) != nil || len(list) == 0 || len(list) > maxUsers {
		o.note(field, fmt.Sprintf("1 to %d entries: [{\"user\": …, \"secret\": …}]", maxUsers))
		return nil
	}
	for i, e := range list {
		name := fmt.Sprintf("%s[%d]", field, i)
		if len(e) == 0 || e[0] != '{' {
			o.note(name, "a JSON object: {…}")
			continue
		}
		s := (&object{path: o.path + name + ".", errs: o.errs, hidden: true}).parse(e)
		var u iscsi.User
		s.text("initiator", &u.Initiator, "an iSCSI name in lower case, such as iqn.1993-08.org.debian:01:abc", func(v string) bool { return v == "" || initiatorName.MatchString(v) })
		if _, present := s.fields["volumes"]; present {
			var names []string
			s.list("volumes", &names, fmt.Sprintf("1 to %d names of volumes", MaxVolumes), volumeName.MatchString, MaxVolumes)
			for _, n := range names {
				u.Targets = append(u.Targets, IQN(n))
			}
		} else {
			s.known = append(s.known, "volumes")
		}
		s.text("user", &u.User, "1 to 255 visible ASCII characters", func(v string) bool { return v != "" && len(v) <= 255 && visible(v) })
		u.Secret = s.secret("secret", true)
		s.text("mutual_user", &u.MutualUser, "at most 255 visible ASCII characters", func(v string) bool { return len(v) <= 255 && visible(v) })
		u.MutualSecret = s.secret("mutual_secret", false)
		s.end()
		users = append(users, u)
	}
	if len(*o.errs) == before { // else they are in part what they are not
		if err := users.Check(); err != nil {
			*o.errs = append(*o.errs, fmt.Errorf("field %q: %w", o.path+field, err))
		}
	}
	return users
}

// secret reads field, or the file that field_file names.
func (o *object) secret(field string, required bool) string {
	v, inline := o.take(field)
	f, file := o.take(field + "_file")
	var s string
	switch {
	case inline && file:
		o.note(field, fmt.Sprintf("one of %q and %q, not both", field, field+"_file"))
	case inline:
		if !isString(v) || json.Unmarshal(v, &s) != nil || s == "" {
			o.note(field, fmt.Sprintf("%d to %d bytes of text", iscsi.MinSecretBytes, iscsi.MaxSecretBytes))
		}
	case file:
		var path string
		if !isString(f) || json.Unmarshal(f, &path) != nil || path == "" {
			o.fail(field+"_file", f, "the path of a file")
			break
		}
		var err error
		if s, err = iscsi.ReadSecret(path); err != nil {
			*o.errs = append(*o.errs, fmt.Errorf("field %q: %w", o.path+field+"_file", err))
		}
	case required:
		o.missing(field, fmt.Sprintf("%d to %d bytes of text, or %q", iscsi.MinSecretBytes, iscsi.MaxSecretBytes, field+"_file"))
	}
	return s
}

// note is fail without the value, which may be a secret.
func (o *object) note(field, want string) {
	*o.errs = append(*o.errs, fmt.Errorf("field %q: value not shown: want %s", o.path+field, want))
}
