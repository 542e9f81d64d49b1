// How fast: the service as a process of its own, against plain Postgres with one transaction per transfer, in
// one run on one machine. The baselines write the same rows into the same tables. The load generator shares
// the machine with all of them.
//
//	WALLET_TEST_KAFKA=apache go test -run '^$' -bench . -benchtime 1x .
//
// Metrics that end in -us and begin with a process' name are what a transfer, event or read cost it, in
// microseconds of processor time.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/book"
	"wallet/internal/conns"
	"wallet/internal/money"
)

var (
	benchWallets = flag.Int("bench.wallets", 10_000, "wallets that transfers go between")
	benchClients = flag.Int("bench.clients", 512, "connections of the HTTP benchmarks")
	benchBacklog = flag.Int("bench.backlog", 2_000_000, "events that the relay catches up with")
	benchFor     = flag.Duration("bench.for", 6*time.Second, "how long each side is driven")
	benchProfile = flag.String("bench.profile", "", "folder for the service's CPU profiles")
	benchSet     = flag.String("bench.set", "",
		"settings of the service under test, NAME=value separated by blanks")
	large = flag.Bool("large", false, "BenchmarkGrowth, BenchmarkMigration, BenchmarkLongWallet and "+
		"BenchmarkTakeover, too: up to 10,000,000 wallets and 50,000,000 entries; some minutes and about "+
		"20 GB each")
	benchOther = flag.String("bench.other", "",
		"another release's program, which BenchmarkRelease compares with this one")
	benchEntries = flag.Int("bench.entries", 50_000_000, "entries of BenchmarkMigration's ledger")
)

// -----------------------------------------------------------------------------------------------------------
// The baselines
// -----------------------------------------------------------------------------------------------------------

// baselineFunction is Postgres' own best: one round trip and one commit a transfer.
const baselineFunction = `
CREATE OR REPLACE FUNCTION transfer_once(from_id bigint, to_id bigint, sum numeric, key text, payload text)
RETURNS numeric LANGUAGE plpgsql AS $$
DECLARE
    a wallet; b wallet; at timestamptz := clock_timestamp();
BEGIN
    IF from_id < to_id THEN
        SELECT * INTO a FROM wallet WHERE id = from_id FOR NO KEY UPDATE;
        SELECT * INTO b FROM wallet WHERE id = to_id FOR NO KEY UPDATE;
    ELSE
        SELECT * INTO b FROM wallet WHERE id = to_id FOR NO KEY UPDATE;
        SELECT * INTO a FROM wallet WHERE id = from_id FOR NO KEY UPDATE;
    END IF;
    PERFORM FROM entry e WHERE e.wallet_id = from_id AND e.idempotency_key = key AND e.kind <> 'transfer_in';
    IF FOUND THEN RETURN a.balance; END IF;
    IF a.balance < sum THEN RAISE EXCEPTION 'insufficient funds'; END IF;
    UPDATE wallet SET balance = a.balance - sum, seq = a.seq + 1, entry_at = at WHERE id = from_id;
    UPDATE wallet SET balance = b.balance + sum, seq = b.seq + 1, entry_at = at WHERE id = to_id;
    INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq,
            created_at, kind, amount, balance, idempotency_key) VALUES
        (from_id, a.seq + 1, to_id, b.seq + 1, at, 'transfer_out', -sum, a.balance - sum, key),
        (to_id, b.seq + 1, from_id, a.seq + 1, at, 'transfer_in', sum, b.balance + sum, key);
    INSERT INTO outbox (aggregate_id, seq, event_type, payload)
    VALUES (from_id, a.seq + 1, 'wallet.entry.v1', payload), (to_id, b.seq + 1, 'wallet.entry.v1', payload);
    RETURN a.balance - sum;
END $$`

const benchPayload = `{"wallet_id":12345,"seq":123,"transaction_id":"12345-123",` +
	`"kind":"transfer_out","currency":"USD",` +
	`"amount":"-0.01","balance_before":"1000000","balance_after":"999999.99",` +
	`"counterparty":{"wallet_id":54321,"seq":321},"idempotency_key":"0123456789abcdef",` +
	`"created_at":"2026-01-02T03:04:05.123456Z"}`

// statement by statement: what a service normally does.
const (
	lockOne = `SELECT seq, balance::text FROM wallet WHERE id = $1 FOR NO KEY UPDATE`
	findKey = `SELECT count(*) FROM entry WHERE wallet_id = $1 AND idempotency_key = $2
		AND kind <> 'transfer_in'`
	updateOne = `UPDATE wallet SET balance = balance + $2::text::numeric, seq = $3, entry_at = $4
		WHERE id = $1`
	insertEntry = `INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind,
		amount, balance, idempotency_key)
		VALUES ($1, $2, $3, $4, $5, $6::text::entry_kind, $7::text::numeric, $8::text::numeric, $9)`
	insertEvent = `INSERT INTO outbox (aggregate_id, seq, event_type, payload)
		VALUES ($1, $2, 'wallet.entry.v1', $3)`
)

func transferByFunction(ctx context.Context, db *pgxpool.Conn, from, to int64, key string) error {
	_, err := db.Exec(ctx, `SELECT transfer_once($1, $2, 0.01, $3, $4)`, from, to, key, benchPayload)
	return err
}

func transferByStatements(ctx context.Context, db *pgxpool.Conn, from, to int64, key string) error {
	return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		seqs, balances := make(map[int64]int64), make(map[int64]string)
		for _, id := range []int64{min(from, to), max(from, to)} {
			var seq int64
			var balance string
			if err := tx.QueryRow(ctx, lockOne, id).Scan(&seq, &balance); err != nil {
				return err
			}
			seqs[id], balances[id] = seq, balance
		}
		var n int
		if err := tx.QueryRow(ctx, findKey, from, key).Scan(&n); err != nil || n > 0 {
			return err
		}
		at := time.Now()
		for _, leg := range []struct {
			id, other    int64
			kind, amount string
		}{{from, to, "transfer_out", "-0.01"}, {to, from, "transfer_in", "0.01"}} {
			after := dec(balances[leg.id]).Add(dec(leg.amount)).String()
			if _, err := tx.Exec(ctx, updateOne, leg.id, leg.amount, seqs[leg.id]+1, at); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, insertEntry, leg.id, seqs[leg.id]+1, leg.other, seqs[leg.other]+1, at,
				leg.kind, leg.amount, after, key); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, insertEvent, leg.id, seqs[leg.id]+1, benchPayload); err != nil {
				return err
			}
		}
		return nil
	})
}

// pgbenchScripts are the two ways again, for Postgres' own load generator: a client in C, prepared
// statements. :wallets is set by -D.
var pgbenchScripts = map[string]string{
	"statements": `
\set a random(1, :wallets)
\set b 1 + (:a - 1 + random(1, :wallets - 1)) % :wallets
\set key random(1, 9000000000000000)
BEGIN;
\if :a < :b
SELECT seq AS aseq, balance AS abalance, now() AS at FROM wallet WHERE id = :a FOR NO KEY UPDATE \gset
SELECT seq AS bseq, balance AS bbalance FROM wallet WHERE id = :b FOR NO KEY UPDATE \gset
\else
SELECT seq AS bseq, balance AS bbalance, now() AS at FROM wallet WHERE id = :b FOR NO KEY UPDATE \gset
SELECT seq AS aseq, balance AS abalance FROM wallet WHERE id = :a FOR NO KEY UPDATE \gset
\endif
SELECT count(*) FROM entry WHERE wallet_id = :a AND idempotency_key = 'p' || :key AND kind <> 'transfer_in';
UPDATE wallet SET balance = balance - 0.01, seq = seq + 1, entry_at = now() WHERE id = :a;
INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance,
idempotency_key)
    VALUES (:a, :aseq + 1, :b, :bseq + 1, now(), 'transfer_out', -0.01, :abalance - 0.01, 'p' || :key);
INSERT INTO outbox (aggregate_id, seq, event_type, payload)
VALUES (:a, :aseq + 1, 'wallet.entry.v1', 'PAYLOAD');
UPDATE wallet SET balance = balance + 0.01, seq = seq + 1, entry_at = now() WHERE id = :b;
INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance,
idempotency_key)
    VALUES (:b, :bseq + 1, :a, :aseq + 1, now(), 'transfer_in', 0.01, :bbalance + 0.01, 'p' || :key);
INSERT INTO outbox (aggregate_id, seq, event_type, payload)
VALUES (:b, :bseq + 1, 'wallet.entry.v1', 'PAYLOAD');
COMMIT;
`,
	"function": `
\set a random(1, :wallets)
\set b 1 + (:a - 1 + random(1, :wallets - 1)) % :wallets
\set key random(1, 9000000000000000)
SELECT transfer_once(:a, :b, 0.01, 'p' || :key, 'PAYLOAD');
`,
}

