// The movements of money: from a request to an operation, through a batch, to an answer. What money may do
// is decided in internal/book. Nothing else writes wallets and entries.
//
// Touches: Postgres: wallets, and by outbox.go's statements entries, holds, reversals, references and the
// outbox, all in the same commit.
// Promises: an operation that was answered is durable and applied once, however often its key is sent and
// whatever dies; a refused one leaves nothing behind; balances never go below zero and no amount is ever
// rounded.
//
// Operations are group-committed: handlers queue them, and while one batch is at Postgres the next one
// gathers by itself. No order between concurrent requests is promised; a request sent after another was
// answered sees its effect.

package main

import (
	"cmp"
	"context"
	cryptorand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/api"
	"wallet/internal/book"
	"wallet/internal/gate"
	"wallet/internal/gather"
	"wallet/internal/metric"
	"wallet/internal/money"
	"wallet/internal/parts"
	"wallet/internal/pg"
)

var (
	errOverloaded = book.Refuse("overloaded",
		"Too many operations are waiting. Nothing was done; try again after the time in Retry-After.")
	// errUnavailable does not say that nothing happened: the commit's outcome may be unknown.
	errUnavailable = book.Refuse("unavailable", "The ledger did not confirm in time. Send the same request "+
		"with the same key again: if it had been applied, it is not applied twice.")
)

// -----------------------------------------------------------------------------------------------------------
// The movements: from a request to an operation, and from its outcome to an answer
// -----------------------------------------------------------------------------------------------------------

// movementKind is a kind of operation on money: its route, what its body may say, and who decides
// (wallet.go).
type movementKind struct {
	op       string // its name in a batch; empty: it is in none
	path     string
	scope    gate.Scope
	status   int
	summary  string
	of       *subject
	kind     string // of the entry that it makes, as far as the route tells
	decide   func(*book.Posting, *book.Operation) error
	body     *api.Shape
	required string // fields of the body
	all      bool   // "amount" may be "all"
	answer   string
	refusals string // besides those of its fields
}

// subject is what a movement's path names; in a batch a field does.
type subject struct {
	id, field string // of the schemas; of a batch's operation
	refusals  string
	read      func(op *book.Operation, text string) error
	// find looks up what the operations' subjects say that the batch must know beforehand, and refuses those
	// whose is not there. nil: nothing.
	find func(ctx context.Context, l *ledger, ops []*book.Operation) error
}

// movements is what money may do.
var movements = []movementKind{
	{op: "deposit", path: "/v1/wallets/{id}/deposit", scope: gate.Write,
		summary: "Deposit; creates the wallet if need be", of: &ofWallet,
		kind: book.KindDeposit, decide: book.DecideDeposit,
		body: bodyOf("amount currency reference metadata"), required: "amount", answer: "Receipt",
		refusals: "currency_mismatch currency_unknown balance_limit wallet_frozen wallet_closed"},
	{op: "withdraw", path: "/v1/wallets/{id}/withdraw", scope: gate.Write, summary: "Withdraw", of: &ofWallet,
		kind: book.KindWithdrawal, decide: book.DecideWithdrawal,
		body: bodyOf("amount currency reference metadata"), required: "amount", all: true, answer: "Receipt",
		refusals: "currency_mismatch currency_unknown wallet_not_found insufficient_funds wallet_frozen " +
			"wallet_closed"},
	{op: "transfer", path: "/v1/wallets/{id}/transfer", scope: gate.Write,
		summary: "Transfer to another wallet; creates it if need be", of: &ofWallet,
		kind: book.KindTransferOut, decide: book.DecideTransfer,
		body: bodyOf("to_id amount currency reference metadata"), required: "to_id amount", all: true,
		answer: "TransferReceipt",
		refusals: "currency_mismatch currency_unknown wallet_not_found insufficient_funds balance_limit " +
			"wallet_frozen wallet_closed"},
	{op: "hold", path: "/v1/wallets/{id}/holds", scope: gate.Write, status: 201,
		summary: "Hold: reserve a part of what is available, until it is captured, voided or expires",
		of:      &ofWallet, kind: book.KindHold, decide: book.DecideHold,
		body: bodyOf("amount to_id expires_in currency reference metadata"), required: "amount",
		answer: "HoldReceipt",
		refusals: "currency_mismatch currency_unknown wallet_not_found insufficient_funds wallet_frozen " +
			"wallet_closed"},
	{op: "capture", path: "/v1/holds/{hold_id}/capture", scope: gate.Write,
		summary: "Capture what is held, or a part of it: pay the payee, or withdraw where there is none",
		of:      &ofHold, kind: book.KindWithdrawal, decide: book.DecideCapture,
		body: bodyOf("amount to_id final reference metadata"), answer: "Capture",
		refusals: "hold_not_found hold_closed hold_expired hold_exceeded payee_mismatch currency_mismatch " +
			"balance_limit wallet_frozen wallet_closed"},
	{op: "void", path: "/v1/holds/{hold_id}/void", scope: gate.Write,
		summary: "Void a hold: release what remains of it", of: &ofHold,
		kind: book.KindRelease, decide: book.DecideVoid, body: bodyOf("reference metadata"),
		answer: "Release", refusals: "hold_not_found hold_closed hold_expired"},
	{op: "reverse", path: "/v1/transactions/{id}/reverse", scope: gate.Write,
		summary: "Reverse a transaction, or a part of it: post the opposite movement",
		of:      &ofTransaction, decide: book.DecideReversal, body: bodyOf("amount reference metadata"),
		answer: "Reversal",
		refusals: "transaction_not_found not_reversible reversal_exceeds insufficient_funds balance_limit " +
			"wallet_frozen wallet_closed"},
	{path: "/v1/wallets/{id}/state", scope: gate.Operate,
		summary: "Set what a wallet lets in and out: open, no_out, frozen or closed", of: &ofWallet,
		kind: book.KindState, decide: book.DecideState, body: bodyOf("state note"), required: "state",
		answer: "StateReceipt", refusals: "wallet_not_found wallet_closed wallet_not_empty"},
}

var (
	ofWallet = subject{"WalletID", "wallet_id", "wallet_id_malformed",
		func(op *book.Operation, text string) (err error) {
			op.WalletID, err = book.ParseWalletID(text)
			return err
		}, nil}

	ofHold = subject{"HoldID", "hold_id", "hold_id_malformed",
		func(op *book.Operation, text string) (err error) {
			op.WalletID, op.OfSeq, err = book.ParseEntryID(text, book.ErrHoldID)
			return err
		}, findPayees}

	ofTransaction = subject{"TransactionID", "transaction_id", "transaction_id_malformed",
		func(op *book.Operation, text string) (err error) {
			op.WalletID, op.OfSeq, err = book.ParseEntryID(text, book.ErrTransactionID)
			return err
		}, findTransactions}
)

