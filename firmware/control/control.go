// Package control is the shelf's API over HTTP: status, pool, takeover, hosts, LUNs, events.
//
// It owns the contract below, the checking of what comes in, and the words of what goes out. It promises that
// bad input is an answer (P9): bodies are bounded, JSON is strict, names and sizes are checked before the pool
// is asked, every error says what was wrong and, where there is one, what to do. It never touches a member or a
// LUN's blocks, keeps nothing that matters (hosts and LUNs live in the pool), and never answers a request
// without the token when one is configured.
//
// # Contract
//
// All bodies are JSON objects in UTF-8, at most 64 KiB; unknown fields are refused. Sizes are bytes. Every
// request carries "Authorization: Bearer <token>" where a token is configured.
//
//	GET    /v1/status         → Status
//	GET    /v1/pool           → PoolInfo
//	POST   /v1/pool           {force?, data?, parity?, spares?, drives?: [path…]} → Status
//	                          400 drives not blank without force; 409 pool exists
//	PUT    /v1/pool/thresholds {warn_percent} → PoolInfo
//	POST   /v1/pool/drain     → 202 Task: all of the log to the members
//	POST   /v1/pool/give-up   {force?} → 202 Task: marks lost what more missing members than parity covers hold back
//	GET    /v1/array          → ArrayInfo
//	POST   /v1/array/scrub    {action: "start"|"pause"|"stop", accept_old?} → ArrayInfo; accept_old, of start, for after writes were given up:
//	                          stripes that were being changed then are taken as they are
//	PUT    /v1/array/rates    {rebuild?, rebuild_floor?, scrub?, scrub_floor?} → ArrayInfo
//	POST   /v1/array/grow     {drives: [path…], force?} → 202 Task
//	POST   /v1/array/members/{n}/fail     {force?} → ArrayInfo   409 data or the last redundancy would be lost
//	POST   /v1/array/members/{n}/replace  {path, force?} → 202 Task
//	POST   /v1/array/members/{n}/readd    {path?} → 202 Task
//	GET    /v1/drives         → DriveList; this controller's own ports, whoever owns the pool
//	POST   /v1/drives/rescan  → DriveList, after a look at what is plugged in
//	POST   /v1/drives/wipe    {path, force?} → Drive            409 a living member; reserved by others without force
//	POST   /v1/takeover       {lose_writes?} or no body → Status 409 refused, with the reason; lose_writes: where the log of the owner's
//	                          newest writes is nowhere, it gives them up, and the pool is as it was destaged last
//	PUT    /v1/hosts/{name}   {initiator, journal_bytes, store_bytes, claim} → Grant; claim: claim.go. The only answer
//	                          with secrets in it, and only to a claim.
//	                          idempotent: creates the host's LUNs when missing, replaces its initiator name.
//	                          409 when a LUN exists with another size
//	GET    /v1/hosts          → {hosts: [{name, initiator, luns: [id…]}]}
//	GET    /v1/luns           → {luns: [LUN…]}
//	POST   /v1/luns           {name, size_bytes, kind?: "plain", block_bytes?: 512|4096} → 201 LUN
//	GET    /v1/luns/{name}    → LUNInfo
//	DELETE /v1/luns/{name}?force=true → 204; the space comes back in the background. 409 a host's LUN without force
//	POST   /v1/luns/{name}/resize {size_bytes} → LUNInfo         400 smaller: never
//	POST   /v1/luns/{name}/rename {name} → LUNInfo
//	GET    /v1/events?since=N&limit=M → {events: [{seq, time, level, text}…], next}
//
// Errors are {"error": "...", "hint": "...", "owner": "A"|"B"} with 400 (the request is wrong), 401 (token), 404, 405, 409 (the
// state forbids it: not the owner, exists, refused), 413, 500, 503 (starting, busy) and 507 (no space).
// A controller that does not own the pool answers what only the owner can with 409 and the owner's name in "owner".
//
// # Time-outs
//
// Headers within 5 s, a body within 10 s, an answer within 150 s (a takeover replays up to a whole log). At most
// MaxRequests requests are served at once; more get 503.
package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Limits of the API.
const (
	MaxBodyBytes = 64 << 10
	MaxRequests  = 64
	maxNameBytes = 48
	// MinJournalBytes and MinStoreBytes are the smallest LUNs that an agent can use.
	MinJournalBytes = 16 << 20
	MinStoreBytes   = 64 << 20
	// MaxLUNBytes keeps sizes and sums far from overflow: 4 PiB.
	MaxLUNBytes = 4 << 50
	answerLimit = 150 * time.Second
)

