// The cache: never behind an answer, never in the way.

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// testCache is a cache of a ledger of its own, in use.
func testCache(tb testing.TB, redisURL, ledger string) *cache {
	tb.Helper()
	c := idleCache(tb, redisURL)
	c.enter(ledger, "1")
	ctx, cancel := context.WithCancel(context.Background())
	var working sync.WaitGroup
	working.Go(func() { c.run(ctx) })
	tb.Cleanup(func() { cancel(); working.Wait() })
	inUse(tb, c)
	return c
}

// idleCache is a cache that does nothing by itself.
func idleCache(tb testing.TB, redisURL string) *cache {
	tb.Helper()
	c, err := newCache(cacheConfig{redisURL: redisURL, cacheTTL: time.Minute,
		cacheTimeout: 200 * time.Millisecond})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.redis.Close() })
	return c
}

// put puts wallet 1's balance, which is ten times its seq.
func put(c *cache, t ticket, seq int64) {
	c.put(t, map[int64]cachedBalance{1: {1, seq, "USD", fmt.Sprint(10 * seq), "0"}})
}

// mustMiss is a read of wallet 1 that must miss; its ticket is for what Postgres then says.
func mustMiss(t *testing.T, c *cache) ticket {
	t.Helper()
	b, found, ok := c.get(context.Background(), 1, 0)
	if ok {
		t.Fatalf("seq %d is in the cache, want nothing", b.seq)
	}
	return found
}

// mustHit is a read of wallet 1 that must hit.
func mustHit(t *testing.T, c *cache, seq int64) {
	t.Helper()
	b, _, ok := c.get(context.Background(), 1, 0)
	if !ok || b != (cachedBalance{1, seq, "USD", fmt.Sprint(10 * seq), "0"}) {
		t.Errorf("%+v %v, want seq %d", b, ok, seq)
	}
}

// TestOnlyNewerBalancesAreKept: and only a reader brings one in where there was none.
func TestOnlyNewerBalancesAreKept(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	put(c, c.ticket(), 4)
	put(c, mustMiss(t, c), 5)
	mustHit(t, c, 5)
	put(c, c.ticket(), 3)
	mustHit(t, c, 5)
	put(c, c.ticket(), 10) // 10 > 5 as a number, not as text
	mustHit(t, c, 10)
	if b, found, ok := c.get(context.Background(), 1, 11); ok {
		t.Errorf("%+v, but at least 11 was asked for", b)
	} else {
		put(c, found, 11)
	}
	mustHit(t, c, 11)
}

// TestPutsOnce: what a process has put it does not put again. When the database begins another life it does:
// there, a lower seq may be the newest.
func TestPutsOnce(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	for range 3 {
		put(c, c.ticket(), 5)
	}
	if n := c.puts.Load(); n != 1 {
		t.Errorf("%d puts", n)
	}
	c.enter(t.Name(), "2")
	inUse(t, c)
	put(c, mustMiss(t, c), 3)
	put(c, c.ticket(), 4)
	mustHit(t, c, 4)
}

// TestFillAfterAnOutageDoesNotPinTheOld: a reader read seq 5, then the put of seq 6 was lost; the reader's
// fill comes last.
func TestFillAfterAnOutageDoesNotPinTheOld(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	late := mustMiss(t, c)
	c.fail(errors.New("the put of seq 6 was lost"))
	eventually(t, 5*time.Second, "a new generation", func() bool { return c.generations.Load() == 2 })
	put(c, late, 5)
	put(c, mustMiss(t, c), 6)
	mustHit(t, c, 6)
	put(c, late, 5)
	mustHit(t, c, 6)
}

// TestLateFill: a reader misses, reads Postgres and stalls. A newer balance is put, then the key is evicted.
// Only now does the reader's fill arrive.
func TestLateFill(t *testing.T) {
	a, b := testCache(t, stack(t).RedisURL, t.Name()), testCache(t, stack(t).RedisURL, t.Name())
	late := mustMiss(t, a)
	put(a, mustMiss(t, b), 5)
	put(b, b.ticket(), 6)
	evict(t, a)
	put(a, late, 5)
	put(b, mustMiss(t, b), 6)
	mustHit(t, a, 6)
}

func evict(t *testing.T, c *cache) {
	t.Helper()
	if err := c.redis.Del(context.Background(), c.keys.Load().wallet(1)).Err(); err != nil {
		t.Fatal(err)
	}
}

