package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"sync"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) driveCommand() *cobra.Command {
	return group("drive", "The shelf's drives: list, fail, replace, re-add, wipe",
		t.driveList("list", "List the drives that each controller sees, and what they are"), t.driveList("rescan", "Look for drives that were plugged in, and list all"),
		t.driveFail(), t.driveReplace(), t.driveReadd(), t.driveWipe())
}

// memberNumber is the argument N.
func memberNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n > 63 {
		return 0, usagef("%q is no member; want its number as 'ledge array show' has it", s)
	}
	return int(n), nil
}

func memberPath(n int, verb string) string { return fmt.Sprintf("/v1/array/members/%d/%s", n, verb) }

// seen is what one controller sees, or why it does not say.
type seen struct {
	Controller string         `json:"controller"`
	Error      string         `json:"error,omitempty"`
	Drives     *api.DriveList `json:"drives,omitempty"`
}

// look asks every controller for its drives.
func (t *tool) look(ctx context.Context, verb string) ([]seen, error) {
	ctl, err := t.controllers()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 4*askTimeout) // a drive that hangs takes its time
	defer cancel()
	out := make([]seen, len(ctl))
	var wg sync.WaitGroup
	for i, c := range ctl {
		wg.Go(func() {
			defer c.client.Close()
			out[i].Controller = c.Name
			var l api.DriveList
			method, path := http.MethodGet, "/v1/drives"
			if verb == "rescan" {
				method, path = http.MethodPost, "/v1/drives/rescan"
			}
			if err := c.client.Do(ctx, method, path, nil, &l); err != nil {
				out[i].Error = err.Error()
				return
			}
			out[i].Drives = &l
		})
	}
	wg.Wait()
	return out, nil
}

func (t *tool) driveList(verb, short string) *cobra.Command {
	cmd := &cobra.Command{
		Use: verb, Short: short, Args: words(),
		Long: short + `. LABEL says what a drive is:

  member N      of this pool, in use          blank         zeros where a label would be
  stale N       the array went on without it  data          no label, but not blank
  older-copy N  an older state of member N    foreign N     member N of another pool
  duplicate N   another drive is member N too unreadable    its label cannot be read
  no-answer     it does not answer            cannot-open   the system refuses it

Drives are found while the shelf runs. Exit code 1 where no controller answers.`,
		Example: "  ledge drive " + verb + "\n  ledge drive " + verb + " --json | jq '.[].drives.drives[] | select(.label == \"blank\").path'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			list, err := t.look(cmd.Context(), verb)
			if err != nil {
				return err
			}
			if t.json {
				err = printJSON(t.out, list)
			} else {
				err = printDrives(t.out, list)
			}
			if err != nil {
				return err
			}
			for _, s := range list {
				if s.Drives != nil {
					return nil
				}
			}
			return hinted{errors.New("no controller answers"), "start the controllers ('make run')"}
		}),
	}
	if verb == "list" {
		cmd.Aliases = []string{"ls"}
	}
	return cmd
}

// printDrives prints one list where both controllers see the same, and else each one's.
func printDrives(w io.Writer, list []seen) error {
	if len(list) == 2 && list[0].Drives != nil && list[1].Drives != nil && sameDrives(list[0].Drives.Drives, list[1].Drives.Drives) {
		fmt.Fprintf(w, "controllers %s and %s see the same %d drives\n", list[0].Controller, list[1].Controller, len(list[0].Drives.Drives))
		return driveTable(w, list[0].Drives)
	}
	for i, s := range list {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if s.Drives == nil {
			fmt.Fprintf(w, "controller %s: %s\n", s.Controller, s.Error)
			continue
		}
		fmt.Fprintf(w, "controller %s sees %d drives\n", s.Controller, len(s.Drives.Drives))
		if err := driveTable(w, s.Drives); err != nil {
			return err
		}
	}
	return nil
}

// sameDrives: what differs by controller only because one of them owns the pool does not count.
func sameDrives(a, b []api.Drive) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := a[i], b[i]
		for _, d := range []*api.Drive{&x, &y} {
			d.InUse, d.Seq, d.Epoch, d.Slot = false, 0, 0, ""
		}
		if !reflect.DeepEqual(x, y) {
			return false
		}
	}
	return true
}

