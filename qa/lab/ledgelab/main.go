// Command ledgelab starts a whole Ledge system on this machine and keeps it until Ctrl-C: `make run` and
// `make run-local`. What it does is package lab's; here it is shown.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/ledge-storage/ledge/qa/lab"
)

const (
	demoName  = "demo"
	demoBytes = 16 << 30
)

func main() {
	o := lab.Options{Ports: lab.DefaultPorts}
	flag.StringVar(&o.Dir, "run", "run", "run directory: the state stays in it")
	flag.StringVar(&o.Image, "image", "build/image", "directory with vmlinuz and initramfs.zst")
	flag.StringVar(&o.Binaries, "bin", "build/bin", "directory with shelfd and hostd")
	flag.BoolVar(&o.Local, "local", false, "controllers as processes on files instead of virtual machines")
	driveGiB := flag.Int64("drive-gib", 4, "size of each new drive")
	flag.IntVar(&o.Ports.Agent, "port", o.Ports.Agent, "the agent's iSCSI port on 127.0.0.1")
	freePorts := flag.Bool("free-ports", false, "choose free ports for everything")
	install := flag.Bool("install", false, "only install the Debian packages that are missing")
	flag.Parse()
	if *freePorts {
		o.Ports = lab.Ports{}
	}
	o.DriveBytes = *driveGiB << 30
	started := time.Now()
	o.Say = func(format string, args ...any) {
		fmt.Printf("[%6.1f s] %s\n", time.Since(started).Seconds(), fmt.Sprintf(format, args...))
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	run := func() error { return run(ctx, cancel, o, started) }
	if *install {
		run = func() error { return lab.InstallPackages(ctx, o.Say) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "ledgelab:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cancel func(), o lab.Options, started time.Time) (err error) {
	l, err := lab.New(o)
	if err != nil {
		return err
	}
	defer func() {
		o.Say("stopping; state stays in %s", l.Dir())
		cancel() // a second Ctrl-C from here on ends the lab itself; the next run finds what is left
		if e := l.Close(); err == nil {
			err = e
		}
		if err == nil {
			o.Say("stopped")
		}
	}()
	if err := l.Start(ctx); err != nil {
		return interrupted(ctx, err)
	}
	v, made, err := l.EnsureVolume(ctx, demoName, demoBytes)
	if err != nil {
		return interrupted(ctx, err)
	}
	if made {
		o.Say("volume %s made", demoName)
	}
	o.Say("everything runs (%.1f s)", time.Since(started).Seconds())
	show(l, v.IQN, v.LUN, v.SizeBytes)
	<-ctx.Done()
	fmt.Println()
	return nil
}

// interrupted drops the error of a start that Ctrl-C cut short.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		fmt.Println()
		return nil
	}
	return err
}

// show prints what runs, and three commands to copy.
func show(l *lab.Lab, iqn string, lun uint16, size int64) {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "PART\tPID\tPORTAL\tAPI\tLOG")
	if l.Enclosure != nil {
		fmt.Fprintf(w, "enclosure\t%d\t127.0.0.1:%d\t\t%s\n", l.Enclosure.PID(), l.Ports().Enclosure, short(l.Enclosure.Log()))
	}
	for _, c := range []*lab.Controller{l.A, l.B} {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		st, _ := c.Status(ctx)
		cancel()
		fmt.Fprintf(w, "controller %s (%s)\t%d\t%s\t%s\t%s\n", c.Name, st.Role, c.PID(), c.Portal(), c.API(), short(c.ConsoleLog()))
	}
	fmt.Fprintf(w, "agent\t%d\t%s\t%s\t%s\n", l.Agent.PID(), l.AgentPortal(), short(l.AgentSocket()), short(l.Agent.Log()))
	fmt.Fprintf(w, "volume %s\t\t%s\t\t%d GiB, LUN %d\n", demoName, iqn, size>>30, lun)
	w.Flush()
	url := fmt.Sprintf("iscsi://%s/%s/%d", l.AgentPortal(), iqn, lun)
	fmt.Printf(`
Copy one of these into another terminal:
  list    iscsi-ls -s iscsi://%s
  write   qemu-io -f raw -c 'write -P 0x5a 0 64M' %s
  read    qemu-io -f raw -c 'read -P 0x5a 0 64M' %s

build/bin/ledge volume show %s   tells what it takes; build/bin/ledge shelf status tells how the shelf is.
Ctrl-C stops everything that was started here.
`, l.AgentPortal(), url, url, demoName)
}

// short is path as seen from here, where that is shorter.
func short(path string) string {
	here, err := os.Getwd()
	if err != nil {
		return path
	}
	if rel, err := filepath.Rel(here, path); err == nil && !strings.HasPrefix(rel, "..") {
		return rel
	}
	return path
}