// findPayees finds who is paid by captures that do not say so.
func findPayees(ctx context.Context, l *ledger, ops []*book.Operation) error {
	ops = slices.DeleteFunc(slices.Clone(ops), func(op *book.Operation) bool {
		return op.Kind != book.KindWithdrawal // a void, or a capture that says it: the batch will see
	})
	payees, err := l.payees(ctx, ofWhat(ops))
	if err != nil {
		return err
	}
	for _, op := range ops {
		if payee, found := payees[book.EntryKey{WalletID: op.WalletID, Seq: op.OfSeq}]; !found {
			op.Err = book.NoHold(op.WalletID, op.OfSeq)
		} else if payee != 0 {
			op.ToID, op.Kind = payee, book.KindTransferOut
		}
	}
	return nil
}

// findTransactions finds what reversals undo.
func findTransactions(ctx context.Context, l *ledger, ops []*book.Operation) error {
	found, err := l.transactionsByID(ctx, ofWhat(ops))
	if err != nil {
		return err
	}
	for _, op := range ops {
		if m := found[book.EntryKey{WalletID: op.WalletID, Seq: op.OfSeq}]; m == nil {
			op.Err = noTransaction(op.WalletID, op.OfSeq)
		} else {
			op.Err = op.Undo(m)
		}
	}
	return nil
}

// ofWhat are the entries that operations are of.
func ofWhat(ops []*book.Operation) []book.EntryKey {
	keys := make([]book.EntryKey, len(ops))
	for i, op := range ops {
		keys[i] = book.EntryKey{WalletID: op.WalletID, Seq: op.OfSeq}
	}
	return keys
}

// bodyOf is a body with these fields, and an idempotency key.
func bodyOf(fields string) *api.Shape {
	return &api.Shape{BytesMax: bodyBytesMax, Fields: append(strings.Fields(fields), "idempotency_key"),
		Flags: []string{"final"}, Objects: []string{"metadata"}}
}

// doc is what the OpenAPI document says of the movement.
func (m *movementKind) doc() api.Doc {
	refusals := m.of.refusals + " idempotency_key_missing idempotency_key_reused " + m.refusals
	for _, field := range m.body.Fields {
		refusals += " " + fieldRefusals[field]
	}
	if m.required != "" {
		refusals += " field_missing"
	}
	as := map[bool]map[string]string{true: {"amount": "amount_or_all"}}[m.all]
	return api.Doc{Summary: m.summary, ID: m.of.id, Body: m.body, Required: strings.Fields(m.required),
		As: as, Answer: m.answer, Refusals: refusals}
}

// fieldRefusals are the codes that each field may be refused with, by itself.
var fieldRefusals = map[string]string{
	"amount": "amount_malformed amount_exponent amount_not_positive amount_too_large amount_scale",
	"to_id":  "wallet_id_malformed same_wallet", "currency": "currency_malformed",
	"expires_in": "expires_in_malformed", "reference": "reference_malformed",
	"metadata": "metadata_malformed", "state": "state_malformed", "note": "note_malformed",
}

const bodyBytesMax = 8 << 10

var creationBody = &api.Shape{BytesMax: bodyBytesMax,
	Fields: []string{"id", "currency", "idempotency_key"}}

func (l *ledger) createWallet(r *http.Request) (*api.Reply, error) {
	body, err := api.ReadFields(r, creationBody)
	if err != nil {
		return nil, err
	}
	op := &book.Operation{Kind: book.KindCreation}
	if op.Currency, err = currencyOf(body); err != nil {
		return nil, err
	}
	if id, given := body["id"]; given {
		if op.WalletID, err = book.ParseWalletID(id.Text); err != nil {
			return nil, err
		}
	} else {
		op.WalletID, op.IDChosen = 1+rand.Int64N(book.WalletIDAutoMax), true
	}
	switch op.Key, err = api.Key(r, body, book.ParseKey); {
	case err != nil:
		return nil, err
	case op.Key == "" && op.IDChosen:
		return nil, book.Refuse("idempotency_key_missing", "Send an Idempotency-Key header or an "+
			"\"idempotency_key\", so that a retry does not create a second wallet; or choose the id "+
			"yourself.")
	case op.Key == "":
		// Without a key a repeat is wallet_exists; but our own rerun of a batch must recognise its wallet.
		op.Key = "\x01" + cryptorand.Text() // which no client can send
	}
	if err := l.do(r.Context(), op); err != nil {
		return nil, err
	}
	location := map[string]string{"Location": fmt.Sprintf("/v1/wallets/%d", op.Created.ID)}
	return &api.Reply{Body: book.AppendWallet(nil, &op.Created), Replayed: op.Replayed, Header: location}, nil
}

// move is every movement of money: it reads the operation, has it posted and shows it as the ledger has it.
func (l *ledger) move(m *movementKind, r *http.Request) (*api.Reply, error) {
	id := r.PathValue("id")
	if id == "" {
		id = r.PathValue("hold_id")
	}
	op := m.operation(r)
	if err := m.of.read(op, id); err != nil {
		return nil, err
	}
	body, err := api.ReadFields(r, m.body)
	if err != nil {
		return nil, err
	}
	if op.Key, err = api.Key(r, body, book.ParseKey); err != nil {
		return nil, err
	}
	if op.Key == "" {
		return nil, errNoKey
	}
	if err := m.read(body, op, l.holdTTL); err != nil {
		return nil, err
	}
	if err := l.complete(r.Context(), m.of, op); err != nil {
		return nil, err
	}
	if err = op.Err; err == nil {
		err = l.do(r.Context(), op) // where that is of the request's end, op may be written to still
	}
	if err != nil {
		return nil, err
	}
	answer := &api.Reply{Body: append(book.AppendReceipt(nil, &op.Posted), '}'), Replayed: op.Replayed}
	if op.Kind == book.KindHold {
		answer.Header = map[string]string{"Location": "/v1/holds/" + book.EntryID(op.Posted.WalletID,
			op.Posted.Seq)}
	}
	return answer, nil
}

var errNoKey = book.Refuse("idempotency_key_missing", "Send an Idempotency-Key header or an "+
	"\"idempotency_key\" in the body, unique to this operation; a retry sends the same key.")

// operation begins one of this kind.
func (m *movementKind) operation(r *http.Request) *book.Operation {
	op := &book.Operation{Kind: m.kind, Decide: m.decide, Traceparent: api.Traceparent(r.Header)}
	op.Note.Client = api.Client(r.Context())
	return op
}

