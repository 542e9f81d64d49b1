// Package consumers runs the example consumers of docs/examples against Apache Kafka: while clients move
// money in every way, leaders of the relay and the consumers themselves are killed again and again. In the
// end each consumer's projection must be the ledger, and its count of events the number of entries: that
// count stands in the same transaction, so that a repeat or a gap would show in it.
//
//	WALLET_TEST_KAFKA=apache go test -C dev -v ./consumers
//
// consumers_test.go is the run, load_test.go what moves money.
package consumers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	"wallet/dev/testbed"
)

var (
	killFor  = flag.Duration("consumers", 25*time.Second, "how long load and kills go on")
	examples = flag.String("consumers.examples", "../../docs/examples", "their folder, perhaps of mutants")
	seed     = flag.Uint64("consumers.seed", uint64(time.Now().UnixNano()), "the order of all but its timing")
)

const (
	topic = "wallet.events"
	// statusBroken is what a consumer ends with that finds a broken chain.
	statusBroken = 3
	// settle is how long the relay may take after the last kill, and the consumers after it.
	settle = time.Minute
)

// consumer is one example, compiled.
type consumer struct {
	name    string
	command func(database string, stop bool) []string
	file    string // its database
	kills   int
}

func TestConsumersSurviveKills(t *testing.T) {
	if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
		t.Skip("set WALLET_TEST_KAFKA=apache; it needs Java 17 or later, Maven and Python 3.9 or later too")
	}
	t.Logf("-consumers.seed %d", *seed)
	folder := testbed.Folder(t, "consumers")
	compiled := make(chan error, 1)
	go func() { compiled <- compile(t.Context(), folder) }()
	servers := testbed.Start(t, folder)
	binary := testbed.Build(t, "../..", filepath.Join(folder, "wallet"))
	l := &load{t: t}
	for _, name := range []string{"A", "B"} {
		one := testbed.NewService(t, servers, folder, binary, name, servers.DatabaseURL)
		one.Start(t)
		t.Cleanup(one.Kill)
		if !one.IsReady(30 * time.Second) {
			t.Fatalf("%s is not ready, see %s", one.Name, one.Log)
		}
		l.replicas = append(l.replicas, one)
	}
	if err := <-compiled; err != nil {
		t.Fatal(err)
	}

	l.send(dice(0), "wallets/1/deposit", fields{"amount": "1000"})
	if len(readTopic(t, servers.KafkaBrokers, kgo.ReadCommitted(), 1)) == 0 {
		t.Fatal("there is no event")
	}
	consumers := all(folder, servers.KafkaBrokers)
	until := time.Now().Add(*killFor)
	var hands sync.WaitGroup
	for i := range clients {
		hands.Go(func() { l.client(dice(i), until) })
	}
	hands.Go(func() { l.killReplicas(dice(100), until) })
	hands.Go(func() { abortAgainAndAgain(t, servers.KafkaBrokers, until) })
	for i, c := range consumers {
		hands.Go(func() { c.killAgainAndAgain(t, folder, dice(200+i), until) })
	}
	hands.Wait()
	for _, c := range consumers {
		t.Logf("%s: killed %d times", c.name, c.kills)
		if c.kills < 3 {
			t.Errorf("%s was killed %d times only", c.name, c.kills)
		}
	}

	want := l.ledger(servers.DatabaseURL)
	for _, c := range consumers {
		hands.Go(func() { c.mustBecome(t, want) })
	}
	hands.Wait()
	committed := readTopic(t, servers.KafkaBrokers, kgo.ReadCommitted(), want.Events)
	every := readTopic(t, servers.KafkaBrokers, kgo.ReadUncommitted(), len(committed)+1)
	aborted := len(every) - len(committed)
	t.Logf("%d entries of %d wallets; %d aborted records in the topic", want.Events, len(want.Wallets),
		aborted)
	if len(committed) != want.Events {
		t.Errorf("the topic has %d events", len(committed))
	}
	if aborted == 0 {
		t.Error("no record was aborted: whether they read committed was not seen")
	}
	if t.Failed() {
		return
	}
	writer := client(t, servers.KafkaBrokers, kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err := writer.ProduceSync(t.Context(), again(committed[len(committed)-1])).FirstErr(); err != nil {
		t.Fatal(err)
	}
	for _, c := range consumers {
		hands.Go(func() { c.mustRefuse(t, want) })
	}
	hands.Wait()
}

func dice(i int) *rand.Rand { return rand.New(rand.NewPCG(*seed, uint64(i))) }

