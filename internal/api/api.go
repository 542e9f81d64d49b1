// Package api serves HTTP operations out of one table of routes. Around each stand admission (gate), a
// deadline, the problem document of an error or a panic, one log line, statistics; the same table makes the
// OpenAPI document.
//
// It touches nothing but requests and answers. Each request gets one answer, and no refusal is without a row
// in the table of problems. What bodies, queries and headers say is read in read.go, the document made in
// openapi.go.
package api

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"wallet/internal/gate"
	"wallet/internal/metric"
)

// Route is one operation: what runs, who may, and what the OpenAPI document says of it.
type Route struct {
	Method, Path string
	Scope        gate.Scope
	Handle       func(*http.Request) (*Reply, error) // its error becomes a problem document
	Status       int                                 // of a successful answer; 0: 200
	Doc          Doc
}

// Doc is what the OpenAPI document says of a route. Schemas, fields and parameters are named; Contract has
// them.
type Doc struct {
	Summary  string
	ID       string // schema of what is in braces in the path
	Body     *Shape // of the body; nil: none
	Query    []string
	Required []string          // of the body's fields, or of the query's parameters
	As       map[string]string // fields that have another schema here than elsewhere: the name of that
	Answer   string            // schema, as JSON
	Forms    map[string]string // schemas of the other forms that the answer comes in, by media type
	Refusals string            // codes, space-separated, besides those of what stands around the handler
}

// versioned tells the service's own operations from what is about it: health, metrics, the document. Only
// they wait for its start, and only they are logged when they succeed.
func (r *Route) versioned() bool { return strings.HasPrefix(r.Path, "/v1/") }

// refusals is every code that the route may refuse with, by itself or by what stands around it.
func (r *Route) refusals() []string {
	codes := strings.Fields(r.Doc.Refusals)
	if r.Doc.Body != nil {
		codes = append(codes, "body_malformed", "body_too_large", "content_type_unsupported", "field_unknown",
			"field_duplicate", "idempotency_key_malformed", "idempotency_key_conflict")
	}
	if len(r.Doc.Query) > 0 {
		codes = append(codes, "parameter_malformed")
	}
	if r.Scope != gate.Open {
		codes = append(codes, "unauthenticated", "forbidden", "rate_limited", "overloaded", "starting",
			"unavailable", "internal")
	}
	return codes
}

// Reply is a successful answer.
type Reply struct {
	Body     []byte // JSON without a line's end, which is added, or what Header's Content-Type says
	Replayed bool   // the same request was answered before
	Header   map[string]string
	// Results, where there are any, are the body: {"results":[{"status":200,"body":{...}},...]}. An error
	// becomes the problem document that it would be as an answer of its own.
	Results []Result
	// Stream, where it is set, writes the body instead: beyond the request's deadline, as long as the client
	// keeps reading. An error breaks the connection off, so that no part is taken for the whole.
	Stream func(ctx context.Context, w io.Writer) error
}

// Result is the outcome of one of several operations of a request.
type Result struct {
	Status int // of a success; 0: 200
	Body   []byte
	Err    error
}

// Static is the Handle of a route whose answer is always the same.
func Static(body []byte) func(*http.Request) (*Reply, error) {
	return func(*http.Request) (*Reply, error) { return &Reply{Body: body}, nil }
}

