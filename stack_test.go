// The tests' harness: the servers, the service under test and what looks at it. The tests are elsewhere.
//
// The first test that needs servers starts `dev services` (Postgres, Redis, Kafka) once for the whole run.
// Each test has a database, a slot and topics of its own.
//
//   - servers are those servers, or some that a test may kill;
//   - running is a service in this process;
//   - replica is a service as a process of its own;
//   - rig is a running service with relays to start and stop beside it.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/book"
	"wallet/internal/kafka"
	"wallet/internal/proctest"
)

// -----------------------------------------------------------------------------------------------------------
// Servers
// -----------------------------------------------------------------------------------------------------------

// servers is what `dev services` printed, and the way to its commands.
type servers struct {
	DatabaseURL  string `json:"database_url"`
	RedisURL     string `json:"redis_url"`
	KafkaBrokers string `json:"kafka_brokers"`
	// With -secure: the settings for the brokers' other listeners.
	SecureKafka map[string]string          `json:"secure_kafka"`
	PIDs        map[string]json.RawMessage `json:"pids"`

	mu     sync.Mutex // one command at a time
	stdin  io.WriteCloser
	stdout *bufio.Reader
	cmd    *exec.Cmd
	log    string
}

var (
	devBinary    = sync.OnceValues(buildDev)
	sharedStack  = sync.OnceValues(func() (*servers, error) { return startServers() })
	stackStarted atomic.Bool
	testFolder   string
	names        atomic.Int64
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	if os.Getenv("WALLET_TEST_LOG") != "" {
		slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr,
			&slog.HandlerOptions{Level: slog.LevelDebug})))
	}
	var err error
	if testFolder, err = proctest.Folder("test"); err != nil {
		panic(err)
	}
	code := m.Run()
	if stackStarted.Load() {
		if s, err := sharedStack(); err == nil {
			s.stop()
		}
	}
	if code == 0 {
		os.RemoveAll(testFolder)
	} else {
		fmt.Fprintln(os.Stderr, "the servers' data and logs are in", testFolder)
	}
	os.Exit(code)
}

// stack returns the shared servers.
func stack(tb testing.TB) *servers {
	tb.Helper()
	stackStarted.Store(true)
	s, err := sharedStack()
	if err != nil {
		tb.Fatalf("start the servers: %v", err)
	}
	return s
}

func buildDev() (string, error) {
	binary := filepath.Join(testFolder, "dev")
	out, err := exec.Command("go", "build", "-C", "dev", "-o", binary, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build dev: %w\n%s", err, out)
	}
	return binary, nil
}

// startServers starts servers of the kinds that WALLET_TEST_KAFKA, WALLET_TEST_POSTGRES and WALLET_TEST_REDIS
// name, with further flags; they end with this process, however it ends.
func startServers(flags ...string) (*servers, error) {
	binary, err := devBinary()
	if err != nil {
		return nil, err
	}
	data, err := os.MkdirTemp(testFolder, "data-")
	if err != nil {
		return nil, err
	}
	os.Chmod(data, 0o755)
	args := []string{"services", "-data", data}
	for flag, variable := range map[string]string{"-kafka": "WALLET_TEST_KAFKA",
		"-postgres": "WALLET_TEST_POSTGRES", "-redis": "WALLET_TEST_REDIS"} {
		if value := os.Getenv(variable); value != "" {
			args = append(args, flag, value)
		}
	}
	s := &servers{cmd: exec.Command(binary, append(args, flags...)...), log: data + ".log"}
	logFile, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	s.cmd.Stderr = logFile
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.stdout = bufio.NewReader(stdout)
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := s.stdout.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, s)
	}
	if err != nil {
		s.stop()
		said, _ := os.ReadFile(s.log)
		return nil, fmt.Errorf("dev %s: %w\n%s", strings.Join(args, " "), err, said)
	}
	return s, nil
}

// startStores starts servers whose Kafka nobody is to use: the embedded one, which is there at once.
func startStores(flags ...string) (*servers, error) {
	return startServers(append(flags, "-kafka", "embedded")...)
}

func (s *servers) stop() {
	s.stdin.Close()
	s.cmd.Wait()
}

// command sends a control line such as "kill redis" and waits until it is done.
func (s *servers) command(tb testing.TB, line string) {
	tb.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintln(s.stdin, line)
	answer, err := s.stdout.ReadBytes('\n')
	var done struct{ Error string }
	if err == nil {
		err = json.Unmarshal(answer, &done)
	}
	if err != nil || done.Error != "" {
		tb.Fatalf("%s: %v %s", line, err, done.Error)
	}
}

// data is the folder of the servers' data, and below is a file or folder in it.
func (s *servers) data(below ...string) string {
	return filepath.Join(append([]string{strings.TrimSuffix(s.log, ".log")}, below...)...)
}

// said counts how often a server's log holds a text.
func (s *servers) said(tb testing.TB, name, text string) int {
	tb.Helper()
	log, err := os.ReadFile(s.data("logs", name+".log"))
	if err != nil {
		tb.Fatal(err)
	}
	return bytes.Count(log, []byte(text))
}

// database makes an empty database and returns its URL.
func (s *servers) database(tb testing.TB) string {
	tb.Helper()
	name := fmt.Sprintf("test_%d_%d", os.Getpid(), names.Add(1))
	conn := connect(tb, s.DatabaseURL)
	if _, err := conn.Exec(context.Background(), "CREATE DATABASE "+name); err != nil {
		tb.Fatal(err)
	}
	base, query, _ := strings.Cut(s.DatabaseURL, "?")
	return base[:strings.LastIndex(base, "/")+1] + name + "?" + query
}

// databaseOf is the name of a URL's database.
func databaseOf(url string) string {
	return url[strings.LastIndex(url, "/")+1 : strings.LastIndex(url, "?")]
}

func connect(tb testing.TB, url string) *pgx.Conn {
	tb.Helper()
	conn, err := pgx.Connect(context.Background(), url)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// testEnv is the environment of a service under test, on a fresh database; more is NAME=value.
func testEnv(tb testing.TB, more ...string) map[string]string {
	tb.Helper()
	s := stack(tb)
	n := names.Add(1)
	env := map[string]string{
		"DATABASE_URL":           s.database(tb),
		"REDIS_URL":              s.RedisURL,
		"REPLICATION_SLOT":       fmt.Sprintf("slot_%d_%d", os.Getpid(), n),
		"KAFKA_TOPIC":            fmt.Sprintf("events-%d-%d", os.Getpid(), n),
		"KAFKA_CHECKPOINT_TOPIC": fmt.Sprintf("checkpoints-%d-%d", os.Getpid(), n),
		"LISTEN_ADDR":            "127.0.0.1:0",
		"RATE_LIMIT":             "0",
	}
	for _, setting := range more {
		name, value, _ := strings.Cut(setting, "=")
		env[name] = value
	}
	return env
}

// -----------------------------------------------------------------------------------------------------------
// A service in this process
// -----------------------------------------------------------------------------------------------------------

// running is a service under test, in this process.
type running struct {
	*service
	http   *httptest.Server // serves the service's whole handler
	direct string           // host:port of the service's own listener, with its timeouts and TLS
	env    map[string]string
	end    func()
}

// start runs a service in this process, until the test ends or end is called.
func start(tb testing.TB, env map[string]string) *running {
	tb.Helper()
	w := launch(tb, env)
	eventually(tb, 20*time.Second, "ready", func() bool { return w.get("/readyz").status == 200 })
	return w
}

// launch is start without waiting until it is ready.
func launch(tb testing.TB, env map[string]string) *running {
	tb.Helper()
	cfg, err := readConfig(func(name string) string { return env[name] })
	if err != nil {
		tb.Fatal(err)
	}
	s, err := newService(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	listener := newListener(tb)
	w := &running{service: s, http: httptest.NewUnstartedServer(s.api.public),
		direct: listener.Addr().String(), env: env}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx, listener) }()
	w.http.Start()
	w.end = sync.OnceFunc(func() {
		w.http.Close()
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("the service ended with: %v", err)
		}
	})
	tb.Cleanup(w.end)
	return w
}

