// Looks at the events without Kafka's tools: a JSON line per record, as a read_committed consumer sees them.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

type eventsConfig struct {
	data    string
	brokers string
	topic   string
	from    string
	count   int // 0: until interrupted
}

// event is one line. Value is the record's own JSON, or a string where it is not JSON.
type event struct {
	Partition int32             `json:"partition"`
	Offset    int64             `json:"offset"`
	Key       string            `json:"key"`
	Headers   map[string]string `json:"headers"`
	Value     json.RawMessage   `json:"value"`
}

// runEvents prints until ctx ends or count events are out.
func runEvents(ctx context.Context, cfg eventsConfig, out io.Writer) error {
	if cfg.brokers == "" {
		stack, err := runningStack(cfg.data)
		if err != nil {
			return err
		}
		cfg.brokers = stack.KafkaBrokers
	}
	waited, err := untilTopic(ctx, cfg)
	if err != nil {
		return err
	}
	offset := kgo.NewOffset().AtEnd()
	if waited || cfg.from == "start" { // of a topic made just now, everything is new
		offset = kgo.NewOffset().AtStart()
	}
	client, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(cfg.brokers, ",")...),
		kgo.ConsumeTopics(cfg.topic),
		kgo.ConsumeResetOffset(offset),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		kgo.FetchMaxWait(500*time.Millisecond),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	lines := json.NewEncoder(out)
	lines.SetEscapeHTML(false)
	for printed := 0; ; {
		fetches := client.PollFetches(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err := fetches.Err(); err != nil {
			return fmt.Errorf("reading from %s: %w", cfg.brokers, err)
		}
		for records := fetches.RecordIter(); !records.Done(); {
			if err := lines.Encode(newEvent(records.Next())); err != nil {
				return err
			}
			if printed++; printed == cfg.count {
				return nil
			}
		}
	}
}

func newEvent(r *kgo.Record) event {
	e := event{Partition: r.Partition, Offset: r.Offset, Key: string(r.Key), Headers: map[string]string{},
		Value: r.Value}
	for _, h := range r.Headers {
		e.Headers[h.Key] = string(h.Value)
	}
	if !json.Valid(r.Value) {
		e.Value, _ = json.Marshal(string(r.Value))
	}
	return e
}

// untilTopic returns when the topic exists, and whether it waited. It fails if no broker answers.
func untilTopic(ctx context.Context, cfg eventsConfig) (waited bool, err error) {
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(cfg.brokers, ",")...),
		kgo.RetryTimeout(5*time.Second))
	if err != nil {
		return false, err
	}
	defer client.Close()
	for {
		request := kmsg.NewPtrMetadataRequest()
		topic := kmsg.NewMetadataRequestTopic()
		topic.Topic = &cfg.topic
		request.Topics = append(request.Topics, topic)
		answer, err := request.RequestWith(ctx, client)
		if err != nil {
			return false, fmt.Errorf("no answer from Kafka at %s: %w", cfg.brokers, err)
		}
		err = kerr.ErrorForCode(answer.Topics[0].ErrorCode)
		if err == nil {
			return waited, nil
		} else if !errors.Is(err, kerr.UnknownTopicOrPartition) && !kerr.IsRetriable(err) {
			return false, fmt.Errorf("topic %s: %w", cfg.topic, err)
		}
		if !waited {
			fmt.Fprintf(os.Stderr, "waiting for the topic %s\n", cfg.topic)
		}
		waited = true
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return false, err
		}
	}
}
