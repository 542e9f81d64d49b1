package money

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/shopspring/decimal"
)

// TestAppend: as decimal.String, whatever the size, sign and places.
func TestAppend(t *testing.T) {
	for _, text := range []string{"0", "0.00", "1", "-1", "0.5", "-0.05", "10.50", "-100", "1000000",
		"999999999999999999", "-999999999999999999", "0.000000000000000001", "-0.999999999999999999",
		"99999999999999999999.999999999999999999", "1e3", "-12e2", "123456789012345678901234567890e-5"} {
		d := decimal.RequireFromString(text)
		if got := Text(d); got != d.String() {
			t.Errorf("%s is written %s, want %s", text, got, d)
		}
	}
	for range 10_000 {
		sign := decimal.New(1-2*rand.Int64N(2), 0)
		d := decimal.New(rand.Int64()>>rand.IntN(64), -int32(rand.IntN(20))).Mul(sign)
		if got := string(Append([]byte("-0."), d)); got != "-0."+d.String() {
			t.Fatalf("%s is written %s", d, got)
		}
	}
}

func FuzzAmount(f *testing.F) {
	for _, seed := range []string{"10.50", "0", "-1", "1e9", "NaN", "99999999999999999999.999999999999999999",
		"1e1000000000", "00", ".", "1.", "٣", "+1", " 1"} {
		f.Add(seed)
	}
	codes := strings.Fields("amount_malformed amount_exponent amount_not_positive amount_too_large " +
		"amount_scale")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := Parse(s)
		if err != nil {
			var no *Error
			if !errors.As(err, &no) {
				t.Fatalf("%q: not an Error: %v", s, err)
			}
			if code, detail := no.Refusal(); !slices.Contains(codes, code) || detail == "" {
				t.Fatalf("%q: %s: %s", s, code, detail)
			}
			return
		}
		whole, fraction, _ := strings.Cut(s, ".")
		if len(whole) > WholeDigitsMax || len(fraction) > DecimalsMax ||
			int(a.Decimals) != len(fraction) || !a.IsPositive() {
			t.Fatalf("%q was taken as %s with %d decimals", s, a, a.Decimals)
		}
		// What was taken is exactly what was written.
		if back := a.StringFixed(a.Decimals); back != s {
			t.Fatalf("%q came back as %q", s, back)
		}
	})
}

// TestRead: it reads what decimal does, and as it does.
func TestRead(t *testing.T) {
	for _, text := range []string{"0", "1", "-1", "0.00", "10.50", "-0.01", "123456789012345678",
		"12345678901234567.8", "-99999999999999999999.999999999999999999", "1e3", "", "-", "x", "1.2.3", "1-",
		"+1", ".5", "5.", ".", "-.", "NaN"} {
		want, wrong := decimal.NewFromString(text)
		got, err := Read([]byte(text))
		if (err == nil) != (wrong == nil) ||
			err == nil && (!got.Equal(want) || got.String() != want.String()) {
			t.Errorf("%q was read as %v, %v; want %v, %v", text, got, err, want, wrong)
		}
	}
}
