package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) shelfCommand() *cobra.Command {
	return group("shelf", "The shelf's two controllers", t.shelfInit(), t.shelfStatus(), t.shelfTakeover())
}

// controllerStatus is one controller's answer, or why there is none.
type controllerStatus struct {
	Controller string     `json:"controller"`
	Address    string     `json:"address"`
	Error      string     `json:"error,omitempty"`
	Status     *api.Shelf `json:"status,omitempty"`
}

// askTimeout is how long a controller may take to say how it is; a hung one accepts connections and says nothing.
const askTimeout = 8 * time.Second

// ask gets the controllers' status, from all at once, so that a hung one keeps nobody waiting for long.
func (t *tool) ask(cmd *cobra.Command) (list []controllerStatus, ctl []controllerAPI, err error) {
	if ctl, err = t.controllers(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), askTimeout)
	defer cancel()
	list = make([]controllerStatus, len(ctl))
	var wg sync.WaitGroup
	for i, c := range ctl {
		wg.Go(func() {
			list[i] = status(ctx, c)
			c.client.Close()
		})
	}
	wg.Wait()
	return list, ctl, nil
}

func (t *tool) shelfStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show both controllers, the pool and its members", Args: words(),
		Long:    "Show both controllers, the pool and its members. Exit code 1 where no controller serves the pool.",
		Example: "  ledge shelf status\n  ledge shelf status --json | jq -r '.[].status.role'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			list, _, err := t.ask(cmd)
			if err != nil {
				return err
			}
			if t.json {
				err = printJSON(t.out, list)
			} else {
				err = t.printShelf(list)
			}
			if err != nil {
				return err
			}
			for _, s := range list {
				if s.Status != nil && s.Status.Role == "owner" {
					return nil
				}
			}
			return nobodyServes(list)
		}),
	}
}

// nobodyServes says what the operator can do.
func nobodyServes(list []controllerStatus) error {
	hint := "start the controllers ('make run')"
	for _, s := range list {
		switch {
		case s.Status == nil:
		case s.Status.Role == "no-pool":
			hint = "'ledge shelf init' makes a pool of the members"
		case s.Status.Role == "standby":
			hint = fmt.Sprintf("'ledge shelf takeover %s' makes controller %s the owner", s.Controller, s.Controller)
		default:
			hint = fmt.Sprintf("controller %s is %s; wait and ask again", s.Controller, s.Status.Role)
		}
	}
	return hinted{fmt.Errorf("no controller serves the pool"), hint}
}

func (t *tool) printShelf(list []controllerStatus) error {
	rows := [][]string{{"CONTROLLER", "ROLE", "EPOCH", "OWNER", "PARTNER", "LINK", "MIRROR", "NVRAM USED", "ADDRESS"}}
	var best *api.Shelf
	for _, s := range list {
		if s.Status == nil {
			rows = append(rows, []string{s.Controller, "down", "", "", "", "", "", "", s.Address})
			continue
		}
		st := s.Status
		if best == nil || st.Role == "owner" {
			best = st
		}
		partner := "not connected"
		if st.Partner.Connected {
			partner = "connected"
		}
		rows = append(rows, []string{s.Controller, st.Role, strconv.FormatUint(st.Epoch, 10), st.Owner, partner, st.Partner.Transport, st.Partner.Mirror,
			fmt.Sprintf("%s of %s", api.FormatSize(st.NVRAM.Used), api.FormatSize(st.NVRAM.Size)), s.Address})
	}
	if err := table(t.out, rows); err != nil {
		return err
	}
	for _, s := range list {
		if s.Error != "" {
			fmt.Fprintf(t.out, "\n%s: %s\n", s.Controller, s.Error)
		} else if s.Status.Trouble != "" {
			fmt.Fprintf(t.out, "\n%s: %s\n", s.Controller, s.Status.Trouble)
		}
		if line := linkLine(s.Status); line != "" {
			fmt.Fprintf(t.out, "\n%s: %s\n", s.Controller, line)
		}
	}
	if best == nil {
		return nil
	}
	if p := best.Pool; p != nil {
		fmt.Fprintf(t.out, "\npool %s: %s, %s of %s allocated\n", p.UUID, p.State, api.FormatSize(p.AllocatedBytes), api.FormatSize(p.CapacityBytes))
	}
	if len(best.Members) > 0 {
		fmt.Fprintln(t.out)
		rows := [][]string{{"MEMBER", "STATE", "ERRORS", "PATH"}}
		for _, m := range best.Members {
			rows = append(rows, []string{strconv.Itoa(m.Index), m.State, strconv.FormatUint(m.Errors, 10), m.Path})
		}
		table(t.out, rows)
	}
	if len(best.LUNs) > 0 {
		fmt.Fprintln(t.out)
		rows := [][]string{{"LUN", "NAME", "KIND", "SIZE", "ALLOCATED"}}
		for _, l := range best.LUNs {
			rows = append(rows, []string{strconv.FormatUint(uint64(l.LUN), 10), l.Name, l.Kind, api.FormatSize(l.SizeBytes), api.FormatSize(l.AllocatedBytes)})
		}
		table(t.out, rows)
	}
	return nil
}

