package md

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"strconv"
	"strings"
)

// The array of md: RAID-6 of ten members in md's default arrangement (left-symmetric), metadata 1.2, and a spare.
//
//	stripe s: parity P on member 9 - s%10, Q on the next, data strip d on the one d+1 behind Q
const (
	mdMembers   = data + parity
	mdOffsetKiB = 1024
	// liar is the member with the faults, healthy the one that fails and is rebuilt to spare.
	liar, healthy, spare = 7, 4, 10
	mdStripes            = 10
)

// where are the stripes of the faults: liar holds data there (parity for LostParity), and healthy holds data.
var where = map[Fault]int{Rot: 0, Lost: 1, Torn: 4, Misdirected: 7, LostParity: 2}

// misdirectedTo is the stripe over which the misdirected write landed: the liar's next strip.
const misdirectedTo = 8

// strip is the data strip that a member holds of a stripe; 8 is Q, 9 is P.
func strip(stripe, member int) int {
	p := mdMembers - 1 - stripe%mdMembers
	return (member - p - 2 + 2*mdMembers) % mdMembers
}

// text is the array's content: numbers from first on, a line each.
func text(first int) []byte {
	b := make([]byte, 0, mdStripes*stripeBytes+16)
	for n := first; len(b) < mdStripes*stripeBytes; n++ {
		b = append(strconv.AppendInt(b, int64(n), 10), '\n')
	}
	return b[:mdStripes*stripeBytes]
}

const firstOld, firstNew = 10_000_000, 20_000_000

// Script makes the array, of the eleven RAM disks /dev/ram0 to 10 (zeros, 4 MiB or more), puts the faults, and prints
// what is read. /dev/md0 must be free.
//
// A line of its output is: NAME STRIPE STRIP, dd's exit status, SHA-256 of what was read, and "-".
func Script() string {
	r := strings.NewReplacer("MEMBERS", fmt.Sprint(mdMembers), "LAST", fmt.Sprint(mdMembers-1), "LIAR", fmt.Sprint(liar), "HEALTHY", fmt.Sprint(healthy),
		"SPARE", fmt.Sprint(spare), "STRIPES", fmt.Sprint(mdStripes), "OFFSET", fmt.Sprint(mdOffsetKiB*1024/stripBytes), "OLD", fmt.Sprint(firstOld), "NEW", fmt.Sprint(firstNew))
	var s strings.Builder
	s.WriteString(r.Replace(`set -e
mkdir -p /run/mdadm /tmp/md && cd /tmp/md
md() { mdadm "$@" >>log 2>&1 || { echo "mdadm $*: $?"; cat log; exit 1; }; }
trap 'mdadm --stop /dev/md0 >/dev/null 2>&1 || :; rm -rf /tmp/md' EXIT
DISKS=$(seq -f /dev/ram%.0f 0 LAST)
assemble() { md --assemble --run /dev/md0 $DISKS; }
stop() { sync; md --stop /dev/md0; echo 3 >/proc/sys/vm/drop_caches; }
fill() { seq $1 99999999 | head -c STRIPESM | dd of=/dev/md0 bs=1M iflag=fullblock oflag=direct 2>>log; }
# raw writes strips of a file over the liar's: FILE STRIP-OF-FILE STRIP-OF-LIAR FROM BLOCKS, the last two in blocks of 4 KiB
raw() { dd if=$1 of=/dev/ramLIAR bs=4k skip=$(($2*32+$4)) seek=$((OFFSET*32+$3*32+$4)) count=$5 oflag=direct conv=notrunc 2>>log; }
save() { dd if=/dev/ramLIAR of=$1 bs=128k skip=OFFSET count=STRIPES iflag=direct 2>>log; }
# cell NAME STRIPE STRIP reads a data strip of the array
cell() { : >got; rc=0; dd if=/dev/md0 of=got bs=128k skip=$(($2*8+$3)) count=1 iflag=direct 2>>log || rc=$?; echo $1 $2 $3 $rc $(sha256sum <got); }
# action WORD: md checks or repairs, and says how many sectors differed
action() { echo $1 >/sys/block/md0/md/sync_action; idle; echo count $1 $(cat /sys/block/md0/md/mismatch_cnt); }
idle() { while :; do sleep 0.1; [ "$(cat /sys/block/md0/md/sync_action)" != idle ] || [ "$(cat /sys/block/md0/md/sync_completed)" != none ] || break; done; }
md --create /dev/md0 --run --assume-clean --metadata=1.2 --data-offset=1M --level=6 --chunk=128 --bitmap=none --raid-devices=MEMBERS $DISKS
fill OLD; stop; save old
assemble; fill NEW; stop; save new
`))
	fmt.Fprintf(&s, "lie() {\n")
	fmt.Fprintf(&s, "dd if=new of=rot bs=4k skip=%d count=1 2>>log; head -c 64 /dev/zero | dd of=rot bs=64 seek=8 conv=notrunc 2>>log\n", where[Rot]*stripBlocks+17)
	fmt.Fprintf(&s, "dd if=rot of=/dev/ram%d bs=4k seek=%d oflag=direct conv=notrunc 2>>log\n", liar, mdOffsetKiB/4+where[Rot]*stripBlocks+17)
	for _, w := range []struct {
		file                     string
		from, to, block, nblocks int
	}{
		{"old", where[Lost], where[Lost], 0, stripBlocks},
		{"old", where[Torn], where[Torn], stripBlocks / 2, stripBlocks / 2},
		{"old", where[Misdirected], where[Misdirected], 0, stripBlocks},
		{"new", where[Misdirected], misdirectedTo, 0, stripBlocks},
		{"old", where[LostParity], where[LostParity], 0, stripBlocks},
	} {
		fmt.Fprintf(&s, "raw %s %d %d %d %d\n", w.file, w.from, w.to, w.block, w.nblocks)
	}
	s.WriteString("}\ncells() {\n")
	for _, f := range Faults {
		for _, p := range places(f) {
			fmt.Fprintf(&s, "cell $1 %d %d\n", p, strip(p, liar)%data) // of a stripe whose parity was lost, some data strip
		}
	}
	s.WriteString("}\nhealthy() {\n")
	for _, f := range Faults {
		fmt.Fprintf(&s, "cell $1 %d %d\n", where[f], strip(where[f], healthy))
	}
	s.WriteString(r.Replace(`}
assemble; cells order; healthy order-healthy; stop
lie; assemble; cells read; action check; action repair; stop
assemble; cells repaired; action check; stop; save after
parity() { dd if=$1 bs=128k skip=PARITY count=1 2>>log | sha256sum; }
echo parity $([ "$(parity after)" = "$(parity new)" ] && echo right || echo old)
assemble; fill NEW; stop
lie; assemble
md /dev/md0 --fail /dev/ramHEALTHY; md /dev/md0 --remove /dev/ramHEALTHY; md /dev/md0 --add /dev/ramSPARE
while [ "$(cat /sys/block/md0/md/degraded)" != 0 ]; do sleep 0.1; done
idle; healthy rebuilt
`))
	return strings.ReplaceAll(s.String(), "PARITY", fmt.Sprint(where[LostParity]))
}