// complete adds to operations of one subject what must be looked up, and refuses in their Err what makes no
// sense. Its own error is a fault.
func (l *ledger) complete(ctx context.Context, of *subject, ops ...*book.Operation) error {
	if of.find != nil && len(ops) > 0 {
		if err := of.find(ctx, l, ops); err != nil {
			return err
		}
	}
	for _, op := range ops {
		if op.Err == nil && (op.ToID == op.WalletID || op.Note.ToID == op.WalletID) {
			op.Err = book.Refuse("same_wallet",
				"A transfer goes to another wallet; this one names wallet %d twice.", op.WalletID)
		}
	}
	return nil
}

// Bounds of a batch of operations in one request.
const (
	manyOpsMax    = 1000
	manyBytesMax  = 1 << 20
	manyKeyLenMax = book.KeyLenMax - len("#999")
	manyAtOnce    = 32 // such requests, some 2 MB of memory each
)

// manyBody is the body of POST /v1/batches. An operation has the fields of its kind's route, and the one that
// stands for the route's path.
var manyBody = func() *api.Shape {
	items := bodyOf("op")
	for i := range movements {
		m := &movements[i]
		for _, field := range append([]string{m.of.field}, m.body.Fields...) {
			if m.op != "" && !slices.Contains(items.Fields, field) {
				items.Fields = append(items.Fields, field)
			}
		}
	}
	return &api.Shape{BytesMax: manyBytesMax, Fields: []string{"idempotency_key", "atomic", "operations"},
		Flags: []string{"atomic"}, List: "operations", Items: items, ItemsMax: manyOpsMax}
}()

// manyRefusals are the codes that an atomic batch may be refused with: those of its operations.
func manyRefusals() string {
	codes := []string{"operation_unknown"}
	for i := range movements {
		if m := &movements[i]; m.op != "" {
			codes = append(codes, strings.Fields(m.doc().Refusals)...)
		}
	}
	slices.Sort(codes)
	return strings.Join(slices.Compact(codes), " ")
}

