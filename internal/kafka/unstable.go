// Open transactions: those that hold readers back, and those that nobody will end.
//
// Touches nothing: it asks the brokers for offsets, and keeps no record of what it saw but in memory.
// Promises that a transaction is called stuck only once it has been open for longer than any live producer
// of Config, or a dead one, keeps one: so neither a producer at work nor one that has just died is.

package kafka

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"
)

// Unstable is a partition where a transaction is open: readers of what is committed get no further than
// From.
type Unstable struct {
	Topic     string
	Partition int32
	From, End int64 // where it began, and where the partition ends; both offsets
}

// Unstable looks where transactions are open in the two topics: two questions for each broker. It asks
// without Config.Busy: any goroutine may call it.
func (c *Client) Unstable() ([]Unstable, error) {
	// The ends first: what is written and committed in between shows as a stable end beyond them, not as an
	// open transaction.
	ends, err := c.bothEnds(sarama.ReadUncommitted)
	if err != nil {
		return nil, err
	}
	stable, err := c.bothEnds(sarama.ReadCommitted)
	if err != nil {
		return nil, err
	}
	var opened []Unstable
	for at, end := range ends {
		if stable[at] < end {
			opened = append(opened, Unstable{at.topic, at.partition, stable[at], end})
		}
	}
	slices.SortFunc(opened, func(a, b Unstable) int {
		return cmp.Or(strings.Compare(a.Topic, b.Topic), cmp.Compare(a.Partition, b.Partition))
	})
	return opened, nil
}

// bothEnds is where each partition of the two topics ends for readers of that level.
func (c *Client) bothEnds(level sarama.IsolationLevel) (map[topicPartition]int64, error) {
	questions := make(map[*sarama.Broker]*sarama.OffsetRequest)
	asked := make(map[*sarama.Broker][]topicPartition)
	add := func(at topicPartition) error {
		leader, err := c.client.Leader(at.topic, at.partition)
		if err != nil {
			return fmt.Errorf("leader of %s/%d: %w", at.topic, at.partition, err)
		}
		if questions[leader] == nil {
			questions[leader] = sarama.NewOffsetRequest(sarama.V2_8_0_0)
			questions[leader].IsolationLevel = level
		}
		questions[leader].AddBlock(at.topic, at.partition, sarama.OffsetNewest, 1)
		asked[leader] = append(asked[leader], at)
		return nil
	}
	for p := range c.partitions {
		if err := add(topicPartition{c.cfg.Topic, p}); err != nil {
			return nil, err
		}
	}
	if err := add(topicPartition{c.cfg.Checkpoints, 0}); err != nil {
		return nil, err
	}
	ends := make(map[topicPartition]int64)
	for leader, question := range questions {
		answer, err := leader.GetAvailableOffsets(question)
		if err != nil {
			_ = leader.Close()
			return nil, fmt.Errorf("ends of partitions: %w", err)
		}
		for _, at := range asked[leader] {
			block := answer.GetBlock(at.topic, at.partition)
			switch {
			case block == nil || block.Err == sarama.ErrNoError && len(block.Offsets) != 1:
				err = sarama.ErrIncompleteResponse
			case block.Err != sarama.ErrNoError:
				err = block.Err
			default:
				ends[at] = block.Offsets[0]
				continue
			}
			_ = c.client.RefreshMetadata(at.topic)
			return nil, fmt.Errorf("end of %s/%d: %w", at.topic, at.partition, err)
		}
	}
	return ends, nil
}

// AbortCommand is the command of Kafka's that ends a transaction.
func AbortCommand(broker string, o Unstable) string {
	return fmt.Sprintf("kafka-transactions.sh --bootstrap-server %s abort --topic %s --partition %d "+
		"--start-offset %d", broker, o.Topic, o.Partition, o.From)
}

// Whole fails if the end of a topic cannot be read because a transaction is open there. Whoever publishes was
// fenced before, so that it is somebody else's, or an orphan: a ConfigError says how to end it. It waits a
// little, for what is about to end.
func (c *Client) Whole(topics ...string) error {
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		opened, err := c.Unstable()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(opened, func(o Unstable) bool {
			return slices.Contains(topics, o.Topic)
		})
		if i < 0 {
			return nil
		}
		if o := opened[i]; time.Since(began) > c.cfg.Patience/2 {
			return configError("topic %s cannot be read beyond offset %d of partition %d, which ends at %d: "+
				"a transaction is open there that is not this service's own, or an orphan, and to go on "+
				"without what follows would repeat it. See who else writes there; if nobody does, run: %s",
				o.Topic, o.From, o.Partition, o.End, AbortCommand(c.cfg.Brokers[0], o))
		}
	}
}

const (
	// stuckInterval is between looks for open transactions.
	stuckInterval = 10 * time.Second
	// stuckPatience is above the time after which brokers abort a dead producer's transaction: its timeout,
	// and then up to 10 s (transaction.abort.timed.out.transaction.cleanup.interval.ms).
	stuckPatience = 30 * time.Second
)

// Stuck watches for transactions that nobody ends. Its zero value does. Safe for concurrent use.
type Stuck struct {
	Patience time.Duration // how long a transaction may be open; 0 is stuckPatience

	partitions atomic.Int64
}

// Partitions is how many hold their readers back, as far as is known.
func (s *Stuck) Partitions() float64 { return float64(s.partitions.Load()) }

// Watch looks until ctx ends, and tells of each in a log line, with the command that ends it. What the
// brokers do not tell stays as it was last known.
func (s *Stuck) Watch(ctx context.Context, c *Client) {
	defer s.partitions.Store(0) // another may watch from now on
	patience := cmp.Or(s.Patience, stuckPatience)
	ticks := time.NewTicker(min(stuckInterval, patience/3))
	defer ticks.Stop()
	var seen openings
	told := make(map[openedAt]bool)
	for {
		select {
		case now := <-ticks.C:
			opened, err := c.Unstable()
			if err != nil {
				continue // whoever publishes meets the same, and says so
			}
			stuck := seen.olderThan(patience, opened, now)
			s.partitions.Store(int64(len(stuck)))
			for _, o := range stuck {
				if at := o.at(); !told[at] {
					told[at] = true
					slog.Error("a transaction that nobody ends holds back the readers of a partition",
						"topic", o.Topic, "partition", o.Partition, "from_offset", o.From,
						"end_offset", o.End, "to_do", "see who else writes there; if nobody, abort it",
						"abort", AbortCommand(c.cfg.Brokers[0], o))
				}
			}
			for at := range told {
				if !slices.ContainsFunc(stuck, func(o Unstable) bool { return o.at() == at }) {
					delete(told, at)
					slog.Info("the readers of a partition go on", "topic", at.topic,
						"partition", at.partition, "from_offset", at.from)
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// openedAt is what makes two looks' transactions the same one.
type openedAt struct {
	topicPartition
	from int64
}

func (o Unstable) at() openedAt { return openedAt{topicPartition{o.Topic, o.Partition}, o.From} }

// openings are open transactions, and when each was first seen.
type openings map[openedAt]time.Time

// olderThan takes note of a look, and gives those that have been open, as far as was seen, for patience.
// A partition where one transaction follows another is not among them: each begins at an offset of its own.
func (s *openings) olderThan(patience time.Duration, opened []Unstable, now time.Time) (old []Unstable) {
	seen := make(openings)
	for _, o := range opened {
		since, before := (*s)[o.at()]
		if !before {
			since = now
		}
		seen[o.at()] = since
		if now.Sub(since) >= patience {
			old = append(old, o)
		}
	}
	*s = seen
	return old
}
