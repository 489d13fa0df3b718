package guest

import (
	"fmt"
	"testing"

	"github.com/ledge-storage/ledge/target/mem"
)

const chapTarget = "iqn.2026-11.io.ledge.qa:chap"

// TestCHAP: open-iscsi proves itself and makes the target prove itself, with either algorithm; who does not know the
// secret, or does not ask to be believed, is refused; and a target that does not know its own is left by the initiator.
func TestCHAP(t *testing.T) {
	h := sharedHost(t)
	s := newShelf(t, chapTarget)
	s.attach(t, 0, mem.Options{Bytes: 1 << 20, Name: "chap"}, "SCRATCH")
	s.connect(h)
	h.discover(t, chapTarget)
	node := "iscsiadm -m node -T " + chapTarget + " -p " + Portal(0)
	set := func(key, value string) string {
		return fmt.Sprintf("%s -o update -n node.session.auth.%s -v '%s'", node, key, value)
	}
	// iscsiadm(8): ISCSI_ERR_LOGIN_AUTH_FAILED is what the target said, ISCSI_ERR_FATAL_LOGIN that the initiator left.
	const refused, left = 24, 19
	for _, c := range []struct {
		name, script string
		code         int
	}{
		{"SHA-256", set("chap_algs", "SHA256"), 0},
		{"MD5", set("chap_algs", "MD5"), 0},
		{"an algorithm that nobody has", set("chap_algs", "SHA1"), refused},
		{"a wrong secret", set("password", "guest-secret-0002"), refused},
		{"a wrong name", set("username", "stranger"), refused},
		{"a target with another secret", set("password_in", "shelf-secret-0002"), left},
		{"a target with another name", set("username_in", "another"), left},
		// With a name and a secret open-iscsi would prove itself whatever the record says of a method.
		{"no proof offered", "cd /etc/iscsi/nodes/" + chapTarget + "/*/ && grep -v session.auth default > new && mv new default", refused},
	} {
		t.Run(c.name, func(t *testing.T) {
			// -o new forgets the update of the case before: the record is made of iscsid.conf again.
			h.record(t, chapTarget, 1, "iscsiadm -m node -T "+chapTarget+" -o delete; iscsiadm -m node -T "+chapTarget+" -p "+Portal(0)+",1 -o new")
			h.sh(t, c.script)
			before := s.servers[0].Stats()
			a := h.try(t, node+" -l")
			after := s.servers[0].Stats()
			if a.Code != c.code {
				t.Errorf("login: exit %d, not %d: %s", a.Code, c.code, a.Output)
			}
			if refusals := after.FailedLogins - before.FailedLogins; (refusals > 0) != (c.code == refused) {
				t.Errorf("the target refused %d logins", refusals)
			}
			if a.Code != 0 {
				if after.Sessions != 0 {
					t.Errorf("%d sessions after a refusal", after.Sessions)
				}
				return
			}
			if after.Sessions != 1 {
				t.Errorf("%d sessions after a login", after.Sessions)
			}
			h.sh(t, node+" -u")
		})
	}
}
