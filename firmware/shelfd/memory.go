package main

import "golang.org/x/sys/unix"

// What is kept in memory of the members' checksum blocks: a 32nd of the machine's memory, at least 64 and at most 256 MiB. Half of that
// knows the generations of 2.8 TB of data (8+2, at most), so that reads at random of that much ask no parity strip.
const (
	leastSums = 64 << 20
	mostSums  = 256 << 20
)

func sumBytes() int {
	var m unix.Sysinfo_t
	memory := uint64(0)
	if unix.Sysinfo(&m) == nil { // it has no other errors than a bad pointer
		memory = uint64(m.Totalram) * uint64(m.Unit)
	}
	return boundSums(memory)
}

func boundSums(memory uint64) int { return int(max(leastSums, min(memory/32, mostSums))) }
