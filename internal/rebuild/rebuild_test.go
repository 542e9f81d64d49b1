package rebuild

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/book"
)

// world is a topic of two partitions and a ledger, both in memory: wallets with an even id are in partition
// 0.
type world struct {
	events     [2][]Event
	from       [2]int64 // offset of the first event that was not deleted
	heads      map[int64]Head
	open       map[int64]map[int64]decimal.Decimal
	currencies map[string]bool

	mu      sync.Mutex
	written []Event
	commits []int // how many events each had
	fail    error
	asked   int
}

func newWorld() *world {
	return &world{heads: make(map[int64]Head), open: make(map[int64]map[int64]decimal.Decimal),
		currencies: map[string]bool{"USD": true, "EUR": true}}
}

func (w *world) Currencies(context.Context) (map[string]bool, error) { return w.currencies, nil }

func (w *world) EachHead(_ context.Context, visit func(id, seq int64) error) error {
	for id, h := range w.heads {
		if err := visit(id, h.Seq); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) Heads(_ context.Context, ids []int64) (map[int64]Head, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked++
	found := make(map[int64]Head)
	for _, id := range ids {
		if h, here := w.heads[id]; here {
			found[id] = h
		}
	}
	return found, nil
}

func (w *world) Open(_ context.Context, id int64) (map[int64]decimal.Decimal, error) {
	return w.open[id], nil
}

func (w *world) Write(_ context.Context, events []Event) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.written = append(w.written, events...)
	w.commits = append(w.commits, len(events))
	return len(events), w.fail
}

func (w *world) topic() Topic {
	t := Topic{Name: "events", Partition: func(id int64) (int32, error) { return int32(id % 2), nil }}
	for p := range w.events {
		t.Partitions = append(t.Partitions, Partition{w.from[p], int64(len(w.events[p]))})
	}
	t.Scan = func(_ context.Context, p int32, visit func(*Event) error) error {
		for i := w.from[p]; i < int64(len(w.events[p])); i++ {
			e := w.events[p][i]
			e.Offset = i
			if err := visit(&e); err != nil {
				return err
			}
		}
		return nil
	}
	return t
}

func (w *world) publish(p int64, entries ...book.Entry) {
	for i := range entries {
		e := &entries[i]
		w.events[p] = append(w.events[p],
			Event{WalletID: e.WalletID, Seq: e.Seq, Payload: book.AppendEvent(nil, e)})
	}
}

var began = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// entries of a wallet: n deposits of 1, and a hold of 1 as the last where held says so.
func entries(id int64, n int, held bool) []book.Entry {
	var list []book.Entry
	for seq := int64(1); seq <= int64(n); seq++ {
		list = append(list, book.Entry{WalletID: id, Seq: seq, Kind: book.KindDeposit, Currency: "USD",
			Amount: decimal.New(1, 0), Balance: decimal.New(seq, 0), Key: fmt.Sprint("k", seq),
			CreatedAt: began.Add(time.Duration(seq) * time.Microsecond)})
	}
	if held {
		e := list[n-1]
		e.Seq, e.Kind, e.Amount, e.Key = int64(n)+1, book.KindHold, decimal.Decimal{}, "h"
		e.More = &book.Details{HeldChange: decimal.New(1, 0), Held: decimal.New(1, 0),
			Remaining: decimal.New(1, 0),
			Note:      book.Note{ExpiresAt: began}, NoteText: `{"expires_at":"2026-01-02T03:04:05.000000Z"}`}
		list = append(list, e)
	}
	return list
}

// captured is the capture of the hold that ends a wallet's entries.
func captured(list []book.Entry) book.Entry {
	e := list[len(list)-1]
	e.More = &book.Details{OfSeq: e.Seq, HeldChange: decimal.New(-1, 0), Note: book.Note{All: true},
		NoteText: `{"all":true}`}
	e.Seq, e.Kind, e.Amount, e.Key = e.Seq+1, book.KindWithdrawal, decimal.New(-1, 0), "c"
	e.Balance = e.Balance.Sub(decimal.New(1, 0))
	return e
}

// restore makes the ledger hold a wallet's entries.
func (w *world) restore(list []book.Entry) {
	last := list[len(list)-1]
	h := Head{Wallet: book.Wallet{ID: last.WalletID, Seq: last.Seq, Currency: last.Currency,
		Balance: last.Balance,
		Held:    last.Says().Held, EntryAt: last.CreatedAt}, Last: &last}
	if !h.Held.IsZero() {
		w.open[h.ID] = map[int64]decimal.Decimal{last.Seq: h.Held}
	}
	w.heads[h.ID] = h
}

