// Package look shows operators a service at work: one HTML page, and the snapshot in JSON that it asks for
// once a second.
//
// It touches what its Source tells, and keeps no history but the last few events: what moves is the
// difference of two snapshots, which the page forms. It promises that the page holds no data and asks nobody
// else for anything, that each number is one of the metrics, and that however many look, the metrics are read
// twice a second at most, and not at all when nobody does.
package look

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"wallet/internal/api"
	"wallet/internal/gate"
	"wallet/internal/metric"
)

var (
	//go:embed page.html
	html string
	//go:embed page.css
	css string
	//go:embed page.js
	js string
)

// policy lets the page run its own script and style, each known by its hash, and ask this address. There is
// no way to make HTML out of text (trusted types).
var policy = "default-src 'none'; script-src " + hash(js) + "; style-src " + hash(css) + "; img-src data:; " +
	"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " +
	"require-trusted-types-for 'script'; trusted-types 'none'"

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// Headers of the page and of the snapshot. That nobody stores them, api says.
var (
	header = map[string]string{
		"Content-Type":                 "text/html; charset=utf-8",
		"Content-Security-Policy":      policy,
		"Cross-Origin-Opener-Policy":   "same-origin",
		"Cross-Origin-Resource-Policy": "same-origin",
		"Referrer-Policy":              "no-referrer",
	}
	ours = map[string]string{"Cross-Origin-Resource-Policy": "same-origin"}
)

// Source is what there is to show.
type Source struct {
	Server  *api.Server
	Metrics func(*metric.Writer)

	// Refusal is what only an operator can put right, in the words that the log has; or empty: a string. It
	// may be nil, and so may Events, where there is no such thing.
	Refusal *atomic.Value
	Events  *Recent

	// Plain are the members of an event that everybody sees who may look, Private those for whom may read as
	// well.
	Plain, Private []string
}

// Page serves both.
type Page struct {
	Source
	began time.Time

	mu     sync.Mutex
	last   moment
	lastAt time.Time
}

// moment is what all who look at the same time see alike.
type moment struct {
	At      time.Time     `json:"at"`
	Uptime  float64       `json:"uptime_seconds"` // untouched by steps of the clock
	Phase   string        `json:"phase"`
	Refusal string        `json:"refusal,omitempty"`
	Metrics metric.Values `json:"metrics"`
}

type snapshot struct {
	moment
	Events []map[string]any `json:"events"` // the newest first
}

// New makes a page. The service begins now.
func New(s Source) *Page { return &Page{Source: s, began: time.Now()} }

// HTML is an api.Route's Handle. The page says whether a key is needed, so that it need not find out by being
// refused.
func (p *Page) HTML(*http.Request) (*api.Reply, error) {
	need := ""
	if !p.Server.Keys.Empty() {
		need = " data-key"
	}
	fill := strings.NewReplacer("{{key}}", need, "{{css}}", css, "{{js}}", js)
	return &api.Reply{Body: []byte(fill.Replace(html)), Header: header}, nil
}

// Status is an api.Route's Handle: the snapshot. With the query parameter private=1 the events have their
// private members, for a key of the scope read as well.
func (p *Page) Status(r *http.Request) (*api.Reply, error) {
	query, err := api.ReadQuery(r, "private")
	if err != nil {
		return nil, err
	}
	private, err := query.Integer("private", 0, 0, 1)
	if err != nil {
		return nil, err
	}
	shown := p.Plain
	if private == 1 {
		if _, err := p.Server.Admit(r, gate.Read); err != nil {
			return nil, err
		}
		shown = append(shown[:len(shown):len(shown)], p.Private...)
	}
	s := snapshot{p.now(), []map[string]any{}}
	if p.Events != nil {
		s.Events = p.Events.last(shown)
	}
	body, err := json.Marshal(s)
	return &api.Reply{Body: body, Header: ours}, err
}

// now is a moment that is half a second old at most.
func (p *Page) now() moment {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last.Metrics == nil || time.Since(p.lastAt) > time.Second/2 {
		p.last = moment{Phase: p.Server.Phase(), Metrics: make(metric.Values)}
		if p.Refusal != nil {
			p.last.Refusal = p.Refusal.Load().(string)
		}
		p.Metrics(p.last.Metrics.Collect())
		p.lastAt = time.Now()
		p.last.At, p.last.Uptime = p.lastAt.UTC(), p.lastAt.Sub(p.began).Seconds()
	}
	return p.last
}

// RecentMax is how many events a Recent keeps.
const RecentMax = 20

// Recent keeps copies of the last events that were published. Safe for concurrent use; the zero value is
// empty. It takes its memory once, as much as its largest events need.
type Recent struct {
	mu    sync.Mutex
	kept  [RecentMax]published
	count int // of all that were added
}

type published struct {
	id      string
	payload []byte // a JSON object
	at      time.Time
}

// Add adds an event, whose payload is a JSON object, and takes nothing of it.
func (r *Recent) Add(id string, payload []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := &r.kept[r.count%RecentMax]
	e.id, e.payload, e.at = id, append(e.payload[:0], payload...), time.Now()
	r.count++
}

// last is the events, the newest first: id, published_at, and the members asked for.
func (r *Recent) last(members []string) []map[string]any {
	r.mu.Lock()
	defer r.mu.Unlock()
	events := []map[string]any{}
	for n := r.count - 1; n >= max(0, r.count-RecentMax); n-- {
		e := &r.kept[n%RecentMax]
		var payload map[string]any
		_ = json.Unmarshal(e.payload, &payload) // what cannot be read shows its id
		event := map[string]any{"id": e.id, "published_at": e.at.UTC()}
		for _, name := range members {
			if value, has := payload[name]; has {
				event[name] = value
			}
		}
		events = append(events, event)
	}
	return events
}
