// Package md puts the faults that drives do without a word on an array of Linux md (RAID-6) and on ours, the same
// ones side by side, and says what each then reads. README.md has the table; the tests hold it.
//
// # Faults
//
// A stripe of 8+2 was written, then written again. Afterwards one member holds, as if its drive had lied:
//
//	rot          64 bytes that are not what was written
//	lost         its strip of the first write: the drive acknowledged the second and never wrote it
//	torn         half a strip of the second write, half of the first
//	misdirected  the second write one strip further on, over another stripe's; in its own place the first
//	lost parity  lost, where the member's strip is parity
//
// # What is read
//
//	Read      the faulted strip, and whatever else the fault touched, before any repair
//	Repaired  the same after the array's own repair: md's check, then repair; our scrub
//	Rebuilt   without a repair before: a member that is in order fails and is rebuilt; what its strip reads then
//
// The faults are put behind the array's back, with the array stopped, so that nothing is in its memory.
//
//	ledge.go  ours, with every strip of the stripe faulted in turn, data and parity alike
//	pool.go   ours through the whole pool: faults on everything that a member holds, the map included
//	linux.go  md's, as a script for a Linux machine; qa/guest has one
package md

import (
	"bytes"
	"fmt"
	"strings"
)

// Fault names a fault.
type Fault string

// The faults, in the table's order.
const (
	Rot         Fault = "bit rot in 64 bytes"
	Lost        Fault = "lost write"
	Torn        Fault = "torn write (half a strip)"
	Misdirected Fault = "misdirected write"
	LostParity  Fault = "lost write on parity"
)

// Faults in the table's order.
var Faults = []Fault{Rot, Lost, Torn, Misdirected, LostParity}

// Row is what became of one fault.
type Row struct {
	Fault                   Fault
	Read, Repaired, Rebuilt string
}

// What a cell may say; Right: every byte is what was written last.
const (
	Right  = "right"
	stale  = "old data, no error"
	mixed  = "half new, half old, no error"
	wrong  = "wrong data, no error"
	failed = "an error"
)

const (
	// data and parity strips of a stripe; blockBytes and stripBlocks are those of package raid and, for md, the
	// chunk: 128 KiB.
	data, parity = 8, 2
	blockBytes   = 4096
	stripBlocks  = 32
	stripBytes   = stripBlocks * blockBytes
	stripeBytes  = data * stripBytes
)

// verdict tells what bytes read without an error are.
func verdict(got, written, before []byte) string {
	const half = stripBytes / 2
	switch {
	case bytes.Equal(got, written):
		return Right
	case bytes.Equal(got, before):
		return stale
	case len(got) == stripBytes && bytes.Equal(got[:half], written[:half]) && bytes.Equal(got[half:], before[half:]):
		return mixed
	}
	return wrong
}

// Table is the two side by side, in Markdown. Both have a row for each fault, in the order of Faults.
func Table(linux, ours []Row) string {
	var b strings.Builder
	b.WriteString("| fault | | read | after its repair | a healthy member rebuilt, no repair before |\n| --- | --- | --- | --- | --- |\n")
	for i, f := range Faults {
		fmt.Fprintf(&b, "| %s | md | %s | %s | %s |\n", f, linux[i].Read, linux[i].Repaired, linux[i].Rebuilt)
		fmt.Fprintf(&b, "| | Ledge | %s | %s | %s |\n", ours[i].Read, ours[i].Repaired, ours[i].Rebuilt)
	}
	return b.String()
}
