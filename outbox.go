// The outbox and the rows: what a batch adds in its one commit, the outbox's rows among them; how rows are
// read back; an outbox row as the replication stream shows it, and the Kafka record that it becomes; the
// ledger read whole, for recovery and audit.
//
// Touches: rows of entries, holds, reversals, references and the outbox, only ever added or moved on inside
// the caller's database transaction; outbox partitions. Promises: an event is there if and only if its
// entry is, and what is read whole is of one snapshot. What an event says is decided in internal/book.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
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
	"wallet/internal/book"
	"wallet/internal/kafka"
	"wallet/internal/money"
	"wallet/internal/moved"
)

const (
	eventType   = "wallet.entry.v1"
	eventSource = "/v1/wallets" // ce_source; together with ce_subject it is the wallet's path

	// How long the log of what moved is kept, and so how far back -audit -since may go.
	movedKept, auditSpanMax = 49 * time.Hour, 48 * time.Hour
)

// entryColumns is an entry as it is read, wherever it is.
const entryColumns = `e.wallet_id, e.seq, coalesce(e.counterparty_id, 0), coalesce(e.counterparty_seq, 0),
       e.created_at, e.kind::text, e.amount::text, e.balance::text, e.idempotency_key,
       e.of_seq, e.held_change::text, e.held::text, e.remaining::text, e.note`

// entryScan is where entryColumns are scanned to.
type entryScan struct {
	e                           *book.Entry
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
	s.e.More = nil
	if s.ofSeq == nil && s.heldChange == nil && s.held == nil && s.note == nil {
		return nil
	}
	d := new(book.Details)
	s.e.More = d
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
		d.NoteText = *s.note
		d.Note, errs[3] = book.ParseNote(*s.note)
	}
	return errors.Join(errs[:]...)
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
	at, err := book.EventTime(e.payload)
	if err != nil {
		return err
	}
	// jsontext.TimeFormat is a case of RFC3339Nano, for which Go has a fast path.
	if r.At, err = time.Parse(time.RFC3339Nano, string(at)); err != nil {
		return fmt.Errorf("outbox payload: %w", err)
	}
	text := strconv.AppendInt(r.text[:0], e.walletID, 10)
	key := text[:len(text):len(text)]
	id := book.AppendEntryID(text[:0], e.walletID, e.seq) // begins with the key
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

// -----------------------------------------------------------------------------------------------------------
// Rows: what a batch adds, all in its one commit
// -----------------------------------------------------------------------------------------------------------

const (
	insertWallets = `
INSERT INTO wallet (id, currency, balance, seq, entry_at, created_at, creation_key, held, state, state_seq)
SELECT unnest($1::bigint[]), unnest($2::text[]), unnest($3::text[]::numeric[]), unnest($4::bigint[]),
       unnest($5::timestamptz[]), unnest($6::timestamptz[]), nullif(unnest($7::text[]), ''),
       unnest($8::text[]::numeric[]), nullif(unnest($9::text[]), ''), nullif(unnest($10::bigint[]), 0)`

	insertEntries = `
INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance,
                   idempotency_key)
SELECT ` + entryArrays

	entryArrays = `unnest($1::bigint[]), unnest($2::bigint[]), nullif(unnest($3::bigint[]), 0),
       nullif(unnest($4::bigint[]), 0), unnest($5::timestamptz[]), unnest($6::text[]::entry_kind[]),
       unnest($7::text[]::numeric[]), unnest($8::text[]::numeric[]), unnest($9::text[])`

	// Of a batch in which some entry says more.
	insertEntriesWithMore = `
INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance,
                   idempotency_key, of_seq, held_change, held, remaining, note)
SELECT ` + entryArrays + `,
       nullif(unnest($10::bigint[]), 0), nullif(unnest($11::text[]), '')::numeric,
       nullif(unnest($12::text[]), '')::numeric, nullif(unnest($13::text[]), '')::numeric,
       nullif(unnest($14::text[]), '')`

	insertHolds = `
INSERT INTO hold (wallet_id, seq, to_id, amount, captured, remaining, status, expires_at, last_seq)
SELECT unnest($1::bigint[]), unnest($2::bigint[]), nullif(unnest($3::bigint[]), 0),
       unnest($4::text[]::numeric[]), unnest($5::text[]::numeric[]), unnest($6::text[]::numeric[]),
       unnest($7::text[]), unnest($8::timestamptz[]), unnest($9::bigint[])`

	updateHolds = `
UPDATE hold SET captured = n.captured, remaining = n.remaining, status = n.status, last_seq = n.last_seq
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq,
             unnest($3::text[]::numeric[]) AS captured, unnest($4::text[]::numeric[]) AS remaining,
             unnest($5::text[]) AS status, unnest($6::bigint[]) AS last_seq) n
WHERE hold.wallet_id = ANY (ARRAY[n.wallet_id]) AND hold.seq = ANY (ARRAY[n.seq])`

	upsertReversals = `
INSERT INTO reversal (wallet_id, seq, amount, reversed)
SELECT unnest($1::bigint[]), unnest($2::bigint[]), unnest($3::text[]::numeric[]),
       unnest($4::text[]::numeric[])
ON CONFLICT (wallet_id, seq) DO UPDATE SET reversed = excluded.reversed`

	insertReferences = `
INSERT INTO reference (reference, wallet_id, seq)
SELECT unnest($1::text[]), unnest($2::bigint[]), unnest($3::bigint[])`
)

