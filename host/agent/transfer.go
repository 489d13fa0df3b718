package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/qcow2"
	"github.com/ledge-storage/ledge/host/store"
)

// Export and import: a volume as one body, a qcow2 image laid out so that it can be read front to back (package qcow2).
//
//	export   of a snapshot; without one, of a snapshot that is taken for it and deleted afterwards
//	import   into a volume with a name that nobody else can have and that is not exported; when all is there and durable, it
//	         gets its real name. So a volume that can be seen is whole.
//
// What a crash leaves of either is swept away when the engine opens next (storeEngine.sweep).

// Names that begin so are the agent's own: the API takes none of them.
const (
	ownPrefix    = "_"
	importPrefix = ownPrefix + "import-"
	exportPrefix = ownPrefix + "export-"
)

const (
	// stallLimit is how long the other side of a transfer may do nothing.
	stallLimit = 10 * time.Minute
	// importBytes are read at a time, and stagedAtOnce of these may be on their way to the store.
	importBytes  = 1 << 20
	stagedAtOnce = 16
	// drainLimit and drainBytes bound what is still read of an import that is refused.
	drainLimit = 5 * time.Second
	drainBytes = 256 << 20
)

// Blocks is a volume or a snapshot, in blocks of store.BlockBytes.
type Blocks interface {
	Size() int64
	Read(ctx context.Context, lba uint64, p []byte) error
	Mapped(lba, most uint64) (mapped bool, n uint64)
	Stage(ctx context.Context, lba uint64, data []byte) (*store.Ticket, error)
}

// Transferrer is an engine whose volumes can be exported and imported.
type Transferrer interface {
	Snapshotter
	DeleteVolume(ctx context.Context, name string) error
	RenameVolume(ctx context.Context, name, to string) error
	// Blocks are those of a volume, or of its snapshot.
	Blocks(volume, snapshot string) (Blocks, error)
}

// source is Blocks as the source of an image.
type source struct{ Blocks }

func (s source) Next(_ context.Context, off int64) (data bool, n int64, err error) {
	mapped, blocks := s.Mapped(uint64(off/store.BlockBytes), uint64((s.Size()-off+store.BlockBytes-1)/store.BlockBytes))
	return mapped, int64(blocks)*store.BlockBytes - off%store.BlockBytes, nil
}

func (s source) ReadAt(ctx context.Context, p []byte, off int64) error {
	if n := s.Size() - off; n < int64(len(p)) {
		clear(p[max(n, 0):])
		p = p[:max(n, 0)]
	}
	return s.Read(ctx, uint64(off/store.BlockBytes), p)
}

// exportVolume sends a volume's image. Errors that come once it is under way cut the connection.
func (a *Agent) exportVolume(w http.ResponseWriter, r *http.Request) error {
	ctx, name, snapshot := r.Context(), r.PathValue("name"), r.URL.Query().Get("snapshot")
	if err := checkName(name); err != nil {
		return err
	}
	e, err := a.current()
	if err != nil {
		return err
	}
	t, ok := e.(Transferrer)
	if !ok {
		return refuse(http.StatusNotImplemented, "", "this agent's engine cannot export volumes")
	}
	if snapshot == "" {
		var random [4]byte
		rand.Read(random[:])
		snapshot = exportPrefix + hex.EncodeToString(random[:])
		if err := a.change(ctx, func(Engine) error {
			_, err := t.Snapshot(ctx, snapshot, name)
			return answer("export", name, err)
		}); err != nil {
			return err
		}
		defer func() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			if err := t.DeleteSnapshot(end, name, snapshot); err != nil {
				a.log.Warn("the snapshot of an export stays until the agent starts again", "volume", name, "snapshot", snapshot, "error", err)
			}
		}()
	} else if err := checkName(snapshot); err != nil {
		return err
	}
	b, err := t.Blocks(name, snapshot)
	if err != nil {
		return answer("export", name, err)
	}
	plan, err := qcow2.NewPlan(ctx, source{b})
	if err != nil {
		return answer("export", name, err)
	}
	a.log.Info("export begins", "volume", name, "snapshot", snapshot, "bytes", plan.Bytes())
	h := w.Header()
	h.Set("Content-Type", api.ImageType)
	h.Set("Content-Length", strconv.FormatInt(plan.Bytes(), 10))
	h.Set(api.DiskBytesHeader, strconv.FormatInt(b.Size(), 10))
	control := http.NewResponseController(w)
	control.SetWriteDeadline(time.Now().Add(stallLimit)) // a connection that cannot is cut some other way
	w.WriteHeader(http.StatusOK)
	if err := plan.Write(ctx, w, func(int64) { control.SetWriteDeadline(time.Now().Add(stallLimit)) }); err != nil {
		a.log.Warn("export ended early", "volume", name, "error", err)
		panic(http.ErrAbortHandler) // the client must not take it for whole; deferred calls run
	}
	return nil
}

