package iscsi

import (
	"cmp"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/ledge-storage/ledge/target/scsi"
)

// A connection's answers.
//
// Whoever has an answer appends it to the batch that is being filled, under sendQueue.mu, and so
// takes its StatSN. Whoever then finds nobody writing becomes the writer: it takes the batch, puts
// an empty one in its place and writes with one writev, again and again until nothing is left.
// Others never wait for the socket, unless more than sendLimit is queued. The reader flushes only
// when it is about to wait for the initiator, so that the answers of all commands that came in one
// read leave in one write.
//
// Rejected: a writer goroutine for each connection. It costs two switches a command at queue
// depth 1, which is half of such a command's time.
const (
	// sendLimit is how many bytes may be queued before those who add wait.
	sendLimit = 1 << 20
	// sendSoon is how many bytes the reader lets gather before it writes them. (At half of it large
	// reads are a quarter slower: the socket is written to, and its reader woken, twice as often.)
	sendSoon = 512 << 10
	// arenaBytes is the size of the memory for headers in a batch.
	arenaBytes = 4 << 10
)

var errClosed = errors.New("iscsi: connection is closed")

type sendQueue struct {
	conn    net.Conn
	raw     syscall.RawConn // nil: net.Buffers.WriteTo
	timeout time.Duration

	// Of the batch that is being written; they belong to the writer.
	iov     []syscall.Iovec
	patient bool // attempt asks to be called again when the socket has room
	failure error
	attempt func(fd uintptr) bool

	mu      sync.Mutex
	space   *sync.Cond
	filling *batch
	spare   *batch
	writing bool
	err     error
	queued  int // bytes in filling and in the batch on its way
	statSN  uint32
	scratch header    // of the PDU being queued; one on the stack would escape
	whole   [1][]byte // of the buffer being queued, likewise
}

// batch is what one writev takes.
type batch struct {
	arena   []byte // headers, digests, padding, small data
	store   [][]byte
	buffers []*scsi.Buffer
	tail    bool // the last element of vec is the end of arena and may grow
	bytes   int
}

func newSendQueue(c net.Conn, timeout time.Duration) *sendQueue {
	q := &sendQueue{conn: c, timeout: timeout, filling: &batch{}, spare: &batch{}, statSN: 1}
	q.space = sync.NewCond(&q.mu)
	q.raw, q.attempt = rawConn(c), q.writeSome
	return q
}

// small appends a copy of p.
func (b *batch) small(p []byte) {
	if len(b.arena)+len(p) > cap(b.arena) {
		b.arena = make([]byte, 0, max(arenaBytes, len(p)))
		b.tail = false
	}
	start := len(b.arena)
	b.arena = append(b.arena, p...)
	if b.tail {
		last := &b.store[len(b.store)-1]
		*last = b.arena[start-len(*last):]
	} else {
		b.store = append(b.store, b.arena[start:])
		b.tail = true
	}
	b.bytes += len(p)
}

// large appends p itself, which must stay as it is until the batch is written.
func (b *batch) large(p []byte) {
	if len(p) == 0 {
		return
	}
	b.store = append(b.store, p)
	b.tail = false
	b.bytes += len(p)
}

func (b *batch) reset() {
	for i, x := range b.buffers {
		x.Release()
		b.buffers[i] = nil
	}
	b.buffers = b.buffers[:0]
	clear(b.store)
	b.store = b.store[:0]
	if cap(b.arena) > 16*arenaBytes {
		b.arena = nil
	}
	b.arena = b.arena[:0]
	b.tail = false
	b.bytes = 0
}

// room waits until less than sendLimit is queued. The lock is held.
func (q *sendQueue) room() {
	for q.queued >= sendLimit && q.err == nil {
		if q.writing {
			q.space.Wait()
			continue
		}
		q.write()
	}
}

// flush writes what is queued, unless somebody does.
func (q *sendQueue) flush() {
	q.mu.Lock()
	if !q.writing {
		q.write()
	}
	q.mu.Unlock()
}

