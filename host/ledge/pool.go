package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) poolCommand() *cobra.Command {
	return group("pool", "The shelf's pool: space, log, state", t.poolShow(), t.poolCreate(), t.poolSet(), t.poolDrain(), t.poolGiveUp())
}

func (t *tool) poolShow() *cobra.Command {
	return &cobra.Command{
		Use: "show", Aliases: []string{"status"}, Short: "Show capacity, allocation, dirty data, log and state, and why", Args: words(),
		Long:    "Show the pool: what it can hold and holds, what is in the log and not on the members yet, its state,\nand every reason for it. Exit code 1 where the pool has failed, or no controller serves it.",
		Example: "  ledge pool show\n  ledge pool show --json | jq -r '.state, .why[]'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			var p api.PoolInfo
			if err := t.owned(cmd.Context(), http.MethodGet, "/v1/pool", nil, &p); err != nil {
				return err
			}
			if err := t.printPool(p); err != nil {
				return err
			}
			if p.State == "failed" {
				return hinted{errors.New("the pool has failed"), "what was acknowledged is in the log and on the members: 'ledge array show' tells which drives to bring back"}
			}
			return nil
		}),
	}
}

func (t *tool) printPool(p api.PoolInfo) error {
	if t.json {
		return printJSON(t.out, p)
	}
	pairs := []string{"pool", p.UUID, "state", p.State}
	for _, w := range p.Why {
		pairs = append(pairs, "why", w)
	}
	pairs = append(pairs,
		"owner", fmt.Sprintf("controller %s, epoch %d", p.Controller, p.Epoch),
		"capacity", api.FormatSize(p.CapacityBytes),
		"allocated", fmt.Sprintf("%s (%s)", api.FormatSize(p.AllocatedBytes), share(uint64(p.AllocatedBytes), uint64(p.CapacityBytes))),
		"free", api.FormatSize(p.FreeBytes),
		"promised", fmt.Sprintf("%s to %d LUN(s)", api.FormatSize(p.LUNBytes), p.LUNs),
		"warns at", fmt.Sprintf("%d %% allocated", p.WarnPercent),
		"dirty", api.FormatSize(p.DirtyBytes),
		"log", fmt.Sprintf("%s of %s used", api.FormatSize(p.LogUsedBytes), api.FormatSize(p.LogBytes)),
		"mirror", p.Mirror,
		"destaged", fmt.Sprintf("%d full and %d partial stripes in %d rounds", p.Counters.FullStripes, p.Counters.PartialStripes, p.Counters.DestageRounds))
	if p.Counters.LostBlocks > 0 {
		pairs = append(pairs, "lost", fmt.Sprintf("%d blocks of 4 KiB were given up; reads of them fail until they are written", p.Counters.LostBlocks))
	}
	if p.Counters.Stalls > 0 {
		pairs = append(pairs, "stalls", fmt.Sprintf("%d writes waited for room in the log", p.Counters.Stalls))
	}
	if err := facts(t.out, pairs...); err != nil {
		return err
	}
	return printTasks(t.out, p.Tasks)
}

func (t *tool) poolCreate() *cobra.Command {
	var (
		data, parity, spares int
		drives               []string
		yes, force           bool
	)
	cmd := &cobra.Command{
		Use: "create", Short: "Make a pool of the shelf's drives", Args: words(),
		Long: `Make a pool: DATA strips and PARITY strips a stripe, over all the drives or those named, with spare
space for SPARES members distributed over all. Any PARITY drives may fail without loss. The first
controller that answers becomes the owner. What is not said is as the controllers are configured.

Drives that are not blank are refused, with what is on them; --force erases them.`,
		Example: "  ledge pool create                          # all drives, as configured (8+2)\n  ledge pool create --data 6 --parity 3 --spares 1\n  ledge pool create --drives /dev/sda,/dev/sdb,/dev/sdc,/dev/sdd,/dev/sde --data 2 --parity 2",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			in := map[string]any{"force": force}
			for name, n := range map[string]int{"data": data, "parity": parity, "spares": spares} {
				if cmd.Flags().Changed(name) {
					in[name] = n
				}
			}
			if cmd.Flags().Changed("data") != cmd.Flags().Changed("parity") {
				return usagef("--data and --parity go together")
			}
			if len(drives) > 0 {
				in["drives"] = drives
			}
			if force {
				if err := t.confirm(cmd, yes, "--force erases everything on "+someOrAll(drives), "erase"); err != nil {
					return err
				}
			}
			list, ctl, err := t.ask(cmd)
			if err != nil {
				return err
			}
			for i, s := range list {
				if s.Status != nil {
					return t.command(cmd, ctl[i], "/v1/pool", in, "pool made; controller %s owns it at epoch %d\n")
				}
			}
			return hinted{fmt.Errorf("no controller answers: %s", list[0].Error), "start the controllers ('make run')"}
		}),
	}
	f := cmd.Flags()
	f.IntVar(&data, "data", 0, "data strips of a stripe, 1 to 32")
	f.IntVar(&parity, "parity", 0, "parity strips of a stripe, 1 to 4: so many drives may fail")
	f.IntVar(&spares, "spares", 0, "members that the distributed spare space can stand for, 0 to 8")
	f.StringSliceVar(&drives, "drives", nil, "paths of the drives to take (default: all that the controllers see)")
	f.BoolVar(&force, "force", false, "erase drives that are not blank")
	f.BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

