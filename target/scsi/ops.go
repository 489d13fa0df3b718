package scsi

type opFlags uint16

const (
	// opNoUnit: answered for a number without a unit too.
	opNoUnit opFlags = 1 << iota
	// opNoAttention: neither reports nor clears a unit attention (SAM-5 5.14).
	opNoAttention
	// opStandby: served in the access states standby, unavailable and transitioning (SPC-4 5.15.2).
	opStandby
	// opInStandby: served in the access state standby, beyond what must be (SPC-4 5.15.2.4.4 allows more).
	opInStandby
	// opNoDevice: does not call the device, so that it never blocks.
	opNoDevice
	// opMedium: needs a unit that is started.
	opMedium
	// opWrites, opReads: what a persistent reservation of another nexus forbids (SPC-4 table 66).
	opWrites
	opReads
	// opAnyHolder: never in conflict with a reservation.
	opAnyHolder
	// opSlow: may block even where the device does not.
	opSlow
	// opRange: changes the blocks that its CDB names (Task.lba, Task.blocks); opChanges: changes
	// blocks that its parameter list names. Tokens of them end (token.go); copies are visits.
	opRange
	opChanges
	// opWhole: works on the whole unit, alone (sanitize.go).
	opWhole
	// opReservation: PERSISTENT RESERVE, which a target in standby may send to the one that serves the unit.
	opReservation
)

// op is a command: how its CDB looks and what carries it out.
type op struct {
	code byte
	// action is the service action, -1 where there is none.
	action int
	// usage is the CDB usage map: a bit for each bit of the CDB that is looked at. Its length
	// is the CDB's.
	usage []byte
	flags opFlags
	// decode fills in the fields of Task that the CDB names, and checks them.
	decode func(*Task) error
	run    func(*Task) error
}

const noAction = -1

// setGroupsCode is the operation code of SET TARGET PORT GROUPS.
const setGroupsCode = 0xA4

