package book

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/money"
)

// ledger is a ledger in memory: what a database would hold between batches.
type ledger struct {
	wallets   map[int64]Wallet
	byKey     map[MovementKey]Posted
	creations map[string]Wallet
	holds     map[EntryKey]Hold
	reversed  map[EntryKey]decimal.Decimal
	entries   map[int64][]Entry
	now       time.Time
	asked     []Operation
	bound     [][]Operation
}

func newLedger() *ledger {
	return &ledger{make(map[int64]Wallet), make(map[MovementKey]Posted), make(map[string]Wallet),
		make(map[EntryKey]Hold), make(map[EntryKey]decimal.Decimal), make(map[int64][]Entry),
		time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), nil, nil}
}

// begin reads what a batch of these operations may touch.
func (l *ledger) begin(ops []*Operation) *Posting {
	p := NewPosting(map[string]int32{"USD": 2, "JPY": 0}, "USD", len(ops))
	p.Now = l.now
	for _, op := range ops {
		for _, id := range []int64{op.WalletID, op.ToID} {
			if w := l.wallets[id]; id != 0 && p.Wallets[id] == nil {
				w.ID = id
				w.Changed, w.HeadChanged = false, false
				p.Wallets[id] = &w
			}
		}
		if m, ok := l.byKey[MovementKey{op.WalletID, op.Key}]; ok {
			p.ByKey[MovementKey{op.WalletID, op.Key}] = &m
		}
		if op.Undoes != nil {
			k := EntryKey{op.Undoes.WalletID, op.Undoes.Seq}
			p.Reversals[k] = &Reversal{Amount: op.Undoes.Amount.Abs(), Reversed: l.reversed[k]}
		} else if h, ok := l.holds[EntryKey{op.WalletID, op.OfSeq}]; ok {
			h.Changed = false
			p.Holds[EntryKey{op.WalletID, op.OfSeq}] = &h
		}
	}
	return p
}

// commit keeps what a batch came to.
func (l *ledger) commit(p *Posting) {
	for id, w := range p.Wallets {
		if w.Changed {
			w.Exists = true
			l.wallets[id] = *w
		}
	}
	for k, m := range p.ByKey {
		l.byKey[k] = *m
	}
	for k, h := range p.Holds {
		h.Exists = true
		l.holds[k] = *h
	}
	for k, r := range p.Reversals {
		l.reversed[k] = r.Reversed
	}
	for _, e := range p.Entries {
		l.entries[e.WalletID] = append(l.entries[e.WalletID], e)
	}
}

// anyOperation draws one of every kind, sensible or not.
func (l *ledger) anyOperation(dice *rand.Rand, n int) *Operation {
	const wallets = 6
	text := fmt.Sprintf("%d.%02d", dice.IntN(60), dice.IntN(100))
	op := &Operation{WalletID: 1 + dice.Int64N(wallets), Key: fmt.Sprint("k", n-dice.IntN(3))}
	if amount, err := money.Parse(text); err == nil {
		op.Amount = amount
	} else {
		op.Amount, _ = money.Parse("1")
	}
	other := 1 + (op.WalletID+dice.Int64N(wallets-1))%wallets
	entries := l.entries[op.WalletID]
	anyEntry := func() *Entry {
		if len(entries) == 0 {
			return &Entry{WalletID: op.WalletID, Seq: 1, Kind: KindHold}
		}
		return &entries[dice.IntN(len(entries))]
	}
	switch dice.IntN(9) {
	case 0, 1:
		op.Kind, op.Decide = KindDeposit, DecideDeposit
	case 2:
		op.Kind, op.Decide, op.Note.All = KindWithdrawal, DecideWithdrawal, dice.IntN(4) == 0
	case 3:
		op.Kind, op.Decide, op.ToID = KindTransferOut, DecideTransfer, other
	case 4:
		op.Kind, op.Decide, op.ExpiresIn = KindHold, DecideHold, time.Duration(1+dice.IntN(9))*time.Second
	case 5:
		op.Kind, op.Decide, op.OfSeq = KindWithdrawal, DecideCapture, anyEntry().Seq
		op.Note.Partial, op.Note.All = dice.IntN(2) == 0, dice.IntN(2) == 0
		if dice.IntN(2) == 0 {
			op.Kind, op.ToID = KindTransferOut, other
		}
	case 6:
		if dice.IntN(2) == 0 {
			op = ExpiryOf(op.WalletID, anyEntry().Seq)
		} else {
			op.Kind, op.Decide, op.OfSeq, op.Note.Reason = KindRelease, DecideVoid, anyEntry().Seq, ReasonVoid
		}
	case 7:
		e := anyEntry()
		if e.Kind == KindTransferIn {
			e = &l.entries[e.CounterpartyID][e.CounterpartySeq-1]
		}
		op.Decide, op.Note.All = DecideReversal, dice.IntN(2) == 0
		if op.Undo(&Posted{Entry: *e}) != nil {
			op = ExpiryOf(e.WalletID, e.Seq)
		}
	case 8:
		op.Kind, op.Decide, op.Note.State = KindState, DecideState, StateOpen
		if dice.IntN(4) == 0 {
			op.Note.State = WalletStates[dice.IntN(len(WalletStates)-1)] // a closed one would stay so
		}
	}
	return op
}

