// Tests of -rebuild: what comes back out of the topic, what is refused, and what a kill leaves.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/shopspring/decimal"

	"wallet/internal/book"
	"wallet/internal/kafka"
	"wallet/internal/proctest"
	"wallet/internal/rebuild"
	"wallet/internal/wal"
)

// ledgerTables is all that a ledger says, a line a row. Of wallets only what comes back: no key of a
// creation.
func ledgerTables(tb testing.TB, databaseURL string) map[string][]string {
	tb.Helper()
	conn := connect(tb, databaseURL)
	tables := make(map[string][]string)
	for table, row := range map[string]string{"entry": "t", "hold": "t", "reversal": "t", "reference": "t",
		"wallet": "ROW(id, seq, entry_at, currency, balance, held, state, state_seq, " +
			"(SELECT e.created_at FROM entry e WHERE e.wallet_id = id AND e.seq = 1))"} {
		where := ""
		if table == "wallet" {
			where = " WHERE seq > 0"
		}
		rows, _ := conn.Query(context.Background(), "SELECT "+row+"::text FROM "+table+" t"+where+" ORDER "+
			"BY 1")
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			tb.Fatal(err)
		}
		tables[table] = lines
	}
	return tables
}

// sameLedger compares two ledgers row by row.
func sameLedger(tb testing.TB, want, got map[string][]string) {
	tb.Helper()
	for table, lines := range want {
		have := make(map[string]bool)
		for _, line := range got[table] {
			have[line] = true
		}
		missing := 0
		for _, line := range lines {
			if !have[line] {
				if missing++; missing == 1 {
					tb.Errorf("%s: %s is not there", table, line)
				}
			}
		}
		if missing > 0 || len(lines) != len(got[table]) {
			tb.Errorf("%s: %d rows, of which %d are not there, and %d in its place", table, len(lines),
				missing,
				len(got[table]))
		}
	}
}

// mustRebuild runs -rebuild and returns what it says.
func mustRebuild(tb testing.TB, cfg *config) string {
	tb.Helper()
	said, err := tryRebuild(cfg, "")
	if err != nil {
		tb.Fatalf("rebuild: %v\n%s", err, said)
	}
	return said
}

func tryRebuild(cfg *config, skip string) (string, error) {
	var said bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := rebuildLedger(ctx, cfg, skip, &said)
	return said.String(), err
}

