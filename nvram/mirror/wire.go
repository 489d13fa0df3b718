package mirror

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/ledge-storage/ledge/nvram"
)

const (
	wireMagic    = "LMR1"
	wireVersion  = 1
	headerBytes  = 24
	frameHead    = 16
	positionSize = 24

	maxHello   = 512
	maxControl = 1<<20 + 256
	maxFrame   = 16<<20 + frameHead
	maxSmall   = 512

	offerBytes = 16 + 8 + 8 + 8 + 16 + 8 + 1
	startBytes = 16 + 8 + 8 + 8 + 16 + 2*positionSize + 1 + 8 + 2*positionSize
)

type messageType uint8

const (
	msgHello messageType = 1 + iota
	msgProof
	msgHeartbeat
	msgControl
	msgOffer
	msgStart
	msgReady
	msgFrame
	msgTrim
	msgComplete
	msgAck
	msgCompleted
	msgRefuse
	msgTypes
)

// limits is the longest payload of each type, exact where both agree.
var limits = [msgTypes]struct{ least, most uint32 }{
	msgHello:     {49, maxHello},
	msgProof:     {32, 32},
	msgHeartbeat: {0, 0},
	msgControl:   {1, maxControl},
	msgOffer:     {offerBytes, offerBytes},
	msgStart:     {startBytes, startBytes},
	msgReady:     {0, 0},
	msgFrame:     {frameHead + nvram.BlockBytes, maxFrame},
	msgTrim:      {2 * positionSize, 2 * positionSize},
	msgComplete:  {8, 8},
	msgAck:       {8, 8},
	msgCompleted: {8, 8},
	msgRefuse:    {1, maxSmall},
}

var (
	// ErrProtocol: the peer sent what this protocol does not have, or out of turn.
	ErrProtocol = errors.New("mirror: protocol error")
	// ErrAuth: the peer is of another shelf, or does not know the secret.
	ErrAuth = errors.New("mirror: authentication failed")
	// ErrNotConnected: there is no connection to the partner.
	ErrNotConnected = errors.New("mirror: partner not connected")
	// ErrRefused: the partner ended the connection, and said why.
	ErrRefused = errors.New("mirror: refused by the partner")
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// putHeader fills h; payload is what the checksum covers of it, length all of it.
func putHeader(h []byte, t messageType, seq uint64, length int, payload []byte) {
	copy(h, wireMagic)
	h[4], h[5], h[6], h[7] = byte(t), 0, 0, 0
	le.PutUint64(h[8:], seq)
	le.PutUint32(h[16:], uint32(length))
	le.PutUint32(h[20:], crc32.Update(crc32.Update(0, castagnoli, h[:20]), castagnoli, payload))
}

// message is a received message. The payload of a Frame is in frame: lsn and off are decoded.
type message struct {
	kind     messageType
	payload  []byte
	lsn, off uint64
	frame    *nvram.Buffer
}

// decoder reads messages; only Hello and Proof before open is set.
type decoder struct {
	r    io.Reader
	seq  uint64
	open bool
	head [headerBytes + frameHead]byte
	// wait is called before each read that may take long: it sets the deadline.
	wait func()
}

// buffered is how many bytes of what comes next are here already.
func (d *decoder) buffered() int {
	if b, ok := d.r.(*bufio.Reader); ok {
		return b.Buffered()
	}
	return 0
}

func (d *decoder) next() (message, error) {
	h := d.head[:headerBytes]
	if d.wait != nil {
		d.wait()
	}
	if _, err := io.ReadFull(d.r, h); err != nil {
		return message{}, fmt.Errorf("mirror: read: %w", err)
	}
	d.seq++
	t, n := messageType(h[4]), le.Uint32(h[16:])
	switch {
	case string(h[:4]) != wireMagic:
		return message{}, fmt.Errorf("%w: magic %x", ErrProtocol, h[:4])
	case t == 0 || t >= msgTypes || h[5]|h[6]|h[7] != 0:
		return message{}, fmt.Errorf("%w: message type %d", ErrProtocol, t)
	case !d.open && t > msgProof || d.open && t <= msgProof:
		return message{}, fmt.Errorf("%w: message type %d out of turn", ErrProtocol, t)
	case le.Uint64(h[8:]) != d.seq:
		return message{}, fmt.Errorf("%w: message %d, %d expected", ErrProtocol, le.Uint64(h[8:]), d.seq)
	case n < limits[t].least || n > limits[t].most:
		return message{}, fmt.Errorf("%w: message type %d of %d bytes", ErrProtocol, t, n)
	}
	if t == msgFrame {
		return d.frame(h, n)
	}
	m := message{kind: t}
	if n > 0 {
		m.payload = make([]byte, n)
		if _, err := io.ReadFull(d.r, m.payload); err != nil {
			return message{}, fmt.Errorf("mirror: read: %w", err)
		}
	}
	return m, verify(h, m.payload)
}

func verify(h, payload []byte) error {
	if crc32.Update(crc32.Update(0, castagnoli, h[:20]), castagnoli, payload) != le.Uint32(h[20:]) {
		return fmt.Errorf("%w: checksum of message %d", ErrProtocol, le.Uint64(h[8:]))
	}
	return nil
}

func (d *decoder) frame(h []byte, n uint32) (message, error) {
	sub := d.head[headerBytes:]
	if _, err := io.ReadFull(d.r, sub); err != nil {
		return message{}, fmt.Errorf("mirror: read: %w", err)
	}
	if err := verify(h, sub); err != nil {
		return message{}, err
	}
	n -= frameHead
	if n%nvram.BlockBytes != 0 {
		return message{}, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, n)
	}
	m := message{kind: msgFrame, lsn: le.Uint64(sub), off: le.Uint64(sub[8:]), frame: nvram.GetBuffer(int(n / nvram.BlockBytes))}
	if d.wait != nil {
		d.wait()
	}
	if _, err := io.ReadFull(d.r, m.frame.Bytes()); err != nil {
		m.frame.Put()
		return message{}, fmt.Errorf("mirror: read: %w", err)
	}
	return m, nil
}

