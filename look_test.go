// The operators' page and the snapshot it asks for, through the operators' handler. dev/look opens the page
// in a browser.

package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// ask asks the operators' address.
func (w *running) ask(method, path string, headers ...string) answer {
	r := httptest.NewRequest(method, path, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	recorder := httptest.NewRecorder()
	w.api.operator.ServeHTTP(recorder, r)
	return answer{recorder.Code, recorder.Result().Header, recorder.Body.String()}
}

// status is a snapshot, as far as a test reads it.
type status struct {
	At      time.Time
	Uptime  float64 `json:"uptime_seconds"`
	Phase   string
	Refusal string
	Metrics map[string]json.RawMessage
	Events  []map[string]any
}

func (w *running) status(t *testing.T, path string, headers ...string) (s status) {
	t.Helper()
	a := w.ask("GET", path, headers...)
	if err := json.Unmarshal([]byte(a.body), &s); err != nil || a.status != 200 {
		t.Fatalf("%s: %v: %s", path, err, a)
	}
	return s
}

// TestPageIsClosed: the page can load nothing, and run nothing but its own script; nobody keeps a copy.
func TestPageIsClosed(t *testing.T) {
	w := start(t, testEnv(t))
	page := w.ask("GET", "/")
	if page.status != 200 || page.header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("the page: %d %v", page.status, page.header)
	}
	policy := strings.Split(page.header.Get("Content-Security-Policy"), "; ")
	for tag, directive := range map[string]string{"script": "script-src", "style": "style-src"} {
		found := regexp.MustCompile(`(?s)<`+tag+`>(.*?)</`+tag+`>`).FindAllStringSubmatch(page.body, -1)
		if len(found) != 1 {
			t.Fatalf("%d times <%s>", len(found), tag)
		}
		sum := sha256.Sum256([]byte(found[0][1]))
		want := directive + " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
		if !slices.Contains(policy, want) {
			t.Errorf("no %s in %q", want, policy)
		}
	}
	for _, directive := range []string{"default-src 'none'", "img-src data:", "connect-src 'self'",
		"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} {
		if !slices.Contains(policy, directive) {
			t.Errorf("no %s in %q", directive, policy)
		}
	}
	elsewhere := regexp.MustCompile(`(?i)https?:|//[a-z]+\.|\bon[a-z]+=|\bstyle=|\bsrc=|@import|innerHTML|` +
		`Storage|eval\(`)
	icon := "xmlns='http://www.w3.org/2000/svg'" // a name, no address
	for _, found := range elsewhere.FindAllString(strings.Replace(page.body, icon, "", 1), -1) {
		t.Errorf("the page has %q", found)
	}
	answers := []answer{page, w.ask("GET", "/status.json"), w.ask("HEAD", "/"), w.ask("HEAD", "/status.json")}
	for _, a := range answers {
		for name, want := range map[string]string{"Cache-Control": "no-store",
			"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
			"Access-Control-Allow-Origin": ""} {
			if got := a.header.Get(name); got != want || a.status != 200 {
				t.Errorf("%d %s: %q", a.status, name, got)
			}
		}
	}
	head := w.ask("HEAD", "/")
	if head.body != "" || head.header.Get("Content-Length") != page.header.Get("Content-Length") {
		t.Errorf("HEAD: %d bytes, %v", len(head.body), head.header)
	}
	for _, c := range []struct {
		method, path string
		status       int
	}{{"POST", "/", 405}, {"POST", "/status.json", 405}, {"GET", "/page.js", 404},
		{"GET", "/status.json?x=1", 400}, {"GET", "/status.json?private=2", 400}} {
		if a := w.ask(c.method, c.path); a.status != c.status {
			t.Errorf("%s %s: %s", c.method, c.path, a)
		}
	}
	if a := w.get("/status.json"); a.status != 404 {
		t.Errorf("clients get %s", a)
	}
}

// TestSnapshotIsTheMetrics: no number has two homes. Events come without amounts unless they are asked for.
func TestSnapshotIsTheMetrics(t *testing.T) {
	w := start(t, testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"417.31","idempotency_key":"k"}`)
	w.mustPost(t, 200, "/v1/wallets/1/transfer",
		`{"to_id":9223372036854775807,"amount":"1","idempotency_key":"t"}`)
	w.mustPost(t, 422, "/v1/wallets/1/withdraw", `{"amount":"1000","idempotency_key":"w"}`)
	eventually(t, 20*time.Second, "published and confirmed", func() bool {
		s := w.status(t, "/status.json")
		positions := string(s.Metrics["wallet_relay_position_bytes"])
		return len(s.Events) == 3 && strings.Contains(positions, "published")
	})
	text := w.ask("GET", "/metrics").body
	s := w.status(t, "/status.json")
	for _, found := range regexp.MustCompile(`(?m)^# TYPE (\w+) `).FindAllStringSubmatch(text, -1) {
		if _, has := s.Metrics[found[1]]; !has {
			t.Errorf("%s is in /metrics alone", found[1])
		}
		delete(s.Metrics, found[1])
	}
	for name := range s.Metrics {
		t.Errorf("%s is not in /metrics", name)
	}
	s = w.status(t, "/status.json")
	for name, want := range map[string]string{
		"wallet_http_refusals_total":  `"code=\"insufficient_funds\"":1`,
		"wallet_queue_operations_max": "4000",
		"wallet_relay_slot_active":    "1",
	} {
		if got := string(s.Metrics[name]); !strings.Contains(got, want) {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if s.Phase != "ready" || s.Refusal != "" || s.Uptime <= 0 || time.Since(s.At) > time.Minute {
		t.Errorf("%+v", s)
	}
	if newest := s.Events[0]; newest["id"] != "9223372036854775807-1" || newest["kind"] != "transfer_in" {
		t.Errorf("the last event is %v", newest)
	}
	last := s.Events[2]
	if _, err := time.Parse(time.RFC3339, last["published_at"].(string)); err != nil || len(last) != 3 {
		t.Errorf("the first event is %v", last)
	}
	if a := w.ask("GET", "/status.json"); strings.Contains(a.body, "417.31") {
		t.Errorf("an amount in %s", a)
	}
	s = w.status(t, "/status.json?private=1")
	if last := s.Events[2]; last["amount"] != "417.31" || last["currency"] != "USD" {
		t.Errorf("asked for amounts: %v", last)
	}
	w.api.Draining.Store(true)
	eventually(t, 5*time.Second, "phase",
		func() bool { return w.status(t, "/status.json").Phase == "stopping" })
}

// TestRefusedIsNotSilent: where a setting is wrong, nobody is told to mend Kafka.
func TestRefusedIsNotSilent(t *testing.T) {
	w := start(t, testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "KAFKA_TLS=true",
		"KAFKA_TLS_CA="+filepath.Join(t.TempDir(), "none")))
	eventually(t, 20*time.Second, "a refusal",
		func() bool { return strings.Contains(w.status(t, "/status.json").Refusal, "KAFKA_TLS_CA") })
	s := w.status(t, "/status.json")
	if silent := string(s.Metrics["wallet_relay_kafka_silent_seconds"]); silent != "0" {
		t.Errorf("Kafka was not asked, and is said to owe an answer for %s s", silent)
	}
}