// TestLatePut: a writer commits and stalls before its put; a newer balance is put and answered by another
// replica; then the key is evicted, or a third replica begins a new generation; the put arrives.
func TestLatePut(t *testing.T) {
	for _, how := range []string{"evicted", "new generation", "another life"} {
		t.Run(how, func(t *testing.T) {
			a, b := testCache(t, stack(t).RedisURL, t.Name()), testCache(t, stack(t).RedisURL, t.Name())
			late := a.ticket()
			put(b, mustMiss(t, b), 5)
			put(b, b.ticket(), 7)
			switch how {
			case "evicted":
				evict(t, b)
			case "new generation":
				testCache(t, stack(t).RedisURL, t.Name())
			case "another life": // Postgres was put back to seq 3
				b.enter(t.Name(), "2")
				put(b, b.ticket(), 3)
				mustMiss(t, a) // it serves nothing of the former life, though it has not heard yet
				a.enter(t.Name(), "2")
			}
			put(a, late, 6)
			inUse(t, a)
			inUse(t, b)
			if how == "another life" {
				put(b, mustMiss(t, b), 3)
				put(a, late, 6)
				inUse(t, a)
				put(b, mustMiss(t, b), 3)
				mustHit(t, a, 3)
				return
			}
			put(b, mustMiss(t, b), 7)
			mustHit(t, a, 7)
		})
	}
}

// TestNothingIsReadUntilWhatWasLostIsMadeUpFor: a put fails; only a new generation that began afterwards lets
// this replica read again, and its next put begins one by itself.
func TestNothingIsReadUntilWhatWasLostIsMadeUpFor(t *testing.T) {
	c := idleCache(t, stack(t).RedisURL)
	c.enter(t.Name(), "1")
	put(c, c.ticket(), 1) // a starting replica's first answer, before run has begun a generation
	put(c, mustMiss(t, c), 1)
	mustHit(t, c, 1)
	other := idleCache(t, stack(t).RedisURL)
	other.enter(t.Name(), "1")
	if err := other.begin(context.Background(), other.keys.Load()); err != nil {
		t.Fatal(err)
	}
	c.losses.Add(1)
	meanwhile := &duringSet{do: func() {
		put(other, mustMiss(t, other), 1)
		c.fail(errors.New("the put of seq 2 was lost"))
	}}
	c.redis.AddHook(meanwhile)
	if err := c.begin(context.Background(), c.keys.Load()); err != nil || meanwhile.do != nil {
		t.Fatal(err)
	}
	if b, _, ok := c.get(context.Background(), 1, 0); ok {
		t.Errorf("%+v is served", b)
	}
	if err := c.begin(context.Background(), c.keys.Load()); err != nil {
		t.Fatal(err)
	}
	put(c, mustMiss(t, c), 2)
	mustHit(t, c, 2)
}

// duringSet does something once, while Redis runs a SET.
type duringSet struct{ do func() }

func (d *duringSet) DialHook(next redis.DialHook) redis.DialHook { return next }
func (d *duringSet) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
func (d *duringSet) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if do := d.do; cmd.Name() == "set" && do != nil {
			d.do = nil
			do()
		}
		return err
	}
}

// TestFrozenWriter: a writer is stopped between its commit and its put, for longer than a call to Redis may
// take. When it goes on, its call has timed out; nobody serves the older balance once it has answered.
func TestFrozenWriter(t *testing.T) {
	frozen, other := testCache(t, stack(t).RedisURL, t.Name()), testCache(t, stack(t).RedisURL, t.Name())
	put(other, mustMiss(t, other), 5)
	mustHit(t, other, 5)
	frozen.redis.AddHook(&timesOut{left: 1})
	put(frozen, frozen.ticket(), 6)
	put(other, mustMiss(t, other), 6)
	mustHit(t, frozen, 6)
}

// TestRedisComesBackAtOneReplicaFirst: another replica serves again already when this one, which takes Redis
// for away still, answers a movement.
func TestRedisComesBackAtOneReplicaFirst(t *testing.T) {
	late, other := idleCache(t, stack(t).RedisURL), testCache(t, stack(t).RedisURL, t.Name())
	late.enter(t.Name(), "1")
	late.redis.AddHook(&timesOut{left: 2})
	put(late, late.ticket(), 4)
	if !late.away.Load() {
		t.Fatal("two calls failed, and Redis is not taken for away")
	}
	put(other, mustMiss(t, other), 5)
	movement := late.ticket()
	movement.moves = true
	put(late, movement, 6)
	put(other, mustMiss(t, other), 6)
	mustHit(t, late, 6)
}

