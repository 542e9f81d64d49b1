// A Kafka transaction that nobody ends: what comes after it in its partition is not read by those who read
// what is committed. The relay says so, and never takes what it cannot read for what is not there.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"

	"wallet/internal/kafka"
)

// orphan leaves a transaction open in a partition, at its end, until it is aborted: nobody else ends it.
// Apache Kafka is told not to verify, and its coordinator knows nothing of the partition: as after
// KAFKA-20734, neither a timeout nor a successor ends the transaction. The embedded broker always verifies,
// and is given one with a long timeout.
func (g *rig) orphan(t *testing.T, topic string, partition int32) (abort func()) {
	t.Helper()
	conf := sarama.NewConfig()
	conf.Version = sarama.V2_8_0_0
	client, err := sarama.NewClient(g.cfg.kafkaBrokers, conf)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	id := "orphan-" + topic
	coordinator, err := client.TransactionCoordinator(id)
	if err != nil {
		t.Fatal(err)
	}
	made, err := coordinator.InitProducerID(&sarama.InitProducerIDRequest{Version: 4, TransactionalID: &id,
		TransactionTimeout: 10 * time.Minute, ProducerID: -1, ProducerEpoch: -1})
	if err != nil || made.Err != sarama.ErrNoError {
		t.Fatal(err, made)
	}
	if os.Getenv("WALLET_TEST_KAFKA") == "apache" {
		g.verifyPartitions(t, "false")
		defer g.verifyPartitions(t, "true")
	} else if _, err := coordinator.AddPartitionsToTxn(&sarama.AddPartitionsToTxnRequest{Version: 3,
		TransactionalID: id, ProducerID: made.ProducerID, ProducerEpoch: made.ProducerEpoch,
		TopicPartitions: map[string][]int32{topic: {partition}}}); err != nil {
		t.Fatal(err)
	}
	leader, err := client.Leader(topic, partition)
	if err != nil {
		t.Fatal(err)
	}
	produced := func() bool {
		request := &sarama.ProduceRequest{Version: 7, TransactionalID: &id,
			RequiredAcks: sarama.WaitForAll, Timeout: 5000}
		now := time.Now().Truncate(time.Millisecond)
		request.AddBatch(topic, partition, &sarama.RecordBatch{Version: 2, IsTransactional: true,
			FirstTimestamp: now, MaxTimestamp: now, ProducerID: made.ProducerID,
			ProducerEpoch: made.ProducerEpoch,
			Records:       []*sarama.Record{{Key: []byte("orphan"), Value: []byte("orphan")}}})
		answer, err := leader.Produce(request)
		return err == nil && answer.GetBlock(topic, partition).Err == sarama.ErrNoError
	}
	// The broker hears a moment later that it need not verify.
	eventually(t, 10*time.Second, "a record in an orphaned transaction", produced)
	return func() {
		t.Helper()
		abortOn(t, g.cfg.kafkaBrokers[0], topic, partition, made.ProducerID, made.ProducerEpoch)
	}
}

// verifyPartitions sets whether the brokers demand that a transaction's coordinator knows a partition.
func (g *rig) verifyPartitions(t *testing.T, value string) {
	t.Helper()
	change := map[string]sarama.IncrementalAlterConfigsEntry{"transaction.partition.verification.enable": {
		Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &value}}
	err := clusterAdmin(t, g.cfg).IncrementalAlterConfig(sarama.BrokerResource, "", change, false)
	if err != nil {
		t.Fatal(err)
	}
}

// abortOn does what `kafka-transactions.sh abort` does: WriteTxnMarkers, version 1
// (https://kafka.apache.org/protocol#The_Messages_WriteTxnMarkers), to the partition's leader.
func abortOn(t *testing.T, broker, topic string, partition int32, pid int64, epoch int16) {
	t.Helper()
	compact := func(b []byte, s string) []byte {
		return append(binary.AppendUvarint(b, uint64(len(s)+1)), s...)
	}
	be := binary.BigEndian
	b := be.AppendUint16(nil, 27) // WriteTxnMarkers
	b = be.AppendUint16(b, 1)
	b = be.AppendUint32(b, 7) // correlation
	b = be.AppendUint16(b, 0) // the client's name
	b = append(b, 0, 2)       // no tags; one marker
	b = be.AppendUint64(b, uint64(pid))
	b = be.AppendUint16(b, uint16(epoch))
	b = append(b, 0, 2) // abort; one topic
	b = compact(b, topic)
	b = append(b, 2) // one partition
	b = be.AppendUint32(b, uint32(partition))
	b = append(b, 0)
	b = be.AppendUint32(b, 0) // the coordinator's epoch, as the tool has it for one that knows nothing
	b = append(b, 0, 0)
	conn, err := net.DialTimeout("tcp", broker, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, 4)
	if _, err = conn.Write(append(be.AppendUint32(nil, uint32(len(b))), b...)); err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if err == nil {
		answer = make([]byte, be.Uint32(answer))
		_, err = io.ReadFull(conn, answer)
	}
	// Before the end come the partition, its error, and the tags of partition, topic, marker and answer.
	if err != nil || len(answer) < 10 || be.Uint16(answer[len(answer)-6:]) != 0 {
		t.Fatalf("abort: %x, %v", answer, err)
	}
}

// lines is a log that is read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) has(words ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		all := true
		for _, word := range words {
			all = all && strings.Contains(line, word)
		}
		if all {
			return true
		}
	}
	return false
}

