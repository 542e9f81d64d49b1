// The ledger: what money may do, and the only code that writes wallets and entries.
//
// Touches: Postgres (wallet, entry, currency), and through outbox.go the outbox, in the same commit.
// Promises: an operation that was answered is durable and applied once, however often its key is sent and
// whatever dies; a refused one leaves nothing behind; balances never go below zero and no amount is ever
// rounded.
//
// Operations are group-committed: handlers queue them, and while one batch is at Postgres the next one
// gathers by itself. No order between concurrent requests is promised; a request sent after another was
// answered sees its effect.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
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

	"wallet/internal/audit"
	"wallet/internal/metric"
)

// Kinds of entries, as entry_kind in schema.sql spells them. A transfer's operation has kindTransferOut and
// writes both.
const (
	kindDeposit     = "deposit"
	kindWithdrawal  = "withdrawal"
	kindTransferOut = "transfer_out"
	kindTransferIn  = "transfer_in"
	kindCreation    = "creation" // of a wallet: an operation, never an entry
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

	traceparent string // of the request, for the event; not stored in the ledger
}

// appendTransactionID appends the public id of the transaction that the entry belongs to: its initiating
// entry's.
func (e *entry) appendTransactionID(dst []byte) []byte {
	if e.Kind == kindTransferIn {
		return appendEntryID(dst, e.CounterpartyID, e.CounterpartySeq)
	}
	return appendEntryID(dst, e.WalletID, e.Seq)
}

// wallet is the head of a wallet's chain of entries.
type wallet struct {
	ID        int64
	Currency  string
	Balance   decimal.Decimal
	Seq       int64     // of the last entry; 0 before the first
	EntryAt   time.Time // the last entry's; zero before the first
	CreatedAt time.Time

	creationKey string
	exists      bool // in the database
	busy        bool // it exists, but somebody else holds its lock
	changed     bool // by this batch
}

// posted is a movement as it stands in the ledger: its initiating entry and, of a transfer, the payee's
// balance after it.
type posted struct {
	entry
	toBalance decimal.Decimal
}

// operation is what a request wants done, and then what came of it.
type operation struct {
	kind        string
	walletID    int64 // the initiating wallet; of a creation, the id given or chosen
	toID        int64 // of a transfer
	idChosen    bool  // by us, of a creation
	amount      amount
	currency    string // as named by the request; may be empty
	key         string
	traceparent string

	ctx  context.Context // the request's: if it ends before a batch forms, the operation is dropped
	done chan struct{}   // closed after the fields below are final

	posted   posted // of a movement
	created  wallet // of a creation
	replayed bool   // the key had been posted before: what is answered is what was answered then
	err      error  // a *refusal, errUnavailable or an unknown fault
}

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
// Amounts, keys and ids
// -----------------------------------------------------------------------------------------------------------

const (
	wholeDigitsMax  = 20 // before the point; wallet.balance's CHECK says the same
	decimalsMax     = 18 // after it, for any currency; currency.scale's CHECK says the same
	keyLenMax       = 255
	walletIDAutoMax = 1<<53 - 1 // of ids chosen by us: exact in a JavaScript number
)

var balanceLimit = decimal.New(1, wholeDigitsMax)

// amount is a positive decimal number and how many decimals it was written with.
type amount struct {
	decimal.Decimal
	decimals int32
}

// parseAmount reads a plain decimal number. Digits are counted before anything is computed, so that no text
// is expensive.
func parseAmount(s string) (amount, error) {
	rest, negative := strings.CutPrefix(s, "-")
	whole, fraction, pointed := strings.Cut(rest, ".")
	switch {
	case strings.ContainsAny(s, "eE") && strings.Trim(s, "0123456789.eE+-") == "":
		return amount{}, refuse("amount_exponent", "Write the amount without an exponent, such as \"10.50\".")
	case whole == "" || pointed && fraction == "" || strings.Trim(whole, "0123456789") != "" ||
		strings.Trim(fraction, "0123456789") != "":
		return amount{}, refuse("amount_malformed",
			"Write the amount as a plain decimal number, such as \"10.50\".")
	case len(whole) > 1 && whole[0] == '0':
		return amount{}, refuse("amount_malformed",
			"Write the amount without leading zeros, such as \"10.50\".")
	case len(whole) > wholeDigitsMax:
		return amount{}, refuse("amount_too_large", "An amount has at most %d digits before the point.",
			wholeDigitsMax)
	case len(fraction) > decimalsMax:
		return amount{}, refuse("amount_scale",
			"The amount has %d decimals; no currency here has more than %d.", len(fraction), decimalsMax)
	}
	value, err := decimal.NewFromString(rest)
	if err != nil {
		return amount{}, refuse("amount_malformed",
			"Write the amount as a plain decimal number, such as \"10.50\".")
	}
	if negative || value.IsZero() {
		return amount{}, refuse("amount_not_positive",
			"The amount must be greater than zero; the route says in which direction the money moves.")
	}
	return amount{value, int32(len(fraction))}, nil
}

