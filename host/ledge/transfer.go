package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/qcow2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Volumes as files: what goes between the agent and this tool is always a qcow2 image that can be read front to back
// (package host/qcow2), so that nothing is sent for what is empty; raw is made, or read, here.

const (
	formatRaw   = "raw"
	formatQcow2 = "qcow2"
	formatAuto  = "auto"
)

// transfer shows how far long copying is.
type transfer struct {
	p     *progress
	what  string
	total int64
	began time.Time
}

func (t *tool) transfer(cmd *cobra.Command, what string, total int64) *transfer {
	return &transfer{p: &progress{w: cmd.ErrOrStderr(), live: t.tty && !t.json, every: 10 * time.Second}, what: what, total: total, began: time.Now()}
}

func (x *transfer) at(done int64) {
	took := time.Since(x.began).Seconds()
	if took < 1 || x.p.live && time.Since(x.p.last) < 200*time.Millisecond {
		return
	}
	rate := float64(done) / took
	rest := int64(float64(x.total-done) / max(rate, 1))
	x.p.show(fmt.Sprintf("%s %s %s of %s, %s/s, %s", x.what, bar(uint64(done), uint64(x.total), barWidth), api.FormatSize(done), api.FormatSize(x.total), api.FormatSize(int64(rate)), left(&rest)))
	if x.p.live {
		x.p.last = time.Now()
	}
}

// counted tells a transfer of what is read.
type counted struct {
	io.Reader
	x    *transfer
	done int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.done += int64(n)
	c.x.at(c.done)
	return n, err
}

// transferred is the answer with --json.
type transferred struct {
	Volume string `json:"volume"`
	File   string `json:"file"`
	Format string `json:"format"`
	// SizeBytes is the disk's size, DataBytes what was written to the file or sent to the agent.
	SizeBytes int64   `json:"size_bytes"`
	DataBytes int64   `json:"data_bytes"`
	Seconds   float64 `json:"seconds"`
}

func (t *tool) volumeExport() *cobra.Command {
	var format string
	var force bool
	cmd := &cobra.Command{
		Use: "export NAME[@SNAPSHOT] FILE", Short: "Copy a volume or a snapshot into a file, as raw or qcow2", Args: words("a NAME, or NAME@SNAPSHOT", "a FILE, or - for standard output"),
		Long: `Copy a volume, or a snapshot of it, into a file. What holds no data is not copied: a raw file is sparse, a qcow2 image has
no clusters there. Of a volume, what is copied is as it was at one instant: a snapshot is taken for it, and deleted
afterwards.

Without --format a FILE that ends in .qcow2 becomes a qcow2 image (version 3, no compression), any other a raw one. FILE appears under its
name once all of it is on the medium; one that exists is replaced with --force only. On standard output raw is as long
as the volume: qcow2 is the better choice there.`,
		Example: "  ledge volume export db@monday /backup/db.qcow2\n  ledge volume export db - --format qcow2 | ssh other ledge volume import - db\n  ledge volume export db disk.img --json",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			name, snapshot, _ := strings.Cut(args[0], "@")
			if name == "" || strings.Contains(args[0], "@") && snapshot == "" {
				return usagef("%q is no volume and no snapshot: want NAME, or NAME@SNAPSHOT", args[0])
			}
			file := args[1]
			switch {
			case format == "" && strings.HasSuffix(file, ".qcow2"):
				format = formatQcow2
			case format == "":
				format = formatRaw
			case format != formatRaw && format != formatQcow2:
				return usagef("--format %q: want raw or qcow2", format)
			}
			if file == "-" && t.json {
				return usagef("--json and the volume cannot both go to standard output")
			}
			if i, err := os.Lstat(file); file != "-" && err == nil {
				switch {
				case !i.Mode().IsRegular():
					return hinted{fmt.Errorf("%s exists and is no regular file", file), "to write a device: ledge volume export NAME - --format raw | dd of=DEVICE bs=1M conv=fsync"}
				case !force:
					return hinted{fmt.Errorf("%s exists", file), "choose another name, or pass --force to replace it"}
				}
			}
			if file == "-" && t.screen {
				return usagef("standard output is a terminal; send it to a file or a program")
			}
			return t.export(cmd, name, snapshot, file, format)
		}),
	}
	cmd.Flags().StringVar(&format, "format", "", "raw or qcow2 (default: by the name of FILE)")
	cmd.Flags().BoolVar(&force, "force", false, "replace FILE if it exists")
	return cmd
}

