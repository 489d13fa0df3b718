package sim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// poolRun is one seed's run in the pool world.
type poolRun struct {
	*base
	w *world
	m *model
	// err is why the world could not be made.
	err error
}

func newPoolRun(b *base) *poolRun {
	r := &poolRun{base: b, m: newModel()}
	r.w, r.err = newWorld(b.seed, b.o.Mutation, b.counts)
	if r.err == nil {
		r.w.sick, r.w.logger = newSick(), b.logger("")
	}
	return r
}

func (r *poolRun) close() {
	if r.w == nil {
		return
	}
	r.w.close()
	for _, c := range r.w.closed {
		for what, n := range map[string]int{"whole stripe": int(c.FullStripes), "partial stripe": int(c.PartialStripes), "stall for room": int(c.Stalls),
			"set replayed": int(c.Replayed), "update replayed": int(c.ReplayedUpdates), "overlay hit": int(c.OverlayHits)} {
			r.counts[what] += n
		}
	}
}

var poolEvents = []weighted{{"operate", 84}, {"lie", 8}, {"scrub", 2}, {"rebuild", 3}, {"revive", 1}, {"wake", 2}, {"grow", 1}}

// expand: three lives of some events, each with a cut armed at its begin and a restart at its end.
func (r *poolRun) expand(rng *rand.Rand) (events []event) {
	for range 3 {
		events = append(events, event{"cut"})
		for range 1 + rng.IntN(30) {
			events = append(events, event{pick(rng, poolEvents)})
		}
		events = append(events, event{"restart"})
	}
	return events
}

func (r *poolRun) do(ctx context.Context, e event) error {
	w := r.w
	if r.err != nil {
		return r.err
	}
	if w.pool == nil {
		if err := w.start(ctx, false); err != nil {
			return err
		}
	}
	if w.off.Load() && e.kind != "restart" {
		return nil
	}
	switch e.kind {
	case "operate":
		return r.operation(ctx)
	case "cut":
		w.cutIn(1 + r.rng.IntN(80))
	case "lie":
		kind, i := w.lie(r.rng)
		r.trace("lie: member %d: %s", i, kind)
	case "revive":
		w.revive()
	case "wake":
		w.wake()
	case "scrub":
		err := w.scrub(ctx)
		r.trace("scrub: %v", err)
		return r.outcome(err, nil, nil)
	case "rebuild":
		i, err := w.rebuild(ctx, func() error { return r.operation(ctx) })
		r.trace("rebuild of member %d: %v", i, err)
		if errors.Is(err, raid.ErrUnrecoverable) || errors.Is(err, raid.ErrBusy) {
			return nil // of a stripe that nothing maps; reads tell
		}
		return r.outcome(err, nil, nil)
	case "grow":
		err := w.grow(ctx, r.rng)
		r.trace("grow: %v", err)
		return r.outcome(err, nil, nil)
	case "restart":
		if err := r.restart(ctx); err != nil {
			return err
		}
		return r.checkAll(ctx)
	}
	return nil
}

// finish: once more from the members alone; and then with one member more broken than parity stands for.
func (r *poolRun) finish(ctx context.Context) error {
	if r.err != nil {
		return r.err
	}
	if r.w.pool == nil || r.w.off.Load() {
		if err := r.restart(ctx); err != nil {
			return err
		}
	}
	r.w.spare()
	r.w.wake()
	if err := r.w.pool.Drain(ctx); err != nil {
		return fmt.Errorf("%w: last drain: %w", errLoss, err)
	}
	if err := r.checkAll(ctx); err != nil {
		return fmt.Errorf("after the last drain: %w", err)
	}
	if r.rng.IntN(2) == 0 {
		if r.seed%4 == 1 {
			return r.giveUp(ctx)
		}
		return nil
	}
	if err := r.w.beyond(ctx, r.rng); err != nil {
		return err
	}
	return r.checkSome(ctx)
}

