package api

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// units are powers of 1024 only: a "GB" that means one thing to a drive's vendor and another to an
// operator is refused rather than guessed.
var units = []struct {
	suffix string
	shift  uint
}{{"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}, {"PiB", 50}}

// ParseSize reads bytes: a whole number, or a decimal number and one of KiB, MiB, GiB, TiB, PiB without a
// blank between, that makes a whole number of bytes.
func ParseSize(s string) (int64, error) {
	digits, shift := s, uint(0)
	for _, u := range units {
		if d, ok := strings.CutSuffix(s, u.suffix); ok {
			digits, shift = d, u.shift
		}
	}
	whole, fraction, point := strings.Cut(digits, ".")
	bad := fmt.Errorf("%q is no size; want bytes (17179869184) or a number with KiB, MiB, GiB, TiB or PiB (16GiB, 1.5TiB)", s)
	if !decimal(whole) || point && (!decimal(fraction) || shift == 0 || len(fraction) > 15) {
		return 0, bad
	}
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size %q is beyond 8 EiB", s)
	}
	n <<= shift
	if !point {
		return n, nil
	}
	// part = fraction × 2^shift / 10^len, which must be whole.
	f, _ := strconv.ParseUint(fraction, 10, 64)
	scale := uint64(math.Pow10(len(fraction)))
	for shift > 0 && scale%2 == 0 {
		scale, shift = scale/2, shift-1
	}
	if f%scale != 0 && scale != 1 {
		// What is left of the scale is a power of five: it has to divide the fraction.
		return 0, fmt.Errorf("size %q is no whole number of bytes", s)
	}
	part := f / scale
	if shift > 0 && part > uint64(math.MaxInt64)>>shift {
		return 0, bad
	}
	part <<= shift
	if int64(part) > math.MaxInt64-n {
		return 0, fmt.Errorf("size %q is beyond 8 EiB", s)
	}
	return n + int64(part), nil
}

func decimal(s string) bool {
	for _, r := range s {
		if r < '0' || r > '9' {
			return false
		}
	}
	return s != ""
}

// FormatSize says bytes for people, exactly where a unit fits and with one decimal otherwise.
func FormatSize(n int64) string {
	if n < 0 {
		return "-" + FormatSize(-n)
	}
	for i := len(units) - 1; i >= 0; i-- {
		u := units[i]
		if n < 1<<u.shift {
			continue
		}
		if n%(1<<u.shift) == 0 {
			return fmt.Sprintf("%d %s", n>>u.shift, u.suffix)
		}
		return fmt.Sprintf("%.1f %s", float64(n)/float64(int64(1)<<u.shift), u.suffix)
	}
	return fmt.Sprintf("%d B", n)
}
