//go:build unix

package metric

import "syscall"

// processorSeconds is what this process has used of all processors.
func processorSeconds() (seconds float64, ok bool) {
	var used syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &used) != nil {
		return 0, false
	}
	total := used.Utime.Nano() + used.Stime.Nano()
	return float64(total) / 1e9, true
}
