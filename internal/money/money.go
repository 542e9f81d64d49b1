// Package money reads and writes amounts as decimal text. No text passes through a float, nothing is rounded,
// and none costs more than its length.
//
// It touches nothing. It promises that what it prints is what shopspring/decimal's String prints, and that
// Parse accepts one form of a number only: no sign, no exponent, no leading zeros.
package money

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/shopspring/decimal"
)

const (
	WholeDigitsMax = 20 // before the point
	DecimalsMax    = 18 // after it
)

// Limit is the lowest number that has too many digits before the point.
var Limit = decimal.New(1, WholeDigitsMax)

// Amount is a positive decimal number and how many decimals it was written with.
type Amount struct {
	decimal.Decimal
	Decimals int32
}

// Error says why a text is no amount: a stable code, and a sentence that says what to do.
type Error struct{ code, detail string }

func (e *Error) Error() string { return e.code + ": " + e.detail }

// Refusal gives the code (amount_malformed, amount_exponent, amount_not_positive, amount_too_large,
// amount_scale) and the sentence.
func (e *Error) Refusal() (code, detail string) { return e.code, e.detail }

func refuse(code, format string, args ...any) *Error {
	return &Error{code, fmt.Sprintf(format, args...)}
}

var errMalformed = refuse("amount_malformed",
	"Write the amount as a plain decimal number, such as \"10.50\".")

// Parse reads a plain decimal number, such as "10.50". Digits are counted before anything is computed, so
// that no text is expensive. Its error is an *Error.
func Parse(s string) (Amount, error) {
	rest, negative := strings.CutPrefix(s, "-")
	whole, fraction, pointed := strings.Cut(rest, ".")
	switch {
	case strings.ContainsAny(s, "eE") && strings.Trim(s, "0123456789.eE+-") == "":
		return Amount{}, refuse("amount_exponent",
			"Write the amount without an exponent, such as \"10.50\".")
	case whole == "" || pointed && fraction == "" || strings.Trim(whole, "0123456789") != "" ||
		strings.Trim(fraction, "0123456789") != "":
		return Amount{}, errMalformed
	case len(whole) > 1 && whole[0] == '0':
		return Amount{}, refuse("amount_malformed",
			"Write the amount without leading zeros, such as \"10.50\".")
	case len(whole) > WholeDigitsMax:
		return Amount{}, refuse("amount_too_large", "An amount has at most %d digits before the point.",
			WholeDigitsMax)
	case len(fraction) > DecimalsMax:
		return Amount{}, refuse("amount_scale",
			"The amount has %d decimals; no currency here has more than %d.", len(fraction), DecimalsMax)
	}
	value, err := decimal.NewFromString(rest)
	if err != nil {
		return Amount{}, errMalformed
	}
	if negative || value.IsZero() {
		return Amount{}, refuse("amount_not_positive",
			"The amount must be greater than zero; the route says in which direction the money moves.")
	}
	return Amount{value, int32(len(fraction))}, nil
}

// Read reads what Append, decimal.String or Postgres writes. Up to 18 digits take no arithmetic of big
// numbers.
func Read(text []byte) (decimal.Decimal, error) {
	n, places, pointed := int64(0), int32(0), false
	digits, negative := text, len(text) > 0 && text[0] == '-'
	if negative {
		digits = text[1:]
	}
	if len(digits) == 0 || len(digits) > 18 || digits[0] == '.' {
		return decimal.NewFromString(string(text))
	}
	for _, c := range digits {
		switch {
		case c >= '0' && c <= '9':
			n = 10*n + int64(c-'0')
			if pointed {
				places++
			}
		case c == '.' && !pointed:
			pointed = true
		default:
			return decimal.NewFromString(string(text))
		}
	}
	if negative {
		n = -n
	}
	return decimal.New(n, -places), nil
}

// Append appends d as decimal.String writes it, without trailing zeros. Up to 18 digits take no arithmetic of
// big numbers.
func Append(dst []byte, d decimal.Decimal) []byte {
	places := int(-d.Exponent())
	if places < 0 || d.NumDigits() > 18 {
		return append(dst, d.String()...)
	}
	n := d.CoefficientInt64()
	for ; places > 0 && n%10 == 0; places-- {
		n /= 10
	}
	if n < 0 {
		dst, n = append(dst, '-'), -n
	}
	start := len(dst)
	dst = strconv.AppendInt(dst, n, 10)
	if places == 0 {
		return dst
	}
	for len(dst)-start <= places { // a digit before the point
		dst = slices.Insert(dst, start, '0')
	}
	return slices.Insert(dst, len(dst)-places, '.')
}

// Text is d as Append writes it.
func Text(d decimal.Decimal) string {
	var room [48]byte
	return string(Append(room[:0], d))
}
