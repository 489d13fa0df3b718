package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/store"
)

const wantCompression = "s2 (fast), zstd (smaller, slower to write) or off (for what is compressed or encrypted already)"

func isCompression(s string) bool {
	_, err := store.ParseCompression(s)
	return err == nil
}

// wantName says what a name may be.
const wantName = "1 to 63 of a-z, 0-9 and -, beginning with a letter or digit"

// maxRequests bounds the requests that are served at once.
const maxRequests = 32

// handler is the API of package api.
func (a *Agent) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) (int, any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			status, out, err := f(r)
			if err != nil {
				replyError(w, r, err)
				return
			}
			reply(w, status, out)
		})
	}
	handle("GET /v1/status", func(*http.Request) (int, any, error) { return http.StatusOK, a.status(), nil })
	handle("GET /v1/volumes", func(*http.Request) (int, any, error) {
		v, err := a.volumes()
		return http.StatusOK, map[string]any{"volumes": v}, err
	})
	handle("POST /v1/volumes", func(r *http.Request) (int, any, error) {
		var name string
		var compression string
		var size int64
		if err := body(r, func(o *object) {
			o.text("name", &name, wantName, volumeName.MatchString)
			requiredSize(o, &size)
			o.text("compression", &compression, wantCompression, isCompression)
		}); err != nil {
			return 0, nil, err
		}
		how, err := store.ParseCompression(compression)
		if err != nil {
			return 0, nil, err
		}
		v, err := a.createVolume(r.Context(), name, size, how)
		return http.StatusCreated, v, err
	})
	handle("GET /v1/volumes/{name}", func(r *http.Request) (int, any, error) {
		v, err := a.volume(r.PathValue("name"))
		return http.StatusOK, v, err
	})
	handle("DELETE /v1/volumes/{name}", func(r *http.Request) (int, any, error) {
		err := a.deleteVolume(r.Context(), r.PathValue("name"), r.URL.Query().Get("force") == "true")
		return http.StatusNoContent, nil, err
	})
	handle("POST /v1/volumes/{name}/resize", func(r *http.Request) (int, any, error) {
		var size int64
		var shrink bool
		if err := body(r, func(o *object) {
			requiredSize(o, &size)
			o.flag("shrink", &shrink)
		}); err != nil {
			return 0, nil, err
		}
		v, err := a.resizeVolume(r.Context(), r.PathValue("name"), size, shrink)
		return http.StatusOK, v, err
	})
	handle("POST /v1/volumes/{name}/rename", func(r *http.Request) (int, any, error) {
		var to string
		var force bool
		if err := body(r, func(o *object) {
			o.text("name", &to, wantName, volumeName.MatchString)
			o.flag("force", &force)
		}); err != nil {
			return 0, nil, err
		}
		v, err := a.renameVolume(r.Context(), r.PathValue("name"), to, force)
		return http.StatusOK, v, err
	})
	handle("POST /v1/volumes/{name}/compression", func(r *http.Request) (int, any, error) {
		var compression string
		if err := body(r, func(o *object) {
			o.text("compression", &compression, wantCompression, func(s string) bool { return s != "" && isCompression(s) })
		}); err != nil {
			return 0, nil, err
		}
		how, err := store.ParseCompression(compression)
		if err != nil {
			return 0, nil, err
		}
		v, err := a.setCompression(r.Context(), r.PathValue("name"), how)
		return http.StatusOK, v, err
	})
	handle("POST /v1/index", func(r *http.Request) (int, any, error) {
		var bytes int64
		if err := body(r, func(o *object) { requiredSize(o, &bytes) }); err != nil {
			return 0, nil, err
		}
		x, err := a.resizeIndex(r.Context(), bytes)
		return http.StatusOK, x, err
	})
	handle("POST /v1/store/accept-lost", func(r *http.Request) (int, any, error) {
		if err := body(r, func(*object) {}); err != nil {
			return 0, nil, err
		}
		err := a.orderAcceptLost()
		return http.StatusAccepted, a.status(), err
	})
	mux.HandleFunc("GET /v1/volumes/{name}/export", func(w http.ResponseWriter, r *http.Request) {
		if err := a.exportVolume(w, r); err != nil {
			replyError(w, r, err)
		}
	})
	mux.HandleFunc("POST /v1/volumes/{name}/import", func(w http.ResponseWriter, r *http.Request) {
		v, err := a.importVolume(w, r)
		if err != nil {
			replyError(w, r, err)
			return
		}
		reply(w, http.StatusCreated, v)
	})
	handle("POST /v1/volumes/{name}/promote", func(r *http.Request) (int, any, error) {
		v, err := a.promote(r.Context(), r.PathValue("name"))
		return http.StatusOK, v, err
	})
	handle("GET /v1/volumes/{name}/diff", func(r *http.Request) (int, any, error) {
		q, offset := r.URL.Query(), int64(0)
		if s := q.Get("offset"); s != "" {
			var err error
			if offset, err = strconv.ParseInt(s, 10, 64); err != nil || offset < 0 {
				return 0, nil, refuse(http.StatusBadRequest, "", "offset %q: want a whole number of bytes", clip(s))
			}
		}
		d, err := a.diff(r.Context(), r.PathValue("name"), q.Get("from"), q.Get("to"), offset)
		return http.StatusOK, d, err
	})
	handle("GET /v1/stats", func(r *http.Request) (int, any, error) {
		s, err := a.stats(r.URL.Query().Get("volume"))
		return http.StatusOK, s, err
	})
	handle("GET /v1/snapshots", func(r *http.Request) (int, any, error) {
		s, err := a.snapshots(r.URL.Query().Get("volume"))
		return http.StatusOK, map[string]any{"snapshots": s}, err
	})
	handle("POST /v1/snapshots", func(r *http.Request) (int, any, error) {
		var name string
		var volumes []string
		if err := body(r, func(o *object) {
			o.text("name", &name, wantName, volumeName.MatchString)
			o.list("volumes", &volumes, fmt.Sprintf("a list of 1 to %d names of volumes", store.MaxGroup), volumeName.MatchString, store.MaxGroup)
		}); err != nil {
			return 0, nil, err
		}
		s, err := a.createSnapshots(r.Context(), name, volumes)
		return http.StatusCreated, map[string]any{"snapshots": s}, err
	})
	const one = "/v1/volumes/{name}/snapshots/{snapshot}"
	handle("DELETE "+one, func(r *http.Request) (int, any, error) {
		return http.StatusNoContent, nil, a.deleteSnapshot(r.Context(), r.PathValue("name"), r.PathValue("snapshot"))
	})
	handle("POST "+one+"/clone", func(r *http.Request) (int, any, error) {
		var name string
		if err := body(r, func(o *object) { o.text("name", &name, wantName, volumeName.MatchString) }); err != nil {
			return 0, nil, err
		}
		v, err := a.cloneSnapshot(r.Context(), r.PathValue("name"), r.PathValue("snapshot"), name)
		return http.StatusCreated, v, err
	})
	handle("POST "+one+"/rollback", func(r *http.Request) (int, any, error) {
		var force bool
		if err := body(r, func(o *object) { o.flag("force", &force) }); err != nil {
			return 0, nil, err
		}
		v, err := a.rollback(r.Context(), r.PathValue("name"), r.PathValue("snapshot"), force)
		return http.StatusOK, v, err
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusNotFound, refuse(0, "see package host/api for the contract", "no %s %s here", clip(r.Method), clip(r.URL.Path)))
	})
	turn := make(chan struct{}, maxRequests)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case turn <- struct{}{}:
			defer func() { <-turn }()
			mux.ServeHTTP(w, r)
		default:
			reply(w, http.StatusServiceUnavailable, refuse(0, "ask again", "%d requests are being served", maxRequests))
		}
	})
}

