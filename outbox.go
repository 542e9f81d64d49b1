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
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
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
	"github.com/shopspring/decimal"

	"wallet/internal/audit"
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

// entry is one signed leg of a movement of money: entry number Seq of wallet WalletID.
type entry struct {
	WalletID, Seq                   int64
	CounterpartyID, CounterpartySeq int64 // the other leg of a transfer; else 0
	Kind                            string
	Currency                        string
	Amount                          decimal.Decimal // negative leaves the wallet
	Balance                         decimal.Decimal // after this entry
	Key                             string          // idempotency key
	CreatedAt                       time.Time       // whole microseconds; never decreases with Seq
	more                            *details        // nil where it says nothing more

	traceparent string // of the request, for the event; not stored in the ledger
}

// details are what an entry says besides. A capture is a withdrawal or transfer_out that gives back some of
// what is held, a reversal the opposite movement; each leg names the entry of its own wallet that it is of.
type details struct {
	OfSeq      int64           // the same wallet's entry that this one captures, releases or undoes; else 0
	HeldChange decimal.Decimal // positive: reserved; negative: given back
	Held       decimal.Decimal // after this entry
	Remaining  decimal.Decimal // of the hold, or of what can still be undone: where OfSeq is not 0, and of a hold
	Note       note
	noteText   string // Note as its entry has it
}

var nothingMore details

// says is what the entry says besides.
func (e *entry) says() *details {
	if e.more == nil {
		return &nothingMore
	}
	return e.more
}

// captures tells a capture of a hold.
func (e *entry) captures() bool { return e.Kind != kindRelease && e.says().HeldChange.IsNegative() }

// reverses tells a leg that undoes another movement.
func (e *entry) reverses() bool { return e.says().OfSeq != 0 && e.says().HeldChange.IsZero() }

// appendTransactionID appends the public id of the transaction that the entry belongs to: its initiating
// entry's.
func (e *entry) appendTransactionID(dst []byte) []byte {
	if e.Kind == kindTransferIn {
		return appendEntryID(dst, e.CounterpartyID, e.CounterpartySeq)
	}
	return appendEntryID(dst, e.WalletID, e.Seq)
}

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
		b := cachedBalance{walletID: id, seq: e.seq, currency: eventText(e.payload, "currency"),
			balance: eventText(e.payload, "balance_after"),
			held:    cmp.Or(eventText(e.payload, "held_after"), "0")}
		if b.currency == "" || b.balance == "" {
			slog.Warn("balance not cached, since the event tells none", "event", entryID(id, e.seq))
			continue
		}
		balances[id] = b
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

// ---------------------------------------------------------------------------------------------------------
// Audit and recovery: the ledger, read whole
// ---------------------------------------------------------------------------------------------------------

// auditedLedger is the ledger as an audit reads it. While it reads, it checks the ledger's own invariants.
type auditedLedger struct {
	past   *pgx.Conn // a snapshot
	now    *pgxpool.Pool
	report *audit.Report

	seqs    map[int64]int64 // of the wallets that heads gave last
	entries int64
}

// legs finds transfers whose two entries do not mirror each other, so that money appeared or vanished.
func (a *auditedLedger) legs(ctx context.Context) error {
	rows, _ := a.past.Query(ctx, `
SELECT e.wallet_id, e.seq FROM entry e JOIN wallet w ON w.id = e.wallet_id
LEFT JOIN entry o ON o.wallet_id = e.counterparty_id AND o.seq = e.counterparty_seq
LEFT JOIN wallet v ON v.id = o.wallet_id
WHERE e.counterparty_id IS NOT NULL
  AND (o.counterparty_id, o.counterparty_seq, o.amount, o.idempotency_key, o.kind <> e.kind, v.currency)
  IS DISTINCT FROM (e.wallet_id, e.seq, -e.amount, e.idempotency_key, true, w.currency)`)
	var id, seq int64
	_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
		a.report.Find("entry %s: the other leg of this transfer is missing or does not mirror it",
			entryID(id, seq))
		return nil
	})
	return err
}

func (a *auditedLedger) heads(ctx context.Context, after int64, n int) (map[int64]int64, int64, error) {
	var last int64
	var err error
	a.seqs, last, err = readWalletSeqs(ctx, a.past, after, 0, n)
	return a.seqs, last, err
}

func (a *auditedLedger) seqsNow(ctx context.Context, walletIDs []int64, visit func(id, seq int64)) error {
	rows, _ := a.now.Query(ctx, `
SELECT id, coalesce(w.seq, 0) FROM unnest($1::bigint[]) AS id LEFT JOIN wallet w USING (id)`, walletIDs)
	var id, seq int64
	_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
		visit(id, seq)
		return nil
	})
	return err
}

