package look

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"sync"
	"testing"
	"time"

	"wallet/internal/api"
	"wallet/internal/gate"
	"wallet/internal/metric"
)

// TestRecentKeepsTheLast: in order, and nothing of the memory that it was given.
func TestRecentKeepsTheLast(t *testing.T) {
	var r Recent
	if got := r.last(nil); got == nil || len(got) != 0 {
		t.Errorf("at first: %v", got)
	}
	buffer := make([]byte, 0, 100)
	for n := range 3*RecentMax + 7 {
		buffer = fmt.Appendf(buffer[:0], `{"kind":"k%d","amount":"7"}`, n)
		r.Add(fmt.Sprint(n), buffer)
	}
	copy(buffer, "overwritten")
	got := r.last([]string{"kind", "absent"})
	if len(got) != RecentMax {
		t.Fatalf("%d events", len(got))
	}
	for i, e := range got {
		n := 3*RecentMax + 6 - i
		if e["id"] != fmt.Sprint(n) || e["kind"] != fmt.Sprint("k", n) || len(e) != 3 {
			t.Errorf("event %d is %v", i, e)
		}
	}
	r.Add("odd", []byte("no JSON"))
	if odd := r.last([]string{"kind"})[0]; odd["id"] != "odd" || len(odd) != 2 {
		t.Errorf("what cannot be read is %v", odd)
	}
}

// TestRecentTakesNoMemory: once it has seen its largest event.
func TestRecentTakesNoMemory(t *testing.T) {
	var r Recent
	payload := make([]byte, 400)
	for range RecentMax {
		r.Add("1-1", payload)
	}
	if n := testing.AllocsPerRun(100, func() { r.Add("1-1", payload) }); n != 0 {
		t.Errorf("%v allocations an event", n)
	}
}

// TestManyLookersOneReading: the metrics are read for the first of those who ask at the same time, and not
// while nobody asks.
func TestManyLookersOneReading(t *testing.T) {
	keys, err := gate.NewKeyring("", "")
	if err != nil {
		t.Fatal(err)
	}
	server := api.New(api.Config{Problems: map[string]api.Problem{}, Keys: keys, Timeout: time.Second,
		RequestsMax: 100})
	readings := 0
	p := New(Source{Server: server, Metrics: func(w *metric.Writer) {
		readings++
		w.Gauge("g", "G.", float64(readings))
	}})
	mux := server.Mux([]api.Route{
		{Method: "GET", Path: "/status.json", Scope: gate.Operate, Handle: p.Status}})
	type answer struct {
		Metrics map[string]float64
		Events  []any
		Phase   string
	}
	look := func() (a answer) {
		recorder := httptest.NewRecorder()
		mux.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/status.json", nil))
		if err := json.Unmarshal(recorder.Body.Bytes(), &a); err != nil {
			t.Errorf("%v: %s", err, recorder.Body)
		}
		return a
	}
	if readings != 0 {
		t.Error("read while nobody looks")
	}
	var lookers sync.WaitGroup
	for range 20 {
		lookers.Go(func() {
			want := answer{map[string]float64{"g": 1}, []any{}, "starting"}
			if a := look(); !reflect.DeepEqual(a, want) {
				t.Errorf("%+v", a)
			}
		})
	}
	lookers.Wait()
	time.Sleep(600 * time.Millisecond)
	if a := look(); a.Metrics["g"] != 2 || readings != 2 {
		t.Errorf("later: %+v, %d readings", a, readings)
	}
}

func BenchmarkRecent(b *testing.B) {
	var r Recent
	payload := make([]byte, 400)
	for b.Loop() {
		r.Add("1-1", payload)
	}
}
