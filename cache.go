// The cache: the newest known (seq, balance) of each wallet, in Redis.
//
// Touches: Redis only. Never authoritative: whatever goes wrong here is counted, logged once and answered from Postgres.
// Promises: an entry is replaced only by a newer one (by seq), and entries of another database, another timeline or from before
// an outage are never served. Writers put balances before they answer; the relay puts them again, which repairs what a crash
// between commit and put left out; CACHE_TTL bounds what nobody repaired.

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// cachedBalance is a wallet's balance after entry number seq.
type cachedBalance struct {
	walletID, seq     int64
	currency, balance string
}

// cache is safe for concurrent use. A value in Redis is "generation seq currency balance"; it counts only while its generation
// is the one in the generation key. A new generation forgets everything at once.
type cache struct {
	redis   *redis.Client
	ttl     time.Duration
	timeout time.Duration

	// prefix of all keys: the database's system identifier and timeline, since after a failover or a restore "only if newer"
	// would pin balances that never were. Nil until the first Postgres connection tells.
	prefix atomic.Pointer[string]

	// lost: a put may not have arrived, so what Redis holds may be old. Nothing is read or put until a new generation has
	// begun. True at first: nobody knows what this replica's former life left out.
	lost atomic.Bool

	// sent holds the newest seq of each wallet that this process has put under prefix: the relay need not put again what a writer beside it has.
	sentMu sync.Mutex
	sent   map[int64]int64

	hits, misses, errors, puts, generations atomic.Int64
}

const sentMax = 50_000 // wallets; then sent begins anew

func newCache(cfg *config) (*cache, error) {
	options, err := redis.ParseURL(cfg.redisURL)
	if err != nil {
		return nil, fmt.Errorf("set REDIS_URL to a URL such as redis://host:6379/0: %w", err)
	}
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = time.Second, cfg.cacheTimeout, cfg.cacheTimeout
	options.ContextTimeoutEnabled = true
	options.MaxRetries = -1
	c := &cache{redis: redis.NewClient(options), ttl: cfg.cacheTTL, timeout: cfg.cacheTimeout, sent: make(map[int64]int64)}
	c.lost.Store(true)
	return c, nil
}

// enter tells which database the balances are of. Each new Postgres connection says it again: that is how a failover shows.
func (c *cache) enter(systemIdentifier, timeline string) {
	prefix := "wallet:{" + systemIdentifier + "." + timeline + "}:" // one hash slot, should Redis be a cluster
	if old := c.prefix.Load(); old == nil || *old != prefix {
		c.prefix.Store(&prefix)
		c.lost.Store(true)
		c.sentMu.Lock()
		clear(c.sent)
		c.sentMu.Unlock()
	}
}

