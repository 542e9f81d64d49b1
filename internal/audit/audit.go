// Package audit compares a ledger that numbers each key's events from 1 with a topic that carries them. An
// event is key, number and bytes.
//
// It touches neither: it reads both, by functions that it is given. It promises that no missing, repeated,
// reordered, misplaced, invented or differing event goes unfound, while both go on growing: events younger
// than the ledger's snapshot are left to the next audit.
package audit

import (
	"context"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"os"
	"slices"
	"time"
)

const (
	keysMax     = 1_000_000        // whose state is in memory at a time; each lot reads the topic once more
	patience    = 30 * time.Second // without progress, for events that are committed but not in the topic yet
	findingsMax = 20               // printed; all are counted
	nowMax      = 10_000           // keys asked for at a time
)

// Ledger is one side, as of one snapshot but for Now. Keys are above 0.
type Ledger struct {
	Noun string // what a key is, for sentences about one: "wallet"

	// Heads gives the number of the last event of each key above after, of at most n keys: the lowest ones,
	// up to last.
	Heads func(ctx context.Context, after int64, n int) (heads map[int64]int64, last int64, err error)
	// Events visits the events of the keys above after and up to last, in order. A value is lent for the
	// visit.
	Events func(ctx context.Context, after, last int64, visit func(Event) error) error
	// Now visits the keys with the number of the last event of each as of now, which is 0 for one unknown.
	Now func(ctx context.Context, keys []int64, visit func(key, number int64)) error
}

// Topic is the other side.
type Topic struct {
	Partitions int32
	Partition  func(key int64) (int32, error) // where a key's events belong

	// Bounds gives the offsets that can be read now; to is exclusive.
	Bounds func(partition int32) (from, to int64, err error)
	// Scan visits what lies between two offsets, in order. What is no event has an error.
	Scan func(ctx context.Context, partition int32, from, to int64, visit Visit) error
}

// Visit is told of an event in the topic, or why there is none at this offset.
type Visit func(offset int64, e Event, err error)

// Event is one event. Key and Number are its id.
type Event struct {
	Key, Number int64
	Value       []byte
}

func (e *Event) id() string { return fmt.Sprintf("%d-%d", e.Key, e.Number) }

// Report is what an audit says: findings, and on a terminal how far it is.
type Report struct {
	out      io.Writer
	terminal bool
	findings int
}

