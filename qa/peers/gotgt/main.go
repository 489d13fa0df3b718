// Gotgt runs gostor/gotgt v0.2.2 as a process of its own, for comparison: it serves one file as LUN 1.
//
// Usage: gotgt FILE PORT IQN
//
// A process of its own because a stranger's login ends it (DESIGN.md, section 7). It listens on every
// address: its Run takes a port only.
package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/gostor/gotgt/pkg/config"
	_ "github.com/gostor/gotgt/pkg/port/iscsit" // registers the iSCSI driver
	"github.com/gostor/gotgt/pkg/scsi"
	_ "github.com/gostor/gotgt/pkg/scsi/backingstore" // registers the file store
	log "github.com/sirupsen/logrus"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: gotgt FILE PORT IQN")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "gotgt:", err)
		os.Exit(1)
	}
}

func run(file, port, iqn string) error {
	log.SetLevel(log.ErrorLevel)
	p, err := strconv.Atoi(port)
	if err != nil {
		return fmt.Errorf("port %q: %w", port, err)
	}
	c := &config.Config{
		Storages:     []config.BackendStorage{{DeviceID: 1000, Path: "file:" + file, Online: true, BlockShift: 9}},
		ISCSIPortals: []config.ISCSIPortalInfo{{ID: 0, Portal: "127.0.0.1:" + port}},
		ISCSITargets: map[string]config.ISCSITarget{iqn: {
			TPGTs: map[string][]uint64{"1": {0}},
			LUNs:  map[string]uint64{"1": 1000},
		}},
	}
	if err := scsi.InitSCSILUMap(c); err != nil {
		return fmt.Errorf("lun map: %w", err)
	}
	driver, err := scsi.NewTargetDriver("iscsi", scsi.NewSCSITargetService())
	if err != nil {
		return fmt.Errorf("driver: %w", err)
	}
	if err := driver.NewTarget(iqn, c); err != nil {
		return fmt.Errorf("target: %w", err)
	}
	return driver.Run(p)
}