// walletArrays are wallets by column.
type walletArrays struct {
	ids, seqs, stateSeqs                              []int64
	currencies, balances, creationKeys, helds, states []string
	createdAts                                        []time.Time
	entryAts                                          []*time.Time
}

func columnsOf(wallets []*book.Wallet) walletArrays {
	var c walletArrays
	for _, w := range wallets {
		var entryAt *time.Time
		if w.Seq > 0 {
			entryAt = &w.EntryAt
		}
		c.ids, c.seqs = append(c.ids, w.ID), append(c.seqs, w.Seq)
		c.currencies, c.creationKeys = append(c.currencies, w.Currency), append(c.creationKeys, w.CreationKey)
		c.balances = append(c.balances, money.Text(w.Balance))
		c.createdAts, c.entryAts = append(c.createdAts, w.CreatedAt), append(c.entryAts, entryAt)
		c.helds = append(c.helds, money.Text(w.Held))
		c.states, c.stateSeqs = append(c.states, w.State), append(c.stateSeqs, w.StateSeq)
	}
	return c
}

func queueEntries(b *pgx.Batch, entries []book.Entry) {
	n := len(entries)
	ids, seqs, toIDs, toSeqs := make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n)
	ats, kinds, keys := make([]time.Time, n), make([]string, n), make([]string, n)
	amounts, balances := make([]string, n), make([]string, n)
	more := false
	for i := range entries {
		e := &entries[i]
		ids[i], seqs[i], toIDs[i], toSeqs[i] = e.WalletID, e.Seq, e.CounterpartyID, e.CounterpartySeq
		ats[i], kinds[i], keys[i] = e.CreatedAt, e.Kind, e.Key
		amounts[i], balances[i] = money.Text(e.Amount), money.Text(e.Balance)
		more = more || e.More != nil
	}
	args := []any{ids, seqs, toIDs, toSeqs, ats, kinds, amounts, balances, keys}
	if !more {
		b.Queue(insertEntries, args...)
		return
	}
	ofSeqs, notes := make([]int64, n), make([]string, n)
	changes, helds, remainings := make([]string, n), make([]string, n), make([]string, n)
	var references []string
	var referring entryIDs
	for i := range entries {
		e := &entries[i]
		d := e.Says()
		ofSeqs[i], notes[i] = d.OfSeq, d.NoteText
		if !d.HeldChange.IsZero() {
			changes[i] = money.Text(d.HeldChange)
		}
		if !d.Held.IsZero() {
			helds[i] = money.Text(d.Held)
		}
		if d.OfSeq != 0 || e.Kind == book.KindHold {
			remainings[i] = money.Text(d.Remaining)
		}
		if d.Note.Reference != "" && e.Kind != book.KindTransferIn {
			references = append(references, d.Note.Reference)
			referring.add(e.WalletID, e.Seq)
		}
	}
	b.Queue(insertEntriesWithMore, append(args, ofSeqs, changes, helds, remainings, notes)...)
	if len(references) > 0 {
		b.Queue(insertReferences, references, referring.wallets, referring.seqs)
	}
}

func queueHolds(b *pgx.Batch, holds map[book.EntryKey]*book.Hold) {
	var placed, moved struct {
		entryIDs
		toIDs, lastSeqs                        []int64
		amounts, captured, remaining, statuses []string
		expiresAts                             []time.Time
	}
	for _, h := range holds {
		c := &placed
		if h.Exists {
			c = &moved
		}
		if h.Changed {
			c.add(h.WalletID, h.Seq)
			c.toIDs, c.lastSeqs = append(c.toIDs, h.ToID), append(c.lastSeqs, h.LastSeq)
			c.amounts = append(c.amounts, money.Text(h.Amount))
			c.captured = append(c.captured, money.Text(h.Captured))
			c.remaining = append(c.remaining, money.Text(h.Remaining))
			c.statuses = append(c.statuses, h.Status)
			c.expiresAts = append(c.expiresAts, h.ExpiresAt)
		}
	}
	if c := &placed; len(c.seqs) > 0 {
		b.Queue(insertHolds, c.wallets, c.seqs, c.toIDs, c.amounts, c.captured, c.remaining, c.statuses,
			c.expiresAts, c.lastSeqs)
	}
	if c := &moved; len(c.seqs) > 0 {
		b.Queue(updateHolds, c.wallets, c.seqs, c.captured, c.remaining, c.statuses, c.lastSeqs)
	}
}

