package control

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// Event is a line of the log, numbered.
type Event struct {
	Seq   uint64    `json:"seq"`
	Time  time.Time `json:"time"`
	Level string    `json:"level"`
	Text  string    `json:"text"`
}

// Events keeps the newest lines in memory: what happened here since the process started. It is safe for
// concurrent use.
type Events struct {
	mu   sync.Mutex // guards the rest
	ring []Event
	next uint64 // sequence number of the next event, from 1
}

// NewEvents keeps n events.
func NewEvents(n int) *Events { return &Events{ring: make([]Event, n), next: 1} }

// Add appends an event.
func (e *Events) Add(t time.Time, level, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ring[e.next%uint64(len(e.ring))] = Event{e.next, t, level, text}
	e.next++
}

// Since returns at most limit events from sequence number since on, oldest first, and the number to ask for next.
func (e *Events) Since(since uint64, limit int) ([]Event, uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	since = max(since, 1)
	if n := uint64(len(e.ring)); e.next > n {
		since = max(since, e.next-n)
	}
	list := []Event{}
	for ; since < e.next && len(list) < limit; since++ {
		list = append(list, e.ring[since%uint64(len(e.ring))])
	}
	return list, max(since, 1)
}

// Handler returns a slog.Handler that passes records to next and keeps those of level info and above.
func (e *Events) Handler(next slog.Handler) slog.Handler { return &tee{next: next, events: e} }

type tee struct {
	next   slog.Handler
	events *Events
	attrs  string
}

func (t *tee) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelInfo || t.next.Enabled(ctx, l)
}

func (t *tee) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		var b strings.Builder
		b.WriteString(r.Message)
		b.WriteString(t.attrs)
		r.Attrs(func(a slog.Attr) bool {
			b.WriteString(" " + a.String())
			return true
		})
		t.events.Add(r.Time, strings.ToLower(r.Level.String()), b.String())
	}
	if !t.next.Enabled(ctx, r.Level) {
		return nil
	}
	return t.next.Handle(ctx, r)
}

func (t *tee) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *t
	n.next = t.next.WithAttrs(attrs)
	for _, a := range attrs {
		n.attrs += " " + a.String()
	}
	return &n
}

func (t *tee) WithGroup(name string) slog.Handler {
	n := *t
	n.next = t.next.WithGroup(name)
	return &n
}