// answer is a response, read to its end. JSON ends with a line's end, which every answer is held to and which
// is left out here.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) String() string { return fmt.Sprintf("%d %s", a.status, a.body) }

// json decodes the body, numbers kept as text.
func (a answer) json(tb testing.TB) map[string]any {
	tb.Helper()
	decoder := json.NewDecoder(strings.NewReader(a.body))
	decoder.UseNumber()
	var v map[string]any
	if err := decoder.Decode(&v); err != nil {
		tb.Fatalf("not a JSON object: %v: %s", err, a)
	}
	return v
}

func (a answer) code() string {
	var p struct{ Code string }
	json.Unmarshal([]byte(a.body), &p)
	return p.Code
}

func (w *running) do(r *http.Request) answer {
	response, err := w.http.Client().Do(r)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{body: err.Error()}
	}
	kind := response.Header.Get("Content-Type")
	if r.Method != http.MethodHead && (kind == "application/json" || kind == "application/problem+json") {
		line, ok := bytes.CutSuffix(body, []byte("\n"))
		if !ok || bytes.HasSuffix(line, []byte("\n")) {
			return answer{body: fmt.Sprintf("not ended by one line's end: %q", body)}
		}
		body = line
	}
	return answer{response.StatusCode, response.Header, string(body)}
}

func (w *running) get(path string, headers ...string) answer {
	r, _ := http.NewRequest("GET", w.http.URL+path, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return w.do(r)
}

func (w *running) post(path, body string, headers ...string) answer {
	r, _ := http.NewRequest("POST", w.http.URL+path, bytes.NewReader([]byte(body)))
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return w.do(r)
}

// mustPost is a post that must be answered with a status.
func (w *running) mustPost(tb testing.TB, status int, path, body string, headers ...string) answer {
	tb.Helper()
	a := w.post(path, body, headers...)
	if a.status != status {
		tb.Fatalf("POST %s %s: %s, want %d", path, body, a, status)
	}
	return a
}

// mustCount says how many wallets, entries and outbox rows there are, and how much money.
func (w *running) mustCount(tb testing.TB) (counts string) {
	tb.Helper()
	err := connect(tb, w.env["DATABASE_URL"]).QueryRow(context.Background(),
		`SELECT concat_ws(' ', (SELECT count(*) FROM wallet),
			(SELECT count(*) FROM entry WHERE idempotency_key NOT LIKE '«expiry %'), -- may come meanwhile
			(SELECT count(*) FROM outbox WHERE payload NOT LIKE '%"reason":"expiry"%'),
			(SELECT sum(balance) FROM wallet))`).Scan(&counts)
	if err != nil {
		tb.Fatal(err)
	}
	return counts
}

func eventually(tb testing.TB, within time.Duration, what string, is func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(within); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("not within %v: %s", within, what)
		}
	}
}

func dec(s string) decimal.Decimal { return decimal.RequireFromString(s) }

// checkLedger verifies every invariant of the ledger, in SQL, on a database at rest or not.
func checkLedger(tb testing.TB, databaseURL string) {
	tb.Helper()
	conn := connect(tb, databaseURL)
	for rule, query := range map[string]string{
		"entries are contiguous from 1": `SELECT wallet_id, count(*), min(seq), max(seq) FROM entry GROUP BY 1
			HAVING min(seq) <> 1 OR max(seq) <> count(*)`,
		"a wallet stands where its last entry says": `SELECT w.id, w.seq, w.balance FROM wallet w
			LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
			WHERE w.seq > 0
			  AND (e.wallet_id IS NULL OR e.balance <> w.balance OR e.created_at <> w.entry_at)`,
		"no entry is beyond its wallet": `SELECT e.wallet_id, e.seq, w.seq FROM entry e
			JOIN wallet w ON w.id = e.wallet_id WHERE e.seq > w.seq`,
		"each balance is the one before plus the amount": `SELECT wallet_id, seq, balance
			FROM (SELECT *, lag(balance, 1, 0::numeric) OVER w AS before, lag(created_at) OVER w AS at_before
			      FROM entry WINDOW w AS (PARTITION BY wallet_id ORDER BY seq)) e
			WHERE balance <> before + amount OR created_at < at_before`,
		"the legs of a transfer fit": `SELECT a.wallet_id, a.seq FROM entry a
			LEFT JOIN entry b ON b.wallet_id = a.counterparty_id AND b.seq = a.counterparty_seq
			WHERE a.kind IN ('transfer_out', 'transfer_in')
			  AND (b.wallet_id IS NULL OR b.counterparty_id <> a.wallet_id OR b.counterparty_seq <> a.seq
			       OR a.amount + b.amount <> 0 OR a.created_at <> b.created_at
			       OR a.idempotency_key <> b.idempotency_key OR a.kind = b.kind)`,
		"money is conserved per currency": `SELECT w.currency, sum(w.balance), d.sum FROM wallet w
			JOIN (SELECT w.currency, sum(e.amount) FROM entry e JOIN wallet w ON w.id = e.wallet_id
			      WHERE e.kind IN ('deposit', 'withdrawal') GROUP BY 1) d ON d.currency = w.currency
			GROUP BY 1, 3 HAVING sum(w.balance) <> d.sum`,
		"what is held is what open holds reserve": `SELECT w.id, w.held, h.sum FROM wallet w
			LEFT JOIN (SELECT wallet_id, sum(remaining) FROM hold WHERE status = 'open' GROUP BY 1) h
			       ON h.wallet_id = w.id
			WHERE w.held <> coalesce(h.sum, 0)`,
		"each hold ended once or is open": `SELECT h.wallet_id, h.seq, count(e.seq) FROM hold h
			LEFT JOIN entry e ON e.wallet_id = h.wallet_id AND e.of_seq = h.seq AND e.remaining = 0
			                 AND e.held_change < 0
			GROUP BY 1, 2, h.status HAVING count(e.seq) <> CASE h.status WHEN 'open' THEN 0 ELSE 1 END`,
		"no more is undone than was done": `SELECT o.wallet_id, o.seq FROM entry o
			JOIN (SELECT wallet_id, of_seq, sum(abs(amount)) AS undone FROM entry
			      WHERE of_seq IS NOT NULL AND held_change IS NULL GROUP BY 1, 2) u
			  ON u.wallet_id = o.wallet_id AND u.of_seq = o.seq
			WHERE u.undone > abs(o.amount)`,
		"a key posts once": `SELECT wallet_id, idempotency_key, count(*) FROM entry
			WHERE kind <> 'transfer_in' GROUP BY 1, 2 HAVING count(*) > 1`,
		"an outbox row for each entry": `SELECT e.wallet_id, e.seq, count(o.seq) FROM entry e
			LEFT JOIN outbox o ON o.aggregate_id = e.wallet_id AND o.seq = e.seq
			GROUP BY 1, 2 HAVING count(o.seq) <> 1`,
	} {
		rows, _ := conn.Query(context.Background(), query)
		broken, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
			values, err := row.Values()
			return fmt.Sprint(values...), err
		})
		if err != nil {
			tb.Fatalf("%s: %v", rule, err)
		}
		if len(broken) > 0 {
			tb.Errorf("broken: %s: %d times, first %s", rule, len(broken), broken[0])
		}
	}
}

