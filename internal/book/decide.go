package book

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/jsontext"
	"wallet/internal/money"
)

// What money may do: each kind of operation is decided by one function, against the batch's running state.

// Posting is one batch on its way: the wallets under lock, what the keys stand for, and the new entries.
type Posting struct {
	Now             time.Time // the database's
	Scales          map[string]int32
	DefaultCurrency string
	Wallets         map[int64]*Wallet
	ByKey           map[MovementKey]*Posted
	Creations       map[string]*Wallet
	Holds           map[EntryKey]*Hold
	Reversals       map[EntryKey]*Reversal
	Entries         []Entry

	Short   map[int64]bool // wallets that lacked funds while some of theirs were held
	Expired int64          // holds
}

// NewPosting makes the posting of a batch of some operations. The caller adds the time, and the wallets with
// what the operations refer to, as they are in the database under the wallets' locks.
func NewPosting(scales map[string]int32, defaultCurrency string, operations int) *Posting {
	return &Posting{
		Scales:          scales,
		DefaultCurrency: defaultCurrency,
		Wallets:         make(map[int64]*Wallet, 2*operations),
		ByKey:           make(map[MovementKey]*Posted, operations),
		Creations:       make(map[string]*Wallet),
		Holds:           make(map[EntryKey]*Hold),
		Reversals:       make(map[EntryKey]*Reversal),
		Entries:         make([]Entry, 0, 2*operations),
		Short:           make(map[int64]bool),
	}
}

// MovementKey is an idempotency key in its scope, the initiating wallet.
type MovementKey struct {
	WalletID int64
	Key      string
}

// ErrLocked puts an operation off: one of its wallets is locked by another session or a stalled writer.
var ErrLocked = errors.New("the wallet is locked by somebody else")

// ErrBroken is a mistake of ours, found before it reached the database.
var ErrBroken = errors.New("assertion failed")

// Settle decides an operation. former is what the try before came to.
func (p *Posting) Settle(op *Operation, former Outcome) {
	op.Err, op.Replayed = nil, false
	op.Err = p.Decide(op)
	if op.Replayed && former.is(op) {
		op.Replayed = false // it was our own try that posted it, whose answer was lost
	}
}

// SettleEach decides operations in order, each by itself. What is put off puts off those behind it on its
// wallets, so that they stay in order: parked holds these wallets, and those of pieces before. A single
// operation needs none.
func (p *Posting) SettleEach(ops []*Operation, parked map[int64]bool) {
	for _, op := range ops {
		former := op.Forget()
		if parked[op.WalletID] || parked[op.ToID] {
			op.Err = ErrLocked
		} else {
			p.Settle(op, former)
		}
		if op.Err == ErrLocked && parked != nil {
			parked[op.WalletID] = true
			if op.ToID != 0 {
				parked[op.ToID] = true
			}
		}
	}
}

// PutOff are the operations that were put off.
func PutOff(ops []*Operation) []*Operation {
	return slices.DeleteFunc(slices.Clone(ops), func(op *Operation) bool { return op.Err != ErrLocked })
}

// SettleShort decides operations once more that were refused for lack of funds, each by itself.
func (p *Posting) SettleShort(ops []*Operation) {
	for _, op := range ops {
		if LacksFunds(op.Err) {
			p.Settle(op, Outcome{})
		}
	}
}

// LacksFunds says that an error is that refusal.
func LacksFunds(err error) bool {
	var no *Refusal
	return errors.As(err, &no) && no.Code == "insufficient_funds"
}

