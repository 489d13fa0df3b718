package region

import "unsafe"

// Implemented in persist_amd64.s.

//go:noescape
func writeBackCLWB(p unsafe.Pointer, n uintptr)

//go:noescape
func writeBackCLFLUSHOPT(p unsafe.Pointer, n uintptr)

//go:noescape
func writeBackCLFLUSH(p unsafe.Pointer, n uintptr)

//go:noescape
func streamSSE2(dst, src unsafe.Pointer, n uintptr)

func storeFence()

func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)

// CPUID bits (Intel SDM vol. 2A, CPUID).
const (
	leaf1CLFLUSH    = 1 << 19 // EDX
	leaf7CLFLUSHOPT = 1 << 23 // EBX
	leaf7CLWB       = 1 << 24 // EBX
)

// detect returns the best instructions that this CPU has; nil: none that this package trusts.
func detect() *instructions { return choose(cpuid) }

func choose(cpuid func(leaf, sub uint32) (eax, ebx, ecx, edx uint32)) *instructions {
	most, _, _, _ := cpuid(0, 0)
	if most < 1 {
		return nil
	}
	_, ebx1, _, edx1 := cpuid(1, 0)
	if edx1&leaf1CLFLUSH == 0 || ebx1>>8&0xff*8 != lineBytes {
		return nil
	}
	in := &instructions{stream: streamSSE2, fence: storeFence}
	var ebx7 uint32
	if most >= 7 {
		_, ebx7, _, _ = cpuid(7, 0)
	}
	switch {
	case ebx7&leaf7CLWB != 0:
		in.name, in.writeBack = "clwb", writeBackCLWB
	case ebx7&leaf7CLFLUSHOPT != 0:
		in.name, in.writeBack = "clflushopt", writeBackCLFLUSHOPT
	default:
		in.name, in.writeBack = "clflush", writeBackCLFLUSH
	}
	return in
}
