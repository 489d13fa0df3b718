// Package emulator says what QEMU emulates where there is no KVM, for the guests of qa/lab and qa/guest.
package emulator

// CPU is QEMU's -cpu: all that its emulation has, but for CMPXCHG16B.
//
// QEMU 7.2 was seen (2026-11-26, once in some hundred boots) to give a guest kernel wrong flags behind that instruction, VM among
// them: the next interrupt is a double fault, in __kmalloc_node or wherever the slab allocator uses it. Linux does
// without it where the processor has none.
//
// Of two emulated processors one was seen to run an int3 that the other had already patched away again ("Oops: int3",
// once in some hundred boots, while the kernel brings the second up): qa/guest emulates one. The controllers of qa/lab have two, as a board has, and
// boot again after a panic.
const CPU = "max,cx16=off"
