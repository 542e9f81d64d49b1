// The check: each wallet's events follow from each other and from what the ledger holds.
//
// Reads the topic and the ledger, writes nothing.
// Promises that what it lets pass can be written, and that it holds in memory what lotMax allows, whatever
// the size of the ledger.

package rebuild

import (
	"context"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/book"
)

const (
	// lotMax is how much one reader keeps in mind at a time: a wallet is 1, and one that holds or undoes
	// something as much as extraCost allows. A million is some 90 MB. What does not fit is left to another
	// reading of the partition.
	lotMax    = 400_000
	extraCost = 12 // of a wallet's whole chain, in wallets
	askMax    = 5_000
	namedMax  = 20 // findings that are printed; all are counted
)

// mark is what is known of a wallet while the topic is read. It has no pointers, since there are many.
type mark struct {
	seq      int64  // of the last event seen
	balance  int64  // where the chain stands, in units of exp
	at       int64  // likewise, in microseconds
	ledger   int64  // number of the last entry in the ledger, or 0
	seam     uint64 // a hash of that one's event
	exp      int8
	state    uint8 // index into states
	currency uint16
	flags    uint8
}

const (
	flagBroken = 1 << iota // something was found: not looked at any further
	flagWide               // the chain is in lot.wide
	flagFrom               // the topic begins later: the chain begins at the ledger's head
)

var states = append([]string{""}, book.WalletStates...)

// check is one run.
type check struct {
	topic    Topic
	ledger   Ledger
	skip     map[int64]bool
	progress *progress
	out      io.Writer
	seed     maphash.Seed
	lotMax   int
	readings atomic.Int64 // of partitions

	currencies []string          // in no order
	known      map[string]uint16 // currency: index into currencies
	empty      bool              // the ledger has no wallet: nothing need be looked up
	published  int64             // as the checkpoint has it

	mu       sync.Mutex
	findings int
	first    string
	totals   Totals
	reaches  int64   // entries that ledger and topic come to
	missing  []int64 // by partition: wallets of the ledger that have entries and, so far, no event
}

func newCheck(ctx context.Context, topic Topic, ledger Ledger, o Options, p *progress) (*check, error) {
	c := &check{topic: topic, ledger: ledger, skip: o.Skip, progress: p, out: o.Out, seed: maphash.MakeSeed(),
		lotMax: lotMax, known: make(map[string]uint16), published: o.Published,
		missing: make([]int64, len(topic.Partitions)), empty: true}
	known, err := ledger.Currencies(ctx)
	if err != nil {
		return nil, err
	}
	for code := range known {
		c.known[code] = uint16(len(c.currencies))
		c.currencies = append(c.currencies, code)
	}
	err = ledger.EachHead(ctx, func(id, seq int64) error {
		c.empty = false
		if c.skip[id] || seq == 0 {
			return nil
		}
		p, err := topic.Partition(id)
		if err == nil {
			c.missing[p]++
			c.reaches += seq
		}
		return err
	})
	return c, err
}

// lot is the wallets of a partition that one reading takes care of: those whose hash lies in a range.
type lot struct {
	c         *check
	p         int32
	low, high uint64 // both included
	marks     map[int64]mark
	wide      map[int64]*book.Chain
	extras    int // of the wide ones
	pending   []Event
}

// spread is a wallet's hash. Ids come in sequence; the product's high bits do not.
func spread(walletID int64) uint64 { return uint64(walletID) * 0x9E3779B97F4A7C15 }

func (l *lot) has(walletID int64) bool {
	h := spread(walletID)
	return l.low <= h && h <= l.high
}

// cost is what the lot keeps in mind, in wallets.
func (l *lot) cost() int { return len(l.marks) + extraCost*len(l.wide) + extraCost/2*l.extras }

// partition checks one partition, in as many readings as its wallets need.
func (c *check) partition(ctx context.Context, p int32) error {
	l := &lot{c: c, p: p, high: math.MaxUint64}
	for {
		if err := l.read(ctx); err != nil {
			return err
		}
		l.finish()
		if l.high == math.MaxUint64 {
			c.progress.set(p, 1)
			return nil
		}
		width := l.high - l.low
		l.low = l.high + 1
		// Twice as much: it may be that one wallet made the lot narrow. What passes the end is the rest.
		if l.high = l.low + 2*width + 1; width > math.MaxUint64/4 || l.high < l.low {
			l.high = math.MaxUint64
		}
	}
}

// read looks at the events of the lot's wallets. Where these are too many, it leaves the upper half of its
// range to the next reading, as often as it must.
func (l *lot) read(ctx context.Context) error {
	l.marks, l.wide, l.extras = make(map[int64]mark), make(map[int64]*book.Chain), 0
	l.c.readings.Add(1)
	span := l.c.topic.Partitions[l.p]
	err := l.c.topic.Scan(ctx, l.p, func(e *Event) error {
		if !l.has(e.WalletID) || l.c.skip[e.WalletID] {
			return nil
		}
		l.pending = append(l.pending, *e)
		if len(l.pending) < askMax {
			return nil
		}
		share := float64(e.Offset-span.From) / float64(span.To-span.From)
		l.c.progress.set(l.p, (float64(l.low)+float64(l.high-l.low)*share)/math.MaxUint64)
		return l.take(ctx)
	})
	if err != nil {
		return err
	}
	return l.take(ctx)
}