// SettleAll decides operations together, in order, each seeing those before it: all are posted, or none. An
// error is of operation number at. They are a replay where all their keys are known, and reused keys where
// only some are.
func (p *Posting) SettleAll(ops []*Operation) (at int, err error) {
	unknown, known := -1, 0
	for i, op := range ops {
		if _, ok := p.ByKey[MovementKey{op.WalletID, op.Key}]; ok {
			known++
		} else if unknown < 0 {
			unknown = i
		}
	}
	switch {
	case known > 0 && known < len(ops):
		return unknown, Refuse("idempotency_key_reused", "This key was used for another batch of "+
			"operations. Use a new key for a new batch.")
	case known == 0:
		for i, op := range ops {
			if p.busy(op) {
				return i, ErrLocked
			}
		}
	}
	first := p.Wallets[ops[0].WalletID]
	id, undo := EntryID(first.ID, first.Seq+1), p.remember(ops)
	for i, op := range ops {
		op.Note.BatchID, op.Note.BatchIndex, op.Note.BatchOf = id, i, len(ops)
		if p.Settle(op, op.Forget()); op.Err != nil {
			undo()
			return i, op.Err
		}
	}
	return 0, nil
}

// remember returns what undoes whatever deciding these operations, whose keys are unknown, does.
func (p *Posting) remember(ops []*Operation) (undo func()) {
	wallets, holds := make(map[int64]Wallet), make(map[EntryKey]Hold)
	reversals, entries := make(map[EntryKey]Reversal), len(p.Entries)
	for _, op := range ops {
		wallets[op.WalletID] = *p.Wallets[op.WalletID]
		if op.ToID != 0 {
			wallets[op.ToID] = *p.Wallets[op.ToID]
		}
		if op.Undoes != nil {
			k := EntryKey{op.Undoes.WalletID, op.Undoes.Seq}
			reversals[k] = *p.Reversals[k]
		} else if k := (EntryKey{op.WalletID, op.OfSeq}); p.Holds[k] != nil {
			holds[k] = *p.Holds[k]
		}
	}
	return func() {
		p.Entries = p.Entries[:entries]
		for id, w := range wallets {
			*p.Wallets[id] = w
		}
		for k, h := range holds {
			*p.Holds[k] = h
		}
		for k, r := range reversals {
			*p.Reversals[k] = r
		}
		for _, op := range ops {
			if op.Kind == KindHold && op.Posted.Seq != 0 && !op.Replayed {
				delete(p.Holds, EntryKey{op.Posted.WalletID, op.Posted.Seq})
			}
			if op.Posted.Seq != 0 && !op.Replayed {
				delete(p.ByKey, MovementKey{op.WalletID, op.Key})
			}
			op.Posted = Posted{}
		}
	}
}

// busy says whether somebody else holds the lock of one of the operation's wallets.
func (p *Posting) busy(op *Operation) bool {
	return p.Wallets[op.WalletID].Busy || op.ToID != 0 && p.Wallets[op.ToID].Busy
}

// Outcome is what a try of a batch came to for one operation.
type Outcome struct {
	posted  Posted
	created Wallet
}

// Forget clears what a former try came to, and returns it.
func (op *Operation) Forget() Outcome {
	former := Outcome{op.Posted, op.Created}
	op.Posted, op.Created = Posted{}, Wallet{}
	return former
}

// is says whether the ledger holds just what this try wanted to write: nobody else's has the same time as
// well.
func (o *Outcome) is(op *Operation) bool {
	if op.Kind == KindCreation {
		return o.created.ID == op.Created.ID && o.created.CreatedAt.Equal(op.Created.CreatedAt)
	}
	return o.posted.Seq == op.Posted.Seq && o.posted.CreatedAt.Equal(op.Posted.CreatedAt)
}

// Decide accepts or refuses one operation against the running balances, in arrival order. The key comes
// first: what was accepted once stays accepted, whatever the balance is now.
func (p *Posting) Decide(op *Operation) error {
	if op.Kind == KindCreation {
		return p.create(op)
	}
	if before, ok := p.ByKey[MovementKey{op.WalletID, op.Key}]; ok {
		if !before.answers(op) {
			return Refuse("idempotency_key_reused",
				"This key was used on wallet %d for another operation (transaction %s). Use a new key "+
					"for a new operation.",
				op.WalletID, EntryID(before.WalletID, before.Seq))
		}
		op.Posted, op.Replayed = *before, true
		return nil
	}
	if p.busy(op) {
		return ErrLocked
	}
	if err := op.Decide(p, op); err != nil {
		return err
	}
	accepted := op.Posted
	p.ByKey[MovementKey{op.WalletID, op.Key}] = &accepted
	return nil
}