func newListener(tb testing.TB) net.Listener {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return listener
}

func inUse(tb testing.TB, c *cache) {
	tb.Helper()
	eventually(tb, 5*time.Second, "cache in use", func() bool { _, _, ok := c.usable(); return ok })
}

// movement is one acknowledged operation, as a client remembers it.
type movement struct {
	path, key, body string // of the request
	answer          string
	status          int
	posted          []receipt // as the answer tells
}

// draw is a movement of any kind, or a batch of some.
func (k *known) draw(dice *rand.Rand, wallets int, key string) movement {
	if dice.IntN(12) > 0 {
		return k.drawOne(dice, wallets, key)
	}
	together := dice.IntN(3) > 0
	var operations []string
	for i := range 1 + dice.IntN(5) {
		one := k.drawOne(dice, wallets, fmt.Sprintf("%s#%d", key, i))
		if operation := asOperation(one, !together); operation != "" {
			operations = append(operations, operation)
		} else {
			return one // a state is in no batch
		}
	}
	if together {
		return movement{path: "/v1/batches", key: key, body: batchOf(key, operations...)}
	}
	return movement{path: "/v1/batches", key: key, body: eachOf(operations...)}
}

var (
	ofPath = regexp.MustCompile(`^/v1/(wallet|hold|transaction)s/([^/]*)/(.*)$`)
	ofKey  = regexp.MustCompile(`"idempotency_key":"[^"]*",?`)
)

// asOperation is a movement as one of a batch's operations, or empty where it cannot be.
func asOperation(m movement, keyed bool) string {
	of := ofPath.FindStringSubmatch(m.path)
	if of == nil || of[3] == "state" {
		return ""
	}
	id := of[2]
	if _, err := strconv.Atoi(id); of[1] != "wallet" || err != nil {
		id = strconv.Quote(id)
	}
	body := m.body[1:]
	if !keyed {
		body = strings.Replace(ofKey.ReplaceAllString(body, ""), ",}", "}", 1)
	}
	operation := fmt.Sprintf(`{"op":%q,%q:%s,%s`, strings.TrimSuffix(of[3], "s"), of[1]+"_id", id, body)
	return strings.Replace(operation, ",}", "}", 1)
}

// read reads what an answer of success tells.
func (m *movement) read(text []byte) error {
	if m.path != "/v1/batches" {
		m.posted = []receipt{{key: m.key}}
		return json.Unmarshal(text, &m.posted[0])
	}
	var batch struct{ Results []json.RawMessage }
	if err := json.Unmarshal(text, &batch); err != nil {
		return err
	}
	for i, result := range batch.Results {
		var each struct {
			Status int
			Body   json.RawMessage
		}
		if json.Unmarshal(result, &each) == nil && each.Body != nil {
			if result = each.Body; each.Status/100 != 2 {
				continue
			}
		}
		r := receipt{key: fmt.Sprintf("%s#%d", m.key, i)}
		if err := json.Unmarshal(result, &r); err != nil {
			return err
		}
		m.posted = append(m.posted, r)
	}
	return nil
}

// accepted is the request without what was refused of it, and the answer without that: what a repeat must
// bring.
func (m *movement) accepted() (body, answer string) {
	var asked struct {
		Atomic     *bool
		Operations []json.RawMessage
	}
	var got struct{ Results []json.RawMessage }
	if json.Unmarshal([]byte(m.body), &asked) != nil || asked.Atomic == nil ||
		json.Unmarshal([]byte(m.answer), &got) != nil {
		return m.body, m.answer
	}
	var operations, results []string
	for i, result := range got.Results {
		if bytes.HasPrefix(result, []byte(`{"status":2`)) {
			operations = append(operations, string(asked.Operations[i]))
			results = append(results, string(result))
		}
	}
	if len(operations) == 0 {
		return "", ""
	}
	return eachOf(operations...), `{"results":[` + strings.Join(results, ",") + `]}`
}

// final says whether a client need not send the same again.
func (a answer) final() bool {
	return a.status > 0 && a.status < 500 && a.status != 429 && !strings.Contains(a.body, `{"status":503`)
}

