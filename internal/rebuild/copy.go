// COPY's text format (https://www.postgresql.org/docs/current/sql-copy.html, File Formats): a third of the
// work of the binary one for us, since amounts are text already.

package rebuild

import (
	"bytes"
	"io"
	"strconv"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/book"
	"wallet/internal/jsontext"
	"wallet/internal/money"
)

// buffer is rows on their way.
type buffer struct {
	bytes []byte
	n     int // rows
}

func (b *buffer) reader() io.Reader { return bytes.NewReader(b.bytes) }

func (b *buffer) next() { b.bytes = append(b.bytes, '\t') }
func (b *buffer) end()  { b.bytes, b.n = append(b.bytes, '\n'), b.n+1 }
func (b *buffer) null() { b.bytes = append(b.bytes, '\\', 'N') }

// text is a value that may hold anything but a zero byte.
func (b *buffer) text(s string) {
	for i := range len(s) {
		switch c := s[i]; c {
		case '\\':
			b.bytes = append(b.bytes, '\\', '\\')
		case '\t':
			b.bytes = append(b.bytes, '\\', 't')
		case '\n':
			b.bytes = append(b.bytes, '\\', 'n')
		case '\r':
			b.bytes = append(b.bytes, '\\', 'r')
		default:
			b.bytes = append(b.bytes, c)
		}
	}
}

func (b *buffer) integer(n int64) { b.bytes = strconv.AppendInt(b.bytes, n, 10) }

func (b *buffer) integerOrNull(n int64) {
	if n == 0 {
		b.null()
		return
	}
	b.integer(n)
}

func (b *buffer) number(d decimal.Decimal) { b.bytes = money.Append(b.bytes, d) }

func (b *buffer) numberOrNull(d decimal.Decimal) {
	if d.IsZero() {
		b.null()
		return
	}
	b.number(d)
}

func (b *buffer) time(t time.Time) { b.bytes = t.UTC().AppendFormat(b.bytes, jsontext.TimeFormat) }

// wallet appends a row of copyWallets'.
func (b *buffer) wallet(w *book.Wallet) {
	b.integer(w.ID)
	b.next()
	b.text(w.Currency)
	b.next()
	b.number(w.Balance)
	b.next()
	b.integer(w.Seq)
	b.next()
	b.time(w.EntryAt)
	b.next()
	b.time(w.CreatedAt)
	b.next()
	b.number(w.Held)
	b.next()
	if w.State != "" {
		b.text(w.State)
	} else {
		b.null()
	}
	b.next()
	b.integerOrNull(w.StateSeq)
	b.end()
}

// hold appends a row of copyHolds'.
func (b *buffer) hold(h *book.Hold) {
	b.integer(h.WalletID)
	b.next()
	b.integer(h.Seq)
	b.next()
	b.integerOrNull(h.ToID)
	b.next()
	b.number(h.Amount)
	b.next()
	b.number(h.Captured)
	b.next()
	b.number(h.Remaining)
	b.next()
	b.text(h.Status)
	b.next()
	b.time(h.ExpiresAt)
	b.next()
	b.integer(h.LastSeq)
	b.end()
}

// reference appends a row of copyReferences'.
func (b *buffer) reference(walletID, seq int64, reference string) {
	b.text(reference)
	b.next()
	b.integer(walletID)
	b.next()
	b.integer(seq)
	b.end()
}

// entry appends a row of copyEntries'.
func (b *buffer) entry(e *book.Entry) {
	d := e.Says()
	b.integer(e.WalletID)
	b.next()
	b.integer(e.Seq)
	b.next()
	b.integerOrNull(e.CounterpartyID)
	b.next()
	b.integerOrNull(e.CounterpartySeq)
	b.next()
	b.time(e.CreatedAt)
	b.next()
	b.text(e.Kind)
	b.next()
	b.number(e.Amount)
	b.next()
	b.number(e.Balance)
	b.next()
	b.text(e.Key)
	b.next()
	b.integerOrNull(d.OfSeq)
	b.next()
	b.numberOrNull(d.HeldChange)
	b.next()
	b.numberOrNull(d.Held)
	b.next()
	if d.OfSeq != 0 || e.Kind == book.KindHold {
		b.number(d.Remaining)
	} else {
		b.null()
	}
	b.next()
	if d.NoteText != "" {
		b.text(d.NoteText)
	} else {
		b.null()
	}
	b.end()
}
