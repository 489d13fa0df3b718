package main

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) snapshotCommand() *cobra.Command {
	c := group("snapshot", "Take, list, compare, roll back to and delete snapshots of volumes",
		t.snapshotCreate(), t.snapshotList(), t.snapshotDiff(), t.snapshotRollback(), t.snapshotDelete())
	c.Long = `A snapshot is a volume as it was at one instant. It takes a millisecond and no space at any size; it keeps the
blocks that are overwritten later. It is read by cloning it: 'ledge volume clone db@monday db-look'.

Snapshots are crash-consistent: what was acknowledged before is in them, as after a power cut. Freeze or
flush the file system first (fsfreeze, FLUSH TABLES WITH READ LOCK, …) for more.`
	return c
}

// splitSnapshot takes VOLUME@SNAPSHOT apart.
func splitSnapshot(s string) (volume, name string, err error) {
	volume, name, ok := strings.Cut(s, "@")
	if !ok || volume == "" || name == "" {
		return "", "", usagef("%q is no snapshot: want VOLUME@NAME, such as db@monday", s)
	}
	return volume, name, nil
}

func snapshotPath(volume, name string) string {
	return volumePath(volume) + "/snapshots/" + url.PathEscape(name)
}

type snapshotList struct {
	Snapshots []api.Snapshot `json:"snapshots"`
}

func (t *tool) snapshotCreate() *cobra.Command {
	return &cobra.Command{
		Use: "create VOLUME@NAME [VOLUME@NAME…]", Aliases: []string{"take"}, Short: "Take a snapshot, of several volumes at one instant", Args: cobra.ArbitraryArgs,
		Long: `Take a snapshot of a volume, or of several volumes at the same instant: a database and its log, say. With several,
NAME is the same for all. NAME is 1 to 63 of a-z, 0-9 and -.`,
		Example: "  ledge snapshot create db@monday\n  ledge snapshot create db@before-upgrade db-log@before-upgrade",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("'%s' needs VOLUME@NAME, such as db@monday", cmd.CommandPath())
			}
			var req api.SnapshotRequest
			for _, a := range args {
				volume, name, err := splitSnapshot(a)
				if err != nil {
					return err
				}
				if req.Name != "" && req.Name != name {
					return usagef("%q and %q: snapshots of one instant have one name", req.Name, name)
				}
				req.Name, req.Volumes = name, append(req.Volumes, volume)
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var list snapshotList
			if err := c.Do(cmd.Context(), http.MethodPost, "/v1/snapshots", req, &list); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, list)
			}
			for _, s := range list.Snapshots {
				fmt.Fprintf(t.out, "took %s@%s, %s\n", s.Volume, s.Name, api.FormatSize(s.SizeBytes))
			}
			return nil
		}),
	}
}

func (t *tool) snapshotList() *cobra.Command {
	return &cobra.Command{
		Use: "list [VOLUME]", Aliases: []string{"ls"}, Short: "List the snapshots, oldest first", Args: cobra.MaximumNArgs(1),
		Example: "  ledge snapshot list\n  ledge snapshot list db --json | jq '.snapshots[].name'",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			path := "/v1/snapshots"
			if len(args) > 0 {
				path += "?volume=" + url.QueryEscape(args[0])
			}
			var list snapshotList
			if err := c.Do(cmd.Context(), http.MethodGet, path, nil, &list); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, list)
			}
			if len(list.Snapshots) == 0 {
				fmt.Fprintln(t.out, "no snapshots; 'ledge snapshot create VOLUME@NAME' takes one")
				return nil
			}
			rows := [][]string{{"SNAPSHOT", "TAKEN", "SIZE", "LOGICAL", "CLONES"}}
			for _, s := range list.Snapshots {
				rows = append(rows, []string{s.Volume + "@" + s.Name, s.Created.Local().Format(time.DateTime), api.FormatSize(s.SizeBytes), api.FormatSize(s.LogicalBytes), strings.Join(s.Clones, " ")})
			}
			return table(t.out, rows)
		}),
	}
}

