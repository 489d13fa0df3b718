package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// The disk that boots without QEMU's help, with an old-fashioned partition table because it takes ten lines and UEFI
// reads it (UEFI 2.10, 5.2.2):
//
//	at      size    what
//	0       512     MBR: two entries
//	1 MiB   64 MiB  type 0xEF, EFI system partition (FAT): EFI/BOOT/BOOTX64.EFI, the unified kernel image
//	65 MiB  …       type 0x83: the root's ext4 image
//
// An entry: 0 active, 1 CHS of the first block (3), 4 type, 5 CHS of the last (3), 8 first block, 12 blocks; little
// endian. 0x1BE is the first one's place, 0x1FE that of the signature 55 AA.
const (
	mib          = 1 << 20
	espAt        = 1 * mib
	espBytes     = 64 * mib
	rootAt       = espAt + espBytes
	sectorBytes  = 512
	bootRoot     = "/dev/vda2" // on a virtio disk
	typeESP      = 0xEF
	typeLinux    = 0x83
	firstEntry   = 0x1BE
	entryBytes   = 16
	signatureAt  = 0x1FE
	noCHS        = 0xFF // beyond what cylinders, heads and sectors can say
	bootFileName = "::EFI/BOOT/BOOTX64.EFI"
)

// WriteDisk makes the disk at path and returns its size, a multiple of 1 MiB.
func (b *Built) WriteDisk(ctx context.Context, path string) (size int64, err error) {
	root, err := os.Open(b.Root)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	info, err := root.Stat()
	if err != nil {
		return 0, err
	}
	size = rootAt + (info.Size()+mib-1)/mib*mib
	disk, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	if err := disk.Truncate(size); err != nil {
		return 0, err
	}
	var mbr [sectorBytes]byte
	for i, p := range []struct {
		kind  byte
		start int64
		size  int64
	}{{typeESP, espAt, espBytes}, {typeLinux, rootAt, size - rootAt}} {
		e := mbr[firstEntry+i*entryBytes:]
		copy(e, []byte{0, noCHS, noCHS, noCHS, p.kind, noCHS, noCHS, noCHS})
		binary.LittleEndian.PutUint32(e[8:], uint32(p.start/sectorBytes))
		binary.LittleEndian.PutUint32(e[12:], uint32(p.size/sectorBytes))
	}
	mbr[signatureAt], mbr[signatureAt+1] = 0x55, 0xAA
	if _, err := disk.WriteAt(mbr[:], 0); err != nil {
		return 0, err
	}
	if _, err := io.Copy(io.NewOffsetWriter(disk, rootAt), root); err != nil {
		return 0, err
	}
	at := fmt.Sprintf("%s@@%d", path, espAt)
	for _, args := range [][]string{
		{"mformat", "-i", at, "-T", fmt.Sprint(espBytes / sectorBytes), "-h", "64", "-s", "32", "-v", "GUEST", "::"},
		{"mmd", "-i", at, "::EFI", "::EFI/BOOT"},
		{"mcopy", "-i", at, b.Unified, bootFileName},
	} {
		if _, err := run(ctx, "", args[0], args[1:]...); err != nil {
			return 0, err
		}
	}
	return size, nil
}