func (t *tool) export(cmd *cobra.Command, name, snapshot, file, format string) (err error) {
	began := time.Now()
	c, err := t.agent()
	if err != nil {
		return err
	}
	defer c.Close()
	path := volumePath(name) + "/export"
	if snapshot != "" {
		path += "?snapshot=" + url.QueryEscape(snapshot)
	}
	resp, err := c.Get(cmd.Context(), path)
	if err != nil {
		return explain(err)
	}
	defer resp.Body.Close()
	size, _ := strconv.ParseInt(resp.Header.Get(api.DiskBytesHeader), 10, 64)
	x := t.transfer(cmd, "exporting", resp.ContentLength)
	defer x.p.end()
	in := &counted{Reader: resp.Body, x: x}
	data := int64(0)
	if file == "-" {
		if data, err = write(in, t.out, nil, format, resp.ContentLength); err != nil {
			return fmt.Errorf("export %s: %w", name, err)
		}
		return nil
	}
	// Under another name until it is whole and durable.
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if data, err = write(in, f, f, format, resp.ContentLength); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = f.Chmod(0o644 &^ umask())
	}
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err == nil {
		err = syncDir(filepath.Dir(file))
	}
	if err != nil {
		return fmt.Errorf("export %s to %s: %w", name, file, err)
	}
	x.p.end()
	if t.json {
		return printJSON(t.out, transferred{name, file, format, size, data, time.Since(began).Seconds()})
	}
	_, err = fmt.Fprintf(t.out, "exported %s to %s as %s: a disk of %s, %s written\n", cmd.Flags().Arg(0), file, format, api.FormatSize(size), api.FormatSize(data))
	return err
}