// answers says whether a movement is what an operation with its key asks for.
func (m *Posted) answers(op *Operation) bool {
	d, amount := m.Says(), m.Amount.Abs()
	asked := op.Note
	asked.Client, asked.ExpiresAt, asked.BatchID = d.Note.Client, d.Note.ExpiresAt, d.Note.BatchID
	if m.Kind == KindHold {
		amount = d.HeldChange
		if !op.AnyExpiry && !m.CreatedAt.Add(op.ExpiresIn).Equal(d.Note.ExpiresAt) {
			return false
		}
	}
	return m.Kind == op.Kind && m.CounterpartyID == op.ToID && d.OfSeq == op.OfSeq && asked == d.Note &&
		(asked.All || amount.Equal(op.Amount.Decimal)) &&
		(op.Currency == "" || op.Currency == m.Currency)
}

// currency is the operation's, which its wallet must have. opens says that it may make the wallet.
func (p *Posting) currency(op *Operation, w *Wallet, opens bool) (string, error) {
	if w.Currency == "" && !opens {
		return "", NoWallet(w.ID)
	}
	currency := cmp.Or(op.Currency, w.Currency, p.DefaultCurrency)
	scale, known := p.Scales[currency]
	switch {
	case !known:
		return "", Refuse("currency_unknown",
			"Currency %q is not in the currency table. Use an ISO 4217 code such as \"USD\".", currency)
	case w.Currency != "" && w.Currency != currency:
		return "", Refuse("currency_mismatch",
			"Wallet %d is in %s, the request in %s. Use a wallet in the request's "+
				"currency.", w.ID, w.Currency, currency)
	case op.Amount.Decimals > scale:
		return "", Refuse("amount_scale",
			"The amount has %d decimals, %s has %d. Nothing is ever rounded: send the exact "+
				"amount.", op.Amount.Decimals, currency, scale)
	}
	return currency, nil
}

// lets refuses what the wallet's state does not let in or out.
func (w *Wallet) lets(in bool) error {
	switch {
	case w.State == StateClosed:
		return Refuse("wallet_closed", "Wallet %d is closed. Use another one.", w.ID)
	case w.State == StateFrozen:
		return Refuse("wallet_frozen",
			"Wallet %d is frozen: nothing goes in or out until an operator sets its "+
				"state to open.", w.ID)
	case w.State == StateNoOut && !in:
		return Refuse("wallet_frozen",
			"Wallet %d takes money in but lets none out until an operator sets its "+
				"state to open.", w.ID)
	}
	return nil
}

// spendable is the amount that the operation takes from what its wallet has available: all of it where it
// says so.
func (p *Posting) spendable(op *Operation, w *Wallet) (decimal.Decimal, error) {
	if err := w.lets(false); err != nil {
		return decimal.Decimal{}, err
	}
	amount, available := op.Amount.Decimal, w.Available()
	if op.Note.All && op.Undoes == nil {
		amount = available
	}
	if available.LessThan(amount) || amount.IsZero() {
		if !w.Held.IsZero() {
			p.Short[w.ID] = true
		}
		return amount, Refuse("insufficient_funds",
			"Wallet %d has %s available, less than the amount. Deposit first; the same key may then be used "+
				"again.", w.ID, money.Text(available))
	}
	return amount, nil
}

// takes refuses what a payee may not get.
func (w *Wallet) takes(amount decimal.Decimal, currency string, from *Wallet) error {
	if w.Currency != "" && w.Currency != currency {
		return Refuse("currency_mismatch",
			"Wallet %d is in %s, wallet %d in %s. A transfer stays in one "+
				"currency.", from.ID, from.Currency, w.ID, w.Currency)
	}
	if err := w.lets(true); err != nil {
		return err
	}
	if w.Balance.Add(amount).GreaterThanOrEqual(money.Limit) {
		return Refuse("balance_limit",
			"The balance of wallet %d would have more than %d digits before the "+
				"point.", w.ID, money.WholeDigitsMax)
	}
	return nil
}

