// Command shelfd runs one controller of a shelf.
//
// Synopsis:
//
//	shelfd --config FILE [--check | --erase-nvram IDENTITY]
//
// Description:
//
// It opens this controller's NVRAM and its ports to the drives, links with the partner, reads the pool's labels
// and becomes owner or standby as they say. It never takes a pool over by itself: POST /v1/takeover of its API
// does. The same binary runs in the booted image and as an ordinary process on files.
//
// Options:
//
//	--config FILE  the configuration, a JSON object (type Config)
//	--check        check the configuration and exit
//	--erase-nvram IDENTITY
//	               empty the NVRAM of a controller that does not run, and exit: all that it holds is lost. IDENTITY is
//	               whose it is (shelf/A), as the refusal says, or "unknown" where none is recorded
//	--help         show help with an example
//
// Exit codes: 0 told to stop; 1 the configuration is wrong; 2 failed, restart with back-off; 3 fenced, restart at
// once; 4 refused, an operator must act, restart slowly.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

const usage = `shelfd runs one controller of a Ledge shelf.

Usage:
  shelfd --config FILE [--check | --erase-nvram IDENTITY]

Options:
  --config FILE  the configuration: one JSON object
  --check        check the configuration and exit: 0 good, 1 wrong
  --erase-nvram IDENTITY
                 empty the NVRAM and exit: all that it holds is lost. IDENTITY is whose it is (shelf/A), as the
                 refusal to use it says, or "unknown" where none is recorded
  --help         this text

Example: controller A as an ordinary process, on files
  for i in 01 02 03 04 05 06 07 08 09 10 11 12; do truncate -s 1G /tmp/shelf/drive$i.img; done
  cat > /tmp/shelf/a.json <<EOF
  {"shelf": "s1", "controller": "A", "secret": "at-least-16-bytes-here", "api_listen": "unix:/tmp/shelf/a.sock",
   "portal_listen": "127.0.0.1:3261", "portals": {"A": ["127.0.0.1:3261"], "B": ["127.0.0.1:3262"]},
   "drives": ["/tmp/shelf/drive*.img"], "nvram": {"path": "/tmp/shelf/nvram-a.img", "size": 134217728},
   "mirror": {"listen": "127.0.0.1:7700"}}
  EOF
  shelfd --config /tmp/shelf/a.json --check
  shelfd --config /tmp/shelf/a.json &
  curl --unix-socket /tmp/shelf/a.sock -X POST http://shelf/v1/pool
  curl --unix-socket /tmp/shelf/a.sock http://shelf/v1/status
Controller B: the same with "controller": "B", its own nvram, api_listen and portal_listen, and
"mirror": {"dial": "127.0.0.1:7700"}.

Exit codes:
  0 told to stop   1 configuration is wrong   2 failed   3 fenced by the partner   4 refused: an operator must act
`

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("shelfd", flag.ContinueOnError)
	flags.Usage = func() {}
	path := flags.String("config", "", "")
	check := flags.Bool("check", false, "")
	erase := flags.String("erase-nvram", "", "")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return exitOK
	case err != nil: // the package has said what
		fmt.Fprintln(os.Stderr, "shelfd: see --help")
		return exitConfig
	case *path == "" || flags.NArg() > 0:
		fmt.Fprintln(os.Stderr, "shelfd: --config FILE is required, and nothing else; see --help")
		return exitConfig
	}
	c, err := LoadConfig(*path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "shelfd: configuration:", err)
		return exitConfig
	}
	if *check {
		fmt.Println("shelfd: configuration is good:", *path)
		return exitOK
	}
	if *erase != "" {
		if err := eraseNVRAM(c, *erase); err != nil {
			fmt.Fprintln(os.Stderr, "shelfd:", err)
			return exitRefused
		}
		fmt.Println("shelfd: NVRAM is empty:", c.NVRAM.Path)
		return exitOK
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	code, err := serve(ctx, c, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "shelfd:", err)
	}
	return code
}
