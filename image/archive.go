package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

// archive collects the initramfs's files; names are relative to its root.
type archive struct {
	records map[string]cpio.Record
}

// newArchive has what the kernel itself wants to find: the console that PID 1 starts with, and the
// directories that PID 1 mounts on.
func newArchive() *archive {
	a := &archive{records: map[string]cpio.Record{}}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "root", "etc"} {
		a.records[dir] = cpio.Directory(dir, 0o755)
	}
	a.records["dev/console"] = cpio.CharDev("dev/console", 0o600, 5, 1)
	a.records["dev/null"] = cpio.CharDev("dev/null", 0o666, 1, 3)
	return a
}

func (a *archive) file(name string, data []byte, mode uint64) {
	a.parents(name)
	a.records[name] = cpio.StaticFile(name, string(data), mode)
}

func (a *archive) symlink(name, target string) {
	a.parents(name)
	a.records[name] = cpio.Symlink(name, target)
}

// parents adds the directories above name: the kernel's unpacker makes none.
func (a *archive) parents(name string) {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := a.records[dir]; !ok {
			a.records[dir] = cpio.Directory(dir, 0o755)
		}
	}
}

// bytes is the archive: names sorted (so a directory precedes what is in it), inodes counted from 1, owner
// root, time 0.
func (a *archive) bytes() ([]byte, error) {
	names := make([]string, 0, len(a.records))
	for name := range a.records {
		names = append(names, name)
	}
	sort.Strings(names)
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	for i, name := range names {
		r := a.records[name]
		r.Ino, r.NLink, r.UID, r.GID, r.MTime = uint64(i+1), 1, 0, 0, 0
		r.Dev, r.Major, r.Minor = 0, 0, 0
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("archive: %s: %w", name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	return b.Bytes(), nil
}

// compress makes one zstd frame. One encoder goroutine: with several, the bytes could depend on their number.
func compress(data []byte) ([]byte, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	return enc.EncodeAll(data, make([]byte, 0, len(data)/2)), nil
}

// writeImage writes kernel and initramfs, unless they are there and made of the same.
func writeImage(a *archive, k *kernel, o Options) ([]part, error) {
	raw, err := a.bytes()
	if err != nil {
		return nil, err
	}
	kernelData, err := os.ReadFile(k.vmlinuz)
	if err != nil {
		return nil, err
	}
	if err := ensure(filepath.Join(o.Out, "vmlinuz"), kernelData); err != nil {
		return nil, err
	}
	// The compressed file's name in the cache is the hash of what is in it, and of how it is compressed.
	h := sha256.Sum256(append([]byte("zstd best 1\n"), raw...))
	stamp := filepath.Join(o.Cache, "initramfs.stamp")
	target := filepath.Join(o.Out, "initramfs.zst")
	old, _ := os.ReadFile(stamp)
	packed, err := os.ReadFile(target)
	if err != nil || string(old) != stampOf(h, packed) {
		o.Say("initramfs   compressing %.1f MB", float64(len(raw))/1e6)
		if packed, err = compress(raw); err != nil {
			return nil, err
		}
		if err := writeFile(target, packed, 0o644); err != nil {
			return nil, err
		}
		if err := writeFile(stamp, []byte(stampOf(h, packed)), 0o644); err != nil {
			return nil, err
		}
	}
	return []part{describe("vmlinuz", kernelData), describe("initramfs.zst", packed)}, nil
}

// stampOf ties an input to its output: a stamp of another output, or of a damaged one, does not match.
func stampOf(input [sha256.Size]byte, output []byte) string {
	sum := sha256.Sum256(output)
	return hex.EncodeToString(input[:]) + " " + hex.EncodeToString(sum[:]) + "\n"
}

func describe(name string, data []byte) part {
	sum := sha256.Sum256(data)
	return part{Name: name, Bytes: int64(len(data)), SHA256: hex.EncodeToString(sum[:])}
}

// ensure writes data to path unless it is there already.
func ensure(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	return writeFile(path, data, 0o644)
}