// Metrics is the Handle of a route that tells what write writes, as Prometheus reads it.
func Metrics(write func(*metric.Writer)) func(*http.Request) (*Reply, error) {
	return func(*http.Request) (*Reply, error) {
		var out bytes.Buffer
		write(metric.NewWriter(&out))
		kind := map[string]string{"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
		return &Reply{Body: out.Bytes(), Header: kind}, nil
	}
}

// Refusal is a clear no: a stable code, which Config.Problems has, and a sentence that says what to do.
type Refusal interface {
	error
	Refusal() (code, detail string)
}

type refusal struct{ code, detail string }

func (r *refusal) Error() string                  { return r.code + ": " + r.detail }
func (r *refusal) Refusal() (code, detail string) { return r.code, r.detail }

func refuse(code, format string, args ...any) Refusal {
	return &refusal{code, fmt.Sprintf(format, args...)}
}

// Problem is what all refusals of one code share.
type Problem struct {
	Status int
	Title  string
}

// own are the problems that may be found out here. Some of their codes a service refuses with as well.
var own = map[string]Problem{
	"body_malformed":            {400, "The body is not the JSON object that this route takes"},
	"field_unknown":             {400, "The body has a field that this route does not know"},
	"field_duplicate":           {400, "The body has a field twice"},
	"idempotency_key_malformed": {400, "Not an idempotency key"},
	"idempotency_key_conflict":  {400, "Two different idempotency keys"},
	"parameter_malformed":       {400, "A query parameter with a bad value"},
	"route_not_found":           {404, "No such route"},
	"method_not_allowed":        {405, "Not a method of this route"},
	"body_too_large":            {413, "The body is too large"},
	"content_type_unsupported":  {415, "Not JSON by its content type"},
	"unauthenticated":           {401, "No valid API key"},
	"forbidden":                 {403, "The API key's scopes do not include this"},
	"rate_limited":              {429, "Too many requests"},
	"internal":                  {500, "A fault of ours"},
	"overloaded":                {503, "Too busy"},
	"unavailable":               {503, "Not available"},
	"starting":                  {503, "Not ready"},
}

// Config is what a server is told of its service.
type Config struct {
	Problems map[string]Problem // the service's refusals, by their codes; New adds those of this package

	// The service's words for what is found out here, with the codes overloaded, starting and unavailable.
	Overloaded, Starting, Unavailable Refusal
	// Unreachable says whether an error means that another server was not there, or too slow.
	Unreachable func(error) bool

	Keys        *gate.Keyring
	Limits      *gate.Limiter  // nil: no limit
	Proxies     []netip.Prefix // whose X-Forwarded-For is believed
	Timeout     time.Duration  // of a request
	RequestsMax int64          // at a time; open routes are not refused, but counted
}

// Server serves routes, in as many muxes as there are addresses.
type Server struct {
	Config
	Started  atomic.Bool // the servers that the service needs have been there once
	Draining atomic.Bool // on the way out

	requests   atomic.Int64             // being served
	statistics sync.Map                 // requestLabels -> *metric.Histogram of seconds
	refused    map[string]*atomic.Int64 // by code
}

// brokenOff is the code, in log and metrics, of an answer that was not written to its end.
const brokenOff = "broken_off"

// New makes a server that has not started.
func New(c Config) *Server {
	c.Problems = maps.Clone(c.Problems)
	maps.Copy(c.Problems, own)
	s := &Server{Config: c, refused: make(map[string]*atomic.Int64, len(c.Problems))}
	for code := range c.Problems {
		s.refused[code] = new(atomic.Int64)
	}
	s.refused[brokenOff] = new(atomic.Int64)
	return s
}

// Phase is starting, ready or stopping.
func (s *Server) Phase() string {
	switch {
	case s.Draining.Load():
		return "stopping"
	case s.Started.Load():
		return "ready"
	}
	return "starting"
}

// Mux serves routes, and answers what is none of them. A route that may refuse with what is no problem is a
// programmer's error.
func (s *Server) Mux(routes []Route) *http.ServeMux {
	mux := http.NewServeMux()
	methods := make(map[string][]string)
	for _, r := range routes {
		for _, code := range r.refusals() {
			s.problem(code)
		}
		methods[r.Path] = append(methods[r.Path], r.Method)
		mux.Handle(r.Method+" "+r.Path, s.serve(r))
	}
	for path, allowed := range methods {
		if slices.Contains(allowed, "GET") {
			allowed = append(allowed, "HEAD")
		}
		allow := strings.Join(allowed, ", ")
		mux.Handle(path, s.serve(Route{Path: path, Handle: func(r *http.Request) (*Reply, error) {
			no := refuse("method_not_allowed", "%.100q takes %s.", r.URL.Path, allow)
			return &Reply{Header: map[string]string{"Allow": allow}}, no
		}}))
	}
	mux.Handle("/", s.serve(Route{Path: "other", Handle: func(r *http.Request) (*Reply, error) {
		return nil, refuse("route_not_found",
			"There is no %.100q here. /openapi.json lists the routes.", r.URL.Path)
	}}))
	return mux
}

// Guard lets those whose key has the scope through to a handler that is no route. Others get a problem
// document.
func (s *Server) Guard(path string, needed gate.Scope, handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := s.Admit(r, needed); err != nil {
			no := func(*http.Request) (*Reply, error) { return nil, err }
			s.serve(Route{Path: path, Handle: no}).ServeHTTP(w, r)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

// Profiles adds those of net/http/pprof, for whose key has the scope.
func (s *Server) Profiles(mux *http.ServeMux, needed gate.Scope) {
	for path, profile := range map[string]http.HandlerFunc{
		"": pprof.Index, "cmdline": pprof.Cmdline, "profile": pprof.Profile, "symbol": pprof.Symbol,
		"trace": pprof.Trace,
	} {
		mux.Handle("GET /debug/pprof/"+path, s.Guard("/debug/pprof/", needed, profile))
	}
}

// -----------------------------------------------------------------------------------------------------------
// What stands around every route
// -----------------------------------------------------------------------------------------------------------

type requestIDKey struct{}

type clientKey struct{}

// Client is the name of the API key that a request was admitted by; empty where no keys are in force.
func Client(ctx context.Context) string {
	name, _ := ctx.Value(clientKey{}).(string)
	return name
}

type chargeKey struct{}

// Charge takes more of the client's rate than the one request that it was admitted for: as many as it turned
// out to be. It may leave the client in debt, which its next requests wait for.
func Charge(ctx context.Context, more int) {
	if charge, limited := ctx.Value(chargeKey{}).(func(int)); limited && more > 0 {
		charge(more)
	}
}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

const requestIDChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"

// serve wraps a route's Handle: request id, deadline, the problem document of an error or a panic, one log
// line, statistics.
func (s *Server) serve(route Route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		id := r.Header.Get("X-Request-Id")
		if len(id) > 64 || strings.Trim(id, requestIDChars) != "" || id == "" {
			id = rand.Text()
		}
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), requestIDKey{}, id), s.Timeout)
		defer cancel()
		h := w.Header()
		h["X-Request-Id"] = []string{id}
		h["Content-Type"], h["Cache-Control"], h["X-Content-Type-Options"] = contentJSON, noStore, noSniff
		if s.Draining.Load() {
			// Else Shutdown may close a kept connection just as the next request arrives on it.
			h.Set("Connection", "close")
		}
		if len(r.TransferEncoding) > 0 {
			// It may have had a Content-Length too, which Go does not tell: what follows could be a smuggled
			// request (RFC 9112, 6.1).
			h.Set("Connection", "close")
		}

		answer, client, err := s.admitAndHandle(&route, r.WithContext(ctx), h)
		if answer != nil {
			for name, value := range answer.Header {
				h.Set(name, value)
			}
		}
		var status int
		var body []byte
		code := ""
		if err != nil {
			p := s.problemOf(ctx, err)
			status, code = p.Status, p.Code
			switch status {
			case http.StatusServiceUnavailable:
				h.Set("Retry-After", "1")
			case http.StatusUnauthorized:
				h.Set("WWW-Authenticate", "Bearer")
			}
			h.Set("Content-Type", "application/problem+json")
			body, _ = json.Marshal(p)
		} else {
			status, body = cmp.Or(route.Status, http.StatusOK), answer.Body
			if answer.Results != nil {
				body = s.results(ctx, answer.Results)
			}
			if answer.Replayed {
				h.Set("Idempotent-Replayed", "true")
			}
		}
		streams := err == nil && answer.Stream != nil
		// In a terminal the next prompt begins a line of its own.
		var end []byte
		if strings.HasSuffix(h.Get("Content-Type"), "json") {
			end = lineEnd
		}
		if !streams {
			h.Set("Content-Length", strconv.Itoa(len(body)+len(end)))
		}
		w.WriteHeader(status)
		switch {
		case r.Method == http.MethodHead:
		case streams:
			if err = s.stream(context.WithValue(r.Context(), requestIDKey{}, id), w, answer); err != nil {
				code = brokenOff
			}
		default:
			w.Write(body)
			w.Write(end) // apart: bodies such as Static's are shared
		}
		took := time.Since(started)
		s.observe(route.Path, r.Method, status, took)
		if code != "" {
			s.refused[code].Add(1)
		}
		level := slog.LevelInfo
		if !route.versioned() && status < 400 {
			level = slog.LevelDebug // probes and scrapes
		}
		log(ctx, level, slog.String("method", r.Method), slog.String("path", r.URL.Path),
			slog.Int("status", status), slog.String("code", code), slog.String("client", client),
			slog.Float64("seconds", took.Round(time.Microsecond).Seconds()), slog.String("request_id", id),
			slog.String("trace_id", traceID(r.Header)))
		if code == brokenOff {
			panic(http.ErrAbortHandler) // which net/http knows: the client sees that the body has not ended
		}
	})
}

