package iscsi

import (
	"bytes"
	"testing"

	"github.com/ledge-storage/ledge/target/mem"
)

// TestLentReads: memory that a device lends arrives as if it had been copied, cut into PDUs that end
// anywhere in it, with digests, also where the initiator has room for less.
func TestLentReads(t *testing.T) {
	dev, err := mem.New(mem.Options{Bytes: 16 << 20, Name: "lent", Huge: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, keys := range [][]string{
		{"MaxRecvDataSegmentLength=262144"},
		{"MaxRecvDataSegmentLength=20480", "MaxBurstLength=65536", "DataDigest=CRC32C", "HeaderDigest=CRC32C"},
		{"MaxRecvDataSegmentLength=1028", "DataDigest=CRC32C"},
	} {
		l := newLab(t, Options{}, dev)
		c := l.session(append(keys, "InitialR2T=Yes", "ImmediateData=No")...).ready()
		data := make([]byte, 300<<10)
		for i := range data {
			data[i] = byte(i ^ i>>9)
		}
		blocks := uint16(len(data) / 512)
		c.must(c.command(0xA0, uint32(len(data)), write10(101, blocks)...), nil, data)
		for _, room := range []int{len(data), 70_001} {
			r := c.must(c.command(0xC0, uint32(room), read10(101, blocks)...), nil, nil)
			if !bytes.Equal(r.data, data[:room]) {
				t.Errorf("%v: %d bytes of %d, or other ones", keys, len(r.data), room)
			}
		}
		c.nc.Close()
	}
}