// drawOne is a movement of any kind between the wallets from 1 on. What it is of, a hold or a transaction, is
// one that the clients were told of.
func (k *known) drawOne(dice *rand.Rand, wallets int, key string) movement {
	id, to := 1+dice.IntN(wallets), 1+dice.IntN(wallets)
	amount := fmt.Sprintf("%d.%02d", dice.IntN(20), 1+dice.IntN(99))
	m := movement{key: key}
	body := fmt.Sprintf(`"amount":%q,"idempotency_key":%q`, amount, key)
	words := []string{"", "", "", `,"reference":"r` + amount + `"`, `,"metadata":{"a":"` + amount + `"}`}
	of := func(ids []string, path string) {
		if len(ids) > 0 {
			m.path = fmt.Sprintf(path, ids[len(ids)-1-dice.IntN(min(len(ids), 200))])
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch n := dice.IntN(40); {
	case n < 6:
		m.path = fmt.Sprintf("/v1/wallets/%d/withdraw", id)
	case n == 6:
		m.path = fmt.Sprintf("/v1/wallets/%d/withdraw", id)
		body = fmt.Sprintf(`"amount":"all","idempotency_key":%q`, key)
	case n < 16:
		m.path = fmt.Sprintf("/v1/wallets/%d/transfer", id)
		body += fmt.Sprintf(`,"to_id":%d`, to)
	case n < 23:
		m.path = fmt.Sprintf("/v1/wallets/%d/holds", id)
		body += fmt.Sprintf(`,"expires_in":"%ds"`, 1+dice.IntN(30))
		if dice.IntN(3) == 0 {
			body += fmt.Sprintf(`,"to_id":%d`, to)
		}
	case n < 28:
		of(k.holds, "/v1/holds/%s/capture")
		if dice.IntN(3) == 0 {
			body = fmt.Sprintf(`"idempotency_key":%q`, key)
		}
		if dice.IntN(3) == 0 {
			body += fmt.Sprintf(`,"to_id":%d`, to)
		}
		body += fmt.Sprintf(`,"final":%v`, dice.IntN(2) == 0)
	case n < 30:
		of(k.holds, "/v1/holds/%s/void")
		body = fmt.Sprintf(`"idempotency_key":%q`, key)
	case n < 33:
		of(k.transactions, "/v1/transactions/%s/reverse")
		if dice.IntN(2) == 0 {
			body = fmt.Sprintf(`"idempotency_key":%q`, key)
		}
	case n == 33:
		m.path = fmt.Sprintf("/v1/wallets/%d/state", 1+wallets-1-dice.IntN(1+wallets/6))
		state := []string{"open", "open", "open", "no_out", "frozen"}[dice.IntN(5)]
		m.body = fmt.Sprintf(`{"state":%q,"note":"drawn","idempotency_key":%q}`, state, key)
		return m
	}
	if m.path == "" {
		m.path = fmt.Sprintf("/v1/wallets/%d/deposit", id)
		body = fmt.Sprintf(`"amount":%q,"idempotency_key":%q`, amount, key)
	}
	m.body = "{" + body + words[dice.IntN(len(words))] + "}"
	return m
}

// known are holds and transactions that the clients were told of.
type known struct {
	mu                  sync.Mutex
	holds, transactions []string
}

// receipt is what clients read in an answer.
type receipt struct {
	WalletID      int64  `json:"wallet_id"`
	FromID        int64  `json:"from_id"`
	ToID          int64  `json:"to_id"`
	Seq           int64  `json:"seq"`
	FromSeq       int64  `json:"from_seq"`
	ToSeq         int64  `json:"to_seq"`
	HoldID        string `json:"hold_id"`
	TransactionID string `json:"transaction_id"`
	Status        string `json:"status"`

	key string
}

// learn remembers what an answer tells of, for others to capture and reverse.
func (k *known) learn(posted []receipt) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range posted {
		if r.Status == "open" {
			k.holds = append(k.holds, r.HoldID)
		}
		if r.TransactionID != "" {
			k.transactions = append(k.transactions, r.TransactionID)
		}
	}
}

// moveAtRandom runs clients that move money between a few wallets until each has had `each` operations
// acknowledged. A client repeats a request with the same key until it is answered with something final, as
// clients are told to.
func moveAtRandom(
	tb testing.TB, clients, each, wallets int, replica func() *running,
) (acknowledged []movement) {
	tb.Helper()
	var mu sync.Mutex
	var working sync.WaitGroup
	var k known
	for c := range clients {
		working.Go(func() {
			dice := rand.New(rand.NewPCG(uint64(c), 42))
			for i := range each {
				m := k.draw(dice, wallets, fmt.Sprintf("c%d-%d", c, i))
				deadline := time.Now().Add(60 * time.Second)
				for {
					a := replica().post(m.path, m.body)
					if a.final() && a.status/100 == 2 {
						m.answer, m.status = a.body, a.status
						if err := m.read([]byte(a.body)); err != nil {
							tb.Errorf("%s: %v", a, err)
						}
						k.learn(m.posted)
						mu.Lock()
						acknowledged = append(acknowledged, m)
						mu.Unlock()
						break
					}
					if a.status == 404 || a.status == 422 || a.status == 400 || a.status == 409 {
						break
					}
					if a.status != 0 && a.status != 503 && a.status != 200 {
						tb.Errorf("POST %s %s: %s", m.path, m.body, a)
						break
					}
					if time.Now().After(deadline) {
						tb.Errorf("never answered: POST %s %s: %s", m.path, m.body, a)
						break
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
		})
	}
	working.Wait()
	return acknowledged
}

// checkAcknowledged sends each acknowledged request once more: the same bytes, and nothing moves.
func checkAcknowledged(tb testing.TB, w *running, acknowledged []movement) {
	tb.Helper()
	before := w.mustCount(tb)
	for _, m := range acknowledged {
		body, answer := m.accepted()
		if body == "" {
			continue
		}
		a := w.post(m.path, body)
		if a.status != m.status || a.body != answer || a.header.Get("Idempotent-Replayed") != "true" {
			tb.Fatalf("acknowledged %s %s as %s, now %s", m.path, m.body, m.answer, a)
		}
	}
	if after := w.mustCount(tb); after != before {
		tb.Errorf("replays moved money: %s, before %s", after, before)
	}
}

// latencies are those of one run, sorted.
type latencies []time.Duration

func (l latencies) at(q float64) time.Duration {
	if len(l) == 0 {
		return 0
	}
	return l[min(len(l)-1, int(q*float64(len(l))))]
}

// -----------------------------------------------------------------------------------------------------------
// A service as a process of its own
// -----------------------------------------------------------------------------------------------------------

var walletBinary = sync.OnceValues(func() (string, error) {
	binary := filepath.Join(testFolder, "wallet")
	// Without the race detector, also under -race: what is killed here is what users run.
	out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the service: %w\n%s", err, out)
	}
	return binary, nil
})

// walletCommand is the service as a process of its own.
func walletCommand(tb testing.TB, env map[string]string, args ...string) *exec.Cmd {
	tb.Helper()
	binary, err := walletBinary()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Env = os.Environ()
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// replica is the service as a process.
type replica struct {
	env      map[string]string
	stepped  bool   // its clock can be stepped
	binary   string // another release's, if not empty
	url      string
	operate  string
	log      string
	cmd      *exec.Cmd
	exited   chan struct{}
	writes   *proxy   // to Postgres, but for the relay's replication; nil where there are several hosts
	postgres *proxy   // of a cuttable one: to the relay's replication connection
	kafka    []*proxy // of a cuttable one
	clock    *os.File // holds the seconds that its clock is ahead of the machine's
}

func newReplica(tb testing.TB, env map[string]string, name string) *replica {
	r := &replica{env: maps.Clone(env), log: filepath.Join(testFolder, name+".log")}
	listener := newListener(tb)
	operate := newListener(tb)
	r.env["LISTEN_ADDR"], r.url = listener.Addr().String(), "http://"+listener.Addr().String()
	r.env["OPERATE_ADDR"], r.operate = operate.Addr().String(), "http://"+operate.Addr().String()
	listener.Close()
	operate.Close()
	var err error
	if r.clock, err = os.Create(r.log + ".clock"); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { r.clock.Close() })
	r.setClock(tb, 0)
	r.env["WALLET_TEST_CLOCK_FILE"] = r.clock.Name()
	return r
}

// setClock steps the replica's clock, if it is a process with a clock of ours.
func (r *replica) setClock(tb testing.TB, ahead time.Duration) {
	tb.Helper()
	seconds := binary.NativeEndian.AppendUint64(nil, uint64(ahead/time.Second))
	if _, err := r.clock.WriteAt(seconds, 0); err != nil {
		tb.Fatal(err)
	}
}

// cutWrites leads the replica's way to Postgres through a proxy.
func (r *replica) cutWrites(tb testing.TB) {
	tb.Helper()
	u, err := url.Parse(r.env["DATABASE_URL"])
	if err != nil {
		tb.Fatal(err)
	}
	if strings.Contains(u.Host, ",") {
		return
	}
	r.writes = newProxy(tb, u.Host)
	go r.writes.serve()
	u.Host = r.writes.listener.Addr().String()
	r.env["DATABASE_URL"] = u.String()
}

// newCuttableReplica is a replica whose relay's ways to Postgres and Kafka lead through proxies.
func newCuttableReplica(tb testing.TB, env map[string]string, name string) *replica {
	r := newReplica(tb, env, "chaos-"+name)
	r.cutWrites(tb)
	if brokers := env["KAFKA_BROKERS"]; brokers != "" {
		u, err := url.Parse(env["DATABASE_URL"])
		if err != nil {
			tb.Fatal(err)
		}
		if !strings.Contains(u.Host, ",") {
			r.postgres = newProxy(tb, u.Host)
			go r.postgres.serve()
			u.Host = r.postgres.listener.Addr().String()
			r.env["REPLICATION_URL"] = u.String()
		}
		// Brokers tell their addresses in their answers: host and port there are replaced by the proxy's.
		var from, to [][]byte
		var addresses []string
		for broker := range strings.SplitSeq(brokers, ",") {
			p := newProxy(tb, broker)
			r.kafka = append(r.kafka, p)
			address := p.listener.Addr().String()
			if r.env["WALLET_TEST_DNS"] != "" {
				address = strings.Replace(address, "127.0.0.1", kafkaName, 1)
			}
			addresses = append(addresses, address)
			from, to = append(from, advertised(broker)), append(to, advertised(address))
		}
		for _, p := range r.kafka {
			p.frames = func(frame []byte) {
				for i := range from {
					for at := 0; ; {
						next := bytes.Index(frame[at:], from[i])
						if next < 0 {
							break
						}
						at += next
						copy(frame[at:], to[i])
					}
				}
			}
			go p.serve()
		}
		r.env["KAFKA_BROKERS"] = strings.Join(addresses, ",")
	}
	return r
}

// The names by which replicas know their servers, where a test has a name server. The broker's is as long as
// the address in whose place it is put.
const (
	kafkaName    = "kafka.tst"
	postgresName = "postgres.tst"
	redisName    = "redis.tst"
)

// byName has a replica know its servers by name.
func (r *replica) byName() {
	for variable, name := range map[string]string{"DATABASE_URL": postgresName,
		"REPLICATION_URL": postgresName, "REDIS_URL": redisName} {
		r.env[variable] = strings.Replace(r.env[variable], "127.0.0.1", name, 1)
	}
	r.env["GODEBUG"] = "netdns=go" // not the C library's, which asks the machine's name server
}

// nameServer answers for these names: 127.0.0.1, unless it is told to fail.
type nameServer struct {
	conn    net.PacketConn
	failing atomic.Int32 // how; 0: not at all
	failed  atomic.Int64 // questions that it failed
	asked   atomic.Int64 // questions that it answered
}

// How a name server fails: it is silent; it says that it failed; it says that there is no such name.
const (
	dnsSilent = 1 + iota
	dnsFailure
	dnsNoName
)

func newNameServer(tb testing.TB) *nameServer {
	tb.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	s := &nameServer{conn: conn}
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := s.answer(buf[:n]); answer != nil {
				conn.WriteTo(answer, from)
			}
		}
	}()
	return s
}

// answer is one message of RFC 1035; nil is none.
func (s *nameServer) answer(question []byte) []byte {
	end := bytes.IndexByte(question[12:], 0) + 12 + 5 // of the name, its type and class
	if len(question) < end {
		return nil
	}
	const response, recursion = 0x8000, 0x0180
	code, answers := uint16(0), uint16(0)
	if s.failing.Load() != 0 {
		s.failed.Add(1)
	} else {
		s.asked.Add(1)
	}
	switch s.failing.Load() {
	case dnsSilent:
		return nil
	case dnsFailure:
		code = 2
	case dnsNoName:
		code = 3
	default:
		if !bytes.Contains(question[12:end], []byte("\x03tst\x00")) {
			code = 3
		} else if binary.BigEndian.Uint16(question[end-4:]) == 1 { // A; of any other type there is none
			answers = 1
		}
	}
	b := append([]byte{}, question[:2]...)
	for _, n := range []uint16{response | recursion | code, 1, answers, 0, 0} {
		b = binary.BigEndian.AppendUint16(b, n)
	}
	b = append(b, question[12:end]...)
	if answers == 1 { // the name asked for, A, IN, for no time
		b = append(b, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1)
	}
	return b
}

// advertised is how an address stands in Kafka's answers.
func advertised(address string) []byte {
	host, port, _ := net.SplitHostPort(address)
	n, _ := strconv.Atoi(port)
	return binary.BigEndian.AppendUint32([]byte(host), uint32(n))
}

func (r *replica) start(tb testing.TB) {
	tb.Helper()
	log, err := os.OpenFile(r.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		tb.Fatal(err)
	}
	defer log.Close()
	r.cmd = walletCommand(tb, r.env)
	if r.stepped {
		binary, err := steppedBinary()
		if err != nil {
			tb.Fatal(err)
		}
		r.cmd.Path, r.cmd.Args[0] = binary, binary
	}
	if r.binary != "" {
		r.cmd.Path, r.cmd.Args[0] = r.binary, r.binary
	}
	r.cmd.Stderr, r.cmd.Stdout = log, log
	if err := r.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	exited := make(chan struct{})
	r.exited = exited
	cmd := r.cmd
	go func() { cmd.Wait(); close(exited) }()
	tb.Cleanup(func() { cmd.Process.Kill(); <-exited })
}

func (r *replica) kill() {
	r.cmd.Process.Kill()
	<-r.exited
}

// stop asks it to stop, and waits until it has.
func (r *replica) stop(tb testing.TB) {
	tb.Helper()
	r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.exited:
	case <-time.After(30 * time.Second):
		tb.Fatal("it did not stop within 30 s of SIGTERM")
	}
}

