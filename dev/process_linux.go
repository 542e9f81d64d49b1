// What only Linux can: the kernel ends our children when we are killed, and a user namespace lets root run
// Postgres without being root.

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// dieWithParent has the kernel send sig to the child when the thread that started it ends.
func dieWithParent(attr *syscall.SysProcAttr, sig syscall.Signal) { attr.Pdeathsig = sig }

// inUserNamespace runs the child under uid and gid of a namespace of its own, where they stand for our real
// ones: it may touch exactly our files and yet is not root. False where the system has no such thing.
func inUserNamespace(attr *syscall.SysProcAttr, uid, gid int) bool {
	attr.Cloneflags |= syscall.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Getuid(), Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: os.Getgid(), Size: 1}}
	return true
}

// processTable maps each living process to its parent; zombies are dead.
func processTable() map[int]int {
	parents := map[int]int{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		stat, err := os.ReadFile(file) // pid (name) state ppid ...
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat)[strings.LastIndexByte(string(stat), ')')+1:])
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if parent, err := strconv.Atoi(fields[1]); err == nil && fields[0] != "Z" && fields[0] != "X" {
			parents[pid] = parent
		}
	}
	return parents
}
