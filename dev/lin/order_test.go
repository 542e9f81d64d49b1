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
		looks := q.kind == balance || q.kind == fresh || q.kind == read || q.kind == history ||
			q.kind == openHolds
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

// served is what one ledger that does one thing after the other answers at a time.
func served(s *state, q *request, at string) *response {
	w := &s[place(q.wallet)]
	one := w.hold(q.seq)
	a := &response{status: q.success(), asked: at, answered: at}
	refused := func(status int, code string) *response {
		a.status, a.code = status, code
		return a
	}
	r := &a.receipt
	switch {
	case (q.kind == capture || q.kind == void || q.kind == oneHold) && one == nil:
		return refused(404, "hold_not_found")
	case q.kind != deposit && !w.exists:
		return refused(404, "wallet_not_found")
	case (q.kind == withdraw || q.kind == transfer || q.kind == hold) && w.cents-w.held < q.cents:
		return refused(422, "insufficient_funds")
	case (q.kind == capture || q.kind == void) && (one.status == "captured" || one.status == "voided"):
		return refused(409, "hold_closed")
	case (q.kind == capture || q.kind == void) && (one.status == "expired" || one.expiresAt <= at):
		return refused(409, "hold_expired")
	case q.kind == capture && one.payee != 0 && one.payee != q.to:
		return refused(422, "payee_mismatch")
	case q.kind == capture && q.cents > one.remaining:
		return refused(422, "hold_exceeded")
	case q.kind == deposit:
		*r = receipt{WalletID: q.wallet, Balance: amount(w.cents + q.cents), Seq: w.seq + 1}
	case q.kind == withdraw:
		*r = receipt{WalletID: q.wallet, Balance: amount(w.cents - q.cents), Seq: w.seq + 1}
	case q.kind == transfer:
		to := s[place(q.to)]
		*r = receipt{FromID: q.wallet, ToID: q.to, FromBalance: amount(w.cents - q.cents),
			ToBalance: amount(to.cents + q.cents), FromSeq: w.seq + 1, ToSeq: to.seq + 1}
	case q.kind == hold:
		*r = receipt{HoldID: id(q.wallet, w.seq+1), WalletID: q.wallet, Remaining: amount(q.cents),
			Status: "open", ExpiresAt: later(at, q.in), ToID: q.payee, Balance: amount(w.cents),
			Held: amount(w.held + q.cents), Available: amount(w.cents - w.held - q.cents), Seq: w.seq + 1}
	case q.kind == void || q.kind == expire:
		*r = receipt{HoldID: id(q.wallet, q.seq), WalletID: q.wallet, Released: amount(one.remaining),
			Remaining: "0", Status: map[string]string{void: "voided", expire: "expired"}[q.kind],
			Balance: amount(w.cents), Held: amount(w.held - one.remaining),
			Available: amount(w.cents - w.held + one.remaining), Seq: w.seq + 1}
	case q.kind == capture:
		taken := cmp.Or(q.cents, one.remaining)
		left := int64(0)
		if q.partial {
			left = one.remaining - taken
		}
		*r = receipt{WalletID: q.wallet, Balance: amount(w.cents - taken), Seq: w.seq + 1}
		if q.to != 0 {
			to := s[place(q.to)]
			*r = receipt{FromID: q.wallet, ToID: q.to, FromBalance: amount(w.cents - taken),
				ToBalance: amount(to.cents + taken), FromSeq: w.seq + 1, ToSeq: to.seq + 1}
		}
		r.HoldID, r.Remaining = id(q.wallet, q.seq), amount(left)
		r.Held, r.Amount = amount(w.held-one.remaining+left), amount(taken)
	case q.kind == history:
		a.entries, a.sum = w.seq, w.sum
	case q.kind == oneHold:
		a.held = one.shown(q.wallet)
	case q.kind == openHolds:
		a.stands, a.open = w.stands(q.wallet, ""), listed(w.open(q.wallet))
		a.stands.Held, a.stands.Available = amount(w.held), amount(w.cents-w.held)
	default:
		a.stands = w.stands(q.wallet, "")
	}
	if *r == (receipt{}) {
		return a
	}
	r.Currency, r.CreatedAt = "USD", at
	if r.HoldID == "" || q.kind == capture {
		r.TransactionID = id(q.wallet, w.seq+1)
	}
	if r.Amount == "" && r.Released == "" {
		r.Amount = amount(q.cents)
	}
	_, *s = whole.step(*s, q, a)
	return a
}

