package main

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

func (t *tool) stats(cmd *cobra.Command, volume string) (s api.Stats, err error) {
	c, err := t.agent()
	if err != nil {
		return s, err
	}
	defer c.Close()
	path := "/v1/stats"
	if volume != "" {
		path += "?volume=" + url.QueryEscape(volume)
	}
	if err := c.Do(cmd.Context(), http.MethodGet, path, nil, &s); err != nil {
		return s, explain(err)
	}
	return s, nil
}

func (t *tool) volumeStats() *cobra.Command {
	return &cobra.Command{
		Use: "stats [NAME]", Short: "What volumes did since this agent opened them: operations, latency by stage, cache, dedup", Args: atMostOne,
		Long: `What volumes did since this agent opened them; with a NAME, one volume in detail.

Latencies are of whole commands, as the target engine sees them, and of their stages:

  read   queue    waiting for a write of the same blocks; only reads that waited
         cache    a line from the flash cache; if a part was enough, one read of sixteen
         miss     asking the flash cache for what it did not have
         shelf    a line from the shelf
         decode   checksum and decompression; one read of sixteen
  write  queue    until it is in the log: locks, room, back-pressure (unmaps too)
         journal  until the log is durable on the shelf (unmaps too)

"memory" are reads that needed neither cache nor shelf. Dedup and compression are of the blocks
packed since then, not of what the volume holds; 'ledge volume show' has that.
--json has counters that only grow, and all histograms: two of them make a rate.`,
		Example: "  ledge volume stats\n  ledge volume stats db\n  ledge volume stats db --json | jq '.volumes[0].reads.latency.p99_us'",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			s, err := t.stats(cmd, name)
			switch {
			case err != nil:
				return err
			case t.json:
				return printJSON(t.out, s)
			case name != "" && len(s.Volumes) == 1:
				return t.printStats(s.Volumes[0])
			case len(s.Volumes) == 0:
				_, err := fmt.Fprintln(t.out, "no volumes; 'ledge volume create NAME SIZE' makes one")
				return err
			}
			rows := [][]string{{"NAME", "FOR", "READS", "BYTES", "P50", "P99", "WRITES", "BYTES", "P50", "P99", "UNMAPS", "ERRORS", "HITS", "DEDUP"}}
			for _, v := range s.Volumes {
				rows = append(rows, slices.Concat([]string{v.Name, duration(v.Seconds)}, brief(v.Reads.Operations), brief(v.Writes.Operations),
					[]string{number(v.Unmaps.Ops), number(errorsOf(v)), hits(v.Cache), toOne(v.Packed.DedupRatio)}))
			}
			return table(t.out, rows)
		}),
	}
}

// atMostOne checks for a NAME that may be left out.
func atMostOne(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usagef("'%s' takes no %q", cmd.CommandPath(), args[1])
	}
	return nil
}

func (t *tool) printStats(v api.VolumeStats) error {
	packed := "nothing"
	if p := v.Packed; p.Blocks > 0 {
		packed = fmt.Sprintf("%d blocks, %d of them stored before (dedup %s); the others in %s (compression %s)", p.Blocks, p.Duplicates, toOne(p.DedupRatio), size(p.StoredBytes), toOne(p.CompressionRatio))
	}
	if err := facts(t.out, "name", v.Name, "since", fmt.Sprintf("%s, for %s", v.Since.Local().Format(time.DateTime), duration(v.Seconds)),
		"logical", api.FormatSize(v.LogicalBytes), "packed", packed,
		"cache", fmt.Sprintf("%d hits (%s), %s; %d misses, %s; %d reads from memory", v.Cache.Hits, hits(v.Cache), size(v.Cache.HitBytes), v.Cache.Misses, size(v.Cache.MissBytes), v.Cache.Memory)); err != nil {
		return err
	}
	fmt.Fprintln(t.out)
	rows := [][]string{{"", "COUNT", "PER S", "BYTES", "PER S", "ERRORS", "MEAN", "P50", "P95", "P99"}}
	command := func(name string, o api.Operations) {
		rows = append(rows, append([]string{name, number(o.Ops), perSecond(float64(o.Ops) / v.Seconds), size(o.Bytes), size(uint64(float64(o.Bytes) / v.Seconds)), number(o.Errors)}, times(o.Latency)...))
	}
	stage := func(name string, l api.Latency) {
		rows = append(rows, append([]string{"  " + name, number(l.Count), "", "", "", ""}, times(l)...))
	}
	command("read", v.Reads.Operations)
	stage("queue", v.Reads.Queue)
	stage("cache", v.Reads.Cache)
	stage("miss", v.Reads.Miss)
	stage("shelf", v.Reads.Shelf)
	stage("decode", v.Reads.Decode)
	command("write", v.Writes.Operations)
	stage("queue", v.Writes.Queue)
	stage("journal", v.Writes.Journal)
	command("unmap", v.Unmaps)
	return table(t.out, rows)
}

