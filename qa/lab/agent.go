package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/ledge-storage/ledge/host/api"
)

// HostName is the lab's host.
const HostName = "host1"

// hostInitiator is its iSCSI name, to which the shelf adds the number of the claim.
const hostInitiator = "iqn.2026-11.io.ledge:" + HostName

// newAgent describes hostd.
func (l *Lab) newAgent() *Part {
	return &Part{
		Name: "agent", lab: l, dir: l.o.Dir, log: l.hostPath("hostd.log"), patience: 30 * time.Second,
		command: func() ([]string, error) {
			path := l.hostPath("hostd.json")
			return []string{filepath.Join(l.o.Binaries, "hostd"), "--config", path}, writeJSON(path, 0o600, l.agentConfig())
		},
	}
}

func (l *Lab) agentConfig() map[string]any {
	c := map[string]any{
		"name":      HostName,
		"initiator": l.initiator(),
		"shelf":     map[string]any{"apis": []string{l.api("A"), l.api("B")}, "token": l.secrets.Token},
		"listen":    loopback(l.o.Ports.Agent),
		"api":       l.AgentSocket(),
		"log_level": "debug",
	}
	if l.o.CacheBytes > 0 {
		c["cache"] = map[string]any{"path": l.hostPath("cache.img"), "size": l.o.CacheBytes}
	}
	return c
}

// AgentSocket is the agent's API.
func (l *Lab) AgentSocket() string { return l.hostPath("hostd.sock") }

// hostPath is a file of the host: in the run directory, or after MoveHost in one of its own there.
func (l *Lab) hostPath(name string) string {
	if l.moves == 0 {
		return l.path(name)
	}
	return l.path(fmt.Sprintf("host.%d", l.moves), name)
}

// initiator is the iSCSI name that the host has: each has its own.
func (l *Lab) initiator() string {
	if l.moves == 0 {
		return hostInitiator
	}
	return fmt.Sprintf("%s.%d", hostInitiator, l.moves)
}

// MoveHost is the end of a host: the agent is killed, and all that it had there is deleted. What StartAgent starts then is on another
// host, that knows no more than an operator tells it: another directory, another initiator name and portal, nothing in the cache. The operator
// gives it the name that the host has at the shelf, and the shelf's addresses and token.
func (l *Lab) MoveHost() error {
	if err := l.Agent.Kill(); err != nil {
		return err
	}
	if l.moves > 0 {
		if err := os.RemoveAll(l.hostPath(".")); err != nil {
			return err
		}
	} else {
		for _, name := range []string{"hostd.json", "hostd.sock", "cache.img", "hostd.log"} {
			if err := os.Remove(l.hostPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	l.moves++
	ln, err := net.Listen("tcp", loopback(0))
	if err != nil {
		return err
	}
	l.o.Ports.Agent = ln.Addr().(*net.TCPAddr).Port
	ln.Close()
	l.Agent = l.newAgent()
	return os.Mkdir(l.hostPath("."), 0o755)
}

// AgentPortal is the agent's iSCSI portal.
func (l *Lab) AgentPortal() string { return loopback(l.o.Ports.Agent) }

// AgentDo sends a request to the agent's API.
func (l *Lab) AgentDo(ctx context.Context, method, path string, in, out any) error {
	c, err := api.New("unix:"+l.AgentSocket(), "")
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Do(ctx, method, path, in, out)
}

// StartAgent starts hostd and waits until it serves.
func (l *Lab) StartAgent(ctx context.Context) error {
	if err := l.Agent.Start(); err != nil {
		return err
	}
	return l.WaitAgent(ctx)
}

// WaitAgent waits until the agent serves its volumes.
func (l *Lab) WaitAgent(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	err := poll(ctx, func() error {
		if !l.Agent.Running() {
			return permanent{fmt.Errorf("it ended: %s", l.Agent.Ended())}
		}
		var st api.Status
		if err := l.AgentDo(ctx, "GET", "/v1/status", nil, &st); err != nil {
			return err
		}
		if st.Phase != api.PhaseServing {
			return fmt.Errorf("it is %s: %s", st.Phase, st.Trouble)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("lab: agent: %w\n%s", err, tail(l.Agent.Log(), 20))
	}
	l.o.Say("agent serves on %s (pid %d)", l.AgentPortal(), l.Agent.PID())
	return nil
}

// EnsureVolume returns the volume, making it where it is missing.
func (l *Lab) EnsureVolume(ctx context.Context, name string, bytes int64) (v api.Volume, made bool, err error) {
	err = l.AgentDo(ctx, "GET", "/v1/volumes/"+name, nil, &v)
	var refused *api.Error
	if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
		err = l.AgentDo(ctx, "POST", "/v1/volumes", map[string]any{"name": name, "size_bytes": bytes}, &v)
		made = true
	}
	if err != nil {
		return v, false, fmt.Errorf("lab: volume %s: %w", name, err)
	}
	return v, made, nil
}
