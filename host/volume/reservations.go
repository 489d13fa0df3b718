package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"

	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// Persistent reservations of the volumes' initiators, kept in the store: they come back with the volumes after
// a restart, and on another host (P6).
//
// They are blocks of a volume of the store's own, SystemVolume, made with the first reservation. Why a volume: its
// blocks have the promises that reservations need (durable when acknowledged, recovered by any host,
// verified when read) and ask for no new kind of record in journal, segments and checkpoints, which would be
// four more places to get wrong. The price: a store that is full takes no reservation, and a clean state costs a
// block that may be deduplicated as any other.
//
// The volume is an array of slots, each of one volume:
//
//	offset size field (little endian)
//	0      8    "LEDGEPR1"; zeros: the slot is free
//	8      4    CRC-32C of 12…32+length
//	12     4    length of the state
//	16     16   UUID of the volume
//	32     …    state, as the target engine made it (target/scsi: JSON with a version of its own)
//
// A state is written as one journal record, so a power cut leaves the old one or the new one.

// SystemVolume is the name of the volume with the reservations. An agent's volumes have other names.
const SystemVolume = "_reservations"

const (
	slotBytes       = 512 << 10
	slots           = store.MaxVolumes
	slotHead        = 32
	slotMagic       = "LEDGEPR1"
	maxStateBytes   = slotBytes - slotHead
	slotBlocks      = slotBytes / store.BlockBytes
	systemVolumeLen = slots * slotBytes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Reservations are those of all volumes of a store. All methods may be called concurrently.
type Reservations struct {
	st *store.Store

	mu   sync.Mutex // held over the reading and writing of a slot: they are few
	vol  *store.Volume
	slot map[[16]byte]int // of each volume that has one
	used [slots]bool
}

// OpenReservations finds what the store has. A slot of a volume that is no more is freed by its next use.
func OpenReservations(ctx context.Context, st *store.Store) (*Reservations, error) {
	r := &Reservations{st: st, slot: map[[16]byte]int{}}
	vol, err := st.Volume(SystemVolume)
	if errors.Is(err, store.ErrNotFound) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	r.vol = vol
	there := map[[16]byte]bool{}
	for _, v := range st.Volumes() {
		there[v.UUID] = true
	}
	head := make([]byte, store.BlockBytes)
	for i := range slots {
		if err := vol.Read(ctx, uint64(i)*slotBlocks, head); err != nil {
			return nil, fmt.Errorf("volume: reservations, slot %d: %w", i, err)
		}
		if string(head[:8]) != slotMagic {
			continue
		}
		id := [16]byte(head[16:32])
		if _, twice := r.slot[id]; there[id] && !twice {
			r.slot[id], r.used[i] = i, true
		}
	}
	return r, nil
}

// Of returns the store of one volume's reservations.
func (r *Reservations) Of(volume [16]byte) scsi.SharedReservations { return reservationsOf{r, volume} }

// Forget frees the slot of a volume that was deleted.
func (r *Reservations) Forget(ctx context.Context, volume [16]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, ok := r.slot[volume]
	if !ok {
		return nil
	}
	delete(r.slot, volume)
	r.used[i] = false
	return r.vol.Zero(ctx, uint64(i)*slotBlocks, slotBlocks)
}

type reservationsOf struct {
	r  *Reservations
	id [16]byte
}

// Current implements scsi.SharedReservations. The store fails once another host has it.
func (o reservationsOf) Current(context.Context) error { return o.r.st.Err() }

// Load implements scsi.ReservationStore. An error means that the volume must not be served: who is fenced is not known.
func (o reservationsOf) Load() ([]byte, error) {
	r := o.r
	r.mu.Lock()
	defer r.mu.Unlock()
	i, ok := r.slot[o.id]
	if !ok {
		return nil, nil
	}
	b := make([]byte, store.BlockBytes)
	if err := r.vol.Read(context.Background(), uint64(i)*slotBlocks, b); err != nil {
		return nil, fmt.Errorf("volume: reservations, slot %d: %w", i, err)
	}
	n, err := stateLength(b)
	if err != nil {
		return nil, fmt.Errorf("volume: reservations, slot %d: %w", i, err)
	}
	if more := blocksOf(n) - 1; more > 0 {
		b = append(b, make([]byte, more*store.BlockBytes)...)
		if err := r.vol.Read(context.Background(), uint64(i)*slotBlocks+1, b[store.BlockBytes:]); err != nil {
			return nil, fmt.Errorf("volume: reservations, slot %d: %w", i, err)
		}
	}
	state, id, err := decodeSlot(b)
	if err == nil && id != o.id {
		err = fmt.Errorf("of another volume: %w", store.ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("volume: reservations, slot %d: %w", i, err)
	}
	return state, nil
}

// Save implements scsi.ReservationStore. target.ErrNoSpace when the state is too long, or the store is full.
func (o reservationsOf) Save(state []byte) error {
	r := o.r
	if len(state) > maxStateBytes {
		return fmt.Errorf("volume: reservations of %d bytes: %w", len(state), target.ErrNoSpace)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx := context.Background() // ends with the store
	i, ok := r.slot[o.id]
	if !ok {
		var err error
		if i, err = r.take(ctx); err != nil {
			return err
		}
	}
	if err := r.vol.Write(ctx, uint64(i)*slotBlocks, encodeSlot(o.id, state)); err != nil {
		return fmt.Errorf("volume: reservations, slot %d: %w", i, err)
	}
	r.slot[o.id], r.used[i] = i, true
	return nil
}

// take finds a free slot, and makes the volume where there is none yet. mu is held.
func (r *Reservations) take(ctx context.Context) (int, error) {
	if r.vol == nil {
		_, err := r.st.CreateVolume(ctx, SystemVolume, systemVolumeLen)
		if err != nil && !errors.Is(err, store.ErrExists) {
			return 0, fmt.Errorf("volume: make %s: %w", SystemVolume, err)
		}
		if r.vol, err = r.st.Volume(SystemVolume); err != nil {
			return 0, err
		}
	}
	for i, used := range r.used {
		if !used {
			return i, nil
		}
	}
	return 0, fmt.Errorf("volume: reservations of %d volumes: %w", slots, target.ErrNoSpace)
}

func blocksOf(state int) int { return (slotHead + state + store.BlockBytes - 1) / store.BlockBytes }

func encodeSlot(id [16]byte, state []byte) []byte {
	b := make([]byte, blocksOf(len(state))*store.BlockBytes)
	copy(b, slotMagic)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(state)))
	copy(b[16:], id[:])
	copy(b[slotHead:], state)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:slotHead+len(state)], castagnoli))
	return b
}

// stateLength reads the head of a slot.
func stateLength(b []byte) (int, error) {
	n := int(binary.LittleEndian.Uint32(b[12:]))
	if string(b[:8]) != slotMagic || n > maxStateBytes {
		return 0, fmt.Errorf("%d bytes of %q: %w", n, b[:8], store.ErrCorrupt)
	}
	return n, nil
}

// decodeSlot takes a slot apart, as many blocks as its head says.
func decodeSlot(b []byte) (state []byte, id [16]byte, err error) {
	if len(b) < slotHead {
		return nil, id, store.ErrCorrupt
	}
	n, err := stateLength(b)
	if err != nil {
		return nil, id, err
	}
	if len(b) < slotHead+n || crc32.Checksum(b[12:slotHead+n], castagnoli) != binary.LittleEndian.Uint32(b[8:]) {
		return nil, id, fmt.Errorf("checksum: %w", store.ErrCorrupt)
	}
	return b[slotHead : slotHead+n], [16]byte(b[16:32]), nil
}