func driveTable(w io.Writer, l *api.DriveList) error {
	rows := [][]string{{"PATH", "SLOT", "SIZE", "SERIAL", "LABEL", ""}}
	for _, d := range l.Drives {
		label, detail := d.Label, d.Detail
		if d.Member != nil {
			label = fmt.Sprintf("%s %d", label, *d.Member)
		}
		if d.Label == "foreign" {
			detail = "of pool " + d.Pool
		}
		size := "-"
		if d.SizeBytes > 0 {
			size = api.FormatSize(d.SizeBytes)
		}
		rows = append(rows, []string{d.Path, or(d.Slot, "-"), size, or(d.Serial, "-"), label, detail})
	}
	return table(w, rows)
}

func (t *tool) driveFail() *cobra.Command {
	var yes, force bool
	cmd := &cobra.Command{
		Use: "fail N", Short: "Take member N out of the array, to pull its drive", Args: words("a member's number N"),
		Long: `Record member N as failed: nothing more is read from its drive or written to it, and its strips are
rebuilt to spare space. Refused where some stripe could bear no further loss afterwards; --force does it
anyway, as long as no data are lost by it.`,
		Example: "  ledge drive fail 3 --yes",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			n, err := memberNumber(args[0])
			if err != nil {
				return err
			}
			if err := t.confirm(cmd, yes, fmt.Sprintf("failing member %d takes its redundancy away until it is rebuilt", n), strconv.Itoa(n)); err != nil {
				return err
			}
			var a api.ArrayInfo
			if err := t.owned(cmd.Context(), http.MethodPost, memberPath(n, "fail"), map[string]bool{"force": force}, &a); err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, a)
			}
			_, err = fmt.Fprintf(t.out, "member %d is failed; the array is %s. Its drive may be pulled\n", n, a.State)
			return err
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().BoolVar(&force, "force", false, "though some stripe bears no further loss afterwards")
	return cmd
}

func (t *tool) driveReplace() *cobra.Command {
	var (
		with             string
		yes, force, wait bool
	)
	cmd := &cobra.Command{
		Use: "replace N --with PATH", Short: "Give failed member N a new drive and fill it", Args: words("a member's number N"),
		Long: `Put a new drive in the place of member N, which has failed, is missing or is spared, and fill it: from
spare space, or from the other members. The spare space is free again when it is done. Both
controllers must see the drive. One that is not blank is refused, with what is on it; --force erases it. A
living member is never taken.`,
		Example: "  ledge drive list                                  # the new drive: blank\n  ledge drive replace 3 --with /dev/sdm --wait",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			n, err := memberNumber(args[0])
			if err != nil {
				return err
			}
			if with == "" {
				return usagef("'ledge drive replace' needs --with PATH")
			}
			if force {
				if err := t.confirm(cmd, yes, fmt.Sprintf("--force erases what is on %s", with), with); err != nil {
					return err
				}
			}
			var task api.Task
			if err := t.owned(cmd.Context(), http.MethodPost, memberPath(n, "replace"), map[string]any{"path": with, "force": force}, &task); err != nil {
				return err
			}
			if wait {
				if err := t.follow(cmd, &task, inPlace(n)); err != nil {
					return err
				}
			}
			return t.printTask(task, fmt.Sprintf("member %d is on %s", n, with), fmt.Sprintf("member %d is being filled on %s; 'ledge array show' tells how far it is", n, with))
		}),
	}
	f := cmd.Flags()
	f.StringVar(&with, "with", "", "path of the new drive, as 'ledge drive list' has it")
	f.BoolVar(&force, "force", false, "take a drive that is not blank, and erase it")
	f.BoolVar(&yes, "yes", false, "do not ask")
	f.BoolVar(&wait, "wait", false, "wait until it is done")
	return cmd
}

// inPlace says that a member is whole again. When the shelf has answered, it has a drive: if that is gone again, waiting
// is over.
func inPlace(n int) func(api.ArrayInfo) (bool, string, error) {
	return func(a api.ArrayInfo) (bool, string, error) {
		if n >= len(a.Members) {
			return false, "", nil
		}
		m := a.Members[n]
		switch m.State {
		case "online", "suspect":
			return true, "", nil
		case "restoring":
		default:
			why := fmt.Errorf("member %d is %s again: its drive did not stand the copy", n, m.State)
			if m.LastError != "" {
				why = fmt.Errorf("%w (%s)", why, m.LastError)
			}
			return false, "", finalError{hinted{why, "'ledge array show' tells more; try another drive"}}
		}
		return false, join(fmt.Sprintf("member %d", n), bar(m.Done, m.Total, barWidth), share(m.Done, m.Total), left(m.SecondsLeft)), nil
	}
}

