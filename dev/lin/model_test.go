// The model: what the service's answers may be, as a sequential object of a few wallets, for porcupine.
//
// One group of wallets is one object, since transfers stay inside it. A state is the wallets' heads with
// their holds; each answer is checked wholly: receipts to the last field, refusals against the funds and the
// holds, reads against the head, histories against every entry. What the clock does, the end of a hold that
// is due, is an operation that nobody asked for: the ledger tells of it in the end (settle).

package lin

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// groupSize is how many wallets a group has. Wallet ids are 10 times the group's number, plus 1 to groupSize.
const groupSize = 3

func place(wallet int64) int { return int(wallet%10) - 1 }

// Kinds of requests.
const (
	create      = "create"
	deposit     = "deposit"
	withdraw    = "withdraw"
	transfer    = "transfer"
	replay      = "replay"      // a deposit that was answered before, sent again
	balance     = "balance"     // from the cache, if it likes
	fresh       = "fresh"       // balance with Cache-Control: no-cache
	read        = "read"        // GET /v1/wallets/{id}
	history     = "history"     // all entries, from whichever end
	transaction = "transaction" // by its id
	hold        = "hold"
	capture     = "capture"
	void        = "void"
	expire      = "expire"   // of a hold, by the clock
	oneHold     = "one hold" // GET /v1/holds/{id}
	openHolds   = "holds"    // of a wallet, those that are open
)

// request is what a client wants, however often it has to say so.
type request struct {
	kind       string
	wallet, to int64
	cents      int64 // of a capture: 0 for all that remains
	key        string
	minSeq     int64         // of balance
	seq        int64         // of transaction, capture, void, expire and one hold: the entry that it is of
	descending bool          // of history
	payee      int64         // of hold: who will be paid, or 0. to is a wallet that the request touches
	in         time.Duration // of hold: when it expires
	named      bool          // of capture: the body names to
	partial    bool          // of capture
	again      *request      // of replay: what was asked before
	before     string        // of replay: the body that was answered before
}

// receipt is the answer to a movement; kind and key are set in GET /v1/transactions alone.
type receipt struct {
	TransactionID string `json:"transaction_id"`
	WalletID      int64  `json:"wallet_id"`
	FromID        int64  `json:"from_id"`
	ToID          int64  `json:"to_id"`
	Currency      string `json:"currency"`
	Amount        string `json:"amount"`
	Balance       string `json:"balance"`
	FromBalance   string `json:"from_balance"`
	ToBalance     string `json:"to_balance"`
	Seq           int64  `json:"seq"`
	FromSeq       int64  `json:"from_seq"`
	ToSeq         int64  `json:"to_seq"`
	CreatedAt     string `json:"created_at"`
	Kind          string `json:"kind"`
	Key           string `json:"idempotency_key"`
	// Of a hold, its captures and its end.
	HoldID    string `json:"hold_id"`
	Remaining string `json:"remaining"`
	Released  string `json:"released"`
	Status    string `json:"status"`
	ExpiresAt string `json:"expires_at"`
	Held      string `json:"held"`
	Available string `json:"available"`
}

// standing is the answer to a creation or a read of a wallet; of a balance it lacks the time.
type standing struct {
	WalletID  int64  `json:"wallet_id"`
	Currency  string `json:"currency"`
	Balance   string `json:"balance"`
	Seq       int64  `json:"seq"`
	CreatedAt string `json:"created_at"`
	Held      string `json:"held"` // this and the next are left out where nothing is held
	Available string `json:"available"`
}

// shownHold is a hold as a read shows it.
type shownHold struct {
	HoldID    string `json:"hold_id"`
	WalletID  int64  `json:"wallet_id"`
	Currency  string `json:"currency"`
	Amount    string `json:"amount"`
	Captured  string `json:"captured"`
	Remaining string `json:"remaining"`
	Status    string `json:"status"`
	ExpiresAt string `json:"expires_at"`
	ToID      int64  `json:"to_id"`
	CreatedAt string `json:"created_at"`
}

