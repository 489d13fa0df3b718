package shelf

import (
	"context"
	"fmt"
	"slices"
)

// Host is a server that uses the shelf: who it is, and which LUNs it may see.
type Host struct {
	Name, Initiator string
	LUNs            []uint32
}

// Hosts returns the registered hosts in the order of their records.
func (p *Pool) Hosts() []Host {
	p.mu.Lock()
	defer p.mu.Unlock()
	var hs []Host
	for _, h := range p.hosts {
		if h.Name != "" {
			h.LUNs = slices.Clone(h.LUNs)
			hs = append(hs, h)
		}
	}
	return hs
}

// PutHost registers a host, or replaces the registration of that name, durably. ErrName, ErrLimit; ErrExists
// when another host has the initiator name.
func (p *Pool) PutHost(ctx context.Context, h Host) error {
	if err := checkName(h.Name, maxName); err != nil {
		return fmt.Errorf("shelf: put host: %w", err)
	}
	if err := checkName(h.Initiator, maxInitiator); err != nil {
		return fmt.Errorf("shelf: put host %s: initiator: %w", h.Name, err)
	}
	if len(h.LUNs) > maxHostLUNs {
		return fmt.Errorf("shelf: put host %s: %d LUNs: %w", h.Name, len(h.LUNs), ErrLimit)
	}
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	h.LUNs = slices.Clone(h.LUNs)
	p.mu.Lock()
	at, empty := -1, -1
	for i := range p.hosts {
		switch x := &p.hosts[i]; {
		case x.Name == h.Name:
			at = i
		case x.Name == "" && empty < 0:
			empty = i
		case x.Name != "" && x.Initiator == h.Initiator:
			p.mu.Unlock()
			return fmt.Errorf("shelf: put host %s: initiator %s belongs to host %s: %w", h.Name, h.Initiator, x.Name, ErrExists)
		}
	}
	p.mu.Unlock()
	if at < 0 {
		at = empty
	}
	if at < 0 {
		return fmt.Errorf("shelf: put host %s: %w", h.Name, ErrLimit)
	}
	block := p.sb.hostBlock() + uint32(at)
	if err := p.logBlock(ctx, block, encodeHost(h, block), func() { p.hosts[at] = h }); err != nil {
		return fmt.Errorf("shelf: put host %s: %w", h.Name, err)
	}
	return nil
}

// DeleteHost forgets a host; its LUNs stay. ErrNotFound.
func (p *Pool) DeleteHost(ctx context.Context, name string) error {
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	p.mu.Lock()
	at := slices.IndexFunc(p.hosts, func(h Host) bool { return name != "" && h.Name == name })
	p.mu.Unlock()
	if at < 0 {
		return fmt.Errorf("shelf: delete host %s: %w", name, ErrNotFound)
	}
	block := p.sb.hostBlock() + uint32(at)
	return p.logBlock(ctx, block, zeroBlock, func() { p.hosts[at] = Host{} })
}
