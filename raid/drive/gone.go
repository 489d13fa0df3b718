package drive

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Gone says that the path does not lead to this drive any more: there is nothing, or another drive that was plugged in
// and got the name. It asks the operating system, never the drive, so a drive that hangs does not hang it.

// Gone of a file: another inode. A fence of ours that put a copy in its place has taken that copy up already.
func (f *File) Gone() bool {
	st, err := os.Stat(f.path)
	if err != nil {
		return os.IsNotExist(err)
	}
	f.swap.RLock()
	defer f.swap.RUnlock()
	own, err := f.now.f.Stat()
	return err != nil || !os.SameFile(st, own)
}

// blkGetDiskSeq is BLKGETDISKSEQ of linux/fs.h: a number that the kernel (5.15 and newer) gives to each disk that
// appears, and never again.
const blkGetDiskSeq = 0x80081280

// sysDevBlock is where the kernel shows block devices by their numbers.
var sysDevBlock = "/sys/dev/block"

// Gone of a block device: another device number, or another disk at the same number.
func (b *Block) Gone() bool {
	st, err := os.Stat(b.Name())
	if err != nil {
		return os.IsNotExist(err)
	}
	var now, own unix.Stat_t
	if unix.Stat(b.Name(), &now) != nil || st.Mode()&os.ModeDevice == 0 {
		return true
	}
	if err := control(b.f, func(fd uintptr) error { return unix.Fstat(int(fd), &own) }); err != nil || own.Rdev != now.Rdev {
		return true
	}
	dir := fmt.Sprintf("%s/%d:%d", sysDevBlock, unix.Major(now.Rdev), unix.Minor(now.Rdev))
	if _, err := os.Stat(sysDevBlock); err != nil {
		return false // no sysfs: the node is all there is to see
	}
	if _, err := os.Stat(dir); err != nil {
		return os.IsNotExist(err) // a node that nothing stands behind
	}
	var seq uint64
	text, err := os.ReadFile(dir + "/diskseq")
	if err != nil || b.ioctl(blkGetDiskSeq, unsafe.Pointer(&seq)) != nil {
		return false
	}
	shown, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 64)
	return err == nil && shown != seq
}
