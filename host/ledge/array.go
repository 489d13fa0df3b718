package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) arrayCommand() *cobra.Command {
	return group("array", "The array of drives below the pool: a picture, scrub, rates, growth", t.arrayShow(), t.arrayScrub(), t.arrayRate(), t.arrayGrow())
}

func (t *tool) array(ctx context.Context) (api.ArrayInfo, error) {
	var a api.ArrayInfo
	return a, t.owned(ctx, http.MethodGet, "/v1/array", nil, &a)
}

func (t *tool) arrayShow() *cobra.Command {
	var (
		watch    bool
		interval time.Duration
	)
	cmd := &cobra.Command{
		Use: "show", Aliases: []string{"status"}, Short: "A picture of the array: members, stripes at risk, progress, time left", Args: words(),
		Long: `A picture of the array, one cell a member:

  O online      h hangs: reads go round it     s suspect: it erred often, reads go round it
  m missing: no write has missed it so far     F failed: to be rebuilt
  R rebuilding to spare space   S spared: spare space has its strips   C a drive is being filled

and how many stripes have lost how many of their strips, what is being rebuilt, copied back or
scrubbed and how long it takes, spare space, and the drives with their errors since the pool was opened.
Exit code 1 where the array has failed, or no controller serves it.`,
		Example: "  ledge array show\n  ledge array show --watch\n  ledge array show --json | jq '.members[] | select(.state != \"online\")'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			if interval < 100*time.Millisecond {
				return usagef("--interval takes 100ms or more")
			}
			for {
				a, err := t.array(cmd.Context())
				if cmd.Context().Err() != nil && watch {
					return nil
				}
				if err == nil || !watch {
					if err == nil {
						err = t.printArray(a, watch)
					}
					if err != nil || !watch {
						return err
					}
				} else if passes(err) {
					fmt.Fprintf(cmd.ErrOrStderr(), "%v; asking again\n", err)
				} else {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(interval):
				}
			}
		}),
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "draw it again and again, until Ctrl-C")
	cmd.Flags().DurationVar(&interval, "interval", 2*time.Second, "how often with --watch")
	return cmd
}

func (t *tool) printArray(a api.ArrayInfo, watch bool) error {
	var err error
	if t.json {
		err = printJSON(t.out, a)
	} else {
		if watch && t.screen {
			fmt.Fprint(t.out, "\x1b[H\x1b[2J")
		}
		err = drawArray(t.out, a)
		if watch && !t.screen {
			fmt.Fprintln(t.out)
		}
	}
	if err == nil && !watch && (a.State == "failed" || a.State == "fenced") {
		return hinted{fmt.Errorf("the array is %s", a.State), "bring missing drives back: 'ledge drive list' tells which are here"}
	}
	return err
}

func (t *tool) arrayScrub() *cobra.Command {
	action := func(what, short, long, did string) *cobra.Command {
		return &cobra.Command{
			Use: what, Short: short, Long: long, Args: words(), Example: "  ledge array scrub " + what,
			RunE: do(func(cmd *cobra.Command, _ []string) error {
				var a api.ArrayInfo
				if err := t.owned(cmd.Context(), http.MethodPost, "/v1/array/scrub", map[string]string{"action": what}, &a); err != nil {
					return err
				}
				if t.json {
					return printJSON(t.out, a.Scrub)
				}
				_, err := fmt.Fprintln(t.out, did)
				return err
			}),
		}
	}
	start := action("start", "Start a pass, or go on with one that is paused", `Read all strips, verify checksums, generations and parity, and repair what is bad. It gives way to foreground I/O.

With --accept-old, for after 'ledge shelf takeover --lose-writes' and for nothing else: stripes that were being changed when the log
was lost, and are answered with errors since, are taken as they are. Each block is then what it was before or after that change.
The same makes old data of writes that drives have lost.`, "the scrub runs; 'ledge array scrub status' tells how far it is")
	start.Example += "\n  ledge array scrub start --accept-old"
	var accept, yes bool
	start.Flags().BoolVar(&accept, "accept-old", false, "take stripes that were being changed when a log was lost as they are")
	start.Flags().BoolVar(&yes, "yes", false, "do not ask")
	plain := start.RunE
	start.RunE = func(cmd *cobra.Command, args []string) error {
		if !accept {
			return plain(cmd, args)
		}
		return do(func(cmd *cobra.Command, _ []string) error {
			if err := t.confirm(cmd, yes, "--accept-old takes what may be lost writes of drives for the data", "accept-old"); err != nil {
				return err
			}
			var a api.ArrayInfo
			if err := t.owned(cmd.Context(), http.MethodPost, "/v1/array/scrub", map[string]any{"action": "start", "accept_old": true}, &a); err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, a.Scrub)
			}
			_, err := fmt.Fprintln(t.out, "the scrub runs; 'ledge array scrub status' tells how far it is")
			return err
		})(cmd, args)
	}
	return group("scrub", "Verify all data, and repair what is bad",
		start,
		action("pause", "Pause the pass where it is, also over restarts", "", "the scrub is paused; 'ledge array scrub start' goes on with it"),
		action("stop", "End the pass; the next begins at the start", "", "the scrub has stopped"),
		&cobra.Command{
			Use: "status", Short: "Show the pass that runs and what the last one found", Args: words(),
			Example: "  ledge array scrub status\n  ledge array scrub status --json | jq .last",
			RunE: do(func(cmd *cobra.Command, _ []string) error {
				a, err := t.array(cmd.Context())
				if err != nil {
					return err
				}
				if t.json {
					return printJSON(t.out, a.Scrub)
				}
				return t.printScrub(a)
			}),
		})
}

