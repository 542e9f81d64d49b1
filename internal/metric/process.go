// What every program tells of itself, by the names that Prometheus' own client libraries use, so that
// dashboards made for any Go program show something.

package metric

import (
	"os"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"
)

// started is when this process did, but for the milliseconds before its packages were set up.
var started = float64(time.Now().UnixMilli()) / 1000

// Process writes what the system knows of this process, and the two values of Go's runtime that everybody
// looks at. What only Linux tells is left out elsewhere.
func (w *Writer) Process() {
	if seconds, ok := processorSeconds(); ok {
		w.Counter("process_cpu_seconds_total", "Processor time, user and system.", seconds)
	}
	w.Gauge("process_start_time_seconds", "When the process started, since 1970.", started)
	// Size and resident size in pages (proc_pid_statm(5)).
	if statm, err := os.ReadFile("/proc/self/statm"); err == nil {
		if fields := strings.Fields(string(statm)); len(fields) > 1 {
			if pages, err := strconv.ParseFloat(fields[1], 64); err == nil {
				w.Gauge("process_resident_memory_bytes", "Memory in use.", pages*float64(os.Getpagesize()))
			}
		}
	}
	if folder, err := os.Open("/proc/self/fd"); err == nil {
		names, err := folder.Readdirnames(-1)
		folder.Close()
		if err == nil {
			w.Gauge("process_open_fds", "Open files and connections.", float64(len(names)-1)) // but this one
		}
	}
	samples := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
	}
	metrics.Read(samples)
	w.Gauge("go_goroutines", "Goroutines.", float64(samples[0].Value.Uint64()))
	w.Gauge("go_memstats_heap_inuse_bytes", "Heap memory in spans that hold something.",
		float64(samples[1].Value.Uint64()+samples[2].Value.Uint64()))
}
