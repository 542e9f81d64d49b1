// Costs that grow: a recovery, and what it goes by, in proportion to what moved and not to the ledger.

package main

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"wallet/internal/moved"
	"wallet/internal/wal"
)

// seedWallets adds wallets of some entries each, as though they had been there for years: no event of them
// was ever written.
func (g *rig) seedWallets(t *testing.T, first, wallets, each int) {
	t.Helper()
	for _, statement := range []string{
		`SET session_replication_role = replica`,
		fmt.Sprintf(`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at)
			SELECT g, 'USD', now(), %d, %d, now() FROM generate_series(%d, %d) g`,
			each, each, first, first+wallets-1),
		fmt.Sprintf(`INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
			SELECT w, s, now(), 'deposit', 1, s, 'seed-' || s
			FROM generate_series(%d, %d) w, generate_series(1, %d) s`, first, first+wallets-1, each),
		`SET session_replication_role = origin`, `VACUUM ANALYZE wallet, entry`,
	} {
		g.mustExec(t, statement)
	}
}

// tuplesRead is how many rows of the tables have been read, by whatever way and whoever.
func (g *rig) tuplesRead(t *testing.T) (read map[string]int64) {
	t.Helper()
	look := func() map[string]int64 {
		read := make(map[string]int64)
		rows, _ := g.conn.Query(context.Background(), `
SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables
WHERE relname IN ('wallet', 'entry', 'moved')`)
		for rows.Next() {
			var name string
			var n int64
			if err := rows.Scan(&name, &n); err != nil {
				t.Fatal(err)
			}
			read[name] = n
		}
		return read
	}
	for still := 0; still < 3; time.Sleep(500 * time.Millisecond) { // backends tell about it a moment later
		now := look()
		if still++; fmt.Sprint(now) != fmt.Sprint(read) {
			still = 0
		}
		read = now
	}
	return read
}

// TestRecoveryCostsTheGap: what a recovery reads of the ledger is what moved since the horizon, though one
// of the wallets has a long chain.
func TestRecoveryCostsTheGap(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 5)
	checkStream(t, g.cfg)
	const deep, shallow = 500_000, 1000
	g.seedWallets(t, shallow, 10_000, 2)
	g.seedWallets(t, deep, 1, 30_000)
	g.awaitHorizon(t)
	r.stop()
	was := lastCheckpointOf(t, g.cfg)

	const gap = 60
	for i := range gap / 3 {
		for _, id := range []int{shallow + 7*i, deep, 1} {
			g.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", id),
				fmt.Sprintf(`{"amount":"1","idempotency_key":"gap-%d"}`, i))
		}
	}
	g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
	before := g.tuplesRead(t)
	r = startRelay(t, g.cfg)
	r.await(t, "leader")
	r.stop()
	after := g.tuplesRead(t)
	if n := lastCheckpointOf(t, g.cfg).Events - was.Events; n != gap {
		t.Errorf("%d events were recovered, want %d", n, gap)
	}
	for name, n := range after {
		if n -= before[name]; n > 3*gap {
			t.Errorf("%d rows of %s were read for a gap of %d entries", n, name, gap)
		} else {
			t.Logf("%d rows of %s were read for a gap of %d entries", n, name, gap)
		}
	}
}

// TestRecoveryBeforeTheLog: where the log of what moved does not reach back to the horizon, as after its
// first day, everything is looked at; nothing is missed or repeated.
func TestRecoveryBeforeTheLog(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 20)
	checkStream(t, g.cfg)
	g.awaitHorizon(t)
	r.stop()
	was := lastCheckpointOf(t, g.cfg)
	g.deposit(t, 20)
	g.mustExec(t, `DELETE FROM moved; UPDATE moved_kept SET from_xid = pg_current_xact_id()::text::bigint`)
	g.deposit(t, 5)
	g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
	r = startRelay(t, g.cfg)
	r.await(t, "leader")
	checkStream(t, g.cfg)
	if n := lastCheckpointOf(t, g.cfg).Events - was.Events; n != 25 {
		t.Errorf("%d events were recovered, want 25", n)
	}
}