func (t *tool) volumeTop() *cobra.Command {
	var (
		interval time.Duration
		count    int
	)
	cmd := &cobra.Command{
		Use: "top", Short: "Rates of all volumes, the busiest first, again and again", Args: words(),
		Long: `Rates and latencies of all volumes between two looks, the one with most operations first,
until Ctrl-C or --count tables. HITS are of the lines that reads wanted of the flash cache.
--json prints an object for each interval.`,
		Example: "  ledge volume top\n  ledge volume top --interval 10s --count 6\n  ledge volume top --count 1 --json | jq '.volumes[0].name'",
		RunE: do(func(cmd *cobra.Command, _ []string) error {
			if interval < 100*time.Millisecond {
				return usagef("--interval takes 100ms or more")
			}
			if count < 0 {
				return usagef("--count takes a number of tables; 0: until Ctrl-C")
			}
			before, err := t.stats(cmd, "")
			for n := 0; err == nil && (count == 0 || n < count); n++ {
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(interval):
				}
				var now api.Stats
				if now, err = t.stats(cmd, ""); err == nil {
					err = t.printTop(ratesOf(before, now), n > 0)
					before = now
				}
			}
			if cmd.Context().Err() != nil {
				return nil
			}
			return err
		}),
	}
	cmd.Flags().DurationVar(&interval, "interval", 2*time.Second, "time between two looks")
	cmd.Flags().IntVar(&count, "count", 0, "how many tables (default: until Ctrl-C)")
	return cmd
}

// rates are what all volumes did between two looks.
type rates struct {
	At      time.Time     `json:"at"`
	Volumes []volumeRates `json:"volumes"`
}

// volumeRates are one volume's, over Seconds.
type volumeRates struct {
	Name    string        `json:"name"`
	Seconds float64       `json:"seconds"`
	Reads   commandRates  `json:"reads"`
	Writes  commandRates  `json:"writes"`
	Unmaps  commandRates  `json:"unmaps"`
	Cache   api.ReadCache `json:"cache"` // hits, misses and their rate; not per second
}

type commandRates struct {
	Ops       float64 `json:"ops_per_second"`
	Bytes     float64 `json:"bytes_per_second"`
	Errors    float64 `json:"errors_per_second"`
	P50Micros float64 `json:"p50_us"`
	P95Micros float64 `json:"p95_us"`
	P99Micros float64 `json:"p99_us"`
}

func (v *volumeRates) ops() float64   { return v.Reads.Ops + v.Writes.Ops + v.Unmaps.Ops }
func (v *volumeRates) bytes() float64 { return v.Reads.Bytes + v.Writes.Bytes + v.Unmaps.Bytes }

// ratesOf compares two looks. A volume that was opened between them is compared with nothing, over its own time; so is one
// that was opened again, whose counters began anew.
func ratesOf(before, now api.Stats) rates {
	r := rates{At: now.At, Volumes: []volumeRates{}}
	for _, v := range now.Volumes {
		var old api.VolumeStats
		for _, b := range before.Volumes {
			if b.UUID == v.UUID && b.Since.Equal(v.Since) {
				old = b
			}
		}
		x := volumeRates{Name: v.Name, Seconds: v.Seconds - old.Seconds, Cache: cacheSince(v.Cache, old.Cache)}
		x.Reads, x.Writes, x.Unmaps = rateOf(v.Reads.Operations, old.Reads.Operations, x.Seconds), rateOf(v.Writes.Operations, old.Writes.Operations, x.Seconds), rateOf(v.Unmaps, old.Unmaps, x.Seconds)
		r.Volumes = append(r.Volumes, x)
	}
	slices.SortFunc(r.Volumes, func(a, b volumeRates) int {
		return cmp.Or(cmp.Compare(b.ops(), a.ops()), cmp.Compare(b.bytes(), a.bytes()), cmp.Compare(a.Name, b.Name))
	})
	return r
}