// run begins a new generation whenever something was lost, as soon as Redis can be reached.
func (c *cache) run(ctx context.Context) error {
	defer c.redis.Close()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	logged := false
	for {
		if prefix := c.prefix.Load(); prefix != nil && c.lost.Load() {
			err := c.begin(ctx, *prefix)
			switch {
			case ctx.Err() != nil:
				return nil
			case err == nil:
				slog.Info("cache in use")
				logged = false
			case !logged:
				slog.Warn("cache out of use, reads go to Postgres", "error", err)
				logged = true
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// begin starts a new generation. Lost is cleared first: a put that fails meanwhile sets it again.
func (c *cache) begin(ctx context.Context, prefix string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c.lost.Store(false)
	if err := c.redis.Set(ctx, prefix+"generation", newGeneration(), 0).Err(); err != nil {
		c.lost.Store(true)
		return err
	}
	c.generations.Add(1)
	return nil
}

func newGeneration() string { return strconv.FormatUint(rand.Uint64(), 36) }

// usable returns the prefix of all keys, or false while the cache must not be used.
func (c *cache) usable() (string, bool) {
	prefix := c.prefix.Load()
	if prefix == nil || c.lost.Load() {
		return "", false
	}
	return *prefix, true
}

// fail counts a fault of Redis; everything it holds is forgotten before it is used again.
func (c *cache) fail(err error) {
	c.errors.Add(1)
	if !c.lost.Swap(true) {
		slog.Warn("cache failed", "error", err)
	}
}

// get looks a balance up. Where it finds none, generation is what fill needs to bring one in.
func (c *cache) get(ctx context.Context, walletID int64) (b cachedBalance, generation string, ok bool) {
	prefix, usable := c.usable()
	if !usable {
		return b, "", false
	}
	timed, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	values, err := c.redis.MGet(timed, prefix+"generation", prefix+strconv.FormatInt(walletID, 10)).Result()
	if err != nil {
		if ctx.Err() == nil { // else it was the client who left
			c.fail(err)
		}
		return b, "", false
	}
	generation, _ = values[0].(string)
	value, _ := values[1].(string)
	fields := strings.Fields(value)
	if generation == "" || len(fields) != 4 || fields[0] != generation {
		c.misses.Add(1)
		return b, generation, false
	}
	seq, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		c.misses.Add(1)
		return b, generation, false
	}
	c.hits.Add(1)
	return cachedBalance{walletID, seq, fields[2], fields[3]}, generation, true
}

// fill brings in a balance that was read from Postgres after a miss. It counts only in the generation of that miss: between
// the two, a newer balance may have been put, lost and forgotten.
func (c *cache) fill(b cachedBalance, generation string) {
	if generation != "" {
		c.store(map[int64]cachedBalance{b.walletID: b}, generation)
	}
}

// put brings in balances that were just committed (or just published), and drops from the map those that this process has put before. It takes
// at most CACHE_TIMEOUT and never fails: what does not arrive is made up for by a new generation.
func (c *cache) put(balances map[int64]cachedBalance) {
	prefix := c.prefix.Load()
	c.sentMu.Lock()
	maps.DeleteFunc(balances, func(id int64, b cachedBalance) bool { return c.sent[id] >= b.seq })
	c.sentMu.Unlock()
	if len(balances) == 0 || !c.store(balances, "") {
		return
	}
	c.sentMu.Lock()
	defer c.sentMu.Unlock()
	if c.prefix.Load() != prefix {
		return // the seqs of another timeline say nothing
	}
	if len(c.sent) > sentMax {
		clear(c.sent)
	}
	for id, b := range balances {
		c.sent[id] = max(c.sent[id], b.seq)
	}
}

// storeNewer sets each wallet's key, and sets it back if what was there has a higher seq and is of the same generation.
// KEYS: the generation key, then the wallets'. ARGV: TTL in ms, the generation demanded (or empty), a new generation in case there is
// none, then seq and "currency balance" of each wallet. A seq is exact up to 2^53, as Lua's numbers are.
var storeNewer = redis.NewScript(`
local generation = redis.call('GET', KEYS[1])
if ARGV[2] ~= '' and ARGV[2] ~= generation then return 0 end
if not generation then
    generation = ARGV[3]
    redis.call('SET', KEYS[1], generation)
end
for i = 2, #KEYS do
    local seq = ARGV[2 * i]
    local was = redis.call('SET', KEYS[i], generation .. ' ' .. seq .. ' ' .. ARGV[2 * i + 1], 'PX', ARGV[1], 'GET')
    if was then
        local g, s = string.match(was, '^(%S+) (%d+) ')
        if g == generation and tonumber(s) > tonumber(seq) then
            redis.call('SET', KEYS[i], was, 'PX', ARGV[1])
        end
    end
end
return 1`)

// store says whether the balances arrived.
func (c *cache) store(balances map[int64]cachedBalance, generation string) bool {
	prefix, usable := c.usable()
	if !usable {
		return false // a new generation will begin after this, and Postgres has the balance
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	keys := make([]string, 0, 1+len(balances))
	args := make([]any, 0, 3+2*len(balances))
	keys, args = append(keys, prefix+"generation"), append(args, c.ttl.Milliseconds(), generation, newGeneration())
	for _, b := range balances {
		keys = append(keys, prefix+strconv.FormatInt(b.walletID, 10))
		args = append(args, b.seq, b.currency+" "+b.balance)
	}
	if err := storeNewer.Run(ctx, c.redis, keys, args...).Err(); err != nil {
		c.fail(err)
		return false
	}
	c.puts.Add(int64(len(balances)))
	return true
}

func (c *cache) writeMetrics(w io.Writer) {
	inUse := 0.0
	if _, usable := c.usable(); usable {
		inUse = 1
	}
	writeMetric(w, "wallet_cache_in_use", "gauge", "1 while Redis answers and its balances count.", sample{"", inUse})
	writeMetric(w, "wallet_cache_lookups_total", "counter", "Balances looked up.",
		sample{`result="hit"`, float64(c.hits.Load())}, sample{`result="miss"`, float64(c.misses.Load())})
	writeMetric(w, "wallet_cache_puts_total", "counter", "Balances put.", sample{"", float64(c.puts.Load())})
	writeMetric(w, "wallet_cache_errors_total", "counter", "Calls to Redis that failed or took too long.", sample{"", float64(c.errors.Load())})
	writeMetric(w, "wallet_cache_generations_total", "counter", "Times that everything cached was forgotten.", sample{"", float64(c.generations.Load())})
}
