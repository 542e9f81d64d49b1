// The writing: what the events say, chunk by chunk, each a commit.
//
// Adds rows to wallet, entry, hold, reversal and reference, and moves on wallets and holds that are there.
// Promises that after each commit every wallet is a whole beginning of its chain, with the side tables that
// belong to it: whoever comes next sees by the wallets' numbers what is there.

package rebuild

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/book"
	"wallet/internal/money"
)

// What is in one commit. Many, since a wallet's row is written once for all of its events in it.
const (
	chunkMax   = 30_000  // events
	chunkBytes = 8 << 20 // of their payloads, which may have notes of 8 KiB
)

// writing is the second reading of the topic.
type writing struct {
	topic    Topic
	ledger   Ledger
	skip     map[int64]bool
	progress *progress

	events, written, skipped atomic.Int64
}

// partition writes what the events of a partition say. While one chunk is at Postgres, the next is read.
func (w *writing) partition(ctx context.Context, p int32) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	chunks := make(chan []Event)
	go func() {
		defer close(chunks)
		chunk, size := make([]Event, 0, chunkMax), 0
		hand := func() error {
			if len(chunk) == 0 {
				return nil
			}
			select {
			case chunks <- chunk:
				chunk, size = make([]Event, 0, chunkMax), 0
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := w.topic.Scan(ctx, p, func(e *Event) error {
			if w.skip[e.WalletID] {
				w.skipped.Add(1)
				return nil
			}
			chunk, size = append(chunk, *e), size+len(e.Payload)
			if len(chunk) < chunkMax && size < chunkBytes {
				return nil
			}
			return hand()
		})
		if err == nil {
			err = hand()
		}
		if err != nil {
			cancel(err)
		}
	}()
	span := w.topic.Partitions[p]
	for chunk := range chunks {
		last := chunk[len(chunk)-1].Offset
		n, err := w.ledger.Write(ctx, chunk)
		if err != nil {
			return err
		}
		w.events.Add(int64(len(chunk)))
		w.written.Add(int64(n))
		w.progress.events.Add(int64(len(chunk)))
		w.progress.set(p, float64(last+1-span.From)/float64(span.To-span.From))
	}
	return context.Cause(ctx)
}

// Postgres is a ledger in a database with this service's schema.
type Postgres struct {
	Pool *pgxpool.Pool // without a limit to a statement's time
	// Alone fails when others may write by now. It is asked before each commit.
	Alone func(context.Context) error

	empty bool // it had no wallet: nothing need be looked up
}

// NewPostgres looks at the ledger.
func NewPostgres(ctx context.Context, pool *pgxpool.Pool, alone func(context.Context) error) (
	*Postgres, error) {
	l := &Postgres{Pool: pool, Alone: alone}
	err := pool.QueryRow(ctx, `SELECT NOT EXISTS (SELECT FROM wallet)`).Scan(&l.empty)
	return l, err
}

// Currencies is Ledger's.
func (l *Postgres) Currencies(ctx context.Context) (map[string]bool, error) {
	rows, _ := l.Pool.Query(ctx, `SELECT code FROM currency`)
	known := make(map[string]bool)
	var code string
	_, err := pgx.ForEachRow(rows, []any{&code}, func() error { known[code] = true; return nil })
	return known, err
}

// EachHead is Ledger's.
func (l *Postgres) EachHead(ctx context.Context, visit func(id, seq int64) error) error {
	if l.empty {
		return nil
	}
	rows, _ := l.Pool.Query(ctx, `SELECT id, seq FROM wallet`)
	var id, seq int64
	_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error { return visit(id, seq) })
	return err
}

const queryHeads = `
SELECT w.id, w.seq, w.currency, w.balance::text, w.held::text, coalesce(w.entry_at, w.created_at),
       coalesce(w.state, ''), e.seq IS NOT NULL,
       coalesce(e.counterparty_id, 0), coalesce(e.counterparty_seq, 0),
       coalesce(e.created_at, w.created_at), coalesce(e.kind::text, ''), coalesce(e.amount, 0)::text,
       coalesce(e.balance, 0)::text, coalesce(e.idempotency_key, ''), coalesce(e.of_seq, 0),
       coalesce(e.held_change, 0)::text, coalesce(e.held, 0)::text, coalesce(e.remaining, 0)::text,
       coalesce(e.note, '')
FROM unnest($1::bigint[]) AS u (id) JOIN wallet w ON w.id = u.id
LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq`

