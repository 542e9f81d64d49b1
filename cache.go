// The cache, and all that is read: balances of wallets that were asked for, in Redis; everything else, and
// what the cache does not have, from Postgres; the ledger whole, for audit and recovery.
//
// Touches: Redis, and Postgres without writing there. The cache is never authoritative: whatever goes wrong
// with it is counted, logged once and answered from Postgres. Promises: a balance read from here is never
// behind anything that was answered before the read was sent. Why:
//
//  1. A wallet's key holds nothing, a balance, or a reader's token. It may become empty at any
//     time: it expires, Redis evicts or loses it, a new generation begins.
//  2. An empty key is filled by readers only. A reader leaves a token there, or shares the one that
//     it finds; then it reads Postgres; then it replaces that very token, and nothing else.
//  3. Whoever is about to answer with something from Postgres puts it first: an older balance gives
//     way to it, a token is removed, an empty key stays empty.
//  4. So no key holds a balance older than one that was put. A fill read Postgres after its token
//     came, and a put since then took the token away. A put replaces only what is older. How late
//     either arrives makes no difference.
//  5. A put that failed may leave an older balance behind, and a server that was restarted may hold
//     older data. Then this replica begins a new generation, in which everything of before counts
//     as nothing, and reads nothing until then.
//
// The relay puts as well, for a writer that died before it could. What it puts, Postgres may show a moment
// later, so it does not stand for the writer's own put.
//
// Not promised: while Redis answers others but not this replica, they may serve what this one could not
// replace.

package main

import (
	"bytes"
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
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/shopspring/decimal"

	"wallet/internal/api"
	"wallet/internal/audit"
	"wallet/internal/metric"
	"wallet/internal/money"
)

// cachedBalance is a wallet's balance after entry number seq, and what was held of it.
type cachedBalance struct {
	walletID, seq           int64
	currency, balance, held string
}

// available is the balance less what is held, as text.
func (b *cachedBalance) available() (string, error) {
	balance, err := decimal.NewFromString(b.balance)
	held, heldErr := decimal.NewFromString(b.held)
	if err = errors.Join(err, heldErr); err != nil {
		return "", fmt.Errorf("cached balance of wallet %d: %w", b.walletID, err)
	}
	return money.Text(balance.Sub(held)), nil
}

// cache is safe for concurrent use.
//
// The generation key, one for a ledger, holds a random word. A wallet's key holds "generation seq currency
// balance held", or "generation ?word" for a token; it counts only in its own generation. Wallets' keys also
// name the life of the database (its timeline and the start of its server), so that a balance of before a
// failover or a restored volume has no place to go, however late it comes.
type cache struct {
	redis   *redis.Client
	ttl     time.Duration
	timeout time.Duration

	keys atomic.Pointer[cacheKeys] // nil until the first Postgres connection tells

	// losses counts the times from which on Redis may hold what is older than an answer; mended is how many
	// of them a new generation has made up for. Only while both are equal is anything read. It begins with
	// one loss: nobody knows what this replica's former life left out.
	losses, mended atomic.Int64
	// away: no new generation could be begun. Until one is, reads put nothing, each a loss; movements try.
	away atomic.Bool

	mu     sync.Mutex
	server string          // run id of the Redis that answered last
	sent   map[int64]int64 // newest seq of each wallet that was put under sentTo: it need not be put again
	sentTo *cacheKeys

	hits, misses, errors, puts, generations atomic.Int64
}

// cacheKeys is where one life of one ledger has its balances.
type cacheKeys struct{ generation, wallets string }

func (k *cacheKeys) wallet(id int64) string { return k.wallets + strconv.FormatInt(id, 10) }

const sentMax = 50_000 // wallets; then sent begins anew

// cacheConfig is what the cache is told; see the settings' table.
type cacheConfig struct {
	redisURL     string
	cacheTTL     time.Duration
	cacheTimeout time.Duration
}