// The usage maps of the common forms of a CDB.
var (
	usageRead6    = []byte{0x08, 0x1F, 0xFF, 0xFF, 0xFF, 0x04}
	usageRead10   = []byte{0x28, 0xFA, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0xFF, 0xFF, 0x04}
	usageRead12   = []byte{0xA8, 0xFA, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usageRead16   = []byte{0x88, 0xFA, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usageWV10     = []byte{0x2E, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0xFF, 0xFF, 0x04}
	usageWV12     = []byte{0xAE, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usageWV16     = []byte{0x8E, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usageSync10   = []byte{0x35, 0x06, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0xFF, 0xFF, 0x04}
	usageSync16   = []byte{0x91, 0x06, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usageWS10     = []byte{0x41, 0xF8, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0xFF, 0xFF, 0x04}
	usageWS16     = []byte{0x93, 0xF9, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usageAlloc16  = []byte{0x9E, 0x1F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0x04}
	usageAlloc12  = []byte{0xA3, 0xFF, 0x00, 0x00, 0x00, 0x00, 0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0x04}
	usageCopyOut  = []byte{0x83, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}
	usageCopyIn1  = []byte{0x84, 0x1F, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}
	usageCopyIn4  = []byte{0x84, 0x1F, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}
	usageToken    = []byte{0x83, 0x1F, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}
	usagePRIn     = []byte{0x5E, 0x1F, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0x04}
	usagePROut    = []byte{0x5F, 0x1F, 0xFF, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x04}
	usageSanitize = []byte{0x48, 0xBF, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0x04}
	usage6        = []byte{0x00, 0x00, 0x00, 0x00, 0x00, 0x04}
)

// The CDB table. REPORT SUPPORTED OPERATION CODES answers from it too, so that it cannot lie.
func operations() []op {
	const (
		read  = opReads | opMedium
		write = opWrites | opMedium
		store = write | opRange
		admin = opAnyHolder | opStandby
		long  = opSlow // may go over the whole unit: not on the reader's time
		whole = opSlow | opWhole
		prIn  = opAnyHolder | opSlow | opReservation // may ask the store
		prOut = opAnyHolder | opSlow | opReservation // waits for the store and for aborted tasks
		// Linux asks for the capacity once, when it finds the disk: a path that was in standby then would have none
		// for ever, and after a takeover every command on it would be "beyond end of device".
		capacity = opAnyHolder | opMedium | opNoDevice | opInStandby
	)
	return []op{
		{0x00, noAction, usage6, opNoDevice | opMedium | opAnyHolder, nil, testUnitReady},
		{0x03, noAction, []byte{0x03, 0x01, 0, 0, 0xFF, 0x04}, opNoUnit | opNoAttention | admin | opNoDevice, nil, requestSense},
		{0x12, noAction, []byte{0x12, 0x01, 0xFF, 0xFF, 0xFF, 0x04}, opNoUnit | opNoAttention | admin | opNoDevice, nil, inquiry},
		{0xA0, noAction, []byte{0xA0, 0, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}, opNoUnit | opNoAttention | admin | opNoDevice, nil, reportLUNs},

		{0x08, noAction, usageRead6, read, decodeRead, read_},
		{0x28, noAction, usageRead10, read, decodeRead, read_},
		{0xA8, noAction, usageRead12, read, decodeRead, read_},
		{0x88, noAction, usageRead16, read, decodeRead, read_},
		{0x0A, noAction, usageRead6, store, decodeWrite, write_},
		{0x2A, noAction, usageRead10, store, decodeWrite, write_},
		{0xAA, noAction, usageRead12, store, decodeWrite, write_},
		{0x8A, noAction, usageRead16, store, decodeWrite, write_},
		{0x2E, noAction, usageWV10, store, decodeWrite, writeAndVerify},
		{0xAE, noAction, usageWV12, store, decodeWrite, writeAndVerify},
		{0x8E, noAction, usageWV16, store, decodeWrite, writeAndVerify},
		{0x2F, noAction, usageWV10, read | long, decodeVerify, verify},
		{0xAF, noAction, usageWV12, read | long, decodeVerify, verify},
		{0x8F, noAction, usageWV16, read | long, decodeVerify, verify},
		{0x8B, noAction, usageRead16, store, decodeWrite, orWrite},
		{0x9C, noAction, []byte{0x9C, 0xFA, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x04}, store, decodeWriteAtomic, writeAtomic},
		{0x89, noAction, []byte{0x89, 0xFA, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0x00, 0x00, 0xFF, 0x1F, 0x04}, store, decodeCompareAndWrite, compareAndWrite},
		{0x34, noAction, usageSync10, read | opNoDevice, decodeExtent, preFetch},
		{0x90, noAction, usageSync16, read | opNoDevice, decodeExtent, preFetch},
		{0x35, noAction, usageSync10, write, decodeSync, synchronizeCache},
		{0x91, noAction, usageSync16, write, decodeSync, synchronizeCache},
		{0x41, noAction, usageWS10, store | long, decodeWriteSame, writeSame},
		{0x93, noAction, usageWS16, store | long, decodeWriteSame, writeSame},
		{0x42, noAction, []byte{0x42, 0x01, 0, 0, 0, 0, 0x1F, 0xFF, 0xFF, 0x04}, write | long | opChanges, decodeUnmap, unmap},
		{formatCode, noAction, []byte{formatCode, 0x3F, 0, 0, 0, 0x04}, write | whole, decodeFormat, formatUnit},
		{sanitizeCode, sanitizeOverwrite, usageSanitize, write | whole, decodeSanitize, overwrite},
		{sanitizeCode, sanitizeBlockErase, usageSanitize, write | whole, decodeSanitize, blockErase},
		{sanitizeCode, sanitizeCryptoErase, usageSanitize, write | whole, decodeSanitize, cryptoErase},
		{sanitizeCode, sanitizeExitFailure, usageSanitize, write | whole, decodeSanitize, exitFailureMode},
		{0x9E, 0x12, usageAlloc16, read | long, decodeMappings, getLBAStatus},
		{0x25, noAction, []byte{0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0x04}, capacity, nil, readCapacity10},
		{0x9E, 0x10, []byte{0x9E, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}, capacity, nil, readCapacity16},

		{0x1A, noAction, []byte{0x1A, 0x08, 0xFF, 0xFF, 0xFF, 0x04}, opReads | opNoDevice | opStandby, nil, modeSense},
		{0x5A, noAction, []byte{0x5A, 0x18, 0xFF, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0x04}, opReads | opNoDevice | opStandby, nil, modeSense},
		{0x4D, noAction, []byte{0x4D, 0x01, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x04}, opReads | opNoDevice | opStandby, nil, logSense},
		{0x15, noAction, []byte{0x15, 0x11, 0, 0, 0xFF, 0x04}, opWrites | opNoDevice, decodeModeSelect, modeSelect},
		{0x55, noAction, []byte{0x55, 0x11, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0x04}, opWrites | opNoDevice, decodeModeSelect, modeSelect},
		{0x1B, noAction, []byte{0x1B, 0x01, 0, 0x0F, 0xF7, 0x04}, opWrites, nil, startStop},
		{0x1D, noAction, []byte{0x1D, 0xFF, 0, 0xFF, 0xFF, 0x04}, opWrites | opNoDevice, nil, sendDiagnostic},

		{0x16, noAction, usage6, opAnyHolder | opNoDevice, nil, reserve},
		{0x56, noAction, []byte{0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0x04}, opAnyHolder | opNoDevice, nil, reserve},
		{0x17, noAction, usage6, opAnyHolder | opNoDevice, nil, release},
		{0x57, noAction, []byte{0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0x04}, opAnyHolder | opNoDevice, nil, release},

		{0x83, actionCopy1, usageCopyOut, write | opSlow, decodeCopy, extendedCopy1},
		{0x83, actionCopy4, usageCopyOut, write | opSlow, decodeCopy, extendedCopy4},
		{0x83, actionPopulate, usageToken, read | opSlow, decodePopulate, populateToken},
		{0x83, actionUseToken, usageToken, write | opSlow, decodeUseToken, writeUsingToken},
		{0x83, actionAbort, []byte{0x83, 0x1F, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x04}, opAnyHolder | opSlow, nil, copyOperationAbort},
		{0x84, 0x00, usageCopyIn1, opReads | opNoDevice, nil, copyStatus1},
		{0x84, 0x03, usageCopyOut, opAnyHolder | opNoDevice, nil, copyParameters},
		{0x84, 0x04, usageCopyIn1, opReads | opNoDevice, nil, copyFailure},
		{0x84, 0x05, usageCopyIn4, opReads | opNoDevice, nil, copyStatus4},
		{0x84, 0x06, usageCopyIn4, opReads | opNoDevice, nil, copyData4},
		{0x84, 0x07, usageCopyIn4, opReads | opNoDevice, nil, rodTokenInformation},
		{0x84, 0x08, usageCopyOut, opReads | opNoDevice, nil, reportAllTokens},
		{0x37, noAction, []byte{0x37, 0, 0x1F, 0, 0, 0, 0, 0xFF, 0xFF, 0x04}, opReads | opNoDevice, nil, readDefectData},
		{0xB7, noAction, []byte{0xB7, 0x1F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}, opReads | opNoDevice, nil, readDefectData},

		{0x5E, 0x00, usagePRIn, prIn, nil, prInReadKeys},
		{0x5E, 0x01, usagePRIn, prIn, nil, prInReadReservation},
		{0x5E, 0x02, usagePRIn, prIn, nil, prInCapabilities},
		{0x5E, 0x03, usagePRIn, prIn, nil, prInFullStatus},
		{0x5F, 0x00, usagePROut, prOut, decodePROut, prOutRun(prRegister)},
		{0x5F, 0x01, usagePROut, prOut, decodePROut, prOutRun(prReserve)},
		{0x5F, 0x02, usagePROut, prOut, decodePROut, prOutRun(prRelease)},
		{0x5F, 0x03, usagePROut, prOut, decodePROut, prOutRun(prClear)},
		{0x5F, 0x04, usagePROut, prOut, decodePROut, prOutRun(prPreempt)},
		{0x5F, 0x05, usagePROut, prOut, decodePROut, prOutRun(prPreemptAndAbort)},
		{0x5F, 0x06, usagePROut, prOut, decodePROut, prOutRun(prRegisterAndIgnore)},
		{0x5F, 0x07, usagePROut, prOut, decodePROut, prOutRun(prMove)},

		{0xA3, 0x0A, usageAlloc12, admin | opNoDevice, nil, reportTargetPortGroups},
		{setGroupsCode, 0x0A, []byte{setGroupsCode, 0x1F, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}, admin | opSlow, decodeSetGroups, setTargetPortGroups},
		{0xA3, 0x0C, []byte{0xA3, 0x1F, 0x87, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}, admin | opNoDevice, nil, reportOperationCodes},
		{0xA3, 0x0D, []byte{0xA3, 0x1F, 0x80, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0x04}, admin | opNoDevice, nil, reportTaskManagement},
	}
}

// decodeRange takes LBA and length from the fields that the CDB's length puts them in.
func (t *Task) decodeRange() {
	switch t.CDB[0] >> 5 {
	case 0:
		t.lba = uint64(t.CDB[1]&0x1F)<<16 | t.be16(2)
		t.blocks = uint64(t.CDB[4])
		if t.blocks == 0 {
			t.blocks = 256
		}
	case 1, 2:
		t.lba, t.blocks = t.be32(2), t.be16(7)
	case 5:
		t.lba, t.blocks = t.be32(2), t.be32(6)
	default:
		t.lba, t.blocks = t.be64(2), t.be32(10)
	}
}

// checkRange refuses what lies beyond the unit's end.
func (t *Task) checkRange() error {
	if t.lba > t.info.Blocks || t.blocks > t.info.Blocks-t.lba {
		return &sense{key: keyIllegalRequest, code: ascRange}
	}
	return nil
}

// checkTransfer refuses what the block limits page says is too long.
func (t *Task) checkTransfer() error {
	if t.blocks > t.maxTransferBlocks() {
		return badCDB(lengthField(t.CDB[0]), 7)
	}
	return nil
}

func (t *Task) maxTransferBlocks() uint64 {
	most := uint64(t.Nexus.Target.opts.MaxTransferBytes / t.info.BlockBytes)
	if m := uint64(t.info.MaxBlocks); m != 0 && m < most {
		most = m
	}
	return most
}

func lengthField(code byte) int {
	switch code >> 5 {
	case 0:
		return 4
	case 1, 2:
		return 7
	case 5:
		return 6
	}
	return 10
}

// checkProtection refuses a request for protection information, which the unit does not keep.
func (t *Task) checkProtection() error {
	if t.CDB[0]>>5 != 0 && t.CDB[1]&0xE0 != 0 {
		return badCDB(1, 7)
	}
	return nil
}

func (t *Task) checkWritable() error {
	if t.info.ReadOnly || t.unit.mode.Load()&modeWriteProtect != 0 {
		return &sense{key: keyDataProtect, code: ascWriteProtected}
	}
	return nil
}