// giveUp: the power goes in the middle of some operations, and the log is lost with it. The pool opens from the members, and what is read is
// something that was written, or zeros, sector by sector; after a scrub that accepts what was being changed nothing answers with an error.
func (r *poolRun) giveUp(ctx context.Context) error {
	w := r.w
	if err := w.scrub(ctx); err != nil || len(w.sick.members) > 0 {
		return nil // drives that are sick as well are too many
	}
	w.cutIn(1 + r.rng.IntN(80))
	for range 40 {
		if w.off.Load() {
			break
		}
		if err := r.operation(ctx); err != nil {
			return err
		}
	}
	w.powerCut()
	w.powerOn()
	w.epoch, w.taking, w.acceptOld = w.epoch+1, false, true
	if err := nvram.Format(&region{w.regions[w.current], w}, w.area(), nvram.FormatOptions{ID: logID(w), Epoch: w.epoch, UpdateBytes: updateBytes}); err != nil {
		return err
	}
	if err := w.start(ctx, false); errors.Is(err, shelf.ErrMetadataLost) {
		w.count("log given up, and the pool does not open")
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: log given up: %w", errLoss, err)
	}
	w.count("log given up")
	for _, last := range []bool{false, true} {
		if last {
			rep, err := w.array.ScrubAll(ctx, raid.ScrubOptions{AcceptOld: true, Used: w.pool.Written})
			if err != nil || rep.Lost > 0 {
				return fmt.Errorf("%w: log given up: scrub %+v, %w", errLoss, rep, err)
			}
			w.counted("strip accepted as it was", int(rep.Repaired))
			w.counted("block lost with the log", int(rep.LostBlocks))
		}
		for _, l := range w.pool.LUNs() {
			info := l.Device().Info()
			buf := make([]byte, blockBytes)
			per := uint64(blockBytes) / uint64(info.BlockBytes)
			for b := range info.Blocks / per {
				if err := l.Device().Read(ctx, b*per, [][]byte{buf}); err != nil {
					if last && !errors.Is(err, raid.ErrUnrecoverable) {
						return fmt.Errorf("%w: log given up: LUN %d: block %d: %w", errLoss, l.ID(), b, err)
					}
					if !last {
						w.count("block unreadable, its log given up")
					}
					continue
				}
				for s := 0; s < blockBytes; s += 512 {
					if !whole(buf[s : s+512]) {
						return fmt.Errorf("%w: log given up: LUN %d: block %d holds what nobody wrote: %s", errLoss, l.ID(), b, describe(buf))
					}
				}
			}
		}
	}
	return nil
}

// whole tells whether a sector is of one content, or zeros: of the last one of a block the last 4 bytes are its checksum.
func whole(sector []byte) bool {
	for i := 16; i < len(sector)-16; i += 16 {
		if !bytes.Equal(sector[i:i+16], sector[:16]) {
			return false
		}
	}
	return bytes.Equal(sector[len(sector)-16:len(sector)-4], sector[:12])
}

// checkSome: each block is right, or cannot be read.
func (r *poolRun) checkSome(ctx context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(r.m.luns)) {
		m := r.m.luns[name]
		l, ok := r.w.pool.LUN(name)
		if !ok {
			return fmt.Errorf("%w: LUN %s is gone", errLoss, name)
		}
		buf := make([]byte, blockBytes)
		for _, b := range slices.Sorted(maps.Keys(m.content)) {
			if b%8 != 0 {
				continue
			}
			err := l.Device().Read(ctx, uint64(b*blockBytes/m.blockBytes), [][]byte{buf})
			if err != nil {
				r.w.count("error beyond parity")
				continue
			}
			if err := m.saw(b, buf); err != nil {
				return fmt.Errorf("%w: beyond parity: LUN %d: %w", errLoss, l.ID(), err)
			}
		}
	}
	return nil
}

