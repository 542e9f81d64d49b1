package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"wallet/internal/gate"
	"wallet/internal/metric"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	m.Run()
}

func newTestServer(tb testing.TB) *Server {
	tb.Helper()
	keys, err := gate.NewKeyring("", "")
	if err != nil {
		tb.Fatal(err)
	}
	s := New(Config{
		Problems:    map[string]Problem{"sold_out": {422, "Sold out"}},
		Overloaded:  refuse("overloaded", "busy"),
		Starting:    refuse("starting", "starting"),
		Unavailable: refuse("unavailable", "away"),
		Unreachable: func(err error) bool { return errors.Is(err, io.EOF) },
		Keys:        keys, Timeout: time.Second, RequestsMax: 10,
	})
	s.Started.Store(true)
	return s
}

// TestOneAnswer: whatever a handler does, the answer is whole, and of the status that its table says.
func TestOneAnswer(t *testing.T) {
	var body []byte
	var err error
	s := newTestServer(t)
	mux := s.Mux([]Route{{Method: "GET", Path: "/v1/shop/{id}", Scope: gate.Read, Status: 202,
		Handle: func(*http.Request) (*Reply, error) { return &Reply{Body: body, Replayed: true}, err }}})
	ask := func(method, path string) *httptest.ResponseRecorder {
		recorder := httptest.NewRecorder()
		mux.ServeHTTP(recorder, httptest.NewRequest(method, path, nil))
		return recorder
	}
	failures := func(want string) {
		t.Helper()
		var out strings.Builder
		s.WriteMetrics(metric.NewWriter(&out), "shop")
		if !strings.Contains(out.String(), want) {
			t.Errorf("not measured: %s:\n%s", want, out.String())
		}
	}
	ours := []string{"internal", "overloaded", "starting", "unavailable"} // alerts ask for them
	for _, code := range ours {
		failures(fmt.Sprintf("shop_refusals_total{code=%q} 0\n", code))
	}
	body = []byte(`{"open":true}`)
	for method, want := range map[string]string{"GET": string(body) + "\n", "HEAD": ""} {
		a := ask(method, "/v1/shop/1")
		if a.Code != 202 || a.Body.String() != want || a.Header().Get("Content-Length") != "14" ||
			a.Header().Get("Idempotent-Replayed") != "true" {
			t.Errorf("%s: %d %s %v", method, a.Code, a.Body, a.Header())
		}
	}
	refused := func(name string, a *httptest.ResponseRecorder, status int, code string) {
		t.Helper()
		var p document
		unreadable := json.Unmarshal(a.Body.Bytes(), &p)
		if unreadable != nil || a.Code != status || p.Status != status || p.Code != code || p.Detail == "" ||
			p.Error != p.Detail || p.Title != s.Problems[code].Title ||
			p.RequestID != a.Header().Get("X-Request-Id") || !strings.HasSuffix(a.Body.String(), "}\n") ||
			a.Header().Get("Content-Length") != strconv.Itoa(a.Body.Len()) {
			t.Errorf("%s: %d %s", name, a.Code, a.Body)
		}
	}
	err = refuse("sold_out", "none left")
	refused("a refusal", ask("GET", "/v1/shop/1"), 422, "sold_out")
	err = io.EOF
	refused("another server is away", ask("GET", "/v1/shop/1"), 503, "unavailable")
	err = errors.New("secret")
	fault := ask("GET", "/v1/shop/1")
	refused("a fault", fault, 500, "internal")
	if strings.Contains(fault.Body.String(), "secret") {
		t.Errorf("a fault is told: %s", fault.Body)
	}
	refused("another path", ask("GET", "/v1/shop"), 404, "route_not_found")
	notAllowed := ask("PUT", "/v1/shop/1")
	refused("another method", notAllowed, 405, "method_not_allowed")
	if allow := notAllowed.Header().Get("Allow"); allow != "GET, HEAD" {
		t.Errorf("Allow: %s", allow)
	}
	s.Started.Store(false)
	refused("before the start", ask("GET", "/v1/shop/1"), 503, "starting")
	s.RequestsMax = 0
	refused("too many requests", ask("GET", "/v1/shop/1"), 503, "overloaded")
	for _, code := range append(ours, "sold_out") {
		failures(fmt.Sprintf("shop_refusals_total{code=%q} 1\n", code))
	}
}

// TestTraceID: log lines carry what all of a trace's spans share.
func TestTraceID(t *testing.T) {
	for sent, want := range map[string]string{
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01": "0af7651916cd43dd8448eb211c80319c",
		"00-00000000000000000000000000000000-b7ad6b7169203331-01": "",
		"": "",
	} {
		var out bytes.Buffer
		was := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(&out, nil)))
		r := httptest.NewRequest("GET", "/v1/none", nil)
		r.Header.Set("Traceparent", sent)
		newTestServer(t).Mux(nil).ServeHTTP(httptest.NewRecorder(), r)
		slog.SetDefault(was)
		if _, is, there := strings.Cut(out.String(), " trace_id="); there != (want != "") ||
			strings.TrimSpace(is) != want {
			t.Errorf("%s: %s", sent, out.String())
		}
	}
}

