package book

import (
	"slices"
	"strings"
	"time"

	"wallet/internal/jsontext"
)

// ShownHold is a hold and what its entry says of it.
type ShownHold struct {
	Hold
	Currency  string
	CreatedAt time.Time
	Note      Note
}

// AppendReceipt appends a movement as a JSON object that still lacks its closing brace. It is a pure function
// of the ledger, so that a replay is equal byte for byte. Each kind of entry is shown by one function.
func AppendReceipt(dst []byte, m *Posted) []byte {
	o := jsontext.Open(slices.Grow(dst, 320))
	shows[m.Kind](&o, m)
	d := m.Says()
	if m.captures() {
		o.Text("hold_id", m.Of)
		o.Number("remaining", d.Remaining)
		o.Number("held", d.Held)
	} else if m.reverses() {
		o.Text("reverses", m.Of)
		o.Number("reversible", d.Remaining)
	}
	appendWords(&o, &d.Note)
	return o.Dst
}

// words are what a movement says in words, where it does.
func appendWords(o *jsontext.Object, n *Note) {
	if n.Reference != "" {
		o.Text("reference", n.Reference)
	}
	if n.Metadata != "" {
		o.Name("metadata")
		o.Dst = append(o.Dst, n.Metadata...)
	}
}

var shows = map[string]func(*jsontext.Object, *Posted){
	KindDeposit: showOne, KindWithdrawal: showOne, KindTransferOut: showTransfer, KindHold: showHold,
	KindRelease: showRelease, KindState: showState,
}

func appendTransactionID(o *jsontext.Object, m *Posted) {
	o.Text("transaction_id", EntryID(m.WalletID, m.Seq))
}

// showOne is a movement of one wallet.
func showOne(o *jsontext.Object, m *Posted) {
	appendTransactionID(o, m)
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Number("amount", m.Amount.Abs())
	o.Number("balance", m.Balance)
	o.Integer("seq", m.Seq)
	o.Time("created_at", m.CreatedAt)
}

func showTransfer(o *jsontext.Object, m *Posted) {
	appendTransactionID(o, m)
	o.Integer("from_id", m.WalletID)
	o.Integer("to_id", m.CounterpartyID)
	o.Text("currency", m.Currency)
	o.Number("amount", m.Amount.Abs())
	o.Number("from_balance", m.Balance)
	o.Number("to_balance", m.ToBalance)
	o.Integer("from_seq", m.Seq)
	o.Integer("to_seq", m.CounterpartySeq)
	o.Time("created_at", m.CreatedAt)
}

// head is the wallet's, after the entry.
func appendHead(o *jsontext.Object, m *Posted) {
	held := m.Says().Held
	o.Number("balance", m.Balance)
	o.Number("held", held)
	o.Number("available", m.Balance.Sub(held))
	o.Integer("seq", m.Seq)
	o.Time("created_at", m.CreatedAt)
}

func showHold(o *jsontext.Object, m *Posted) {
	d := m.Says()
	o.Text("hold_id", EntryID(m.WalletID, m.Seq))
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Number("amount", d.HeldChange)
	o.Number("remaining", d.Remaining)
	o.Text("status", HoldOpen)
	o.Time("expires_at", d.Note.ExpiresAt)
	if d.Note.ToID != 0 {
		o.Integer("to_id", d.Note.ToID)
	}
	appendHead(o, m)
}

func showRelease(o *jsontext.Object, m *Posted) {
	d := m.Says()
	status := HoldVoided
	if d.Note.Reason == ReasonExpiry {
		status = HoldExpired
	}
	o.Text("hold_id", m.Of)
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Number("released", d.HeldChange.Neg())
	o.Number("remaining", d.Remaining)
	o.Text("status", status)
	appendHead(o, m)
}

func showState(o *jsontext.Object, m *Posted) {
	d := m.Says()
	appendTransactionID(o, m)
	o.Integer("wallet_id", m.WalletID)
	o.Text("currency", m.Currency)
	o.Text("state", d.Note.State)
	if d.Note.Text != "" {
		o.Text("note", d.Note.Text)
	}
	appendHead(o, m)
}

// AppendTransaction appends a movement as who asks for it later sees it.
func AppendTransaction(dst []byte, m *Posted) []byte {
	o := jsontext.Object{Dst: AppendReceipt(dst, m)}
	o.Text("kind", strings.TrimSuffix(m.Kind, "_out")) // the transaction is a transfer
	o.Text("idempotency_key", m.Key)
	if !m.Reversed.IsZero() {
		o.Number("reversed", m.Reversed)
	}
	return append(o.Dst, '}')
}

// AppendHold appends a hold as it stands now.
func AppendHold(dst []byte, h *ShownHold) []byte {
	o := jsontext.Open(dst)
	o.Text("hold_id", EntryID(h.WalletID, h.Seq))
	o.Integer("wallet_id", h.WalletID)
	o.Text("currency", h.Currency)
	o.Number("amount", h.Amount)
	o.Number("captured", h.Captured)
	o.Number("remaining", h.Remaining)
	o.Text("status", h.Status)
	o.Time("expires_at", h.ExpiresAt)
	if h.ToID != 0 {
		o.Integer("to_id", h.ToID)
	}
	o.Time("created_at", h.CreatedAt)
	appendWords(&o, &h.Note)
	return append(o.Dst, '}')
}

// AppendWallet appends a wallet as it stands.
func AppendWallet(dst []byte, w *Wallet) []byte {
	o := jsontext.Open(dst)
	o.Integer("wallet_id", w.ID)
	o.Text("currency", w.Currency)
	o.Number("balance", w.Balance)
	if !w.Held.IsZero() {
		o.Number("held", w.Held)
		o.Number("available", w.Available())
	}
	o.Integer("seq", w.Seq)
	if w.State != "" {
		o.Text("state", w.State)
	}
	o.Time("created_at", w.CreatedAt)
	return append(o.Dst, '}')
}