// results is the body that shows the outcomes of a request's operations.
func (s *Server) results(ctx context.Context, outcomes []Result) []byte {
	body := []byte(`{"results":[`)
	for i, one := range outcomes {
		if i > 0 {
			body = append(body, ',')
		}
		status, text := cmp.Or(one.Status, http.StatusOK), one.Body
		if one.Err != nil {
			p := s.problemOf(ctx, one.Err)
			status = p.Status
			text, _ = json.Marshal(p)
		}
		body = strconv.AppendInt(append(body, `{"status":`...), int64(status), 10)
		body = append(append(append(body, `,"body":`...), text...), '}')
	}
	return append(body, "]}"...)
}

// stream writes a body of any length. It counts as a request as long as it takes.
func (s *Server) stream(ctx context.Context, w http.ResponseWriter, answer *Reply) error {
	s.requests.Add(1)
	defer s.requests.Add(-1)
	err := answer.Stream(ctx, &patientWriter{w, http.NewResponseController(w)})
	if err != nil && ctx.Err() == nil {
		slog.WarnContext(ctx, "answer broken off", "request_id", requestID(ctx), "error", err)
	}
	return err
}

// patientWriter gives a client streamPatience for each part of a body, however many there are.
type patientWriter struct {
	http.ResponseWriter
	control *http.ResponseController
}

