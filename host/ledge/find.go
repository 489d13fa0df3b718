package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
)

// directories are where a running system keeps its files, in the order of preference.
func directories() []string {
	if dir := os.Getenv("LEDGE_RUN"); dir != "" {
		return []string{dir}
	}
	return []string{"run", "run-local", "/run/ledge"}
}

// find is the first of the directories that holds a file of that name.
func find(name string) (path string, tried []string) {
	for _, dir := range directories() {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		tried = append(tried, path)
	}
	return "", tried
}

// agent is a client of this host's agent.
func (t *tool) agent() (*api.Client, error) {
	path := t.socket
	if path == "" {
		path = os.Getenv("LEDGE_SOCKET")
	}
	if path == "" {
		var tried []string
		if path, tried = find("hostd.sock"); path == "" {
			return nil, hinted{fmt.Errorf("no agent found: none of %s exists", strings.Join(tried, ", ")), "start it ('make run'), or say where it is with --socket or $LEDGE_SOCKET"}
		}
	}
	return api.New("unix:"+strings.TrimPrefix(path, "unix:"), "")
}

// explain adds advice to an agent that does not answer.
func explain(err error) error {
	if errors.Is(err, api.ErrNoServer) {
		return hinted{fmt.Errorf("the agent does not answer: %w", err), "is hostd running? 'make run' starts it; its log tells why it ended"}
	}
	return err
}

// controllerAPI is one controller of the shelf.
type controllerAPI struct {
	Name    string // A or B
	Address string
	client  *api.Client
}

const maxShelfFile = 64 << 10

// controllers are clients of both controllers, A first.
func (t *tool) controllers() ([]controllerAPI, error) {
	path := t.shelf
	if path == "" {
		var tried []string
		if path, tried = find("shelf.json"); path == "" {
			return nil, hinted{fmt.Errorf("no shelf found: none of %s exists", strings.Join(tried, ", ")), "start it ('make run'), or name its file with --shelf"}
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, hinted{err, "name the shelf's file with --shelf"}
	}
	var file struct {
		APIs  map[string]string `json:"apis"`
		Token string            `json:"token"`
	}
	bad := func(err error) error {
		return hinted{fmt.Errorf("%s: %w", path, err), `want {"apis": {"A": "http://host:port", "B": "http://host:port"}, "token": "…"}`}
	}
	if len(b) > maxShelfFile {
		return nil, bad(fmt.Errorf("%d bytes", len(b)))
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, bad(err)
	}
	var out []controllerAPI
	for _, name := range []string{"A", "B"} {
		address, ok := file.APIs[name]
		if !ok {
			continue
		}
		c, err := api.New(address, file.Token)
		if err != nil {
			return nil, bad(fmt.Errorf("apis.%s: %w", name, err))
		}
		out = append(out, controllerAPI{name, address, c})
	}
	if len(out) == 0 || len(out) != len(file.APIs) {
		return nil, bad(fmt.Errorf("apis names neither A nor B, or something else"))
	}
	return out, nil
}
