// Package agent is the host's agent: it joins a shelf, opens the host's store on two of its LUNs, and
// exports the store's volumes over iSCSI, with an API over HTTP for the operator.
//
// It owns the order in which these things start, fail and end, the checks of what an operator asks
// for, and nothing of the data path: that is initiator → store → volume → target, wired in engine.go.
//
//	             ┌──────────────── store failed, pause ◄───────────────┐
//	             ▼                                                     │
//	joining: PUT /v1/hosts ─► opening: sessions, recovery ─► serving: targets
//	             │ ctx ends        │ ctx ends                    │ ctx ends
//	             └─────────────────┴──────► closing ◄────────────┘
//
// The API answers from the first moment, and says in which phase the agent is; volumes can be asked for
// only while it serves. It promises that New returns an error for what a configuration makes
// impossible (a socket in use), that Run returns when every goroutine, session and listener is gone, and that
// initiators see a volume as soon as its creation was acknowledged, and after every restart of the agent.
//
// Beside volumes and snapshots by order (volumes.go, snapshots.go) it takes snapshots by schedule (schedule.go), and exports and
// imports volumes as images (transfer.go). Both keep nothing on the host, and a crash in the middle leaves nothing that looks whole.
//
// A store that another host has opened (store.ErrFenced) ends Run: two agents that take the store from
// each other for ever would serve nobody.
package agent