// findPgbench returns pgbench's path, or nothing where it is not installed.
func findPgbench() string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pgbench")
	if path, err := exec.LookPath("pgbench"); err == nil {
		found = append(found, path)
	}
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1]
}

// benchBaseline is how many clients drive the baselines, a turn for each number. 0 leaves them out.
var benchBaseline = []int{8, 16, 32}

func init() {
	const help = "clients of the baselines, a turn each, separated by commas; 0 leaves them out " +
		"(default 8,16,32)"
	flag.Func("bench.baseline", help, func(text string) error {
		benchBaseline = nil
		for n := range strings.SplitSeq(text, ",") {
			clients, err := strconv.Atoi(n)
			if err != nil {
				return err
			}
			benchBaseline = append(benchBaseline, clients)
		}
		return nil
	})
}

var pgbenchTPS = regexp.MustCompile(`tps = ([0-9.]+) \(without`)

// pgbench runs a script with clients and returns how many transfers a second.
func pgbench(b *testing.B, program, databaseURL, script string, clients, wallets int) float64 {
	b.Helper()
	file := filepath.Join(b.TempDir(), "script.sql")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(script, "PAYLOAD", benchPayload)),
		0o644); err != nil {
		b.Fatal(err)
	}
	out, err := exec.Command(program, "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", "2", "-T",
		strconv.Itoa(max(1, int(benchFor.Seconds()/2))),
		"-D", "wallets="+strconv.Itoa(wallets), "-f", file, databaseURL).CombinedOutput()
	tps := pgbenchTPS.FindSubmatch(out)
	if err != nil || tps == nil {
		b.Fatalf("pgbench: %v\n%s", err, out)
	}
	rate, _ := strconv.ParseFloat(string(tps[1]), 64)
	return rate
}

// baselines drives both ways with clients, by pgx and by pgbench, and returns the better rate of each.
func (r *replica) baselines(
	b *testing.B, db *pgxpool.Pool, pick pair, wallets, clients int,
) (byStatements, byFunction float64) {
	b.Helper()
	byStatements, _ = driveSQL(b, db, clients, *benchFor/2, pick, transferByStatements)
	byFunction, _ = driveSQL(b, db, clients, *benchFor/2, pick, transferByFunction)
	if program := findPgbench(); program != "" {
		byStatements = max(byStatements, pgbench(b, program, r.env["DATABASE_URL"],
			pgbenchScripts["statements"], clients, wallets))
		byFunction = max(byFunction, pgbench(b, program, r.env["DATABASE_URL"], pgbenchScripts["function"],
			clients, wallets))
	}
	return byStatements, byFunction
}

// -----------------------------------------------------------------------------------------------------------
// Driving
// -----------------------------------------------------------------------------------------------------------

// pair picks the two wallets of a transfer.
type pair func(dice *rand.Rand) (from, to int64)

// anyOf picks any two of n wallets.
func anyOf(n int) pair {
	return func(dice *rand.Rand) (int64, int64) {
		from, to := 1+dice.Int64N(int64(n)), 1+dice.Int64N(int64(n)-1)
		if to >= from {
			to++
		}
		return from, to
	}
}

func (l latencies) report(b *testing.B, prefix string) {
	b.ReportMetric(float64(l.at(.5).Microseconds())/1000, prefix+"p50-ms")
	b.ReportMetric(float64(l.at(.99).Microseconds())/1000, prefix+"p99-ms")
}

// driveSQL has clients at work until the time is up, and returns how many transfers they did a second and how
// long each took.
func driveSQL(
	b *testing.B, db *pgxpool.Pool, clients int, how time.Duration, pick pair,
	transfer func(ctx context.Context, db *pgxpool.Conn, from, to int64, key string) error,
) (float64, latencies) {
	b.Helper()
	all, run := make([]latencies, clients), newRun()
	var failed atomic.Pointer[error]
	var working sync.WaitGroup
	begin := make(chan struct{})
	var began time.Time
	for c := range clients {
		conn, err := db.Acquire(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		working.Go(func() {
			defer conn.Release()
			dice := newDice()
			<-begin
			for i := 0; time.Since(began) < how && failed.Load() == nil; i++ {
				from, to := pick(dice)
				at := time.Now()
				if err := transfer(context.Background(), conn, from, to,
					string(appendKey(nil, run, c, i))); err != nil {
					failed.Store(&err)
					return
				}
				all[c] = append(all[c], time.Since(at))
			}
		})
	}
	began = time.Now()
	close(begin)
	working.Wait()
	took := time.Since(began)
	if err := failed.Load(); err != nil {
		b.Fatal(*err)
	}
	l := slices.Concat(all...)
	slices.Sort(l)
	return float64(len(l)) / took.Seconds(), l
}

func newRun() string { return strconv.FormatInt(time.Now().UnixNano(), 36) }

func newDice() *rand.Rand { return rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())) }

// appendKey appends the idempotency key of a client's request number i in a run.
func appendKey(dst []byte, run string, client, i int) []byte {
	dst = append(append(dst, run...), '-')
	dst = append(strconv.AppendInt(dst, int64(client), 10), '-')
	return strconv.AppendInt(dst, int64(i), 10)
}

// httpLoad is what HTTP clients do, each over a connection of its own: one request after another.
type httpLoad struct {
	clients int
	how     time.Duration
	// The least time from one of a client's requests to its next.
	pace     time.Duration
	write    func(dst []byte, from, to int64, key []byte) []byte // appends one request
	answered func(key []byte)                                    // told of each response, if not nil
	most     int                                                 // requests in all; 0: any number
	until    func() bool                                         // ends it before its time, if not nil
}

// drive has the clients at work until the time is up, and returns how much they did a second and how long
// each request took. It speaks HTTP/1.1 by hand, for all of them in one goroutine: the load generator shares
// the machine, and net/http's client costs as much as the server.
func (l httpLoad) drive(b *testing.B, address string, pick pair) (perSecond float64, took latencies) {
	b.Helper()
	set, err := conns.Dial(address, l.clients)
	if err != nil {
		b.Fatal(err)
	}
	defer set.Close()
	clients := make([]struct {
		sent, due time.Duration // its last request, its next one
		n         int           // its requests so far
		waits     bool          // for a response
	}, l.clients)
	dice, run := newDice(), newRun()
	for c := range clients {
		clients[c].due = time.Duration(dice.Float64() * float64(l.pace))
	}
	var request, key []byte
	sent := 0
	began := time.Now()
	for {
		now, busy, rest := time.Since(began), false, cmp.Or(l.pace, conns.Never)
		for c := range clients {
			client := &clients[c]
			over := max(now, client.due) >= l.how || l.most > 0 && sent == l.most ||
				l.until != nil && l.until()
			if !client.waits && over {
				continue
			}
			busy = true
			switch {
			case client.waits:
			case client.due > now:
				rest = min(rest, client.due-now)
			default:
				from, to := pick(dice)
				key = appendKey(key[:0], run, c, client.n)
				request = l.write(request[:0], from, to, key)
				client.sent, client.waits = time.Since(began), true
				sent++
				if err := set.Send(c, request); err != nil {
					b.Fatal(err)
				}
			}
		}
		if !busy {
			break
		}
		for c, err := range set.Answered(rest) {
			if err != nil {
				b.Fatal(err)
			}
			client := &clients[c]
			took = append(took, time.Since(began)-client.sent)
			if l.answered != nil {
				l.answered(appendKey(key[:0], run, c, client.n))
			}
			client.n, client.due, client.waits = client.n+1, client.due+l.pace, false
		}
	}
	ended := time.Since(began)
	slices.Sort(took)
	return float64(len(took)) / ended.Seconds(), took
}

