package gather

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

type op struct {
	number int
	keys   []int64
	gone   bool
}

func (o *op) Keys() []int64 { return o.keys }
func (o *op) Gone() bool    { return o.gone }

// TestGather: each operation goes to one worker or is dropped; no two batches at work share a key; on one key
// the order of arrival is kept.
func TestGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const operations, workers, most = 5_000, 3, 7
		var mu sync.Mutex
		held, last, seen := map[int64]int{}, map[int64]int{}, map[int]int{}
		var dropped atomic.Int64
		work := func(batch []*op, release func()) {
			mu.Lock()
			if len(batch) == 0 || len(batch) > most {
				t.Errorf("a batch of %d", len(batch))
			}
			ours := make(map[int64]bool)
			for _, o := range batch {
				seen[o.number]++
				for _, key := range o.keys {
					if last[key] > o.number {
						t.Errorf("key %d: operation %d after %d", key, o.number, last[key])
					}
					last[key], ours[key] = o.number, true
				}
			}
			for key := range ours {
				if held[key]++; held[key] > 1 {
					t.Errorf("two batches have key %d in hand", key)
				}
			}
			mu.Unlock()
			time.Sleep(rand.N(3 * time.Millisecond))
			mu.Lock()
			for key := range ours {
				held[key]--
			}
			mu.Unlock()
			release()
		}
		g := New(100, workers, most, work, func(*op) { dropped.Add(1) })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		gone := int64(0)
		for i := range operations {
			o := &op{number: i, gone: rand.IntN(50) == 0}
			for range 1 + rand.IntN(4) {
				o.keys = append(o.keys, rand.Int64N(12))
			}
			if o.gone {
				gone++
			}
			g.Queue <- o
			if rand.IntN(20) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		cancel()
		if err := <-done; err != nil || g.Waiting() != 0 {
			t.Fatalf("%v, %d left", err, g.Waiting())
		}
		for number, times := range seen {
			if times != 1 {
				t.Errorf("operation %d was worked off %d times", number, times)
			}
		}
		if dropped.Load() != gone || int64(len(seen))+gone != operations {
			t.Errorf("%d worked off and %d dropped of %d, %d were gone", len(seen), dropped.Load(),
				operations, gone)
		}
	})
}

// TestSmallBatchDoesNotWait: with nobody at work a batch starts at once; beside one at work, after
// furtherAfter or with furtherMin operations.
func TestSmallBatchDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type start struct {
			at   time.Duration
			size int
		}
		began := time.Now()
		var mu sync.Mutex
		var starts []start
		g := New(1000, 4, 1000, func(batch []*op, release func()) {
			mu.Lock()
			starts = append(starts, start{time.Since(began), len(batch)})
			mu.Unlock()
			time.Sleep(time.Second)
			release()
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		g.Queue <- &op{keys: []int64{1}}
		synctest.Wait()
		g.Queue <- &op{keys: []int64{2}}
		time.Sleep(furtherAfter + time.Millisecond)
		for key := range int64(furtherMin) {
			g.Queue <- &op{keys: []int64{10 + key}}
		}
		synctest.Wait()
		cancel()
		<-done
		want := []start{{0, 1}, {furtherAfter, 1}, {furtherAfter + time.Millisecond, furtherMin}}
		for i := range want {
			if len(starts) != len(want) || starts[i] != want[i] {
				t.Fatalf("batches started at %v, want %v", starts, want)
			}
		}
	})
}