// take looks at the events that have gathered.
func (l *lot) take(ctx context.Context) error {
	if err := l.meet(ctx); err != nil {
		return err
	}
	for i := range l.pending {
		if err := l.see(&l.pending[i]); err != nil {
			return err
		}
	}
	l.c.progress.events.Add(int64(len(l.pending)))
	clear(l.pending) // or it would keep the payloads
	l.pending = l.pending[:0]
	for l.cost() > l.c.lotMax && len(l.marks) > 1 {
		l.high = l.low + (l.high-l.low)/2
		for id := range l.marks {
			if l.has(id) {
				continue
			}
			delete(l.marks, id)
			if chain := l.wide[id]; chain != nil {
				l.extras -= chain.Extras()
				delete(l.wide, id)
			}
		}
	}
	return nil
}

// meet makes the marks of wallets that come up for the first time, as the ledger has them.
func (l *lot) meet(ctx context.Context) error {
	firsts := make(map[int64]int64) // numbers of their first events
	for i := range l.pending {
		e := &l.pending[i]
		if _, met := l.marks[e.WalletID]; !met {
			l.marks[e.WalletID] = mark{currency: math.MaxUint16}
			firsts[e.WalletID] = e.Seq
		}
	}
	if l.c.empty || len(firsts) == 0 {
		return nil
	}
	heads, err := l.c.ledger.Heads(ctx, slices.Collect(maps.Keys(firsts)))
	if err != nil {
		return err
	}
	for id, h := range heads {
		m := l.marks[id]
		if i, known := l.c.known[h.Currency]; known {
			m.currency = i
		}
		if m.ledger = h.Seq; h.Seq > 0 {
			if err := l.seam(ctx, &m, &h, firsts[id]); err != nil {
				return err
			}
		}
		l.marks[id] = m
	}
	return nil
}

// seam notes where the ledger ends, and, where the topic's head was deleted, takes the chain up from there.
func (l *lot) seam(ctx context.Context, m *mark, h *Head, first int64) error {
	if h.Last == nil || !h.Balance.Equal(h.Last.Balance) || !h.Held.Equal(h.Last.Says().Held) ||
		!h.EntryAt.Equal(h.Last.CreatedAt) {
		m.flags |= flagBroken
		l.c.find(h.ID, "its balance, time or held here is not its last entry's (number %d): this ledger is "+
			"damaged, rebuild into an empty database", h.Seq)
		return nil
	}
	m.seam = maphash.Bytes(l.c.seed, book.AppendEvent(nil, h.Last))
	if first == 1 || !l.c.topic.Partitions[l.p].headless() || first > h.Seq+1 {
		return nil
	}
	chain := book.ChainAt(&h.Wallet)
	if !h.Held.IsZero() {
		var err error
		if chain.Open, err = l.c.ledger.Open(ctx, h.ID); err != nil {
			return err
		}
	}
	m.flags |= flagFrom
	m.seq = first - 1
	l.keep(h.ID, m, &chain)
	return nil
}

// see checks a wallet's next event.
func (l *lot) see(e *Event) error {
	m := l.marks[e.WalletID]
	if m.flags&flagBroken != 0 {
		return nil
	}
	entry, err := book.ParseEvent(e.Payload)
	if err == nil && (entry.WalletID != e.WalletID || entry.Seq != e.Seq) {
		err = fmt.Errorf("its id is %s, but it says %s", book.EntryID(e.WalletID, e.Seq),
			book.EntryID(entry.WalletID, entry.Seq))
	}
	if err != nil {
		m.flags |= flagBroken
		l.c.find(e.WalletID, "event number %d (partition %d, offset %d): %v", e.Seq, l.p, e.Offset, err)
	} else if wrong := l.follow(&m, &entry, e); wrong != "" {
		m.flags |= flagBroken
		l.c.find(e.WalletID, "event number %d (partition %d, offset %d): %s", e.Seq, l.p, e.Offset, wrong)
	}
	m.seq = e.Seq
	l.marks[e.WalletID] = m
	return nil
}