// chain is what is known of one wallet while its entries are read in order.
type chain struct {
	last  entry
	open  map[int64]decimal.Decimal // what remains of each open hold
	left  map[int64]decimal.Decimal // what is left to undo of each entry that was undone in part
	state string
}

// follow says what is wrong with the chain's next entry, or nothing.
func (c *chain) follow(e *entry) string {
	last, d := &c.last, e.says()
	defer func() { c.last = *e }()
	held, of := last.says().Held, c.open[d.OfSeq]
	switch {
	case e.Seq != last.Seq+1:
		return fmt.Sprintf("it follows number %d", last.Seq)
	case !e.Balance.Equal(last.Balance.Add(e.Amount)):
		return "its balance is not the former one plus its amount"
	case e.CreatedAt.Before(last.CreatedAt):
		return "it is older than the one before it"
	case !d.Held.Equal(held.Add(d.HeldChange)):
		return "what it holds is not what was held before plus its change"
	case d.Held.IsNegative() || d.Held.GreaterThan(e.Balance):
		return "more is held than there is"
	case !stateLets(c.state, e):
		return "the wallet was " + c.state
	}
	switch {
	case e.Kind == kindHold:
		if c.open == nil {
			c.open = make(map[int64]decimal.Decimal)
		}
		c.open[e.Seq] = d.HeldChange
	case e.Kind == kindState:
		c.state = d.Note.State
	case !d.HeldChange.IsZero(): // a capture or a release
		if of.IsZero() {
			return "there is no open hold that it could be of"
		}
		if c.open[d.OfSeq] = d.Remaining; d.Remaining.IsZero() {
			delete(c.open, d.OfSeq)
		}
		taken := e.Amount.Abs()
		if !d.HeldChange.Equal(d.Remaining.Sub(of)) || taken.GreaterThan(of) ||
			!d.Remaining.IsZero() && !taken.Equal(of.Sub(d.Remaining)) {
			return "it does not fit what remained of its hold"
		}
	case d.OfSeq != 0: // a reversal
		if c.left == nil {
			c.left = make(map[int64]decimal.Decimal)
		}
		was, again := c.left[d.OfSeq]
		c.left[d.OfSeq] = d.Remaining
		if again && !d.Remaining.Equal(was.Sub(e.Amount.Abs())) {
			return "it does not fit what was left to undo"
		}
	}
	return ""
}

// stateLets says whether a wallet of a state takes an entry, as state_allows_entry in schema.sql does.
func stateLets(state string, e *entry) bool {
	switch state {
	case stateNoOut:
		return e.captures() || e.Kind != kindWithdrawal && e.Kind != kindTransferOut && e.Kind != kindHold
	case stateFrozen:
		return e.Kind == kindRelease || e.Kind == kindState
	case stateClosed:
		return false
	}
	return true
}

