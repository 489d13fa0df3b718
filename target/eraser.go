package target

import "context"

// Eraser is implemented by a Device whose blocks are encrypted and whose key can be forgotten.
type Eraser interface {
	Device
	// EraseKey replaces the key, atomically and durably: when it returns nil, no read on any path
	// and after any restart returns what was there, and nothing that is stored can be deciphered any
	// more. After an error, or a power cut in between, the old data are either all there or all gone.
	EraseKey(ctx context.Context) error
}