// bind makes operations that stand or fall together; often they are those of a former time.
func (l *ledger) bind(ops []*Operation, dice *rand.Rand) []*Operation {
	const key = "g%d#%d"
	ops = ops[:1+dice.IntN(min(len(ops), 4))]
	if again := len(l.bound) - 1 - dice.IntN(20); again >= 0 && dice.IntN(4) == 0 {
		former := l.bound[again]
		for i := range ops {
			op := former[min(i, len(former)-1)] // not always as many
			ops[i] = &op
		}
		return ops
	}
	var group []Operation
	for i, op := range ops {
		if op.Kind == KindState || op.Note.Reason == ReasonExpiry { // which are never together with others
			*op = Operation{Kind: KindDeposit, Decide: DecideDeposit, WalletID: op.WalletID, Amount: one}
		}
		op.Key = fmt.Sprintf(key, len(l.bound), i)
		group = append(group, *op)
	}
	l.bound = append(l.bound, group)
	return ops
}

var one, _ = money.Parse("1")

// picture is everything that deciding may change.
func picture(p *Posting) string {
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(p.Wallets)) {
		fmt.Fprintf(&b, "%+v\n", *p.Wallets[id])
	}
	fmt.Fprintf(&b, "%d entries, %d keys, %d holds\n", len(p.Entries), len(p.ByKey), len(p.Holds))
	holds := slices.Collect(maps.Values(p.Holds))
	slices.SortFunc(holds, func(a, b *Hold) int {
		return cmp.Or(cmp.Compare(a.WalletID, b.WalletID), cmp.Compare(a.Seq, b.Seq))
	})
	for _, h := range holds {
		fmt.Fprintf(&b, "%+v\n", *h)
	}
	var undone decimal.Decimal
	for _, r := range p.Reversals {
		undone = undone.Add(r.Reversed)
	}
	fmt.Fprintf(&b, "%d reversals of %s\n", len(p.Reversals), undone)
	return b.String()
}

