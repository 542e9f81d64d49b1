// The outbox: what an event is (its id, JSON and Kafka headers), and the rows that carry events to the relay,
// as written and as the replication stream shows them.
//
// Touches: outbox rows, only ever added inside the caller's database transaction, one per ledger entry;
// outbox partitions.
// Promises: an event is a pure function of its entry (and of the request's traceparent), so it can be
// rebuilt from the ledger, and two builds of one entry's event are equal byte for byte. The JSON names are a
// contract: history's items carry the same.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/kafka"
)

const (
	eventType   = "wallet.entry.v1"
	eventSource = "/v1/wallets" // ce_source; together with ce_subject it is the wallet's path
	// timeFormat is RFC 3339 in UTC with exactly six decimals: a fixed width, which sorts as text and is
	// what Postgres keeps.
	timeFormat = "2006-01-02T15:04:05.000000Z"
)

// appendEvent appends the event's JSON: one object, no white space, names in this order. Amounts are
// decimal strings without trailing zeros, amount signed (negative leaves the wallet); times have
// timeFormat.
func appendEvent(dst []byte, e *entry) []byte {
	dst = append(dst, `{"wallet_id":`...)
	dst = strconv.AppendInt(dst, e.WalletID, 10)
	dst = append(dst, `,"seq":`...)
	dst = strconv.AppendInt(dst, e.Seq, 10)
	dst = append(dst, `,"transaction_id":"`...)
	dst = e.appendTransactionID(dst)
	dst = append(dst, `","kind":"`...)
	dst = append(dst, e.Kind...)
	dst = append(dst, `","currency":"`...)
	dst = append(dst, e.Currency...)
	dst = append(dst, `","amount":"`...)
	dst = appendDecimal(dst, e.Amount)
	dst = append(dst, `","balance_before":"`...)
	dst = appendDecimal(dst, e.Balance.Sub(e.Amount))
	dst = append(dst, `","balance_after":"`...)
	dst = appendDecimal(dst, e.Balance)
	if e.CounterpartyID != 0 {
		dst = append(dst, `","counterparty":{"wallet_id":`...)
		dst = strconv.AppendInt(dst, e.CounterpartyID, 10)
		dst = append(dst, `,"seq":`...)
		dst = strconv.AppendInt(dst, e.CounterpartySeq, 10)
		dst = append(dst, `},"idempotency_key":`...)
	} else {
		dst = append(dst, `","idempotency_key":`...)
	}
	if strings.ContainsAny(e.Key, `"\`) {
		dst = strconv.AppendQuote(dst, e.Key) // printable ASCII only (parseKey), where Go's quoting is JSON's
	} else {
		dst = append(append(append(dst, '"'), e.Key...), '"')
	}
	dst = append(dst, `,"created_at":"`...)
	dst = e.CreatedAt.UTC().AppendFormat(dst, timeFormat)
	return append(dst, `"}`...)
}

// eventTime is the entry's time out of an event's JSON, as text in timeFormat. It reads what appendEvent
// wrote: the last member.
func eventTime(payload []byte) ([]byte, error) {
	tail := len(payload) - len(`"}`)
	if tail < len(timeFormat) || !bytes.HasSuffix(payload[:tail-len(timeFormat)], []byte(`,"created_at":"`)) {
		return nil, fmt.Errorf("outbox payload does not end in created_at: %.300q", payload)
	}
	return payload[tail-len(timeFormat) : tail], nil
}

// eventText is a text member out of an event's JSON, by its name. No earlier member can contain the name:
// the only free text, the idempotency key, comes after those that are asked for (currency, balance_after).
func eventText(payload []byte, name string) (string, error) {
	_, rest, found := bytes.Cut(payload, []byte(`,"`+name+`":"`))
	text, _, closed := bytes.Cut(rest, []byte{'"'})
	if !found || !closed {
		return "", fmt.Errorf("outbox payload has no %s: %.300q", name, payload)
	}
	return string(text), nil
}

// Headers that all events have alike, and the names of the others.
var (
	headerSpecVersion = &kafka.Header{Key: []byte("ce_specversion"), Value: []byte("1.0")}
	headerSource      = &kafka.Header{Key: []byte("ce_source"), Value: []byte(eventSource)}
	headerType        = &kafka.Header{Key: []byte("ce_type"), Value: []byte(eventType)}
	headerContentType = &kafka.Header{Key: []byte("content-type"), Value: []byte("application/json")}

	nameID, nameTime, nameSubject  = []byte("ce_id"), []byte("ce_time"), []byte("ce_subject")
	nameCommitLSN, nameTraceparent = []byte("ce_commitlsn"), []byte("traceparent")
)

// event is one outbox row.
type event struct {
	walletID, seq int64
	payload       []byte
	traceparent   string
	commitLSN     pglogrepl.LSN // of the transaction that wrote it
}

// eventRecord is an event's Kafka record and the memory that it is made of, which may be used again once
// the record has been sent.
type eventRecord struct {
	kafka.Message // its time is the entry's

	headers [9]*kafka.Header
	own     [5]kafka.Header
	text    [64]byte
}

// set makes r the record of e, with whose payload it shares memory. The key is the wallet's id; headers are
// CloudEvents 1.0 in Kafka's binary mode
// (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md), the
// commit LSN of the entry's transaction as an extension, and traceparent where the request had one.
func (r *eventRecord) set(e *event) error {
	at, err := eventTime(e.payload)
	if err != nil {
		return err
	}
	// timeFormat is a case of RFC3339Nano, for which Go has a fast path.
	if r.At, err = time.Parse(time.RFC3339Nano, string(at)); err != nil {
		return fmt.Errorf("outbox payload: %w", err)
	}
	text := strconv.AppendInt(r.text[:0], e.walletID, 10)
	key := text[:len(text):len(text)]
	id := appendEntryID(text[:0], e.walletID, e.seq) // begins with the key
	lsn := appendLSN(id[len(id):], e.commitLSN)
	r.own = [5]kafka.Header{{Key: nameID, Value: id}, {Key: nameTime, Value: at},
		{Key: nameSubject, Value: key}, {Key: nameCommitLSN, Value: lsn}}
	r.headers = [9]*kafka.Header{headerSpecVersion, &r.own[0], headerSource, headerType, &r.own[1], &r.own[2],
		&r.own[3], headerContentType}
	n := 8
	if e.traceparent != "" {
		r.own[4] = kafka.Header{Key: nameTraceparent, Value: []byte(e.traceparent)}
		r.headers[n] = &r.own[4]
		n++
	}
	r.Record = kafka.Record{Key: key, Value: e.payload, Headers: r.headers[:n]}
	return nil
}

// eventRecords makes the records of many events, each time in the same memory.
type eventRecords struct {
	records  []eventRecord
	messages []*kafka.Message
}

// of makes the events' messages, which hold until the next call.
func (r *eventRecords) of(events []event) ([]*kafka.Message, error) {
	r.records = slices.Grow(r.records[:0], len(events))[:len(events)]
	r.messages = slices.Grow(r.messages[:0], len(events))[:len(events)]
	for i := range events {
		if err := r.records[i].set(&events[i]); err != nil {
			return nil, err
		}
		r.messages[i] = &r.records[i].Message
	}
	return r.messages, nil
}

// newestBalances are the balances of the events' wallets after the last event of each.
func newestBalances(events []event) map[int64]cachedBalance {
	newest := make(map[int64]*event)
	for i := range events {
		newest[events[i].walletID] = &events[i]
	}
	balances := make(map[int64]cachedBalance, len(newest))
	for id, e := range newest {
		currency, err := eventText(e.payload, "currency")
		balance, err2 := eventText(e.payload, "balance_after")
		if err := errors.Join(err, err2); err != nil {
			slog.Warn("balance not cached", "event", entryID(id, e.seq), "error", err)
			continue
		}
		balances[id] = cachedBalance{walletID: id, seq: e.seq, currency: currency, balance: balance}
	}
	return balances
}

// eventIDOf reads a record's event id, which must fit its key.
func eventIDOf(r *kafka.Committed) (walletID, seq int64, err error) {
	for _, h := range r.Headers {
		if string(h.Key) == "ce_id" {
			id, number, _ := strings.Cut(string(h.Value), "-")
			if walletID, err = strconv.ParseInt(id, 10, 64); err == nil {
				seq, err = strconv.ParseInt(number, 10, 64)
			}
			if err == nil && id == string(r.Key) {
				return walletID, seq, nil
			}
		}
	}
	return 0, 0, fmt.Errorf("partition %d, offset %d: not an event of this service", r.Partition, r.Offset)
}

// appendLSN appends a position in the WAL as Postgres writes it, such as 16/B374D848.
func appendLSN(dst []byte, lsn pglogrepl.LSN) []byte {
	start := len(dst)
	dst = strconv.AppendUint(dst, uint64(lsn>>32), 16)
	dst = append(dst, '/')
	dst = strconv.AppendUint(dst, uint64(uint32(lsn)), 16)
	for i, c := range dst[start:] {
		if c >= 'a' {
			dst[start+i] = c - 'a' + 'A'
		}
	}
	return dst
}

const insertOutbox = `
INSERT INTO outbox (aggregate_id, seq, event_type, payload, traceparent)
SELECT unnest($1::bigint[]), unnest($2::bigint[]), '` + eventType + `', unnest($3::text[]),
       nullif(unnest($4::text[]), '')`

// queueOutbox adds the entries' events to a batch that the caller sends within its transaction: an event
// exists if and only if its entry does.
func queueOutbox(b *pgx.Batch, entries []entry) *pgx.QueuedQuery {
	n := len(entries)
	ids, seqs := make([]int64, n), make([]int64, n)
	payloads, traceparents := make([]string, n), make([]string, n)
	var buf []byte
	for i := range entries {
		e := &entries[i]
		buf = appendEvent(buf[:0], e)
		ids[i], seqs[i], payloads[i], traceparents[i] = e.WalletID, e.Seq, string(buf), e.traceparent
	}
	return b.Queue(insertOutbox, ids, seqs, payloads, traceparents)
}

// outboxRelations are the tables that a replication stream has described, by their OID; nil if it is not the
// outbox.
type outboxRelations map[uint32]*outboxColumns

var errNotOutbox = errors.New("a row of another table than the outbox")

// add notes what pgoutput's Relation message says.
func (r outboxRelations) add(relation []byte) error {
	var m pglogrepl.RelationMessage
	if err := m.Decode(relation); err != nil {
		return err
	}
	r[m.RelationID] = newOutboxColumns(&m)
	return nil
}

// decode reads pgoutput's Insert message.
func (r outboxRelations) decode(insert []byte) (event, error) {
	if len(insert) < 7 || insert[4] != 'N' {
		return event{}, fmt.Errorf("malformed insert of %d bytes", len(insert))
	}
	columns := r[binary.BigEndian.Uint32(insert)]
	if columns == nil {
		return event{}, errNotOutbox
	}
	return columns.decode(insert[5:])
}

// outboxColumns tells where in a row the columns are that make an event.
type outboxColumns struct {
	walletID, seq, payload, traceparent int

	room []byte // for copies
}

// copy copies a value into room that it shares with its neighbours: one allocation for many rows.
func (c *outboxColumns) copy(value []byte) []byte {
	if len(value) > cap(c.room)-len(c.room) {
		c.room = make([]byte, 0, max(64<<10, len(value)))
	}
	start := len(c.room)
	c.room = append(c.room, value...)
	return c.room[start:len(c.room):len(c.room)]
}

// newOutboxColumns returns nil for another table: Postgres describes the partitions, too, though rows come
// under the root's name.
func newOutboxColumns(m *pglogrepl.RelationMessage) *outboxColumns {
	at := func(name string) int {
		return slices.IndexFunc(m.Columns, func(c *pglogrepl.RelationMessageColumn) bool {
			return c.Name == name
		})
	}
	c := &outboxColumns{walletID: at("aggregate_id"), seq: at("seq"), payload: at("payload"),
		traceparent: at("traceparent")}
	if m.RelationName != "outbox" || min(c.walletID, c.seq, c.payload, c.traceparent) < 0 {
		return nil
	}
	return c
}

// decode reads a row's TupleData. It copies what it keeps: data is the connection's buffer.
func (c *outboxColumns) decode(data []byte) (e event, err error) {
	if len(data) < 2 {
		return e, errors.New("outbox row ends early")
	}
	n := int(binary.BigEndian.Uint16(data))
	data = data[2:]
	for i := range n {
		if len(data) < 1 {
			return e, errors.New("outbox row ends early")
		}
		kind := data[0]
		data = data[1:]
		if kind != pglogrepl.TupleDataTypeText {
			continue // null: traceparent alone may be
		}
		if len(data) < 4 || uint64(len(data)-4) < uint64(binary.BigEndian.Uint32(data)) {
			return e, errors.New("outbox row ends early")
		}
		size := binary.BigEndian.Uint32(data)
		value := data[4 : 4+size]
		data = data[4+size:]
		switch i {
		case c.walletID:
			e.walletID, err = strconv.ParseInt(string(value), 10, 64)
		case c.seq:
			e.seq, err = strconv.ParseInt(string(value), 10, 64)
		case c.payload:
			e.payload = c.copy(value)
		case c.traceparent:
			e.traceparent = string(value)
		}
		if err != nil {
			return e, fmt.Errorf("outbox row: %w", err)
		}
	}
	if e.walletID == 0 || e.seq == 0 || len(e.payload) == 0 {
		return e, errors.New("outbox row without wallet, seq or payload")
	}
	return e, nil
}

// outboxAhead is how far ahead partitions exist: how long a broken keeper may go unnoticed.
const outboxAhead = 48 * time.Hour

// makeOutboxPartitions makes the missing partitions from now until outboxAhead. Without one for the present
// hour no write succeeds, so main calls it before it serves and every minute after.
func makeOutboxPartitions(ctx context.Context, db *pgxpool.Pool) error {
	var made int
	if err := db.QueryRow(ctx, `SELECT outbox_make_partitions($1)`, outboxAhead).Scan(&made); err != nil {
		return fmt.Errorf("make outbox partitions: %w", err)
	}
	if made > 0 {
		slog.InfoContext(ctx, "outbox partitions made", "count", made, "ahead", outboxAhead)
	}
	return nil
}

// outboxPartition is one hour of the outbox.
type outboxPartition struct {
	Name             string
	StartsAt, EndsAt time.Time
	Bytes            int64
}

func listOutboxPartitions(ctx context.Context, db *pgxpool.Pool) ([]outboxPartition, error) {
	rows, _ := db.Query(ctx, `
SELECT name, starts_at, ends_at, bytes FROM outbox_partition ORDER BY starts_at`)
	parts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[outboxPartition])
	if err != nil {
		return nil, fmt.Errorf("list outbox partitions: %w", err)
	}
	return parts, nil
}