// details of the operation's initiating entry, or nil where it says nothing.
func (op *Operation) details(d Details) *Details {
	d.Note = op.Note
	if d == nothingMore {
		return nil // as most; nothing is allocated for them
	}
	more := d
	more.NoteText = more.Note.json()
	return &more
}

// post makes the operation's initiating entry the next one of w.
func (p *Posting) post(op *Operation, w *Wallet, currency string, amount decimal.Decimal, d Details) {
	e := Entry{WalletID: w.ID, Kind: op.Kind, Currency: currency, Amount: amount, Key: op.Key,
		More: op.details(d), Traceparent: op.Traceparent}
	p.append(w, &e, Latest(p.Now, w.EntryAt))
	op.Posted.Entry = e
}

// transfer makes both entries of a movement from one wallet to another; to is what the payee's says.
func (p *Posting) transfer(op *Operation, from, to *Wallet, currency string, amount decimal.Decimal,
	d Details, payee *Details) {
	at := Latest(Latest(p.Now, from.EntryAt), to.EntryAt)
	first := Entry{WalletID: from.ID, CounterpartyID: to.ID, CounterpartySeq: to.Seq + 1, Kind: op.Kind,
		Currency: currency, Amount: amount.Neg(), Key: op.Key, More: op.details(d),
		Traceparent: op.Traceparent}
	second := Entry{WalletID: to.ID, CounterpartyID: from.ID, CounterpartySeq: from.Seq + 1,
		Kind: KindTransferIn, Currency: currency, Amount: amount, Key: op.Key, Traceparent: op.Traceparent}
	said := Note{Reference: op.Note.Reference, Metadata: op.Note.Metadata, BatchID: op.Note.BatchID,
		BatchIndex: op.Note.BatchIndex, BatchOf: op.Note.BatchOf}
	if payee != nil || said != (Note{}) {
		second.More = cmp.Or(payee, new(Details))
		second.More.Note, second.More.NoteText = said, said.json()
	}
	p.append(from, &first, at)
	p.append(to, &second, at)
	op.Posted.Entry, op.Posted.ToBalance, op.Posted.ToHeld = first, second.Balance, to.Held
}

// DecideDeposit adds to a wallet, and opens it where it is not there.
func DecideDeposit(p *Posting, op *Operation) error {
	w := p.Wallets[op.WalletID]
	currency, err := p.currency(op, w, true)
	if err == nil {
		err = w.takes(op.Amount.Decimal, currency, w)
	}
	if err != nil {
		return err
	}
	p.post(op, w, currency, op.Amount.Decimal, Details{})
	return nil
}

// spends is what an operation takes from its wallet, which exists, has the currency, and has that available.
func (p *Posting) spends(op *Operation) (w *Wallet, currency string, amount decimal.Decimal, err error) {
	w = p.Wallets[op.WalletID]
	if currency, err = p.currency(op, w, false); err == nil {
		amount, err = p.spendable(op, w)
	}
	return w, currency, amount, err
}

// DecideWithdrawal takes from what a wallet has available.
func DecideWithdrawal(p *Posting, op *Operation) error {
	w, currency, amount, err := p.spends(op)
	if err != nil {
		return err
	}
	p.post(op, w, currency, amount.Neg(), Details{})
	return nil
}

// DecideTransfer takes from what one wallet has available, and gives it to another.
func DecideTransfer(p *Posting, op *Operation) error {
	to := p.Wallets[op.ToID]
	from, currency, amount, err := p.spends(op)
	if err == nil {
		err = to.takes(amount, currency, from)
	}
	if err != nil {
		return err
	}
	p.transfer(op, from, to, currency, amount, Details{}, nil)
	return nil
}

