// The relay's tests: its parts by themselves, then each fault that one process can stage, on the shared
// servers. cdc_chaos_test.go kills real processes.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/book"
	"wallet/internal/jsontext"
	"wallet/internal/kafka"
	"wallet/internal/logs"
	"wallet/internal/metric"
	"wallet/internal/wal"
)

// TestKafkaRefusalsNameSettings: internal/kafka does not know how its fields are set here.
func TestKafkaRefusalsNameSettings(t *testing.T) {
	for want, cfg := range map[string]relayConfig{
		"set KAFKA_TLS_CA to a file that can be read: ": {kafkaTLS: true, kafkaTLSCA: "absent"},
		"set KAFKA_TLS_CERT and KAFKA_TLS_KEY to a certificate and its key: ": {
			kafkaTLS: true, kafkaTLSCert: "absent", kafkaTLSKey: "absent"},
	} {
		_, err := kafka.Open(kafkaConfig(&cfg, nil))
		if refusal, found := refusalIn(err); !found || !strings.HasPrefix(string(refusal), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	names := kafkaConfig(&relayConfig{}, nil).Settings
	if names.Checkpoints != "KAFKA_CHECKPOINT_TOPIC" || names.Retention != "KAFKA_RETENTION" {
		t.Errorf("%+v", names)
	}
}

// -----------------------------------------------------------------------------------------------------------
// On servers
// -----------------------------------------------------------------------------------------------------------

// TestRelayPublishesEachEntryOnceInOrder: also what was written before the relay was ever switched on.
func TestRelayPublishesEachEntryOnceInOrder(t *testing.T) {
	g := newRig(t)
	g.deposit(t, 7)
	r := startRelay(t, g.cfg)
	moveAtRandom(t, 8, 25, 9, func() *running { return g.running })
	checkStream(t, g.cfg)
	if r.recoveries.Load() != 1 || r.takeovers.Load() != 1 {
		t.Errorf("%d recoveries, %d takeovers", r.recoveries.Load(), r.takeovers.Load())
	}
	var metrics bytes.Buffer
	r.writeMetrics(metric.NewWriter(&metrics))
	for _, want := range []string{`wallet_relay_state{state="leader"} 1`, "wallet_relay_slot_active 1",
		"wallet_relay_recoveries_total 1", `wallet_relay_slot{status="reserved"} 1`} {
		if !strings.Contains(metrics.String(), want+"\n") {
			t.Errorf("metrics lack %s:\n%s", want, metrics.String())
		}
	}
}

// TestRelayResumes: stopped again and again under load, by its end or by its connection's.
func TestRelayResumes(t *testing.T) {
	g := newRig(t)
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			r := startRelay(t, g.cfg)
			select {
			case <-time.After(time.Duration(300+rand.IntN(1200)) * time.Millisecond):
			case <-stop:
				return
			}
			if i%2 == 0 {
				connect(t, g.cfg.databaseURL).Exec(context.Background(),
					`SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots
						WHERE slot_name = $1`, g.cfg.replicationSlot)
				time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
			}
			r.stop()
		}
	}()
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); {
		moveAtRandom(t, 4, 10, 9, func() *running { return g.running })
		g.deposit(t, 1)
	}
	close(stop)
	<-stopped
	checkStream(t, g.cfg)
}

// TestRelayConfirmsOnlyPublished: while Kafka does not answer, for longer than Postgres would wait for a
// silent relay, nothing is confirmed; then everything is there once.
func TestRelayConfirmsOnlyPublished(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 3)
	checkStream(t, g.cfg)
	r.await(t, "leader")
	resume := pauseKafka(t)
	var before pglogrepl.LSN
	if err := g.conn.QueryRow(context.Background(),
		`SELECT pg_current_wal_lsn()::text`).Scan((*lsnText)(&before)); err != nil {
		t.Fatal(err)
	}
	g.deposit(t, 20)
	end := time.Now().Add(walSenderTimeout + 2*time.Second)
	for ; time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if confirmed := g.slot(t); confirmed > before {
			t.Fatalf("confirmed %v, but nothing after %v was published", confirmed, before)
		}
	}
	if restarts := r.restarts.Load(); restarts != 0 {
		t.Errorf("a slow Kafka cost the slot: %d restarts", restarts)
	}
	resume()
	checkStream(t, g.cfg)
}

type lsnText pglogrepl.LSN

func (l *lsnText) Scan(v any) error { return (*pglogrepl.LSN)(l).Scan(v) }

