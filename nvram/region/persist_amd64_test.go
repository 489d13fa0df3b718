package region

import "testing"

// everyInstructions is each variant that this CPU can run, the best first.
func everyInstructions() []*instructions {
	var all []*instructions
	for _, mask := range []uint32{0, leaf7CLWB, leaf7CLWB | leaf7CLFLUSHOPT} {
		in := choose(func(leaf, sub uint32) (eax, ebx, ecx, edx uint32) {
			eax, ebx, ecx, edx = cpuid(leaf, sub)
			if leaf == 7 {
				ebx &^= mask
			}
			return
		})
		if in != nil && (len(all) == 0 || all[len(all)-1].name != in.name) {
			all = append(all, in)
		}
	}
	return all
}

// What CPUID says decides, and a CPU whose lines are of another size is refused.
func TestChoose(t *testing.T) {
	for _, c := range []struct {
		what             string
		most, ebx1, edx1 uint32
		ebx7             uint32
		want             string
	}{
		{"all", 22, 8 << 8, leaf1CLFLUSH, leaf7CLWB | leaf7CLFLUSHOPT, "clwb"},
		{"no clwb", 22, 8 << 8, leaf1CLFLUSH, leaf7CLFLUSHOPT, "clflushopt"},
		{"old", 22, 8 << 8, leaf1CLFLUSH, 0, "clflush"},
		{"leaf 7 is not there", 5, 8 << 8, leaf1CLFLUSH, leaf7CLWB, "clflush"},
		{"no clflush", 22, 8 << 8, 0, leaf7CLWB, ""},
		{"lines of 128", 22, 16 << 8, leaf1CLFLUSH, leaf7CLWB, ""},
		{"other bits around", 22, 0xff<<24 | 8<<8 | 0xff, ^uint32(0), leaf7CLWB, "clwb"},
		{"no leaves", 0, 8 << 8, leaf1CLFLUSH, leaf7CLWB, ""},
	} {
		in := choose(func(leaf, _ uint32) (eax, ebx, ecx, edx uint32) {
			switch {
			case leaf == 0:
				return c.most, 0, 0, 0
			case leaf == 1 && c.most >= 1:
				return 0, c.ebx1, 0, c.edx1
			case leaf == 7 && c.most >= 7:
				return 0, c.ebx7, 0, 0
			}
			t.Fatalf("%s: leaf %d asked for", c.what, leaf)
			return
		})
		got := ""
		if in != nil {
			got = in.name
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
	if detect() == nil {
		t.Error("this CPU has nothing")
	}
}
