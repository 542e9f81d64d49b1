// The ledger: what money may do, and the batches that do it. Nothing else writes wallets and entries.
//
// Touches: Postgres: wallets, and by outbox.go's statements entries, holds, reversals, references and the
// outbox, all in the same commit.
// Promises: an operation that was answered is durable and applied once, however often its key is sent and
// whatever dies; a refused one leaves nothing behind; balances never go below zero and no amount is ever
// rounded.
//
// Operations are group-committed: handlers queue them, and while one batch is at Postgres the next one
// gathers by itself. No order between concurrent requests is promised; a request sent after another was
// answered sees its effect.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/gather"
	"wallet/internal/metric"
	"wallet/internal/money"
	"wallet/internal/parts"
	"wallet/internal/pg"
)

// Kinds of entries, as entry_kind in schema.sql spells them. A transfer's operation has kindTransferOut and
// writes both.
const (
	kindDeposit     = "deposit"
	kindWithdrawal  = "withdrawal"
	kindTransferOut = "transfer_out"
	kindTransferIn  = "transfer_in"
	kindHold        = "hold"     // reserves; moves nothing
	kindRelease     = "release"  // of what remains of a hold
	kindState       = "state"    // of the wallet
	kindCreation    = "creation" // of a wallet: an operation, never an entry
)

// wallet is the head of a wallet's chain of entries.
type wallet struct {
	ID        int64
	Currency  string
	Balance   decimal.Decimal
	Held      decimal.Decimal // of the balance, by open holds
	State     string          // one of those below; empty before it is set for the first time
	StateSeq  int64           // the entry that set it
	Seq       int64           // of the last entry; 0 before the first
	EntryAt   time.Time       // the last entry's; zero before the first
	CreatedAt time.Time

	creationKey string
	exists      bool // in the database
	busy        bool // it exists, but somebody else holds its lock
	changed     bool // by this batch
	headChanged bool // by this batch: held or state
}

// States of a wallet.
const (
	stateOpen   = "open"
	stateNoOut  = "no_out" // nothing more is spent or held; what is held can be captured
	stateFrozen = "frozen" // nothing but releases
	stateClosed = "closed" // empty, for ever
)

// available is what may be spent or held.
func (w *wallet) available() decimal.Decimal {
	if w.Held.IsZero() {
		return w.Balance
	}
	return w.Balance.Sub(w.Held)
}

// hold is where a hold stands: entry number Seq of wallet WalletID placed it.
type hold struct {
	WalletID, Seq, ToID         int64 // ToID: who will be paid; 0 where that was not said
	Amount, Captured, Remaining decimal.Decimal
	Status                      string // one of those below
	ExpiresAt                   time.Time

	lastSeq int64 // of the last entry about it
	exists  bool  // in the database
	changed bool  // by this batch
}

// Statuses of a hold.
const (
	holdOpen     = "open"
	holdCaptured = "captured"
	holdVoided   = "voided"
	holdExpired  = "expired"
)

var holdStatuses = []string{holdOpen, holdCaptured, holdVoided, holdExpired}

// reversal is how much of a transaction has been undone.
type reversal struct {
	amount, reversed decimal.Decimal
	changed          bool // by this batch
}

// entryKey names an entry.
type entryKey struct{ walletID, seq int64 }

// operation is what a request wants done, and then what came of it.
type operation struct {
	kind        string // of the entry that it will make
	decide      func(*posting, *operation) error
	walletID    int64 // the initiating wallet; of a creation, the id given or chosen
	toID        int64 // of a transfer
	idChosen    bool  // by us, of a creation
	amount      money.Amount
	currency    string // as named by the request; may be empty
	key         string
	traceparent string
	ofSeq       int64         // the entry of walletID that it captures, releases or undoes
	undoes      *posted       // of a reversal: the transaction
	expiresIn   time.Duration // of a hold
	anyExpiry   bool          // of a hold: the request named none
	note        note          // what its entry will say, as far as the request does

	wallets []int64         // that it touches
	room    [2]int64        // for them, mostly
	ctx     context.Context // the request's: if it ends before a batch forms, the operation is dropped
	done    chan struct{}   // closed after the fields below are final

	posted   posted // of a movement
	created  wallet // of a creation
	replayed bool   // the key had been posted before: what is answered is what was answered then
	err      error  // a *refusal, errUnavailable or an unknown fault
}

// Keys are the operation's wallets.
func (op *operation) Keys() []int64 { return op.wallets }

// Gone says that the client has left.
func (op *operation) Gone() bool { return op.ctx.Err() != nil }

// refusal is an operation's or a request's clear no: a stable code, and a sentence that says what to do.
// The codes and their HTTP statuses stand in one table in main.go.
type refusal struct{ code, detail string }

func (r *refusal) Error() string { return r.code + ": " + r.detail }

// Refusal makes the ledger's refusals answers of the API.
func (r *refusal) Refusal() (code, detail string) { return r.code, r.detail }

func refuse(code, format string, args ...any) *refusal {
	return &refusal{code, fmt.Sprintf(format, args...)}
}

var (
	errOverloaded = refuse("overloaded",
		"Too many operations are waiting. Nothing was done; try again after the time in Retry-After.")
	// errLocked puts an operation off: one of its wallets is locked by another session or a stalled writer.
	// The operation is queued again.
	errLocked = errors.New("the wallet is locked by somebody else")
	// errUnavailable does not say that nothing happened: the commit's outcome may be unknown.
	errUnavailable = refuse("unavailable", "The ledger did not confirm in time. Send the same request with "+
		"the same key again: if it had been applied, it is not applied twice.")
)

// -----------------------------------------------------------------------------------------------------------
// Keys and ids
// -----------------------------------------------------------------------------------------------------------

const (
	keyLenMax       = 255
	walletIDAutoMax = 1<<53 - 1 // of ids chosen by us: exact in a JavaScript number
)

// parseKey checks an idempotency key: 1-255 printable ASCII characters.
func parseKey(s string) (string, error) {
	if len(s) == 0 || len(s) > keyLenMax {
		return "", refuse("idempotency_key_malformed", "An idempotency key has 1 to %d characters.",
			keyLenMax)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return "", refuse("idempotency_key_malformed",
				"An idempotency key has printable ASCII characters only.")
		}
	}
	return s, nil
}