// TestAnyOperations: whatever is asked for, in batches of any size, each wallet's entries follow from each
// other, money comes from deposits only and goes by withdrawals only, holds and heads are what the entries
// say, a key posts once, and what is refused leaves nothing.
func TestAnyOperations(t *testing.T) {
	accepted, refused, replayed, again := make(map[string]int), make(map[string]int), 0, 0
	for seed := range uint64(20) {
		dice, l := rand.New(rand.NewPCG(seed, 1)), newLedger()
		for n := 0; n < 3000; {
			ops := make([]*Operation, 1+dice.IntN(20))
			for i := range ops {
				if again := len(l.asked) - 1 - dice.IntN(100); again >= 0 && dice.IntN(20) == 0 {
					retry := l.asked[again]
					ops[i] = &retry
				} else {
					ops[i] = l.anyOperation(dice, n)
					l.asked = append(l.asked, *ops[i])
				}
				n++
			}
			l.now = l.now.Add(time.Duration(dice.IntN(2000)-300) * time.Millisecond) // clocks go back, too
			together := dice.IntN(6) == 0
			if together {
				ops = l.bind(ops, dice)
			}
			p := l.begin(ops)
			if together {
				before := picture(p)
				at, err := p.SettleAll(ops)
				var no *Refusal
				switch {
				case errors.As(err, &no):
					refused["together"]++
					refused[no.Code]++
					if after := picture(p); after != before {
						t.Fatalf("operation %d refused, and left\n%s\nof\n%s", at, after, before)
					}
				case err != nil && err != ErrNotDue:
					t.Fatal(err)
				case err == nil && ops[0].Replayed:
					again++
				case err == nil:
					accepted["together"]++
					for i, op := range ops {
						n := op.Posted.Says().Note
						first := EntryID(ops[0].Posted.WalletID, ops[0].Posted.Seq)
						if n.BatchID != first || n.BatchIndex != i || n.BatchOf != len(ops) {
							t.Fatalf("operation %d of %d says %+v", i, len(ops), n)
						}
					}
				}
				ops = nil
			}
			for _, op := range ops {
				before := len(p.Entries)
				p.Settle(op, op.Forget())
				var no *Refusal
				switch {
				case op.Replayed:
					replayed++
				case op.Err == nil:
					accepted[op.Kind]++
				case errors.As(op.Err, &no):
					refused[no.Code]++
				}
				if (op.Err != nil || op.Replayed) != (len(p.Entries) == before) {
					t.Fatalf("%+v: %v, replayed %v, %d entries", op, op.Err, op.Replayed,
						len(p.Entries)-before)
				}
			}
			if err := p.Check(); err != nil {
				t.Fatal(err)
			}
			l.commit(p)
		}
		l.check(t)
	}
	if len(accepted) < 7 || len(refused) < 10 || replayed == 0 || again == 0 {
		t.Errorf("too little is drawn: %v accepted, %v refused, %d replayed, %d together", accepted, refused,
			replayed, again)
	}
}

// check compares everything with what the entries alone say.
func (l *ledger) check(t *testing.T) {
	t.Helper()
	keys := make(map[MovementKey]int)
	for id, entries := range l.entries {
		chain := Chain{Last: Entry{WalletID: id}}
		for i := range entries {
			e := &entries[i]
			if wrong := chain.Follow(e); wrong != "" {
				t.Fatalf("entry %s: %s", EntryID(e.WalletID, e.Seq), wrong)
			}
			if e.Kind == KindTransferIn {
				out := l.entries[e.CounterpartyID][e.CounterpartySeq-1]
				if !out.Amount.Equal(e.Amount.Neg()) || out.CounterpartyID != id ||
					out.CounterpartySeq != e.Seq {
					t.Fatalf("entry %s is not mirrored", EntryID(e.WalletID, e.Seq))
				}
			} else if k := (MovementKey{id, e.Key}); keys[k] == 0 {
				keys[k]++
			} else {
				t.Fatalf("key %v posted twice", k)
			}
		}
		w, last := l.wallets[id], chain.Last
		var held decimal.Decimal
		for seq, remaining := range chain.Open {
			held = held.Add(remaining)
			if h := l.holds[EntryKey{id, seq}]; h.Status != HoldOpen || !h.Remaining.Equal(remaining) {
				t.Fatalf("hold %d-%d: %+v, of which %s remains", id, seq, h, remaining)
			}
		}
		if w.Seq != last.Seq || !w.Balance.Equal(last.Balance) || !w.Held.Equal(held) ||
			w.State != chain.state || !w.EntryAt.Equal(last.CreatedAt) {
			t.Fatalf("wallet %d: %+v, its entries say %+v and %s held", id, w, last, held)
		}
	}
	for k, h := range l.holds {
		taken := h.Captured.Add(h.Remaining)
		if taken.GreaterThan(h.Amount) || h.Status == HoldOpen == h.Remaining.IsZero() {
			t.Fatalf("hold %v: %+v", k, h)
		}
	}
	for k, undone := range l.reversed {
		if of := l.entries[k.WalletID][k.Seq-1]; undone.GreaterThan(of.Amount.Abs()) {
			t.Fatalf("of %v, which moved %s, %s was undone", k, of.Amount, undone)
		}
	}
	var sum, outside decimal.Decimal
	for _, id := range slices.Sorted(maps.Keys(l.entries)) {
		sum = sum.Add(l.wallets[id].Balance)
		for _, e := range l.entries[id] {
			if e.CounterpartyID == 0 {
				outside = outside.Add(e.Amount)
			}
		}
	}
	if !sum.Equal(outside) {
		t.Fatalf("wallets hold %s, but %s came in", sum, outside)
	}
}

