// How fast: transfers over HTTP, durable before the answer, against Postgres' own one transaction per transfer, in one run on one
// machine. The baselines write the same rows into the same tables.
//
//	go test -run '^$' -bench . -benchtime 10s

package main

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

var (
	benchWallets = flag.Int("bench.wallets", 10_000, "wallets that transfers go between")
	benchClients = flag.Int("bench.clients", 256, "connections of the HTTP benchmarks")
)

// baselines are transfers as a service without group commit makes them: statement by statement, and as one function, Postgres' own best.
const baselineFunction = `
CREATE OR REPLACE FUNCTION transfer_once(from_id bigint, to_id bigint, sum numeric, key text, payload text) RETURNS numeric LANGUAGE plpgsql AS $$
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
    INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance, idempotency_key) VALUES
        (from_id, a.seq + 1, to_id, b.seq + 1, at, 'transfer_out', -sum, a.balance - sum, key),
        (to_id, b.seq + 1, from_id, a.seq + 1, at, 'transfer_in', sum, b.balance + sum, key);
    INSERT INTO outbox (aggregate_id, seq, event_type, payload) VALUES (from_id, a.seq + 1, 'wallet.entry.v1', payload), (to_id, b.seq + 1, 'wallet.entry.v1', payload);
    RETURN a.balance - sum;
END $$`

const benchPayload = `{"wallet_id":12345,"seq":123,"transaction_id":"12345-123","kind":"transfer_out","currency":"USD","amount":"-0.01","balance_before":"1000000","balance_after":"999999.99",` +
	`"counterparty":{"wallet_id":54321,"seq":321},"idempotency_key":"0123456789abcdef","created_at":"2026-01-02T03:04:05.123456Z"}`

// pair picks the two wallets of a transfer.
type pair func(dice *rand.Rand) (from, to int64)

func anyPair(dice *rand.Rand) (int64, int64) {
	from := 1 + dice.Int64N(int64(*benchWallets))
	to := 1 + dice.Int64N(int64(*benchWallets)-1)
	if to >= from {
		to++
	}
	return from, to
}