// parseWalletID reads 1..2^63-1 in its one decimal form.
func parseWalletID(s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id < 1 || strconv.FormatInt(id, 10) != s {
		return 0, refuse("wallet_id_malformed", "A wallet id is a whole number from 1 to %d.", math.MaxInt64)
	}
	return id, nil
}

// -----------------------------------------------------------------------------------------------------------
// The ledger and its writers
// -----------------------------------------------------------------------------------------------------------

type ledger struct {
	reads           *pgxpool.Pool
	writes          *pgxpool.Pool // one connection a writer
	cache           *cache        // nil without Redis
	rerunBudget     time.Duration // how long a batch is run again after faults before its clients are told
	defaultCurrency string
	holdTTL         time.Duration // how long a hold stands whose request does not say

	queue  *gather.Gatherer[*operation]
	scales atomic.Pointer[map[string]int32] // the currency table: code to scale

	batches, operations, reruns, splits, expiries atomic.Int64
	held                                          atomic.Pointer[[]heldMoney]
	batchSizes, batchSeconds                      *metric.Histogram
}

// ledgerConfig is what the ledger is told; see the settings' table.
type ledgerConfig struct {
	defaultCurrency string
	writers         int
	batchOpsMax     int
	queueOpsMax     int
	requestTimeout  time.Duration
	holdTTL         time.Duration
}

func newLedger(cfg ledgerConfig, reads, writes *pgxpool.Pool, cache *cache) *ledger {
	l := &ledger{
		reads:           reads,
		writes:          writes,
		cache:           cache,
		rerunBudget:     cfg.requestTimeout,
		defaultCurrency: cfg.defaultCurrency,
		holdTTL:         cfg.holdTTL,
		batchSizes:      metric.NewHistogram(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
		batchSeconds:    metric.NewHistogram(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5),
	}
	l.queue = gather.New(cfg.queueOpsMax, cfg.writers, cfg.batchOpsMax, l.work, l.drop)
	return l
}

// do queues an operation and waits for its outcome. When ctx ends first the outcome is unknown to the
// caller, and the operation may still be applied.
func (l *ledger) do(ctx context.Context, op *operation) error {
	op.ctx, op.done = ctx, make(chan struct{})
	op.wallets = append(op.room[:0], op.walletID)
	if op.toID != 0 {
		op.wallets = append(op.wallets, op.toID)
	}
	select {
	case l.queue.Queue <- op:
	default:
		return errOverloaded
	}
	select {
	case <-op.done:
		return op.err
	case <-ctx.Done():
		return errUnavailable
	}
}

// run works off what is queued until ctx ends.
func (l *ledger) run(ctx context.Context) error { return l.queue.Run(ctx) }

// work posts a batch and tells of it. Its wallets are free for the next batch once it is in the ledger.
func (l *ledger) work(batch []*operation, release func()) {
	t, heads := l.cache.ticket(), make(map[int64]cachedBalance, len(batch))
	t.moves = true
	l.post(batch, heads)
	release()
	l.announce(batch, t, heads)
}

// drop ends an operation whose client left before a batch took it: nothing was done.
func (l *ledger) drop(op *operation) {
	op.err = errUnavailable
	close(op.done)
}

// post brings a batch into the ledger, or settles each operation's error. Running a batch again is always
// safe, also when its commit's outcome is unknown: the idempotency keys find what was written. heads takes
// what the answers are about to tell of each wallet, for the cache.
func (l *ledger) post(batch []*operation, heads map[int64]cachedBalance) {
	started := time.Now()
	lock := lockWallets
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		err := l.tryPost(batch, lock, heads)
		if err == nil {
			l.batches.Add(1)
			l.operations.Add(int64(len(batch)))
			l.batchSizes.Observe(float64(len(batch)))
			l.batchSeconds.Observe(time.Since(started).Seconds())
			return
		}
		rerun, split := remedy(err)
		switch {
		case split && len(batch) > 1:
			// One operation's fault must not fail its neighbours: halve until it stands alone.
			slog.Warn("batch split", "operations", len(batch), "error", err)
			l.splits.Add(1)
			l.post(batch[:len(batch)/2], heads)
			l.post(batch[len(batch)/2:], heads)
			return
		case rerun && time.Since(started)+pause < l.rerunBudget:
			slog.Warn("batch is run again", "operations", len(batch), "error", err)
			l.reruns.Add(1)
			switch pg.State(err) {
			case "55P03": // lock_timeout: a wallet that somebody holds must not hold up the others
				lock = lockFreeWallets
				continue
			case "23514": // no partition of the outbox for this hour: remedy lets no other through
				if err := makeOutboxPartitions(context.Background(), l.reads); err != nil {
					slog.Error("the outbox lacks this hour's partition", "error", err)
				}
			}
			time.Sleep(pause/2 + rand.N(pause/2))
		default:
			slog.Error("batch failed", "operations", len(batch), "error", err)
			for _, op := range batch {
				op.err = err
				if rerun {
					op.err = errUnavailable
				}
			}
			return
		}
	}
}

// remedy says what helps against a failed batch: to run it again, to split it, or neither.
func remedy(err error) (rerun, split bool) {
	var pgErr *pgconn.PgError
	switch {
	case errors.Is(err, errBroken):
		return false, true
	case !errors.As(err, &pgErr):
		return true, false
	case pgErr.Code == "23505" && (pgErr.ConstraintName == "wallet_pkey" ||
		pgErr.ConstraintName == "wallet_creation_key_once"):
		return true, false // another writer made the wallet first: this time we lock it
	case pgErr.Code == "23514" && strings.HasPrefix(pgErr.Message, "no partition"):
		return true, false // an outbox without this hour's partition
	}
	passes := pg.Passes(err)
	return passes, !passes
}

// putOff queues an operation again after a pause, unless its client gives up before.
func (l *ledger) putOff(op *operation) {
	select {
	case <-time.After(100 * time.Millisecond):
		l.queue.Queue <- op
	case <-op.ctx.Done():
	}
}

// announce tells the cache and then the clients. The cache comes first, so that a read sent after the
// answer is not served anything older from there.
func (l *ledger) announce(batch []*operation, t ticket, heads map[int64]cachedBalance) {
	l.cache.put(t, heads)
	for _, op := range batch {
		if op.err == errLocked {
			go l.putOff(op)
			continue
		}
		close(op.done)
	}
}

// -----------------------------------------------------------------------------------------------------------
// One batch: one Postgres transaction, READ COMMITTED, in two round trips
// -----------------------------------------------------------------------------------------------------------

