// Among strangers: keys, limits, TLS, the contract, and attacks.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wallet/internal/gate"
)

func hashed(name, scopes, key string) string {
	return fmt.Sprintf("%s:%s:%x", name, scopes, sha256.Sum256([]byte(key)))
}

func TestKeysAndScopes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys")
	lines := "# one a line\n" + hashed("writer", "write", "w-key") + " # rotates\n" +
		hashed("operator", "operate+read", "o-key") + "\n"
	os.WriteFile(file, []byte(lines), 0o600)
	w := start(t, testEnv(t, "API_KEYS="+hashed("reader", "read", "r-key"), "API_KEYS_FILE="+file))
	deposit := func(headers ...string) answer {
		return w.post("/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`, headers...)
	}
	for _, c := range []struct {
		answer answer
		status int
		code   string
	}{
		{deposit(), 401, "unauthenticated"},
		{deposit("Authorization", "Bearer wrong"), 401, "unauthenticated"},
		{deposit("Authorization", "Bearer "), 401, "unauthenticated"},
		{deposit("Authorization", "w-key"), 401, "unauthenticated"},
		{deposit("Authorization", "Basic w-key"), 401, "unauthenticated"},
		{deposit("Authorization", "Bearer r-key"), 403, "forbidden"},
		{deposit("Authorization", "Bearer o-key"), 403, "forbidden"},
		{deposit("Authorization", "Bearer w-key"), 200, ""},
		{w.get("/v1/wallets/1"), 401, "unauthenticated"},
		{w.get("/v1/wallets/1", "Authorization", "Bearer w-key"), 403, "forbidden"},
		{w.get("/v1/wallets/1", "Authorization", "Bearer r-key"), 200, ""},
		{w.get("/v1/wallets/1", "Authorization", "Bearer o-key"), 200, ""},
		{w.get("/healthz"), 200, ""},
		{w.get("/readyz"), 200, ""},
		{w.get("/openapi.json"), 200, ""},
	} {
		if c.answer.status != c.status || c.answer.code() != c.code {
			t.Errorf("%s, want %d %s", c.answer, c.status, c.code)
		}
		if c.status == 401 && c.answer.header.Get("WWW-Authenticate") != "Bearer" {
			t.Errorf("401 without WWW-Authenticate")
		}
	}
	operator := func(path, key string) int {
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("Authorization", "Bearer "+key)
		recorder := httptest.NewRecorder()
		w.api.operator.ServeHTTP(recorder, r)
		return recorder.Code
	}
	for _, path := range []string{"/metrics", "/debug/pprof/", "/debug/pprof/heap"} {
		if a, b, c := operator(path, "none"), operator(path, "w-key"), operator(path, "o-key"); a != 401 ||
			b != 403 || c != 200 {
			t.Errorf("%s: %d without a key, %d with one for writing, %d with the operator's", path, a, b, c)
		}
	}
	if a := w.get("/metrics", "Authorization", "Bearer o-key"); a.status != 404 {
		t.Errorf("metrics on the public address: %d", a.status)
	}
}

// TestWithoutKeysOnlyLoopback: a service that asks nobody for a key is not reachable by others, unless told
// that it may.
func TestWithoutKeysOnlyLoopback(t *testing.T) {
	for address, allowed := range map[string]bool{"127.0.0.1:8080": true, "localhost:8080": true,
		"[::1]:8080": true, ":8080": false, "0.0.0.0:8080": false, "10.0.0.1:8080": false,
		"example.com:8080": false} {
		cfg := &config{listenAddr: address, readConns: 1}
		cfg.databaseURL, cfg.writers = "postgres://localhost/x", 1
		if _, err := newService(cfg); (err == nil) != allowed {
			t.Errorf("%s without keys: %v", address, err)
		}
		cfg.authenticatedUpstream = true
		if _, err := newService(cfg); err != nil {
			t.Errorf("%s behind something that authenticates: %v", address, err)
		}
		cfg.authenticatedUpstream, cfg.apiKeys = false, hashed("a", "read", "k")
		if _, err := newService(cfg); err != nil {
			t.Errorf("%s with a key: %v", address, err)
		}
		cfg.apiKeys, cfg.listenAddr, cfg.operateAddr = "", "127.0.0.1:1", address
		if _, err := newService(cfg); (err == nil) != allowed {
			t.Errorf("operators on %s without keys: %v", address, err)
		}
	}
}

