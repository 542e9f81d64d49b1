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
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/shopspring/decimal"

	"wallet/internal/api"
	"wallet/internal/book"
	"wallet/internal/export"
	"wallet/internal/gate"
	"wallet/internal/gather"
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
	w := start(t, testEnv(t, "RATE_LIMIT=1", "RATE_BURST=20",
		"API_KEYS="+hashed("a", "read+write", "a-key")+","+hashed("b", "read+write", "b-key")))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`, "Authorization",
		"Bearer b-key")
	var refused int
	for range 40 {
		a := w.get("/v1/wallets/1/balance", "Authorization", "Bearer a-key")
		if a.header.Get("RateLimit-Policy") != `"default";q=20;w=20` || a.header.Get("RateLimit") == "" {
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
	eventually(t, 8*time.Second, "tokens again", func() bool {
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

// TestDashboardAndAlerts: what they ask for is measured, and so is what the operators' page shows.
func TestDashboardAndAlerts(t *testing.T) {
	w := start(t, testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"0.5","idempotency_key":"h"}`)
	w.mustPost(t, 422, "/v1/wallets/1/withdraw", `{"amount":"9","idempotency_key":"w"}`)
	if err := w.ledger.countHolds(context.Background()); err != nil { // as every minute
		t.Fatal(err)
	}
	scrape := func() string {
		recorder := httptest.NewRecorder()
		w.api.operator.ServeHTTP(recorder, httptest.NewRequest("GET", "/metrics", nil))
		return recorder.Body.String()
	}
	measured := scrape()
	well := regexp.MustCompile(`^(# (HELP|TYPE) \w+ .+|(wallet|process|go)_\w+(\{(\w+="[^"]*",?)+\})? \S+)$`)
	for _, line := range strings.Split(strings.TrimSpace(measured), "\n") {
		if !well.MatchString(line) {
			t.Errorf("not Prometheus text: %s", line)
		}
	}
	observers := []string{"dev/observe/grafana.json", "dev/observe/alerts.yaml", "internal/look/page.js"}
	for _, file := range observers {
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

	// The first 500 alerts: by the rule's own expression, whose rate is 0 for a series that was not there.
	alerts := readPage(t, "dev/observe/alerts.yaml")
	form := `alert: WalletErrors\n +expr: sum\(rate\((\w+\{code="internal"\})\[5m\]\)\) > 0\n`
	rule := regexp.MustCompile(form).FindStringSubmatch(alerts)
	if rule == nil {
		t.Fatal("no rule WalletErrors of this form")
	}
	series := regexp.MustCompile(`(?m)^` + strings.ReplaceAll(regexp.QuoteMeta(rule[1]), `\{`,
		`\{(?:[^}]*,)?`) + ` (\S+)$`)
	if _, err := connect(t, w.env["DATABASE_URL"]).Exec(context.Background(),
		`ALTER TABLE entry RENAME TO away`); err != nil {
		t.Fatal(err)
	}
	if a := w.get("/v1/wallets/1/history"); a.status != 500 {
		t.Fatal(a)
	}
	was, is := series.FindStringSubmatch(measured), series.FindStringSubmatch(scrape())
	if was == nil || is == nil || was[1] != "0" || is[1] != "1" {
		t.Errorf("%s goes from %v to %v: the first 500 does not alert", rule[1], was, is)
	}
}

// -----------------------------------------------------------------------------------------------------------
// Contract
// -----------------------------------------------------------------------------------------------------------

// contract is the served OpenAPI document, as far as the test reads it.
type contract struct {
	OpenAPI    string
	Paths      map[string]map[string]operationDoc
	Components struct {
		Schemas   map[string]any
		Responses map[string]responseDoc
		Headers   map[string]headerDoc
	}

	shown map[uintptr]bool // the schemas of members that a value had
}

// operationDoc is what the document says of an operation.
type operationDoc struct {
	Parameters []struct {
		Name, In, Description string
		Required              bool
		Schema, Example       any
	}
	RequestBody struct{ Content contents }
	Responses   map[string]responseDoc
}

// responseDoc is an answer, or a reference to one of the components with a description of its own.
type responseDoc struct {
	Ref         string `json:"$ref"`
	Description string
	Content     contents
	Headers     map[string]struct {
		Ref string `json:"$ref"`
	}
}

type headerDoc struct {
	Required bool
	Schema   any
	Example  any
}

// readContract reads a document, with what its operations refer to in its place.
func readContract(t *testing.T, document string) (c contract) {
	t.Helper()
	decodeJSON(t, document, &c)
	for path, operations := range c.Paths {
		for method, o := range operations {
			for status, response := range o.Responses {
				if response.Ref == "" {
					continue
				}
				name := strings.TrimPrefix(response.Ref, "#/components/responses/")
				is, known := c.Components.Responses[name]
				if !known {
					t.Errorf("%s %s: %s leads nowhere", method, path, response.Ref)
				}
				is.Description = response.Description
				o.Responses[status] = is
			}
			for _, body := range o.RequestBody.Content {
				name, _ := body.Schema["$ref"].(string)
				whole, _ := c.Components.Schemas[strings.TrimPrefix(name, "#/components/schemas/")]
				maps.Copy(body.Schema, whole.(map[string]any))
			}
		}
	}
	return c
}

type contents map[string]struct{ Schema map[string]any } // by media type

// errNotChecked is a keyword of JSON Schema, or a word of it, that conforms does not know.
var errNotChecked = errors.New("this is not checked")

// conforms checks a JSON value against a schema, by each of the schema's keywords.
func (c *contract) conforms(schema, value any) error {
	if schema == true {
		return nil
	}
	s, ok := schema.(map[string]any)
	if !ok {
		return fmt.Errorf("%v is not documented", value)
	}
	for keyword, wants := range s {
		if err := c.demands(s, keyword, wants, value); err != nil {
			return err
		}
	}
	return nil
}

