package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
)

// identity is what an operator looks for on a drive and its tray. Fields are empty where the kernel knows none: plain
// files have no identity but their path.
type identity struct {
	Serial, Model, Slot string
}

// sysClassBlock is where the kernel describes block devices by name.
var sysClassBlock = "/sys/class/block"

// identify reads what the kernel knows of the drive at a path; it never asks the drive.
func identify(path string) identity {
	dir := filepath.Join(sysClassBlock, sysName(path))
	device := filepath.Join(dir, "device")
	var id identity
	if st, err := os.Stat(path); err != nil || st.Mode()&os.ModeDevice == 0 {
		return id
	}
	for _, f := range []string{filepath.Join(device, "vpd_pg80"), filepath.Join(device, "serial"), filepath.Join(dir, "serial")} {
		b, err := os.ReadFile(f)
		if err == nil && strings.HasSuffix(f, "vpd_pg80") && len(b) >= 4 {
			b = b[4:] // SPC-4 7.8.21: page code, length, then the number
		}
		if id.Serial = printable(b); err == nil && id.Serial != "" {
			break
		}
	}
	if b, err := os.ReadFile(filepath.Join(device, "model")); err == nil {
		id.Model = printable(b)
	}
	// The enclosure's own word for the place (driver ses), else the drive's SCSI address.
	if places, _ := filepath.Glob(filepath.Join(device, "enclosure_device:*")); len(places) > 0 {
		_, name, _ := strings.Cut(filepath.Base(places[0]), ":")
		id.Slot = printable([]byte(name))
	} else if link, err := filepath.EvalSymlinks(device); err == nil && strings.Count(filepath.Base(link), ":") == 3 {
		id.Slot = filepath.Base(link)
	}
	return id
}

// sysName is the kernel's name of the device at a path, which may be a link (/dev/disk/by-id).
func sysName(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	return filepath.Base(path)
}

// wholeDisk returns the path of the disk that the path is a partition of; "" for one that is none.
func wholeDisk(path string) string {
	dir := filepath.Join(sysClassBlock, sysName(path))
	st, err := os.Stat(path)
	if err != nil || st.Mode()&os.ModeDevice == 0 {
		return ""
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		return ""
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		return filepath.Join(filepath.Dir(path), filepath.Base(filepath.Dir(real)))
	}
	return ""
}

// printable keeps what a drive says of itself from becoming more than a word on a terminal.
func printable(b []byte) string {
	b = bytes.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, b)
	b = bytes.TrimSpace(b)
	return string(b[:min(len(b), 64)])
}
