package proctest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func linuxOnly(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
}

func TestCommandLine(t *testing.T) {
	linuxOnly(t)
	program, arguments, err := CommandLine(os.Getpid())
	executable, _ := os.Executable()
	if err != nil || program != executable || !slices.Equal(arguments, os.Args[1:]) {
		t.Errorf("%s %q, %v", program, arguments, err)
	}
	if _, _, err := CommandLine(0); err == nil {
		t.Error("process 0 has a command line")
	}
}

func TestMemory(t *testing.T) {
	linuxOnly(t)
	now, most := Memory(os.Getpid(), "VmRSS"), Memory(os.Getpid(), "VmHWM")
	if now < 1 || now > 1000 || most < 1 || most > 1000 {
		t.Errorf("%v MB now, %v MB at most", now, most)
	}
	if absent := Memory(0, "VmRSS"); absent != 0 {
		t.Errorf("%v MB of no process", absent)
	}
}

// TestNotRoot: the child is not root, and yet may write to the folder.
func TestNotRoot(t *testing.T) {
	linuxOnly(t)
	folder := t.TempDir()
	attributes, err := NotRoot(folder)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `id -u && echo here > "$1/file"`, "-", folder)
	cmd.SysProcAttr = attributes
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) == "0" {
		t.Errorf("%v: %s", err, out)
	}
	if written, err := os.ReadFile(folder + "/file"); string(written) != "here\n" {
		t.Errorf("%q, %v", written, err)
	}
}

// TestFoldersOfFailedRuns: the newest few and the young stay, and one in use does, however old. Other names'
// are not ours.
func TestFoldersOfFailedRuns(t *testing.T) {
	parent := t.TempDir()
	inUse, err := folderIn(parent, "a")
	if err != nil {
		t.Fatal(err)
	}
	failed := []string{"wallet-a-1", "wallet-a-2", "wallet-a-3", "wallet-a-4", "wallet-a-5"} // oldest first
	for i, folder := range append([]string{inUse, parent + "/wallet-b-1"}, failed...) {
		if i > 0 {
			folder = filepath.Join(parent, filepath.Base(folder))
			err = os.MkdirAll(folder+"/data", 0o700)
		}
		at := time.Now().Add(time.Duration(i-100) * time.Hour)
		if err := errors.Join(err, os.Chtimes(folder, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	own, err := folderIn(parent, "a")
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range left {
		names = append(names, entry.Name())
	}
	want := append([]string{filepath.Base(inUse), filepath.Base(own), "wallet-b-1"}, failed[2:]...)
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("left are %s, want %s", names, want)
	}
	for i := range 2 * foldersKept { // all of them young
		if err := os.Mkdir(fmt.Sprintf("%s/wallet-c-%d", parent, i), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := folderIn(parent, "c"); err != nil {
		t.Fatal(err)
	}
	if young, _ := filepath.Glob(parent + "/wallet-c-*"); len(young) != 2*foldersKept+1 {
		t.Errorf("%d young folders are left", len(young))
	}
	if info, err := os.Stat(own); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
}