// demands checks a value by one keyword of a schema. As in JSON Schema, a keyword demands nothing of a value
// of another type than its own.
func (c *contract) demands(s map[string]any, keyword string, wants, value any) error {
	text, isText := value.(string)
	number, isNumber := value.(json.Number)
	members, isObject := value.(map[string]any)
	bound := func(is decimal.Decimal) error {
		by := is.Cmp(dec(fmt.Sprint(wants)))
		if by > 0 && keyword[:3] == "max" || by < 0 && keyword[:3] == "min" {
			return fmt.Errorf("%v: %s %v", value, keyword, wants)
		}
		return nil
	}
	switch keyword {
	case "description", "examples", "default": // for readers; TestSchemas checks the values in them
	case "$ref":
		target, known := c.Components.Schemas[strings.TrimPrefix(wants.(string), "#/components/schemas/")]
		if !known {
			return fmt.Errorf("%s leads nowhere", wants)
		}
		return c.conforms(target, value)
	case "allOf":
		for _, part := range asList(wants) {
			if err := c.conforms(part, value); err != nil {
				return err
			}
		}
	case "oneOf":
		fitting := 0
		for _, option := range asList(wants) {
			if c.conforms(option, value) == nil {
				fitting++
			}
		}
		if fitting != 1 {
			return fmt.Errorf("%v fits %d of oneOf", value, fitting)
		}
	case "discriminator": // the schema that it names is the one that fits
		by := wants.(map[string]any)
		name, _ := members[by["propertyName"].(string)].(string)
		return c.conforms(map[string]any{"$ref": fmt.Sprint(by["mapping"].(map[string]any)[name])}, value)
	case "type":
		fits, known := map[any]bool{"string": isText, "object": isObject, "array": asList(value) != nil,
			"boolean": value == true || value == false,
			"integer": isNumber && !strings.ContainsAny(number.String(), ".eE")}[wants]
		if !known {
			return fmt.Errorf("type %v: %w", wants, errNotChecked)
		}
		if !fits {
			return fmt.Errorf("%v is no %s", value, wants)
		}
	case "enum":
		if !slices.Contains(asList(wants), value) {
			return fmt.Errorf("%v is none of %v", value, wants)
		}
	case "pattern":
		if isText && !regexp.MustCompile(wants.(string)).MatchString(text) {
			return fmt.Errorf("%q does not match %s", text, wants)
		}
	case "format":
		var err error
		switch _, isTime := time.Parse(time.RFC3339, text); {
		case wants == "date-time" && isText:
			err = isTime
		case wants == "int64" && isNumber:
			_, err = number.Int64()
		case wants != "date-time" && wants != "int64":
			err = fmt.Errorf("format %v: %w", wants, errNotChecked)
		}
		return err
	case "minLength", "maxLength":
		if isText {
			return bound(decimal.NewFromInt(int64(utf8.RuneCountInString(text))))
		}
	case "minItems", "maxItems":
		if list, isList := value.([]any); isList {
			return bound(decimal.NewFromInt(int64(len(list))))
		}
	case "maxProperties":
		if isObject {
			return bound(decimal.NewFromInt(int64(len(members))))
		}
	case "minimum", "maximum":
		if isNumber {
			return bound(dec(number.String()))
		}
	case "items":
		for i, item := range asList(value) {
			if err := c.conforms(wants, item); err != nil {
				return fmt.Errorf("%d: %w", i, err)
			}
		}
	case "dependentRequired":
		for name, others := range wants.(map[string]any) {
			if _, there := members[name]; there {
				if err := c.demands(s, "required", others, value); err != nil {
					return err
				}
			}
		}
	case "required":
		for _, name := range asList(wants) {
			if _, there := members[name.(string)]; isObject && !there {
				return fmt.Errorf("lacks %s", name)
			}
		}
	case "properties":
		for name, property := range wants.(map[string]any) {
			if member, there := members[name]; there {
				if err := c.conforms(property, member); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				if c.shown != nil {
					c.shown[reflect.ValueOf(property).Pointer()] = true
				}
			}
		}
	case "additionalProperties":
		known, _ := s["properties"].(map[string]any)
		for name, member := range members {
			if _, ok := known[name]; !ok {
				if err := c.conforms(wants, member); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
		}
	default:
		return fmt.Errorf("keyword %s: %w", keyword, errNotChecked)
	}
	return nil
}

func asList(v any) []any { list, _ := v.([]any); return list }

// schemas visits a schema and those within.
func schemas(schema any, visit func(map[string]any)) {
	s, ok := schema.(map[string]any)
	if !ok {
		return
	}
	visit(s)
	for _, part := range slices.Concat(asList(s["oneOf"]), asList(s["allOf"]),
		[]any{s["items"], s["additionalProperties"]}) {
		schemas(part, visit)
	}
	properties, _ := s["properties"].(map[string]any)
	for _, property := range properties {
		schemas(property, visit)
	}
}

// TestSchemas: every keyword in the document is one that TestContract checks, each example and default is as
// its schema says, everything has a description and an example, and no schema is there for nothing. Whether
// a key is asked for is as it is.
func TestSchemas(t *testing.T) {
	documented := func(keys string) string {
		keyring, err := gate.NewKeyring(keys, "")
		if err != nil {
			t.Fatal(err)
		}
		s := &server{Server: api.New(api.Config{Problems: problems, Keys: keyring})}
		return string(s.OpenAPI(s.routes(), apiContract))
	}
	if open := documented(""); strings.Contains(open, "bearer") || strings.Contains(open, `"key": []`) {
		t.Error("the document of a service without keys asks for one")
	}
	document := documented(hashed("a", "read", "k"))
	asks := strings.Count(document, `"key": []`)
	if asks != 1 || strings.Count(document, `"security": []`) != len(openRoutes) {
		t.Error("the document of a service with keys does not ask for one, except on its open routes")
	}
	c := readContract(t, document)
	operations := make(map[string]bool)
	var all []any
	unused := maps.Clone(c.Components.Schemas)
	for _, schema := range c.Components.Schemas {
		all = append(all, schema)
	}
	for name, header := range c.Components.Headers {
		if err := c.conforms(header.Schema, header.Example); err != nil {
			t.Errorf("example of %s: %v", name, err)
		}
	}
	for path, methods := range c.Paths {
		for method, o := range methods {
			operations[strings.ToUpper(method)+" "+path] = true
			for _, parameter := range o.Parameters {
				if parameter.Description == "" {
					t.Errorf("%s has no description", parameter.Name)
				}
				if err := c.conforms(parameter.Schema, parameter.Example); err != nil {
					t.Errorf("example of %s: %v", parameter.Name, err)
				}
				all = append(all, parameter.Schema)
			}
			bodies := []contents{o.RequestBody.Content}
			for _, response := range o.Responses {
				bodies = append(bodies, response.Content)
				for name, header := range response.Headers {
					_, known := c.Components.Headers[name]
					if !known || header.Ref != "#/components/headers/"+name {
						t.Errorf("%s: %s leads nowhere", name, header.Ref)
					}
				}
			}
			for _, body := range bodies {
				for _, form := range body {
					all = append(all, form.Schema)
				}
			}
		}
	}
	for _, schema := range all {
		schemas(schema, func(s map[string]any) {
			for keyword, wants := range s {
				if keyword == "discriminator" {
					for kind, target := range wants.(map[string]any)["mapping"].(map[string]any) {
						name := strings.TrimPrefix(target.(string), "#/components/schemas/")
						if c.Components.Schemas[name] == nil {
							t.Errorf("%s: %s leads nowhere", kind, target)
						}
					}
				} else if err := c.demands(s, keyword, wants, nil); errors.Is(err, errNotChecked) {
					t.Errorf("%v: %v", s, err)
				}
			}
			examples := asList(s["examples"])
			if value, there := s["default"]; there {
				examples = append(examples, value)
			}
			for _, example := range examples {
				if err := c.conforms(s, example); err != nil {
					t.Errorf("example of %v: %v", s["description"], err)
				}
			}
			if ref, ok := s["$ref"].(string); ok {
				delete(unused, strings.TrimPrefix(ref, "#/components/schemas/"))
			}
			properties, _ := s["properties"].(map[string]any)
			for name, property := range properties {
				p := property.(map[string]any)
				nested := p["$ref"] != nil || p["items"] != nil // says so itself
				if !nested && (p["description"] == nil || p["examples"] == nil) {
					t.Errorf("%s of %v has no description or no example", name, s["description"])
				}
			}
		})
	}
	for route := range apiContract.Operations {
		if !operations[route] {
			t.Errorf("docs/schemas.json describes %s, which is no route", route)
		}
	}
	for name := range unused {
		t.Errorf("nothing refers to the schema %s", name)
	}
}

// TestConforms: what TestContract finds its answers to be, they are. Each value breaks its schema by one
// keyword.
func TestConforms(t *testing.T) {
	var c contract
	decodeJSON(t, `{"components":{"schemas":{"One":{"properties":{"kind":{"enum":["1"]}}},
		"Two":{"properties":{"kind":{"enum":["2"]},"a":{"type":"string"}}}}}}`, &c)
	const two = `{"oneOf":[{"$ref":"#/components/schemas/One"},{"$ref":"#/components/schemas/Two"}],` +
		`"discriminator":{"propertyName":"kind","mapping":{"1":"#/components/schemas/One",` +
		`"2":"#/components/schemas/Two","3":"#/components/schemas/Three"}}}`
	for _, is := range []struct{ schema, fits, breaks string }{
		{`{"type":"string"}`, `"x"`, `1`}, {`{"type":"integer"}`, `-1`, `1.0`},
		{`{"type":"array"}`, `[]`, `{}`}, {`{"type":"object"}`, `{}`, `[]`},
		{`{"type":"boolean"}`, `false`, `"false"`},
		{`{"enum":["a","b"]}`, `"b"`, `"c"`}, {`{"pattern":"^a+$"}`, `"aa"`, `"ab"`},
		{`{"format":"date-time"}`, `"2026-01-02T03:04:05Z"`, `"yesterday"`},
		{`{"format":"int64"}`, `9223372036854775807`, `9223372036854775808`},
		{`{"minLength":1}`, `"é"`, `""`}, {`{"maxLength":1}`, `"é"`, `"ab"`}, {`{"minimum":1}`, `1`, `0`},
		{`{"dependentRequired":{"a":["b"]}}`, `{"a":1,"b":2}`, `{"a":1}`}, {`{"maximum":9}`, `9`, `10`},
		{`{"maxProperties":1}`, `{"a":1}`, `{"a":1,"b":2}`},
		{`{"minItems":1}`, `["a"]`, `[]`}, {`{"maxItems":1}`, `["a"]`, `["a","b"]`},
		{`{"items":{"type":"string"}}`, `["a"]`, `["a",1]`}, {`{"required":["a"]}`, `{"a":1}`, `{"b":1}`},
		{`{"properties":{"a":{"type":"string"}}}`, `{"a":"1","b":2}`, `{"a":1}`},
		{`{"properties":{"a":true},"additionalProperties":false}`, `{"a":1}`, `{"a":1,"b":2}`},
		{`{"properties":{"a":true},"additionalProperties":{"type":"string"}}`, `{"a":1,"b":"2"}`, `{"b":2}`},
		{`{"allOf":[true,{"minimum":1}]}`, `1`, `0`},
		{`{"oneOf":[{"minimum":1},{"maximum":1}]}`, `2`, `1`}, {`{"oneOf":[{"minimum":3}]}`, `3`, `2`},
		{two, `{"kind":"1"}`, `{"kind":"3"}`}, {two, `{"kind":"2","a":"b"}`, `{"kind":"2","a":1}`},
		{two, `{"kind":"1"}`, `{}`}, {`{"description":"x","examples":[1],"default":2}`, `"y"`, ``},
		{`{"$ref":"#/components/schemas/One"}`, `{"kind":"1"}`, `{"kind":"2"}`},
		{`{"$ref":"#/components/schemas/Three"}`, ``, `1`}, {`{"const":1}`, ``, `1`},
		{`{"type":"number"}`, ``, `1`}, {`{"format":"uuid"}`, ``, `1`}, {`null`, ``, `1`}, {`false`, ``, `1`},
	} {
		var schema, value any
		decodeJSON(t, is.schema, &schema)
		for text, want := range map[string]bool{is.fits: true, is.breaks: false} {
			if text == "" {
				continue
			}
			decodeJSON(t, text, &value)
			if err := c.conforms(schema, value); (err == nil) != want {
				t.Errorf("%s of %s: %v", text, is.schema, err)
			}
		}
	}
}

// contractCheck is a service that is held to its own contract.
type contractCheck struct {
	service  *running
	contract contract
	// What is listed and not yet seen: "post /v1/wallets 201 application/json",
	// "post /v1/wallets 409 wallet_exists", ...
	unseen map[string]bool
}

func newContractCheck(t *testing.T) *contractCheck {
	t.Helper()
	keys := hashed("all", "read+write+operate", "key") + "," + hashed("operator", "operate", "operator-key") +
		"," + hashed("clerk", "read+write", "clerk-key")
	h := &contractCheck{service: start(t, testEnv(t, "API_KEYS="+keys, "RATE_LIMIT=1000000",
		"RATE_BURST=1000000")), unseen: make(map[string]bool)}
	h.contract = readContract(t, h.service.get("/openapi.json").body)
	h.contract.shown = make(map[uintptr]bool)
	for path, operations := range h.contract.Paths {
		for method, operation := range operations {
			for status, response := range operation.Responses {
				parts := strings.Split(response.Description, ", ")
				if status[0] == '2' {
					parts = slices.Collect(maps.Keys(response.Content))
				}
				for _, part := range parts {
					h.unseen[method+" "+path+" "+status+" "+part] = true
				}
				for name := range response.Headers {
					h.unseen[status[:1]+"xx with "+name] = true
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

// isOf says whether a path is one of a route's, such as /v1/wallets/1 of /v1/wallets/{id}.
func isOf(path, route string) bool {
	return regexp.MustCompile("^" + regexp.MustCompile(`\{\w+\}`).ReplaceAllString(route, "[^/]+") + "$").
		MatchString(path)
}

// of finds the route of a target in the contract.
func (h *contractCheck) of(method, target string) (path string, operation operationDoc) {
	target, _, _ = strings.Cut(target, "?")
	for path, operations := range h.contract.Paths {
		if isOf(target, path) {
			return path, operations[strings.ToLower(method)]
		}
	}
	return target, operationDoc{}
}

// check demands that an answer is documented, and crosses it off.
func (h *contractCheck) check(t *testing.T, method, target string, a answer) {
	t.Helper()
	path, operation := h.of(method, target)
	kind := a.header.Get("Content-Type")
	said, value := kind, any(a.body)
	if strings.HasSuffix(kind, "json") && kind != export.Lines {
		decodeJSON(t, a.body, &value)
	}
	if a.status >= 400 {
		said = a.code()
	}
	delete(h.unseen, fmt.Sprintf("%s %s %d %s", strings.ToLower(method), path, a.status, said))
	response := operation.Responses[strconv.Itoa(a.status)]
	if schema := response.Content[kind].Schema; schema == nil {
		t.Errorf("%s %s: %s is not documented", method, target, a)
	} else if err := h.contract.conforms(schema, value); err != nil {
		t.Errorf("%s %s: %s: %v", method, target, a, err)
	}
	documented := make(map[string]bool)
	for name := range response.Headers {
		documented[http.CanonicalHeaderKey(name)] = true
		is, header := a.header.Get(name), h.contract.Components.Headers[name]
		var value any = is
		if _, err := strconv.Atoi(is); err == nil {
			value = json.Number(is)
		}
		if is != "" {
			delete(h.unseen, strconv.Itoa(a.status/100)+"xx with "+name)
			if err := h.contract.conforms(header.Schema, value); err != nil {
				t.Errorf("%s %s: %s: %v", method, target, name, err)
			}
		} else if header.Required {
			t.Errorf("%s %s: %s has no %s, which is documented as required", method, target, a, name)
		}
	}
	for name := range a.header {
		if !documented[name] && !slices.Contains(headersOfTheWeb, name) {
			t.Errorf("%s %s: the header %s is not documented", method, target, name)
		}
	}
}

// headersOfTheWeb need no word of ours.
var headersOfTheWeb = []string{"Cache-Control", "Connection", "Content-Disposition", "Content-Length",
	"Content-Type", "Date", "Trailer", "X-Content-Type-Options"}

func (h *contractCheck) get(t *testing.T, target string, headers ...string) answer {
	t.Helper()
	headers = append([]string{"Authorization", "Bearer key"}, headers...)
	a := h.service.get(target, headers...)
	h.check(t, "GET", target, a)
	return a
}

// post demands besides that a body that was accepted is a documented one, and that what was created is there.
func (h *contractCheck) post(t *testing.T, target, body string, headers ...string) answer {
	t.Helper()
	headers = append([]string{"Authorization", "Bearer key"}, headers...)
	a := h.service.post(target, body, headers...)
	h.check(t, "POST", target, a)
	if a.status >= 300 {
		h.postInBatch(t, target, body, a.code())
		return a
	}
	var sent any
	decodeJSON(t, body, &sent)
	_, operation := h.of("POST", target)
	schema := operation.RequestBody.Content["application/json"].Schema
	if err := h.contract.conforms(schema, sent); err != nil {
		t.Errorf("POST %s accepts %s: %v", target, body, err)
	}
	created := a.header.Get("Location")
	if (a.status == 201) != (created != "") {
		t.Errorf("POST %s: %s, Location %q", target, a, created)
	}
	if created != "" {
		is, was := h.get(t, created), a.json(t)
		for _, name := range []string{"wallet_id", "hold_id"} {
			if is.status != 200 || is.json(t)[name] != was[name] {
				t.Errorf("%s: %s, created as %s", created, is, a)
			}
		}
	}
	return a
}

// postInBatch posts a movement that was refused as a batch's operation: it is refused for the same reason.
func (h *contractCheck) postInBatch(t *testing.T, target, body, code string) {
	t.Helper()
	status := h.service.api.Problems[code].Status
	if !slices.Contains([]int{400, 404, 409, 422}, status) || !json.Valid([]byte(body)) ||
		strings.HasPrefix(code, "idempotency_key") || code == "field_duplicate" {
		return // what is not about the operation
	}
	operation := asOperation(movement{path: target, body: body}, false)
	if operation == "" {
		return
	}
	a := h.service.post(batches, batchOf("in a batch", operation), "Authorization", "Bearer key")
	h.check(t, "POST", batches, a)
	if a.code() != code || !strings.Contains(a.body, `"operation":0`) {
		t.Errorf("%s %s is %s, and %s in a batch: %s", target, body, code, operation, a)
	}
}

// batches is every field of every operation, and what only a batch is refused for.
func (h *contractCheck) batches(t *testing.T) {
	const words = `"reference":"r","metadata":{"a":"b"}`
	h.post(t, "/v1/wallets/16/deposit", `{"amount":"100","idempotency_key":"d"}`)
	for range 3 { // as entries 2 to 4
		key := fmt.Sprint(time.Now().UnixNano())
		h.post(t, "/v1/wallets/16/holds", `{"amount":"5","idempotency_key":"`+key+`"}`)
	}
	operations := func(key func(string) string) []string {
		return []string{key(`{"op":"deposit","wallet_id":16,"amount":"1","currency":"USD",` + words),
			key(`{"op":"withdraw","wallet_id":16,"amount":"1","currency":"USD",` + words),
			key(`{"op":"transfer","wallet_id":16,"to_id":17,"amount":"1","currency":"USD",` + words),
			key(`{"op":"hold","wallet_id":16,"amount":"1","to_id":17,"expires_in":"1h",` +
				`"currency":"USD",` + words),
			key(`{"op":"capture","hold_id":"16-2","amount":"1","to_id":17,"final":false,` + words),
			key(`{"op":"void","hold_id":"16-3",` + words),
			key(`{"op":"reverse","transaction_id":"16-1","amount":"1",` + words)}
	}
	bare := func(operation string) string { return operation + "}" }
	n := 0
	keyed := func(operation string) string {
		n++
		return fmt.Sprintf(`%s,"idempotency_key":"e%d"}`, operation, n)
	}
	together := batchOf("b", operations(bare)...)
	for range 2 {
		if a := h.post(t, batches, together); a.status != 200 {
			t.Error(a)
		}
	}
	h.get(t, "/v1/wallets/16/history")
	h.get(t, "/v1/transactions/16-5")
	h.post(t, batches, eachOf(append(operations(keyed), `{"op":"void","hold_id":"16-3"}`)...))
	h.post(t, batches, `{"atomic":true,"idempotency_key":"c","operations":[`+operations(bare)[0]+`]}`)

	h.post(t, batches, batchOf("b", operations(bare)[:1]...))
	h.post(t, batches, batchOf("k", operations(keyed)...))
	h.post(t, batches, batchOf("k", `{"op":"pay"}`))
	h.post(t, batches, batchOf("k"))
	h.post(t, batches, `{"operations":[`+operations(bare)[0]+`]}`)
	h.post(t, batches, `{"idempotency_key":"k","operations":[`+strings.Repeat(" ", manyBytesMax)+`]}`)
	h.post(t, batches, batchOf("k", `{"op":"deposit","wallet_id":1,"amount":"1","amount":"1"}`))
}

// taking is those of the routes below whose body has a field.
func (h *contractCheck) taking(field string) (targets []string) {
	for _, target := range postRoutes {
		_, operation := h.of("POST", target)
		properties := operation.RequestBody.Content["application/json"].Schema["properties"].(map[string]any)
		if properties[field] != nil {
			targets = append(targets, target)
		}
	}
	return targets
}

// The routes that the contract's test calls, for wallets, holds and transactions that are there.
const (
	creations   = "/v1/wallets"
	batches     = "/v1/batches"
	deposits    = "/v1/wallets/1/deposit"
	withdrawals = "/v1/wallets/1/withdraw"
	transfers   = "/v1/wallets/1/transfer"
	holds       = "/v1/wallets/1/holds"
	captures    = "/v1/holds/1-4/capture"
	voids       = "/v1/holds/1-4/void"
	reversals   = "/v1/transactions/1-1/reverse"
	states      = "/v1/wallets/1/state"
)

var (
	movesMoney = []string{deposits, withdrawals, transfers, holds, captures, voids, reversals, states}
	postRoutes = append([]string{creations, batches}, movesMoney...)
	getRoutes  = []string{"/v1/wallets", "/v1/wallets/1", "/v1/wallets/1/balance", "/v1/wallets/1/history",
		"/v1/wallets/1/statement", "/v1/wallets/1/holds", "/v1/wallets/1/transactions?idempotency_key=d",
		"/v1/holds/1-4", "/v1/transactions?reference=r", "/v1/transactions/1-1"}
	openRoutes = []string{"/openapi.json", "/healthz", "/readyz"}
)

// right is what a right body for each of them says, besides its key.
var right = map[string]map[string]string{
	creations: {"id": `9`}, deposits: {"amount": `"1"`}, withdrawals: {"amount": `"1"`},
	transfers: {"amount": `"1"`, "to_id": `2`}, holds: {"amount": `"1"`}, captures: {"amount": `"1"`},
	voids: {}, reversals: {"amount": `"1"`}, states: {"state": `"open"`},
	batches: {"operations": `[{"op":"deposit","wallet_id":1,"amount":"1"}]`},
}

// body is a right one for a route but for changes: a name and what is said instead, empty for nothing.
func body(target string, changes ...string) string {
	members := map[string]string{"idempotency_key": `"k"`}
	maps.Copy(members, right[target])
	for i := 0; i < len(changes); i += 2 {
		members[changes[i]] = changes[i+1]
	}
	var said []string
	for _, name := range slices.Sorted(maps.Keys(members)) {
		if members[name] != "" {
			said = append(said, fmt.Sprintf("%q:%s", name, members[name]))
		}
	}
	return "{" + strings.Join(said, ",") + "}"
}

// everywhere calls each route in a way that is right but for the cause that a test has set up.
func (h *contractCheck) everywhere(t *testing.T, headers ...string) {
	t.Helper()
	for _, target := range getRoutes {
		h.get(t, target, headers...)
	}
	for _, target := range postRoutes {
		key := fmt.Sprintf(`"%d"`, time.Now().UnixNano())
		h.post(t, target, body(target, "idempotency_key", key), headers...)
	}
}

// TestContract causes every answer that the OpenAPI document lists, each refusal in a subtest of its cause.
// It finds each answer documented: status, code and shape.
func TestContract(t *testing.T) {
	h := newContractCheck(t)
	if h.contract.OpenAPI != "3.1.0" {
		t.Errorf("OpenAPI %s", h.contract.OpenAPI)
	}
	h.post(t, deposits, `{"amount":"100","idempotency_key":"d"}`)
	h.post(t, withdrawals, `{"amount":"1","idempotency_key":"w"}`)
	h.post(t, transfers, `{"amount":"1","to_id":2,"idempotency_key":"t"}`)
	h.post(t, holds, `{"amount":"5","idempotency_key":"h"}`)
	h.post(t, "/v1/wallets/3/deposit", `{"amount":"99999999999999999999","idempotency_key":"d"}`)
	h.post(t, creations, `{"id":4,"currency":"EUR"}`)

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
	id := regexp.MustCompile(`/(\d)`) // where a target's begins
	for _, c := range []struct {
		cause string
		do    func(t *testing.T)
	}{
		{"nothing", each(slices.Concat(getRoutes, openRoutes),
			func(t *testing.T, target string) { h.get(t, target) })},
		{"HEAD", each(slices.Concat(getRoutes, openRoutes), h.head)},
		{"amounts", each(h.taking("amount"), func(t *testing.T, target string) {
			for _, amount := range []string{"x", "1e3", "-1", "123456789012345678901", "0.001"} {
				h.post(t, target, body(target, "amount", `"`+amount+`"`))
			}
		})},
		{"bodies", each(postRoutes, func(t *testing.T, target string) {
			open := strings.TrimSuffix(body(target), "}")
			h.post(t, target, open)
			h.post(t, target, body(target, "idempotency_key", `"`+strings.Repeat("k", bodyBytesMax)+`"`))
			h.post(t, target, body(target), "Content-Type", "text/plain")
			h.post(t, target, body(target, "x", "1"))
			h.post(t, target, open+`,"idempotency_key":"k"}`)
		})},
		{"members left out", each(movesMoney, func(t *testing.T, target string) {
			_, operation := h.of("POST", target)
			schema := operation.RequestBody.Content["application/json"].Schema
			for _, name := range asList(schema["required"]) {
				a := h.post(t, target, body(target, name.(string), ""))
				if a.code() != "field_missing" {
					t.Errorf("%s without %s: %s", target, name, a)
				}
			}
		})},
		{"idempotency keys", func(t *testing.T) {
			for _, target := range postRoutes {
				h.post(t, target, body(target, "idempotency_key", `""`))
				h.post(t, target, body(target), "Idempotency-Key", "other")
			}
			for _, target := range movesMoney {
				h.post(t, target, body(target, "idempotency_key", `"d"`))
				h.post(t, target, body(target, "idempotency_key", ""))
			}
			h.post(t, creations, `{"currency":"USD"}`)
			h.post(t, creations, `{"currency":"EUR","idempotency_key":"c"}`)
			h.post(t, creations, `{"currency":"USD","idempotency_key":"c"}`)
		}},
		{"currencies", func(t *testing.T) {
			for _, target := range h.taking("currency") {
				h.post(t, target, body(target, "currency", `"usd"`))
				h.post(t, target, body(target, "currency", `"QQQ"`))
				if target != creations {
					h.post(t, target, body(target, "currency", `"USD"`, "idempotency_key", `"`+target+`"`))
					h.post(t, target, body(target, "currency", `"EUR"`))
				}
			}
			h.post(t, captures, body(captures, "to_id", "4"))
		}},
		{"wallets, holds and transactions", func(t *testing.T) {
			for _, target := range getRoutes {
				if id.MatchString(target) {
					h.get(t, id.ReplaceAllString(target, "/x$1"))
					h.get(t, id.ReplaceAllString(target, "/9$1"))
				}
			}
			for _, target := range movesMoney {
				h.post(t, id.ReplaceAllString(target, "/x$1"), body(target))
				if target != deposits { // which would make the wallet
					h.post(t, id.ReplaceAllString(target, "/9$1"), body(target))
				}
			}
			for _, target := range h.taking("to_id") {
				h.post(t, target, body(target, "to_id", `"x"`))
				h.post(t, target, body(target, "to_id", `1`))
			}
			h.post(t, creations, `{"id":"x","currency":"USD"}`)
			h.post(t, creations, `{"id":4,"currency":"EUR"}`)
		}},
		{"balances", func(t *testing.T) {
			for _, target := range []string{withdrawals, transfers, holds} {
				h.post(t, target, body(target, "amount", `"10000"`))
			}
			h.post(t, "/v1/wallets/3/deposit", body(deposits))
			h.post(t, transfers, body(transfers, "to_id", "3"))
			h.post(t, captures, body(captures, "to_id", "3"))
			now := time.Now().UTC().Format(time.RFC3339Nano)
			for _, query := range []string{"seq=1", "seq=99", "min_seq=1", "min_seq=99", "at=" + now,
				"seq=1&at=" + now} {
				h.get(t, "/v1/wallets/1/balance?"+query)
			}
			if a := h.get(t, "/v1/wallets/1/balance?seq=&at="+now); a.status != 200 {
				t.Errorf("an empty parameter: %s", a)
			}
		}},
		{"holds", h.holds},
		{"reversals", h.reversals},
		{"states", h.states},
		{"words", h.words},
		{"batches", h.batches},
		{"lists", h.lists},
		{"statements", h.statements},
		{"an unknown API key", everywhere("Authorization", "Bearer wrong")},
		{"an API key for something else", func(t *testing.T) {
			h.everywhere(t, "Authorization", "Bearer operator-key")
			h.post(t, states, body(states), "Authorization", "Bearer clerk-key")
		}},
		{"too many requests of one client", func(t *testing.T) {
			limits := h.service.api.Limits
			h.service.api.Limits = gate.NewLimiter(0.001, 0)
			h.everywhere(t)
			h.service.api.Limits = limits
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
			for _, refusal := range slices.Sorted(maps.Keys(h.unseen)) {
				t.Errorf("documented but not caused: %s", refusal)
			}
			for name, schema := range h.contract.Components.Schemas {
				schemas(schema, func(s map[string]any) {
					properties, _ := s["properties"].(map[string]any)
					for member, property := range properties {
						if !h.contract.shown[reflect.ValueOf(property).Pointer()] {
							t.Errorf("documented but in no answer: %s of %s", member, name)
						}
					}
				})
			}
		}},
	} {
		t.Run(c.cause, c.do)
	}
}

// head demands that HEAD is what GET says, without a body.
func (h *contractCheck) head(t *testing.T, target string) {
	t.Helper()
	r, _ := http.NewRequest("HEAD", h.service.http.URL+target, nil)
	r.Header.Set("Authorization", "Bearer key")
	is, want := h.service.do(r), h.get(t, target)
	if is.status != want.status || is.body != "" {
		t.Errorf("HEAD %s: %s", target, is)
	}
	for _, name := range []string{"Content-Type", "Content-Length", "Link"} {
		if is.header.Get(name) != want.header.Get(name) {
			t.Errorf("HEAD %s: %s %q, of GET %q", target, name, is.header.Get(name), want.header.Get(name))
		}
	}
}

// holds is every way that a hold goes, and each that it does not.
func (h *contractCheck) holds(t *testing.T) {
	place := func(more string) { // as entries 2 to 4, and 9
		h.post(t, "/v1/wallets/10/holds", `{"amount":"10",`+more+`}`)
	}
	end := func(seq int, how, more string) {
		h.post(t, fmt.Sprintf("/v1/holds/10-%d/%s", seq, how), `{`+more+`}`)
	}
	capture := func(seq int, more string) { end(seq, "capture", more) }
	void := func(seq int, more string) { end(seq, "void", more) }
	const key = `"idempotency_key":"k"`
	h.post(t, "/v1/wallets/10/deposit", `{"amount":"100","idempotency_key":"d"}`)
	place(`"expires_in":"15m","idempotency_key":"h1"`)
	place(`"to_id":2,"currency":"USD","idempotency_key":"h2"`)
	place(`"idempotency_key":"h3"`)
	place(`"idempotency_key":"h3"`) // again
	h.get(t, "/v1/wallets/10")
	h.get(t, "/v1/wallets/10/balance")

	capture(2, `"amount":"10.01",`+key)
	capture(2, `"amount":"4","final":false,"idempotency_key":"c1"`)
	capture(2, `"idempotency_key":"c2"`)
	capture(3, `"to_id":4,`+key)
	capture(3, `"amount":"4","idempotency_key":"c3"`)
	void(4, `"idempotency_key":"v"`)
	for _, seq := range []int{2, 4} {
		capture(seq, key)
		void(seq, key)
	}
	place(`"expires_in":"1s","idempotency_key":"h4"`)
	eventually(t, 5*time.Second, "expired", func() bool {
		return h.get(t, "/v1/holds/10-9").json(t)["status"] == "expired"
	})
	capture(9, key)
	void(9, key)

	for seq := 1; seq <= 10; seq++ {
		if a := h.get(t, fmt.Sprintf("/v1/transactions/10-%d", seq)); a.status != 200 {
			t.Error(a)
		}
	}
	for _, status := range append(book.HoldStatuses, "") {
		h.get(t, "/v1/wallets/10/holds?status="+status)
	}
	h.get(t, "/v1/wallets/10/history")
	h.get(t, "/v1/wallets/10/statement")
}

// reversals is one of each kind of movement, and what cannot be undone.
func (h *contractCheck) reversals(t *testing.T) {
	reverse := func(id, more string) {
		h.post(t, "/v1/transactions/"+id+"/reverse", `{`+more+`}`)
	}
	const key = `"idempotency_key":"k"`
	h.post(t, "/v1/wallets/11/deposit", `{"amount":"10","idempotency_key":"d"}`)
	h.post(t, "/v1/wallets/11/withdraw", `{"amount":"1","idempotency_key":"w"}`)
	h.post(t, "/v1/wallets/11/transfer", `{"amount":"1","to_id":12,"idempotency_key":"t"}`)
	reverse("11-1", `"amount":"1","idempotency_key":"r1"`)
	reverse("11-2", `"idempotency_key":"r2"`)
	reverse("11-3", `"reference":"undone","metadata":{"a":"b"},"idempotency_key":"r3"`)
	for _, id := range []string{"11-1", "11-2", "11-3", "11-4", "11-5", "12-2"} {
		if a := h.get(t, "/v1/transactions/"+id); a.status != 200 {
			t.Error(a)
		}
	}
	reverse("1-4", key)  // a hold
	reverse("11-4", key) // a reversal
	reverse("11-1", `"amount":"9.01",`+key)
	h.post(t, "/v1/wallets/11/withdraw", `{"amount":"1","idempotency_key":"w2"}`)
	reverse("11-1", key) // 9 are left, and 8 are there
	h.post(t, "/v1/wallets/3/withdraw", `{"amount":"1","idempotency_key":"w"}`)
	h.post(t, "/v1/wallets/3/deposit", `{"amount":"1","idempotency_key":"d2"}`)
	reverse("3-2", key) // to a full wallet
	h.get(t, "/v1/wallets/11/history")
}

// states is each that a wallet can be in, and what it does not let through.
func (h *contractCheck) states(t *testing.T) {
	set := func(state, key string) {
		h.post(t, "/v1/wallets/5/state", fmt.Sprintf(`{"state":%q,"idempotency_key":%q}`, state, key))
		h.get(t, "/v1/wallets/5")
	}
	through := func() {
		for target, body := range map[string]string{
			"/v1/wallets/5/deposit": body(deposits), "/v1/wallets/5/withdraw": body(withdrawals),
			"/v1/wallets/5/transfer": body(transfers), "/v1/wallets/5/holds": body(holds),
			"/v1/transactions/5-2/reverse": body(reversals), captures: body(captures, "to_id", "5"),
		} {
			if a := h.post(t, target, body); a.status != 409 {
				t.Errorf("%s: %s", target, a)
			}
		}
	}
	h.post(t, "/v1/wallets/5/deposit", `{"amount":"10","idempotency_key":"d"}`)
	h.post(t, "/v1/wallets/5/withdraw", `{"amount":"1","idempotency_key":"w"}`)
	set("no_out", "s1")
	set("frozen", "s2")
	through()
	h.post(t, "/v1/wallets/5/state", `{"state":"open","note":"court order 12","idempotency_key":"s3"}`)
	set("closed", "k") // with money in it
	h.post(t, "/v1/wallets/5/withdraw", `{"amount":"all","idempotency_key":"all"}`)
	set("closed", "s4")
	through()
	set("open", "k")
	for _, id := range []string{"5-3", "5-5"} {
		if a := h.get(t, "/v1/transactions/"+id); a.json(t)["kind"] != "state" {
			t.Error(a)
		}
	}
	h.get(t, "/v1/wallets/5/history")
}

// words is what movements say besides, in each answer that shows it, and what they may not say.
func (h *contractCheck) words(t *testing.T) {
	for field, malformed := range map[string]string{"reference": `""`, "metadata": `{"a":1}`, "note": `""`,
		"state": `"shut"`, "expires_in": `"1w"`} {
		for _, target := range h.taking(field) {
			a := h.post(t, target, body(target, field, malformed))
			if a.code() != field+"_malformed" {
				t.Errorf("%s with %s %s: %s", target, field, malformed, a)
			}
		}
	}
	for i, c := range []struct{ target, body string }{
		{"/v1/wallets/13/deposit", body(deposits, "amount", `"100"`)},
		{"/v1/wallets/13/withdraw", body(withdrawals)},
		{"/v1/wallets/13/transfer", body(transfers, "amount", `"all"`)},
		{"/v1/wallets/13/deposit", body(deposits, "amount", `"100"`)},
		{"/v1/wallets/13/holds", body(holds, "amount", `"5"`)},
		{"/v1/holds/13-5/capture", body(captures, "final", "false")},
		{"/v1/holds/13-5/capture", body(captures, "to_id", "2", "final", "false")},
		{"/v1/holds/13-5/void", body(voids)},
		{"/v1/transactions/13-2/reverse", body(reversals)},
	} {
		words := fmt.Sprintf(`"w%d","reference":"a b é","metadata":{"c":"d"}`, i)
		said := strings.Replace(c.body, `"k"`, words, 1)
		if a := h.post(t, c.target, said); a.status >= 300 || a.json(t)["reference"] != "a b é" {
			t.Errorf("%s %s: %s", c.target, said, a)
		}
		id := fmt.Sprintf("/v1/transactions/13-%d", i+1)
		if a := h.get(t, id); a.status != 200 || a.json(t)["reference"] != "a b é" {
			t.Errorf("%s: %s", id, a)
		}
	}
	h.get(t, "/v1/holds/13-5")
	h.get(t, "/v1/wallets/13/holds")
	h.get(t, "/v1/wallets/13/history")
	h.get(t, "/v1/wallets/13/statement")
	if a := h.get(t, "/v1/transactions?reference=a+b+%C3%A9"); strings.Count(a.body, "idempotency_key") != 9 {
		t.Error(a)
	}
}

// lists is each list to its end, and each parameter of each route with what it does not take.
func (h *contractCheck) lists(t *testing.T) {
	for _, target := range getRoutes {
		path, _, _ := strings.Cut(target, "?")
		_, operation := h.of("GET", target)
		needed, bad := false, []string{}
		for _, p := range operation.Parameters {
			if p.In != "query" {
				continue
			}
			bad = append(bad, p.Name+"=%07", p.Name+"=%zz", "x=1")
			needed = needed || p.Required
			if p.Required && !strings.Contains(target, p.Name+"=") {
				t.Errorf("%s is right without its %s, which is documented as required", target, p.Name)
			}
		}
		if a := h.get(t, path); (a.status == 400) != needed {
			t.Errorf("%s: %s, documented as required: %v", path, a, needed)
		}
		for _, query := range bad {
			if a := h.get(t, path+"?"+query); a.code() != "parameter_malformed" {
				t.Errorf("%s?%s: %s", path, query, a)
			}
		}
	}
	link := regexp.MustCompile(`^<(/v1/[^>]*)>; rel="next"$`)
	for target, want := range map[string]int{"/v1/wallets?limit=3": 9, "/v1/wallets/10/holds?limit=1": 4,
		"/v1/wallets/10/holds?limit=1&status=captured": 2, "/v1/wallets/10/history?limit=4": 10,
		"/v1/wallets/10/history?limit=4&order=desc": 10, "/v1/transactions?reference=a+b+%C3%A9&limit=2": 9} {
		got, page := 0, target
		for page != "" {
			a := h.get(t, page)
			var items []any
			if strings.HasPrefix(a.body, "{") {
				items = asList(a.json(t)["holds"])
			} else {
				decodeJSON(t, a.body, &items)
			}
			got, page = got+len(items), ""
			if next := link.FindStringSubmatch(a.header.Get("Link")); next != nil {
				page = next[1]
			}
		}
		if got < want {
			t.Errorf("%s: %d items in all, want %d", target, got, want)
		}
	}
}

// statements is each form of one, whose trailer has the hash of its entries, and one that is broken off.
func (h *contractCheck) statements(t *testing.T) {
	// More has gone in and out than a wallet can hold.
	h.post(t, "/v1/wallets/3/withdraw", `{"amount":"all","idempotency_key":"out"}`)
	h.post(t, "/v1/wallets/3/deposit", `{"amount":"99999999999999999999","idempotency_key":"in"}`)
	now := time.Now().UTC().Format(time.RFC3339Nano)
	for _, target := range []string{"/v1/wallets/3/statement", "/v1/wallets/4/statement",
		"/v1/wallets/5/statement", "/v1/wallets/10/statement?until=" + now,
		"/v1/wallets/13/statement?since=" + now} {
		whole := h.get(t, target).json(t)
		for _, form := range []string{export.JSON, export.Lines, export.CSV} {
			r, _ := http.NewRequest("GET", h.service.http.URL+target, nil)
			r.Header.Set("Authorization", "Bearer key")
			r.Header.Set("Accept", form)
			response, err := h.service.http.Client().Do(r)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(response.Body)
			response.Body.Close()
			if sum := response.Trailer.Get("Statement-Sha256"); err != nil || sum != whole["sha256"] {
				t.Errorf("%s as %s: %v, trailer %q, want %v", target, form, err, sum, whole["sha256"])
			}
			h.check(t, "GET", target, answer{response.StatusCode, response.Header, string(text)})
			if form == export.Lines {
				h.lines(t, string(text), whole)
			}
		}
	}
	h.get(t, "/v1/wallets/1/statement", "Accept", "text/html")

	// What goes wrong after the head has been read: the client cannot take what it gets for a whole.
	admin := connect(t, h.service.env["DATABASE_URL"])
	rename := func(from, to string) {
		sql := "ALTER TABLE entry RENAME COLUMN " + from + " TO " + to
		if _, err := admin.Exec(context.Background(), sql); err != nil {
			t.Fatal(err)
		}
	}
	rename("idempotency_key", "gone")
	for _, form := range []string{export.JSON, export.Lines, export.CSV} {
		a := h.service.get("/v1/wallets/1/statement", "Authorization", "Bearer key", "Accept", form)
		if a.status != 0 {
			t.Errorf("a statement broken off: %s", a)
		}
	}
	rename("gone", "idempotency_key")
}

// lines demands that a statement's lines are its entries, and the last one the rest of it.
func (h *contractCheck) lines(t *testing.T, text string, whole map[string]any) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	entries := asList(whole["entries"])
	if len(lines) != len(entries)+1 {
		t.Fatalf("%d lines for %d entries", len(lines), len(entries))
	}
	for i, entry := range entries {
		var is any
		if decodeJSON(t, lines[i], &is); !reflect.DeepEqual(is, entry) {
			t.Errorf("line %d is %v, entry %v", i, is, entry)
		}
	}
	rest := maps.Clone(whole)
	delete(rest, "entries")
	var last any
	decodeJSON(t, lines[len(entries)], &last)
	if !reflect.DeepEqual(last, any(map[string]any{"statement": rest})) {
		t.Errorf("the last line is %v, want %v", last, rest)
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

// sendRaw sends bytes and returns the status of each response on the connection.
func sendRaw(tb testing.TB, address, request string) (statuses []int) {
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
		for _, status := range sendRaw(t, address, request) {
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
		a := sendRaw(t, w.http.Listener.Addr().String(),
			"GET "+path+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if len(a) != 1 || a[0] < 300 {
			t.Errorf("%s: %v", path, a)
		}
	}
	long := sendRaw(t, w.http.Listener.Addr().String(),
		"GET /healthz HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("y", 2<<20)+"\r\n\r\n")
	if len(long) > 0 && long[0] != 431 {
		t.Errorf("2 MiB of headers: %v", long)
	}
}

// TestSlowClientsHoldNothing: clients that send a byte now and then are cut off, and nobody waits for them.
func TestSlowClientsHoldNothing(t *testing.T) {
	t.Parallel()
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
			$$ BEGIN PERFORM pg_sleep(0.06); RETURN NULL; END $$;
		CREATE TRIGGER slow BEFORE INSERT ON entry FOR EACH STATEMENT EXECUTE FUNCTION slow()`); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}, Timeout: 10 * time.Second}
	runs := 0
	run := func(clients int, how time.Duration) (took latencies, refused int) {
		var mu sync.Mutex
		var working sync.WaitGroup
		began := time.Now()
		runs++
		for c := range clients {
			working.Go(func() {
				for i := 0; time.Since(began) < how; i++ {
					body := fmt.Sprintf(`{"amount":"1","idempotency_key":"%d-%d-%d"}`, runs, c, i)
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
	// once says what was wrong with one flood.
	once := func() (wrong string) {
		calm, surplus := run(queue, 3*time.Second)
		if surplus > 0 {
			t.Errorf("%d of as many requests as the queue holds were refused", surplus)
		}
		flooded, refused := run(100, 5*time.Second)
		var memory runtime.MemStats
		runtime.ReadMemStats(&memory)
		t.Logf("calm: %d served, median %v, p99 %v; flood: %d, median %v, p99 %v, %d refused; heap %d MB",
			len(calm), calm.at(.5), calm.at(.99), len(flooded), flooded.at(.5), flooded.at(.99), refused,
			memory.HeapAlloc>>20)
		rate, before := float64(len(flooded))/5, float64(len(calm))/3
		switch {
		case len(calm) < 25 || refused < 9*len(flooded):
			return "that was no flood"
		case flooded.at(.5) > 2*calm.at(.5) || flooded.at(.99) > 4*calm.at(.99):
			return "what was accepted in the flood took longer"
		case rate < before/2:
			return fmt.Sprintf("%.0f a second were served in the flood, %.0f before", rate, before)
		}
		return ""
	}
	// What else the machine does may hit one of the two halves. A queue that grows does so each time.
	wrong := once()
	for again := 0; wrong != "" && again < 2; again++ {
		t.Log("once more:", wrong)
		wrong = once()
	}
	if wrong != "" {
		t.Error(wrong)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// requestSeeds are what FuzzRequest begins with: each route, each of its fields and parameters.
var requestSeeds = []struct{ method, path, query, key, contentType, trace, body string }{
	{"POST", "/v1/wallets", "", "k", "application/json",
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", `{"id":1,"currency":"USD"}`},
	{"POST", "/v1/wallets/1/deposit", "", "k", "application/json", "",
		`{"amount":"1","currency":"USD","reference":"r","metadata":{"a":"b"}}`},
	{"POST", "/v1/wallets/1/withdraw", "", `"k"`, "application/json", "",
		`{"amount":"all","currency":"USD","reference":"r","metadata":{}}`},
	{"POST", "/v1/wallets/1/transfer", "", "", "application/json; charset=utf-8", "",
		`{"to_id":2,"amount":1.5,"currency":"USD","reference":"é","metadata":{"a":"\u00e9"},` +
			`"idempotency_key":"k"}`},
	{"POST", "/v1/wallets/1/holds", "", "k", "application/json", "", `{"amount":"1","to_id":2,` +
		`"expires_in":"15m","currency":"USD","reference":"r","metadata":{"a":"b"}}`},
	{"POST", "/v1/holds/1-1/capture", "", "k", "application/json", "",
		`{"amount":"1","to_id":"2","final":false,"reference":"r","metadata":{"a":"b"}}`},
	{"POST", "/v1/holds/1-1/void", "", "k", "application/json", "", `{"reference":"r","metadata":{"a":"b"}}`},
	{"POST", "/v1/transactions/1-1/reverse", "", "k", "application/json", "",
		`{"amount":"1","reference":"r","metadata":{"a":"b"}}`},
	{"POST", "/v1/wallets/1/state", "", "k", "application/json", "", `{"state":"frozen","note":"n"}`},
	{"GET", "/v1/wallets", "limit=5&cursor=dy4xLjE", "", "", "", ""},
	{"GET", "/v1/wallets/1", "", "", "", "", ""},
	{"GET", "/v1/wallets/1/balance", "min_seq=1", "", "", "", ""},
	{"GET", "/v1/wallets/1/balance", "at=2026-01-02T03:04:05Z", "", "", "", ""},
	{"GET", "/v1/wallets/1/balance", "seq=1", "", "", "", ""},
	{"GET", "/v1/wallets/1/history", "limit=5&since=2026-01-02T03:04:05Z&order=desc", "", "", "", ""},
	{"GET", "/v1/wallets/1/history", "until=2026-01-02T03:04:05%2B01:00", "", "", "", ""},
	{"GET", "/v1/wallets/1/history", "cursor=YS4xLjI", "", "", "", ""},
	{"GET", "/v1/wallets/1/statement", "since=2026-01-02T03:04:05Z&until=2026-01-03T03:04:05Z", "", "", "",
		""},
	{"GET", "/v1/wallets/1/holds", "status=open&limit=5&cursor=aC4xLjE", "", "", "", ""},
	{"GET", "/v1/wallets/1/transactions", "idempotency_key=k", "", "", "", ""},
	{"GET", "/v1/holds/1-1", "", "", "", "", ""},
	{"GET", "/v1/transactions", "reference=r&limit=5&cursor=ci4xLjE", "", "", "", ""},
	{"GET", "/v1/transactions/1-1", "", "", "", "", ""},
	{"HEAD", "/v1/wallets/1/statement", "", "", "", "", ""},
	{"GET", "/openapi.json", "", "", "", "", ""},
	{"POST", "/v1/batches", "", "", "application/json", "", `{"idempotency_key":"b","operations":[` +
		`{"op":"transfer","wallet_id":1,"to_id":2,"amount":"1.5","currency":"USD","reference":"r"},` +
		`{"op":"hold","wallet_id":1,"amount":"1","expires_in":"1m","metadata":{"a":"b"}},` +
		`{"op":"capture","hold_id":"1-2","to_id":3,"final":false}]}`},
	{"POST", "/v1/batches", "", "", "application/json", "", `{"atomic":false,"operations":[` +
		`{"op":"deposit","wallet_id":1,"amount":"1","idempotency_key":"a"},` +
		`{"op":"withdraw","wallet_id":1,"amount":"all","idempotency_key":"b"},` +
		`{"op":"void","hold_id":"1-2","idempotency_key":"c"},{"op":"x"},` +
		`{"op":"reverse","transaction_id":"1-1","idempotency_key":"d"}]}`},
	{"GET", "/healthz", "", "", "", "", ""},
	{"GET", "/readyz", "", "", "", "", ""},
	{"PUT", "/v1/wallets/1%2f2", "x=%zz", "", "", "", ""},
}

// TestRequestSeeds: FuzzRequest begins with right requests of every route, with each of its fields and
// parameters.
func TestRequestSeeds(t *testing.T) {
	for _, route := range new(server).routes() {
		said, seeds := make(map[string]bool), 0
		for _, seed := range requestSeeds {
			if seed.method != route.Method || !isOf(seed.path, route.Path) {
				continue
			}
			seeds++
			r := httptest.NewRequest(seed.method, seed.path+"?"+seed.query, strings.NewReader(seed.body))
			r.Header.Set("Content-Type", seed.contentType)
			if route.Doc.Body != nil {
				fields, err := api.ReadList(r, route.Doc.Body, func(_ int, item api.Fields) error {
					for name := range item {
						said[name] = true
					}
					return nil
				})
				if err != nil {
					t.Errorf("%s %s: %v", seed.path, seed.body, err)
				}
				for name := range fields {
					said[name] = true
				}
				said["idempotency_key"] = said["idempotency_key"] || seed.key != ""
			}
			query, err := api.ReadQuery(r, route.Doc.Query...)
			if err != nil {
				t.Errorf("%s?%s: %v", seed.path, seed.query, err)
			}
			for name := range query {
				said[name] = true
			}
		}
		if seeds == 0 {
			t.Errorf("no seed for %s %s", route.Method, route.Path)
		}
		want := slices.Clone(route.Doc.Query)
		if route.Doc.Body != nil {
			want = append(want, route.Doc.Body.Fields...)
		}
		for _, name := range want {
			if !said[name] {
				t.Errorf("no seed for %s of %s %s", name, route.Method, route.Path)
			}
		}
	}
}

// FuzzRequest sends anything through the whole handler as far as the writers' queue: each answer is one that
// the contract lists, and whole.
func FuzzRequest(f *testing.F) {
	for _, seed := range requestSeeds {
		f.Add(seed.method, seed.path, seed.query, seed.key, seed.contentType, seed.trace, []byte(seed.body))
	}
	cfg := &config{requestsMax: 10, readConns: 1,
		ledgerConfig: ledgerConfig{requestTimeout: time.Second, queueOpsMax: 10, writers: 1, batchOpsMax: 1},
		relayConfig:  relayConfig{databaseURL: "postgres://127.0.0.1:1/none"}}
	reads, err := openPool(cfg, 1, "none", nil)
	if err != nil {
		f.Fatal(err)
	}
	l := newLedger(cfg.ledgerConfig, reads, nil, nil)
	// What reaches the ledger is well-formed, and refused.
	wellFormed := func(op *book.Operation) bool {
		named := op.Note.All || op.Kind == book.KindState || op.Kind == book.KindRelease ||
			op.Amount.IsPositive()
		return op.WalletID > 0 && (op.Kind == book.KindCreation ||
			named && op.Key != "" && len(op.Key) <= book.KeyLenMax) && op.ToID >= 0 &&
			op.ToID != op.WalletID && len(op.Note.Reference) <= noteBytesMax &&
			len(op.Note.Metadata) <= metadataBytesMax
	}
	l.queue = gather.New(gather.Bounds{Queue: 2000, Workers: 1, Batch: 1, Large: 1, Beside: 1},
		func(batch []*task, release func()) {
			release()
			for _, t := range batch {
				for _, op := range t.ops {
					if !wellFormed(op) {
						panic(fmt.Sprintf("in the queue: %+v", op))
					}
				}
				t.fail(book.Refuse("balance_limit", "refused by the test"))
				close(t.done)
			}
		}, l.drop)
	go l.run(context.Background())
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
