// The outbox: what an entry is and says, what its event is (its id, JSON and Kafka headers), what an answer
// shows of it, and the rows that a batch adds in its one commit, those of the outbox among them, as written
// and as the replication stream shows them.
//
// Touches: rows of entries, holds, reversals, references and the outbox, only ever added or moved on inside
// the caller's database transaction; outbox partitions. Promises: an event is a pure function of its entry
// (and of the request's traceparent), so it can be rebuilt from the ledger, and two builds of one entry's
// event are equal byte for byte. So is a receipt. The JSON names are a contract: history's items carry the
// same.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/api"
	"wallet/internal/export"
	"wallet/internal/jsontext"
	"wallet/internal/kafka"
	"wallet/internal/money"
)

const (
	eventType   = "wallet.entry.v1"
	eventSource = "/v1/wallets" // ce_source; together with ce_subject it is the wallet's path
	timeFormat  = jsontext.TimeFormat
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
	Remaining  decimal.Decimal // of the hold, or to undo; where OfSeq is not 0, and of a hold
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

// posted is a movement as it stands in the ledger: its initiating entry and, of a transfer, the payee's head
// after it.
type posted struct {
	entry
	toBalance, toHeld decimal.Decimal
	of                string          // the transaction whose entry says.OfSeq is, or empty
	reversed          decimal.Decimal // of this transaction, by now; read by transactions only
}

var (
	errTransactionID = refuse("transaction_id_malformed",
		"A transaction id is <wallet_id>-<seq>, such as 1-1.")
	errHoldID = refuse("hold_id_malformed", "A hold id is <wallet_id>-<seq>, such as 1-1.")
)

// parseEntryID reads the id of a transaction or a hold; malformed is what to say where it is none.
func parseEntryID(s string, malformed *refusal) (walletID, seq int64, err error) {
	wallet, number, _ := strings.Cut(s, "-")
	walletID, err = parseWalletID(wallet)
	seq, seqErr := parseWalletID(number) // the same form
	if err != nil || seqErr != nil {
		return 0, 0, malformed
	}
	return walletID, seq, nil
}

// entryID is an entry's public id, "<wallet_id>-<seq>": the event's id, and for an initiating entry the
// transaction's.
func entryID(walletID, seq int64) string {
	return string(appendEntryID(nil, walletID, seq))
}

func appendEntryID(dst []byte, walletID, seq int64) []byte {
	dst = strconv.AppendInt(dst, walletID, 10)
	dst = append(dst, '-')
	return strconv.AppendInt(dst, seq, 10)
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
	dst = jsontext.AppendText(dst, e.Key)
	if e.more != nil && e.more.noteText != "" {
		inner := e.more.noteText[1 : len(e.more.noteText)-1]
		dst = append(append(dst, ','), inner...)
	}
	dst = append(dst, `,"created_at":"`...)
	dst = e.CreatedAt.UTC().AppendFormat(dst, timeFormat)
	return append(dst, `"}`...)
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
			dst = jsontext.AppendText(dst, value)
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

var (
	errReference = refuse("reference_malformed",
		"The \"reference\" is a string of 1 to %d bytes of printable UTF-8.", noteBytesMax)
	errNote = refuse("note_malformed", "The \"note\" is a string of 1 to %d bytes of printable UTF-8.",
		noteBytesMax)
)

// readNote reads what a movement says in words.
func readNote(body api.Fields, n *note) error {
	text := func(name string, malformed *refusal) (string, error) {
		f, given := body[name]
		if given && (!f.Quoted || len(f.Text) == 0 || len(f.Text) > noteBytesMax || !api.Printable(f.Text)) {
			return "", malformed
		}
		return f.Text, nil
	}
	var err error
	if n.Reference, err = text("reference", errReference); err != nil {
		return err
	}
	if n.Text, err = text("note", errNote); err != nil {
		return err
	}
	if state, given := body["state"]; given {
		if n.State = state.Text; !state.Quoted || !slices.Contains(walletStates, n.State) {
			return refuse("state_malformed", "The \"state\" is one of %s.", strings.Join(walletStates, ", "))
		}
	}
	if metadata, given := body["metadata"]; given {
		var ok bool
		if n.Metadata, ok = api.Canonical(metadata.Text, metadataMembersMax); !ok {
			return refuse("metadata_malformed", "The \"metadata\" is an object of at most %d members, each "+
				"with a name of its own and a string of valid UTF-8.", metadataMembersMax)
		}
		if len(n.Metadata) > metadataBytesMax {
			return refuse("metadata_malformed", "The \"metadata\" may have %d bytes in all; these are %d.",
				metadataBytesMax, len(n.Metadata))
		}
	}
	return nil
}

// Bounds of what a movement says in words.
const (
	noteBytesMax       = 255
	metadataMembersMax = 16
	metadataBytesMax   = 2 << 10
)

var walletStates = []string{stateOpen, stateNoOut, stateFrozen, stateClosed}

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

func columnsOf(wallets []*wallet) walletArrays {
	var c walletArrays
	for _, w := range wallets {
		var entryAt *time.Time
		if w.Seq > 0 {
			entryAt = &w.EntryAt
		}
		c.ids, c.seqs = append(c.ids, w.ID), append(c.seqs, w.Seq)
		c.currencies, c.creationKeys = append(c.currencies, w.Currency), append(c.creationKeys, w.creationKey)
		c.balances = append(c.balances, money.Text(w.Balance))
		c.createdAts, c.entryAts = append(c.createdAts, w.CreatedAt), append(c.entryAts, entryAt)
		c.helds = append(c.helds, money.Text(w.Held))
		c.states, c.stateSeqs = append(c.states, w.State), append(c.stateSeqs, w.StateSeq)
	}
	return c
}

func (p *posting) queueEntries(b *pgx.Batch) {
	n := len(p.entries)
	ids, seqs, toIDs, toSeqs := make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n)
	ats, kinds, keys := make([]time.Time, n), make([]string, n), make([]string, n)
	amounts, balances := make([]string, n), make([]string, n)
	more := false
	for i := range p.entries {
		e := &p.entries[i]
		ids[i], seqs[i], toIDs[i], toSeqs[i] = e.WalletID, e.Seq, e.CounterpartyID, e.CounterpartySeq
		ats[i], kinds[i], keys[i] = e.CreatedAt, e.Kind, e.Key
		amounts[i], balances[i] = money.Text(e.Amount), money.Text(e.Balance)
		more = more || e.more != nil
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
	for i := range p.entries {
		e := &p.entries[i]
		d := e.says()
		ofSeqs[i], notes[i] = d.OfSeq, d.noteText
		if !d.HeldChange.IsZero() {
			changes[i] = money.Text(d.HeldChange)
		}
		if !d.Held.IsZero() {
			helds[i] = money.Text(d.Held)
		}
		if d.OfSeq != 0 || e.Kind == kindHold {
			remainings[i] = money.Text(d.Remaining)
		}
		if d.Note.Reference != "" && e.Kind != kindTransferIn {
			references = append(references, d.Note.Reference)
			referring.add(e.WalletID, e.Seq)
		}
	}
	b.Queue(insertEntriesWithMore, append(args, ofSeqs, changes, helds, remainings, notes)...)
	if len(references) > 0 {
		b.Queue(insertReferences, references, referring.wallets, referring.seqs)
	}
}

func (p *posting) queueHolds(b *pgx.Batch) {
	var placed, moved struct {
		entryIDs
		toIDs, lastSeqs                        []int64
		amounts, captured, remaining, statuses []string
		expiresAts                             []time.Time
	}
	for _, h := range p.holds {
		c := &placed
		if h.exists {
			c = &moved
		}
		if h.changed {
			c.add(h.WalletID, h.Seq)
			c.toIDs, c.lastSeqs = append(c.toIDs, h.ToID), append(c.lastSeqs, h.lastSeq)
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

func (p *posting) queueReversals(b *pgx.Batch) {
	var of entryIDs
	var amounts, reversed []string
	for k, r := range p.reversals {
		if r.changed {
			of.add(k.walletID, k.seq)
			amounts, reversed = append(amounts, money.Text(r.amount)), append(reversed,
				money.Text(r.reversed))
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

// -----------------------------------------------------------------------------------------------------------
// Answers: what the API shows of a movement, a wallet, a hold, a statement
// -----------------------------------------------------------------------------------------------------------

// appendReceipt appends a movement as a JSON object that still lacks its closing brace. It is a pure function
// of the ledger, so that a replay is equal byte for byte. Each kind of entry is shown by one function.
func appendReceipt(dst []byte, m *posted) []byte {
	o := jsontext.Open(slices.Grow(dst, 320))
	shows[m.Kind](&o, m)
	d := m.says()
	if m.captures() {
		o.Text("hold_id", m.of)
		o.Number("remaining", d.Remaining)
		o.Number("held", d.Held)
	} else if m.reverses() {
		o.Text("reverses", m.of)
		o.Number("reversible", d.Remaining)
	}
	appendWords(&o, &d.Note)
	return o.Dst
}

// words are what a movement says in words, where it does.
func appendWords(o *jsontext.Object, n *note) {
	if n.Reference != "" {
		o.Text("reference", n.Reference)
	}
	if n.Metadata != "" {
		o.Name("metadata")
		o.Dst = append(o.Dst, n.Metadata...)
	}
}

var shows = map[string]func(*jsontext.Object, *posted){
	kindDeposit: showOne, kindWithdrawal: showOne, kindTransferOut: showTransfer, kindHold: showHold,
	kindRelease: showRelease, kindState: showState,
}

func appendTransactionID(o *jsontext.Object, m *posted) {
	o.Text("transaction_id", entryID(m.WalletID, m.Seq))
}

// showOne is a movement of one wallet.
func showOne(o *jsontext.Object, m *posted) {
	appendTransactionID(o, m)
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Number("amount", m.Amount.Abs())
	o.Number("balance", m.Balance)
	o.Integer("seq", m.Seq)
	o.Time("created_at", m.CreatedAt)
}

func showTransfer(o *jsontext.Object, m *posted) {
	appendTransactionID(o, m)
	o.Integer("from_id", m.WalletID)
	o.Integer("to_id", m.CounterpartyID)
	o.Text("currency", m.Currency)
	o.Number("amount", m.Amount.Abs())
	o.Number("from_balance", m.Balance)
	o.Number("to_balance", m.toBalance)
	o.Integer("from_seq", m.Seq)
	o.Integer("to_seq", m.CounterpartySeq)
	o.Time("created_at", m.CreatedAt)
}

// head is the wallet's, after the entry.
func appendHead(o *jsontext.Object, m *posted) {
	held := m.says().Held
	o.Number("balance", m.Balance)
	o.Number("held", held)
	o.Number("available", m.Balance.Sub(held))
	o.Integer("seq", m.Seq)
	o.Time("created_at", m.CreatedAt)
}

func showHold(o *jsontext.Object, m *posted) {
	d := m.says()
	o.Text("hold_id", entryID(m.WalletID, m.Seq))
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Number("amount", d.HeldChange)
	o.Number("remaining", d.Remaining)
	o.Text("status", holdOpen)
	o.Time("expires_at", d.Note.ExpiresAt)
	if d.Note.ToID != 0 {
		o.Integer("to_id", d.Note.ToID)
	}
	appendHead(o, m)
}

func showRelease(o *jsontext.Object, m *posted) {
	d := m.says()
	status := holdVoided
	if d.Note.Reason == reasonExpiry {
		status = holdExpired
	}
	o.Text("hold_id", m.of)
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Number("released", d.HeldChange.Neg())
	o.Number("remaining", d.Remaining)
	o.Text("status", status)
	appendHead(o, m)
}

func showState(o *jsontext.Object, m *posted) {
	d := m.says()
	appendTransactionID(o, m)
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Text("state", d.Note.State)
	if d.Note.Text != "" {
		o.Text("note", d.Note.Text)
	}
	appendHead(o, m)
}

// appendTransaction appends a movement as who asks for it later sees it.
func appendTransaction(dst []byte, m *posted) []byte {
	o := jsontext.Object{Dst: appendReceipt(dst, m)}
	o.Text("kind", strings.TrimSuffix(m.Kind, "_out")) // the transaction is a transfer
	o.Text("idempotency_key", m.Key)
	if !m.reversed.IsZero() {
		o.Number("reversed", m.reversed)
	}
	return append(o.Dst, '}')
}

// appendHold appends a hold as it stands now.
func appendHold(dst []byte, h *shownHold) []byte {
	o := jsontext.Open(dst)
	o.Text("hold_id", entryID(h.WalletID, h.Seq))
	o.Integer("wallet_id", h.WalletID)
	o.Text("currency", h.currency)
	o.Number("amount", h.Amount)
	o.Number("captured", h.Captured)
	o.Number("remaining", h.Remaining)
	o.Text("status", h.Status)
	o.Time("expires_at", h.ExpiresAt)
	if h.ToID != 0 {
		o.Integer("to_id", h.ToID)
	}
	o.Time("created_at", h.createdAt)
	appendWords(&o, &h.note)
	return append(o.Dst, '}')
}

// appendHolds is a wallet's head and some of its holds.
func appendHolds(w *wallet, holds []*shownHold) []byte {
	o := jsontext.Open(nil)
	o.Integer("wallet_id", w.ID)
	o.Text("currency", w.Currency)
	o.Number("balance", w.Balance)
	o.Number("held", w.Held)
	o.Number("available", w.available())
	o.Integer("seq", w.Seq)
	o.Name("holds")
	o.Dst = api.AppendList(o.Dst, holds, appendHold)
	return o.Close()
}

func appendWallet(dst []byte, w *wallet) []byte {
	o := jsontext.Open(dst)
	o.Integer("wallet_id", w.ID)
	o.Text("currency", w.Currency)
	o.Number("balance", w.Balance)
	if !w.Held.IsZero() {
		o.Number("held", w.Held)
		o.Number("available", w.available())
	}
	o.Integer("seq", w.Seq)
	if w.State != "" {
		o.Text("state", w.State)
	}
	o.Time("created_at", w.CreatedAt)
	return append(o.Dst, '}')
}

// appendMoment begins what is told of a wallet as it was.
func appendMoment(walletID int64, m *moment) jsontext.Object {
	o := jsontext.Open(nil)
	o.Integer("wallet_id", walletID)
	o.Text("currency", m.currency)
	o.Number("balance", m.balance)
	o.Number("held", m.held)
	o.Number("available", m.balance.Sub(m.held))
	o.Integer("seq", m.seq)
	return o
}

// appendEdge appends one end of a statement.
func appendEdge(o *jsontext.Object, name string, m *moment) {
	o.Name(name)
	inner := jsontext.Open(o.Dst)
	inner.Number("balance", m.balance)
	inner.Number("held", m.held)
	o.Dst = inner.Close()
}

// statementColumns are those of a statement as CSV.
var statementColumns = []string{"seq", "created_at", "transaction_id", "kind", "credit", "debit", "balance",
	"held",
	"counterparty", "reference", "metadata", "idempotency_key"}

// statement is one on its way to a client.
type statement struct {
	ledger     *ledger
	walletID   int64
	head       []byte // of the JSON object, without its closing brace
	begin, end *moment
}

// statement begins a wallet's statement from since until end, which is until; query tells which were asked
// for.
func (l *ledger) statement(ctx context.Context, id int64, query api.Query, since, until time.Time,
	end *moment,
) (*statement, error) {
	first := min(end.low, end.seq+1) // an empty span may end before it begins
	begin, err := l.momentAfter(ctx, id, first-1)
	if err != nil {
		return nil, err
	}
	head := jsontext.Open(nil)
	head.Integer("wallet_id", id)
	head.Text("currency", end.currency)
	if query["since"] != "" {
		head.Time("since", since)
	}
	if query["until"] != "" {
		head.Time("until", until)
	}
	head.Flag("final", end.final)
	appendEdge(&head, "opening", begin)
	appendEdge(&head, "closing", end)
	if first <= end.seq {
		head.Integer("first_seq", first)
		head.Integer("last_seq", end.seq)
	}
	return &statement{ledger: l, walletID: id, head: head.Dst, begin: begin, end: end}, nil
}

func (st *statement) write(ctx context.Context, w io.Writer, format string) error {
	out, err := export.NewWriter(w, format, st.head, statementColumns)
	if err != nil {
		return err
	}
	edge := func(kind string, m *moment) error {
		return out.Row([]string{strconv.FormatInt(m.seq, 10), "", "", kind, "", "", money.Text(m.balance),
			money.Text(m.held), "", "", "", ""})
	}
	if err := edge("opening", st.begin); err != nil {
		return err
	}
	type total struct {
		count int64
		sum   decimal.Decimal
	}
	totals := make(map[string]total)
	var buf []byte
	err = st.ledger.entriesBetween(ctx, st.walletID, st.begin.seq+1, st.end.seq, func(e *entry) error {
		sum := totals[e.Kind]
		totals[e.Kind] = total{sum.count + 1, sum.sum.Add(e.Amount)}
		buf = appendEvent(buf[:0], e)
		return out.Item(buf, func() []string { return statementRow(e) })
	})
	if err != nil {
		return err
	}
	if err := edge("closing", st.end); err != nil {
		return err
	}
	o := jsontext.Open(nil)
	o.Name("totals")
	o.Dst = append(o.Dst, '{')
	for _, kind := range slices.Sorted(maps.Keys(totals)) {
		o.Name(kind)
		inner := jsontext.Open(o.Dst)
		inner.Integer("count", totals[kind].count)
		inner.Number("sum", totals[kind].sum)
		o.Dst = append(inner.Dst, '}')
	}
	o.Dst = append(o.Dst, '}')
	o.Text("sha256", out.Sum())
	if w, ok := w.(http.ResponseWriter); ok {
		w.Header().Set("Statement-Sha256", out.Sum())
	}
	return out.Close("statement", st.head, o.Dst[1:])
}

func statementRow(e *entry) []string {
	credit, debit, counterparty := "", "", ""
	switch {
	case e.Amount.IsPositive():
		credit = money.Text(e.Amount)
	case e.Amount.IsNegative():
		debit = money.Text(e.Amount.Neg())
	}
	if e.CounterpartyID != 0 {
		counterparty = strconv.FormatInt(e.CounterpartyID, 10)
	}
	d := e.says()
	return []string{strconv.FormatInt(e.Seq, 10), e.CreatedAt.UTC().Format(timeFormat),
		string(e.appendTransactionID(nil)), e.Kind, credit, debit, money.Text(e.Balance), money.Text(d.Held),
		counterparty, d.Note.Reference, d.Note.Metadata, e.Key}
}
