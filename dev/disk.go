// Disks that a test may fill, under -disks: a library of ours stands between a server and its C library's
// writes, preload/full.c, which says what a full disk does here. It is compiled when it is needed.
//
// That takes no mount, no namespace and no root, so it works wherever a C compiler does, and no other file of
// the machine feels it. Postgres and Apache Kafka have such a disk; Redis writes nothing that matters.

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

//go:embed preload/full.c
var fullSource []byte

// After there is room again a server may still end by what went before: a broker notices a failed write at
// once and halts a moment after, and so does Postgres. The first is for how long that may take at most, and
// the second for how long it mostly does.
const (
	diskGrace   = 10 * time.Second
	diskSettles = 300 * time.Millisecond
)

// disk is one server's. Nil is the machine's own, which nobody fills.
type disk struct {
	library, file, folder string
	filled                bool
	part                  bool // only one folder of it
	freed                 time.Time
}

// newDisk compiles the library beside the folder that a server writes to, where it may read.
func newDisk(ctx context.Context, procs *processes, wanted bool, folder string) (*disk, error) {
	if !wanted {
		return nil, nil
	}
	cc, err := exec.LookPath("cc")
	if err != nil {
		return nil, errors.New("-disks needs a C compiler, cc: install the Debian package gcc")
	}
	source := folder + ".disk.c"
	d := &disk{library: folder + ".disk.so", file: folder + ".disk", folder: folder}
	if err := os.WriteFile(source, fullSource, 0o644); err != nil {
		return nil, err
	}
	compile := exec.Command(cc, "-shared", "-fPIC", "-O1", "-o", d.library, source, "-ldl")
	if err := procs.run(ctx, "cc", compile); err != nil {
		return nil, err
	}
	const page = 4096 // what the library maps
	return d, os.WriteFile(d.file, make([]byte, page), 0o644)
}

// give has a program write to this disk.
func (d *disk) give(cmd *exec.Cmd) {
	if d != nil {
		preload(cmd, d.library)
		cmd.Env = append(cmd.Env, "WALLET_DEV_DISK="+d.file)
	}
}

// preload has a program load a library before its others, and after those that it was told of before.
func preload(cmd *exec.Cmd, library string) {
	env := cmd.Environ()
	const name = "LD_PRELOAD="
	i := slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, name) })
	if i >= 0 {
		env[i] += ":" + library
	} else {
		env = append(env, name+library)
	}
	cmd.Env = env
}

var errNoDisk = errors.New("there is no disk to fill: only Postgres and Apache Kafka have one, under -disks")

// fill lets nothing grow from now on in what the server writes to, or in one folder of that.
func (d *disk) fill(within string) error {
	if d == nil {
		return errNoDisk
	}
	folder, err := filepath.EvalSymlinks(filepath.Join(d.folder, within))
	if err != nil {
		return fmt.Errorf("no folder to fill: %w", err)
	}
	d.filled, d.part = true, within != ""
	return d.write(append([]byte(folder[1:]), 0), folder[0])
}

// free makes room again. It says whether only a part was full: a server that lives on without that part wants
// to be started again before it takes it back.
func (d *disk) free() (part bool, err error) {
	if d == nil {
		return false, errNoDisk
	}
	d.filled, d.freed = false, time.Now()
	return d.part, d.write(nil, 0)
}

// write sets the rest and then the first byte, by which the library knows that there is a path.
func (d *disk) write(rest []byte, first byte) error {
	f, err := os.OpenFile(d.file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(rest, 1)
	_, err2 := f.WriteAt([]byte{first}, 0)
	return errors.Join(err, err2, f.Close())
}

// excuses says that a server with this disk may have ended because it is or was full.
func (d *disk) excuses(ended time.Time) bool {
	return d != nil && (d.filled || ended.Before(d.freed.Add(diskGrace)))
}