// TestLeaderWithoutKafkaGivesUp: and then another leads, or the same one later.
func TestLeaderWithoutKafkaGivesUp(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	r.await(t, "leader")
	resume := pauseKafka(t)
	g.deposit(t, 1)
	began := time.Now()
	active := true
	for active && time.Since(began) < 20*time.Second {
		if err := g.conn.QueryRow(context.Background(),
			`SELECT active FROM pg_replication_slots
				WHERE slot_name = $1`, g.cfg.replicationSlot).Scan(&active); err != nil {
			t.Error(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	resume()
	if active {
		t.Error("a leader without Kafka keeps the slot")
	}
	t.Logf("slot free after %v", time.Since(began).Round(100*time.Millisecond))
	checkStream(t, g.cfg)
}

// TestTransactionThatBeginsAtTheCheckpoint: a transaction open while the idle checkpoint moves may commit
// exactly at its end, and is not to be taken for published.
func TestTransactionThatBeginsAtTheCheckpoint(t *testing.T) {
	g := newRig(t)
	ctx := context.Background()
	exact := 0
	for i := 0; i < 6 && exact < 2; i++ {
		r := startRelay(t, g.cfg)
		r.await(t, "leader")
		tx, err := connect(t, g.cfg.databaseURL).Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		insertByHand(t, tx, int64(1000+i), 2)
		// Another transaction, without an outbox row; the idle checkpoint follows it.
		if _, err := g.conn.Exec(ctx,
			`CREATE TABLE IF NOT EXISTS other (n int); INSERT INTO other VALUES (1)`); err != nil {
			t.Fatal(err)
		}
		var end pglogrepl.LSN
		if err := g.conn.QueryRow(ctx,
			`SELECT pg_current_wal_lsn()::text`).Scan((*lsnText)(&end)); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "idle checkpoint", func() bool {
			return lastCheckpointOf(t, g.cfg).end(t) >= end
		})
		r.stop()
		at := lastCheckpointOf(t, g.cfg).end(t)
		if err := tx.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		r = startRelay(t, g.cfg)
		checkStream(t, g.cfg)
		r.stop()
		for m := range consume(t, g.cfg, 2*(i+1)) {
			if string(m.Headers[6].Key) == "ce_commitlsn" && string(m.Headers[6].Value) == at.String() {
				exact++
				break
			}
		}
	}
	if exact == 0 {
		t.Error("no transaction began where the checkpoint ended: this test has proven nothing")
	}
}

// TestIdleCheckpointMoves: a quiet outbox in a busy database does not keep its WAL, and Kafka hears of it
// before Postgres does.
func TestIdleCheckpointMoves(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	r.await(t, "leader")
	g.deposit(t, 1)
	foreign := func() (end pglogrepl.LSN) {
		g.mustExec(t, `CREATE TABLE other AS SELECT generate_series(1, 10000); DROP TABLE other`)
		if err := g.conn.QueryRow(context.Background(),
			`SELECT pg_current_wal_lsn()::text`).Scan((*lsnText)(&end)); err != nil {
			t.Fatal(err)
		}
		return end
	}
	end := foreign()
	eventually(t, 15*time.Second, "confirmed past foreign WAL", func() bool { return g.slot(t) >= end })
	if at := lastCheckpointOf(t, g.cfg).end(t); at < end {
		t.Errorf("confirmed %v, but the checkpoint is at %v", end, at)
	}
	resume := pauseKafka(t)
	end = foreign()
	until := time.Now().Add(idleInterval + 3*time.Second)
	for ; time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if confirmed := g.slot(t); confirmed >= end {
			t.Fatalf("confirmed %v with Kafka away", confirmed)
		}
	}
	resume()
	eventually(t, 15*time.Second, "confirmed at last", func() bool { return g.slot(t) >= end })
}

// pauseKafka freezes the shared broker until the returned function is called or the test ends.
func pauseKafka(t *testing.T) (resume func()) {
	t.Helper()
	stack(t).command(t, "pause kafka")
	resume = sync.OnceFunc(func() { stack(t).command(t, "resume kafka") })
	t.Cleanup(resume)
	return resume
}

// TestStandby: it leaves a healthy leader alone, and takes over within seconds.
func TestStandby(t *testing.T) {
	g := newRig(t)
	leader := startRelay(t, g.cfg)
	leader.await(t, "leader")
	standby := startRelay(t, g.cfg)
	standby.await(t, "standby")
	moveAtRandom(t, 4, 50, 9, func() *running { return g.running })
	checkStream(t, g.cfg)
	restarts, takeovers := leader.restarts.Load(), standby.takeovers.Load()
	if restarts != 0 || takeovers != 0 {
		t.Errorf("the standby disturbed the leader: %d restarts, %d takeovers", restarts, takeovers)
	}
	leader.stop()
	began := time.Now()
	standby.await(t, "leader")
	t.Logf("takeover from a leader that stopped: %v", time.Since(began).Round(time.Millisecond))
	g.deposit(t, 5)
	checkStream(t, g.cfg)
}

// TestRecoveryFillsTheGap: the slot dropped, or made anew, while no relay ran.
func TestRecoveryFillsTheGap(t *testing.T) {
	for name, sql := range map[string]string{
		"dropped": `SELECT pg_drop_replication_slot($1)`,
		"made anew": `SELECT pg_drop_replication_slot($1),
			pg_create_logical_replication_slot($1, 'pgoutput')`,
		"moved": `SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newRig(t)
			r := startRelay(t, g.cfg)
			g.deposit(t, 10)
			checkStream(t, g.cfg)
			r.stop()
			g.deposit(t, 10)
			g.onFreeSlot(t, sql)
			g.deposit(t, 10)
			r = startRelay(t, g.cfg)
			other := startRelay(t, g.cfg) // two that want to recover
			g.deposit(t, 10)
			checkStream(t, g.cfg)
			if n := r.recoveries.Load() + other.recoveries.Load(); n != 1 {
				t.Errorf("%d recoveries", n)
			}
			var open int
			err := g.conn.QueryRow(context.Background(), `SELECT count(*) FROM pg_stat_activity
				WHERE datname = current_database() AND pid <> pg_backend_pid()
				AND xact_start < now() - interval '1s'
				AND backend_type = 'client backend'`).Scan(&open)
			if err != nil || open > 0 {
				t.Errorf("%d transactions left open, %v: the recovery's snapshot must not hold vacuum back",
					open, err)
			}
		})
	}
}

// TestExportedSnapshotHarmsNoRow: see wal.AwaitTransactions. Without it this finds rows twice within some
// tens of slots.
func TestExportedSnapshotHarmsNoRow(t *testing.T) {
	t.Log("makes slots for 10 s while 16 connections update rows")
	g := newRig(t)
	ctx := context.Background()
	g.mustExec(t,
		`CREATE TABLE hot (id int PRIMARY KEY, n int) WITH (fillfactor = 50);
		INSERT INTO hot SELECT generate_series(1, 50), 0`)
	db, err := pgxpool.New(ctx, g.cfg.databaseURL+"&pool_max_conns=20")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var stop atomic.Bool
	var writing sync.WaitGroup
	defer func() { // before the pool closes, whatever ended the test
		stop.Store(true)
		writing.Wait()
	}()
	for range 16 {
		writing.Go(func() {
			for !stop.Load() {
				if _, err := db.Exec(ctx, `UPDATE hot SET n = n + 1 WHERE id = $1`,
					1+rand.IntN(50)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	r := newRelay(&g.cfg.relayConfig, db, nil)
	slots := 0
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && !t.Failed(); slots++ {
		conn, _, err := r.connect(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var past *pastLedger
		// The last turn's backends let go of slot and lock a moment after their connections closed; makeSlot
		// takes them for another relay until then. As run, but trying often: the more slots the better.
		eventually(t, 30*time.Second, "slot and lock are free", func() bool {
			var slot wal.Slot
			if slot, err = r.readSlot(ctx, db); err != nil {
				return true
			}
			if slot.Active {
				return false
			}
			past, err = r.makeSlot(ctx, conn, slot)
			return !errors.Is(err, errSlotTaken)
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = past.Exec(ctx, `
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off;
SELECT n FROM hot WHERE id > 0 ORDER BY id`, pgx.QueryExecModeSimpleProtocol)
		if err != nil {
			t.Fatal(err)
		}
		past.forget()
		conn.Close(ctx)
		var twice int
		if err := g.conn.QueryRow(ctx, `SELECT count(*) - 50 FROM hot`).Scan(&twice); err != nil ||
			twice != 0 {
			t.Errorf("%d rows came back to life after %d slots, %v", twice, slots+1, err)
		}
	}
	t.Logf("%d slots", slots)
}

// TestHugeTransaction: it passes in pieces, by stream and by recovery, though the relay ends in the middle.
func TestHugeTransaction(t *testing.T) {
	const n = 60_000
	for _, name := range []string{"streamed", "recovered"} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			r := startRelay(t, g.cfg)
			r.await(t, "leader")
			g.deposit(t, 3)
			if name == "recovered" {
				r.stop()
				g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
			}
			tx, err := g.conn.Begin(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			insertByHand(t, tx, 77, n)
			if err := tx.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
			if name == "recovered" {
				r = startRelay(t, g.cfg)
			}
			interrupted := 0
			for range 3 {
				eventually(t, 30*time.Second, "some of it published", func() bool {
					return r.events.Load() > 5000 || lastCheckpointOf(t, g.cfg).Events >= n
				})
				r.stop()
				if published := r.events.Load(); published > 5000 && published < n {
					interrupted++
				}
				r = startRelay(t, g.cfg)
			}
			if interrupted == 0 {
				t.Error("it was never interrupted: this test has proven nothing")
			}
			g.deposit(t, 3)
			checkStream(t, g.cfg)
		})
	}
}

// TestAnotherDatabase: it is refused, until it is adopted. Here, a copy that went on.
func TestAnotherDatabase(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 10)
	checkStream(t, g.cfg)
	r.stop()
	g.deposit(t, 5)
	g.end()
	g.conn.Close(context.Background())

	admin := connect(t, stack(t).DatabaseURL)
	name := databaseOf(g.cfg.databaseURL)
	eventually(t, 10*time.Second, "copied", func() bool {
		admin.Exec(context.Background(),
			`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, name)
		_, err := admin.Exec(context.Background(), "CREATE DATABASE "+name+"_copy TEMPLATE "+name)
		return err == nil
	})
	original := g.cfg
	g.env["DATABASE_URL"] = strings.Replace(original.databaseURL, "/"+name+"?", "/"+name+"_copy?", 1)
	g.env["REPLICATION_SLOT"] = original.replicationSlot + "c"
	g.running = start(t, g.env)
	g.cfg = g.config(t, "")
	dropSlotAtEnd(t, g.cfg.replicationSlot)
	refused := startRelay(t, g.cfg)
	refused.await(t, "refused")
	var slots int
	if err := admin.QueryRow(context.Background(),
		`SELECT count(*) FROM pg_replication_slots
			WHERE slot_name = $1`, g.cfg.replicationSlot).Scan(&slots); err != nil || slots != 0 {
		t.Errorf("a refused relay left %d slots, %v", slots, err)
	}
	refused.stop()
	g.deposit(t, 5)
	if err := adopt(context.Background(), &g.cfg.relayConfig); err != nil {
		t.Fatal(err)
	}
	startRelay(t, g.cfg)
	g.deposit(t, 5)
	checkStream(t, g.cfg)
	former := startRelay(t, original)
	former.await(t, "refused")
}

