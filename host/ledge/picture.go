package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
)

// The picture of the array: for a terminal of 80 columns, in ASCII. Everything in it is in the JSON too.

const (
	columns   = 80
	cellsARow = 16
	barWidth  = 20
)

// letters of the members' states, in the order of the legend.
var letters = []struct {
	state  string
	letter byte
	means  string
}{
	{"online", 'O', "online"}, {"suspect", 's', "suspect"}, {"missing", 'm', "missing"}, {"failed", 'F', "failed"},
	{"rebuilding", 'R', "rebuilding"}, {"spared", 'S', "spared"}, {"restoring", 'C', "copied back"}, {"", 'h', "hangs"},
}

func letter(m api.ArrayMember) byte {
	for _, l := range letters {
		if l.state == m.State {
			if m.Slow && l.letter == 'O' {
				return 'h'
			}
			return l.letter
		}
	}
	return '?'
}

// drawArray draws it.
func drawArray(w io.Writer, a api.ArrayInfo) error {
	d := &drawing{w: w}
	d.line("array %s of pool %s", short(a.UUID), a.Pool)
	d.line("%s: %d+%d over %d members, %d stripes of %s", strings.ToUpper(a.State), a.Data, a.Parity, len(a.Members), a.Stripes, api.FormatSize(a.StripeBytes))
	for _, why := range a.Why {
		d.wrap("  ! ", why)
	}
	if a.Checksums == "crc32c" {
		d.wrap("  ! ", "its checksums, CRC-32C, do not show that a drive lost the write of a block which ends in its own CRC-32C; only a new array has others")
	}
	d.line("")
	d.cells(a.Members)
	d.line("")
	d.risk(a)
	d.line("spare     %s %d of %d columns used, %s each", bar(uint64(a.Spare.Used), uint64(a.Spare.Columns), barWidth), a.Spare.Used, a.Spare.Columns, api.FormatSize(a.Spare.ColumnBytes))
	d.jobs(a)
	d.scrub(a.Scrub)
	d.line("")
	d.members(a.Members)
	return d.err
}

// drawing writes lines, none of which is longer than the terminal, and keeps the first error.
type drawing struct {
	w   io.Writer
	err error
}

func (d *drawing) line(format string, args ...any) {
	if d.err == nil {
		_, d.err = fmt.Fprintln(d.w, crop(strings.TrimRight(fmt.Sprintf(format, args...), " "), columns))
	}
}

// wrap writes a sentence over as many lines as it takes.
func (d *drawing) wrap(head, text string) {
	line := head
	for _, word := range strings.Fields(text) {
		if len([]rune(line))+len([]rune(word)) > columns {
			d.line("%s", line)
			line = strings.Repeat(" ", len(head))
		}
		line += word + " "
	}
	d.line("%s", line)
}

// crop cuts a line, with a sign that it was cut.
func crop(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most-2]) + ".."
	}
	return s
}

// tail keeps the end of a path or number, which tells drives apart.
func tail(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return ".." + string(r[len(r)-most+2:])
	}
	return s
}

func short(uuid string) string { return uuid[:min(8, len(uuid))] }

// cells draws one cell a member, its number above.
func (d *drawing) cells(members []api.ArrayMember) {
	seen := map[byte]bool{}
	for at := 0; at < len(members); at += cellsARow {
		numbers, cells := "  ", "  "
		for _, m := range members[at:min(at+cellsARow, len(members))] {
			numbers += fmt.Sprintf("%3d ", m.Index)
			cells += fmt.Sprintf("[%c] ", letter(m))
			seen[letter(m)] = true
		}
		d.line("%s", numbers)
		d.line("%s", cells)
	}
	var legend []string
	for _, l := range letters {
		if seen[l.letter] {
			legend = append(legend, fmt.Sprintf("%c=%s", l.letter, strings.ReplaceAll(l.means, " ", "-")))
		}
	}
	d.wrap("  ", strings.Join(legend, " "))
}

// risk draws how many stripes have lost how many strips.
func (d *drawing) risk(a api.ArrayInfo) {
	if len(a.AtRisk) == 0 {
		return
	}
	for lost, n := range a.AtRisk {
		if n == 0 && lost > 0 {
			continue
		}
		note := ""
		switch {
		case lost == 0:
			note = "have all their strips"
		case lost == a.Parity:
			note = fmt.Sprintf("lost %d: no further loss is borne", lost)
		default:
			note = fmt.Sprintf("lost %d, bear %d more", lost, a.Parity-lost)
		}
		d.line("stripes   %s %d %s", bar(n, a.Stripes, barWidth), n, note)
	}
	if a.Beyond > 0 {
		d.line("stripes   %s %d LOST MORE THAN PARITY REBUILDS", bar(a.Beyond, a.Stripes, barWidth), a.Beyond)
	}
}