const streamPatience = 10 * time.Second

func (w *patientWriter) Write(part []byte) (int, error) {
	// A writer without deadlines, such as a test's, needs none.
	if err := w.control.SetWriteDeadline(time.Now().Add(streamPatience)); err != nil &&
		!errors.Is(err, http.ErrNotSupported) {
		return 0, err
	}
	n, err := w.ResponseWriter.Write(part)
	if err == nil {
		_ = w.control.Flush()
	}
	return n, err
}

// Headers that all answers have alike; not to be changed in place.
var contentJSON, noStore, noSniff = []string{"application/json"}, []string{"no-store"}, []string{"nosniff"}

var lineEnd = []byte{'\n'}

// log writes a request's line, without attributes that say nothing. slog's own functions look up their caller
// each time.
func log(ctx context.Context, level slog.Level, attrs ...slog.Attr) {
	handler := slog.Default().Handler()
	if !handler.Enabled(ctx, level) {
		return
	}
	line := slog.NewRecord(time.Now(), level, "request", 0)
	line.AddAttrs(slices.DeleteFunc(attrs, func(a slog.Attr) bool {
		return a.Value.Kind() == slog.KindString && a.Value.String() == ""
	})...)
	_ = handler.Handle(ctx, line)
}

// admitAndHandle lets a request in, or not: overload first, then the client's rate, then its key, then
// whether we have started. A panic of one request does not end the others.
func (s *Server) admitAndHandle(
	route *Route, r *http.Request, h http.Header,
) (answer *Reply, client string, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			answer, err = nil, fmt.Errorf("panic: %v\n%s", fault, debug.Stack())
		}
	}()
	defer s.requests.Add(-1)
	if s.requests.Add(1) > s.RequestsMax && route.Scope != gate.Open {
		return nil, "", s.Overloaded
	}
	client, err = s.Admit(r, route.Scope)
	if client == "" {
		client = gate.Client(r, s.Proxies)
	} else {
		r = r.WithContext(context.WithValue(r.Context(), clientKey{}, client))
	}
	if s.Limits != nil && (route.Scope != gate.Open || err != nil) {
		if wait := s.Limits.Take(client, h); wait > 0 {
			h.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
			return nil, client, refuse("rate_limited", "This client sends more than %g requests a second. "+
				"Try again after the time in Retry-After.", s.Limits.Rate())
		}
		if route.Doc.Body != nil && route.Doc.Body.List != "" {
			r = r.WithContext(context.WithValue(r.Context(), chargeKey{}, func(more int) {
				s.Limits.Charge(client, more, h)
			}))
		}
	}
	if err != nil {
		return nil, client, err
	}
	if route.versioned() && !s.Started.Load() {
		return nil, client, s.Starting
	}
	answer, err = route.Handle(r)
	return answer, client, err
}