// restart brings the pool up after a cut, cutting again while it does, and losing members.
func (r *poolRun) restart(ctx context.Context) error {
	w := r.w
	for again := 0; ; again++ {
		w.powerCut()
		if r.rng.IntN(3) == 0 {
			what, i := w.lose(r.rng)
			r.trace("restart: member %d: %s", i, what)
		}
		w.powerOn()
		cutAt := 0
		if again < 3 && r.rng.IntN(2) == 0 {
			cutAt = 1 + r.rng.IntN(30)
			w.cutIn(cutAt)
		}
		takeover := w.taking || r.rng.IntN(4) == 0
		err := w.start(ctx, takeover)
		r.trace("restart takeover=%v cutAt=%d: %v", takeover, cutAt, err)
		if err == nil && !w.off.Load() { // the last trim is nobody's failure
			w.spare()
			w.count("restart")
			return nil
		}
		if !w.off.Load() {
			return fmt.Errorf("%w: %w", errLoss, err)
		}
		w.count("cut in replay")
	}
}

// name picks a LUN that exists, or "".
func (r *poolRun) name() string {
	names := slices.Sorted(maps.Keys(r.m.luns))
	if len(names) == 0 {
		return ""
	}
	return names[r.rng.IntN(len(names))]
}

func (r *poolRun) operation(ctx context.Context) error {
	name := r.name()
	pick := r.rng.IntN(100)
	if name == "" {
		pick = 99
	}
	l, ok := r.w.pool.LUN(name)
	if name != "" && !ok {
		return fmt.Errorf("%w: LUN %s is gone", errLoss, name)
	}
	m := r.m.luns[name]
	switch {
	case pick < 50 && shelf.Kind(m.kind) == shelf.KindStore:
		return r.writeStore(ctx, l, m)
	case pick < 50:
		return r.write(ctx, l, m)
	case pick < 60:
		return r.unmap(ctx, l, m)
	case pick < 65:
		return r.writeSame(ctx, l, m)
	case pick < 70:
		return r.compareAndWrite(ctx, l, m)
	case pick < 82:
		return r.read(ctx, l, m, r.rng.IntN(m.blocks), 1+r.rng.IntN(80))
	case pick < 88:
		r.trace("drain")
		return r.outcome(r.w.pool.Drain(ctx), nil, nil)
	case pick < 90:
		return r.putHost(ctx)
	case pick < 92 && len(r.m.luns) > 1:
		return r.deleteLUN(ctx, name)
	case pick < 94:
		return r.resize(ctx, name, m)
	default:
		return r.createLUN(ctx)
	}
}

// outcome tells the model what became of an operation: done, of unknown outcome when the power went, or an error that
// nobody expected.
func (r *poolRun) outcome(err error, done, doubt func()) error {
	call := func(f func()) {
		if f != nil {
			f()
		}
	}
	switch {
	case err == nil:
		call(done)
	case r.w.off.Load():
		call(doubt)
	case errors.Is(err, target.ErrNoSpace):
		r.w.count("full pool")
		// Nothing of it was written: the model keeps what it has.
	default:
		return fmt.Errorf("%w: unexpected: %w", errLoss, err)
	}
	return nil
}

// content makes a block that no other write has, in every sector. It ends in its own CRC-32C, as a block of an ext4 directory does: a
// CRC-32C over it is the same whatever else is in it.
func (b *base) content(lba int) []byte {
	stamp := b.next()
	c := make([]byte, blockBytes)
	for i := 0; i < len(c); i += 16 {
		binary.BigEndian.PutUint64(c[i:], stamp)
		binary.BigEndian.PutUint64(c[i+8:], uint64(lba))
	}
	end := len(c) - 4
	binary.LittleEndian.PutUint32(c[end:], crc32.Checksum(c[:end], castagnoli))
	return c
}

// span picks a run of blocks: often hot, sometimes a whole stripe or more.
func (r *poolRun) span(m *modelLUN) (lo, n int) {
	unit := r.w.shape.data * raid.StripBlocks
	switch r.rng.IntN(5) {
	case 0:
		lo, n = r.rng.IntN(8), 1
	case 1:
		lo, n = r.rng.IntN(m.blocks), 1+r.rng.IntN(4)
	case 2:
		lo, n = r.rng.IntN(m.blocks)/unit*unit, unit
	case 3:
		lo, n = r.rng.IntN(m.blocks), 1+r.rng.IntN(40)
	case 4:
		lo, n = r.rng.IntN(m.blocks)/unit*unit, unit*(1+r.rng.IntN(2))
	}
	return lo, min(n, m.blocks-lo)
}

