// Command hostd is Ledge's host agent: it joins a shelf and exports deduplicated, compressed, cached
// volumes over iSCSI.
//
//	hostd --config FILE [--check]
//
// --check reads and checks the configuration, says what is wrong with it, and ends. SIGINT and SIGTERM
// end the agent cleanly; a second one ends it at once, which loses nothing acknowledged.
//
// Exit codes: 0 clean end, 1 failed (restart it), 2 bad usage or configuration (do not restart it
// before it is mended), 3 another host has opened the store (do not restart it).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/ledge-storage/ledge/host/agent"
	"github.com/ledge-storage/ledge/host/store"
)

// version is set by the linker.
var version = "dev"

const (
	exitClean  = 0
	exitFailed = 1
	exitConfig = 2
	exitFenced = 3
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("hostd", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { io.WriteString(stderr, usage) }
	path := flags.String("config", "", "")
	check := flags.Bool("check", false, "")
	showVersion := flags.Bool("version", false, "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return exitClean
	} else if err != nil {
		return exitConfig
	}
	if *showVersion {
		fmt.Fprintln(stdout, version)
		return exitClean
	}
	if *path == "" || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "hostd: want --config FILE and nothing else; see hostd --help")
		return exitConfig
	}
	cfg, err := agent.LoadConfig(*path)
	if err == nil {
		err = cfg.Check()
	}
	if err != nil {
		fmt.Fprintf(stderr, "hostd: %v\n", err)
		return exitConfig
	}
	if *check {
		fmt.Fprintf(stdout, "%s: good\n", *path)
		return exitClean
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	a, err := agent.New(cfg, agent.Options{Logger: log, Version: version, Open: agent.OpenStore(cfg, log)})
	if err != nil {
		fmt.Fprintf(stderr, "hostd: %v\n", err)
		return exitFailed
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the second signal has its default effect
	log.Info("ledge: hostd runs", "host", cfg.Name, "portal", a.Portal(), "api", cfg.API, "version", version)
	switch err := a.Run(ctx); {
	case errors.Is(err, store.ErrFenced):
		fmt.Fprintf(stderr, "hostd: %v\n", err)
		return exitFenced
	case err != nil:
		fmt.Fprintf(stderr, "hostd: %v\n", err)
		return exitFailed
	}
	log.Info("ledge: hostd ended")
	return exitClean
}