// TestPutBackVolume: Postgres' data folder becomes a copy of an earlier moment: the same system on the same
// timeline, whose positions and numbers now mean something else. The relay refuses, also when the WAL has
// grown past the checkpoint before it looks, and so does -adopt; the cache forgets what never was. New topics
// get the ledger as it is.
func TestPutBackVolume(t *testing.T) {
	s, err := startServers()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	for _, how := range []string{"at once", "overtaken", "nothing published since"} {
		t.Run(how, func(t *testing.T) {
			overtaken, quiet := how == "overtaken", how == "nothing published since"
			env := testEnv(t, "DATABASE_URL="+s.database(t), "REDIS_URL="+s.RedisURL, "KAFKA_PARTITIONS=3")
			without := start(t, env) // a relay
			env = maps.Clone(env)
			env["KAFKA_BROKERS"] = s.KafkaBrokers
			w := start(t, env)
			inUse(t, w.balances)
			keys := 0
			deposit := func(w *running, n int) {
				t.Helper()
				for range n {
					keys++
					w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", 1+keys%3),
						fmt.Sprintf(`{"amount":"1","idempotency_key":"p%d"}`, keys))
				}
			}
			deposit(w, 9)
			checkStream(t, w.cfg)
			var folder string
			if err := connect(t, s.DatabaseURL).QueryRow(context.Background(),
				`SHOW data_directory`).Scan(&folder); err != nil {
				t.Fatal(err)
			}
			copyFolder := func(from, to string) {
				t.Helper()
				s.command(t, "stop postgres")
				const script = `rm -rf "$2" && cp -a "$1" "$2" && rm -f "$2/postmaster.pid"`
				if out, err := exec.Command("sh", "-c", script, "-", from, to).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				s.command(t, "start postgres")
				eventually(t, 20*time.Second, "ready again", func() bool {
					return without.get("/readyz").status == 200
				})
			}
			copyFolder(folder, folder+"-copy")
			if quiet { // the checkpoint alone moves, over WAL that holds no event
				admin := connect(t, env["DATABASE_URL"])
				var end string
				err := admin.QueryRow(context.Background(),
					`SELECT pg_current_wal_insert_lsn()::text
						FROM pg_logical_emit_message(false, 'filler', repeat('x', 1000000))`).Scan(&end)
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, 30*time.Second, "the checkpoint moved", func() bool {
					var moved bool
					err := admin.QueryRow(context.Background(), `SELECT $1::pg_lsn >= $2::pg_lsn`,
						lastCheckpointOf(t, w.cfg).EndLSN, end).Scan(&moved)
					return err == nil && moved
				})
			} else {
				deposit(w, 60)
			}
			for id := range 3 {
				w.get(fmt.Sprintf("/v1/wallets/%d/balance", 1+id)) // cached
			}
			checkStream(t, w.cfg)
			published := lastCheckpointOf(t, w.cfg)
			if overtaken {
				w.end()
			}
			copyFolder(folder+"-copy", folder)
			if overtaken {
				conn := connect(t, env["DATABASE_URL"])
				for past := false; !past; {
					if err := conn.QueryRow(context.Background(),
						`SELECT pg_current_wal_flush_lsn() > $1::pg_lsn
							FROM pg_logical_emit_message(false, 'filler', repeat('x', 100000))`,
						published.EndLSN).Scan(&past); err != nil {
						t.Fatal(err)
					}
				}
				deposit(without, 6)
				w = start(t, env)
			}
			eventually(t, 30*time.Second, "refused", func() bool { return w.relay.state.Load() == "refused" })
			deposit(w, 21)
			for id := range 3 {
				for _, path := range []string{fmt.Sprintf("/v1/wallets/%d/balance", 1+id),
					fmt.Sprintf("/v1/wallets/%d/balance?min_seq=1", 1+id)} {
					fresh := w.get(path, "Cache-Control", "no-cache")
					for _, replica := range []*running{w, without} {
						if cached := replica.get(path); cached.body != fresh.body {
							t.Errorf("cached %s, Postgres has %s", cached, fresh)
						}
					}
				}
			}
			var refusal relayRefusal
			if err := adopt(context.Background(), &w.cfg.relayConfig); errors.As(err, &refusal) == quiet ||
				quiet && err != nil {
				t.Errorf("-adopt: %v", err)
			}
			if quiet { // the topic holds nothing that this ledger lacks: it goes on
				deposit(w, 3)
				eventually(t, 80*time.Second, "leading", func() bool {
					return w.relay.state.Load() == "leader"
				})
				checkStream(t, w.cfg)
				return
			}
			if now := lastCheckpointOf(t, w.cfg); now.Events != published.Events {
				t.Errorf("the checkpoint moved: %+v, was %+v", now, published)
			}
			w.end()
			env["KAFKA_TOPIC"] += "-new"
			env["KAFKA_CHECKPOINT_TOPIC"] += "-new"
			w = start(t, env)
			eventually(t, 30*time.Second, "leading", func() bool { return w.relay.state.Load() == "leader" })
			deposit(w, 3)
			checkStream(t, w.cfg)
		})
	}
}

// TestPartitionsAreFinal: a partition more would move wallets to other partitions.
func TestPartitionsAreFinal(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 5)
	checkStream(t, g.cfg)
	r.stop()
	admin := clusterAdmin(t, g.cfg)
	if err := admin.CreatePartitions(g.cfg.kafkaTopic, 4, nil, false); err != nil {
		t.Fatal(err)
	}
	r = startRelay(t, g.cfg)
	r.await(t, "refused")
}

func clusterAdmin(t *testing.T, cfg *config) sarama.ClusterAdmin {
	t.Helper()
	conf := sarama.NewConfig()
	conf.Version = sarama.V2_8_0_0
	admin, err := sarama.NewClusterAdmin(cfg.kafkaBrokers, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { admin.Close() })
	return admin
}

