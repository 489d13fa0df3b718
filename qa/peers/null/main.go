// Null is the floor that a target on this machine and under this client cannot beat: it answers iSCSI
// commands with as many bytes as they ask for, and neither keeps (without -memory) nor checks anything.
//
// Usage: null [-batch] [-memory] [-spin DURATION] PORT BYTES
//
// -batch reads as many requests as have come and answers them with one writev, which is what the best
// target would do; without it, it takes a request at a time and writes each answer by itself.
// -memory answers reads from a memory of BYTES bytes at their address, and stores what is written there (with -batch).
// -spin is how long a connection looks for the next request before it sleeps.
//
// It moves the same bytes in the same PDUs as a good target: Data-In in pieces that the initiator takes, the last with
// the status; R2T for what of a write does not come by itself. Nothing is allocated for a request, and no data is
// copied but by the kernel, always out of and into the same few pages. It knows just what one well-behaved client sends:
// never expose it.
package main

import (
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
)

func main() {
	batch := flag.Bool("batch", false, "answer all that has come with one writev")
	keep := flag.Bool("memory", false, "keep what is written, in memory")
	spin := flag.Duration("spin", 0, "look for requests this long before sleeping")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: null [-batch] [-memory] [-spin DURATION] PORT BYTES")
		os.Exit(2)
	}
	size, err := strconv.ParseUint(flag.Arg(1), 10, 64)
	var m memory
	if err == nil && *keep {
		m, err = newMemory(size)
	}
	if err == nil {
		err = serve(net.JoinHostPort("127.0.0.1", flag.Arg(0)), size, m, *batch, *spin)
	}
	fmt.Fprintln(os.Stderr, "null:", err)
	os.Exit(1)
}

func serve(addr string, size uint64, m memory, batch bool, spin time.Duration) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			s := newSession(c, size)
			s.memory = m
			if s.login() != nil {
				return
			}
			if batch {
				_ = s.serveBatches(spin) // ends with the connection, which is all there is to say
			} else {
				_ = s.serveOneByOne()
			}
		}()
	}
}