// TestPositionsInTheirOrder: the three of the relay belong to one moment, and the end of the WAL is not
// before them; while nothing leads here, Postgres' word stands alone.
func TestPositionsInTheirOrder(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers)
	leader := start(t, env)
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		for n := range 300 {
			leader.post("/v1/wallets/1/deposit", fmt.Sprintf(`{"amount":"1","idempotency_key":"%d"}`, n))
		}
	}()
	seen := make(map[float64]bool)
	positions := func(w *running) (at map[string]float64) {
		json.Unmarshal(w.status(t, "/status.json").Metrics["wallet_relay_position_bytes"], &at)
		return at
	}
	eventually(t, 30*time.Second, "three positions", func() bool {
		at := positions(leader)
		received, published := at[`of="received"`], at[`of="published"`]
		confirmed, end := at[`of="confirmed"`], at[`of="end"`]
		inOrder := 0 < confirmed && confirmed <= published && published <= received && received <= end
		if published > 0 && !inOrder {
			t.Fatalf("%v", at)
		}
		seen[confirmed] = true
		return len(seen) > 3
	})
	<-stop
	standby := start(t, env)
	eventually(t, 20*time.Second, "standby", func() bool { return standby.relay.state.Load() == "standby" })
	at := positions(standby)
	if confirmed := at[`of="confirmed"`]; len(at) != 2 || confirmed == 0 || at[`of="end"`] < confirmed {
		t.Errorf("a standby shows %v", at)
	}
}

// TestPageWithKeys: the page holds nothing and is open, the snapshot wants the scope operate, amounts want
// read as well.
func TestPageWithKeys(t *testing.T) {
	w := start(t, testEnv(t, "API_KEYS="+hashed("operator", "operate", "o-key")+","+
		hashed("both", "operate+read", "b-key")+","+hashed("reader", "read", "r-key")))
	if a := w.ask("GET", "/"); a.status != 200 || !strings.Contains(a.body, `<html lang="en" data-key>`) {
		t.Errorf("the page does not say that a key is needed: %d", a.status)
	}
	for _, c := range []struct {
		path, key string
		status    int
		code      string
	}{
		{"/status.json", "", 401, "unauthenticated"},
		{"/status.json", "wrong", 401, "unauthenticated"},
		{"/status.json", "r-key", 403, "forbidden"},
		{"/status.json", "o-key", 200, ""},
		{"/status.json", "b-key", 200, ""},
		{"/status.json?private=0", "o-key", 200, ""},
		{"/status.json?private=1", "", 401, "unauthenticated"},
		{"/status.json?private=1", "r-key", 403, "forbidden"},
		{"/status.json?private=1", "o-key", 403, "forbidden"},
		{"/status.json?private=1", "b-key", 200, ""},
	} {
		a := w.ask("GET", c.path, "Authorization", "Bearer "+c.key)
		if a.status != c.status || a.code() != c.code {
			t.Errorf("%s with %q: %s", c.path, c.key, a)
		}
	}
}

// TestPageSaysWhatTheRelayRefuses: in the log's words, and not any longer than it refuses.
func TestPageSaysWhatTheRelayRefuses(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers)
	w := start(t, env)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`)
	eventually(t, 20*time.Second, "leads",
		func() bool { return len(w.status(t, "/status.json").Events) == 1 })
	w.end()
	other := env["REPLICATION_SLOT"]
	env["REPLICATION_SLOT"] += "_other"
	w = start(t, env)
	eventually(t, 20*time.Second, "a refusal", func() bool {
		return strings.Contains(w.status(t, "/status.json").Refusal, "belongs to database")
	})
	w.relay.enter("standby")
	eventually(t, 5*time.Second, "it is over",
		func() bool { return w.status(t, "/status.json").Refusal == "" })
	_, err := w.reads.Exec(context.Background(), "SELECT pg_drop_replication_slot($1)", other)
	if err != nil {
		t.Error(err)
	}
}
