package control

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"strconv"
	"strings"
)

// Limits of what is asked of pool and array.
const (
	maxDriveNames = 64
	maxPathBytes  = 1024
	maxMember     = 63
	// maxRate keeps a rate a number that means something: 1 TiB/s.
	maxRate = 1 << 40
)

func (s *Server) storageRoutes() map[string]map[string]func(*http.Request) (int, any, error) {
	return map[string]map[string]func(*http.Request) (int, any, error){
		"/v1/pool":                           {"GET": s.getPool, "POST": s.postPool},
		"/v1/pool/thresholds":                {"PUT": s.putThresholds},
		"/v1/pool/drain":                     {"POST": s.postDrain},
		"/v1/pool/give-up":                   {"POST": s.postGiveUp},
		"/v1/array":                          {"GET": s.getArray},
		"/v1/array/scrub":                    {"POST": s.postScrub},
		"/v1/array/rates":                    {"PUT": s.putRates},
		"/v1/array/grow":                     {"POST": s.postGrow},
		"/v1/array/members/{member}/fail":    {"POST": s.postFail},
		"/v1/array/members/{member}/replace": {"POST": s.postReplace},
		"/v1/array/members/{member}/readd":   {"POST": s.postReadd},
		"/v1/drives":                         {"GET": s.getDrives},
		"/v1/drives/rescan":                  {"POST": s.postRescan},
		"/v1/drives/wipe":                    {"POST": s.postWipe},
		"/v1/luns/{name}":                    {"GET": s.getLUN, "DELETE": s.deleteLUN},
		"/v1/luns/{name}/resize":             {"POST": s.postResize},
		"/v1/luns/{name}/rename":             {"POST": s.postRename},
	}
}

func (s *Server) postPool(r *http.Request) (int, any, error) {
	var req struct {
		Force  bool     `json:"force"`
		Data   int      `json:"data"`
		Parity int      `json:"parity"`
		Spares *int     `json:"spares"`
		Drives []string `json:"drives"`
	}
	if err := decode(r, &req, true); err != nil {
		return 0, nil, err
	}
	spec := PoolSpec{Force: req.Force, Data: req.Data, Parity: req.Parity, Spares: -1, Drives: req.Drives}
	if req.Spares != nil {
		spec.Spares = *req.Spares
	}
	if err := errors.Join(checkShape(spec, req.Spares != nil), checkPaths("drives", req.Drives)); err != nil {
		return 0, nil, invalid(err)
	}
	if err := s.o.Shelf.CreatePool(r.Context(), spec); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, s.status(r), nil
}

// checkShape: both of data and parity, or neither; whether the drives suffice is the array's to say.
func checkShape(p PoolSpec, spares bool) error {
	switch {
	case (p.Data == 0) != (p.Parity == 0):
		return errors.New("data and parity: give both, or neither")
	case p.Data < 0 || p.Data > 32:
		return fmt.Errorf("data %d: 1 to 32 strips", p.Data)
	case p.Parity < 0 || p.Parity > 4:
		return fmt.Errorf("parity %d: 1 to 4 strips", p.Parity)
	case spares && (p.Spares < 0 || p.Spares > 8):
		return fmt.Errorf("spares %d: 0 to 8 columns", p.Spares)
	}
	return nil
}

func (s *Server) getPool(r *http.Request) (int, any, error) {
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	p, err := st.Pool(r.Context())
	if err != nil {
		return 0, nil, err
	}
	p.Why, p.Tasks = listed(p.Why), listed(p.Tasks)
	return http.StatusOK, p, nil
}