// moveMany posts many operations, all or none, or each by itself.
func (l *ledger) moveMany(r *http.Request) (*api.Reply, error) {
	defer l.manyNow.Add(-1)
	if l.manyNow.Add(1) > manyAtOnce {
		return nil, errOverloaded
	}
	var ops []*book.Operation
	var kinds []*movementKind
	body, err := api.ReadList(r, manyBody, func(_ int, item api.Fields) error {
		m, op := l.readItem(r, item)
		ops, kinds = append(ops, op), append(kinds, m)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(ops) == 0 {
		return nil, missing("operations")
	}
	api.Charge(r.Context(), len(ops)-1)
	key, err := api.Key(r, body, book.ParseKey)
	if err != nil {
		return nil, err
	}
	together := body["atomic"].Text != "false"
	if err := setKeys(ops, key, together); err != nil {
		return nil, err
	}
	for _, of := range []*subject{&ofWallet, &ofHold, &ofTransaction} {
		var theirs []*book.Operation
		for i, op := range ops {
			if op.Err == nil && kinds[i].of == of {
				theirs = append(theirs, op)
			}
		}
		if err := l.complete(r.Context(), of, theirs...); err != nil {
			return nil, err
		}
	}
	if together {
		return l.answerTogether(r.Context(), ops)
	}
	return l.answerEach(r.Context(), ops, kinds)
}

// readItem reads one operation of many. What is wrong with it is in its Err; its kind is nil if it is none.
func (l *ledger) readItem(r *http.Request, item api.Fields) (*movementKind, *book.Operation) {
	i := slices.IndexFunc(movements, func(m movementKind) bool {
		return m.op != "" && m.op == item["op"].Text
	})
	if i < 0 {
		return nil, &book.Operation{Err: book.Refuse("operation_unknown",
			"The \"op\" is one of %s.", strings.Join(opNames(), ", "))}
	}
	m := &movements[i]
	op := m.operation(r)
	op.Err = func() error {
		for field := range item {
			if field != "op" && field != m.of.field && !slices.Contains(m.body.Fields, field) {
				return book.Refuse("field_unknown", "The op %q has no field %q. It takes %s, %s.",
					m.op, field, m.of.field, strings.Join(m.body.Fields, ", "))
			}
		}
		id, given := item[m.of.field]
		if !given {
			return missing(m.of.field)
		}
		err := m.of.read(op, id.Text)
		if err == nil {
			op.Key, err = api.KeyIn(item, book.ParseKey)
		}
		if err == nil {
			err = m.read(item, op, l.holdTTL)
		}
		return err
	}()
	return m, op
}

func opNames() (names []string) {
	for _, m := range movements {
		if m.op != "" {
			names = append(names, m.op)
		}
	}
	return names
}

// setKeys gives operations that are posted together keys out of their request's, which has one. Each of the
// others has a key of its own.
func setKeys(ops []*book.Operation, key string, together bool) error {
	switch {
	case together && key == "":
		return errNoKey
	case len(key) > manyKeyLenMax:
		return book.Refuse("idempotency_key_malformed", "The key of an atomic batch has 1 to %d characters: "+
			"each operation's has its number besides.", manyKeyLenMax)
	case !together && key != "":
		return book.Refuse("idempotency_key_conflict", "With \"atomic\":false each operation has an "+
			"\"idempotency_key\" of its own, and the request has none.")
	}
	for i, op := range ops {
		switch {
		case op.Err != nil:
		case together && op.Key != "":
			op.Err = book.Refuse("idempotency_key_conflict", "The operations of an atomic batch share its "+
				"\"idempotency_key\": send none in an operation, or send \"atomic\":false.")
		case together:
			op.Key = key + "#" + strconv.Itoa(i)
		case op.Key == "":
			op.Err = errNoKey
		}
	}
	return nil
}

// answerTogether posts operations together. A refusal is that of the first that was refused.
func (l *ledger) answerTogether(ctx context.Context, ops []*book.Operation) (*api.Reply, error) {
	at := slices.IndexFunc(ops, func(op *book.Operation) bool { return op.Err != nil })
	var err error
	if at >= 0 {
		err = ops[at].Err
	} else {
		at, err = l.doTogether(ctx, ops)
	}
	if err == errOverloaded || err == errUnavailable {
		return nil, err // which is of all
	} else if err != nil {
		return nil, &api.InItem{List: "operations", Item: at, Err: err}
	}
	body := []byte(`{"results":[`)
	for i, op := range ops {
		if i > 0 {
			body = append(body, ',')
		}
		body = append(book.AppendReceipt(body, &op.Posted), '}')
	}
	return &api.Reply{Body: append(body, "]}"...), Replayed: ops[0].Replayed}, nil
}

// answerEach posts operations that stand by themselves.
func (l *ledger) answerEach(ctx context.Context, ops []*book.Operation, kinds []*movementKind) (
	*api.Reply, error) {
	results := make([]api.Result, len(ops))
	var good []*book.Operation
	for i, op := range ops {
		if results[i].Err = op.Err; op.Err == nil {
			good = append(good, op)
		}
	}
	errs, err := l.doEach(ctx, good)
	if err != nil {
		return nil, err
	}
	n, replayed := 0, 0
	for i, op := range ops {
		if results[i].Err != nil {
			continue
		}
		if results[i].Err = errs[n]; errs[n] == nil {
			results[i].Status = kinds[i].status
			results[i].Body = append(book.AppendReceipt(nil, &op.Posted), '}')
			if op.Replayed {
				replayed++
			}
		}
		n++
	}
	return &api.Reply{Results: results, Replayed: replayed == len(ops)}, nil
}

// read reads what the body says.
func (m *movementKind) read(body api.Fields, op *book.Operation, holdTTL time.Duration) (err error) {
	for field := range strings.SplitSeq(m.required, " ") {
		if _, given := body[field]; !given && field != "to_id" && field != "" {
			return missing(field)
		}
	}
	if amount, given := body["amount"]; !given {
		op.Note.All = m.kind == book.KindWithdrawal ||
			m.of.id == "TransactionID" && m.kind != book.KindRelease
	} else if m.all && amount == (api.Field{Text: "all", Quoted: true}) {
		op.Note.All = true
	} else if op.Amount, err = money.Parse(amount.Text); err != nil {
		return err
	}
	if op.Currency, err = currencyOf(body); err != nil {
		return err
	}
	if to, given := body["to_id"]; given {
		toID, err := book.ParseWalletID(to.Text)
		if err != nil {
			return err
		}
		switch m.kind {
		case book.KindHold: // which touches the payer alone
			op.Note.ToID = toID
		default:
			op.ToID, op.Kind = toID, book.KindTransferOut
		}
	} else if m.kind == book.KindTransferOut {
		return missing("to_id")
	}
	if m.kind == book.KindHold {
		op.ExpiresIn, op.AnyExpiry = holdTTL, true
		if in, given := body["expires_in"]; given {
			op.AnyExpiry = false
			var ok bool
			if op.ExpiresIn, ok = api.Span(in.Text, holdTTLMax); !ok || !in.Quoted {
				return book.Refuse("expires_in_malformed",
					"\"expires_in\" is a whole number of s, m, h or d, such "+
						"as \"15m\", from 1s to 365d.")
			}
		}
	}
	op.Note.Partial = body["final"].Text == "false"
	if m.kind == book.KindRelease {
		op.Note.Reason = book.ReasonVoid
	}
	return readNote(body, &op.Note)
}

func missing(field string) error {
	switch field {
	case "amount":
		return book.Refuse("field_missing", "Send the \"amount\", such as \"10.50\".")
	case "to_id":
		return book.Refuse("field_missing", "Send the \"to_id\", the wallet that receives.")
	case "operations":
		return book.Refuse("field_missing", "Send the \"operations\": a list of 1 to %d.", manyOpsMax)
	}
	return book.Refuse("field_missing", "Send the %q.", field)
}

const holdTTLMax = 365 * 24 * time.Hour // no hold is for ever

// currencyOf is the request's currency code, or empty where it names none.
func currencyOf(body api.Fields) (string, error) {
	code, given := body["currency"]
	if !given {
		return "", nil
	}
	wellFormed := code.Quoted && len(code.Text) >= 3 && len(code.Text) <= 10 &&
		strings.Trim(code.Text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == ""
	if !wellFormed {
		return "", book.Refuse("currency_malformed",
			"A currency is a string of 3 to 10 capital letters or digits, such as \"USD\".")
	}
	return code.Text, nil
}

// Bounds of what a movement says in words.
const (
	noteBytesMax       = 255
	metadataMembersMax = 16
	metadataBytesMax   = 2 << 10
)

var (
	errReference = book.Refuse("reference_malformed",
		"The \"reference\" is a string of 1 to %d bytes of printable UTF-8.", noteBytesMax)
	errNote = book.Refuse("note_malformed", "The \"note\" is a string of 1 to %d bytes of printable UTF-8.",
		noteBytesMax)
)

// readNote reads what a movement says in words.
func readNote(body api.Fields, n *book.Note) error {
	text := func(name string, malformed *book.Refusal) (string, error) {
		f, given := body[name]
		if given && (!f.Quoted || len(f.Text) == 0 || len(f.Text) > noteBytesMax || !api.Printable(f.Text)) {
			return "", malformed
		}
		return f.Text, nil
	}
	var err error
	if n.Reference, err = text("reference", errReference); err != nil {
		return err
	}
	if n.Text, err = text("note", errNote); err != nil {
		return err
	}
	if state, given := body["state"]; given {
		if n.State = state.Text; !state.Quoted || !slices.Contains(book.WalletStates, n.State) {
			return book.Refuse("state_malformed", "The \"state\" is one of %s.",
				strings.Join(book.WalletStates, ", "))
		}
	}
	if metadata, given := body["metadata"]; given {
		var ok bool
		if n.Metadata, ok = api.Canonical(metadata.Text, metadataMembersMax); !ok {
			return book.Refuse("metadata_malformed", "The \"metadata\" is an object of at most %d members, "+
				"each with a name of its own and a string of valid UTF-8.", metadataMembersMax)
		}
		if len(n.Metadata) > metadataBytesMax {
			return book.Refuse("metadata_malformed",
				"The \"metadata\" may have %d bytes in all; these are %d.", metadataBytesMax, len(n.Metadata))
		}
	}
	return nil
}

// -----------------------------------------------------------------------------------------------------------
// The ledger and its writers
// -----------------------------------------------------------------------------------------------------------

type ledger struct {
	*reader
	writes          *pgxpool.Pool // one connection a writer
	rerunBudget     time.Duration // how long a batch is run again after faults before its clients are told
	defaultCurrency string
	holdTTL         time.Duration // how long a hold stands whose request does not say

	queue  *gather.Gatherer[*task]
	scales atomic.Pointer[map[string]int32] // the currency table: code to scale

	manyNow                                       atomic.Int64 // requests of many operations at work
	batches, operations, reruns, splits, expiries atomic.Int64
	held                                          atomic.Pointer[[]heldMoney]
	batchSizes, batchSeconds                      *metric.Histogram
}

// ledgerConfig is what the ledger is told; see the settings' table.
type ledgerConfig struct {
	defaultCurrency string
	writers         int
	batchOpsMax     int
	queueOpsMax     int
	requestTimeout  time.Duration
	holdTTL         time.Duration
}

func newLedger(cfg ledgerConfig, reads, writes *pgxpool.Pool, cache *cache) *ledger {
	l := &ledger{
		reader:          &reader{db: reads, cache: cache, timeout: cfg.requestTimeout},
		writes:          writes,
		rerunBudget:     cfg.requestTimeout,
		defaultCurrency: cfg.defaultCurrency,
		holdTTL:         cfg.holdTTL,
		batchSizes:      metric.NewHistogram(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
		batchSeconds:    metric.NewHistogram(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5),
	}
	l.queue = gather.New(gather.Bounds{Queue: cfg.queueOpsMax, Workers: cfg.writers, Batch: cfg.batchOpsMax,
		Large: manyMax, Beside: manyBeside}, l.work, l.drop)
	return l
}

// task is operations on their way through a batch, in order: each by itself, or together.
type task struct {
	ops      []*book.Operation
	together bool            // all of them are posted, or none
	many     bool            // they are of a request with many
	again    bool            // they were put off before
	parked   map[int64]bool  // wallets on which such an operation waits; nil for a single operation
	wallets  []int64         // that they touch
	ctx      context.Context // the request's: if it ends before a batch forms, the task is dropped
	done     chan struct{}   // closed after the outcomes are final

	err error // the outcome of operations together,
	at  int   // and which one it is of

	room struct { // for one, as most are
		ops     [1]*book.Operation
		wallets [2]int64
	}
}

func newTask(ctx context.Context, together, many bool, ops ...*book.Operation) *task {
	t := &task{together: together, many: many, ctx: ctx, done: make(chan struct{})}
	t.ops, t.wallets = append(t.room.ops[:0], ops...), t.room.wallets[:0]
	for _, op := range ops {
		t.wallets = append(t.wallets, op.WalletID)
		if op.ToID != 0 {
			t.wallets = append(t.wallets, op.ToID)
		}
	}
	if len(ops) > 1 {
		slices.Sort(t.wallets)
		t.wallets = slices.Compact(t.wallets)
	}
	return t
}

// Keys are the wallets of its operations.
func (t *task) Keys() []int64 { return t.wallets }

// Size is how many operations it has.
func (t *task) Size() int { return len(t.ops) }

// Large says that it is of a request with many.
func (t *task) Large() bool { return t.many }

// Gone says that the client has left.
func (t *task) Gone() bool { return t.ctx.Err() != nil }

// settle decides it.
func (t *task) settle(p *book.Posting) {
	if t.together {
		t.at, t.err = p.SettleAll(t.ops)
	} else {
		p.SettleEach(t.ops, t.parked)
	}
}

// settleAgain decides what was refused for lack of funds once more.
func (t *task) settleAgain(p *book.Posting) {
	if !t.together {
		p.SettleShort(t.ops)
	} else if book.LacksFunds(t.err) {
		t.settle(p)
	}
}

// ended says that its outcome is final.
func (t *task) ended() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// fail ends it with an error of all its operations.
func (t *task) fail(err error) {
	t.err, t.at = err, 0
	for _, op := range t.ops {
		op.Err = err
	}
}

// do has an operation posted and waits for its outcome. When ctx ends first the outcome is unknown to the
// caller, and the operation may still be applied.
func (l *ledger) do(ctx context.Context, op *book.Operation) error {
	if !l.queue.Reserve(1, false) {
		return errOverloaded
	}
	if _, err := l.pass(ctx, newTask(ctx, false, false, op)); err != nil {
		return err
	}
	return op.Err
}

// doTogether has operations posted, all or none; an error is of operation number at.
func (l *ledger) doTogether(ctx context.Context, ops []*book.Operation) (at int, err error) {
	if !l.queue.Reserve(len(ops), true) {
		return 0, errOverloaded
	}
	last, err := l.pass(ctx, newTask(ctx, true, true, ops...))
	if err != nil {
		return 0, err
	}
	return last[0].at, last[0].err
}

// A commit takes so many operations of requests with many, and fewer while there are single ones, which may
// wait for it. Those that stand by themselves are queued in pieces, whose wallets are sooner free.
const (
	manyMax    = 500
	manyBeside = 100
	pieceMax   = 25
)

// doEach has operations posted, each by itself, those on one wallet in order, and returns their errors.
func (l *ledger) doEach(ctx context.Context, ops []*book.Operation) (errs []error, err error) {
	if !l.queue.Reserve(len(ops), true) {
		return nil, errOverloaded
	}
	var pieces []*task
	parked := make(map[int64]bool) // the lane has one worker: no two write to it
	for some := range slices.Chunk(ops, pieceMax) {
		t := newTask(ctx, false, true, some...)
		t.parked = parked
		pieces = append(pieces, t)
	}
	last, err := l.pass(ctx, pieces...)
	unknown := func(op *book.Operation) bool { // it may be written to still, or be put off
		i := slices.IndexFunc(last, func(t *task) bool { return slices.Contains(t.ops, op) })
		return i >= 0 && (!last[i].ended() || op.Err == book.ErrLocked)
	}
	errs = slices.Repeat([]error{errUnavailable}, len(ops))
	for i, op := range ops {
		if err == nil || !unknown(op) {
			errs[i] = op.Err
		}
	}
	return errs, nil
}

// pass queues a request's tasks, whose sizes are reserved, and waits for their outcomes. What was put off is
// queued again, as one task. The error says that ctx ended before all outcomes of the last were known.
func (l *ledger) pass(ctx context.Context, tasks ...*task) (last []*task, err error) {
	for {
		for _, t := range tasks {
			l.queue.Put(t)
		}
		var off []*book.Operation
		for _, t := range tasks {
			select {
			case <-t.done:
				if !t.together {
					off = append(off, book.PutOff(t.ops)...)
				} else if t.err == book.ErrLocked {
					off = t.ops
				}
			case <-ctx.Done():
				return tasks, errUnavailable
			}
		}
		if len(off) == 0 {
			return tasks, nil
		}
		again := newTask(ctx, tasks[0].together, tasks[0].many, off...)
		again.again, again.parked = true, make(map[int64]bool)
		tasks = []*task{again}
		if parts.Sleep(ctx, 100*time.Millisecond) != nil {
			return tasks, errUnavailable
		}
		l.queue.Renew(len(off), again.many)
	}
}

// run works off what is queued until ctx ends.
func (l *ledger) run(ctx context.Context) error { return l.queue.Run(ctx) }

// work posts a batch and tells of it. Its wallets are free for the next batch once it is in the ledger.
func (l *ledger) work(batch []*task, release func()) {
	t, heads := l.cache.ticket(), make(map[int64]cachedBalance, len(batch))
	t.moves = true
	l.post(batch, heads)
	release()
	l.announce(batch, t, heads)
}

// drop ends a task whose client left before a batch took it: nothing was done.
func (l *ledger) drop(t *task) {
	t.fail(errUnavailable)
	close(t.done)
}

// post brings a batch into the ledger, or settles each operation's error. Running a batch again is always
// safe, also when its commit's outcome is unknown: the idempotency keys find what was written. heads takes
// what the answers are about to tell of each wallet, for the cache.
func (l *ledger) post(batch []*task, heads map[int64]cachedBalance) {
	started := time.Now()
	lock := lockWallets
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		err := l.tryPost(batch, lock, heads)
		if err == nil {
			size := 0
			for _, t := range batch {
				size += t.Size()
			}
			l.batches.Add(1)
			l.operations.Add(int64(size))
			l.batchSizes.Observe(float64(size))
			l.batchSeconds.Observe(time.Since(started).Seconds())
			return
		}
		rerun, split := remedy(err)
		switch {
		case split && (len(batch) > 1 || len(batch[0].ops) > 1 && !batch[0].together):
			// One operation's fault must not fail its neighbours: halve until it stands alone.
			slog.Warn("batch split", "tasks", len(batch), "error", err)
			l.splits.Add(1)
			if len(batch) == 1 {
				t := batch[0]
				half := len(t.ops) / 2
				batch = []*task{newTask(t.ctx, false, t.many, t.ops[:half]...),
					newTask(t.ctx, false, t.many, t.ops[half:]...)}
				batch[0].parked, batch[1].parked = t.parked, t.parked
			}
			l.post(batch[:len(batch)/2], heads)
			l.post(batch[len(batch)/2:], heads)
			return
		case rerun && time.Since(started)+pause < l.rerunBudget:
			slog.Warn("batch is run again", "tasks", len(batch), "error", err)
			l.reruns.Add(1)
			switch pg.State(err) {
			case "55P03": // lock_timeout: a wallet that somebody holds must not hold up the others
				lock = lockFreeWallets
				continue
			case "23514": // no partition of the outbox for this hour: remedy lets no other through
				if err := makeOutboxPartitions(context.Background(), l.db); err != nil {
					slog.Error("the outbox lacks this hour's partition", "error", err)
				}
			}
			time.Sleep(pause/2 + rand.N(pause/2))
		default:
			slog.Error("batch failed", "tasks", len(batch), "error", err)
			if rerun {
				err = errUnavailable
			}
			for _, t := range batch {
				t.fail(err)
			}
			return
		}
	}
}

// remedy says what helps against a failed batch: to run it again, to split it, or neither.
func remedy(err error) (rerun, split bool) {
	switch {
	case errors.Is(err, book.ErrBroken):
		return false, true
	case pg.State(err) == "":
		return true, false
	case pg.State(err) == "23505" && slices.Contains([]string{"wallet_pkey", "wallet_creation_key_once"},
		pg.Constraint(err)):
		return true, false // another writer made the wallet first: this time we lock it
	case pg.NoPartition(err):
		return true, false // an outbox without this hour's partition
	}
	passes := pg.Passes(err)
	return passes, !passes
}

// announce tells the cache and then the clients. The cache comes first, so that a read sent after the
// answer is not served anything older from there.
func (l *ledger) announce(batch []*task, t ticket, heads map[int64]cachedBalance) {
	l.cache.put(t, heads)
	for _, t := range batch {
		close(t.done)
	}
}

// -----------------------------------------------------------------------------------------------------------
// One batch: one Postgres transaction, READ COMMITTED, in two round trips
// -----------------------------------------------------------------------------------------------------------

// Lock order: every transaction locks the wallets that exist by ascending id, then inserts the missing ones
// by ascending id, so no two can wait for each other in a circle.
//
// A plan made on an empty table is kept, and scans the index for every row. These joins allow index lookups
// only: LATERAL with a LIMIT, a subquery, ANY (ARRAY[...]).
//
// Rows arrive as arrays, one a column, unnested in the select list, side by side: in FROM each array is
// first copied into a store of its own, row by row, which costs Postgres a twentieth of the batch.
const (
	lockWallets = `
SELECT ` + walletColumns + ` FROM wallet
WHERE id = ANY ($1::bigint[]) ORDER BY id FOR NO KEY UPDATE`

	// What was put off before holds up its other wallets each time that it waits.
	waitLess = `SET LOCAL lock_timeout = '50ms'`

	// After a lock_timeout: those that can be had at once, and then which others there are.
	lockFreeWallets = lockWallets + ` SKIP LOCKED`
	findWallets     = `SELECT id FROM wallet WHERE id = ANY ($1::bigint[])`

	// A statement of its own after the locks, hence with a newer snapshot: what the locks' former holders
	// wrote is seen. So is a wallet that was missing a moment ago; what is new to it fails on the wallet's
	// id, and the batch runs again.
	findKeys = selectPosted + `
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::text[]) AS key) k
CROSS JOIN LATERAL (
    SELECT * FROM entry
    WHERE wallet_id = k.wallet_id AND idempotency_key = k.key AND kind <> 'transfer_in' LIMIT 1
) e`

	findCreations = `
SELECT id, currency, created_at, creation_key FROM wallet WHERE creation_key = ANY ($1::text[])`

	// Under their wallets' locks, like the keys. Only operations of that kind ask.
	findHolds = `
SELECT ` + holdColumns + `
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq) k
CROSS JOIN LATERAL (SELECT * FROM hold WHERE wallet_id = k.wallet_id AND seq = k.seq LIMIT 1) h`

	findReversals = `
SELECT r.wallet_id, r.seq, r.reversed
FROM (SELECT unnest($1::bigint[]) AS wallet_id, unnest($2::bigint[]) AS seq) k
CROSS JOIN LATERAL (SELECT * FROM reversal WHERE wallet_id = k.wallet_id AND seq = k.seq LIMIT 1) r`

	// By the time, not by the wallet, which may have many that are not due: + 0 rules that index out.
	findDueHolds = `
SELECT ` + holdColumns + `
FROM hold h WHERE h.status = 'open' AND h.expires_at <= $2 AND h.wallet_id + 0 = ANY ($1::bigint[])
ORDER BY h.expires_at, h.wallet_id, h.seq LIMIT $3 OFFSET $4`

	updateWallets = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[]::numeric[]) AS balance,
             unnest($3::bigint[]) AS seq, unnest($4::timestamptz[]) AS entry_at) n
WHERE wallet.id = ANY (ARRAY[n.id])`

	// Only of wallets whose held or state changed.
	updateHeads = `
UPDATE wallet SET balance = n.balance, seq = n.seq, entry_at = n.entry_at, held = n.held, state = n.state,
       state_seq = n.state_seq
FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[]::numeric[]) AS balance,
             unnest($3::bigint[]) AS seq, unnest($4::timestamptz[]) AS entry_at,
             unnest($5::text[]::numeric[]) AS held, nullif(unnest($6::text[]), '') AS state,
             nullif(unnest($7::bigint[]), 0) AS state_seq) n