// follow says what is wrong with an event, or nothing.
func (l *lot) follow(m *mark, e *book.Entry, at *Event) string {
	currency, known := l.c.known[e.Currency]
	home, err := l.c.topic.Partition(e.WalletID)
	switch {
	case err != nil:
		return err.Error()
	case home != l.p:
		return fmt.Sprintf("it belongs into partition %d", home)
	case e.Seq <= m.seq:
		return fmt.Sprintf("it follows number %d, so it is repeated or too late", m.seq)
	case m.seq == 0 && e.Seq > 1 && l.c.topic.Partitions[l.p].headless():
		return fmt.Sprintf("the topic begins with it, since its head was deleted, and this ledger ends at "+
			"number %d: restore a backup that reaches further first", m.ledger)
	case m.seq == 0 && e.Seq > 1:
		return "it is the first one, and those before it are missing"
	case e.Seq > m.seq+1:
		return fmt.Sprintf("it follows number %d, and those between are missing", m.seq)
	case !known:
		return fmt.Sprintf("currency %q is not in the currency table: insert it, with its scale", e.Currency)
	case m.currency != math.MaxUint16 && m.currency != currency:
		return fmt.Sprintf("it is in %s, the wallet in %s", e.Currency, l.c.currencies[m.currency])
	case e.Seq == m.ledger && maphash.Bytes(l.c.seed, at.Payload) != m.seam:
		return "this ledger has another entry of that number, so it went on without the topic: restore a " +
			"backup of before that, or rebuild into an empty database"
	}
	m.currency = currency
	if wrong := e.Misfit(); wrong != "" || m.flags&flagFrom != 0 && e.Seq <= m.ledger {
		return wrong // the ledger has it, and the chain begins after it
	}
	chain := l.chain(e.WalletID, m)
	wrong := chain.Follow(e)
	l.keep(e.WalletID, m, chain)
	return wrong
}

// chain is where a wallet stands: after its last event or, with flagFrom, at the ledger's head at least.
func (l *lot) chain(id int64, m *mark) *book.Chain {
	if m.flags&flagWide != 0 {
		chain := l.wide[id]
		l.extras -= chain.Extras()
		return chain
	}
	w := book.Wallet{ID: id, Seq: m.seq, Balance: decimal.New(m.balance, int32(m.exp)),
		State: states[m.state]}
	if m.flags&flagFrom != 0 {
		w.Seq = max(m.seq, m.ledger)
	}
	if w.Seq > 0 {
		w.EntryAt = time.UnixMicro(m.at)
	}
	chain := book.ChainAt(&w)
	return &chain
}

// keep puts a chain away: into the mark where that has room for all there is to know.
func (l *lot) keep(id int64, m *mark, chain *book.Chain) {
	last := &chain.Last
	held, exp := last.Says().Held, last.Balance.Exponent()
	m.at, m.state = last.CreatedAt.UnixMicro(), uint8(slices.Index(states, chain.State()))
	if chain.Extras() == 0 && held.IsZero() && last.Balance.NumDigits() <= 18 && exp >= math.MinInt8 &&
		exp <= 0 {
		m.balance, m.exp = last.Balance.CoefficientInt64(), int8(exp)
		if m.flags&flagWide != 0 {
			m.flags &^= flagWide
			delete(l.wide, id)
		}
		return
	}
	chain.Last = book.Entry{WalletID: id, Seq: last.Seq, Balance: last.Balance, CreatedAt: last.CreatedAt}
	if !held.IsZero() {
		chain.Last.More = &book.Details{Held: held}
	}
	m.flags |= flagWide
	l.wide[id] = chain
	l.extras += chain.Extras()
}

// finish looks at where topic and ledger end.
func (l *lot) finish() {
	var seen, more int64
	for id, m := range l.marks {
		if m.ledger > 0 {
			seen++
		}
		if m.flags&flagBroken == 0 && m.seq < m.ledger {
			l.c.find(id, "it has entries up to number %d here, and the topic ends with its number %d: %s",
				m.ledger, m.seq, publishFirst)
		}
		more += max(0, m.seq-m.ledger)
	}
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	l.c.totals.Wallets += int64(len(l.marks))
	l.c.reaches += more
	l.c.missing[l.p] -= seen
}

const publishFirst = "let a relay publish the rest first (start the service, or run `wallet -adopt`)"

// find notes what is wrong with a wallet, or with the whole where it is 0.
func (c *check) find(walletID int64, format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	if walletID != 0 {
		what = fmt.Sprintf("wallet %d: %s", walletID, what)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.findings++; c.findings == 1 {
		c.first = what
	}
	if c.findings <= namedMax {
		fmt.Fprintln(c.out, "FOUND", what)
	} else if c.findings == namedMax+1 {
		fmt.Fprintln(c.out, "further findings are counted only")
	}
}

// finish looks at the wallets that have no event at all, and sums up.
func (c *check) finish() error {
	headless := false
	for p, missing := range c.missing {
		if c.topic.Partitions[p].headless() {
			headless = true
			c.totals.NotSeen += missing
		} else if missing > 0 {
			c.find(0, "%d wallets that have entries here have no event in partition %d of topic %s: %s",
				missing, p,
				c.topic.Name, publishFirst)
		}
	}
	if headless && len(c.skip) == 0 && c.reaches < c.published {
		c.find(0, "the head of topic %s was deleted: of the %d events that were published, this ledger and "+
			"what is left of the topic come to %d; restore a backup that reaches further first", c.topic.Name,
			c.published,
			c.reaches)
	}
	if c.findings == 0 {
		return nil
	}
	return fmt.Errorf("nothing was written, since topic %s and this ledger do not add up (%d findings); the "+
		"first: %s. Mend that, or leave wallets as they are with -rebuild-skip 7,9", c.topic.Name, c.findings,
		c.first)
}
