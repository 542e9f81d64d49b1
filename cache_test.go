// The cache: never wrong for long, never in the way.

package main

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// testCache is a cache of a database of its own, in use.
func testCache(tb testing.TB, redisURL, database string) *cache {
	tb.Helper()
	c, err := newCache(&config{redisURL: redisURL, cacheTTL: time.Minute, cacheTimeout: 200 * time.Millisecond})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.run(ctx) })
	tb.Cleanup(func() { cancel(); running.Wait() })
	c.enter(database, "1")
	eventually(tb, 5*time.Second, "cache in use", func() bool { _, ok := c.usable(); return ok })
	return c
}

func one(walletID, seq int64, balance string) map[int64]cachedBalance {
	return map[int64]cachedBalance{walletID: {walletID, seq, "USD", balance}}
}

func TestOnlyNewerBalancesAreKept(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	want := func(seq int64, balance string) {
		t.Helper()
		if b, _, ok := c.get(context.Background(), 1); !ok || b.seq != seq || b.balance != balance || b.currency != "USD" {
			t.Errorf("%+v %v, want seq %d, %s", b, ok, seq, balance)
		}
	}
	c.put(one(1, 5, "50"))
	want(5, "50")
	c.put(one(1, 4, "40"))
	want(5, "50")
	c.put(one(1, 10, "100")) // 10 > 5 as a number, not as text
	want(10, "100")
}

// TestPutsOnce: what a process has put it does not put again, until the timeline changes: there, a lower seq may be the newest.
func TestPutsOnce(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	for range 3 {
		c.put(one(1, 5, "50"))
	}
	if n := c.puts.Load(); n != 1 {
		t.Errorf("%d puts", n)
	}
	c.enter(t.Name(), "2")
	eventually(t, 5*time.Second, "cache in use", func() bool { _, ok := c.usable(); return ok })
	c.put(one(1, 4, "40"))
	if b, _, ok := c.get(context.Background(), 1); !ok || b.seq != 4 {
		t.Errorf("%+v %v, want seq 4", b, ok)
	}
}

// TestFillAfterAnOutageDoesNotPinTheOld: a reader read seq 5, then seq 6 was put and lost; the reader's fill comes last.
func TestFillAfterAnOutageDoesNotPinTheOld(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	_, generation, ok := c.get(context.Background(), 1)
	if ok || generation == "" {
		t.Fatalf("generation %q, found %v", generation, ok)
	}
	c.fail(fmt.Errorf("the put of seq 6 was lost"))
	eventually(t, 5*time.Second, "a new generation", func() bool { return c.generations.Load() == 2 })
	c.fill(cachedBalance{1, 5, "USD", "50"}, generation)
	if b, _, ok := c.get(context.Background(), 1); ok {
		t.Errorf("the old balance is served: %+v", b)
	}
	_, generation, _ = c.get(context.Background(), 1)
	c.fill(cachedBalance{1, 6, "USD", "60"}, generation)
	if b, _, ok := c.get(context.Background(), 1); !ok || b.balance != "60" {
		t.Errorf("%+v %v", b, ok)
	}
}

// TestAnotherTimelineSeesNothing: after a failover "only if newer" must not pin balances that never were.
func TestAnotherTimelineSeesNothing(t *testing.T) {
	c := testCache(t, stack(t).RedisURL, t.Name())
	c.put(one(1, 5, "50"))
	c.enter(t.Name(), "2")
	if _, _, ok := c.get(context.Background(), 1); ok {
		t.Error("a balance of timeline 1 on timeline 2")
	}
	eventually(t, 5*time.Second, "in use again", func() bool { _, ok := c.usable(); return ok })
	c.put(one(1, 3, "30"))
	if b, _, ok := c.get(context.Background(), 1); !ok || b.seq != 3 {
		t.Errorf("%+v %v, want seq 3", b, ok)
	}
}

// TestRedisAway: without Redis everything is answered from Postgres in time; when it is back, with old data, nothing old is served.
func TestRedisAway(t *testing.T) {
	s, err := startServers()
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
			eventually(t, 5*time.Second, "cache in use", func() bool { _, ok := w.balances.usable(); return ok })
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
			balance("1")
			if w.balances.hits.Load() == 0 {
				t.Error("the cache was not used")
			}
			s.command(t, fault[0])
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"b"}`) // its put is lost
			balance("2")
			balance("2")
			if w.balances.errors.Load() == 0 {
				t.Error("no fault was counted")
			}
			s.command(t, fault[1]) // a paused Redis still holds the old balance
			eventually(t, 10*time.Second, "cache in use again", func() bool { _, ok := w.balances.usable(); return ok })
			hits := w.balances.hits.Load()
			eventually(t, 10*time.Second, "a hit again", func() bool { // on a starved machine a call may time out once more
				balance("2")
				return w.balances.hits.Load() > hits
			})
		})
	}
}