// Lock order: every transaction locks the wallets that exist by ascending id, then inserts the missing ones
// by ascending id, so no two can wait for each other in a circle.
//
// A plan made on an empty table is kept, and scans the index for every row. These joins allow index lookups
// only: LATERAL with a LIMIT, a subquery, ANY (ARRAY[...]).
//
// Rows arrive as arrays, one a column, unnested in the select list, side by side: in FROM each array is
// first copied into a store of its own, row by row, which costs Postgres a twentieth of the batch.
const (
	walletColumns = `id, currency, balance::text, seq, entry_at, created_at, nullif(held, 0)::text, state,
       state_seq`

	lockWallets = `
SELECT ` + walletColumns + ` FROM wallet
WHERE id = ANY ($1::bigint[]) ORDER BY id FOR NO KEY UPDATE`

	// After a lock_timeout: those that can be had at once, and then which others there are.
	lockFreeWallets = lockWallets + ` SKIP LOCKED`
	findWallets     = `SELECT id FROM wallet WHERE id = ANY ($1::bigint[])`

	// A statement of its own after the locks, hence with a newer snapshot: what the locks' former holders
	// wrote is seen. So is a wallet that was missing a moment ago; what is new to it fails on the wallet's
	// id, and the batch runs again.
	findKeys = selectPosted + `
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::text[]) AS key) k
CROSS JOIN LATERAL (
    SELECT * FROM entry
    WHERE wallet_id = k.wallet_id AND idempotency_key = k.key AND kind <> 'transfer_in' LIMIT 1
) e`

	findCreations = `
SELECT id, currency, created_at, creation_key FROM wallet WHERE creation_key = ANY ($1::text[])`

	// Under their wallets' locks, like the keys. Only operations of that kind ask.
	findHolds = `
SELECT ` + holdColumns + `
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq) k
CROSS JOIN LATERAL (SELECT * FROM hold WHERE wallet_id = k.wallet_id AND seq = k.seq LIMIT 1) h`

	findReversals = `
SELECT r.wallet_id, r.seq, r.reversed
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq) k
CROSS JOIN LATERAL (SELECT * FROM reversal WHERE wallet_id = k.wallet_id AND seq = k.seq LIMIT 1) r`

	// By the time, not by the wallet, which may have many that are not due: + 0 rules that index out.
	findDueHolds = `
SELECT ` + holdColumns + `
FROM hold h WHERE h.status = 'open' AND h.expires_at <= $2 AND h.wallet_id + 0 = ANY ($1::bigint[])
ORDER BY h.expires_at, h.wallet_id, h.seq LIMIT $3 OFFSET $4`

	updateWallets = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[]::numeric[]) AS balance,
             unnest($3::bigint[]) AS seq, unnest($4::timestamptz[]) AS entry_at) n
WHERE wallet.id = ANY (ARRAY[n.id])`

	// Only of wallets whose held or state changed.
	updateHeads = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at, held = n.held, state = n.state,
       state_seq = n.state_seq
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[]::numeric[]) AS balance,
             unnest($3::bigint[]) AS seq, unnest($4::timestamptz[]) AS entry_at,
             unnest($5::text[]::numeric[]) AS held, nullif(unnest($6::text[]), '') AS state,
             nullif(unnest($7::bigint[]), 0) AS state_seq) n
WHERE wallet.id = ANY (ARRAY[n.id])`
)

// tryPost runs the batch once. Its error means that nothing, or in the case of a lost connection something
// unknown, happened. lock is lockWallets or lockFreeWallets.
func (l *ledger) tryPost(batch []*operation, lock string, heads map[int64]cachedBalance) error {
	// The server's own timeouts (openPool) are shorter: this one is for a network that swallows everything.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := l.writes.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release() // a connection still inside a transaction is closed by the pool

	p, err := l.read(ctx, conn, batch, lock)
	if err != nil {
		return err
	}
	for _, op := range batch {
		former := outcome{op.posted, op.created}
		op.posted, op.created = posted{}, wallet{} // of a former try
		p.settle(op, former)
	}
	if err := p.releaseDue(ctx, conn, batch); err != nil {
		return err
	}
	if err := p.check(); err != nil {
		return err
	}
	if err := p.commit(ctx, conn); err != nil {
		return err
	}
	// What was accepted is durable.
	l.expiries.Add(p.expired)
	if l.cache != nil {
		p.collectHeads(batch, heads)
	}
	return nil
}

// settle decides an operation. former is what the try before came to.
func (p *posting) settle(op *operation, former outcome) {
	op.err, op.replayed = nil, false
	op.err = p.decide(op)
	if op.replayed && former.is(op) {
		op.replayed = false // it was our own try that posted it, whose answer was lost
	}
}

// outcome is what a try of a batch came to for one operation.
type outcome struct {
	posted  posted
	created wallet
}

// is says whether the ledger holds just what this try wanted to write: nobody else's has the same time as
// well.
func (o *outcome) is(op *operation) bool {
	if op.kind == kindCreation {
		return o.created.ID == op.created.ID && o.created.CreatedAt.Equal(op.created.CreatedAt)
	}
	return o.posted.Seq == op.posted.Seq && o.posted.CreatedAt.Equal(op.posted.CreatedAt)
}

// releaseDue releases the holds that are due on wallets which lacked funds, and decides again what was
// refused for that. So nobody waits for the sweep, and nobody but who was refused pays for the look.
func (p *posting) releaseDue(ctx context.Context, conn *pgxpool.Conn, batch []*operation) error {
	short := slices.Collect(maps.Keys(p.short))
	due := p.now // or later, where a wallet's entries are: the clock may have been set back
	for _, id := range short {
		due = latest(due, p.wallets[id].EntryAt)
	}
	for seen := 0; len(p.short) > 0; seen += dueMax {
		rows, _ := conn.Query(ctx, findDueHolds, short, due, dueMax, seen)
		holds, err := scanHolds(rows)
		if err != nil || len(holds) == 0 {
			return err
		}
		for _, h := range holds {
			if k := (entryKey{h.WalletID, h.Seq}); p.holds[k] == nil {
				p.holds[k] = h // else one of the batch has changed it
			}
			if err := p.decide(expiryOf(h.WalletID, h.Seq)); err != nil && err != errNotDue {
				return err
			}
		}
		clear(p.short)
		for _, op := range batch {
			var no *refusal
			if errors.As(op.err, &no) && no.code == "insufficient_funds" {
				p.settle(op, outcome{})
			}
		}
	}
	return nil
}