func (w *world) run(o Options) (Totals, string, error) {
	var said bytes.Buffer
	o.Out = &said
	totals, err := Run(context.Background(), w.topic(), w, o)
	return totals, said.String(), err
}

// TestManyReadings: whatever little is kept in mind at a time, each wallet is checked once and whole, and all
// events are written.
func TestManyReadings(t *testing.T) {
	w := newWorld()
	const wallets = 500
	lists := make([][]book.Entry, wallets)
	for id := range int64(wallets) {
		lists[id] = entries(1000+id, 3+int(id%4), id%5 == 0)
		if id%10 == 0 {
			lists[id] = append(lists[id], captured(lists[id]))
		}
		if id%3 == 0 {
			w.restore(lists[id][:2])
		}
	}
	events := 0
	for round := range 8 { // interleaved
		for id, list := range lists {
			if round < len(list) {
				w.publish(int64(id%2), list[round])
				events++
			}
		}
	}
	for _, most := range []int{7, 40, 200, lotMax} {
		var said bytes.Buffer
		o := Options{Out: &said}
		p := newProgress(w.topic(), &said)
		c, err := newCheck(context.Background(), w.topic(), w, o, p)
		if err != nil {
			t.Fatal(err)
		}
		c.lotMax = most
		if err := each(context.Background(), 2, w.topic(), c.partition); err != nil {
			t.Fatal(err)
		}
		p.stop()
		if err := c.finish(); err != nil || c.totals.Wallets != wallets || c.reaches != int64(events) {
			t.Errorf("%d at a time: %v, %+v, %d of %d entries\n%s", most, err, c.totals, c.reaches, events,
				said.String())
		}
		if readings := c.readings.Load(); readings < int64(wallets/most) || most == lotMax && readings != 2 {
			t.Errorf("%d at a time: %d readings", most, readings)
		}
		if _, done, _, _ := p.now(); done < 0.999 || done > 1.001 {
			t.Errorf("%d at a time: %.3f of the topic are done", most, done)
		}
	}
	totals, said, err := w.run(Options{})
	if err != nil || totals.Events != int64(events) || len(w.written) != events {
		t.Errorf("%v, %+v, %d of %d events written\n%s", err, totals, len(w.written), events, said)
	}
}

