// The ledger's properties: under concurrency, under faults of Postgres, and as the database enforces them.

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wallet/internal/book"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// TestRandomMovesKeepEveryInvariant: three replicas, few wallets, much contention.
func TestRandomMovesKeepEveryInvariant(t *testing.T) {
	env := testEnv(t)
	replicas := []*running{start(t, env), start(t, env), start(t, env)}
	acknowledged := moveAtRandom(t, 24, 60, 6, func() *running { return replicas[rand.IntN(3)] })
	if len(acknowledged) < 400 {
		t.Fatalf("only %d operations were accepted", len(acknowledged))
	}
	checkLedger(t, env["DATABASE_URL"])
	checkAcknowledged(t, replicas[0], acknowledged)
	var entries int // but for what the clock did: nobody asked for that
	err := connect(t, env["DATABASE_URL"]).QueryRow(context.Background(),
		`SELECT count(*) FROM entry
		WHERE kind <> 'transfer_in' AND idempotency_key NOT LIKE '«expiry %'`).Scan(&entries)
	posted := 0
	for _, m := range acknowledged {
		posted += len(m.posted)
	}
	if err != nil || entries != posted {
		t.Errorf("%d operations in the ledger, %d acknowledged (%v)", entries, posted, err)
	}
}

// TestOppositeTransfersDoNotDeadlock: A to B and B to A, in many batches of two replicas with four writers.
func TestOppositeTransfersDoNotDeadlock(t *testing.T) {
	env := testEnv(t, "WRITERS=4", "WRITE_BATCH_MAX=3")
	replicas := []*running{start(t, env), start(t, env)}
	for id := 1; id <= 2; id++ {
		replicas[0].mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", id),
			`{"amount":"1000","idempotency_key":"seed"}`)
	}
	var working sync.WaitGroup
	for c := range 16 {
		working.Go(func() {
			for i := range 25 {
				body := fmt.Sprintf(`{"amount":"1","to_id":%d,"idempotency_key":"%d-%d"}`, 2-c%2, c, i)
				if a := replicas[c/2%2].post(fmt.Sprintf("/v1/wallets/%d/transfer", 1+c%2),
					body); a.status != 200 {
					t.Errorf("transfer: %s", a)
				}
			}
		})
	}
	working.Wait()
	if n := replicas[0].ledger.reruns.Load() + replicas[1].ledger.reruns.Load(); n > 0 {
		t.Errorf("%d batches had to run again", n)
	}
	checkLedger(t, env["DATABASE_URL"])
}

// TestMissingWalletsAreMadeOnce: many clients of two replicas open the same wallets at once.
func TestMissingWalletsAreMadeOnce(t *testing.T) {
	env := testEnv(t)
	replicas := []*running{start(t, env), start(t, env)}
	var working sync.WaitGroup
	for c := range 20 {
		working.Go(func() {
			for i := range 20 {
				if a := replicas[c%2].post(fmt.Sprintf("/v1/wallets/%d/deposit", 1+i),
					fmt.Sprintf(`{"amount":"1","idempotency_key":"%d"}`, c)); a.status != 200 {
					t.Errorf("deposit: %s", a)
				}
			}
		})
	}
	working.Wait()
	if got, want := replicas[0].mustCount(t), "20 400 400 400"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	checkLedger(t, env["DATABASE_URL"])
}

// -----------------------------------------------------------------------------------------------------------
// Faults of Postgres
// -----------------------------------------------------------------------------------------------------------

