package main

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) hostCommand() *cobra.Command {
	status := &cobra.Command{
		Use: "status", Short: "Show the agent: phase, paths, reduction, cache", Args: words(),
		Long:    "Show this host's agent. Exit code 1 where it is not serving.",
		Example: "  ledge host status\n  ledge host status --json | jq .phase",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var s api.Status
			if err := c.Do(cmd.Context(), http.MethodGet, "/v1/status", nil, &s); err != nil {
				return explain(err)
			}
			if t.json {
				err = printJSON(t.out, s)
			} else {
				err = t.printHost(s)
			}
			if err == nil && s.Phase != api.PhaseServing {
				return hinted{fmt.Errorf("the agent is not serving: %s", s.Phase), "'ledge shelf status' shows whether a controller owns the pool"}
			}
			return err
		}),
	}
	return group("host", "This host's agent", status, t.hostIndex(), t.hostAcceptLost())
}

func (t *tool) hostIndex() *cobra.Command {
	return &cobra.Command{
		Use: "index [SIZE]", Short: "Show or resize the dedup index", Args: atMostOne,
		Long: `Show the dedup index, or give it another size while volumes are in use. 8 bytes find a block of 4 KiB: 2 GiB
find those of 1 TiB. A smaller one keeps a sample, by which duplicates that come in runs are still found; those that
come alone are stored again. A new size is filled from what is stored, in the background, and holds until the
agent ends: "memory": {"index": SIZE} in its configuration is for good.`,
		Example: "  ledge host index\n  ledge host index 2GiB\n  ledge host index --json | jq .ready",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var s api.Status
			x := &api.Index{}
			if len(args) == 0 {
				if err = c.Do(cmd.Context(), http.MethodGet, "/v1/status", nil, &s); err == nil && s.Index == nil {
					err = fmt.Errorf("the agent has no index: %s", s.Phase)
				}
				x = s.Index
			} else {
				n, err := api.ParseSize(args[0])
				if err != nil {
					return usagef("%w", err)
				}
				if err := c.Do(cmd.Context(), http.MethodPost, "/v1/index", map[string]int64{"size_bytes": n}, x); err != nil {
					return explain(err)
				}
			}
			if err != nil {
				return explain(err)
			}
			if t.json {
				return printJSON(t.out, x)
			}
			return facts(t.out, "index", indexWords(x))
		}),
	}
}

func (t *tool) hostAcceptLost() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "accept-lost", Short: "Give up blocks whose place in the store is lost, so that the agent serves again", Args: words(),
		Long: `A last resort, for when the shelf lost more drives than parity stands for. The agent's maps say where each block is stored;
a page of them has the places of 2 MiB of a volume. Where the shelf cannot read one, its blocks are read errors, and
the agent stops when one of them is to be written: the drives may come back. Where they will not, this gives such
pages up, of all volumes and snapshots: their blocks are read errors until they are written or unmapped. Nothing else
is touched. Where a piece of the agent's journal is lost, all volumes are then as they were at one moment before: what was
acknowledged later, and is not stored elsewhere yet, is gone. See with 'ledge array show' whether drives may come back. It is refused unless that is why the agent does
not serve, looks through all maps (a minute or two for 10 TiB), and ends when the agent serves.`,
		Example: "  ledge host accept-lost\n  ledge host accept-lost --yes --json | jq '.[].volume'   # without asking",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			if err := t.confirm(cmd, yes, "what the shelf cannot read now of the maps is given up for good, and of the journal with all that was acknowledged after it, though its drives come back", "lost"); err != nil {
				return err
			}
			c, err := t.agent()
			if err != nil {
				return err
			}
			defer c.Close()
			var s api.Status
			if err := c.Do(cmd.Context(), http.MethodPost, "/v1/store/accept-lost", map[string]any{}, &s); err != nil {
				return explain(err)
			}
			for shown := ""; s.Phase != api.PhaseServing; {
				if s.Trouble != shown && !t.json {
					shown = s.Trouble
					fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s\n", s.Phase, shown)
				}
				select {
				case <-time.After(500 * time.Millisecond):
				case <-cmd.Context().Done():
					return fmt.Errorf("the agent does not serve yet; the order holds: %w", cmd.Context().Err())
				}
				if err := c.Do(cmd.Context(), http.MethodGet, "/v1/status", nil, &s); err != nil {
					return explain(err)
				}
			}
			if t.json {
				return printJSON(t.out, append([]api.GivenUp{}, s.GivenUp...))
			}
			return table(t.out, givenUp(s.GivenUp))
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

