// Package measure is what the benchmarks share: the spread of some figures, ratios of the same moment, and who had the cores
// meanwhile.
package measure

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ticksPerSecond is the unit of /proc/stat (USER_HZ), the same on all of Linux's architectures that Go runs on.
const ticksPerSecond = 100

// A Machine is the CPU time, in seconds, that all cores have spent until now.
type Machine struct {
	Busy  float64 // on anything of this machine
	Steal float64 // on other machines of the same host
}

// Now reads /proc/stat. What ksoftirqd did is left out of Busy: it is the loopback's work for whoever sends, and on its
// own account in some of the packets only.
func Now() Machine {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return Machine{}
	}
	m := parseStat(string(b))
	for _, pid := range ksoftirqd() {
		m.Busy -= CPUSeconds(pid)
	}
	return m
}

// parseStat takes the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
func parseStat(stat string) Machine {
	line, _, _ := strings.Cut(stat, "\n")
	var m Machine
	for i, f := range strings.Fields(line) {
		ticks, err := strconv.ParseFloat(f, 64)
		switch {
		case i == 0 || i > 8 || err != nil: // the label; guest time, which is in user's
		case i == 4 || i == 5: // idle, iowait
		case i == 8:
			m.Steal += ticks / ticksPerSecond
		default:
			m.Busy += ticks / ticksPerSecond
		}
	}
	return m
}

var softirqThreads []int // found once: they live as long as the machine

func ksoftirqd() []int {
	if softirqThreads != nil {
		return softirqThreads
	}
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && strings.HasPrefix(string(b), "ksoftirqd/") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			softirqThreads = append(softirqThreads, pid)
		}
	}
	return softirqThreads
}

// CPUSeconds is the CPU time that the process's threads have used, to the nanosecond. A thread that ended is not in it.
func CPUSeconds(pid int) float64 {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	var sum int64
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err == nil {
			sum += firstNumber(string(b))
		}
	}
	return float64(sum) / 1e9
}

// ResidentBytes is the process's resident memory.
func ResidentBytes(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	return firstNumber(rest) << 10 // in KiB
}

// firstNumber is the first word of s as a number; 0 where it is none.
func firstNumber(s string) int64 {
	fields := strings.Fields(s)
	if len(fields) == 0 {
		return 0
	}
	n, _ := strconv.ParseInt(fields[0], 10, 64)
	return n
}