// Heads is Ledger's.
func (l *Postgres) Heads(ctx context.Context, ids []int64) (map[int64]Head, error) {
	rows, _ := l.Pool.Query(ctx, queryHeads, ids)
	heads := make(map[int64]Head, len(ids))
	var w book.Wallet
	var e book.Entry
	var d book.Details
	var there bool
	columns := []any{&w.ID, &w.Seq, &w.Currency, &w.Balance, &w.Held, &w.EntryAt, &w.State, &there,
		&e.CounterpartyID, &e.CounterpartySeq, &e.CreatedAt, &e.Kind, &e.Amount, &e.Balance, &e.Key, &d.OfSeq,
		&d.HeldChange, &d.Held, &d.Remaining, &d.NoteText}
	_, err := pgx.ForEachRow(rows, columns, func() error {
		h := Head{Wallet: w}
		if there {
			last, more := e, d
			last.WalletID, last.Seq, last.Currency, last.More = w.ID, w.Seq, w.Currency, &more
			h.Last = &last
		}
		heads[w.ID] = h
		return nil
	})
	return heads, err
}

// Open is Ledger's.
func (l *Postgres) Open(ctx context.Context, id int64) (map[int64]decimal.Decimal, error) {
	rows, _ := l.Pool.Query(ctx,
		`SELECT seq, remaining::text FROM hold WHERE wallet_id = $1 AND status = 'open'`, id)
	open := make(map[int64]decimal.Decimal)
	var seq int64
	var remaining decimal.Decimal
	_, err := pgx.ForEachRow(rows, []any{&seq, &remaining},
		func() error { open[seq] = remaining; return nil })
	return open, err
}

const (
	queryNumbers = `
SELECT w.id, w.seq FROM unnest($1::bigint[]) AS u (id) JOIN wallet w ON w.id = u.id`

	// Wallets come first, since entry_fits_wallet asks that a wallet's row is at its last entry when that
	// comes.
	copyWallets = `
COPY wallet (id, currency, balance, seq, entry_at, created_at, held, state, state_seq) FROM STDIN`

	// Of wallets whose held and state were not touched: closed_is_final runs for each row whose state is set.
	updateWallets = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[])::numeric AS balance, unnest($3::bigint[]) AS seq,
             unnest($4::timestamptz[]) AS entry_at) n
WHERE wallet.id = n.id`

	updateHeads = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at, held = n.held,
    state = coalesce(n.state, wallet.state), state_seq = coalesce(n.state_seq, wallet.state_seq)
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[])::numeric AS balance, unnest($3::bigint[]) AS seq,
             unnest($4::timestamptz[]) AS entry_at, unnest($5::text[])::numeric AS held,
             nullif(unnest($6::text[]), '') AS state, nullif(unnest($7::bigint[]), 0) AS state_seq) n
WHERE wallet.id = n.id`

	copyHolds = `
COPY hold (wallet_id, seq, to_id, amount, captured, remaining, status, expires_at, last_seq) FROM STDIN`

	updateHolds = `
UPDATE hold SET captured = trim_scale(hold.captured + n.captured), remaining = n.remaining, status = n.status,
    last_seq = n.last_seq
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq,
             unnest($3::text[])::numeric AS captured, unnest($4::text[])::numeric AS remaining,
             unnest($5::text[]) AS status, unnest($6::bigint[]) AS last_seq) n
WHERE hold.wallet_id = n.wallet_id AND hold.seq = n.seq`

	// Of a transaction that was undone in part before, the amount is known already.
	upsertReversals = `
INSERT INTO reversal (wallet_id, seq, amount, reversed)
SELECT unnest($1::bigint[]), unnest($2::bigint[]), unnest($3::text[])::numeric, unnest($4::text[])::numeric
ON CONFLICT (wallet_id, seq) DO UPDATE SET reversed = trim_scale(reversal.reversed + excluded.reversed)`

	copyEntries = `
COPY entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance,
            idempotency_key, of_seq, held_change, held, remaining, note) FROM STDIN`

	copyReferences = `COPY reference (reference, wallet_id, seq) FROM STDIN`
)

