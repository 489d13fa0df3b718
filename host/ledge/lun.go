package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) lunCommand() *cobra.Command {
	return group("lun", "The shelf's own LUNs, below the hosts' volumes", t.lunList(), t.lunShow(), t.lunCreate(), t.lunResize(), t.lunRename(), t.lunDelete())
}

func lunPath(name string) string { return "/v1/luns/" + url.PathEscape(name) }

func (t *tool) luns(ctx context.Context) ([]api.ShelfLUN, error) {
	var out struct {
		LUNs []api.ShelfLUN `json:"luns"`
	}
	err := t.owned(ctx, http.MethodGet, "/v1/luns", nil, &out)
	return out.LUNs, err
}

func (t *tool) lunList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List LUNs, those that are being deleted too", Args: words(),
		Example: "  ledge lun list\n  ledge lun list --json | jq -r '.[] | select(.kind==\"plain\").name'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			luns, err := t.luns(cmd.Context())
			if err != nil {
				return err
			}
			if t.json {
				if luns == nil {
					luns = []api.ShelfLUN{}
				}
				return printJSON(t.out, luns)
			}
			rows := [][]string{{"LUN", "NAME", "KIND", "SIZE", "BLOCK", "ALLOCATED", "STATE"}}
			for _, l := range luns {
				state := l.State
				if state == "" {
					state = "online"
				}
				rows = append(rows, []string{strconv.FormatUint(uint64(l.LUN), 10), l.Name, l.Kind, api.FormatSize(l.SizeBytes), strconv.FormatUint(uint64(l.BlockBytes), 10), api.FormatSize(l.AllocatedBytes), state})
			}
			return table(t.out, rows)
		}),
	}
}

func (t *tool) lunShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show one LUN and what initiators did with it", Args: words("a NAME"),
		Example: "  ledge lun show db\n  ledge lun show db --json | jq .stats",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			var l api.LUNInfo
			if err := t.owned(cmd.Context(), http.MethodGet, lunPath(args[0]), nil, &l); err != nil {
				return err
			}
			return t.printLUN(l)
		}),
	}
}

func (t *tool) printLUN(l api.LUNInfo) error {
	if t.json {
		return printJSON(t.out, l)
	}
	hosts := "every initiator"
	switch {
	case len(l.Hosts) > 0:
		hosts = strings.Join(l.Hosts, ", ")
	case l.Kind != "plain":
		hosts = "nobody: it is a host's, and the host is gone"
	}
	return facts(t.out, "name", l.Name, "lun", strconv.FormatUint(uint64(l.LUN), 10), "kind", l.Kind, "uuid", l.UUID,
		"size", api.FormatSize(l.SizeBytes), "block", fmt.Sprintf("%d bytes", l.BlockBytes),
		"allocated", fmt.Sprintf("%s (%s)", api.FormatSize(l.AllocatedBytes), share(uint64(l.AllocatedBytes), uint64(l.SizeBytes))),
		"seen by", hosts,
		"reads", fmt.Sprintf("%d, %s", l.Stats.Reads, api.FormatSize(int64(l.Stats.ReadBytes))),
		"writes", fmt.Sprintf("%d, %s", l.Stats.Writes, api.FormatSize(int64(l.Stats.WriteBytes))),
		"failed", strconv.FormatUint(l.Stats.Failed, 10))
}

func (t *tool) lunCreate() *cobra.Command {
	var (
		kind  string
		block uint32
	)
	cmd := &cobra.Command{
		Use: "create NAME SIZE", Short: "Create a thin LUN that any initiator can use", Args: words("a NAME", "a SIZE such as 100GiB"),
		Long: `Create a thin LUN on the shelf. Initiators see it at once, on both controllers. A host's agent makes
its own LUNs: this is for initiators without one.

NAME is 1 to 48 of a-z, 0-9 and -. SIZE is in bytes, or with KiB, MiB, GiB, TiB (powers of 1024), and a
multiple of 4KiB.`,
		Example: "  ledge lun create esx1 500GiB\n  ledge lun create db 2TiB --block 4096",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			size, err := api.ParseSize(args[1])
			if err != nil {
				return usageError{err}
			}
			in := map[string]any{"name": args[0], "size_bytes": size}
			if kind != "" {
				in["kind"] = kind
			}
			if block != 0 {
				in["block_bytes"] = block
			}
			var l api.ShelfLUN
			if err := t.owned(cmd.Context(), http.MethodPost, "/v1/luns", in, &l); err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, l)
			}
			_, err = fmt.Fprintf(t.out, "created %s, %s, as LUN %d\n", l.Name, api.FormatSize(l.SizeBytes), l.LUN)
			return err
		}),
	}
	cmd.Flags().StringVar(&kind, "kind", "", "plain (default), journal or store")
	cmd.Flags().Uint32Var(&block, "block", 0, "logical block in bytes: 512 (default) or 4096")
	return cmd
}