// entry is one item of a history.
type entry struct {
	WalletID      int64  `json:"wallet_id"`
	Seq           int64  `json:"seq"`
	TransactionID string `json:"transaction_id"`
	Kind          string `json:"kind"`
	Currency      string `json:"currency"`
	Amount        string `json:"amount"`
	BalanceBefore string `json:"balance_before"`
	BalanceAfter  string `json:"balance_after"`
	Counterparty  struct {
		WalletID int64 `json:"wallet_id"`
		Seq      int64 `json:"seq"`
	} `json:"counterparty"`
	Key       string `json:"idempotency_key"`
	CreatedAt string `json:"created_at"`

	HeldBefore string `json:"held_before"`
	HeldAfter  string `json:"held_after"`
	OfSeq      int64  `json:"of_seq"`
	Remaining  string `json:"remaining"`
	said
}

// said is what an entry's note says.
type said struct {
	ToID      int64  `json:"to_id"`
	ExpiresAt string `json:"expires_at"`
	Reason    string `json:"reason"`
	All       bool   `json:"all"`
	Partial   bool   `json:"partial"`
}

// response is what was answered in the end.
type response struct {
	status  int
	code    string // of a refusal
	body    string
	receipt receipt
	stands  standing
	entries int64  // how many a history has
	sum     uint64 // of them, in ascending order
	held    shownHold
	open    string // of holds, as listed makes it

	asked, answered string // when, by the machine's clock, which is the database's as well
}

// parse reads the body as the kind of request has it. What it does not know is an error.
func (q *request) parse(status int, body string) (*response, error) {
	a := &response{status: status, body: body}
	if status >= 400 {
		var problem struct{ Code string }
		err := json.Unmarshal([]byte(body), &problem)
		a.code = problem.Code
		return a, err
	}
	decoder := json.NewDecoder(strings.NewReader(body))
	decoder.DisallowUnknownFields()
	switch q.kind {
	case create, balance, fresh, read:
		return a, decoder.Decode(&a.stands)
	case oneHold:
		return a, decoder.Decode(&a.held)
	case openHolds:
		var list struct {
			standing
			Holds []shownHold `json:"holds"`
		}
		err := decoder.Decode(&list)
		a.stands, a.open = list.standing, listed(list.Holds)
		return a, err
	case history:
		var entries []entry
		err := decoder.Decode(&entries)
		for i := range entries {
			e := &entries[i]
			if q.descending {
				e = &entries[len(entries)-1-i]
			}
			a.sum = e.add(a.sum)
		}
		a.entries = int64(len(entries))
		return a, err
	}
	return a, decoder.Decode(&a.receipt)
}

// add makes the sum of a chain of entries that ends in e.
func (e *entry) add(sum uint64) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %v", sum, *e)
	return h.Sum64()
}

func listed(holds []shownHold) string { return fmt.Sprint(holds) }

// head is a wallet. Two are the same if all but last and holds is: the sum stands for the chain, which all
// follows from.
type head struct {
	exists      bool
	createdAt   string
	creationKey string
	cents, seq  int64
	held        int64
	sum         uint64
	last        *link
	holds       *holding
}

// holding is where a hold stands, with all those before it: older ones, and what they were before.
type holding struct {
	seq, cents, captured, remaining, payee int64
	status, expiresAt, createdAt           string
	before                                 *holding
}

// link is an entry with those before it, and the receipt of its transaction where the entry began it.
type link struct {
	entry
	receipt receipt
	before  *link
}

type state [groupSize]head

func (s state) equal(other state) bool {
	for i := range s {
		s[i].last, other[i].last = nil, nil
		s[i].holds, other[i].holds = nil, nil
	}
	return s == other
}

func (s state) hash() uint64 {
	var sum uint64
	for _, h := range s {
		sum = sum*31 + h.sum + uint64(h.seq)
	}
	return sum
}