// appendDecimal appends d as decimal.String writes it, without trailing zeros. Up to 18 digits take no
// arithmetic of big numbers.
func appendDecimal(dst []byte, d decimal.Decimal) []byte {
	places := int(-d.Exponent())
	if places < 0 || d.NumDigits() > 18 {
		return append(dst, d.String()...)
	}
	n := d.CoefficientInt64()
	for ; places > 0 && n%10 == 0; places-- {
		n /= 10
	}
	if n < 0 {
		dst, n = append(dst, '-'), -n
	}
	start := len(dst)
	dst = strconv.AppendInt(dst, n, 10)
	if places == 0 {
		return dst
	}
	for len(dst)-start <= places { // a digit before the point
		dst = slices.Insert(dst, start, '0')
	}
	return slices.Insert(dst, len(dst)-places, '.')
}

func decimalText(d decimal.Decimal) string {
	var room [48]byte
	return string(appendDecimal(room[:0], d))
}

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

// -----------------------------------------------------------------------------------------------------------
// The ledger and its writers
// -----------------------------------------------------------------------------------------------------------

type ledger struct {
	reads           *pgxpool.Pool
	writes          *pgxpool.Pool // one connection a writer
	cache           *cache        // nil without Redis
	writers         int
	batchOpsMax     int
	rerunBudget     time.Duration // how long a batch is run again after faults before its clients are told
	defaultCurrency string

	queue  chan *operation
	scales atomic.Pointer[map[string]int32] // the currency table: code to scale

	aside                               atomic.Int64 // operations that gather, or wait for a wallet in hand
	batches, operations, reruns, splits atomic.Int64
	batchSizes, batchSeconds            *metric.Histogram
}

// ledgerConfig is what the ledger is told; see the settings' table.
type ledgerConfig struct {
	defaultCurrency string
	writers         int
	batchOpsMax     int
	queueOpsMax     int
	requestTimeout  time.Duration
}