func newCache(cfg cacheConfig) (*cache, error) {
	options, err := redis.ParseURL(cfg.redisURL)
	if err != nil {
		return nil, fmt.Errorf("set REDIS_URL to a URL such as redis://host:6379/0: %w", err)
	}
	c := &cache{ttl: cfg.cacheTTL, timeout: cfg.cacheTimeout, sent: make(map[int64]int64)}
	options.DialTimeout = time.Second
	options.ReadTimeout, options.WriteTimeout = cfg.cacheTimeout, cfg.cacheTimeout
	options.ContextTimeoutEnabled = true
	options.MaxRetries = -1
	options.OnConnect = c.greet
	c.redis = redis.NewClient(options)
	c.losses.Store(1)
	return c, nil
}

// enter tells which ledger the balances are of, and which life of its database. Each new Postgres
// connection says it again: that is how a failover, a restart and a restored volume show.
func (c *cache) enter(ledger, life string) {
	prefix := "wallet:{" + ledger + "}:" // one hash slot, should Redis be a cluster
	keys := &cacheKeys{generation: prefix + "generation", wallets: prefix + life + ":"}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.keys.Load(); old == nil || *old != *keys {
		c.keys.Store(keys)
		c.losses.Add(1)
	}
}

// greet looks who answers on a new connection to Redis. Another run id is another server, or the same one
// after a restart: it may hold older data.
func (c *cache) greet(ctx context.Context, conn *redis.Conn) error {
	info, err := conn.Info(ctx, "server").Result()
	var refusal redis.Error
	// One that does not know INFO, or does not let us, is taken as it is.
	if err != nil && !errors.As(err, &refusal) {
		return err
	}
	_, id, _ := strings.Cut(info, "run_id:")
	id, _, _ = strings.Cut(id, "\r")
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server != "" && c.server != id {
		c.losses.Add(1)
	}
	c.server = id
	return nil
}