// TestWrongTopicSettingsAreRefused: a compacted topic would lose events.
func TestWrongTopicSettingsAreRefused(t *testing.T) {
	for topic, settings := range map[string]map[string]string{
		"events":      {"cleanup.policy": "compact"},
		"checkpoints": {"cleanup.policy": "delete"},
		"short":       {"retention.ms": "3600000"},
	} {
		g := newRig(t)
		name := map[string]string{"events": g.cfg.kafkaTopic, "checkpoints": g.cfg.kafkaCheckpointTopic,
			"short": g.cfg.kafkaTopic}[topic]
		detail := sarama.TopicDetail{NumPartitions: 1, ReplicationFactor: 1,
			ConfigEntries: make(map[string]*string)}
		for key, value := range settings {
			detail.ConfigEntries[key] = &value
		}
		if err := clusterAdmin(t, g.cfg).CreateTopic(name, &detail, false); err != nil {
			t.Fatal(err)
		}
		r := startRelay(t, g.cfg)
		r.await(t, "refused")
		r.stop()
	}
}

// TestTruncatedTopic: a gap that cannot be filled exactly is refused; one that lies behind the deleted head
// is filled. An audit compares what is left.
func TestTruncatedTopic(t *testing.T) {
	g := newRig(t)
	r := startRelay(t, g.cfg)
	g.deposit(t, 20)
	checkStream(t, g.cfg)
	g.awaitHorizon(t)
	admin := clusterAdmin(t, g.cfg)
	if err := admin.DeleteRecords(g.cfg.kafkaTopic, map[int32]int64{0: 3, 1: 3, 2: 3}); err != nil {
		t.Fatal(err)
	}
	g.deposit(t, 20)
	findings := func() {
		t.Helper()
		var said bytes.Buffer
		if n, err := runAudit(context.Background(), &g.cfg.relayConfig, 0, &said); err != nil || n != 0 ||
			!strings.Contains(said.String(), "head has been deleted") {
			t.Errorf("%d findings, %v\n%s", n, err, said.String())
		}
	}
	findings()
	r.stop()
	g.deposit(t, 20)
	g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
	r = startRelay(t, g.cfg)
	r.await(t, "leader")
	findings()

	g.awaitHorizon(t)
	tx := g.begin(t) // keeps the horizon where it is
	defer tx.Rollback(context.Background())
	time.Sleep(2 * horizonInterval)
	g.deposit(t, 20)
	findings()
	r.stop()
	beyond := make(map[int32]int64)
	for p, offset := range lastCheckpointOf(t, g.cfg).Horizon.Offsets {
		beyond[int32(p)] = offset + 1
	}
	if err := admin.DeleteRecords(g.cfg.kafkaTopic, beyond); err != nil {
		t.Fatal(err)
	}
	g.deposit(t, 1)
	tx.Rollback(context.Background())
	g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
	r = startRelay(t, g.cfg)
	r.await(t, "refused")
}

// TestRecoveryAsksNoClock: the slot is lost while Postgres' clock is behind or ahead, or while a transaction
// is open that began long before. Nothing is missed, and nothing before the horizon is looked at.
func TestRecoveryAsksNoClock(t *testing.T) {
	for _, step := range []string{"-3 hours", "-2 days", "3 hours", "0"} {
		t.Run(step, func(t *testing.T) {
			g := newRig(t)
			r := startRelay(t, g.cfg)
			g.deposit(t, 20)
			checkStream(t, g.cfg)
			g.awaitHorizon(t)
			open := g.begin(t)
			if step == "0" { // a horizon that did not wait for it would be in the checkpoint by then
				g.deposit(t, 1)
				time.Sleep(2*horizonInterval + idleInterval)
			}
			time.Sleep(2 * horizonInterval)
			g.deposit(t, 20)
			checkStream(t, g.cfg)
			r.stop()
			was := lastCheckpointOf(t, g.cfg)

			g.setClock(t, step)
			insertByHand(t, open, 77, 5)
			if err := open.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
			for i := range 10 {
				g.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", 100+i),
					`{"amount":"1","idempotency_key":"late"}`)
			}
			g.deposit(t, 5)
			g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
			if step == "0" { // a head that the horizon does not need is not asked for
				heads := make(map[int32]int64)
				for p, offset := range was.Horizon.Offsets {
					heads[int32(p)] = offset
				}
				if err := clusterAdmin(t, g.cfg).DeleteRecords(g.cfg.kafkaTopic, heads); err != nil {
					t.Fatal(err)
				}
			}
			r = startRelay(t, g.cfg)
			r.await(t, "leader")
			if step == "0" {
				checkAudit(t, g.cfg)
			} else {
				checkStream(t, g.cfg)
			}
			if n := lastCheckpointOf(t, g.cfg).Events - was.Events; n != 20 {
				t.Errorf("%d events were recovered, want 20", n)
			}
		})
	}
}

// TestRecordsOfAnyTime: Postgres' clock is two hours ahead, which Kafka 4 refuses by default.
func TestRecordsOfAnyTime(t *testing.T) {
	t.Parallel()
	if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
		t.Skip("needs WALLET_TEST_KAFKA=apache: the embedded broker takes any time")
	}
	g := newRig(t)
	admin := clusterAdmin(t, g.cfg)
	limit := func(value string) {
		t.Helper()
		err := admin.IncrementalAlterConfig(sarama.TopicResource, g.cfg.kafkaTopic,
			map[string]sarama.IncrementalAlterConfigsEntry{
				"message.timestamp.after.max.ms": {
					Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &value,
				},
			}, false)
		if err != nil {
			t.Fatal(err)
		}
	}
	r := startRelay(t, g.cfg)
	r.await(t, "leader")
	g.deposit(t, 5)
	g.setClock(t, "2 hours")
	g.deposit(t, 5)
	checkStream(t, g.cfg)
	if n := r.restarts.Load(); n != 0 {
		t.Errorf("%d restarts", n)
	}
	limit("3600000") // somebody else sets it, under a running relay
	time.Sleep(time.Second)
	g.deposit(t, 5)
	r.await(t, "refused")
	checkStream(t, g.cfg) // the next attempt lifts the limit again
}

