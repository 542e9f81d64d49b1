// Package gather forms batches by themselves: while one is being worked on, the next one gathers.
//
// It touches nothing but the operations that it is given. It promises that each one queued is handed to a
// worker once (or dropped, if it is gone by then), that those of one size on one key go in the order of
// their arrival, and that no two batches at work share a key.
//
// There are two lanes, so that small operations do not wait behind large ones: a batch has only small or only
// large ones, one worker at most is on large ones, and each lane has its own bound. While there are small
// ones, batches of large ones are shorter: who shares a key with one waits for it. A large one that waits for
// keys bars them to small ones that come after, so that it cannot wait for ever.
package gather

import (
	"context"
	"maps"
	"sync/atomic"
	"time"
)

// Operation is what is gathered.
type Operation interface {
	// Keys is what it works on; two operations that share one are never at work in different batches.
	Keys() []int64
	// Size is how much work it is: 1 of a small one, 1 or more of a large one.
	Size() int
	Large() bool
	// Gone says that nobody waits for it any more.
	Gone() bool
}

// Bounds are those of a Gatherer, in sizes of operations but for Workers.
type Bounds struct {
	Queue   int // of what waits in each lane; one operation may be larger
	Workers int // batches at work at the same time
	Batch   int // of a batch of small operations
	Large   int // of a batch of large ones; a single one may be larger
	Beside  int // of one while there are small ones: of those, some came since the last
}

// Gatherer hands batches to workers.
type Gatherer[T Operation] struct {
	Bounds
	small, large chan T
	work         func(batch []T, release func())
	drop         func(T)
	waiting      [2]atomic.Int64 // by lane: sizes of what was reserved and no batch has taken yet
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
func (g *Gatherer[T]) Waiting() int { return int(g.waiting[0].Load() + g.waiting[1].Load()) }

func (g *Gatherer[T]) waitingIn(large bool) *atomic.Int64 {
	if large {
		return &g.waiting[1]
	}
	return &g.waiting[0]
}

// Reserve makes room in a lane's queue for operations of a size in all, or says that there is none. What was
// reserved is queued, or released.
func (g *Gatherer[T]) Reserve(size int, large bool) bool {
	n := g.waitingIn(large)
	if now := n.Add(int64(size)); now > int64(g.Queue) && now > int64(size) {
		n.Add(-int64(size))
		return false
	}
	return true
}

// Renew reserves for what a batch has had and left undone, whether there is room or not.
func (g *Gatherer[T]) Renew(size int, large bool) { g.waitingIn(large).Add(int64(size)) }

// Release gives back what was reserved and is not queued.
func (g *Gatherer[T]) Release(size int, large bool) { g.waitingIn(large).Add(-int64(size)) }

// Put queues an operation whose size was reserved.
func (g *Gatherer[T]) Put(op T) {
	if op.Large() {
		g.large <- op
	} else {
		g.small <- op
	}
}

// lane is what waits of one kind.
type lane[T Operation] struct {
	queue  chan T
	most   int // of a batch
	atWork int // batches
	left   []T // in order of arrival
	ready  int // size of those that no key in hand keeps waiting, as far as is known
}

func (l *lane[T]) take(op T) {
	l.left = append(l.left, op)
	l.ready += op.Size()
}

// finished is a batch that was worked off.
type finished[T Operation] struct {
	*lane[T]
	batch []T
}

// Run hands out batches until ctx ends and everything queued is worked off. When no batch of small operations
// is at work the next one starts at once, however small.
func (g *Gatherer[T]) Run(ctx context.Context) error {
	small, large := &lane[T]{queue: g.small, most: g.Batch}, &lane[T]{queue: g.large, most: g.Large}
	lanes := []*lane[T]{small, large}
	free, done := g.Workers, make(chan finished[T], g.Workers)
	inHand := make(map[int64]bool) // keys of the batches at work
	barred := make(map[int64]bool) // keys that a large operation waits for
	var overdue <-chan time.Time   // set while operations gather beside a batch at work
	smalls := false                // some came since the last batch of large ones
	start := func(l *lane[T]) {
		if l == large {
			if l.most = g.Large; smalls || small.atWork > 0 {
				l.most = g.Beside
			}
			smalls = false
		} else {
			smalls = true
		}
		var batch []T
		batch, l.left, l.ready = g.form(l, inHand, barred, l == large)
		if len(batch) > 0 {
			free--
			l.atWork++
			go g.work(batch, func() { done <- finished[T]{l, batch} })
		}
	}
	stop := ctx.Done()
	for stop != nil || free < g.Workers || len(small.left)+len(large.left)+len(g.small)+len(g.large) > 0 {
		further := min(furtherMin, g.Batch)
		ofSmall, ofLarge := small.queue, large.queue
		if free == 0 || len(small.left) >= g.Batch {
			ofSmall = nil // what arrives waits there
		}
		if free == 0 || len(large.left) >= g.Batch {
			ofLarge = nil
		}
		select {
		case op := <-ofSmall:
			small.take(op)
		case op := <-ofLarge:
			large.take(op)
		case f := <-done:
			free++
			f.atWork--
			for _, op := range f.batch {
				for _, key := range op.Keys() {
					delete(inHand, key)
				}
			}
			for _, l := range lanes { // a key that any of them waits for may be free now
				l.ready = 0
				for _, op := range l.left {
					l.ready += op.Size()
				}
			}
			if f.lane == small && g.Workers == 1 && large.ready > 0 {
				start(large) // in turns: small ones never leave the one worker free
			}
		case <-overdue:
			overdue, further = nil, 1
		case <-stop:
			stop = nil
			continue
		}
		for _, l := range lanes {
			for len(l.left) < g.Batch && len(l.queue) > 0 {
				l.take(<-l.queue)
			}
		}
		for free > 0 && small.ready > 0 && (small.atWork == 0 || small.ready >= further) {
			overdue = nil
			start(small)
		}
		if free > 0 && large.ready > 0 && large.atWork == 0 {
			start(large)
		}
		if free > 0 && small.ready > 0 && overdue == nil {
			overdue = time.After(furtherAfter)
		}
	}
	return nil
}

// form makes a batch of what a lane has, and takes its keys in hand. Of what is left, so much had no room;
// the rest must wait until a batch is finished.
func (g *Gatherer[T]) form(l *lane[T], inHand, barred map[int64]bool, bars bool) (
	batch, left []T, noRoom int) {
	awaited := barred
	if bars {
		clear(barred) // those that still wait bar again
	} else {
		awaited = maps.Clone(barred)
	}
	size := 0
	for _, op := range l.left {
		n := op.Size()
		switch {
		case op.Gone():
			g.waitingIn(op.Large()).Add(-int64(n))
			g.drop(op)
		case anyOf(inHand, op.Keys()), anyOf(awaited, op.Keys()):
			// Those behind it wait as well, or it might wait for ever.
			for _, key := range op.Keys() {
				awaited[key] = true
			}
			left = append(left, op)
		case noRoom > 0, size > 0 && size+n > l.most:
			noRoom += n
			left = append(left, op)
		default:
			size += n
			g.waitingIn(op.Large()).Add(-int64(n))
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