// model is the object, seen from some of the group's wallets only: legs on others are taken as they were
// answered, which weakens what is demanded but never demands more. All wallets but for the shrinking.
type model struct {
	wallets [groupSize]bool
	start   state
}

var whole = model{wallets: [groupSize]bool{true, true, true}}

func (m model) sees(wallet int64) bool { return m.wallets[place(wallet)] }

func (m model) porcupine() porcupine.Model {
	return porcupine.Model{
		Init:  func() any { return m.start },
		Equal: func(a, b any) bool { return a.(state).equal(b.(state)) },
		Hash:  func(s any) uint64 { return s.(state).hash() },
		Step: func(s, input, output any) (bool, any) {
			ok, next := m.step(s.(state), input.(*request), output.(*response))
			return ok, next
		},
		DescribeOperation: func(input, output any) string {
			return describe(input.(*request), output.(*response))
		},
		DescribeState: func(s any) string { return m.describe(s.(state)) },
	}
}

// step says whether the answer is right in a state, and the state after it. It is called very often.
func (m model) step(s state, q *request, a *response) (bool, state) {
	w := &s[place(q.wallet)]
	switch a.code {
	case "wallet_not_found":
		return !w.exists && q.kind != deposit && q.kind != create, s
	case "insufficient_funds": // what was due when it was asked for is available
		spends := q.kind == withdraw || q.kind == transfer || q.kind == hold
		return spends && w.exists && w.cents-w.held+w.due(a.asked) < q.cents, s
	case "hold_not_found", "hold_expired", "hold_closed", "hold_exceeded", "payee_mismatch":
		return w.refuses(q, a), s
	case "wallet_exists":
		return w.exists && w.creationKey != q.key && q.kind == create, s
	case "seq_not_reached":
		return w.exists && w.seq < q.minSeq && (q.kind == balance || q.kind == fresh), s
	case "transaction_not_found":
		begun := w.find(q.seq)
		return (begun == nil || begun.Kind == "transfer_in") && q.kind == transaction, s
	}
	if a.status != q.success() {
		return false, s
	}
	switch q.kind {
	case create:
		if w.exists && w.creationKey != q.key {
			return false, s
		}
		if !w.exists {
			*w = head{exists: true, createdAt: a.stands.CreatedAt, creationKey: q.key}
		}
		want := standing{WalletID: q.wallet, Currency: "USD", Balance: "0", CreatedAt: w.createdAt}
		return a.stands == want, s
	case deposit, withdraw, transfer:
		return m.move(s, q, &a.receipt)
	case hold, void, expire:
		return w.seq+1 == a.receipt.Seq && w.ofHold(q, &a.receipt), s
	case capture:
		return m.capture(s, q, &a.receipt)
	case replay:
		begun := w.find(max(a.receipt.Seq, a.receipt.FromSeq))
		return begun != nil && a.body == q.before && begun.receipt == a.receipt, s
	case balance, fresh:
		return w.exists && w.seq >= q.minSeq && a.stands == w.stands(q.wallet, ""), s
	case read:
		return w.exists && a.stands == w.stands(q.wallet, w.createdAt), s
	case oneHold:
		h := w.hold(q.seq)
		return h != nil && a.held == h.shown(q.wallet), s
	case openHolds:
		if !w.exists || a.stands.Seq != w.seq {
			return false, s
		}
		want := w.stands(q.wallet, "")
		want.Held, want.Available = amount(w.held), amount(w.cents-w.held)
		return a.stands == want && a.open == listed(w.open(q.wallet)), s
	case history:
		return w.exists && a.entries == w.seq && a.sum == w.sum, s
	case transaction:
		begun := w.find(q.seq)
		if begun == nil || begun.Kind == "transfer_in" {
			return false, s
		}
		want := begun.receipt
		want.Kind, want.Key = strings.TrimSuffix(begun.Kind, "_out"), begun.Key
		return a.receipt == want, s
	}
	return false, s
}

