package drive

import (
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"github.com/ledge-storage/ledge/raid"
)

// SG_IO (include/scsi/sg.h): one SCSI command through a block device's descriptor.

const (
	sgIO       = 0x2285
	toDevice   = -2
	fromDevice = -3
	sgTimeout  = 10 * time.Second
	// sgAttempts bounds the repetitions after a unit attention or a busy drive. Each unit attention is told once per
	// nexus and condition, so a few suffice.
	sgAttempts = 10
	sgPause    = 50 * time.Millisecond
)

// sgHeader is struct sg_io_hdr on 64-bit Linux.
type sgHeader struct {
	interfaceID  int32
	direction    int32
	cdbLen       uint8
	maxSense     uint8
	iovecCount   uint16
	dataLen      uint32
	data         unsafe.Pointer
	cdb          unsafe.Pointer
	sense        unsafe.Pointer
	timeoutMs    uint32
	flags        uint32
	packID       int32
	_            [4]byte
	user         unsafe.Pointer
	status       uint8
	maskedStatus uint8
	msgStatus    uint8
	senseWritten uint8
	hostStatus   uint16
	driverStatus uint16
	residual     int32
	durationMs   uint32
	info         uint32
	_            [4]byte
}

// errAgain: the command was not done, for a reason that passes.
var errAgain = errors.New("drive: not done, to be repeated")

// sgio sends one command, repeats it after unit attentions, and returns how many bytes of data were moved.
func (b *Block) sgio(cdb, data []byte, direction int32) (int, error) {
	var err error
	for attempt := range sgAttempts {
		if attempt > 0 && !isUnitAttention(err) {
			time.Sleep(sgPause)
		}
		var n int
		if n, err = b.sgioOnce(cdb, data, direction); !errors.Is(err, errAgain) {
			return n, err
		}
	}
	return 0, err
}

func isUnitAttention(err error) bool {
	var s *SenseError
	return errors.As(err, &s) && s.Key == senseUnitAttention
}

func (b *Block) sgioOnce(cdb, data []byte, direction int32) (int, error) {
	sense := make([]byte, 64)
	h := &sgHeader{interfaceID: 'S', direction: direction, cdbLen: uint8(len(cdb)), maxSense: uint8(len(sense)),
		dataLen: uint32(len(data)), data: unsafe.Pointer(unsafe.SliceData(data)), cdb: unsafe.Pointer(unsafe.SliceData(cdb)),
		sense: unsafe.Pointer(unsafe.SliceData(sense)), timeoutMs: uint32(sgTimeout.Milliseconds())}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(h)
	for _, p := range []unsafe.Pointer{h.data, h.cdb, h.sense} {
		pin.Pin(p)
	}
	if err := b.ioctl(sgIO, unsafe.Pointer(h)); err != nil {
		return 0, fmt.Errorf("SG_IO %02x: %w", cdb[0], err)
	}
	n := len(data) - int(max(h.residual, 0))
	return n, outcome(h.status, h.hostStatus, h.driverStatus, sense[:min(int(h.senseWritten), len(sense))])
}

// outcome turns a command's statuses into an error. Host status (SG_ERR_DID_*) 0 is fine; driver status 8 only says
// that there is sense data.
func outcome(status uint8, host, driver uint16, sense []byte) error {
	switch status {
	case statusGood:
	case statusReservationConflict:
		return raid.ErrReservation
	case statusBusy, statusTaskSetFull:
		return fmt.Errorf("status %02x: %w", status, errAgain)
	case statusCheckCondition:
		e := decodeSense(sense)
		if e.Key == senseUnitAttention || e.Key == senseNotReady {
			return fmt.Errorf("%w: %w", e, errAgain)
		}
		return e
	default:
		return fmt.Errorf("status %02x", status)
	}
	if host != 0 || driver&0x0F != 0 && driver&0x0F != 8 {
		return fmt.Errorf("host status %d, driver status %d", host, driver)
	}
	return nil
}
