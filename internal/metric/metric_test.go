package metric

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"
)

// TestTextAndValues: the same samples in both forms.
func TestTextAndValues(t *testing.T) {
	h := NewHistogram(.5, 2)
	var observers sync.WaitGroup
	for range 4 {
		observers.Go(func() {
			h.Observe(.25)
			h.Observe(.5) // a bound belongs to its bucket
			h.Observe(3)
		})
	}
	observers.Wait()
	write := func(w *Writer) {
		w.Counter("a_total", "A.", 12345678)
		w.Gauges("b", "B.", Sample{`x="1"`, .5}, Sample{`x="2"`, 1})
		w.Gauge("c", "C.", 1e21)
		w.Counters("d_total", "D.")
		w.Histogram("e", "E.", h)
		w.Histograms("f", "F.", func(yield func(string, *Histogram) bool) { yield(`r="/"`, h) })
	}
	var out strings.Builder
	write(NewWriter(&out))
	const want = `# HELP a_total A.
# TYPE a_total counter
a_total 1.2345678e+07
# HELP b B.
# TYPE b gauge
b{x="1"} 0.5
b{x="2"} 1
# HELP c C.
# TYPE c gauge
c 1e+21
# HELP d_total D.
# TYPE d_total counter
# HELP e E.
# TYPE e histogram
e_bucket{le="0.5"} 8
e_bucket{le="2"} 8
e_bucket{le="+Inf"} 12
e_sum 15
e_count 12
# HELP f F.
# TYPE f histogram
f_bucket{r="/",le="0.5"} 8
f_bucket{r="/",le="2"} 8
f_bucket{r="/",le="+Inf"} 12
f_sum{r="/"} 15
f_count{r="/"} 12
`
	if out.String() != want {
		t.Errorf("got:\n%s", out.String())
	}

	values := make(Values)
	write(values.Collect())
	got, err := json.Marshal(values)
	const counts = `{"bounds":[0.5,2],"counts":[8,0,4],"sum":15}`
	const object = `{"a_total":12345678,"b":{"x=\"1\"":0.5,"x=\"2\"":1},"c":1e+21,"d_total":{},` +
		`"e":` + counts + `,"f":{"r=\"/\"":` + counts + `}}`
	if err != nil || string(got) != object {
		t.Errorf("%v: got:\n%s\nwant:\n%s", err, got, object)
	}
}