// The conditions that a Shelf reports; wrapped with what exactly was wrong.
var (
	// ErrInvalid: the request can never succeed as it is. 400.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound: no such LUN or host. 404.
	ErrNotFound = errors.New("not found")
	// ErrConflict: the state forbids it. 409.
	ErrConflict = errors.New("conflict")
	// ErrUnavailable: not now; the same request may succeed soon. 503.
	ErrUnavailable = errors.New("not available now")
	// ErrNoSpace: the pool is full. 507.
	ErrNoSpace = errors.New("no space left in the pool")
)

// Hint is an error with advice for the one who reads it.
type Hint struct {
	Err  error
	Hint string
}

func (h *Hint) Error() string { return h.Err.Error() }
func (h *Hint) Unwrap() error { return h.Err }

// NotOwner is the answer of a controller that does not own the pool.
type NotOwner struct {
	Self, Owner string // "A" or "B"; Owner "" where nobody owns it
	Role        string
}

func (e *NotOwner) Error() string {
	if e.Owner == "" {
		return "controller " + e.Self + " (" + e.Role + ") does not own the pool, and nobody does"
	}
	return "controller " + e.Self + " (" + e.Role + ") does not own the pool: controller " + e.Owner + " does"
}

// Partner in a Status. Mirror is "in-sync", "resync", "solo" or "stale". Transport is what the link to the partner is over, and
// TransportSince since when: "window" or "tcp" ("unix" between processes); neither while it is not connected. Fallback is the last time that
// another transport stood in for the window; nil: never since this controller started, or it has no window.
type Partner struct {
	Connected      bool       `json:"connected"`
	Mirror         string     `json:"mirror"`
	Transport      string     `json:"transport,omitempty"`
	TransportSince *time.Time `json:"transport_since,omitempty"`
	Fallback       *Fallback  `json:"fallback,omitempty"`
}

// Fallback in a Partner.
type Fallback struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
}

// NVRAM in a Status.
type NVRAM struct {
	Size int64 `json:"size"`
	Used int64 `json:"used"`
}

// Pool in a Status; nil where no pool is known. State is "ok", "degraded", "full" or "failed".
type Pool struct {
	UUID           string `json:"uuid"`
	CapacityBytes  int64  `json:"capacity_bytes"`
	AllocatedBytes int64  `json:"allocated_bytes"`
	State          string `json:"state"`
}

// Member in a Status.
type Member struct {
	Index  int    `json:"index"`
	Path   string `json:"path"`
	State  string `json:"state"`
	Errors uint64 `json:"errors"`
}

// LUN as the API shows it. ID and LUN are the same number: the pool's id is the SCSI logical unit number.
type LUN struct {
	ID             uint32 `json:"id"`
	LUN            uint32 `json:"lun"`
	Name           string `json:"name"`
	Kind           string `json:"kind"`
	SizeBytes      int64  `json:"size_bytes"`
	BlockBytes     uint32 `json:"block_bytes"`
	AllocatedBytes int64  `json:"allocated_bytes"`
	UUID           string `json:"uuid"`
	// State is "deleting" for one whose space is coming back; "" else.
	State string `json:"state,omitempty"`
}

