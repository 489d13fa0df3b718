// Package agent is the line between a test and the guest that it booted: the test asks for a command to be run, the
// guest answers with what came of it. The line is a virtio serial port, so that no network is needed and none is
// disturbed.
//
// # Format
//
// One JSON object a line, at most MaxLine bytes with its newline. The guest begins with Hello. Then requests go to the
// guest and answers come back, in any order; ID ties an answer to its request. A line that is no request ends the
// conversation: nothing but this package writes there.
//
// # Limits
//
// MaxUnderWay commands run at once; the guest reads no further request before one of them ends. Of a command's
// output the first MaxOutput bytes are kept.
package agent

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
)

const (
	MaxLine     = 2 << 20
	MaxOutput   = 1 << 20
	MaxUnderWay = 16
	// Version is what Hello says; both ends are built from one tree.
	Version = 1
)

// Hello is the guest's first line.
type Hello struct {
	Version int `json:"version"`
	// Kernel is its release, uname -r.
	Kernel string `json:"kernel"`
}

// Request asks for a command.
type Request struct {
	ID uint64 `json:"id"`
	// Argv is the program, found in PATH, and its arguments.
	Argv []string `json:"argv"`
	// Input is what it reads.
	Input []byte `json:"input,omitempty"`
	// Seconds after which it is killed, with all that it started; zero: never.
	Seconds int `json:"seconds,omitempty"`
}

// Answer is what came of it.
type Answer struct {
	ID uint64 `json:"id"`
	// Code is its exit status; -1: it was killed, or could not be started, and Error says why.
	Code int `json:"code"`
	// Output is what it wrote, standard output and error together; Cut says that it wrote more.
	Output []byte `json:"output,omitempty"`
	Cut    bool   `json:"cut,omitempty"`
	Error  string `json:"error,omitempty"`
}

// lines reads objects.
type lines struct{ in *bufio.Scanner }

func newLines(r io.Reader) lines {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 64<<10), MaxLine)
	return lines{in}
}

func (l lines) next(v any) error {
	if !l.in.Scan() {
		if err := l.in.Err(); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		return io.EOF
	}
	if err := json.Unmarshal(l.in.Bytes(), v); err != nil {
		return fmt.Errorf("agent: a line of %d bytes: %w", len(l.in.Bytes()), err)
	}
	return nil
}

func write(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	if len(line) >= MaxLine {
		return fmt.Errorf("agent: a line of %d bytes is longer than %d", len(line)+1, MaxLine)
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
