package conformance

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// algorithms of CHAP, by their numbers in the IANA registry.
var algorithms = map[int]func(b []byte) []byte{
	5: func(b []byte) []byte { s := md5.Sum(b); return s[:] },
	7: func(b []byte) []byte { s := sha256.Sum256(b); return s[:] },
}

func chapResponse(algorithm int, id byte, secret string, challenge []byte) []byte {
	return algorithms[algorithm](append(append([]byte{id}, secret...), challenge...))
}

// lockedLog takes what a server logs.
type lockedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestCHAP goes through the exchange of RFC 7143 12.1.3 with raw PDUs: each algorithm, one-way and
// mutual, right and wrong, each encoding, secrets by initiator, for sessions and for discovery. No
// secret and no response is logged.
func TestCHAP(t *testing.T) {
	const secret, back = "sixteen-bytes-or-more", "another-sixteen-bytes"
	log := new(lockedLog)
	portal := start(t, iscsi.Options{
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Auth: func(initiator, target string) *iscsi.CHAP {
			switch initiator {
			case initiatorName:
				return &iscsi.CHAP{User: "host", Secret: secret, MutualUser: "shelf", MutualSecret: back}
			case "iqn.2026-11.test:oneway":
				return &iscsi.CHAP{User: "host", Secret: secret}
			}
			return &iscsi.CHAP{User: "elsewhere", Secret: "of-another-initiator"}
		},
	}, unit{mem: mem.Options{Bytes: 16 << 20, Name: "chap"}})

	type attempt struct {
		name               string
		initiator          string // empty: initiatorName
		offer              string // empty: the algorithm alone
		user, secret       string
		mutual             bool
		base64, upper, pad bool
		discovery          bool
		spoil              func(response []byte) []byte
		reflect            bool // the target's challenge is sent back as our own
		want               uint16
	}
	good := func(a attempt) attempt {
		if a.user == "" {
			a.user = "host"
		}
		if a.secret == "" {
			a.secret = secret
		}
		return a
	}
	for number := range algorithms {
		other := 12 - number
		for _, a := range []attempt{
			{name: "one-way"},
			{name: "mutual", mutual: true},
			{name: "offered with others", offer: fmt.Sprintf("8,6,%d,%d", number, other)},
			{name: "base64", base64: true, mutual: true},
			{name: "upper case", upper: true, mutual: true},
			{name: "discovery", discovery: true},
			{name: "discovery, mutual", discovery: true, mutual: true},
			{name: "discovery, wrong", discovery: true, secret: "wrong", want: 0x0201},
			{name: "wrong secret", secret: "wrong", want: 0x0201},
			{name: "no secret", secret: " ", want: 0x0201},
			{name: "wrong secret, mutual", secret: "wrong", mutual: true, want: 0x0201},
			{name: "wrong user", user: "nobody", want: 0x0201},
			{name: "the target's secret", user: "shelf", secret: back, want: 0x0201},
			{name: "another initiator's", initiator: "iqn.2026-11.test:stranger", want: 0x0201},
			{name: "mutual where the target has no secret", initiator: "iqn.2026-11.test:oneway", mutual: true, want: 0x0201},
			{name: "one-way where the target has no secret", initiator: "iqn.2026-11.test:oneway"},
			{name: "our own challenge back", mutual: true, reflect: true, want: 0x0201},
			{name: "a short response", spoil: func(b []byte) []byte { return b[:len(b)-1] }, want: 0x0201},
			{name: "a long response", spoil: func(b []byte) []byte { return append(b, 0) }, want: 0x0201},
			{name: "one bit wrong", spoil: func(b []byte) []byte { b[0] ^= 1; return b }, want: 0x0201},
			{name: "an empty response", spoil: func([]byte) []byte { return nil }, want: 0x0201},
		} {
			a = good(a)
			t.Run(fmt.Sprintf("%d %s", number, a.name), func(t *testing.T) {
				c := dial(t, portal)
				initiator := initiatorName
				if a.initiator != "" {
					initiator = a.initiator
				}
				keys := []string{"InitiatorName=" + initiator, "TargetName=" + targetName, "AuthMethod=CHAP,None"}
				if a.discovery {
					keys[1] = "SessionType=Discovery"
				}
				status, answer, _ := c.step(0x00, keys...)
				if status != 0 || answer["AuthMethod"] != "CHAP" {
					t.Fatalf("status %04X, %v", status, answer)
				}
				offer := a.offer
				if offer == "" {
					offer = strconv.Itoa(number)
				}
				status, answer, _ = c.step(0x00, "CHAP_A="+offer)
				id, err := strconv.Atoi(answer["CHAP_I"])
				challenge, err2 := hex.DecodeString(strings.TrimPrefix(strings.ToLower(answer["CHAP_C"]), "0x"))
				if status != 0 || answer["CHAP_A"] != strconv.Itoa(number) || err != nil || err2 != nil || id > 255 || len(challenge) < 16 {
					t.Fatalf("status %04X, %v", status, answer)
				}
				response := chapResponse(number, byte(id), a.secret, challenge)
				if a.spoil != nil {
					response = a.spoil(response)
				}
				binary := func(b []byte) string {
					switch {
					case a.base64:
						return "0b" + base64.StdEncoding.EncodeToString(b)
					case a.upper:
						return "0X" + strings.ToUpper(hex.EncodeToString(b))
					}
					return "0x" + hex.EncodeToString(b)
				}
				mine := []byte("a challenge of the initiator's own")
				if a.reflect {
					mine = challenge
				}
				keys = []string{"CHAP_N=" + a.user, "CHAP_R=" + binary(response)}
				if a.mutual {
					keys = append(keys, "CHAP_I=200", "CHAP_C="+binary(mine))
				}
				status, answer, f := c.step(0x87&^0x04, keys...)
				if status != a.want {
					t.Fatalf("status %04X, want %04X", status, a.want)
				}
				if status != 0 {
					if f.h[1]&final != 0 && f.h[1]&3 == 3 && status == 0 {
						t.Error("it was let in")
					}
					c.closed()
					if hasKey(answer, "CHAP_R") {
						t.Error("the target proved itself to one who did not")
					}
					return
				}
				want := ""
				if a.mutual {
					want = "0x" + hex.EncodeToString(chapResponse(number, 200, back, mine))
				}
				if strings.ToLower(answer["CHAP_R"]) != want || a.mutual && answer["CHAP_N"] != "shelf" {
					t.Errorf("the target's answer: %v", answer)
				}
				if !a.discovery {
					c.ready()
				} else if found := c.text("SendTargets=All"); found["TargetName"] != targetName {
					t.Errorf("found %v", found)
				}
			})
		}
	}
	t.Run("out of order", func(t *testing.T) {
		first := normal("AuthMethod=CHAP")
		for name, steps := range map[string][][]string{
			"no AuthMethod":          {normal(), {"CHAP_A=7"}},
			"response first":         {first, {"CHAP_N=host", "CHAP_R=0x00"}},
			"algorithm twice":        {first, {"CHAP_A=7"}, {"CHAP_A=7"}},
			"no algorithm in common": {first, {"CHAP_A=6,8"}},
			"None alone":             {normal("AuthMethod=None")},
			"a method twice":         {first, {"AuthMethod=None"}},
			"key of another stage":   {normal("AuthMethod=CHAP", "MaxBurstLength=4096")},
		} {
			c := dial(t, portal)
			var status uint16
			for _, keys := range steps {
				if status, _, _ = c.step(0x00, keys...); status != 0 {
					break
				}
			}
			if status>>8 != 2 {
				t.Errorf("%s: status %04X", name, status)
				continue
			}
			c.closed()
		}
		// The stage is left without proof.
		for _, flags := range []byte{0x81, 0x83} {
			c := dial(t, portal)
			status, _, f := c.step(flags, normal("AuthMethod=CHAP")...)
			if status == 0 && f.h[1]&final != 0 {
				t.Errorf("flags %02X: the security stage was left", flags)
			}
		}
		for _, flags := range []byte{0x04, 0x87} {
			if status, _, _ := dial(t, portal).step(flags, normal()...); status != 0x0201 {
				t.Errorf("flags %02X: status %04X without authentication", flags, status)
			}
		}
	})
	for _, s := range []string{secret, back, hex.EncodeToString([]byte(secret)), "CHAP_R", "of-another-initiator"} {
		if strings.Contains(log.String(), s) {
			t.Errorf("the log has %q", s)
		}
	}
	if !strings.Contains(log.String(), "login failed") {
		t.Error("the log says nothing of failed logins")
	}
}