func queueReversals(b *pgx.Batch, reversals map[book.EntryKey]*book.Reversal) {
	var of entryIDs
	var amounts, reversed []string
	for k, r := range reversals {
		if r.Changed {
			of.add(k.WalletID, k.Seq)
			amounts, reversed = append(amounts, money.Text(r.Amount)), append(reversed,
				money.Text(r.Reversed))
		}
	}
	if len(of.seqs) > 0 {
		b.Queue(upsertReversals, of.wallets, of.seqs, amounts, reversed)
	}
}

const insertOutbox = `
INSERT INTO outbox (aggregate_id, seq, event_type, payload, traceparent)
SELECT unnest($1::bigint[]), unnest($2::bigint[]), '` + eventType + `', unnest($3::text[]),
       nullif(unnest($4::text[]), '')`

// queueOutbox adds the entries' events to a batch that the caller sends within its transaction: an event
// exists if and only if its entry does.
func queueOutbox(b *pgx.Batch, entries []book.Entry) *pgx.QueuedQuery {
	n := len(entries)
	ids, seqs := make([]int64, n), make([]int64, n)
	payloads, traceparents := make([]string, n), make([]string, n)
	var buf []byte
	for i := range entries {
		e := &entries[i]
		buf = book.AppendEvent(buf[:0], e)
		ids[i], seqs[i], payloads[i], traceparents[i] = e.WalletID, e.Seq, string(buf), e.Traceparent
	}
	return b.Queue(insertOutbox, ids, seqs, payloads, traceparents)
}

const (
	walletColumns = `id, currency, balance::text, seq, entry_at, created_at, nullif(held, 0)::text, state,
       state_seq`

	holdColumns = `h.wallet_id, h.seq, coalesce(h.to_id, 0), h.amount, h.captured, h.remaining, h.status,
       h.expires_at, h.last_seq`
)

// entryIDs are entries as two arrays.
type entryIDs struct{ wallets, seqs []int64 }

func (ids *entryIDs) add(walletID, seq int64) {
	ids.wallets, ids.seqs = append(ids.wallets, walletID), append(ids.seqs, seq)
}

func idsOf(keys []book.EntryKey) (ids entryIDs) {
	for _, k := range keys {
		ids.add(k.WalletID, k.Seq)
	}
	return ids
}

func scanWallets(rows pgx.Rows, found map[int64]*book.Wallet) error {
	var w book.Wallet
	var balance string
	var entryAt *time.Time
	var held, state *string
	var stateSeq *int64
	columns := []any{&w.ID, &w.Currency, &balance, &w.Seq, &entryAt, &w.CreatedAt, &held, &state, &stateSeq}
	_, err := pgx.ForEachRow(rows, columns, func() (err error) {
		read := w
		read.Exists = true
		if entryAt != nil {
			read.EntryAt = *entryAt
		}
		if state != nil && stateSeq != nil {
			read.State, read.StateSeq = *state, *stateSeq
		}
		if read.Balance, err = decimal.NewFromString(balance); err == nil && held != nil {
			read.Held, err = decimal.NewFromString(*held)
		}
		found[w.ID] = &read
		return err
	})
	return err
}

// scanBusy marks the wallets that exist but were not locked.
func scanBusy(rows pgx.Rows, wallets map[int64]*book.Wallet) error {
	var id int64
	_, err := pgx.ForEachRow(rows, []any{&id}, func() error {
		w := wallets[id]
		w.Busy = !w.Exists
		return nil
	})
	return err
}

func scanKeys(rows pgx.Rows, byKey map[book.MovementKey]*book.Posted) error {
	for rows.Next() {
		var found book.Posted
		if err := scanPosted(rows, &found); err != nil {
			return err
		}
		byKey[book.MovementKey{WalletID: found.WalletID, Key: found.Key}] = &found
	}
	return rows.Err()
}

func scanHolds(rows pgx.Rows) ([]*book.Hold, error) {
	var holds []*book.Hold
	var h book.Hold
	columns := []any{&h.WalletID, &h.Seq, &h.ToID, &h.Amount, &h.Captured, &h.Remaining, &h.Status,
		&h.ExpiresAt, &h.LastSeq}
	_, err := pgx.ForEachRow(rows, columns, func() error {
		found := h
		found.Exists = true
		holds = append(holds, &found)
		return nil
	})
	return holds, err
}