// drawn is a random request of a ledger in a state, or what its clock does at a time.
func drawn(dice *rand.Rand, s *state, at, key string) *request {
	kinds := []string{deposit, deposit, withdraw, transfer, balance, balance, balance, fresh, history, hold,
		hold, capture, capture, void, oneHold, openHolds}
	wallet := 11 + dice.Int64N(groupSize)
	other := 11 + (wallet-11+1+dice.Int64N(groupSize-1))%groupSize
	q := &request{kind: kinds[dice.IntN(len(kinds))], wallet: wallet, cents: 1 + dice.Int64N(9), key: key}
	w := &s[place(wallet)]
	for one := w.holds; one != nil && q.seq == 0; one = one.before { // the clock first, then any
		if now := w.hold(one.seq); now.status == "open" && now.expiresAt <= at {
			return &request{kind: expire, wallet: wallet, seq: one.seq, key: key}
		}
	}
	switch q.kind {
	case transfer:
		q.to = other
	case hold:
		q.in = time.Duration(1+dice.IntN(60)) * time.Millisecond
		if dice.IntN(2) == 0 {
			q.payee = other
		}
	case capture, void, oneHold:
		for one := w.holds; one != nil && (q.seq == 0 || dice.IntN(2) == 0); one = one.before {
			q.seq = one.seq
		}
		if one := w.hold(q.seq); one != nil && q.kind == capture {
			q.to, q.partial = one.payee, dice.IntN(2) == 0
		}
		if q.kind != capture || dice.IntN(2) == 0 {
			q.cents = 0
		}
	}
	return q
}

// TestWhatCanBeIsFoundToBe: random histories of one ledger, in which one operation in ten lasts as long as
// hundreds of others, are found to be possible, and at once. Without what order adds, some take over 10 s.
func TestWhatCanBeIsFoundToBe(t *testing.T) {
	kinds := make(map[string]int)
	for seed := range uint64(60) {
		dice := rand.New(rand.NewPCG(seed, 0))
		var s state
		var ops []porcupine.Operation
		for i := range int64(400) {
			clock := moments.Add(time.Duration(i) * time.Millisecond).Format(timeFormat)
			q := drawn(dice, &s, clock, fmt.Sprint(i))
			long := int64(4_000)
			if dice.IntN(10) == 0 {
				long = 400_000
			}
			at := 1000 * i
			ops = append(ops, porcupine.Operation{Input: q, Output: served(&s, q, clock),
				Call: at - dice.Int64N(long), Return: at + dice.Int64N(long)})
		}
		for _, op := range ops {
			kinds[input(op).kind+" "+output(op).code]++
		}
		began := time.Now()
		v := violation{model: whole, ops: relax(ops)}
		if result, _ := v.find(10 * time.Second); result != porcupine.Ok {
			t.Errorf("seed %d: a history that was is %s after %v", seed, result, time.Since(began))
		}
	}
	for _, kind := range []string{hold + " ", capture + " ", void + " ", expire + " ",
		hold + " insufficient_funds", capture + " hold_exceeded", capture + " hold_closed",
		capture + " hold_expired"} {
		if kinds[kind] == 0 {
			t.Errorf("none of %q in %v", kind, kinds)
		}
	}
}

