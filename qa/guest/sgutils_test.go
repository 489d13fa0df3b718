package guest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

const scratchTarget = "iqn.2026-11.io.ledge.qa:scratch"

// Exit codes of sg3-utils, sg3_utils(8).
const (
	ok             = 0
	illegalRequest = 5
	unitAttention  = 6
	invalidOpcode  = 9
	copyAborted    = 10
	miscompare     = 14
	outOfRange     = 22
	conflict       = 24
)

// sgCase is a command and what the standards say comes of it. $A0 is unit 0 through controller A, $B0 the same
// through B, $X0 through A by another initiator; $A1 and $A300 are other units. read BLOCK UNIT prints one block, by
// READ and past the guest's cache.
type sgCase struct {
	command string
	code    int
	want    []string // printed, among other things
}

// inquiries are by SPC-4 and SBC-3 (the clauses stand beside them).
var inquiries = []sgCase{
	{"sg_inq $A0", ok, []string{"version=0x06  [SPC-4]", "TPGS=1  3PC=1", "CmdQue=1", "MultiP=", "Vendor identification: LEDGE", "Product identification: SCRATCH"}}, // SPC-4 6.6.2
	{"sg_inq -d $A0", ok, []string{"SAM-5", "iSCSI", "SPC-4", "SBC-3"}},
	{"sg_vpd -p sv $A0", ok, []string{"[sn]", "[di]", "[ei]", "[mpp]", "[sp]", "[tpc]", "[bl]", "[bdc]", "[lbpv]"}},              // SPC-4 7.8.15
	{"sg_vpd -p sn $A0", ok, []string{"Unit serial number: "}},                                                                   // 7.8.18
	{"sg_vpd -p di $A0", ok, []string{"type: NAA", "Relative target port: 0x1", "Target port group: 0x1", scratchTarget}},        // 7.8.6
	{"sg_vpd -p di $B0", ok, []string{"type: NAA", "Relative target port: 0x2", "Target port group: 0x2", scratchTarget}},        //
	{"sg_vpd -p ei $A0", ok, []string{"HEADSUP=1 ORDSUP=1 SIMPSUP=1", "LUICLR="}},                                                // 7.8.7
	{"sg_vpd -p mpp $A0", ok, []string{"Policy: shared"}},                                                                        // 7.8.10
	{"sg_vpd -p sp $A0", ok, []string{"Relative port=1", "Relative port=2", scratchTarget + ",t,0x0001", ",t,0x0002"}},           // 7.8.14
	{"sg_vpd -p tpc $A0", ok, []string{"Extended copy(LID1)", "block -> block", "Identification Descriptor"}},                    // 7.8.17
	{"sg_vpd -p bl $A0", ok, []string{"Maximum compare and write length: 255", "Optimal transfer length granularity: 8 blocks"}}, // SBC-3 6.6.4
	{"sg_vpd -p bdc $A0", ok, []string{"Non-rotating medium"}},                                                                   // 6.6.2
	{"sg_vpd -p lbpv $A0", ok, []string{"(LBPU): 1", "(LBPWS): 1", "(LBPRZ): 1", "thin provisioned"}},                            // 6.6.6
	{"sg_vpd -f -p 0xcc $A0", illegalRequest, nil},                                                                               // a page that is not there
	{"sg_luns $A0", ok, []string{"0000000000000000", "0001000000000000", "412c000000000000"}},                                    // 300 in flat addressing, SAM-5 4.7.7.3
	{"sg_readcap $A0", ok, []string{"Last LBA=131071", "Logical block length=512"}},
	{"sg_readcap -l $A0", ok, []string{"prot_en=0", "lbpme=1, lbprz=1", "physical block exponent=3", "Lowest aligned LBA=0"}}, // SBC-3 5.16
	{"sg_readcap -l $A300", ok, []string{"Last LBA=16383", "Logical block length=4096"}},
	{"sg_rtpg -d -e $A0", ok, []string{"id : 0x1 , Pref=1", "id : 0x2 , Pref=0", "0x00 (active/optimized)", "0x01 (active/non optimized)", "T_SUP : 1"}}, // SPC-4 6.37
	{"sg_turs $A0", ok, nil},
	{"sg_requests $A0", ok, []string{"No Sense"}},
	{"sg_opcodes $A0", ok, []string{"Compare and write", "Unmap", "Write same(16)", "Extended copy(LID1)", "Get LBA status(16)", "Report target port groups", "preempt and abort"}}, // 6.35
	{"sg_opcodes -o 0x28 $A0", ok, []string{"supported [conforming", "Usage data: 28 "}},
	{"sg_opcodes -o 0xc1 $A0", ok, []string{"NOT supported"}},
	{"sg_opcodes -t $A0", ok, []string{"Abort task", "Logical unit reset"}}, // 6.36
	{"sg_modes -a $A0", ok, []string{"DpoFua=1", "Caching", "Control", "Informational exceptions control"}},
	{"sg_modes -p 0x0a,0x01 $A0", ok, []string{"Control extension"}},
	{"sg_modes -p 0x19 $A0", illegalRequest, nil},
	{"sg_logs -p lbp $A0", ok, []string{"Available LBA mapping", "Used LBA mapping"}}, // SBC-3 6.4.4
	{"sg_logs -p 0x0d $A0", illegalRequest, nil},
	{"sg_senddiag -t $A0", ok, nil},
	{"sg_ses -p 1 $A0", invalidOpcode, nil}, // no enclosure: RECEIVE DIAGNOSTIC RESULTS is not served
	{"sg_sync $A0", ok, nil},
	{"sg_start --stop $A0 && sg_start --start $A0", ok, nil},
}