func scanCreations(rows pgx.Rows, creations map[string]*book.Wallet) error {
	var w book.Wallet
	_, err := pgx.ForEachRow(rows, []any{&w.ID, &w.Currency, &w.CreatedAt, &w.CreationKey}, func() error {
		found := w
		creations[w.CreationKey] = &found
		return nil
	})
	return err
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
func readEntries(ctx context.Context, db querier, where string, args []any, visit entryVisit) error {
	return streamEntries(ctx, db, queryEntries+where, args, visit)
}

func streamEntries(ctx context.Context, db querier, query string, args []any, visit entryVisit) error {
	rows, _ := db.Query(ctx, query, args...)
	defer rows.Close()
	var e book.Entry
	s := entryScan{e: &e}
	columns := append(s.columns(), &e.Currency)
	for rows.Next() {
		fast, err := s.raw(rows)
		if err == nil && !fast {
			err = rows.Scan(columns...)
		}
		if err == nil && !fast {
			err = s.finish()
		}
		if err == nil {
			err = visit(&e)
		}
		if err != nil {
			return fmt.Errorf("read entries: %w", err)
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read entries: %w", err)
	}
	return nil
}

// raw reads a row of entryColumns and the currency by hand, at a third of what Scan costs: a whole ledger is
// read so. It leaves to Scan the entries that say more, and connections that want text.
func (s *entryScan) raw(rows pgx.Rows) (done bool, err error) {
	const at, plain, all = 4, 9, 15 // the time; how many columns a plain entry has; the currency is the last
	fields, values, e := rows.FieldDescriptions(), rows.RawValues(), s.e
	if len(fields) != all || fields[0].Format != pgx.BinaryFormatCode ||
		fields[at].Format != pgx.BinaryFormatCode {
		return false, nil
	}
	for _, more := range values[plain : all-1] {
		if more != nil {
			return false, nil
		}
	}
	for i, n := range []*int64{&e.WalletID, &e.Seq, &e.CounterpartyID, &e.CounterpartySeq} {
		if len(values[i]) != 8 {
			return false, nil
		}
		*n = int64(binary.BigEndian.Uint64(values[i]))
	}
	if len(values[at]) != 8 {
		return false, nil
	}
	e.CreatedAt = postgresEpoch.Add(time.Duration(binary.BigEndian.Uint64(values[at])) * time.Microsecond)
	if kind := values[5]; string(kind) != e.Kind {
		e.Kind = string(kind)
	}
	e.Key = string(values[8])
	if currency := values[all-1]; string(currency) != e.Currency {
		e.Currency = string(currency)
	}
	e.More = nil
	if e.Amount, err = money.Read(values[6]); err == nil {
		e.Balance, err = money.Read(values[7])
	}
	return true, err
}

// postgresEpoch is what Postgres counts microseconds from: 292 years of them fit a Duration.
var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// A movement is read as its initiating entry e, the wallet's currency, the payee's head, what the entry is
// of.
const selectPosted = `
SELECT ` + entryColumns + `, (SELECT w.currency FROM wallet w WHERE w.id = e.wallet_id),
       coalesce((
           SELECT p.balance FROM entry p WHERE p.wallet_id = e.counterparty_id AND p.seq = e.counterparty_seq
       ), 0)::text,
       (SELECT p.held FROM entry p
        WHERE p.wallet_id = e.counterparty_id AND p.seq = e.counterparty_seq)::text,
       (SELECT CASE o.kind WHEN 'transfer_in' THEN o.counterparty_id || '-' || o.counterparty_seq
                           ELSE o.wallet_id || '-' || o.seq END
        FROM entry o WHERE o.wallet_id = e.wallet_id AND o.seq = e.of_seq)`

// scanPosted reads what selectPosted selects, and what stands behind it.
func scanPosted(row pgx.Row, m *book.Posted, more ...any) error {
	s := entryScan{e: &m.Entry}
	var toHeld, of *string
	columns := append(s.columns(), &m.Currency, &m.ToBalance, &toHeld, &of)
	if err := row.Scan(append(columns, more...)...); err != nil {
		return err
	}
	if of != nil {
		m.Of = *of
	}
	if toHeld != nil {
		var err error
		if m.ToHeld, err = decimal.NewFromString(*toHeld); err != nil {
			return err
		}
	}
	return s.finish()
}

// holdsEvent says whether there is such an entry, and its event is this one, byte for byte.
func holdsEvent(ctx context.Context, db querier, walletID, seq int64, payload []byte) (held bool, err error) {
	where := `WHERE e.wallet_id = $1 AND e.seq = $2`
	err = readEntries(ctx, db, where, []any{walletID, seq}, func(e *book.Entry) error {
		held = bytes.Equal(book.AppendEvent(nil, e), payload)
		return nil
	})
	return held, err
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
const outboxAhead = 12 * time.Hour

// makeOutboxPartitions makes the missing partitions from now until outboxAhead. Without one for now
// no write succeeds, so main calls it before it serves and every minute after.
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

// outboxPartition is ten minutes of the outbox; an hour, where schema version 3 made it.
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

// dropOutboxPartitions drops those that ended more than retention ago and of which published is true:
// the relay's leader says so of what its checkpoint is past; without a relay, age alone decides. closed
// remembers, between calls, the end of the WAL that everything in one was committed before; a nil closed
// means that nobody is to publish the rows. Nothing needs them afterwards: the relay reads the WAL, and a
// recovery the ledger.
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

	seqs    map[int64]int64 // of the wallets that were given last
	entries int64

	since int64     // number of the transaction from which on it is audited; 0 is the beginning
	at    time.Time // when that was

	// Transfers: the sum over payers' legs less that over payees', each leg by all that both must agree on.
	// It is zero if and only if they mirror each other, but for one chance in 2^64.
	seed   maphash.Seed
	mirror uint64
	leg    []byte
}

// openAuditedLedger takes the snapshot, which close ends.
func openAuditedLedger(ctx context.Context, databaseURL string, out io.Writer) (
	a *auditedLedger, err error) {
	a = &auditedLedger{report: audit.NewReport(out), seed: maphash.MakeSeed()}
	if a.now, err = pgxpool.New(ctx, databaseURL); err != nil {
		return nil, err
	}
	if a.past, err = pgx.Connect(ctx, databaseURL); err != nil {
		a.now.Close()
		return nil, err
	}
	_, err = a.past.Exec(ctx, `
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0;
SELECT FROM wallet_schema`, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		a.close()
		return nil, fmt.Errorf("begin: %w", err)
	}
	return a, nil
}

func (a *auditedLedger) close() {
	a.past.Close(context.Background())
	a.now.Close()
}

// addLeg adds a transfer's leg to the sum.
func (a *auditedLedger) addLeg(e *book.Entry) {
	from, fromSeq, to, toSeq := e.WalletID, e.Seq, e.CounterpartyID, e.CounterpartySeq
	amount, in := e.Amount, e.Kind == book.KindTransferIn
	if in {
		from, fromSeq, to, toSeq = to, toSeq, from, fromSeq
	} else {
		amount = amount.Neg()
	}
	b := a.leg[:0]
	for _, n := range [...]int64{from, fromSeq, to, toSeq} {
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	b = append(money.Append(b, amount), ' ')
	b = append(append(append(b, e.Currency...), ' '), e.Key...)
	a.leg = b
	if sum := maphash.Bytes(a.seed, b); in {
		a.mirror -= sum
	} else {
		a.mirror += sum
	}
}

// legs finds transfers whose two entries do not mirror each other, so that money appeared or vanished. It is
// asked once all entries have been read, and looks for them only where there are some. Among what moved
// since, there may be some that do: one leg's wallet moved just before, in a transaction that had to wait.
func (a *auditedLedger) legs(ctx context.Context) error {
	if a.mirror == 0 {
		return nil
	}
	find := func(from string, args ...any) error {
		rows, _ := a.past.Query(ctx, `
SELECT e.wallet_id, e.seq FROM `+from+` JOIN wallet w ON w.id = e.wallet_id
LEFT JOIN entry o ON o.wallet_id = e.counterparty_id AND o.seq = e.counterparty_seq
LEFT JOIN wallet v ON v.id = o.wallet_id
WHERE e.counterparty_id IS NOT NULL
  AND (o.counterparty_id, o.counterparty_seq, o.amount, o.idempotency_key, o.kind <> e.kind, v.currency)
  IS DISTINCT FROM (e.wallet_id, e.seq, -e.amount, e.idempotency_key, true, w.currency)`, args...)
		var id, seq int64
		_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
			a.report.Find("entry %s: the other leg of this transfer is missing or does not mirror it",
				book.EntryID(id, seq))
			return nil
		})
		return err
	}
	if a.since == 0 {
		return find("entry e")
	}
	return a.lots(ctx, 500_000, func(m *audit.Moved) error {
		return inBites(m.Keys, m.Firsts, func(ids, firsts []int64) error {
			return find(`unnest($1::bigint[], $2::bigint[]) AS m (id, first)
JOIN entry e ON e.wallet_id = m.id AND e.seq >= m.first`, ids, firsts)
		})
	})
}

// goBack has what moved in a last while audited: from at on, by Postgres' clock.
func (a *auditedLedger) goBack(ctx context.Context, since time.Duration) (at time.Time, err error) {
	if err := a.past.QueryRow(ctx, `SELECT clock_timestamp() - $1::interval`, since).Scan(&at); err != nil {
		return at, err
	}
	xid, known, err := moved.Point(ctx, a.past, at)
	if err == nil && !known {
		err = fmt.Errorf("the log of what moved begins after %s: run `wallet -audit` without -since, or "+
			"with a shorter one", at.UTC().Format(time.RFC3339))
	}
	a.since, a.at = xid, at
	return at, err
}

// conclude says how much was compared, and what an audit of what moved does not prove.
func (a *auditedLedger) conclude(totals audit.Totals, partitions int32) (findings int) {
	findings = a.report.Findings()
	a.report.Note("%d wallets, %d entries, %d events compared in %d partitions, %d events younger than this "+
		"audit: %d findings", totals.Keys, a.entries, totals.Events, partitions, totals.Younger, findings)
	if a.since > 0 {
		a.report.Note("only since %s; not proven: older entries, other wallets, rows of holds, states and "+
			"the like", a.at.UTC().Format(time.RFC3339))
	}
	return findings
}

func (a *auditedLedger) lots(ctx context.Context, n int, do func(*audit.Moved) error) error {
	return moved.Lots(moved.Since(ctx, a.past, a.since), n, func(l *moved.Lot) error {
		m := &audit.Moved{After: l.After, Last: l.Upto, Keys: l.Keys, Firsts: make([]int64, len(l.Keys))}
		for i, id := range l.Keys {
			m.Firsts[i] = l.First[id]
		}
		return do(m)
	})
}

func (a *auditedLedger) headsOf(ctx context.Context, ids []int64, visit func(id, seq int64)) error {
	return visitSeqs(ctx, a.past, ids, visit)
}

func (a *auditedLedger) seqsNow(ctx context.Context, ids []int64, visit func(id, seq int64)) error {
	return visitSeqs(ctx, a.now, ids, visit)
}

func visitSeqs(ctx context.Context, db querier, ids []int64, visit func(id, seq int64)) error {
	rows, _ := db.Query(ctx, `
SELECT id, coalesce(w.seq, 0) FROM unnest($1::bigint[]) AS id LEFT JOIN wallet w USING (id)`, ids)
	var id, seq int64
	_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
		visit(id, seq)
		return nil
	})
	return err
}