func replyError(w http.ResponseWriter, r *http.Request, err error) {
	var e *api.Error
	if !errors.As(answer(r.Method, r.URL.Path, err), &e) {
		e = refuse(http.StatusInternalServerError, "", "%v", err)
	}
	reply(w, e.Status, e)
}

func reply(w http.ResponseWriter, status int, out any) {
	if out == nil {
		w.WriteHeader(status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(out) // a client that went away is no error of ours
}

// requiredSize takes any whole number: what a volume's size may be, checkSize says in its own words.
func requiredSize(o *object, size *int64) {
	v, ok := o.take("size_bytes")
	if !ok {
		o.missing("size_bytes", "a whole number of bytes")
		return
	}
	if json.Unmarshal(v, size) != nil || string(v) == "null" {
		o.fail("size_bytes", v, "a whole number of bytes")
	}
}

// body reads a request's object strictly.
func body(r *http.Request, fields func(o *object)) error {
	b, err := readAll(r)
	if err != nil {
		return err
	}
	if err := syntax(b); err != nil {
		return refuse(http.StatusBadRequest, "", "the body is no JSON object: %v", err)
	}
	var errs []error
	o := parseObject(b, "", &errs)
	fields(o)
	o.end()
	if len(errs) > 0 {
		return refuse(http.StatusBadRequest, "", "%v", errors.Join(errs...))
	}
	return nil
}
