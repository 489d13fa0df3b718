package gotgt

import (
	"testing"

	"github.com/ledge-storage/ledge/target/devicetest"
	"github.com/ledge-storage/ledge/target/mem"
)

// TestBothWays drives a Device on a Store on a Device: both adapters at once.
func TestBothWays(t *testing.T) {
	for _, o := range []Options{{}, {Thin: true}, {BlockBytes: 4096, Thin: true, Volatile: true}} {
		m, err := mem.New(mem.Options{Bytes: 4 << 20, BlockBytes: o.BlockBytes, Name: "gotgt"})
		if err != nil {
			t.Fatal(err)
		}
		d, err := Open(NewStore(m), o)
		if err != nil {
			t.Fatal(err)
		}
		devicetest.Run(t, d, 1)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