func (t *tool) printScrub(a api.ArrayInfo) error {
	s := a.Scrub
	pairs := []string{"scrub", s.State}
	if s.State != "idle" {
		pairs = append(pairs, "progress", fmt.Sprintf("%s %s", bar(s.Position, s.Total, barWidth), share(s.Position, s.Total)))
		for _, x := range a.Tasks {
			if x.Kind == "scrub" {
				pairs = append(pairs, "speed", join(rate(x.BytesPerSecond), left(x.SecondsLeft), x.Note))
			}
		}
		pairs = append(pairs, "so far", reportWords(s.Now))
	}
	last := "no pass has ended yet"
	if s.Last.Ended != nil {
		last = s.Last.Ended.UTC().Format("2006-01-02 15:04 UTC") + ": " + reportWords(s.Last)
	}
	pairs = append(pairs, "last pass", last)
	if s.Next != nil {
		pairs = append(pairs, "next pass", s.Next.UTC().Format("2006-01-02 15:04 UTC"))
	}
	return facts(t.out, pairs...)
}

func reportWords(r api.ScrubReport) string {
	out := fmt.Sprintf("%d stripes verified, %d bad strips, %d repaired", r.Stripes, r.BadStrips, r.Repaired)
	for _, x := range []struct {
		n    uint64
		word string
	}{{r.UnrecoverableStripes, "stripes beyond repair"}, {r.LostBlocks, "blocks lost"}, {r.ParityErrors, "parity errors"}} {
		if x.n > 0 {
			out += fmt.Sprintf(", %d %s", x.n, x.word)
		}
	}
	return out
}

func (t *tool) arrayRate() *cobra.Command {
	flags := []struct{ name, field, help string }{
		{"rebuild", "rebuild", "most that rebuild, copy-back and re-add do on an idle pool"},
		{"rebuild-floor", "rebuild_floor", "what they do however busy the pool is, so that they end"},
		{"scrub", "scrub", "most that a scrub does on an idle pool"},
		{"scrub-floor", "scrub_floor", "what it does however busy the pool is"},
	}
	values := make([]string, len(flags))
	cmd := &cobra.Command{
		Use: "rate", Short: "Show or set how fast rebuild and scrub may go", Args: words(),
		Long: `Show or set the bounds of maintenance, in bytes of data a second: a size as 100MiB, "default", or, where it
is a most, "unlimited". Between floor and most it gives way to foreground I/O. They hold until the
ownership moves.`,
		Example: "  ledge array rate\n  ledge array rate --rebuild unlimited --rebuild-floor 100MiB\n  ledge array rate --scrub default",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			in := map[string]int64{}
			for i, f := range flags {
				if !cmd.Flags().Changed(f.name) {
					continue
				}
				n, err := parseRate(values[i], !strings.HasSuffix(f.name, "floor"))
				if err != nil {
					return usagef("--%s: %w", f.name, err)
				}
				in[f.field] = n
			}
			var (
				a   api.ArrayInfo
				err error
			)
			if len(in) == 0 {
				a, err = t.array(cmd.Context())
			} else {
				err = t.owned(cmd.Context(), http.MethodPut, "/v1/array/rates", in, &a)
			}
			if err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, a.Rates)
			}
			return facts(t.out, "rebuild", rateWords(a.Rates.Rebuild), "rebuild floor", rateWords(a.Rates.RebuildFloor), "scrub", rateWords(a.Rates.Scrub), "scrub floor", rateWords(a.Rates.ScrubFloor))
		}),
	}
	for i, f := range flags {
		cmd.Flags().StringVar(&values[i], f.name, "", f.help)
	}
	return cmd
}