// copyDatabase makes a copy of a database that nobody uses.
func copyDatabase(t *testing.T, databaseURL, suffix string) string {
	t.Helper()
	admin, name := connect(t, stack(t).DatabaseURL), databaseOf(databaseURL)
	eventually(t, 20*time.Second, "copied", func() bool {
		admin.Exec(context.Background(),
			`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, name)
		_, err := admin.Exec(context.Background(), "CREATE DATABASE "+name+suffix+" TEMPLATE "+name)
		return err == nil
	})
	return strings.Replace(databaseURL, "/"+name+"?", "/"+name+suffix+"?", 1)
}

// elsewhere is an environment's with another database and a slot of its own.
func elsewhere(t *testing.T, env map[string]string, databaseURL string) (map[string]string, *config) {
	t.Helper()
	env = maps.Clone(env)
	env["DATABASE_URL"] = databaseURL
	env["REPLICATION_SLOT"] = fmt.Sprintf("%s_%d", env["REPLICATION_SLOT"], names.Add(1))
	cfg, err := readConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	dropSlotAtEnd(t, cfg.replicationSlot)
	return env, cfg
}

// migrated makes the schema in an empty database.
func migrated(t *testing.T, cfg *config) {
	t.Helper()
	if err := migrateSchema(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
}

// published is a ledger at rest, after all of it has been published.
func published(t *testing.T, cfg *config) map[string][]string {
	t.Helper()
	r := startRelay(t, cfg)
	checkStream(t, cfg)
	r.stop()
	return ledgerTables(t, cfg.databaseURL)
}

// TestRebuild: movements of every kind, a copy of the database from between them; then, out of the topic, an
// empty database and the copy become what the original is, row by row. Each goes on as the topic's: no event
// is missing, none comes twice, and what was answered is answered again.
func TestRebuild(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "KAFKA_PARTITIONS=3")
	dropSlotAtEnd(t, env["REPLICATION_SLOT"])
	w := start(t, env)
	one := func() *running { return w }
	acknowledged := moveAtRandom(t, 8, 60, 6, one)
	w.end()
	between := copyDatabase(t, env["DATABASE_URL"], "_between")
	w = start(t, env)
	acknowledged = append(acknowledged, moveAtRandom(t, 8, 100, 12, one)...) // some are of before, once more
	w.mustPost(t, 201, "/v1/wallets", `{"id":77,"idempotency_key":"w77"}`)
	w.mustPost(t, 200, "/v1/wallets/1/state", `{"state":"open","idempotency_key":"o"}`)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"o2"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"1.5","idempotency_key":"o3","to_id":2}`)
	w.end()
	original := published(t, w.cfg)

	empty := stack(t).database(t)
	for _, c := range []struct{ name, database string }{{"empty", empty}, {"restored", between}} {
		t.Run(c.name, func(t *testing.T) {
			env, cfg := elsewhere(t, env, c.database)
			migrated(t, cfg)
			said := mustRebuild(t, cfg)
			t.Log(said)
			sameLedger(t, original, ledgerTables(t, c.database))
			checkAudit(t, cfg)
			if again := mustRebuild(t, cfg); !strings.Contains(again, " 0 entries added") {
				t.Errorf("again: %s", again)
			}
			w = start(t, env)
			eventually(t, 30*time.Second, "leading", func() bool { return w.relay.state.Load() == "leader" })
			checkAcknowledged(t, w, acknowledged)
			moveAtRandom(t, 4, 130, 8, one)
			w.end()
			original = published(t, cfg)
		})
	}
}

// TestEmptyLedgerOfATopicIsNotServed: Postgres was lost, and somebody starts the service on an empty
// database. It says what to do and is not ready, so nothing is posted under a number that the topic has.
// Whether the topic is empty cannot be seen without Kafka; a ledger with wallets is served without.
func TestEmptyLedgerOfATopicIsNotServed(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "KAFKA_PARTITIONS=3")
	dropSlotAtEnd(t, env["REPLICATION_SLOT"])
	w := start(t, env)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"before"}`)
	checkStream(t, w.cfg)
	w.end()

	env, cfg := elsewhere(t, env, stack(t).database(t))
	const path, body = "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"after"}`
	w = launch(t, env)
	eventually(t, 20*time.Second, "a refusal", func() bool { return w.relay.state.Load() == "refused" })
	if refusal := w.relay.refusal.Load().(string); !strings.Contains(refusal, "`wallet -rebuild`") {
		t.Error(refusal)
	}
	if ready, a := w.get("/readyz"), w.post(path, body); ready.status != 503 || a.status != 503 {
		t.Errorf("on an empty ledger: %s, %s", ready, a)
	}
	silent := *cfg
	silent.kafkaBrokers = []string{"127.0.0.1:1"}
	mayBegin := func(since time.Time) error {
		return newRelay(&silent.relayConfig, w.reads, nil).mayBegin(t.Context(), since)
	}
	if err := mayBegin(time.Now()); err == nil || !strings.Contains(err.Error(), "cannot be seen yet") {
		t.Errorf("empty, and without Kafka: %v", err)
	}
	if err := mayBegin(time.Now().Add(-emptyPatience)); err != nil {
		t.Errorf("empty, and without Kafka for long: %v", err)
	}
	w.end()
	eventually(t, 10*time.Second, "rebuilt", func() bool { // once the service's connections have ended
		_, err := tryRebuild(cfg, "")
		return err == nil
	})
	w = start(t, env)
	if err := mayBegin(time.Now()); err != nil {
		t.Errorf("with wallets, and without Kafka: %v", err)
	}
	a := w.mustPost(t, 200, path, body)
	if !strings.Contains(a.body, `"transaction_id":"1-2"`) {
		t.Errorf("after the rebuild: %s", a)
	}
}