func TestCheckRefuses(t *testing.T) {
	altered := func(list []book.Entry, i int, alter func(*book.Entry)) []book.Entry {
		alter(&list[i])
		return list
	}
	for name, c := range map[string]struct {
		stage func(w *world)
		want  string // empty: it is let pass
	}{
		"nothing wrong": {func(w *world) { w.publish(0, entries(2, 3, true)...) }, ""},
		"behind": {func(w *world) {
			w.publish(0, entries(2, 3, true)...)
			w.restore(entries(2, 2, false))
		}, ""},
		"equal": {func(w *world) {
			w.publish(0, entries(2, 3, true)...)
			w.restore(entries(2, 3, true))
		}, ""},
		"ahead": {func(w *world) { w.publish(0, entries(2, 3, false)...); w.restore(entries(2, 5, false)) },
			"wallet 2: it has entries up to number 5 here, and the topic ends with its number 3: let a " +
				"relay"},
		"unpublished wallet": {func(w *world) {
			w.publish(0, entries(2, 3, false)...)
			w.restore(entries(4, 1, false))
		},
			"1 wallets that have entries here have no event in partition 0"},
		"gap": {func(w *world) { l := entries(2, 4, false); w.publish(0, l[0], l[1], l[3]) },
			"wallet 2: event number 4 (partition 0, offset 2): it follows number 2, and those between are " +
				"missing"},
		"repeated": {func(w *world) { l := entries(2, 2, false); w.publish(0, l[0], l[1], l[1]) },
			"it is repeated"},
		"no first": {func(w *world) { w.publish(0, entries(2, 4, false)[1:]...) },
			"those before it are missing"},
		"no first, with a ledger": {func(w *world) {
			w.publish(0, entries(2, 4, false)[1:]...)
			w.restore(entries(2, 3, false))
		}, "those before it are missing"},
		"wrong partition": {func(w *world) { w.publish(1, entries(2, 1, false)...) },
			"it belongs into partition 0"},
		"balance": {func(w *world) {
			w.publish(0, altered(entries(2, 3, false), 2, func(e *book.Entry) {
				e.Balance = decimal.New(4, 0)
			})...)
		}, "wallet 2: event number 3 (partition 0, offset 2): its balance is not the former one"},
		"time": {func(w *world) {
			w.publish(0, altered(entries(2, 3, false), 2, func(e *book.Entry) { e.CreatedAt = began })...)
		}, "it is older"},
		"held": {func(w *world) {
			l := entries(2, 3, true)
			w.publish(0, append(l, captured(l), captured(l))[:4]...)
			e := captured(l)
			e.More.OfSeq = 3
			w.publish(0, e)
		}, "there is no open hold"},
		"sign": {func(w *world) {
			l := altered(entries(2, 2, false), 1, func(e *book.Entry) {
				e.Amount, e.Balance = decimal.New(-1, 0), decimal.Decimal{}
			})
			w.publish(0, l...)
		}, "its amount does not come in"},
		"currency": {func(w *world) {
			w.publish(0, altered(entries(2, 2, false), 1, func(e *book.Entry) { e.Currency = "EUR" })...)
		}, "it is in EUR, the wallet in USD"},
		"currency of the ledger": {func(w *world) {
			w.publish(0, entries(2, 2, false)...)
			w.heads[2] = Head{Wallet: book.Wallet{ID: 2, Currency: "EUR"}}
		}, "it is in USD, the wallet in EUR"},
		"unknown currency": {func(w *world) {
			w.publish(0, altered(entries(2, 1, false), 0, func(e *book.Entry) { e.Currency = "ABC" })...)
		}, `currency "ABC" is not in the currency table`},
		"foreign": {func(w *world) {
			w.events[0] = []Event{{WalletID: 2, Seq: 1, Payload: []byte("{}")}}
		}, "not an event"},
		"another id": {func(w *world) {
			w.publish(0, entries(2, 1, false)...)
			w.events[0][0].WalletID = 4
		}, "its id is 4-1, but it says 2-1"},
		"other entry": {func(w *world) {
			w.publish(0, entries(2, 3, false)...)
			w.restore(altered(entries(2, 2, false), 1, func(e *book.Entry) { e.Key = "x" }))
		}, "this ledger has another entry of that number"},
		"damaged": {func(w *world) {
			w.publish(0, entries(2, 3, false)...)
			w.restore(entries(2, 2, false))
			h := w.heads[2]
			h.Balance = decimal.New(9, 0)
			w.heads[2] = h
		}, "this ledger is damaged"},
		"no last entry": {func(w *world) {
			w.publish(0, entries(2, 3, false)...)
			w.restore(entries(2, 2, false))
			h := w.heads[2]
			h.Last = nil
			w.heads[2] = h
		}, "this ledger is damaged"},
		"head deleted, ledger beyond it": {func(w *world) {
			l := entries(2, 6, true)
			w.publish(0, append(l, captured(l))...)
			w.restore(l[:5])
			w.from[0] = 3
		}, ""},
		"head deleted, ledger just at it": {func(w *world) {
			w.publish(0, entries(2, 6, false)...)
			w.restore(entries(2, 3, false))
			w.from[0] = 3
		}, ""},
		"head deleted, ledger holds": {func(w *world) {
			l := entries(2, 6, true)
			w.publish(0, append(l, captured(l))...)
			w.restore(l)
			w.from[0] = 5
		}, ""},
		"head deleted, ledger before it": {func(w *world) {
			w.publish(0, entries(2, 6, false)...)
			w.restore(entries(2, 2, false))
			w.from[0] = 3
		}, "the topic begins with it, since its head was deleted, and this ledger ends at number 2"},
		"head deleted, no ledger": {func(w *world) { w.publish(0, entries(2, 6, false)...); w.from[0] = 3 },
			"the topic begins with it, since its head was deleted, and this ledger ends at number 0"},
		"head deleted, another entry": {func(w *world) {
			w.publish(0, entries(2, 6, false)...)
			w.restore(altered(entries(2, 5, false), 4, func(e *book.Entry) { e.Key = "x" }))
			w.from[0] = 3
		}, "another entry of that number"},
		"head deleted, does not follow": {func(w *world) {
			w.publish(0, altered(entries(2, 6, false), 5, func(e *book.Entry) {
				e.Balance = decimal.New(9, 0)
			})...)
			w.restore(entries(2, 5, false))
			w.from[0] = 3
		}, "its balance is not the former one"},
		"head deleted, a wallet with it": {func(w *world) {
			w.publish(0, append(entries(4, 2, false), entries(2, 6, false)...)...)
			w.restore(entries(2, 5, false))
			w.from[0] = 2
		}, "of the 10 events that were published, this ledger and what is left of the topic come to 8"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.publish(1, entries(7, 2, false)...)
			c.stage(w)
			published := int64(len(w.events[0]) + len(w.events[1]))
			totals, said, err := w.run(Options{Published: published})
			if c.want == "" {
				if err != nil || len(w.written) == 0 || totals.Written != totals.Events {
					t.Fatalf("%v, %+v, %d written\n%s", err, totals, len(w.written), said)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(said, "FOUND") {
				t.Errorf("%v, want %q\n%s", err, c.want, said)
			}
			if len(w.written) > 0 {
				t.Errorf("%d events were written all the same", len(w.written))
			}
		})
	}
}

// TestSkippedWallets: what is wrong with them stops nothing, and nothing of theirs is written.
func TestSkippedWallets(t *testing.T) {
	w := newWorld()
	l := entries(2, 4, false)
	w.publish(0, l[0], l[3])
	w.publish(0, entries(4, 2, false)...)
	skip, err := ParseSkip(" 2, 8 ")
	if err != nil {
		t.Fatal(err)
	}
	totals, said, err := w.run(Options{Skip: skip})
	if err != nil || len(w.written) != 2 || w.written[0].WalletID != 4 || totals.Skipped != 2 ||
		totals.Events != 2 {
		t.Errorf("%v, %+v, %d written\n%s", err, totals, len(w.written), said)
	}
	for _, bad := range []string{"x", "7;8", "-1", "0"} {
		if _, err := ParseSkip(bad); err == nil || !strings.Contains(err.Error(), "as in 7,9") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if none, err := ParseSkip(""); err != nil || len(none) != 0 {
		t.Errorf("%v, %v", none, err)
	}
}

// TestProgress: a partition counts by its size, and what is left is told from what has been done.
func TestProgress(t *testing.T) {
	w := newWorld()
	w.publish(0, entries(2, 3, false)...)
	w.publish(1, entries(3, 9, false)...)
	var said bytes.Buffer
	p := newProgress(w.topic(), &said)
	p.stop() // it shows itself no more
	p.terminal = true
	p.set(1, 1)
	p.began = time.Now().Add(-90 * time.Second)
	p.events.Store(900)
	p.show()
	if got, want := said.String(), "\r\x1b[Kchecking: 75% of the topic, 10 events/s, 30s "+
		"left\r"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestCommitsAreBounded: in events, and in bytes where these are large.
func TestCommitsAreBounded(t *testing.T) {
	for _, c := range []struct {
		name    string
		events  int
		payload []byte
		want    []int
	}{
		{"small events", 2*chunkMax + 1, []byte("{}"), []int{chunkMax, chunkMax, 1}},
		{"large events", 20, make([]byte, chunkBytes/8), []int{8, 8, 4}},
	} {
		w := newWorld()
		for seq := range c.events {
			w.events[0] = append(w.events[0], Event{WalletID: 2, Seq: int64(seq) + 1, Payload: c.payload})
		}
		topic := w.topic()
		p := newProgress(topic, io.Discard)
		writing := writing{topic: topic, ledger: w, progress: p}
		err := writing.partition(t.Context(), 0)
		p.stop()
		if err != nil || !slices.Equal(w.commits, c.want) || len(w.written) != c.events {
			t.Errorf("%s: commits of %d, want %d; %v", c.name, w.commits, c.want, err)
		}
	}
}

func TestFailedWriteEndsTheRun(t *testing.T) {
	w := newWorld()
	w.publish(0, entries(2, 4, false)...)
	w.fail = errors.New("disk full")
	if _, _, err := w.run(Options{}); !errors.Is(err, w.fail) {
		t.Error(err)
	}
}

func TestCopyText(t *testing.T) {
	var b buffer
	b.text("a\\b\tc\nd\re«")
	b.next()
	b.integerOrNull(0)
	b.next()
	b.numberOrNull(decimal.New(-105, -1))
	b.end()
	if got, want := string(b.bytes), `a\\b\tc\nd\re«`+"\t"+`\N`+"\t-10.5\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func BenchmarkCheck(b *testing.B) {
	w := newWorld()
	for id := range int64(20_000) {
		w.publish(id%2, entries(1000+id, 5, false)...)
	}
	b.ReportAllocs()
	for b.Loop() {
		var said bytes.Buffer
		p := newProgress(w.topic(), &said)
		c, err := newCheck(context.Background(), w.topic(), w, Options{Out: &said}, p)
		if err == nil {
			err = each(context.Background(), 1, w.topic(), c.partition)
		}
		p.stop()
		if err != nil || c.finish() != nil {
			b.Fatal(err, said.String())
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/event")
}