// DecideHold reserves a part of what a wallet has available.
func DecideHold(p *Posting, op *Operation) error {
	w, currency, amount, err := p.spends(op)
	if err != nil {
		return err
	}
	op.Note.ExpiresAt = Latest(p.Now, w.EntryAt).Add(op.ExpiresIn)
	p.post(op, w, currency, decimal.Decimal{}, Details{HeldChange: amount, Remaining: amount})
	p.Holds[EntryKey{w.ID, w.Seq}] = &Hold{WalletID: w.ID, Seq: w.Seq, ToID: op.Note.ToID, Amount: amount,
		Remaining: amount, Status: HoldOpen, ExpiresAt: op.Note.ExpiresAt, LastSeq: w.Seq, Changed: true}
	return nil
}

// open finds the operation's hold, which must be open at that time.
func (p *Posting) open(op *Operation, at time.Time) (*Hold, error) {
	h := p.Holds[EntryKey{op.WalletID, op.OfSeq}]
	switch {
	case h == nil:
		return nil, NoHold(op.WalletID, op.OfSeq)
	case h.Status == HoldExpired || h.Status == HoldOpen && !at.Before(h.ExpiresAt):
		return h, Refuse("hold_expired", "Hold %s expired at %s. Place a new one.",
			EntryID(h.WalletID, h.Seq), h.ExpiresAt.UTC().Format(jsontext.TimeFormat))
	case h.Status != HoldOpen:
		return h, Refuse("hold_closed", "Hold %s was %s. Place a new one.",
			EntryID(h.WalletID, h.Seq), h.Status)
	}
	return h, nil
}

// DecideCapture never lacks funds: what is held is there. It takes what the hold's state, or the payee, lets.
func DecideCapture(p *Posting, op *Operation) error {
	from := p.Wallets[op.WalletID]
	at := Latest(p.Now, from.EntryAt)
	to := p.Wallets[op.ToID] // nil: the money leaves the ledger
	if to != nil {
		at = Latest(at, to.EntryAt)
	}
	h, err := p.open(op, at)
	if err != nil {
		return err
	}
	if h.ToID != 0 && h.ToID != op.ToID {
		return Refuse("payee_mismatch", "Hold %s is for wallet %d. Leave \"to_id\" out, or name that wallet.",
			EntryID(h.WalletID, h.Seq), h.ToID)
	}
	currency, err := p.currency(op, from, false)
	if err != nil {
		return err
	}
	amount := op.Amount.Decimal
	if op.Note.All {
		amount = h.Remaining
	}
	if amount.GreaterThan(h.Remaining) {
		return Refuse("hold_exceeded", "Of hold %s there remains %s. Capture no more than that.",
			EntryID(h.WalletID, h.Seq), money.Text(h.Remaining))
	}
	if from.State != StateNoOut { // which lets go what was held before
		err = from.lets(false)
	}
	if err == nil && to != nil {
		err = to.takes(amount, currency, from)
	}
	if err != nil {
		return err
	}
	d := Details{OfSeq: h.Seq, HeldChange: h.Remaining.Neg()}
	if op.Note.Partial {
		d.HeldChange, d.Remaining = amount.Neg(), h.Remaining.Sub(amount)
	}
	if to != nil {
		p.transfer(op, from, to, currency, amount, d, nil)
	} else {
		p.post(op, from, currency, amount.Neg(), d)
	}
	op.Posted.Of = EntryID(h.WalletID, h.Seq)
	h.Captured, h.Remaining, h.LastSeq, h.Changed = h.Captured.Add(amount), d.Remaining, from.Seq, true
	if h.Remaining.IsZero() {
		h.Status = HoldCaptured
	}
	return nil
}

// Reasons of a release.
const (
	ReasonVoid   = "void"
	ReasonExpiry = "expiry"
)

// ErrNotDue ends an expiry's operation that has nothing to do (any more, or yet).
var ErrNotDue = errors.New("the hold is not due")

// ExpiryOf is the operation that ends a hold when it is due. Its key is one that no client can send, since it
// is not ASCII: whoever comes first, this happens once.
func ExpiryOf(walletID, seq int64) *Operation {
	return &Operation{Kind: KindRelease, Decide: decideExpiry, WalletID: walletID, OfSeq: seq,
		Key: "«expiry " + strconv.FormatInt(seq, 10) + "»", Note: Note{Reason: ReasonExpiry}}
}