// linkLine says since when and why the mirror link does, or did, without its window; empty where it never did.
func linkLine(st *api.Shelf) string {
	if st == nil || st.Partner.Fallback == nil {
		return ""
	}
	p := &st.Partner
	at := func(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }
	why := fmt.Sprintf("it last did without its window at %s: %s", at(p.Fallback.At), p.Fallback.Reason)
	if p.TransportSince == nil {
		return "the mirror link is down; " + why
	}
	return fmt.Sprintf("the mirror link is over %s since %s; %s", p.Transport, at(*p.TransportSince), why)
}

func (t *tool) shelfTakeover() *cobra.Command {
	var lose, yes bool
	cmd := &cobra.Command{
		Use: "takeover [A|B]", Short: "Make a controller the owner of the pool",
		Long: `Make a controller the owner: it fences the other, replays the mirrored log, and serves.
Without a name it is the one standby that answers. A controller whose mirror is stale
refuses, and says what to do.

With --lose-writes it becomes owner even then: for a shelf whose owner was alone when its NVRAM
broke. What was acknowledged and not yet destaged to the drives is lost for good, also if a
controller with its log comes back later, and some blocks of stripes that were being changed
when it broke answer MEDIUM ERROR until 'ledge array scrub start --accept-old' has been there. Bring that one back instead, if there is a way. Hosts find
some of their newest writes gone and others there: check file systems before use. Where nothing needs
to be lost, nothing is.`,
		Example: "  ledge shelf takeover       # the standby\n  ledge shelf takeover B\n  ledge shelf takeover B --lose-writes",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 && args[0] != "A" && args[0] != "B" {
				return usagef("'ledge shelf takeover' takes A or B, not %q", args)
			}
			return nil
		},
		ValidArgs: []string{"A", "B"},
		RunE: do(func(cmd *cobra.Command, args []string) error {
			list, ctl, err := t.ask(cmd)
			if err != nil {
				return err
			}
			chosen := -1
			for i, s := range list {
				switch {
				case len(args) == 1 && s.Controller == args[0], len(args) == 0 && s.Status != nil && s.Status.Role == "standby":
					if chosen >= 0 {
						return hinted{errors.New("both controllers are standby"), "name one: 'ledge shelf takeover A' or B"}
					}
					chosen = i
				}
			}
			if chosen < 0 {
				return hinted{errors.New("no controller to take over"), "'ledge shelf status' shows what both say"}
			}
			c := ctl[chosen]
			if s := list[chosen]; s.Status == nil {
				return hinted{fmt.Errorf("controller %s does not answer: %s", c.Name, s.Error), "start it, then ask again"}
			}
			if !lose {
				return t.command(cmd, c, "/v1/takeover", struct{}{}, "controller %s owns the pool at epoch %d\n")
			}
			if err := t.confirm(cmd, yes, "--lose-writes loses what was acknowledged and is in no NVRAM that this shelf still has", "lose-writes"); err != nil {
				return err
			}
			if err := t.command(cmd, c, "/v1/takeover", map[string]bool{"lose_writes": true}, "controller %s owns the pool at epoch %d\n"); err != nil {
				return err
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "→ 'ledge array scrub start --accept-old' makes readable again what was being changed when the log was lost; check the hosts' file systems before they are used")
			return nil
		}),
	}
	cmd.Flags().BoolVar(&lose, "lose-writes", false, "become owner even where acknowledged writes are lost by it")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// command POSTs to one controller and prints its new status.
func (t *tool) command(cmd *cobra.Command, c controllerAPI, path string, in any, format string) error {
	defer c.client.Close()
	var st api.Shelf
	if err := c.client.Do(cmd.Context(), http.MethodPost, path, in, &st); err != nil {
		return fmt.Errorf("controller %s: %w", c.Name, err)
	}
	if t.json {
		return printJSON(t.out, st)
	}
	_, err := fmt.Fprintf(t.out, format, c.Name, st.Epoch)
	return err
}

func (t *tool) shelfInit() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "init", Short: "Make a pool of the shelf's members", Args: words(),
		Long: `Make a pool of the shelf's members. The first controller that answers becomes its owner.
Members that are not blank are refused without --force, which erases them.`,
		Example: "  ledge shelf init",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			list, ctl, err := t.ask(cmd)
			if err != nil {
				return err
			}
			for i, s := range list {
				if s.Status != nil {
					return t.command(cmd, ctl[i], "/v1/pool", map[string]bool{"force": force}, "pool made; controller %s owns it at epoch %d\n")
				}
			}
			return hinted{fmt.Errorf("no controller answers: %s", list[0].Error), "start the controllers ('make run')"}
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "erase members that are not blank")
	return cmd
}