// writes change unit 0: its first MiB is written with ones, the rest was never written.
var writes = []sgCase{
	{"sg_write_same -S -i /run/ones -l 0 -n 2048 $A0", ok, nil},
	{"read 2047 $A0", ok, []string{ones}},
	{"sg_get_lba_status -l 0 $A0", ok, []string{"LBA: 0x0000000000000000  blocks:       2048  mapped"}}, // SBC-3 5.6
	{"sg_get_lba_status -l 4096 $A0", ok, []string{"blocks:     126976  deallocated"}},
	{"sg_unmap -f -l 0 -n 128 $A0", ok, nil}, // 5.28
	{"sg_get_lba_status -l 0 $A0", ok, []string{"blocks:        128  deallocated"}},
	{"read 0 $A0", ok, []string{zeros}},
	{"read 128 $A0", ok, []string{ones}},
	{"sg_unmap -f -l 131071 -n 2 $A0", outOfRange, nil},
	{"sg_write_same -S --unmap -i /run/zeros -l 256 -n 128 $A0", ok, nil}, // 5.46
	{"sg_get_lba_status -l 256 $A0", ok, []string{"blocks:        128  deallocated"}},
	{"sg_write_same --10 -i /run/sevens -l 128 -n 2 $A0", ok, nil}, // 5.45
	{"read 129 $A0", ok, []string{sevens}},
	{"read 130 $A0", ok, []string{ones}},
	{"sg_write_same -S --ndob -l 129 -n 1 $A0", ok, nil},
	{"read 129 $A0", ok, []string{zeros}},
	{"read 128 $A0", ok, []string{sevens}},
	{"sg_write_same -S -i /run/ones -l 131071 -n 2 $A0", outOfRange, nil},

	// COMPARE AND WRITE, 5.2: the block is zeros and becomes sevens; then it is not zeros any more.
	{"sg_compare_and_write -l 3000 -n 1 -i /run/zeros-sevens $A0", ok, nil},
	{"read 3000 $A0", ok, []string{sevens}},
	{"sg_compare_and_write -v -l 3000 -n 1 -i /run/zeros-sevens $A0", miscompare, []string{"Sense key: Miscompare", "Miscompare during verify operation", "byte offset: 0"}},
	{"sg_compare_and_write -l 3000 -n 1 -i /run/sevens-ones $B0", ok, nil}, // through the other controller
	{"read 3000 $A0", ok, []string{ones}},

	{"sg_verify -l 0 -c 128 $A0", ok, nil},                                                     // 5.30
	{"sg_verify -l 3000 -c 1 -n 512 -E 1 -i /run/ones $A0", ok, nil},                           // BYTCHK=01b
	{"sg_verify -l 3000 -c 1 -n 512 -E 1 -i /run/sevens $A0", miscompare, nil},                 //
	{"sg_write_verify -l 3001 -n 1 -i /run/sevens $A0 && read 3001 $A0", ok, []string{sevens}}, // 5.42

	// EXTENDED COPY, SPC-4 6.4, by the units' designators.
	{"sg_xcopy if=$A0 of=$A1 bs=512 count=2048 skip=2048 seek=1024", ok, []string{"2048 blocks, 1 command"}},
	{"read 1976 $A1", ok, []string{ones}}, // 3000 - 2048 + 1024
	{"read 1977 $A1", ok, []string{sevens}},
	{"read 1978 $A1", ok, []string{zeros}},
	{"sg_xcopy --on_dst if=$A0 of=$A1 bs=512 count=1 skip=3001 seek=0 && read 0 $A1", ok, []string{sevens}},
	{"sg_xcopy if=$A0 of=$A1 bs=512 count=16 skip=0 seek=131064", copyAborted, nil}, // past the end
	{"sg_copy_results -p $A0", ok, []string{"Segment descriptor 0x02", "Target descriptor 0xe4"}},
}