// compile builds the examples in copies: nothing is left among the sources.
func compile(ctx context.Context, folder string) error {
	copied := filepath.Join(folder, "examples")
	if err := os.CopyFS(copied, os.DirFS(*examples)); err != nil {
		return err
	}
	for _, command := range [][]string{
		{"python3", "-m", "venv", "venv"},
		{"venv/bin/pip", "install", "-q", "--disable-pip-version-check", "-r", "python/requirements.txt"},
		{"mvn", "-B", "-q", "-f", "java/pom.xml", "compile"},
		{"go", "build", "-C", "go", "-o", "../consumer", "."},
	} {
		cmd := exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.Dir = copied
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", cmd, err, out)
		}
	}
	return nil
}

func all(folder, brokers string) []*consumer {
	in := func(path string) string { return filepath.Join(folder, "examples", path) }
	java := []string{"java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Djava.io.tmpdir=" + folder,
		"-cp", in("java/target/classes") + ":" + in("java/target/lib/*"), "Consumer"}
	var all []*consumer
	for name, program := range map[string][]string{"go": {in("consumer")}, "java": java,
		"python": {in("venv/bin/python"), in("python/consumer.py")}} {
		c := &consumer{name: name, file: filepath.Join(folder, name+".db")}
		c.command = func(database string, stop bool) []string {
			command := slices.Clone(program)
			if stop {
				command = append(command, "--stop")
			}
			return append(command, brokers, topic, database)
		}
		all = append(all, c)
	}
	return all
}

// killAgainAndAgain kills the consumer: a quarter of the times as it starts, a quarter while it works, and
// half of them just as it has written to its database. Were the offset committed apart, that would be between
// the two.
func (c *consumer) killAgainAndAgain(t *testing.T, folder string, dice *rand.Rand, until time.Time) {
	p := testbed.NewProcess(folder, c.name, nil, c.command(c.file, false)...)
	for time.Now().Before(until) {
		before := stored(p.Log)
		p.Start(t)
		when := dice.IntN(4)
		for when > 0 && stored(p.Log) == before && time.Now().Before(until) {
			time.Sleep(10 * time.Millisecond)
		}
		pause := time.Duration(dice.Int64N(int64(700 * time.Millisecond)))
		if when > 1 {
			pause /= 350
			for written := c.written(); c.written() == written && time.Now().Before(until); {
				time.Sleep(50 * time.Microsecond)
			}
		}
		select {
		case <-p.Exited: // and has said why
			text, _ := os.ReadFile(p.Log)
			t.Errorf("%s ended:\n%s", c.name, text[max(0, len(text)-2000):])
			return
		case <-time.After(pause):
		}
		p.Kill()
		c.kills++
	}
}

// written is when the consumer last committed.
func (c *consumer) written() time.Time {
	log, err := os.Stat(c.file + "-wal")
	if err != nil {
		return time.Time{}
	}
	return log.ModTime()
}

// stored is how many batches a consumer has said it stored.
func stored(log string) int {
	text, _ := os.ReadFile(log)
	return bytes.Count(text, []byte("stored "))
}

// projection is a ledger's heads, of wallets as text: id, seq, balance, held, state.
type projection struct {
	Events  int
	Wallets []string
}

// readProjection is Python, which has SQLite in it: as a module of ours SQLite would take a minute to compile
// and to check.
const readProjection = `
import json, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(json.dumps({"events": db.execute("SELECT coalesce(sum(events), 0) FROM position").fetchone()[0],
    "wallets": [" ".join(map(str, row)) for row in
        db.execute("SELECT id, seq, balance, held, state FROM wallet ORDER BY id")]}))`

func (c *consumer) projection() (p projection, err error) {
	out, err := exec.Command("python3", "-c", readProjection, c.file).Output()
	if err != nil {
		return p, err
	}
	return p, json.Unmarshal(out, &p)
}

// run runs the consumer until it has read everything.
func (c *consumer) run() (status int, said string, err error) {
	command := c.command(c.file, true)
	ctx, cancel := context.WithTimeout(context.Background(), settle)
	defer cancel()
	out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), string(out), nil
	}
	return 0, string(out), err
}

// mustBecome runs the consumer until it has all that the ledger has; the relay may still be at it.
func (c *consumer) mustBecome(t *testing.T, want *projection) {
	var got projection
	for deadline := time.Now().Add(settle); got.Events < want.Events; time.Sleep(100 * time.Millisecond) {
		status, said, err := c.run()
		if err == nil {
			got, err = c.projection()
		}
		if status != 0 || err != nil || time.Now().After(deadline) {
			t.Errorf("%s: exit status %d, %v, %d events of %d\n%s", c.name, status, err, got.Events,
				want.Events, said)
			return
		}
	}
	if got.Events != want.Events {
		t.Errorf("%s: it counted %d events, the ledger has %d entries", c.name, got.Events, want.Events)
	}
	if !slices.Equal(got.Wallets, want.Wallets) {
		t.Errorf("%s: its projection is not the ledger:\n%s\nbut\n%s", c.name,
			strings.Join(got.Wallets, "\n"), strings.Join(want.Wallets, "\n"))
	}
}

