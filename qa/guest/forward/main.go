// Command forward carries one TCP connection for QEMU: its standard input and output to the address that is its
// argument. QEMU starts one for each connection that a guest makes to a guestfwd address of its user network; that
// network is closed otherwise (restrict=on), so that a guest reaches nothing but what a test put there.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: forward HOST:PORT")
		os.Exit(2)
	}
	c, err := net.Dial("tcp", os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "forward:", err)
		os.Exit(1)
	}
	// The end of either direction ends both: what a peer may not say half an end of, iSCSI, does not need half.
	ended := make(chan struct{}, 2)
	for _, way := range []struct {
		to   io.Writer
		from io.Reader
	}{{c, os.Stdin}, {os.Stdout, c}} {
		go func() {
			_, _ = io.Copy(way.to, way.from)
			ended <- struct{}{}
		}()
	}
	<-ended
	c.Close()
}
