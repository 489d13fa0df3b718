package main

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) volumeCommand() *cobra.Command {
	return group("volume", "Create, list, show, measure, clone, promote, resize, compress, export, import and delete volumes",
		t.volumeCreate(), t.volumeList(), t.volumeShow(), t.volumeStats(), t.volumeTop(), t.volumeClone(), t.volumePromote(), t.volumeRename(), t.volumeResize(), t.volumeCompression(), t.volumeExport(), t.volumeImport(), t.volumeDelete())
}

// words checks the number of arguments in words of the command.
func words(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("'%s' needs %s", cmd.CommandPath(), names[len(args)])
		}
		if len(args) > len(names) {
			return usagef("'%s' takes no %q", cmd.CommandPath(), args[len(names)])
		}
		return nil
	}
}

func volumePath(name string) string { return "/v1/volumes/" + url.PathEscape(name) }

func (t *tool) volumeCreate() *cobra.Command {
	var compression string
	cmd := &cobra.Command{
		Use: "create NAME SIZE", Short: "Create a thin volume and export it", Args: words("a NAME", "a SIZE such as 16GiB"),
		Long: `Create a thin volume and export it over iSCSI. Initiators see it at once.

NAME is 1 to 63 of a-z, 0-9 and -. SIZE is in bytes, or with KiB, MiB, GiB, TiB
(powers of 1024), and a multiple of 4KiB.

` + compressionHelp,
		Example: "  ledge volume create db 16GiB\n  ledge volume create archive 4TiB --compression zstd\n  ledge volume create scratch 1.5TiB --json",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			size, err := api.ParseSize(args[1])
			if err != nil {
				return usageError{err}
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, "/v1/volumes", api.CreateRequest{Name: args[0], SizeBytes: size, Compression: compression}, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			fmt.Fprintf(t.out, "created %s, %s\n", v.Name, api.FormatSize(v.SizeBytes))
			return facts(t.out, "iqn", v.IQN, "portal", v.Portal, "lun", strconv.Itoa(int(v.LUN)), "url", iscsiURL(v))
		}),
	}
	cmd.Flags().StringVar(&compression, "compression", "", "s2, zstd or off (default s2)")
	return cmd
}

const compressionHelp = `Blocks are compressed with S2, which is fast; with zstd they are about a quarter smaller, and
writing takes three times as much of the processor; off is for data that is compressed or
encrypted already.`

func (t *tool) volumeCompression() *cobra.Command {
	return &cobra.Command{
		Use: "compression NAME s2|zstd|off", Short: "Change how a volume is compressed", Args: words("a NAME", "s2, zstd or off"),
		Long:    "Change how a volume is compressed: what is written from now on, not what is there.\n\n" + compressionHelp,
		Example: "  ledge volume compression archive zstd",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, volumePath(args[0])+"/compression", api.CompressionRequest{Compression: args[1]}, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			_, err = fmt.Fprintf(t.out, "what is written to %s from now on is compressed: %s\n", v.Name, v.Compression)
			return err
		}),
	}
}

// iscsiURL is what qemu-img, qemu and libiscsi's tools take.
func iscsiURL(v api.Volume) string {
	return fmt.Sprintf("iscsi://%s/%s/%d", v.Portal, v.IQN, v.LUN)
}

func (t *tool) volumeList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the volumes", Args: words(),
		Example: "  ledge volume list\n  ledge volume list --json | jq '.volumes[].name'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var list struct {
				Volumes []api.Volume `json:"volumes"`
			}
			if err := c.Do(cmd.Context(), http.MethodGet, "/v1/volumes", nil, &list); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, list)
			}
			if len(list.Volumes) == 0 {
				fmt.Fprintln(t.out, "no volumes; 'ledge volume create NAME SIZE' makes one")
				return nil
			}
			rows := [][]string{{"NAME", "SIZE", "LOGICAL", "UNIQUE", "STORED", "SESSIONS", "IQN"}}
			for _, v := range list.Volumes {
				rows = append(rows, []string{v.Name, api.FormatSize(v.SizeBytes), api.FormatSize(v.LogicalBytes), api.FormatSize(v.UniqueBytes), api.FormatSize(v.StoredBytes), strconv.Itoa(v.Sessions), v.IQN})
			}
			return table(t.out, rows)
		}),
	}
}

