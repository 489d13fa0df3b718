package control

import (
	"fmt"
	"strconv"
	"strings"
)

// Claims hold promise P5 for what exists: of two agents that run for one host, only the one that came last may
// touch the host's LUNs.
//
// An agent that starts claims its host. The shelf raises the host's number, records it in the pool, and lets only the
// initiator name with that number see the host's LUNs; the answer to the claim leaves when no command of
// an earlier name runs any more. So whatever the earlier agent was told to be written is there before the new one
// reads the journal, and what it writes later is refused, on either controller: the number is kept with the pool, and
// survives a takeover. The name is "<initiator>:e<number>", which is a legal iSCSI name (RFC 7143 4.2.7).
// A number never falls: a request without a claim keeps the one that is.
//
// A name is no proof: everybody on the network may say it. So the shelf takes a claim's name only from one who proves
// by CHAP that the claim was his (RFC 7143 12.1.3), and proves itself to him by another secret. Both secrets go out
// with the grant, are another pair for each claim, and are kept nowhere: Shelf.Secrets derives them, on both
// controllers alike.

const (
	claimMark = ":e"
	maxClaim  = len(claimMark) + 20 // bytes that a claim adds to a name; names are 223 bytes at most
)

// joinClaim returns the initiator name of the nth claim; the name itself for n = 0, a host never claimed.
func joinClaim(initiator string, n uint64) string {
	if n == 0 {
		return initiator
	}
	return fmt.Sprintf("%s%s%d", initiator, claimMark, n)
}

// IsClaim says that an initiator name is one that a claim gives.
func IsClaim(initiator string) bool {
	_, n := splitClaim(initiator)
	return n > 0
}

// splitClaim is joinClaim's inverse.
func splitClaim(name string) (initiator string, n uint64) {
	at := strings.LastIndex(name, claimMark)
	if at < 0 {
		return name, 0
	}
	n, err := strconv.ParseUint(name[at+len(claimMark):], 10, 64)
	if err != nil || joinClaim(name[:at], n) != name {
		return name, 0
	}
	return name[:at], n
}
