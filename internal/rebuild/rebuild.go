// Package rebuild makes a ledger whole out of the topic that carries its events: all of it in an empty
// database, what came after in a restored one.
//
// It reads the topic, and adds wallets, entries, holds, reversals and references to the ledger; it changes
// none that is there but to move it on, and writes no outbox row: what it writes is published already. It
// promises that it writes nothing unless every event of the topic is one that this ledger would have
// written, follows from the one before and from what the ledger holds; that after each of its commits every
// wallet is a whole beginning of its chain, so that a killed run can be run again; and that its memory does
// not grow with the ledger.
//
// rebuild.go is the order of things, check.go the reading before, write.go the writing. Its caller keeps
// everybody else away from ledger and topic meanwhile.
package rebuild

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/book"
)

// Topic is the events, as far as they were committed when the rebuild began.
type Topic struct {
	Name       string
	Partitions []Partition
	Partition  func(walletID int64) (int32, error) // where a wallet's events belong

	// Scan visits a partition's events in order. A payload is not used again.
	Scan func(ctx context.Context, partition int32, visit func(*Event) error) error
}

// Empty says that there is nothing to read.
func (t *Topic) Empty() bool {
	return !slices.ContainsFunc(t.Partitions, func(p Partition) bool { return p.From < p.To })
}

// Partition is the offsets of a topic's partition that can be read; To is exclusive.
type Partition struct{ From, To int64 }

// headless says that the first events of the partition were deleted.
func (p Partition) headless() bool { return p.From > 0 }

// Event is an event and its place.
type Event struct {
	WalletID, Seq int64
	Payload       []byte
	Offset        int64
}

// Head is a wallet as the ledger has it.
type Head struct {
	book.Wallet
	Last *book.Entry // number Seq; nil where Seq is 0, or the ledger lacks it
}

// Ledger is where the events' entries go.
type Ledger interface {
	// Currencies are those that a wallet may be in.
	Currencies(ctx context.Context) (map[string]bool, error)
	// EachHead visits all wallets, with the number of the last entry of each.
	EachHead(ctx context.Context, visit func(id, seq int64) error) error
	// Heads gives those of the wallets that are there.
	Heads(ctx context.Context, ids []int64) (map[int64]Head, error)
	// Open gives what remains of each open hold of a wallet, by its number.
	Open(ctx context.Context, id int64) (map[int64]decimal.Decimal, error)
	// Write adds what the events say, in one commit. Those that the ledger has already are left out. It may
	// sort them.
	Write(ctx context.Context, events []Event) (written int, err error)
}

// Options is what a rebuild is told besides.
type Options struct {
	Skip      map[int64]bool // wallets that are left as they are
	Published int64          // events, as the topic's checkpoint counts them
	Out       io.Writer      // for findings
	Progress  io.Writer      // a terminal is shown how far it is; else the log is told
}

// Totals is what a rebuild came to.
type Totals struct {
	Wallets int64 // in the topic
	Events  int64 // in the topic, without those of skipped wallets
	Written int64 // entries
	Skipped int64 // events
	// NotSeen are wallets of the ledger with entries and without an event, in partitions whose head was
	// deleted.
	NotSeen int64
}

const (
	readers = 2 // partitions that are checked at a time: a core each
	writers = 2 // partitions that are written at a time: what is next is read meanwhile
)

// Run checks all of the topic, then writes what the ledger lacks.
func Run(ctx context.Context, topic Topic, ledger Ledger, o Options) (Totals, error) {
	p := newProgress(topic, o.Progress)
	defer p.stop()
	c, err := newCheck(ctx, topic, ledger, o, p)
	if err != nil {
		return Totals{}, err
	}
	if err := each(ctx, readers, topic, c.partition); err != nil {
		return c.totals, err
	}
	if err := c.finish(); err != nil {
		return c.totals, err
	}
	p.next("writing")
	w := writing{topic: topic, ledger: ledger, skip: o.Skip, progress: p}
	err = each(ctx, writers, topic, w.partition)
	c.totals.Events, c.totals.Written, c.totals.Skipped = w.events.Load(), w.written.Load(), w.skipped.Load()
	return c.totals, err
}

