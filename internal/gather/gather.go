// Package gather forms batches by themselves: while one is being worked on, the next one gathers.
//
// It touches nothing but the operations that it is given. It promises that each one queued is handed to a
// worker once (or dropped, if it is gone by then), that those on one key go in the order of their arrival,
// and that no two batches at work share a key.
package gather

import (
	"context"
	"sync/atomic"
	"time"
)

// Operation is what is gathered.
type Operation interface {
	// Keys is what it works on; two operations that share one are never at work in different batches.
	Keys() []int64
	// Gone says that nobody waits for it any more.
	Gone() bool
}

// Gatherer hands batches to workers.
type Gatherer[T Operation] struct {
	Queue chan T // what waits; its capacity is the bound

	workers, most int
	work          func(batch []T, release func())
	drop          func(T)
	aside         atomic.Int64 // gathered, or waiting for a key in hand
}

// New makes a Gatherer for so many operations in the queue, batches at work at the same time, and operations
// in a batch, at most. work works a batch off; it calls release when the batch's keys are free again, and may
// go on after. drop gets what was gone before a batch took it.
func New[T Operation](queue, workers, most int, work func([]T, func()), drop func(T)) *Gatherer[T] {
	return &Gatherer[T]{Queue: make(chan T, queue), workers: workers, most: most, work: work, drop: drop}
}

// A batch has a fixed cost, about a dozen operations'. While one is at work, another starts only for
// furtherMin operations or after furtherAfter, when something must hold the first one up.
const (
	furtherMin   = 32 // operations
	furtherAfter = 20 * time.Millisecond
)

// Waiting is how many operations wait for a batch.
func (g *Gatherer[T]) Waiting() int { return len(g.Queue) + int(g.aside.Load()) }

// Run hands out batches until ctx ends and everything queued is worked off. When no batch is at work the next
// one starts at once, however small. It takes every waiting operation except those on keys that another batch
// has in hand.
func (g *Gatherer[T]) Run(ctx context.Context) error {
	free, finished := g.workers, make(chan []T, g.workers)
	inHand := make(map[int64]bool) // keys of the batches at work
	var gathered []T               // for the next batch, in order of arrival
	var waiting []T                // for a key in hand, likewise
	awaited := make(map[int64]bool)
	var overdue <-chan time.Time // set while operations gather beside a batch at work
	stop := ctx.Done()
	for stop != nil || free < g.workers || len(gathered) > 0 || len(waiting) > 0 || len(g.Queue) > 0 {
		g.aside.Store(int64(len(gathered) + len(waiting)))
		further := min(furtherMin, g.most)
		queue := g.Queue
		if free == 0 || len(waiting) >= g.most {
			queue = nil // what arrives waits there, up to its bound
		}
		select {
		case op := <-queue:
			gathered = append(gathered, op)
		case batch := <-finished:
			free++
			for _, op := range batch {
				for _, key := range op.Keys() {
					delete(inHand, key)
				}
			}
			gathered, waiting = append(waiting, gathered...), nil
			clear(awaited)
		case <-overdue:
			further = 0
		case <-stop:
			stop = nil
			continue
		}
		for len(gathered) < g.most && len(g.Queue) > 0 {
			gathered = append(gathered, <-g.Queue)
		}
		if free < g.workers && len(gathered) < further {
			if overdue == nil && len(gathered) > 0 {
				overdue = time.After(furtherAfter)
			}
			continue
		}
		overdue = nil
		batch := make([]T, 0, len(gathered))
		for _, op := range gathered {
			switch {
			case op.Gone():
				g.drop(op)
			case len(batch) == g.most || anyOf(inHand, op.Keys()) || anyOf(awaited, op.Keys()):
				// Those behind it wait as well, or it might wait for ever.
				for _, key := range op.Keys() {
					awaited[key] = true
				}
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
			for _, key := range op.Keys() {
				inHand[key] = true
			}
		}
		free--
		go g.work(batch, func() { finished <- batch })
	}
	return nil
}

func anyOf(set map[int64]bool, keys []int64) bool {
	for _, key := range keys {
		if set[key] {
			return true
		}
	}
	return false
}
