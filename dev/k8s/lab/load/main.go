// Command load moves money through a running service for a while and checks what it is told: for the proof on
// the cluster, where pods die meanwhile.
//
// Every movement is repeated with its key until it has an answer, as a careful client does. What it holds the
// service to:
//   - failed: a request whose first attempt had no answer, or a 5xx. With -strict none may.
//   - lost: a movement without an answer after -patience. None may.
//   - stale: a balance that is older than a movement that was answered before the question, though the
//     question had that movement's seq as min_seq. None may.
//   - behind: the same without min_seq. It may be for a moment, if the put to Redis timed out.
//   - changed: a movement that is answered differently when it is sent once more at the end. None may.
//   - money: the wallets' balances at the end are what was deposited less what was withdrawn. They must be.
//
// The key travels in the body: with an Idempotency-Key header, Go's client would itself repeat a movement
// whose connection broke, and hide what this program counts. (It repeats what it had not sent a byte of, and
// GETs, as every client does.)
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

type config struct {
	url, key string
	length   time.Duration
	workers  int
	wallets  int64
	pause    time.Duration
	patience time.Duration
	timeout  time.Duration
	strict   bool
}

// answer is what came back; status 0 is no answer.
type answer struct {
	status int
	body   []byte
}

func (a answer) failed() bool { return a.status == 0 || a.status >= 500 }

// movement is one that was accepted, to be sent once more at the end.
type movement struct {
	path, body, answer string
}

// report is printed as one JSON line.
type report struct {
	Seconds     float64        `json:"seconds"`
	Operations  int            `json:"operations"`
	PerSecond   int            `json:"per_second"`
	Failed      int            `json:"failed"`
	Lost        int            `json:"lost"`
	Stale       int            `json:"stale"`
	Behind      int            `json:"behind"`
	Limited     int            `json:"limited"` // told to come back later (429), which is no failure
	Repeated    int            `json:"repeated"`
	Changed     int            `json:"changed"`
	MoneyRight  bool           `json:"money_right"`
	P50ms       float64        `json:"p50_ms"`
	P99ms       float64        `json:"p99_ms"`
	MaxMs       float64        `json:"max_ms"`        // of an operation with all its attempts
	LongestGapS float64        `json:"longest_gap_s"` // without any success
	Failures    map[string]int `json:"failures,omitempty"`
	Unexpected  map[string]int `json:"unexpected,omitempty"`
}

// client is one worker: its own numbers, merged at the end.
type client struct {
	cfg   *config
	http  *http.Client
	first int64 // id of the first wallet

	key       string
	n         int
	took      []time.Duration
	successes []time.Time
	failures  map[string]int
	strange   map[string]int
	failed    int
	lost      int
	stale     int
	behind    int
	limited   int
	deposited int64
	moved     []movement
}

func main() {
	var cfg config
	flag.StringVar(&cfg.url, "url", "http://127.0.0.1:8080", "the service")
	flag.StringVar(&cfg.key, "key", "", "API key")
	flag.DurationVar(&cfg.length, "for", 30*time.Second, "how long; SIGTERM ends it earlier")
	flag.IntVar(&cfg.workers, "workers", 8, "clients at a time, each with one connection")
	flag.Int64Var(&cfg.wallets, "wallets", 40, "wallets, new ones each time")
	flag.DurationVar(&cfg.pause, "pause", 10*time.Millisecond, "between a client's operations, on average")
	flag.DurationVar(&cfg.patience, "patience", 2*time.Minute, "for one operation, with all its attempts")
	flag.DurationVar(&cfg.timeout, "timeout", 8*time.Second, "for one attempt")
	flag.BoolVar(&cfg.strict, "strict", false, "a single failed request is a failure of the run")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	r := run(ctx, &cfg)
	line, _ := json.Marshal(r)
	fmt.Println(string(line))
	if r.Lost+r.Stale+r.Changed+len(r.Unexpected) > 0 || !r.MoneyRight || cfg.strict && r.Failed > 0 {
		os.Exit(1)
	}
}