func givenUp(all []api.GivenUp) [][]string {
	rows := [][]string{{"GIVEN UP IN", "OFFSET", "BYTES"}}
	for _, x := range all {
		if x.Snapshot != "" {
			x.Volume += "@" + x.Snapshot
		}
		if x.Journal {
			rows = append(rows, []string{"the writes acknowledged last, of all volumes", "–", "–"})
			continue
		}
		rows = append(rows, []string{x.Volume, fmt.Sprint(x.OffsetBytes), fmt.Sprint(x.Bytes)})
	}
	return rows
}

func indexWords(x *api.Index) string {
	s := fmt.Sprintf("%s, %d blocks of %d", api.FormatSize(x.Bytes), x.Entries, x.Bytes/8)
	if x.Sampled {
		s += ", a sample of what is stored"
	}
	if !x.Ready {
		s += ", still being filled"
	}
	return s
}

func (t *tool) printHost(s api.Status) error {
	pairs := []string{
		"host", s.Host, "initiator", s.Initiator, "version", s.Version,
		"phase", fmt.Sprintf("%s for %v", s.Phase, time.Since(s.Since).Round(time.Second)), "trouble", strings.ReplaceAll(s.Trouble, "\n", "; "),
		"portal", s.Portal, "store", s.Store,
		"volumes", fmt.Sprintf("%d of %d, %d session(s)", s.Volumes, s.MaxVolumes, s.Sessions),
	}
	if s.Phase == api.PhaseServing {
		cache := "none"
		if s.Cache.Size > 0 {
			cache = fmt.Sprintf("%s of %s, hits %s", api.FormatSize(s.Cache.Bytes), api.FormatSize(s.Cache.Size), percent(float64(s.Cache.Hits), float64(s.Cache.Hits+s.Cache.Misses)))
		}
		pairs = append(pairs,
			"logical", api.FormatSize(s.LogicalBytes), "unique", fmt.Sprintf("%s (%.2f to 1)", api.FormatSize(s.UniqueBytes), s.DedupRatio),
			"stored", fmt.Sprintf("%s (%.2f to 1)", api.FormatSize(s.StoredBytes), s.CompressionRatio), "cache", cache)
		if s.Index != nil {
			pairs = append(pairs, "index", indexWords(s.Index))
		}
		if w := s.Work; w != nil {
			pairs = append(pairs, "written", fmt.Sprintf("%d new blocks, %d stored before, %d overwritten at once; %d moved by the cleaner", w.Stored, w.Duplicates, w.Overwritten, w.Moved))
		}
		if m := s.Maps; m != nil {
			pairs = append(pairs, "maps", fmt.Sprintf("%s of %s, %d of %d pages in memory, %d read", api.FormatSize(m.Bytes), api.FormatSize(m.LimitBytes), m.Resident, m.Pages, m.PagesRead))
		}
	}
	if err := facts(t.out, pairs...); err != nil {
		return err
	}
	if len(s.GivenUp) > 0 {
		fmt.Fprintln(t.out)
		if err := table(t.out, givenUp(s.GivenUp)); err != nil {
			return err
		}
	}
	if len(s.Schedules) > 0 {
		fmt.Fprintln(t.out)
		rows := [][]string{{"SNAPSHOTS", "OF", "EVERY", "KEEP", "LAST", "NEXT", "ERROR"}}
		at := func(x *time.Time) string {
			if x == nil {
				return "–"
			}
			return x.Local().Format(time.DateTime)
		}
		for _, x := range s.Schedules {
			rows = append(rows, []string{x.Name, strings.Join(x.Volumes, " "), (time.Duration(x.EverySeconds) * time.Second).String(), fmt.Sprint(x.Keep), at(x.Last), at(x.Next), x.Trouble})
		}
		if err := table(t.out, rows); err != nil {
			return err
		}
	}
	if len(s.Paths) == 0 {
		return nil
	}
	fmt.Fprintln(t.out)
	rows := [][]string{{"LUN", "PORTAL", "STATE", "USED", "ERROR"}}
	for _, p := range s.Paths {
		rows = append(rows, []string{p.LUN, p.Portal, p.State, yes(p.InUse, "yes"), p.Error})
	}
	return table(t.out, rows)
}