// write makes the caller the writer. The lock is held, and dropped while the socket is busy.
func (q *sendQueue) write() {
	if len(q.filling.store) == 0 {
		return
	}
	q.writing = true
	for len(q.filling.store) > 0 {
		b := q.filling
		q.filling, q.spare = q.spare, nil
		if q.err == nil {
			q.mu.Unlock()
			err := q.transmit(b)
			q.mu.Lock()
			if err != nil && q.err == nil {
				q.err = err
				if errors.Is(err, os.ErrDeadlineExceeded) {
					q.err = errors.New("iscsi: the initiator takes no data")
				}
				q.conn.Close()
			}
		}
		q.queued -= b.bytes
		b.reset()
		q.spare = b
		q.space.Broadcast()
	}
	q.writing = false
	q.space.Broadcast()
}

// transmit writes a batch. The caller is the writer. The deadline is set only where the socket has no
// room, which is when time counts, and anew for each piece that it takes.
func (q *sendQueue) transmit(b *batch) error {
	if q.raw == nil {
		q.conn.SetWriteDeadline(time.Now().Add(q.timeout))
		v := net.Buffers(slices.Clone(b.store))
		_, err := v.WriteTo(q.conn)
		return err
	}
	for _, p := range b.store {
		q.iov = append(q.iov, iovec(p))
	}
	all := q.iov
	q.patient, q.failure = false, nil
	err := q.raw.Write(q.attempt)
	for err == nil && q.failure == nil && len(q.iov) > 0 {
		q.patient = true
		q.conn.SetWriteDeadline(time.Now().Add(q.timeout))
		err = q.raw.Write(q.attempt)
	}
	if q.patient {
		q.conn.SetWriteDeadline(time.Time{})
	}
	clear(all)
	q.iov = all[:0]
	if cap(all) > maxIovecs {
		q.iov = nil
	}
	return cmp.Or(err, q.failure)
}

// writeSome is the body of a RawConn.Write: it writes what the socket takes. Patient, it asks to be
// called again when there is room, and returns after each piece that went.
func (q *sendQueue) writeSome(fd uintptr) bool {
	for len(q.iov) > 0 {
		n, ready, err := vectored(syscall.SYS_WRITEV, fd, q.iov[:min(len(q.iov), maxIovecs)])
		if err != nil {
			q.failure = err
			return true
		}
		if !ready {
			return !q.patient
		}
		q.consume(n)
		if q.patient {
			return true
		}
	}
	return true
}

// consume takes n written bytes off iov.
func (q *sendQueue) consume(n int) {
	for n > 0 {
		v := &q.iov[0]
		if k := int(v.Len); n >= k {
			n -= k
			q.iov = q.iov[1:]
			continue
		}
		v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
		v.SetLen(int(v.Len) - n)
		return
	}
	for len(q.iov) > 0 && q.iov[0].Len == 0 {
		q.iov = q.iov[1:]
	}
}

// fail ends the queue: what is queued or comes is dropped.
func (q *sendQueue) fail(err error) {
	q.mu.Lock()
	if q.err == nil {
		q.err = err
	}
	q.space.Broadcast()
	if !q.writing {
		q.write()
	}
	q.mu.Unlock()
}

// drain waits until the writer, if there is one, has ended.
func (q *sendQueue) drain() {
	q.mu.Lock()
	for q.writing {
		q.space.Wait()
	}
	q.mu.Unlock()
}

// small queues a copy of p. The lock is held.
func (q *sendQueue) small(p []byte) {
	q.filling.small(p)
	q.queued += len(p)
}

// large queues p itself; with the batch written, the buffer it is part of may be released by
// release. The lock is held.
func (q *sendQueue) large(p []byte) {
	q.filling.large(p)
	q.queued += len(p)
}

// release has b released when the batch being filled has been written. The lock is held.
func (q *sendQueue) release(b *scsi.Buffer) {
	q.filling.buffers = append(q.filling.buffers, b)
}
