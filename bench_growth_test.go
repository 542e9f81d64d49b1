// What grows with the years: recovery, audit, disk, and reads beside a bulk load. The same command as
// bench_test.go's runs them; -large makes the ledger that a recovery is measured on a large one.

package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/kafka"
)

var (
	benchPart = flag.Float64("bench.part", 1,
		"with -large, BenchmarkRecovery: this part of 10,000,000 wallets and 60,000,000 entries, 24 GB")
	benchGap     = flag.Duration("bench.gap", 10*time.Second, "how long a recovery's gap is under load")
	benchAudited = flag.Int("bench.audited", 2_000_000, "entries that are audited")
)

// BenchmarkRecovery is a slot that was lost, and what moved meanwhile, under load: from the start of a
// process that finds it gone until it leads. A sixth of the entries are one wallet's.
func BenchmarkRecovery(b *testing.B) {
	wallets := 100_000
	if *large {
		wallets = int(10_000_000 * *benchPart)
	}
	r, db := benchService(b, 1, "REDIS_URL=", "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	quiet := newReplica(b, r.env, fmt.Sprintf("bench-%d", names.Add(1)))
	quiet.env["KAFKA_BROKERS"] = ""
	began := time.Now()
	grow(b, db, wallets, 5)
	deep := int64(wallets + 1)
	for _, statement := range []string{
		`SET session_replication_role = replica`,
		fmt.Sprintf(`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at)
			VALUES (%d, 'USD', now(), %d, 1000000, now())`, deep, wallets),
		fmt.Sprintf(`INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
			SELECT %d, s, now(), 'deposit', 0.5, 1000000, 'seed-' || s FROM generate_series(1, %d) s`,
			deep, wallets),
		`SET session_replication_role = origin`, `ANALYZE entry`, `CHECKPOINT`,
	} {
		conn, err := db.Acquire(context.Background())
		if err == nil {
			_, err = conn.Exec(context.Background(), statement)
			conn.Release()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Logf("%d wallets and %d entries after %v", wallets+1, 6*wallets, time.Since(began).Round(time.Second))
	pick := func(dice *rand.Rand) (from, to int64) {
		if from, to = anyOf(wallets)(dice); dice.IntN(10) == 0 {
			to = deep
		}
		return from, to
	}
	for b.Loop() {
		var next int64
		err := db.QueryRow(context.Background(), `SELECT pg_current_xact_id()::text::bigint`).Scan(&next)
		if err != nil {
			b.Fatal(err)
		}
		driveHTTP(b, r.address(), 16, time.Second, pick) // a horizon moves when there are events
		cfg, err := readConfig(func(name string) string { return r.env[name] })
		if err != nil {
			b.Fatal(err)
		}
		k, err := kafka.Open(kafkaConfig(&cfg.relayConfig, nil))
		if err != nil {
			b.Fatal(err)
		}
		defer k.Close()
		eventually(b, time.Minute, "a horizon", func() bool {
			c, err := lastCheckpoint(k, cfg.kafkaCheckpointTopic)
			return err == nil && c != nil && c.Horizon != nil && c.Horizon.XID > next
		})
		r.stop(b)
		quiet.start(b)
		eventually(b, 20*time.Second, "ready", quiet.isReady)
		_, l := driveHTTP(b, quiet.address(), *benchClients, *benchGap, pick)
		quiet.stop(b)
		if _, err := db.Exec(context.Background(), `SELECT pg_drop_replication_slot($1)`,
			r.env["REPLICATION_SLOT"]); err != nil {
			b.Fatal(err)
		}
		began := time.Now()
		r.start(b)
		eventually(b, 20*time.Minute, "leading", r.leads)
		took := time.Since(began).Seconds()
		b.ReportMetric(took, "s")
		b.ReportMetric(2*float64(len(l)), "events")
		b.ReportMetric(2*float64(len(l))/took, "events/s")
		b.ReportMetric(r.memory("VmHWM"), "MB-highest")
		if n := r.metric("wallet_relay_events_total"); n != 2*float64(len(l)) {
			b.Errorf("%.0f events were recovered, want %d", n, 2*len(l))
		}
	}
	b.ReportMetric(0, "ns/op")
}

// seedTransfers fills an empty ledger: pairs of wallets that sent each other a cent, back and forth.
func seedTransfers(b *testing.B, db *pgxpool.Pool, wallets, each int) {
	b.Helper()
	for _, statement := range []string{
		`INSERT INTO wallet (id, currency, created_at, seq, balance, entry_at)
			SELECT w, 'USD', now(), $2::int, 1000000 + CASE WHEN $2::int % 2 = 1 THEN 0
				ELSE 0.01 * (2 * (w % 2) - 1) END, '2026-01-01'::timestamptz + $2 * interval '1 second'
			FROM generate_series(2, $1::int + 1) w`,
		`INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount,
				balance, idempotency_key)
			SELECT w, s, CASE WHEN s > 1 THEN w + CASE w % 2 WHEN 0 THEN 1 ELSE -1 END END,
				CASE WHEN s > 1 THEN s END, '2026-01-01'::timestamptz + s * interval '1 second',
				CASE WHEN s = 1 THEN 'deposit' WHEN (w + s) % 2 = 0 THEN 'transfer_out'
					ELSE 'transfer_in' END::entry_kind,
				CASE WHEN s = 1 THEN 1000000 ELSE 0.01 * (2 * ((w + s) % 2) - 1) END,
				1000000 + CASE WHEN s % 2 = 1 THEN 0 ELSE 0.01 * (2 * (w % 2) - 1) END,
				'0123456789abcdef-' || s
			FROM generate_series(1, $2::int) s, generate_series(2, $1::int + 1) w`,
	} {
		if _, err := db.Exec(context.Background(), statement, wallets, each); err != nil {
			b.Fatal(err)
		}
	}
	for _, statement := range []string{`VACUUM ANALYZE`, `CHECKPOINT`} {
		if _, err := db.Exec(context.Background(), statement); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAudit is how fast `wallet -audit` is, here in this process (-cpuprofile shows it): of everything,
// and of what moved in a last few seconds.
func BenchmarkAudit(b *testing.B) {
	const each = 20
	r, db := benchService(b, 0, "REDIS_URL=", "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	r.stop(b)
	seedTransfers(b, db, *benchAudited/each, each)
	// The relay has published nothing yet, so it looks at the whole ledger.
	if _, err := db.Exec(context.Background(), `SELECT pg_drop_replication_slot($1)`,
		r.env["REPLICATION_SLOT"]); err != nil {
		b.Fatal(err)
	}
	r.env["KAFKA_TOPIC"] += ".audited"
	r.env["KAFKA_CHECKPOINT_TOPIC"] += ".audited"
	r.start(b)
	eventually(b, 10*time.Minute, "leading", r.leads)
	cfg, err := readConfig(func(name string) string { return r.env[name] })
	if err != nil {
		b.Fatal(err)
	}
	audit := func(prefix string, run func(said *bytes.Buffer) (int, error), entries float64) {
		var said bytes.Buffer
		before, began := r.cpu(b), time.Now()
		findings, err := run(&said)
		if err != nil || findings > 0 {
			b.Fatalf("%d findings, %v\n%s", findings, err, said.String())
		}
		b.ReportMetric(entries/time.Since(began).Seconds(), prefix+"entries/s")
		spent := make(cost)
		spent.add(before, r.cpu(b))
		spent.report(b, prefix, entries)
		b.Log(strings.TrimSpace(said.String()))
	}
	for b.Loop() {
		audit("", func(said *bytes.Buffer) (int, error) {
			return runAudit(context.Background(), &cfg.relayConfig, 0, said)
		}, float64(*benchAudited))
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDisk is what a transfer takes, in bytes: ledger, log of what moved, outbox, WAL, topic. WAL is
// with the full pages that follow a checkpoint, as long as this takes.
func BenchmarkDisk(b *testing.B) {
	r, db := benchService(b, *benchWallets, "REDIS_URL=", "KAFKA_BROKERS="+stack(b).KafkaBrokers)
	look := func() map[string]float64 {
		var ledger, log, outbox, wal float64
		if err := db.QueryRow(context.Background(), `
SELECT pg_total_relation_size('entry') + pg_total_relation_size('wallet'), pg_total_relation_size('moved'),
       (SELECT sum(bytes) FROM outbox_partition), pg_current_wal_lsn() - '0/0'::pg_lsn`).Scan(
			&ledger, &log, &outbox, &wal); err != nil {
			b.Fatal(err)
		}
		return map[string]float64{"ledger": ledger, "moved": log, "outbox": outbox, "wal": wal,
			"topic": topicBytes(b, r.env["KAFKA_TOPIC"])}
	}
	for b.Loop() {
		before, events := look(), r.metric("wallet_relay_events_total")
		_, l := driveHTTP(b, r.address(), *benchClients, *benchFor, anyOf(*benchWallets))
		r.awaitEvents(b, events+2*float64(len(l)))
		for name, bytes := range look() {
			b.ReportMetric((bytes-before[name])/float64(len(l)), name+"-B/transfer")
		}
		b.ReportMetric(float64(len(l))/benchFor.Seconds(), "transfers/s")
	}
	b.ReportMetric(0, "ns/op")
}

// topicBytes is what the brokers store of a topic, one replica of each partition.
func topicBytes(b *testing.B, topic string) (size float64) {
	b.Helper()
	conf := sarama.NewConfig()
	conf.Version = sarama.V2_8_0_0
	admin, err := sarama.NewClusterAdmin(strings.Split(stack(b).KafkaBrokers, ","), conf)
	if err != nil {
		b.Fatal(err)
	}
	defer admin.Close()
	brokers, _, err := admin.DescribeCluster()
	if err != nil {
		b.Fatal(err)
	}
	dirs, err := admin.DescribeLogDirs([]int32{brokers[0].ID()})
	if err != nil {
		b.Logf("the broker does not say how large a topic is: %v", err)
		return 0
	}
	for _, metadata := range dirs {
		for _, dir := range metadata {
			for _, t := range dir.Topics {
				for _, p := range t.Partitions {
					if t.Topic == topic {
						size += float64(p.Size)
					}
				}
			}
		}
	}
	return size
}

// BenchmarkReadsUnderLoad is how long a page of history, a statement and a balance at a time take, one read
// after the other, without and with a bulk load beside them, in turns: four connections that post
// batches of 500 transfers.
func BenchmarkReadsUnderLoad(b *testing.B) {
	r, _ := benchService(b, *benchWallets, "REDIS_URL=")
	address, pick := r.address(), anyOf(*benchWallets)
	driveHTTP(b, address, 64, 2*time.Second, pick) // some history
	paths := map[string]string{
		"history":    "/history?limit=20",
		"statement":  "/statement?since=2020-01-01T00:00:00Z&until=2040-01-01T00:00:00Z",
		"balance-at": "/balance?at=2040-01-01T00:00:00Z",
	}
	read := func(path string, how time.Duration) (l latencies) { // a statement comes in chunks
		dice, began := newDice(), time.Now()
		for time.Since(began) < how {
			from, _ := pick(dice)
			at := time.Now()
			answer, err := http.Get(fmt.Sprintf("%s/v1/wallets/%d%s", r.url, from, path))
			if err == nil {
				_, err = io.Copy(io.Discard, answer.Body)
				answer.Body.Close()
			}
			if err != nil || answer.StatusCode != 200 {
				b.Fatalf("%s: %v", path, err)
			}
			l = append(l, time.Since(at))
			time.Sleep(time.Millisecond)
		}
		return l
	}
	for b.Loop() {
		alone, beside := make(map[string]latencies), make(map[string]latencies)
		bulk := httpLoad{clients: 4, how: *benchFor / 2, write: writeBulk(pick, 500)}
		var batches []float64
		for range 3 { // in turns
			for name, path := range paths {
				alone[name] = append(alone[name], read(path, *benchFor/6)...)
			}
			var loading sync.WaitGroup
			loading.Go(func() {
				rate, _ := bulk.drive(b, address, pick)
				batches = append(batches, rate)
			})
			for name, path := range paths {
				beside[name] = append(beside[name], read(path, *benchFor/6)...)
			}
			loading.Wait()
		}
		slices.Sort(batches)
		b.ReportMetric(500*batches[1], "bulk-transfers/s")
		for name := range paths {
			slices.Sort(alone[name])
			slices.Sort(beside[name])
			for _, q := range []struct {
				name string
				at   float64
			}{{"p50", .5}, {"p99", .99}} {
				before, after := alone[name].at(q.at), beside[name].at(q.at)
				b.ReportMetric(float64(after)/float64(before), "x-"+name+"-"+q.name)
				b.ReportMetric(float64(after.Microseconds()), name+"-"+q.name+"-us")
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

// writeBulk writes requests for batches of transfers, each by itself.
func writeBulk(pick pair, size int) func(dst []byte, from, to int64, key []byte) []byte {
	dice := newDice()
	var body []byte
	return func(dst []byte, _, _ int64, key []byte) []byte {
		body = append(body[:0], `{"atomic":false,"operations":[`...)
		for i := range size {
			from, to := pick(dice)
			body = fmt.Appendf(body, `{"op":"transfer","wallet_id":%d,"to_id":%d,"amount":"0.01",`+
				`"idempotency_key":"%s-%d"},`, from, to, key, i)
		}
		body = append(body[:len(body)-1], "]}"...)
		return fmt.Appendf(dst, "POST /v1/batches HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\n"+
			"Content-Length: %d\r\n\r\n%s", len(body), body)
	}
}