// success is the status of an answer that is none of refusal.
func (q *request) success() int {
	kind := q.kind
	if kind == replay {
		kind = q.again.kind
	}
	if kind == create || kind == hold {
		return 201
	}
	return 200
}

func (h *head) stands(wallet int64, createdAt string) standing {
	s := standing{WalletID: wallet, Currency: "USD", Balance: amount(h.cents), Seq: h.seq,
		CreatedAt: createdAt}
	if h.held != 0 {
		s.Held, s.Available = amount(h.held), amount(h.cents-h.held)
	}
	return s
}

// hold returns where a hold stands, or nil.
func (h *head) hold(seq int64) *holding {
	for one := h.holds; one != nil; one = one.before {
		if one.seq == seq {
			return one
		}
	}
	return nil
}

// open lists the open holds, the oldest first.
func (h *head) open(wallet int64) (open []shownHold) {
	seen := make(map[int64]bool)
	for one := h.holds; one != nil; one = one.before {
		if !seen[one.seq] && one.status == "open" {
			open = append(open, one.shown(wallet))
		}
		seen[one.seq] = true
	}
	slices.SortFunc(open, func(a, b shownHold) int { // within one wallet: the shorter id is the older
		return cmp.Or(cmp.Compare(len(a.HoldID), len(b.HoldID)), cmp.Compare(a.HoldID, b.HoldID))
	})
	return open
}

func (h *holding) shown(wallet int64) shownHold {
	return shownHold{id(wallet, h.seq), wallet, "USD", amount(h.cents), amount(h.captured),
		amount(h.remaining), h.status, h.expiresAt, h.payee, h.createdAt}
}

// due is what open holds reserve that were due at a time.
func (h *head) due(at string) (cents int64) {
	seen := make(map[int64]bool)
	for one := h.holds; one != nil; one = one.before {
		if !seen[one.seq] && one.status == "open" && one.expiresAt <= at {
			cents += one.remaining
		}
		seen[one.seq] = true
	}
	return cents
}

// refuses says whether a request about a hold is refused rightly.
func (h *head) refuses(q *request, a *response) bool {
	one := h.hold(q.seq)
	switch {
	case q.kind != capture && q.kind != void && q.kind != oneHold:
		return false
	case one == nil || a.code == "hold_not_found":
		return one == nil && a.code == "hold_not_found"
	case q.kind == oneHold:
		return false
	case one.status == "captured" || one.status == "voided":
		return a.code == "hold_closed"
	case a.code == "hold_expired": // swept or not
		return one.expiresAt <= a.answered
	case one.status != "open" || q.kind != capture || one.expiresAt <= a.asked:
		return false
	case one.payee != 0 && one.payee != q.to:
		return a.code == "payee_mismatch"
	}
	return a.code == "hold_exceeded" && q.cents > one.remaining
}

// ofHold is a hold, or the end of one, that touches its wallet alone.
func (h *head) ofHold(q *request, got *receipt) bool {
	if q.kind == hold {
		if !h.exists || h.cents-h.held < q.cents {
			return false
		}
		one := &holding{seq: got.Seq, cents: q.cents, remaining: q.cents, payee: q.payee, status: "open",
			expiresAt: later(got.CreatedAt, q.in), createdAt: got.CreatedAt, before: h.holds}
		want := receipt{HoldID: id(q.wallet, got.Seq), WalletID: q.wallet, Currency: "USD",
			Amount: amount(q.cents), Remaining: amount(q.cents), Status: "open", ExpiresAt: one.expiresAt,
			ToID: q.payee, Balance: amount(h.cents), Held: amount(h.held + q.cents),
			Available: amount(h.cents - h.held - q.cents), Seq: got.Seq, CreatedAt: got.CreatedAt}
		h.holds = one
		return h.append(hold, 0, q.key, want, 0, 0, change{held: q.cents, remaining: q.cents,
			said: said{ToID: q.payee, ExpiresAt: one.expiresAt}}) && *got == want
	}
	one := h.hold(q.seq)
	if one == nil || one.status != "open" || (q.kind == expire) != (got.CreatedAt >= one.expiresAt) {
		return false // due is what can no longer be voided
	}
	ended, reason := *one, "void"
	ended.before, ended.remaining, ended.status = h.holds, 0, "voided"
	if q.kind == expire {
		reason, ended.status = "expiry", "expired"
	}
	want := receipt{HoldID: id(q.wallet, q.seq), WalletID: q.wallet, Currency: "USD",
		Released: amount(one.remaining), Remaining: "0", Status: ended.status, Balance: amount(h.cents),
		Held: amount(h.held - one.remaining), Available: amount(h.cents - h.held + one.remaining),
		Seq: got.Seq, CreatedAt: got.CreatedAt}
	h.holds = &ended
	return h.append("release", 0, q.key, want, 0, 0,
		change{held: -one.remaining, of: q.seq, said: said{Reason: reason}}) && *got == want
}

