package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
)

// secrets are made once and stay: the pool's labels outlive a run, and so must who may open it.
type secrets struct {
	Shelf string `json:"shelf"` // the controllers' shared secret
	Token string `json:"token"` // the API's bearer token
}

// makeState makes what is missing in the run directory; what is there stays.
func (l *Lab) makeState() error {
	for _, dir := range []string{"drives", "drives/removed", "nvram", "A", "B"} {
		if err := os.MkdirAll(l.path(dir), 0o755); err != nil {
			return err
		}
	}
	err := readJSON(l.path("secrets.json"), &l.secrets)
	if errors.Is(err, fs.ErrNotExist) {
		l.secrets = secrets{Shelf: randomText(), Token: randomText()}
		err = writeJSON(l.path("secrets.json"), 0o600, l.secrets)
		if err == nil {
			err = l.makeMedia()
		}
	}
	if err != nil {
		return err
	}
	return writeJSON(l.path("shelf.json"), 0o600, map[string]any{
		"apis":  map[string]string{"A": l.api("A"), "B": l.api("B")},
		"token": l.secrets.Token,
	})
}

// makeMedia makes drives and NVRAM: sparse, so they take only what is written. Only for a new directory: a
// drive that is missing later was removed, and must not come back blank.
func (l *Lab) makeMedia() error {
	for i := 1; i <= l.o.Drives; i++ {
		if err := sparse(l.memberPath(i), l.o.DriveBytes); err != nil {
			return err
		}
	}
	for _, side := range []string{"A", "B"} {
		if err := sparse(l.nvramPath(side), l.o.NVRAMBytes); err != nil {
			return err
		}
	}
	if l.o.Window {
		if err := sparse(l.path("window.img"), windowBytes); err != nil {
			return err
		}
	}
	l.o.Say("%d drives of %.1f GiB and two NVRAM modules of %d MiB, sparse, in %s", l.o.Drives,
		float64(l.o.DriveBytes)/(1<<30), l.o.NVRAMBytes>>20, l.o.Dir)
	return nil
}

func sparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func (l *Lab) memberPath(i int) string { return l.path("drives", fmt.Sprintf("%02d.img", i)) }

func (l *Lab) nvramPath(side string) string { return l.path("nvram", side+".img") }

// Members lists the members' files that are there, sorted.
func (l *Lab) Members() ([]string, error) {
	paths, err := filepath.Glob(l.path("drives", "*.img"))
	sort.Strings(paths)
	return paths, err
}

// member is the number in a member's file name: also its LUN in the enclosure.
func member(path string) (int, error) {
	var n int
	_, err := fmt.Sscanf(filepath.Base(path), "%02d.img", &n)
	return n, err
}

func randomText() string {
	var b [24]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}

// choosePorts replaces zeros by free ports, checks the others, and remembers them.
func (l *Lab) choosePorts() error {
	p := &l.o.Ports
	for _, c := range []struct {
		name string
		port *int
	}{
		{"the agent's portal", &p.Agent}, {"controller A's portal", &p.PortalA}, {"controller B's portal", &p.PortalB},
		{"controller A's API", &p.APIA}, {"controller B's API", &p.APIB}, {"the enclosure", &p.Enclosure},
	} {
		ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(*c.port)))
		if err != nil {
			return fmt.Errorf("lab: port %d for %s: %w; -free-ports chooses others", *c.port, c.name, err)
		}
		*c.port = ln.Addr().(*net.TCPAddr).Port
		defer ln.Close() // all are held until each is chosen, so that none is chosen twice
	}
	return writeJSON(l.path("ports.json"), 0o644, *p)
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

func (l *Lab) api(side string) string {
	if side == "A" {
		return "http://" + loopback(l.o.Ports.APIA)
	}
	return "http://" + loopback(l.o.Ports.APIB)
}

func (l *Lab) portal(side string) string {
	if side == "A" {
		return loopback(l.o.Ports.PortalA)
	}
	return loopback(l.o.Ports.PortalB)
}
