// Package audit compares a ledger that numbers each key's events from 1 with a topic that carries them. An
// event is key, number and bytes.
//
// It touches neither: it reads both, by functions that it is given. It promises that no missing, repeated,
// reordered, misplaced, invented or differing event goes unfound, while both go on growing: events younger
// than the ledger's snapshot are left to the next audit.
package audit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	keysMax     = 1_000_000        // whose state is in memory at a time; each lot reads the topic once more
	spanBefore  = time.Hour        // that the topic is read from before a moment, at first: clocks differ
	patience    = 30 * time.Second // without progress, for events that are committed but not in the topic yet
	findingsMax = 20               // printed; all are counted
	nowMax      = 10_000           // keys asked for at a time
)

// Ledger is one side, as of one snapshot but for Now, which alone is called beside the others. Keys are above
// 0.
type Ledger struct {
	Noun string // what a key is, for sentences about one: "wallet"

	// Heads gives the number of the last event of each key above after, of at most n keys: the lowest ones,
	// up to last.
	Heads func(ctx context.Context, after int64, n int) (heads map[int64]int64, last int64, err error)
	// Events visits the events of the keys above after and up to last, key by key and in order. A value is
	// lent for the visit.
	Events func(ctx context.Context, after, last int64, visit func(Event) error) error
	// Now visits the keys with the number of the last event of each as of now, which is 0 for one unknown.
	Now func(ctx context.Context, keys []int64, visit func(key, number int64)) error

	// The rest is for CompareSince. Lots hands over the keys that moved, in lots of at most n by their order.
	// HeadsOf visits keys with the number of the last event of each, which is 0 for one unknown. EventsFrom
	// visits the events of a lot's keys from their first numbers on.
	Lots       func(ctx context.Context, n int, do func(*Moved) error) error
	HeadsOf    func(ctx context.Context, keys []int64, visit func(key, number int64)) error
	EventsFrom func(ctx context.Context, m *Moved, visit func(Event) error) error
}

// Moved is a lot of keys that moved: all of those above After and up to Last, in order, with the first number
// that each got.
type Moved struct {
	After, Last  int64
	Keys, Firsts []int64
}

// Topic is the other side.
type Topic struct {
	Partitions int32
	Partition  func(key int64) (int32, error) // where a key's events belong

	// Bounds gives the offsets that can be read now; to is exclusive.
	Bounds func(partition int32) (from, to int64, err error)
	// OffsetAt gives the first offset of a moment or later, for CompareSince.
	OffsetAt func(partition int32, at time.Time) (int64, error)
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

	mu       sync.Mutex
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
	r.mu.Lock()
	defer r.mu.Unlock()
	r.findings++
	if r.findings <= findingsMax {
		fmt.Fprintf(r.out, "FOUND "+format+"\n", args...)
	} else if r.findings == findingsMax+1 {
		fmt.Fprintln(r.out, "further findings are counted only")
	}
}

// Findings is how many there are.
func (r *Report) Findings() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.findings
}

// take adds what another report found, and what it said.
func (r *Report) take(other *Report, said []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.findings += other.findings
	_, _ = r.out.Write(said)
}

// Note prints a line that is not a finding.
func (r *Report) Note(format string, args ...any) { fmt.Fprintf(r.out, format+"\n", args...) }