// run goes on until cfg.length is over or ctx ends.
func run(ctx context.Context, cfg *config) report {
	first := time.Now().UnixMilli()*1000 + 1 // wallets that no run before had
	run := strconv.FormatInt(first, 36)
	clients := make([]*client, cfg.workers)
	for i := range clients {
		clients[i] = newClient(cfg, first, fmt.Sprintf("%s-%d", run, i))
	}
	began := time.Now()
	var all sync.WaitGroup
	for i, c := range clients {
		all.Go(func() {
			for id := first + int64(i); id < first+cfg.wallets; id += int64(cfg.workers) {
				c.deposit(id, 1000)
			}
		})
	}
	all.Wait()
	for _, c := range clients {
		all.Go(func() {
			for time.Since(began) < cfg.length && ctx.Err() == nil {
				c.step()
				time.Sleep(time.Duration(rand.Int64N(int64(2*cfg.pause) + 1)))
			}
		})
	}
	all.Wait()
	return conclude(cfg, clients, first, began)
}

func newClient(cfg *config, first int64, key string) *client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	transport.MaxIdleConnsPerHost = 1
	return &client{
		cfg: cfg, http: &http.Client{Transport: transport, Timeout: cfg.timeout}, first: first, key: key,
		failures: make(map[string]int), strange: make(map[string]int),
	}
}

// step is one operation, or two that belong together.
func (c *client) step() {
	id := c.first + rand.Int64N(c.cfg.wallets)
	amount := 1 + rand.Int64N(20)
	switch n := rand.IntN(100); {
	case n < 45:
		to := c.first + rand.Int64N(c.cfg.wallets)
		if to == id {
			to = c.first + (id-c.first+1)%c.cfg.wallets
		}
		c.move(id, "transfer", fmt.Sprintf(`{"amount":"%d","to_id":%d,`, amount, to))
	case n < 65:
		c.deposit(id, amount)
	case n < 75:
		if c.move(id, "withdraw", fmt.Sprintf(`{"amount":"%d",`, amount)) != nil {
			c.deposited -= amount
		}
	case n < 92: // what was answered must be seen by whoever asks afterwards, at whichever replica
		if body := c.deposit(id, amount); body != nil {
			var done, seen struct {
				Seq int64 `json:"seq"`
			}
			if err := json.Unmarshal(body, &done); err != nil {
				c.strange[string(body)]++
				return
			}
			demand := ""
			if n%2 == 0 {
				demand = fmt.Sprintf("?min_seq=%d", done.Seq)
			}
			read := c.do("GET", c.path(id, "balance"+demand), "")
			c.expect(read, 200)
			switch older := json.Unmarshal(read.body, &seen) == nil && seen.Seq < done.Seq; {
			case older && demand != "":
				c.stale++
			case older:
				c.behind++
			}
		}
	case n < 98: // a hold, and its end
		c.hold(id, amount)
	default:
		c.expect(c.do("GET", c.path(id, "history?limit=5"), ""), 200)
	}
}

// hold places a hold, ends it, and takes a part of what it paid back.
func (c *client) hold(id, amount int64) {
	to := c.first + (id-c.first+1)%c.cfg.wallets
	var placed struct {
		ID string `json:"hold_id"`
	}
	body := c.move(id, "holds", fmt.Sprintf(`{"amount":"%d","expires_in":"1h",`, amount))
	if body == nil || json.Unmarshal(body, &placed) != nil {
		return
	}
	if rand.IntN(4) == 0 {
		c.post("/v1/holds/"+placed.ID+"/void", `{`, 200)
		return
	}
	var paid struct {
		ID string `json:"transaction_id"`
	}
	fields := fmt.Sprintf(`{"to_id":%d,"amount":"%d",`, to, 1+rand.Int64N(amount))
	body = c.post("/v1/holds/"+placed.ID+"/capture", fields, 200)
	if body != nil && json.Unmarshal(body, &paid) == nil && rand.IntN(2) == 0 {
		c.post("/v1/transactions/"+paid.ID+"/reverse", `{"amount":"1",`, 200)
	}
}

func (c *client) path(id int64, rest string) string {
	return fmt.Sprintf("/v1/wallets/%d/%s", id, rest)
}

func (c *client) deposit(id, amount int64) []byte {
	body := c.move(id, "deposit", fmt.Sprintf(`{"amount":"%d",`, amount))
	if body != nil {
		c.deposited += amount
	}
	return body
}

// move sends a wallet's movement until it is answered; its body if it was accepted.
func (c *client) move(id int64, what, fields string) []byte {
	status := 200
	if what == "holds" {
		status = 201
	}
	return c.post(c.path(id, what), fields, status)
}