func (t *tool) lunResize() *cobra.Command {
	return &cobra.Command{
		Use: "resize NAME SIZE", Short: "Make a LUN larger; it never shrinks", Args: words("a NAME", "a SIZE such as 200GiB"),
		Long:    "Make a LUN larger. Initiators are told. A LUN never shrinks: what lies beyond would be lost.",
		Example: "  ledge lun resize db 4TiB",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			size, err := api.ParseSize(args[1])
			if err != nil {
				return usageError{err}
			}
			var l api.LUNInfo
			if err := t.owned(cmd.Context(), http.MethodPost, lunPath(args[0])+"/resize", map[string]int64{"size_bytes": size}, &l); err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, l)
			}
			_, err = fmt.Fprintf(t.out, "%s has %s now\n", l.Name, api.FormatSize(l.SizeBytes))
			return err
		}),
	}
}

func (t *tool) lunRename() *cobra.Command {
	return &cobra.Command{
		Use: "rename NAME NEWNAME", Short: "Give a LUN another name; initiators notice nothing", Args: words("a NAME", "a NEWNAME"),
		Example: "  ledge lun rename db db-old",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			var l api.LUNInfo
			if err := t.owned(cmd.Context(), http.MethodPost, lunPath(args[0])+"/rename", map[string]string{"name": args[1]}, &l); err != nil {
				return err
			}
			if t.json {
				return printJSON(t.out, l)
			}
			_, err := fmt.Fprintf(t.out, "%s is %s now\n", args[0], l.Name)
			return err
		}),
	}
}

func (t *tool) lunDelete() *cobra.Command {
	var yes, force, wait bool
	cmd := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a LUN and all its data", Args: words("a NAME"),
		Long: `Delete a LUN. It is gone for initiators at once; its space comes back in the background, also after a
restart ('ledge lun list' shows it as deleting). There are no snapshots: what is deleted is lost.
A host's LUN holds all of the host's volumes and is refused without --force.`,
		Example: "  ledge lun delete scratch --yes\n  ledge lun delete scratch --yes --wait    # until its space is free",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			var l api.LUNInfo
			if err := t.owned(cmd.Context(), http.MethodGet, lunPath(args[0]), nil, &l); err != nil {
				return err
			}
			what := fmt.Sprintf("deleting %s loses all of it: %s LUN of %s with %s allocated", l.Name, l.Kind, api.FormatSize(l.SizeBytes), api.FormatSize(l.AllocatedBytes))
			if err := t.confirm(cmd, yes, what, l.Name); err != nil {
				return err
			}
			path := lunPath(args[0])
			if force {
				path += "?force=true"
			}
			if err := t.owned(cmd.Context(), http.MethodDelete, path, nil, nil); err != nil {
				return err
			}
			if wait {
				if err := t.freed(cmd, l); err != nil {
					return err
				}
			}
			if t.json {
				return printJSON(t.out, map[string]any{"deleted": l.Name, "uuid": l.UUID, "freed": wait})
			}
			if wait {
				_, err := fmt.Fprintf(t.out, "deleted %s; its space is free\n", l.Name)
				return err
			}
			_, err := fmt.Fprintf(t.out, "deleted %s; its space comes back in the background\n", l.Name)
			return err
		}),
	}
	f := cmd.Flags()
	f.BoolVar(&yes, "yes", false, "do not ask")
	f.BoolVar(&force, "force", false, "delete it though a host's volumes are on it")
	f.BoolVar(&wait, "wait", false, "wait until its space is free")
	return cmd
}

// freed waits until nothing is left of a LUN.
func (t *tool) freed(cmd *cobra.Command, l api.LUNInfo) error {
	return t.poll(cmd, func(ctx context.Context) (bool, string, error) {
		luns, err := t.luns(ctx)
		if err != nil {
			return false, "", err
		}
		for _, x := range luns {
			if x.UUID == l.UUID {
				done := uint64(max(l.AllocatedBytes-x.AllocatedBytes, 0))
				return false, fmt.Sprintf("freeing %s  %s %s", l.Name, bar(done, uint64(l.AllocatedBytes), 30), share(done, uint64(l.AllocatedBytes))), nil
			}
		}
		return true, "", nil
	})
}