// Status of one controller. Role is one of owner, standby, starting, fenced, taking-over, handing-over, no-pool.
type Status struct {
	Shelf      string  `json:"shelf"`
	Controller string  `json:"controller"`
	Role       string  `json:"role"`
	Phase      string  `json:"phase"`
	Epoch      uint64  `json:"epoch"`
	Owner      string  `json:"owner"`
	Partner    Partner `json:"partner"`
	NVRAM      NVRAM   `json:"nvram"`
	Pool       *Pool   `json:"pool"`
	// Members is empty on a controller that does not have the array open and could not look.
	Members      []Member   `json:"members"`
	LUNs         []LUN      `json:"luns"`
	Target       string     `json:"target"`
	Portals      []string   `json:"portals"`
	ServingSince *time.Time `json:"serving_since"`
	// Trouble is the last thing that failed, in words; "" where nothing did.
	Trouble string `json:"trouble,omitempty"`
	Version string `json:"version"`
}

// Host is a registered host.
type Host struct {
	Name      string   `json:"name"`
	Initiator string   `json:"initiator"`
	LUNs      []uint32 `json:"luns"`
}

// Grant is what a host needs to use its LUNs.
type Grant struct {
	// Initiator is the name to log in with: the one asked for, or with a claim that name and ":e" and the claim's number.
	Initiator  string   `json:"initiator"`
	Target     string   `json:"target"`
	Portals    []string `json:"portals"`
	JournalLUN uint32   `json:"journal_lun"`
	StoreLUN   uint32   `json:"store_lun"`
	// CapacityBytes is what the store may take of the pool, as things stand: the store LUN is thin and larger than the
	// pool, and a store that stops in time keeps room to free what is deleted. Zero: not known.
	CapacityBytes int64 `json:"capacity_bytes"`
	// CHAP is what the initiator must prove, and what the target proves; nil without a claim.
	CHAP *CHAP `json:"chap,omitempty"`
}

// CHAP is a pair of secrets (RFC 7143 12.1.3). It is never printed.
type CHAP struct {
	User         string `json:"user"`
	Secret       string `json:"secret"`
	TargetUser   string `json:"target_user"`
	TargetSecret string `json:"target_secret"`
}

// Format keeps the secrets out of logs and errors, whatever the verb.
func (c CHAP) Format(f fmt.State, _ rune) { fmt.Fprint(f, "(CHAP secrets)") }

// LogValue does the same for package slog.
func (c CHAP) LogValue() slog.Value { return slog.StringValue("(CHAP secrets)") }

// LUNSpec asks for a new LUN.
type LUNSpec struct {
	Name       string
	Kind       string // plain, journal, store
	SizeBytes  int64
	BlockBytes uint32
}

// Catalog is the owner's pool as this package uses it. Implementations wrap the errors above.
type Catalog interface {
	LUNs() []LUN
	// Deleting are LUNs that are gone for initiators and still hold space.
	Deleting() []LUN
	CreateLUN(ctx context.Context, spec LUNSpec) (LUN, error)
	DeleteLUN(ctx context.Context, name string) error
	Hosts() []Host
	// PutHost inserts or replaces h, durably, and lets its initiator (and no other host's) see its LUNs.
	PutHost(ctx context.Context, h Host) error
}

// Shelf is what the API acts on.
type Shelf interface {
	Status(ctx context.Context) Status
	// Catalog returns the pool's catalog, or *NotOwner, or ErrUnavailable while ownership moves.
	Catalog() (Catalog, error)
	// Storage as Catalog.
	Storage() (Storage, error)
	// Drives looks at what is plugged in at this controller now.
	Drives(ctx context.Context) (DriveList, error)
	// WipeDrive erases the labels of a drive that is no living member, and returns what it is then.
	WipeDrive(ctx context.Context, path string, force bool) (Drive, error)
	CreatePool(ctx context.Context, spec PoolSpec) error
	// Takeover makes this controller the owner; with lose even where acknowledged writes are lost by it.
	Takeover(ctx context.Context, lose bool) error
	// Target is the name and all portals of both controllers that initiators should use.
	Target() (name string, portals []string)
	// Secrets are those of an initiator name that a claim gave.
	Secrets(initiator string) CHAP
}