// Admit names the client whose key a request carries; its error is a refusal.
func (s *Server) Admit(r *http.Request, needed gate.Scope) (client string, err error) {
	switch client, err = s.Keys.Admit(r.Header, needed); {
	case errors.Is(err, gate.ErrUnauthenticated):
		err = refuse("unauthenticated", "Send a valid API key as \"Authorization: Bearer KEY\".")
	case errors.Is(err, gate.ErrForbidden):
		err = refuse("forbidden", "The key of %q does not have the scope that this route needs. "+
			"Ask the operator for one that has.", client)
	}
	return client, err
}

// document is an RFC 9457 document. Error repeats Detail under the name that older clients read.
type document struct {
	Type      string `json:"type"`
	Title     string `json:"title"`
	Status    int    `json:"status"`
	Code      string `json:"code"`
	Detail    string `json:"detail"`
	Error     string `json:"error"`
	RequestID string `json:"request_id"`
	Operation *int   `json:"operation,omitempty"` // where it is of one of a list in the body: which, from 0
}

// problemOf turns any error into a document. What is not a refusal is ours: bare outside, whole in the log.
func (s *Server) problemOf(ctx context.Context, err error) *document {
	var no Refusal
	switch {
	case errors.As(err, &no):
	case ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) || s.Unreachable(err):
		slog.WarnContext(ctx, "request not served", "request_id", requestID(ctx), "error", err)
		no = s.Unavailable
	default:
		slog.ErrorContext(ctx, "request failed", "request_id", requestID(ctx), "error", err)
		no = refuse("internal", "Something went wrong on our side. The request id leads to it in our log.")
	}
	code, detail := no.Refusal()
	p := s.problem(code)
	d := &document{"about:blank", p.Title, p.Status, code, detail, detail, requestID(ctx), nil}
	var in *InItem
	if errors.As(err, &in) {
		d.Operation = &in.Item
	}
	return d
}

func (s *Server) problem(code string) Problem {
	p, known := s.Problems[code]
	if !known {
		panic("refusal without a place in the table: " + code)
	}
	return p
}

// -----------------------------------------------------------------------------------------------------------
// Statistics
// -----------------------------------------------------------------------------------------------------------

// requestLabels are what requests are counted by.
type requestLabels struct {
	method, route string
	status        int
}

// observe counts a request. The method is a label only where it is one of ours: labels are bounded.
func (s *Server) observe(path, method string, status int, took time.Duration) {
	if method != http.MethodGet && method != http.MethodPost {
		method = "other"
	}
	labels := requestLabels{method, path, status}
	h, ok := s.statistics.Load(labels)
	if !ok {
		fresh := metric.NewHistogram(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5)
		h, _ = s.statistics.LoadOrStore(labels, fresh)
	}
	h.(*metric.Histogram).Observe(took.Seconds())
}

// WriteMetrics writes, under names that begin with prefix, how many requests there were, how long they took,
// and how many were refused. What is our fault is there before it happens: of a series that begins with the
// first failure a rate does not see that failure.
func (s *Server) WriteMetrics(w *metric.Writer, prefix string) {
	var refusals []metric.Sample
	for _, code := range slices.Sorted(maps.Keys(s.refused)) {
		if n := s.refused[code].Load(); n > 0 || s.Problems[code].Status >= 500 {
			labels := fmt.Sprintf("code=%q", code)
			refusals = append(refusals, metric.Sample{Labels: labels, Value: float64(n)})
		}
	}
	w.Counters(prefix+"_refusals_total", "Requests not answered with success, by code; those of our fault "+
		"from 0 on.", refusals...)
	const help = "Requests by route and status, and how long they took."
	w.Histograms(prefix+"_request_seconds", help, func(yield func(string, *metric.Histogram) bool) {
		s.statistics.Range(func(key, h any) bool {
			is := key.(requestLabels)
			labels := fmt.Sprintf(`method="%s",route="%s",status="%d"`, is.method, is.route, is.status)
			return yield(labels, h.(*metric.Histogram))
		})
	})
}
