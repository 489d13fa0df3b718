package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"sync/atomic"

	"github.com/ledge-storage/ledge/target"
)

// SANITIZE (SBC-3 4.11, 5.24), for units whose UnitOptions allow it; to all others the operation code
// is unknown. BLOCK ERASE unmaps every block of a thin unit and zeroes those of another;
// OVERWRITE stores its pattern in every block, as often as it says. CRYPTOGRAPHIC ERASE has a device that
// is a target.Eraser forget its key; of others that service action is unknown. FORMAT UNIT (format.go) is
// the same machine.
//
//	         SANITIZE                     last block stored, flushed
//	idle ───────────────► in progress ──────────────────────────────────► idle
//	 ▲                       ▲    │ the device failed
//	 │ EXIT FAILURE MODE,    │    ▼
//	 └──(AUSE was set)────── failed
//	                         SANITIZE again ─► in progress
//
// In progress, all commands but those that describe the unit get NOT READY, SANITIZE IN PROGRESS,
// with the progress; failed, they get MEDIUM ERROR, SANITIZE COMMAND FAILED. The operation has a
// goroutine of its own, because neither the end of its command (IMMED), nor task management,
// nor the end of its session ends it; Detach does, and waits for it. It begins when no
// command that was accepted before it runs any more, those of EXTENDED COPY on other units
// included, so that nothing is stored behind its back.
//
// What it promises is what a host can see: that no read returns what was there. Copies on
// members, in logs and caches are the device's business. The state is not kept through a restart.
//
// Parameter list of OVERWRITE:
//
//	offset size
//	0      1    bit 7 INVERT, bits 6..5 TEST, bits 4..0 OVERWRITE COUNT
//	1      1    reserved
//	2      2    length of the pattern
//	4           the pattern, repeated to fill a block
const (
	sanitizeOverwrite   = 0x01
	sanitizeBlockErase  = 0x02
	sanitizeCryptoErase = 0x03
	sanitizeExitFailure = 0x1F

	sanitizeCode       = 0x48
	sanitizeListHeader = 4

	// The most that is asked of the device at once: progress is told in these steps.
	eraseStepBytes     = 1 << 30
	overwriteStepBytes = 16 << 20
)

// sanitize is one operation. It is in unit.sanitizing from its beginning until it succeeds or
// its failure is left behind.
type sanitize struct {
	unit *unit
	// passes holds the block that each pass stores; a nil block is erased.
	passes [][]byte
	// eraser, where not nil, forgets its key instead.
	eraser target.Eraser
	// format says that it is FORMAT UNIT.
	format bool
	// exitable is AUSE: EXIT FAILURE MODE may end a failure.
	exitable bool

	progress atomic.Uint32 // of 65536
	failed   atomic.Bool
	cancel   context.CancelFunc
	done     chan struct{}
}

// sanitizeError is what a command gets while the unit is sanitized, or after that failed.
func (u *unit) sanitizeError(o *op) error {
	s := u.sanitizing.Load()
	if s == nil || o.flags&(opAnyHolder|opStandby) == opAnyHolder|opStandby {
		return nil
	}
	if s.failed.Load() && (o.code == sanitizeCode || s.format && o.code == formatCode) {
		return nil
	}
	return s.sense()
}

func (s *sanitize) sense() *sense {
	failed, running := ascSanitizeFailed, ascSanitizing
	if s.format {
		failed, running = ascMediumFormatCorrupted, ascFormatting
	}
	if s.failed.Load() {
		return &sense{key: keyMediumError, code: failed}
	}
	return &sense{key: keyNotReady, code: running, field: progress(s.progress.Load())}
}

func decodeSanitize(t *Task) error {
	n := t.be16(7)
	t.lba, t.blocks = 0, 0
	if t.CDB[1]&0x1F != sanitizeOverwrite {
		if n != 0 {
			return badCDB(7, 7)
		}
	} else if n <= sanitizeListHeader || n > sanitizeListHeader+uint64(t.info.BlockBytes) {
		return badCDB(7, 7)
	}
	t.OutTotal = int64(n)
	return t.checkWritable()
}

// overwrite is SANITIZE, OVERWRITE. Wrong fields of the list are answered INVALID FIELD IN CDB,
// as libiscsi's suite wants; SBC-3 leaves it open.
func overwrite(t *Task) error {
	list, err := t.list()
	if err != nil {
		return err
	}
	count, pattern := int(list[0]&0x1F), list[sanitizeListHeader:]
	if n := int(binary.BigEndian.Uint16(list[2:])); count == 0 || n == 0 || n != len(pattern) {
		return badCDB(7, 7)
	}
	size := int(t.info.BlockBytes)
	block := bytes.Repeat(pattern, (size+len(pattern)-1)/len(pattern))[:size]
	inverse := make([]byte, size)
	for i, c := range block {
		inverse[i] = ^c
	}
	passes := make([][]byte, count)
	for i := range passes {
		passes[i] = block
		if list[0]&0x80 != 0 && i%2 == 1 {
			passes[i] = inverse
		}
	}
	return t.sanitize(&sanitize{passes: passes})
}