var replicaClient = &http.Client{Timeout: 8 * time.Second,
	Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

func (r *replica) leads() bool { return r.metric(`wallet_relay_state{state="leader"}`) == 1 }

func (r *replica) isReady() bool {
	response, err := http.Get(r.url + "/readyz")
	if err == nil {
		response.Body.Close()
	}
	return err == nil && response.StatusCode == 200
}

// metric is the value of one of the replica's metrics; 0 if it does not answer.
func (r *replica) metric(name string) float64 {
	client := http.Client{Timeout: time.Second, Transport: replicaClient.Transport}
	response, err := client.Get(r.operate + "/metrics")
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	_, rest, _ := bytes.Cut(body, []byte("\n"+name+" "))
	text, _, _ := bytes.Cut(rest, []byte("\n"))
	value, _ := strconv.ParseFloat(string(text), 64)
	return value
}

// memory is the service's resident set in MB: VmRSS now, VmHWM at its highest.
func (r *replica) memory(size string) float64 { return proctest.Memory(r.cmd.Process.Pid, size) }

// steppedBinary is the service with a clock that can be stepped, and a name server of ours. A Go program
// reads the kernel's clock, not the C library's, where libfaketime sits; so this one is built with another
// time.Now, which adds what a file says. Its monotonic clock stays. And it asks the name server of
// WALLET_TEST_DNS, if that is set: /etc/resolv.conf is the machine's, and knows no ports.
var steppedBinary = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", err
	}
	folder := filepath.Join(testFolder, "stepped")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", err
	}
	replace := make(map[string]string)
	// patch adds text behind a line of a package of Go's own, and a file to the package.
	patch := func(pkg, file, line, text, added string) {
		if err != nil {
			return
		}
		source := filepath.Join(strings.TrimSpace(string(out)), "src", pkg)
		var original []byte
		if original, err = os.ReadFile(filepath.Join(source, file)); err != nil {
			return
		}
		if strings.Count(string(original), line) != 1 {
			err = fmt.Errorf("%s/%s has no %q: this Go does it elsewhere", source, file, line)
			return
		}
		changed, more := filepath.Join(folder, pkg+"-"+file), filepath.Join(folder, pkg+"-added.go")
		replace[filepath.Join(source, file)], replace[filepath.Join(source, "added.go")] = changed, more
		err = errors.Join(os.WriteFile(more, []byte(added), 0o644),
			os.WriteFile(changed, []byte(strings.Replace(string(original), line, line+text, 1)), 0o644))
	}
	// The runtime asks for the time on its own stack too, where no system call may be: the file is mapped.
	patch("time", "time.go", "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n",
		"\tsec += testClockSeconds()\n", `package time

import (
	"syscall"
	"unsafe"
)

var testClock *int64

func init() {
	name, ok := syscall.Getenv("WALLET_TEST_CLOCK_FILE")
	if !ok {
		return
	}
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("open WALLET_TEST_CLOCK_FILE: " + err.Error())
	}
	mapped, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("map WALLET_TEST_CLOCK_FILE: " + err.Error())
	}
	testClock = (*int64)(unsafe.Pointer(&mapped[0]))
}

func testClockSeconds() int64 {
	if testClock == nil {
		return 0
	}
	return *testClock
}
`)
	patch("net", "dnsconfig_unix.go",
		"\tconf := &dnsConfig{\n\t\tndots:    1,\n\t\ttimeout:  5 * time.Second,\n\t\tattempts: 2,\n\t}\n",
		"\tif testDNS(conf) {\n\t\treturn conf\n\t}\n", `package net

import "syscall"

func testDNS(conf *dnsConfig) bool {
	server, ok := syscall.Getenv("WALLET_TEST_DNS")
	conf.servers = []string{server}
	return ok
}
`)
	overlay, binary := filepath.Join(folder, "overlay.json"), filepath.Join(folder, "wallet")
	text, failed := json.Marshal(map[string]any{"Replace": replace})
	if err := errors.Join(err, failed, os.WriteFile(overlay, text, 0o644)); err != nil {
		return "", err
	}
	out, err = exec.Command("go", "build", "-overlay", overlay, "-o", binary, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the service with a clock of ours: %w\n%s", err, out)
	}
	return binary, nil
})

