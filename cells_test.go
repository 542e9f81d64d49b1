// Several ledgers side by side: schemas of one database and databases of one Postgres, on one Kafka and one
// Redis.

package main

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

// cellURL is a URL of the same database, of one schema of it, with further parameters.
func cellURL(t *testing.T, databaseURL, schema string, more ...string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("search_path", schema)
	for i := 0; i < len(more); i += 2 {
		query.Set(more[i], more[i+1])
	}
	u.RawQuery = query.Encode()
	return u.String()
}

// texts is the first column of a query's rows.
func texts(t *testing.T, databaseURL, query string) []string {
	t.Helper()
	rows, _ := connect(t, databaseURL).Query(context.Background(), query)
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestCells: each ledger has the wallets that the others have too, under the same keys, and each one's relay
// publishes exactly its own entries. One of them does without what a coordinator of several nodes lacks, and
// then moves to another database while its neighbours go on.
func TestCells(t *testing.T) {
	kafka := "KAFKA_BROKERS=" + stack(t).KafkaBrokers
	whole := testEnv(t, kafka) // the schema public
	conn := connect(t, whole["DATABASE_URL"])
	if _, err := conn.Exec(context.Background(), `CREATE SCHEMA cell_a; CREATE SCHEMA "Cell'b"`); err != nil {
		t.Fatal(err)
	}
	a := testEnv(t, kafka, "DATABASE_URL="+cellURL(t, whole["DATABASE_URL"], "cell_a",
		"plan_cache_mode", "auto", "wallet.entry_fits_wallet", "off"))
	b := testEnv(t, kafka, "DATABASE_URL="+cellURL(t, whole["DATABASE_URL"], `"Cell'b"`))
	elsewhere := testEnv(t, kafka)
	var cells []*running
	for _, env := range []map[string]string{whole, a, b, elsewhere} {
		dropSlotAtEnd(t, env["REPLICATION_SLOT"])
		cells = append(cells, start(t, env))
	}
	made := texts(t, whole["DATABASE_URL"], `SELECT pubname FROM pg_publication ORDER BY pubname COLLATE "C"`)
	if !slices.Equal(made, []string{"wallet_outbox", "wallet_outbox_Cell'b", "wallet_outbox_cell_a"}) {
		t.Errorf("publications: %q", made)
	}
	has := texts(t, whole["DATABASE_URL"], `
SELECT nspname FROM pg_trigger t
JOIN pg_class c ON c.oid = tgrelid JOIN pg_namespace n ON n.oid = relnamespace
WHERE tgname = 'entry_fits_wallet' ORDER BY nspname COLLATE "C"`)
	if !slices.Equal(has, []string{"Cell'b", "public"}) {
		t.Errorf("with the trigger that can be left out: %q", has)
	}
	for cell, mode := range map[int]string{0: "force_generic_plan", 1: "auto"} {
		var is string
		err := cells[cell].writes.QueryRow(context.Background(), `SHOW plan_cache_mode`).Scan(&is)
		if err != nil || is != mode {
			t.Errorf("plan_cache_mode of cell %d is %s, %v", cell, is, err)
		}
	}

	move := func(w *running, run string) {
		for i := range 40 {
			w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", 1+i%4),
				fmt.Sprintf(`{"amount":"2","idempotency_key":"%s d%d"}`, run, i))
			w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/transfer", 1+i%4),
				fmt.Sprintf(`{"amount":"1","to_id":%d,"idempotency_key":"%s t%d"}`, 1+(i+1)%4, run, i))
		}
		w.mustPost(t, 201, "/v1/wallets/1/holds", fmt.Sprintf(`{"amount":"1","idempotency_key":"%s h"}`, run))
	}
	together := func(run string) {
		var clients sync.WaitGroup
		for _, w := range cells {
			clients.Go(func() { move(w, run) })
		}
		clients.Wait()
		for _, w := range cells {
			checkLedger(t, w.env["DATABASE_URL"])
			checkStream(t, w.cfg)
		}
	}
	together("first")

	// The cell moves. What its relay has not published by then is published from where it arrives.
	moving := cells[1]
	was := moving.cfg
	moving.end()
	there := testEnv(t, kafka)
	moved := make(map[string]string)
	for name, value := range a {
		moved[name] = value
	}
	moved["DATABASE_URL"], moved["REPLICATION_SLOT"] = there["DATABASE_URL"], there["REPLICATION_SLOT"]
	moved["KAFKA_BROKERS"] = "" // its first start is without a relay
	dropSlotAtEnd(t, moved["REPLICATION_SLOT"])
	unrelayed := start(t, with(a, "KAFKA_BROKERS", ""))
	move(unrelayed, "unpublished")
	unrelayed.end()
	arriving := start(t, moved) // makes the schema
	arriving.end()
	copyLedger(t, was.databaseURL, moved["DATABASE_URL"])
	moved["KAFKA_BROKERS"] = a["KAFKA_BROKERS"]
	cfg, err := readConfig(func(name string) string { return moved[name] })
	if err != nil {
		t.Fatal(err)
	}
	if err := adopt(context.Background(), &cfg.relayConfig); err != nil {
		t.Fatal(err)
	}
	cells[1] = start(t, moved)
	again := cells[1].mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"2","idempotency_key":"first d0"}`)
	if again.header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("a key of before the move: %s", again)
	}
	together("second")
}

// with is an environment with one value changed.
func with(env map[string]string, name, value string) map[string]string {
	changed := make(map[string]string)
	for n, v := range env {
		changed[n] = v
	}
	changed[name] = value
	return changed
}

// copyLedger copies a ledger at rest into one that has the same schema and nothing in it, table by table, as
// pg_dump --data-only would.
func copyLedger(t *testing.T, from, to string) {
	t.Helper()
	source, target := connect(t, from), connect(t, to)
	for _, table := range []string{"wallet", "entry", "hold", "reversal", "reference", "outbox"} {
		names := texts(t, from, fmt.Sprintf(`SELECT quote_ident(attname) FROM pg_attribute
			WHERE attrelid = '%s'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum`, table))
		columns := strings.Join(names, ", ")
		reader, writer := io.Pipe()
		go func() {
			_, err := source.PgConn().CopyTo(context.Background(), writer,
				fmt.Sprintf("COPY (SELECT %s FROM %s) TO STDOUT", columns, table))
			writer.CloseWithError(err)
		}()
		if _, err := target.PgConn().CopyFrom(context.Background(), reader,
			fmt.Sprintf("COPY %s (%s) FROM STDIN", table, columns)); err != nil {
			t.Fatalf("%s: %v", table, err)
		}
	}
}

// TestPostgresWithoutLogicalWAL: a server that was found in place of the one that was meant is met with what
// to do, in the relay's own log line.
func TestPostgresWithoutLogicalWAL(t *testing.T) {
	s, err := startStores("-pgset", "wal_level=replica")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	w := start(t, testEnv(t, "DATABASE_URL="+s.database(t)))
	r := newRelay(&w.cfg.relayConfig, w.reads, nil)
	conn, _, err := r.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	slot, err := r.readSlot(t.Context(), r.db)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.makeSlot(t.Context(), conn, slot); err == nil ||
		!strings.Contains(err.Error(), "run ALTER SYSTEM SET wal_level = logical and restart it") {
		t.Error(err)
	}
}