// DecideVoid ends an open hold before it is due.
func DecideVoid(p *Posting, op *Operation) error {
	h, err := p.open(op, Latest(p.Now, p.Wallets[op.WalletID].EntryAt))
	if err != nil {
		return err
	}
	p.release(op, h, HoldVoided)
	return nil
}

// decideExpiry is by the clock, whoever asks: due is what can no longer be captured.
func decideExpiry(p *Posting, op *Operation) error {
	h, err := p.open(op, Latest(p.Now, p.Wallets[op.WalletID].EntryAt))
	if err == nil || h == nil || h.Status != HoldOpen {
		return ErrNotDue
	}
	p.release(op, h, HoldExpired)
	p.Expired++
	return nil
}

// release gives back what remains of a hold, which ends it.
func (p *Posting) release(op *Operation, h *Hold, status string) {
	w := p.Wallets[h.WalletID]
	p.post(op, w, w.Currency, decimal.Decimal{}, Details{OfSeq: h.Seq, HeldChange: h.Remaining.Neg()})
	op.Posted.Of = EntryID(h.WalletID, h.Seq)
	h.Remaining, h.Status, h.LastSeq, h.Changed = decimal.Decimal{}, status, w.Seq, true
}

// Undo makes op the reversal of a transaction. Its wallet is the one that pays now.
func (op *Operation) Undo(m *Posted) error {
	op.Undoes, op.WalletID, op.OfSeq = m, m.WalletID, m.Seq
	switch {
	case m.reverses():
		return Refuse("not_reversible", "Transaction %s is itself a reversal: post a new movement instead.",
			EntryID(m.WalletID, m.Seq))
	case m.Kind == KindDeposit:
		op.Kind = KindWithdrawal
	case m.Kind == KindWithdrawal:
		op.Kind = KindDeposit
	case m.Kind == KindTransferOut:
		op.Kind, op.ToID = KindTransferOut, m.WalletID
		op.WalletID, op.OfSeq = m.CounterpartyID, m.CounterpartySeq
	default:
		return Refuse("not_reversible", "Transaction %s moved no money: a hold is voided, a state set again.",
			EntryID(m.WalletID, m.Seq))
	}
	return nil
}

// DecideReversal posts the opposite movement of a transaction, or of a part of it.
func DecideReversal(p *Posting, op *Operation) error {
	was := op.Undoes
	r := p.Reversals[EntryKey{was.WalletID, was.Seq}]
	left := r.Amount.Sub(r.Reversed)
	amount := op.Amount.Decimal
	if op.Note.All {
		amount = left
	}
	w := p.Wallets[op.WalletID]
	currency, err := p.currency(op, w, false)
	if err != nil {
		return err
	}
	if amount.GreaterThan(left) || left.IsZero() {
		return Refuse("reversal_exceeds",
			"Of transaction %s there is %s left to reverse. Reverse no more than "+
				"that.", EntryID(was.WalletID, was.Seq), money.Text(left))
	}
	d := Details{OfSeq: op.OfSeq, Remaining: left.Sub(amount)}
	pay := *op
	pay.Amount.Decimal = amount
	switch op.Kind {
	case KindDeposit: // of a withdrawal: it comes back
		if err := w.takes(amount, currency, w); err != nil {
			return err
		}
		p.post(op, w, currency, amount, d)
	case KindWithdrawal: // of a deposit
		if _, err := p.spendable(&pay, w); err != nil {
			return err
		}
		p.post(op, w, currency, amount.Neg(), d)
	case KindTransferOut: // from who was paid to who paid
		to := p.Wallets[op.ToID]
		_, err := p.spendable(&pay, w)
		if err == nil {
			err = to.takes(amount, currency, w)
		}
		if err != nil {
			return err
		}
		p.transfer(op, w, to, currency, amount, d, &Details{OfSeq: was.Seq, Remaining: d.Remaining})
	}
	op.Posted.Of = EntryID(was.WalletID, was.Seq)
	r.Reversed, r.Changed = r.Reversed.Add(amount), true
	return nil
}

