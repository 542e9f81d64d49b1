// The reader: what is committed, by partition and offset.
//
// Touches nothing: it only reads, and belongs to no consumer group.
// Promises that every record of a span is visited once, in order, and none that is part of an aborted or
// open transaction; and that a broker that moves or restarts is asked again for a while.

package kafka

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/IBM/sarama"
)

// Span is a range of a partition's offsets.
type Span struct {
	Topic     string
	Partition int32
	From, To  int64 // To is exclusive
	Headless  bool  // earlier records of the partition were deleted
}

// Committed is a committed record and its place.
type Committed struct {
	Partition int32
	Offset    int64
	*Record
}

// Bounds gives a partition's readable span: what was neither deleted nor is part of an open transaction.
func (c *Client) Bounds(topic string, partition int32) (s Span, err error) {
	err = c.cfg.Busy(func() error {
		s, err = c.bounds(topic, partition)
		return err
	})
	return s, err
}

func (c *Client) bounds(topic string, partition int32) (Span, error) {
	s := Span{Topic: topic, Partition: partition}
	end, err := c.end(topic, partition)
	if err != nil {
		return s, err
	}
	block, err := c.fetch(topic, partition, end)
	if err != nil {
		return s, err
	}
	s.From, s.To, s.Headless = block.LogStartOffset, block.LastStableOffset, block.LogStartOffset > 0
	return s, nil
}

func (c *Client) end(topic string, partition int32) (int64, error) {
	end, err := c.client.GetOffset(topic, partition, sarama.OffsetNewest)
	if err != nil {
		return 0, fmt.Errorf("end of %s/%d: %w", topic, partition, err)
	}
	return end, nil
}

