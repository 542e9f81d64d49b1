// The producer: messages and the checkpoint that covers them, in one transaction, each request sent once.
//
// Touches the two topics and the transactional id that it is given: making a producer fences all others of
// the id.
// Promises that a transaction is whole or not there, for readers of what is committed; that each partition
// has its messages in the order of Send; and that it repeats nothing by itself. After an error it is of no
// more use.

package kafka

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/IBM/sarama"
)

// Record and Header are as the wire has them.
type (
	Record = sarama.Record
	Header = sarama.RecordHeader
)

// Message is a record to send. Its offset and the time within its batch are set by Send.
type Message struct {
	Record
	At time.Time // its time; the wire keeps whole milliseconds
}

// size is a bound of the bytes it takes in a batch: lengths and deltas are varints.
func (m *Message) size() int {
	n := 40 + len(m.Key) + len(m.Value)
	for _, h := range m.Headers {
		n += 10 + len(h.Key) + len(h.Value)
	}
	return n
}

// Producer is a transactional producer, made of sarama's requests. sarama's own repeats requests by itself,
// the one that ends a transaction as well, and a late first one may then end a later transaction too early
// (KAFKA-17754). Here each is sent once: whatever is answered otherwise than by yes is an error. One
// goroutine may use it.
type Producer struct {
	c     *Client
	id    string // transactional
	pid   int64  // of this producer, and the epoch that fences those before it
	epoch int16

	sequences map[topicPartition]int32 // of the next record
}

type topicPartition struct {
	topic     string
	partition int32
}

const (
	produceTimeout = 5 * time.Second // for all in-sync replicas to have a batch

	// compressionLevel 1 of zstd is about as fast as snappy and lz4 (0.5 us a message more), and 7.7 to 1
	// where they reach 4.5; its default level takes half as much time again.
	compressionLevel = 1

	// recordBatchBytesMax is below what a broker accepts by default (message.max.bytes: 1,048,588) even if
	// nothing can be compressed.
	recordBatchBytesMax = 1_000_000
)

// NewProducer makes a producer, and thereby fences any other of the same id and settles its open transaction.
func (c *Client) NewProducer(id string) (*Producer, error) {
	p := &Producer{c: c, id: id, sequences: make(map[topicPartition]int32)}
	request := &sarama.InitProducerIDRequest{Version: 4, TransactionalID: &id,
		TransactionTimeout: c.cfg.TransactionTimeout, ProducerID: -1, ProducerEpoch: -1}
	err := p.ask(func(coordinator *sarama.Broker) (sarama.KError, error) {
		answer, err := coordinator.InitProducerID(request)
		if err != nil {
			return 0, err
		}
		p.pid, p.epoch = answer.ProducerID, answer.ProducerEpoch
		return answer.Err, nil
	})
	return p, refusedForGood("transactional id "+id, err)
}

// ask puts a question to the transaction coordinator, and puts it again after a "not yet". That is the
// answer while it writes the end of the former transaction, mostly for less than 2 ms, and while another
// broker becomes the coordinator.
func (p *Producer) ask(question func(*sarama.Broker) (sarama.KError, error)) error {
	began := time.Now()
	for pause := 500 * time.Microsecond; ; pause = min(2*pause, 32*time.Millisecond) {
		coordinator, err := p.c.client.TransactionCoordinator(p.id)
		if err == nil {
			var answer sarama.KError
			if answer, err = question(coordinator); err == nil && answer != sarama.ErrNoError {
				err = answer
			}
		}
		switch {
		case err == nil || time.Since(began) > p.c.cfg.Patience:
			return err
		case errors.Is(err, sarama.ErrConcurrentTransactions):
		case errors.Is(err, sarama.ErrConsumerCoordinatorNotAvailable),
			errors.Is(err, sarama.ErrNotCoordinatorForConsumer),
			errors.Is(err, sarama.ErrOffsetsLoadInProgress):
			_ = p.c.client.RefreshTransactionCoordinator(p.id)
		default:
			return err
		}
		time.Sleep(pause)
	}
}

