package book

import (
	"fmt"

	"github.com/shopspring/decimal"
)

// Chain is what is known of one wallet while its entries are read in order.
type Chain struct {
	Last Entry
	// Midway: the entries are read from one in the middle on, Last is the one before it, and what was held,
	// set or undone earlier is not known.
	Midway bool
	Open   map[int64]decimal.Decimal // what remains of each open hold
	left   map[int64]decimal.Decimal // what is left to undo of each entry that was undone in part
	state  string
}

// ChainAt is the chain of a wallet that stands there. Open is left to the caller, and what was undone in part
// before is not known.
func ChainAt(w *Wallet) Chain {
	c := Chain{state: w.State, Last: Entry{WalletID: w.ID, Seq: w.Seq, Currency: w.Currency,
		Balance: w.Balance, CreatedAt: w.EntryAt}}
	if !w.Held.IsZero() {
		c.Last.More = &Details{Held: w.Held}
	}
	return c
}

// State is what the wallet's last entry of that kind set.
func (c *Chain) State() string { return c.state }

// Extras is how much is known besides the last entry and the state: of a chain without any these two are
// all there is.
func (c *Chain) Extras() int { return len(c.Open) + len(c.left) }

// Follow says what is wrong with the chain's next entry, or nothing.
func (c *Chain) Follow(e *Entry) string {
	last, d := &c.Last, e.Says()
	defer func() { c.Last = *e }()
	held, of := last.Says().Held, c.Open[d.OfSeq]
	switch {
	case e.Seq != last.Seq+1:
		return fmt.Sprintf("it follows number %d", last.Seq)
	case !e.Balance.Equal(last.Balance.Add(e.Amount)):
		return "its balance is not the former one plus its amount"
	case e.CreatedAt.Before(last.CreatedAt):
		return "it is older than the one before it"
	case !d.Held.Equal(held.Add(d.HeldChange)):
		return "what it holds is not what was held before plus its change"
	case d.Held.IsNegative() || d.Held.GreaterThan(e.Balance):
		return "more is held than there is"
	case !stateLets(c.state, e):
		return "the wallet was " + c.state
	}
	switch {
	case e.Kind == KindHold:
		if c.Open == nil {
			c.Open = make(map[int64]decimal.Decimal)
		}
		c.Open[e.Seq] = d.HeldChange
	case e.Kind == KindState:
		c.state = d.Note.State
	case !d.HeldChange.IsZero(): // a capture or a release
		_, known := c.Open[d.OfSeq]
		if c.Midway && !known { // placed before, and from here on it is known
			of = d.Remaining.Sub(d.HeldChange)
			if c.Open == nil {
				c.Open = make(map[int64]decimal.Decimal)
			}
		}
		if of.IsZero() {
			return "there is no open hold that it could be of"
		}
		if c.Open[d.OfSeq] = d.Remaining; d.Remaining.IsZero() {
			delete(c.Open, d.OfSeq)
		}
		taken := e.Amount.Abs()
		if !d.HeldChange.Equal(d.Remaining.Sub(of)) || taken.GreaterThan(of) ||
			!d.Remaining.IsZero() && !taken.Equal(of.Sub(d.Remaining)) {
			return "it does not fit what remained of its hold"
		}
	case d.OfSeq != 0: // a reversal
		if c.left == nil {
			c.left = make(map[int64]decimal.Decimal)
		}
		was, again := c.left[d.OfSeq]
		c.left[d.OfSeq] = d.Remaining
		if again && !d.Remaining.Equal(was.Sub(e.Amount.Abs())) {
			return "it does not fit what was left to undo"
		}
	}
	return ""
}

// stateLets says whether a wallet of a state takes an entry, as state_allows_entry in schema.sql does.
func stateLets(state string, e *Entry) bool {
	switch state {
	case StateNoOut:
		return e.captures() || e.Kind != KindWithdrawal && e.Kind != KindTransferOut && e.Kind != KindHold
	case StateFrozen:
		return e.Kind == KindRelease || e.Kind == KindState
	case StateClosed:
		return false
	}
	return true
}