func deposit(walletID int64, key string) *Operation {
	return &Operation{Kind: KindDeposit, Decide: DecideDeposit, WalletID: walletID, Key: key, Amount: one}
}

// settle decides operations in a batch of their own, as far as that succeeds.
func (l *ledger) settle(t *testing.T, ops ...*Operation) {
	t.Helper()
	p := l.begin(ops)
	p.SettleEach(ops, make(map[int64]bool))
	for _, op := range ops {
		if op.Err != nil {
			t.Fatal(op.Err)
		}
	}
	l.commit(p)
}

// TestTogetherLeavesHoldsAlone: a capture is undone with what was refused after it.
func TestTogetherLeavesHoldsAlone(t *testing.T) {
	l := newLedger()
	l.settle(t, deposit(1, "d"), &Operation{Kind: KindHold, Decide: DecideHold, WalletID: 1, Key: "h",
		Amount: one, ExpiresIn: time.Hour})
	capture := &Operation{Kind: KindWithdrawal, Decide: DecideCapture, WalletID: 1, OfSeq: 2, Key: "k#0",
		Note: Note{All: true}}
	spend := &Operation{Kind: KindWithdrawal, Decide: DecideWithdrawal, WalletID: 1, Key: "k#1", Amount: one}
	p := l.begin([]*Operation{capture, spend})
	before := picture(p)
	at, err := p.SettleAll([]*Operation{capture, spend})
	var no *Refusal
	if !errors.As(err, &no) || no.Code != "insufficient_funds" || at != 1 {
		t.Fatalf("operation %d: %v", at, err)
	}
	if after := picture(p); after != before {
		t.Errorf("left\n%s\nof\n%s", after, before)
	}
}

// TestTogetherKnowsItsKeys: a batch whose operations are known in part is another one.
func TestTogetherKnowsItsKeys(t *testing.T) {
	l := newLedger()
	post := func(wallets ...int64) (int, error) {
		var ops []*Operation
		for i, id := range wallets {
			ops = append(ops, deposit(id, fmt.Sprint("k#", i)))
		}
		p := l.begin(ops)
		at, err := p.SettleAll(ops)
		l.commit(p)
		return at, err
	}
	if _, err := post(1, 2, 3); err != nil {
		t.Fatal(err)
	}
	for _, other := range [][]int64{{1, 2, 4}, {4, 2, 3}, {1, 2}, {1, 2, 3, 4}} {
		var no *Refusal
		if at, err := post(other...); !errors.As(err, &no) || no.Code != "idempotency_key_reused" {
			t.Errorf("%v: operation %d: %v", other, at, err)
		}
	}
	if _, err := post(1, 2, 3); err != nil || len(l.entries[1])+len(l.entries[2])+len(l.entries[3]) != 3 {
		t.Errorf("again: %v, %v", err, l.entries)
	}
}

// TestPutOffInOrder: what waits for a wallet holds up what comes after it on the same wallets, and nothing
// else.
func TestPutOffInOrder(t *testing.T) {
	l := newLedger()
	transfer := func(from, to int64, key string) *Operation {
		return &Operation{Kind: KindTransferOut, Decide: DecideTransfer, WalletID: from, ToID: to, Key: key,
			Amount: one}
	}
	l.settle(t, deposit(1, "a"), deposit(2, "a"), deposit(3, "a"), deposit(4, "a"))
	ops := []*Operation{transfer(3, 4, "0"), transfer(2, 1, "1"), transfer(2, 3, "2"), deposit(3, "3"),
		deposit(4, "4")}
	p := l.begin(ops)
	p.Wallets[1].Busy = true
	p.SettleEach(ops, make(map[int64]bool))
	for i, want := range []error{nil, ErrLocked, ErrLocked, ErrLocked, nil} {
		if ops[i].Err != want {
			t.Errorf("operation %d: %v, want %v", i, ops[i].Err, want)
		}
	}
}
