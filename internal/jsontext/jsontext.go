// Package jsontext writes JSON a member at a time, in the order of the calls and always in the same form, so
// that what is a contract byte for byte does not hang on a library's taste.
//
// It touches nothing.
package jsontext

import (
	"strconv"
	"time"

	"github.com/shopspring/decimal"

	"wallet/internal/money"
)

// TimeFormat is RFC 3339 in UTC with exactly six decimals: a fixed width, which sorts as text and is what
// Postgres keeps.
const TimeFormat = "2006-01-02T15:04:05.000000Z"

// AppendText appends s, which is valid UTF-8, as a JSON string: nothing is escaped but what must be (RFC
// 8259, 7), so that no library's taste shows in an event.
func AppendText(dst []byte, s string) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	plain := 0 // from here on nothing was escaped yet
	for i := range len(s) {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[plain:i]...)
		plain = i + 1
		if c < ' ' {
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		} else {
			dst = append(dst, '\\', c)
		}
	}
	return append(append(dst, s[plain:]...), '"')
}

// Object is a JSON object on its way: Dst ends in an open brace or a member, and lacks the closing brace.
type Object struct{ Dst []byte }

// Open begins an object.
func Open(dst []byte) Object { return Object{append(dst, '{')} }

// Close ends it.
func (o *Object) Close() []byte { return append(o.Dst, '}') }

// Name begins a member, whose value the caller appends.
func (o *Object) Name(name string) {
	if len(o.Dst) == 0 || o.Dst[len(o.Dst)-1] != '{' {
		o.Dst = append(o.Dst, ',')
	}
	o.Dst = append(append(append(o.Dst, '"'), name...), `":`...)
}

// Flag is one that is true or false.
func (o *Object) Flag(name string, v bool) { o.Name(name); o.Dst = strconv.AppendBool(o.Dst, v) }

// Text is a member that is a string.
func (o *Object) Text(name, v string) { o.Name(name); o.Dst = AppendText(o.Dst, v) }

// Integer is one that is a whole number.
func (o *Object) Integer(name string, v int64) {
	o.Name(name)
	o.Dst = strconv.AppendInt(o.Dst, v, 10)
}

// Number is one that is a decimal, as a string.
func (o *Object) Number(name string, v decimal.Decimal) {
	o.Name(name)
	o.Dst = append(money.Append(append(o.Dst, '"'), v), '"')
}

// Time is one that is a time, in TimeFormat.
func (o *Object) Time(name string, v time.Time) {
	o.Name(name)
	o.Dst = append(v.UTC().AppendFormat(append(o.Dst, '"'), TimeFormat), '"')
}
