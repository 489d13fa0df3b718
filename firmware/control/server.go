package control

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"time"
)

// Options of a Server.
type Options struct {
	Shelf  Shelf
	Events *Events // nil: GET /v1/events is empty
	// Token that requests must carry; "" lets everybody in (for a unix socket, whose directory guards it).
	Token  string
	Logger *slog.Logger
}

// Server serves the API.
type Server struct {
	o     Options
	token [sha256.Size]byte
	slots chan struct{}
	hosts chan struct{} // held while a host's registration changes
	http  *http.Server
}

// NewServer returns a server; Serve runs it.
func NewServer(o Options) (*Server, error) {
	if o.Shelf == nil {
		return nil, errors.New("control: a shelf is required")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Events == nil {
		o.Events = NewEvents(1)
	}
	s := &Server{o: o, token: sha256.Sum256([]byte(o.Token)), slots: make(chan struct{}, MaxRequests), hosts: make(chan struct{}, 1)}
	s.http = &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      answerLimit + 5*time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// Serve answers requests on l until Close; it may be called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control: %s: %w", l.Addr(), err)
	}
	return nil
}

// Close waits for requests under way until ctx ends, then cuts them off.
func (s *Server) Close(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		return s.http.Close()
	}
	return nil
}

// Handler is the API without the listener, for tests and for other servers.
func (s *Server) Handler() http.Handler {
	routes := map[string]map[string]func(*http.Request) (int, any, error){
		"/v1/status":       {"GET": s.getStatus},
		"/v1/takeover":     {"POST": s.postTakeover},
		"/v1/hosts":        {"GET": s.getHosts},
		"/v1/hosts/{name}": {"PUT": s.putHost},
		"/v1/luns":         {"GET": s.getLUNs, "POST": s.postLUN},
		"/v1/events":       {"GET": s.getEvents},
	}
	maps.Copy(routes, s.storageRoutes())
	mux := http.NewServeMux()
	for path, methods := range routes {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			h, ok := methods[r.Method]
			if !ok {
				w.Header().Set("Allow", allowed(methods))
				s.fail(w, r, http.StatusMethodNotAllowed, &Hint{fmt.Errorf("%s is not allowed on %s", r.Method, r.URL.Path), "allowed: " + allowed(methods)})
				return
			}
			s.answer(w, r, h)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, http.StatusNotFound, &Hint{fmt.Errorf("no such resource: %s", r.URL.Path), "the API begins at /v1/status"})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		default:
			w.Header().Set("Retry-After", "1")
			s.fail(w, r, http.StatusServiceUnavailable, fmt.Errorf("%d requests are being served already", MaxRequests))
			return
		}
		if !s.authorized(r) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			s.fail(w, r, http.StatusUnauthorized, &Hint{errors.New("missing or wrong token"), `send "Authorization: Bearer <api_token of the shelf's config>"`})
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func allowed(methods map[string]func(*http.Request) (int, any, error)) string {
	var names []string
	for _, m := range []string{"GET", "PUT", "POST", "DELETE"} {
		if methods[m] != nil {
			names = append(names, m)
		}
	}
	return strings.Join(names, ", ")
}

// authorized compares digests, so that neither content nor length of the token shows in the time it takes.
func (s *Server) authorized(r *http.Request) bool {
	if s.o.Token == "" {
		return true
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	sum := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(sum[:], s.token[:]) == 1 && strings.EqualFold(scheme, "Bearer")
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, h func(*http.Request) (int, any, error)) {
	r.Body = http.MaxBytesReader(w, r.Body, MaxBodyBytes)
	ctx, cancel := context.WithTimeout(r.Context(), answerLimit)
	defer cancel()
	code, v, err := h(r.WithContext(ctx))
	if err != nil {
		s.fail(w, r, statusOf(err), err)
		return
	}
	s.write(w, code, v)
}

func (s *Server) write(w http.ResponseWriter, code int, v any) {
	if v == nil {
		w.WriteHeader(code)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.o.Logger.Debug("control: answer not sent", "err", err)
	}
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, code int, err error) {
	level := slog.LevelInfo
	if code >= 500 {
		level = slog.LevelWarn
	}
	s.o.Logger.Log(r.Context(), level, "control: request refused", "method", r.Method, "path", r.URL.Path, "code", code, "err", err)
	body := struct {
		Error string `json:"error"`
		Hint  string `json:"hint,omitempty"`
		// Owner is the controller to ask, where it is not this one.
		Owner string `json:"owner,omitempty"`
	}{Error: err.Error()}
	var hint *Hint
	if errors.As(err, &hint) {
		body.Hint = hint.Hint
	}
	var no *NotOwner
	if errors.As(err, &no) {
		body.Owner = no.Owner
	}
	if no != nil && body.Hint == "" {
		if no.Owner != "" {
			body.Hint = "send this to controller " + no.Owner + ", or order a takeover here: POST /v1/takeover"
		} else {
			body.Hint = "order a takeover: POST /v1/takeover; or create a pool: POST /v1/pool"
		}
	}
	s.write(w, code, body)
}

// statusOf is the one table from errors to codes.
func statusOf(err error) int {
	var no *NotOwner
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, ErrInvalid):
		return http.StatusBadRequest
	case errors.Is(err, ErrNotFound):
		return http.StatusNotFound
	case errors.As(err, &no), errors.Is(err, ErrConflict):
		return http.StatusConflict
	case errors.Is(err, ErrNoSpace):
		return http.StatusInsufficientStorage
	case errors.Is(err, ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// decode reads the strict JSON object of a request into v, whatever Content-Type says (curl -d says a form). An empty body is an empty object if optional.
func decode(r *http.Request, v any, optional bool) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return fmt.Errorf("the body is larger than %d bytes: %w", tooLarge.Limit, err)
		}
		return fmt.Errorf("%w: reading the body: %w", ErrInvalid, err)
	}
	if len(strings.TrimSpace(string(body))) == 0 {
		if optional {
			return nil
		}
		return fmt.Errorf("%w: the body is empty; a JSON object is required", ErrInvalid)
	}
	if err := Strict(body, v); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}
