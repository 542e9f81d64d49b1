// The cache, and all that is read: balances of wallets that were asked for, in Redis; everything else, and
// what the cache does not have, from Postgres.
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
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
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
	"wallet/internal/book"
	"wallet/internal/export"
	"wallet/internal/jsontext"
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

// newestBalances are the balances of the events' wallets after the last event of each.
func newestBalances(events []event) map[int64]cachedBalance {
	newest := make(map[int64]*event)
	for i := range events {
		newest[events[i].walletID] = &events[i]
	}
	balances := make(map[int64]cachedBalance, len(newest))
	for id, e := range newest {
		b := cachedBalance{walletID: id, seq: e.seq, currency: book.EventText(e.payload, "currency"),
			balance: book.EventText(e.payload, "balance_after"),
			held:    cmp.Or(book.EventText(e.payload, "held_after"), "0")}
		if b.currency == "" || b.balance == "" {
			slog.Warn("balance not cached, since the event tells none", "event", book.EntryID(id, e.seq))
			continue
		}
		balances[id] = b
	}
	return balances
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
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq) k
CROSS JOIN LATERAL (
    SELECT * FROM entry WHERE wallet_id = k.wallet_id AND seq = k.seq AND kind <> 'transfer_in' LIMIT 1
) e`

	selectPayees = `
SELECT h.wallet_id, h.seq, coalesce(h.to_id, 0)
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq) k
CROSS JOIN LATERAL (SELECT * FROM hold WHERE wallet_id = k.wallet_id AND seq = k.seq LIMIT 1) h`

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

// reader answers what is asked of the ledger.
type reader struct {
	db      *pgxpool.Pool
	cache   *cache        // nil without Redis
	timeout time.Duration // of a page of a long answer
}

// wallet reads one wallet from Postgres.
func (r *reader) wallet(ctx context.Context, id int64) (*book.Wallet, error) {
	return r.readWallet(ctx, id, r.cache.ticket())
}

// readWallet reads a wallet, and puts what it found into the cache.
func (r *reader) readWallet(ctx context.Context, id int64, t ticket) (*book.Wallet, error) {
	found := make(map[int64]*book.Wallet)
	rows, _ := r.db.Query(ctx, selectWallet, id)
	if err := scanWallets(rows, found); err != nil {
		return nil, fmt.Errorf("read wallet: %w", err)
	}
	w := found[id]
	if w == nil {
		return nil, book.NoWallet(id)
	}
	r.cache.put(t, map[int64]cachedBalance{id: cachedOf(w)})
	return w, nil
}

func cachedOf(w *book.Wallet) cachedBalance {
	return cachedBalance{w.ID, w.Seq, w.Currency, money.Text(w.Balance), money.Text(w.Held)}
}

// balance reads a balance that is at least as new as entry minSeq, from the cache unless fresh.
func (r *reader) balance(ctx context.Context, id, minSeq int64, fresh bool) (cachedBalance, error) {
	t := r.cache.ticket()
	if !fresh {
		b, found, ok := r.cache.get(ctx, id, minSeq)
		if ok {
			return b, nil
		}
		t = found
	}
	w, err := r.readWallet(ctx, id, t)
	if err != nil {
		return cachedBalance{}, err
	}
	if w.Seq < minSeq {
		return cachedBalance{}, errSeqNotReached(id, w.Seq, minSeq)
	}
	return cachedOf(w), nil
}

// transactions reads movements by one of the queries above.
func (r *reader) transactions(ctx context.Context, query string, args ...any) ([]*book.Posted, error) {
	t := r.cache.ticket()
	rows, _ := r.db.Query(ctx, query, args...)
	defer rows.Close()
	var found []*book.Posted
	told := make(map[int64]cachedBalance)
	for rows.Next() {
		m := new(book.Posted)
		if err := scanPosted(rows, m, &m.Reversed); err != nil {
			return nil, fmt.Errorf("read transactions: %w", err)
		}
		found = append(found, m)
		tellPosted(told, m)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read transactions: %w", err)
	}
	r.cache.put(t, told)
	return found, nil
}

// transactionsByID reads movements by their initiating entries. What is none is left out.
func (r *reader) transactionsByID(ctx context.Context, keys []book.EntryKey) (
	map[book.EntryKey]*book.Posted, error) {
	found := make(map[book.EntryKey]*book.Posted, len(keys))
	ids := idsOf(keys)
	read, err := r.transactions(ctx, transactionByID, ids.wallets, ids.seqs)
	for _, m := range read {
		found[book.EntryKey{WalletID: m.WalletID, Seq: m.Seq}] = m
	}
	return found, err
}

// transaction reads a movement by its initiating entry.
func (r *reader) transaction(ctx context.Context, walletID, seq int64) (*book.Posted, error) {
	k := book.EntryKey{WalletID: walletID, Seq: seq}
	found, err := r.transactionsByID(ctx, []book.EntryKey{k})
	if err == nil && found[k] == nil {
		err = noTransaction(walletID, seq)
	}
	return found[k], err
}

func noTransaction(walletID, seq int64) *book.Refusal {
	return book.Refuse("transaction_not_found", "There is no transaction %s.", book.EntryID(walletID, seq))
}

// payees reads who is to be paid by holds: 0 where nobody was named. What is no hold is left out.
func (r *reader) payees(ctx context.Context, holds []book.EntryKey) (map[book.EntryKey]int64, error) {
	found := make(map[book.EntryKey]int64, len(holds))
	if len(holds) == 0 {
		return found, nil
	}
	ids := idsOf(holds)
	rows, _ := r.db.Query(ctx, selectPayees, ids.wallets, ids.seqs)
	var k book.EntryKey
	var payee int64
	_, err := pgx.ForEachRow(rows, []any{&k.WalletID, &k.Seq, &payee}, func() error {
		found[k] = payee
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read payees: %w", err)
	}
	return found, nil
}

// walletsAfter reads wallets by their ids.
func (r *reader) walletsAfter(ctx context.Context, after int64, limit int) ([]*book.Wallet, error) {
	t := r.cache.ticket()
	found := make(map[int64]*book.Wallet)
	rows, _ := r.db.Query(ctx, `