WHERE wallet.id = ANY (ARRAY[n.id])`
)

// tryPost runs the batch once. Its error means that nothing, or in the case of a lost connection something
// unknown, happened. lock is lockWallets or lockFreeWallets.
func (l *ledger) tryPost(batch []*task, lock string, heads map[int64]cachedBalance) error {
	// The server's own timeouts (openPool) are shorter: this one is for a network that swallows everything.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := l.writes.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release() // a connection still inside a transaction is closed by the pool

	p, err := l.read(ctx, conn, batch, lock)
	if err != nil {
		return err
	}
	for _, t := range batch {
		t.settle(p)
	}
	if err := releaseDue(ctx, conn, p, batch); err != nil {
		return err
	}
	if err := p.Check(); err != nil {
		return err
	}
	if err := commit(ctx, conn, p); err != nil {
		return err
	}
	// What was accepted is durable.
	l.expiries.Add(p.Expired)
	if l.cache != nil {
		tellHeads(heads, p)
		for _, t := range batch {
			tellReplays(heads, t.ops)
		}
	}
	return nil
}

// releaseDue releases the holds that are due on wallets which lacked funds, and decides again what was
// refused for that. So nobody waits for the sweep, and nobody but who was refused pays for the look.
func releaseDue(ctx context.Context, conn *pgxpool.Conn, p *book.Posting, batch []*task) error {
	short := slices.Collect(maps.Keys(p.Short))
	due := p.Now // or later, where a wallet's entries are: the clock may have been set back
	for _, id := range short {
		due = book.Latest(due, p.Wallets[id].EntryAt)
	}
	for seen := 0; len(p.Short) > 0; seen += dueMax {
		rows, _ := conn.Query(ctx, findDueHolds, short, due, dueMax, seen)
		holds, err := scanHolds(rows)
		if err != nil || len(holds) == 0 {
			return err
		}
		for _, h := range holds {
			if k := (book.EntryKey{WalletID: h.WalletID, Seq: h.Seq}); p.Holds[k] == nil {
				p.Holds[k] = h // else one of the batch has changed it
			}
			if err := p.Decide(book.ExpiryOf(h.WalletID, h.Seq)); err != nil && err != book.ErrNotDue {
				return err
			}
		}
		clear(p.Short)
		for _, t := range batch {
			t.settleAgain(p)
		}
	}
	return nil
}

// read is the first round trip: lock, then look up the keys.
func (l *ledger) read(ctx context.Context, conn *pgxpool.Conn, batch []*task, lock string,
) (*book.Posting, error) {
	size := 0
	for _, t := range batch {
		size += t.Size()
	}
	p := book.NewPosting(*l.scales.Load(), l.defaultCurrency, size)
	var ids, keyWallets []int64
	var keys, creationKeys []string
	var held, undone entryIDs
	asked := make(map[book.MovementKey]bool, size)
	again := false
	for _, t := range batch {
		ids, again = append(ids, t.wallets...), again || t.again
		for _, op := range t.ops {
			if op.Kind == book.KindCreation {
				creationKeys = append(creationKeys, op.Key)
				continue
			}
			if k := (book.MovementKey{WalletID: op.WalletID, Key: op.Key}); !asked[k] {
				asked[k] = true
				keyWallets, keys = append(keyWallets, op.WalletID), append(keys, op.Key)
			}
			switch {
			case op.Undoes != nil:
				undone.add(op.Undoes.WalletID, op.Undoes.Seq)
				p.Reversals[book.EntryKey{WalletID: op.Undoes.WalletID,
					Seq: op.Undoes.Seq}] = &book.Reversal{Amount: op.Undoes.Amount.Abs()}
			case op.OfSeq != 0:
				held.add(op.WalletID, op.OfSeq)
			}
		}
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	for _, id := range ids {
		p.Wallets[id] = &book.Wallet{ID: id}
	}

	var b pgx.Batch
	b.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED`)
	if again {
		b.Queue(waitLess)
	}
	b.Queue(lock, ids).Query(func(rows pgx.Rows) error { return scanWallets(rows, p.Wallets) })
	if lock == lockFreeWallets {
		b.Queue(findWallets, ids).Query(func(rows pgx.Rows) error { return scanBusy(rows, p.Wallets) })
	}
	b.Queue(`SELECT clock_timestamp()`).QueryRow(func(row pgx.Row) error { return row.Scan(&p.Now) })
	if len(keys) > 0 {
		b.Queue(findKeys, keyWallets, keys).Query(func(rows pgx.Rows) error {
			return scanKeys(rows, p.ByKey)
		})
	}
	if len(creationKeys) > 0 {
		b.Queue(findCreations, creationKeys).Query(func(rows pgx.Rows) error {
			return scanCreations(rows, p.Creations)
		})
	}
	if len(held.seqs) > 0 {
		b.Queue(findHolds, held.wallets, held.seqs).Query(func(rows pgx.Rows) error {
			holds, err := scanHolds(rows)
			for _, h := range holds {
				p.Holds[book.EntryKey{WalletID: h.WalletID, Seq: h.Seq}] = h
			}
			return err
		})
	}
	if len(undone.seqs) > 0 {
		b.Queue(findReversals, undone.wallets, undone.seqs).Query(func(rows pgx.Rows) error {
			var k book.EntryKey
			var reversed decimal.Decimal
			_, err := pgx.ForEachRow(rows, []any{&k.WalletID, &k.Seq, &reversed}, func() error {
				p.Reversals[k].Reversed = reversed
				return nil
			})
			return err
		})
	}
	return p, conn.SendBatch(ctx, &b).Close()
}