func rateOf(now, before api.Operations, seconds float64) commandRates {
	if seconds <= 0 {
		return commandRates{}
	}
	per := func(now, before uint64) float64 { return float64(now-min(now, before)) / seconds }
	l := now.Latency.Since(before.Latency)
	return commandRates{per(now.Ops, before.Ops), per(now.Bytes, before.Bytes), per(now.Errors, before.Errors), l.P50Micros, l.P95Micros, l.P99Micros}
}

func cacheSince(now, before api.ReadCache) api.ReadCache {
	c := api.ReadCache{Hits: now.Hits - min(now.Hits, before.Hits), Misses: now.Misses - min(now.Misses, before.Misses), HitBytes: now.HitBytes - min(now.HitBytes, before.HitBytes),
		MissBytes: now.MissBytes - min(now.MissBytes, before.MissBytes), Memory: now.Memory - min(now.Memory, before.Memory)}
	if n := c.Hits + c.Misses; n > 0 {
		c.HitRate = float64(c.Hits) / float64(n)
	}
	return c
}

func (t *tool) printTop(r rates, again bool) error {
	if t.json {
		return printJSON(t.out, r)
	}
	if t.screen {
		fmt.Fprint(t.out, "\x1b[H\x1b[2J")
	} else if again {
		fmt.Fprintln(t.out)
	}
	rows := [][]string{{"NAME", "OPS/S", "READS/S", "BYTES/S", "P50", "P99", "WRITES/S", "BYTES/S", "P50", "P99", "UNMAPS/S", "ERRORS/S", "HITS"}}
	for _, v := range r.Volumes {
		row := []string{v.Name, perSecond(v.ops())}
		for _, c := range []commandRates{v.Reads, v.Writes} {
			row = append(row, perSecond(c.Ops), size(uint64(c.Bytes)), micros(c.P50Micros), micros(c.P99Micros))
		}
		rows = append(rows, append(row, perSecond(v.Unmaps.Ops), perSecond(v.Reads.Errors+v.Writes.Errors+v.Unmaps.Errors), hits(v.Cache)))
	}
	return table(t.out, rows)
}

func brief(o api.Operations) []string {
	return []string{number(o.Ops), size(o.Bytes), micros(o.Latency.P50Micros), micros(o.Latency.P99Micros)}
}

func times(l api.Latency) []string {
	if l.Count == 0 {
		return []string{"–", "–", "–", "–"}
	}
	return []string{micros(float64(l.SumMicros) / float64(l.Count)), micros(l.P50Micros), micros(l.P95Micros), micros(l.P99Micros)}
}

func errorsOf(v api.VolumeStats) uint64 { return v.Reads.Errors + v.Writes.Errors + v.Unmaps.Errors }

func number(n uint64) string { return strconv.FormatUint(n, 10) }

func size(n uint64) string { return api.FormatSize(int64(n)) }

func hits(c api.ReadCache) string { return percent(float64(c.Hits), float64(c.Hits+c.Misses)) }

// toOne says a ratio; there may be none.
func toOne(r *float64) string {
	if r == nil {
		return "–"
	}
	return fmt.Sprintf("%.2f to 1", *r)
}

// perSecond says how many a second: one decimal where it counts.
func perSecond(r float64) string {
	if r < 100 {
		return fmt.Sprintf("%.1f", r)
	}
	return fmt.Sprintf("%.0f", r)
}

// micros says a latency in three digits.
func micros(us float64) string {
	switch {
	case us == 0:
		return "–"
	case us < 999.5: // what would be rounded to 1000 is of the next unit
		return fmt.Sprintf("%.3g µs", us)
	case us < 999.5e3:
		return fmt.Sprintf("%.3g ms", us/1000)
	}
	return fmt.Sprintf("%.3g s", us/1e6)
}

func duration(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
}