// OffsetAt gives the first offset of a message of a time or later, or the end where there is none.
func (c *Client) OffsetAt(topic string, partition int32, at time.Time) (offset int64, err error) {
	err = c.cfg.Busy(func() (err error) {
		offset, err = c.client.GetOffset(topic, partition, at.UnixMilli())
		if err == nil && offset < 0 {
			offset, err = c.end(topic, partition)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("offset of %v in %s/%d: %w", at, topic, partition, err)
	}
	return offset, nil
}

// Ends gives the offset at which each partition of the messages' topic ends, open transactions included. It
// asks without Config.Busy: any goroutine may call it, whoever Busy belongs to.
func (c *Client) Ends() ([]int64, error) {
	ends := make([]int64, c.partitions)
	for p := range ends {
		var err error
		if ends[p], err = c.end(c.cfg.Topic, int32(p)); err != nil {
			return nil, err
		}
	}
	return ends, nil
}

// OffsetError is that a partition does not have all that follows an offset: it starts later, or ends before.
type OffsetError struct {
	Partition          int32
	Offset, Start, End int64
}

func (e *OffsetError) Error() string {
	return fmt.Sprintf("partition %d goes from offset %d to %d and was to be read from %d",
		e.Partition, e.Start, e.End, e.Offset)
}

// Since gives the span of each partition of the messages' topic that follows an offset, one for each
// partition; nil is the beginning. It is an *OffsetError where a partition does not have all of it.
func (c *Client) Since(offsets []int64) ([]Span, error) {
	spans := make([]Span, c.partitions)
	for p := range spans {
		s := &spans[p]
		var end int64
		err := c.cfg.Busy(func() (err error) {
			if *s, err = c.bounds(c.cfg.Topic, int32(p)); err == nil {
				end, err = c.end(c.cfg.Topic, int32(p))
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		from := int64(0)
		if offsets != nil {
			from = offsets[p]
		}
		if from > end || from < s.From {
			return nil, &OffsetError{Partition: int32(p), Offset: from, Start: s.From, End: end}
		}
		s.From = from
	}
	return spans, nil
}

// Scan visits the committed records of a span in order.
func (c *Client) Scan(ctx context.Context, s Span, visit func(*Committed) error) error {
	for s.From < s.To && ctx.Err() == nil {
		var block *sarama.FetchResponseBlock
		err := c.cfg.Busy(func() (err error) {
			block, err = c.fetch(s.Topic, s.Partition, s.From)
			return err
		})
		if err != nil {
			return err
		}
		next, err := visitBlock(block, s, visit)
		if err != nil {
			return err
		}
		s.From = max(next, s.From+1) // sarama hides a batch that compaction emptied
	}
	return ctx.Err()
}

// visitBlock visits those records of an answer that lie within the span and are committed. It returns the
// offset that follows the answer's last batch, or the span's first if there is none.
func visitBlock(block *sarama.FetchResponseBlock, s Span, visit func(*Committed) error) (int64, error) {
	next := s.From
	aborted := slices.SortedFunc(slices.Values(block.AbortedTransactions),
		func(a, b *sarama.AbortedTransaction) int { return cmp.Compare(a.FirstOffset, b.FirstOffset) })
	aborting := make(map[int64]bool) // producers within a transaction that was aborted
	for _, records := range block.RecordsSet {
		b := records.RecordBatch
		if b == nil {
			return 0, fmt.Errorf("%s/%d: records in a format of before 2017", s.Topic, s.Partition)
		}
		if b.PartialTrailingRecord {
			break
		}
		for len(aborted) > 0 && aborted[0].FirstOffset <= b.LastOffset() {
			aborting[aborted[0].ProducerID] = true
			aborted = aborted[1:]
		}
		next = b.LastOffset() + 1
		if b.Control { // the key is version and type: 0 abort, 1 commit
			if len(b.Records) == 1 && len(b.Records[0].Key) >= 4 &&
				binary.BigEndian.Uint16(b.Records[0].Key[2:]) == 0 {
				delete(aborting, b.ProducerID)
			}
			continue
		}
		if b.IsTransactional && aborting[b.ProducerID] {
			continue
		}
		for _, record := range b.Records {
			offset := b.FirstOffset + record.OffsetDelta
			if offset < s.From || offset >= s.To {
				continue
			}
			if err := visit(&Committed{s.Partition, offset, record}); err != nil {
				return 0, err
			}
		}
	}
	return next, nil
}

// fetch reads from an offset on what there is, read_committed. A broker that moves or restarts is asked
// again for a while.
func (c *Client) fetch(topic string, partition int32, offset int64) (*sarama.FetchResponseBlock, error) {
	for attempt := 0; ; attempt++ {
		block, err := c.fetchOnce(topic, partition, offset)
		if err == nil {
			return block, nil
		}
		final := errors.Is(err, sarama.ErrOffsetOutOfRange) || errors.Is(err, sarama.ErrClosedClient)
		if attempt == 10 || final {
			return nil, fmt.Errorf("read %s/%d at %d: %w", topic, partition, offset, err)
		}
		time.Sleep(200 * time.Millisecond)
		_ = c.client.RefreshMetadata(topic)
	}
}

func (c *Client) fetchOnce(topic string, partition int32, offset int64) (*sarama.FetchResponseBlock, error) {
	broker, err := c.client.Leader(topic, partition)
	if err != nil {
		return nil, err
	}
	// In small pieces: on a busy machine, unpacking 8 MB was seen to take longer than 10 s.
	bytesMax := cmp.Or(c.cfg.FetchBytes, 1<<20)
	request := &sarama.FetchRequest{Version: 11, MaxBytes: bytesMax, MaxWaitTime: 100,
		Isolation: sarama.ReadCommitted}
	request.AddBlock(topic, partition, offset, bytesMax, -1)
	response, err := broker.Fetch(request)
	if err != nil {
		_ = broker.Close()
		return nil, err
	}
	block := response.GetBlock(topic, partition)
	if block == nil {
		return nil, sarama.ErrIncompleteResponse
	}
	if block.Err != sarama.ErrNoError {
		return nil, block.Err
	}
	return block, nil
}

// Last finds the last committed record of a partition, or nil: backwards, since before its end there may be
// markers and aborted records, and after months millions that compaction has not reached.
func (c *Client) Last(topic string, partition int32) (last *Committed, err error) {
	bounds, err := c.Bounds(topic, partition)
	if err != nil {
		return nil, err
	}
	for look, s := int64(16), bounds; last == nil && s.To > bounds.From; look *= 8 {
		s.From = max(bounds.From, s.To-look)
		err := c.Scan(context.Background(), s, func(r *Committed) error {
			last = r
			return nil
		})
		if err != nil {
			return nil, err
		}
		s.To = s.From
	}
	return last, nil
}