// TestAuditFinds: what must not be, staged.
func TestAuditFinds(t *testing.T) {
	ctx := context.Background()
	hold := [2]string{"/v1/wallets/1/holds", `{"amount":"1","idempotency_key":"h"}`}
	for name, c := range map[string]struct {
		stage func(t *testing.T, g *rig)
		want  string
		moves [][2]string // of before, path and body; an audit waits long for what is not published
	}{
		"repeated": {func(t *testing.T, g *rig) {
			forge(t, g, "1", "1-1", `{}`)
		}, "event 1-1 is repeated", nil},
		"gap": {func(t *testing.T, g *rig) {
			forge(t, g, "1", "1-9", `{}`)
		}, "those between are missing", nil},
		"invented": {func(t *testing.T, g *rig) {
			forge(t, g, "99", "99-1", `{}`)
		}, "event 99-1 is in the topic, but the ledger ends at number 0", nil},
		"foreign": {func(t *testing.T, g *rig) {
			forge(t, g, "1", "2-2", `{}`)
		}, "not an event of this service", nil},
		"differing": {func(t *testing.T, g *rig) {
			g.mustExec(t,
				`ALTER TABLE entry DISABLE TRIGGER ALL;
				UPDATE entry SET idempotency_key = 'x' WHERE wallet_id = 1 AND seq = 1`)
		}, "at least one differs", nil},
		"missing": {func(t *testing.T, g *rig) {
			g.mustExec(t, `UPDATE wallet SET seq = seq + 1, balance = balance + 1 WHERE id = 1;
				INSERT INTO entry SELECT id, seq, null, null, entry_at, 'deposit', 1, balance, 'x'
					FROM wallet WHERE id = 1`)
		}, "not in the topic", nil},
		"balance": {func(t *testing.T, g *rig) {
			g.mustExec(t, `UPDATE wallet SET balance = balance + 1 WHERE id = 2`)
		}, "wallet 2: its balance, time or held is not its last entry's", nil},
		"held": {func(t *testing.T, g *rig) {
			g.mustExec(t, `ALTER TABLE entry DISABLE TRIGGER ALL;
				ALTER TABLE entry DROP CONSTRAINT held_before_within_balance;
				UPDATE entry SET held = 0.5 WHERE kind = 'hold'; UPDATE wallet SET held = 0.5 WHERE id = 1`)
		}, "what it holds is not what was held before plus its change", [][2]string{hold}},
		"hold": {func(t *testing.T, g *rig) {
			g.mustExec(t, `UPDATE hold SET remaining = 0, status = 'voided'`)
		}, "its row is not what its entries say", [][2]string{hold}},
		"capture": {func(t *testing.T, g *rig) {
			g.mustExec(t,
				`ALTER TABLE entry DISABLE TRIGGER ALL; UPDATE entry SET of_seq = 1 WHERE of_seq = 4`)
		}, "there is no open hold that it could be of", [][2]string{hold,
			{"/v1/holds/1-4/capture", `{"idempotency_key":"c"}`}}},
		"state": {func(t *testing.T, g *rig) {
			g.mustExec(t, `UPDATE wallet SET state = 'open' WHERE id = 2`)
		}, "wallet 2: its state is not what its last entry of that kind says", [][2]string{
			{"/v1/wallets/2/state", `{"state":"frozen","idempotency_key":"s"}`}}},
		"frozen": {func(t *testing.T, g *rig) {
			g.mustExec(t, `ALTER TABLE entry DISABLE TRIGGER ALL;
				UPDATE entry SET note = '{"state":"frozen"}' WHERE kind = 'state';
				UPDATE wallet SET state = 'frozen' WHERE id = 2`)
		}, "the wallet was frozen", [][2]string{
			{"/v1/wallets/2/state", `{"state":"no_out","idempotency_key":"s"}`},
			{"/v1/wallets/2/deposit", `{"amount":"1","idempotency_key":"s2"}`}}},
		"reversal": {func(t *testing.T, g *rig) {
			g.mustExec(t, `UPDATE reversal SET reversed = 1`)
		}, "transaction 2-1: how much of it was reversed is not what its entries say", [][2]string{
			{"/v1/transactions/2-1/reverse", `{"amount":"0.5","idempotency_key":"r"}`}}},
		"reference": {func(t *testing.T, g *rig) {
			g.mustExec(t, `DELETE FROM reference`)
		}, "it is not found by its reference", [][2]string{
			{"/v1/wallets/2/deposit", `{"amount":"1","reference":"r","idempotency_key":"r"}`}}},
		"leg": {func(t *testing.T, g *rig) {
			g.mustExec(t,
				`ALTER TABLE entry DISABLE TRIGGER ALL;
				UPDATE entry SET counterparty_seq = 7 WHERE kind = 'transfer_in'`)
		}, "the other leg", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newRig(t)
			r := startRelay(t, g.cfg)
			g.deposit(t, 10)
			g.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"1","to_id":3,"idempotency_key":"t"}`)
			for _, move := range c.moves {
				if a := g.post(move[0], move[1]); a.status/100 != 2 {
					t.Fatalf("POST %s: %s", move[0], a)
				}
			}
			checkStream(t, g.cfg)
			r.stop()
			c.stage(t, g)
			var said bytes.Buffer
			findings, err := runAudit(ctx, &g.cfg.relayConfig, 0, &said)
			if err != nil || findings == 0 || !strings.Contains(said.String(), c.want) {
				t.Errorf("%d findings, %v\n%s", findings, err, said.String())
			}
		})
	}
}

// forge adds a record to the events topic, as no relay would.
func forge(t *testing.T, g *rig, key, id, value string) {
	t.Helper()
	conf := sarama.NewConfig()
	conf.Version = sarama.V2_8_0_0
	conf.Producer.Return.Successes = true
	conf.Producer.Partitioner = sarama.NewMurmur2Partitioner
	producer, err := sarama.NewSyncProducer(g.cfg.kafkaBrokers, conf)
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()
	_, _, err = producer.SendMessage(&sarama.ProducerMessage{Topic: g.cfg.kafkaTopic,
		Key: sarama.StringEncoder(key), Value: sarama.StringEncoder(value),
		Headers: []sarama.RecordHeader{{Key: []byte("ce_id"), Value: []byte(id)}}})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLastCheckpointIsFoundBackwards: behind markers and aborted transactions, without reading the topic.
func TestLastCheckpointIsFoundBackwards(t *testing.T) {
	g := newRig(t)
	k := g.openKafka(t)
	if c, err := lastCheckpoint(k, g.cfg.kafkaCheckpointTopic); c != nil || err != nil {
		t.Fatalf("%v, %v in an empty topic", c, err)
	}
	producer, err := k.NewProducer("test-" + g.cfg.replicationSlot)
	if err != nil {
		t.Fatal(err)
	}
	write := func(events int64, commit bool) error {
		if err := producer.Send(nil, fmt.Appendf(nil, `{"events":%d}`, events)); err != nil {
			return err
		}
		if commit {
			return producer.Commit()
		}
		return producer.Abort()
	}
	for i := range int64(30) {
		if err := write(i, true); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		if err := write(1000, false); err != nil {
			t.Fatal(err)
		}
	}
	c, err := lastCheckpoint(k, g.cfg.kafkaCheckpointTopic)
	if err != nil || c == nil || c.Events != 29 {
		t.Errorf("%+v, %v", c, err)
	}
	// A successor fences it: it can neither end what it had begun nor begin anew.
	if err := producer.Send(nil, []byte(`{"events":1500}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := k.NewProducer("test-" + g.cfg.replicationSlot); err != nil {
		t.Fatal(err)
	}
	if err := producer.Commit(); !strings.Contains(fmt.Sprint(kafka.Explain(err)), "fenced") {
		t.Errorf("a fenced producer was told %v at its transaction's end", err)
	}
	if err := write(2000, true); !strings.Contains(fmt.Sprint(kafka.Explain(err)), "fenced") {
		t.Errorf("a fenced producer was told %v", err)
	}
	if c, err := lastCheckpoint(k, g.cfg.kafkaCheckpointTopic); err != nil || c == nil || c.Events != 29 {
		t.Errorf("%+v, %v after a fenced producer", c, err)
	}
}

// TestRefusedRecordsAreAnError: a broker that begins the transaction but does not take its records.
func TestRefusedRecordsAreAnError(t *testing.T) {
	g := newRig(t)
	k := g.openKafka(t)
	bytesMax := "100"
	change := map[string]sarama.IncrementalAlterConfigsEntry{
		"max.message.bytes": {Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &bytesMax}}
	err := clusterAdmin(t, g.cfg).IncrementalAlterConfig(sarama.TopicResource, g.cfg.kafkaTopic, change,
		false)
	if err != nil {
		t.Fatal(err)
	}
	payload := book.AppendEvent(nil, &book.Entry{WalletID: 1, Seq: 1, Kind: book.KindDeposit, Currency: "USD",
		Amount: dec("1"), Balance: dec("1"), Key: "a", CreatedAt: time.Now()})
	// The broker hears of the setting a moment later.
	eventually(t, 10*time.Second, "refused for its size", func() bool {
		producer, err := k.NewProducer("test-" + g.cfg.replicationSlot)
		if err != nil {
			t.Fatal(err)
		}
		var record eventRecord
		if err := record.set(&event{walletID: 1, seq: 1, payload: payload}); err != nil {
			t.Fatal(err)
		}
		err = producer.Send([]*kafka.Message{&record.Message}, []byte(`{}`))
		if _, refused := refusalIn(err); err != nil && !refused {
			t.Errorf("%v is not taken for what an operator must put right", err)
		}
		return errors.Is(err, sarama.ErrMessageSizeTooLarge)
	})
}

// TestAddedPartitionsEndAStay: they would break each wallet's order, and the next start says so.
func TestAddedPartitionsEndAStay(t *testing.T) {
	g := newRig(t)
	k := g.openKafka(t)
	producer, err := k.NewProducer("test-" + g.cfg.replicationSlot)
	if err != nil {
		t.Fatal(err)
	}
	if err := clusterAdmin(t, g.cfg).CreatePartitions(g.cfg.kafkaTopic, 5, nil, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "refused for its partitions", func() bool {
		err := producer.Send(nil, []byte(`{}`))
		if err == nil {
			err = producer.Abort()
		}
		return errors.Is(err, sarama.ErrInvalidPartition)
	})
}

// TestUnreachableKafka: the relay says so and goes on trying, and ends when told to.
func TestUnreachableKafka(t *testing.T) {
	g := newRig(t)
	cfg := *g.cfg
	cfg.kafkaBrokers = []string{"127.0.0.1:1"}
	r := startRelay(t, &cfg)
	eventually(t, 20*time.Second, "tried twice", func() bool { return r.restarts.Load() >= 2 })
	if s, err := (&relay{cfg: &cfg.relayConfig}).readSlot(context.Background(), g.conn); err != nil ||
		s.Exists {
		t.Errorf("%+v, %v: a relay without Kafka made a slot", s, err)
	}
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("stopping took %v", took)
	}
}