// TestDamagedWallets: rows are changed by hand, past all triggers and constraints. The audit names their
// wallets and no other; a rebuild onto the damaged ledger refuses, and writes nothing; one into a database
// beside it is the ledger as it was, and goes on.
func TestDamagedWallets(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "KAFKA_PARTITIONS=3")
	w := start(t, env)
	one := func() *running { return w }
	acknowledged := moveAtRandom(t, 8, 60, 12, one)
	for id := 1; id <= 4; id++ { // so that each has a head that differs from the entry before
		path := fmt.Sprintf("/v1/wallets/10%d/deposit", id)
		w.mustPost(t, 200, path, `{"amount":"7","idempotency_key":"d"}`)
		w.mustPost(t, 200, path, `{"amount":"8","idempotency_key":"e"}`)
	}
	w.end()
	slot := env["REPLICATION_SLOT"]
	original := published(t, w.cfg)
	conn := connect(t, env["DATABASE_URL"])
	if _, err := conn.Exec(context.Background(), `
SET session_replication_role = replica;
UPDATE wallet SET balance = 1000000 WHERE id = 101;                         -- a balance
UPDATE wallet SET seq = 1, balance = 7 WHERE id = 102;                      -- a head, put back
UPDATE entry SET amount = 9, balance = 16 WHERE wallet_id = 103 AND seq = 2; -- an entry and the head with it
UPDATE wallet SET balance = 16 WHERE id = 103`, pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	findings, err := runAudit(context.Background(), &w.cfg.relayConfig, 0, &said)
	if err != nil || findings < 3 {
		t.Errorf("%d findings, %v", findings, err)
	}
	for id := 1; id <= 104; id++ {
		named := regexp.MustCompile(fmt.Sprintf(`\b(wallet |event )%d\b`, id)).MatchString(said.String())
		if damaged := id >= 101 && id <= 103; named != damaged {
			t.Errorf("wallet %d: named %v, damaged %v\n%s", id, named, damaged, said.String())
		}
	}
	before := ledgerTables(t, env["DATABASE_URL"])
	refusal, err := tryRebuild(w.cfg, "")
	if err == nil {
		t.Errorf("onto a damaged ledger: %s", refusal)
	}
	t.Logf("%s%v", said.String(), err)
	sameLedger(t, before, ledgerTables(t, env["DATABASE_URL"]))

	eventually(t, 20*time.Second, "slot dropped", func() bool {
		_, err := conn.Exec(context.Background(), `SELECT pg_drop_replication_slot($1)`, slot)
		return err == nil
	})
	env["DATABASE_URL"] = stack(t).database(t)
	dropSlotAtEnd(t, slot)
	cfg, err := readConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	migrated(t, cfg)
	mustRebuild(t, cfg)
	sameLedger(t, original, ledgerTables(t, cfg.databaseURL))
	checkAudit(t, cfg)
	w = start(t, env)
	eventually(t, 30*time.Second, "leading", func() bool { return w.relay.state.Load() == "leader" })
	checkAcknowledged(t, w, acknowledged)
	w.mustPost(t, 200, "/v1/wallets/101/withdraw", `{"amount":"15","idempotency_key":"w"}`)
	w.end()
	published(t, cfg)
}

// TestBothWays: Kafka is lost, and new topics get the whole ledger; then Postgres is lost, and an empty
// database gets it back out of these. The ledger is what it was, and so is each event.
func TestBothWays(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "KAFKA_PARTITIONS=3")
	dropSlotAtEnd(t, env["REPLICATION_SLOT"])
	w := start(t, env)
	moveAtRandom(t, 6, 50, 8, func() *running { return w })
	w.end()
	original := published(t, w.cfg)
	events := func(cfg *config) map[string]string {
		found := make(map[string]string)
		for m := range consume(t, cfg, len(original["entry"])) {
			found[string(m.Headers[1].Value)] = string(m.Value)
		}
		return found
	}
	before := events(w.cfg)

	env = maps.Clone(env)
	env["KAFKA_TOPIC"] += "-new"
	env["KAFKA_CHECKPOINT_TOPIC"] += "-new"
	cfg, err := readConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	sameLedger(t, original, published(t, cfg))
	if after := events(cfg); !maps.Equal(before, after) || len(after) != len(original["entry"]) {
		t.Errorf("%d events in the former topic, %d in the new one, of %d entries, or some differ",
			len(before),
			len(after), len(original["entry"]))
	}
	_, cfg = elsewhere(t, env, stack(t).database(t))
	migrated(t, cfg)
	mustRebuild(t, cfg)
	sameLedger(t, original, published(t, cfg))
}