// moments are the times of histories that are made up: from here on.
var moments = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// TestWhatCannotBeIsFound: of a history about one hold, each lie about it is found.
func TestWhatCannotBeIsFound(t *testing.T) {
	at := func(i int) string { return moments.Add(time.Duration(i) * time.Second).Format(timeFormat) }
	const w, payee = 11, 12
	story := func() (ops []porcupine.Operation) {
		var s state
		for i, q := range []*request{
			0: {kind: deposit, wallet: w, cents: 100, key: "d"},
			1: {kind: hold, wallet: w, cents: 60, key: "h", payee: payee, in: 10 * time.Second},
			2: {kind: balance, wallet: w},
			3: {kind: withdraw, wallet: w, cents: 41, key: "w"},
			4: {kind: capture, wallet: w, to: payee, seq: 2, cents: 10, partial: true, key: "c"},
			5: {kind: oneHold, wallet: w, seq: 2},
			6: {kind: openHolds, wallet: w},
			7: {kind: hold, wallet: w, cents: 5, key: "h2", in: time.Hour},
			8: {kind: void, wallet: w, seq: 4, key: "v"},
			9: {kind: capture, wallet: w, seq: 4, key: "c2"},
			// The clock's: due at 11.
			12: {kind: expire, wallet: w, seq: 2, key: "«expiry 2»"},
			13: {kind: capture, wallet: w, to: payee, seq: 2, key: "c3"},
			14: {kind: withdraw, wallet: w, cents: 90, key: "all"},
			15: {kind: history, wallet: w},
		} {
			if q != nil {
				ops = append(ops, porcupine.Operation{Input: q, Output: served(&s, q, at(i)),
					Call: int64(2 * i), Return: int64(2*i + 1)})
			}
		}
		return ops
	}
	impossible := func(ops []porcupine.Operation) bool {
		result, _ := violation{model: whole, ops: relax(ops)}.find(checkLimit)
		return result == porcupine.Illegal
	}
	if ops := story(); impossible(ops) {
		t.Fatalf("what can be is found impossible:\n%s", violation{ops: ops})
	}
	for _, lie := range []struct {
		what string
		last int // operation that it is told in
		tell func(q []*request, a []*response)
	}{
		{"what is held is not shown", 2, func(_ []*request, a []*response) { a[2].stands.Held = "" }},
		{"what is held is spent", 3, func(_ []*request, a []*response) {
			*a[3] = response{status: 200, receipt: receipt{TransactionID: "11-3", WalletID: w,
				Currency: "USD", Amount: "0.41", Balance: "0.59", Seq: 3, CreatedAt: at(3)}}
		}},
		{"a refusal with money enough", 3, func(q []*request, _ []*response) { q[3].cents = 40 }},
		{"a refusal for what was due", 3, func(_ []*request, a []*response) { a[3].asked = at(11) }},
		{"a capture of more than remains", 4, func(q []*request, a []*response) {
			q[4].cents, a[4].receipt.Amount = 61, "0.61"
			a[4].receipt.FromBalance, a[4].receipt.ToBalance = "0.39", "0.61"
			a[4].receipt.Remaining, a[4].receipt.Held = "-0.01", "-0.01"
		}},
		{"a capture when it was due", 4, func(_ []*request, a []*response) {
			a[4].receipt.CreatedAt = at(11)
		}},
		{"a capture for somebody else", 4, func(q []*request, a []*response) {
			q[1].payee, a[1].receipt.ToID = 13, 13
		}},
		{"a partial capture that leaves nothing", 4, func(_ []*request, a []*response) {
			a[4].receipt.Remaining, a[4].receipt.Held = "0", "0"
		}},
		{"a hold shown as whole", 5, func(_ []*request, a []*response) { a[5].held.Captured = "0" }},
		{"a list without the hold", 6, func(_ []*request, a []*response) { a[6].open = listed(nil) }},
		{"a hold that expires too early", 7, func(_ []*request, a []*response) {
			a[7].receipt.ExpiresAt = at(8)
		}},
		{"a void of another hold", 8, func(q []*request, _ []*response) { q[8].seq = 2 }},
		{"closed, though it is open", 9, func(q []*request, _ []*response) { q[9].seq, q[9].to = 2, payee }},
		{"not found, though it is there", 9, func(_ []*request, a []*response) {
			a[9].code = "hold_not_found"
		}},
		{"exceeded, though it is closed", 9, func(_ []*request, a []*response) {
			a[9].code = "hold_exceeded"
		}},
		{"an expiry before its time", 10, func(_ []*request, a []*response) {
			a[10].receipt.CreatedAt = at(10)
		}},
		{"an expiry that releases less", 10, func(_ []*request, a []*response) {
			a[10].receipt.Released = "0.4"
		}},
		{"expired, before its time", 11, func(_ []*request, a []*response) { a[11].answered = at(10) }},
		{"a payee mismatch where there is none", 11, func(_ []*request, a []*response) {
			a[11].code = "payee_mismatch"
		}},
		{"an expiry that history has otherwise", 13, func(q []*request, _ []*response) {
			q[10].key = "another"
		}},
	} {
		ops := story()[:lie.last+1]
		var q []*request
		var a []*response
		for _, op := range story() {
			q, a = append(q, input(op)), append(a, output(op))
		}
		for i := range ops {
			ops[i].Input, ops[i].Output = q[i], a[i]
		}
		if lie.tell(q, a); !impossible(ops) {
			t.Errorf("%s: not found in\n%s", lie.what, violation{ops: ops})
		}
	}
}