// importVolume makes a volume of the image that the request brings.
func (a *Agent) importVolume(w http.ResponseWriter, r *http.Request) (v api.Volume, err error) {
	ctx, name := r.Context(), r.PathValue("name")
	if err := checkName(name); err != nil {
		return v, err
	}
	least := int64(0)
	if s := r.URL.Query().Get("size_bytes"); s != "" {
		if least, err = strconv.ParseInt(s, 10, 64); err != nil || least <= 0 {
			return v, refuse(http.StatusBadRequest, "", "size_bytes %q: want a whole number of bytes", clip(s))
		}
	}
	how, err := store.ParseCompression(r.URL.Query().Get("compression"))
	if err != nil {
		return v, refuse(http.StatusBadRequest, "", "compression: want %s", wantCompression)
	}
	if e, err := a.current(); err != nil {
		return v, err
	} else if err := a.vacant(e, name); err != nil { // before all of it is sent for nothing
		return v, err
	} else if t, ok := e.(Transferrer); ok {
		if _, err := t.Blocks(importPrefix+name, ""); err == nil {
			return v, underWay(name)
		}
	}
	control := http.NewResponseController(w)
	defer func() {
		if err != nil { // who still sends is to get the answer, not a broken pipe
			control.SetReadDeadline(time.Now().Add(drainLimit))
			io.CopyN(io.Discard, r.Body, drainBytes)
		}
	}()
	control.SetReadDeadline(time.Now().Add(stallLimit))
	s, err := qcow2.NewStream(r.Body)
	if err != nil {
		return v, refuse(http.StatusBadRequest, "'ledge volume import' sends any image in this form", "%v", err)
	}
	size := max(s.Size(), VolumeStep)
	size = (size + VolumeStep - 1) / VolumeStep * VolumeStep
	if least != 0 && least < size {
		return v, refuse(http.StatusBadRequest, "leave --size out, or shrink the disk first", "the image has %s, more than %s", api.FormatSize(size), api.FormatSize(least))
	}
	size = max(size, least)
	if err := checkSize(size); err != nil {
		return v, err
	}
	hidden := importPrefix + name
	var t Transferrer
	if err := a.change(ctx, func(e Engine) (err error) {
		var ok bool
		if t, ok = e.(Transferrer); !ok {
			return refuse(http.StatusNotImplemented, "", "this agent's engine cannot import volumes")
		}
		if err := a.vacant(e, name); err != nil {
			return err
		}
		if err := e.CreateVolume(ctx, hidden, size); errors.Is(err, store.ErrExists) {
			return underWay(name)
		} else if err != nil {
			return answer("import", name, err)
		}
		if how == store.CompressS2 {
			return nil
		}
		if err := compress(ctx, e, hidden, how); err != nil {
			return errors.Join(err, e.DeleteVolume(ctx, hidden))
		}
		return nil
	}); err != nil {
		return v, err
	}
	a.log.Info("import begins", "volume", name, "bytes", size, "data", s.DataBytes())
	err = a.receive(ctx, t, s, hidden, control)
	if err == nil {
		err = a.change(ctx, func(e Engine) error {
			if err := a.vacant(e, name); err != nil {
				return err
			}
			if err := t.RenameVolume(ctx, hidden, name); err != nil {
				return answer("import", name, err)
			}
			return a.begin(e, name)
		})
	}
	if err != nil {
		a.log.Warn("import failed; nothing of it stays", "volume", name, "error", err)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if serr := sweepImport(end, t, hidden); serr != nil {
			a.log.Warn("what an import leaves stays until the agent starts again", "volume", name, "error", serr)
		}
		return v, err
	}
	a.log.Info("volume imported", "volume", name, "bytes", size)
	return a.volume(name)
}

func underWay(name string) error {
	return refuse(http.StatusConflict, "wait for it, or end it", "another import of %q is under way", name)
}

// vacant says whether a volume of that name can be made.
func (a *Agent) vacant(e Engine, name string) error {
	list := e.Volumes()
	if len(list) >= MaxVolumes {
		return refuse(http.StatusConflict, "delete a volume", "%d volumes exist, and an agent takes no more", len(list))
	}
	for _, v := range list {
		if v.Name == name {
			return answer("import", name, fmt.Errorf("%q: %w", name, store.ErrExists))
		}
	}
	return nil
}

// receive writes the image to the hidden volume; all is durable when it returns nil.
func (a *Agent) receive(ctx context.Context, t Transferrer, s *qcow2.Stream, hidden string, control *http.ResponseController) error {
	b, err := t.Blocks(hidden, "")
	if err != nil {
		return answer("import", hidden, err)
	}
	var tickets []*store.Ticket
	wait := func(most int) error {
		for len(tickets) > most {
			if err := tickets[0].Wait(ctx); err != nil {
				return answer("import", hidden, err)
			}
			tickets = tickets[1:]
		}
		return nil
	}
	buf := make([]byte, importBytes)
	for {
		control.SetReadDeadline(time.Now().Add(stallLimit))
		off, n, err := s.Next(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return refuse(http.StatusBadRequest, "send it again; nothing of it stays", "the image: %v", err)
		}
		whole := (n + store.BlockBytes - 1) / store.BlockBytes * store.BlockBytes
		clear(buf[n:whole])
		ticket, err := b.Stage(ctx, uint64(off/store.BlockBytes), buf[:whole]) // it copies
		if err != nil {
			return answer("import", hidden, err)
		}
		tickets = append(tickets, ticket)
		if err := wait(stagedAtOnce); err != nil {
			return err
		}
	}
	return wait(0)
}

// sweepImport deletes the hidden volume of an import. That it is not there is no error.
func sweepImport(ctx context.Context, t Transferrer, hidden string) error {
	if err := t.DeleteVolume(ctx, hidden); !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return nil
}

// own says whether a volume is the agent's own: it is not exported, and not listed.
func own(name string) bool { return strings.HasPrefix(name, ownPrefix) }
