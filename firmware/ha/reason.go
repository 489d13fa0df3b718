package ha

import "fmt"

// staleReason says since when the mirror lacks writes and what helps.
func staleReason(self Controller, v View) string {
	return fmt.Sprintf("mirror is stale: owner %s writes alone since lsn %d (epoch %d), controller %s lacks what came after; start controller %s again and wait for in-sync%s",
		v.Owner, v.SoloLSN, v.Epoch, self, v.Owner, giveUp(self))
}

// giveUp says what is left where the log is lost for good.
func giveUp(self Controller) string {
	return fmt.Sprintf("; if its NVRAM is lost for good, 'ledge shelf takeover %s --lose-writes' gives up what only that had", self)
}
