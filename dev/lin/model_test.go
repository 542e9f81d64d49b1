// The model: what the service's answers may be, as a sequential object of a few wallets, for porcupine.
//
// One group of wallets is one object, since transfers stay inside it. A state is the wallets' heads; each
// answer is checked wholly: receipts to the last field, refusals against the funds, reads against the head,
// histories against every entry.

package lin

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"math"
	"strconv"
	"strings"

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
)

// request is what a client wants, however often it has to say so.
type request struct {
	kind       string
	wallet, to int64
	cents      int64
	key        string
	minSeq     int64  // of balance
	seq        int64  // of transaction
	descending bool   // of history
	before     string // of replay: the body that was answered before
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
}

// standing is the answer to a creation or a read of a wallet; of a balance it lacks the time.
type standing struct {
	WalletID  int64  `json:"wallet_id"`
	Currency  string `json:"currency"`
	Balance   string `json:"balance"`
	Seq       int64  `json:"seq"`
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

// head is a wallet. Two are the same if all but last is: the sum stands for the chain.
type head struct {
	exists      bool
	createdAt   string
	creationKey string
	cents, seq  int64
	sum         uint64
	last        *link
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
	case "insufficient_funds":
		return w.exists && w.cents < q.cents && (q.kind == withdraw || q.kind == transfer), s
	case "wallet_exists":
		return w.exists && w.creationKey != q.key && q.kind == create, s
	case "seq_not_reached":
		return w.exists && w.seq < q.minSeq && (q.kind == balance || q.kind == fresh), s
	case "transaction_not_found":
		begun := w.find(q.seq)
		return (begun == nil || begun.Kind == "transfer_in") && q.kind == transaction, s
	}
	if ok := map[bool]int{true: 201, false: 200}[q.kind == create]; a.status != ok {
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
		return a.stands == standing{q.wallet, "USD", "0", 0, w.createdAt}, s
	case deposit, withdraw, transfer:
		return m.move(s, q, &a.receipt)
	case replay:
		begun := w.find(a.receipt.Seq)
		return begun != nil && a.body == q.before && begun.receipt == a.receipt, s
	case balance, fresh:
		want := standing{q.wallet, "USD", amount(w.cents), w.seq, ""}
		return w.exists && w.seq >= q.minSeq && a.stands == want, s
	case read:
		return w.exists && a.stands == standing{q.wallet, "USD", amount(w.cents), w.seq, w.createdAt}, s
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
			if !from.exists || from.cents < q.cents {
				return false, s
			}
		}
		if got.Seq != from.seq+1 { // most are tried in vain: say no before anything is made
			return false, s
		}
		want := receipt{TransactionID: id(q.wallet, got.Seq), WalletID: q.wallet, Currency: "USD",
			Amount: amount(q.cents), Balance: amount(from.cents + cents), Seq: got.Seq,
			CreatedAt: got.CreatedAt}
		return from.append(kind, cents, q.key, want, 0, 0) && *got == want, s
	}
	to := &s[place(q.to)]
	want := receipt{FromID: q.wallet, ToID: q.to, Currency: "USD", Amount: amount(q.cents),
		FromBalance: got.FromBalance, ToBalance: got.ToBalance, FromSeq: got.FromSeq, ToSeq: got.ToSeq,
		CreatedAt: got.CreatedAt}
	want.TransactionID = id(q.wallet, want.FromSeq)
	if m.sees(q.wallet) {
		if !from.exists || from.cents < q.cents || got.FromSeq != from.seq+1 {
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
		ok = ok && from.append("transfer_out", -q.cents, q.key, want, q.to, want.ToSeq)
	}
	if m.sees(q.to) {
		ok = ok && to.append("transfer_in", q.cents, q.key, want, q.wallet, want.FromSeq)
	}
	return ok, s
}

// append makes the wallet's next entry. False: its time is before the last one's.
func (h *head) append(kind string, cents int64, key string, r receipt, other, otherSeq int64) bool {
	e := &link{receipt: r, before: h.last}
	e.WalletID, e.Seq, e.TransactionID = max(r.WalletID, r.FromID), h.seq+1, r.TransactionID
	e.Kind, e.Currency = kind, "USD"
	if kind == "transfer_in" {
		e.WalletID = r.ToID
	}
	e.Amount, e.BalanceBefore, e.BalanceAfter = amount(cents), amount(h.cents), amount(h.cents+cents)
	e.Counterparty.WalletID, e.Counterparty.Seq, e.Key, e.CreatedAt = other, otherSeq, key, r.CreatedAt
	if !h.exists {
		h.exists, h.createdAt = true, r.CreatedAt
	}
	inOrder := h.last == nil || h.last.CreatedAt <= e.CreatedAt // in one format: as text as in time
	h.cents, h.seq, h.sum, h.last = h.cents+cents, e.Seq, e.add(h.sum), e
	return inOrder
}

func id(wallet, seq int64) string { return fmt.Sprintf("%d-%d", wallet, seq) }

// amount writes cents as the service does: without trailing zeros.
func amount(cents int64) string { return strconv.FormatFloat(float64(cents)/100, 'f', -1, 64) }

// -----------------------------------------------------------------------------------------------------------
// What an operation did and saw
// -----------------------------------------------------------------------------------------------------------

// writes says whether the operation changed the ledger.
func (q *request) writes(a *response) bool {
	movesMoney := q.kind == deposit || q.kind == withdraw || q.kind == transfer
	return a.status < 300 && (movesMoney || q.kind == create)
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
	case a.code == "wallet_not_found" || a.code == "seq_not_reached" || a.code == "transaction_not_found":
		return -1
	case a.status >= 300:
		return everything
	case q.kind == history:
		return a.entries
	case q.kind == transfer && wallet == q.wallet:
		return a.receipt.FromSeq
	case q.kind == transfer:
		return a.receipt.ToSeq
	case q.kind == transaction:
		return q.seq
	}
	return max(a.receipt.Seq, a.stands.Seq)
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
	case transaction:
		fmt.Fprintf(&text, "-%d", q.seq)
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
		fmt.Fprintf(&text, "seq %d balance %s", a.stands.Seq, a.stands.Balance)
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
			all = append(all, fmt.Sprintf("the wallet that ends in %d at seq %d, balance %s",
				i+1, h.seq, amount(h.cents)))
		} else if m.wallets[i] {
			all = append(all, fmt.Sprintf("the wallet that ends in %d does not exist", i+1))
		}
	}
	return strings.Join(all, "; ")
}