// DecideState sets what a wallet lets in and out. A closed one stays so, and was empty.
func DecideState(p *Posting, op *Operation) error {
	w := p.Wallets[op.WalletID]
	switch {
	case w.Currency == "":
		return NoWallet(w.ID)
	case w.State == StateClosed:
		return w.lets(false)
	case op.Note.State == StateClosed && !w.Balance.IsZero():
		return Refuse("wallet_not_empty", "Wallet %d has a balance of %s, %s of it held. Empty it first: "+
			"\"amount\":\"all\" withdraws or transfers what is available.", w.ID, money.Text(w.Balance),
			money.Text(w.Held))
	}
	p.post(op, w, w.Currency, decimal.Decimal{}, Details{})
	w.State, w.StateSeq, w.HeadChanged = op.Note.State, w.Seq, true
	return nil
}

// append makes e the wallet's next entry.
func (p *Posting) append(w *Wallet, e *Entry, at time.Time) {
	if w.Currency == "" {
		w.Currency, w.CreatedAt = e.Currency, at
	}
	w.Seq++
	w.Balance = w.Balance.Add(e.Amount)
	w.EntryAt = at
	w.Changed = true
	if e.More != nil && !e.More.HeldChange.IsZero() {
		w.Held, w.HeadChanged = w.Held.Add(e.More.HeldChange), true
	}
	if !w.Held.IsZero() {
		if e.More == nil {
			e.More = new(Details)
		}
		e.More.Held = w.Held
	}
	e.Seq, e.Balance, e.CreatedAt = w.Seq, w.Balance, at
	p.Entries = append(p.Entries, *e)
}

func (p *Posting) create(op *Operation) error {
	currency := cmp.Or(op.Currency, p.DefaultCurrency)
	if before, ok := p.Creations[op.Key]; ok {
		if before.Currency != currency || !op.IDChosen && op.WalletID != before.ID {
			return Refuse("idempotency_key_reused",
				"This key was used to create wallet %d in %s. Use a new key for a new "+
					"wallet.", before.ID, before.Currency)
		}
		op.Created, op.Replayed = Wallet{ID: before.ID, Currency: before.Currency,
			CreatedAt: before.CreatedAt}, true
		return nil
	}
	w := p.Wallets[op.WalletID]
	if w.Busy {
		return ErrLocked
	}
	if _, known := p.Scales[currency]; !known {
		return Refuse("currency_unknown",
			"Currency %q is not in the currency table. Use an ISO 4217 code such as \"USD\".", currency)
	}
	if w.Currency != "" {
		return Refuse("wallet_exists", "Wallet %d exists already, in %s.", w.ID, w.Currency)
	}
	w.Currency, w.CreatedAt, w.CreationKey, w.Changed = currency, p.Now, op.Key, true
	op.Created = *w
	p.Creations[op.Key] = &op.Created
	return nil
}

// Check catches our own mistakes before they reach the database: money of a batch's transfers sums to zero,
// and each changed wallet stands where its last entry says. The operation at fault ends alone, in a 500 and
// a log line, rather than the process.
func (p *Posting) Check() error {
	var transferred decimal.Decimal
	for i := range p.Entries {
		e, w := &p.Entries[i], p.Wallets[p.Entries[i].WalletID]
		if e.CounterpartyID != 0 {
			transferred = transferred.Add(e.Amount)
		}
		if e.Balance.IsNegative() || e.Seq > w.Seq || e.Seq == w.Seq && !e.Balance.Equal(w.Balance) ||
			e.More != nil && (e.More.Held.IsNegative() || e.More.Held.GreaterThan(e.Balance)) {
			return fmt.Errorf("%w: entry %s does not fit its wallet", ErrBroken, EntryID(e.WalletID, e.Seq))
		}
	}
	if !transferred.IsZero() {
		return fmt.Errorf("%w: the transfers of a batch sum to %s", ErrBroken, transferred)
	}
	return nil
}
