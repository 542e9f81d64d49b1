// Package gather forms batches by themselves: while one is being worked on, the next one gathers.
//
// It touches nothing but the operations that it is given. It promises that each one queued is handed to a
// worker once (or dropped, if it is gone by then), that those of one size on one key go in the order of
// their arrival, and that no two batches at work share a key.
//
// Small operations, of size 1, do not wait behind large ones: a batch takes all small ones that it can, and
// large ones only up to a share. A large one on keys that are in hand bars them to those that come after, so
// that it cannot wait for ever.
package gather

import (
	"context"
	"slices"
	"sync/atomic"
	"time"
)

// Operation is what is gathered.
type Operation interface {
	// Keys is what it works on; two operations that share one are never at work in different batches.
	Keys() []int64
	// Size is how much work it is, 1 or more.
	Size() int
	// Gone says that nobody waits for it any more.
	Gone() bool
}

// Bounds are those of a Gatherer, in sizes of operations but for Workers.
type Bounds struct {
	Queue   int // of what waits; one operation may be larger
	Workers int // batches at work at the same time
	Batch   int // of a batch; a large operation may be larger, and is alone then, or with small ones
	Large   int // of a batch, when a batch takes no further large one
}

// Gatherer hands batches to workers.
type Gatherer[T Operation] struct {
	Bounds
	small, large chan T
	work         func(batch []T, release func())
	drop         func(T)
	waiting      atomic.Int64 // sizes of what was reserved and no batch has taken yet
}

// New makes a Gatherer. work works a batch off; it calls release when the batch's keys are free again, and
// may go on after. drop gets what was gone before a batch took it.
func New[T Operation](b Bounds, work func([]T, func()), drop func(T)) *Gatherer[T] {
	return &Gatherer[T]{Bounds: b, work: work, drop: drop,
		small: make(chan T, b.Queue), large: make(chan T, b.Queue)}
}

// A batch has a fixed cost, about a dozen operations'. While one is at work, another starts only for
// furtherMin or after furtherAfter, when something must hold the first one up.
const (
	furtherMin   = 32 // of size
	furtherAfter = 20 * time.Millisecond
)

// Waiting is the size of what waits for a batch.
func (g *Gatherer[T]) Waiting() int { return int(g.waiting.Load()) }

// Reserve makes room in the queue for operations of a size in all, or says that there is none. What was
// reserved is queued, or released.
func (g *Gatherer[T]) Reserve(size int) bool {
	now := g.waiting.Add(int64(size))
	if now > int64(g.Queue) && now > int64(size) {
		g.waiting.Add(-int64(size))
		return false
	}
	return true
}

// Renew reserves for what a batch has had and left undone, whether there is room or not.
func (g *Gatherer[T]) Renew(size int) { g.waiting.Add(int64(size)) }

// Release gives back what was reserved and is not queued.
func (g *Gatherer[T]) Release(size int) { g.waiting.Add(-int64(size)) }

// Put queues an operation whose size was reserved.
func (g *Gatherer[T]) Put(op T) {
	if op.Size() == 1 {
		g.small <- op
	} else {
		g.large <- op
	}
}

// Run hands out batches until ctx ends and everything queued is worked off. When no batch is at work the next
// one starts at once, however small.
func (g *Gatherer[T]) Run(ctx context.Context) error {
	free, finished := g.Workers, make(chan []T, g.Workers)
	inHand := make(map[int64]bool) // keys of the batches at work
	var left, small, large []T     // waiting, each in order of arrival; left by the batches so far
	ready := 0                     // size of what the next batch may take: small, large, and some of left
	var overdue <-chan time.Time   // set while operations gather beside a batch at work
	take := func(list *[]T, op T) {
		*list = append(*list, op)
		ready += op.Size()
	}
	stop := ctx.Done()
	for stop != nil || free < g.Workers || ready > 0 || len(left) > 0 || len(g.small)+len(g.large) > 0 {
		further := min(furtherMin, g.Batch)
		smalls, larges := g.small, g.large
		if free == 0 || len(left) >= g.Batch {
			smalls, larges = nil, nil // what arrives waits there
		}
		select {
		case op := <-smalls:
			take(&small, op)
		case op := <-larges:
			take(&large, op)
		case batch := <-finished:
			free++
			for _, op := range batch {
				for _, key := range op.Keys() {
					delete(inHand, key)
				}
			}
			ready = 0
			for _, list := range [][]T{left, small, large} {
				for _, op := range list {
					ready += op.Size()
				}
			}
		case <-overdue:
			overdue, further = nil, 1
		case <-stop:
			stop = nil
			continue
		}
		for len(small) < g.Batch && len(g.small) > 0 {
			take(&small, <-g.small)
		}
		for len(large) < g.Batch && len(g.large) > 0 {
			take(&large, <-g.large)
		}
		for free > 0 && ready > 0 && (free == g.Workers || ready >= further) {
			overdue = nil
			gathered := slices.Concat(left, small, large)
			var batch []T
			batch, left, ready = g.form(gathered, inHand)
			small, large = nil, nil
			if len(batch) > 0 {
				free--
				go g.work(batch, func() { finished <- batch })
			}
		}
		if free > 0 && ready > 0 && overdue == nil {
			overdue = time.After(furtherAfter)
		}
	}
	return nil
}

// form makes a batch of what was gathered, and takes its keys in hand. Of what is left, so much had no room;
// the rest must wait until a batch is finished.
func (g *Gatherer[T]) form(gathered []T, inHand map[int64]bool) (batch, left []T, noRoom int) {
	awaited := make(map[int64]bool)
	size, large, full := 0, 0, false
	for _, op := range gathered {
		n := op.Size()
		switch {
		case op.Gone():
			g.waiting.Add(-int64(n))
			g.drop(op)
		case anyOf(inHand, op.Keys()), anyOf(awaited, op.Keys()):
			// Those behind it wait as well, or it might wait for ever.
			for _, key := range op.Keys() {
				awaited[key] = true
			}
			left = append(left, op)
		case n == 1 && size >= g.Batch,
			n > 1 && (full || large > 0 && (large+n > g.Large || size+n > g.Batch)):
			full = full || n > 1
			noRoom += n
			left = append(left, op)
		default:
			size += n
			if n > 1 {
				large += n
			}
			g.waiting.Add(-int64(n))
			batch = append(batch, op)
		}
	}
	for _, op := range batch {
		for _, key := range op.Keys() {
			inHand[key] = true
		}
	}
	return batch, left, noRoom
}

func anyOf(set map[int64]bool, keys []int64) bool {
	for _, key := range keys {
		if set[key] {
			return true
		}
	}
	return false
}