// TestMoved: the log names what each statement added, whoever wrote it, or nothing where it was rolled back;
// and what is forgotten is old, of transactions that the relay is past, and no longer promised.
func TestMoved(t *testing.T) {
	w := start(t, testEnv(t))
	ctx := context.Background()
	conn := connect(t, w.env["DATABASE_URL"])
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	log := func(xid int64) string {
		t.Helper()
		var all []string
		err := moved.Since(ctx, conn, xid)(func(keys, numbers []int64) {
			all = append(all, fmt.Sprint(keys, numbers))
		})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(all, " ")
	}
	from := func() int64 {
		t.Helper()
		xid, err := moved.From(ctx, conn)
		if err != nil {
			t.Fatal(err)
		}
		return xid
	}
	first := from()
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"a"}`)
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"2","to_id":2,"idempotency_key":"b"}`)
	w.mustPost(t, 422, "/v1/wallets/1/transfer", `{"amount":"20","to_id":2,"idempotency_key":"c"}`)
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	insertByHand(t, tx, 9, 1)
	tx.Rollback(ctx)
	exec(`INSERT INTO entry SELECT * FROM entry LIMIT 0`)
	var middle int64
	if err := conn.QueryRow(ctx, `SELECT pg_current_xact_id()::text::bigint`).Scan(&middle); err != nil {
		t.Fatal(err)
	}
	if tx, err = conn.Begin(ctx); err != nil {
		t.Fatal(err)
	}
	insertByHand(t, tx, 8, 3)
	tx.Commit(ctx)
	const all = "[1] [1] [1 2] [2 1] [8 8 8] [1 2 3]"
	if got := log(first); got != all {
		t.Errorf("%q moved, want %q", got, all)
	}
	if got := log(middle); got != "[8 8 8] [1 2 3]" {
		t.Errorf("%q moved since %d", got, middle)
	}

	forget := func(below int64, age time.Duration, want string) {
		t.Helper()
		before := from()
		if err := moved.Forget(ctx, w.reads, below, age); err != nil {
			t.Fatal(err)
		}
		if got := log(0); got != want || (from() > before) != (want != all) {
			t.Errorf("below %d and older than %v: %q is left, from %d to %d", below, age, got, before, from())
		}
	}
	forget(math.MaxInt64, time.Hour, all)
	forget(first, 0, all)
	forget(middle, 0, "[8 8 8] [1 2 3]")
	if from() > middle {
		t.Errorf("the log is said to begin at %d, and has what came after %d", from(), middle)
	}
	// Out of a dump: numbers of another server, above all of ours.
	exec(`UPDATE moved_kept SET from_xid = 1000000000000; UPDATE moved SET xid = xid + 1000000000000`)
	if err := moved.Forget(ctx, w.reads, math.MaxInt64, time.Hour); err != nil {
		t.Fatal(err)
	}
	if log(0) != "" || from() <= middle || from() > middle+1000 {
		t.Errorf("after a dump the log begins at %d and has %q", from(), log(0))
	}
}