func driveHTTP(b *testing.B, address string, clients int, how time.Duration, pick pair) (float64, latencies) {
	b.Helper()
	return httpLoad{clients: clients, how: how, write: writeTransfer}.drive(b, address, pick)
}

func writeTransfer(dst []byte, from, to int64, key []byte) []byte {
	dst = strconv.AppendInt(append(dst, "POST /v1/wallets/"...), from, 10)
	return writeBody(append(dst, "/transfer"...), to, `,"amount":"0.01"`, key)
}

// writeBody appends the rest of a request that names another wallet.
func writeBody(dst []byte, to int64, fields string, key []byte) []byte {
	var room [128]byte
	body := strconv.AppendInt(append(room[:0], `{"to_id":`...), to, 10)
	body = append(append(body, fields...), `,"idempotency_key":"`...)
	body = append(append(body, key...), `"}`...)
	dst = append(dst, " HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: "...)
	dst = append(strconv.AppendInt(dst, int64(len(body)), 10), "\r\n\r\n"...)
	return append(dst, body...)
}

// -----------------------------------------------------------------------------------------------------------
// The service and what it costs
// -----------------------------------------------------------------------------------------------------------

// benchService is a service as a process, on fresh tables with funded wallets, and a pool for the baselines
// on the same tables.
func benchService(b *testing.B, wallets int, settings ...string) (r *replica, baseline *pgxpool.Pool) {
	b.Helper()
	return benchRelease(b, "", wallets, settings...)
}

// benchRelease is benchService with another release's program.
func benchRelease(b *testing.B, binary string, wallets int, settings ...string) (r *replica,
	baseline *pgxpool.Pool) {
	b.Helper()
	env := testEnv(b, append(append([]string{"REQUESTS_MAX=100000"}, settings...),
		strings.Fields(*benchSet)...)...)
	r = newReplica(b, env, fmt.Sprintf("bench-%d", names.Add(1)))
	r.binary = binary
	if env["KAFKA_BROKERS"] != "" {
		dropSlotAtEnd(b, env["REPLICATION_SLOT"])
	}
	r.start(b)
	eventually(b, 20*time.Second, "ready", r.isReady)
	baseline, err := pgxpool.New(context.Background(), env["DATABASE_URL"]+"&pool_max_conns=64")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(baseline.Close)
	// The seed's rows were never posted, so there are no events for the relay to be busy with.
	for _, statement := range []string{
		baselineFunction,
		`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at)
			SELECT g, 'USD', now(), 1, 1000000, now()
			FROM generate_series(1, ` + strconv.Itoa(wallets) + `) g`,
		`INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
			SELECT id, 1, entry_at, 'deposit', 1000000, 1000000, 'seed' FROM wallet`,
		`VACUUM ANALYZE`, `CHECKPOINT`,
	} {
		if _, err := baseline.Exec(context.Background(), statement); err != nil {
			b.Fatal(err)
		}
	}
	if env["KAFKA_BROKERS"] != "" {
		eventually(b, 20*time.Second, "leading", r.leads)
	}
	return r, baseline
}

func (r *replica) address() string { return strings.TrimPrefix(r.url, "http://") }

// processes names the processes at work: the service, the servers, and ourselves, the load generator.
func (r *replica) processes(b *testing.B) map[string]int {
	return withServers(b, map[string]int{"service": r.cmd.Process.Pid, "driver": os.Getpid()})
}

// withServers adds the servers' processes.
func withServers(b *testing.B, found map[string]int) map[string]int {
	for name, raw := range stack(b).PIDs {
		var pid int
		if json.Unmarshal(raw, &pid) == nil {
			found[name] = pid
		}
	}
	return found
}

// cost is processor time by process.
type cost map[string]time.Duration

func (c cost) add(before, after cost) {
	for name := range after {
		c[name] += after[name] - before[name]
	}
}

// report tells what each of n things cost every process, in microseconds.
func (c cost) report(b *testing.B, prefix string, n float64) {
	for name, spent := range c {
		if us := float64(spent.Microseconds()) / n; us >= .05 {
			b.ReportMetric(us, prefix+name+"-us")
		}
	}
}

// cpu is the processor time of the processes at work.
func (r *replica) cpu(b *testing.B) cost { return processorTime(r.processes(b)) }

// processorTime is what each process and its children have used so far, Postgres' WAL sender by itself; empty
// where there is no /proc.
func processorTime(processes map[string]int) cost {
	parents, used := make(map[int]int), make(map[int]time.Duration)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		stat, _ := os.ReadFile(file)
		_, rest, ok := bytes.Cut(stat, []byte(") ")) // what precedes is the pid and a name
		fields := strings.Fields(string(rest))
		if !ok || len(fields) < 15 {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		parents[pid], _ = strconv.Atoi(fields[1])
		for _, ticks := range fields[11:15] { // own and waited-for children's, user and system, in 1/100 s
			n, _ := strconv.Atoi(ticks)
			used[pid] += time.Duration(n) * 10 * time.Millisecond
		}
	}
	total := make(cost)
	for name, process := range processes {
		total[name] = used[process]
		for pid, parent := range parents {
			if parent != process || name != "postgres" {
				continue
			}
			title, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if bytes.HasPrefix(title, []byte("postgres: walsender")) {
				total["walsender"] += used[pid]
			} else {
				total[name] += used[pid] // its children are part of it
			}
		}
	}
	return total
}

