package gather

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

type op struct {
	number int
	keys   []int64
	size   int
	gone   bool
}

func (o *op) Keys() []int64 { return o.keys }
func (o *op) Size() int     { return max(o.size, 1) }
func (o *op) Large() bool   { return o.size > 0 }
func (o *op) Gone() bool    { return o.gone }

// TestGather: each operation goes to one worker or is dropped; no two batches at work share a key; on one key
// the order of arrival is kept among small operations, and among large ones.
func TestGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const operations, workers, most, share = 5_000, 3, 7, 5
		var mu sync.Mutex
		type place struct {
			key   int64
			large bool
		}
		held, last, seen := map[int64]int{}, map[place]int{}, map[int]int{}
		onLarge := 0 // workers
		var dropped atomic.Int64
		work := func(batch []*op, release func()) {
			mu.Lock()
			ours := make(map[int64]bool)
			size, large, larges := 0, 0, 0
			for _, o := range batch {
				seen[o.number]++
				if size += o.Size(); o.Large() {
					large += o.Size()
					larges++
				}
				for _, key := range o.keys {
					p := place{key, o.Large()}
					if last[p] > o.number {
						t.Errorf("key %d: operation %d after %d", key, o.number, last[p])
					}
					last[p], ours[key] = o.number, true
				}
			}
			if size == 0 || larges > 0 && size > large || larges == 0 && size > most ||
				larges > 1 && large > share {
				t.Errorf("a batch of %d, %d of it in %d large ones", size, large, larges)
			}
			for key := range ours {
				if held[key]++; held[key] > 1 {
					t.Errorf("two batches have key %d in hand", key)
				}
			}
			if larges > 0 {
				if onLarge++; onLarge > 1 {
					t.Error("two workers are on large ones")
				}
			}
			mu.Unlock()
			time.Sleep(rand.N(3 * time.Millisecond))
			mu.Lock()
			for key := range ours {
				held[key]--
			}
			if larges > 0 {
				onLarge--
			}
			mu.Unlock()
			release()
		}
		g := New(Bounds{100, workers, most, share, share}, work, func(*op) { dropped.Add(1) })
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
			if rand.IntN(10) == 0 {
				o.size = 1 + rand.IntN(10)
			}
			for !g.Reserve(o.Size(), o.Large()) {
				time.Sleep(time.Millisecond)
			}
			g.Put(o)
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
		g := New(Bounds{1000, 4, 1000, 100, 100}, func(batch []*op, release func()) {
			mu.Lock()
			starts = append(starts, start{time.Since(began), len(batch)})
			mu.Unlock()
			time.Sleep(time.Second)
			release()
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		g.Put(&op{keys: []int64{1}})
		synctest.Wait()
		g.Put(&op{keys: []int64{2}})
		time.Sleep(furtherAfter + time.Millisecond)
		for key := range int64(furtherMin) {
			g.Put(&op{keys: []int64{10 + key}})
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

// TestSmallOnesPassLargeOnes: what is small waits for the batches at work only, however many large ones are
// queued; and large ones on a key that small ones never let go get it.
func TestSmallOnesPassLargeOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const each = 10 * time.Millisecond
		var mu sync.Mutex
		finished := make(map[*op]time.Duration)
		began := time.Now()
		g := New(Bounds{100_000, 2, 1000, 100, 100}, func(batch []*op, release func()) {
			time.Sleep(each)
			mu.Lock()
			for _, o := range batch {
				finished[o] = time.Since(began)
			}
			mu.Unlock()
			release()
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		put := func(o *op) *op {
			if !g.Reserve(o.Size(), o.Large()) {
				t.Error("the queue is full")
			}
			g.Put(o)
			return o
		}
		for key := range int64(100) {
			put(&op{keys: []int64{1000 + key}, size: 60}) // two fit in no batch: 100 batches, one at a time
		}
		time.Sleep(time.Millisecond)
		small := put(&op{keys: []int64{1}})
		hot := put(&op{keys: []int64{5, 6}, size: 60}) // behind all of those
		for range 300 {                                // one of both keys is always in hand
			put(&op{keys: []int64{5}})
			time.Sleep(each / 2)
			put(&op{keys: []int64{6}})
			time.Sleep(each / 2)
		}
		cancel()
		<-done
		if finished[small] > 3*each {
			t.Errorf("a small one took %v beside large ones", finished[small])
		}
		if at := finished[hot]; at == 0 || at > 150*each {
			t.Errorf("the large one on keys in demand was finished after %v", at)
		}
		if g.Waiting() != 0 || len(finished) != 702 {
			t.Errorf("%d finished, %d wait", len(finished), g.Waiting())
		}
	})
}

// TestShorterBesideSmallOnes: a batch of large ones is short while there are small ones, and long without.
func TestShorterBesideSmallOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sizes []int // of batches of large ones
		g := New(Bounds{1000, 2, 100, 100, 20}, func(batch []*op, release func()) {
			if batch[0].Large() {
				size := 0
				for _, o := range batch {
					size += o.Size()
				}
				sizes = append(sizes, size)
			}
			time.Sleep(10 * time.Millisecond)
			release()
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		put := func(o *op) {
			g.Reserve(o.Size(), o.Large())
			g.Put(o)
		}
		for i := range int64(50) {
			put(&op{keys: []int64{i}, size: 10})
		}
		go func() { done <- g.Run(ctx) }()
		time.Sleep(15 * time.Millisecond) // the second is at work
		put(&op{keys: []int64{1000}})
		time.Sleep(time.Second)
		cancel()
		<-done
		if want := []int{100, 100, 20, 100, 100, 80}; !slices.Equal(sizes, want) {
			t.Errorf("batches of %v, want %v", sizes, want)
		}
	})
}

// TestOneWorkerTakesTurns: small ones that never leave the one worker free keep no large one waiting.
func TestOneWorkerTakesTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const each = 10 * time.Millisecond
		var large atomic.Int64 // when it was finished, since the beginning
		began := time.Now()
		g := New(Bounds{100, 1, 10, 10, 10}, func(batch []*op, release func()) {
			time.Sleep(each)
			if batch[0].Large() {
				large.Store(int64(time.Since(began)))
			}
			release()
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		put := func(o *op) {
			if !g.Reserve(o.Size(), o.Large()) {
				t.Error("the queue is full")
			}
			g.Put(o)
		}
		for i := range int64(200) {
			put(&op{keys: []int64{i}})
			if i == 10 {
				put(&op{keys: []int64{1000}, size: 5})
			}
			time.Sleep(each / 4)
		}
		cancel()
		<-done
		if took := time.Duration(large.Load()); took == 0 || took > 8*each {
			t.Errorf("the large one was finished after %v", took)
		}
	})
}

// TestReserve: the queue's bound is by size, and one operation may be larger than it.
func TestReserve(t *testing.T) {
	g := New[*op](Bounds{10, 1, 10, 10, 10}, nil, nil)
	for _, step := range []struct {
		size int
		ok   bool
	}{{25, true}, {1, false}, {-25, true}, {6, true}, {5, false}, {4, true}, {1, false}} {
		if step.size < 0 {
			g.Release(-step.size, true)
		} else if ok := g.Reserve(step.size, true); ok != step.ok {
			t.Errorf("%d beside %d: %v", step.size, g.Waiting(), ok)
		}
	}
	if !g.Reserve(10, false) || g.Reserve(1, false) {
		t.Error("a full lane is the other one's as well")
	}
}