// TestStreamEqualsLedger: three whole services, random moves between few wallets, and the stream holds what
// the ledger holds, in order.
func TestStreamEqualsLedger(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers)
	dropSlotAtEnd(t, env["REPLICATION_SLOT"])
	replicas := []*running{start(t, env), start(t, env), start(t, env)}
	acknowledged := moveAtRandom(t, 12, 40, 6, func() *running { return replicas[rand.IntN(3)] })
	checkLedger(t, env["DATABASE_URL"])
	eventually(t, 30*time.Second, "a leader", func() bool {
		return slices.ContainsFunc(replicas, func(w *running) bool {
			return w.relay.state.Load() == "leader"
		})
	})
	checkStream(t, replicas[0].cfg)
	if len(acknowledged) < 150 {
		t.Errorf("only %d operations were accepted", len(acknowledged))
	}
}

// TestEventArrivesWithinTensOfMilliseconds: on an otherwise idle system, an event does not wait for company,
// nor for sarama's back-off (24-28 ms a transaction by its default, on a real broker).
func TestEventArrivesWithinTensOfMilliseconds(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "KAFKA_PARTITIONS=1")
	dropSlotAtEnd(t, env["REPLICATION_SLOT"])
	w := start(t, env)
	eventually(t, 30*time.Second, "leading", func() bool { return w.relay.state.Load() == "leader" })
	conf := sarama.NewConfig()
	conf.Consumer.IsolationLevel = sarama.ReadCommitted
	consumer, err := sarama.NewConsumer(w.cfg.kafkaBrokers, conf)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	partition, err := consumer.ConsumePartition(w.cfg.kafkaTopic, 0, sarama.OffsetOldest)
	if err != nil {
		t.Fatal(err)
	}
	defer partition.Close()
	var took []time.Duration
	for i := range 40 {
		w.mustPost(t, 200, "/v1/wallets/1/deposit", fmt.Sprintf(`{"amount":"1","idempotency_key":"%d"}`, i))
		answered := time.Now()
		select {
		case <-partition.Messages():
			took = append(took, time.Since(answered))
		case <-time.After(10 * time.Second):
			t.Fatalf("no event for deposit %d", i)
		}
		time.Sleep(10 * time.Millisecond)
	}
	slices.Sort(took)
	t.Logf("from the answer to the consumer: median %v, p90 %v, longest %v", took[20], took[36], took[39])
	if took[20] > 100*time.Millisecond {
		t.Errorf("half of the events took more than %v", took[20])
	}
}

// TestSecuredKafka: over TLS with client certificates and SASL, by each mechanism. A wrong setting costs
// nothing but time: the service takes deposits and says in its log what is wrong, and with the right one
// their events follow.
func TestSecuredKafka(t *testing.T) {
	if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
		t.Skip("needs WALLET_TEST_KAFKA=apache: the embedded broker has no secured listener")
	}
	s, err := startServers("-secure")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	env := map[string]string{"DATABASE_URL": s.database(t), "REDIS_URL": s.RedisURL,
		"KAFKA_BROKERS": s.KafkaBrokers, "KAFKA_PARTITIONS": "3"}
	// The consumer's way, beside the one under test.
	plain, err := readConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(env, s.SecureKafka)
	deposits := 0
	for _, c := range []struct{ settings, fault string }{
		// Not by that one.
		{"KAFKA_TLS_CA=" + env["KAFKA_TLS_CERT"], "certificate signed by unknown authority"},
		{"KAFKA_TLS_CA=" + testFolder + "/absent", "set KAFKA_TLS_CA to a file that can be read"},
		{"KAFKA_TLS_CERT= KAFKA_TLS_KEY=", "remote error: tls: "},
		// It hangs up without a word.
		{"KAFKA_TLS=false KAFKA_TLS_CA= KAFKA_TLS_CERT= KAFKA_TLS_KEY=", "run out of available brokers"},
		{"KAFKA_SASL_MECHANISM= KAFKA_SASL_USER= KAFKA_SASL_PASSWORD=", "run out of available brokers"},
		{"KAFKA_SASL_MECHANISM=PLAIN KAFKA_SASL_PASSWORD=wrong", "Invalid username or password"},
		{"KAFKA_SASL_MECHANISM=PLAIN", ""},
		{"KAFKA_SASL_MECHANISM=SCRAM-SHA-256 KAFKA_SASL_PASSWORD=wrong", "invalid credentials"},
		{"KAFKA_SASL_MECHANISM=SCRAM-SHA-256", ""},
		{"KAFKA_SASL_MECHANISM=SCRAM-SHA-512 KAFKA_SASL_USER=nobody", "invalid credentials"},
		{"KAFKA_SASL_MECHANISM=SCRAM-SHA-512", ""},
	} {
		t.Run(c.settings, func(t *testing.T) {
			r := newReplica(t, env, fmt.Sprint("secured-", names.Add(1)))
			for setting := range strings.FieldsSeq(c.settings) {
				name, value, _ := strings.Cut(setting, "=")
				r.env[name] = value
			}
			deposit := func() {
				t.Helper()
				deposits++
				url := fmt.Sprintf("%s/v1/wallets/%d/deposit", r.url, 1+deposits%5)
				body := fmt.Sprintf(`{"amount":"1","idempotency_key":"k%d"}`, deposits)
				response, err := http.Post(url, "application/json", strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				if response.StatusCode != 200 {
					t.Fatalf("deposit: %s", response.Status)
				}
			}
			r.start(t)
			eventually(t, 20*time.Second, "ready", r.isReady)
			deposit()
			if c.fault == "" {
				eventually(t, 30*time.Second, "leading", r.leads)
				restarts := r.metric("wallet_relay_restarts_total")
				deposit()
				// Longer than the broker lets a session live: it is authenticated again.
				time.Sleep(4 * time.Second)
				deposit()
				checkStream(t, plain)
				if again := r.metric("wallet_relay_restarts_total"); again != restarts {
					t.Errorf("%v restarts while it led, see %s", again-restarts, r.log)
				}
				cfg, err := readConfig(func(name string) string { return r.env[name] })
				if err != nil {
					t.Fatal(err)
				}
				checkAudit(t, cfg)
			} else {
				var log []byte
				eventually(t, 20*time.Second, c.fault+" in "+r.log, func() bool {
					log, _ = os.ReadFile(r.log)
					return bytes.Contains(log, []byte(c.fault))
				})
				eventually(t, 5*time.Second, "the fault counted", func() bool {
					return r.metric("wallet_relay_restarts_total") > 0
				})
				if takeovers := r.metric("wallet_relay_takeovers_total"); takeovers != 0 || !r.isReady() {
					t.Errorf("%v takeovers, ready: %v", takeovers, r.isReady())
				}
				deposit()
			}
			if r.stop(t); r.cmd.ProcessState.ExitCode() != 0 {
				t.Errorf("exit status %d, see %s", r.cmd.ProcessState.ExitCode(), r.log)
			}
		})
	}
}