// TestAuditSince: an audit of what moved finds what is wrong with that, and reads as much; what is wrong
// before is not its matter, and its last line says so.
func TestAuditSince(t *testing.T) {
	type stage = func(t *testing.T, g *rig)
	damage := func(sql string) stage {
		return func(t *testing.T, g *rig) { g.mustExec(t, `ALTER TABLE entry DISABLE TRIGGER ALL; `+sql) }
	}
	for name, c := range map[string]struct {
		stage stage
		want  string
		n     int
	}{
		"clean": {func(*testing.T, *rig) {}, "5 wallets, 16 entries, 22 events compared", 0},
		"before": {damage(`UPDATE entry SET idempotency_key = 'x' WHERE wallet_id = 1 AND seq = 1`),
			"", 0},
		"others": {damage(`UPDATE wallet SET balance = balance + 1 WHERE id = 1000`), "", 0},
		"differing": {damage(`UPDATE entry SET idempotency_key = 'x' WHERE idempotency_key = 'b7'`),
			"at least one differs", 1},
		"chain": {damage(`UPDATE entry SET balance = balance + 1 WHERE idempotency_key = 'b7'`),
			"its balance is not the former one", 3},
		"balance": {damage(`UPDATE wallet SET balance = balance + 1 WHERE id = 2`),
			"wallet 2: its balance, time or held", 1},
		"leg": {damage(`UPDATE entry SET counterparty_seq = 7 WHERE kind = 'transfer_in'`),
			"the other leg", 3},
		"missing": {damage(`UPDATE wallet SET seq = seq + 1, balance = balance + 1 WHERE id = 1;
			ALTER TABLE entry ENABLE TRIGGER ALL;
			INSERT INTO entry SELECT id, seq, null, null, entry_at, 'deposit', 1, balance, 'x'
				FROM wallet WHERE id = 1`), "wallet 1: events", 1},
		"repeated": {func(t *testing.T, g *rig) { forge(t, g, "1000", "1000-1", `{}`) },
			"wallet 1000: events 2 to 2", 1},
		"invented": {func(t *testing.T, g *rig) { forge(t, g, "99", "99-1", `{}`) },
			"event 99-1 is in the topic, but the ledger ends at number 0", 1},
	} {
		// Not in parallel: the log counts from the oldest transaction of the whole server.
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			r := startRelay(t, g.cfg)
			r.await(t, "leader")
			g.seedWallets(t, 1000, 10_000, 2)
			g.deposit(t, 5)
			g.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"0.5","idempotency_key":"h"}`)
			// The last before the mark, with nothing older under way: the audit begins with it.
			if err := wal.AwaitTransactions(context.Background(), g.conn); err != nil {
				t.Fatal(err)
			}
			g.mustPost(t, 200, "/v1/wallets/2/state", `{"state":"no_out","idempotency_key":"s"}`)
			time.Sleep(100 * time.Millisecond)
			mark := time.Now()
			time.Sleep(time.Second) // the audit goes back from when it has all its connections
			g.deposit(t, 10)
			g.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"1","to_id":3,"idempotency_key":"t"}`)
			g.mustPost(t, 200, "/v1/holds/1-2/capture", `{"amount":"0.2","idempotency_key":"c"}`)
			g.mustPost(t, 201, "/v1/wallets/4/holds", `{"amount":"0.5","idempotency_key":"h4"}`)
			g.mustPost(t, 200, "/v1/wallets/2/state", `{"state":"open","idempotency_key":"s2"}`)
			eventually(t, 20*time.Second, "all is published", func() bool { return r.events.Load() == 22 })
			if name == "clean" {
				r.stop()
				g.end()
			}
			c.stage(t, g)
			audit := func(since time.Duration) (int, string, error) {
				var said bytes.Buffer
				findings, err := runAudit(context.Background(), &g.cfg.relayConfig, since, &said)
				return findings, said.String(), err
			}
			var before map[string]int64
			if name == "clean" {
				before = g.tuplesRead(t)
			}
			findings, said, err := audit(time.Since(mark))
			last := said[strings.LastIndexByte(strings.TrimSuffix(said, "\n"), '\n')+1:]
			if err != nil || findings != c.n || !strings.Contains(said, c.want) ||
				!strings.HasPrefix(last, "only since "+mark.UTC().Format("2006-01-02T")) {
				t.Errorf("%d findings, want %d with %q; %v\n%s", findings, c.n, c.want, err, said)
			}
			if name == "clean" {
				_, proves, _ := strings.Cut(last, "; ") // it is printed there, on a line of its own
				if page := readPage(t, "docs/operate.md"); !strings.Contains(page, proves) {
					t.Errorf("docs/operate.md does not print %q", proves)
				}
				for table, n := range g.tuplesRead(t) {
					if n -= before[table]; n > 100 {
						t.Errorf("%d rows of %s were read for 15 entries", n, table)
					}
				}
				if _, _, err := audit(time.Hour); err == nil ||
					!strings.Contains(err.Error(), "run `wallet -audit` without -since") {
					t.Errorf("since before the log begins: %v", err)
				}
			}
		})
	}
}