// dueMax is how many due holds are looked up at a time.
const dueMax = 1000

// commit is the second round trip: everything that the accepted operations changed, and COMMIT.
func commit(ctx context.Context, conn *pgxpool.Conn, p *book.Posting) error {
	var b pgx.Batch
	var missing, changed []*book.Wallet
	heads := false
	for _, w := range p.Wallets {
		if w.Changed && w.Exists {
			changed = append(changed, w)
			heads = heads || w.HeadChanged
		} else if w.Changed {
			missing = append(missing, w)
		}
	}
	if len(missing) > 0 {
		slices.SortFunc(missing, func(a, b *book.Wallet) int { return cmp.Compare(a.ID, b.ID) })
		c := columnsOf(missing)
		b.Queue(insertWallets, c.ids, c.currencies, c.balances, c.seqs, c.entryAts, c.createdAts,
			c.creationKeys, c.helds, c.states, c.stateSeqs)
	}
	var updated *int64
	if len(changed) > 0 {
		c := columnsOf(changed)
		query, args := updateWallets, []any{c.ids, c.balances, c.seqs, c.entryAts}
		if heads {
			query, args = updateHeads, append(args, c.helds, c.states, c.stateSeqs)
		}
		updated = new(int64)
		b.Queue(query, args...).Exec(func(tag pgconn.CommandTag) error {
			*updated = tag.RowsAffected()
			return nil
		})
	}
	if len(p.Entries) > 0 {
		queueEntries(&b, p.Entries)
		queueOutbox(&b, p.Entries)
	}
	queueHolds(&b, p.Holds)
	queueReversals(&b, p.Reversals)
	b.Queue(`COMMIT`)
	if err := conn.SendBatch(ctx, &b).Close(); err != nil {
		return err
	}
	if updated != nil && *updated != int64(len(changed)) {
		panic(fmt.Sprintf("updated %d wallets of %d that were locked", *updated, len(changed)))
	}
	return nil
}