// NewReport makes a Report that is written to out.
func NewReport(out io.Writer) *Report {
	r := &Report{out: out}
	if f, ok := out.(*os.File); ok {
		info, err := f.Stat()
		r.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return r
}

// Find reports a finding. All are counted, the first ones printed.
func (r *Report) Find(format string, args ...any) {
	r.findings++
	if r.findings <= findingsMax {
		fmt.Fprintf(r.out, "FOUND "+format+"\n", args...)
	} else if r.findings == findingsMax+1 {
		fmt.Fprintln(r.out, "further findings are counted only")
	}
}

// Findings is how many there are.
func (r *Report) Findings() int { return r.findings }

// Note prints a line that is not a finding.
func (r *Report) Note(format string, args ...any) { fmt.Fprintf(r.out, format+"\n", args...) }

// Progress shows a line until the next one, on a terminal.
func (r *Report) Progress(format string, args ...any) {
	if r.terminal {
		fmt.Fprintf(r.out, "\r\x1b[K"+format+"\r", args...)
	}
}

// Totals is how much was compared.
type Totals struct {
	Keys    int64
	Events  int64 // seen in the topic, the younger ones included
	Younger int64 // than the ledger's snapshot
}

// keyState is what is known of one key while its lot is audited.
type keyState struct {
	head  int64 // number of its last event in the ledger
	first int64 // number of the first event seen in the topic: 1, unless the topic's head was deleted
	next  int64 // number of the event that must come next; 0 before the first
	sum   uint64
	found bool // something was found and said already
}

// comparison is one run of Compare.
type comparison struct {
	ledger   Ledger
	topic    Topic
	report   *Report
	seed     maphash.Seed
	headless []bool // by partition: its first events have been deleted
	totals   Totals
}

// lot is the keys of which one reading of the topic takes care.
type lot struct {
	after, last int64
	keys        map[int64]*keyState
	missing     int             // keys whose last event has not been seen
	younger     map[int64]int64 // the highest number of each key that is above its head
	from        []int64         // by partition: where to read on
}

// Compare reads both sides and reports what differs.
func Compare(ctx context.Context, ledger Ledger, topic Topic, report *Report) (Totals, error) {
	c := &comparison{ledger: ledger, topic: topic, report: report, seed: maphash.MakeSeed(),
		headless: make([]bool, topic.Partitions)}
	for p := range topic.Partitions {
		from, _, err := topic.Bounds(p)
		if err != nil {
			return c.totals, err
		}
		if c.headless[p] = from > 0; c.headless[p] {
			report.Note("partition %d begins at offset %d, its head has been deleted: compared from there",
				p, from)
		}
	}
	for after, more := int64(0), true; more; {
		heads, last, err := ledger.Heads(ctx, after, keysMax)
		if err != nil {
			return c.totals, err
		}
		if more = len(heads) == keysMax; !more {
			last = math.MaxInt64
		}
		l := &lot{after: after, last: last, keys: make(map[int64]*keyState, len(heads)),
			younger: make(map[int64]int64), from: make([]int64, topic.Partitions)}
		for key, head := range heads {
			l.keys[key] = &keyState{head: head}
			if head > 0 {
				l.missing++
			}
		}
		for _, step := range []func(context.Context, *lot) error{c.readTopic, c.checkYounger, c.readLedger} {
			if err := step(ctx, l); err != nil {
				return c.totals, err
			}
		}
		c.totals.Keys += int64(len(l.keys))
		after = last
	}
	return c.totals, nil
}

// readTopic checks each key's events among themselves, and waits for those that are on their way.
func (c *comparison) readTopic(ctx context.Context, l *lot) error {
	for quiet := time.Now(); ; {
		grew, err := c.readOn(ctx, l)
		if err != nil {
			return err
		}
		if grew {
			quiet = time.Now()
		}
		if l.missing <= 0 || time.Since(quiet) > patience {
			break
		}
		c.report.Progress("waiting for the events of %d %ss", l.missing, c.ledger.Noun)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for key, k := range l.keys {
		p, err := c.topic.Partition(key)
		if err != nil {
			return err
		}
		if k.next <= k.head && !k.found && (k.next > 0 || !c.headless[p]) {
			k.found = true
			c.report.Find("%s %d: events %d to %d are not in the topic",
				c.ledger.Noun, key, max(k.next, 1), k.head)
		}
	}
	return nil
}

// readOn reads what the topic has got since it was last called.
func (c *comparison) readOn(ctx context.Context, l *lot) (grew bool, err error) {
	for p := range c.topic.Partitions {
		from, to, err := c.topic.Bounds(p)
		if err != nil {
			return grew, err
		}
		from = max(from, l.from[p])
		grew = grew || from < to
		l.from[p] = to
		err = c.topic.Scan(ctx, p, from, to, func(offset int64, e Event, err error) {
			if err != nil {
				c.report.Find("%v", err)
				return
			}
			if e.Key <= l.after || e.Key > l.last {
				return
			}
			c.totals.Events++
			if c.totals.Events%50_000 == 0 {
				c.report.Progress("partition %d of %d, offset %d of %d", p+1, c.topic.Partitions, offset, to)
			}
			c.see(l, p, offset, &e)
		})
		if err != nil {
			return grew, err
		}
	}
	return grew, nil
}

// see takes note of an event of the topic.
func (c *comparison) see(l *lot, p int32, offset int64, e *Event) {
	k := l.keys[e.Key]
	if k == nil { // made after the snapshot, or never
		k = new(keyState)
		l.keys[e.Key] = k
	}
	find := func(format string, args ...any) {
		at := fmt.Sprintf("partition %d, offset %d: event %s", p, offset, e.id())
		c.report.Find("%s "+format, append([]any{at}, args...)...)
	}
	if k.next == 0 {
		k.first, k.next = e.Number, e.Number
		if want, _ := c.topic.Partition(e.Key); want != p {
			find("is in the wrong partition, want %d", want)
		}
		if e.Number != 1 && !c.headless[p] {
			k.found = true
			find("is the %s's first: those before it are missing", c.ledger.Noun)
		}
	}
	switch {
	case e.Number < k.next:
		k.found = true
		find("is repeated, or too late")
		return
	case e.Number > k.next:
		k.found = true
		find("follows number %d: those between are missing", k.next-1)
	}
	k.next = e.Number + 1
	if e.Number > k.head {
		c.totals.Younger++
		l.younger[e.Key] = e.Number
		return
	}
	k.sum = c.add(k.sum, e.Value)
	if e.Number == k.head {
		l.missing--
	}
}

// checkYounger finds events that the ledger does not hold, not even by now.
func (c *comparison) checkYounger(ctx context.Context, l *lot) error {
	keys := make([]int64, 0, len(l.younger))
	for key := range l.younger {
		keys = append(keys, key)
	}
	for some := range slices.Chunk(keys, nowMax) {
		err := c.ledger.Now(ctx, some, func(key, number int64) {
			if e := (Event{Key: key, Number: l.younger[key]}); number < e.Number {
				c.report.Find("event %s is in the topic, but the ledger ends at number %d", e.id(), number)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// readLedger checks the events of the ledger against those of the topic, key by key, by their hashes.
func (c *comparison) readLedger(ctx context.Context, l *lot) error {
	var key int64
	var sum uint64
	finish := func() {
		k := l.keys[key]
		if k != nil && !k.found && k.next > k.head && sum != k.sum {
			c.report.Find("%s %d: among events %d to %d of the topic at least one differs from its entry",
				c.ledger.Noun, key, k.first, k.head)
		}
	}
	err := c.ledger.Events(ctx, l.after, l.last, func(e Event) error {
		if e.Key != key {
			finish()
			key, sum = e.Key, 0
		}
		if k := l.keys[key]; k != nil && e.Number >= k.first {
			sum = c.add(sum, e.Value)
		}
		return nil
	})
	if err != nil {
		return err
	}
	finish()
	return nil
}

// add extends a hash over a sequence of events.
func (c *comparison) add(sum uint64, value []byte) uint64 {
	return (sum ^ maphash.Bytes(c.seed, value)) * 0x100000001b3
}
