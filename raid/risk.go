package raid

import (
	"sync"

	"github.com/ledge-storage/ledge/raid/layout"
)

// How much redundancy is left, by arithmetic. What a stripe has lost depends on its place in the layout's cycle, and on
// whether the rebuild and the restore have done it. The latter changes only at a few stripes: where the progress stands,
// and where each urgent pass stands. Between two such stripes one rule holds, and counting is a difference of prefix sums
// over the cycle, kept for every group of groups that one base permutation serves.

// riskTables bounds the tables kept: one for each rule in force, a handful; more are forgotten.
const riskTables = 16

// riskRule is all that what a stripe has lost depends on, but for the stripe.
type riskRule struct {
	at                *layout.Layout
	online, restoring uint64
	spareOf           [8]uint8
	rebuildMember     int
	rebuildSpare      int
	rebuilt, restored rule
}

// rule says which stripes of a range are done: all of them, or those of some urgent passes.
type rule struct {
	all    bool
	passes [maxPasses]Pass // Progress zero: it is the range's affair
}

// riskTable are the prefix sums of one rule: sums[i] counts the stripes of the first i steps of a cycle by what they
// have lost.
type riskTable struct {
	step uint64
	sums [][]uint64
}

type riskCache struct {
	mu     sync.Mutex
	tables map[riskRule]*riskTable
}

// AtRisk counts all stripes of the array by what they have lost now, exactly, by arithmetic; it costs some tens of
// milliseconds after a member changed, and microseconds else. Stripes of the batch at work count as not yet done.
func (a *Array) AtRisk() Risk {
	l := a.Label()
	total := a.Geometry().Stripes
	base := riskRule{spareOf: l.SpareOf, rebuildMember: l.RebuildMember, rebuildSpare: l.RebuildSpare}
	a.mu.Lock()
	for _, m := range a.members {
		switch m.state {
		case Online:
			base.online |= 1 << m.index
		case Restoring:
			base.restoring |= 1 << m.index
		}
	}
	a.mu.Unlock()
	r := Risk{Lost: make([]uint64, a.layout.Parity()+1)}
	for from := uint64(0); from < total; {
		rule, to := base, total
		a.mu.Lock()
		rule.at = a.layoutOf(from)
		a.mu.Unlock()
		switch {
		case from < l.GrowDone:
			to = min(to, l.GrowDone)
		case from < l.GrowStaged:
			r.add(a.absentOf(from), 1)
			from++
			continue
		}
		rule.rebuilt, to = ruleAt(&l, false, from, to)
		rule.restored, to = ruleAt(&l, true, from, to)
		for lost, n := range a.riskBetween(rule, from, to) {
			r.add(lost, n)
		}
		from = to
	}
	return r
}

func (r *Risk) add(lost int, stripes uint64) {
	if lost < len(r.Lost) {
		r.Lost[lost] += stripes
	} else {
		r.Beyond += stripes
	}
}

// absentOf counts the strips of a stripe that have no place.
func (a *Array) absentOf(stripe uint64) (n int) {
	for _, p := range a.places(stripe) {
		if p.member == nil {
			n++
		}
	}
	return n
}

// ruleAt returns what is done from a stripe on, and where that changes, at most to.
func ruleAt(l *Label, restore bool, from, to uint64) (rule, uint64) {
	var r rule
	if restore && l.Restore.Member() < 0 || !restore && l.RebuildMember < 0 {
		return r, to
	}
	progress, passes := l.jobProgress(restore)
	if from < progress {
		return rule{all: true}, min(to, progress)
	}
	for i, p := range passes {
		if from < p.Progress {
			to = min(to, p.Progress)
			p.Progress = 0
			r.passes[i] = p
		}
	}
	return r, to
}

// riskBetween counts the stripes of a range by what they have lost.
func (a *Array) riskBetween(rule riskRule, from, to uint64) []uint64 {
	a.risk.mu.Lock()
	defer a.risk.mu.Unlock()
	t := a.risk.tables[rule]
	if t == nil {
		if a.risk.tables == nil || len(a.risk.tables) >= riskTables {
			a.risk.tables = make(map[riskRule]*riskTable)
		}
		t = a.newRiskTable(rule)
		a.risk.tables[rule] = t
	}
	out, before := a.riskBelow(rule, t, to), a.riskBelow(rule, t, from)
	for i := range out {
		out[i] -= before[i]
	}
	return out
}

func (a *Array) newRiskTable(rule riskRule) *riskTable {
	const steps = 256
	cycle := rule.at.CycleStripes()
	t := &riskTable{step: (cycle + steps - 1) / steps}
	sum := make([]uint64, rule.at.Width()+1)
	for stripe := range cycle {
		if stripe%t.step == 0 {
			t.sums = append(t.sums, append([]uint64(nil), sum...))
		}
		sum[a.lostUnder(rule, stripe)]++
	}
	t.sums = append(t.sums, sum)
	return t
}

// riskBelow counts the stripes below one.
func (a *Array) riskBelow(rule riskRule, t *riskTable, stripe uint64) []uint64 {
	cycle := rule.at.CycleStripes()
	cycles, rest := stripe/cycle, stripe%cycle
	whole := t.sums[len(t.sums)-1]
	out := append([]uint64(nil), t.sums[rest/t.step]...)
	for i := range out {
		out[i] += cycles * whole[i]
	}
	for s := rest / t.step * t.step; s < rest; s++ {
		out[a.lostUnder(rule, s)]++
	}
	return out
}

// lostUnder counts the strips of a stripe that have no place. It is locate, for a rule.
func (a *Array) lostUnder(rule riskRule, stripe uint64) int {
	rebuilt, restored := doneUnder(rule.at, &rule.rebuilt, stripe), doneUnder(rule.at, &rule.restored, stripe)
	there := rule.online
	if restored {
		there |= rule.restoring
	}
	lost := 0
	for i := range rule.at.Width() {
		index, slot := rule.at.Strip(stripe, i)
		for hop := 0; there>>index&1 == 0; hop++ {
			spare := bytesIndex(rule.spareOf, index)
			if spare < 0 && rebuilt && rule.rebuildMember == index {
				spare = rule.rebuildSpare
			}
			if spare < 0 || hop > rule.at.Spares() {
				lost++
				break
			}
			index = rule.at.Spare(slot, spare)
		}
	}
	return lost
}

func doneUnder(at *layout.Layout, r *rule, stripe uint64) bool {
	if r.all {
		return true
	}
	for i := range r.passes {
		if p := &r.passes[i]; p.Lost > 0 && lostBy(at, stripe, p.Failed, p.SpareOf) >= p.Lost {
			return true
		}
	}
	return false
}