func (c *client) post(path, fields string, status int) []byte {
	c.n++
	body := fmt.Sprintf(`%s"idempotency_key":"%s-%d"}`, fields, c.key, c.n)
	a := c.do("POST", path, body)
	if a.status != status {
		if a.status != 422 || !bytes.Contains(a.body, []byte(`"insufficient_funds"`)) {
			c.expect(a, status)
		}
		return nil
	}
	c.moved = append(c.moved, movement{path, body, string(a.body)})
	return a.body
}

func (c *client) expect(a answer, status int) {
	if a.status != status && a.status != 0 {
		c.strange[fmt.Sprintf("%d %.200s", a.status, a.body)]++
	}
}

// do sends a request until it is answered by something else than a fault, or patience is at its end.
func (c *client) do(method, path, body string) answer {
	began := time.Now()
	for attempt := 0; ; attempt++ {
		a, err := c.once(method, path, body)
		if a.status == http.StatusTooManyRequests {
			c.limited++
			time.Sleep(time.Second)
			attempt--
			continue
		}
		if !a.failed() {
			c.took = append(c.took, time.Since(began))
			c.successes = append(c.successes, time.Now())
			return a
		}
		if attempt == 0 {
			c.failed++
		}
		why := fmt.Sprint(a.status)
		if err != nil {
			why = reason(err)
		}
		c.failures[why]++
		if time.Since(began) > c.cfg.patience {
			c.lost++
			return answer{}
		}
		chance := time.Duration(rand.Int64N(int64(50 * time.Millisecond)))
		time.Sleep(time.Duration(min(attempt, 10))*20*time.Millisecond + chance)
	}
}

// reason is an error without its addresses.
func reason(err error) string {
	for {
		inner, ok := err.(interface{ Unwrap() error })
		if !ok || inner.Unwrap() == nil {
			return err.Error()
		}
		err = inner.Unwrap()
	}
}

func (c *client) once(method, path, body string) (answer, error) {
	request, err := http.NewRequest(method, c.cfg.url+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return answer{}, err
	}
	if method == "POST" {
		request.Header.Set("Content-Type", "application/json")
	}
	if c.cfg.key != "" {
		request.Header.Set("Authorization", "Bearer "+c.cfg.key)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	read, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{}, err
	}
	return answer{response.StatusCode, read}, nil
}

// conclude sends the movements once more, adds the balances up and sums the workers' numbers.
func conclude(cfg *config, clients []*client, first int64, began time.Time) report {
	r := report{Seconds: time.Since(began).Seconds(), Failures: make(map[string]int),
		Unexpected: make(map[string]int)}
	var took []time.Duration
	var successes []time.Time
	var deposited, balances int64
	checker := newClient(cfg, first, "")
	for _, c := range clients {
		took, successes = append(took, c.took...), append(successes, c.successes...)
		r.Failed += c.failed
		r.Lost += c.lost
		r.Stale += c.stale
		r.Behind += c.behind
		r.Limited += c.limited
		deposited += c.deposited
		for why, n := range c.failures {
			r.Failures[why] += n
		}
		for what, n := range c.strange {
			r.Unexpected[what] += n
		}
		// The first, the last and some between.
		step := max(1, len(c.moved)/50)
		for i := 0; i < len(c.moved); i += step {
			m := c.moved[len(c.moved)-1-i]
			r.Repeated++
			if a := checker.do("POST", m.path, m.body); string(a.body) != m.answer {
				r.Changed++
			}
		}
	}
	for id := first; id < first+cfg.wallets; id++ {
		var b struct {
			Balance string `json:"balance"`
		}
		a := checker.do("GET", checker.path(id, "balance"), "")
		err := json.Unmarshal(a.body, &b)
		n, numberErr := strconv.ParseInt(b.Balance, 10, 64)
		if err != nil || numberErr != nil {
			r.Unexpected[fmt.Sprintf("%d %.200s", a.status, a.body)]++
		}
		balances += n
	}
	// An unanswered movement may have happened or not.
	r.MoneyRight = r.Lost > 0 || balances == deposited
	r.Operations = len(took)
	r.PerSecond = int(float64(len(took)) / r.Seconds)
	slices.Sort(took)
	if len(took) > 0 {
		ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
		r.P50ms, r.P99ms, r.MaxMs = ms(took[len(took)/2]), ms(took[len(took)*99/100]), ms(took[len(took)-1])
	}
	slices.SortFunc(successes, time.Time.Compare)
	for i := 1; i < len(successes); i++ {
		r.LongestGapS = max(r.LongestGapS, successes[i].Sub(successes[i-1]).Seconds())
	}
	return r
}