// -----------------------------------------------------------------------------------------------------------
// A service with a relay beside it
// -----------------------------------------------------------------------------------------------------------

// rig is a service that writes, with no relay, and relays to start and stop beside it.
type rig struct {
	*running
	cfg  *config
	conn *pgx.Conn
	keys int
}

func newRig(t *testing.T, more ...string) *rig {
	t.Helper()
	env := testEnv(t, append([]string{"REDIS_URL=", "KAFKA_PARTITIONS=3"}, more...)...)
	g := &rig{running: start(t, env)}
	g.cfg = g.config(t, "")
	g.conn = connect(t, env["DATABASE_URL"])
	dropSlotAtEnd(t, g.cfg.replicationSlot)
	return g
}

// dropSlotAtEnd: a slot left behind would keep the shared cluster's WAL.
func dropSlotAtEnd(t testing.TB, slot string) {
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), stack(t).DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		eventually(t, 10*time.Second, "slot dropped", func() bool {
			_, err := conn.Exec(context.Background(),
				`SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
					WHERE slot_name = $1`, slot)
			return err == nil
		})
	})
}

func (g *rig) config(t *testing.T, databaseURL string) *config {
	env := map[string]string{"KAFKA_BROKERS": stack(t).KafkaBrokers}
	for name, value := range g.env {
		if _, set := env[name]; !set {
			env[name] = value
		}
	}
	if databaseURL != "" {
		env["DATABASE_URL"] = databaseURL
	}
	cfg, err := readConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// deposit makes n entries, over a few wallets.
func (g *rig) deposit(t *testing.T, n int) {
	t.Helper()
	for range n {
		g.keys++
		g.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", 1+g.keys%5),
			fmt.Sprintf(`{"amount":"1.50","idempotency_key":"b%d"}`, g.keys))
	}
}

func (g *rig) slot(t *testing.T) (confirmed pglogrepl.LSN) {
	t.Helper()
	r := relay{cfg: &g.cfg.relayConfig}
	s, err := r.readSlot(context.Background(), g.conn)
	if err != nil {
		t.Fatal(err)
	}
	return s.Confirmed
}

// onFreeSlot runs sql with the slot's name once Postgres has let go of it.
func (g *rig) onFreeSlot(t *testing.T, sql string) {
	t.Helper()
	eventually(t, 10*time.Second, "slot free", func() bool {
		s, err := (&relay{cfg: &g.cfg.relayConfig}).readSlot(context.Background(), g.conn)
		return err == nil && !s.Active
	})
	if _, err := g.conn.Exec(context.Background(), sql, g.cfg.replicationSlot); err != nil {
		t.Fatal(err)
	}
}

// begin opens a transaction that has begun to write.
func (g *rig) begin(t *testing.T) pgx.Tx {
	t.Helper()
	tx, err := connect(t, g.cfg.databaseURL).Begin(context.Background())
	if err == nil {
		_, err = tx.Exec(context.Background(), `SELECT pg_current_xact_id()`)
	}
	if err != nil {
		t.Fatal(err)
	}
	return tx
}

// awaitHorizon waits until the checkpoint has a horizon that covers all there is now.
func (g *rig) awaitHorizon(t *testing.T) {
	t.Helper()
	var next int64
	if err := g.conn.QueryRow(context.Background(),
		`SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint`).Scan(&next); err != nil {
		t.Fatal(err)
	}
	g.deposit(t, 1) // a horizon moves only when there are events
	eventually(t, 20*time.Second, "a horizon", func() bool {
		c := lastCheckpointOf(t, g.cfg)
		return c != nil && c.Horizon != nil && c.Horizon.XID > next
	})
}

// setClock steps the clock by which the ledger writes, for this database, and starts the service again.
func (g *rig) setClock(t *testing.T, step string) {
	t.Helper()
	g.end()
	name := databaseOf(g.cfg.databaseURL)
	g.mustExec(t, `CREATE SCHEMA clock;
		CREATE FUNCTION clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql
		AS $$ SELECT pg_catalog.clock_timestamp() + interval '`+step+`' $$;
		ALTER DATABASE `+name+` SET search_path = clock, pg_catalog, public`)
	g.running = start(t, g.env)
}