// TestRebuildRefuses: each thing that is in the way is said in one sentence, and nothing is written.
func TestRebuildRefuses(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 20)
	g.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"1","to_id":3,"idempotency_key":"t"}`)
	checkStream(t, g.cfg)
	refused := func(cfg *config, skip, want string) {
		t.Helper()
		before := ledgerTables(t, cfg.databaseURL)
		if said, err := tryRebuild(cfg, skip); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q\n%s", err, want, said)
		}
		sameLedger(t, before, ledgerTables(t, cfg.databaseURL))
	}
	_, empty := elsewhere(t, g.env, stack(t).database(t))
	empty.kafkaBrokers = g.cfg.kafkaBrokers
	if _, err := tryRebuild(empty, ""); err == nil || !strings.Contains(err.Error(),
		"run `wallet -migrate` first") {
		t.Errorf("without a schema: %v", err)
	}
	migrated(t, empty)
	refused(empty, "x", "-rebuild-skip")
	none := *empty
	none.kafkaTopic, none.kafkaCheckpointTopic = none.kafkaTopic+"-none", none.kafkaCheckpointTopic+"-none"
	refused(&none, "", "holds no event")
	fewer := *empty
	fewer.kafkaTopic, fewer.kafkaPartitions = fewer.kafkaTopic+"-fewer", 1
	refused(&fewer, "", "has 1 partitions but had 3")

	refused(g.cfg, "", "is in use") // the relay's slot
	r.stop()
	refused(g.cfg, "", "connections of the service are open")
	g.deposit(t, 1) // which the topic lacks
	g.end()
	refused(g.cfg, "", "let a relay publish the rest first")
	tx := g.begin(t)
	if _, err := tx.Exec(context.Background(),
		`INSERT INTO outbox (aggregate_id, seq, event_type, payload) VALUES (1, 1, '', '')`); err != nil {
		t.Fatal(err)
	}
	refused(g.cfg, "", "somebody writes to this ledger")
	tx.Rollback(context.Background())

	published := lastCheckpointOf(t, g.cfg)
	forge(t, g, "2", "2-9", `{"wallet_id":2}`)
	refused(empty, "", "wallet 2: event number 9")
	if now := lastCheckpointOf(t, g.cfg); now.EndLSN != published.EndLSN || now.Slot != published.Slot {
		t.Errorf("the checkpoint moved: %+v", now)
	}
	said, err := tryRebuild(empty, "2")
	if err != nil || !strings.Contains(said, "new topics") {
		t.Fatalf("%v\n%s", err, said)
	}
	fresh := *empty
	fresh.kafkaTopic, fresh.kafkaCheckpointTopic = fresh.kafkaTopic+"-new", fresh.kafkaCheckpointTopic+"-new"
	startRelay(t, &fresh).await(t, "leader")
	var said2 bytes.Buffer
	// The other leg of none is missing: wallet 2 took no part in a transfer.
	if n, err := runAudit(context.Background(), &fresh.relayConfig, 0, &said2); err != nil || n != 0 {
		t.Errorf("%d findings, %v\n%s", n, err, said2.String())
	}
}

// TestWritersAreKeptOutMeanwhile: a service that starts beside a rebuild posts nothing; one that publishes
// beside it is found.
func TestWritersAreKeptOutMeanwhile(t *testing.T) {
	g := newRig(t, "REQUEST_TIMEOUT=1s")
	r := startRelay(t, g.cfg)
	g.deposit(t, 5)
	checkStream(t, g.cfg)
	r.stop()
	g.end()
	ctx := context.Background()
	var guard *rebuild.Guard
	var err error
	eventually(t, 10*time.Second, "the service's connections have ended", func() bool {
		guard, err = rebuild.KeepOut(ctx, g.cfg.migrateURL)
		return err == nil
	})
	if _, err := rebuild.KeepOut(ctx, g.cfg.migrateURL); err == nil ||
		!strings.Contains(err.Error(), "any other rebuild") {
		t.Errorf("two rebuilds at a time: %v", err)
	}
	k := g.openKafka(t)
	topic, _, err := (&relay{cfg: &g.cfg.relayConfig, adopting: true}).takeTopic(ctx, k)
	if err == nil {
		err = topic.Unchanged(k)
	}
	if err != nil {
		t.Fatal(err)
	}
	forge(t, g, "1", "1-1", `{}`)
	if err := topic.Unchanged(k); err == nil || !strings.Contains(err.Error(), "somebody has published") {
		t.Error(err)
	}
	g.running = start(t, g.env)
	const path, body = "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"beside"}`
	if a := g.post(path, body); a.status != 503 {
		t.Errorf("beside a rebuild: %s", a)
	}
	if err := guard.Check(ctx); err != nil {
		t.Error(err)
	}
	guard.Release()
	g.mustPost(t, 200, path, body)
	if guard.Check(ctx) == nil {
		t.Error("a guard that let go says that it has the lock")
	}
}