func (r *poolRun) write(ctx context.Context, l *shelf.LUN, m *modelLUN) error {
	lo, n := r.span(m)
	per := blockBytes / m.blockBytes
	var after [][]byte
	for i := range n {
		after = append(after, r.content(lo+i))
	}
	from, to := 0, n*per // logical blocks of the span
	if per > 1 && r.rng.IntN(3) == 0 {
		from = r.rng.IntN(per)
		to = (n-1)*per + from + 1 + r.rng.IntN(per-from)
	}
	src := bytesOf(after)[from*m.blockBytes : to*m.blockBytes]
	if head := from * m.blockBytes; head > 0 {
		copy(after[0][:head], m.at(lo)[:head])
	}
	if tail := to * m.blockBytes % blockBytes; tail > 0 {
		copy(after[n-1][tail:], m.at(lo + n - 1)[tail:])
	}
	err := l.Device().Write(ctx, uint64(lo*per+from), scatter(r.rng, src, m.blockBytes), r.rng.IntN(2) == 0)
	r.trace("write %d %d+%d (sectors %d-%d): %v", l.ID(), lo, n, from, to, err)
	r.w.count("write")
	return r.outcome(err, func() { m.setAll(lo, after) }, func() { m.doubtAll(lo, after) })
}

func (r *poolRun) writeStore(ctx context.Context, l *shelf.LUN, m *modelLUN) error {
	unit := r.w.shape.data * raid.StripBlocks
	lo, n := r.rng.IntN(m.blocks)/unit*unit, unit*(1+r.rng.IntN(2))
	if n = min(n, (m.blocks-lo)/unit*unit); n == 0 {
		return nil
	}
	var after [][]byte
	written, same := false, r.rng.IntN(3) == 0
	for i := range n {
		old := m.content[lo+i]
		written = written || old != nil
		if same && old != nil {
			after = append(after, old)
			continue
		}
		after = append(after, r.content(lo+i))
	}
	if len(m.maybe) > 0 {
		return nil // checkAll has not been: it is not known what was written
	}
	err := l.Device().Write(ctx, uint64(lo), [][]byte{bytesOf(after)}, false)
	r.trace("store %d %d+%d written=%v same=%v: %v", l.ID(), lo, n, written, same, err)
	r.w.count("write")
	switch {
	case written && !same && errors.Is(err, target.ErrOverwrite):
		return nil
	case written && !same && err == nil:
		return fmt.Errorf("%w: store LUN took an overwrite", errLoss)
	}
	return r.outcome(err, func() { m.setAll(lo, after) }, func() { m.doubtAll(lo, after) })
}

func (m *modelLUN) setAll(lo int, after [][]byte) {
	for i, b := range after {
		m.set(lo+i, b)
	}
}

func (m *modelLUN) doubtAll(lo int, after [][]byte) {
	for i, b := range after {
		m.doubt(lo+i, b)
	}
}

func bytesOf(blocks [][]byte) []byte {
	b := make([]byte, 0, len(blocks)*blockBytes)
	for _, x := range blocks {
		b = append(b, x...)
	}
	return b
}

// scatter cuts b into buffers at multiples of unit.
func scatter(rng *rand.Rand, b []byte, unit int) (bufs [][]byte) {
	for len(b) > 0 {
		n := len(b)
		if rng.IntN(2) == 0 {
			n = unit * (1 + rng.IntN(len(b)/unit))
		}
		bufs = append(bufs, b[:n])
		b = b[n:]
	}
	return bufs
}

