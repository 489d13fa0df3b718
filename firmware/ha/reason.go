package ha

import "fmt"

// staleReason says since when the mirror lacks writes and what helps.
func staleReason(self Controller, v View) string {
	return fmt.Sprintf("mirror is stale: owner %s writes alone since lsn %d (epoch %d), controller %s lacks what came after; start controller %s again and wait for in-sync",
		v.Owner, v.SoloLSN, v.Epoch, self, v.Owner)
}
