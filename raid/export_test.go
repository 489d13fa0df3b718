package raid

import "github.com/ledge-storage/ledge/raid/layout"

// LayoutOf is for tests that must know where strips lie.
func LayoutOf(a *Array) *layout.Layout { return a.layout }
