package proctest

import (
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
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
