package metric

import (
	"bufio"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestProcess(t *testing.T) {
	read := func() map[string]float64 {
		var out strings.Builder
		NewWriter(&out).Process()
		values := make(map[string]float64)
		for lines := bufio.NewScanner(strings.NewReader(out.String())); lines.Scan(); {
			if name, value, ok := strings.Cut(lines.Text(), " "); ok && name != "#" {
				values[name], _ = strconv.ParseFloat(value, 64)
			}
		}
		return values
	}
	before := read()
	if age := float64(time.Now().Unix()) - before["process_start_time_seconds"]; age < -1 || age > 600 {
		t.Errorf("started %v s ago", age)
	}
	const mb = 1 << 20
	held := make([]byte, 32*mb)
	for i := range held { // touched, so that they are resident
		held[i] = byte(i)
	}
	var open []*os.File
	for range 10 {
		f, err := os.Open(os.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, f)
	}
	end := make(chan struct{})
	for range 10 {
		go func() { <-end }()
	}
	for deadline := time.Now().Add(30 * time.Millisecond); time.Now().Before(deadline); {
	}
	after := read()
	close(end)
	for _, f := range open {
		f.Close()
	}
	runtime.KeepAlive(held)
	grown := func(name string, least, most float64) {
		t.Helper()
		if by := after[name] - before[name]; by < least || by > most {
			t.Errorf("%s rose by %v, from %v", name, by, before[name])
		}
	}
	grown("go_goroutines", 10, 20) // with the runtime's own
	grown("go_memstats_heap_inuse_bytes", 30*mb, 40*mb)
	if runtime.GOOS == "linux" {
		grown("process_open_fds", 10, 10)
		grown("process_resident_memory_bytes", 20*mb, 400*mb)          // the race detector triples it
		if is := after["process_resident_memory_bytes"]; is > 700*mb { // its addresses are more by far
			t.Errorf("resident: %v", is)
		}
		grown("process_cpu_seconds_total", .01, 10)
	}
}