// TestLogsShowLSNsAsPostgresDoes: in both formats, so that they can be searched for in Postgres' own log.
func TestLogsShowLSNsAsPostgresDoes(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		log, flush := logs.New(&out, slog.LevelInfo, format)
		log.Info("relay", "from", pglogrepl.LSN(0x16B374D848))
		flush()
		if !strings.Contains(out.String(), "16/B374D848") {
			t.Errorf("%s: %s", format, out.String())
		}
	}
}

// -----------------------------------------------------------------------------------------------------------
// The event's shape, and the outbox's partitions
// -----------------------------------------------------------------------------------------------------------

func TestEventShape(t *testing.T) {
	e := &book.Entry{
		WalletID: 1, Seq: 2, CounterpartyID: 7, CounterpartySeq: 1, Kind: book.KindTransferOut,
		Currency: "USD",
		Amount:   dec("-10.50"), Balance: dec("9.5"),
		Key: `k"\<1>`, CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 123456000, time.UTC),
	}
	want := `{"wallet_id":1,"seq":2,"transaction_id":"1-2","kind":"transfer_out","currency":"USD",` +
		`"amount":"-10.5","balance_before":"20","balance_after":"9.5",` +
		`"counterparty":{"wallet_id":7,"seq":1},"idempotency_key":"k\"\\<1>",` +
		`"created_at":"2026-01-02T03:04:05.123456Z"}`
	got := book.AppendEvent(nil, e)
	if string(got) != want {
		t.Errorf("\n%s, want\n%s", got, want)
	}
	if !json.Valid(got) {
		t.Error("not JSON")
	}
	if at, err := book.EventTime(got); err != nil || string(at) != "2026-01-02T03:04:05.123456Z" {
		t.Errorf("time %s, %v", at, err)
	}
	if balance := book.EventText(got, "balance_after"); balance != "9.5" {
		t.Errorf("balance %s", balance)
	}
	e.Kind, e.Amount, e.Balance = book.KindTransferIn, dec("10.50"), dec("20")
	if got := book.AppendEvent(nil, e); string(got[:45]) != `{"wallet_id":1,"seq":2,"transaction_id":"7-1"` {
		t.Errorf("a transfer_in names its payer's transaction: %s", got)
	}
	if _, err := book.EventTime([]byte(`{"x":1}`)); err == nil {
		t.Error("no error for a payload of another shape")
	}

	var record eventRecord
	err := record.set(&event{walletID: 1, seq: 2, payload: []byte(want),
		traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", commitLSN: 0x16B374D848})
	if err != nil {
		t.Fatal(err)
	}
	at := "2026-01-02T03:04:05.123456Z"
	if string(record.Key) != "1" || string(record.Value) != want ||
		record.At.Format(jsontext.TimeFormat) != at {
		t.Errorf("record %s at %v: %s", record.Key, record.At, record.Value)
	}
	if lsn := appendLSN(nil, math.MaxUint64); string(lsn) != pglogrepl.LSN(math.MaxUint64).String() {
		t.Errorf("LSN %s", lsn)
	}
	wantHeaders := map[string]string{
		"ce_specversion": "1.0", "ce_id": "1-2", "ce_source": "/v1/wallets", "ce_type": "wallet.entry.v1",
		"ce_time": "2026-01-02T03:04:05.123456Z", "ce_subject": "1",
		"ce_commitlsn": "16/B374D848", "content-type": "application/json",
		"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
	if len(record.Headers) != len(wantHeaders) {
		t.Errorf("headers %v", record.Headers)
	}
	for _, h := range record.Headers {
		if wantHeaders[string(h.Key)] != string(h.Value) {
			t.Errorf("header %s is %q, want %q", h.Key, h.Value, wantHeaders[string(h.Key)])
		}
	}
}

// TestEventEqualsEntry: the outbox row written with an entry is what the entry alone would give again.
func TestEventEqualsEntry(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"20.00","idempotency_key":"a"}`, "Traceparent",
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"10.50","to_id":7,"idempotency_key":"b"}`)
	w.mustPost(t, 200, "/v1/wallets/7/withdraw", `{"amount":"0.50","idempotency_key":"c"}`)
	conn := connect(t, w.env["DATABASE_URL"])
	for _, wallet := range []int64{1, 7} {
		entries, err := w.ledger.history(context.Background(), wallet, &page{from: 1, to: 100, limit: 100})
		if err != nil || len(entries) != 2 {
			t.Fatalf("%d entries, %v", len(entries), err)
		}
		for i := range entries {
			var payload, kind, eventOf string
			var trace *string
			err := conn.QueryRow(context.Background(),
				`SELECT payload, event_type, aggregate_type, traceparent FROM outbox
					WHERE aggregate_id = $1 AND seq = $2`,
				wallet, entries[i].Seq).Scan(&payload, &kind, &eventOf, &trace)
			if err != nil || kind != eventType || eventOf != "wallet" ||
				(trace != nil) != (book.EntryID(wallet, entries[i].Seq) == "1-1") {
				t.Errorf("%s %s %v %v", kind, eventOf, trace, err)
			}
			if again := string(book.AppendEvent(nil, entries[i])); again != payload {
				t.Errorf("\n%s from the entry,\n%s in the outbox", again, payload)
			}
		}
	}
}