// run begins a new generation whenever something was lost and no put does it first, as soon as Redis can be
// reached.
func (c *cache) run(ctx context.Context) error {
	defer c.redis.Close()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	inUse, logged := false, false
	for {
		if keys := c.keys.Load(); keys != nil {
			var err error
			if _, _, usable := c.usable(); !usable {
				err = c.begin(ctx, keys)
			}
			_, _, usable := c.usable()
			switch {
			case ctx.Err() != nil:
				return nil
			case usable && !inUse:
				slog.Info("cache in use")
				inUse, logged = true, false
			case err != nil && !logged:
				slog.Warn("cache out of use, reads go to Postgres", "error", err)
				inUse, logged = false, true
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// begin starts a new generation. It makes up for the losses of before, and not for one that happens
// meanwhile.
func (c *cache) begin(ctx context.Context, keys *cacheKeys) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	losses := c.losses.Load()
	if err := c.redis.Set(ctx, keys.generation, newWord(), 0).Err(); err != nil {
		c.away.Store(true)
		return err
	}
	c.away.Store(false)
	c.mend(losses)
	return nil
}

func (c *cache) mend(losses int64) {
	c.generations.Add(1)
	for {
		mended := c.mended.Load()
		if mended >= losses || c.mended.CompareAndSwap(mended, losses) {
			return
		}
	}
}

func newWord() string { return strconv.FormatUint(rand.Uint64(), 36) }

// usable says whether balances may be read, from where, and after how many losses: while that number
// stands, what was read counts.
func (c *cache) usable() (keys *cacheKeys, losses int64, ok bool) {
	losses = c.losses.Load()
	keys = c.keys.Load()
	return keys, losses, keys != nil && c.mended.Load() == losses
}

// fail counts a fault of Redis. Whatever the call was for may not have arrived.
func (c *cache) fail(err error) {
	c.errors.Add(1)
	if before := c.losses.Add(1) - 1; before == c.mended.Load() {
		slog.Warn("cache failed", "error", err)
	}
}

// ticket says under which circumstances something is read from Postgres or committed there; it is taken
// before. The zero ticket is that of nobody who has spoken to Postgres before.
type ticket struct {
	keys   *cacheKeys
	losses int64
	found  string // what a reader saw in the wallet's key: a token, or a balance that was not new enough
	moves  bool   // a movement's: its answer waits for one more try, also while Redis seems to be away
	early  bool   // the relay's: it has a commit out of the WAL, maybe a moment before Postgres shows it
}

func (c *cache) ticket() ticket {
	if c == nil {
		return ticket{}
	}
	return ticket{keys: c.keys.Load(), losses: c.losses.Load()}
}

// claimKey returns what a wallet's key holds in the present generation, or leaves a token there.
// KEYS: the generation key, the wallet's. ARGV: a generation in case there is none, a token, TTL in ms.
var claimKey = redis.NewScript(`
local generation = redis.call('GET', KEYS[1])
if not generation then
    generation = ARGV[1]
    redis.call('SET', KEYS[1], generation)
end
local found = redis.call('GET', KEYS[2])
if found and string.sub(found, 1, #generation + 1) == generation .. ' ' then return found end
local token = generation .. ' ?' .. ARGV[2]
redis.call('SET', KEYS[2], token, 'PX', ARGV[3])
return token`)

// get looks a balance up that is at least as new as entry minSeq. Where it finds none, the ticket lets put
// bring in what is then read from Postgres.
func (c *cache) get(ctx context.Context, walletID, minSeq int64) (b cachedBalance, t ticket, ok bool) {
	if c == nil {
		return b, t, false
	}
	keys, losses, usable := c.usable()
	t = ticket{keys: keys, losses: losses}
	if !usable {
		return b, t, false
	}
	timed, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	values, err := c.redis.MGet(timed, keys.generation, keys.wallet(walletID)).Result()
	var found string
	if err == nil {
		generation, _ := values[0].(string)
		found, _ = values[1].(string)
		if generation == "" || !strings.HasPrefix(found, generation+" ") {
			found, err = c.claim(timed, keys, walletID)
		}
	}
	if err != nil {
		if ctx.Err() == nil { // else it was the client who left
			c.fail(err)
		}
		return b, t, false
	}
	if c.losses.Load() != losses { // such as another server on a new connection
		c.misses.Add(1)
		return b, t, false
	}
	t.found = found
	if b, ok = parseBalance(walletID, found); !ok || b.seq < minSeq {
		c.misses.Add(1)
		return b, t, false
	}
	c.hits.Add(1)
	return b, t, true
}

func (c *cache) claim(ctx context.Context, keys *cacheKeys, walletID int64) (found string, err error) {
	return claimKey.Run(ctx, c.redis, []string{keys.generation, keys.wallet(walletID)}, newWord(), newWord(),
		c.ttl.Milliseconds()).Text()
}

// parseBalance reads a wallet's key; ok is false for a token, and for what a replica of the release before
// wrote, which knew of no holds.
func parseBalance(walletID int64, value string) (b cachedBalance, ok bool) {
	fields := strings.Fields(value)
	if len(fields) != 5 {
		return b, false
	}
	seq, err := strconv.ParseInt(fields[1], 10, 64)
	return cachedBalance{walletID, seq, fields[2], fields[3], fields[4]}, err == nil
}

// put takes balances that were read from Postgres, or committed there, since the ticket was taken, and that
// are about to be answered. It drops from the map those that this process has put before. It takes at most
// twice CACHE_TIMEOUT and never fails: what does not arrive is made up for by a new generation.
func (c *cache) put(t ticket, balances map[int64]cachedBalance) {
	if c == nil {
		return
	}
	keys := c.keys.Load()
	c.mu.Lock()
	for id, b := range balances {
		known := c.sentTo == keys && c.sent[id] >= b.seq || b.seq == 0 // nothing is older than seq 0
		if known && t.found == "" {
			delete(balances, id)
		}
	}
	c.mu.Unlock()
	if keys == nil || len(balances) == 0 {
		return
	}
	if c.away.Load() && !t.moves {
		c.losses.Add(1)
		return
	}
	if t.keys != keys {
		c.losses.Add(1) // the database began another life meanwhile: of which are they?
	}
	if t.losses != c.losses.Load() {
		t.found = ""
	}
	if !c.store(keys, t.found, balances) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// A reader may still find the one before in Postgres: the writer puts again.
	if t.keys != keys || t.early {
		return
	}
	if c.sentTo != keys || len(c.sent) > sentMax {
		c.sent, c.sentTo = make(map[int64]int64, len(balances)), keys
	}
	for id, b := range balances {
		c.sent[id] = max(c.sent[id], b.seq)
	}
}

// storeNewer puts balances where older ones are, and removes tokens but for the one that is the ticket.
// KEYS: the generation key, then the wallets'. ARGV: TTL in ms, the ticket or empty, a new generation or
// empty, then seq and "currency balance held" of each wallet. A seq is exact up to 2^53, as Lua's numbers
// are.
var storeNewer = redis.NewScript(`
if ARGV[3] ~= '' then
    redis.call('SET', KEYS[1], ARGV[3])
    return
end
local generation = redis.call('GET', KEYS[1])
for i = 2, #KEYS do
    local found, seq = redis.call('GET', KEYS[i]), ARGV[2 * i]
    if found then
        local its, older = string.match(found, '^(%S+) (%d+) ')
        if found == ARGV[2] or its and its == generation and tonumber(older) < tonumber(seq) then
            its = string.match(found, '^%S+')
            redis.call('SET', KEYS[i], its .. ' ' .. seq .. ' ' .. ARGV[2 * i + 1], 'PX', ARGV[1])
        elseif not its then
            redis.call('DEL', KEYS[i])
        end
    end
end`)

// store runs storeNewer, and says whether it arrived. Where something was lost before, it begins a new
// generation instead: in that, there is nothing to replace. So does the second try after a failed first
// one: a process that was frozen finds its call timed out, and what others serve must not wait for its
// next.
func (c *cache) store(keys *cacheKeys, found string, balances map[int64]cachedBalance) bool {
	names := append(make([]string, 0, 1+len(balances)), keys.generation)
	args := append(make([]any, 0, 3+2*len(balances)), c.ttl.Milliseconds(), found, "")
	for _, b := range balances {
		names = append(names, keys.wallet(b.walletID))
		args = append(args, b.seq, b.currency+" "+b.balance+" "+b.held)
	}
	tries := 2
	if c.away.Load() {
		tries = 1
	}
	for range tries {
		losses, generation := c.losses.Load(), ""
		if c.mended.Load() < losses {
			generation = newWord()
		}
		args[2] = generation
		ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
		err := storeNewer.Run(ctx, c.redis, names, args...).Err()
		cancel()
		if err == nil || errors.Is(err, redis.Nil) {
			if generation != "" {
				c.away.Store(false)
				c.mend(losses)
			}
			c.puts.Add(int64(len(balances)))
			return true
		}
		c.fail(err)
	}
	c.away.Store(true)
	return false
}

func (c *cache) writeMetrics(w *metric.Writer) {
	inUse := 0.0
	if _, _, usable := c.usable(); usable {
		inUse = 1
	}
	w.Gauge("wallet_cache_in_use", "1 while Redis answers and its balances count.", inUse)
	w.Counters("wallet_cache_lookups_total", "Balances looked up.",
		metric.Sample{Labels: `result="hit"`, Value: float64(c.hits.Load())},
		metric.Sample{Labels: `result="miss"`, Value: float64(c.misses.Load())})
	w.Counter("wallet_cache_puts_total", "Balances put.", float64(c.puts.Load()))
	w.Counter("wallet_cache_errors_total", "Calls to Redis that failed or took too long.",
		float64(c.errors.Load()))
	w.Counter("wallet_cache_generations_total", "Times that everything cached was forgotten.",
		float64(c.generations.Load()))
}

// -----------------------------------------------------------------------------------------------------------
// Reads: each puts what it is about to tell (3 above)
// -----------------------------------------------------------------------------------------------------------

const (
	selectWallet = `SELECT ` + walletColumns + ` FROM wallet WHERE id = $1`

	// A transaction is a movement, and how much of it has been reversed by now.
	selectTransaction = selectPosted + `,
       coalesce((SELECT r.reversed FROM reversal r WHERE r.wallet_id = e.wallet_id AND r.seq = e.seq), 0)
`
	transactionByID = selectTransaction + `
FROM entry e WHERE e.wallet_id = $1 AND e.seq = $2 AND e.kind <> 'transfer_in'`

	transactionByKey = selectTransaction + `
FROM entry e WHERE e.wallet_id = $1 AND e.idempotency_key = $2 AND e.kind <> 'transfer_in'`

	transactionsByReference = selectTransaction + `
FROM reference f
CROSS JOIN LATERAL (SELECT * FROM entry WHERE wallet_id = f.wallet_id AND seq = f.seq LIMIT 1) e
WHERE f.reference = $1 AND (f.wallet_id, f.seq) > ($2, $3) ORDER BY f.wallet_id, f.seq LIMIT $4`

	selectPageUp   = selectPage + `ASC LIMIT $6) e ON true ORDER BY e.seq ASC`
	selectPageDown = selectPage + `DESC LIMIT $6) e ON true ORDER BY e.seq DESC`

	// The wallet's head and the page's bounds stand beside each entry, and beside none where there is none.
	selectPage = `
WITH s AS MATERIALIZED (
    SELECT w.id, w.currency, w.balance, w.held, w.seq,
           coalesce(nullif($2::bigint, 0), seq_since(w.id, coalesce($4, now() - interval '24 hours'))) AS low,
           coalesce(nullif($3::bigint, 0), seq_since(w.id, $5)) AS high
    FROM wallet w WHERE w.id = $1
)` + selectPosted + `, s.currency, s.balance::text, s.held::text, s.seq, s.low, s.high
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
	return cachedBalance{w.ID, w.Seq, w.Currency, money.Text(w.Balance), money.Text(w.Held)}
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
		return cachedBalance{}, errSeqNotReached(id, w.Seq, minSeq)
	}
	return w.cached(), nil
}

// transactions reads movements by one of the queries above.
func (l *ledger) transactions(ctx context.Context, query string, args ...any) ([]*posted, error) {
	t := l.cache.ticket()
	rows, _ := l.reads.Query(ctx, query, args...)
	defer rows.Close()
	var found []*posted
	told := make(map[int64]cachedBalance)
	for rows.Next() {
		m := new(posted)
		if err := scanPosted(rows, m, &m.reversed); err != nil {
			return nil, fmt.Errorf("read transactions: %w", err)
		}
		found = append(found, m)
		m.tell(told)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read transactions: %w", err)
	}
	l.cache.put(t, told)
	return found, nil
}

// transaction reads a movement by its initiating entry.
func (l *ledger) transaction(ctx context.Context, walletID, seq int64) (*posted, error) {
	found, err := l.transactions(ctx, transactionByID, walletID, seq)
	if err == nil && len(found) == 0 {
		err = refuse("transaction_not_found", "There is no transaction %s.", entryID(walletID, seq))
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// walletsAfter reads wallets by their ids.
func (l *ledger) walletsAfter(ctx context.Context, after int64, limit int) ([]*wallet, error) {
	t := l.cache.ticket()
	found := posting{wallets: make(map[int64]*wallet)}
	rows, _ := l.reads.Query(ctx, `
SELECT `+walletColumns+` FROM wallet WHERE id > $1 ORDER BY id LIMIT $2`, after, limit)
	if err := found.scanWallets(rows); err != nil {
		return nil, fmt.Errorf("read wallets: %w", err)
	}
	told := make(map[int64]cachedBalance, len(found.wallets))
	for id, w := range found.wallets {
		told[id] = w.cached()
	}
	l.cache.put(t, told)
	return slices.SortedFunc(maps.Values(found.wallets), func(a, b *wallet) int {
		return cmp.Compare(a.ID, b.ID)
	}), nil
}

// moment is a wallet's head as it was at a time, or after an entry.
type moment struct {
	currency      string
	seq           int64 // of the last entry by then
	balance, held decimal.Decimal
	final         bool // nothing can be committed any more that belongs before
	low           int64
}

const (
	// The time before which nothing can be committed any more: every batch under way reads its clock after it
	// began. (A clock that is set back breaks this, as it would for anybody.)
	settledUntil = `
SELECT least(clock_timestamp(), min(xact_start)) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'wallet write'`

	// Entry number $2, or where that is negative the last one before $3; and the first one since $4.
	selectMoment = `
WITH s AS MATERIALIZED (
    SELECT w.id, w.currency, w.balance, w.held, w.seq, seq_since(w.id, $4) AS low,
           CASE WHEN $2::bigint >= 0 THEN $2::bigint ELSE seq_since(w.id, $3) - 1 END AS at
    FROM wallet w WHERE w.id = $1
)
SELECT s.currency, s.balance, s.held, s.seq, s.at, s.low, coalesce(e.balance, 0), coalesce(e.held, 0)
FROM s LEFT JOIN entry e ON e.wallet_id = s.id AND e.seq = s.at`
)

// momentAfter reads a wallet as it was after entry number seq.
func (l *ledger) momentAfter(ctx context.Context, walletID, seq int64) (*moment, error) {
	return l.moment(ctx, walletID, seq, time.Time{}, time.Time{})
}

// momentBefore reads a wallet as it was before a time, and which entry is the first since another.
func (l *ledger) momentBefore(ctx context.Context, walletID int64, until, since time.Time) (*moment, error) {
	return l.moment(ctx, walletID, -1, until, since)
}

func (l *ledger) moment(ctx context.Context, walletID, seq int64, until, since time.Time) (*moment, error) {
	t := l.cache.ticket()
	m, head := new(moment), wallet{ID: walletID}
	var settled time.Time
	var b pgx.Batch
	// Two statements: what is committed between them is seen by the second, and was under way for the first.
	b.Queue(settledUntil).QueryRow(func(row pgx.Row) error { return row.Scan(&settled) })
	b.Queue(selectMoment, walletID, seq, until, since).QueryRow(func(row pgx.Row) error {
		return row.Scan(&head.Currency, &head.Balance, &head.Held, &head.Seq, &m.seq, &m.low, &m.balance,
			&m.held)
	})
	err := l.reads.SendBatch(ctx, &b).Close()
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, errNoWallet(walletID)
	case err != nil:
		return nil, fmt.Errorf("read balance as it was: %w", err)
	}
	l.cache.put(t, map[int64]cachedBalance{walletID: head.cached()})
	if m.seq > head.Seq {
		return nil, errSeqNotReached(walletID, head.Seq, m.seq)
	}
	m.currency = head.Currency
	m.final = seq >= 0 || m.seq < head.Seq || !until.After(settled)
	return m, nil
}

func errSeqNotReached(walletID, has, wants int64) *refusal {
	return refuse("seq_not_reached", "Wallet %d is at seq %d; no entry %d has been written.", walletID, has,
		wants)
}

// entriesBetween visits a wallet's entries from one to another, both included, a page at a time: entries
// never change, so that no snapshot has to last. visit's entry is used again.
func (l *ledger) entriesBetween(ctx context.Context, walletID, from, to int64,
	visit func(*entry) error) error {
	const page = 1000
	for ; from <= to; from += page {
		ctx, cancel := context.WithTimeout(ctx, l.rerunBudget)
		where := `WHERE w.id = $1 AND e.wallet_id = $1 AND e.seq BETWEEN $2 AND $3 ORDER BY e.seq`
		args := []any{walletID, from, min(from+page-1, to)}
		var read []entry // a connection is not to wait for a client
		err := readEntries(ctx, l.reads, where, args, func(e *entry) error {
			read = append(read, *e)
			return nil
		})
		cancel()
		if err != nil {
			return err
		}
		for i := range read {
			if err := visit(&read[i]); err != nil {
				return err
			}
		}
	}
	return nil
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

// cursor names the rest of a history after a page.
func (p page) cursor() string {
	if p.descending {
		return api.Cursor("d", p.from, p.to)
	}
	return api.Cursor("a", p.from, p.to)
}

func parseCursor(s string) (p page, err error) {
	if p.from, p.to, err = api.ParseCursor("a", s); err != nil {
		p.descending = true
		p.from, p.to, err = api.ParseCursor("d", s)
	}
	return p, err
}

// endOfTime is the until of a history that has none.
var endOfTime = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)

// pageOf reads which page a query asks for.
func pageOf(query api.Query) (p page, err error) {
	limit, err := query.Integer("limit", api.Limit, 1, api.LimitMax)
	if err != nil {
		return p, err
	}
	if cursor := query["cursor"]; cursor != "" {
		if query["since"] != "" || query["until"] != "" || query["order"] != "" {
			return p, refuse("parameter_malformed",
				"A cursor stands for since, until and order: send it with a limit only.")
		}
		p, err = parseCursor(cursor)
		p.limit = int(limit)
		return p, err
	}
	p.limit = int(limit)
	switch query["order"] {
	case "", "asc":
	case "desc":
		p.descending = true
	default:
		return p, refuse("parameter_malformed", "order is asc or desc.")
	}
	since, err := query.Time("since", time.Time{})
	if err != nil {
		return p, err
	}
	if query["since"] != "" {
		p.since = &since
	}
	if p.until, err = query.Time("until", endOfTime); err != nil {
		return p, err
	}
	if !p.descending && query["until"] == "" {
		p.to = math.MaxInt64 // entries that come while a client pages are on its last page
	}
	return p, nil
}

// history reads one page of a wallet's entries, and sets the page's from and to. It is one statement, so
// that everything is of one moment.
func (l *ledger) history(ctx context.Context, walletID int64, p *page) (entries []*entry, err error) {
	query := selectPageUp
	if p.descending {
		query = selectPageDown
	}
	t := l.cache.ticket()
	rows, _ := l.reads.Query(ctx, query, walletID, p.from, p.to, p.since, p.until, p.limit)
	defer rows.Close()
	head := wallet{ID: walletID}
	for rows.Next() {
		m := new(posted)
		of := []any{&head.Currency, &head.Balance, &head.Held, &head.Seq, &p.from, &p.to}
		if rows.RawValues()[0] == nil { // no entry
			err = rows.Scan(append(make([]any, len(rows.RawValues())-len(of)), of...)...)
		} else if err = scanPosted(rows, m, of...); err == nil {
			entries = append(entries, &m.entry)
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

// Holds, what their entries say, and their wallet's head: of one snapshot.
const (
	holdColumns = `h.wallet_id, h.seq, coalesce(h.to_id, 0), h.amount, h.captured, h.remaining, h.status,
       h.expires_at, h.last_seq`

	selectHolds = `
SELECT w.currency, w.balance, w.held, w.seq, ` + holdColumns + `, e.created_at, e.note
FROM wallet w LEFT JOIN LATERAL (SELECT * FROM hold WHERE wallet_id = w.id AND `
	andTheirEntries = `) h ON true LEFT JOIN entry e ON e.wallet_id = h.wallet_id AND e.seq = h.seq
WHERE w.id = $1 ORDER BY h.seq`
)

// shownHold is a hold and what its entry says of it.
type shownHold struct {
	hold
	currency  string
	createdAt time.Time
	note      note
}

// readHolds reads a wallet's head and those of its holds that a condition names; the wallet is nil where
// there is none.
func (l *ledger) readHolds(ctx context.Context, condition string, walletID int64, args ...any,
) (w *wallet, holds []*shownHold, err error) {
	t := l.cache.ticket()
	rows, _ := l.reads.Query(ctx, selectHolds+condition+andTheirEntries, append([]any{walletID}, args...)...)
	defer rows.Close()
	for rows.Next() {
		w = &wallet{ID: walletID}
		h := new(shownHold)
		var said *string
		columns := []any{&w.Currency, &w.Balance, &w.Held, &w.Seq, &h.WalletID, &h.Seq, &h.ToID, &h.Amount,
			&h.Captured, &h.Remaining, &h.Status, &h.ExpiresAt, &h.lastSeq, &h.createdAt, &said}
		none := rows.RawValues()[4] == nil
		if none {
			clear(columns[4:])
		}
		if err := rows.Scan(columns...); err != nil {
			return nil, nil, fmt.Errorf("read holds: %w", err)
		}
		if none {
			continue
		}
		if said != nil {
			if h.note, err = parseNote(*said); err != nil {
				return nil, nil, err
			}
		}
		h.currency = w.Currency
		holds = append(holds, h)
	}
	if err := rows.Err(); err != nil {
		return nil, nil, fmt.Errorf("read holds: %w", err)
	}
	if w != nil {
		l.cache.put(t, map[int64]cachedBalance{walletID: w.cached()})
	}
	return w, holds, nil
}

// hold reads one hold.
func (l *ledger) hold(ctx context.Context, walletID, seq int64) (*shownHold, error) {
	_, found, err := l.readHolds(ctx, `seq = $2`, walletID, seq)
	if err == nil && len(found) == 0 {
		err = errNoHold(walletID, seq)
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// holds reads a wallet's holds after one, of a status unless that is empty, and the wallet's head.
func (l *ledger) holds(ctx context.Context, walletID int64, status string, after int64, limit int,
) (*wallet, []*shownHold, error) {
	condition := `seq > $2 ORDER BY seq LIMIT $3`
	if status != "" { // one of a few words: as a parameter it would keep out the index of open ones
		condition = `status = '` + status + `' AND ` + condition
	}
	w, found, err := l.readHolds(ctx, condition, walletID, after, limit)
	if err == nil && w == nil {
		err = errNoWallet(walletID)
	}
	return w, found, err
}

// tell adds a balance unless a newer one is there.
func tell(heads map[int64]cachedBalance, b cachedBalance) {
	if heads[b.walletID].seq < b.seq {
		heads[b.walletID] = b
	}
}

// tell adds what the movement's answer tells of its wallets.
func (m *posted) tell(heads map[int64]cachedBalance) {
	tell(heads, cachedBalance{m.WalletID, m.Seq, m.Currency, money.Text(m.Balance),
		money.Text(m.says().Held)})
	if m.CounterpartyID != 0 {
		tell(heads, cachedBalance{m.CounterpartyID, m.CounterpartySeq, m.Currency, money.Text(m.toBalance),
			money.Text(m.toHeld)})
	}
}

// heldMoney is what open holds reserve in one currency.
type heldMoney struct {
	currency      string
	holds, amount float64
}

// countHolds looks how much is held, for the metrics.
func (l *ledger) countHolds(ctx context.Context) error {
	rows, _ := l.reads.Query(ctx, `
SELECT w.currency, count(*)::float8, sum(h.remaining)::float8
FROM hold h JOIN wallet w ON w.id = h.wallet_id WHERE h.status = 'open' GROUP BY 1 ORDER BY 1`)
	var h heldMoney
	held := []heldMoney{}
	_, err := pgx.ForEachRow(rows, []any{&h.currency, &h.holds, &h.amount}, func() error {
		held = append(held, h)
		return nil
	})
	if err != nil {
		return fmt.Errorf("count open holds: %w", err)
	}
	l.held.Store(&held)
	return nil
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
	saw := make(map[string]bool) // what the entries say that a rule is about
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
		switch {
		case e.more == nil:
		case e.Kind == kindState:
			saw["states"] = true
		case !e.more.HeldChange.IsZero():
			saw["holds"] = true
		case e.more.OfSeq != 0:
			saw["reversals"] = true
		}
		if e.says().Note.Reference != "" {
			saw["references"] = true
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
		rows, _ := a.past.Query(ctx, rule.query, after, last)
		var id, seq int64
		_, err := pgx.ForEachRow(rows, []any{&id, &seq}, func() error {
			a.report.Find(rule.finding, id, seq)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// sideRules are what the tables beside the entries must say of the wallets after $1 and up to $2. A rule is
// left out where no entry says what it is about and no row is there.
var sideRules = []struct{ about, rows, finding, query string }{
	{"", "", "wallet %[1]d: its balance, time or held is not its last entry's", `
SELECT w.id, w.seq FROM wallet w LEFT JOIN entry e ON e.wallet_id = w.id AND e.seq = w.seq
WHERE w.id > $1 AND w.id <= $2
  AND (w.balance, w.entry_at, w.held) IS DISTINCT FROM
      (coalesce(e.balance, 0), e.created_at, coalesce(e.held, 0))`},
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
func scanPosted(row pgx.Row, m *posted, more ...any) error {
	s := entryScan{e: &m.entry}
	var toHeld, of *string
	columns := append(s.columns(), &m.Currency, &m.toBalance, &toHeld, &of)
	if err := row.Scan(append(columns, more...)...); err != nil {
		return err
	}
	if of != nil {
		m.of = *of
	}
	if toHeld != nil {
		var err error
		if m.toHeld, err = decimal.NewFromString(*toHeld); err != nil {
			return err
		}
	}
	return s.finish()
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