// timesOut has the next calls time out without reaching Redis.
type timesOut struct{ left int }

func (o *timesOut) DialHook(next redis.DialHook) redis.DialHook { return next }
func (o *timesOut) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
func (o *timesOut) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if o.left > 0 {
			o.left--
			cmd.SetErr(context.DeadlineExceeded)
			return context.DeadlineExceeded
		}
		return next(ctx, cmd)
	}
}

// TestAnotherLifeSeesNothing: after a failover "only if newer" must not pin balances that never were, and
// another replica, which has not heard of it, must not go on serving them.
func TestAnotherLifeSeesNothing(t *testing.T) {
	c, other := testCache(t, stack(t).RedisURL, t.Name()), testCache(t, stack(t).RedisURL, t.Name())
	put(c, mustMiss(t, c), 5)
	mustHit(t, other, 5)
	c.enter(t.Name(), "2")
	if _, _, ok := c.get(context.Background(), 1, 0); ok {
		t.Error("a balance of life 1 in life 2")
	}
	put(c, c.ticket(), 3)
	mustMiss(t, other)
	put(c, mustMiss(t, c), 3)
	mustHit(t, c, 3)
}

// TestLedgersShareNothing: two databases of one cluster, on one Redis.
func TestLedgersShareNothing(t *testing.T) {
	a, b := testCache(t, stack(t).RedisURL, t.Name()+"a"), testCache(t, stack(t).RedisURL, t.Name()+"b")
	put(a, mustMiss(t, a), 5)
	put(b, mustMiss(t, b), 2)
	mustHit(t, a, 5)
	mustHit(t, b, 2)
}

// TestRedisComesBackWithOlderData: a snapshot that lacks the last puts. Its connections die unnoticed while
// nobody uses them.
func TestRedisComesBackWithOlderData(t *testing.T) {
	s, err := startStores()
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	a, b := testCache(t, s.RedisURL, t.Name()), testCache(t, s.RedisURL, t.Name())
	put(a, mustMiss(t, a), 5)
	mustHit(t, b, 5)
	if err := a.redis.Save(context.Background()).Err(); err != nil {
		if strings.Contains(err.Error(), "unknown command") {
			t.Skip("miniredis keeps no snapshot, and comes back empty")
		}
		t.Fatal(err)
	}
	put(a, a.ticket(), 6)
	mustHit(t, b, 6)
	s.command(t, "kill redis")
	s.command(t, "start redis")
	inspector := idleCache(t, s.RedisURL)
	was := inspector.redis.Get(context.Background(), a.keys.Load().wallet(1)).Val()
	if !strings.HasSuffix(was, " 5 USD 50 0") {
		t.Fatalf("Redis came back with %q: this test has proven nothing", was)
	}
	if seen, _, ok := b.get(context.Background(), 1, 0); ok && seen.seq < 6 {
		t.Errorf("%+v is served", seen)
	}
	inUse(t, b)
	if seen, _, ok := b.get(context.Background(), 1, 0); ok {
		t.Errorf("%+v is served in the new generation", seen)
	}
}

