// Package proctest tells tests of real servers what the system knows of a process: how it was started, what
// it holds in memory, and as whom a copy of it may run. That it reads in /proc, so only Linux answers;
// elsewhere these functions return an error or 0. And it gives a run of tests the folder of its servers.
package proctest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// CommandLine is the program that a process runs, as an absolute path, and its arguments after its name.
func CommandLine(pid int) (program string, arguments []string, err error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "", nil, err
	}
	program, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return "", nil, err
	}
	return program, strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")[1:], nil
}

// Memory is one of the sizes in a process' /proc status, in MB (2^20 bytes): "VmRSS" is what it holds now,
// "VmHWM" the most that it ever held. It is 0 if there is no such process or size.
func Memory(pid int, size string) float64 {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(status), "\n"+size+":")
	kB, _ := strconv.ParseFloat(strings.Fields(rest + " 0 ")[0], 64)
	return kB / 1024
}