// Progress shows a line until the next one, on a terminal.
func (r *Report) Progress(format string, args ...any) {
	if r.terminal {
		r.mu.Lock()
		defer r.mu.Unlock()
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
	head  int64  // number of its last event in the ledger
	from  int64  // number from which on the two sides are compared
	first int64  // number of the first event seen in the topic: 1, unless its reading begins later
	next  int64  // number of the event that must come next; 0 before the first
	above int64  // how many events above its head were seen
	sum   uint64 // over those from from up to head
	found bool   // something was found and said already
}

// comparison is one run of Compare, or one try of CompareSince.
type comparison struct {
	ledger   Ledger
	topic    Topic
	report   *Report
	seed     maphash.Seed
	start    []int64 // by partition: where its reading begins
	headless []bool  // by partition: it has, or had, events before that
	partial  bool    // what the ledger is compared from is known only once the topic was read
	since    bool    // only keys that moved are asked for; others are met
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

// begin notes where the partitions are read from.
func begin(ledger Ledger, topic Topic, report *Report,
	start func(partition int32, from, to int64) (int64, error)) (*comparison, error) {
	c := &comparison{ledger: ledger, topic: topic, report: report, seed: maphash.MakeSeed(),
		start: make([]int64, topic.Partitions), headless: make([]bool, topic.Partitions)}
	for p := range topic.Partitions {
		from, to, err := topic.Bounds(p)
		if err != nil {
			return nil, err
		}
		if from > 0 {
			report.Note("partition %d begins at offset %d, its head has been deleted: compared from there",
				p, from)
		}
		if c.start[p], err = start(p, from, to); err != nil {
			return nil, err
		}
		c.headless[p] = c.start[p] > 0
		c.partial = c.partial || c.headless[p]
	}
	return c, nil
}

func fromBegin(_ int32, from, _ int64) (int64, error) { return from, nil }

func (c *comparison) newLot(after, last int64) *lot {
	return &lot{after: after, last: last, keys: make(map[int64]*keyState), younger: make(map[int64]int64),
		from: slices.Clone(c.start)}
}

func (l *lot) add(key, head, from int64) {
	l.keys[key] = &keyState{head: head, from: from}
	if head > 0 {
		l.missing++
	}
}

// Compare reads both sides and reports what differs.
func Compare(ctx context.Context, ledger Ledger, topic Topic, report *Report) (Totals, error) {
	c, err := begin(ledger, topic, report, fromBegin)
	if err != nil {
		return Totals{}, err
	}
	for after, more := int64(0), true; more; {
		heads, last, err := ledger.Heads(ctx, after, keysMax)
		if err != nil {
			return c.totals, err
		}
		if more = len(heads) == keysMax; !more {
			last = math.MaxInt64
		}
		l := c.newLot(after, last)
		for key, head := range heads {
			l.add(key, head, 1)
		}
		err = c.compare(ctx, l, func(ctx context.Context, visit func(Event) error) error {
			return ledger.Events(ctx, l.after, l.last, visit)
		})
		if err != nil {
			return c.totals, err
		}
		c.totals.Keys += int64(len(l.keys))
		after = last
	}
	return c.totals, nil
}

// errLate: some key's first event since lies before where the reading of the topic began, if it is there.
var errLate = errors.New("the topic was read from too late")

// CompareSince compares what moved: of each key that did, the events from its first one since on. The topic
// is read from a while before at, and once more from its begin where that was too late: clocks decide how
// much is read, and not what is found.
func CompareSince(ctx context.Context, ledger Ledger, topic Topic, at time.Time, report *Report) (
	totals Totals, err error) {
	fromBefore := func(p int32, from, to int64) (int64, error) {
		offset, err := topic.OffsetAt(p, at.Add(-spanBefore))
		return min(max(offset, from), to), err
	}
	for _, start := range []func(int32, int64, int64) (int64, error){fromBefore, fromBegin} {
		var said bytes.Buffer
		try := NewReport(&said)
		totals, err = compareSince(ctx, ledger, topic, try, start)
		if !errors.Is(err, errLate) {
			report.take(try, said.Bytes())
			break
		}
		report.Progress("reading the topic from its begin")
	}
	return totals, err
}

func compareSince(ctx context.Context, ledger Ledger, topic Topic, report *Report,
	start func(partition int32, from, to int64) (int64, error)) (Totals, error) {
	c, err := begin(ledger, topic, report, start)
	if err != nil {
		return Totals{}, err
	}
	whole, err := begin(ledger, topic, NewReport(io.Discard), fromBegin)
	if err != nil {
		return Totals{}, err
	}
	mayBeLate := !slices.Equal(c.start, whole.start)
	c.since, c.partial = true, true
	err = ledger.Lots(ctx, keysMax/4, func(m *Moved) error {
		l, first := c.newLot(m.After, m.Last), make(map[int64]int64, len(m.Keys))
		for i, key := range m.Keys {
			first[key] = m.Firsts[i]
		}
		for some := range slices.Chunk(m.Keys, nowMax) {
			err := ledger.HeadsOf(ctx, some, func(key, head int64) { l.add(key, head, first[key]) })
			if err != nil {
				return err
			}
		}
		c.totals.Keys += int64(len(l.keys))
		return c.compare(ctx, l, func(ctx context.Context, visit func(Event) error) error {
			for _, key := range m.Keys {
				if k := l.keys[key]; mayBeLate && (k.next == 0 || k.first > first[key]) {
					return errLate
				}
			}
			return ledger.EventsFrom(ctx, m, visit)
		})
	})
	return c.totals, err
}

// compare reads both sides of a lot, at once where it can. The sum over a key's events does not depend on
// their order, which each side checks for itself.
func (c *comparison) compare(ctx context.Context, l *lot,
	events func(ctx context.Context, visit func(Event) error) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var keys []int64
	var sums []uint64
	ended := make(chan error, 1)
	read := func() {
		from := int64(1)
		err := events(ctx, func(e Event) error {
			if n := len(keys); n == 0 || keys[n-1] != e.Key {
				keys, sums = append(keys, e.Key), append(sums, 0)
				if c.partial { // else the topic is read meanwhile, which adds keys
					if k := l.keys[e.Key]; k != nil {
						from = k.from
					}
				}
			}
			if e.Number >= from {
				sums[len(sums)-1] += c.hash(&e)
			}
			return nil
		})
		if err != nil {
			stop()
		}
		ended <- err
	}
	if !c.partial {
		go read()
	}
	topicErr := c.readTopic(ctx, l)
	if topicErr != nil {
		stop()
	}
	if c.partial && topicErr != nil {
		return topicErr
	} else if c.partial {
		read()
	}
	ledgerErr := <-ended
	if topicErr != nil && (ledgerErr == nil || errors.Is(ledgerErr, context.Canceled)) {
		return topicErr
	}
	if err := cmp.Or(ledgerErr, c.checkYounger(ctx, l)); err != nil {
		return err
	}
	for i, key := range keys {
		k := l.keys[key]
		if k != nil && !k.found && k.next > k.head && sums[i] != k.sum {
			c.report.Find("%s %d: among events %d to %d of the topic at least one differs from its entry",
				c.ledger.Noun, key, max(k.first, k.from), k.head)
		}
	}
	return nil
}

// hash is of an event at its place: two that have exchanged their values have another sum.
func (c *comparison) hash(e *Event) uint64 {
	return maphash.Bytes(c.seed, e.Value) * uint64(2*e.Number+1)
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
		if c.headless[p] {
			k.from = max(k.from, e.Number)
		}
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
		k.above++
		l.younger[e.Key] = e.Number
		return
	}
	if e.Number >= k.from {
		k.sum += c.hash(e)
	}
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
		if c.since {
			err := c.ledger.HeadsOf(ctx, some, func(key, head int64) { c.checkUnmoved(l, key, head) })
			if err != nil {
				return err
			}
		}
		err := c.ledger.Now(ctx, some, func(key, number int64) {
			if e := (Event{Key: key, Number: l.younger[key]}); number < e.Number {
				c.report.Find("event %s is in the topic, but the ledger ends at number %d", e.id(), number)
			}
			c.totals.Younger += l.keys[key].above
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// checkUnmoved is of a key that did not move, of which older events were met: they must reach its end.
func (c *comparison) checkUnmoved(l *lot, key, head int64) {
	k, last := l.keys[key], l.younger[key]
	if k.head > 0 || last > head {
		return // it moved, or its events are younger than the snapshot
	}
	k.above = 0
	if last < head && !k.found {
		k.found = true
		c.report.Find("%s %d: events %d to %d are not in the topic", c.ledger.Noun, key, last+1, head)
	}
}