// jobs draws what is being done: first by member, then the tasks that are of no member's.
func (d *drawing) jobs(a api.ArrayInfo) {
	shown := map[string]bool{}
	for _, m := range a.Members {
		if m.Total == 0 {
			continue
		}
		subject := fmt.Sprintf("member %d", m.Index)
		shown[subject] = true
		state, note := left(m.SecondsLeft), ""
		if !m.Running {
			state = "waits to go on"
		}
		for _, t := range a.Tasks {
			if t.Subject == subject && t.State == "running" {
				state = join(rate(t.BytesPerSecond), left(t.SecondsLeft))
				note = t.Note
			}
		}
		d.line("%-9s %s %s of member %d  %s", m.Job, bar(m.Done, m.Total, barWidth), share(m.Done, m.Total), m.Index, state)
		if note != "" {
			d.wrap("          ", note)
		}
	}
	if a.Grow != nil && !slices.ContainsFunc(a.Tasks, func(t api.Task) bool { return t.Kind == "grow" && t.State == "running" }) {
		d.line("%s", growLine(*a.Grow))
	}
	for _, t := range a.Tasks {
		switch {
		case t.State != "running" && t.State != "waiting" && t.State != "failed", shown[t.Subject], t.Kind == "scrub":
		case t.Error != "":
			d.wrap("  ! ", join(t.Kind, t.Subject)+" failed: "+t.Error+"; "+t.Note)
		default:
			d.line("%s", taskLine(t))
		}
	}
}

// growLine is a growth that nobody is at work on now.
func growLine(g api.GrowInfo) string {
	return fmt.Sprintf("%-9s %s %s from %d to %d members  waits to go on", "grow", bar(g.Done, g.Total, barWidth), share(g.Done, g.Total), g.From, g.To)
}

func (d *drawing) scrub(s api.ScrubInfo) {
	if s.State != "idle" && s.State != "" {
		found := fmt.Sprintf("%s, %d bad strips, %d repaired", s.State, s.Now.BadStrips, s.Now.Repaired)
		d.line("scrub     %s %s  %s", bar(s.Position, s.Total, barWidth), share(s.Position, s.Total), found)
		return
	}
	if s.Last.Ended == nil {
		d.line("scrub     no pass has ended yet")
		return
	}
	d.line("scrub     %s: %d bad strips, %d repaired, %d stripes lost", s.Last.Ended.UTC().Format("2006-01-02 15:04 UTC"), s.Last.BadStrips, s.Last.Repaired, s.Last.UnrecoverableStripes)
}

// members lists them with what tells the drive in the rack.
func (d *drawing) members(members []api.ArrayMember) {
	rows := [][]string{{"MEMBER", "STATE", "SLOT", "SERIAL", "PATH", "ERRORS"}}
	for _, m := range members {
		rows = append(rows, []string{fmt.Sprint(m.Index), m.State, tail(or(m.Slot, "-"), 12), tail(or(m.Serial, "-"), 16), tail(or(m.Path, "-"), 22), errorCount(m.Errors)})
	}
	var b strings.Builder
	table(&b, rows)
	for line := range strings.Lines(b.String()) {
		d.line("%s", strings.TrimRight(line, "\n"))
	}
	for _, m := range members {
		if errorCount(m.Errors) != "-" {
			d.wrap(fmt.Sprintf("%6d  ", m.Index), errorWords(m.Errors))
		}
	}
}

// errorCount: what was repaired was counted when it was found.
func errorCount(e api.MemberErrors) string {
	n := e.Read + e.Write + e.Timeout + e.Checksum + e.Stale
	if n+e.Repaired == 0 {
		return "-"
	}
	return strconv.FormatUint(n, 10)
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// errorWords names the kinds of errors that there were.
func errorWords(e api.MemberErrors) string {
	var out []string
	for _, x := range []struct {
		n    uint64
		word string
	}{{e.Read, "read"}, {e.Write, "write"}, {e.Timeout, "timeout"}, {e.Checksum, "checksum"}, {e.Stale, "stale"}, {e.Repaired, "repaired"}} {
		if x.n > 0 {
			out = append(out, fmt.Sprintf("%d %s", x.n, x.word))
		}
	}
	return strings.Join(out, ", ")
}

func rate(bytesPerSecond int64) string {
	if bytesPerSecond <= 0 {
		return ""
	}
	return api.FormatSize(bytesPerSecond) + "/s"
}

// join joins what is not empty.
func join(words ...string) string {
	var out []string
	for _, w := range words {
		if w != "" {
			out = append(out, w)
		}
	}
	return strings.Join(out, " ")
}

// taskLine is a task in one line.
func taskLine(t api.Task) string {
	if t.Total == 0 {
		return join(t.Kind, t.Subject, t.State, t.Note)
	}
	return join(fmt.Sprintf("%-9s", t.Kind), bar(t.Done, t.Total, barWidth), share(t.Done, t.Total), t.Subject, rate(t.BytesPerSecond), left(t.SecondsLeft), t.Note)
}

// printTasks lists what runs, and what failed lately.
func printTasks(w io.Writer, tasks []api.Task) error {
	d := &drawing{w: w}
	for _, t := range tasks {
		switch {
		case t.Error != "":
			d.wrap("  ! ", join(t.Kind, t.Subject)+" failed: "+t.Error)
		case t.State == "running" || t.State == "waiting":
			d.line("%s", taskLine(t))
		}
	}
	return d.err
}
