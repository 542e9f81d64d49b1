package jsontext

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/shopspring/decimal"
)

func FuzzText(f *testing.F) {
	for _, seed := range []string{"", "plain", `"`, `a"b\\c`, "\x00\x1f\n", "é😀 ", `ends in \\`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var back string
		valid := []rune(s)
		text := AppendText(nil, string(valid))
		if err := json.Unmarshal(text, &back); err != nil || back != string(valid) {
			t.Fatalf("%q is written %s, which reads %q, %v", s, text, back, err)
		}
	})
}

func TestObject(t *testing.T) {
	o := Open([]byte("x"))
	o.Text("text", `<a "b">`)
	o.Integer("integer", -7)
	o.Number("number", decimal.RequireFromString("10.50"))
	o.Time("time", time.Date(2026, 1, 2, 4, 4, 5, 123456789, time.FixedZone("", 3600)))
	o.Flag("flag", true)
	inner := Open(nil)
	o.Name("inner")
	o.Dst = append(o.Dst, inner.Close()...)
	want := `x{"text":"<a \"b\">","integer":-7,"number":"10.5","time":"2026-01-02T03:04:05.123456Z",` +
		`"flag":true,"inner":{}}`
	if got := string(o.Close()); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
