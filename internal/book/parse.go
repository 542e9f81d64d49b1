package book

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/shopspring/decimal"

	"wallet/internal/jsontext"
	"wallet/internal/money"
)

// ErrNotEvent is ParseEvent's: the text is not what AppendEvent writes.
var ErrNotEvent = errors.New("not an event that this ledger could have written")

// ParseEvent reads an event's JSON back to its entry, which has no traceparent. It takes just what
// AppendEvent writes, byte for byte: AppendEvent of the entry is the payload again. Its error is ErrNotEvent.
func ParseEvent(payload []byte) (Entry, error) {
	var e Entry
	p := eventParser{rest: payload}
	p.event(&e)
	if p.failed {
		return Entry{}, ErrNotEvent
	}
	var room [768]byte
	if again := AppendEvent(room[:0], &e); !bytes.Equal(again, payload) {
		return Entry{}, fmt.Errorf("%w: its entry says %s", ErrNotEvent, string(again))
	}
	return e, nil
}

// eventParser reads members from the front of an event. It is lenient where the comparison at the end is
// not: it trusts what it skips.
type eventParser struct {
	rest   []byte
	failed bool
}

func (p *eventParser) event(e *Entry) {
	e.WalletID = p.integer(`{"wallet_id":`)
	e.Seq = p.integer(`,"seq":`)
	p.text(`,"transaction_id":"`)
	e.Kind = interned(p.text(`,"kind":"`))
	e.Currency = interned(p.text(`,"currency":"`))
	e.Amount = p.number(`,"amount":"`)
	p.text(`,"balance_before":"`)
	e.Balance = p.number(`,"balance_after":"`)
	var d Details
	if p.has(`,"held_before":"`) {
		before := p.number("")
		d.Held = p.number(`,"held_after":"`)
		d.HeldChange = d.Held.Sub(before)
	}
	if p.has(`,"of_seq":`) {
		d.OfSeq = p.integer("")
	}
	if p.has(`,"remaining":"`) {
		d.Remaining = p.number("")
	}
	if p.has(`,"counterparty":{"wallet_id":`) {
		e.CounterpartyID = p.integer("")
		e.CounterpartySeq = p.integer(`,"seq":`)
		p.expect("}")
	}
	e.Key = p.quoted(`,"idempotency_key":`)
	at, err := EventTime(p.rest)
	if err == nil {
		e.CreatedAt, err = time.Parse(time.RFC3339Nano, string(at)) // for which Go has a fast path
		e.CreatedAt = e.CreatedAt.UTC()
	}
	if err != nil {
		p.failed = true
		return
	}
	note := p.rest[:len(p.rest)-len(`,"created_at":"`)-len(jsontext.TimeFormat)-len(`"}`)]
	if len(note) > 0 {
		d.NoteText = "{" + string(note[1:]) + "}"
		if d.Note, err = ParseNote(d.NoteText); err != nil || d.Note.json() != d.NoteText {
			p.failed = true
		}
	}
	if d != nothingMore {
		e.More = &d
	}
}

// has takes a text, if it is next.
func (p *eventParser) has(next string) bool {
	if len(p.rest) < len(next) || string(p.rest[:len(next)]) != next {
		return false
	}
	p.rest = p.rest[len(next):]
	return true
}

func (p *eventParser) expect(next string) {
	if !p.has(next) {
		p.failed = true
	}
}

func (p *eventParser) integer(name string) (n int64) {
	p.expect(name)
	end := 0
	for end < len(p.rest) && p.rest[end] >= '0' && p.rest[end] <= '9' {
		end++
	}
	n, err := strconv.ParseInt(string(p.rest[:end]), 10, 64)
	p.failed = p.failed || err != nil
	p.rest = p.rest[end:]
	return n
}

// text is what follows a name, up to the next quotation mark.
func (p *eventParser) text(name string) []byte {
	p.expect(name)
	end := bytes.IndexByte(p.rest, '"')
	if end < 0 {
		p.failed = true
		return nil
	}
	text := p.rest[:end]
	p.rest = p.rest[end+1:]
	return text
}

// number is a decimal. One of up to 18 digits takes no arithmetic of big numbers.
func (p *eventParser) number(name string) decimal.Decimal {
	text := p.text(name)
	digits := text
	if len(digits) > 0 && digits[0] == '-' {
		digits = digits[1:]
	}
	var n int64
	places, point := 0, false
	for _, c := range digits {
		switch {
		case c == '.' && !point:
			point = true
		case c < '0' || c > '9':
			p.failed = true
		case point:
			places++
			fallthrough
		default:
			n = 10*n + int64(c-'0')
		}
	}
	if p.failed || len(digits) == 0 || len(digits) > 64 {
		p.failed = true
		return decimal.Decimal{}
	}
	if len(digits) > 18 {
		d, err := decimal.NewFromString(string(text))
		p.failed = p.failed || err != nil
		return d
	}
	if len(digits) < len(text) {
		n = -n
	}
	return decimal.New(n, int32(-places))
}