func (a *auditedLedger) heads(ctx context.Context, after int64, n int) (map[int64]int64, int64, error) {
	var last int64
	var err error
	a.seqs, last, err = readWalletSeqs(ctx, a.past, after, n)
	return a.seqs, last, err
}

// events makes the events of the entries again, and checks each wallet's chain of entries.
func (a *auditedLedger) events(ctx context.Context, after, last int64, visit func(audit.Event) error) error {
	saw := make(map[string]bool) // what the entries say that a rule is about
	w := &chainWalk{auditedLedger: a, visit: visit, saw: saw}
	err := readChains(ctx, a.past, after, last, w.follow)
	if err != nil {
		return err
	}
	w.finish()
	for _, rule := range sideRules {
		if rule.rows != "" && !saw[rule.about] { // nothing to compare them with: are there any?
			var any bool
			err := a.past.QueryRow(ctx, `SELECT EXISTS (SELECT FROM `+rule.rows+`)`, after, last).Scan(&any)
			if err != nil {
				return err
			}
			if !any {
				continue
			}
		}
		if err := a.rule(ctx, rule.finding, rule.query, after, last); err != nil {
			return err
		}
	}
	return nil
}

// eventsFrom is events for the ends of wallets' chains: each is read from the entry before the first one,
// which it must follow.
func (a *auditedLedger) eventsFrom(ctx context.Context, m *audit.Moved,
	visit func(audit.Event) error) error {
	before, first := make([]int64, len(m.Firsts)), make(map[int64]int64, len(m.Keys))
	for i, seq := range m.Firsts {
		before[i], first[m.Keys[i]] = seq-1, seq
	}
	a.seqs = make(map[int64]int64, len(m.Keys))
	for some := range slices.Chunk(m.Keys, 10_000) {
		if err := a.headsOf(ctx, some, func(id, seq int64) { a.seqs[id] = seq }); err != nil {
			return err
		}
	}
	w := &chainWalk{auditedLedger: a, visit: visit, first: first, saw: make(map[string]bool)}
	if err := readChainsFrom(ctx, a.past, m.Keys, before, w.follow); err != nil {
		return err
	}
	w.finish()
	for some := range slices.Chunk(m.Keys, 10_000) {
		err := a.rule(ctx, sideRules[0].finding, headRule+`WHERE w.id = ANY ($1)`+headRuleHolds, some)
		if err != nil {
			return err
		}
	}
	return nil
}

