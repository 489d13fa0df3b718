package iscsi

import (
	"context"
	"fmt"
	"net"
	"time"
)

// Limits of this side. The sizes are what we declare in the login; a target may make all but
// maxRecvBytes smaller.
const (
	maxRecvBytes       = 256 << 10 // MaxRecvDataSegmentLength: of one PDU to us
	maxBurstBytes      = 1 << 20   // MaxBurstLength: of one R2T's or Data-In sequence's data
	firstBurstBytes    = 256 << 10 // FirstBurstLength: of unsolicited data with a command
	maxQueueDepth      = 1024
	maxTransferBytes   = 64 << 20 // of one command
	maxControlBytes    = 64 << 10 // data of a PDU that is not Data-In
	maxPendingAnswers  = 64       // NOP-Outs owed to a target that asks faster than it reads
	defaultQueueDepth  = 128
	defaultPing        = 2 * time.Second
	defaultPingTimeout = 3 * time.Second
	defaultCommandTime = 30 * time.Second
	defaultLoginTime   = 5 * time.Second
)

// CHAP are the credentials of RFC 7143 12.1.3. The target proves itself too where TargetSecret is set.
type CHAP struct {
	User, Secret             string
	TargetUser, TargetSecret string
}

// Config of a session. Portal, Target and InitiatorName are required; zero of the rest means the
// value in brackets.
type Config struct {
	Portal        string // host:port
	Target        string // iqn…
	InitiatorName string
	// ISID names this session among those of InitiatorName; a login with one that is in use
	// ends the session that uses it. [random]
	ISID [6]byte
	CHAP *CHAP // [none]
	// HeaderDigest and DataDigest ask for CRC32C; the target may decline. [no]
	HeaderDigest, DataDigest bool
	// QueueDepth bounds the commands in flight, 1024 at most. [128]
	QueueDepth int
	// PingInterval is the silence after which the target is asked for a sign of life [2 s];
	// PingTimeout is how long it may take to give one [3 s].
	PingInterval, PingTimeout time.Duration
	// CommandTimeout is the age at which an unanswered command ends the session. [30 s]
	CommandTimeout time.Duration
	// LoginTimeout bounds connecting and login. [5 s]
	LoginTimeout time.Duration
	// Dial connects. [net.Dialer]
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Validate tells what Dial would refuse before it connects.
func (c *Config) Validate() error {
	switch {
	case c.Portal == "":
		return fmt.Errorf("%w: Portal is empty", ErrConfig)
	case !validName(c.Target):
		return fmt.Errorf("%w: Target %q is no iSCSI name", ErrConfig, c.Target)
	case !validName(c.InitiatorName):
		return fmt.Errorf("%w: InitiatorName %q is no iSCSI name", ErrConfig, c.InitiatorName)
	case c.QueueDepth < 0 || c.QueueDepth > maxQueueDepth:
		return fmt.Errorf("%w: QueueDepth %d is not in 0..%d", ErrConfig, c.QueueDepth, maxQueueDepth)
	case c.PingInterval < 0 || c.PingTimeout < 0 || c.CommandTimeout < 0 || c.LoginTimeout < 0:
		return fmt.Errorf("%w: a negative duration", ErrConfig)
	case c.CHAP != nil && (c.CHAP.User == "" || c.CHAP.Secret == ""):
		return fmt.Errorf("%w: CHAP without user or secret", ErrConfig)
	case c.CHAP != nil && c.CHAP.TargetSecret == c.CHAP.Secret:
		return fmt.Errorf("%w: CHAP with the same secret both ways", ErrConfig)
	}
	return nil
}

func (c *Config) setDefaults() {
	if c.QueueDepth == 0 {
		c.QueueDepth = defaultQueueDepth
	}
	for _, d := range []struct {
		p *time.Duration
		v time.Duration
	}{{&c.PingInterval, defaultPing}, {&c.PingTimeout, defaultPingTimeout}, {&c.CommandTimeout, defaultCommandTime}, {&c.LoginTimeout, defaultLoginTime}} {
		if *d.p == 0 {
			*d.p = d.v
		}
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
}

// validName accepts the names of RFC 7143 4.2.7: at most 223 bytes of iqn., eui. or naa. form
// without blanks or control characters.
func validName(s string) bool {
	if len(s) < 5 || len(s) > 223 {
		return false
	}
	if p := s[:4]; p != "iqn." && p != "eui." && p != "naa." {
		return false
	}
	for _, r := range s {
		if r <= ' ' || r == 0x7f || r == '=' || r == ',' {
			return false
		}
	}
	return true
}
