package region

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sysfs is where the kernel describes devices; tests have one of their own.
type sysfs string

const realSysfs sysfs = "/sys"

// daxDevice is what sysfs says of a DAX character device.
type daxDevice struct {
	size, align int64
}

// dax describes the character device rdev. ErrKind: it is none of the dax subsystem.
func (s sysfs) dax(rdev uint64) (*daxDevice, error) {
	dir := s.dir("char", rdev)
	sub, err := filepath.EvalSymlinks(filepath.Join(dir, "subsystem"))
	if err != nil || filepath.Base(sub) != "dax" {
		return nil, fmt.Errorf("%w: a character device that is not a DAX device", ErrKind)
	}
	size, err := readNumber(dir, "size")
	if err != nil {
		return nil, err
	}
	d := &daxDevice{size: size, align: 2 << 20} // kernels before 5.10 don't say; 2 MiB is what they use
	if align, err := readNumber(dir, "align"); err == nil && align > 0 && align%blockBytes == 0 {
		d.align = align
	}
	return d, nil
}

// volatileCache tells whether the block device rdev, or the one that it is a partition of, answers writes from a
// cache that loses them without power, unless it is told to write through.
func (s sysfs) volatileCache(rdev uint64) (bool, error) {
	dir := s.dir("block", rdev)
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		b, err := os.ReadFile(filepath.Join(d, "queue", "write_cache"))
		if err == nil {
			return strings.TrimSpace(string(b)) != "write through", nil
		}
	}
	return false, fmt.Errorf("%w: the kernel does not say whether %s has a volatile write cache", ErrVolatileCache, dir)
}

// blockName is the kernel's name of a block device, whatever path leads to it.
func (s sysfs) blockName(rdev uint64) string {
	dir := s.dir("block", rdev)
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	return filepath.Base(dir)
}

func (s sysfs) dir(kind string, rdev uint64) string {
	return filepath.Join(string(s), "dev", kind, fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)))
}

func readNumber(dir, name string) (int64, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
	}
	return n, nil
}
