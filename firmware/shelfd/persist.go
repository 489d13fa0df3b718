package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// PERSISTENT RESERVE on the standby's paths. The standby sends the command over the mirror link to the owner, which
// carries it out for the initiator port on the standby's port, and sends back the answer (target/scsi/remote.go says why).
// The messages, JSON:
//
//	shelf.persist    {id, command}   scsi.PersistCommand
//	shelf.persisted  {id, answer}    scsi.PersistAnswer; none: not the owner
//
// A message may be lost, as a connection may: the initiator gets NOT READY, ASYMMETRIC ACCESS STATE TRANSITION then,
// does not know what became of its command, and asks. A controller that owns the pool no more, without knowing it
// yet, changes nothing and tells nothing (slot.Save, slot.Current).

const (
	msgPersist   = "shelf.persist"
	msgPersisted = "shelf.persisted"

	// persistWait bounds the wait for the owner.
	persistWait = 5 * time.Second
	// maxPersist bounds the commands that are on their way to the owner, and those that it works on.
	maxPersist = 64
)

type persistMessage struct {
	ID      uint64               `json:"id"`
	Command *scsi.PersistCommand `json:"command,omitempty"`
	Answer  *scsi.PersistAnswer  `json:"answer,omitempty"`
}

// persist is both sides of it.
type persist struct {
	t    *scsi.Target
	send func(ctx context.Context, kind string, body []byte) error
	// owner says whether this controller owns the pool now.
	owner func() bool
	log   *slog.Logger

	ctx    context.Context // ends with the link
	turn   chan struct{}   // of the commands that the owner works on
	serves sync.WaitGroup

	mu      sync.Mutex
	waiting map[uint64]chan *scsi.PersistAnswer // each takes one answer
}

func newPersist(ctx context.Context, t *scsi.Target, send func(context.Context, string, []byte) error, owner func() bool, log *slog.Logger) *persist {
	return &persist{t: t, send: send, owner: owner, log: log, ctx: ctx, turn: make(chan struct{}, maxPersist), waiting: map[uint64]chan *scsi.PersistAnswer{}}
}

// wait returns when nothing runs any more; ctx has ended.
func (p *persist) wait() { p.serves.Wait() }

// forward is the standby's side.
func (p *persist) forward(ctx context.Context, c scsi.PersistCommand) (scsi.PersistAnswer, error) {
	var random [8]byte
	rand.Read(random[:]) // of another run no answer is taken
	id, answer := binary.LittleEndian.Uint64(random[:]), make(chan *scsi.PersistAnswer, 1)
	p.mu.Lock()
	if len(p.waiting) >= maxPersist {
		p.mu.Unlock()
		return scsi.PersistAnswer{}, target.ErrBusy
	}
	p.waiting[id] = answer
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, id)
		p.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(ctx, persistWait)
	defer cancel()
	body, err := json.Marshal(persistMessage{ID: id, Command: &c})
	if err == nil {
		err = p.send(ctx, msgPersist, body)
	}
	if err != nil {
		return scsi.PersistAnswer{}, fmt.Errorf("%w: %w", target.ErrStandby, err)
	}
	select {
	case a := <-answer:
		if a == nil {
			return scsi.PersistAnswer{}, target.ErrTransition
		}
		return *a, nil
	case <-ctx.Done():
	case <-p.ctx.Done():
	}
	return scsi.PersistAnswer{}, target.ErrTransition
}

// take is what the link's control messages are given to; it never waits.
func (p *persist) take(kind string, body []byte) {
	var m persistMessage
	if err := json.Unmarshal(body, &m); err != nil {
		p.log.Error("the partner's message cannot be read", "kind", kind, "err", err)
		return
	}
	if kind == msgPersisted {
		p.mu.Lock()
		answer := p.waiting[m.ID]
		delete(p.waiting, m.ID)
		p.mu.Unlock()
		if answer != nil {
			answer <- m.Answer
		}
		return
	}
	select {
	case p.turn <- struct{}{}:
	default:
		return // the partner's bound is the same: answers were lost, and it has given up
	}
	p.serves.Go(func() {
		defer func() { <-p.turn }()
		p.serve(m)
	})
}

// serve is the owner's side.
func (p *persist) serve(m persistMessage) {
	ctx, cancel := context.WithTimeout(p.ctx, persistWait)
	defer cancel()
	reply := persistMessage{ID: m.ID}
	if m.Command != nil && p.owner() {
		a := p.t.Persist(ctx, *m.Command)
		reply.Answer = &a
	}
	body, err := json.Marshal(reply)
	if err == nil {
		err = p.send(ctx, msgPersisted, body)
	}
	if err != nil {
		p.log.Debug("answer to the partner", "err", err)
	}
}