// rule finds what a query gives, by wallet and number.
func (a *auditedLedger) rule(ctx context.Context, finding, query string, args ...any) error {
	rows, _ := a.past.Query(ctx, query, args...)
	var id, seq int64
	_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
		a.report.Find(finding, id, seq)
		return nil
	})
	return err
}

// chainWalk follows wallets' entries, one wallet after the other.
type chainWalk struct {
	*auditedLedger
	visit func(audit.Event) error
	first map[int64]int64 // where it begins to look, of each wallet, after the entry before; nil: at entry 1
	saw   map[string]bool
	chain book.Chain
	buf   []byte
}

func (w *chainWalk) follow(e *book.Entry) error {
	if e.WalletID != w.chain.Last.WalletID {
		w.finish()
		w.chain = book.Chain{Last: book.Entry{WalletID: e.WalletID}}
		if first := w.first[e.WalletID]; first > 1 {
			w.chain.Midway = true
			if e.Seq == first-1 {
				w.chain.Last = *e
				return nil
			}
		}
	}
	w.entries++
	if w.entries%50_000 == 0 {
		w.report.Progress("ledger: wallet %d, %d entries", e.WalletID, w.entries)
	}
	switch {
	case e.More == nil:
	case e.Kind == book.KindState:
		w.saw["states"] = true
	case !e.More.HeldChange.IsZero():
		w.saw["holds"] = true
	case e.More.OfSeq != 0:
		w.saw["reversals"] = true
	}
	if e.Says().Note.Reference != "" {
		w.saw["references"] = true
	}
	if wrong := w.chain.Follow(e); wrong != "" {
		w.report.Find("entry %s: %s", book.EntryID(e.WalletID, e.Seq), wrong)
	}
	if e.CounterpartyID != 0 {
		w.addLeg(e)
	}
	w.buf = book.AppendEvent(w.buf[:0], e)
	return w.visit(audit.Event{Key: e.WalletID, Number: e.Seq, Value: w.buf})
}