// reservations: SPC-4 5.13. A and B are one initiator's two ports, X is another initiator.
var reservations = []sgCase{
	{"sg_persist -n -i -c $A0", ok, []string{"All Target Ports Capable(ATP_C): 1", "Persist Through Power Loss Capable(PTPL_C): 1", "Exclusive Access, registrants only: 1"}},
	{"sg_persist -n -o -G -S 0xa $A0", ok, nil},
	{"sg_persist -n -i -k $B0", ok, []string{"1 registered reservation key follows", "0xa"}},
	{"sg_persist -n -o -R -T 5 -K 0xb $A0", conflict, nil}, // not the key that was registered
	{"sg_persist -n -o -R -T 5 -K 0xa $A0", ok, nil},       // Write Exclusive – Registrants Only
	{"sg_persist -n -i -r $X0", ok, []string{"Key=0xa", "Write Exclusive, registrants only"}},
	{"sg_persist -n -i -s $A0", ok, []string{"Reservation holder", "Relative port address: 0x1", "iqn.2026-11.io.ledge.qa:guest,i,0x"}},
	// Who is not registered reads and does not write: the other initiator, and the same one by its other port.
	{"put $A0", ok, nil}, {"put $X0", conflict, nil}, {"put $B0", conflict, nil},
	{"read 0 $X0", ok, nil},
	{"sg_unmap -f -l 0 -n 1 $X0", conflict, nil},
	{"sg_compare_and_write -l 0 -n 1 -i /run/zeros-sevens $X0", conflict, nil},
	{"sg_xcopy if=$X0 of=$X1 bs=512 count=1 skip=3001 seek=8 && read 8 $X1", ok, []string{sevens}}, // a copy from it reads
	// The same host registers its other port, and writes there.
	{"sg_persist -n -o -G -S 0xa $B0", ok, nil},
	{"put $B0", ok, nil},
	// PREEMPT by the other initiator, 5.13.11.
	{"sg_persist -n -o -G -S 0xc $X0", ok, nil},
	{"sg_persist -n -o -P -T 5 -K 0xc -S 0xa $X0", ok, nil},
	{"sg_turs -v $A0", unitAttention, []string{"Registrations preempted"}},
	{"sg_turs -v $B0", unitAttention, []string{"Registrations preempted"}},
	{"put $A0", conflict, nil}, {"put $B0", conflict, nil}, {"put $X0", ok, nil},
	{"sg_persist -n -i -r $A0", ok, []string{"Key=0xc"}},
	{"sg_persist -n -o -L -T 5 -K 0xa $A0", conflict, nil}, // no longer registered
	// REGISTER AND IGNORE with the old holder's new key, RELEASE, Exclusive Access, PREEMPT AND ABORT, CLEAR.
	{"sg_persist -n -o -I -S 0xa $A0", ok, nil},
	{"sg_persist -n -o -L -T 5 -K 0xc $X0", ok, nil},
	{"sg_turs -v $A0", unitAttention, []string{"Reservations released"}}, // 5.13.11.2.3, to other registrants
	{"sg_persist -n -o -R -T 3 -K 0xa $A0", ok, nil},
	{"read 0 $X0", conflict, nil},
	{"sg_persist -n -o -A -T 3 -K 0xc -S 0xa $X0", ok, nil},
	{"sg_turs -v $A0", unitAttention, []string{"Registrations preempted"}},
	{"read 0 $A0", conflict, nil},
	{"sg_persist -n -o -C -K 0xc $X0", ok, nil},
	{"sg_persist -n -i -k $A0", ok, []string{"NO registered reservation keys"}},
	{"put $A0", ok, nil}, {"put $B0", ok, nil}, {"put $X0", ok, nil},
	// APTPL is kept, and told.
	{"sg_persist -n -o -G -S 0xa -Z $A0 && sg_persist -n -i -c $A0", ok, []string{"Persist Through Power Loss Active(PTPL_A): 1"}},
	{"sg_persist -n -o -C -K 0xa $A0", ok, nil},
	// RESERVE(6), SPC-2 7.21: of one nexus, gone with a reset.
	{"sg_raw $A0 16 00 00 00 00 00", ok, nil},
	{"put $X0", conflict, nil},
	{"sg_reset -d $A0", ok, nil},
	{"sg_turs -v $B0", unitAttention, []string{"reset"}},
	{"sg_turs $A0; sg_turs $X0; put $X0", ok, nil}, // and so is what was reserved
}

