//go:build !amd64

package region

func everyInstructions() []*instructions { return nil }
