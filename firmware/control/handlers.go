package control

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func (s *Server) getStatus(r *http.Request) (int, any, error) {
	return http.StatusOK, s.status(r), nil
}

func (s *Server) status(r *http.Request) Status {
	st := s.o.Shelf.Status(r.Context())
	if st.Members == nil {
		st.Members = []Member{}
	}
	if st.LUNs == nil {
		st.LUNs = []LUN{}
	}
	if st.Portals == nil {
		st.Portals = []string{}
	}
	return st
}

func (s *Server) postTakeover(r *http.Request) (int, any, error) {
	var req struct {
		LoseWrites bool `json:"lose_writes"`
	}
	if err := decode(r, &req, true); err != nil {
		return 0, nil, err
	}
	if err := s.o.Shelf.Takeover(r.Context(), req.LoseWrites); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, s.status(r), nil
}

func (s *Server) getHosts(r *http.Request) (int, any, error) {
	c, err := s.o.Shelf.Catalog()
	if err != nil {
		return 0, nil, err
	}
	hosts := c.Hosts()
	if hosts == nil {
		hosts = []Host{}
	}
	return http.StatusOK, map[string]any{"hosts": hosts}, nil
}

// getLUNs answers on both controllers. The owner adds those that are being deleted.
func (s *Server) getLUNs(r *http.Request) (int, any, error) {
	luns := s.status(r).LUNs
	if c, err := s.o.Shelf.Catalog(); err == nil {
		luns = append(slices.Clone(luns), c.Deleting()...)
	}
	return http.StatusOK, map[string]any{"luns": luns}, nil
}

// putHost brings the host's two LUNs and its registration into being. Each step is idempotent, so a host that
// asks again after any failure gets the same LUNs.
func (s *Server) putHost(r *http.Request) (int, any, error) {
	var req struct {
		Initiator    string `json:"initiator"`
		JournalBytes int64  `json:"journal_bytes"`
		StoreBytes   int64  `json:"store_bytes"`
		Claim        bool   `json:"claim"`
	}
	name := r.PathValue("name")
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if err := errors.Join(checkName("host name", name), checkInitiator(req.Initiator),
		checkSize("journal_bytes", req.JournalBytes, MinJournalBytes), checkSize("store_bytes", req.StoreBytes, MinStoreBytes)); err != nil {
		return 0, nil, invalid(err)
	}
	c, err := s.o.Shelf.Catalog()
	if err != nil {
		return 0, nil, err
	}
	// One at a time, so that no two claims get the same number.
	select {
	case s.hosts <- struct{}{}:
		defer func() { <-s.hosts }()
	case <-r.Context().Done():
		return 0, nil, r.Context().Err()
	}
	var claims uint64
	for _, h := range c.Hosts() {
		base, n := splitClaim(h.Initiator)
		if h.Name == name {
			claims = n
		} else if base == req.Initiator {
			return 0, nil, &Hint{fmt.Errorf("%w: initiator %s belongs to host %q already", ErrConflict, req.Initiator, h.Name), "give each host an initiator name of its own"}
		}
	}
	if req.Claim {
		claims++
	}
	initiator := joinClaim(req.Initiator, claims)
	journal, err := ensure(r, c, LUNSpec{Name: name + ".journal", Kind: "journal", SizeBytes: req.JournalBytes, BlockBytes: 4096})
	if err != nil {
		return 0, nil, err
	}
	store, err := ensure(r, c, LUNSpec{Name: name + ".store", Kind: "store", SizeBytes: req.StoreBytes, BlockBytes: 4096})
	if err != nil {
		return 0, nil, err
	}
	if err := c.PutHost(r.Context(), Host{Name: name, Initiator: initiator, LUNs: []uint32{journal.ID, store.ID}}); err != nil {
		return 0, nil, err
	}
	target, portals := s.o.Shelf.Target()
	g := Grant{Initiator: initiator, Target: target, Portals: portals, JournalLUN: journal.LUN, StoreLUN: store.LUN,
		CapacityBytes: storeCapacity(s.o.Shelf.Status(r.Context()), store.ID)}
	if req.Claim { // who asks without one gets to know an earlier claim's name, but nothing to use it with
		chap := s.o.Shelf.Secrets(initiator)
		g.CHAP = &chap
	}
	return http.StatusOK, g, nil
}

// capacitySlack stays free for what the pool frees late: extents whose records are still on their way.
const capacitySlack = 32 << 20

// storeCapacity is what the pool can give to a store: all but what others have, and what journals will have, which are
// circular and soon allocated whole. One extent is the least, so that a pool with nothing left is no unlimited one.
func storeCapacity(st Status, id uint32) int64 {
	if st.Pool == nil {
		return 0
	}
	left := st.Pool.CapacityBytes - capacitySlack
	for _, l := range st.LUNs {
		switch {
		case l.ID == id:
		case l.Kind == "journal":
			left -= max(l.SizeBytes, l.AllocatedBytes)
		default:
			left -= l.AllocatedBytes
		}
	}
	return max(left, roundUp(1))
}