func (t *tool) volumeShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show one volume: size, reduction, cache, address", Args: words("a NAME"),
		Long: `Show one volume. "logical" is what holds data; "unique" is what its writes brought that
was not stored before; "stored" is that after compression, with metadata.`,
		Example: "  ledge volume show db\n  ledge volume show db --json | jq .stored_bytes",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodGet, volumePath(args[0]), nil, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			return facts(t.out,
				"name", v.Name, "uuid", v.UUID, "size", api.FormatSize(v.SizeBytes),
				"logical", api.FormatSize(v.LogicalBytes),
				"unique", fmt.Sprintf("%s (%.2f to 1 by dedup)", api.FormatSize(v.UniqueBytes), v.DedupRatio),
				"stored", fmt.Sprintf("%s (%.2f to 1 by compression)", api.FormatSize(v.StoredBytes), v.CompressionRatio),
				"compression", cmp.Or(v.Compression, "–"),
				"pending", api.FormatSize(v.PendingBytes),
				"cache hits", percent(float64(v.Cache.Hits), float64(v.Cache.Hits+v.Cache.Misses)),
				"sessions", strconv.Itoa(v.Sessions), "snapshots", strconv.Itoa(v.Snapshots), "origin", cmp.Or(v.Origin, "–"),
				"iqn", v.IQN, "lun", strconv.Itoa(int(v.LUN)), "portal", v.Portal, "url", iscsiURL(v))
		}),
	}
}

func (t *tool) volumeResize() *cobra.Command {
	var shrink bool
	cmd := &cobra.Command{
		Use: "resize NAME SIZE", Short: "Change a volume's size", Args: words("a NAME", "a SIZE such as 32GiB"),
		Long: `Change a volume's size. Initiators are told. A smaller size cuts off the end, and what is
there, so it needs --shrink.`,
		Example: "  ledge volume resize db 32GiB\n  ledge volume resize db 8GiB --shrink",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			size, err := api.ParseSize(args[1])
			if err != nil {
				return usageError{err}
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, volumePath(args[0])+"/resize", api.ResizeRequest{SizeBytes: size, Shrink: shrink}, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			_, err = fmt.Fprintf(t.out, "%s has %s now\n", v.Name, api.FormatSize(v.SizeBytes))
			return err
		}),
	}
	cmd.Flags().BoolVar(&shrink, "shrink", false, "allow a smaller size; the data beyond it is lost")
	return cmd
}

func (t *tool) volumeRename() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rename NAME NEWNAME", Short: "Give a volume another name, and its target with it", Args: words("a NAME", "a NEWNAME"),
		Long: `Give a volume another name. Its snapshots, their clones and its figures stay with it. Its target has the new name too, so
initiators must be logged out, and find it by discovery. Schedules of the agent's configuration know volumes by name.`,
		Example: "  ledge volume promote db-test && ledge volume rename db db-old && ledge volume rename db-test db",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var v api.Volume
			if err := c.Do(cmd.Context(), http.MethodPost, volumePath(args[0])+"/rename", api.RenameRequest{Name: args[1], Force: force}, &v); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, v)
			}
			_, err = fmt.Fprintf(t.out, "%s is %s now, %s\n", args[0], v.Name, v.IQN)
			return err
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "throw initiators out that are logged in")
	return cmd
}

func (t *tool) volumeDelete() *cobra.Command {
	var force, yes bool
	cmd := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a volume and its data", Args: words("a NAME"),
		Long: `Delete a volume and its data. It asks before it deletes one that has any. One that has snapshots is not deleted:
delete those first, or promote a clone of them.`,
		Example: "  ledge volume delete scratch\n  ledge volume delete scratch --yes --force   # without asking, though initiators use it",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			path := volumePath(args[0])
			if !yes {
				var v api.Volume
				if err := c.Do(cmd.Context(), http.MethodGet, path, nil, &v); err != nil {
					return explain(err)
				}
				what := fmt.Sprintf("deleting %s loses all of it: %s, of which %s have data", v.Name, api.FormatSize(v.SizeBytes), api.FormatSize(v.LogicalBytes))
				if err := t.confirm(cmd, v.LogicalBytes == 0, what, v.Name); err != nil {
					return err
				}
			}
			if force {
				path += "?force=true"
			}
			if err := c.Do(cmd.Context(), http.MethodDelete, path, nil, nil); err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, map[string]string{"deleted": args[0]})
			}
			_, err = fmt.Fprintf(t.out, "deleted %s\n", args[0])
			return err
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().BoolVar(&force, "force", false, "delete it though initiators are logged in")
	return cmd
}