// TestStream: a body of any length has no length told ahead, its trailer comes after it, HEAD writes none of
// it, and a client that got a part of it knows.
func TestStream(t *testing.T) {
	var fault error
	streams := 0
	s := newTestServer(t)
	server := httptest.NewServer(s.Mux([]Route{{Method: "GET", Path: "/v1/shop", Scope: gate.Read,
		Handle: func(*http.Request) (*Reply, error) {
			header := map[string]string{"Content-Type": "text/csv", "Trailer": "Sum"}
			return &Reply{Header: header, Stream: func(_ context.Context, w io.Writer) error {
				streams++
				io.WriteString(w, "one,")
				if fault != nil {
					return fault
				}
				io.WriteString(w, "two")
				w.(http.ResponseWriter).Header().Set("Sum", "2")
				return nil
			}}, nil
		}}}))
	defer server.Close()
	ask := func(method string) (*http.Response, string, error) {
		r, _ := http.NewRequest(method, server.URL+"/v1/shop", nil)
		response, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		return response, string(body), err
	}
	a, body, err := ask("GET")
	if err != nil || a.StatusCode != 200 || body != "one,two" || a.Trailer.Get("Sum") != "2" ||
		a.Header.Get("Content-Length") != "" || a.Header.Get("Content-Type") != "text/csv" {
		t.Errorf("%d %s, %v, %v, trailer %v", a.StatusCode, body, err, a.Header, a.Trailer)
	}
	a, body, err = ask("HEAD")
	if err != nil || a.StatusCode != 200 || body != "" || streams != 1 ||
		a.Header.Get("Content-Length") != "" || a.Header.Get("Content-Type") != "text/csv" {
		t.Errorf("HEAD: %d %s, %v, %v, %d streams", a.StatusCode, body, err, a.Header, streams)
	}
	fault = io.EOF
	if a, body, err = ask("GET"); !errors.Is(err, io.ErrUnexpectedEOF) || body != "one," ||
		a.Trailer.Get("Sum") != "" {
		t.Errorf("broken off: %q, %v, trailer %v", body, err, a.Trailer)
	}
}

func TestPanicIsABare500(t *testing.T) {
	fails := func(*http.Request) (*Reply, error) { panic("secret") }
	h := newTestServer(t).serve(Route{Path: "other", Handle: fails})
	recorder := httptest.NewRecorder()
	h.ServeHTTP(recorder, httptest.NewRequest("GET", "/", nil))
	id := recorder.Header().Get("X-Request-Id")
	text := recorder.Body.String()
	if recorder.Code != 500 || strings.Contains(text, "secret") || !strings.Contains(text, id) {
		t.Errorf("%d %s", recorder.Code, text)
	}
}

// TestNoRefusalWithoutARow: a route whose refusals the table of problems does not have is found at start.
func TestNoRefusalWithoutARow(t *testing.T) {
	for refusals, fine := range map[string]bool{"sold_out": true, "sold_out burnt_down": false} {
		func() {
			defer func() {
				if fault := recover(); (fault == nil) != fine {
					t.Errorf("%s: %v", refusals, fault)
				}
			}()
			newTestServer(t).Mux([]Route{{Method: "GET", Path: "/x", Doc: Doc{Refusals: refusals}}})
		}()
	}
}

