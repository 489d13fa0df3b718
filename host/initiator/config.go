package initiator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
)

// Limits.
const (
	maxPortals       = 16
	defaultTransfer  = 1 << 20
	maxTransferBytes = 16 << 20 // of one command, whatever the target would take
	maxParallel      = 8        // commands in flight for one call
	maxCallBytes     = 1 << 30
)

var (
	// ErrConfig: a field of Config is outside its limits.
	ErrConfig = errors.New("initiator: bad configuration")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("initiator: device closed")
	// ErrNoLUN: the portal shows the target, but not the LUN.
	ErrNoLUN = errors.New("initiator: no such LUN")
	// ErrForeign: a portal shows another unit, or one of another size of block, under the same LUN.
	ErrForeign = errors.New("initiator: another unit behind this path")
	// ErrMalformed: the target's parameter data are not what the standard says.
	ErrMalformed = errors.New("initiator: malformed parameter data")
	// ErrReservation: another initiator holds a persistent reservation on the LUN.
	ErrReservation = errors.New("initiator: reservation conflict")
)

// Config of a Device. Portals, Target and Initiator are required; zero of the rest means the value
// in brackets.
type Config struct {
	Portals   []string // host:port; duplicates are ignored, 16 at most
	Target    string
	LUN       uint16
	Initiator string
	CHAP      *iscsi.CHAP // [none]
	Digests   bool        // CRC32C of headers and data [no]
	// QueueDepth bounds the commands in flight on each path. [128]
	QueueDepth int
	// PingInterval, PingTimeout and CommandTimeout are those of iscsi.Config. [2 s, 3 s, 30 s]
	PingInterval, PingTimeout, CommandTimeout time.Duration
	// ProbeInterval is how often a path that is not in use is asked for its state. [1 s]
	ProbeInterval time.Duration
	// MaxBackoff bounds the pause between attempts to connect. [2 s]
	MaxBackoff time.Duration
	// MaxTransfer is the most that one command moves, if the target takes it. [1 MiB, or the target's
	// optimal transfer length where that is more]
	MaxTransfer int
	Logger      *slog.Logger // [discard]
	// Dial connects. [net.Dialer]
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

func (c *Config) validate() error {
	seen := map[string]bool{}
	var portals []string
	for _, p := range c.Portals {
		if _, _, err := net.SplitHostPort(p); err != nil {
			return fmt.Errorf("%w: portal %q is not host:port", ErrConfig, p)
		}
		if !seen[p] {
			seen[p] = true
			portals = append(portals, p)
		}
	}
	c.Portals = portals
	switch {
	case len(portals) == 0 || len(portals) > maxPortals:
		return fmt.Errorf("%w: %d portals; 1 to %d are allowed", ErrConfig, len(portals), maxPortals)
	case c.LUN >= 1<<14:
		return fmt.Errorf("%w: LUN %d; flat addressing ends at 16383", ErrConfig, c.LUN)
	case c.MaxTransfer < 0 || c.MaxTransfer > maxTransferBytes:
		return fmt.Errorf("%w: MaxTransfer %d is not in 0..%d", ErrConfig, c.MaxTransfer, maxTransferBytes)
	case c.ProbeInterval < 0 || c.MaxBackoff < 0:
		return fmt.Errorf("%w: a negative duration", ErrConfig)
	}
	if c.ProbeInterval == 0 {
		c.ProbeInterval = time.Second
	}
	if c.MaxBackoff == 0 {
		c.MaxBackoff = 2 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

func (c *Config) session(portal string, isid [6]byte) iscsi.Config {
	return iscsi.Config{
		Portal: portal, Target: c.Target, InitiatorName: c.Initiator, ISID: isid, CHAP: c.CHAP,
		HeaderDigest: c.Digests, DataDigest: c.Digests, QueueDepth: c.QueueDepth,
		PingInterval: c.PingInterval, PingTimeout: c.PingTimeout, CommandTimeout: c.CommandTimeout, Dial: c.Dial,
	}
}