// TestOutboxPartitions: they exist hours ahead, without a hole. Past ones go when they are old enough and
// wholly published.
func TestOutboxPartitions(t *testing.T) {
	w := start(t, testEnv(t, "OUTBOX_RETENTION=720h")) // its own upkeep leaves the old ones to the test
	ctx := context.Background()
	parts, err := listOutboxPartitions(ctx, w.reads)
	if err != nil || len(parts) < 48 || parts[0].StartsAt.After(time.Now()) ||
		time.Until(parts[len(parts)-1].EndsAt) < outboxAhead {
		t.Fatalf("%d partitions, first %+v, %v", len(parts), parts[0], err)
	}
	for i, p := range parts {
		if p.EndsAt.Sub(p.StartsAt) != 10*time.Minute || i > 0 && !p.StartsAt.Equal(parts[i-1].EndsAt) {
			t.Errorf("a partition from %v to %v", p.StartsAt, p.EndsAt)
		}
	}
	// Two of the day before yesterday: an hour, as schema version 3 made them, and ten minutes.
	conn := connect(t, w.env["DATABASE_URL"])
	day := time.Now().UTC().Add(-48 * time.Hour).Truncate(time.Hour)
	for i := range 2 {
		from := day.Add(time.Duration(i) * time.Hour)
		name := "outbox_" + from.Format([]string{"2006010215", "200601021504"}[i])
		to := from.Add([]time.Duration{time.Hour, 10 * time.Minute}[i])
		for _, statement := range []string{
			`CREATE TABLE ` + name + ` (LIKE outbox INCLUDING DEFAULTS)`,
			fmt.Sprintf(`ALTER TABLE outbox ATTACH PARTITION %s FOR VALUES FROM ('%s') TO ('%s')`, name,
				from.Format(time.RFC3339), to.Format(time.RFC3339)),
			fmt.Sprintf(`INSERT INTO outbox (created_at, aggregate_id, seq, event_type, payload)
				VALUES ('%s', 1, 1, 'x', 'x')`, from.Add(time.Minute).Format(time.RFC3339)),
		} {
			if _, err := conn.Exec(ctx, statement); err != nil {
				t.Fatal(err)
			}
		}
	}
	count := func() int {
		t.Helper()
		now, err := listOutboxPartitions(ctx, w.reads)
		if err != nil {
			t.Fatal(err)
		}
		return len(now) - len(parts)
	}
	closed := make(map[string]pglogrepl.LSN)
	if err := dropOutboxPartitions(ctx, w.reads, 24*time.Hour, closed, 1); err != nil || count() != 2 ||
		len(closed) != 2 {
		t.Fatalf("unpublished: %d left, %d closed, %v", count(), len(closed), err)
	}
	if err := dropOutboxPartitions(ctx, w.reads, 72*time.Hour, closed, ^pglogrepl.LSN(0)); err != nil ||
		count() != 2 {
		t.Fatalf("published but young: %d left, %v", count(), err)
	}
	// An open transaction with a row in the hour keeps it: its commit will be later than any position now.
	tx, _ := conn.Begin(ctx)
	tx.Exec(ctx, fmt.Sprintf(`INSERT INTO outbox (created_at, aggregate_id, seq, event_type, payload)
		VALUES ('%s', 1, 2, 'x', 'x')`, day.Add(time.Minute).Format(time.RFC3339)))
	if err := dropOutboxPartitions(ctx, w.reads, 24*time.Hour, make(map[string]pglogrepl.LSN),
		^pglogrepl.LSN(0)); err == nil || count() != 2 {
		t.Fatalf("with an open transaction: %d left, %v", count(), err)
	}
	tx.Rollback(ctx)
	if err := dropOutboxPartitions(ctx, w.reads, 24*time.Hour, closed,
		closed["outbox_"+day.Add(time.Hour).Format("200601021504")]); err != nil || count() != 0 ||
		len(closed) != 0 {
		t.Fatalf("published: %d left, %d closed, %v", count(), len(closed), err)
	}
	if _, err := w.reads.Exec(ctx, `SELECT outbox_drop_partition($1)`, parts[0].Name); err == nil {
		t.Error("the present partition could be dropped")
	}
	// Hours that version 3 made ahead stay, and those that follow them are of ten minutes.
	hour := parts[len(parts)-1].EndsAt.UTC().Truncate(time.Hour).Add(2 * time.Hour)
	name := "outbox_" + hour.Format("2006010215")
	for _, statement := range []string{
		`CREATE TABLE ` + name + ` (LIKE outbox INCLUDING DEFAULTS)`,
		fmt.Sprintf(`ALTER TABLE outbox ATTACH PARTITION %s FOR VALUES FROM ('%s') TO ('%s')`, name,
			hour.Format(time.RFC3339), hour.Add(time.Hour).Format(time.RFC3339)),
	} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.reads.Exec(ctx, `SELECT outbox_make_partitions($1)`, outboxAhead+5*time.Hour); err != nil {
		t.Fatal(err)
	}
	parts, err = listOutboxPartitions(ctx, w.reads)
	if err != nil {
		t.Fatal(err)
	}
	hours := 0
	for i, p := range parts {
		if p.Name == name && p.EndsAt.Sub(p.StartsAt) == time.Hour {
			hours++
		} else if p.EndsAt.Sub(p.StartsAt) != 10*time.Minute {
			t.Errorf("%s is of %v", p.Name, p.EndsAt.Sub(p.StartsAt))
		}
		if i > 0 && !p.StartsAt.Equal(parts[i-1].EndsAt) {
			t.Errorf("%s begins at %v, the one before ends at %v", p.Name, p.StartsAt, parts[i-1].EndsAt)
		}
	}
	if hours != 1 {
		t.Errorf("%d partitions of an hour are left", hours)
	}
}

// TestMissingPartitionIsMade: an outbox without its hour stops no write for longer than it takes to make it.
func TestMissingPartitionIsMade(t *testing.T) {
	w := start(t, testEnv(t))
	parts, err := listOutboxPartitions(context.Background(), w.reads)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, w.env["DATABASE_URL"]).Exec(context.Background(),
		`DROP TABLE `+parts[0].Name+`, `+parts[1].Name); err != nil {
		t.Fatal(err)
	}
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
	if w.ledger.reruns.Load() == 0 {
		t.Error("the write did not miss its partition")
	}
}

func outboxRow(values ...string) []byte {
	row := binary.BigEndian.AppendUint16(nil, uint16(len(values)))
	for _, v := range values {
		if v == "" {
			row = append(row, 'n')
			continue
		}
		row = binary.BigEndian.AppendUint32(append(row, 't'), uint32(len(v)))
		row = append(row, v...)
	}
	return row
}

func TestOutboxRow(t *testing.T) {
	c := outboxColumns{walletID: 1, seq: 2, payload: 5, traceparent: 6}
	row := outboxRow("2026-01-01 00:00:00+00", "7", "3", "wallet", "wallet.entry.v1", "{}", "")
	e, err := c.decode(row)
	if err != nil || e.walletID != 7 || e.seq != 3 || string(e.payload) != "{}" || e.traceparent != "" {
		t.Errorf("%+v, %v", e, err)
	}
	clear(row)
	if string(e.payload) != "{}" {
		t.Error("the event is in the connection's buffer")
	}
	for _, row := range [][]byte{
		outboxRow("", "7", "3", "", "", ""),
		outboxRow("", "x", "3", "", "", "{}"),
		outboxRow(),
		row[:1],
		outboxRow("", "7", "3", "", "", "{}")[:20],
	} {
		if e, err := c.decode(row); err == nil {
			t.Errorf("%q was read as %+v", row, e)
		}
	}
}

func FuzzOutboxRow(f *testing.F) {
	f.Add(outboxRow("2026-01-01 00:00:00+00", "7", "3", "wallet", "wallet.entry.v1", "{}", "t"))
	f.Fuzz(func(t *testing.T, row []byte) {
		c := outboxColumns{walletID: 1, seq: 2, payload: 5, traceparent: 6}
		c.decode(row)
	})
}
