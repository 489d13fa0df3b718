package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Placements. Pinned: every thread of the target on core 0, of the client on core 1. A target in Go
// that is started pinned sees one core, and sets GOMAXPROCS to 1, as a user's would under taskset. Free: where the
// scheduler puts them.
const (
	pinned = "pinned"
	free   = "free"

	targetCore = 0
	clientCore = 1
)

// onCore runs f, which starts a process, so that the process may use that core only. The affinity is this
// thread's for as long, and a child has its parent thread's from its first instruction.
func onCore(placement string, core int, f func() error) error {
	if placement != pinned {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("affinity: %w", err)
	}
	one.Set(core)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("pin to core %d: %w", core, err)
	}
	err := f()
	if undo := unix.SchedSetaffinity(0, &before); undo != nil {
		panic(undo) // what follows would be measured in the wrong place
	}
	return err
}

// autogroup is the scheduling group of this process's session, where the kernel has them: with them, a thread's
// priority counts among its session's only, and the session's is written here (sched(7)).
const autogroup = "/proc/self/autogroup"

// realtimePriority is of SCHED_RR: above what a machine runs for its users, below what it runs for itself.
const realtimePriority = 10

// prefer gives this process, and so all that it starts, a nice value, or real-time scheduling; undo gives its session's
// nice value back. Both are for machines that do other things too. With neither nothing is changed.
func prefer(nice int, realtime bool) (undo func() error, err error) {
	undo = func() error { return nil }
	if nice == 0 && !realtime {
		return undo, nil
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return undo, err
	}
	for _, t := range tasks {
		// In Linux both are a thread's, and a thread has its creator's.
		tid, _ := strconv.Atoi(t.Name())
		if realtime {
			err = unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: realtimePriority}, 0)
		} else {
			err = unix.Setpriority(unix.PRIO_PROCESS, tid, nice)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return undo, fmt.Errorf("priority: %w", err)
		}
	}
	b, err := os.ReadFile(autogroup)
	var number, before int
	if _, scan := fmt.Sscanf(string(b), "/autogroup-%d nice %d", &number, &before); err != nil || scan != nil || realtime {
		return undo, nil // the kernel has no such groups, or they do not matter
	}
	set := func(n int) error { return os.WriteFile(autogroup, []byte(strconv.Itoa(n)), 0) }
	return func() error { return set(before) }, set(nice)
}