// capture pays what was held, or a part of it: as a transfer does, or as a withdrawal.
func (m model) capture(s state, q *request, got *receipt) (bool, state) {
	from, taken := &s[place(q.wallet)], cents(got.Amount)
	if taken <= 0 || q.cents != 0 && q.cents != taken {
		return false, s
	}
	want := *got // what is not seen is taken as it is
	want.WalletID, want.FromID, want.ToID, want.Currency = 0, q.wallet, q.to, "USD"
	seq, kind := got.FromSeq, "transfer_out"
	if q.to == 0 {
		want.WalletID, want.FromID, seq, kind = q.wallet, 0, got.Seq, "withdrawal"
	}
	want.TransactionID, want.HoldID = id(q.wallet, seq), id(q.wallet, q.seq)
	c := change{of: q.seq, said: said{All: q.cents == 0, Partial: q.partial}}
	if m.sees(q.wallet) {
		one := from.hold(q.seq)
		if seq != from.seq+1 || one == nil || one.status != "open" || got.CreatedAt >= one.expiresAt ||
			taken > one.remaining || q.cents == 0 && taken != one.remaining ||
			one.payee != 0 && one.payee != q.to {
			return false, s
		}
		now := *one
		now.before, now.captured, now.remaining = from.holds, one.captured+taken, 0
		if q.partial {
			now.remaining = one.remaining - taken
		}
		if now.remaining == 0 {
			now.status = "captured"
		}
		from.holds = &now
		c.held, c.remaining = now.remaining-one.remaining, now.remaining
		want.Remaining, want.Held = amount(now.remaining), amount(from.held+c.held)
		if want.FromBalance = amount(from.cents - taken); q.to == 0 {
			want.Balance, want.FromBalance = want.FromBalance, ""
		}
	}
	var to *head
	if q.to != 0 && m.sees(q.to) {
		if to = &s[place(q.to)]; got.ToSeq != to.seq+1 {
			return false, s
		}
		want.ToBalance = amount(to.cents + taken)
	}
	ok := *got == want
	if m.sees(q.wallet) {
		ok = ok && from.append(kind, -taken, q.key, want, q.to, got.ToSeq, c)
	}
	if to != nil {
		ok = ok && to.append("transfer_in", taken, q.key, want, q.wallet, seq, change{})
	}
	return ok, s
}

// later adds to a time that the service wrote.
func later(at string, d time.Duration) string {
	t, err := time.Parse(timeFormat, at)
	if err != nil {
		return ""
	}
	return t.Add(d).Format(timeFormat)
}

// timeFormat has a fixed width, so that times compare as text.
const timeFormat = "2006-01-02T15:04:05.000000Z"

// find returns entry number seq, or nil.
func (h *head) find(seq int64) *link {
	e := h.last
	for e != nil && e.Seq > seq {
		e = e.before
	}
	if e != nil && e.Seq != seq {
		return nil
	}
	return e
}