SELECT `+walletColumns+` FROM wallet WHERE id > $1 ORDER BY id LIMIT $2`, after, limit)
	if err := scanWallets(rows, found); err != nil {
		return nil, fmt.Errorf("read wallets: %w", err)
	}
	told := make(map[int64]cachedBalance, len(found))
	for id, w := range found {
		told[id] = cachedOf(w)
	}
	r.cache.put(t, told)
	return slices.SortedFunc(maps.Values(found), func(a, b *book.Wallet) int {
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
func (r *reader) momentAfter(ctx context.Context, walletID, seq int64) (*moment, error) {
	return r.moment(ctx, walletID, seq, time.Time{}, time.Time{})
}

// momentBefore reads a wallet as it was before a time, and which entry is the first since another.
func (r *reader) momentBefore(ctx context.Context, walletID int64, until, since time.Time) (*moment, error) {
	return r.moment(ctx, walletID, -1, until, since)
}

func (r *reader) moment(ctx context.Context, walletID, seq int64, until, since time.Time) (*moment, error) {
	t := r.cache.ticket()
	m, head := new(moment), book.Wallet{ID: walletID}
	var settled time.Time
	var b pgx.Batch
	// Two statements: what is committed between them is seen by the second, and was under way for the first.
	b.Queue(settledUntil).QueryRow(func(row pgx.Row) error { return row.Scan(&settled) })
	b.Queue(selectMoment, walletID, seq, until, since).QueryRow(func(row pgx.Row) error {
		return row.Scan(&head.Currency, &head.Balance, &head.Held, &head.Seq, &m.seq, &m.low, &m.balance,
			&m.held)
	})
	err := r.db.SendBatch(ctx, &b).Close()
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, book.NoWallet(walletID)
	case err != nil:
		return nil, fmt.Errorf("read balance as it was: %w", err)
	}
	r.cache.put(t, map[int64]cachedBalance{walletID: cachedOf(&head)})
	if m.seq > head.Seq {
		return nil, errSeqNotReached(walletID, head.Seq, m.seq)
	}
	m.currency = head.Currency
	m.final = seq >= 0 || m.seq < head.Seq || !until.After(settled)
	return m, nil
}

func errSeqNotReached(walletID, has, wants int64) *book.Refusal {
	return book.Refuse("seq_not_reached", "Wallet %d is at seq %d; no entry %d has been written.",
		walletID, has, wants)
}

// entriesBetween visits a wallet's entries from one to another, both included, a page at a time: entries
// never change, so that no snapshot has to last. The first page is short, for whoever waits for the first
// lines. visit's entry is used again.
func (r *reader) entriesBetween(ctx context.Context, walletID, from, to int64,
	visit func(*book.Entry) error) error {
	const first, further = 250, 1000
	for page := int64(first); from <= to; from, page = from+page, further {
		if err := ctx.Err(); err != nil {
			return err
		}
		// A client that leaves costs no connection: pgx closes one whose query is cut off.
		reading, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
		where := `WHERE w.id = $1 AND e.wallet_id = $1 AND e.seq BETWEEN $2 AND $3 ORDER BY e.seq`
		args := []any{walletID, from, min(from+page-1, to)}
		var read []book.Entry // a connection is not to wait for a client
		err := readEntries(reading, r.db, where, args, func(e *book.Entry) error {
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
			return p, book.Refuse("parameter_malformed",
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
		return p, book.Refuse("parameter_malformed", "order is asc or desc.")
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
func (r *reader) history(ctx context.Context, walletID int64, p *page) (entries []*book.Entry, err error) {
	query := selectPageUp
	if p.descending {
		query = selectPageDown
	}
	t := r.cache.ticket()
	rows, _ := r.db.Query(ctx, query, walletID, p.from, p.to, p.since, p.until, p.limit)
	defer rows.Close()
	head := book.Wallet{ID: walletID}
	for rows.Next() {
		m := new(book.Posted)
		of := []any{&head.Currency, &head.Balance, &head.Held, &head.Seq, &p.from, &p.to}
		if rows.RawValues()[0] == nil { // no entry
			err = rows.Scan(append(make([]any, len(rows.RawValues())-len(of)), of...)...)
		} else if err = scanPosted(rows, m, of...); err == nil {
			entries = append(entries, &m.Entry)
		}
		if err != nil {
			break
		}
	}
	if err = cmp.Or(err, rows.Err()); err != nil {
		return nil, fmt.Errorf("read history: %w", err)
	}
	if head.Currency == "" {
		return nil, book.NoWallet(walletID)
	}
	r.cache.put(t, map[int64]cachedBalance{walletID: cachedOf(&head)})
	return entries, nil
}

// Holds, what their entries say, and their wallet's head: of one snapshot.
const (
	selectHolds = `
