// The cache: balances of wallets that were asked for, in Redis.
//
// Touches: Redis only. Never authoritative: whatever goes wrong here is counted, logged once and answered
// from Postgres. Promises: a balance read from here is never behind anything that was answered before the
// read was sent. Why:
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
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/shopspring/decimal"

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
// empty, then seq and "currency balance held" of each wallet. A seq is exact up to 2^53, as Lua's numbers are.
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
