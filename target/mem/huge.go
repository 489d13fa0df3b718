package mem

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Huge pages. In pages of 4 KiB each access to a large unit misses the processor's translation cache,
// which in a virtual machine costs two walks of page tables: a fifth of a small command's time.

// reserve takes the memory of the whole unit from the system, as huge pages where it has them, and
// touches all of it, so that no command pays for it. It goes back when the device is collected.
func (d *Device) reserve(bytes int64) error {
	size := (bytes + pageBytes - 1) / pageBytes * pageBytes
	m, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("mem: %d bytes from the system: %w", size, err)
	}
	if err := unix.Madvise(m, unix.MADV_HUGEPAGE); err != nil && err != unix.EINVAL {
		unix.Munmap(m)
		return fmt.Errorf("mem: huge pages: %w", err)
	}
	if err := unix.Madvise(m, unix.MADV_POPULATE_WRITE); err != nil && err != unix.EINVAL {
		unix.Munmap(m)
		return fmt.Errorf("mem: %d bytes from the system: %w", size, err)
	}
	d.region, d.home = m, make([]page, size/pageBytes)
	runtime.AddCleanup(d, func(m []byte) { unix.Munmap(m) }, m)
	return nil
}

// newPage returns a page of zeros: the one whose memory is of the region, unless that was freed while
// it was lent and still is. The page's lock is held exclusively.
func (d *Device) newPage(n int64) *page {
	if d.region == nil || d.home[n].loans.Load() != 0 {
		return &page{data: make([]byte, pageBytes)}
	}
	p := &d.home[n]
	if p.data == nil {
		p.data = d.region[n*pageBytes : (n+1)*pageBytes : (n+1)*pageBytes]
	}
	clear(p.data)
	return p
}
