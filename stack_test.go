// The tests' servers and the service under test. The first test that needs servers starts `dev services` (Postgres, Redis, Kafka) once
// for the whole run; each test has a database, a slot and topics of its own.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/shopspring/decimal"
)

// servers is what `dev services` printed, and the way to its commands.
type servers struct {
	DatabaseURL  string                     `json:"database_url"`
	RedisURL     string                     `json:"redis_url"`
	KafkaBrokers string                     `json:"kafka_brokers"`
	SecureKafka  map[string]string          `json:"secure_kafka"` // with -secure: the settings for the brokers' other listeners
	PIDs         map[string]json.RawMessage `json:"pids"`

	mu     sync.Mutex // one command at a time
	stdin  io.WriteCloser
	stdout *bufio.Reader
	cmd    *exec.Cmd
	log    string
}

var (
	devBinary   = sync.OnceValues(buildDev)
	sharedStack = sync.OnceValues(func() (*servers, error) { return startServers() })
	testFolder  string
	names       atomic.Int64
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	if os.Getenv("WALLET_TEST_LOG") != "" {
		slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})))
	}
	var err error
	if testFolder, err = os.MkdirTemp("/var/tmp", "wallet-test-"); err != nil {
		panic(err)
	}
	os.Chmod(testFolder, 0o755) // Postgres may run as somebody else
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

var stackStarted atomic.Bool

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

// startServers starts servers of the kinds that WALLET_TEST_KAFKA, WALLET_TEST_POSTGRES and WALLET_TEST_REDIS name, with further
// flags; they end with this process, however it ends.
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
	for flag, variable := range map[string]string{"-kafka": "WALLET_TEST_KAFKA", "-postgres": "WALLET_TEST_POSTGRES", "-redis": "WALLET_TEST_REDIS"} {
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

// wallets is a running service under test.
type wallets struct {
	*service
	http   *httptest.Server // serves the service's whole handler
	direct string           // host:port of the service's own listener, with its timeouts and TLS
	env    map[string]string
	end    func()
}

// start runs a service in this process, until the test ends or end is called.
func start(tb testing.TB, env map[string]string) *wallets {
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
	w := &wallets{service: s, http: httptest.NewUnstartedServer(s.api.public), direct: listener.Addr().String(), env: env}
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
	eventually(tb, 20*time.Second, "ready", func() bool { return w.get("/readyz").status == 200 })
	return w
}

// answer is a response, read to its end.
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

func (w *wallets) do(r *http.Request) answer {
	response, err := w.http.Client().Do(r)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{body: err.Error()}
	}
	return answer{response.StatusCode, response.Header, string(body)}
}

func (w *wallets) get(path string, headers ...string) answer {
	r, _ := http.NewRequest("GET", w.http.URL+path, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return w.do(r)
}

func (w *wallets) post(path, body string, headers ...string) answer {
	r, _ := http.NewRequest("POST", w.http.URL+path, bytes.NewReader([]byte(body)))
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return w.do(r)
}

// mustPost is a post that must be answered with a status.
func (w *wallets) mustPost(tb testing.TB, status int, path, body string, headers ...string) answer {
	tb.Helper()
	a := w.post(path, body, headers...)
	if a.status != status {
		tb.Fatalf("POST %s %s: %s, want %d", path, body, a, status)
	}
	return a
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
		"entries are contiguous from 1": `SELECT wallet_id, count(*), min(seq), max(seq) FROM entry GROUP BY 1 HAVING min(seq) <> 1 OR max(seq) <> count(*)`,
		"a wallet stands where its last entry says": `SELECT w.id, w.seq, w.balance FROM wallet w LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
			WHERE w.seq > 0 AND (e.wallet_id IS NULL OR e.balance <> w.balance OR e.created_at <> w.entry_at)`,
		"no entry is beyond its wallet": `SELECT e.wallet_id, e.seq, w.seq FROM entry e JOIN wallet w ON w.id = e.wallet_id WHERE e.seq > w.seq`,
		"each balance is the one before plus the amount": `SELECT wallet_id, seq, balance FROM (SELECT *, lag(balance, 1, 0::numeric) OVER w AS before, lag(created_at) OVER w AS at_before
			FROM entry WINDOW w AS (PARTITION BY wallet_id ORDER BY seq)) e WHERE balance <> before + amount OR created_at < at_before`,
		"the legs of a transfer fit": `SELECT a.wallet_id, a.seq FROM entry a LEFT JOIN entry b ON b.wallet_id = a.counterparty_id AND b.seq = a.counterparty_seq
			WHERE a.kind IN ('transfer_out', 'transfer_in') AND (b.wallet_id IS NULL OR b.counterparty_id <> a.wallet_id OR b.counterparty_seq <> a.seq
			OR a.amount + b.amount <> 0 OR a.created_at <> b.created_at OR a.idempotency_key <> b.idempotency_key OR a.kind = b.kind)`,
		"money is conserved per currency": `SELECT w.currency, sum(w.balance), d.sum FROM wallet w JOIN (SELECT w.currency, sum(e.amount) FROM entry e JOIN wallet w ON w.id = e.wallet_id
			WHERE e.kind IN ('deposit', 'withdrawal') GROUP BY 1) d ON d.currency = w.currency GROUP BY 1, 3 HAVING sum(w.balance) <> d.sum`,
		"a key posts once": `SELECT wallet_id, idempotency_key, count(*) FROM entry WHERE kind <> 'transfer_in' GROUP BY 1, 2 HAVING count(*) > 1`,
		"an outbox row for each entry": `SELECT e.wallet_id, e.seq, count(o.seq) FROM entry e LEFT JOIN outbox o ON o.aggregate_id = e.wallet_id AND o.seq = e.seq
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