func (l *ledger) writeMetrics(w *metric.Writer) {
	w.Counter("wallet_batches_total", "Batches committed.", float64(l.batches.Load()))
	w.Counter("wallet_operations_total", "Operations decided, replays and refusals included.",
		float64(l.operations.Load()))
	w.Counter("wallet_batch_reruns_total", "Batches run again after a pg.", float64(l.reruns.Load()))
	w.Counter("wallet_batch_splits_total", "Batches halved because one operation failed them.",
		float64(l.splits.Load()))
	w.Counter("wallet_hold_expiries_total", "Holds that this replica released, being due.",
		float64(l.expiries.Load()))
	if held := l.held.Load(); held != nil {
		var open, amounts []metric.Sample
		for _, h := range *held {
			label := `currency="` + h.currency + `"`
			open = append(open, metric.Sample{Labels: label, Value: h.holds})
			amounts = append(amounts, metric.Sample{Labels: label, Value: h.amount})
		}
		w.Gauges("wallet_holds_open", "Open holds, within the last minute.", open...)
		w.Gauges("wallet_held", "Money that open holds reserve, within the last minute.", amounts...)
	}
	w.Gauge("wallet_queue_operations", "Operations that wait for a batch.",
		float64(l.queue.Waiting()))
	w.Histogram("wallet_batch_operations", "Operations of a batch.", l.batchSizes)
	w.Histogram("wallet_batch_seconds", "From a batch's forming to its commit, reruns included.",
		l.batchSeconds)
	for _, pool := range []struct {
		name string
		*pgxpool.Pool
	}{{"read", l.db}, {"write", l.writes}} {
		stat := pool.Stat()
		w.Gauges("wallet_postgres_"+pool.name+"_connections", "Connections to Postgres.",
			metric.Sample{Labels: `state="busy"`, Value: float64(stat.AcquiredConns())},
			metric.Sample{Labels: `state="idle"`, Value: float64(stat.IdleConns())})
	}
}

