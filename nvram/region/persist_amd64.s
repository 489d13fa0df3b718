#include "textflag.h"

// Each writeBack touches a line per round; p is at a line's start, n may be anything.

// func writeBackCLWB(p unsafe.Pointer, n uintptr)
TEXT ·writeBackCLWB(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), DI
	MOVQ n+8(FP), CX
	ADDQ DI, CX
	JMP  test

line:
	CLWB (DI)
	ADDQ $64, DI

test:
	CMPQ DI, CX
	JCS  line
	RET

// func writeBackCLFLUSHOPT(p unsafe.Pointer, n uintptr)
TEXT ·writeBackCLFLUSHOPT(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), DI
	MOVQ n+8(FP), CX
	ADDQ DI, CX
	JMP  test

line:
	CLFLUSHOPT (DI)
	ADDQ       $64, DI

test:
	CMPQ DI, CX
	JCS  line
	RET

// func writeBackCLFLUSH(p unsafe.Pointer, n uintptr)
TEXT ·writeBackCLFLUSH(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), DI
	MOVQ n+8(FP), CX
	ADDQ DI, CX
	JMP  test

line:
	CLFLUSH (DI)
	ADDQ    $64, DI

test:
	CMPQ DI, CX
	JCS  line
	RET

// func streamSSE2(dst, src unsafe.Pointer, n uintptr)
// A line a round: dst at a line's start, n a multiple of 64; src anywhere.
TEXT ·streamSSE2(SB), NOSPLIT, $0-24
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	ADDQ DI, CX
	JMP  test

line:
	MOVOU   (SI), X0
	MOVOU   16(SI), X1
	MOVOU   32(SI), X2
	MOVOU   48(SI), X3
	MOVNTO  X0, (DI)
	MOVNTO  X1, 16(DI)
	MOVNTO  X2, 32(DI)
	MOVNTO  X3, 48(DI)
	ADDQ    $64, SI
	ADDQ    $64, DI

test:
	CMPQ DI, CX
	JCS  line
	RET

// func storeFence()
TEXT ·storeFence(SB), NOSPLIT, $0-0
	SFENCE
	RET

// func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL sub+4(FP), CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	MOVL DX, edx+20(FP)
	RET