// Write is Ledger's.
func (l *Postgres) Write(ctx context.Context, events []Event) (written int, err error) {
	err = pgx.BeginFunc(ctx, l.Pool, func(tx pgx.Tx) error {
		numbers, err := l.numbers(ctx, tx, events)
		if err != nil {
			return err
		}
		c := newChunk(len(events), numbers)
		// By wallet, so that its entries are neighbours in table and index, and rows are found in the index's
		// order. Each one's stay in order.
		slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.WalletID, b.WalletID) })
		for i := range events {
			if events[i].Seq <= numbers[events[i].WalletID] {
				continue
			}
			e, err := book.ParseEvent(events[i].Payload)
			if err != nil {
				return err
			}
			c.add(&e)
		}
		if written = c.entries; written == 0 {
			return nil
		}
		if err := c.write(ctx, tx); err != nil {
			return err
		}
		return l.Alone(ctx) // from here on it is committed, with all that belongs to it
	})
	if err != nil {
		return 0, fmt.Errorf("write: %w", err)
	}
	return written, nil
}

// numbers are those of the last entries of the wallets that are there.
func (l *Postgres) numbers(ctx context.Context, tx pgx.Tx, events []Event) (map[int64]int64, error) {
	if l.empty {
		return nil, nil
	}
	met := make(map[int64]bool, len(events))
	ids := make([]int64, 0, len(events))
	for i := range events {
		if id := events[i].WalletID; !met[id] {
			met[id] = true
			ids = append(ids, id)
		}
	}
	numbers := make(map[int64]int64, len(ids))
	rows, _ := tx.Query(ctx, queryNumbers, ids)
	var id, seq int64
	_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error { numbers[id] = seq; return nil })
	return numbers, err
}

// walletAfter is a wallet as it stands after the chunk.
type walletAfter struct {
	book.Wallet
	beyond bool // it was said what is held, or a state
}

// chunk is what some events come to.
type chunk struct {
	numbers    map[int64]int64 // of the wallets that are there, as far as was looked
	entries    int
	wallets    []walletAfter
	holds      map[book.EntryKey]*book.Hold
	reversals  map[book.EntryKey]*book.Reversal
	text       buffer // of COPY: entries
	references buffer
}

func newChunk(n int, numbers map[int64]int64) *chunk {
	return &chunk{numbers: numbers, holds: make(map[book.EntryKey]*book.Hold),
		reversals: make(map[book.EntryKey]*book.Reversal), text: buffer{bytes: make([]byte, 0, n*140)}}
}

// add takes an entry up. It follows from those before it, and a wallet's come together.
func (c *chunk) add(e *book.Entry) {
	c.entries++
	c.text.entry(e)
	d := e.Says()
	if n := len(c.wallets); n == 0 || c.wallets[n-1].ID != e.WalletID {
		_, there := c.numbers[e.WalletID]
		c.wallets = append(c.wallets, walletAfter{Wallet: book.Wallet{ID: e.WalletID,
			CreatedAt: e.CreatedAt, Exists: there || e.Seq > 1}})
	}
	w := &c.wallets[len(c.wallets)-1]
	w.beyond = w.beyond || e.Kind == book.KindState || !d.HeldChange.IsZero()
	w.Currency, w.Seq, w.EntryAt, w.Balance, w.Held = e.Currency, e.Seq, e.CreatedAt, e.Balance, d.Held
	switch {
	case e.Kind == book.KindState:
		w.State, w.StateSeq = d.Note.State, e.Seq
	case e.Kind == book.KindHold:
		c.holds[book.EntryKey{WalletID: e.WalletID, Seq: e.Seq}] = &book.Hold{WalletID: e.WalletID,
			Seq:  e.Seq,
			ToID: d.Note.ToID, Amount: d.HeldChange, Remaining: d.Remaining, Status: book.HoldOpen,
			ExpiresAt: d.Note.ExpiresAt, LastSeq: e.Seq}
	case d.HeldChange.IsNegative():
		c.endHold(e, d)
	case d.OfSeq != 0 && e.Kind != book.KindTransferOut: // whose other leg is of the initiating entry
		k := book.EntryKey{WalletID: e.WalletID, Seq: d.OfSeq}
		r := c.reversals[k]
		if r == nil {
			r = &book.Reversal{Amount: d.Remaining.Add(e.Amount.Abs())}
			c.reversals[k] = r
		}
		r.Reversed = r.Reversed.Add(e.Amount.Abs())
	}
	if d.Note.Reference != "" && e.Kind != book.KindTransferIn {
		c.references.reference(e.WalletID, e.Seq, d.Note.Reference)
	}
}