// TestLostConnectionAtCommit: the connection is lost at COMMIT, once before Postgres heard of it and once
// after it was done. Either way the operation is applied once, and its client gets its answer.
func TestLostConnectionAtCommit(t *testing.T) {
	for _, when := range []string{"failed", "succeeded but reported as failed"} {
		t.Run(when, func(t *testing.T) {
			env := testEnv(t)
			direct := env["DATABASE_URL"]
			proxy, through := newCutter(t, direct)
			env["DATABASE_URL"] = through
			w := start(t, env)
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"seed"}`)

			isCommit := commitMessage("marker-of-this-test")
			var messages atomic.Int64
			cut := func(message []byte) (before, after bool) {
				// The key is in both round trips: in the first it is looked up, in the second written.
				if !isCommit(message) || messages.Add(1) != 2 {
					return false, false
				}
				return when == "failed", when != "failed"
			}
			proxy.cut.Store(&cut)
			a := w.mustPost(t, 200, "/v1/wallets/1/withdraw",
				`{"amount":"10","idempotency_key":"marker-of-this-test"}`)
			if a.json(t)["balance"] != "90" || proxy.cuts.Load() != 1 || w.ledger.reruns.Load() != 1 {
				t.Errorf("%s after %d cuts and %d reruns", a, proxy.cuts.Load(), w.ledger.reruns.Load())
			}
			if a.header.Get("Idempotent-Replayed") != "" {
				t.Error("a request that was sent once is called a replay") // it was the service's own rerun
			}
			again := w.mustPost(t, 200, "/v1/wallets/1/withdraw",
				`{"amount":"10","idempotency_key":"marker-of-this-test"}`)
			if again.header.Get("Idempotent-Replayed") != "true" || again.body != a.body {
				t.Errorf("sent again: %s, first %s", again, a)
			}
			if got := w.get("/v1/wallets/1").json(t); fmt.Sprint(got["seq"]) != "2" {
				t.Errorf("wallet: %v", got)
			}
			// So for operations together, and for many that stand by themselves.
			for i, body := range []string{
				batchOf("marker-of-this-test", `{"op":"withdraw","wallet_id":1,"amount":"1"}`,
					`{"op":"transfer","wallet_id":1,"to_id":2,"amount":"2"}`),
				eachOf(`{"op":"withdraw","wallet_id":1,"amount":"1",`+
					`"idempotency_key":"marker-of-this-test-a"}`,
					`{"op":"deposit","wallet_id":3,"amount":"2","idempotency_key":"marker-of-this-test-b"}`),
			} {
				messages.Store(0)
				a := w.mustPost(t, 200, "/v1/batches", body)
				again := w.mustPost(t, 200, "/v1/batches", body)
				if proxy.cuts.Load() != int64(2+i) || a.header.Get("Idempotent-Replayed") != "" ||
					again.header.Get("Idempotent-Replayed") != "true" || again.body != a.body {
					t.Errorf("after %d cuts: %s, sent again: %s", proxy.cuts.Load(), a, again)
				}
			}
			if got := w.get("/v1/wallets/1").json(t); got["balance"] != "86" {
				t.Errorf("wallet after batches: %v", got)
			}
			checkLedger(t, direct)
		})
	}
}

// TestCacheAfterALostAnswer: the balance is cached; then a movement's COMMIT is answered to nobody, and it is
// the rerun that answers. A cached read at another replica shows the movement.
func TestCacheAfterALostAnswer(t *testing.T) {
	env := testEnv(t)
	proxy, through := newCutter(t, env["DATABASE_URL"])
	cached := start(t, env)
	env = maps.Clone(env)
	env["DATABASE_URL"] = through
	w := start(t, env)
	inUse(t, w.balances)
	inUse(t, cached.balances)
	for round := range 20 {
		key := fmt.Sprintf("marker-of-round-%d-", round)
		w.mustPost(t, 200, "/v1/wallets/1/deposit",
			fmt.Sprintf(`{"amount":"1","idempotency_key":"d%d"}`, round))
		cached.get("/v1/wallets/1/balance")
		isCommit := commitMessage(key)
		var messages atomic.Int64
		cut := func(message []byte) (before, after bool) {
			return false, isCommit(message) && messages.Add(1) == 2
		}
		proxy.cut.Store(&cut)
		a := w.mustPost(t, 200, "/v1/wallets/1/transfer",
			fmt.Sprintf(`{"amount":"1","to_id":2,"idempotency_key":%q}`, key))
		seq := fmt.Sprint(a.json(t)["from_seq"])
		for _, path := range []string{"/v1/wallets/1/balance", "/v1/wallets/1/balance?min_seq=" + seq} {
			if b := cached.get(path); fmt.Sprint(b.json(t)["seq"]) != seq {
				t.Fatalf("round %d: %s: %s, but seq %s was answered", round, path, b, seq)
			}
		}
	}
	if n := proxy.cuts.Load(); n != 20 {
		t.Errorf("%d answers were lost, want 20", n)
	}
}

// TestCacheAfterARetryElsewhere: a writer dies between its commit and its put; the client sends its request
// to another replica, which answers with a replay. So does a movement that this replica knows of only by a
// refusal or a read.
func TestCacheAfterARetryElsewhere(t *testing.T) {
	env := testEnv(t)
	dies := maps.Clone(env)
	dies["REDIS_URL"] = "" // it puts nothing
	dying, w, cached := start(t, dies), start(t, env), start(t, env)
	inUse(t, w.balances)
	inUse(t, cached.balances)
	seq := 0
	for name, learn := range map[string]func(body string) answer{
		"replay": func(body string) answer { return w.post("/v1/wallets/1/deposit", body) },
		"refusal": func(string) answer {
			return w.post("/v1/wallets/1/withdraw", `{"amount":"1000","idempotency_key":"r"}`)
		},
		"wallet": func(string) answer { return w.get("/v1/wallets/1") },
		"fresh": func(string) answer {
			return w.get("/v1/wallets/1/balance", "Cache-Control", "no-cache")
		},
		"history":     func(string) answer { return w.get("/v1/wallets/1/history") },
		"transaction": func(string) answer { return w.get(fmt.Sprintf("/v1/transactions/1-%d", seq)) },
	} {
		cached.get("/v1/wallets/1/balance")
		body := fmt.Sprintf(`{"amount":"1","idempotency_key":%q}`, name)
		dying.mustPost(t, 200, "/v1/wallets/1/deposit", body)
		seq++
		if a := learn(body); a.status != 200 && a.status != 422 {
			t.Fatalf("%s: %s", name, a)
		}
		if b := cached.get("/v1/wallets/1/balance").json(t); fmt.Sprint(b["seq"]) != fmt.Sprint(seq) {
			t.Errorf("after a %s that knew of seq %d: %v", name, seq, b)
		}
	}
}

// TestPostgresCrashes: immediate stop under load, and start: every acknowledged operation is there, once.
func TestPostgresCrashes(t *testing.T) {
	s, err := startStores()
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	env := testEnv(t, "DATABASE_URL="+s.database(t))
	replicas := []*running{start(t, env), start(t, env)}
	stop := make(chan struct{})
	var crashing sync.WaitGroup
	crashing.Go(func() {
		for range 2 {
			select {
			case <-stop:
				return
			case <-time.After(300 * time.Millisecond):
			}
			s.command(t, "stop postgres immediate")
			time.Sleep(200 * time.Millisecond)
			s.command(t, "start postgres")
		}
	})
	acknowledged := moveAtRandom(t, 8, 150, 20, func() *running { return replicas[rand.IntN(2)] })
	close(stop)
	crashing.Wait()
	eventually(t, 10*time.Second, "ready again", func() bool {
		return replicas[0].get("/readyz").status == 200
	})
	if replicas[0].ledger.reruns.Load()+replicas[1].ledger.reruns.Load() == 0 {
		t.Error("no batch met a crash")
	}
	checkLedger(t, env["DATABASE_URL"])
	checkAcknowledged(t, replicas[0], acknowledged)
}

// TestPostgresAway: reads and writes are refused with 503 while Postgres is away, and served again after.
func TestPostgresAway(t *testing.T) {
	s, err := startStores()
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	w := start(t, testEnv(t, "DATABASE_URL="+s.database(t), "REDIS_URL=", "REQUEST_TIMEOUT=1s"))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
	s.command(t, "stop postgres fast")
	if a := w.get("/readyz"); a.status != 503 {
		t.Errorf("readyz: %s", a)
	}
	if a := w.get("/v1/wallets/1/balance"); a.status != 503 || a.header.Get("Retry-After") == "" {
		t.Errorf("balance: %s", a)
	}
	if a := w.post("/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`); a.status != 503 ||
		a.header.Get("Retry-After") == "" || a.code() != "unavailable" {
		t.Errorf("deposit: %s", a)
	}
	if a := w.get("/healthz"); a.status != 200 {
		t.Errorf("healthz: %s", a)
	}
	s.command(t, "start postgres")
	eventually(t, 10*time.Second, "ready again", func() bool { return w.get("/readyz").status == 200 })
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`)
}

// holdWallet locks a wallet, as somebody who is not one of our writers, until the transaction ends.
func holdWallet(t *testing.T, w *running, id int64) pgx.Tx {
	t.Helper()
	tx, err := connect(t, w.env["DATABASE_URL"]).Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(context.Background(), `SELECT FROM wallet WHERE id = $1 FOR UPDATE`,
		id); err != nil {
		t.Fatal(err)
	}
	return tx
}

// patientEnv is of a service whose batches wait for a lock for longer than a busy machine makes a test wait.
func patientEnv(t *testing.T, more ...string) map[string]string {
	t.Helper()
	env := testEnv(t, more...)
	env["DATABASE_URL"] += "&lock_timeout=3500ms" // less than statement_timeout
	return env
}

// TestLockedWalletDoesNotFailItsNeighbours: one wallet is held for long, and the others' operations go on.
func TestLockedWalletDoesNotFailItsNeighbours(t *testing.T) {
	w := start(t, testEnv(t, "WRITERS=1"))
	for id := 1; id <= 4; id++ {
		w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", id), `{"amount":"1","idempotency_key":"a"}`)
	}
	tx := holdWallet(t, w, 1)
	statuses := make([]int, 5)
	var clients sync.WaitGroup
	for id := 1; id <= 4; id++ {
		clients.Go(func() {
			statuses[id] = w.post(fmt.Sprintf("/v1/wallets/%d/deposit", id),
				`{"amount":"1","idempotency_key":"b"}`).status
		})
	}
	clients.Wait()
	if statuses[1] != 503 || statuses[2] != 200 || statuses[3] != 200 || statuses[4] != 200 {
		t.Errorf("statuses %v, want 503 for wallet 1 only", statuses[1:])
	}
	tx.Rollback(context.Background())
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`)
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestStalledBatchHoldsUpNobody: while a batch waits for a lock at Postgres, others start beside it, too few
// to be worth it as they are.
func TestStalledBatchHoldsUpNobody(t *testing.T) {
	w := start(t, patientEnv(t))
	for id := 1; id <= 2; id++ {
		w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", id), `{"amount":"1","idempotency_key":"a"}`)
	}
	tx := holdWallet(t, w, 1)
	stalled := make(chan answer)
	go func() { stalled <- w.post("/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`) }()
	eventually(t, 2*time.Second, "the first batch waits for the lock", func() bool {
		var waiting int
		err := tx.QueryRow(context.Background(),
			`SELECT count(*) FROM pg_locks WHERE NOT granted AND pid IN (SELECT pid FROM pg_stat_activity
				WHERE datname = current_database())`).Scan(&waiting)
		return err == nil && waiting > 0
	})
	w.mustPost(t, 200, "/v1/wallets/2/deposit", `{"amount":"1","idempotency_key":"b"}`)
	if n := w.ledger.reruns.Load(); n > 0 {
		t.Error("the second batch was answered only after the first had given up")
	}
	tx.Rollback(context.Background())
	if a := <-stalled; a.status != 200 {
		t.Errorf("the first batch: %s", a)
	}
}

// TestBadNeighbour: one operation that the database refuses fails alone.
func TestBadNeighbour(t *testing.T) {
	w := start(t, patientEnv(t, "WRITERS=1"))
	conn := connect(t, w.env["DATABASE_URL"])
	if _, err := conn.Exec(context.Background(),
		`ALTER TABLE entry ADD CONSTRAINT of_this_test CHECK (idempotency_key <> 'bad')`); err != nil {
		t.Fatal(err)
	}
	// Hold the writer, so that the next operations come in one batch.
	tx, _ := conn.Begin(context.Background())
	tx.Exec(context.Background(), `LOCK TABLE wallet IN EXCLUSIVE MODE`)
	answers := make([]answer, 20)
	var clients sync.WaitGroup
	for i := range answers {
		clients.Go(func() {
			key := fmt.Sprint("good", i)
			if i == 13 {
				key = "bad"
			}
			answers[i] = w.post(fmt.Sprintf("/v1/wallets/%d/deposit", 1+i%3),
				fmt.Sprintf(`{"amount":"1","idempotency_key":%q}`, key))
		})
	}
	time.Sleep(300 * time.Millisecond)
	tx.Rollback(context.Background())
	clients.Wait()
	for i, a := range answers {
		if i == 13 && (a.status != 500 || a.code() != "internal" ||
			strings.Contains(a.body, "of_this_test")) {
			t.Errorf("the bad one: %s", a)
		}
		if i != 13 && a.status != 200 {
			t.Errorf("a good one: %s", a)
		}
	}
	if w.ledger.splits.Load() == 0 {
		t.Error("no batch was split: the test did not bring the operations together")
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestStalledWriterIsThrownOut: one that stops between its two round trips holds its locks for at most 2 s.
func TestStalledWriterIsThrownOut(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
	conn, err := w.writes.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	if _, err := conn.Exec(context.Background(), `BEGIN`); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(context.Background(),
		`SELECT FROM wallet WHERE id = 1 FOR NO KEY UPDATE`); err != nil {
		t.Fatal(err)
	}
	// Waits, runs again, succeeds.
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`)
	if _, err := conn.Exec(context.Background(), `COMMIT`); err == nil {
		t.Error("the stalled transaction could still commit")
	}
}

// TestFullQueueIsRefused: bounded, with Retry-After, and nothing done.
func TestFullQueueIsRefused(t *testing.T) {
	l := newLedger(ledgerConfig{queueOpsMax: 1, writers: 1, batchOpsMax: 1}, nil, nil, nil)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go l.do(ctx, &book.Operation{})
	eventually(t, 8*time.Second, "queued", func() bool { return l.queue.Waiting() == 1 })
	if err := l.do(ctx, &book.Operation{}); !errors.Is(err, errOverloaded) {
		t.Errorf("%v, want errOverloaded", err)
	}
}

// -----------------------------------------------------------------------------------------------------------
// What the database enforces by itself
// -----------------------------------------------------------------------------------------------------------

// TestLeastPrivilege: three roles, and what each of them cannot do.
func TestLeastPrivilege(t *testing.T) {
	env := testEnv(t)
	admin := connect(t, env["DATABASE_URL"])
	suffix := fmt.Sprintf("%d_%d", time.Now().UnixNano(), names.Add(1))
	role := func(kind string) string { return kind + "_" + suffix }
	u, _ := url.Parse(env["DATABASE_URL"])
	as := func(name string) string {
		v := *u
		v.User = url.User(name)
		return v.String()
	}
	for _, statement := range []string{
		"CREATE ROLE " + role("owner") + " LOGIN",
		"CREATE ROLE " + role("service") + " LOGIN",
		"CREATE ROLE " + role("relay") + " LOGIN REPLICATION",
		"ALTER DATABASE " + strings.Trim(u.Path, "/") + " OWNER TO " + role("owner"),
	} {
		if _, err := admin.Exec(context.Background(), statement); err != nil {
			t.Fatal(err)
		}
	}
	env["DATABASE_URL"], env["MIGRATE_URL"] = as(role("service")), as(role("owner"))
	env["REPLICATION_URL"] = as(role("relay"))
	w := start(t, env)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"a"}`)
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"2","to_id":2,"idempotency_key":"b"}`)
	if a := w.get("/v1/wallets/1/history"); a.status != 200 {
		t.Errorf("history: %s", a)
	}
	if err := makeOutboxPartitions(context.Background(), w.reads); err != nil {
		t.Error(err)
	}
	refused := func(name, code, statement string) {
		t.Helper()
		var pgErr *pgconn.PgError
		if _, err := connect(t, as(name)).Exec(context.Background(), statement); !errors.As(err, &pgErr) ||
			pgErr.Code != code {
			t.Errorf("as %s: %s: %v, want SQLSTATE %s", name, statement, err, code)
		}
	}
	for _, statement := range []string{
		`UPDATE entry SET amount = 1`, `DELETE FROM entry`, `TRUNCATE entry`, `DELETE FROM wallet`,
		`UPDATE wallet SET currency = 'EUR'`, `UPDATE wallet SET id = 5`,
		`UPDATE currency SET scale = 5`, `INSERT INTO currency VALUES ('XYZ', 2)`, `DELETE FROM outbox`,
		`UPDATE outbox SET payload = ''`, `CREATE TABLE t ()`,
		`ALTER TABLE entry DISABLE TRIGGER ALL`, `DROP TABLE entry`, `DROP PUBLICATION wallet_outbox`,
		`INSERT INTO wallet_schema VALUES (2)`,
		`SELECT pg_create_logical_replication_slot('x', 'pgoutput')`,
	} {
		refused(role("service"), "42501", statement)
	}
	for _, statement := range []string{`SELECT * FROM entry`,
		`INSERT INTO wallet (id, created_at, currency) VALUES (9, now(), 'USD')`,
		`SELECT outbox_make_partitions('1 day')`} {
		refused(role("relay"), "42501", statement)
	}
	for _, statement := range []string{`UPDATE entry SET amount = amount`, `DELETE FROM entry`,
		`TRUNCATE entry`, `DELETE FROM wallet`, `UPDATE wallet SET currency = 'EUR'`,
		`UPDATE currency SET scale = 1`} {
		refused(role("owner"), "23001", statement) // by trigger: not even the owner, unawares
	}
	checkLedger(t, u.String())
}

// TestConstraintsStateTheRules: each rule of schema.sql that pairs a check in Go refuses by its own name.
func TestConstraintsStateTheRules(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"a"}`)
	conn := connect(t, w.env["DATABASE_URL"])
	insert := func(values string) string {
		return `INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq,
			created_at, kind, amount, balance, idempotency_key) VALUES (` + values + `)`
	}
	for _, c := range []struct{ constraint, statement string }{
		{"balance_not_negative", `UPDATE wallet SET balance = -0.01`},
		{"balance_at_most_20_digits", `UPDATE wallet SET balance = 1e20`},
		{"wallet_without_entries_is_empty", `UPDATE wallet SET seq = 0`},
		{"wallet_id_positive", `INSERT INTO wallet (id, created_at, currency) VALUES (0, now(), 'USD')`},
		{"wallet_currency_known", `INSERT INTO wallet (id, created_at, currency) VALUES (2, now(), 'QQQ')`},
		// No such wallet.
		{"entry_fits_wallet", insert(`99, 1, NULL, NULL, now(), 'deposit', 1, 1, 'k'`)},
		// Beyond its wallet.
		{"entry_fits_wallet", insert(`1, 2, NULL, NULL, now(), 'deposit', 1, 6, 'k'`)},
		// Another balance.
		{"entry_fits_wallet", `UPDATE wallet SET seq = 2, balance = 6, entry_at = now(); ` +
			insert(`1, 2, NULL, NULL, now(), 'deposit', 2, 7, 'k'`)},
		{"entry_fits_wallet", `UPDATE wallet SET seq = 2, balance = 6, entry_at = now(); ` +
			insert(`1, 2, NULL, NULL, now() + '1s', 'deposit', 1, 6, 'k'`)},
		// A decoy.
		{"entry_fits_wallet",
			`CREATE TEMP TABLE wallet AS SELECT 99::bigint AS id, 1::bigint AS seq, 1::numeric AS balance,
				now() AS entry_at; ` + insert(`99, 1, NULL, NULL, now(), 'deposit', 1, 1, 'k'`)},
		{"entry_pkey", insert(`1, 1, NULL, NULL, now(), 'deposit', 1, 1, 'k'`)},
		{"idempotency_key_posts_once", insert(`1, 2, NULL, NULL, now(), 'deposit', 1, 6, 'a'`)},
		{"amount_sign_fits_kind", insert(`1, 2, NULL, NULL, now(), 'deposit', -1, 4, 'k'`)},
		{"amount_sign_fits_kind", insert(`1, 2, NULL, NULL, now(), 'withdrawal', 1, 6, 'k'`)},
		{"amount_sign_fits_kind", insert(`1, 2, NULL, NULL, now(), 'deposit', 0, 5, 'k'`)},
		{"amount_at_most_18_decimals", insert(`1, 2, NULL, NULL, now(), 'deposit', 1e-19, 5, 'k'`)},
		{"entry_balance_not_negative", insert(`1, 2, NULL, NULL, now(), 'withdrawal', -6, -1, 'k'`)},
		{"balance_before_not_negative", insert(`1, 2, NULL, NULL, now(), 'deposit', 6, 5, 'k'`)},
		{"transfer_has_counterparty", insert(`1, 2, NULL, NULL, now(), 'transfer_out', -1, 4, 'k'`)},
		{"transfer_has_counterparty", insert(`1, 2, 2, 1, now(), 'deposit', 1, 6, 'k'`)},
		{"counterparty_is_another", insert(`1, 2, 1, 1, now(), 'transfer_out', -1, 4, 'k'`)},
		{"idempotency_key_1_to_255", insert(`1, 2, NULL, NULL, now(), 'deposit', 1, 6, ''`)},
		{"currency_scale_in_range", `INSERT INTO currency VALUES ('ABC', 19)`},
	} {
		var pgErr *pgconn.PgError
		if _, err := conn.Exec(context.Background(), c.statement); !errors.As(err, &pgErr) ||
			pgErr.ConstraintName != c.constraint {
			t.Errorf("%s: %v, want %s", c.statement, err, c.constraint)
		}
	}
}

// TestNoSequentialScanOnARequestPath: every statement of a request finds its rows by an index, also in a
// database that is new and was never analysed.
func TestNoSequentialScanOnARequestPath(t *testing.T) {
	w := start(t, testEnv(t))
	var probe string // EXPLAIN of a call does not show it
	if err := w.reads.QueryRow(context.Background(), `
SELECT 'SELECT e.created_at ' || replace((regexp_match(prosrc, 'INTO at (FROM .*?);'))[1], 'probe', '$2')
FROM pg_proc WHERE proname = 'seq_since'`).Scan(&probe); err != nil {
		t.Fatal(err)
	}
	// Analysed while nearly empty is the worst case: reading the whole table looks cheap, and the plan stays.
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"a"}`)
	for _, analysed := range []bool{false, true} {
		if analysed {
			if _, err := connect(t, w.env["DATABASE_URL"]).Exec(context.Background(), `ANALYZE`); err != nil {
				t.Fatal(err)
			}
		}
		checkPlans(t, w, probe)
	}
}

func checkPlans(t *testing.T, w *running, seqSince string) {
	t.Helper()
	for name, query := range map[string]string{
		"lockWallets": lockWallets, "lockFreeWallets": lockFreeWallets, "findWallets": findWallets,
		"findKeys": findKeys, "findCreations": findCreations, "updateWallets": updateWallets,
		"updateHeads": updateHeads, "findHolds": findHolds, "findReversals": findReversals,
		"findDueHolds": findDueHolds, "updateHolds": updateHolds, "dueHolds": dueHolds,
		"selectWallet": selectWallet, "transactionByID": transactionByID,
		"transactionByKey": transactionByKey, "transactionsByReference": transactionsByReference,
		"history": selectPageUp, "history backwards": selectPageDown, "selectMoment": selectMoment,
		"holds":      selectHolds + `seq > $2 ORDER BY seq LIMIT $3` + andTheirEntries,
		"open holds": selectHolds + `status = 'open' AND seq > $2 ORDER BY seq LIMIT $3` + andTheirEntries,
		"seq_since":  seqSince,
	} {
		conn, err := w.reads.Acquire(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		nulls := strings.Repeat("NULL, ", len(parametersOf(query)))
		nulls = "(" + strings.TrimSuffix(nulls, ", ") + ")"
		plan := ""
		err = pgx.BeginFunc(context.Background(), conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(context.Background(),
				"PREPARE of_this_test AS "+strings.TrimRight(query, "\n ")); err != nil {
				return err
			}
			defer tx.Exec(context.Background(), "DEALLOCATE of_this_test")
			rows, _ := tx.Query(context.Background(), "EXPLAIN EXECUTE of_this_test "+nulls,
				pgx.QueryExecModeSimpleProtocol)
			lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
			plan = strings.Join(lines, "\n")
			return err
		})
		conn.Release()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if strings.Contains(plan, "Seq Scan") || !strings.Contains(plan, "Index") ||
			strings.Contains(plan, "JIT") {
			t.Errorf("%s:\n%s", name, plan)
		}
		scans := regexp.MustCompile(`Index (?:Only )?Scan[^\n]*\n\s*([^\n]*)`)
		for _, scan := range scans.FindAllStringSubmatch(plan, -1) {
			if !strings.HasPrefix(scan[1], "Index Cond") {
				t.Errorf("%s reads a whole index:\n%s", name, plan)
			}
		}
	}
}

func parametersOf(query string) map[string]bool {
	found := make(map[string]bool)
	for _, p := range regexp.MustCompile(`\$\d+`).FindAllString(query, -1) {
		found[p] = true
	}
	return found
}

// -----------------------------------------------------------------------------------------------------------
// Parsers
// -----------------------------------------------------------------------------------------------------------

func FuzzCursor(f *testing.F) {
	for _, p := range []page{{from: 1, to: 5}, {from: 3, to: 1<<63 - 1, descending: true}} {
		f.Add(p.cursor())
	}
	f.Add("!!")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseCursor(s)
		if err == nil && (p.from < 1 || p.to < 1 || p.cursor() != s) {
			t.Fatalf("%q was taken as %+v", s, p)
		}
	})
}

// TestWritersShareNoWallet: our own batches never wait for each other's locks at Postgres, however few the
// wallets, and nobody starves.
func TestWritersShareNoWallet(t *testing.T) {
	w := start(t, testEnv(t, "WRITERS=4", "WRITE_BATCH_MAX=2"))
	conn := connect(t, w.env["DATABASE_URL"])
	moved := make(chan struct{})
	go func() {
		defer close(moved)
		moveAtRandom(t, 24, 100, 6, func() *running { return w })
	}()
	samples, busy, waits := 0, 0, 0
	for going := true; going; samples++ {
		select {
		case <-moved:
			going = false
		case <-time.After(time.Millisecond):
		}
		var active, waiting int
		if err := conn.QueryRow(context.Background(),
			`SELECT count(*),
				count(*) FILTER (WHERE wait_event_type = 'Lock' AND wait_event IN ('transactionid', 'tuple'))
			FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = 'wallet write'
			  AND state <> 'idle'`).Scan(&active, &waiting); err != nil {
			t.Fatal(err)
		}
		busy, waits = busy+active, waits+waiting
	}
	if waits > 0 || busy == 0 {
		t.Errorf("of %d batches seen at Postgres in %d samples, %d waited for another's lock", busy, samples,
			waits)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}
