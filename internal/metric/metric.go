// Package metric writes Prometheus' text format
// (https://prometheus.io/docs/instrumenting/exposition_formats/), or the same samples as values for JSON.
//
// It touches only the writer it is given, and keeps nothing but a histogram's counts: every other value
// belongs to whoever counts it. It promises that a metric's help and type stand once, before all of its
// samples, and that no sample is in one form only.
package metric

import (
	"fmt"
	"io"
	"math"
	"runtime/metrics"
	"slices"
	"strconv"
	"sync/atomic"
)

// Sample is one value of a metric. Labels is `name="value",...` or empty.
type Sample struct {
	Labels string
	Value  float64
}

// Writer writes metrics one after another. A failed write is not reported: write into memory.
type Writer struct {
	to     io.Writer
	values Values // where it is set, nothing is written
}

// NewWriter makes a Writer that writes to w.
func NewWriter(w io.Writer) *Writer { return &Writer{to: w} }

// Values are metrics by their names, for JSON. One that has no labels is a float64, or Counts; one that has
// is a map of those by Sample.Labels.
type Values map[string]any

// Counts is a histogram: how many observations were up to each bound and above the bound before, then those
// above all bounds.
type Counts struct {
	Bounds []float64 `json:"bounds"`
	Counts []int64   `json:"counts"`
	Sum    float64   `json:"sum"`
}

// Collect makes a Writer that adds to v.
func (v Values) Collect() *Writer { return &Writer{values: v} }

// Counter writes a counter of one value. Its name ends in _total.
func (w *Writer) Counter(name, help string, value float64) { w.Counters(name, help, Sample{"", value}) }

// Counters writes a counter of several values, which differ in their labels.
func (w *Writer) Counters(name, help string, samples ...Sample) {
	w.write(name, "counter", help, samples)
}

// Gauge writes a gauge of one value.
func (w *Writer) Gauge(name, help string, value float64) { w.Gauges(name, help, Sample{"", value}) }

// Gauges writes a gauge of several values, which differ in their labels.
func (w *Writer) Gauges(name, help string, samples ...Sample) {
	w.write(name, "gauge", help, samples)
}

func (w *Writer) write(name, typ, help string, samples []Sample) {
	if w.values != nil {
		collect(w.values, name, func(yield func(string, float64) bool) {
			for _, s := range samples {
				yield(s.Labels, s.Value)
			}
		})
		return
	}
	fmt.Fprintf(w.to, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, typ)
	for _, s := range samples {
		labels := ""
		if s.Labels != "" {
			labels = "{" + s.Labels + "}"
		}
		fmt.Fprintf(w.to, "%s%s %s\n", name, labels, strconv.FormatFloat(s.Value, 'g', -1, 64))
	}
}

// collect adds one metric. A name without any sample stands for an empty map.
func collect[T any](to Values, name string, each func(yield func(labels string, value T) bool)) {
	labelled := make(map[string]T)
	to[name] = labelled
	for labels, value := range each {
		if labels == "" {
			to[name] = value
		}
		labelled[labels] = value
	}
}

// Histogram counts observations in buckets. Safe for concurrent use.
type Histogram struct {
	bounds []float64
	counts []atomic.Int64 // one more than bounds: the last is +Inf
	sum    atomic.Uint64  // a float's bits
}

// NewHistogram makes a histogram whose buckets have these upper bounds, in ascending order.
func NewHistogram(bounds ...float64) *Histogram {
	return &Histogram{bounds: bounds, counts: make([]atomic.Int64, len(bounds)+1)}
}

// Observe counts one observation.
func (h *Histogram) Observe(v float64) {
	i, _ := slices.BinarySearch(h.bounds, v)
	h.counts[i].Add(1)
	for {
		old := h.sum.Load()
		if h.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+v)) {
			return
		}
	}
}

// Histogram writes one histogram without labels.
func (w *Writer) Histogram(name, help string, h *Histogram) {
	w.Histograms(name, help, func(yield func(string, *Histogram) bool) { yield("", h) })
}

// Histograms writes histograms that share a name, each with its labels as in Sample.
func (w *Writer) Histograms(name, help string, each func(yield func(labels string, h *Histogram) bool)) {
	if w.values != nil {
		collect(w.values, name, func(yield func(string, Counts) bool) {
			each(func(labels string, h *Histogram) bool { return yield(labels, h.read()) })
		})
		return
	}
	fmt.Fprintf(w.to, "# HELP %s %s\n# TYPE %s histogram\n", name, help, name)
	for labels, h := range each {
		comma := ""
		if labels != "" {
			comma = ","
		}
		var total int64
		for i := range h.counts {
			total += h.counts[i].Load()
			bound := "+Inf"
			if i < len(h.bounds) {
				bound = strconv.FormatFloat(h.bounds[i], 'g', -1, 64)
			}
			fmt.Fprintf(w.to, "%s_bucket{%s%sle=%q} %d\n", name, labels, comma, bound, total)
		}
		if labels != "" {
			labels = "{" + labels + "}"
		}
		sum := math.Float64frombits(h.sum.Load())
		fmt.Fprintf(w.to, "%s_sum%s %g\n%s_count%s %d\n", name, labels, sum, name, labels, total)
	}
}

func (h *Histogram) read() Counts {
	c := Counts{h.bounds, make([]int64, len(h.counts)), math.Float64frombits(h.sum.Load())}
	for i := range h.counts {
		c.Counts[i] = h.counts[i].Load()
	}
	return c
}

// Runtime writes what Go's runtime says of itself, under names that begin with prefix.
func (w *Writer) Runtime(prefix string) {
	samples := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/total:bytes"},
		{Name: "/gc/cycles/total:gc-cycles"},
	}
	metrics.Read(samples)
	value := func(i int) float64 { return float64(samples[i].Value.Uint64()) }
	w.Gauge(prefix+"_goroutines", "Goroutines.", value(0))
	w.Gauge(prefix+"_heap_bytes", "Memory of live and not yet collected objects.", value(1))
	w.Gauge(prefix+"_memory_bytes", "Memory that Go's runtime has mapped.", value(2))
	w.Counter(prefix+"_gc_cycles_total", "Garbage collections.", value(3))
}