// endHold moves a hold on, or ends it.
func (c *chunk) endHold(e *book.Entry, d *book.Details) {
	k := book.EntryKey{WalletID: e.WalletID, Seq: d.OfSeq}
	h := c.holds[k]
	if h == nil { // placed before; captured is what this chunk adds
		h = &book.Hold{WalletID: k.WalletID, Seq: k.Seq, Exists: true}
		c.holds[k] = h
	}
	h.Captured, h.Remaining, h.LastSeq = h.Captured.Add(e.Amount.Abs()), d.Remaining, e.Seq
	switch {
	case !d.Remaining.IsZero():
		h.Status = book.HoldOpen
	case e.Kind != book.KindRelease:
		h.Status = book.HoldCaptured
	case d.Note.Reason == book.ReasonVoid:
		h.Status = book.HoldVoided
	default:
		h.Status = book.HoldExpired
	}
}

func (c *chunk) write(ctx context.Context, tx pgx.Tx) error {
	b := new(pgx.Batch)
	made, placed := c.queueWallets(b), c.queueHolds(b)
	c.queueReversals(b)
	if b.Len() > 0 {
		if err := tx.SendBatch(ctx, b).Close(); err != nil {
			return err
		}
	}
	for _, rows := range []struct {
		sql string
		buffer
	}{{copyWallets, made}, {copyHolds, placed}, {copyEntries, c.text}, {copyReferences, c.references}} {
		if rows.n == 0 {
			continue
		}
		tag, err := tx.Conn().PgConn().CopyFrom(ctx, rows.reader(), rows.sql)
		if err == nil {
			err = all(rows.n, "rows are taken")(tag)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// all checks that a command was about as many rows as it should.
func all(n int, what string) func(pgconn.CommandTag) error {
	return func(tag pgconn.CommandTag) error {
		if tag.RowsAffected() != int64(n) {
			return fmt.Errorf("%d of %d %s: this ledger is damaged, rebuild into an empty database",
				tag.RowsAffected(), n, what)
		}
		return nil
	}
}

// queueWallets moves on the wallets that are there, and returns the rows of the others.
func (c *chunk) queueWallets(b *pgx.Batch) (made buffer) {
	type columns struct {
		ids, seqs, stateSeqs    []int64
		balances, helds, states []string
		ats                     []time.Time
	}
	var moved, beyond columns
	for i := range c.wallets {
		w := &c.wallets[i]
		if !w.Exists {
			made.wallet(&w.Wallet)
			continue
		}
		s := &moved
		if w.beyond {
			s = &beyond
			s.helds, s.states = append(s.helds, money.Text(w.Held)), append(s.states, w.State)
			s.stateSeqs = append(s.stateSeqs, w.StateSeq)
		}
		s.ids, s.seqs = append(s.ids, w.ID), append(s.seqs, w.Seq)
		s.balances, s.ats = append(s.balances, money.Text(w.Balance)), append(s.ats, w.EntryAt)
	}
	const there = "wallets are there"
	if s := &moved; len(s.ids) > 0 {
		b.Queue(updateWallets, s.ids, s.balances, s.seqs, s.ats).Exec(all(len(s.ids), there))
	}
	if s := &beyond; len(s.ids) > 0 {
		b.Queue(updateHeads, s.ids, s.balances, s.seqs, s.ats, s.helds, s.states, s.stateSeqs).Exec(
			all(len(s.ids), there))
	}
	return made
}

// queueHolds moves on the holds that are there, and returns the rows of the others.
func (c *chunk) queueHolds(b *pgx.Batch) (placed buffer) {
	var wallets, seqs, lastSeqs []int64
	var captured, remaining, statuses []string
	for k, h := range c.holds {
		if !h.Exists {
			placed.hold(h)
			continue
		}
		wallets, seqs = append(wallets, k.WalletID), append(seqs, k.Seq)
		captured = append(captured, money.Text(h.Captured))
		remaining = append(remaining, money.Text(h.Remaining))
		statuses, lastSeqs = append(statuses, h.Status), append(lastSeqs, h.LastSeq)
	}
	if len(seqs) > 0 {
		b.Queue(updateHolds, wallets, seqs, captured, remaining, statuses, lastSeqs).Exec(
			all(len(seqs), "holds are there"))
	}
	return placed
}

func (c *chunk) queueReversals(b *pgx.Batch) {
	var wallets, seqs []int64
	var amounts, reversed []string
	for k, r := range c.reversals {
		wallets, seqs = append(wallets, k.WalletID), append(seqs, k.Seq)
		amounts, reversed = append(amounts, money.Text(r.Amount)), append(reversed, money.Text(r.Reversed))
	}
	if len(seqs) > 0 {
		b.Queue(upsertReversals, wallets, seqs, amounts, reversed)
	}
}
