// Package peers runs other targets beside Ledge's, so that conformance and speed are compared in one run on
// one machine: Debian's tgtd, gotgt, and the null server, which only answers.
//
// Each peer is a process of its own on 127.0.0.1, started here, ended here by its pid, and waited for.
package peers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// IQN names the target that every peer serves.
const IQN = "iqn.2026-11.io.ledge:peer"

// startTimeout is how long a peer may take until it accepts connections.
const startTimeout = 20 * time.Second

// A Peer is a running target with one LUN.
type Peer struct {
	Name string
	// URL is the LUN's, as libiscsi writes it.
	URL string
	// Portal is host:port.
	Portal string
	LUN    int

	cmd  *exec.Cmd
	done chan error
	log  *os.File
}

// Pid is the process's, for pinning and for accounting.
func (p *Peer) Pid() int { return p.cmd.Process.Pid }

// Alive says whether the process still runs.
func (p *Peer) Alive() bool {
	select {
	case err := <-p.done:
		p.done <- err
		return false
	default:
		return true
	}
}

// Stop ends the process and waits for it.
func (p *Peer) Stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(3 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	return p.log.Close()
}

// Tgtd serves file as LUN 1 with Debian's tgtd (package tgt). Dir takes its log.
func Tgtd(ctx context.Context, dir, file string) (*Peer, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	// The control port is a suffix of a socket's path, 32767 at most; one derived from the free TCP port is free too.
	control := strconv.Itoa(port & 0x7fff)
	p, err := start(ctx, "tgtd", dir, port, 1, "tgtd", "-f", "-C", control, "--iscsi", fmt.Sprintf("portal=127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"--op", "new", "--mode", "target", "--tid", "1", "-T", IQN},
		{"--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", file},
		{"--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"},
	} {
		args = append([]string{"-C", control, "--lld", "iscsi"}, args...)
		if out, err := exec.CommandContext(ctx, "tgtadm", args...).CombinedOutput(); err != nil {
			return nil, errors.Join(fmt.Errorf("peers: tgtadm %s: %w: %s", strings.Join(args, " "), err, out), p.Stop())
		}
	}
	return p, nil
}

// Gotgt serves file as LUN 1 with the binary of qa/peers/gotgt.
func Gotgt(ctx context.Context, dir, binary, file string) (*Peer, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	return start(ctx, "gotgt", dir, port, 1, binary, file, strconv.Itoa(port), IQN)
}

// NullOptions choose how the null server answers.
type NullOptions struct {
	// Batch: all that has come, with as few system calls as can be.
	Batch bool
	// Memory keeps what is written, and answers reads from there.
	Memory bool
	// Spin is how long it looks for the next request before it sleeps; zero: not at all.
	Spin time.Duration
}

// Null answers for a LUN of size bytes with the binary of qa/peers/null. Name is the peer's.
func Null(ctx context.Context, name, dir, binary string, size int64, opts NullOptions) (*Peer, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	return start(ctx, name, dir, port, 0, binary, fmt.Sprintf("-batch=%t", opts.Batch), fmt.Sprintf("-memory=%t", opts.Memory), "-spin", opts.Spin.String(),
		strconv.Itoa(port), strconv.FormatInt(size, 10))
}

// EngineOptions choose what Ledge's engine serves.
type EngineOptions struct {
	// File is served; empty: memory.
	File string
	// Spin is iscsi.Options.Spin.
	Spin time.Duration
}

// Engine serves bytes with Ledge's own engine (the binary of qa/peers/engine). Name is the peer's.
func Engine(ctx context.Context, name, dir, binary string, bytes int64, opts EngineOptions) (*Peer, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	return start(ctx, name, dir, port, 0, binary, "-file", opts.File, "-spin", opts.Spin.String(), strconv.Itoa(port), strconv.FormatInt(bytes, 10), IQN)
}

func start(ctx context.Context, name, dir string, port, lun int, binary string, args ...string) (*Peer, error) {
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, fmt.Errorf("peers: %s: %w", name, err)
	}
	portal := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	p := &Peer{
		Name: name, Portal: portal, LUN: lun, log: log, done: make(chan error, 1),
		URL: fmt.Sprintf("iscsi://%s/%s/%d", portal, IQN, lun),
		cmd: exec.Command(binary, args...),
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// A peer dies with whoever started it, so that a killed benchmark leaves nothing behind.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("peers: %s: %w", name, err), log.Close())
	}
	go func() { p.done <- p.cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		c, err := net.Dial("tcp", portal)
		if err == nil {
			return p, c.Close()
		}
		select {
		case err := <-p.done:
			p.done <- err
			return nil, errors.Join(fmt.Errorf("peers: %s ended at its start (%v): see %s", name, err, log.Name()), log.Close())
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("peers: %s does not listen on %s: %w", name, portal, ctx.Err()), p.Stop())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// freePort asks the kernel for a port; whoever starts next may take it first, which start then reports.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("peers: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