func FuzzBody(f *testing.F) {
	for _, seed := range []string{
		`{"amount":"1","idempotency_key":"k"}`, `{"amount":1.50}`, `{}`, `{"amount":{}}`, `[`,
		`{"a":1,"a":2}`, `{"amount":1}x`,
		` { "to_id" : -0.5e+7 , "currency":"\\u0055SD\\"\\\\" } `, `{"amount":1,}`,
		`{"amount":01}`, `{"amount" 1}`, `{"amount":tru}`, `{,}`, `{"amount":"\\x"}`, "{\"amount\":\"\x7f\"}",
		"{\"amount\":\"1\n\"}", "{\"amount\":\"\xff\"}", `{"amount":1e999999999}`,
		`{"idempotency_key":"a\"b\\"}`, `{"final":true,"metadata":{"a":"b","c":{}}}`, `{"final":1}`,
		`{"metadata":{"a":"}"} , "to_id":1}`, `{"metadata":{}`, `{"metadata":"{}"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		found, err := parseBody(body, &bodyShape, nil)
		want, ok := readByTokens(body)
		if (err == nil) != ok || ok && !maps.Equal(found, want) {
			t.Fatalf("%q: %v, %v; encoding/json reads %v, %v", body, found, err, want, ok)
		}
		var no *refusal
		if err != nil && (!errors.As(err, &no) || own[no.code].Status != 400) {
			t.Fatalf("%q: not a 400: %v", body, err)
		}
	})
}

var bodyShape = Shape{Fields: []string{"amount", "currency", "idempotency_key", "to_id", "final", "metadata"},
	Flags: []string{"final"}, Objects: []string{"metadata"}}

// readByTokens is what parseFields does, by encoding/json alone: an object of bodyShape's fields, each at
// most once.
func readByTokens(body []byte) (Fields, bool) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	if open, err := decoder.Token(); err != nil || open != json.Delim('{') {
		return nil, false
	}
	found := make(Fields)
	for decoder.More() {
		token, err := decoder.Token()
		name, ok := token.(string)
		if _, twice := found[name]; err != nil || !ok || twice || !slices.Contains(bodyShape.Fields, name) {
			return nil, false
		}
		var raw json.RawMessage
		if decoder.Decode(&raw) != nil {
			return nil, false
		}
		var text string
		switch first := raw[0]; {
		case name == "metadata":
			if first != '{' {
				return nil, false
			}
			found[name] = Field{Text: string(raw)}
		case name == "final":
			if first != 't' && first != 'f' {
				return nil, false
			}
			found[name] = Field{Text: string(raw)}
		case json.Unmarshal(raw, &text) == nil && first == '"':
			found[name] = Field{text, true}
		case first == '-' || first >= '0' && first <= '9':
			found[name] = Field{Text: string(raw)}
		default:
			return nil, false
		}
	}
	if _, err := decoder.Token(); err != nil { // the closing brace
		return nil, false
	}
	_, err := decoder.Token()
	return found, err == io.EOF
}

// TestKeyHeader: a quoted key is a structured-field string (RFC 9651), which escapes two characters only.
func TestKeyHeader(t *testing.T) {
	for header, want := range map[string]string{
		`a "b" \c`: `a "b" \c`, `"a \"b\" \\c"`: `a "b" \c`, `""`: ``,
		`"a\x"`: `refused`, `"a"b"`: `refused`, `"a`: `refused`, `"a\"`: `refused`, `"`: `refused`,
	} {
		got, err := parseKeyHeader(header)
		if err != nil {
			got = "refused"
		}
		if got != want {
			t.Errorf("%s: %s, want %s", header, got, want)
		}
	}
}

// FuzzKeyHeader: a key has one meaning, whether it is sent bare, quoted or in the body as well, and passes
// the service's own rule.
func FuzzKeyHeader(f *testing.F) {
	for _, seed := range []string{
		`k`, `"k"`, `"a\"b"`, `"a`, `a"b`, `""`, `"\x"`, "a\nb", strings.Repeat("k", 256),
	} {
		f.Add(seed)
	}
	short := func(key string) (string, error) {
		if len(key) == 0 || len(key) > 255 {
			return "", refuse("idempotency_key_malformed", "too short, or too long")
		}
		return key, nil
	}
	f.Fuzz(func(t *testing.T, header string) {
		r := &http.Request{Header: http.Header{"Idempotency-Key": {header}}}
		key, err := Key(r, nil, short)
		if err != nil {
			var no *refusal
			if !errors.As(err, &no) || no.code != "idempotency_key_malformed" {
				t.Fatalf("%q: %v", header, err)
			}
			return
		}
		if _, err := short(key); err != nil {
			t.Fatalf("%q gave the key %q: %v", header, key, err)
		}
		body := Fields{"idempotency_key": {key, true}}
		quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(key) + `"`
		r.Header.Set("Idempotency-Key", quoted)
		if again, err := Key(r, body, short); err != nil || again != key {
			t.Fatalf("%q: quoted as %s it is %q, %v", key, quoted, again, err)
		}
		body["idempotency_key"] = Field{key + "x", true}
		if _, err := Key(r, body, short); err == nil {
			t.Fatalf("%q in the header and %q in the body were taken", key, key+"x")
		}
	})
}

// TestCanonical: an object of strings comes out as what it was, whatever its names are. A name is no JSON of
// its own: none can end its string and add a member.
func TestCanonical(t *testing.T) {
	for object, want := range map[string]string{
		`{"b":"1", "a":"2"}`:                   `{"a":"2","b":"1"}`,
		`{}`:                                   ``,
		`{"a\",\"client\":\"x":"y"}`:           `{"a\",\"client\":\"x":"y"}`,
		`{"\u0000\n\\":"\u0000","é":"\u00e9"}`: `{"\u0000\u000a\\":"\u0000","é":"é"}`,
	} {
		text, ok := Canonical(object, 2)
		if !ok || text != want {
			t.Errorf("%s: %s, %v; want %s", object, text, ok, want)
		}
		if again, ok := Canonical(text, 2); text != "" && (!ok || again != text) {
			t.Errorf("%s again: %s, %v", text, again, ok)
		}
	}
	for _, object := range []string{`{"":"a"}`, `{"a":1}`, `{"a":"1","a":"2"}`, `{"a":"1","b":"2","c":"3"}`} {
		if text, ok := Canonical(object, 2); ok {
			t.Errorf("%s is %s", object, text)
		}
	}
}