// endings destroy what unit 1 has.
var endings = []sgCase{
	{"read 0 $A1", ok, []string{sevens}},
	{"sg_sanitize --block -Q -w $A1; sg_turs $A1; read 0 $A1", ok, []string{zeros}}, // SBC-3 4.11, 5.25
	{"sg_get_lba_status -l 0 $A1", ok, []string{"blocks:     131072  deallocated"}}, //
	{"sg_raw $A0 c1 00 00 00 00 00", invalidOpcode, nil},
	{"sg_raw -r 512 $A0 28 00 00 02 00 00 00 00 01 00", outOfRange, nil}, // READ(10) of the block after the last
}

// Blocks, as `read` prints them.
const (
	zeros  = "block 00"
	ones   = "block 11"
	sevens = "block 77"
)

// prelude defines what the commands use. put writes a block that nobody looks at.
const prelude = `
block() { head -c 512 /dev/zero | tr '\0' "$1"; }
[ -e /run/sevens-ones ] || {
	block '\000' > /run/zeros; block '\021' > /run/ones; block '\167' > /run/sevens
	cat /run/zeros /run/sevens > /run/zeros-sevens; cat /run/sevens /run/ones > /run/sevens-ones
}
put() { sg_write_same -S -i /run/ones -l 100000 -n 1 $1; }
read() {
	sg_raw -r 512 -o /run/block $2 28 00 $(printf '%02x %02x %02x %02x' $(($1>>24)) $(($1>>16&255)) $(($1>>8&255)) $(($1&255))) 00 00 01 00 > /run/said 2>&1 ||
		{ c=$?; cat /run/said; return $c; }
	for b in 00 11 77; do [ "$(od -An -v -tx1 -w1 /run/block | tr -d ' ' | sort -u)" = $b ] && echo block $b; done
	return 0
}
`

// TestSgUtils holds the engine to the standards with a stock host's tools.
func TestSgUtils(t *testing.T) {
	h := sharedHost(t)
	s := newShelf(t, scratchTarget)
	s.target.SetPortGroups([]target.PortGroup{
		{ID: 1, State: target.Optimized, Preferred: true, Ports: []uint16{1}}, {ID: 2, State: target.NonOptimized, Ports: []uint16{2}}})
	s.attach(t, 0, mem.Options{Bytes: 64 << 20, Name: "scratch 0", PhysicalExponent: 3}, "SCRATCH")
	s.attach(t, 1, mem.Options{Bytes: 64 << 20, Name: "scratch 1"}, "SCRATCH")
	s.attach(t, 300, mem.Options{Bytes: 64 << 20, Name: "scratch 300", BlockBytes: 4096}, "SCRATCH")
	s.connect(h)
	h.discover(t, scratchTarget)
	// A second initiator on the same machine: an interface with another initiator's name.
	node := "iscsiadm -m node -T " + scratchTarget
	h.sh(t, node+" -l")
	t.Cleanup(func() { h.try(t, "iscsiadm -m iface -I other -o delete") })
	h.sh(t, `iscsiadm -m iface -I other -o new && iscsiadm -m iface -I other -o update -n iface.transport_name -v tcp &&
		iscsiadm -m iface -I other -o update -n iface.initiatorname -v iqn.2026-11.io.ledge.qa:other`)
	other := node + " -p " + Portal(0) + ",1 -I other"
	h.record(t, scratchTarget, 3, other+" -o delete; "+other+" -o new")
	h.sh(t, other+" -l && udevadm settle --timeout=120")
	names := ""
	eventually(t, "nine disks", func() string {
		names = ""
		disks := h.disks(t)
		for _, d := range disks {
			who := map[string]string{Portal(0): "A", Portal(1): "B"}[d.portal]
			if strings.HasSuffix(d.initiator, ":other") {
				who = "X"
			}
			// The generic device, not the block device: when that is closed after writing, udev and the kernel look
			// at the disk anew and take the unit attentions that a case waits for. Linux says 16684, 0x412C, for 300
			// in flat addressing.
			names += fmt.Sprintf("%s%s=%s\n", who, strings.Replace(d.lun, "16684", "300", 1), d.generic)
		}
		if len(disks) != 9 {
			return fmt.Sprintf("%d disks:\n%s", len(disks), names)
		}
		return ""
	})
	for _, group := range []struct {
		name  string
		cases []sgCase
	}{{"inquiries", inquiries}, {"writes", writes}, {"reservations", reservations}, {"endings", endings}} {
		t.Run(group.name, func(t *testing.T) {
			for _, c := range group.cases {
				a := h.try(t, names+prelude+c.command)
				if a.Code != c.code {
					t.Errorf("%s: exit %d, not %d\n%s", c.command, a.Code, c.code, a.Output)
				}
				for _, want := range c.want {
					if !strings.Contains(string(a.Output), want) {
						t.Errorf("%s: does not say %q\n%s", c.command, want, a.Output)
					}
				}
			}
		})
	}
}