// mustRefuse: the topic now repeats an event. The consumer says what to do, and stores nothing of it.
func (c *consumer) mustRefuse(t *testing.T, want *projection) {
	for range 2 { // also when it is started again
		status, said, err := c.run()
		if err != nil || status != statusBroken || !strings.Contains(said, `"wallet -audit"`) {
			t.Errorf("%s: an event comes twice: exit status %d, %v\n%s", c.name, status, err, said)
		}
	}
	if got, err := c.projection(); err != nil || got.Events != want.Events ||
		!slices.Equal(got.Wallets, want.Wallets) {
		t.Errorf("%s: it stored a part of a broken chain (%v): %d events", c.name, err, got.Events)
	}
}

func client(t *testing.T, brokers string, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(append(opts, kgo.SeedBrokers(strings.Split(brokers, ",")...))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// readTopic reads all records that there are, which should be some.
func readTopic(t *testing.T, brokers string, level kgo.IsolationLevel, some int) (records []*kgo.Record) {
	t.Helper()
	reader := client(t, brokers, kgo.ConsumeTopics(topic), kgo.FetchIsolationLevel(level),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	for {
		patience := settle
		if len(records) >= some {
			patience = 2 * time.Second
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		fetches := reader.PollFetches(ctx)
		cancel()
		if fetches.NumRecords() == 0 {
			return records
		}
		records = append(records, fetches.Records()...)
	}
}

// abortAgainAndAgain leaves what a leader leaves that dies in the middle of a Kafka transaction: events that
// were never committed. Few of the leaders that are killed do.
func abortAgainAndAgain(t *testing.T, brokers string, until time.Time) {
	ctx := context.Background()
	reader := client(t, brokers, kgo.ConsumeTopics(topic), kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	writer := client(t, brokers, kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.TransactionalID("dies"))
	reading, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	for {
		records := reader.PollFetches(reading).Records()
		if len(records) == 0 {
			return // nothing came until the end
		}
		err := writer.BeginTransaction()
		if err == nil {
			err = writer.ProduceSync(ctx, again(records[len(records)-1])).FirstErr()
		}
		if err == nil {
			err = writer.EndTransaction(ctx, kgo.TryAbort)
		}
		if err != nil {
			t.Errorf("aborting a transaction: %v", err)
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// again is a record as it was, to be written once more.
func again(r *kgo.Record) *kgo.Record {
	return &kgo.Record{Topic: topic, Partition: r.Partition, Key: r.Key, Value: r.Value, Headers: r.Headers}
}

// ledger waits until no hold expires any more, and tells what the ledger has.
func (l *load) ledger(databaseURL string) *projection {
	t := l.t
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for deadline := time.Now().Add(settle); ; time.Sleep(50 * time.Millisecond) {
		var due int
		err := conn.QueryRow(t.Context(), `
SELECT count(*) FROM hold WHERE status = 'open' AND expires_at < now() + interval '10 minutes'`).Scan(&due)
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("%d holds are due: %v", due, err)
		}
		if due == 0 {
			break
		}
	}
	rows, _ := conn.Query(t.Context(), `
SELECT concat_ws(' ', CASE WHEN kind = 'release' THEN note::json ->> 'reason'
                           WHEN held_change < 0 THEN 'captured by'
                           WHEN of_seq IS NOT NULL THEN 'undone by' END, kind), count(*)
FROM entry GROUP BY 1 ORDER BY 1`)
	var kind string
	var count int
	var kinds []string
	p := new(projection)
	if _, err := pgx.ForEachRow(rows, []any{&kind, &count}, func() error {
		p.Events += count
		kinds = append(kinds, kind)
		t.Logf("%6d %s", count, kind)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"captured by transfer_out", "captured by withdrawal", "deposit",
		"expiry release", "hold", "state", "transfer_in", "transfer_out", "undone by deposit",
		"undone by transfer_in", "undone by transfer_out", "undone by withdrawal", "void release",
		"withdrawal"} {
		if !slices.Contains(kinds, kind) {
			t.Errorf("the load had no %q", kind)
		}
	}
	rows, _ = conn.Query(t.Context(), `
SELECT concat(id, ' ', seq, ' ', trim_scale(balance), ' ', trim_scale(held), ' ', state) FROM wallet
WHERE seq > 0 ORDER BY id`)
	if p.Wallets, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		t.Fatal(err)
	}
	return p
}