// TestCacheInAllOrders drives readers, writers and faults on a real Redis, one step at a time, in an order
// drawn at random: every step may be late by any number of others. No read may be behind what was answered
// before it began.
func TestCacheInAllOrders(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	dice := rand.New(rand.NewPCG(seed, 0))
	redisURL := stack(t).RedisURL
	replica := func() *cache {
		c := idleCache(t, redisURL)
		c.enter(t.Name(), "1")
		return c
	}
	const wallets, steps = 2, 30_000
	caches := []*cache{replica(), replica(), replica()}
	var committed, answered [1 + wallets]int64 // seqs: as Postgres shows them, and as told to somebody
	var busy [1 + wallets]bool
	head := func(id int64) map[int64]cachedBalance {
		return map[int64]cachedBalance{id: {id, committed[id], "USD", fmt.Sprint(10 * committed[id]), "0"}}
	}
	hits := 0
	var late []func() // what has begun and waits to go on
	for step := range steps {
		i, id := dice.IntN(len(caches)), int64(1+dice.IntN(wallets))
		c := caches[i]
		answer := func(seq int64) { answered[id] = max(answered[id], seq) }
		switch n := dice.IntN(1000); {
		case len(late) > 0 && (n < 450 || len(late) > 12): // something goes on
			k := dice.IntN(len(late))
			next := late[k]
			late = slices.Delete(late, k, k+1)
			next()
		case n < 530 && !busy[id]: // a movement: into the WAL, where the relay finds it; visible; put, answer
			before := c.ticket()
			busy[id] = true
			told := map[int64]cachedBalance{id: {id, committed[id] + 1, "USD",
				fmt.Sprint(10 * (committed[id] + 1)), "0"}}
			late = append(late, func() {
				early := caches[dice.IntN(len(caches))].ticket()
				early.early = true
				caches[dice.IntN(len(caches))].put(early, maps.Clone(told))
			}, func() {
				committed[id], busy[id] = told[id].seq, false
				late = append(late, func() {
					seq := told[id].seq
					c.put(before, told)
					answer(seq)
				})
			})
		case n < 550: // a read of Postgres, which is answered as it is
			before := c.ticket()
			told := head(id)
			late = append(late, func() {
				seq := told[id].seq
				c.put(before, told)
				answer(seq)
			})
		case n < 980: // a read: the cache, else Postgres, put, answer
			least := answered[id]
			minSeq := int64(dice.IntN(2)) * dice.Int64N(committed[id]+1)
			b, found, ok := c.get(context.Background(), id, minSeq)
			if ok {
				hits++
				if b.seq < least || b.seq < minSeq {
					t.Fatalf("seed %d, step %d: wallet %d is served at seq %d, but %d was answered and "+
						"%d asked for",
						seed, step, id, b.seq, least, minSeq)
				}
				answer(min(b.seq, committed[id])) // the relay's may be ahead
				break
			}
			late = append(late, func() {
				told := head(id)
				late = append(late, func() {
					seq := told[id].seq
					c.put(found, told)
					answer(seq)
				})
			})
		case n < 992: // eviction
			c.redis.Del(context.Background(), c.keys.Load().wallet(id))
		case n < 993:
			c.redis.Del(context.Background(), c.keys.Load().generation)
		case n < 995: // a replica stalls for good, another starts
			caches[i] = replica()
		case n < 997:
			if err := c.begin(context.Background(), c.keys.Load()); err != nil {
				t.Fatal(err)
			}
		default: // a server was restarted, as far as this replica knows
			c.losses.Add(1)
		}
	}
	if hits < steps/20 {
		t.Errorf("%d hits in %d steps: this test has proven little", hits, steps)
	}
	t.Logf("seed %d: %d steps, %d hits", seed, steps, hits)
}

// TestRedisAway: without Redis everything is answered from Postgres in time; when it is back, with old data,
// nothing old is served.
func TestRedisAway(t *testing.T) {
	s, err := startStores()
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	for _, fault := range [][2]string{{"kill redis", "start redis"}, {"pause redis", "resume redis"}} {
		t.Run(fault[0], func(t *testing.T) {
			w := start(t, testEnv(t, "REDIS_URL="+s.RedisURL))
			balance := func(want string) {
				t.Helper()
				began := time.Now()
				if a := w.get("/v1/wallets/1/balance"); a.status != 200 || a.json(t)["balance"] != want {
					t.Errorf("balance: %s, want %s", a, want)
				}
				if took := time.Since(began); took > time.Second {
					t.Errorf("a read took %v", took)
				}
			}
			inUse(t, w.balances)
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
			balance("1")
			balance("1") // the first read filled it
			if w.balances.hits.Load() == 0 {
				t.Error("the cache was not used")
			}
			s.command(t, fault[0])
			// Its put is lost.
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`)
			balance("2")
			balance("2")
			if w.balances.errors.Load() == 0 {
				t.Error("no fault was counted")
			}
			s.command(t, fault[1]) // a paused Redis still holds the old balance
			inUse(t, w.balances)
			hits := w.balances.hits.Load()
			// On a starved machine a call may time out once more.
			eventually(t, 10*time.Second, "a hit again", func() bool {
				balance("2")
				return w.balances.hits.Load() > hits
			})
		})
	}
}