// places are the stripes that the fault touched.
func places(f Fault) []int {
	if f == Misdirected {
		return []int{where[f], misdirectedTo}
	}
	return []int{where[f]}
}

// Linux runs the script and returns md's rows. run returns what the script printed.
func Linux(ctx context.Context, run func(ctx context.Context, script string) (string, error)) ([]Row, error) {
	out, err := run(ctx, Script())
	if err != nil {
		return nil, err
	}
	cells, err := parse(out)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	var rows []Row
	for _, f := range Faults {
		cell := func(name string) string {
			var all []string
			for _, p := range places(f) {
				c := cells[fmt.Sprintf("%s %d %d", name, p, strip(p, liar)%data)]
				if c == "" {
					c = "not said"
				}
				all = append(all, c)
			}
			if len(all) == 2 && all[0] != Right {
				return "in its place: " + all[0] + "; where it landed: " + all[1]
			}
			return all[0]
		}
		of := func(name string) string {
			return cells[fmt.Sprintf("%s %d %d", name, where[f], strip(where[f], healthy))]
		}
		if a, b := cell("order"), of("order-healthy"); a != Right || b != Right {
			return nil, fmt.Errorf("md: before any fault: %s, %s\n%s", a, b, out)
		}
		rows = append(rows, Row{f, cell("read"), cell("repaired"), of("rebuilt")})
		if f == LostParity && !strings.Contains(out, "\nparity right\n") {
			rows[len(rows)-1].Repaired += ", parity still old"
		}
	}
	return rows, nil
}

// parse returns the verdict of each cell, by NAME STRIPE STRIP.
func parse(out string) (map[string]string, error) {
	old, now := text(firstOld), text(firstNew)
	sum := func(b ...[]byte) string { return fmt.Sprintf("%x", sha256.Sum256(bytes.Join(b, nil))) }
	cells := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		f := strings.Fields(line)
		if len(f) != 6 {
			continue
		}
		var stripe, strip, status int
		if _, err := fmt.Sscan(strings.Join(f[1:4], " "), &stripe, &strip, &status); err != nil || stripe < 0 || stripe >= mdStripes || strip < 0 || strip >= data {
			return nil, fmt.Errorf("md: a line %q", line)
		}
		at := stripe*stripeBytes + strip*stripBytes
		was, is := old[at:at+stripBytes], now[at:at+stripBytes]
		v := wrong
		switch got := f[4]; {
		case status != 0:
			v = failed
		case got == sum(is):
			v = Right
		case got == sum(was):
			v = stale
		case got == sum(is[:stripBytes/2], was[stripBytes/2:]):
			v = mixed
		}
		cells[strings.Join(f[:3], " ")] = v
	}
	return cells, nil
}
