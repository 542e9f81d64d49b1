package export

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"testing"
)

func TestFormats(t *testing.T) {
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte("{\"n\":1}\n{\"n\":2}\n")))
	for format, want := range map[string]string{
		JSON:  `{"id":1,"entries":[{"n":1},{"n":2}],"count":2}` + "\n",
		Lines: "{\"n\":1}\n{\"n\":2}\n{\"list\":{\"id\":1,\"count\":2}}\n",
		CSV:   "n,text\n1,'=1+1\n2,\"'-2,\"\"x\"\"\"\n,'@sum\n",
	} {
		var out bytes.Buffer
		head := []byte(`{"id":1`)
		w, err := NewWriter(&out, format, head, []string{"n", "text"})
		if err != nil {
			t.Fatal(err)
		}
		for i, text := range []string{"=1+1", `-2,"x"`} {
			n := fmt.Sprint(i + 1)
			if err := w.Item([]byte(`{"n":`+n+`}`),
				func() []string { return []string{n, text} }); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Row([]string{"", "@sum"}); err != nil {
			t.Fatal(err)
		}
		if err := w.Close("list", head, []byte(`"count":2`)); err != nil {
			t.Fatal(err)
		}
		if out.String() != want || w.Sum() != sum {
			t.Errorf("%s:\n%s\nwant\n%s\nsum %s, want %s", format, out.String(), want, w.Sum(), sum)
		}
	}
}

func TestNegotiate(t *testing.T) {
	for accept, want := range map[string]string{
		"": JSON, "*/*": JSON, "text/csv": CSV, "text/html, text/csv;q=0.5": CSV,
		"application/x-ndjson":            Lines,
		"application/json; charset=utf-8": JSON, "application/jsonl": Lines, "text/html": "", "x": "",
		"text/csv;q=0, application/json": JSON, "text/csv;q=0": "",
		"application/json;q=0.1, text/csv;q=0.2": CSV,
	} {
		if got, ok := Negotiate(accept); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", accept, got, ok)
		}
	}
}