func someOrAll(drives []string) string {
	if len(drives) == 0 {
		return "all drives that the controller sees"
	}
	return strings.Join(drives, ", ")
}

func (t *tool) poolSet() *cobra.Command {
	var warn int
	cmd := &cobra.Command{
		Use: "set --warn PERCENT", Short: "Set when a thin pool warns that space runs out", Args: words(),
		Long: `Set how much of the pool may be allocated before it warns: its state is then "low", and initiators
that log in or write get the unit attention THIN PROVISIONING SOFT THRESHOLD REACHED. 100 never warns.`,
		Example: "  ledge pool set --warn 80",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			if warn < 1 || warn > 100 {
				return usagef("--warn takes 1 to 100 percent")
			}
			var p api.PoolInfo
			if err := t.owned(cmd.Context(), http.MethodPut, "/v1/pool/thresholds", map[string]int{"warn_percent": warn}, &p); err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, p)
			}
			_, err := fmt.Fprintf(t.out, "the pool warns at %d %% allocated; it is at %s\n", p.WarnPercent, share(uint64(p.AllocatedBytes), uint64(p.CapacityBytes)))
			return err
		}),
	}
	cmd.Flags().IntVar(&warn, "warn", 0, "percent of the pool that may be allocated without a warning, 1 to 100")
	return cmd
}

func (t *tool) poolDrain() *cobra.Command {
	var background bool
	cmd := &cobra.Command{
		Use: "drain", Short: "Destage everything that is in the log to the members", Args: words(),
		Long: `Destage all that is acknowledged now from the log to the members, and wait for it. Initiators go on;
what they write meanwhile is not waited for. Nothing needs this: it makes what follows (a takeover, a
power-off of the NVRAM) quick.`,
		Example: "  ledge pool drain\n  ledge pool drain --background    # 'ledge pool show' tells how far it is",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			var task api.Task
			if err := t.owned(cmd.Context(), http.MethodPost, "/v1/pool/drain", struct{}{}, &task); err != nil {
				return err
			}
			if !background {
				if err := t.followPool(cmd, &task); err != nil {
					return err
				}
			}
			return t.printTask(task, "all of the log is on the members", "the log is being destaged; 'ledge pool show' tells how far it is")
		}),
	}
	cmd.Flags().BoolVar(&background, "background", false, "do not wait")
	return cmd
}

func (t *tool) poolGiveUp() *cobra.Command {
	var yes, force bool
	cmd := &cobra.Command{
		Use: "give-up", Short: "Give up what only members that will not come back have", Args: words(),
		Long: `Where more members are gone than parity covers, the stripes that they had strips of hold back the log, in the
hope that a member comes back. This ends the wait: what cannot be rebuilt is marked as lost, and reads of
it fail until it is written again. Everything else stays readable. Bring missing drives back first.`,
		Example: "  ledge pool show                      # what is stuck\n  ledge pool give-up --force --yes",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			if force {
				if err := t.confirm(cmd, yes, "what the missing members alone have is lost for good", "give up"); err != nil {
					return err
				}
			}
			var task api.Task
			if err := t.owned(cmd.Context(), http.MethodPost, "/v1/pool/give-up", map[string]bool{"force": force}, &task); err != nil {
				return err
			}
			if err := t.followPool(cmd, &task); err != nil {
				return err
			}
			return t.printTask(task, join("done:", task.Note), "")
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "needed: data are lost")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// followPool waits for a task of the pool.
func (t *tool) followPool(cmd *cobra.Command, task *api.Task) error {
	return t.poll(cmd, func(ctx context.Context) (bool, string, error) {
		var p api.PoolInfo
		if err := t.owned(ctx, http.MethodGet, "/v1/pool", nil, &p); err != nil {
			return false, "", err
		}
		return taskDone(p.Tasks, task)
	})
}

// taskDone looks for a task among those that the owner lists, and takes over what is said of it.
func taskDone(list []api.Task, task *api.Task) (done bool, line string, err error) {
	for _, x := range list {
		if x.ID != task.ID || x.Kind != task.Kind {
			continue
		}
		*task = x
		switch x.State {
		case "done":
			return true, taskLine(x), nil
		case "failed":
			return false, "", finalError{fmt.Errorf("%s: %s", x.Kind, x.Error)}
		case "stopped":
			return false, "", finalError{hinted{fmt.Errorf("%s was stopped: the pool's ownership moved", x.Kind), "the new owner: ledge shelf status"}}
		}
		return false, taskLine(x), nil
	}
	return false, "", finalError{hinted{fmt.Errorf("the owner knows nothing of this %s: the ownership has moved", task.Kind), "'ledge array show' and 'ledge pool show' tell how things are"}}
}

// printTask prints what became of a task.
func (t *tool) printTask(task api.Task, done, running string) error {
	if t.json {
		return printJSON(t.out, task)
	}
	line := running
	if task.State == "done" {
		line = done
	}
	_, err := fmt.Fprintln(t.out, line)
	return err
}