// TestBadKeysNameTheirSetting: whatever is wrong with keys or a certificate, the sentence says what to set.
func TestBadKeysNameTheirSetting(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(file, []byte("# none yet\n"), 0o600)
	good := hashed("a", "read", "k")
	for _, c := range []struct {
		cfg  config
		want string
	}{
		{config{apiKeys: good + ",b:admin:00"},
			"write each API key as NAME:SCOPES:HASH, .*[(]key 2 is not so[)]$"},
		{config{apiKeysFile: file},
			"^put a line NAME:SCOPES:HASH into API_KEYS_FILE .* open the service to everybody$"},
		{config{apiKeysFile: file + "x"}, "^set API_KEYS_FILE to a file that can be read: open "},
		{config{apiKeys: good, tlsCert: file},
			"^set TLS_CERT and TLS_KEY to files [(]PEM[)] that belong together: "},
	} {
		c.cfg.databaseURL, c.cfg.readConns, c.cfg.writers = "postgres://localhost/x", 1, 1
		if _, err := newService(&c.cfg); err == nil || !regexp.MustCompile(c.want).MatchString(err.Error()) {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}

func TestRateLimit(t *testing.T) {
	w := start(t, testEnv(t, "RATE_LIMIT=10", "RATE_BURST=20",
		"API_KEYS="+hashed("a", "read+write", "a-key")+","+hashed("b", "read+write", "b-key")))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`, "Authorization",
		"Bearer b-key")
	var refused int
	for range 40 {
		a := w.get("/v1/wallets/1/balance", "Authorization", "Bearer a-key")
		if a.header.Get("RateLimit-Policy") != `"default";q=20;w=2` || a.header.Get("RateLimit") == "" {
			t.Fatalf("headers: %v", a.header)
		}
		if a.status == 429 {
			refused++
			if a.code() != "rate_limited" || a.header.Get("Retry-After") != "1" {
				t.Errorf("%s %v", a, a.header)
			}
		}
	}
	if refused < 10 || refused > 20 {
		t.Errorf("%d of 40 requests refused with a burst of 20", refused)
	}
	if a := w.get("/v1/wallets/1/balance", "Authorization", "Bearer b-key"); a.status != 200 {
		t.Errorf("another client: %s", a)
	}
	// Guessing keys is limited by address.
	guesses := 0
	for range 40 {
		if w.get("/v1/wallets/1/balance", "Authorization", "Bearer guess").status == 429 {
			guesses++
		}
	}
	if guesses == 0 {
		t.Error("keys can be guessed without limit")
	}
	if a := w.get("/readyz"); a.status != 200 {
		t.Errorf("probes are limited: %s", a)
	}
	eventually(t, 3*time.Second, "tokens again", func() bool {
		return w.get("/v1/wallets/1/balance", "Authorization", "Bearer a-key").status == 200
	})
}

// makeCertificate writes a self-signed certificate for 127.0.0.1.
func makeCertificate(tb testing.TB, certFile, keyFile string, serial int64) *x509.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "wallet"},
		NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	keyDER, _ := x509.MarshalPKCS8PrivateKey(key)
	os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
	os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)
	cert, _ := x509.ParseCertificate(der)
	return cert
}

// TestTLS: 1.2 or later, and a renewed certificate counts without a restart.
func TestTLS(t *testing.T) {
	folder := t.TempDir()
	certFile, keyFile := filepath.Join(folder, "cert"), filepath.Join(folder, "key")
	makeCertificate(t, certFile, keyFile, 1)
	w := start(t, testEnv(t, "TLS_CERT="+certFile, "TLS_KEY="+keyFile))
	serial := func(most uint16) (int64, error) {
		conn, err := tls.Dial("tcp", w.direct, &tls.Config{InsecureSkipVerify: true, MaxVersion: most})
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(), nil
	}
	if n, err := serial(tls.VersionTLS13); err != nil || n != 1 {
		t.Errorf("serial %d, %v", n, err)
	}
	if _, err := serial(tls.VersionTLS11); err == nil {
		t.Error("TLS 1.1 was spoken")
	}
	makeCertificate(t, certFile, keyFile, 2)
	if err := w.certificate.Load(); err != nil {
		t.Fatal(err)
	}
	if n, err := serial(tls.VersionTLS12); err != nil || n != 2 {
		t.Errorf("renewed: serial %d, %v", n, err)
	}
	os.WriteFile(keyFile, []byte("nonsense"), 0o600)
	if err := w.certificate.Load(); err == nil {
		t.Error("a broken key was loaded")
	}
	if n, err := serial(tls.VersionTLS12); err != nil || n != 2 {
		t.Errorf("after a broken key: serial %d, %v", n, err)
	}
}

// TestDashboardAndAlerts: what they ask for is measured.
func TestDashboardAndAlerts(t *testing.T) {
	w := start(t, testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`)
	recorder := httptest.NewRecorder()
	w.api.operator.ServeHTTP(recorder, httptest.NewRequest("GET", "/metrics", nil))
	measured := recorder.Body.String()
	well := regexp.MustCompile(`^(# (HELP|TYPE) wallet_\w+ .+|wallet_\w+(\{(\w+="[^"]*",?)+\})? \S+)$`)
	for _, line := range strings.Split(strings.TrimSpace(measured), "\n") {
		if !well.MatchString(line) {
			t.Errorf("not Prometheus text: %s", line)
		}
	}
	for _, file := range []string{"dev/observe/grafana.json", "dev/observe/alerts.yaml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		asked := regexp.MustCompile(`\bwallet_\w+\b`).FindAllString(string(text), -1)
		for _, name := range asked {
			if !regexp.MustCompile(`(?m)^` + name + `(_bucket)?[ {]`).MatchString(measured) {
				t.Errorf("%s asks for %s, which is not measured", file, name)
			}
		}
		if len(asked) < 10 {
			t.Errorf("%s asks for %d metrics", file, len(asked))
		}
	}
}

// -----------------------------------------------------------------------------------------------------------
// Contract
// -----------------------------------------------------------------------------------------------------------

// contract is the served OpenAPI document, as far as the test reads it.
type contract struct {
	OpenAPI string
	Paths   map[string]map[string]struct {
		Responses map[string]struct {
			Description string
			Content     map[string]struct{ Schema map[string]any }
		}
	}
	Components struct{ Schemas map[string]any }
}

// conforms checks a JSON value against the part of JSON Schema that our document uses.
func (c *contract) conforms(schema any, value any) error {
	s, _ := schema.(map[string]any)
	if ref, ok := s["$ref"].(string); ok {
		target, known := c.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")]
		if !known {
			return fmt.Errorf("%s leads nowhere", ref)
		}
		return c.conforms(target, value)
	}
	for _, part := range asList(s["allOf"]) {
		if err := c.conforms(part, value); err != nil {
			return err
		}
	}
	if options := asList(s["oneOf"]); options != nil {
		fitting := 0
		for _, option := range options {
			if c.conforms(option, value) == nil {
				fitting++
			}
		}
		if fitting != 1 {
			return fmt.Errorf("%v fits %d of oneOf", value, fitting)
		}
	}
	if enum := asList(s["enum"]); enum != nil && !slices.Contains(enum, value) {
		return fmt.Errorf("%v is none of %v", value, enum)
	}
	switch s["type"] {
	case "string":
		text, ok := value.(string)
		if !ok {
			return fmt.Errorf("%v is no string", value)
		}
		if pattern, ok := s["pattern"].(string); ok && !regexp.MustCompile(pattern).MatchString(text) {
			return fmt.Errorf("%q does not match %s", text, pattern)
		}
		if _, err := time.Parse(time.RFC3339, text); s["format"] == "date-time" && err != nil {
			return err
		}
	case "integer":
		if n, ok := value.(json.Number); !ok || strings.ContainsAny(n.String(), ".eE-") {
			return fmt.Errorf("%v is no such integer", value)
		}
	case "array":
		list, ok := value.([]any)
		if !ok {
			return fmt.Errorf("%v is no array", value)
		}
		for _, item := range list {
			if err := c.conforms(s["items"], item); err != nil {
				return err
			}
		}
	case "object":
		members, ok := value.(map[string]any)
		if !ok {
			return fmt.Errorf("%v is no object", value)
		}
		for _, name := range asList(s["required"]) {
			if _, there := members[name.(string)]; !there {
				return fmt.Errorf("lacks %s", name)
			}
		}
	}
	if properties, ok := s["properties"].(map[string]any); ok {
		members, _ := value.(map[string]any)
		for name, member := range members {
			property, known := properties[name]
			if !known {
				property = s["additionalProperties"]
				if property == false {
					return fmt.Errorf("%s is not documented", name)
				}
			}
			if err := c.conforms(property, member); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

func asList(v any) []any { list, _ := v.([]any); return list }

// held is a service that is held to its own contract.
type held struct {
	service  *running
	contract contract
	// What is listed and not yet seen: "post /v1/wallets 201", "post /v1/wallets 409 wallet_exists", ...
	unseen map[string]bool
}

func newHeld(t *testing.T) *held {
	t.Helper()
	keys := hashed("all", "read+write", "key") + "," + hashed("operator", "operate", "operator-key")
	h := &held{service: start(t, testEnv(t, "API_KEYS="+keys)), unseen: make(map[string]bool)}
	decodeJSON(t, h.service.get("/openapi.json").body, &h.contract)
	for path, operations := range h.contract.Paths {
		for method, operation := range operations {
			for status, response := range operation.Responses {
				if status[0] == '2' {
					h.unseen[method+" "+path+" "+status] = true
					continue
				}
				for _, code := range strings.Split(response.Description, ", ") {
					h.unseen[method+" "+path+" "+status+" "+code] = true
				}
			}
		}
	}
	return h
}

// decodeJSON decodes a JSON text, numbers kept as text.
func decodeJSON(t *testing.T, text string, into any) {
	t.Helper()
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(into); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}

// identified matches the paths that name one thing; the contract has {id} there.
var identified = []*regexp.Regexp{
	regexp.MustCompile(`^(/v1/wallets/)[^/]+(.*)$`),
	regexp.MustCompile(`^(/v1/transactions/)[^/]+()$`),
}

// check demands that an answer is documented, and crosses it off.
func (h *held) check(t *testing.T, method, target string, a answer) {
	t.Helper()
	path, _, _ := strings.Cut(target, "?")
	for _, template := range identified {
		path = template.ReplaceAllString(path, "$1{id}$2")
	}
	key := fmt.Sprintf("%s %s %d", strings.ToLower(method), path, a.status)
	kind := "application/json"
	response := h.contract.Paths[path][strings.ToLower(method)].Responses[strconv.Itoa(a.status)]
	if a.status >= 400 {
		key += " " + a.code()
		kind = "application/problem+json"
	}
	delete(h.unseen, key)
	var value any
	decodeJSON(t, a.body, &value)
	if schema := response.Content[kind].Schema; schema == nil {
		t.Errorf("%s %s: %s is not documented", method, target, a)
	} else if err := h.contract.conforms(schema, value); err != nil {
		t.Errorf("%s %s: %s: %v", method, target, a, err)
	}
}

func (h *held) get(t *testing.T, target string, headers ...string) {
	t.Helper()
	headers = append([]string{"Authorization", "Bearer key"}, headers...)
	h.check(t, "GET", target, h.service.get(target, headers...))
}

func (h *held) post(t *testing.T, target, body string, headers ...string) {
	t.Helper()
	headers = append([]string{"Authorization", "Bearer key"}, headers...)
	h.check(t, "POST", target, h.service.post(target, body, headers...))
}

// The routes that the contract's test calls, for wallets and transactions that are there.
const (
	creations   = "/v1/wallets"
	deposits    = "/v1/wallets/1/deposit"
	withdrawals = "/v1/wallets/1/withdraw"
	transfers   = "/v1/wallets/1/transfer"
)

var (
	postRoutes = []string{creations, deposits, withdrawals, transfers}
	getRoutes  = []string{"/v1/wallets/1", "/v1/wallets/1/balance", "/v1/wallets/1/history",
		"/v1/transactions/1-1"}
)

// everywhere calls each route in a way that is right but for the cause that a test has set up.
func (h *held) everywhere(t *testing.T, headers ...string) {
	t.Helper()
	for _, target := range getRoutes {
		h.get(t, target, headers...)
	}
	for _, target := range postRoutes {
		body := `"amount":"1","idempotency_key":"` + fmt.Sprint(time.Now().UnixNano()) + `"}`
		switch target {
		case creations:
			body = `{"id":7}`
		case transfers:
			body = `{"to_id":2,` + body
		default:
			body = `{` + body
		}
		h.post(t, target, body, headers...)
	}
}

// members are the members of a right body for a route, each followed by a comma, without the key. A creation
// has id where a transfer has to_id.
func members(target string) string {
	switch target {
	case creations:
		return `"id":9,`
	case transfers:
		return `"to_id":2,"amount":"1",`
	default:
		return `"amount":"1",`
	}
}

// TestContract causes every answer that the OpenAPI document lists, each refusal in a subtest of its cause.
// It finds each answer documented: status, code and shape.
func TestContract(t *testing.T) {
	h := newHeld(t)
	if h.contract.OpenAPI != "3.1.0" {
		t.Errorf("OpenAPI %s", h.contract.OpenAPI)
	}
	h.post(t, deposits, `{"amount":"100","idempotency_key":"d"}`)
	h.post(t, withdrawals, `{"amount":"1","idempotency_key":"w"}`)
	h.post(t, transfers, `{"amount":"1","to_id":2,"idempotency_key":"t"}`)
	h.post(t, "/v1/wallets/3/deposit", `{"amount":"99999999999999999999","idempotency_key":"d"}`)
	h.post(t, creations, `{"id":4,"currency":"EUR"}`)

	const key = `"idempotency_key":"k"`
	each := func(targets []string, do func(t *testing.T, target string)) func(*testing.T) {
		return func(t *testing.T) {
			for _, target := range targets {
				do(t, target)
			}
		}
	}
	everywhere := func(headers ...string) func(*testing.T) {
		return func(t *testing.T) { h.everywhere(t, headers...) }
	}
	movements := postRoutes[1:]
	for _, c := range []struct {
		cause string
		do    func(t *testing.T)
	}{
		{"nothing", each(append(slices.Clone(getRoutes), "/v1/transactions/1-3", "/openapi.json", "/healthz",
			"/readyz"),
			func(t *testing.T, target string) { h.get(t, target) })},
		{"amounts", each(movements, func(t *testing.T, target string) {
			for _, amount := range []string{"x", "1e3", "-1", "123456789012345678901", "0.001"} {
				body := strings.Replace(members(target), `"amount":"1"`, `"amount":"`+amount+`"`, 1)
				h.post(t, target, `{`+body+key+`}`)
			}
		})},
		{"bodies", each(postRoutes, func(t *testing.T, target string) {
			h.post(t, target, `{`+members(target)+key)
			long := strings.Repeat("k", bodyBytesMax)
			h.post(t, target, `{`+members(target)+`"idempotency_key":"`+long+`"}`)
			h.post(t, target, `{`+members(target)+key+`}`, "Content-Type", "text/plain")
			h.post(t, target, `{`+members(target)+`"x":1,`+key+`}`)
			h.post(t, target, `{`+members(target)+key+`,`+key+`}`)
		})},
		{"members left out", func(t *testing.T) {
			each(movements, func(t *testing.T, target string) { h.post(t, target, `{`+key+`}`) })(t)
			h.post(t, creations, `{"currency":"USD"}`)
		}},
		{"idempotency keys", func(t *testing.T) {
			for _, target := range postRoutes {
				h.post(t, target, `{`+members(target)+`"idempotency_key":""}`)
				h.post(t, target, `{`+members(target)+key+`}`, "Idempotency-Key", "other")
			}
			for i, target := range movements {
				body := strings.Replace(members(target), `"amount":"1"`, `"amount":"2"`, 1)
				h.post(t, target, `{`+body+`"idempotency_key":"`+[]string{"d", "w", "t"}[i]+`"}`)
				h.post(t, target, `{`+strings.TrimSuffix(members(target), ",")+`}`)
			}
			h.post(t, creations, `{"currency":"EUR","idempotency_key":"c"}`)
			h.post(t, creations, `{"currency":"USD","idempotency_key":"c"}`)
		}},
		{"currencies", func(t *testing.T) {
			for _, target := range postRoutes {
				h.post(t, target, `{`+members(target)+`"currency":"usd",`+key+`}`)
			}
			for _, target := range movements {
				h.post(t, target, `{`+members(target)+`"currency":"EUR",`+key+`}`)
			}
			h.post(t, creations, `{"id":9,"currency":"QQQ"}`)
			h.post(t, "/v1/wallets/9/deposit", `{"amount":"1","currency":"QQQ",`+key+`}`)
		}},
		{"wallets", func(t *testing.T) {
			for _, target := range movements {
				h.post(t, strings.Replace(target, "/1/", "/x/", 1), `{`+members(target)+key+`}`)
			}
			for _, target := range []string{withdrawals, transfers} {
				h.post(t, strings.Replace(target, "/1/", "/99/", 1), `{`+members(target)+key+`}`)
			}
			for _, target := range getRoutes[:3] {
				h.get(t, strings.Replace(target, "/1", "/x", 1))
				h.get(t, strings.Replace(target, "/1", "/99", 1))
			}
			h.get(t, "/v1/transactions/x")
			h.get(t, "/v1/transactions/99-1")
			h.post(t, creations, `{"id":"x","currency":"USD"}`)
			h.post(t, creations, `{"id":4,"currency":"EUR"}`)
			h.post(t, transfers, `{"amount":"1","to_id":1,`+key+`}`)
		}},
		{"balances", func(t *testing.T) {
			for _, target := range []string{withdrawals, transfers} {
				body := strings.Replace(members(target), `"amount":"1"`, `"amount":"10000"`, 1)
				h.post(t, target, `{`+body+key+`}`)
			}
			h.post(t, "/v1/wallets/3/deposit", `{"amount":"1",`+key+`}`)
			h.post(t, transfers, `{"amount":"1","to_id":3,`+key+`}`)
		}},
		{"parameters", func(t *testing.T) {
			h.get(t, "/v1/wallets/1/balance?min_seq=99")
			h.get(t, "/v1/wallets/1/balance?x=1")
			h.get(t, "/v1/wallets/1/history?order=up")
		}},
		{"an unknown API key", everywhere("Authorization", "Bearer wrong")},
		{"an API key for something else", everywhere("Authorization", "Bearer operator-key")},
		{"too many requests of one client", func(t *testing.T) {
			h.service.api.Limits = gate.NewLimiter(0.001, 0)
			h.everywhere(t)
			h.service.api.Limits = nil
		}},
		{"too many requests at once", func(t *testing.T) {
			h.service.api.RequestsMax = 0
			h.everywhere(t)
			h.service.api.RequestsMax = 1000
		}},
		{"not started", func(t *testing.T) {
			h.service.api.Started.Store(false)
			h.everywhere(t)
			h.get(t, "/readyz")
			h.service.api.Started.Store(true)
		}},
		{"tables that are gone", func(t *testing.T) {
			admin := connect(t, h.service.env["DATABASE_URL"])
			rename := func(from, to string) {
				t.Helper()
				for _, table := range []string{"entry", "wallet"} {
					sql := "ALTER TABLE " + table + from + " RENAME TO " + table + to
					if _, err := admin.Exec(context.Background(), sql); err != nil {
						t.Fatal(err)
					}
				}
			}
			rename("", "_gone")
			h.everywhere(t, "Cache-Control", "no-cache")
			rename("_gone", "")
		}},
		{"no time", func(t *testing.T) {
			h.service.api.Timeout = time.Microsecond
			h.everywhere(t, "Cache-Control", "no-cache")
			h.get(t, "/readyz")
			h.service.api.Timeout = time.Second
		}},
		{"all were caused", func(t *testing.T) { // which is so only if all of the above ran
			for refusal := range h.unseen {
				t.Errorf("documented but not caused: %s", refusal)
			}
		}},
	} {
		t.Run(c.cause, c.do)
	}
}

// -----------------------------------------------------------------------------------------------------------
// Under attack
// -----------------------------------------------------------------------------------------------------------

// TestBombs: texts that would cost a careless parser much cost little.
func TestBombs(t *testing.T) {
	w := start(t, testEnv(t))
	began := time.Now()
	for _, body := range []string{
		`{"amount":"1e1000000000","idempotency_key":"k"}`, `{"amount":1e1000000000,"idempotency_key":"k"}`,
		`{"amount":1e-1000000000,"idempotency_key":"k"}`,
		`{"amount":"` + strings.Repeat("9", 4000) + `","idempotency_key":"k"}`,
		`{"amount":0.` + strings.Repeat("1", 4000) + `,"idempotency_key":"k"}`,
		strings.Repeat("[", 4000), strings.Repeat(`{"amount":`, 400),
		`{"` + strings.Repeat("a", 4000) + `":1}`, strings.Repeat(" ", 4000),
		`{"amount":"\u0031"` + strings.Repeat(" ", 3000) + `,"idempotency_key":""}`, "\xff\xfe{", "\x00",
	} {
		if a := w.post("/v1/wallets/1/deposit", body); a.status < 400 || a.status >= 500 {
			t.Errorf("%.60q: %s", body, a)
		}
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("a dozen bombs took %v", took)
	}
}

// raw sends bytes and returns the status of each response on the connection.
func raw(tb testing.TB, address, request string) (statuses []int) {
	tb.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprint(conn, request)
	reader := bufio.NewReader(conn)
	for {
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return statuses
		}
		response.Body.Close()
		statuses = append(statuses, response.StatusCode)
	}
}

// TestSmuggling: requests that two servers could cut apart differently are not served.
func TestSmuggling(t *testing.T) {
	w := start(t, testEnv(t))
	address := w.http.Listener.Addr().String()
	const head = "POST /v1/wallets/1/deposit HTTP/1.1\r\nHost: x\r\n"
	const length = "Content-Length: 4\r\n"
	const end = "0\r\n\r\n" // the last chunk
	hidden := head + "Content-Type: application/json\r\nContent-Length: 36\r\n\r\n" +
		`{"amount":"1","idempotency_key":"s"}`
	for name, request := range map[string]string{
		"both lengths":        head + length + "Transfer-Encoding: chunked\r\n\r\n" + end + hidden,
		"two lengths":         head + length + "Content-Length: 5\r\n\r\nabcd" + hidden,
		"a length with a +":   head + "Content-Length: +4\r\n\r\nabcd" + hidden,
		"an obscured chunked": head + "Transfer-Encoding: xchunked\r\n\r\n" + end + hidden,
		"a folded header":     head + "X: y\r\n Content-Length: 4\r\n\r\nabcd" + hidden,
		"no host":             "POST /v1/wallets/1/deposit HTTP/1.1\r\n\r\n" + hidden,
		"two hosts":           "GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + hidden,
		"a bare LF in a name": "GET /healthz HTTP/1.1\r\nHost: x\r\nX\n: y\r\n\r\n" + hidden,
	} {
		for _, status := range raw(t, address, request) {
			if status < 400 && name != "a folded header" {
				t.Errorf("%s: %d", name, status)
			}
		}
	}
	if a := w.get("/v1/wallets/1"); a.status != 404 {
		t.Errorf("a hidden request was served: %s", a)
	}
}

// TestPathTricks: a path means one thing only.
func TestPathTricks(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`)
	for _, path := range []string{"/v1/wallets/1%2f../2/balance", "/v1/wallets/%31%00/balance",
		"/v1/wallets/1;x/balance", "/v1/wallets/ 1/balance", "/v1/wallets/1%0a/balance",
		"/V1/wallets/1/balance", "/v1/wallets/1/balance/"} {
		a := raw(t, w.http.Listener.Addr().String(),
			"GET "+path+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if len(a) != 1 || a[0] < 300 {
			t.Errorf("%s: %v", path, a)
		}
	}
	long := raw(t, w.http.Listener.Addr().String(),
		"GET /healthz HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("y", 2<<20)+"\r\n\r\n")
	if len(long) > 0 && long[0] != 431 {
		t.Errorf("2 MiB of headers: %v", long)
	}
}

// TestSlowClientsHoldNothing: clients that send a byte now and then are cut off, and nobody waits for them.
func TestSlowClientsHoldNothing(t *testing.T) {
	w := start(t, testEnv(t))
	var cut atomic.Int64
	var slow sync.WaitGroup
	for i := range 200 {
		conn, err := net.Dial("tcp", w.direct)
		if err != nil {
			t.Fatal(err)
		}
		slow.Go(func() {
			defer conn.Close()
			const head = "POST /v1/wallets/1/deposit HTTP/1.1\r\nHost: x\r\n"
			text := head + "X-Slow: "
			if i%2 == 0 { // the head is there, the body drips
				text = head + "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
			}
			fmt.Fprint(conn, text)
			for range 30 {
				time.Sleep(500 * time.Millisecond)
				if _, err := conn.Write([]byte(" ")); err != nil {
					cut.Add(1)
					return
				}
			}
		})
	}
	for i := range 50 {
		began := time.Now()
		response, err := http.Post("http://"+w.direct+"/v1/wallets/1/deposit", "application/json",
			strings.NewReader(fmt.Sprintf(`{"amount":"1","idempotency_key":"%d"}`, i)))
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("a deposit beside slow clients: %v %v", response, err)
		}
		response.Body.Close()
		if took := time.Since(began); took > time.Second {
			t.Errorf("a deposit took %v beside slow clients", took)
		}
	}
	slow.Wait()
	if cut.Load() != 200 {
		t.Errorf("%d of 200 slow clients were cut off within 15 s", cut.Load())
	}
}

// TestFlood: at ten times what can be written, the surplus is refused at once, and what is accepted takes no
// longer than with the queue just full. What can be written is made small, so that the flood is not about who
// gets the processor.
func TestFlood(t *testing.T) {
	const queue = 20
	w := start(t, testEnv(t, "WRITERS=1", "WRITE_BATCH_MAX=1", fmt.Sprint("WRITE_QUEUE_MAX=", queue),
		"REQUESTS_MAX=60"))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"seed"}`)
	if _, err := connect(t, w.env["DATABASE_URL"]).Exec(context.Background(),
		`CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END $$;
		CREATE TRIGGER slow BEFORE INSERT ON entry FOR EACH STATEMENT EXECUTE FUNCTION slow()`); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}, Timeout: 10 * time.Second}
	run := func(clients int, how time.Duration) (took latencies, refused int) {
		var mu sync.Mutex
		var working sync.WaitGroup
		began := time.Now()
		for c := range clients {
			working.Go(func() {
				for i := 0; time.Since(began) < how; i++ {
					body := fmt.Sprintf(`{"amount":"1","idempotency_key":"%d-%d-%d"}`, clients, c, i)
					at := time.Now()
					response, err := client.Post(w.http.URL+fmt.Sprintf("/v1/wallets/%d/deposit", 1+c%50),
						"application/json", strings.NewReader(body))
					if err != nil {
						t.Error(err)
						return
					}
					response.Body.Close()
					mu.Lock()
					switch {
					case response.StatusCode == 200:
						took = append(took, time.Since(at))
					case response.StatusCode == 503 && response.Header.Get("Retry-After") != "":
						refused++
					default:
						t.Errorf("%d, Retry-After %q", response.StatusCode,
							response.Header.Get("Retry-After"))
					}
					mu.Unlock()
					if response.StatusCode == 503 {
						time.Sleep(100 * time.Millisecond) // sooner than it is told
					}
				}
			})
		}
		working.Wait()
		slices.Sort(took)
		return took, refused
	}
	calm, surplus := run(queue, 3*time.Second)
	if surplus > 0 {
		t.Errorf("%d of as many requests as the queue holds were refused", surplus)
	}
	flooded, refused := run(100, 5*time.Second)
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	t.Logf("calm: %d served, median %v, p99 %v; flood: %d served, median %v, p99 %v, %d refused; heap %d MB",
		len(calm), calm.at(.5), calm.at(.99), len(flooded), flooded.at(.5), flooded.at(.99), refused,
		memory.HeapAlloc>>20)
	if len(calm) < 50 || refused < 9*len(flooded) {
		t.Fatal("that was no flood")
	}
	if flooded.at(.5) > 2*calm.at(.5) || flooded.at(.99) > 4*calm.at(.99) {
		t.Error("what was accepted in the flood took longer")
	}
	if rate, before := float64(len(flooded))/5, float64(len(calm))/3; rate < before/2 {
		t.Errorf("%.0f a second were served in the flood, %.0f before", rate, before)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// FuzzRequest sends anything through the whole handler as far as the writers' queue: each answer is one that
// the contract lists, and whole.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/v1/wallets/1/deposit", "", "k", "application/json", "", []byte(`{"amount":"1"}`))
	f.Add("POST", "/v1/wallets/1/transfer", "", "", "application/json; charset=utf-8", "",
		[]byte(`{"to_id":2,"amount":1.5,"idempotency_key":"k"}`))
	f.Add("POST", "/v1/wallets", "", "", "application/json",
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", []byte(`{"id":1}`))
	f.Add("GET", "/v1/wallets/1/history", "limit=5&since=2026-01-02T03:04:05Z&order=desc", "", "", "",
		[]byte(nil))
	f.Add("GET", "/v1/wallets/1/history", "cursor=YS4xLjI", "", "", "", []byte(nil))
	f.Add("POST", "/v1/wallets/1/holds", "", "k", "application/json", "",
		[]byte(`{"amount":"1","to_id":2,"expires_in":"15m","reference":"r","metadata":{"a":"b"}}`))
	f.Add("POST", "/v1/wallets/1/state", "", "k", "application/json", "",
		[]byte(`{"state":"frozen","note":"n"}`))
	f.Add("POST", "/v1/holds/1-1/capture", "", "k", "application/json", "", []byte(`{"final":false}`))
	f.Add("GET", "/v1/wallets/1/statement", "since=2026-01-02T03:04:05Z", "", "", "", []byte(nil))
	f.Add("GET", "/v1/transactions/1-1", "", "", "", "", []byte(nil))
	f.Add("PUT", "/v1/wallets/1%2f2", "x=%zz", "", "", "", []byte(nil))

	cfg := &config{requestsMax: 10, readConns: 1,
		ledgerConfig: ledgerConfig{requestTimeout: time.Second, queueOpsMax: 10, writers: 1, batchOpsMax: 1},
		relayConfig:  relayConfig{databaseURL: "postgres://127.0.0.1:1/none"}}
	reads, err := openPool(cfg, 1, "none", nil)
	if err != nil {
		f.Fatal(err)
	}
	l := newLedger(cfg.ledgerConfig, reads, nil, nil)
	go func() { // what reaches the ledger is well-formed, and refused
		for op := range l.queue.Queue {
			named := op.note.All || op.kind == kindState || op.amount.IsPositive()
			if op.walletID < 1 || op.kind != kindCreation &&
				(!named || op.key == "" || len(op.key) > keyLenMax) || op.toID < 0 ||
				op.toID == op.walletID || len(op.note.Reference) > noteBytesMax ||
				len(op.note.Metadata) > metadataBytesMax {
				panic(fmt.Sprintf("in the queue: %+v", op))
			}
			op.err = refuse("balance_limit", "refused by the test")
			close(op.done)
		}
	}()
	keys := &gate.Keyring{}
	keys.Load()
	s := newServer(cfg, l, nil, keys)
	s.Started.Store(true)
	f.Fuzz(func(t *testing.T, method, path, query, key, contentType, trace string, body []byte) {
		r, err := http.NewRequest(method, "http://wallet/", bytes.NewReader(body))
		if err != nil {
			t.Skip()
		}
		r.URL.Path, r.URL.RawQuery, r.RequestURI = "/"+strings.TrimPrefix(path, "/"), query, "/"
		r.RemoteAddr = "192.0.2.1:1"
		for name, value := range map[string]string{"Idempotency-Key": key, "Content-Type": contentType,
			"Traceparent": trace, "X-Request-Id": trace} {
			if value != "" {
				r.Header.Set(name, value)
			}
		}
		recorder := httptest.NewRecorder()
		s.public.ServeHTTP(recorder, r)
		status, text := recorder.Code, recorder.Body.String()
		if status < 400 || method == http.MethodHead {
			return
		}
		var p struct {
			Status       int
			Code, Detail string
		}
		err = json.Unmarshal([]byte(text), &p)
		if err != nil || p.Status != status || s.Problems[p.Code].Status != status || p.Detail == "" {
			t.Fatalf("%s %q?%q %q: %d %s", method, path, query, body, status, text)
		}
		if status == 500 {
			t.Fatalf("%s %q?%q %q: %s", method, path, query, body, text)
		}
	})
}
