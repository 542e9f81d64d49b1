// What is kept, and the proof of a wallet's chain of events.

package main

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/shopspring/decimal" // money is never a float
)

// schema is the projection, and the position in the topic that it is of. Amounts are text, which SQLite does
// not round. In remains is what remains of a hold, or of an entry that was undone in part, by its seq.
const schema = `
CREATE TABLE IF NOT EXISTS wallet (id INTEGER PRIMARY KEY, currency TEXT, seq INTEGER, balance TEXT,
    held TEXT, state TEXT);
CREATE TABLE IF NOT EXISTS remains (wallet INTEGER, seq INTEGER, amount TEXT, PRIMARY KEY (wallet, seq));
CREATE TABLE IF NOT EXISTS position (partition INTEGER PRIMARY KEY, next INTEGER, events INTEGER)`

const (
	beginOrGoOn = `INSERT INTO position VALUES (?, 0, 0) ON CONFLICT DO UPDATE SET next = next RETURNING next`
	// move refuses to go back: then another process was here.
	move = `UPDATE position SET next = ?1 + 1, events = events + ?2 WHERE partition = ?3 AND next <= ?1`

	readWallet  = `SELECT seq, balance, held, state FROM wallet WHERE id = ?`
	readRemains = `SELECT amount FROM remains WHERE wallet = ? AND seq = ?`
	putWallet   = `REPLACE INTO wallet VALUES (?, ?, ?, ?, ?, ?)`
	putRemains  = `REPLACE INTO remains VALUES (?, ?, ?)`
)

// broken is what is wrong with a chain.
type broken string

func (b broken) Error() string { return string(b) }

// apply proves that the event is its wallet's next one, and makes it the wallet's head. A kind that it does
// not know is applied as well: balances are right for each.
func apply(tx *sql.Tx, value []byte) error {
	var e struct { // members that are not here are ignored; amounts that an event lacks are zero
		Wallet        int64           `json:"wallet_id"`
		Seq           int64           `json:"seq"`
		Kind          string          `json:"kind"`
		Currency      string          `json:"currency"`
		Amount        decimal.Decimal `json:"amount"`
		BalanceBefore decimal.Decimal `json:"balance_before"`
		Balance       decimal.Decimal `json:"balance_after"`
		HeldBefore    decimal.Decimal `json:"held_before"`
		Held          decimal.Decimal `json:"held_after"`
		OfSeq         int64           `json:"of_seq"`
		Remaining     decimal.Decimal `json:"remaining"`
		State         string          `json:"state"`
	}
	if err := json.Unmarshal(value, &e); err != nil {
		return err
	}
	var seq int64
	var balance, held, left decimal.Decimal
	var state string
	err := tx.QueryRow(readWallet, e.Wallet).Scan(&seq, &balance, &held, &state)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	err = tx.QueryRow(readRemains, e.Wallet, e.OfSeq).Scan(&left)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	known := err == nil
	taken, freed := e.Amount.Abs(), held.Sub(e.Held)
	gives := freed.IsPositive() // a capture or a release
	spends := e.Kind == "hold" || e.Amount.IsNegative() && !gives
	switch {
	case e.Seq != seq+1:
		return broken(fmt.Sprintf("the wallet's last event was number %d", seq))
	case !e.BalanceBefore.Equal(balance) || !e.HeldBefore.Equal(held):
		return broken(fmt.Sprintf("the wallet had %s, %s of it held", balance, held))
	case !e.Balance.Equal(balance.Add(e.Amount)), e.Held.IsNegative(), e.Held.GreaterThan(e.Balance):
		return broken("it does not add up")
	case state == "closed", state == "frozen" && e.Kind != "release" && e.Kind != "state",
		state == "no_out" && spends:
		return broken("the wallet was " + state)
	case gives && !known, freed.IsNegative() && e.Kind != "hold", e.Remaining.IsNegative():
		return broken("there is no such hold")
	case e.Kind == "hold" && !e.Remaining.Equal(freed.Neg()),
		gives && !e.Remaining.Equal(left.Sub(freed)),
		gives && taken.GreaterThan(freed), // the last capture of a hold may free more than it takes
		gives && !taken.Equal(freed) && !e.Remaining.IsZero(),
		freed.IsZero() && known && !e.Remaining.Equal(left.Sub(taken)): // undone once more
		return broken(fmt.Sprintf("it does not fit the %s that remained", left))
	}
	if e.Kind == "state" {
		state = e.State
	}
	if _, err := tx.Exec(putWallet, e.Wallet, e.Currency, e.Seq, e.Balance, e.Held, state); err != nil {
		return err
	}
	of := e.OfSeq
	if e.Kind == "hold" {
		of = e.Seq
	}
	if of != 0 {
		_, err = tx.Exec(putRemains, e.Wallet, of, e.Remaining)
		return err
	}
	return nil
}