// quoted is a JSON string as jsontext.AppendText writes it.
func (p *eventParser) quoted(name string) string {
	p.expect(name)
	if p.failed || !p.has(`"`) {
		p.failed = true
		return ""
	}
	end := 0
	escaped := false
	for ; end < len(p.rest) && p.rest[end] != '"'; end++ {
		if p.rest[end] == '\\' {
			escaped = true
			end++
		}
	}
	if end >= len(p.rest) {
		p.failed = true
		return ""
	}
	text := string(p.rest[:end])
	p.rest = p.rest[end+1:]
	if !escaped {
		return text
	}
	var plain strings.Builder
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] != '\\':
			plain.WriteByte(text[i])
		case strings.HasPrefix(text[i+1:], "u00") && len(text) >= i+6:
			c, err := strconv.ParseUint(text[i+4:i+6], 16, 8)
			p.failed = p.failed || err != nil
			plain.WriteByte(byte(c))
			i += 5
		default:
			i++
			plain.WriteByte(text[i])
		}
	}
	return plain.String()
}

// interned saves an allocation for the words that most events have.
func interned(text []byte) string {
	switch string(text) {
	case KindDeposit:
		return KindDeposit
	case KindWithdrawal:
		return KindWithdrawal
	case KindTransferOut:
		return KindTransferOut
	case KindTransferIn:
		return KindTransferIn
	case KindHold:
		return KindHold
	case KindRelease:
		return KindRelease
	case KindState:
		return KindState
	case "USD":
		return "USD"
	case "EUR":
		return "EUR"
	}
	return string(text)
}

// Bounds of schema.sql's.
const (
	noteLenMax      = 8192
	referenceLenMax = 255
)

// Misfit says what is wrong with an entry by itself, or nothing. It has the rules that schema.sql's
// constraints on entry have, and those that a chain does not ask.
func (e *Entry) Misfit() string {
	d := e.Says()
	transfer := e.Kind == KindTransferIn || e.Kind == KindTransferOut
	switch e.Kind {
	case KindDeposit, KindTransferIn:
		if !e.Amount.IsPositive() {
			return "its amount does not come in"
		}
	case KindWithdrawal, KindTransferOut:
		if !e.Amount.IsNegative() {
			return "its amount does not go out"
		}
	case KindHold, KindRelease, KindState:
		if !e.Amount.IsZero() {
			return "it moves money"
		}
	default:
		return "it is of no known kind"
	}
	switch {
	case e.WalletID < 1 || e.Seq < 1:
		return "it has no number"
	case !utf8.ValidString(e.Key) || !utf8.ValidString(d.NoteText) || strings.Contains(e.Key, "\x00") ||
		strings.Contains(d.NoteText, `\u0000`):
		return "it is no text that a database takes"
	case len(d.NoteText) > noteLenMax || len(d.Note.Reference) > referenceLenMax:
		return "it says too much"
	case e.Amount.Exponent() < -money.DecimalsMax || e.Balance.GreaterThanOrEqual(money.Limit):
		return "its amount has too many decimals, or its balance too many digits"
	case e.Kind == KindState && !slices.Contains(WalletStates, d.Note.State):
		return "it sets no known state"
	case e.Kind == KindState && d.Note.State == StateClosed && !e.Balance.IsZero():
		return "it closes a wallet that is not empty"
	case e.Kind == KindHold && d.Note.ExpiresAt.IsZero():
		return "it holds for ever"
	case transfer != (e.CounterpartyID > 0 && e.CounterpartySeq > 0) || e.CounterpartyID == e.WalletID:
		return "its counterparty is none"
	case len(e.Key) == 0 || len(e.Key) > KeyLenMax:
		return "its idempotency key is too long, or none"
	case e.Balance.IsNegative() || e.Balance.LessThan(e.Amount):
		return "its balance is negative, before or after it"
	case d.OfSeq >= e.Seq || d.OfSeq < 0 || d.Remaining.IsNegative():
		return "it is of an entry that comes later"
	case e.Kind == KindHold && (!d.HeldChange.IsPositive() || !d.Remaining.Equal(d.HeldChange) ||
		d.OfSeq != 0),
		e.Kind == KindRelease && (!d.HeldChange.IsNegative() || !d.Remaining.IsZero() || d.OfSeq == 0):
		return "what it holds or releases does not fit its kind"
	case e.Kind != KindHold && e.Kind != KindRelease && !d.HeldChange.IsZero() &&
		(!e.Amount.IsNegative() || d.HeldChange.GreaterThan(e.Amount) || d.OfSeq == 0):
		return "what it captures does not fit its amount"
	}
	return ""
}