// blockErase is SANITIZE, BLOCK ERASE.
func blockErase(t *Task) error { return t.sanitize(&sanitize{passes: [][]byte{nil}}) }

// cryptoErase is SANITIZE, CRYPTOGRAPHIC ERASE.
func cryptoErase(t *Task) error { return t.sanitize(&sanitize{eraser: t.unit.eraser}) }

// exitFailureMode is SANITIZE, EXIT FAILURE MODE: where nothing failed it does nothing.
func exitFailureMode(t *Task) error {
	u := t.unit
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.sanitizing.Load()
	if s == nil {
		return nil
	}
	if !s.failed.Load() || s.format {
		return s.sense()
	}
	if !s.exitable {
		return badCDB(1, 4)
	}
	u.sanitizing.Store(nil)
	return nil
}

// sanitize starts an operation and, unless IMMED is set, waits for its end.
func (t *Task) sanitize(s *sanitize) error {
	s.exitable = t.CDB[1]&0x20 != 0 // AUSE
	return t.startSanitize(s, t.CDB[1]&0x80 != 0)
}

func (t *Task) startSanitize(s *sanitize, immed bool) error {
	u := t.unit
	ctx, cancel := context.WithCancel(context.Background())
	s.unit, s.cancel, s.done = u, cancel, make(chan struct{})
	u.mu.Lock()
	var refused error
	if old := u.sanitizing.Load(); old != nil {
		if !old.failed.Load() {
			refused = old.sense()
		} else if s.exitable && !old.exitable && !old.format {
			refused = badCDB(1, 5) // a restricted failure is not made unrestricted
		}
	}
	if u.removed {
		refused = illegal(ascUnsupportedLUN)
	}
	if refused != nil {
		u.mu.Unlock()
		cancel()
		return refused
	}
	u.sanitizing.Store(s)
	for _, k := range u.tokens {
		k.leave(tokenRevoked)
	}
	u.tokens = nil
	u.mu.Unlock()
	go s.run(ctx)
	if immed {
		return nil
	}
	select {
	case <-s.done:
	case <-t.ctx.Done():
		return errAborted // the operation goes on
	}
	if !s.failed.Load() {
		return nil
	}
	if s.format {
		return &sense{key: keyMediumError, code: ascFormatFailed}
	}
	return s.sense()
}

func (s *sanitize) run(ctx context.Context) {
	defer close(s.done)
	defer s.cancel()
	u := s.unit
	u.mu.Lock()
	for u.atWork() {
		u.left.Wait()
	}
	u.mu.Unlock()
	err := s.store(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil {
		s.failed.Store(true)
		return
	}
	u.sanitizing.Store(nil)
}

// atWork says whether a command that touches blocks runs, on this unit or as a copy from or to
// it. unit.mu is held.
func (u *unit) atWork() bool {
	for t := u.first; t != nil; t = t.next {
		if t.state == taskRunning && t.op.flags&opMedium != 0 && t.op.flags&opWhole == 0 {
			return true
		}
	}
	return len(u.visits) > 0
}

// store carries the passes out.
func (s *sanitize) store(ctx context.Context) error {
	dev := s.unit.dev
	if s.eraser != nil {
		if err := s.eraser.EraseKey(ctx); err != nil {
			return err
		}
		return dev.Flush(ctx)
	}
	info := dev.Info()
	total, done := info.Blocks*uint64(len(s.passes)), uint64(0)
	for _, block := range s.passes {
		step := uint64(overwriteStepBytes) / uint64(info.BlockBytes)
		if block == nil {
			step = eraseStepBytes / uint64(info.BlockBytes)
		}
		for lba := uint64(0); lba < info.Blocks; lba += step {
			n := min(step, info.Blocks-lba)
			var err error
			if block == nil && info.Thin {
				err = dev.Unmap(ctx, []target.Range{{LBA: lba, Blocks: n}})
			} else {
				err = dev.WriteSame(ctx, lba, n, block)
			}
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return err
			}
			done += n
			s.progress.Store(uint32(float64(done) / float64(total) * 0xFFFF))
		}
		if err := dev.Flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

// endSanitize ends an operation in progress and waits for it.
func (u *unit) endSanitize() {
	if s := u.sanitizing.Load(); s != nil {
		s.cancel()
		<-s.done
	}
}
