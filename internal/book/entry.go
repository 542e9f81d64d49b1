package book

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/jsontext"
)

// Entry is one signed leg of a movement of money: entry number Seq of wallet WalletID.
type Entry struct {
	WalletID, Seq                   int64
	CounterpartyID, CounterpartySeq int64 // the other leg of a transfer; else 0
	Kind                            string
	Currency                        string
	Amount                          decimal.Decimal // negative leaves the wallet
	Balance                         decimal.Decimal // after this entry
	Key                             string          // idempotency key
	CreatedAt                       time.Time       // whole microseconds; never decreases with Seq
	More                            *Details        // nil where it says nothing more

	Traceparent string // of the request, for the event; not stored in the ledger
}

// Details are what an entry says besides. A capture is a withdrawal or transfer_out that gives back some of
// what is held, a reversal the opposite movement; each leg names the entry of its own wallet that it is of.
type Details struct {
	OfSeq      int64           // the same wallet's entry that this one captures, releases or undoes; else 0
	HeldChange decimal.Decimal // positive: reserved; negative: given back
	Held       decimal.Decimal // after this entry
	Remaining  decimal.Decimal // of the hold, or to undo; where OfSeq is not 0, and of a hold
	Note       Note
	NoteText   string // Note as its entry has it
}

var nothingMore Details

// Says is what the entry says besides.
func (e *Entry) Says() *Details {
	if e.More == nil {
		return &nothingMore
	}
	return e.More
}

// captures tells a capture of a hold.
func (e *Entry) captures() bool { return e.Kind != KindRelease && e.Says().HeldChange.IsNegative() }

// reverses tells a leg that undoes another movement.
func (e *Entry) reverses() bool { return e.Says().OfSeq != 0 && e.Says().HeldChange.IsZero() }

// AppendTransactionID appends the public id of the transaction that the entry belongs to: its initiating
// entry's.
func (e *Entry) AppendTransactionID(dst []byte) []byte {
	if e.Kind == KindTransferIn {
		return AppendEntryID(dst, e.CounterpartyID, e.CounterpartySeq)
	}
	return AppendEntryID(dst, e.WalletID, e.Seq)
}

// Posted is a movement as it stands in the ledger: its initiating entry and, of a transfer, the payee's head
// after it.
type Posted struct {
	Entry
	ToBalance, ToHeld decimal.Decimal
	Of                string          // the transaction whose entry Says().OfSeq is, or empty
	Reversed          decimal.Decimal // of this transaction, by now; read by transactions only
}

// What to say of ids that are none.
var (
	ErrTransactionID = Refuse("transaction_id_malformed",
		"A transaction id is <wallet_id>-<seq>, such as 1-1.")
	ErrHoldID = Refuse("hold_id_malformed", "A hold id is <wallet_id>-<seq>, such as 1-1.")
)

// ParseEntryID reads the id of a transaction or a hold; malformed is what to say where it is none.
func ParseEntryID(s string, malformed *Refusal) (walletID, seq int64, err error) {
	wallet, number, _ := strings.Cut(s, "-")
	walletID, err = ParseWalletID(wallet)
	seq, seqErr := ParseWalletID(number) // the same form
	if err != nil || seqErr != nil {
		return 0, 0, malformed
	}
	return walletID, seq, nil
}

// EntryID is an entry's public id, "<wallet_id>-<seq>": the event's id, and for an initiating entry the
// transaction's.
func EntryID(walletID, seq int64) string {
	return string(AppendEntryID(nil, walletID, seq))
}

// AppendEntryID appends an entry's public id.
func AppendEntryID(dst []byte, walletID, seq int64) []byte {
	dst = strconv.AppendInt(dst, walletID, 10)
	dst = append(dst, '-')
	return strconv.AppendInt(dst, seq, 10)
}

// Note is what an entry says in words. The ledger stores its JSON object as text, and the event has the same
// members, byte for byte, after its idempotency key. Each is there only where it says something.
type Note struct {
	ToID      int64     // of a hold: who will be paid
	ExpiresAt time.Time // of a hold
	Reason    string    // of a release: void or expiry
	State     string    // that a wallet takes on
	Text      string    // why it does
	All       bool      // all that there was: the request named no amount
	Partial   bool      // of a capture: the hold stays open for what remains
	Reference string
	Metadata  string // a JSON object of strings, its members in order
	Client    string // the API key's name; in a transaction's initiating entry only

	// Of what was posted together with others: the first one's transaction, its place from 0, and how many.
	BatchID             string
	BatchIndex, BatchOf int
}

// json is the note as an object, or empty where it says nothing.
func (n *Note) json() string {
	if *n == (Note{}) {
		return ""
	}
	dst := make([]byte, 0, 128)
	member := func(name string) { dst = append(append(append(dst, `,"`...), name...), `":`...) }
	text := func(name, value string) {
		if value != "" {
			member(name)
			dst = jsontext.AppendText(dst, value)
		}
	}
	flag := func(name string, is bool) {
		if is {
			member(name)
			dst = append(dst, "true"...)
		}
	}
	if n.ToID != 0 {
		member("to_id")
		dst = strconv.AppendInt(dst, n.ToID, 10)
	}
	if !n.ExpiresAt.IsZero() {
		text("expires_at", n.ExpiresAt.UTC().Format(jsontext.TimeFormat))
	}
	text("reason", n.Reason)
	text("state", n.State)
	text("note", n.Text)
	flag("all", n.All)
	flag("partial", n.Partial)
	text("reference", n.Reference)
	if n.Metadata != "" {
		member("metadata")
		dst = append(dst, n.Metadata...)
	}
	if n.BatchOf != 0 {
		member("batch")
		dst = append(append(append(dst, `{"id":"`...), n.BatchID...), `","index":`...)
		dst = append(strconv.AppendInt(dst, int64(n.BatchIndex), 10), `,"of":`...)
		dst = append(strconv.AppendInt(dst, int64(n.BatchOf), 10), '}')
	}
	text("client", n.Client)
	dst[0] = '{'
	return string(append(dst, '}'))
}

// ParseNote reads what json wrote.
func ParseNote(text string) (n Note, err error) {
	if text == "" {
		return n, nil
	}
	var members struct {
		ToID      int64           `json:"to_id"`
		ExpiresAt time.Time       `json:"expires_at"`
		Reason    string          `json:"reason"`
		State     string          `json:"state"`
		Text      string          `json:"note"`
		All       bool            `json:"all"`
		Partial   bool            `json:"partial"`
		Reference string          `json:"reference"`
		Metadata  json.RawMessage `json:"metadata"`
		Batch     struct {
			ID    string `json:"id"`
			Index int    `json:"index"`
			Of    int    `json:"of"`
		} `json:"batch"`
		Client string `json:"client"`
	}
	if err := json.Unmarshal([]byte(text), &members); err != nil {
		return n, fmt.Errorf("note of an entry: %w", err)
	}
	m := &members
	return Note{m.ToID, m.ExpiresAt, m.Reason, m.State, m.Text, m.All, m.Partial, m.Reference,
		string(m.Metadata), m.Client, m.Batch.ID, m.Batch.Index, m.Batch.Of}, nil
}
