// What the seqs say about the order of operations, said to porcupine in its own words: times. It tries
// operations in the order of their calls and comes back when it was wrong, which takes for ever when an
// operation was frozen for seconds and the mistake shows only when it ends. Each bound set here follows from
// the answers alone, so that no order is lost, and the first that porcupine tries is mostly right.

package lin

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// step is one operation's place in the life of one wallet: two with the same rank are in any order, else the
// lower comes first. Ranks are -1 for "there is no such wallet", 2 seq for the write, and 2 seq + 1 for who
// saw it last.
type step struct {
	rank int64
	op   *porcupine.Operation
}

// steps lists each wallet's operations whose place is known, for the wallets that the model sees.
func (m model) steps(ops []porcupine.Operation) map[int64][]step {
	lives := make(map[int64][]step)
	for i := range ops {
		q, a := input(ops[i]), output(ops[i])
		looks := q.kind == balance || q.kind == fresh || q.kind == read || q.kind == history
		switch {
		case a.code == "wallet_not_found" && m.sees(q.wallet):
			lives[q.wallet] = append(lives[q.wallet], step{-1, &ops[i]})
		case looks && a.status == 200 && m.sees(q.wallet):
			lives[q.wallet] = append(lives[q.wallet], step{2*saw(q, a, q.wallet) + 1, &ops[i]})
		case writes(ops[i]):
			for _, wallet := range []int64{q.wallet, q.to} {
				if wallet != 0 && m.sees(wallet) {
					lives[wallet] = append(lives[wallet], step{2 * saw(q, a, wallet), &ops[i]})
				}
			}
		}
	}
	for _, life := range lives {
		slices.SortStableFunc(life, func(a, b step) int { return cmp.Compare(a.rank, b.rank) })
	}
	return lives
}

// passesMost bounds the work where two wallets' orders contradict each other, which porcupine then sees.
const passesMost = 100

// order narrows the times by the seqs: who comes after another was not called before it, and returned no
// earlier. False: some operation would have to end before it begins.
func (m model) order(ops []porcupine.Operation) ([]porcupine.Operation, bool) {
	ops = slices.Clone(ops)
	lives := m.steps(ops)
	for pass, changed := 0, true; changed && pass < passesMost; pass++ {
		changed = false
		for _, life := range lives {
			// What is true of all of lower rank, and of those of the rank itself so far.
			called, calledHere := -2*whenever, -2*whenever
			for i, s := range life {
				if i > 0 && life[i-1].rank < s.rank {
					called = max(called, calledHere)
				}
				if s.op.Call <= called {
					s.op.Call, changed = called+1, true
				}
				calledHere = max(calledHere, s.op.Call)
			}
			returned, returnedHere := 2*whenever, 2*whenever
			for i, s := range slices.Backward(life) {
				if i < len(life)-1 && life[i+1].rank > s.rank {
					returned = min(returned, returnedHere)
				}
				if s.op.Return >= returned {
					s.op.Return, changed = returned-1, true
				}
				returnedHere = min(returnedHere, s.op.Return)
			}
		}
		for i := range ops {
			if ops[i].Call > ops[i].Return {
				return nil, false
			}
		}
	}
	return ops, true
}

// served is what one ledger that does one thing after the other answers.
func served(s *state, q *request) *response {
	w := &s[place(q.wallet)]
	a := &response{status: 200}
	switch {
	case q.kind != deposit && !w.exists:
		return &response{status: 404, code: "wallet_not_found"}
	case (q.kind == withdraw || q.kind == transfer) && w.cents < q.cents:
		return &response{status: 422, code: "insufficient_funds"}
	case q.kind == deposit:
		a.receipt = receipt{WalletID: q.wallet, Balance: amount(w.cents + q.cents), Seq: w.seq + 1}
	case q.kind == withdraw:
		a.receipt = receipt{WalletID: q.wallet, Balance: amount(w.cents - q.cents), Seq: w.seq + 1}
	case q.kind == transfer:
		to := s[place(q.to)]
		a.receipt = receipt{FromID: q.wallet, ToID: q.to, FromBalance: amount(w.cents - q.cents),
			ToBalance: amount(to.cents + q.cents), FromSeq: w.seq + 1, ToSeq: to.seq + 1}
	case q.kind == history:
		a.entries, a.sum = w.seq, w.sum
	default:
		a.stands = standing{q.wallet, "USD", amount(w.cents), w.seq, ""}
	}
	if a.receipt != (receipt{}) {
		a.receipt.TransactionID = id(q.wallet, w.seq+1)
		a.receipt.Currency, a.receipt.Amount = "USD", amount(q.cents)
		_, *s = whole.step(*s, q, a)
	}
	return a
}

// TestWhatCanBeIsFoundToBe: random histories of one ledger, in which one operation in ten lasts as long as
// hundreds of others, are found to be possible, and at once. Without what order adds, some take over 10 s.
func TestWhatCanBeIsFoundToBe(t *testing.T) {
	kinds := []string{deposit, deposit, withdraw, transfer, balance, balance, balance, fresh, history}
	for seed := range uint64(60) {
		dice := rand.New(rand.NewPCG(seed, 0))
		var s state
		var ops []porcupine.Operation
		for i := range int64(400) {
			wallet := 11 + dice.Int64N(groupSize)
			q := &request{kind: kinds[dice.IntN(len(kinds))], wallet: wallet, cents: 1 + dice.Int64N(9)}
			q.key = fmt.Sprint(i)
			if q.kind == transfer {
				q.to = 11 + (wallet-11+1+dice.Int64N(groupSize-1))%groupSize
			}
			long := int64(4_000)
			if dice.IntN(10) == 0 {
				long = 400_000
			}
			at := 1000 * i
			ops = append(ops, porcupine.Operation{Input: q, Output: served(&s, q),
				Call: at - dice.Int64N(long), Return: at + dice.Int64N(long)})
		}
		began := time.Now()
		v := violation{model: whole, ops: relax(ops)}
		if result, _ := v.find(10 * time.Second); result != porcupine.Ok {
			t.Errorf("seed %d: a history that was is %s after %v", seed, result, time.Since(began))
		}
	}
}