// each does something for all partitions, n at a time.
func each(ctx context.Context, n int, topic Topic, do func(context.Context, int32) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int32
	var group sync.WaitGroup
	for range n {
		group.Go(func() {
			for ctx.Err() == nil {
				p := next.Add(1) - 1
				if int(p) >= len(topic.Partitions) {
					return
				}
				if err := do(ctx, p); err != nil {
					cancel(err)
				}
			}
		})
	}
	group.Wait()
	return context.Cause(ctx)
}

// ---------------------------------------------------------------------------------------------------------
// Progress
// ---------------------------------------------------------------------------------------------------------

// progress tells how far a step is: each second on a terminal, else in a log line now and then.
type progress struct {
	out      io.Writer
	terminal bool
	total    float64 // records of the topic
	sizes    []int64 // by partition

	mu    sync.Mutex
	step  string
	began time.Time
	done  []float64 // of each partition, from 0 to 1

	events atomic.Int64 // of this step
	ended  chan struct{}
	over   sync.WaitGroup
}

const logInterval = 10 * time.Second

func newProgress(topic Topic, out io.Writer) *progress {
	p := &progress{out: out, sizes: make([]int64, len(topic.Partitions)), ended: make(chan struct{})}
	for i, span := range topic.Partitions {
		p.sizes[i] = span.To - span.From
		p.total += float64(p.sizes[i])
	}
	if f, ok := out.(*os.File); ok {
		info, err := f.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	p.next("checking")
	p.over.Go(p.run)
	return p
}

// next begins a step.
func (p *progress) next(step string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step, p.began, p.done = step, time.Now(), make([]float64, len(p.sizes))
	p.events.Store(0)
}

func (p *progress) set(partition int32, done float64) {
	p.mu.Lock()
	p.done[partition] = done
	p.mu.Unlock()
}

func (p *progress) stop() {
	close(p.ended)
	p.over.Wait()
}

// now is the share that is done of the step, how fast it is and how long it will take.
func (p *progress) now() (step string, done, perSecond float64, left time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, d := range p.done {
		done += d * float64(p.sizes[i]) / max(1, p.total)
	}
	since := time.Since(p.began)
	if done > 0 {
		left = time.Duration(float64(since) * (1 - done) / done).Round(time.Second)
	}
	return p.step, done, float64(p.events.Load()) / max(0.001, since.Seconds()), left
}

func (p *progress) run() {
	interval := logInterval
	if p.terminal {
		interval = time.Second
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.show()
		case <-p.ended:
			if p.terminal {
				fmt.Fprint(p.out, "\r\x1b[K")
			}
			return
		}
	}
}

func (p *progress) show() {
	step, done, perSecond, left := p.now()
	if p.terminal {
		fmt.Fprintf(p.out, "\r\x1b[K%s: %.0f%% of the topic, %.0f events/s, %v left\r", step, 100*done,
			perSecond,
			left)
		return
	}
	slog.Info("rebuild", "step", step, "percent", int(100*done), "events_per_second", int(perSecond),
		"left", left)
}

// ParseSkip reads the wallets of -rebuild-skip: ids, comma-separated.
func ParseSkip(text string) (map[int64]bool, error) {
	skip := make(map[int64]bool)
	for id := range strings.SplitSeq(text, ",") {
		if id = strings.TrimSpace(id); id == "" {
			continue
		}
		n, err := book.ParseWalletID(id)
		if err != nil {
			return nil, fmt.Errorf("-rebuild-skip: %q is no wallet id: write ids, comma-separated, as in 7,9",
				id)
		}
		skip[n] = true
	}
	return skip, nil
}
