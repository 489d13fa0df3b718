package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// startQEMU starts qemu-storage-daemon with an image of a format, compressed by its filter or not.
func startQEMU(ctx context.Context, dir, format string, compressed bool) (*contestant, error) {
	image, socket, monitor := filepath.Join(dir, "image"), filepath.Join(dir, "nbd"), filepath.Join(dir, "qmp")
	create := []string{"create", "-q", "-f", format}
	if compressed {
		create = append(create, "-o", "compression_type=zstd")
	}
	if out, err := exec.CommandContext(ctx, "qemu-img", append(create, image, fmt.Sprint(diskBytes))...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("qemu-img: %w: %s", err, out)
	}
	args := []string{"--blockdev", "driver=file,node-name=file,discard=unmap,filename=" + image,
		"--blockdev", "node-name=image,discard=unmap,file=file,driver=" + format}
	node := "image"
	if compressed {
		args = append(args, "--blockdev", "driver=compress,node-name=filter,file=image")
		node = "filter"
	}
	args = append(args, "--nbd-server", "addr.type=unix,max-connections=1,addr.path="+socket,
		"--export", "type=nbd,id=e,name=disk,writable=on,node-name="+node,
		"--chardev", "socket,id=m,server=on,wait=off,path="+monitor, "--monitor", "chardev=m,mode=control")
	cmd := exec.CommandContext(ctx, "qemu-storage-daemon", args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	end := func() error {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		err := cmd.Wait()
		var exit *exec.ExitError
		if errors.As(err, &exit) { // told to stop
			return nil
		}
		return err
	}
	d, err := dialNBD(socket, "disk")
	for began := time.Now(); err != nil && time.Since(began) < 10*time.Second && ctx.Err() == nil; d, err = dialNBD(socket, "disk") {
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		return nil, errors.Join(err, end())
	}
	c := &contestant{disk: d, dir: dir, pid: cmd.Process.Pid, once: compressed, stop: func() error { return errors.Join(d.Close(), end()) }}
	if format == "qcow2" {
		c.snapshot = func(ctx context.Context) error {
			return qmp(ctx, monitor, "blockdev-snapshot-internal-sync", map[string]string{"device": "image", "name": "s"})
		}
		c.delete = func(ctx context.Context) error {
			return qmp(ctx, monitor, "blockdev-snapshot-delete-internal-sync", map[string]string{"device": "image", "name": "s"})
		}
	}
	return c, nil
}

// qmp performs one command of QEMU's monitor (QEMU Machine Protocol Specification, 2.3).
func qmp(ctx context.Context, socket, command string, arguments any) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	in := bufio.NewScanner(conn)
	if !in.Scan() { // the greeting
		return errors.New("qmp: no greeting")
	}
	for _, c := range []map[string]any{{"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}} {
		if err := json.NewEncoder(conn).Encode(c); err != nil {
			return err
		}
		for {
			if !in.Scan() {
				return fmt.Errorf("qmp: %s: no answer", command)
			}
			var a struct {
				Return json.RawMessage `json:"return"`
				Error  *struct {
					Desc string `json:"desc"`
				} `json:"error"`
			}
			if err := json.Unmarshal(in.Bytes(), &a); err != nil {
				return err
			}
			if a.Error != nil {
				return fmt.Errorf("qmp: %s: %s", command, a.Error.Desc)
			}
			if a.Return != nil {
				break // else it is an event
			}
		}
	}
	return nil
}