// heldMoney is what open holds reserve in one currency.
type heldMoney struct {
	currency      string
	holds, amount float64
}

// countHolds looks how much is held, for the metrics.
func (l *ledger) countHolds(ctx context.Context) error {
	rows, _ := l.db.Query(ctx, `
SELECT w.currency, count(*)::float8, sum(h.remaining)::float8
FROM hold h JOIN wallet w ON w.id = h.wallet_id WHERE h.status = 'open' GROUP BY 1 ORDER BY 1`)
	var h heldMoney
	held := []heldMoney{}
	_, err := pgx.ForEachRow(rows, []any{&h.currency, &h.holds, &h.amount}, func() error {
		held = append(held, h)
		return nil
	})
	if err != nil {
		return fmt.Errorf("count open holds: %w", err)
	}
	l.held.Store(&held)
	return nil
}

// loadCurrencies reads the currency table: at start, and again every minute, so that a new row counts
// without a restart.
func (l *ledger) loadCurrencies(ctx context.Context) error {
	rows, _ := l.db.Query(ctx, `SELECT code, scale FROM currency`)
	scales := make(map[string]int32)
	var code string
	var scale int32
	if _, err := pgx.ForEachRow(rows, []any{&code, &scale},
		func() error { scales[code] = scale; return nil }); err != nil {
		return fmt.Errorf("read currencies: %w", err)
	}
	if _, known := scales[l.defaultCurrency]; !known {
		return fmt.Errorf("DEFAULT_CURRENCY %s is not in the table currency", l.defaultCurrency)
	}
	l.scales.Store(&scales)
	return nil
}

// -----------------------------------------------------------------------------------------------------------
// Holds over time
// -----------------------------------------------------------------------------------------------------------

// sweep releases holds that are due, as long as ctx lives: a second late at most. Every replica does, and the
// reserved key sees to it that each happens once. Captures do not wait for it: they look at the clock.
func (l *ledger) sweep(ctx context.Context) error {
	const pause = time.Second
	for last := ""; ; {
		found, err := l.releaseDue(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != last:
			slog.Warn("due holds not released, will try again", "error", err)
			last = err.Error()
		case err == nil:
			last = ""
		}
		if found == dueMax && err == nil {
			continue
		}
		if parts.Sleep(ctx, pause/2+rand.N(pause/2)) != nil {
			return nil
		}
	}
}

const dueHolds = `
SELECT wallet_id, seq FROM hold WHERE status = 'open' AND expires_at <= now() ORDER BY expires_at LIMIT $1`

func (l *ledger) releaseDue(ctx context.Context) (found int, err error) {
	ctx, cancel := context.WithTimeout(ctx, l.rerunBudget)
	defer cancel()
	rows, _ := l.db.Query(ctx, dueHolds, dueMax)
	var k book.EntryKey
	var due []*book.Operation
	_, err = pgx.ForEachRow(rows, []any{&k.WalletID, &k.Seq}, func() error {
		due = append(due, book.ExpiryOf(k.WalletID, k.Seq))
		return nil
	})
	if err != nil {
		return 0, err
	}
	outcomes := make(chan error, len(due))
	for _, op := range due {
		go func() { outcomes <- l.do(ctx, op) }()
	}
	for range due {
		if e := <-outcomes; e != nil && e != book.ErrNotDue {
			err = e
		}
	}
	return len(due), err
}