// role of a controller towards its partner.
type role uint8

const (
	roleNone role = iota
	roleOwner
	roleStandby
	roles
)

func (r role) String() string { return [roles]string{"none", "owner", "standby"}[r] }

type hello struct {
	controller byte
	role       role
	epoch      uint64
	nonce      [32]byte
	shelf      string
}

func (h *hello) encode() []byte {
	b := make([]byte, 49, 49+len(h.shelf))
	le.PutUint32(b, wireVersion)
	b[4], b[5] = h.controller, byte(h.role)
	le.PutUint64(b[8:], h.epoch)
	copy(b[16:], h.nonce[:])
	b[48] = byte(len(h.shelf))
	return append(b, h.shelf...)
}

func decodeHello(b []byte) (hello, error) {
	var h hello
	switch {
	case len(b) < 49 || len(b) != 49+int(b[48]):
		return h, fmt.Errorf("%w: hello of %d bytes", ErrProtocol, len(b))
	case le.Uint32(b) != wireVersion:
		return h, fmt.Errorf("%w: partner speaks version %d, this build %d", ErrProtocol, le.Uint32(b), wireVersion)
	case b[4] != 'A' && b[4] != 'B' || role(b[5]) >= roles:
		return h, fmt.Errorf("%w: hello of controller %q, role %d", ErrProtocol, b[4], b[5])
	}
	h.controller, h.role, h.epoch = b[4], role(b[5]), le.Uint64(b[8:])
	copy(h.nonce[:], b[16:])
	h.shelf = string(b[49:])
	return h, nil
}

func appendPositions(b []byte, p [2]nvram.Position) []byte {
	for _, q := range p {
		b = le.AppendUint64(b, q.LSN)
		b = le.AppendUint64(b, q.Off)
		b = le.AppendUint64(b, q.Seq)
	}
	return b
}

func getPositions(b []byte) (p [2]nvram.Position) {
	for i := range p {
		q := b[i*positionSize:]
		p[i] = nvram.Position{LSN: le.Uint64(q), Off: le.Uint64(q[8:]), Seq: le.Uint64(q[16:])}
	}
	return p
}

func appendLog(b []byte, id nvram.ID, epoch, run, runLSN uint64, bytes [2]uint64) []byte {
	b = append(b, id[:]...)
	for _, v := range []uint64{epoch, run, runLSN, bytes[0], bytes[1]} {
		b = le.AppendUint64(b, v)
	}
	return b
}

const logBytes = 56

func encodeOffer(s nvram.MirrorState) []byte {
	b := appendLog(nil, s.ID, s.Epoch, s.Run, s.RunLSN, s.Bytes)
	b = le.AppendUint64(b, s.Next)
	return append(b, boolByte(s.Complete))
}

func decodeOffer(b []byte) (nvram.MirrorState, error) {
	if len(b) != offerBytes || b[offerBytes-1] > 1 {
		return nvram.MirrorState{}, fmt.Errorf("%w: offer", ErrProtocol)
	}
	s := nvram.MirrorState{
		ID: nvram.ID(b[:16]), Epoch: le.Uint64(b[16:]), Run: le.Uint64(b[24:]), RunLSN: le.Uint64(b[32:]),
		Bytes: [2]uint64{le.Uint64(b[40:]), le.Uint64(b[48:])}, Next: le.Uint64(b[logBytes:]), Complete: b[offerBytes-1] == 1,
	}
	return s, nil
}

func encodeStart(s nvram.Start) []byte {
	b := appendLog(nil, s.ID, s.Epoch, s.Run, s.RunLSN, s.Bytes)
	b = appendPositions(b, s.Tail)
	b = append(b, boolByte(s.Full))
	b = le.AppendUint64(b, s.Resume)
	return appendPositions(b, s.Head)
}

func decodeStart(b []byte) (nvram.Start, error) {
	if len(b) != startBytes || b[logBytes+2*positionSize] > 1 {
		return nvram.Start{}, fmt.Errorf("%w: start", ErrProtocol)
	}
	rest := b[logBytes+2*positionSize:]
	return nvram.Start{
		ID: nvram.ID(b[:16]), Epoch: le.Uint64(b[16:]), Run: le.Uint64(b[24:]), RunLSN: le.Uint64(b[32:]),
		Bytes: [2]uint64{le.Uint64(b[40:]), le.Uint64(b[48:])}, Tail: getPositions(b[logBytes:]),
		Full: rest[0] == 1, Resume: le.Uint64(rest[1:]), Head: getPositions(rest[9:]),
	}, nil
}

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

func decodeControl(b []byte) (kind string, body []byte, err error) {
	if len(b) < 1 || len(b) < 1+int(b[0]) {
		return "", nil, fmt.Errorf("%w: control message of %d bytes", ErrProtocol, len(b))
	}
	n := 1 + int(b[0])
	return string(b[1:n]), b[n:], nil
}