func parseRate(s string, most bool) (int64, error) {
	switch s {
	case "default":
		return 0, nil
	case "unlimited":
		if most {
			return -1, nil
		}
		return 0, errors.New("a floor is a size, or default")
	}
	n, err := api.ParseSize(s)
	if err == nil && n < 1<<20 {
		err = fmt.Errorf("%s is less than 1MiB a second", s)
	}
	return n, err
}

func rateWords(n int64) string {
	switch {
	case n < 0:
		return "unlimited"
	case n == 0:
		return "default"
	}
	return rate(n)
}

func (t *tool) arrayGrow() *cobra.Command {
	var (
		drives           []string
		yes, force, wait bool
	)
	cmd := &cobra.Command{
		Use: "grow --drives PATH,PATH…", Short: "Add drives as members; the data spreads over all of them", Args: words(),
		Long: `Add drives to the array as members. The pool serves all the while; the data is moved step by step so that
it lies over all members, and the pool has the new space at the end. It goes on after a restart and a
takeover. An array never shrinks: the drives cannot be taken out again.`,
		Example: "  ledge drive list                             # which are blank\n  ledge array grow --drives /dev/sdm,/dev/sdn --yes --wait",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			if len(drives) == 0 {
				return usagef("'ledge array grow' needs --drives")
			}
			what := fmt.Sprintf("adding %s to the array cannot be undone", strings.Join(drives, ", "))
			if force {
				what += ", and what is on them is erased"
			}
			if err := t.confirm(cmd, yes, what, "grow"); err != nil {
				return err
			}
			before, err := t.array(cmd.Context())
			if err != nil {
				return err
			}
			var task api.Task
			if err := t.owned(cmd.Context(), http.MethodPost, "/v1/array/grow", map[string]any{"drives": drives, "force": force}, &task); err != nil {
				return err
			}
			if wait {
				if err := t.follow(cmd, &task, grown(len(before.Members)+len(drives))); err != nil {
					return err
				}
			}
			return t.printTask(task, "the array has grown", "the array is growing; 'ledge array show' tells how far it is")
		}),
	}
	f := cmd.Flags()
	f.StringSliceVar(&drives, "drives", nil, "paths of the drives to add")
	f.BoolVar(&force, "force", false, "take drives that are not blank, and erase them")
	f.BoolVar(&yes, "yes", false, "do not ask")
	f.BoolVar(&wait, "wait", false, "wait until it is done")
	return cmd
}

// grown says that the array has so many members, and all its data over them.
func grown(members int) func(api.ArrayInfo) (bool, string, error) {
	return func(a api.ArrayInfo) (bool, string, error) {
		if a.Grow == nil {
			return len(a.Members) >= members, "", nil
		}
		for _, x := range a.Tasks {
			if x.Kind == "grow" && x.State == "running" {
				return false, taskLine(x), nil
			}
		}
		return false, growLine(*a.Grow), nil
	}
}

// follow waits for work on the array. done tells from the array itself that it is done: the task ends with the
// ownership, and the next owner goes on.
func (t *tool) follow(cmd *cobra.Command, task *api.Task, done func(api.ArrayInfo) (bool, string, error)) error {
	return t.poll(cmd, func(ctx context.Context) (bool, string, error) {
		a, err := t.array(ctx)
		if err != nil {
			return false, "", err
		}
		for _, x := range a.Tasks {
			if x.ID == task.ID && x.Kind == task.Kind && x.State == "failed" {
				return false, "", finalError{fmt.Errorf("%s: %s", join(x.Kind, x.Subject), x.Error)}
			}
		}
		ok, line, err := done(a)
		if ok {
			task.State = "done"
		}
		return ok, line, err
	})
}
