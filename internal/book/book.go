// Package book is the bookkeeping: what a wallet, an entry and a hold are, what money may do, and what is
// told of it. It touches nothing: no database, no network, no clock. The same wallets, operations and time
// give the same entries, events and answers, byte for byte, so that each can be made again from the ledger.
//
// book.go has the words, decide.go the rules, entry.go what an entry says, event.go its event, answer.go
// what the API shows, chain.go the proof that a wallet's entries follow from each other.
//
// A new kind of movement is a row of movements (wallet.go), a function that decides (decide.go), and one
// that shows it (answer.go). JSON names are a contract: history's items carry those of the event.
package book

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/money"
)

// Kinds of entries, as entry_kind in schema.sql spells them. A transfer's operation has KindTransferOut and
// writes both.
const (
	KindDeposit     = "deposit"
	KindWithdrawal  = "withdrawal"
	KindTransferOut = "transfer_out"
	KindTransferIn  = "transfer_in"
	KindHold        = "hold"     // reserves; moves nothing
	KindRelease     = "release"  // of what remains of a hold
	KindState       = "state"    // of the wallet
	KindCreation    = "creation" // of a wallet: an operation, never an entry
)

// Wallet is the head of a wallet's chain of entries.
type Wallet struct {
	ID        int64
	Currency  string
	Balance   decimal.Decimal
	Held      decimal.Decimal // of the balance, by open holds
	State     string          // one of those below; empty before it is set for the first time
	StateSeq  int64           // the entry that set it
	Seq       int64           // of the last entry; 0 before the first
	EntryAt   time.Time       // the last entry's; zero before the first
	CreatedAt time.Time

	CreationKey string
	Exists      bool // in the database
	Busy        bool // it exists, but somebody else holds its lock
	Changed     bool // by this batch
	HeadChanged bool // by this batch: held or state
}

// States of a wallet.
const (
	StateOpen   = "open"
	StateNoOut  = "no_out" // nothing more is spent or held; what is held can be captured
	StateFrozen = "frozen" // nothing but releases
	StateClosed = "closed" // empty, for ever
)

// WalletStates are the states that can be set.
var WalletStates = []string{StateOpen, StateNoOut, StateFrozen, StateClosed}

// Available is what may be spent or held.
func (w *Wallet) Available() decimal.Decimal {
	if w.Held.IsZero() {
		return w.Balance
	}
	return w.Balance.Sub(w.Held)
}

// Hold is where a hold stands: entry number Seq of wallet WalletID placed it.
type Hold struct {
	WalletID, Seq, ToID         int64 // ToID: who will be paid; 0 where that was not said
	Amount, Captured, Remaining decimal.Decimal
	Status                      string // one of those below
	ExpiresAt                   time.Time

	LastSeq int64 // of the last entry about it
	Exists  bool  // in the database
	Changed bool  // by this batch
}

// Statuses of a hold.
const (
	HoldOpen     = "open"
	HoldCaptured = "captured"
	HoldVoided   = "voided"
	HoldExpired  = "expired"
)

// HoldStatuses are the statuses that can be asked for.
var HoldStatuses = []string{HoldOpen, HoldCaptured, HoldVoided, HoldExpired}

// Reversal is how much of a transaction has been undone.
type Reversal struct {
	Amount, Reversed decimal.Decimal
	Changed          bool // by this batch
}

// EntryKey names an entry.
type EntryKey struct{ WalletID, Seq int64 }

// Operation is what a request wants done, and then what came of it.
type Operation struct {
	Kind        string // of the entry that it will make
	Decide      func(*Posting, *Operation) error
	WalletID    int64 // the initiating wallet; of a creation, the id given or chosen
	ToID        int64 // of a transfer
	IDChosen    bool  // by us, of a creation
	Amount      money.Amount
	Currency    string // as named by the request; may be empty
	Key         string
	Traceparent string
	OfSeq       int64         // the entry of WalletID that it captures, releases or undoes
	Undoes      *Posted       // of a reversal: the transaction
	ExpiresIn   time.Duration // of a hold
	AnyExpiry   bool          // of a hold: the request named none
	Note        Note          // what its entry will say, as far as the request does

	Posted   Posted // of a movement
	Created  Wallet // of a creation
	Replayed bool   // the key had been posted before: what is answered is what was answered then
	Err      error  // a *Refusal, or a fault of the database
}

// Refusal is an operation's or a request's clear no: a stable code, and a sentence that says what to do.
// The codes and their HTTP statuses stand in one table in main.go.
type Refusal struct{ Code, detail string }

func (r *Refusal) Error() string { return r.Code + ": " + r.detail }

// Refusal makes the ledger's refusals answers of the API.
func (r *Refusal) Refusal() (code, detail string) { return r.Code, r.detail }

// Refuse makes a refusal: a code of the table, and a sentence that says what to do.
func Refuse(code, format string, args ...any) *Refusal {
	return &Refusal{code, fmt.Sprintf(format, args...)}
}

// NoWallet refuses what names a wallet that is not there.
func NoWallet(id int64) *Refusal {
	return Refuse("wallet_not_found", "Wallet %d does not exist. A deposit creates it.", id)
}

// NoHold refuses what names a hold that is not there.
func NoHold(walletID, seq int64) *Refusal {
	return Refuse("hold_not_found", "There is no hold %s.", EntryID(walletID, seq))
}

// Bounds of keys and ids.
const (
	KeyLenMax       = 255
	WalletIDAutoMax = 1<<53 - 1 // of ids chosen by us: exact in a JavaScript number
)

// ParseKey checks an idempotency key: 1-255 printable ASCII characters.
func ParseKey(s string) (string, error) {
	if len(s) == 0 || len(s) > KeyLenMax {
		return "", Refuse("idempotency_key_malformed", "An idempotency key has 1 to %d characters.",
			KeyLenMax)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return "", Refuse("idempotency_key_malformed",
				"An idempotency key has printable ASCII characters only.")
		}
	}
	return s, nil
}

// ParseWalletID reads 1..2^63-1 in its one decimal form.
func ParseWalletID(s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id < 1 || strconv.FormatInt(id, 10) != s {
		return 0, Refuse("wallet_id_malformed", "A wallet id is a whole number from 1 to %d.", math.MaxInt64)
	}
	return id, nil
}

// Latest is the later of two times.
func Latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}