func (w *chainWalk) finish() {
	id, seq := w.chain.Last.WalletID, w.chain.Last.Seq
	if w.seqs[id] != seq {
		w.report.Find("wallet %d has seq %d, but its last entry is number %d", id, w.seqs[id], seq)
	}
	if w.chain.Midway {
		return // what was held before is not known
	}
	var open decimal.Decimal
	for _, remaining := range w.chain.Open {
		open = open.Add(remaining)
	}
	if held := w.chain.Last.Says().Held; !held.Equal(open) {
		w.report.Find("wallet %d: %s is held, but its open holds sum to %s", id, held, open)
	}
}

const (
	headRule = `
SELECT w.id, w.seq FROM wallet w LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
`
	headRuleHolds = `
  AND (w.balance, w.entry_at, w.held) IS DISTINCT FROM
      (coalesce(e.balance, 0), e.created_at, coalesce(e.held, 0))`
)

// auditedTopic is the events topic as an audit reads it.
func auditedTopic(k *kafka.Client, topic string) audit.Topic {
	return audit.Topic{
		Partitions: k.Partitions(),
		Partition: func(walletID int64) (int32, error) {
			return k.Partition(strconv.AppendInt(nil, walletID, 10))
		},
		Bounds: func(partition int32) (from, to int64, err error) {
			s, err := k.Bounds(topic, partition)
			return s.From, s.To, err
		},
		OffsetAt: func(partition int32, at time.Time) (int64, error) {
			return k.OffsetAt(topic, partition, at)
		},
		Scan: func(ctx context.Context, partition int32, from, to int64, visit audit.Visit) error {
			s := kafka.Span{Topic: topic, Partition: partition, From: from, To: to}
			return k.Scan(ctx, s, func(r *kafka.Committed) error {
				id, seq, err := eventIDOf(r)
				visit(r.Offset, audit.Event{Key: id, Number: seq, Value: r.Value}, err)
				return nil
			})
		},
	}
}

