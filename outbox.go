// The outbox: what an event is (its id, JSON and Kafka headers), and the rows that carry events to the relay.
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
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/kafka"
	"wallet/internal/money"
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
// timeFormat. What an entry does not say has no member: a plain deposit, withdrawal or transfer has those of
// version 2 only.
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
	dst = money.Append(dst, e.Amount)
	dst = append(dst, `","balance_before":"`...)
	dst = money.Append(dst, e.Balance.Sub(e.Amount))
	dst = append(dst, `","balance_after":"`...)
	dst = money.Append(dst, e.Balance)
	dst = append(dst, '"')
	if d := e.more; d != nil {
		if !d.Held.IsZero() || !d.HeldChange.IsZero() {
			dst = append(dst, `,"held_before":"`...)
			dst = money.Append(dst, d.Held.Sub(d.HeldChange))
			dst = append(dst, `","held_after":"`...)
			dst = append(money.Append(dst, d.Held), '"')
		}
		if d.OfSeq != 0 {
			dst = append(dst, `,"of_seq":`...)
			dst = strconv.AppendInt(dst, d.OfSeq, 10)
		}
		if d.OfSeq != 0 || e.Kind == kindHold {
			dst = append(dst, `,"remaining":"`...)
			dst = append(money.Append(dst, d.Remaining), '"')
		}
	}
	if e.CounterpartyID != 0 {
		dst = append(dst, `,"counterparty":{"wallet_id":`...)
		dst = strconv.AppendInt(dst, e.CounterpartyID, 10)
		dst = append(dst, `,"seq":`...)
		dst = strconv.AppendInt(dst, e.CounterpartySeq, 10)
		dst = append(dst, '}')
	}
	dst = append(dst, `,"idempotency_key":`...)
	dst = appendText(dst, e.Key)
	if e.more != nil && e.more.noteText != "" {
		inner := e.more.noteText[1 : len(e.more.noteText)-1]
		dst = append(append(dst, ','), inner...)
	}
	dst = append(dst, `,"created_at":"`...)
	dst = e.CreatedAt.UTC().AppendFormat(dst, timeFormat)
	return append(dst, `"}`...)
}

// appendText appends s, which is valid UTF-8, as a JSON string: nothing is escaped but what must be (RFC 8259,
// 7), so that no library's taste shows in an event.
func appendText(dst []byte, s string) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c < ' ':
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return append(dst, '"')
}

// note is what an entry says in words. The ledger stores its JSON object as text, and the event has the same
// members, byte for byte, after its idempotency key. Each is there only where it says something.
type note struct {
	ToID      int64     // of a hold: who will be paid
	ExpiresAt time.Time // of a hold
	Reason    string    // of a release: void or expiry
	State     string    // that a wallet takes on
	Text      string    // why it does
	All       bool      // all that there was: the request named no amount
	Partial   bool      // of a capture: the hold stays open for what remains
	Reference string
	Metadata  string // a JSON object of strings, its members in order
	Client    string // the API key's name; in a transaction's initiating entry only
}

// json is the note as an object, or empty where it says nothing.
func (n *note) json() string {
	if *n == (note{}) {
		return ""
	}
	dst := make([]byte, 0, 128)
	member := func(name string) { dst = append(append(append(dst, `,"`...), name...), `":`...) }
	text := func(name, value string) {
		if value != "" {
			member(name)
			dst = appendText(dst, value)
		}
	}
	flag := func(name string, is bool) {
		if is {
			member(name)
			dst = append(dst, "true"...)
		}
	}
	if n.ToID != 0 {
		member("to_id")
		dst = strconv.AppendInt(dst, n.ToID, 10)
	}
	if !n.ExpiresAt.IsZero() {
		text("expires_at", n.ExpiresAt.UTC().Format(timeFormat))
	}
	text("reason", n.Reason)
	text("state", n.State)
	text("note", n.Text)
	flag("all", n.All)
	flag("partial", n.Partial)
	text("reference", n.Reference)
	if n.Metadata != "" {
		member("metadata")
		dst = append(dst, n.Metadata...)
	}
	text("client", n.Client)
	dst[0] = '{'
	return string(append(dst, '}'))
}

// parseNote reads what json wrote.
func parseNote(text string) (n note, err error) {
	if text == "" {
		return n, nil
	}
	var members struct {
		ToID      int64           `json:"to_id"`
		ExpiresAt time.Time       `json:"expires_at"`
		Reason    string          `json:"reason"`
		State     string          `json:"state"`
		Text      string          `json:"note"`
		All       bool            `json:"all"`
		Partial   bool            `json:"partial"`
		Reference string          `json:"reference"`
		Metadata  json.RawMessage `json:"metadata"`
		Client    string          `json:"client"`
	}
	if err := json.Unmarshal([]byte(text), &members); err != nil {
		return n, fmt.Errorf("note of an entry: %w", err)
	}
	m := &members
	return note{m.ToID, m.ExpiresAt, m.Reason, m.State, m.Text, m.All, m.Partial, m.Reference,
		string(m.Metadata), m.Client}, nil
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

// eventText is a text member out of an event's JSON, by its name, or empty where it has none. It looks at
// those before the idempotency key, the first free text: no text there can look like a member.
func eventText(payload []byte, name string) string {
	head, _, _ := bytes.Cut(payload, []byte(`,"idempotency_key":`))
	_, rest, _ := bytes.Cut(head, []byte(`,"`+name+`":"`))
	text, _, closed := bytes.Cut(rest, []byte{'"'})
	if !closed {
		return ""
	}
	return string(text)
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
