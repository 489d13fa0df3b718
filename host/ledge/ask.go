package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// confirm makes sure that what cannot be undone is meant: by --yes, or by the name typed again at a terminal.
func (t *tool) confirm(cmd *cobra.Command, yes bool, what, word string) error {
	if yes {
		return nil
	}
	if !t.tty {
		return usageError{hinted{fmt.Errorf("%s; nothing was done", what), "to do it, repeat the command with --yes"}}
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s.\nType %s to go on: ", what, word)
	line, err := bufio.NewReader(io.LimitReader(t.in, 4096)).ReadString('\n')
	if strings.TrimSpace(line) != word {
		if err != nil && err != io.EOF {
			return err
		}
		return fmt.Errorf("not confirmed; nothing was done")
	}
	return nil
}

// isTerminal says that a person is at the other end.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// progress shows a line that changes: in place on a terminal, else now and then.
type progress struct {
	w     io.Writer
	live  bool
	every time.Duration
	last  time.Time
	shown string
}

func (p *progress) show(line string) {
	switch {
	case line == "" || line == p.shown:
	case p.live:
		fmt.Fprintf(p.w, "\r\x1b[K%s", line)
		p.shown = line
	case p.last.IsZero() || time.Since(p.last) >= p.every:
		fmt.Fprintln(p.w, line)
		p.shown, p.last = line, time.Now()
	}
}

func (p *progress) end() {
	if p.live && p.shown != "" {
		fmt.Fprintln(p.w)
	}
}

// bar is a fraction as width characters. What is something shows, and what is not all never shows as all.
func bar(done, total uint64, width int) string {
	n := 0
	if total > 0 {
		n = int(float64(width) * float64(min(done, total)) / float64(total))
		if done > 0 {
			n = max(n, 1)
		}
		if done < total {
			n = min(n, width-1)
		}
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}

// share is a fraction in percent; what is not all never shows as all.
func share(done, total uint64) string {
	if total == 0 {
		return "–"
	}
	p := 100 * float64(done) / float64(total)
	if done < total && p > 99.9 {
		p = 99.9
	}
	return fmt.Sprintf("%.1f %%", p)
}

// left says how long something takes, coarsely.
func left(seconds *int64) string {
	if seconds == nil {
		return ""
	}
	d := time.Duration(max(*seconds, 0)) * time.Second
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s left", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min left", int(d.Minutes()+0.5))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %d min left", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days left", int(d.Hours()/24+0.5))
}