func (r *poolRun) unmap(ctx context.Context, l *shelf.LUN, m *modelLUN) error {
	lo, n := r.span(m)
	per := blockBytes / m.blockBytes
	if shelf.Kind(m.kind) == shelf.KindStore || r.rng.IntN(2) == 0 {
		lo = lo / extentBlocks * extentBlocks
		n = min(extentBlocks*(1+r.rng.IntN(2)), m.blocks-lo)
	}
	from, to := lo*per, (lo+n)*per
	if per > 1 && r.rng.IntN(3) == 0 {
		from += r.rng.IntN(per)
		to -= r.rng.IntN(min(per, to-from))
	}
	after := m.zeroed(from, to)
	err := l.Device().Unmap(ctx, []target.Range{{LBA: uint64(from), Blocks: uint64(to - from)}})
	r.trace("unmap %d sectors %d-%d (%d+%d): %v", l.ID(), from, to, lo, n, err)
	r.w.count("unmap")
	return r.outcome(err, func() { m.putZeroed(after) }, func() {
		for _, b := range slices.Sorted(maps.Keys(after)) {
			m.doubt(b, after[b])
		}
	})
}

// zeroed is what blocks become when logical blocks [from, to) are zeros.
func (m *modelLUN) zeroed(from, to int) map[int][]byte {
	after := map[int][]byte{}
	per := blockBytes / m.blockBytes
	for b := from / per; b*per < to; b++ {
		c := slices.Clone(m.at(b))
		clear(c[max(0, from-b*per)*m.blockBytes : min(per, to-b*per)*m.blockBytes])
		after[b] = c
	}
	return after
}

func (m *modelLUN) putZeroed(after map[int][]byte) {
	for b, c := range after {
		m.set(b, c)
		if shelf.Kind(m.kind) == shelf.KindStore {
			delete(m.content, b)
		}
	}
}

func (r *poolRun) writeSame(ctx context.Context, l *shelf.LUN, m *modelLUN) error {
	if shelf.Kind(m.kind) == shelf.KindStore {
		return nil
	}
	lo, n := r.span(m)
	per := blockBytes / m.blockBytes
	block := r.content(lo)[:m.blockBytes]
	if r.rng.IntN(3) == 0 {
		block = nil
	}
	err := l.Device().WriteSame(ctx, uint64(lo*per), uint64(n*per), block)
	r.trace("write same %d %d+%d zero=%v: %v", l.ID(), lo, n, block == nil, err)
	var after [][]byte
	for range n {
		b := make([]byte, blockBytes)
		for i := 0; block != nil && i < len(b); i += len(block) {
			copy(b[i:], block)
		}
		after = append(after, b)
	}
	return r.outcome(err, func() { m.setAll(lo, after) }, func() { m.doubtAll(lo, after) })
}

func (r *poolRun) compareAndWrite(ctx context.Context, l *shelf.LUN, m *modelLUN) error {
	if shelf.Kind(m.kind) == shelf.KindStore {
		return nil
	}
	lo := r.rng.IntN(m.blocks)
	per := blockBytes / m.blockBytes
	after := r.content(lo)
	sector := r.rng.IntN(per) * m.blockBytes
	compare := slices.Clone(m.at(lo)[sector:][:m.blockBytes])
	full := slices.Clone(m.at(lo))
	copy(full[sector:], after[:m.blockBytes])
	miss := r.rng.IntN(3) == 0
	if miss {
		compare[100] ^= 1
	}
	err := l.Device().CompareAndWrite(ctx, uint64(lo*per+sector/m.blockBytes), compare, after[:m.blockBytes])
	r.trace("compare and write %d %d: %v", l.ID(), lo, err)
	var mis *target.MiscompareError
	if miss && !r.w.off.Load() {
		if !errors.As(err, &mis) || mis.Offset != 100 {
			return fmt.Errorf("%w: compare and write of other data: %w", errLoss, err)
		}
		return nil
	}
	return r.outcome(err, func() { m.set(lo, full) }, func() {
		if !miss {
			m.doubt(lo, full)
		}
	})
}

func (r *poolRun) read(ctx context.Context, l *shelf.LUN, m *modelLUN, lo, n int) error {
	n = min(n, m.blocks-lo)
	b := make([]byte, n*blockBytes)
	per := blockBytes / m.blockBytes
	err := l.Device().Read(ctx, uint64(lo*per), scatter(r.rng, b, m.blockBytes))
	r.w.count("read")
	if err != nil {
		return r.outcome(err, nil, nil)
	}
	for i := range n {
		if err := m.saw(lo+i, b[i*blockBytes:][:blockBytes]); err != nil {
			return fmt.Errorf("%w: LUN %d: %w", errLoss, l.ID(), err)
		}
	}
	return nil
}

