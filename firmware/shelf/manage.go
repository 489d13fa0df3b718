package shelf

import (
	"context"
	"fmt"
)

// What an operator asks beside making and deleting LUNs.

// defaultWarnPercent of a pool may be allocated before initiators are warned that space runs out.
const defaultWarnPercent = 90

func (s *superblock) warnPercent() int {
	if s.WarnPercent == 0 {
		return defaultWarnPercent
	}
	return s.WarnPercent
}

// WarnPercent of the pool may be allocated before initiators are warned (SBC-3 4.7.3.7, the soft threshold).
func (p *Pool) WarnPercent() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sb.warnPercent()
}

// SetWarnPercent changes it, durably: 1 to 100, which warns of nothing. ErrSize.
func (p *Pool) SetWarnPercent(ctx context.Context, percent int) error {
	if percent < 1 || percent > 100 {
		return fmt.Errorf("shelf: warning at %d %%: %w: 1 to 100", percent, ErrSize)
	}
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	p.mu.Lock()
	next := p.sb
	p.mu.Unlock()
	next.WarnPercent = percent
	if err := p.logBlock(ctx, 0, next.encode(), func() { p.sb.WarnPercent = percent }); err != nil {
		return fmt.Errorf("shelf: warning at %d %%: %w", percent, err)
	}
	return nil
}

// Deleting returns the LUNs whose extents are being freed in the background; their names may be used again.
func (p *Pool) Deleting() []LUNInfo {
	var out []LUNInfo
	for _, l := range p.condemned() {
		out = append(out, l.Info())
	}
	return out
}

// RenameLUN gives a LUN another name, durably. Initiators know it by number and UUID and notice nothing. ErrNotFound,
// ErrExists, ErrName.
func (p *Pool) RenameLUN(ctx context.Context, name, to string) error {
	if err := checkName(to, maxName); err != nil {
		return fmt.Errorf("shelf: rename LUN %s: %w", name, err)
	}
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	l, ok := p.LUN(name)
	if !ok {
		return fmt.Errorf("shelf: rename LUN %s: %w", name, ErrNotFound)
	}
	if name == to {
		return nil
	}
	if _, taken := p.LUN(to); taken {
		return fmt.Errorf("shelf: rename LUN %s to %s: %w", name, to, ErrExists)
	}
	r := l.record()
	r.Name = to
	if err := p.logBlock(ctx, r.ID, r.encode(), func() { l.rec = r }); err != nil {
		return fmt.Errorf("shelf: rename LUN %s: %w", name, err)
	}
	return nil
}