// Send begins a transaction and sends the messages, and the checkpoint unless it is nil. They share memory
// with what is on its way until Send returns.
func (p *Producer) Send(messages []*Message, checkpoint []byte) error {
	cfg := &p.c.cfg
	// As sarama last heard, within MetadataMaxAge: a partition more would break the order of a key's
	// messages.
	if all, err := p.c.client.Partitions(cfg.Topic); err != nil || len(all) != int(p.c.partitions) {
		return fmt.Errorf("topic %s has %d partitions and had %d at the start: %w",
			cfg.Topic, len(all), p.c.partitions, cmp.Or(err, sarama.ErrInvalidPartition))
	}
	batches, err := p.pack(messages, checkpoint)
	if err != nil {
		return err
	}
	if err := p.begin(batches); err != nil {
		return fmt.Errorf("begin Kafka transaction: %w",
			refusedForGood("records in "+cfg.Topic+" and "+cfg.Checkpoints, err))
	}
	// A request has at most one batch of a partition. The next one is sent after the answer, or it might
	// overtake.
	for round := 0; ; round++ {
		requests, err := p.requests(batches, round)
		if err != nil {
			return err
		}
		if len(requests) == 0 {
			return nil
		}
		answers := make(chan error, len(requests))
		for leader, r := range requests {
			go func() { answers <- r.send(leader) }()
		}
		for range requests {
			if err := <-answers; err != nil {
				return err
			}
		}
	}
}

// begin tells the coordinator which partitions the transaction is about.
func (p *Producer) begin(batches packed) error {
	partitions := make(map[string][]int32)
	for at := range batches {
		partitions[at.topic] = append(partitions[at.topic], at.partition)
	}
	request := &sarama.AddPartitionsToTxnRequest{Version: 3, TransactionalID: p.id,
		ProducerID: p.pid, ProducerEpoch: p.epoch, TopicPartitions: partitions}
	return p.ask(func(coordinator *sarama.Broker) (sarama.KError, error) {
		answer, err := coordinator.AddPartitionsToTxn(request)
		if err != nil {
			return 0, err
		}
		for _, results := range answer.Errors {
			for _, result := range results {
				// A partition is not attempted because of another one.
				if result.Err != sarama.ErrNoError && result.Err != sarama.ErrOperationNotAttempted {
					return result.Err, nil
				}
			}
		}
		return sarama.ErrNoError, nil
	})
}

// produceRequest is what goes to one broker.
type produceRequest struct {
	sarama.ProduceRequest
	batches int
}

// requests makes those of a round: the partitions' batches of this number, by the partitions' leaders.
func (p *Producer) requests(batches packed, round int) (map[*sarama.Broker]*produceRequest, error) {
	requests := make(map[*sarama.Broker]*produceRequest)
	for at, list := range batches {
		if round >= len(list) {
			continue
		}
		leader, err := p.c.client.Leader(at.topic, at.partition)
		if err != nil {
			return nil, fmt.Errorf("leader of %s/%d: %w", at.topic, at.partition, err)
		}
		r := requests[leader]
		if r == nil {
			r = &produceRequest{ProduceRequest: sarama.ProduceRequest{Version: 7, TransactionalID: &p.id,
				RequiredAcks: sarama.WaitForAll, Timeout: int32(produceTimeout.Milliseconds())}}
			requests[leader] = r
		}
		r.AddBatch(at.topic, at.partition, list[round])
		r.batches++
	}
	return requests, nil
}

func (r *produceRequest) send(leader *sarama.Broker) error {
	answer, err := leader.Produce(&r.ProduceRequest)
	if err != nil {
		return err
	}
	taken := 0
	for topic, blocks := range answer.Blocks {
		for partition, block := range blocks {
			if block.Err != sarama.ErrNoError {
				return refusedForGood("records", fmt.Errorf("%s/%d: %w", topic, partition, block.Err))
			}
			taken++
		}
	}
	if taken != r.batches {
		return sarama.ErrIncompleteResponse
	}
	return nil
}

// packed is record batches, in the order in which they go to their partition.
type packed map[topicPartition][]*sarama.RecordBatch

