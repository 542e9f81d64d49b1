// Clocks that a test may step, under -clocks: libfaketime stands between a server and its C library's clock,
// and reads from a file how far the server's time is from the machine's. The monotonic clock, by which
// servers wait, stays.
//
// Postgres and Apache Kafka have such a clock. Redis has none: its allocator asks for the time before
// libfaketime is set up, which then asks for memory, and the two wait for each other for ever. Go programs
// read the clock without C.

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// faketimeLibraries is where distributions put the library for programs with threads.
var faketimeLibraries = []string{
	"/usr/lib/*/faketime/libfaketimeMT.so.1", // Debian
	"/usr/lib/faketime/libfaketimeMT.so.1",
	"/usr/lib64/faketime/libfaketimeMT.so.1",
}

func findFaketime() (library string, err error) {
	for _, pattern := range faketimeLibraries {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0], nil
		}
	}
	return "", errors.New("-clocks needs libfaketime: install the Debian package libfaketime")
}

// clock is one server's. Nil is the machine's own, which nobody steps.
type clock struct{ library, file string }

// newClock makes a clock that tells the machine's time so far. Who the server runs as must reach its file.
func newClock(library, file string) (*clock, error) {
	if library == "" {
		return nil, nil
	}
	c := &clock{library, file}
	return c, c.step(0)
}

// give has a program live by this clock.
func (c *clock) give(cmd *exec.Cmd) {
	if c == nil {
		return
	}
	preload(cmd, c.library)
	cmd.Env = append(cmd.Env, "FAKETIME_TIMESTAMP_FILE="+c.file,
		"FAKETIME_NO_CACHE=1",                                     // it would hide a step for 10 s
		"FAKETIME_DONT_FAKE_MONOTONIC=1", "DONT_FAKE_MONOTONIC=1", // its name before 0.9.9, too
		"NO_FAKE_STAT=1", // the times of files are compared with each other only
		// Else 0.9.10 makes each timed wait of a JVM end at once: its threads then spin.
		"FAKETIME_FORCE_MONOTONIC_FIX=0")
}

// step sets the clock that far from the machine's. A reader sees the old offset or the new one, never half.
func (c *clock) step(offset time.Duration) error {
	if c == nil {
		return errors.New("there is no clock to step: only Postgres and Apache Kafka have one, under -clocks")
	}
	next := c.file + ".next"
	text := fmt.Sprintf("%+f\n", offset.Seconds())
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(next, c.file)
}

// parseOffset reads a clock line's offset: 0, or a Go duration, or days as in -3d.
func parseOffset(text string) (time.Duration, error) {
	if n := len(text) - 1; n > 0 && text[n] == 'd' {
		days, err := strconv.ParseFloat(text[:n], 64)
		if err != nil || days < -10_000 || days > 10_000 {
			return 0, fmt.Errorf("%s is no number of days", text)
		}
		return time.Duration(days * float64(24*time.Hour)), nil
	}
	return time.ParseDuration(text)
}