func (g *rig) openKafka(t *testing.T) *kafka.Client {
	t.Helper()
	cfg := kafkaConfig(&g.cfg.relayConfig, nil)
	cfg.MetadataMaxAge = 100 * time.Millisecond
	k, err := kafka.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func (g *rig) mustExec(t *testing.T, sql string) {
	t.Helper()
	if _, err := g.conn.Exec(context.Background(), sql); err != nil {
		t.Fatal(err)
	}
}

// relaying is a relay that runs.
type relaying struct {
	*relay
	stop func()
}

func startRelay(t *testing.T, cfg *config, adjust ...func(*relay)) *relaying {
	t.Helper()
	db, err := pgxpool.New(context.Background(), cfg.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &relaying{relay: newRelay(&cfg.relayConfig, db, nil)}
	for _, change := range adjust {
		change(r.relay)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stopped := false
	r.stop = func() {
		if !stopped {
			stopped = true
			cancel()
			<-done
			db.Close()
		}
	}
	t.Cleanup(r.stop)
	return r
}

func (r *relaying) await(t *testing.T, state string) {
	t.Helper()
	eventually(t, 30*time.Second, "relay "+state, func() bool { return r.state.Load() == state })
}

// insertByHand writes n entries of one wallet, outbox rows included, in the given transaction.
func insertByHand(t testing.TB, tx pgx.Tx, walletID int64, n int) {
	t.Helper()
	ctx := context.Background()
	var at time.Time
	err := tx.QueryRow(ctx, `INSERT INTO wallet (id, seq, entry_at, created_at, currency, balance)
		VALUES ($1, $2::bigint, now(), now(), 'USD', $2::bigint) RETURNING entry_at`, walletID, n).Scan(&at)
	if err != nil {
		t.Fatal(err)
	}
	e := book.Entry{WalletID: walletID, Kind: book.KindDeposit, Currency: "USD", Amount: decimal.New(1, 0),
		CreatedAt: at}
	next := func() *book.Entry {
		e.Seq++
		e.Balance, e.Key = decimal.New(e.Seq, 0), "h"+strconv.FormatInt(e.Seq, 10)
		return &e
	}
	columns := []string{"wallet_id", "seq", "created_at", "kind", "amount", "balance", "idempotency_key"}
	rows := pgx.CopyFromSlice(n, func(int) ([]any, error) {
		e := next()
		return []any{e.WalletID, e.Seq, e.CreatedAt, e.Kind, 1, e.Seq, e.Key}, nil
	})
	_, err = tx.CopyFrom(ctx, pgx.Identifier{"entry"}, columns, rows)
	if err != nil {
		t.Fatal(err)
	}
	e.Seq = 0
	columns = []string{"aggregate_id", "seq", "event_type", "payload"}
	rows = pgx.CopyFromSlice(n, func(int) ([]any, error) {
		e := next()
		return []any{e.WalletID, e.Seq, eventType, string(book.AppendEvent(nil, e))}, nil
	})
	_, err = tx.CopyFrom(ctx, pgx.Identifier{"outbox"}, columns, rows)
	if err != nil {
		t.Fatal(err)
	}
}

func lastCheckpointOf(t testing.TB, cfg *config) *checkpoint {
	t.Helper()
	k, err := kafka.Open(kafkaConfig(&cfg.relayConfig, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	c, err := lastCheckpoint(k, cfg.kafkaCheckpointTopic)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *checkpoint) end(t *testing.T) pglogrepl.LSN {
	t.Helper()
	p, err := c.Position()
	if err != nil {
		t.Fatal(err)
	}
	return p.End
}

// checkStream audits ledger and topic, and reads the topic a second time.
func checkStream(t testing.TB, cfg *config) {
	t.Helper()
	checkAudit(t, cfg)
	checkEvents(t, cfg)
}

// checkEvents reads the topic, all published, by sarama's own consumer, and compares it with the ledger.
func checkEvents(t testing.TB, cfg *config) {
	t.Helper()
	conn := connect(t, cfg.databaseURL)
	entries := func() (all, expiries int) {
		if err := conn.QueryRow(context.Background(), `
SELECT count(*), count(*) FILTER (WHERE idempotency_key LIKE '«expiry %') FROM entry`).Scan(
			&all, &expiries); err != nil {
			t.Fatal(err)
		}
		return all, expiries
	}
	want, expired := entries()
	expiries := 0
	chains := make(map[string]*streamed)
	groups := make(map[string]map[int]bool) // of what was posted together: which are there
	of := make(map[string]int)
	got := 0
	for m := range consume(t, cfg, want) {
		got++
		id := string(m.Key)
		c := chains[id]
		if c == nil {
			c = &streamed{holds: make(map[int64]decimal.Decimal), undone: make(map[int64]decimal.Decimal)}
			chains[id] = c
		}
		c.seq++
		if want := id + "-" + strconv.FormatInt(c.seq, 10); string(m.Headers[1].Value) != want {
			t.Fatalf("partition %d, offset %d: %s, want %s", m.Partition, m.Offset, m.Headers[1].Value, want)
		}
		if bytes.Contains(m.Value, []byte(`"reason":"expiry"`)) {
			expiries++
		}
		if wrong := c.follow(m.Value); wrong != "" {
			t.Fatalf("partition %d, offset %d: %s: %s", m.Partition, m.Offset, wrong, m.Value)
		}
		var said struct {
			Batch struct {
				ID        string
				Index, Of int
			}
		}
		if err := json.Unmarshal(m.Value, &said); err != nil {
			t.Fatal(err)
		}
		if b := said.Batch; b.ID != "" {
			if groups[b.ID] == nil {
				groups[b.ID] = make(map[int]bool)
			}
			groups[b.ID][b.Index], of[b.ID] = true, b.Of
		}
	}
	for id, there := range groups {
		if len(there) != of[id] {
			t.Errorf("of the batch %s %d of %d operations are in the stream", id, len(there), of[id])
		}
	}
	// Holds may go on expiring; of anything else there is exactly what there was.
	if _, most := entries(); got-expiries != want-expired || expiries < expired || expiries > most {
		t.Errorf("%d events, %d of them expiries, for %d entries, %d to %d expiries", got, expiries, want,
			expired, most)
	}
	rows, _ := conn.Query(context.Background(),
		`SELECT id::text, seq, balance, held, coalesce(state, '') FROM wallet WHERE seq > 0`)
	var id, state string
	var seq int64
	var balance, held decimal.Decimal
	if _, err := pgx.ForEachRow(rows, []any{&id, &seq, &balance, &held, &state}, func() error {
		c := chains[id]
		if c != nil && c.seq < seq { // an entry that came since
			return nil
		}
		if c == nil || !c.balance.Equal(balance) || !c.held.Equal(held) || c.state != state {
			t.Errorf("wallet %s has %s, %s held, state %q; by the stream alone: %+v", id, balance, held,
				state, c)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// streamed is what a consumer knows of a wallet from its events alone.
type streamed struct {
	seq           int64
	balance, held decimal.Decimal
	state         string
	holds         map[int64]decimal.Decimal // what remains of each open one
	undone        map[int64]decimal.Decimal // what is left of each entry that was undone in part
}

// follow says what is wrong with the wallet's next event, or nothing. It knows no code of the service's.
func (c *streamed) follow(payload []byte) string {
	var e struct {
		Seq           int64            `json:"seq"`
		Kind          string           `json:"kind"`
		Amount        decimal.Decimal  `json:"amount"`
		BalanceBefore decimal.Decimal  `json:"balance_before"`
		BalanceAfter  decimal.Decimal  `json:"balance_after"`
		HeldBefore    decimal.Decimal  `json:"held_before"`
		HeldAfter     decimal.Decimal  `json:"held_after"`
		OfSeq         int64            `json:"of_seq"`
		Remaining     *decimal.Decimal `json:"remaining"`
		State         string           `json:"state"`
	}
	if err := json.Unmarshal(payload, &e); err != nil {
		return err.Error()
	}
	change := e.HeldAfter.Sub(e.HeldBefore)
	switch {
	case e.Seq != c.seq || !e.BalanceBefore.Equal(c.balance) || !e.HeldBefore.Equal(c.held):
		return fmt.Sprintf("it does not begin where the one before ended: %+v", c)
	case !e.BalanceAfter.Equal(e.BalanceBefore.Add(e.Amount)) || e.HeldAfter.IsNegative() ||
		e.HeldAfter.GreaterThan(e.BalanceAfter):
		return "it does not add up"
	case c.state == "closed", c.state == "frozen" && e.Kind != "release" && e.Kind != "state",
		c.state == "no_out" && e.Amount.IsNegative() && !change.IsNegative(), c.state == "no_out" &&
			e.Kind == "hold":
		return "the wallet is " + c.state
	}
	c.balance, c.held = e.BalanceAfter, e.HeldAfter
	switch {
	case e.Kind == "state":
		c.state = e.State
	case e.Kind == "hold":
		c.holds[e.Seq] = change
	case change.IsNegative():
		was, open := c.holds[e.OfSeq]
		if !open || e.Remaining == nil || e.Amount.Abs().GreaterThan(was) ||
			!e.Remaining.Equal(was.Add(change)) {
			return fmt.Sprintf("of its hold there remained %s", was)
		}
		if c.holds[e.OfSeq] = *e.Remaining; e.Remaining.IsZero() {
			delete(c.holds, e.OfSeq) // so that it ends once
		}
	case !change.IsZero():
		return "more is held without a hold"
	case e.OfSeq != 0:
		was, again := c.undone[e.OfSeq]
		if e.Remaining == nil || again && !e.Remaining.Equal(was.Sub(e.Amount.Abs())) {
			return fmt.Sprintf("of what it undoes there was left %s", was)
		}
		c.undone[e.OfSeq] = *e.Remaining
	}
	return ""
}

func checkAudit(t testing.TB, cfg *config) {
	t.Helper()
	var said bytes.Buffer
	findings, err := runAudit(context.Background(), &cfg.relayConfig, 0, &said)
	if err != nil || findings != 0 {
		t.Errorf("audit: %d findings, %v\n%s", findings, err, said.String())
	}
}

// consume yields the committed events: at least want of them, unless none comes for some seconds, and any
// that follow at once.
func consume(t testing.TB, cfg *config, want int) func(func(*sarama.ConsumerMessage) bool) {
	return func(yield func(*sarama.ConsumerMessage) bool) {
		conf := sarama.NewConfig()
		conf.Consumer.IsolationLevel = sarama.ReadCommitted
		consumer, err := sarama.NewConsumer(cfg.kafkaBrokers, conf)
		if err != nil {
			t.Fatal(err)
		}
		defer consumer.Close()
		partitions, err := consumer.Partitions(cfg.kafkaTopic)
		if err != nil {
			t.Fatal(err)
		}
		messages := make(chan *sarama.ConsumerMessage)
		stop := make(chan struct{})
		defer close(stop)
		for _, p := range partitions {
			pc, err := consumer.ConsumePartition(cfg.kafkaTopic, p, sarama.OffsetOldest)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				for m := range pc.Messages() {
					select {
					case messages <- m:
					case <-stop:
					}
				}
			}()
			defer pc.AsyncClose()
		}
		for got := 0; ; got++ {
			patience := 5 * time.Second
			if got >= want {
				patience = 500 * time.Millisecond
			}
			select {
			case m := <-messages:
				if !yield(m) {
					return
				}
			case <-time.After(patience):
				return
			}
		}
	}
}

// -----------------------------------------------------------------------------------------------------------
// Connections that break
// -----------------------------------------------------------------------------------------------------------

// proxy is one replica's way to one server. It can break a connection in the middle of a message, and turn
// into a hole that takes everything and gives nothing.
type proxy struct {
	listener net.Listener
	target   string
	// Of the server's answers, to rewrite in place; nil: bytes are carried as they come.
	frames func(frame []byte)

	answersLost  atomic.Int64 // so many COMMITs more are done, and cut off before the answer passes
	requestsLost atomic.Int64 // so many COMMITs more are cut off before Postgres hears of them

	mu     sync.Mutex
	opened chan struct{} // closed unless the proxy is a hole
	half   atomic.Bool   // carry half of the next piece, then cut
	cuts   atomic.Int64
}

func newProxy(tb testing.TB, target string) *proxy {
	p := &proxy{listener: newListener(tb), target: target, opened: make(chan struct{})}
	close(p.opened)
	tb.Cleanup(func() { p.listener.Close() })
	return p
}

func (p *proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			server, err := net.Dial("tcp", p.target)
			if err != nil {
				client.Close()
				return
			}
			go p.carry(server, client, false)
			p.carry(client, server, true)
		}()
	}
}

// carry copies one direction until something ends it, and then ends both.
func (p *proxy) carry(to, from net.Conn, answers bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n := 0
		if answers && p.frames != nil {
			if _, err := io.ReadFull(from, buf[:4]); err != nil {
				return
			}
			n = 4 + int(binary.BigEndian.Uint32(buf))
			buf = slices.Grow(buf[:4], n)[:max(n, len(buf))]
			if _, err := io.ReadFull(from, buf[4:n]); err != nil {
				return
			}
			p.frames(buf[4:n])
		} else {
			var err error
			if n, err = from.Read(buf); err != nil {
				return
			}
		}
		p.mu.Lock()
		opened := p.opened
		p.mu.Unlock()
		<-opened
		if answers && bytes.Contains(buf[:n], commitAnswer) && takeOne(&p.answersLost) ||
			!answers && isCommitRequest(buf[:n]) && takeOne(&p.requestsLost) {
			p.cuts.Add(1)
			return
		}
		if n > 8 && p.half.CompareAndSwap(true, false) {
			p.cuts.Add(1)
			to.Write(buf[:n/2])
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// hole swallows everything until the returned function is called.
func (p *proxy) hole() (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	hole := make(chan struct{})
	p.opened = hole
	return func() { close(hole) }
}

// commitAnswer is Postgres' CommandComplete for a COMMIT: whoever sees it pass knows that it was done.
var commitAnswer = []byte("C\x00\x00\x00\x0bCOMMIT\x00")

// commitName is pgx's name of the prepared COMMIT. A connection that knows it sends the word no more.
var commitName = func() []byte {
	sum := sha256.Sum256([]byte("COMMIT"))
	return fmt.Appendf(nil, "stmtcache_%x", sum[:24])
}()

func isCommitRequest(message []byte) bool {
	return bytes.Contains(message, commitName) || bytes.Contains(message, []byte("COMMIT\x00"))
}

func takeOne(n *atomic.Int64) bool {
	for {
		left := n.Load()
		if left <= 0 {
			return false
		}
		if n.CompareAndSwap(left, left-1) {
			return true
		}
	}
}

// cutter is a service's way to Postgres. It cuts a connection at the moment that a test picks.
type cutter struct {
	listener net.Listener
	target   string
	// cut decides on each message from the client: cut before it is sent on, or after it was sent on and
	// before the answer returns.
	cut  atomic.Pointer[func(message []byte) (before, after bool)]
	cuts atomic.Int64
}

func newCutter(tb testing.TB, databaseURL string) (c *cutter, throughIt string) {
	tb.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		tb.Fatal(err)
	}
	c = &cutter{listener: newListener(tb), target: u.Host}
	u.Host = c.listener.Addr().String()
	tb.Cleanup(func() { c.listener.Close() })
	go func() {
		for {
			client, err := c.listener.Accept()
			if err != nil {
				return
			}
			go c.carry(client)
		}
	}()
	return c, u.String()
}

func (c *cutter) carry(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.target)
	if err != nil {
		return
	}
	defer server.Close()
	var mute atomic.Bool // the server's answers are swallowed
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, err := server.Read(buf)
			if mute.Load() || err != nil {
				client.Close()
				return
			}
			client.Write(buf[:n])
		}
	}()
	buf := make([]byte, 1<<20)
	for {
		n, err := client.Read(buf)
		if err != nil {
			server.Close()
			<-done
			return
		}
		before, after := false, false
		if cut := c.cut.Load(); cut != nil {
			before, after = (*cut)(buf[:n])
		}
		if before {
			c.cuts.Add(1)
			return
		}
		if after {
			c.cuts.Add(1)
			mute.Store(true)
		}
		server.Write(buf[:n])
		if after {
			io.Copy(io.Discard, io.LimitReader(client, 0))
			<-done // the server did its work and answered; nobody hears it
			return
		}
	}
}

// commitMessage tells messages by a parameter: statements go by name, and the rows travel as parameters.
func commitMessage(marker string) func([]byte) bool {
	return func(message []byte) bool { return bytes.Contains(message, []byte(marker)) }
}