// TestRebuildAfterAKill: it is killed while it writes. Each wallet is a whole beginning of its chain then,
// and the next run goes on from there.
func TestRebuildAfterAKill(t *testing.T) {
	g := newRig(t)
	tx := g.begin(t)
	for id := range int64(120) {
		insertByHand(t, tx, 1000+id, 500)
	}
	if err := tx.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	r := startRelay(t, g.cfg)
	r.await(t, "leader")
	g.deposit(t, 1)
	eventually(t, 60*time.Second, "published", func() bool {
		c := lastCheckpointOf(t, g.cfg)
		return c != nil && c.Events == 60_001
	})
	r.stop()
	g.end()
	original := ledgerTables(t, g.cfg.databaseURL)

	env, cfg := elsewhere(t, g.env, stack(t).database(t))
	env["KAFKA_BROKERS"] = stack(t).KafkaBrokers
	cfg.kafkaBrokers = g.cfg.kafkaBrokers
	migrated(t, cfg)
	conn := connect(t, cfg.databaseURL)
	count := func(what string) (n int) {
		t.Helper()
		if err := conn.QueryRow(context.Background(), "SELECT count(*) FROM "+what).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	killed := walletCommand(t, env, "-rebuild")
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); count("entry") == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	killed.Process.Kill()
	killed.Wait()
	time.Sleep(500 * time.Millisecond) // Postgres may still be at its last commit
	written := count("entry")
	if written == 0 || written == 60_001 {
		t.Fatalf("%d entries were written when it was killed: this has proven nothing", written)
	}
	if n := count(`wallet w WHERE seq <> (SELECT count(*) FROM entry e WHERE e.wallet_id = w.id)`); n != 0 {
		t.Errorf("%d wallets are not whole beginnings", n)
	}
	if c := lastCheckpointOf(t, cfg); c.Slot != g.cfg.replicationSlot {
		t.Errorf("the checkpoint is this database's already: %+v", c)
	}
	said := mustRebuild(t, cfg)
	if want := fmt.Sprintf(" %d entries added", 60_001-written); !strings.Contains(said, want) {
		t.Errorf("want %q\n%s", want, said)
	}
	sameLedger(t, original, ledgerTables(t, cfg.databaseURL))
	checkAudit(t, cfg)
}

