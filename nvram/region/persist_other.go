//go:build !amd64

package region

// detect: no instructions are known here. A file on a DAX file system is then made durable by msync; a DAX
// device, which has no msync, is refused.
func detect() *instructions { return nil }