// umask without changing it for others for longer than it takes.
func umask() os.FileMode {
	m := unix.Umask(0o077)
	unix.Umask(m)
	return os.FileMode(m)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// write copies an image to out, in its format. f is out where that is a file, which may have holes.
func write(in io.Reader, out io.Writer, f *os.File, format string, length int64) (data int64, err error) {
	if format == formatQcow2 {
		n, err := io.Copy(out, in)
		if err == nil && length >= 0 && n != length {
			err = fmt.Errorf("%d bytes came, of %d: %w", n, length, io.ErrUnexpectedEOF)
		}
		return n, err
	}
	s, err := qcow2.NewStream(in)
	if err != nil {
		return 0, err
	}
	buf, at := make([]byte, 16*qcow2.Cluster), int64(0)
	for {
		off, n, err := s.Next(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return data, err
		}
		if f != nil {
			_, err = f.WriteAt(buf[:n], off)
		} else if err = zeros(out, off-at); err == nil {
			_, err = out.Write(buf[:n])
		}
		if err != nil {
			return data, err
		}
		at, data = off+int64(n), data+int64(n)
	}
	if f != nil {
		return data, f.Truncate(s.Size())
	}
	return data, zeros(out, s.Size()-at)
}

func zeros(out io.Writer, n int64) error {
	_, err := io.CopyN(out, zeroReader{}, n)
	return err
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func (t *tool) volumeImport() *cobra.Command {
	var format, size, compression string
	cmd := &cobra.Command{
		Use: "import FILE NAME", Short: "Make a volume of a raw or qcow2 file", Args: words("a FILE, or - for standard input", "a NAME"),
		Long: `Make a volume of a file: raw, or qcow2 of version 2 or 3 (compressed clusters too; no backing file, no encryption). The volume
appears when all of it is there and durable: an import that is interrupted leaves nothing. Holes and zeros take no space.

From standard input the image is first kept in a temporary file in $TMPDIR, for its length must be known.`,
		Example: "  ledge volume import debian-12.qcow2 vm1 --size 40GiB\n  ledge volume import disk.img db\n  curl -s https://example.com/image.raw | ledge volume import - vm2",
		RunE: do(func(cmd *cobra.Command, args []string) error {
			if format != formatAuto && format != formatRaw && format != formatQcow2 {
				return usagef("--format %q: want auto, raw or qcow2", format)
			}
			least := int64(0)
			if size != "" {
				var err error
				if least, err = api.ParseSize(size); err != nil {
					return usageError{err}
				}
			}
			query := url.Values{}
			if least > 0 {
				query.Set("size_bytes", strconv.FormatInt(least, 10))
			}
			if compression != "" {
				query.Set("compression", compression)
			}
			return t.importFile(cmd, args[0], args[1], format, query)
		}),
	}
	cmd.Flags().StringVar(&format, "format", formatAuto, "raw, qcow2, or auto: by what the file begins with")
	cmd.Flags().StringVar(&size, "size", "", "size of the volume, if it is to be larger than the image")
	cmd.Flags().StringVar(&compression, "compression", "", "s2, zstd or off (default s2)")
	return cmd
}

func (t *tool) importFile(cmd *cobra.Command, file, name, format string, query url.Values) error {
	began, ctx := time.Now(), cmd.Context()
	f, err := t.input(file)
	if err != nil {
		return err
	}
	defer f.Close()
	src, format, err := openImage(f, format)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	plan, err := qcow2.NewPlan(ctx, src)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	c, err := t.agent()
	if err != nil {
		return err
	}
	defer c.Close()
	x := t.transfer(cmd, "importing", plan.Bytes())
	defer x.p.end()
	path := volumePath(name) + "/import"
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	r, w := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		err := plan.Write(ctx, w, x.at)
		w.CloseWithError(err)
		wrote <- err
	}()
	var v api.Volume
	err = c.Send(ctx, path, r, plan.Bytes(), &v)
	r.CloseWithError(errors.New("the agent takes no more"))
	werr := <-wrote
	var refused *api.Error
	switch {
	case err == nil:
	case errors.As(err, &refused), werr == nil, errors.Is(werr, io.ErrClosedPipe):
		return explain(err)
	default: // the file could not be read
		return fmt.Errorf("import %s: %w", file, errors.Join(werr, err))
	}
	x.p.end()
	if t.json {
		return printJSON(t.out, struct {
			transferred
			Made api.Volume `json:"made"`
		}{transferred{name, file, format, v.SizeBytes, plan.DataBytes(), time.Since(began).Seconds()}, v})
	}
	fmt.Fprintf(t.out, "imported %s (%s) as %s, %s, of which %s came as data\n", file, format, v.Name, api.FormatSize(v.SizeBytes), api.FormatSize(plan.DataBytes()))
	return facts(t.out, "iqn", v.IQN, "portal", v.Portal, "lun", strconv.Itoa(int(v.LUN)), "url", iscsiURL(v))
}

// input opens the file; standard input becomes a temporary one.
func (t *tool) input(file string) (*os.File, error) {
	if file != "-" {
		return os.Open(file)
	}
	f, err := os.CreateTemp("", "ledge-import-*")
	if err != nil {
		return nil, err
	}
	os.Remove(f.Name()) // it is gone when this program is
	if _, err := io.Copy(f, t.in); err != nil {
		f.Close()
		return nil, fmt.Errorf("standard input, kept in %s: %w", os.TempDir(), err)
	}
	return f, nil
}

// openImage says what the file is, and gives it as a disk.
func openImage(f *os.File, format string) (qcow2.Source, string, error) {
	size, err := f.Seek(0, io.SeekEnd) // of a block device too
	if err != nil {
		return nil, "", err
	}
	head := make([]byte, 4)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", err
	}
	if format == formatAuto {
		format = formatRaw
		if qcow2.Is(head[:n]) {
			format = formatQcow2
		}
	}
	if format == formatQcow2 {
		m, err := qcow2.Open(f, size)
		return m, format, err
	}
	if size == 0 {
		return nil, "", errors.New("it is empty")
	}
	return rawFile{f, size}, format, nil
}

// rawFile is a file, with its holes.
type rawFile struct {
	f    *os.File
	size int64
}

func (r rawFile) Size() int64 { return r.size }

// Next asks the file system; one that knows no holes has none.
func (r rawFile) Next(_ context.Context, off int64) (data bool, n int64, err error) {
	fd := int(r.f.Fd())
	at, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return false, r.size - off, nil
	case err != nil:
		return true, r.size - off, nil
	case at > off:
		return false, min(at, r.size) - off, nil
	}
	if at, err = unix.Seek(fd, off, unix.SEEK_HOLE); err != nil || at <= off {
		return true, r.size - off, nil
	}
	return true, min(at, r.size) - off, nil
}

func (r rawFile) ReadAt(_ context.Context, p []byte, off int64) error {
	if rest := r.size - off; rest < int64(len(p)) {
		clear(p[max(rest, 0):])
		p = p[:max(rest, 0)]
	}
	if n, err := r.f.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("read at %d: %w", off, err)
	}
	return nil
}