// move is a movement that was answered with got.
func (m model) move(s state, q *request, got *receipt) (bool, state) {
	from := &s[place(q.wallet)]
	if q.kind != transfer {
		cents, kind := q.cents, "deposit"
		if q.kind == withdraw {
			cents, kind = -q.cents, "withdrawal"
			if !from.exists || from.cents-from.held < q.cents {
				return false, s
			}
		}
		if got.Seq != from.seq+1 { // most are tried in vain: say no before anything is made
			return false, s
		}
		want := receipt{TransactionID: id(q.wallet, got.Seq), WalletID: q.wallet, Currency: "USD",
			Amount: amount(q.cents), Balance: amount(from.cents + cents), Seq: got.Seq,
			CreatedAt: got.CreatedAt}
		return from.append(kind, cents, q.key, want, 0, 0, change{}) && *got == want, s
	}
	to := &s[place(q.to)]
	want := receipt{FromID: q.wallet, ToID: q.to, Currency: "USD", Amount: amount(q.cents),
		FromBalance: got.FromBalance, ToBalance: got.ToBalance, FromSeq: got.FromSeq, ToSeq: got.ToSeq,
		CreatedAt: got.CreatedAt}
	want.TransactionID = id(q.wallet, want.FromSeq)
	if m.sees(q.wallet) {
		if !from.exists || from.cents-from.held < q.cents || got.FromSeq != from.seq+1 {
			return false, s
		}
		want.FromBalance = amount(from.cents - q.cents)
	}
	if m.sees(q.to) {
		if got.ToSeq != to.seq+1 {
			return false, s
		}
		want.ToBalance = amount(to.cents + q.cents)
	}
	ok := *got == want
	if m.sees(q.wallet) {
		ok = ok && from.append("transfer_out", -q.cents, q.key, want, q.to, want.ToSeq, change{})
	}
	if m.sees(q.to) {
		ok = ok && to.append("transfer_in", q.cents, q.key, want, q.wallet, want.FromSeq, change{})
	}
	return ok, s
}

// change is what an entry changes of what is held, and of which hold.
type change struct {
	held, of, remaining int64
	said
}

// append makes the wallet's next entry. False: its time is before the last one's.
func (h *head) append(
	kind string, cents int64, key string, r receipt, other, otherSeq int64, c change,
) bool {
	e := &link{receipt: r, before: h.last}
	e.WalletID, e.Seq = max(r.WalletID, r.FromID), h.seq+1
	e.Kind, e.Currency = kind, "USD"
	e.TransactionID = id(e.WalletID, e.Seq)
	if kind == "transfer_in" {
		e.WalletID, e.TransactionID = r.ToID, r.TransactionID
	}
	if e.said = c.said; h.held != 0 || c.held != 0 {
		e.HeldBefore, e.HeldAfter = amount(h.held), amount(h.held+c.held)
	}
	if e.OfSeq = c.of; c.held != 0 {
		e.Remaining = amount(c.remaining)
	}
	e.Amount, e.BalanceBefore, e.BalanceAfter = amount(cents), amount(h.cents), amount(h.cents+cents)
	e.Counterparty.WalletID, e.Counterparty.Seq, e.Key, e.CreatedAt = other, otherSeq, key, r.CreatedAt
	if !h.exists {
		h.exists, h.createdAt = true, r.CreatedAt
	}
	inOrder := h.last == nil || h.last.CreatedAt <= e.CreatedAt // in one format: as text as in time
	h.cents, h.seq, h.sum, h.last = h.cents+cents, e.Seq, e.add(h.sum), e
	h.held += c.held
	return inOrder
}

func id(wallet, seq int64) string { return fmt.Sprintf("%d-%d", wallet, seq) }

// amount writes cents as the service does: without trailing zeros.
func amount(cents int64) string { return strconv.FormatFloat(float64(cents)/100, 'f', -1, 64) }

// cents reads what amount wrote.
func cents(amount string) int64 {
	n, _ := strconv.ParseFloat(amount, 64)
	return int64(math.Round(100 * n))
}

// -----------------------------------------------------------------------------------------------------------
// What an operation did and saw
// -----------------------------------------------------------------------------------------------------------