// logged has the log written where the test can read it.
func logged(t *testing.T) *lines {
	l, was := new(lines), slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(l, nil)))
	t.Cleanup(func() { slog.SetDefault(was) })
	return l
}

// startWatcher is startRelay, with a relay that is soon impatient.
func (g *rig) startWatcher(t *testing.T) *relaying {
	t.Helper()
	return startRelay(t, g.cfg, func(r *relay) { r.stuck.Patience = time.Second })
}

// TestOrphanInTheEvents: it is counted, named with the command that ends it, and over when it is aborted. A
// successor leads nevertheless, and what was published behind the orphan is there once, in order.
func TestOrphanInTheEvents(t *testing.T) {
	g := newRig(t)
	log := logged(t)
	r := g.startWatcher(t)
	r.await(t, "leader")
	g.deposit(t, 10)
	checkStream(t, g.cfg)
	abort := g.orphan(t, g.cfg.kafkaTopic, 1)
	var open kafka.Unstable
	eventually(t, 5*time.Second, "open", func() bool {
		all, err := g.openKafka(t).Unstable()
		for _, u := range all {
			open = u
		}
		return err == nil && len(all) == 1
	})
	if r.stuck.Partitions() != 0 {
		t.Error("a transaction that has just begun is taken for one that nobody ends")
	}
	eventually(t, 10*time.Second, "counted", func() bool { return r.stuck.Partitions() == 1 })
	command := kafka.AbortCommand(g.cfg.kafkaBrokers[0], open)
	if !log.has("level=ERROR", "nobody ends", "partition=1", command) {
		t.Errorf("the log does not say: %s\n%s", command, log.text.String())
	}
	g.deposit(t, 20)
	r.stop()
	eventually(t, time.Second, "it leads no more, and counts none", func() bool {
		return r.stuck.Partitions() == 0
	})
	next := g.startWatcher(t)
	next.await(t, "leader")
	g.deposit(t, 20)
	eventually(t, 10*time.Second, "published", func() bool {
		return lastCheckpointOf(t, g.cfg).Events == 50
	})
	behind := 0
	for range consume(t, g.cfg, 0) {
		behind++
	}
	if behind >= 50 {
		t.Errorf("%d events are read past the orphan: this has proven nothing", behind)
	}
	eventually(t, 10*time.Second, "counted by the next", func() bool { return next.stuck.Partitions() == 1 })
	abort()
	eventually(t, 10*time.Second, "over", func() bool { return next.stuck.Partitions() == 0 })
	if !log.has("level=INFO", "go on", "partition=1") {
		t.Error("the log does not say that it is over")
	}
	checkStream(t, g.cfg)
}

// TestOrphanHidesTheCheckpoint: who cannot read the last checkpoint must not lead by the one before, since it
// would publish again what came between; nor may a recovery take events that it cannot read for missing.
func TestOrphanHidesTheCheckpoint(t *testing.T) {
	for name, topic := range map[string]func(*rig) string{
		"checkpoints": func(g *rig) string { return g.cfg.kafkaCheckpointTopic },
		"events":      func(g *rig) string { return g.cfg.kafkaTopic }, // and the slot is lost
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			log := logged(t)
			r := startRelay(t, g.cfg)
			r.await(t, "leader")
			g.deposit(t, 10)
			checkStream(t, g.cfg)
			abort := g.orphan(t, topic(g), 0)
			g.deposit(t, 20)
			eventually(t, 10*time.Second, "published", func() bool { return r.events.Load() == 30 })
			r.stop()
			if topic(g) == g.cfg.kafkaTopic {
				g.onFreeSlot(t, `SELECT pg_drop_replication_slot($1)`)
			}
			next := startRelay(t, g.cfg)
			eventually(t, 20*time.Second, "refused", func() bool { return next.state.Load() == "refused" })
			command := kafka.AbortCommand(g.cfg.kafkaBrokers[0], kafka.Unstable{Topic: topic(g)})
			command = strings.TrimSuffix(command, "0") // the offset is another
			if !strings.Contains(next.refusal.Load().(string), command) || !log.has("refuses", command) {
				t.Errorf("refused without the way out: %s", next.refusal.Load())
			}
			abort()
			next.stop()
			next = startRelay(t, g.cfg)
			next.await(t, "leader")
			g.deposit(t, 5)
			checkStream(t, g.cfg)
		})
	}
}

// TestLeaderAtWorkIsNotStuck: neither load nor a transaction of a leader that died raises the alarm, however
// short the looks.
func TestLeaderAtWorkIsNotStuck(t *testing.T) {
	g := newRig(t)
	log := logged(t)
	r := g.startWatcher(t)
	r.await(t, "leader")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		g.deposit(t, 5)
	}
	// It dies between what it sent and its commit; the next fences it.
	r.stop()
	k := g.openKafka(t)
	c := lastCheckpointOf(t, g.cfg)
	dead, err := k.NewProducer(transactionalID(c.System, g.cfg.replicationSlot))
	if err == nil {
		err = dead.Send(nil, []byte(`{"events":1000000}`))
	}
	if err != nil {
		t.Fatal(err)
	}
	g.startWatcher(t).await(t, "leader")
	time.Sleep(2 * time.Second)
	if log.has("nobody ends") {
		t.Errorf("a false alarm: %s", log.text.String())
	}
	checkStream(t, g.cfg)
}
