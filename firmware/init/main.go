// Command init is PID 1 of a controller. It owns everything between the kernel and shelfd: mounts, kernel
// modules, links, the configuration, the wait for NVRAM and drives, supervision, the watchdog, the rescue
// shell and the way down. Each has a file.
//
// It promises never to exit, whatever fails: the kernel panics when PID 1 ends. A step that fails is said
// on the console and the next one is tried; what a step needs it checks itself. It touches no block of
// any drive and no byte of NVRAM: shelfd does.
//
// # Order
//
//  1. mounts      proc sys dev run tmp                                  mounts.go
//  2. board       ledge.board= and ledge.controller= of the command line; config.go
//  3. modules     the board's, with their dependencies                  modules.go
//  4. watchdog    armed as soon as its driver is there, fed till power off; watchdog.go
//  5. config      fw_cfg, else the boot disk, completed from the board → /run/ledge/shelfd.json; config.go bootdisk.go
//  6. links       loopback, management, partner                         (firmware/network)
//  7. devices     NVRAM and drives appear                               devices.go
//  8. shelfd      started, and started again                            supervise.go
//
// # Exit codes of shelfd
//
//	code    meaning                        what init does
//	0       it was told to stop            nothing: the controller is going down, or an operator stopped it
//	1       bad configuration              says so and waits for an operator: a restart cannot help
//	2       crash, other codes, signals    starts it again after 1 s, 2 s, 4 s … 30 s; 1 s again after a minute's run
//	3       fenced                         starts it again at once: it comes up as standby
//	4       refused to serve               starts it again after 30 s: the partner may have appeared
//
// # Console
//
// Everything is said on the board's serial console with the seconds since the kernel started. Enter there
// asks for a rescue shell (u-root's gosh); its exit returns to the console. `ledge.rescue` on the kernel's
// command line starts the shell instead of shelfd. Whoever has the serial console has the machine: it
// asks for no password.
//
// SIGTERM, Ctrl-Alt-Del and the power button stop shelfd (SIGTERM, 20 s, SIGKILL) and power off.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this is a controller's PID 1; it does nothing elsewhere")
		os.Exit(1)
	}
	forever(func() { run(context.Background()) })
}

// forever keeps PID 1 alive: a panic in duty is reported, and the machine stays up with its console, its
// watchdog and what was started so far.
func forever(duty func()) {
	func() {
		defer func() {
			if r := recover(); r != nil {
				fmt.Printf("ledge init: broken: %v; the controller stays up for its console\n", r)
			}
		}()
		duty()
	}()
	for {
		time.Sleep(time.Hour)
	}
}

// run goes through the steps of the package comment.
func run(ctx context.Context) {
	mounted := mountAll()
	con := openConsole("")
	con.step("mounts", mounted)

	// Signals before the first child: a Ctrl-Alt-Del during boot must not be lost, and Ctrl-Alt-Del must
	// reach us at all instead of resetting the machine.
	ctrlAltDelToInit()
	stop := make(chan os.Signal, 4)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR)
	children := newReaper()

	boot := bootArguments()
	board, err := boot.board()
	who := boot.Controller
	if who == "" {
		who = "as its configuration says"
	}
	con.step("board", err, "%s, controller %s", boot.Board, who)
	if board != nil {
		con = openConsole(board.Console)
		con.step("modules", nil, "%s", loadModules(con, board.Modules))
	}
	dog := startWatchdog(con, board)

	go children.reap()
	go watchPowerButton(con, stop)
	down := &powerOff{con: con, dog: dog}
	sup := newSupervisor(con, children)
	go newRescue(con, children).listen(boot.Rescue)

	if board != nil && !boot.Rescue {
		go prepareAndServe(ctx, con, boot, board, sup)
	}
	s := <-stop
	down.run(s, sup)
}

// prepareAndServe does steps 5 to 8.
func prepareAndServe(ctx context.Context, con *console, boot arguments, board *boardFile, sup *supervisor) {
	defer func() {
		if r := recover(); r != nil {
			con.say("broken: %v", r)
		}
	}()
	cfg, err := readConfig(ctx, con, board, boot.Controller)
	con.step("config", err, "%s", cfg.summary)
	con.step("links", bringUpLinks(ctx, con, board, cfg.controller))
	con.step("devices", nil, "%s", waitForDevices(ctx, con, board))
	if err != nil {
		con.say("no shelfd without a configuration; press Enter for a rescue shell")
		return
	}
	sup.serve(shelfdPath, "--config", cfg.path)
}