// collectHeads adds each wallet's newest balance: under the lock that was its head. A refusal or a replay
// tells of it as well. Of a wallet that could not be locked, a replay tells what it was.
func (p *posting) collectHeads(batch []*operation, heads map[int64]cachedBalance) {
	for _, w := range p.wallets {
		tell(heads, w.cached())
	}
	for _, op := range batch {
		if op.replayed && op.kind != kindCreation {
			op.posted.tell(heads)
		}
	}
}

// posting is one batch on its way: the wallets under lock, what the keys stand for, and the new entries.
type posting struct {
	now             time.Time // the database's
	scales          map[string]int32
	defaultCurrency string
	wallets         map[int64]*wallet
	byKey           map[movementKey]*posted
	creations       map[string]*wallet
	holds           map[entryKey]*hold
	reversals       map[entryKey]*reversal
	entries         []entry

	short   map[int64]bool // wallets that lacked funds while some of theirs were held
	expired int64          // holds
}

type movementKey struct {
	walletID int64
	key      string
}

// read is the first round trip: lock, then look up the keys.
func (l *ledger) read(ctx context.Context, conn *pgxpool.Conn, batch []*operation, lock string,
) (*posting, error) {
	p := &posting{
		scales:          *l.scales.Load(),
		defaultCurrency: l.defaultCurrency,
		wallets:         make(map[int64]*wallet, 2*len(batch)),
		byKey:           make(map[movementKey]*posted, len(batch)),
		creations:       make(map[string]*wallet),
		holds:           make(map[entryKey]*hold),
		reversals:       make(map[entryKey]*reversal),
		entries:         make([]entry, 0, 2*len(batch)),
		short:           make(map[int64]bool),
	}
	var ids, keyWallets []int64
	var keys, creationKeys []string
	var held, undone entryIDs
	asked := make(map[movementKey]bool, len(batch))
	for _, op := range batch {
		ids = append(ids, op.wallets...)
		if op.kind == kindCreation {
			creationKeys = append(creationKeys, op.key)
			continue
		}
		if k := (movementKey{op.walletID, op.key}); !asked[k] {
			asked[k] = true
			keyWallets, keys = append(keyWallets, op.walletID), append(keys, op.key)
		}
		switch {
		case op.undoes != nil:
			undone.add(op.undoes.WalletID, op.undoes.Seq)
			p.reversals[entryKey{op.undoes.WalletID,
				op.undoes.Seq}] = &reversal{amount: op.undoes.Amount.Abs()}
		case op.ofSeq != 0:
			held.add(op.walletID, op.ofSeq)
		}
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	for _, id := range ids {
		p.wallets[id] = &wallet{ID: id}
	}

	var b pgx.Batch
	b.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED`)
	b.Queue(lock, ids).Query(p.scanWallets)
	if lock == lockFreeWallets {
		b.Queue(findWallets, ids).Query(p.scanBusy)
	}
	b.Queue(`SELECT clock_timestamp()`).QueryRow(func(row pgx.Row) error { return row.Scan(&p.now) })
	if len(keys) > 0 {
		b.Queue(findKeys, keyWallets, keys).Query(p.scanKeys)
	}
	if len(creationKeys) > 0 {
		b.Queue(findCreations, creationKeys).Query(p.scanCreations)
	}
	if len(held.seqs) > 0 {
		b.Queue(findHolds, held.wallets, held.seqs).Query(func(rows pgx.Rows) error {
			holds, err := scanHolds(rows)
			for _, h := range holds {
				p.holds[entryKey{h.WalletID, h.Seq}] = h
			}
			return err
		})
	}
	if len(undone.seqs) > 0 {
		b.Queue(findReversals, undone.wallets, undone.seqs).Query(func(rows pgx.Rows) error {
			var k entryKey
			var reversed decimal.Decimal
			_, err := pgx.ForEachRow(rows, []any{&k.walletID, &k.seq, &reversed}, func() error {
				p.reversals[k].reversed = reversed
				return nil
			})
			return err
		})
	}
	return p, conn.SendBatch(ctx, &b).Close()
}

// entryIDs are entries as two arrays.
type entryIDs struct{ wallets, seqs []int64 }

func (ids *entryIDs) add(walletID, seq int64) {
	ids.wallets, ids.seqs = append(ids.wallets, walletID), append(ids.seqs, seq)
}

func (p *posting) scanWallets(rows pgx.Rows) error {
	var w wallet
	var balance string
	var entryAt *time.Time
	var held, state *string
	var stateSeq *int64
	columns := []any{&w.ID, &w.Currency, &balance, &w.Seq, &entryAt, &w.CreatedAt, &held, &state, &stateSeq}
	_, err := pgx.ForEachRow(rows, columns, func() (err error) {
		found := w
		found.exists = true
		if entryAt != nil {
			found.EntryAt = *entryAt
		}
		if state != nil && stateSeq != nil {
			found.State, found.StateSeq = *state, *stateSeq
		}
		if found.Balance, err = decimal.NewFromString(balance); err == nil && held != nil {
			found.Held, err = decimal.NewFromString(*held)
		}
		p.wallets[w.ID] = &found
		return err
	})
	return err
}

// scanBusy marks the wallets that exist but were not locked.
func (p *posting) scanBusy(rows pgx.Rows) error {
	var id int64
	_, err := pgx.ForEachRow(rows, []any{&id}, func() error {
		w := p.wallets[id]
		w.busy = !w.exists
		return nil
	})
	return err
}

func (p *posting) scanKeys(rows pgx.Rows) error {
	for rows.Next() {
		var found posted
		if err := scanPosted(rows, &found); err != nil {
			return err
		}
		p.byKey[movementKey{found.WalletID, found.Key}] = &found
	}
	return rows.Err()
}

func scanHolds(rows pgx.Rows) ([]*hold, error) {
	var holds []*hold
	var h hold
	columns := []any{&h.WalletID, &h.Seq, &h.ToID, &h.Amount, &h.Captured, &h.Remaining, &h.Status,
		&h.ExpiresAt, &h.lastSeq}
	_, err := pgx.ForEachRow(rows, columns, func() error {
		found := h
		found.exists = true
		holds = append(holds, &found)
		return nil
	})
	return holds, err
}

func (p *posting) scanCreations(rows pgx.Rows) error {
	var w wallet
	_, err := pgx.ForEachRow(rows, []any{&w.ID, &w.Currency, &w.CreatedAt, &w.creationKey}, func() error {
		found := w
		p.creations[w.creationKey] = &found
		return nil
	})
	return err
}

// decide accepts or refuses one operation against the running balances, in arrival order. The key comes
// first: what was accepted once stays accepted, whatever the balance is now.
func (p *posting) decide(op *operation) error {
	if op.kind == kindCreation {
		return p.create(op)
	}
	if before, ok := p.byKey[movementKey{op.walletID, op.key}]; ok {
		if !before.answers(op) {
			return refuse("idempotency_key_reused",
				"This key was used on wallet %d for another operation (transaction %s). Use a new key "+
					"for a new operation.",
				op.walletID, entryID(before.WalletID, before.Seq))
		}
		op.posted, op.replayed = *before, true
		return nil
	}
	for _, id := range op.wallets {
		if p.wallets[id].busy {
			return errLocked
		}
	}
	if err := op.decide(p, op); err != nil {
		return err
	}
	accepted := op.posted
	p.byKey[movementKey{op.walletID, op.key}] = &accepted
	return nil
}

// answers says whether a movement is what an operation with its key asks for.
func (m *posted) answers(op *operation) bool {
	d, amount := m.says(), m.Amount.Abs()
	asked := op.note
	asked.Client, asked.ExpiresAt = d.Note.Client, d.Note.ExpiresAt
	if m.Kind == kindHold {
		amount = d.HeldChange
		if !op.anyExpiry && !m.CreatedAt.Add(op.expiresIn).Equal(d.Note.ExpiresAt) {
			return false
		}
	}
	return m.Kind == op.kind && m.CounterpartyID == op.toID && d.OfSeq == op.ofSeq && asked == d.Note &&
		(asked.All || amount.Equal(op.amount.Decimal)) &&
		(op.currency == "" || op.currency == m.Currency)
}

// -----------------------------------------------------------------------------------------------------------
// What money may do: each kind of operation is decided by one function
// -----------------------------------------------------------------------------------------------------------

// currency is the operation's, which its wallet must have. opens says that it may make the wallet.
func (p *posting) currency(op *operation, w *wallet, opens bool) (string, error) {
	if w.Currency == "" && !opens {
		return "", errNoWallet(w.ID)
	}
	currency := cmp.Or(op.currency, w.Currency, p.defaultCurrency)
	scale, known := p.scales[currency]
	switch {
	case !known:
		return "", refuse("currency_unknown",
			"Currency %q is not in the currency table. Use an ISO 4217 code such as \"USD\".", currency)
	case w.Currency != "" && w.Currency != currency:
		return "", refuse("currency_mismatch",
			"Wallet %d is in %s, the request in %s. Use a wallet in the request's "+
				"currency.", w.ID, w.Currency, currency)
	case op.amount.Decimals > scale:
		return "", refuse("amount_scale",
			"The amount has %d decimals, %s has %d. Nothing is ever rounded: send the exact "+
				"amount.", op.amount.Decimals, currency, scale)
	}
	return currency, nil
}

// lets refuses what the wallet's state does not let in or out.
func (w *wallet) lets(in bool) error {
	switch {
	case w.State == stateClosed:
		return refuse("wallet_closed", "Wallet %d is closed. Use another one.", w.ID)
	case w.State == stateFrozen:
		return refuse("wallet_frozen",
			"Wallet %d is frozen: nothing goes in or out until an operator sets its "+
				"state to open.", w.ID)
	case w.State == stateNoOut && !in:
		return refuse("wallet_frozen",
			"Wallet %d takes money in but lets none out until an operator sets its "+
				"state to open.", w.ID)
	}
	return nil
}

// spendable is the amount that the operation takes from what its wallet has available: all of it where it
// says so.
func (p *posting) spendable(op *operation, w *wallet) (decimal.Decimal, error) {
	if err := w.lets(false); err != nil {
		return decimal.Decimal{}, err
	}
	amount, available := op.amount.Decimal, w.available()
	if op.note.All && op.undoes == nil {
		amount = available
	}
	if available.LessThan(amount) || amount.IsZero() {
		if !w.Held.IsZero() {
			p.short[w.ID] = true
		}
		return amount, refuse("insufficient_funds",
			"Wallet %d has %s available, less than the amount. Deposit first; the same key may then be used "+
				"again.", w.ID, money.Text(available))
	}
	return amount, nil
}

// takes refuses what a payee may not get.
func (w *wallet) takes(amount decimal.Decimal, currency string, from *wallet) error {
	if w.Currency != "" && w.Currency != currency {
		return refuse("currency_mismatch",
			"Wallet %d is in %s, wallet %d in %s. A transfer stays in one "+
				"currency.", from.ID, from.Currency, w.ID, w.Currency)
	}
	if err := w.lets(true); err != nil {
		return err
	}
	if w.Balance.Add(amount).GreaterThanOrEqual(money.Limit) {
		return refuse("balance_limit",
			"The balance of wallet %d would have more than %d digits before the "+
				"point.", w.ID, money.WholeDigitsMax)
	}
	return nil
}

// details of the operation's initiating entry, or nil where it says nothing.
func (op *operation) details(d details) *details {
	d.Note = op.note
	d.noteText = d.Note.json()
	if d == nothingMore {
		return nil
	}
	return &d
}

// post makes the operation's initiating entry the next one of w.
func (p *posting) post(op *operation, w *wallet, currency string, amount decimal.Decimal, d details) {
	e := entry{WalletID: w.ID, Kind: op.kind, Currency: currency, Amount: amount, Key: op.key,
		more: op.details(d), traceparent: op.traceparent}
	p.append(w, &e, latest(p.now, w.EntryAt))
	op.posted.entry = e
}

// transfer makes both entries of a movement from one wallet to another; to is what the payee's says.
func (p *posting) transfer(op *operation, from, to *wallet, currency string, amount decimal.Decimal,
	d details, payee *details) {
	at := latest(latest(p.now, from.EntryAt), to.EntryAt)
	first := entry{WalletID: from.ID, CounterpartyID: to.ID, CounterpartySeq: to.Seq + 1, Kind: op.kind,
		Currency: currency, Amount: amount.Neg(), Key: op.key, more: op.details(d),
		traceparent: op.traceparent}
	second := entry{WalletID: to.ID, CounterpartyID: from.ID, CounterpartySeq: from.Seq + 1,
		Kind: kindTransferIn, Currency: currency, Amount: amount, Key: op.key, traceparent: op.traceparent}
	if payee != nil || op.note.Reference != "" || op.note.Metadata != "" {
		second.more = cmp.Or(payee, new(details))
		second.more.Note = note{Reference: op.note.Reference, Metadata: op.note.Metadata}
		second.more.noteText = second.more.Note.json()
	}
	p.append(from, &first, at)
	p.append(to, &second, at)
	op.posted.entry, op.posted.toBalance, op.posted.toHeld = first, second.Balance, to.Held
}

func decideDeposit(p *posting, op *operation) error {
	w := p.wallets[op.walletID]
	currency, err := p.currency(op, w, true)
	if err == nil {
		err = w.takes(op.amount.Decimal, currency, w)
	}
	if err != nil {
		return err
	}
	p.post(op, w, currency, op.amount.Decimal, details{})
	return nil
}

// spends is what an operation takes from its wallet, which exists, has the currency, and has that available.
func (p *posting) spends(op *operation) (w *wallet, currency string, amount decimal.Decimal, err error) {
	w = p.wallets[op.walletID]
	if currency, err = p.currency(op, w, false); err == nil {
		amount, err = p.spendable(op, w)
	}
	return w, currency, amount, err
}

func decideWithdrawal(p *posting, op *operation) error {
	w, currency, amount, err := p.spends(op)
	if err != nil {
		return err
	}
	p.post(op, w, currency, amount.Neg(), details{})
	return nil
}

func decideTransfer(p *posting, op *operation) error {
	to := p.wallets[op.toID]
	from, currency, amount, err := p.spends(op)
	if err == nil {
		err = to.takes(amount, currency, from)
	}
	if err != nil {
		return err
	}
	p.transfer(op, from, to, currency, amount, details{}, nil)
	return nil
}

func decideHold(p *posting, op *operation) error {
	w, currency, amount, err := p.spends(op)
	if err != nil {
		return err
	}
	op.note.ExpiresAt = latest(p.now, w.EntryAt).Add(op.expiresIn)
	p.post(op, w, currency, decimal.Decimal{}, details{HeldChange: amount, Remaining: amount})
	p.holds[entryKey{w.ID, w.Seq}] = &hold{WalletID: w.ID, Seq: w.Seq, ToID: op.note.ToID, Amount: amount,
		Remaining: amount, Status: holdOpen, ExpiresAt: op.note.ExpiresAt, lastSeq: w.Seq, changed: true}
	return nil
}

// open finds the operation's hold, which must be open at that time.
func (p *posting) open(op *operation, at time.Time) (*hold, error) {
	h := p.holds[entryKey{op.walletID, op.ofSeq}]
	switch {
	case h == nil:
		return nil, errNoHold(op.walletID, op.ofSeq)
	case h.Status == holdExpired || h.Status == holdOpen && !at.Before(h.ExpiresAt):
		return h, refuse("hold_expired", "Hold %s expired at %s. Place a new one.",
			entryID(h.WalletID, h.Seq), h.ExpiresAt.UTC().Format(timeFormat))
	case h.Status != holdOpen:
		return h, refuse("hold_closed", "Hold %s was %s. Place a new one.",
			entryID(h.WalletID, h.Seq), h.Status)
	}
	return h, nil
}

func errNoHold(walletID, seq int64) *refusal {
	return refuse("hold_not_found", "There is no hold %s.", entryID(walletID, seq))
}

// decideCapture never lacks funds: what is held is there. It takes what the hold's state, or the payee, lets.
func decideCapture(p *posting, op *operation) error {
	from := p.wallets[op.walletID]
	at := latest(p.now, from.EntryAt)
	to := p.wallets[op.toID] // nil: the money leaves the ledger
	if to != nil {
		at = latest(at, to.EntryAt)
	}
	h, err := p.open(op, at)
	if err != nil {
		return err
	}
	if h.ToID != 0 && h.ToID != op.toID {
		return refuse("payee_mismatch", "Hold %s is for wallet %d. Leave \"to_id\" out, or name that wallet.",
			entryID(h.WalletID, h.Seq), h.ToID)
	}
	currency, err := p.currency(op, from, false)
	if err != nil {
		return err
	}
	amount := op.amount.Decimal
	if op.note.All {
		amount = h.Remaining
	}
	if amount.GreaterThan(h.Remaining) {
		return refuse("hold_exceeded", "Of hold %s there remains %s. Capture no more than that.",
			entryID(h.WalletID, h.Seq), money.Text(h.Remaining))
	}
	if from.State != stateNoOut { // which lets go what was held before
		err = from.lets(false)
	}
	if err == nil && to != nil {
		err = to.takes(amount, currency, from)
	}
	if err != nil {
		return err
	}
	d := details{OfSeq: h.Seq, HeldChange: h.Remaining.Neg()}
	if op.note.Partial {
		d.HeldChange, d.Remaining = amount.Neg(), h.Remaining.Sub(amount)
	}
	if to != nil {
		p.transfer(op, from, to, currency, amount, d, nil)
	} else {
		p.post(op, from, currency, amount.Neg(), d)
	}
	op.posted.of = entryID(h.WalletID, h.Seq)
	h.Captured, h.Remaining, h.lastSeq, h.changed = h.Captured.Add(amount), d.Remaining, from.Seq, true
	if h.Remaining.IsZero() {
		h.Status = holdCaptured
	}
	return nil
}

// Reasons of a release.
const (
	reasonVoid   = "void"
	reasonExpiry = "expiry"
)

// errNotDue ends an expiry's operation that has nothing to do (any more, or yet).
var errNotDue = errors.New("the hold is not due")

// dueMax is how many due holds are looked up at a time.
const dueMax = 1000

// expiryOf is the operation that ends a hold when it is due. Its key is one that no client can send, since it
// is not ASCII: whoever comes first, this happens once.
func expiryOf(walletID, seq int64) *operation {
	op := &operation{kind: kindRelease, decide: decideExpiry, walletID: walletID, ofSeq: seq,
		key: "«expiry " + strconv.FormatInt(seq, 10) + "»", note: note{Reason: reasonExpiry}}
	op.wallets = append(op.room[:0], walletID)
	return op
}

func decideVoid(p *posting, op *operation) error {
	h, err := p.open(op, latest(p.now, p.wallets[op.walletID].EntryAt))
	if err != nil {
		return err
	}
	p.release(op, h, holdVoided)
	return nil
}

// decideExpiry is by the clock, whoever asks: due is what can no longer be captured.
func decideExpiry(p *posting, op *operation) error {
	h, err := p.open(op, latest(p.now, p.wallets[op.walletID].EntryAt))
	if err == nil || h == nil || h.Status != holdOpen {
		return errNotDue
	}
	p.release(op, h, holdExpired)
	p.expired++
	return nil
}

// release gives back what remains of a hold, which ends it.
func (p *posting) release(op *operation, h *hold, status string) {
	w := p.wallets[h.WalletID]
	p.post(op, w, w.Currency, decimal.Decimal{}, details{OfSeq: h.Seq, HeldChange: h.Remaining.Neg()})
	op.posted.of = entryID(h.WalletID, h.Seq)
	h.Remaining, h.Status, h.lastSeq, h.changed = decimal.Decimal{}, status, w.Seq, true
}

// undo makes op the reversal of a transaction. Its wallet is the one that pays now.
func (op *operation) undo(m *posted) error {
	op.undoes, op.walletID, op.ofSeq = m, m.WalletID, m.Seq
	switch {
	case m.reverses():
		return refuse("not_reversible", "Transaction %s is itself a reversal: post a new movement instead.",
			entryID(m.WalletID, m.Seq))
	case m.Kind == kindDeposit:
		op.kind = kindWithdrawal
	case m.Kind == kindWithdrawal:
		op.kind = kindDeposit
	case m.Kind == kindTransferOut:
		op.kind, op.toID = kindTransferOut, m.WalletID
		op.walletID, op.ofSeq = m.CounterpartyID, m.CounterpartySeq
	default:
		return refuse("not_reversible", "Transaction %s moved no money: a hold is voided, a state set again.",
			entryID(m.WalletID, m.Seq))
	}
	return nil
}

// decideReversal posts the opposite movement of a transaction, or of a part of it.
func decideReversal(p *posting, op *operation) error {
	was := op.undoes
	r := p.reversals[entryKey{was.WalletID, was.Seq}]
	left := r.amount.Sub(r.reversed)
	amount := op.amount.Decimal
	if op.note.All {
		amount = left
	}
	w := p.wallets[op.walletID]
	currency, err := p.currency(op, w, false)
	if err != nil {
		return err
	}
	if amount.GreaterThan(left) || left.IsZero() {
		return refuse("reversal_exceeds",
			"Of transaction %s there is %s left to reverse. Reverse no more than "+
				"that.", entryID(was.WalletID, was.Seq), money.Text(left))
	}
	d := details{OfSeq: op.ofSeq, Remaining: left.Sub(amount)}
	pay := *op
	pay.amount.Decimal = amount
	switch op.kind {
	case kindDeposit: // of a withdrawal: it comes back
		if err := w.takes(amount, currency, w); err != nil {
			return err
		}
		p.post(op, w, currency, amount, d)
	case kindWithdrawal: // of a deposit
		if _, err := p.spendable(&pay, w); err != nil {
			return err
		}
		p.post(op, w, currency, amount.Neg(), d)
	case kindTransferOut: // from who was paid to who paid
		to := p.wallets[op.toID]
		_, err := p.spendable(&pay, w)
		if err == nil {
			err = to.takes(amount, currency, w)
		}
		if err != nil {
			return err
		}
		p.transfer(op, w, to, currency, amount, d, &details{OfSeq: was.Seq, Remaining: d.Remaining})
	}
	op.posted.of = entryID(was.WalletID, was.Seq)
	r.reversed, r.changed = r.reversed.Add(amount), true
	return nil
}

func decideState(p *posting, op *operation) error {
	w := p.wallets[op.walletID]
	switch {
	case w.Currency == "":
		return errNoWallet(w.ID)
	case w.State == stateClosed:
		return w.lets(false)
	case op.note.State == stateClosed && !w.Balance.IsZero():
		return refuse("wallet_not_empty", "Wallet %d has a balance of %s, %s of it held. Empty it first: "+
			"\"amount\":\"all\" withdraws or transfers what is available.", w.ID, money.Text(w.Balance),
			money.Text(w.Held))
	}
	p.post(op, w, w.Currency, decimal.Decimal{}, details{})
	w.State, w.StateSeq, w.headChanged = op.note.State, w.Seq, true
	return nil
}

// append makes e the wallet's next entry.
func (p *posting) append(w *wallet, e *entry, at time.Time) {
	if w.Currency == "" {
		w.Currency, w.CreatedAt = e.Currency, at
	}
	w.Seq++
	w.Balance = w.Balance.Add(e.Amount)
	w.EntryAt = at
	w.changed = true
	if e.more != nil && !e.more.HeldChange.IsZero() {
		w.Held, w.headChanged = w.Held.Add(e.more.HeldChange), true
	}
	if !w.Held.IsZero() {
		if e.more == nil {
			e.more = new(details)
		}
		e.more.Held = w.Held
	}
	e.Seq, e.Balance, e.CreatedAt = w.Seq, w.Balance, at
	p.entries = append(p.entries, *e)
}

func (p *posting) create(op *operation) error {
	currency := cmp.Or(op.currency, p.defaultCurrency)
	if before, ok := p.creations[op.key]; ok {
		if before.Currency != currency || !op.idChosen && op.walletID != before.ID {
			return refuse("idempotency_key_reused",
				"This key was used to create wallet %d in %s. Use a new key for a new "+
					"wallet.", before.ID, before.Currency)
		}
		op.created, op.replayed = wallet{ID: before.ID, Currency: before.Currency,
			CreatedAt: before.CreatedAt}, true
		return nil
	}
	w := p.wallets[op.walletID]
	if w.busy {
		return errLocked
	}
	if _, known := p.scales[currency]; !known {
		return refuse("currency_unknown",
			"Currency %q is not in the currency table. Use an ISO 4217 code such as \"USD\".", currency)
	}
	if w.Currency != "" {
		return refuse("wallet_exists", "Wallet %d exists already, in %s.", w.ID, w.Currency)
	}
	w.Currency, w.CreatedAt, w.creationKey, w.changed = currency, p.now, op.key, true
	op.created = *w
	p.creations[op.key] = &op.created
	return nil
}

// errBroken is a mistake of ours, found before it reached the database.
var errBroken = errors.New("assertion failed")

// check catches our own mistakes before they reach the database: money of a batch's transfers sums to zero,
// and each changed wallet stands where its last entry says. The operation at fault ends alone, in a 500 and
// a log line, rather than the process.
func (p *posting) check() error {
	var transferred decimal.Decimal
	for i := range p.entries {
		e, w := &p.entries[i], p.wallets[p.entries[i].WalletID]
		if e.CounterpartyID != 0 {
			transferred = transferred.Add(e.Amount)
		}
		if e.Balance.IsNegative() || e.Seq > w.Seq || e.Seq == w.Seq && !e.Balance.Equal(w.Balance) ||
			e.more != nil && (e.more.Held.IsNegative() || e.more.Held.GreaterThan(e.Balance)) {
			return fmt.Errorf("%w: entry %s does not fit its wallet", errBroken, entryID(e.WalletID, e.Seq))
		}
	}
	if !transferred.IsZero() {
		return fmt.Errorf("%w: the transfers of a batch sum to %s", errBroken, transferred)
	}
	return nil
}

// commit is the second round trip: everything that the accepted operations changed, and COMMIT.
func (p *posting) commit(ctx context.Context, conn *pgxpool.Conn) error {
	var b pgx.Batch
	var missing, changed []*wallet
	heads := false
	for _, w := range p.wallets {
		if w.changed && w.exists {
			changed = append(changed, w)
			heads = heads || w.headChanged
		} else if w.changed {
			missing = append(missing, w)
		}
	}
	if len(missing) > 0 {
		slices.SortFunc(missing, func(a, b *wallet) int { return cmp.Compare(a.ID, b.ID) })
		c := columnsOf(missing)
		b.Queue(insertWallets, c.ids, c.currencies, c.balances, c.seqs, c.entryAts, c.createdAts,
			c.creationKeys, c.helds, c.states, c.stateSeqs)
	}
	var updated *int64
	if len(changed) > 0 {
		c := columnsOf(changed)
		query, args := updateWallets, []any{c.ids, c.balances, c.seqs, c.entryAts}
		if heads {
			query, args = updateHeads, append(args, c.helds, c.states, c.stateSeqs)
		}
		updated = new(int64)
		b.Queue(query, args...).Exec(func(tag pgconn.CommandTag) error {
			*updated = tag.RowsAffected()
			return nil
		})
	}
	if len(p.entries) > 0 {
		p.queueEntries(&b)
		queueOutbox(&b, p.entries)
	}
	p.queueHolds(&b)
	p.queueReversals(&b)
	b.Queue(`COMMIT`)
	if err := conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	if updated != nil && *updated != int64(len(changed)) {
		panic(fmt.Sprintf("updated %d wallets of %d that were locked", *updated, len(changed)))
	}
	return nil
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

func errNoWallet(id int64) *refusal {
	return refuse("wallet_not_found", "Wallet %d does not exist. A deposit creates it.", id)
}

func (l *ledger) writeMetrics(w *metric.Writer) {
	w.Counter("wallet_batches_total", "Batches committed.", float64(l.batches.Load()))
	w.Counter("wallet_operations_total", "Operations decided, replays and refusals included.",
		float64(l.operations.Load()))
	w.Counter("wallet_batch_reruns_total", "Batches run again after a pg.", float64(l.reruns.Load()))
	w.Counter("wallet_batch_splits_total", "Batches halved because one operation failed them.",
		float64(l.splits.Load()))
	w.Counter("wallet_hold_expiries_total", "Holds that this replica released, being due.",
		float64(l.expiries.Load()))
	if held := l.held.Load(); held != nil {
		var open, amounts []metric.Sample
		for _, h := range *held {
			label := `currency="` + h.currency + `"`
			open = append(open, metric.Sample{Labels: label, Value: h.holds})
			amounts = append(amounts, metric.Sample{Labels: label, Value: h.amount})
		}
		w.Gauges("wallet_holds_open", "Open holds, within the last minute.", open...)
		w.Gauges("wallet_held", "Money that open holds reserve, within the last minute.", amounts...)
	}
	w.Gauge("wallet_queue_operations", "Operations that wait for a batch.",
		float64(l.queue.Waiting()))
	w.Histogram("wallet_batch_operations", "Operations of a batch.", l.batchSizes)
	w.Histogram("wallet_batch_seconds", "From a batch's forming to its commit, reruns included.",
		l.batchSeconds)
	for _, pool := range []struct {
		name string
		*pgxpool.Pool
	}{{"read", l.reads}, {"write", l.writes}} {
		stat := pool.Stat()
		w.Gauges("wallet_postgres_"+pool.name+"_connections", "Connections to Postgres.",
			metric.Sample{Labels: `state="busy"`, Value: float64(stat.AcquiredConns())},
			metric.Sample{Labels: `state="idle"`, Value: float64(stat.IdleConns())})
	}
}

// -----------------------------------------------------------------------------------------------------------
// Holds over time
// -----------------------------------------------------------------------------------------------------------

// sweep releases holds that are due, as long as ctx lives: a second late at most. Every replica does, and the
// reserved key sees to it that each happens once. Captures do not wait for it: they look at the clock.
func (l *ledger) sweep(ctx context.Context) error {
	const pause = time.Second
	for last := ""; ; {
		found, err := l.releaseDue(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != last:
			slog.Warn("due holds not released, will try again", "error", err)
			last = err.Error()
		case err == nil:
			last = ""
		}
		if found == dueMax && err == nil {
			continue
		}
		if parts.Sleep(ctx, pause/2+rand.N(pause/2)) != nil {
			return nil
		}
	}
}

const dueHolds = `
SELECT wallet_id, seq FROM hold WHERE status = 'open' AND expires_at <= now() ORDER BY expires_at LIMIT $1`

func (l *ledger) releaseDue(ctx context.Context) (found int, err error) {
	ctx, cancel := context.WithTimeout(ctx, l.rerunBudget)
	defer cancel()
	rows, _ := l.reads.Query(ctx, dueHolds, dueMax)
	var k entryKey
	var due []*operation
	_, err = pgx.ForEachRow(rows, []any{&k.walletID, &k.seq}, func() error {
		due = append(due, expiryOf(k.walletID, k.seq))
		return nil
	})
	if err != nil {
		return 0, err
	}
	outcomes := make(chan error, len(due))
	for _, op := range due {
		go func() { outcomes <- l.do(ctx, op) }()
	}
	for range due {
		if e := <-outcomes; e != nil && e != errNotDue {
			err = e
		}
	}
	return len(due), err
}