// writeKinds are those that change the ledger.
var writeKinds = []string{create, deposit, withdraw, transfer, hold, capture, void, expire}

// writes says whether the operation changed the ledger.
func (q *request) writes(a *response) bool {
	return a.status < 300 && slices.Contains(writeKinds, q.kind)
}

// touches says whether the operation is about a wallet that the model sees.
func (m model) touches(q *request, a *response) bool {
	return m.sees(q.wallet) || q.to != 0 && a.status < 300 && m.sees(q.to)
}

// everything is what an operation saw of a wallet whose answer depends on all of it.
const everything = math.MaxInt64

// saw is the highest entry of a wallet that the answer depends on: without later ones it would have been
// right as well.
func saw(q *request, a *response, wallet int64) int64 {
	switch {
	case q.wallet != wallet && q.to != wallet:
		return -1
	case a.code == "wallet_not_found" || a.code == "seq_not_reached" || a.code == "transaction_not_found" ||
		a.code == "hold_not_found":
		return -1
	case a.status >= 300 || q.kind == oneHold:
		return everything
	case q.kind == history:
		return a.entries
	case q.to != 0 && wallet == q.to:
		return a.receipt.ToSeq
	case q.kind == transaction:
		return q.seq
	}
	return max(a.receipt.Seq, a.receipt.FromSeq, a.stands.Seq)
}

func describe(q *request, a *response) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s %d", q.kind, q.wallet)
	switch q.kind {
	case deposit, withdraw:
		fmt.Fprintf(&text, " amount %s key %s", amount(q.cents), q.key)
	case transfer:
		fmt.Fprintf(&text, " to %d amount %s key %s", q.to, amount(q.cents), q.key)
	case create, replay:
		fmt.Fprintf(&text, " key %s", q.key)
	case transaction, void, expire, oneHold:
		fmt.Fprintf(&text, "-%d", q.seq)
	case hold:
		fmt.Fprintf(&text, " amount %s for %d in %v key %s", amount(q.cents), q.payee, q.in, q.key)
	case capture:
		fmt.Fprintf(&text, "-%d to %d amount %s partial %v key %s", q.seq, q.to, amount(q.cents), q.partial,
			q.key)
	}
	if q.minSeq > 0 {
		fmt.Fprintf(&text, " min_seq %d", q.minSeq)
	}
	fmt.Fprintf(&text, " -> %d ", a.status)
	switch {
	case a.code != "":
		text.WriteString(a.code)
	case q.kind == transfer:
		fmt.Fprintf(&text, "from seq %d balance %s, to seq %d balance %s",
			a.receipt.FromSeq, a.receipt.FromBalance, a.receipt.ToSeq, a.receipt.ToBalance)
	case q.kind == deposit || q.kind == withdraw:
		fmt.Fprintf(&text, "seq %d balance %s", a.receipt.Seq, a.receipt.Balance)
	case q.kind == balance || q.kind == fresh || q.kind == read || q.kind == create:
		fmt.Fprintf(&text, "seq %d balance %s held %s", a.stands.Seq, a.stands.Balance, a.stands.Held)
	case slices.Contains(writeKinds, q.kind):
		fmt.Fprintf(&text, "%+v", a.receipt)
	case q.kind == history && a.entries == 0:
		text.WriteString("[]")
	case q.kind == history:
		fmt.Fprintf(&text, "entries 1-%d, sum %x", a.entries, a.sum)
	default:
		text.WriteString(a.body)
	}
	return text.String()
}

func (m model) describe(s state) string {
	var all []string
	for i, h := range s {
		if m.wallets[i] && h.exists {
			all = append(all, fmt.Sprintf("the wallet that ends in %d at seq %d, balance %s, held %s",
				i+1, h.seq, amount(h.cents), amount(h.held)))
		} else if m.wallets[i] {
			all = append(all, fmt.Sprintf("the wallet that ends in %d does not exist", i+1))
		}
	}
	return strings.Join(all, "; ")
}