// TestCHAPReplay: a response is good for one challenge.
func TestCHAPReplay(t *testing.T) {
	portal := start(t, iscsi.Options{Auth: func(string, string) *iscsi.CHAP { return &iscsi.CHAP{User: "host", Secret: "s3cret"} }},
		unit{mem: mem.Options{Bytes: 16 << 20, Name: "replay"}})
	seen := make(map[string]bool)
	var response string
	for i := range 10 {
		c := dial(t, portal)
		c.step(0x00, normal("AuthMethod=CHAP")...)
		_, answer, _ := c.step(0x00, "CHAP_A=7")
		if seen[answer["CHAP_C"]] {
			t.Fatalf("challenge %s came twice", answer["CHAP_C"])
		}
		seen[answer["CHAP_C"]] = true
		want := uint16(0x0201)
		if i == 0 {
			id, _ := strconv.Atoi(answer["CHAP_I"])
			challenge, _ := hex.DecodeString(answer["CHAP_C"][2:])
			response, want = hex.EncodeToString(chapResponse(7, byte(id), "s3cret", challenge)), 0
		}
		if status, _, _ := c.step(0x83, "CHAP_N=host", "CHAP_R=0x"+response); status != want {
			t.Errorf("login %d: status %04X, want %04X", i, status, want)
		}
	}
}

func hasKey(m map[string]string, k string) bool { _, ok := m[k]; return ok }