func (t *tool) snapshotDelete() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "delete VOLUME@NAME [VOLUME@NAME…]", Aliases: []string{"rm"}, Short: "Delete snapshots; clones of them stay", Args: cobra.ArbitraryArgs,
		Long: `Delete snapshots. What only they had is freed in the background. Volumes that were cloned from them stay as they are.
It asks before it begins. The first that cannot be deleted ends the command.`,
		Example: "  ledge snapshot delete db@monday\n  ledge snapshot delete db@monday db-log@monday --yes   # without asking",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("'%s' needs VOLUME@NAME, such as db@monday", cmd.CommandPath())
			}
			for _, a := range args {
				if _, _, err := splitSnapshot(a); err != nil {
					return err
				}
			}
			what := "what only " + args[0] + " has will be lost"
			if n := len(args); n > 1 {
				what = fmt.Sprintf("what only these %d snapshots have will be lost", n)
			}
			if err := t.confirm(cmd, yes, what, args[0]); err != nil {
				return err
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			for _, a := range args {
				volume, name, _ := splitSnapshot(a)
				if err := c.Do(cmd.Context(), http.MethodDelete, snapshotPath(volume, name), nil, nil); err != nil {
					return explain(err)
				}
				if !t.json {
					fmt.Fprintf(t.out, "deleted %s\n", a)
				}
			}
			if t.json {
				return printJSON(t.out, map[string][]string{"deleted": args})
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

func (t *tool) snapshotDiff() *cobra.Command {
	return &cobra.Command{
		Use: "diff VOLUME@FROM [TO]", Short: "Show where a volume changed between two snapshots, or since one", Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("'%s' needs VOLUME@FROM, such as db@monday", cmd.CommandPath())
			}
			return cobra.MaximumNArgs(2)(cmd, args)
		},
		Long: `Show the ranges of bytes that may differ between the snapshots FROM and TO of a volume, or without TO between FROM and the
volume as it is. An incremental backup reads these ranges and no others.`,
		Example: "  ledge snapshot diff db@monday tuesday\n  ledge snapshot diff db@monday --json | jq '.ranges[]'",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			volume, from, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			to := ""
			if len(args) > 1 {
				to = strings.TrimPrefix(args[1], volume+"@")
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			all := api.Diff{Volume: volume, From: from, To: to, Ranges: []api.Range{}}
			for offset := int64(0); ; {
				q := url.Values{"from": {from}, "to": {to}, "offset": {strconv.FormatInt(offset, 10)}}
				var d api.Diff
				if err := c.Do(cmd.Context(), http.MethodGet, volumePath(volume)+"/diff?"+q.Encode(), nil, &d); err != nil {
					return explain(err)
				}
				if offset == 0 && !t.json {
					fmt.Fprintln(t.out, "OFFSET LENGTH")
				}
				all.Bytes += d.Bytes
				if t.json {
					all.Ranges = append(all.Ranges, d.Ranges...)
				} else {
					for _, r := range d.Ranges {
						fmt.Fprintf(t.out, "%d %d\n", r.Offset, r.Length)
					}
				}
				if d.Next <= offset {
					break
				}
				offset = d.Next
			}
			if t.json {
				return printJSON(t.out, all)
			}
			_, err = fmt.Fprintf(t.out, "%s in all\n", api.FormatSize(all.Bytes))
			return err
		}),
	}
}

func (t *tool) snapshotRollback() *cobra.Command {
	var force, yes bool
	cmd := &cobra.Command{
		Use: "rollback VOLUME@NAME", Short: "Put a volume back to what it was; what was written since is lost", Args: words("VOLUME@NAME, such as db@monday"),
		Long: `Put a volume back to a snapshot, its size too. What was written since is lost, unless another snapshot has it: take one first
if in doubt. All snapshots stay.

Unmount the volume and log its initiators out before: nothing tells a host to forget what it has cached. With --force
they are thrown out.`,
		Example: "  ledge snapshot create db@just-in-case && ledge snapshot rollback db@monday\n  ledge snapshot rollback db@monday --yes --force",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			volume, name, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			if err := t.confirm(cmd, yes, fmt.Sprintf("what was written to %s since %s was taken will be lost", volume, args[0]), volume); err != nil {
				return err
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, snapshotPath(volume, name)+"/rollback", api.RollbackRequest{Force: force}, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			_, err = fmt.Fprintf(t.out, "%s is what %s was\n", v.Name, args[0])
			return err
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "throw initiators out that are logged in")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

func (t *tool) volumeClone() *cobra.Command {
	return &cobra.Command{
		Use: "clone VOLUME@SNAPSHOT NEW", Short: "Make a writable volume of a snapshot, at once", Args: words("VOLUME@SNAPSHOT, such as db@monday", "a name for the NEW volume"),
		Long: `Make a volume that begins as the snapshot is, and export it. It takes a millisecond and no space at any size; both go their
own ways from there on. The snapshot may be deleted later.`,
		Example: "  ledge volume clone db@monday db-test\n  ledge volume clone golden@v7 vm-17 --json",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			volume, name, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, snapshotPath(volume, name)+"/clone", api.CloneRequest{Name: args[1]}, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			fmt.Fprintf(t.out, "cloned %s as %s, %s\n", args[0], v.Name, api.FormatSize(v.SizeBytes))
			return facts(t.out, "iqn", v.IQN, "portal", v.Portal, "lun", strconv.Itoa(int(v.LUN)), "url", iscsiURL(v))
		}),
	}
}

func (t *tool) volumePromote() *cobra.Command {
	return &cobra.Command{
		Use: "promote CLONE", Short: "Turn a clone and the volume it came from round", Args: words("the name of a CLONE"),
		Long: `The snapshots of the volume that the clone came from, up to the one that it began as, become the clone's, and that volume becomes
the clone. So the old volume can be deleted and the clone kept. No data move.`,
		Example: "  ledge volume promote db-test && ledge volume delete db",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, volumePath(args[0])+"/promote", nil, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			_, err = fmt.Fprintf(t.out, "%s has %d snapshot(s) now\n", v.Name, v.Snapshots)
			return err
		}),
	}
}