SELECT w.currency, w.balance, w.held, w.seq, ` + holdColumns + `, e.created_at, e.note
FROM wallet w LEFT JOIN LATERAL (SELECT * FROM hold WHERE wallet_id = w.id AND `
	andTheirEntries = `) h ON true LEFT JOIN entry e ON e.wallet_id = h.wallet_id AND e.seq = h.seq
WHERE w.id = $1 ORDER BY h.seq`
)

// readHolds reads a wallet's head and those of its holds that a condition names; the wallet is nil where
// there is none.
func (r *reader) readHolds(ctx context.Context, condition string, walletID int64, args ...any,
) (w *book.Wallet, holds []*book.ShownHold, err error) {
	t := r.cache.ticket()
	rows, _ := r.db.Query(ctx, selectHolds+condition+andTheirEntries, append([]any{walletID}, args...)...)
	defer rows.Close()
	for rows.Next() {
		w = &book.Wallet{ID: walletID}
		h := new(book.ShownHold)
		var said *string
		columns := []any{&w.Currency, &w.Balance, &w.Held, &w.Seq, &h.WalletID, &h.Seq, &h.ToID, &h.Amount,
			&h.Captured, &h.Remaining, &h.Status, &h.ExpiresAt, &h.LastSeq, &h.CreatedAt, &said}
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
			if h.Note, err = book.ParseNote(*said); err != nil {
				return nil, nil, err
			}
		}
		h.Currency = w.Currency
		holds = append(holds, h)
	}
	if err := rows.Err(); err != nil {
		return nil, nil, fmt.Errorf("read holds: %w", err)
	}
	if w != nil {
		r.cache.put(t, map[int64]cachedBalance{walletID: cachedOf(w)})
	}
	return w, holds, nil
}

// hold reads one hold.
func (r *reader) hold(ctx context.Context, walletID, seq int64) (*book.ShownHold, error) {
	_, found, err := r.readHolds(ctx, `seq = $2`, walletID, seq)
	if err == nil && len(found) == 0 {
		err = book.NoHold(walletID, seq)
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// holds reads a wallet's holds after one, of a status unless that is empty, and the wallet's head.
func (r *reader) holds(ctx context.Context, walletID int64, status string, after int64, limit int,
) (*book.Wallet, []*book.ShownHold, error) {
	condition := `seq > $2 ORDER BY seq LIMIT $3`
	if status != "" { // one of a few words: as a parameter it would keep out the index of open ones
		condition = `status = '` + status + `' AND ` + condition
	}
	w, found, err := r.readHolds(ctx, condition, walletID, after, limit)
	if err == nil && w == nil {
		err = book.NoWallet(walletID)
	}
	return w, found, err
}

// appendHolds is a wallet's head and some of its holds.
func appendHolds(w *book.Wallet, holds []*book.ShownHold) []byte {
	o := jsontext.Open(nil)
	o.Integer("wallet_id", w.ID)
	o.Text("currency", w.Currency)
	o.Number("balance", w.Balance)
	o.Number("held", w.Held)
	o.Number("available", w.Available())
	o.Integer("seq", w.Seq)
	o.Name("holds")
	o.Dst = api.AppendList(o.Dst, holds, book.AppendHold)
	return o.Close()
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
	reader     *reader
	walletID   int64
	head       []byte // of the JSON object, without its closing brace
	begin, end *moment
}

// statement begins a wallet's statement from since until end, which is until; query tells which were asked
// for.
func (r *reader) statement(ctx context.Context, id int64, query api.Query, since, until time.Time,
	end *moment,
) (*statement, error) {
	first := min(end.low, end.seq+1) // an empty span may end before it begins
	begin, err := r.momentAfter(ctx, id, first-1)
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
	return &statement{reader: r, walletID: id, head: head.Dst, begin: begin, end: end}, nil
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
	err = st.reader.entriesBetween(ctx, st.walletID, st.begin.seq+1, st.end.seq, func(e *book.Entry) error {
		sum := totals[e.Kind]
		totals[e.Kind] = total{sum.count + 1, sum.sum.Add(e.Amount)}
		buf = book.AppendEvent(buf[:0], e)
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

func statementRow(e *book.Entry) []string {
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
	d := e.Says()
	return []string{strconv.FormatInt(e.Seq, 10), e.CreatedAt.UTC().Format(jsontext.TimeFormat),
		string(e.AppendTransactionID(nil)), e.Kind, credit, debit, money.Text(e.Balance), money.Text(d.Held),
		counterparty, d.Note.Reference, d.Note.Metadata, e.Key}
}

// tell adds a balance unless a newer one is there.
func tell(heads map[int64]cachedBalance, b cachedBalance) {
	if heads[b.walletID].seq < b.seq {
		heads[b.walletID] = b
	}
}

// tellHeads adds each wallet's newest balance: under the lock that was its head.
func tellHeads(heads map[int64]cachedBalance, p *book.Posting) {
	for _, w := range p.Wallets {
		tell(heads, cachedOf(w))
	}
}

// tellReplays adds what replays say. Of a wallet that could not be locked, they tell what it was.
func tellReplays(heads map[int64]cachedBalance, ops []*book.Operation) {
	for _, op := range ops {
		if op.Replayed && op.Kind != book.KindCreation {
			tellPosted(heads, &op.Posted)
		}
	}
}

// tellPosted adds what a movement's answer tells of its wallets.
func tellPosted(heads map[int64]cachedBalance, m *book.Posted) {
	tell(heads, cachedBalance{m.WalletID, m.Seq, m.Currency, money.Text(m.Balance),
		money.Text(m.Says().Held)})
	if m.CounterpartyID != 0 {
		tell(heads, cachedBalance{m.CounterpartyID, m.CounterpartySeq, m.Currency, money.Text(m.ToBalance),
			money.Text(m.ToHeld)})
	}
}