// pack makes the record batches of each partition.
func (p *Producer) pack(messages []*Message, checkpoint []byte) (packed, error) {
	batches := make(packed)
	rooms := make(map[topicPartition]int) // bytes left in the last batch
	add := func(to topicPartition, m *Message) {
		at, size := m.At.Truncate(time.Millisecond), m.size()
		list := batches[to]
		if rooms[to] < size {
			list = append(list, &sarama.RecordBatch{Version: 2, IsTransactional: true,
				Codec: sarama.CompressionZSTD, CompressionLevel: compressionLevel,
				FirstTimestamp: at, MaxTimestamp: at, LastOffsetDelta: -1,
				ProducerID: p.pid, ProducerEpoch: p.epoch, FirstSequence: p.sequences[to]})
			batches[to], rooms[to] = list, recordBatchBytesMax
		}
		b := list[len(list)-1]
		b.LastOffsetDelta++
		if at.After(b.MaxTimestamp) {
			b.MaxTimestamp = at
		}
		m.OffsetDelta, m.TimestampDelta = int64(b.LastOffsetDelta), at.Sub(b.FirstTimestamp)
		b.Records = append(b.Records, &m.Record)
		rooms[to] -= size
		p.sequences[to] = (p.sequences[to] + 1) & math.MaxInt32 // 0 follows the highest
	}
	var scratch sarama.ProducerMessage
	for _, m := range messages {
		partition, err := p.c.partition(&scratch, m.Key)
		if err != nil {
			return nil, err
		}
		add(topicPartition{p.c.cfg.Topic, partition}, m)
	}
	if checkpoint != nil {
		record := Record{Key: []byte("checkpoint"), Value: checkpoint}
		add(topicPartition{p.c.cfg.Checkpoints, 0}, &Message{Record: record, At: time.Now()})
	}
	return batches, nil
}

// Commit commits the transaction. After an error nobody knows what came of it.
func (p *Producer) Commit() error { return p.end(true) }

// Abort aborts the transaction. After an error nobody knows what came of it.
func (p *Producer) Abort() error { return p.end(false) }

// end asks the coordinator once: a repeated question might end the next transaction.
func (p *Producer) end(commit bool) error {
	coordinator, err := p.c.client.TransactionCoordinator(p.id)
	if err != nil {
		return err
	}
	answer, err := coordinator.EndTxn(&sarama.EndTxnRequest{Version: 3, TransactionalID: p.id,
		ProducerID: p.pid, ProducerEpoch: p.epoch, TransactionResult: commit})
	if err == nil && answer.Err != sarama.ErrNoError {
		err = answer.Err
	}
	return err
}

// Explain says of a producer's error what it means, if it is that a younger one of its id has been made.
func Explain(err error) error {
	if errors.Is(err, sarama.ErrProducerFenced) || errors.Is(err, sarama.ErrInvalidProducerEpoch) {
		return fmt.Errorf("fenced, another leads: %w", err)
	}
	return err
}

// refusedForGood makes a ConfigError of an answer that no other attempt cures, and says what does. Anything
// else is returned as it is: it may have another outcome next time.
func refusedForGood(what string, err error) error {
	var answer sarama.KError
	var cure string
	switch _ = errors.As(err, &answer); answer {
	case sarama.ErrInvalidTimestamp:
		cure = "look at the clocks of Postgres and of the brokers, and set the topic's " +
			"message.timestamp.before.max.ms and message.timestamp.after.max.ms to " + anyTime +
			" with kafka-configs, since this service may not"
	case sarama.ErrMessageSizeTooLarge:
		cure = "set the topic's max.message.bytes to at least 1048588 with kafka-configs"
	case sarama.ErrTopicAuthorizationFailed, sarama.ErrClusterAuthorizationFailed,
		sarama.ErrTransactionalIDAuthorizationFailed:
		cure = "allow the relay's user to write to the topics and to use its transactional id, " +
			"with kafka-acls"
	case sarama.ErrInvalidRecord, sarama.ErrPolicyViolation, sarama.ErrUnsupportedForMessageFormat,
		sarama.ErrUnsupportedCompressionType:
		cure = "see the broker's log for its reason, and alter the topic or its policy"
	default:
		return err
	}
	refusal := configError("the broker refuses the relay's %s (%s), so no event is published; "+
		"nothing is lost. To go on, %s", what, strings.TrimSuffix(err.Error(), "."), cure)
	return fmt.Errorf("%w: %w", refusal, err)
}
