package main

import (
	"fmt"
	"regexp"
)

// A Cell is one load.
type Cell struct {
	Op      string `json:"op"`      // read or write
	Pattern string `json:"pattern"` // rand or seq
	Bytes   int    `json:"bytes"`
	Depth   int    `json:"depth"` // commands in flight on each connection
	Conns   int    `json:"connections"`
}

// ID is the cell's short name, for -cells and for machines: 4k-read-qd32, 4k-read-8x8.
func (c Cell) ID() string {
	if c.Conns > 1 {
		return fmt.Sprintf("%dk-%s-%dx%d", c.Bytes>>10, c.Op, c.Conns, c.Depth)
	}
	return fmt.Sprintf("%dk-%s-qd%d", c.Bytes>>10, c.Op, c.Depth)
}

func (c Cell) String() string {
	size := fmt.Sprintf("%d KiB", c.Bytes>>10)
	if c.Bytes >= 1<<20 {
		size = fmt.Sprintf("%d MiB", c.Bytes>>20)
	}
	pattern := map[string]string{"rand": "random", "seq": "sequential"}[c.Pattern]
	if c.Conns > 1 {
		return fmt.Sprintf("%s %s %s, %d × QD %d", size, pattern, c.Op, c.Conns, c.Depth)
	}
	return fmt.Sprintf("%s %s %s, QD %d", size, pattern, c.Op, c.Depth)
}

var cells = []Cell{
	{"read", "rand", 4 << 10, 1, 1}, {"write", "rand", 4 << 10, 1, 1},
	{"read", "rand", 4 << 10, 32, 1}, {"write", "rand", 4 << 10, 32, 1},
	{"read", "rand", 4 << 10, 8, 8}, {"write", "rand", 4 << 10, 8, 8},
	{"read", "seq", 128 << 10, 8, 1}, {"write", "seq", 128 << 10, 8, 1},
	{"read", "seq", 1 << 20, 4, 1}, {"write", "seq", 1 << 20, 4, 1},
}

// single says whether the cell has one command in flight: the loads in which spinning is asked for.
func (c Cell) single() bool { return c.Depth*c.Conns == 1 }

// crowded says whether the cell has so many small commands in flight that a client with a system call for each is
// likely the limit: the loads that rawload runs too.
func (c Cell) crowded() bool { return c.Bytes == 4<<10 && !c.single() }

// system says whether the whole system's targets run the cell too: what they did before the engine was measured alone.
func (c Cell) system() bool { return c.Conns == 1 && c.Bytes < 1<<20 }

// Clients.
const (
	libiscsi = "libiscsi"
	raw      = "raw"
)

// A Row is a cell as one client runs it in one placement.
type Row struct {
	Placement string `json:"placement"`
	Client    string `json:"client"`
	Cell      Cell   `json:"cell"`
}

// rows are the rows of a placement that filter (of cells' IDs) and client let through. Client is libiscsi, raw, both,
// or auto: libiscsi everywhere, raw where the cell is crowded.
func rows(placement string, filter *regexp.Regexp, client string) []Row {
	var rows []Row
	for _, c := range cells {
		if !filter.MatchString(c.ID()) {
			continue
		}
		if client != raw {
			rows = append(rows, Row{placement, libiscsi, c})
		}
		if client == raw || client == "both" || client == "auto" && c.crowded() {
			rows = append(rows, Row{placement, raw, c})
		}
	}
	return rows
}