// TestRebuildWithoutTheTopicsHead: a ledger that reaches beyond what was deleted is made whole; one that does
// not is refused.
func TestRebuildWithoutTheTopicsHead(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 20)
	g.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"2","idempotency_key":"h"}`)
	checkStream(t, g.cfg)
	r.stop()
	g.end()
	g.conn.Close(context.Background())
	between := copyDatabase(t, g.cfg.databaseURL, "_between")
	k := g.openKafka(t)
	ends, err := k.Ends()
	if err != nil {
		t.Fatal(err)
	}
	g.running = start(t, g.env)
	r = startRelay(t, g.cfg)
	g.mustPost(t, 200, "/v1/holds/1-5/capture", `{"amount":"0.5","final":false,"idempotency_key":"c"}`)
	g.mustPost(t, 200, "/v1/transactions/2-1/reverse", `{"amount":"0.5","idempotency_key":"r"}`)
	g.deposit(t, 20)
	g.mustPost(t, 200, "/v1/holds/1-5/capture", `{"idempotency_key":"c2"}`)
	checkStream(t, g.cfg)
	r.stop()
	original := ledgerTables(t, g.cfg.databaseURL)
	g.end()
	cut := make(map[int32]int64)
	for p, end := range ends {
		cut[int32(p)] = max(0, end-2)
	}
	if err := clusterAdmin(t, g.cfg).DeleteRecords(g.cfg.kafkaTopic, cut); err != nil {
		t.Fatal(err)
	}
	_, empty := elsewhere(t, g.env, stack(t).database(t))
	_, restored := elsewhere(t, g.env, between)
	empty.kafkaBrokers, restored.kafkaBrokers = g.cfg.kafkaBrokers, g.cfg.kafkaBrokers
	migrated(t, empty)
	if said, err := tryRebuild(empty, ""); err == nil || !strings.Contains(err.Error(), "head was deleted") {
		t.Errorf("%v\n%s", err, said)
	}
	t.Log(mustRebuild(t, restored))
	sameLedger(t, original, ledgerTables(t, between))
	startRelay(t, restored).await(t, "leader")
}

// BenchmarkRebuild makes a ledger out of a topic that a producer has filled: 600,000 events of 200,000
// wallets, with -large 10,000,000 of 10,000,000 and of 1,000,000. The schema's constraints and triggers are
// in force, and the program is a process of its own. Then the other way: new topics get the whole ledger.
func BenchmarkRebuild(b *testing.B) {
	sizes := [][2]int{{600_000, 200_000}}
	if *large {
		sizes = [][2]int{{10_000_000, 1_000_000}, {10_000_000, 10_000_000}}
	}
	for _, size := range sizes {
		b.Run(fmt.Sprintf("%d events of %d wallets", size[0], size[1]), func(b *testing.B) {
			if b.N > 1 {
				b.Skip("pass -benchtime 1x: it is made once")
			}
			env := testEnv(b, "KAFKA_BROKERS="+stack(b).KafkaBrokers)
			dropSlotAtEnd(b, env["REPLICATION_SLOT"])
			cfg, err := readConfig(func(name string) string { return env[name] })
			if err == nil {
				err = migrateSchema(context.Background(), cfg)
			}
			if err == nil {
				err = fillTopic(cfg, size[0], size[1])
			}
			if err != nil {
				b.Fatal(err)
			}
			cmd := walletCommand(b, env, "-rebuild")
			var said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &said, &said
			spent, before := make(cost), processorTime(withServers(b, map[string]int{}))
			b.ResetTimer()
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			most := 0.0
			for running := true; running; {
				select {
				case err = <-ended:
					running = false
				case <-time.After(20 * time.Millisecond):
					most = max(most, proctest.Memory(cmd.Process.Pid, "VmHWM"))
				}
			}
			b.StopTimer()
			if err != nil || !strings.Contains(said.String(), fmt.Sprintf(" %d entries added", size[0])) {
				b.Fatalf("%v\n%s", err, said.String())
			}
			b.Log(said.String())
			spent.add(before, processorTime(withServers(b, map[string]int{})))
			spent["rebuild"] = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			spent.report(b, "", float64(size[0]))
			b.ReportMetric(float64(size[0])/b.Elapsed().Seconds(), "events/s")
			b.ReportMetric(most, "MB")

			env["KAFKA_TOPIC"] += "-new"
			env["KAFKA_CHECKPOINT_TOPIC"] += "-new"
			r := newReplica(b, env, fmt.Sprintf("bench-%d", names.Add(1)))
			began := time.Now()
			r.start(b)
			eventually(b, 20*time.Minute, "leading", r.leads)
			b.ReportMetric(float64(size[0])/time.Since(began).Seconds(), "new-topics-events/s")
			b.ReportMetric(r.memory("VmHWM"), "new-topics-MB")
			if n := r.metric("wallet_relay_events_total"); int(n) != size[0] {
				b.Errorf("%.0f events went to new topics", n)
			}
			r.stop(b)
		})
	}
}

// fillTopic publishes deposits, wallet after wallet and round after round, as some relay's.
func fillTopic(cfg *config, events, wallets int) error {
	k, err := kafka.Open(kafkaConfig(&cfg.relayConfig, nil))
	if err != nil {
		return err
	}
	defer k.Close()
	producer, err := k.NewProducer(transactionalID("1", "gone"))
	if err != nil {
		return err
	}
	last := checkpoint{Mark: wal.Mark{System: "1", Timeline: 1, Slot: "gone", EndLSN: "0/1"},
		Partitions: k.Partitions(), Events: int64(events)}
	record, err := json.Marshal(last)
	if err != nil {
		return err
	}
	var records eventRecords
	for done := 0; done < events; {
		list := make([]event, 0, batchEventsMax)
		for ; len(list) < cap(list) && done < events; done++ {
			e := book.Entry{WalletID: int64(1 + done%wallets), Seq: int64(1 + done/wallets),
				Kind:     book.KindDeposit,
				Currency: "USD", Amount: decimal.New(1050, -2), Key: fmt.Sprintf("key-%012d", done),
				CreatedAt: time.Now().UTC().Truncate(time.Microsecond)}
			e.Balance = e.Amount.Mul(decimal.New(e.Seq, 0))
			list = append(list, event{walletID: e.WalletID, seq: e.Seq, payload: book.AppendEvent(nil, &e)})
		}
		messages, err := records.of(list)
		if err == nil {
			err = producer.Send(messages, record)
		}
		if err == nil {
			err = producer.Commit()
		}
		if err != nil {
			return err
		}
	}
	return nil
}