// listed makes an empty list of none: JSON tells [] from null, and clients count on [].
func listed[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

func (s *Server) putThresholds(r *http.Request) (int, any, error) {
	var req struct {
		WarnPercent *int `json:"warn_percent"`
	}
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if req.WarnPercent == nil || *req.WarnPercent < 1 || *req.WarnPercent > 100 {
		return 0, nil, fmt.Errorf("%w: warn_percent: 1 to 100 (100: no warning)", ErrInvalid)
	}
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	if err := st.SetWarnPercent(r.Context(), *req.WarnPercent); err != nil {
		return 0, nil, err
	}
	return s.getPool(r)
}

func (s *Server) postDrain(r *http.Request) (int, any, error) {
	return s.begin(r, func(st Storage) (Task, error) { return st.Drain(r.Context()) })
}

func (s *Server) postGiveUp(r *http.Request) (int, any, error) {
	var req struct {
		Force bool `json:"force"`
	}
	if err := decode(r, &req, true); err != nil {
		return 0, nil, err
	}
	return s.task(func(st Storage) (Task, error) { return st.GiveUp(r.Context(), req.Force) })
}

// begin answers with the task that a request without a body began.
func (s *Server) begin(r *http.Request, f func(Storage) (Task, error)) (int, any, error) {
	var req struct{}
	if err := decode(r, &req, true); err != nil {
		return 0, nil, err
	}
	return s.task(f)
}

func (s *Server) task(f func(Storage) (Task, error)) (int, any, error) {
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	t, err := f(st)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusAccepted, t, nil
}

func (s *Server) getArray(r *http.Request) (int, any, error) {
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	a, err := st.Array(r.Context())
	if err != nil {
		return 0, nil, err
	}
	a.Why, a.Members, a.AtRisk, a.Tasks = listed(a.Why), listed(a.Members), listed(a.AtRisk), listed(a.Tasks)
	return http.StatusOK, a, nil
}

func (s *Server) postScrub(r *http.Request) (int, any, error) {
	var req struct {
		Action    string `json:"action"`
		AcceptOld bool   `json:"accept_old"`
	}
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if req.AcceptOld && req.Action != "start" {
		return 0, nil, fmt.Errorf("%w: accept_old is of start alone", ErrInvalid)
	}
	if req.Action != "start" && req.Action != "pause" && req.Action != "stop" {
		return 0, nil, fmt.Errorf("%w: action %q: start, pause or stop", ErrInvalid, clip(req.Action))
	}
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	if req.AcceptOld {
		req.Action = "start accepting old"
	}
	if err := st.Scrub(r.Context(), req.Action); err != nil {
		return 0, nil, err
	}
	return s.getArray(r)
}

// putRates changes what the request names and leaves the others.
func (s *Server) putRates(r *http.Request) (int, any, error) {
	var req struct {
		RebuildFloor *int64 `json:"rebuild_floor"`
		ScrubFloor   *int64 `json:"scrub_floor"`
		Rebuild      *int64 `json:"rebuild"`
		Scrub        *int64 `json:"scrub"`
	}
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	a, err := st.Array(r.Context())
	if err != nil {
		return 0, nil, err
	}
	named := false
	for _, x := range []struct {
		field    string
		from, to *int64
		least    int64 // -1: no bound
	}{{"rebuild_floor", req.RebuildFloor, &a.Rates.RebuildFloor, 0}, {"scrub_floor", req.ScrubFloor, &a.Rates.ScrubFloor, 0},
		{"rebuild", req.Rebuild, &a.Rates.Rebuild, -1}, {"scrub", req.Scrub, &a.Rates.Scrub, -1}} {
		if x.from == nil {
			continue
		}
		named = true
		if n := *x.from; n < x.least || n > 0 && n < 1<<20 || n > maxRate {
			return 0, nil, fmt.Errorf("%w: %s %d: 0 (the built-in pace), or bytes a second from 1 MiB to 1 TiB", ErrInvalid, x.field, n)
		}
		*x.to = *x.from
	}
	if !named {
		return 0, nil, fmt.Errorf("%w: name at least one of rebuild, rebuild_floor, scrub, scrub_floor", ErrInvalid)
	}
	if err := st.SetRates(r.Context(), a.Rates); err != nil {
		return 0, nil, err
	}
	return s.getArray(r)
}

func (s *Server) postGrow(r *http.Request) (int, any, error) {
	var req struct {
		Drives []string `json:"drives"`
		Force  bool     `json:"force"`
	}
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if len(req.Drives) == 0 {
		return 0, nil, fmt.Errorf("%w: drives: the paths of the drives to add", ErrInvalid)
	}
	if err := checkPaths("drives", req.Drives); err != nil {
		return 0, nil, invalid(err)
	}
	return s.task(func(st Storage) (Task, error) { return st.Grow(r.Context(), req.Drives, req.Force) })
}

// member is the number in the path.
func member(r *http.Request) (int, error) {
	text := r.PathValue("member")
	n, err := strconv.ParseUint(text, 10, 8)
	if err != nil || n > maxMember {
		return 0, fmt.Errorf("%w: member %q: a number from 0 to %d", ErrInvalid, clip(text), maxMember)
	}
	return int(n), nil
}

func (s *Server) postFail(r *http.Request) (int, any, error) {
	var req struct {
		Force bool `json:"force"`
	}
	n, err := member(r)
	if err == nil {
		err = decode(r, &req, true)
	}
	if err != nil {
		return 0, nil, err
	}
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	if err := st.FailMember(r.Context(), n, req.Force); err != nil {
		return 0, nil, err
	}
	return s.getArray(r)
}

func (s *Server) postReplace(r *http.Request) (int, any, error) {
	var req struct {
		Path  string `json:"path"`
		Force bool   `json:"force"`
	}
	n, err := member(r)
	if err == nil {
		err = decode(r, &req, false)
	}
	if err != nil {
		return 0, nil, err
	}
	if err := checkPath("path", req.Path); err != nil {
		return 0, nil, invalid(err)
	}
	return s.task(func(st Storage) (Task, error) { return st.ReplaceMember(r.Context(), n, req.Path, req.Force) })
}

func (s *Server) postReadd(r *http.Request) (int, any, error) {
	var req struct {
		Path string `json:"path"`
	}
	n, err := member(r)
	if err == nil {
		err = decode(r, &req, true)
	}
	if err != nil {
		return 0, nil, err
	}
	if req.Path != "" {
		if err := checkPath("path", req.Path); err != nil {
			return 0, nil, invalid(err)
		}
	}
	return s.task(func(st Storage) (Task, error) { return st.ReaddMember(r.Context(), n, req.Path) })
}

func (s *Server) getDrives(r *http.Request) (int, any, error) {
	l, err := s.o.Shelf.Drives(r.Context())
	if err != nil {
		return 0, nil, err
	}
	l.Drives = listed(l.Drives)
	return http.StatusOK, l, nil
}

// postRescan differs from getDrives in what it says to a reader: both look at what is plugged in now.
func (s *Server) postRescan(r *http.Request) (int, any, error) {
	var req struct{}
	if err := decode(r, &req, true); err != nil {
		return 0, nil, err
	}
	return s.getDrives(r)
}

func (s *Server) postWipe(r *http.Request) (int, any, error) {
	var req struct {
		Path  string `json:"path"`
		Force bool   `json:"force"`
	}
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if err := checkPath("path", req.Path); err != nil {
		return 0, nil, invalid(err)
	}
	d, err := s.o.Shelf.WipeDrive(r.Context(), req.Path, req.Force)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, d, nil
}

func (s *Server) getLUN(r *http.Request) (int, any, error) {
	name := r.PathValue("name")
	if err := checkLUNName(name); err != nil {
		return 0, nil, invalid(err)
	}
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	l, err := st.LUN(r.Context(), name)
	if err != nil {
		return 0, nil, err
	}
	l.Hosts = listed(l.Hosts)
	return http.StatusOK, l, nil
}

func (s *Server) deleteLUN(r *http.Request) (int, any, error) {
	name := r.PathValue("name")
	force, err := queryBool(r, "force")
	if err == nil {
		err = checkLUNName(name)
	}
	if err != nil {
		return 0, nil, invalid(err)
	}
	c, err := s.o.Shelf.Catalog()
	if err != nil {
		return 0, nil, err
	}
	if host := ownerOf(c, name); host != "" && !force {
		return 0, nil, &Hint{fmt.Errorf("%w: LUN %q is host %q's: all of its volumes would be lost", ErrConflict, name, host),
			"delete the host's volumes on the host; to lose them anyway, force it"}
	}
	if err := c.DeleteLUN(r.Context(), name); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, nil
}

// ownerOf is the host that a LUN was made for, or "".
func ownerOf(c Catalog, name string) string {
	for _, l := range c.LUNs() {
		for _, h := range c.Hosts() {
			for _, id := range h.LUNs {
				if l.Name == name && id == l.ID {
					return h.Name
				}
			}
		}
	}
	return ""
}

func (s *Server) postResize(r *http.Request) (int, any, error) {
	var req struct {
		SizeBytes int64 `json:"size_bytes"`
	}
	name := r.PathValue("name")
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if err := errors.Join(checkLUNName(name), checkSize("size_bytes", req.SizeBytes, 1<<20)); err != nil {
		return 0, nil, invalid(err)
	}
	return s.changeLUN(r, name, name, func(st Storage) error { return st.ResizeLUN(r.Context(), name, req.SizeBytes) })
}

func (s *Server) postRename(r *http.Request) (int, any, error) {
	var req struct {
		Name string `json:"name"`
	}
	name := r.PathValue("name")
	if err := decode(r, &req, false); err != nil {
		return 0, nil, err
	}
	if err := errors.Join(checkLUNName(name), checkName("name", req.Name)); err != nil {
		return 0, nil, invalid(err)
	}
	return s.changeLUN(r, name, req.Name, func(st Storage) error { return st.RenameLUN(r.Context(), name, req.Name) })
}

// changeLUN changes a LUN that belongs to no host, whose agent relies on what it asked for, and answers with what it
// is then.
func (s *Server) changeLUN(r *http.Request, name, after string, change func(Storage) error) (int, any, error) {
	st, err := s.o.Shelf.Storage()
	if err != nil {
		return 0, nil, err
	}
	c, err := s.o.Shelf.Catalog()
	if err != nil {
		return 0, nil, err
	}
	if host := ownerOf(c, name); host != "" {
		return 0, nil, &Hint{fmt.Errorf("%w: LUN %q is host %q's", ErrConflict, name, host), "its agent made it and relies on its name and size"}
	}
	if err := change(st); err != nil {
		return 0, nil, err
	}
	l, err := st.LUN(r.Context(), after)
	if err != nil {
		return 0, nil, err
	}
	l.Hosts = listed(l.Hosts)
	return http.StatusOK, l, nil
}

func queryBool(r *http.Request, name string) (bool, error) {
	switch text := r.URL.Query().Get(name); text {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, fmt.Errorf("%s=%q: true or false", name, clip(text))
	}
}

func checkPaths(field string, paths []string) error {
	if len(paths) > maxDriveNames {
		return fmt.Errorf("%s: %d paths; at most %d", field, len(paths), maxDriveNames)
	}
	seen := map[string]bool{}
	for i, p := range paths {
		if err := checkPath(fmt.Sprintf("%s[%d]", field, i), p); err != nil {
			return err
		}
		if seen[p] {
			return fmt.Errorf("%s: %s is named twice", field, p)
		}
		seen[p] = true
	}
	return nil
}

// checkPath: an absolute path as the shelf itself writes it, so that two names of one drive are never taken for two.
func checkPath(field, p string) error {
	switch {
	case p == "":
		return fmt.Errorf("%s: the path of a drive is required", field)
	case len(p) > maxPathBytes || !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%s %q: an absolute path as 'ledge drive list' shows it", field, clip(p))
	}
	return nil
}