// dropOutboxPartitions drops the hours that ended more than retention ago and of which published is true:
// the relay's leader says so of what its checkpoint is past; without a relay, age alone decides. closed
// remembers, between calls, the end of the WAL that everything in an hour was committed before; a nil
// closed means that nobody is to publish the rows.
func dropOutboxPartitions(ctx context.Context, db *pgxpool.Pool, retention time.Duration,
	closed map[string]pglogrepl.LSN, checkpoint pglogrepl.LSN) error {
	parts, err := listOutboxPartitions(ctx, db)
	if err != nil {
		return err
	}
	for _, p := range parts {
		if time.Since(p.EndsAt) < retention {
			break // sorted by time
		}
		if closed != nil {
			if _, ok := closed[p.Name]; !ok {
				var end pgtype.Text
				err := db.QueryRow(ctx, `SELECT outbox_close_partition($1)::text`, p.Name).Scan(&end)
				if err != nil {
					return fmt.Errorf("close outbox partition %s: %w", p.Name, err)
				}
				lsn, err := pglogrepl.ParseLSN(end.String)
				if err != nil {
					return fmt.Errorf("close outbox partition %s: %w", p.Name, err)
				}
				closed[p.Name] = lsn
			}
			if checkpoint < closed[p.Name] {
				continue // not wholly published yet
			}
		}
		if _, err := db.Exec(ctx, `SELECT outbox_drop_partition($1)`, p.Name); err != nil {
			return fmt.Errorf("drop outbox partition %s: %w", p.Name, err)
		}
		delete(closed, p.Name)
		slog.InfoContext(ctx, "outbox partition dropped", "partition", p.Name, "bytes", p.Bytes)
	}
	return nil
}

// outboxSize is for the metrics. Partitions that were made ahead count.
func outboxSize(ctx context.Context, db *pgxpool.Pool) (partitions, bytes float64, err error) {
	err = db.QueryRow(ctx, `
SELECT count(*)::float8, coalesce(sum(bytes), 0)::float8 FROM outbox_partition`).Scan(&partitions, &bytes)
	return partitions, bytes, err
}