// sideRules are what the tables beside the entries must say of the wallets after $1 and up to $2. A rule is
// left out where no entry says what it is about and no row is there.
var sideRules = []struct{ about, rows, finding, query string }{
	{"", "", "wallet %[1]d: its balance, time or held is not its last entry's",
		headRule + `WHERE w.id > $1 AND w.id <= $2` + headRuleHolds},
	{"states", `wallet WHERE state IS NOT NULL AND id > $1 AND id <= $2`,
		"wallet %[1]d: its state is not what its last entry of that kind says", `
SELECT w.id, w.seq FROM wallet w
LEFT JOIN (SELECT wallet_id, max(seq) AS seq FROM entry
           WHERE kind = 'state' AND wallet_id > $1 AND wallet_id <= $2 GROUP BY 1) t ON t.wallet_id = w.id
LEFT JOIN entry s ON s.wallet_id = w.id AND s.seq = t.seq
WHERE w.id > $1 AND w.id <= $2
  AND (w.state_seq, w.state) IS DISTINCT FROM (s.seq, s.note::json ->> 'state')`},
	{"holds", `hold WHERE wallet_id > $1 AND wallet_id <= $2`,
		"hold %d-%d: its row is not what its entries say", `
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
	{"reversals", `reversal WHERE wallet_id > $1 AND wallet_id <= $2`,
		"transaction %d-%d: how much of it was reversed is not what its entries say", `
SELECT coalesce(u.wallet_id, r.wallet_id), coalesce(u.seq, r.seq)
FROM (SELECT wallet_id, of_seq AS seq, sum(abs(amount)) AS undone, min(remaining) AS remaining FROM entry
      WHERE of_seq IS NOT NULL AND held_change IS NULL AND wallet_id > $1 AND wallet_id <= $2 GROUP BY 1, 2) u
JOIN entry e ON e.wallet_id = u.wallet_id AND e.seq = u.seq
FULL JOIN (SELECT * FROM reversal WHERE wallet_id > $1 AND wallet_id <= $2) r
       ON r.wallet_id = u.wallet_id AND r.seq = u.seq
WHERE u.seq IS NULL OR u.undone + u.remaining <> abs(e.amount)
   OR e.kind <> 'transfer_in' AND (r.amount, r.reversed) IS DISTINCT FROM (abs(e.amount), u.undone)`},
	{"references", `reference WHERE wallet_id > $1 AND wallet_id <= $2`,
		"transaction %d-%d: it is not found by its reference", `
SELECT coalesce(e.wallet_id, f.wallet_id), coalesce(e.seq, f.seq)
FROM (SELECT wallet_id, seq, note::json ->> 'reference' AS reference FROM entry
      WHERE note LIKE '%"reference":%' AND kind <> 'transfer_in' AND wallet_id > $1 AND wallet_id <= $2
        AND note::json ->> 'reference' IS NOT NULL) e
FULL JOIN (SELECT * FROM reference WHERE wallet_id > $1 AND wallet_id <= $2) f
       ON f.wallet_id = e.wallet_id AND f.seq = e.seq AND f.reference = e.reference
WHERE e.seq IS NULL OR f.seq IS NULL`},
}

type entryVisit = func(*book.Entry) error

// readWalletSeqs reads the wallets after lo that have entries, at most n of them by id, with the seq of each
// one's last entry; hi is the last one's id.
func readWalletSeqs(ctx context.Context, db *pgx.Conn, lo int64, n int) (
	seqs map[int64]int64, hi int64, err error) {
	rows, _ := db.Query(ctx, `
SELECT w.id, w.seq FROM wallet w WHERE w.id > $1 AND w.seq > 0 ORDER BY w.id LIMIT $2`, lo, n)
	seqs = make(map[int64]int64)
	var seq int64
	_, err = pgx.ForEachRow(rows, []any{&hi, &seq}, func() error { seqs[hi] = seq; return nil })
	if err != nil {
		return nil, 0, fmt.Errorf("read wallets: %w", err)
	}
	return seqs, hi, nil
}

// readChains streams the entries of the wallets after lo and up to hi, wallet by wallet, in order. visit's
// entry is used again.
func readChains(ctx context.Context, db *pgx.Conn, lo, hi int64, visit entryVisit) error {
	_, err := db.Exec(ctx, `SET LOCAL work_mem = '64MB'; SET LOCAL jit = off`,
		pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return err
	}
	return readEntries(ctx, db, `
WHERE w.id > $1 AND w.id <= $2 AND e.wallet_id > $1 AND e.wallet_id <= $2
ORDER BY e.wallet_id, e.seq`, []any{lo, hi}, visit)
}

// readChainsFrom streams the ends of wallets' chains, from an entry of each on, as readChains does. ids are
// in order. It reads nothing else, whatever is in the tables: the plan is a probe of the primary key for
// each.
func readChainsFrom(ctx context.Context, db *pgx.Conn, ids, seqs []int64, visit entryVisit) error {
	_, err := db.Exec(ctx, `SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off; SET LOCAL enable_bitmapscan = off; SET LOCAL jit = off`,
		pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return err
	}
	last := book.Entry{}
	inOrder := func(e *book.Entry) error {
		if e.WalletID < last.WalletID || e.WalletID == last.WalletID && e.Seq <= last.Seq {
			return fmt.Errorf("entry %s came after entry %s", book.EntryID(e.WalletID, e.Seq),
				book.EntryID(last.WalletID, last.Seq))
		}
		last.WalletID, last.Seq = e.WalletID, e.Seq
		return visit(e)
	}
	return inBites(ids, seqs, func(ids, seqs []int64) error {
		return streamEntries(ctx, db, `
SELECT `+entryColumns+`, w.currency
FROM (SELECT m.id, m.first, (SELECT w.currency FROM wallet w WHERE w.id = m.id) AS currency
      FROM unnest($1::bigint[], $2::bigint[]) AS m (id, first) OFFSET 0) w
CROSS JOIN LATERAL (SELECT * FROM entry e WHERE e.wallet_id = w.id AND e.seq >= w.first ORDER BY e.seq) e`,
			[]any{ids, seqs}, inOrder)
	})
}

// inBites calls do with 10,000 at a time of two slices' elements.
func inBites(a, b []int64, do func(a, b []int64) error) error {
	for len(a) > 0 {
		n := min(10_000, len(a))
		if err := do(a[:n], b[:n]); err != nil {
			return err
		}
		a, b = a[n:], b[n:]
	}
	return nil
}