// events makes the events of the entries again, and checks each wallet's chain of entries.
func (a *auditedLedger) events(ctx context.Context, after, last int64, visit func(audit.Event) error) error {
	var c chain
	var buf []byte
	finish := func() {
		id, seq := c.last.WalletID, c.last.Seq
		if a.seqs[id] != seq {
			a.report.Find("wallet %d has seq %d, but its last entry is number %d", id, a.seqs[id], seq)
		}
		var open decimal.Decimal
		for _, remaining := range c.open {
			open = open.Add(remaining)
		}
		if held := c.last.says().Held; !held.Equal(open) {
			a.report.Find("wallet %d: %s is held, but its open holds sum to %s", id, held, open)
		}
	}
	err := readChains(ctx, a.past, after, last, 0, func(e *entry) error {
		a.entries++
		if a.entries%50_000 == 0 {
			a.report.Progress("ledger: wallet %d, %d entries", e.WalletID, a.entries)
		}
		if e.WalletID != c.last.WalletID {
			finish()
			c = chain{last: entry{WalletID: e.WalletID}}
		}
		if wrong := c.follow(e); wrong != "" {
			a.report.Find("entry %s: %s", entryID(e.WalletID, e.Seq), wrong)
		}
		buf = appendEvent(buf[:0], e)
		return visit(audit.Event{Key: e.WalletID, Number: e.Seq, Value: buf})
	})
	if err != nil {
		return err
	}
	finish()
	for _, rule := range sideRules {
		rows, _ := a.past.Query(ctx, rule.query, after, last)
		var id, seq int64
		_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
			a.report.Find(rule.finding, entryID(id, seq))
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// sideRules are what the tables beside the entries must say of the wallets after $1 and up to $2.
var sideRules = []struct{ finding, query string }{
	{"wallet of entry %s: its balance, time, held or state is not what its entries say", `
SELECT w.id, w.seq FROM wallet w LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
LEFT JOIN (SELECT wallet_id, max(seq) AS seq FROM entry
           WHERE kind = 'state' AND wallet_id > $1 AND wallet_id <= $2 GROUP BY 1) t ON t.wallet_id = w.id
LEFT JOIN entry s ON s.wallet_id = w.id AND s.seq = t.seq
WHERE w.id > $1 AND w.id <= $2
  AND (w.balance, w.entry_at, w.held, w.state_seq, w.state) IS DISTINCT FROM
      (coalesce(e.balance, 0), e.created_at, coalesce(e.held, 0), s.seq, s.note::json ->> 'state')`},
	{"hold %s: its row is not what its entries say", `
SELECT coalesce(h.wallet_id, e.wallet_id), coalesce(h.seq, e.seq)
FROM (SELECT * FROM hold WHERE wallet_id > $1 AND wallet_id <= $2) h
FULL JOIN (SELECT * FROM entry WHERE kind = 'hold' AND wallet_id > $1 AND wallet_id <= $2) e
       ON e.wallet_id = h.wallet_id AND e.seq = h.seq
LEFT JOIN (SELECT wallet_id, of_seq, sum(-amount) AS captured, max(seq) AS last, min(remaining) AS remaining
           FROM entry WHERE held_change < 0 AND wallet_id > $1 AND wallet_id <= $2 GROUP BY 1, 2) c
       ON c.wallet_id = e.wallet_id AND c.of_seq = e.seq
LEFT JOIN entry l ON l.wallet_id = e.wallet_id AND l.seq = c.last
WHERE (h.amount, h.captured, h.remaining, h.last_seq, h.to_id, h.expires_at, h.status) IS DISTINCT FROM
      (e.held_change, coalesce(c.captured, 0), coalesce(c.remaining, e.remaining), coalesce(c.last, e.seq),
       (e.note::json ->> 'to_id')::bigint, (e.note::json ->> 'expires_at')::timestamptz,
       CASE WHEN coalesce(c.remaining, e.remaining) > 0 THEN 'open' WHEN l.kind <> 'release' THEN 'captured'
            WHEN l.note::json ->> 'reason' = 'void' THEN 'voided' ELSE 'expired' END)`},
	{"transaction %s: how much of it was reversed is not what its entries say", `
SELECT coalesce(u.wallet_id, r.wallet_id), coalesce(u.seq, r.seq)
FROM (SELECT wallet_id, of_seq AS seq, sum(abs(amount)) AS undone, min(remaining) AS remaining FROM entry
      WHERE of_seq IS NOT NULL AND held_change IS NULL AND wallet_id > $1 AND wallet_id <= $2 GROUP BY 1, 2) u
JOIN entry e ON e.wallet_id = u.wallet_id AND e.seq = u.seq
FULL JOIN (SELECT * FROM reversal WHERE wallet_id > $1 AND wallet_id <= $2) r
       ON r.wallet_id = u.wallet_id AND r.seq = u.seq
WHERE u.seq IS NULL OR u.undone + u.remaining <> abs(e.amount)
   OR e.kind <> 'transfer_in' AND (r.amount, r.reversed) IS DISTINCT FROM (abs(e.amount), u.undone)`},
	{"transaction %s: it is not found by its reference", `
SELECT coalesce(e.wallet_id, f.wallet_id), coalesce(e.seq, f.seq)
FROM (SELECT wallet_id, seq, note::json ->> 'reference' AS reference FROM entry
      WHERE note LIKE '%"reference":%' AND kind <> 'transfer_in' AND wallet_id > $1 AND wallet_id <= $2
        AND note::json ->> 'reference' IS NOT NULL) e
FULL JOIN (SELECT * FROM reference WHERE wallet_id > $1 AND wallet_id <= $2) f
       ON f.wallet_id = e.wallet_id AND f.seq = e.seq AND f.reference = e.reference
WHERE e.seq IS NULL OR f.seq IS NULL`},
}

// The conditions on wallets and entries for those that were written by the transaction with number $4 or one
// above.
const (
	walletSince = ` AND age(w.xmin) BETWEEN 0 AND age($4::xid8::xid)`
	entrySince  = `age(e.xmin) BETWEEN 0 AND age($4::xid8::xid)`
)

// writtenSince adds a condition and its argument; from 0 on, everything was written.
func writtenSince(xid int64, condition string, args ...any) (string, []any) {
	if xid == 0 {
		return "", args
	}
	return condition, append(args, strconv.FormatInt(xid, 10))
}

// readWalletSeqs reads the wallets after lo that were written since xid, at most n of them by id, with the
// seq of each one's last entry; hi is the last one's id.
func readWalletSeqs(ctx context.Context, db *pgx.Conn, lo, xid int64, n int) (
	seqs map[int64]int64, hi int64, err error) {
	where, args := writtenSince(xid, walletSince, lo, n, 0)
	rows, _ := db.Query(ctx, `
SELECT w.id, w.seq FROM wallet w WHERE w.id > $1 AND w.seq > $3`+where+` ORDER BY w.id LIMIT $2`, args...)
	seqs = make(map[int64]int64)
	var seq int64
	_, err = pgx.ForEachRow(rows, []any{&hi, &seq}, func() error { seqs[hi] = seq; return nil })
	if err != nil {
		return nil, 0, fmt.Errorf("read wallets: %w", err)
	}
	return seqs, hi, nil
}

// readChains streams the entries of the wallets after lo and up to hi that were written since xid, wallet by
// wallet, in order. visit's entry is used again.
func readChains(ctx context.Context, db *pgx.Conn, lo, hi, xid int64, visit func(*entry) error) error {
	// Where a chain crosses xid is found by steps back from its end, each twice as long as the one before, up
	// to an entry that was written earlier.
	where, args := writtenSince(xid, walletSince+` AND `+entrySince+` AND e.seq > coalesce((
    SELECT w.seq - (1::bigint << k) FROM generate_series(0, 62) k
    WHERE 1::bigint << k < w.seq AND EXISTS (
        SELECT FROM entry e
        WHERE e.wallet_id = w.id AND e.seq = w.seq - (1::bigint << k) AND NOT `+entrySince+`)
    ORDER BY k LIMIT 1), 0)`, lo, hi, 0)
	return readEntries(ctx, db, `
WHERE w.id > $1 AND w.id <= $2 AND e.wallet_id > $1 AND e.wallet_id <= $2 AND w.seq > $3`+where+`
ORDER BY e.wallet_id, e.seq`, args, visit)
}

const queryEntries = `
SELECT ` + entryColumns + `, w.currency
FROM wallet w JOIN entry e ON e.wallet_id = w.id
`

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// readEntries streams entries. visit's entry is used again.
func readEntries(ctx context.Context, db querier, where string, args []any, visit func(*entry) error) error {
	rows, _ := db.Query(ctx, queryEntries+where, args...)
	var e entry
	s := entryScan{e: &e}
	_, err := pgx.ForEachRow(rows, append(s.columns(), &e.Currency), func() error {
		if err := s.finish(); err != nil {
			return err
		}
		return visit(&e)
	})
	if err != nil {
		return fmt.Errorf("read entries: %w", err)
	}
	return nil
}

// entryColumns is an entry as it is read, wherever it is.
const entryColumns = `e.wallet_id, e.seq, coalesce(e.counterparty_id, 0), coalesce(e.counterparty_seq, 0),
       e.created_at, e.kind::text, e.amount::text, e.balance::text, e.idempotency_key,
       e.of_seq, e.held_change::text, e.held::text, e.remaining::text, e.note`

// entryScan is where entryColumns are scanned to.
type entryScan struct {
	e                           *entry
	ofSeq                       *int64
	heldChange, held, remaining *string
	note                        *string
}

func (s *entryScan) columns() []any {
	e := s.e
	return []any{&e.WalletID, &e.Seq, &e.CounterpartyID, &e.CounterpartySeq, &e.CreatedAt, &e.Kind, &e.Amount,
		&e.Balance, &e.Key, &s.ofSeq, &s.heldChange, &s.held, &s.remaining, &s.note}
}

// finish makes the entry's details of what was scanned.
func (s *entryScan) finish() error {
	s.e.more = nil
	if s.ofSeq == nil && s.heldChange == nil && s.held == nil && s.note == nil {
		return nil
	}
	d := new(details)
	s.e.more = d
	if s.ofSeq != nil {
		d.OfSeq = *s.ofSeq
	}
	var errs [4]error
	number := func(text *string) (n decimal.Decimal, err error) {
		if text != nil {
			n, err = decimal.NewFromString(*text)
		}
		return n, err
	}
	d.HeldChange, errs[0] = number(s.heldChange)
	d.Held, errs[1] = number(s.held)
	d.Remaining, errs[2] = number(s.remaining)
	if s.note != nil {
		d.noteText = *s.note
		d.Note, errs[3] = parseNote(*s.note)
	}
	return errors.Join(errs[:]...)
}

// holdsEvent says whether there is such an entry, and its event is this one, byte for byte.
func holdsEvent(ctx context.Context, db querier, walletID, seq int64, payload []byte) (held bool, err error) {
	where := `WHERE e.wallet_id = $1 AND e.seq = $2`
	err = readEntries(ctx, db, where, []any{walletID, seq}, func(e *entry) error {
		held = bytes.Equal(appendEvent(nil, e), payload)
		return nil
	})
	return held, err
}