// ensure returns the LUN of that name, created if missing.
func ensure(r *http.Request, c Catalog, spec LUNSpec) (LUN, error) {
	for _, l := range c.LUNs() {
		if l.Name != spec.Name {
			continue
		}
		if l.Kind != spec.Kind {
			return LUN{}, fmt.Errorf("%w: LUN %q exists as kind %s", ErrConflict, l.Name, l.Kind)
		}
		if want := roundUp(spec.SizeBytes); l.SizeBytes != spec.SizeBytes && l.SizeBytes != want {
			return LUN{}, &Hint{fmt.Errorf("%w: LUN %q exists with %d bytes, not %d", ErrConflict, l.Name, l.SizeBytes, spec.SizeBytes), "ask for the size it has"}
		}
		return l, nil
	}
	return c.CreateLUN(r.Context(), spec)
}

// roundUp is to the array extent, 8 MiB: the pool may give a LUN whole extents.
func roundUp(n int64) int64 { const e = 8 << 20; return (n + e - 1) / e * e }

func (s *Server) postLUN(r *http.Request) (int, any, error) {
	var req struct {
		Name       string `json:"name"`
		Kind       string `json:"kind"`
		SizeBytes  int64  `json:"size_bytes"`
		BlockBytes uint32 `json:"block_bytes"`
	}
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if req.Kind == "" {
		req.Kind = "plain"
	}
	if req.BlockBytes == 0 {
		req.BlockBytes = 512
		if req.Kind != "plain" {
			req.BlockBytes = 4096
		}
	}
	if err := errors.Join(checkName("name", req.Name), checkSize("size_bytes", req.SizeBytes, 1<<20), checkKind(req.Kind, req.BlockBytes)); err != nil {
		return 0, nil, invalid(err)
	}
	c, err := s.o.Shelf.Catalog()
	if err != nil {
		return 0, nil, err
	}
	l, err := c.CreateLUN(r.Context(), LUNSpec{Name: req.Name, Kind: req.Kind, SizeBytes: req.SizeBytes, BlockBytes: req.BlockBytes})
	if err != nil {
		return 0, nil, err
	}
	return http.StatusCreated, l, nil
}

func (s *Server) getEvents(r *http.Request) (int, any, error) {
	since, err := queryUint(r, "since", 0)
	if err != nil {
		return 0, nil, err
	}
	limit, err := queryUint(r, "limit", 100)
	if err != nil {
		return 0, nil, err
	}
	events, next := s.o.Events.Since(since, int(min(limit, 1000)))
	return http.StatusOK, map[string]any{"events": events, "next": next}, nil
}

func queryUint(r *http.Request, name string, zero uint64) (uint64, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return zero, nil
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%w: %s=%q is not a whole number", ErrInvalid, name, text)
	}
	return n, nil
}

// invalid puts several complaints into one line.
func invalid(err error) error {
	return fmt.Errorf("%w: %s", ErrInvalid, strings.ReplaceAll(err.Error(), "\n", "; "))
}

var (
	namePattern      = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
	lunNamePattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]*$`)
	initiatorPattern = regexp.MustCompile(`^(iqn\.[0-9]{4}-[0-9]{2}\.[a-z0-9.-]+(:[^\s,]+)?|eui\.[0-9A-Fa-f]{16}|naa\.[0-9A-Fa-f]{16}([0-9A-Fa-f]{16})?)$`)
)

// checkName: no dots, which separate a host's name from what its LUNs are for.
func checkName(field, name string) error {
	if len(name) > maxNameBytes || !namePattern.MatchString(name) {
		return fmt.Errorf("%s %q: 1 to %d of a-z, 0-9 and '-', beginning with a letter or digit", field, clip(name), maxNameBytes)
	}
	return nil
}

func checkLUNName(name string) error {
	if len(name) > maxNameBytes+8 || !lunNamePattern.MatchString(name) {
		return fmt.Errorf("LUN name %q: letters a-z, digits, '-' and '.' only", clip(name))
	}
	return nil
}

func checkInitiator(name string) error {
	if len(name) > 223-maxClaim || !initiatorPattern.MatchString(name) {
		return fmt.Errorf("initiator %q: an iSCSI name is wanted, as iqn.2026-11.io.example:host1 (RFC 7143 4.2.7)", clip(name))
	}
	if _, n := splitClaim(name); n > 0 {
		return fmt.Errorf("initiator %q: names that end in %s and a number are given out by the shelf (claims)", clip(name), claimMark)
	}
	return nil
}

func checkSize(field string, n, least int64) error {
	switch {
	case n < least:
		return fmt.Errorf("%s %d: at least %d bytes", field, n, least)
	case n > MaxLUNBytes:
		return fmt.Errorf("%s %d: at most %d bytes", field, n, int64(MaxLUNBytes))
	case n%4096 != 0:
		return fmt.Errorf("%s %d: a multiple of 4096 bytes", field, n)
	}
	return nil
}

func checkKind(kind string, block uint32) error {
	switch {
	case kind != "plain" && kind != "journal" && kind != "store":
		return fmt.Errorf("kind %q: plain, journal or store", clip(kind))
	case block != 512 && block != 4096:
		return fmt.Errorf("block_bytes %d: 512 or 4096", block)
	case kind != "plain" && block != 4096:
		return fmt.Errorf("block_bytes %d: a %s LUN has 4096", block, kind)
	}
	return nil
}

// clip keeps hostile names out of logs and answers.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