func (t *tool) driveReadd() *cobra.Command {
	var (
		path string
		wait bool
	)
	cmd := &cobra.Command{
		Use: "readd N", Short: "Take member N's own drive back, and bring it up to date", Args: words("a member's number N"),
		Long: `Take a member's own drive back after it was out: pulled, without power, or failed. It is found by its
label, in whatever slot; what it missed is copied to it, what it has is kept. A drive that is plugged in
while the shelf runs is taken back by itself: this is for one that was there before, or was failed by hand.`,
		Example: "  ledge drive readd 3\n  ledge drive readd 3 --drive /dev/sdm --wait",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			n, err := memberNumber(args[0])
			if err != nil {
				return err
			}
			in := map[string]string{}
			if path != "" {
				in["path"] = path
			}
			var task api.Task
			if err := t.owned(cmd.Context(), http.MethodPost, memberPath(n, "readd"), in, &task); err != nil {
				return err
			}
			if wait {
				if err := t.follow(cmd, &task, inPlace(n)); err != nil {
					return err
				}
			}
			return t.printTask(task, fmt.Sprintf("member %d is back", n), fmt.Sprintf("member %d is being brought up to date; 'ledge array show' tells how far it is", n))
		}),
	}
	cmd.Flags().StringVar(&path, "drive", "", "the drive's path, where several carry the member's label")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it is done")
	return cmd
}

func (t *tool) driveWipe() *cobra.Command {
	var yes, force bool
	cmd := &cobra.Command{
		Use: "wipe PATH", Short: "Erase the label of a drive that is no living member", Args: words("the PATH of a drive"),
		Long: `Erase the first MiB of a drive, where labels are, so that it is blank: a member of another pool, a stale
or old copy of a member, a drive with data of something else. A living member is refused, always. One
that another shelf has reserved is refused without --force, which breaks the reservation.`,
		Example: "  ledge drive wipe /dev/sdm --yes",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			what := fmt.Sprintf("wiping %s loses what is on it%s", args[0], t.whatIs(cmd.Context(), args[0]))
			if err := t.confirm(cmd, yes, what, args[0]); err != nil {
				return err
			}
			d, err := t.wipe(cmd.Context(), args[0], force)
			if err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, d)
			}
			_, err = fmt.Fprintf(t.out, "%s is %s now\n", d.Path, d.Label)
			return err
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().BoolVar(&force, "force", false, "break another shelf's reservation")
	return cmd
}

// whatIs says what a controller takes a drive for.
func (t *tool) whatIs(ctx context.Context, path string) string {
	list, err := t.look(ctx, "list")
	if err != nil {
		return ""
	}
	for _, s := range list {
		if s.Drives == nil {
			continue
		}
		for _, d := range s.Drives.Drives {
			if d.Path == path && d.Member != nil {
				return fmt.Sprintf(": %s, member %d of pool %s", d.Label, *d.Member, d.Pool)
			} else if d.Path == path {
				return ": " + d.Label
			}
		}
	}
	return ""
}

// wipe asks the owner; where there is no pool, the first controller that answers.
func (t *tool) wipe(ctx context.Context, path string, force bool) (d api.Drive, err error) {
	ctl, err := t.controllers()
	if err != nil {
		return d, err
	}
	for _, c := range ctl {
		defer c.client.Close()
	}
	at, err := findOwner(ctx, ctl)
	if err != nil {
		pool := false
		for i, c := range ctl {
			if s := status(ctx, c); s.Status != nil {
				pool = pool || s.Status.Role != "no-pool"
				at = i
			}
		}
		if pool {
			return d, err
		}
	}
	if err := ctl[at].client.Do(ctx, http.MethodPost, "/v1/drives/wipe", map[string]any{"path": path, "force": force}, &d); err != nil {
		return d, fmt.Errorf("controller %s: %w", ctl[at].Name, err)
	}
	return d, nil
}
