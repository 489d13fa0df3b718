// Command ledge is the operator's tool: the shelf's controllers, the host's agent and its volumes.
//
//	ledge shelf  init | status | takeover
//	ledge pool   show | create | set | drain | give-up
//	ledge array  show | scrub | rate | grow
//	ledge drive  list | rescan | fail | replace | readd | wipe
//	ledge lun    list | show | create | resize | rename | delete
//	ledge volume create | list | show | stats | top | clone | promote | rename | resize | compression | export | import | delete
//	ledge snapshot create | list | diff | rollback | delete
//	ledge host   status | index | accept-lost
//
// It finds the agent's socket by --socket, $LEDGE_SOCKET, $LEDGE_RUN/hostd.sock, ./run/hostd.sock,
// ./run-local/hostd.sock and /run/ledge/hostd.sock, in this order; and the shelf's addresses likewise in
// shelf.json of those directories: {"apis": {"A": URL, "B": URL}, "token": "…"}.
//
// What cannot be undone is confirmed: by --yes, or by typing the name again where a terminal asks. What would lose
// data or the last redundancy is refused without --force, and what would lose living members' data always.
//
// Exit codes: 0 done, 1 the operation failed or was refused, 2 wrong usage.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "dev"

const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// usageError is a command line that can never work.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// hinted is a failure with advice.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	t := &tool{out: stdout, in: os.Stdin, pause: time.Second}
	if f, ok := stdout.(*os.File); ok {
		t.screen = isTerminal(f)
		t.tty = isTerminal(os.Stdin)
	}
	return t.run(ctx, args, stdout, stderr)
}

func (t *tool) run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := t.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	fmt.Fprintf(stderr, "ledge: %v\n", err)
	var h hinted
	var e *api.Error
	switch {
	case errors.As(err, &h):
		fmt.Fprintf(stderr, "  → %s\n", h.hint)
	case errors.As(err, &e) && e.Hint != "":
		fmt.Fprintf(stderr, "  → %s\n", e.Hint)
	}
	// What cobra itself refuses (unknown commands and flags) it marks in no way; what a command's RunE
	// returns went through tool.do.
	var failed failure
	if errors.As(err, &failed) {
		return exitFailed
	}
	if h.hint == "" {
		fmt.Fprintln(stderr, "  → see ledge --help")
	}
	return exitUsage
}

// failure marks an operation that failed, against wrong usage.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }

// do wraps a command's work so that its errors are told from usage errors.
func do(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := f(cmd, args)
		var u usageError
		if err == nil || errors.As(err, &u) {
			return err
		}
		return failure{err}
	}
}

// tool is one invocation.
type tool struct {
	out    io.Writer
	socket string
	shelf  string
	json   bool

	in          io.Reader
	tty, screen bool          // a person types; a person looks
	pause       time.Duration // between two looks at what goes on
}

func (t *tool) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ledge",
		Short: "Operate a Ledge shelf, this host's agent and its volumes",
		Example: `  ledge host status                  # is the agent serving, over which paths
  ledge volume create db 16GiB       # a thin volume, at once visible to initiators
  ledge volume show db --json        # figures for programs
  ledge volume top                   # the busiest volumes; 'ledge volume stats db' tells which stage is slow
  ledge snapshot create db@monday    # as it is now; 'ledge volume clone db@monday NAME' makes it a volume
  ledge shelf status                 # both controllers
  ledge shelf takeover B             # make controller B the owner
  ledge pool show                    # space, log, state and why
  ledge array show --watch           # a picture of the drives and what is being rebuilt
  ledge drive replace 3 --with /dev/sdm --wait
  ledge lun create esx1 500GiB       # a LUN of the shelf itself, without an agent`,
		Version: version, SilenceUsage: true, SilenceErrors: true,
	}
	f := root.PersistentFlags()
	f.StringVar(&t.socket, "socket", "", "the agent's socket (default: what 'make run' started)")
	f.StringVar(&t.shelf, "shelf", "", "file with the addresses of the shelf's APIs (default: shelf.json of 'make run')")
	f.BoolVar(&t.json, "json", false, "print JSON, for programs")
	root.AddCommand(t.hostCommand(), t.volumeCommand(), t.snapshotCommand(), t.shelfCommand(), t.poolCommand(), t.arrayCommand(), t.driveCommand(), t.lunCommand())
	return root
}

// group is a command that only holds others: without one of them it is wrong usage, not help.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usagef("no command %q under '%s'", args[0], cmd.CommandPath())
		}
		return usagef("'%s' needs a command", cmd.CommandPath())
	}, RunE: func(*cobra.Command, []string) error { return nil }}
	c.AddCommand(sub...)
	return c
}
