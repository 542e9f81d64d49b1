// COPY's text format (https://www.postgresql.org/docs/current/sql-copy.html, File Formats): a third of the
// work of the binary one for us, since amounts are text already.

package rebuild

import (
	"bytes"
	"io"
	"strconv"

	"github.com/shopspring/decimal"

	"wallet/internal/money"
)

// buffer is rows on their way.
type buffer struct{ bytes []byte }

func (b *buffer) reader() io.Reader { return bytes.NewReader(b.bytes) }

func (b *buffer) next() { b.bytes = append(b.bytes, '\t') }
func (b *buffer) end()  { b.bytes = append(b.bytes, '\n') }
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