func newLedger(cfg ledgerConfig, reads, writes *pgxpool.Pool, cache *cache) *ledger {
	return &ledger{
		reads:           reads,
		writes:          writes,
		cache:           cache,
		writers:         cfg.writers,
		batchOpsMax:     cfg.batchOpsMax,
		rerunBudget:     cfg.requestTimeout,
		defaultCurrency: cfg.defaultCurrency,
		queue:           make(chan *operation, cfg.queueOpsMax),
		batchSizes:      metric.NewHistogram(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
		batchSeconds:    metric.NewHistogram(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5),
	}
}

// loadCurrencies reads the currency table: at start, and again every minute, so that a new row counts
// without a restart.
func (l *ledger) loadCurrencies(ctx context.Context) error {
	rows, _ := l.reads.Query(ctx, `SELECT code, scale FROM currency`)
	scales := make(map[string]int32)
	var code string
	var scale int32
	if _, err := pgx.ForEachRow(rows, []any{&code, &scale},
		func() error { scales[code] = scale; return nil }); err != nil {
		return fmt.Errorf("read currencies: %w", err)
	}
	if _, known := scales[l.defaultCurrency]; !known {
		return fmt.Errorf("DEFAULT_CURRENCY %s is not in the table currency", l.defaultCurrency)
	}
	l.scales.Store(&scales)
	return nil
}

// do queues an operation and waits for its outcome. When ctx ends first the outcome is unknown to the
// caller, and the operation may still be applied.
func (l *ledger) do(ctx context.Context, op *operation) error {
	op.ctx, op.done = ctx, make(chan struct{})
	select {
	case l.queue <- op:
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

// A batch has a fixed cost, about a dozen operations'. While one is at Postgres, another starts only for
// furtherBatchMin operations or after furtherBatchAfter, when something must hold the first one up.
const (
	furtherBatchMin   = 32 // operations
	furtherBatchAfter = 20 * time.Millisecond
)

// run hands batches to the writers until ctx ends and everything taken is posted. A batch forms while those
// before it are at Postgres; when none is there it starts at once, however small. It takes every waiting
// operation except those on wallets that another batch holds: they would block it on a lock.
func (l *ledger) run(ctx context.Context) error {
	free, finished := l.writers, make(chan []*operation, l.writers)
	inHand := make(map[int64]bool) // wallets of the batches at Postgres
	var gathered []*operation      // for the next batch, in order of arrival
	var waiting []*operation       // for a wallet in hand, likewise
	awaited := make(map[int64]bool)
	var overdue <-chan time.Time // set while operations gather beside a batch at Postgres
	stop := ctx.Done()
	for stop != nil || free < l.writers || len(gathered) > 0 || len(waiting) > 0 || len(l.queue) > 0 {
		l.aside.Store(int64(len(gathered) + len(waiting)))
		further := min(furtherBatchMin, l.batchOpsMax)
		queue := l.queue
		if free == 0 || len(waiting) >= l.batchOpsMax {
			queue = nil // what arrives waits there, up to its bound
		}
		select {
		case op := <-queue:
			gathered = append(gathered, op)
		case batch := <-finished:
			free++
			for _, op := range batch {
				delete(inHand, op.walletID)
				delete(inHand, op.toID)
			}
			gathered, waiting = append(waiting, gathered...), nil
			clear(awaited)
		case <-overdue:
			further = 0
		case <-stop:
			stop = nil
			continue
		}
		for len(gathered) < l.batchOpsMax && len(l.queue) > 0 {
			gathered = append(gathered, <-l.queue)
		}
		if free < l.writers && len(gathered) < further {
			if overdue == nil && len(gathered) > 0 {
				overdue = time.After(furtherBatchAfter)
			}
			continue
		}
		overdue = nil
		batch := make([]*operation, 0, len(gathered))
		for _, op := range gathered {
			switch {
			case op.ctx.Err() != nil:
				op.err = errUnavailable // nobody is waiting any more, and nothing was done
				close(op.done)
			case len(batch) == l.batchOpsMax || inHand[op.walletID] || inHand[op.toID] ||
				awaited[op.walletID] || awaited[op.toID]:
				// Those behind it wait as well, or it might wait for ever.
				awaited[op.walletID], awaited[op.toID] = true, op.toID != 0
				waiting = append(waiting, op)
			default:
				batch = append(batch, op)
			}
		}
		gathered = nil
		if len(batch) == 0 {
			continue
		}
		for _, op := range batch {
			inHand[op.walletID], inHand[op.toID] = true, op.toID != 0
		}
		free--
		go func() {
			t, heads := l.cache.ticket(), make(map[int64]cachedBalance, len(batch))
			t.moves = true
			l.post(batch, heads)
			finished <- batch
			l.announce(batch, t, heads)
		}()
	}
	return nil
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
			switch sqlState(err) {
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

func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// remedy says what helps against a failed batch: to run it again, to split it, or neither.
func remedy(err error) (rerun, split bool) {
	var pgErr *pgconn.PgError
	if errors.Is(err, errBroken) {
		return false, true
	}
	if !errors.As(err, &pgErr) {
		return true, false // a lost connection, a timeout: the outcome is unknown
	}
	switch {
	case pgErr.Code == "23505" && (pgErr.ConstraintName == "wallet_pkey" ||
		pgErr.ConstraintName == "wallet_creation_key_once"):
		return true, false // another writer made the wallet first: this time we lock it
	case pgErr.Code == "23514" && strings.HasPrefix(pgErr.Message, "no partition"):
		return true, false // an outbox without this hour's partition
	}
	switch pgErr.Code[:2] {
	case "08", // connection exception
		"55", // lock_timeout
		"25", // idle_in_transaction_session_timeout; read-only after a failover
		"40", // serialization failure, deadlock
		"53", // out of connections, disk, memory
		"57", // statement_timeout, shutdown, crash, not up yet
		"58": // system error
		return true, false
	}
	return false, true
}

// putOff queues an operation again after a pause, unless its client gives up before.
func (l *ledger) putOff(op *operation) {
	select {
	case <-time.After(100 * time.Millisecond):
		l.queue <- op
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
	lockWallets = `
SELECT id, currency, balance::text, seq, entry_at, created_at FROM wallet
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

	insertWallets = `
INSERT INTO wallet (id, currency, balance, seq, entry_at, created_at, creation_key)
SELECT unnest($1::bigint[]), unnest($2::text[]), unnest($3::text[]::numeric[]), unnest($4::bigint[]),
       unnest($5::timestamptz[]), unnest($6::timestamptz[]), nullif(unnest($7::text[]), '')`

	updateWallets = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[]::numeric[]) AS balance,
             unnest($3::bigint[]) AS seq, unnest($4::timestamptz[]) AS entry_at) n
WHERE wallet.id = ANY (ARRAY[n.id])`

	insertEntries = `
INSERT INTO entry (wallet_id, seq, counterparty_id, counterparty_seq, created_at, kind, amount, balance,
                   idempotency_key)
SELECT unnest($1::bigint[]), unnest($2::bigint[]), nullif(unnest($3::bigint[]), 0),
       nullif(unnest($4::bigint[]), 0), unnest($5::timestamptz[]), unnest($6::text[]::entry_kind[]),
       unnest($7::text[]::numeric[]), unnest($8::text[]::numeric[]), unnest($9::text[])`
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
		op.err, op.replayed, op.posted, op.created = nil, false, posted{}, wallet{} // of a former try
		op.err = p.decide(op)
		if op.replayed && former.is(op) {
			op.replayed = false // it was our own try that posted it, whose answer was lost
		}
	}
	if err := p.check(); err != nil {
		return err
	}
	if err := p.commit(ctx, conn); err != nil {
		return err
	}
	// What was accepted is durable.
	if l.cache != nil {
		p.collectHeads(batch, heads)
	}
	return nil
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

// collectHeads adds each wallet's newest balance: under the lock that was its head. A refusal or a replay
// tells of it as well. Of a wallet that could not be locked, a replay tells what it was.
func (p *posting) collectHeads(batch []*operation, heads map[int64]cachedBalance) {
	newest := func(walletID, seq int64, currency string, balance decimal.Decimal) {
		if heads[walletID].seq < seq {
			heads[walletID] = cachedBalance{walletID, seq, currency, decimalText(balance)}
		}
	}
	for _, w := range p.wallets {
		newest(w.ID, w.Seq, w.Currency, w.Balance)
	}
	for _, op := range batch {
		if m := &op.posted; op.replayed {
			newest(m.WalletID, m.Seq, m.Currency, m.Balance)
			newest(m.CounterpartyID, m.CounterpartySeq, m.Currency, m.toBalance)
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
	entries         []entry
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
		entries:         make([]entry, 0, 2*len(batch)),
	}
	var ids, keyWallets []int64
	var keys, creationKeys []string
	asked := make(map[movementKey]bool, len(batch))
	for _, op := range batch {
		ids = append(ids, op.walletID)
		if op.kind == kindCreation {
			creationKeys = append(creationKeys, op.key)
			continue
		}
		if op.toID != 0 {
			ids = append(ids, op.toID)
		}
		if k := (movementKey{op.walletID, op.key}); !asked[k] {
			asked[k] = true
			keyWallets, keys = append(keyWallets, op.walletID), append(keys, op.key)
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
	return p, conn.SendBatch(ctx, &b).Close()
}

func (p *posting) scanWallets(rows pgx.Rows) error {
	var w wallet
	var balance string
	var entryAt *time.Time
	_, err := pgx.ForEachRow(rows, []any{&w.ID, &w.Currency, &balance, &w.Seq, &entryAt, &w.CreatedAt},
		func() (err error) {
			found := w
			found.exists = true
			if entryAt != nil {
				found.EntryAt = *entryAt
			}
			found.Balance, err = decimal.NewFromString(balance)
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

// A movement is read the same way wherever it is read: its initiating entry e, the wallet's currency, the
// payee's balance.
const selectPosted = `
SELECT e.wallet_id, e.seq, coalesce(e.counterparty_id, 0), coalesce(e.counterparty_seq, 0), e.created_at,
       e.kind::text, e.amount::text,
       e.balance::text, e.idempotency_key, (SELECT w.currency FROM wallet w WHERE w.id = e.wallet_id),
       coalesce((
           SELECT p.balance FROM entry p WHERE p.wallet_id = e.counterparty_id AND p.seq = e.counterparty_seq
       ), 0)::text`

// scanPosted reads what selectPosted selects, and what stands behind it.
func scanPosted(row pgx.Row, m *posted, more ...any) error {
	return row.Scan(append([]any{&m.WalletID, &m.Seq, &m.CounterpartyID, &m.CounterpartySeq, &m.CreatedAt,
		&m.Kind, &m.Amount, &m.Balance, &m.Key, &m.Currency, &m.toBalance}, more...)...)
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
		same := before.Kind == op.kind && before.CounterpartyID == op.toID &&
			before.Amount.Abs().Equal(op.amount.Decimal) &&
			(op.currency == "" || op.currency == before.Currency)
		if !same {
			return refuse("idempotency_key_reused",
				"This key was used on wallet %d for another operation (transaction %s). Use a new key "+
					"for a new operation.",
				op.walletID, entryID(before.WalletID, before.Seq))
		}
		op.posted, op.replayed = *before, true
		return nil
	}

	from := p.wallets[op.walletID]
	if from.busy || op.toID != 0 && p.wallets[op.toID].busy {
		return errLocked
	}
	opens := op.kind == kindDeposit // may make its wallet
	if from.Currency == "" && !opens {
		return errNoWallet(op.walletID)
	}
	currency := cmp.Or(op.currency, from.Currency, p.defaultCurrency)
	scale, known := p.scales[currency]
	switch {
	case !known:
		return refuse("currency_unknown",
			"Currency %q is not in the currency table. Use an ISO 4217 code such as \"USD\".", currency)
	case from.Currency != "" && from.Currency != currency:
		return refuse("currency_mismatch",
			"Wallet %d is in %s, the request in %s. Use a wallet in the request's "+
				"currency.", from.ID, from.Currency, currency)
	case op.amount.decimals > scale:
		return refuse("amount_scale",
			"The amount has %d decimals, %s has %d. Nothing is ever rounded: send the exact "+
				"amount.", op.amount.decimals, currency, scale)
	case !opens && from.Balance.LessThan(op.amount.Decimal):
		return refuse("insufficient_funds",
			"Wallet %d holds less than the amount. Deposit first; the same key may then be used "+
				"again.", from.ID)
	}

	amount := op.amount.Decimal
	at := latest(p.now, from.EntryAt)
	first := entry{WalletID: from.ID, Kind: op.kind, Currency: currency, Key: op.key,
		traceparent: op.traceparent}
	switch op.kind {
	case kindDeposit:
		if from.Balance.Add(amount).GreaterThanOrEqual(balanceLimit) {
			return refuse("balance_limit",
				"The balance of wallet %d would have more than %d digits before the "+
					"point.", from.ID, wholeDigitsMax)
		}
		first.Amount = amount
		p.append(from, &first, at)
		op.posted = posted{entry: first}

	case kindWithdrawal:
		first.Amount = amount.Neg()
		p.append(from, &first, at)
		op.posted = posted{entry: first}

	case kindTransferOut:
		to := p.wallets[op.toID]
		switch {
		case to.Currency != "" && to.Currency != currency:
			return refuse("currency_mismatch",
				"Wallet %d is in %s, wallet %d in %s. A transfer stays in one "+
					"currency.", from.ID, from.Currency, to.ID, to.Currency)
		case to.Balance.Add(amount).GreaterThanOrEqual(balanceLimit):
			return refuse("balance_limit",
				"The balance of wallet %d would have more than %d digits before the "+
					"point.", to.ID, wholeDigitsMax)
		}
		at = latest(at, to.EntryAt)
		second := first
		first.Amount, first.CounterpartyID, first.CounterpartySeq = amount.Neg(), to.ID, to.Seq+1
		second.Amount, second.CounterpartyID, second.CounterpartySeq = amount, from.ID, from.Seq+1
		second.WalletID, second.Kind = to.ID, kindTransferIn
		p.append(from, &first, at)
		p.append(to, &second, at)
		op.posted = posted{first, second.Balance}

	default:
		return fmt.Errorf("operation of unknown kind %q", op.kind)
	}
	accepted := op.posted
	p.byKey[movementKey{op.walletID, op.key}] = &accepted
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
		if e.Balance.IsNegative() || e.Seq > w.Seq || e.Seq == w.Seq && !e.Balance.Equal(w.Balance) {
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
	for _, w := range p.wallets {
		if w.changed && w.exists {
			changed = append(changed, w)
		} else if w.changed {
			missing = append(missing, w)
		}
	}
	if len(missing) > 0 {
		slices.SortFunc(missing, func(a, b *wallet) int { return cmp.Compare(a.ID, b.ID) })
		c := walletColumns(missing)
		b.Queue(insertWallets, c.ids, c.currencies, c.balances, c.seqs, c.entryAts, c.createdAts,
			c.creationKeys)
	}
	var updated *int64
	if len(changed) > 0 {
		c := walletColumns(changed)
		updated = new(int64)
		b.Queue(updateWallets, c.ids, c.balances, c.seqs, c.entryAts).Exec(func(tag pgconn.CommandTag) error {
			*updated = tag.RowsAffected()
			return nil
		})
	}
	if n := len(p.entries); n > 0 {
		ids, seqs, toIDs, toSeqs := make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n)
		ats, kinds, keys := make([]time.Time, n), make([]string, n), make([]string, n)
		amounts, balances := make([]string, n), make([]string, n)
		for i := range p.entries {
			e := &p.entries[i]
			ids[i], seqs[i], toIDs[i], toSeqs[i] = e.WalletID, e.Seq, e.CounterpartyID, e.CounterpartySeq
			ats[i], kinds[i], keys[i] = e.CreatedAt, e.Kind, e.Key
			amounts[i], balances[i] = decimalText(e.Amount), decimalText(e.Balance)
		}
		b.Queue(insertEntries, ids, seqs, toIDs, toSeqs, ats, kinds, amounts, balances, keys)
		queueOutbox(&b, p.entries)
	}
	b.Queue(`COMMIT`)
	if err := conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	if updated != nil && *updated != int64(len(changed)) {
		panic(fmt.Sprintf("updated %d wallets of %d that were locked", *updated, len(changed)))
	}
	return nil
}

type walletArrays struct {
	ids, seqs                          []int64
	currencies, balances, creationKeys []string
	createdAts                         []time.Time
	entryAts                           []*time.Time
}

func walletColumns(wallets []*wallet) walletArrays {
	var c walletArrays
	for _, w := range wallets {
		var entryAt *time.Time
		if w.Seq > 0 {
			entryAt = &w.EntryAt
		}
		c.ids, c.seqs = append(c.ids, w.ID), append(c.seqs, w.Seq)
		c.currencies, c.creationKeys = append(c.currencies, w.Currency), append(c.creationKeys, w.creationKey)
		c.balances = append(c.balances, decimalText(w.Balance))
		c.createdAts, c.entryAts = append(c.createdAts, w.CreatedAt), append(c.entryAts, entryAt)
	}
	return c
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// -----------------------------------------------------------------------------------------------------------
// Reads
// -----------------------------------------------------------------------------------------------------------

const (
	selectWallet = `SELECT id, currency, balance::text, seq, entry_at, created_at FROM wallet WHERE id = $1`

	selectTransaction = selectPosted + `
FROM entry e WHERE e.wallet_id = $1 AND e.seq = $2 AND e.kind <> 'transfer_in'`

	selectPageUp   = selectPage + `ASC LIMIT $6) e ON true ORDER BY e.seq ASC`
	selectPageDown = selectPage + `DESC LIMIT $6) e ON true ORDER BY e.seq DESC`

	// The wallet's head and the page's bounds stand beside each entry, and beside none where there is none.
	selectPage = `
WITH s AS MATERIALIZED (
    SELECT w.id, w.currency, w.balance, w.seq,
           coalesce(nullif($2::bigint, 0), seq_since(w.id, coalesce($4, now() - interval '24 hours'))) AS low,
           coalesce(nullif($3::bigint, 0), seq_since(w.id, $5)) AS high
    FROM wallet w WHERE w.id = $1
)` + selectPosted + `, s.currency, s.balance::text, s.seq, s.low, s.high
FROM s LEFT JOIN LATERAL (
    SELECT * FROM entry WHERE wallet_id = s.id AND seq >= s.low AND seq < s.high ORDER BY seq `
)

// wallet reads one wallet from Postgres.
func (l *ledger) wallet(ctx context.Context, id int64) (*wallet, error) {
	return l.readWallet(ctx, id, l.cache.ticket())
}

// readWallet reads a wallet, and puts what it found into the cache.
func (l *ledger) readWallet(ctx context.Context, id int64, t ticket) (*wallet, error) {
	found := posting{wallets: make(map[int64]*wallet)}
	rows, _ := l.reads.Query(ctx, selectWallet, id)
	if err := found.scanWallets(rows); err != nil {
		return nil, fmt.Errorf("read wallet: %w", err)
	}
	w := found.wallets[id]
	if w == nil {
		return nil, errNoWallet(id)
	}
	l.cache.put(t, map[int64]cachedBalance{id: w.cached()})
	return w, nil
}

func (w *wallet) cached() cachedBalance {
	return cachedBalance{w.ID, w.Seq, w.Currency, decimalText(w.Balance)}
}

// balance reads a balance that is at least as new as entry minSeq, from the cache unless fresh.
func (l *ledger) balance(ctx context.Context, id, minSeq int64, fresh bool) (cachedBalance, error) {
	t := l.cache.ticket()
	if !fresh {
		b, found, ok := l.cache.get(ctx, id, minSeq)
		if ok {
			return b, nil
		}
		t = found
	}
	w, err := l.readWallet(ctx, id, t)
	if err != nil {
		return cachedBalance{}, err
	}
	if w.Seq < minSeq {
		return cachedBalance{}, refuse("seq_not_reached",
			"Wallet %d is at seq %d; no entry %d has been written.", id, w.Seq, minSeq)
	}
	return w.cached(), nil
}

// transaction reads a movement by its initiating entry.
func (l *ledger) transaction(ctx context.Context, walletID, seq int64) (*posted, error) {
	var m posted
	t := l.cache.ticket()
	err := scanPosted(l.reads.QueryRow(ctx, selectTransaction, walletID, seq), &m)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, refuse("transaction_not_found", "There is no transaction %s.", entryID(walletID, seq))
	}
	if err != nil {
		return nil, fmt.Errorf("read transaction: %w", err)
	}
	told := map[int64]cachedBalance{walletID: {walletID, seq, m.Currency, decimalText(m.Balance)}}
	if m.CounterpartyID != 0 {
		told[m.CounterpartyID] = cachedBalance{m.CounterpartyID, m.CounterpartySeq, m.Currency,
			decimalText(m.toBalance)}
	}
	l.cache.put(t, told)
	return &m, nil
}

// page is a stretch of a wallet's history, ascending or descending, limit entries at most: those of from <=
// seq < to or, where these are 0, of since <= created_at < until. A nil since means 24 hours ago, by the
// database's clock as the entries' times are.
type page struct {
	from, to   int64
	since      *time.Time
	until      time.Time
	descending bool
	limit      int
}

// cursor names the rest of a history after a page: opaque to clients.
func (p page) cursor() string {
	order := 'a'
	if p.descending {
		order = 'd'
	}
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%c.%d.%d", order, p.from, p.to))
}

func parseCursor(s string) (page, error) {
	bad := refuse("parameter_malformed",
		"This cursor is not one of ours. Take it from the Link header of the page before.")
	raw, err := base64.RawURLEncoding.DecodeString(s)
	parts := strings.Split(string(raw), ".")
	if err != nil || len(parts) != 3 || parts[0] != "a" && parts[0] != "d" {
		return page{}, bad
	}
	p := page{descending: parts[0] == "d"}
	var errs [2]error
	p.from, errs[0] = strconv.ParseInt(parts[1], 10, 64)
	p.to, errs[1] = strconv.ParseInt(parts[2], 10, 64)
	if errs[0] != nil || errs[1] != nil || p.from < 1 || p.to < 1 || p.cursor() != s {
		return page{}, bad
	}
	return p, nil
}

// history reads one page of a wallet's entries, and sets the page's from and to. It is one statement, so
// that everything is of one moment.
func (l *ledger) history(ctx context.Context, walletID int64, p *page) (entries []entry, err error) {
	query := selectPageUp
	if p.descending {
		query = selectPageDown
	}
	t := l.cache.ticket()
	rows, _ := l.reads.Query(ctx, query, walletID, p.from, p.to, p.since, p.until, p.limit)
	defer rows.Close()
	head := wallet{ID: walletID}
	for rows.Next() {
		var m posted
		of := []any{&head.Currency, &head.Balance, &head.Seq, &p.from, &p.to}
		if rows.RawValues()[0] == nil { // no entry
			err = rows.Scan(append(make([]any, len(rows.RawValues())-len(of)), of...)...)
		} else if err = scanPosted(rows, &m, of...); err == nil {
			entries = append(entries, m.entry)
		}
		if err != nil {
			break
		}
	}
	if err = cmp.Or(err, rows.Err()); err != nil {
		return nil, fmt.Errorf("read history: %w", err)
	}
	if head.Currency == "" {
		return nil, errNoWallet(walletID)
	}
	l.cache.put(t, map[int64]cachedBalance{walletID: head.cached()})
	return entries, nil
}

func errNoWallet(id int64) *refusal {
	return refuse("wallet_not_found", "Wallet %d does not exist. A deposit creates it.", id)
}

func (l *ledger) writeMetrics(w *metric.Writer) {
	w.Counter("wallet_batches_total", "Batches committed.", float64(l.batches.Load()))
	w.Counter("wallet_operations_total", "Operations decided, replays and refusals included.",
		float64(l.operations.Load()))
	w.Counter("wallet_batch_reruns_total", "Batches run again after a fault.", float64(l.reruns.Load()))
	w.Counter("wallet_batch_splits_total", "Batches halved because one operation failed them.",
		float64(l.splits.Load()))
	w.Gauge("wallet_queue_operations", "Operations that wait for a batch.",
		float64(len(l.queue))+float64(l.aside.Load()))
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

// events makes the events of the entries again, and checks each wallet's chain of entries.
func (a *auditedLedger) events(ctx context.Context, after, last int64, visit func(audit.Event) error) error {
	var former entry // of the same wallet
	var buf []byte
	finish := func() {
		if seq := a.seqs[former.WalletID]; former.Seq != seq {
			a.report.Find("wallet %d has seq %d, but its last entry is number %d",
				former.WalletID, seq, former.Seq)
		}
	}
	err := readChains(ctx, a.past, after, last, 0, func(e *entry) error {
		a.entries++
		if a.entries%50_000 == 0 {
			a.report.Progress("ledger: wallet %d, %d entries", e.WalletID, a.entries)
		}
		if e.WalletID != former.WalletID {
			finish()
			former = entry{WalletID: e.WalletID}
		}
		if e.Seq != former.Seq+1 {
			a.report.Find("entry %s follows number %d", entryID(e.WalletID, e.Seq), former.Seq)
		}
		if !e.Balance.Equal(former.Balance.Add(e.Amount)) {
			a.report.Find("entry %s: its balance is not the former one plus its amount",
				entryID(e.WalletID, e.Seq))
		}
		if e.CreatedAt.Before(former.CreatedAt) {
			a.report.Find("entry %s is older than the one before it", entryID(e.WalletID, e.Seq))
		}
		former = *e
		buf = appendEvent(buf[:0], e)
		return visit(audit.Event{Key: e.WalletID, Number: e.Seq, Value: buf})
	})
	if err != nil {
		return err
	}
	finish()
	// Heads of chains that do not stand on their last entry.
	rows, _ := a.past.Query(ctx, `
SELECT w.id FROM wallet w LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
WHERE w.id > $1 AND w.id <= $2
  AND (w.balance, w.entry_at) IS DISTINCT FROM (coalesce(e.balance, 0), e.created_at)`, after, last)
	var id int64
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
		a.report.Find("wallet %d: its balance or time is not its last entry's", id)
		return nil
	})
	return err
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
SELECT e.wallet_id, e.seq, coalesce(e.counterparty_id, 0), coalesce(e.counterparty_seq, 0), e.created_at,
       e.kind::text, e.amount, e.balance, e.idempotency_key, w.currency
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
	columns := []any{&e.WalletID, &e.Seq, &e.CounterpartyID, &e.CounterpartySeq, &e.CreatedAt, &e.Kind,
		&e.Amount, &e.Balance, &e.Key, &e.Currency}
	if _, err := pgx.ForEachRow(rows, columns, func() error { return visit(&e) }); err != nil {
		return fmt.Errorf("read entries: %w", err)
	}
	return nil
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