func hotPair(dice *rand.Rand) (int64, int64) {
	if dice.IntN(2) == 0 {
		return 1, 2
	}
	return 2, 1
}

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
			if err := tx.QueryRow(ctx, `SELECT seq, balance::text FROM wallet WHERE id = $1 FOR NO KEY UPDATE`, id).Scan(&seq, &balance); err != nil {
				return err
			}
			seqs[id], balances[id] = seq, balance
		}
		var n int
		if err := tx.QueryRow(ctx, `SELECT count(*) FROM entry WHERE wallet_id = $1 AND idempotency_key = $2 AND kind <> 'transfer_in'`, from, key).Scan(&n); err != nil || n > 0 {
			return err
		}
		at := time.Now()
		for _, leg := range []struct {
			id, other    int64
			kind, amount string
		}{{from, to, "transfer_out", "-0.01"}, {to, from, "transfer_in", "0.01"}} {
			after := dec(balances[leg.id]).Add(dec(leg.amount)).String()
			if _, err := tx.Exec(ctx, `UPDATE wallet SET balance = $2::text::numeric, seq = $3, entry_at = $4 WHERE id = $1`, leg.id, after, seqs[leg.id]+1, at); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance, idempotency_key)
				VALUES ($1, $2, $3, $4, $5, $6::text::entry_kind, $7::text::numeric, $8::text::numeric, $9)`,
				leg.id, seqs[leg.id]+1, leg.other, seqs[leg.other]+1, at, leg.kind, leg.amount, after, key); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `INSERT INTO outbox (aggregate_id, seq, event_type, payload) VALUES ($1, $2, 'wallet.entry.v1', $3)`, leg.id, seqs[leg.id]+1, benchPayload); err != nil {
				return err
			}
		}
		return nil
	})
}

// latencies are those of one run, sorted.
type latencies []time.Duration

func (l latencies) at(q float64) time.Duration {
	if len(l) == 0 {
		return 0
	}
	return l[min(len(l)-1, int(q*float64(len(l))))]
}

// drive has clients do transfers until the time is up, and returns how many a second and how long each took.
func drive(b *testing.B, clients int, how time.Duration, pick pair, open func(client int) (do func(from, to int64, key string) error, shut func())) (perSecond float64, l latencies) {
	b.Helper()
	run := strconv.FormatInt(time.Now().UnixNano(), 36)
	all := make([]latencies, clients)
	var failed atomic.Pointer[error]
	var running sync.WaitGroup
	begin := make(chan struct{})
	var began time.Time
	for c := range clients {
		do, shut := open(c)
		running.Go(func() {
			defer shut()
			dice := rand.New(rand.NewPCG(uint64(c), uint64(time.Now().UnixNano())))
			<-begin
			for i := 0; time.Since(began) < how && failed.Load() == nil; i++ {
				from, to := pick(dice)
				at := time.Now()
				if err := do(from, to, run+"-"+strconv.Itoa(c)+"-"+strconv.Itoa(i)); err != nil {
					failed.Store(&err)
					return
				}
				all[c] = append(all[c], time.Since(at))
			}
		})
	}
	began = time.Now()
	close(begin)
	running.Wait()
	took := time.Since(began)
	if err := failed.Load(); err != nil {
		b.Fatal(*err)
	}
	l = slices.Concat(all...)
	slices.Sort(l)
	return float64(len(l)) / took.Seconds(), l
}

func driveSQL(b *testing.B, db *pgxpool.Pool, clients int, how time.Duration, pick pair, transfer func(context.Context, *pgxpool.Conn, int64, int64, string) error) (float64, latencies) {
	return drive(b, clients, how, pick, func(int) (func(int64, int64, string) error, func()) {
		conn, err := db.Acquire(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		return func(from, to int64, key string) error { return transfer(context.Background(), conn, from, to, key) }, conn.Release
	})
}

// driveHTTP speaks HTTP/1.1 by hand over kept connections: the load generator shares the machine, and net/http's client costs as much as
// the server.
func driveHTTP(b *testing.B, address string, clients int, how time.Duration, pick pair) (float64, latencies) {
	return drive(b, clients, how, pick, func(int) (func(int64, int64, string) error, func()) {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		reader := bufio.NewReaderSize(conn, 1024)
		var request, body []byte
		return func(from, to int64, key string) error {
			body = fmt.Appendf(body[:0], `{"to_id":%d,"amount":"0.01","idempotency_key":"%s"}`, to, key)
			request = fmt.Appendf(request[:0], "POST /v1/wallets/%d/transfer HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", from, len(body), body)
			if _, err := conn.Write(request); err != nil {
				return err
			}
			return readOK(reader)
		}, func() { conn.Close() }
	})
}

// readOK reads one response to its end.
func readOK(reader *bufio.Reader) error {
	status, err := reader.ReadSlice('\n')
	if err != nil {
		return err
	}
	failed := ""
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
		failed = string(status)
	}
	length := 0
	for {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		if value, found := bytes.CutPrefix(line, []byte("Content-Length: ")); found {
			length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if failed != "" {
		body := make([]byte, length)
		reader.Read(body)
		return fmt.Errorf("%s%s", failed, body)
	}
	_, err = reader.Discard(length)
	return err
}

// benchService is a service on fresh tables with funded wallets, and a pool for the baselines on the same tables.
func benchService(b *testing.B, relay bool) (w *wallets, baseline *pgxpool.Pool) {
	b.Helper()
	env := testEnv(b, "REQUESTS_MAX=100000", "LOG_LEVEL=warn")
	if relay {
		env["KAFKA_BROKERS"] = stack(b).KafkaBrokers
	} else {
		env["REDIS_URL"] = ""
	}
	w = start(b, env)
	baseline, err := pgxpool.New(context.Background(), env["DATABASE_URL"]+"&pool_max_conns=64")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(baseline.Close)
	for _, statement := range []string{
		baselineFunction,
		`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at) SELECT g, 'USD', now(), 1, 1000000, now() FROM generate_series(1, ` + strconv.Itoa(*benchWallets) + `) g`,
		`INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key) SELECT id, 1, now(), 'deposit', 1000000, 1000000, 'seed' FROM wallet`,
		`VACUUM ANALYZE`, `CHECKPOINT`,
	} {
		if _, err := baseline.Exec(context.Background(), statement); err != nil {
			b.Fatal(err)
		}
	}
	return w, baseline
}

// BenchmarkTransfers is the claim: transfers a second over HTTP, and how many times the baselines' that is.
func BenchmarkTransfers(b *testing.B) {
	for _, c := range []struct {
		name  string
		relay bool
		pick  pair
	}{{"relay", true, anyPair}, {"no relay", false, anyPair}, {"hot pair", false, hotPair}} {
		b.Run(c.name, func(b *testing.B) {
			w, db := benchService(b, c.relay)
			address := w.http.Listener.Addr().String()
			driveHTTP(b, address, 16, time.Second, c.pick) // connections, prepared statements
			var byStatements, byFunction, ours float64
			var l latencies
			for b.Loop() {
				// In turns, each at its best number of clients, so that the machine's moods meet all of them.
				for _, clients := range []int{8, 16} {
					rate, _ := driveSQL(b, db, clients, 3*time.Second, c.pick, transferByStatements)
					byStatements = max(byStatements, rate)
					rate, _ = driveSQL(b, db, clients, 3*time.Second, c.pick, transferByFunction)
					byFunction = max(byFunction, rate)
				}
				ours, l = driveHTTP(b, address, *benchClients, 6*time.Second, c.pick)
			}
			b.ReportMetric(ours, "transfers/s")
			b.ReportMetric(float64(l.at(.5).Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(l.at(.99).Microseconds())/1000, "p99-ms")
			b.ReportMetric(byStatements, "statements/s")
			b.ReportMetric(byFunction, "function/s")
			b.ReportMetric(ours/byStatements, "x-statements")
			b.ReportMetric(ours/byFunction, "x-function")
			b.ReportMetric(0, "ns/op")
			b.StopTimer()
			checkBalances(b, w)
		})
	}
}

// checkBalances: a benchmark that loses money measured nothing.
func checkBalances(b *testing.B, w *wallets) {
	b.Helper()
	var wrong int
	err := connect(b, w.env["DATABASE_URL"]).QueryRow(context.Background(),
		`SELECT count(*) FROM wallet w JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq WHERE e.balance <> w.balance OR (SELECT sum(balance) FROM wallet) <> 1000000 * (SELECT count(*) FROM wallet)`).Scan(&wrong)
	if err != nil || wrong > 0 {
		b.Fatalf("%d wallets are wrong, %v", wrong, err)
	}
}

// BenchmarkLatency is one client alone: what group commit costs where there is no group.
func BenchmarkLatency(b *testing.B) {
	w, db := benchService(b, false)
	address := w.http.Listener.Addr().String()
	driveHTTP(b, address, 1, time.Second, anyPair)
	driveSQL(b, db, 1, time.Second, anyPair, transferByFunction)
	var ours, function latencies
	for b.Loop() {
		_, function = driveSQL(b, db, 1, 3*time.Second, anyPair, transferByFunction)
		_, ours = driveHTTP(b, address, 1, 3*time.Second, anyPair)
	}
	b.ReportMetric(float64(ours.at(.5).Microseconds()), "p50-us")
	b.ReportMetric(float64(function.at(.5).Microseconds()), "function-p50-us")
	b.ReportMetric(float64(ours.at(.5))/float64(function.at(.5)), "x-function")
	b.ReportMetric(0, "ns/op")
}