// profile writes the service's CPU profile of the next seconds, and what Postgres spent on each statement
// where it keeps count, if -bench.profile names a folder.
func (r *replica) profile(b *testing.B, seconds time.Duration) (wait func()) {
	if *benchProfile == "" {
		return func() {}
	}
	name := filepath.Join(*benchProfile, strings.NewReplacer("/", "-", "Benchmark", "").Replace(b.Name()))
	db := connect(b, r.env["DATABASE_URL"])
	_, err := db.Exec(context.Background(),
		`CREATE EXTENSION IF NOT EXISTS pg_stat_statements; SELECT pg_stat_statements_reset()`)
	counted := err == nil
	cmd := exec.Command("curl", "-s", "-o", name+".pprof",
		fmt.Sprintf("%s/debug/pprof/profile?seconds=%d", r.operate, int(seconds.Seconds())))
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return func() {
		cmd.Wait()
		if !counted {
			return
		}
		rows, _ := db.Query(context.Background(),
			`SELECT format('%10s calls %10s us each %12s rows %12s WAL bytes  %s', calls,
				round((1000 * mean_exec_time)::numeric, 1), rows, wal_bytes,
				left(regexp_replace(query, '\s+', ' ', 'g'), 150))
			FROM pg_stat_statements ORDER BY total_exec_time DESC LIMIT 20`)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err == nil {
			err = os.WriteFile(name+".statements", []byte(strings.Join(lines, "\n")+"\n"), 0o644)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// -----------------------------------------------------------------------------------------------------------
// Writes
// -----------------------------------------------------------------------------------------------------------

// BenchmarkTransfers is the claim: transfers a second over HTTP, and how many times the baselines' that is.
func BenchmarkTransfers(b *testing.B) {
	for _, c := range []struct {
		name    string
		relay   bool
		wallets int
	}{{"relay and cache", true, *benchWallets}, {"neither", false, *benchWallets}, {"hot pair", false, 2}} {
		b.Run(c.name, func(b *testing.B) {
			settings := []string{"REDIS_URL="}
			if c.relay {
				settings = []string{"KAFKA_BROKERS=" + stack(b).KafkaBrokers}
			}
			r, db := benchService(b, c.wallets, settings...)
			pick := anyOf(c.wallets)
			var byStatements, byFunction, ours float64
			var l latencies
			spent := make(cost)
			for b.Loop() {
				var rates []float64
				for _, clients := range benchBaseline { // in turns: the machine's moods meet all of them
					if clients > 0 {
						r.stop(b) // the baselines have the machine for themselves, without a relay
						statements, function := r.baselines(b, db, pick, c.wallets, clients)
						byStatements, byFunction = max(byStatements, statements), max(byFunction, function)
						r.start(b)
						eventually(b, 20*time.Second, "ready", r.isReady)
						driveHTTP(b, r.address(), 16, time.Second, pick) // connections, prepared statements
					}
					if c.relay { // works off the baselines' events first
						eventually(b, 60*time.Second, "the relay has caught up", func() bool {
							return r.leads() && r.metric("wallet_relay_lag_bytes") < 100_000
						})
					}
					events := r.metric("wallet_relay_events_total")
					transactions := r.metric("wallet_relay_batches_total")
					before, profiled := r.cpu(b), r.profile(b, *benchFor)
					rate, turn := driveHTTP(b, r.address(), *benchClients, *benchFor, pick)
					spent.add(before, r.cpu(b))
					rates, l = append(rates, rate), append(l, turn...)
					profiled()
					if c.relay {
						b.ReportMetric(float64(r.awaitEvents(b, events+2*float64(len(turn))).Milliseconds()),
							"relay-behind-ms")
						transactions = r.metric("wallet_relay_batches_total") - transactions
						b.ReportMetric(2*float64(len(turn))/transactions, "events/transaction")
					}
				}
				slices.Sort(rates)
				slices.Sort(l)
				ours = rates[len(rates)/2]
				spent.report(b, "", float64(len(l)))
			}
			b.ReportMetric(ours, "transfers/s")
			l.report(b, "")
			b.ReportMetric(byStatements, "statements/s")
			b.ReportMetric(byFunction, "function/s")
			b.ReportMetric(ours/byStatements, "x-statements")
			b.ReportMetric(ours/byFunction, "x-function")
			b.ReportMetric(r.memory("VmHWM"), "MB-highest")
			b.ReportMetric(0, "ns/op")
			b.StopTimer()
			checkBalances(b, db)
		})
	}
}

// BenchmarkRelease is this program beside another release's, each on a database of its own, both with relay
// and cache. They take turns of a second, so that the machine's moods meet both. The load generator's time
// does not count.
func BenchmarkRelease(b *testing.B) {
	if *benchOther == "" {
		b.Skip("pass -bench.other: a program")
	}
	pick := anyOf(*benchWallets)
	var sides [2]*replica
	for i, binary := range []string{*benchOther, ""} {
		sides[i], _ = benchRelease(b, binary, *benchWallets, "KAFKA_BROKERS="+stack(b).KafkaBrokers)
		driveHTTP(b, sides[i].address(), *benchClients, time.Second, pick)
		sides[i].settle(b)
	}
	for b.Loop() {
		var ratios []float64
		var rates, totals [2][]float64
		spent := [2]cost{{}, {}}
		var n [2]float64
		for turn := range 10 * max(1, int(benchFor.Seconds()/2)) {
			for _, i := range [][]int{{0, 1}, {1, 0}}[turn%2] { // who comes first may have it better
				r := sides[i]
				before := r.cpu(b)
				rate, l := driveHTTP(b, r.address(), *benchClients, time.Second, pick)
				r.settle(b)
				turn := make(cost)
				turn.add(before, r.cpu(b))
				spent[i].add(before, r.cpu(b))
				delete(turn, "driver")
				var total time.Duration
				for _, t := range turn {
					total += t
				}
				n[i] += float64(len(l))
				rates[i] = append(rates[i], rate)
				totals[i] = append(totals[i], float64(total.Microseconds())/float64(len(l)))
			}
			last := len(totals[0]) - 1
			ratios = append(ratios, totals[1][last]/totals[0][last])
		}
		for i, name := range []string{"other-", ""} {
			spent[i].report(b, name, n[i])
			slices.Sort(rates[i])
			slices.Sort(totals[i])
			b.ReportMetric(rates[i][len(rates[i])/2], name+"transfers/s")
			b.ReportMetric(totals[i][len(totals[i])/2], name+"all-us")
		}
		slices.Sort(ratios)
		for name, at := range map[string]int{"x-quartile-1": 1, "x-median": 2, "x-quartile-3": 3} {
			b.ReportMetric(ratios[at*(len(ratios)-1)/4], name)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// settle waits until the relay has nothing to do.
func (r *replica) settle(b *testing.B) {
	b.Helper()
	eventually(b, 60*time.Second, "the relay has caught up", func() bool {
		before := r.metric("wallet_relay_events_total")
		time.Sleep(20 * time.Millisecond)
		return before > 0 && r.metric("wallet_relay_events_total") == before
	})
}

// awaitEvents waits until the relay has published so many, and returns how long it took.
func (r *replica) awaitEvents(b *testing.B, events float64) time.Duration {
	b.Helper()
	began := time.Now()
	eventually(b, 60*time.Second, "the relay has caught up", func() bool {
		return r.metric("wallet_relay_events_total") >= events
	})
	return time.Since(began)
}

// checkBalances: a benchmark that loses money measured nothing.
func checkBalances(b *testing.B, db *pgxpool.Pool) {
	b.Helper()
	var wrong int
	err := db.QueryRow(context.Background(), `
		SELECT count(*) FROM wallet w JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
		WHERE e.balance <> w.balance
		   OR (SELECT sum(balance) FROM wallet) <> 1000000 * (SELECT count(*) FROM wallet)`).Scan(&wrong)
	if err != nil || wrong > 0 {
		b.Fatalf("%d wallets are wrong, %v", wrong, err)
	}
}

// bulk is clients that send independent transfers, so many in each request.
func bulk(clients, size int, how time.Duration, pick pair) httpLoad {
	dice := newDice()
	return httpLoad{clients: clients, how: how, write: func(dst []byte, _, _ int64, key []byte) []byte {
		body := append(make([]byte, 0, 128*size), `{"atomic":false,"operations":[`...)
		for i := range size {
			if i > 0 {
				body = append(body, ',')
			}
			from, to := pick(dice)
			body = strconv.AppendInt(append(body, `{"op":"transfer","wallet_id":`...), from, 10)
			body = strconv.AppendInt(append(body, `,"to_id":`...), to, 10)
			body = append(append(body, `,"amount":"0.01","idempotency_key":"`...), key...)
			body = append(strconv.AppendInt(append(body, '-'), int64(i), 10), `"}`...)
		}
		body = append(body, "]}"...)
		dst = append(dst, "POST /v1/batches HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\n"...)
		dst = strconv.AppendInt(append(dst, "Content-Length: "...), int64(len(body)), 10)
		return append(append(dst, "\r\n\r\n"...), body...)
	}}
}

// BenchmarkBulk: batches of independent transfers, in turns with single requests; and the latency of single
// requests at a tenth of the best rate, alone and beside such a load.
func BenchmarkBulk(b *testing.B) {
	const clients, size = 8, 500
	r, db := benchService(b, *benchWallets, "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	pick := anyOf(*benchWallets)
	var singles, bulks []float64
	var alone, beside latencies
	single, many := make(cost), make(cost)
	transfers, moved := 0.0, 0.0
	caughtUp := func() {
		eventually(b, 60*time.Second, "the relay has caught up", func() bool {
			return r.metric("wallet_relay_lag_bytes") < 100_000
		})
	}
	for b.Loop() {
		for range 3 {
			before := r.cpu(b)
			rate, l := driveHTTP(b, r.address(), *benchClients, *benchFor/2, pick)
			singles, transfers = append(singles, rate), transfers+float64(len(l))
			caughtUp()
			single.add(before, r.cpu(b))
			profiled := r.profile(b, *benchFor/2)
			before = r.cpu(b)
			rate, l = bulk(clients, size, *benchFor/2, pick).drive(b, r.address(), pick)
			bulks, moved = append(bulks, rate*size), moved+float64(len(l)*size)
			caughtUp()
			many.add(before, r.cpu(b))
			profiled()
			paced := httpLoad{clients: 64, how: *benchFor / 2, pace: 64 * time.Second / 1200,
				write: writeTransfer}
			_, l = paced.drive(b, r.address(), pick)
			alone = append(alone, l...)
			var working sync.WaitGroup
			working.Go(func() { bulk(clients, size, *benchFor/2, pick).drive(b, r.address(), pick) })
			time.Sleep(100 * time.Millisecond)
			paced.how -= 200 * time.Millisecond
			_, l = paced.drive(b, r.address(), pick)
			beside = append(beside, l...)
			working.Wait()
			caughtUp()
		}
	}
	for _, all := range [][]float64{singles, bulks} {
		slices.Sort(all)
	}
	slices.Sort(alone)
	slices.Sort(beside)
	single.report(b, "single-", transfers)
	many.report(b, "bulk-", moved)
	b.ReportMetric(singles[len(singles)-1], "singles/s")
	b.ReportMetric(bulks[len(bulks)/2], "transfers/s")
	b.ReportMetric(bulks[len(bulks)/2]/singles[len(singles)-1], "x-singles")
	alone.report(b, "alone-")
	beside.report(b, "beside-")
	b.ReportMetric(float64(beside.at(.99))/float64(alone.at(.99)), "x-p99")
	b.ReportMetric(r.memory("VmHWM"), "MB-highest")
	b.ReportMetric(0, "ns/op")
	b.StopTimer()
	checkBalances(b, db)
}

// BenchmarkHolds: holds placed, then each captured for a payee, in turns with transfers.
func BenchmarkHolds(b *testing.B) {
	r, db := benchService(b, *benchWallets, "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	pick := anyOf(*benchWallets)
	var transfers, placed, captured []float64
	spent := make(cost)
	pairs := 0.0
	for b.Loop() {
		for range 3 {
			rate, _ := driveHTTP(b, r.address(), *benchClients, *benchFor/2, pick)
			transfers = append(transfers, rate)
			before := r.cpu(b)
			rate, _ = httpLoad{clients: *benchClients, how: *benchFor / 2,
				write: func(dst []byte, from, to int64, key []byte) []byte {
					dst = strconv.AppendInt(append(dst, "POST /v1/wallets/"...), from, 10)
					return writeBody(append(dst, "/holds"...), to, `,"amount":"0.01"`, key)
				}}.drive(b, r.address(), pick)
			placed = append(placed, rate)
			rows, _ := db.Query(context.Background(), `
SELECT wallet_id || '-' || seq, to_id FROM hold WHERE status = 'open' ORDER BY random()`)
			type open struct {
				ID   string
				ToID int64
			}
			holds, err := pgx.CollectRows(rows, pgx.RowToStructByPos[open])
			if err != nil {
				b.Fatal(err)
			}
			pairs += float64(len(holds))
			began := time.Now()
			all := len(holds)
			httpLoad{clients: min(*benchClients, all), how: time.Minute, most: all,
				write: func(dst []byte, _, _ int64, key []byte) []byte {
					h := holds[0]
					holds = holds[1:]
					dst = append(append(dst, "POST /v1/holds/"...), h.ID...)
					return writeBody(append(dst, "/capture"...), h.ToID, "", key)
				}}.drive(b, r.address(), pick)
			captured = append(captured, float64(all)/time.Since(began).Seconds())
			spent.add(before, r.cpu(b))
		}
		spent.report(b, "", pairs)
	}
	mid := func(rates []float64) float64 { slices.Sort(rates); return rates[len(rates)/2] }
	pair := 1 / (1/mid(placed) + 1/mid(captured))
	b.ReportMetric(mid(transfers), "transfers/s")
	b.ReportMetric(mid(placed), "holds/s")
	b.ReportMetric(mid(captured), "captures/s")
	b.ReportMetric(pair/(mid(transfers)/2), "x-two-transfers")
	b.ReportMetric(0, "ns/op")
	b.StopTimer()
	checkBalances(b, db)
}

// BenchmarkLatency is one client alone: what group commit costs where there is no group.
func BenchmarkLatency(b *testing.B) {
	r, db := benchService(b, *benchWallets, "REDIS_URL=")
	pick := anyOf(*benchWallets)
	driveHTTP(b, r.address(), 1, time.Second, pick)
	driveSQL(b, db, 1, time.Second, pick, transferByFunction)
	var ours, function latencies
	for b.Loop() {
		for range 3 { // in turns
			_, f := driveSQL(b, db, 1, *benchFor/3, pick, transferByFunction)
			_, o := driveHTTP(b, r.address(), 1, *benchFor/3, pick)
			function, ours = append(function, f...), append(ours, o...)
		}
	}
	slices.Sort(function)
	slices.Sort(ours)
	b.ReportMetric(float64(ours.at(.5).Microseconds()), "p50-us")
	b.ReportMetric(float64(function.at(.5).Microseconds()), "function-p50-us")
	b.ReportMetric(float64(ours.at(.5))/float64(function.at(.5)), "x-function")
	b.ReportMetric(0, "ns/op")
}

// -----------------------------------------------------------------------------------------------------------
// The relay
// -----------------------------------------------------------------------------------------------------------

// BenchmarkCatchUp is a relay that comes back to a backlog: transactions of 1,000 outbox rows, as the writers
// commit them under load.
func BenchmarkCatchUp(b *testing.B) {
	r, db := benchService(b, 1, "REDIS_URL=", "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	var rate float64
	for b.Loop() {
		spent := make(cost)
		r.stop(b)
		for first := 0; first < *benchBacklog; first += 1000 {
			if _, err := db.Exec(context.Background(), `
				INSERT INTO outbox (aggregate_id, seq, event_type, payload)
				SELECT 1 + g % 10000, 2 + g / 10000, 'wallet.entry.v1',
				       overlay($1::text placing lpad(g::text, 16, '0')
				               from position('0123456789abcdef' in $1::text) for 16)
				FROM generate_series($2::bigint, $2::bigint + 999) g`, benchPayload, first); err != nil {
				b.Fatal(err)
			}
		}
		r.start(b)
		eventually(b, 60*time.Second, "leading", func() bool {
			return r.metric("wallet_relay_events_total") > 0
		})
		before, profiled := r.cpu(b), r.profile(b, *benchFor)
		began, first := time.Now(), r.metric("wallet_relay_events_total")
		eventually(b, 5*time.Minute, "the backlog is published", func() bool {
			time.Sleep(100 * time.Millisecond) // a look costs Postgres 4 ms, for the outbox's size
			return r.metric("wallet_relay_events_total") >= float64(*benchBacklog)
		})
		n := float64(*benchBacklog) - first
		rate = n / time.Since(began).Seconds()
		spent.add(before, r.cpu(b))
		spent.report(b, "", n)
		profiled()
	}
	b.ReportMetric(rate, "events/s")
	b.ReportMetric(r.memory("VmHWM"), "MB-highest")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkEventLatency is the time from a transfer's answer to its event at a read_committed consumer: at
// half of the write path's maximum, and one event at a time.
func BenchmarkEventLatency(b *testing.B) {
	env := []string{"KAFKA_BROKERS=" + stack(b).KafkaBrokers}
	r, _ := benchService(b, *benchWallets, env...)
	pick := anyOf(*benchWallets)
	arrivals := consumeKeys(b, r.env["KAFKA_TOPIC"])
	for b.Loop() {
		most, l := driveHTTP(b, r.address(), *benchClients, *benchFor/2, pick)
		r.awaitEvents(b, 2*float64(len(l)))
		pace := time.Duration(float64(*benchClients) / (most / 2) * float64(time.Second))
		transactions, before := r.metric("wallet_relay_batches_total"), r.cpu(b)
		loaded := r.eventLatency(b, arrivals, *benchClients, *benchFor, pace, pick)
		transactions = r.metric("wallet_relay_batches_total") - transactions
		b.ReportMetric(2*float64(len(loaded))/transactions, "events/transaction")
		spent := make(cost)
		spent.add(before, r.cpu(b))
		spent.report(b, "half-load-", float64(len(loaded)))
		b.ReportMetric(float64(len(loaded))/benchFor.Seconds(), "transfers/s")
		b.ReportMetric(most, "most-transfers/s")
		loaded.report(b, "half-load-")
		r.eventLatency(b, arrivals, 1, *benchFor, 20*time.Millisecond, pick).report(b, "idle-")
	}
	b.ReportMetric(0, "ns/op")
}

// eventLatency has clients make transfers, one in a pace each, and returns how long after its answer each
// event arrived (0 if before).
func (r *replica) eventLatency(
	b *testing.B, arrivals *keyTimes, clients int, how, pace time.Duration, pick pair,
) latencies {
	b.Helper()
	answered := &keyTimes{at: make(map[string]time.Time)}
	note := func(key []byte) { answered.add(string(key)) }
	httpLoad{clients: clients, how: how, pace: pace, write: writeTransfer, answered: note}.drive(b,
		r.address(), pick)
	var l latencies
	for key, at := range answered.at {
		eventually(b, 30*time.Second, "the event of "+key, func() bool { return !arrivals.of(key).IsZero() })
		l = append(l, max(0, arrivals.of(key).Sub(at)))
	}
	slices.Sort(l)
	return l
}

// keyTimes is when something was known of an idempotency key.
type keyTimes struct {
	mu sync.Mutex
	at map[string]time.Time
}

func (k *keyTimes) add(key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.at[key] = time.Now()
}

func (k *keyTimes) of(key string) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.at[key]
}

// consumeKeys reads a topic as a read_committed consumer until the benchmark ends, and notes when each
// payer's event arrived.
func consumeKeys(b *testing.B, topic string) *keyTimes {
	b.Helper()
	conf := sarama.NewConfig()
	conf.Consumer.IsolationLevel = sarama.ReadCommitted
	consumer, err := sarama.NewConsumer(strings.Split(stack(b).KafkaBrokers, ","), conf)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { consumer.Close() })
	partitions, err := consumer.Partitions(topic)
	if err != nil {
		b.Fatal(err)
	}
	arrivals := &keyTimes{at: make(map[string]time.Time)}
	for _, p := range partitions {
		pc, err := consumer.ConsumePartition(topic, p, sarama.OffsetOldest)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(pc.AsyncClose)
		go func() {
			for m := range pc.Messages() {
				if bytes.Contains(m.Value, []byte(`"kind":"transfer_out"`)) {
					_, key, _ := bytes.Cut(m.Value, []byte(`,"idempotency_key":"`))
					key, _, _ = bytes.Cut(key, []byte{'"'})
					arrivals.add(string(key))
				}
			}
		}()
	}
	return arrivals
}

// -----------------------------------------------------------------------------------------------------------
// Reads, growth, start
// -----------------------------------------------------------------------------------------------------------

// BenchmarkBalance is whether Redis earns its place: balances a second from it, and by Postgres' primary key.
func BenchmarkBalance(b *testing.B) {
	r, _ := benchService(b, *benchWallets)
	pick := anyOf(*benchWallets)
	read := func(header string) func(dst []byte, from, to int64, key []byte) []byte {
		return func(dst []byte, from, _ int64, _ []byte) []byte {
			return fmt.Appendf(dst, "GET /v1/wallets/%d/balance HTTP/1.1\r\nHost: b\r\n%s\r\n", from, header)
		}
	}
	sides := []struct{ name, header string }{{"cache", ""}, {"postgres", "Cache-Control: no-cache\r\n"}}
	for b.Loop() {
		rates := make(map[string]float64)
		for range 2 { // in turns; the first fills the cache
			for _, side := range sides {
				before := r.cpu(b)
				reads := httpLoad{clients: 64, how: *benchFor / 2, write: read(side.header)}
				rate, l := reads.drive(b, r.address(), pick)
				rates[side.name] = rate
				b.ReportMetric(rate, side.name+"-reads/s")
				l.report(b, side.name+"-")
				spent := make(cost)
				spent.add(before, r.cpu(b))
				spent.report(b, side.name+"-", float64(len(l)))
			}
		}
		b.ReportMetric(rates["cache"]/rates["postgres"], "x-postgres")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkStart is from the process' start against running servers to its first ready answer, and how long
// until its relay leads.
func BenchmarkStart(b *testing.B) {
	r, _ := benchService(b, 1, "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	for b.Loop() {
		var ready, leading latencies
		for range 5 {
			r.stop(b)
			began := time.Now()
			r.start(b)
			eventually(b, 20*time.Second, "ready", r.isReady)
			ready = append(ready, time.Since(began))
			eventually(b, 20*time.Second, "leading", r.leads)
			leading = append(leading, time.Since(began))
		}
		slices.Sort(ready)
		slices.Sort(leading)
		b.ReportMetric(float64(ready.at(.5).Milliseconds()), "ready-ms")
		b.ReportMetric(float64(leading.at(.5).Milliseconds()), "leading-ms")
		b.ReportMetric(r.memory("VmRSS"), "MB")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkGrowth is what a large ledger costs: writes among 10,000 active wallets and uniformly among all,
// and reads of one wallet, against an empty ledger's, in one run.
func BenchmarkGrowth(b *testing.B) {
	if !*large {
		b.Skip("pass -large: it fills about 20 GB")
	}
	const wallets, entries = 10_000_000, 50_000_000
	small, _ := benchService(b, *benchWallets, "REDIS_URL=")
	r, db := benchService(b, 1, "REDIS_URL=")
	deep := page{from: 1, to: 4, descending: true, limit: 20}
	reads := map[string]string{
		"balance": "/balance", "first-page": "/history?limit=20",
		"deep-page":     "/history?limit=20&cursor=" + deep.cursor(),
		"between-times": "/history?limit=20&since=2020-01-01T00:00:00Z&until=2040-01-01T00:00:00Z",
	}
	read := func(r *replica, path string, how time.Duration) time.Duration {
		_, l := httpLoad{clients: 1, how: how, write: func(dst []byte, from, _ int64, _ []byte) []byte {
			return fmt.Appendf(dst,
				"GET /v1/wallets/%d%s HTTP/1.1\r\nHost: b\r\nCache-Control: no-cache\r\n\r\n", from, path)
		}}.drive(b, r.address(), anyOf(*benchWallets))
		return l.at(.5)
	}
	for _, path := range reads {
		read(small, path, time.Second/4)
	}
	began := time.Now()
	grow(b, db, wallets, entries/wallets)
	b.Logf("%d wallets and %d entries after %v", wallets, entries, time.Since(began).Round(time.Second))
	for b.Loop() {
		var empty, active, uniform []float64
		for range 3 { // in turns
			rate, _ := driveHTTP(b, small.address(), *benchClients, *benchFor, anyOf(*benchWallets))
			empty = append(empty, rate)
			rate, _ = driveHTTP(b, r.address(), *benchClients, *benchFor, anyOf(*benchWallets))
			active = append(active, rate)
			rate, _ = driveHTTP(b, r.address(), *benchClients, *benchFor, anyOf(wallets))
			uniform = append(uniform, rate)
		}
		b.Logf("transfers/s on an empty ledger %.0f, among 10,000 wallets of the large one %.0f, "+
			"among all %.0f",
			empty, active, uniform)
		for _, rates := range [][]float64{empty, active, uniform} {
			slices.Sort(rates)
		}
		b.ReportMetric(empty[1], "empty-transfers/s")
		b.ReportMetric(active[1]/empty[1], "x-active")
		b.ReportMetric(uniform[1]/empty[1], "x-uniform")
		for name, path := range reads {
			before, after := read(small, path, *benchFor/3), read(r, path, *benchFor/3)
			b.ReportMetric(float64(after)/float64(before), "x-"+name)
			b.ReportMetric(float64(after.Microseconds()), name+"-us")
		}
	}
	b.ReportMetric(0, "ns/op")
	b.StopTimer()
	checkBalances(b, db)
}

// grow fills the ledger: its indexes are dropped and made again, since a row at a time would take hours.
func grow(b *testing.B, db *pgxpool.Pool, wallets, each int) {
	b.Helper()
	for _, statement := range []string{
		`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at)
			SELECT g, 'USD', now(), $2, 1000000, now() FROM generate_series(2, $1::bigint) g`,
		`ALTER TABLE entry DROP CONSTRAINT entry_pkey`,
		`DROP INDEX idempotency_key_posts_once`,
		`ALTER TABLE entry DROP CONSTRAINT IF EXISTS entry_wallet_exists`,
		`ALTER TABLE entry DISABLE TRIGGER USER`,
		`INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
			SELECT w, s, now(), 'deposit', 1000000 / $2::numeric, 1000000 / $2::numeric * s, 'seed-' || s
			FROM generate_series(1, $2::bigint) s, generate_series(2, $1::bigint) w`,
		`SET LOCAL maintenance_work_mem = '1GB'`,
		`ALTER TABLE entry ADD PRIMARY KEY (wallet_id, seq)`,
		`CREATE UNIQUE INDEX idempotency_key_posts_once ON entry (wallet_id, idempotency_key)
			WHERE kind <> 'transfer_in'`,
		`ALTER TABLE entry ENABLE TRIGGER USER`,
		`VACUUM ANALYZE`, `CHECKPOINT`,
	} {
		var args []any
		if strings.Contains(statement, "$") {
			args = []any{wallets, each}
		}
		if !strings.Contains(statement, "$2") && args != nil {
			args = args[:1]
		}
		if _, err := db.Exec(context.Background(), statement, args...); err != nil {
			b.Fatalf("%s: %v", statement, err)
		}
	}
}

// BenchmarkMigration is a live ledger of the former release, under load, that a replica of this one brings to
// its schema: the longest that a write took meanwhile, and how long all of it took.
func BenchmarkMigration(b *testing.B) {
	if !*large {
		b.Skip("pass -large: it fills about 10 GB")
	}
	const each = 50
	wallets := *benchEntries / each
	env := testEnv(b, "REQUESTS_MAX=100000", "REDIS_URL=")
	old := startFormer(b, env)
	db, err := pgxpool.New(context.Background(), env["DATABASE_URL"])
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(db.Close)
	old.post(b, "/v1/wallets/1/deposit", `{"amount":"1000000","idempotency_key":"seed"}`)
	began := time.Now()
	grow(b, db, wallets, each)
	b.Logf("%d wallets and %d entries after %v", wallets, *benchEntries, time.Since(began).Round(time.Second))
	unvalidated := func() (n int) {
		if err := db.QueryRow(context.Background(),
			`SELECT count(*) FROM pg_constraint WHERE NOT convalidated`).Scan(&n); err != nil {
			b.Error(err)
		}
		return n
	}
	const clients = 64
	address, pick := strings.TrimPrefix(old.url, "http://"), anyOf(min(*benchWallets, wallets))
	for b.Loop() {
		driveHTTP(b, address, clients, time.Second, pick) // connections, prepared statements
		// until drives the former release until the next thing is done, and reports the writes meanwhile.
		until := func(name string, is func() bool) {
			var done atomic.Bool
			began := time.Now()
			go func() {
				for !is() {
					time.Sleep(10 * time.Millisecond)
				}
				done.Store(true)
			}()
			rate, l := httpLoad{clients: clients, how: time.Hour, write: writeTransfer,
				until: done.Load}.drive(b, address, pick)
			b.ReportMetric(time.Since(began).Seconds(), name+"-s")
			b.ReportMetric(rate, name+"-transfers/s")
			l.report(b, name+"-")
			b.ReportMetric(float64(l[len(l)-1].Milliseconds()), name+"-longest-ms")
		}
		before := time.Now()
		until("before", func() bool { return time.Since(before) > *benchFor })
		r := newReplica(b, env, "migrates")
		began := time.Now()
		r.start(b)
		until("steps", r.isReady)
		until("validation", func() bool { return unvalidated() == 0 })
		b.ReportMetric(time.Since(began).Seconds(), "total-s")
		rate, l := driveHTTP(b, r.address(), clients, *benchFor, pick) // the former one is still there
		b.ReportMetric(rate, "after-transfers/s")
		l.report(b, "after-")
		r.stop(b)
	}
	b.ReportMetric(0, "ns/op")
	b.StopTimer()
	old.end()
	checkBalances(b, db)
}

// sides are two wallets that are asked the same, in turns.
type sides struct {
	r     *replica
	names [2]string // of wallets 1 and 2
}

// compare drives both wallets with a kind of request, and reports the medians of the first and of one by the
// other. write appends a request about a wallet.
func (s *sides) compare(
	b *testing.B, name string, clients int, write func(dst []byte, wallet int64, key []byte) []byte,
) {
	b.Helper()
	var took [2]latencies
	var rates [2][]float64
	for turn := range 6 {
		wallet := turn % 2
		rate, l := httpLoad{clients: clients, how: *benchFor / 6,
			write: func(dst []byte, _, _ int64, key []byte) []byte {
				return write(dst, int64(wallet+1), key)
			}}.drive(b, s.r.address(), anyOf(2))
		took[wallet], rates[wallet] = append(took[wallet], l...), append(rates[wallet], rate)
	}
	for i := range took {
		slices.Sort(took[i])
		slices.Sort(rates[i])
		b.ReportMetric(float64(took[i].at(.5).Microseconds()), s.names[i]+"-"+name+"-us")
		if clients > 1 {
			b.ReportMetric(rates[i][1], s.names[i]+"-"+name+"/s")
		}
	}
	if clients > 1 {
		b.ReportMetric(rates[0][1]/rates[1][1], "x-rate-"+name)
	} else {
		b.ReportMetric(float64(took[0].at(.5))/float64(took[1].at(.5)), "x-"+name)
	}
}

// appendPost appends a request with a body.
func appendPost(dst []byte, path, body string) []byte {
	return fmt.Appendf(dst, "POST %s HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", path, len(body), body)
}

// get makes requests of a path about a wallet, none of them from the cache.
func get(path string) func(dst []byte, wallet int64, key []byte) []byte {
	return func(dst []byte, wallet int64, _ []byte) []byte {
		return fmt.Appendf(dst, "GET /v1/wallets/%d%s HTTP/1.1\r\nHost: b\r\nCache-Control: no-cache\r\n\r\n",
			wallet, path)
	}
}

// BenchmarkOpenHolds is a wallet with 100,000 open holds beside one with none.
func BenchmarkOpenHolds(b *testing.B) {
	const open, clients = 100_000, 64
	r, db := benchService(b, 0, "REDIS_URL=")
	post := func(clients, most int, write func(dst, key []byte) []byte) {
		httpLoad{clients: clients, how: time.Minute, most: most,
			write: func(dst []byte, _, _ int64, key []byte) []byte { return write(dst, key) },
		}.drive(b, r.address(), anyOf(2))
	}
	for wallet := range 2 {
		post(1, 1, func(dst, key []byte) []byte {
			return appendPost(dst, fmt.Sprintf("/v1/wallets/%d/deposit", wallet+1),
				`{"amount":"1000000","idempotency_key":"seed"}`)
		})
	}
	hold := func(dst []byte, wallet int64, key []byte) []byte {
		return appendPost(dst, fmt.Sprintf("/v1/wallets/%d/holds", wallet),
			fmt.Sprintf(`{"amount":"0.01","idempotency_key":%q}`, key))
	}
	post(*benchClients, open, func(dst, key []byte) []byte { return hold(dst, 1, key) })
	if _, err := db.Exec(context.Background(), `VACUUM ANALYZE`); err != nil {
		b.Fatal(err)
	}
	s := &sides{r, [2]string{"holds", "none"}}
	// captures has the holds captured that compare placed: what is open of each wallet is then what it was.
	captures := func(name string, clients int) {
		var holds [2][]string
		for wallet := range holds {
			rows, _ := db.Query(context.Background(), `
SELECT wallet_id || '-' || seq FROM hold WHERE status = 'open' AND wallet_id = $1 ORDER BY seq DESC
LIMIT (SELECT count(*) FROM hold WHERE status = 'open' AND wallet_id = $1)
      - CASE $1 WHEN 1 THEN $2::bigint ELSE 0 END`, wallet+1, open)
			var err error
			if holds[wallet], err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
				b.Fatal(err)
			}
		}
		n := min(len(holds[0]), len(holds[1]))
		var took [2]time.Duration
		for wallet := range holds { // what is more than n without a look at the time
			for _, part := range [][]string{holds[wallet][:n], holds[wallet][n:]} {
				if len(part) == 0 {
					continue
				}
				began := time.Now()
				post(clients, len(part), func(dst, key []byte) []byte {
					h := part[0]
					part = part[1:]
					return appendPost(dst, "/v1/holds/"+h+"/capture",
						fmt.Sprintf(`{"idempotency_key":%q}`, key))
				})
				took[wallet] = cmp.Or(took[wallet], time.Since(began)/time.Duration(max(n, 1)))
			}
		}
		for i := range took {
			b.ReportMetric(float64(took[i].Microseconds()), s.names[i]+"-"+name+"-us")
		}
		b.ReportMetric(float64(took[0])/float64(took[1]), "x-"+name)
	}
	for b.Loop() {
		for _, c := range []struct {
			prefix  string
			clients int
		}{{"", 1}, {"hot-", clients}} {
			s.compare(b, c.prefix+"deposit", c.clients, func(dst []byte, wallet int64, key []byte) []byte {
				return appendPost(dst, fmt.Sprintf("/v1/wallets/%d/deposit", wallet),
					fmt.Sprintf(`{"amount":"0.01","idempotency_key":%q}`, key))
			})
			s.compare(b, c.prefix+"hold", c.clients, hold)
			captures(c.prefix+"capture", c.clients)
			s.compare(b, c.prefix+"balance", c.clients, get("/balance"))
		}
		s.compare(b, "open-holds-page", 1, get("/holds?status=open&limit=20"))
		s.compare(b, "holds-page", 1, get("/holds?limit=20"))
	}
	b.ReportMetric(0, "ns/op")
	b.StopTimer()
	checkLedger(b, r.env["DATABASE_URL"])
}

// BenchmarkLongWallet is a wallet with 10,000,000 entries beside one with 100: what it was, and statements.
func BenchmarkLongWallet(b *testing.B) {
	if !*large {
		b.Skip("pass -large: it fills about 2 GB")
	}
	const long, short = 10_000_000, 100
	r, db := benchService(b, 0, "REDIS_URL=")
	ctx := context.Background()
	for _, statement := range []string{
		`ALTER TABLE entry DISABLE TRIGGER USER`, // it compares each entry with its wallet
		`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at)
			SELECT id, 'USD', '2020-01-01', n, n, timestamptz '2020-01-01' + n * interval '1 second'
			FROM (VALUES (1, ` + strconv.Itoa(long) + `), (2, ` + strconv.Itoa(short) + `)) w (id, n)`,
		`INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
			SELECT w.id, s, timestamptz '2020-01-01' + s * interval '1 second', 'deposit', 1, s, 'seed-' || s
			FROM wallet w, generate_series(1, w.seq) s`,
		`ALTER TABLE entry ENABLE TRIGGER USER`, `VACUUM ANALYZE`, `CHECKPOINT`,
	} {
		if _, err := db.Exec(ctx, statement); err != nil {
			b.Fatalf("%s: %v", statement, err)
		}
	}
	s := &sides{r, [2]string{"long", "short"}}
	dice := newDice()
	lengths := []int64{long, short}
	at := func(seq int64) string {
		return time.Date(2020, 1, 1, 0, 0, int(seq), 0, time.UTC).Format(time.RFC3339)
	}
	anywhere := func(path func(seq int64) string) func(dst []byte, wallet int64, key []byte) []byte {
		return func(dst []byte, wallet int64, key []byte) []byte {
			return get(path(1+dice.Int64N(lengths[wallet-1])))(dst, wallet, key)
		}
	}
	// hundred is how long a whole wallet's statement takes to its hundredth line, where the short one ends.
	// The rest is left unread.
	hundred := func(wallet int) time.Duration {
		began := time.Now()
		request, err := http.NewRequest("GET", fmt.Sprintf("%s/v1/wallets/%d/statement", r.url, wallet), nil)
		if err != nil {
			b.Fatal(err)
		}
		request.Header.Set("Accept", "application/x-ndjson")
		response, err := replicaClient.Do(request)
		if err != nil {
			b.Fatal(err)
		}
		defer response.Body.Close()
		lines := bufio.NewScanner(response.Body)
		for range short {
			if !lines.Scan() {
				b.Fatalf("wallet %d: %v", wallet, lines.Err())
			}
		}
		return time.Since(began)
	}
	for b.Loop() {
		s.compare(b, "balance", 1, get("/balance"))
		s.compare(b, "at", 1, anywhere(func(seq int64) string { return "/balance?at=" + at(seq) }))
		s.compare(b, "seq", 1, anywhere(func(seq int64) string {
			return fmt.Sprintf("/balance?seq=%d", seq)
		}))
		var took [2]latencies
		for turn := range 400 {
			took[turn%2] = append(took[turn%2], hundred(turn%2+1))
			time.Sleep(20 * time.Millisecond) // what was left unread may still be on its way
		}
		for i := range took {
			slices.Sort(took[i])
			b.ReportMetric(float64(took[i].at(.5).Microseconds()), s.names[i]+"-statement-us")
		}
		b.ReportMetric(float64(took[0].at(.5))/float64(took[1].at(.5)), "x-statement")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkBatches is the ceiling: batches posted one after another by one writer, without HTTP.
func BenchmarkBatches(b *testing.B) {
	for _, size := range []int{1, 16, 64, 128, 256, 512, 1000} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			r, _ := benchService(b, *benchWallets, "REDIS_URL=")
			cfg, err := readConfig(func(name string) string { return r.env[name] })
			if err != nil {
				b.Fatal(err)
			}
			writes, err := openPool(cfg, 1, "bench", nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(writes.Close)
			l := newLedger(cfg.ledgerConfig, writes, writes, nil)
			if err := l.loadCurrencies(context.Background()); err != nil {
				b.Fatal(err)
			}
			pick, dice, run := anyOf(*benchWallets), rand.New(rand.NewPCG(1, 2)), newRun()
			cent, _ := money.Parse("0.01")
			post := func(n int) {
				batch := make([]*task, size)
				for i := range batch {
					from, to := pick(dice)
					batch[i] = newTask(context.Background(), false, false, &book.Operation{
						Kind: book.KindTransferOut, Decide: book.DecideTransfer, WalletID: from, ToID: to,
						Amount: cent, Key: run + "-" + strconv.Itoa(n*size+i)})
				}
				l.post(batch, make(map[int64]cachedBalance))
				if batch[0].ops[0].Err != nil {
					b.Fatal(batch[0].ops[0].Err)
				}
			}
			for b.Loop() {
				for n := range 20 {
					post(n)
				}
				profiled := r.profile(b, *benchFor/2)
				before, began, n := r.cpu(b), time.Now(), 20
				for ; time.Since(began) < *benchFor/2; n++ {
					post(n)
				}
				transfers := float64(size * (n - 20))
				b.ReportMetric(transfers/time.Since(began).Seconds(), "transfers/s")
				spent := make(cost)
				spent.add(before, r.cpu(b))
				spent.report(b, "", transfers)
				profiled()
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
