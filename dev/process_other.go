//go:build !linux

// Systems without Pdeathsig, user namespaces and /proc: the janitor alone ends what a killed stack leaves.

package main

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
)

func dieWithParent(*syscall.SysProcAttr, syscall.Signal) {}

func inUserNamespace(*syscall.SysProcAttr, int, int) bool { return false }

// processTable maps each living process to its parent; zombies are dead.
func processTable() map[int]int {
	parents := map[int]int{}
	out, _ := exec.Command("ps", "-axo", "pid=,ppid=,stat=").Output()
	for line := range strings.Lines(string(out)) {
		var pid, parent int
		var state string
		if _, err := fmt.Sscan(line, &pid, &parent, &state); err == nil && !strings.HasPrefix(state, "Z") {
			parents[pid] = parent
		}
	}
	return parents
}