func (r *poolRun) createLUN(ctx context.Context) error {
	name := fmt.Sprintf("lun%d", r.next())
	kind := shelf.Kind(1 + r.rng.IntN(3))
	m := &modelLUN{kind: int(kind), blockBytes: blockBytes, blocks: extentBlocks * (1 + r.rng.IntN(5)), content: map[int][]byte{}, maybe: map[int][][]byte{}}
	if kind == shelf.KindPlain && r.rng.IntN(2) == 0 {
		m.blockBytes = 512
	}
	_, err := r.w.pool.CreateLUN(ctx, shelf.LUNSpec{Name: name, Kind: kind, Bytes: int64(m.blocks) * blockBytes, BlockBytes: uint32(m.blockBytes)})
	r.trace("create %s %s %d blocks: %v", name, kind, m.blocks, err)
	if errors.Is(err, shelf.ErrLimit) {
		return nil
	}
	return r.outcome(err, func() { r.m.luns[name] = m }, func() { m.blockBytes = -m.blockBytes; r.m.luns[name] = m })
}

func (r *poolRun) deleteLUN(ctx context.Context, name string) error {
	err := r.w.pool.DeleteLUN(ctx, name)
	r.trace("delete %s: %v", name, err)
	return r.outcome(err, func() { delete(r.m.luns, name) }, func() { m := r.m.luns[name]; m.blockBytes = -m.blockBytes })
}

func (r *poolRun) resize(ctx context.Context, name string, m *modelLUN) error {
	to := m.blocks + 64*r.rng.IntN(3)
	err := r.w.pool.ResizeLUN(ctx, name, int64(to)*blockBytes)
	r.trace("resize %s to %d: %v", name, to, err)
	return r.outcome(err, func() { m.blocks = to }, nil)
}

func (r *poolRun) putHost(ctx context.Context) error {
	name := fmt.Sprintf("host%d", r.rng.IntN(3))
	ini := fmt.Sprintf("iqn.2026-11.sim:%d", r.next())
	err := r.w.pool.PutHost(ctx, shelf.Host{Name: name, Initiator: ini, LUNs: []uint32{1, 2}})
	r.trace("host %s: %v", name, err)
	return r.outcome(err, func() { r.m.hosts[name] = ini }, func() { delete(r.m.hosts, name) })
}

// checkAll compares everything that can be read with the model, and settles what was in doubt.
func (r *poolRun) checkAll(ctx context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(r.m.luns)) {
		m := r.m.luns[name]
		l, ok := r.w.pool.LUN(name)
		if m.blockBytes < 0 { // created or deleted when the power went
			if !ok {
				delete(r.m.luns, name)
				continue
			}
			m.blockBytes = -m.blockBytes
		}
		if !ok {
			return fmt.Errorf("%w: LUN %s is gone", errLoss, name)
		}
		blocks := int(l.Info().SizeBytes / blockBytes)
		if blocks < m.blocks || blocks > m.blocks+128 {
			return fmt.Errorf("%w: LUN %s has %d blocks, want %d", errLoss, name, blocks, m.blocks)
		}
		m.blocks = blocks
		for _, run := range m.runs(r.rng) {
			if err := r.read(ctx, l, m, run[0], run[1]); err != nil {
				return err
			}
		}
	}
	if n := len(r.w.pool.LUNs()); n != len(r.m.luns) {
		return fmt.Errorf("%w: %d LUNs, want %d", errLoss, n, len(r.m.luns))
	}
	hosts := map[string]string{}
	for _, h := range r.w.pool.Hosts() {
		hosts[h.Name] = h.Initiator
	}
	for name, ini := range r.m.hosts {
		if hosts[name] != ini {
			return fmt.Errorf("%w: host %s has initiator %q, want %q", errLoss, name, hosts[name], ini)
		}
	}
	return nil
}
