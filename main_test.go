// The HTTP API through its whole handler, against real servers.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"wallet/internal/api"
	"wallet/internal/jsontext"
)

// TestWalkthrough is the predecessor's walkthrough: its eight cases, with its routes and fields.
func TestWalkthrough(t *testing.T) {
	w := start(t, testEnv(t))

	// 1. A deposit creates the wallet.
	first := w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100.50","idempotency_key":"d1"}`)
	got := first.json(t)
	for name, want := range map[string]string{"transaction_id": "1-1", "wallet_id": "1", "currency": "USD",
		"amount": "100.5", "balance": "100.5", "seq": "1"} {
		if fmt.Sprint(got[name]) != want {
			t.Errorf("deposit: %s is %v, want %s", name, got[name], want)
		}
	}
	if _, err := time.Parse(jsontext.TimeFormat, fmt.Sprint(got["created_at"])); err != nil {
		t.Error(err)
	}
	// 2. The same key again: the same answer, and the money moved once.
	again := w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":100.5,"idempotency_key":"d1"}`)
	if again.body != first.body || again.header.Get("Idempotent-Replayed") != "true" ||
		first.header.Get("Idempotent-Replayed") != "" {
		t.Errorf("replay: %s, first %s", again, first)
	}
	// 3. The balance.
	const balance = `{"wallet_id":1,"currency":"USD","balance":"100.5","seq":1}`
	if a := w.get("/v1/wallets/1/balance"); a.body != balance {
		t.Errorf("balance: %s", a)
	}
	// 4. A withdrawal.
	if a := w.mustPost(t, 200, "/v1/wallets/1/withdraw",
		`{"amount":"30","idempotency_key":"w1"}`).json(t); a["balance"] != "70.5" || a["amount"] != "30" {
		t.Errorf("withdrawal: %v", a)
	}
	// 5. More than there is.
	if a := w.post("/v1/wallets/1/withdraw", `{"amount":"1000","idempotency_key":"w2"}`); a.status != 422 ||
		a.code() != "insufficient_funds" {
		t.Errorf("overdraft: %s", a)
	}
	// 6. A transfer; the predecessor's README sends to_id as a string, its code wants a number.
	transfer := w.mustPost(t, 200, "/v1/wallets/1/transfer",
		`{"to_id":"2","amount":"20.25","idempotency_key":"t1"}`)
	got = transfer.json(t)
	for name, want := range map[string]string{"transaction_id": "1-3", "from_balance": "50.25",
		"to_balance": "20.25", "from_seq": "3", "to_seq": "1"} {
		if fmt.Sprint(got[name]) != want {
			t.Errorf("transfer: %s is %v, want %s", name, got[name], want)
		}
	}
	if a := w.mustPost(t, 200, "/v1/wallets/1/transfer",
		`{"to_id":2,"amount":"20.25","idempotency_key":"t1"}`); a.body != transfer.body {
		t.Errorf("transfer replayed: %s, first %s", a, transfer)
	}
	// 7. The history of both.
	var items []map[string]any
	json.Unmarshal([]byte(w.get("/v1/wallets/1/history").body), &items)
	var kinds []string
	for _, item := range items {
		kinds = append(kinds, fmt.Sprint(item["kind"], item["amount"]))
	}
	if want := []string{"deposit100.5", "withdrawal-30", "transfer_out-20.25"}; !slices.Equal(kinds, want) {
		t.Errorf("history: %v, want %v", kinds, want)
	}
	// 8. A wallet that does not exist.
	if a := w.post("/v1/wallets/99/withdraw", `{"amount":"1","idempotency_key":"x"}`); a.status != 404 ||
		a.code() != "wallet_not_found" {
		t.Errorf("unknown wallet: %s", a)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestRefusals causes each refusal that a request can bring about, and finds nothing left behind by any.
func TestRefusals(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"seed"}`)
	w.mustPost(t, 200, "/v1/wallets/2/deposit", `{"amount":"100","currency":"JPY","idempotency_key":"seed"}`)
	w.mustPost(t, 200, "/v1/wallets/3/deposit", `{"amount":"99999999999999999999","idempotency_key":"seed"}`)
	before := w.mustCount(t)

	big := `{"amount":"1","idempotency_key":"` + strings.Repeat("k", bodyBytesMax) + `"}`
	for _, c := range []struct {
		path, body string
		status     int
		code       string
	}{
		{"1/deposit", `{"amount":"0","idempotency_key":"k"}`, 400, "amount_not_positive"},
		{"1/deposit", `{"amount":"0.00","idempotency_key":"k"}`, 400, "amount_not_positive"},
		{"1/deposit", `{"amount":"-5","idempotency_key":"k"}`, 400, "amount_not_positive"},
		{"1/deposit", `{"amount":-5,"idempotency_key":"k"}`, 400, "amount_not_positive"},
		{"1/deposit", `{"amount":"1e3","idempotency_key":"k"}`, 400, "amount_exponent"},
		{"1/deposit", `{"amount":1E3,"idempotency_key":"k"}`, 400, "amount_exponent"},
		{"1/deposit", `{"amount":"1e1000000000","idempotency_key":"k"}`, 400, "amount_exponent"},
		{"1/deposit", `{"amount":"NaN","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"Infinity","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":" 1","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"+1","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"1.","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":".5","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"1,5","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"0x10","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"007","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"١","idempotency_key":"k"}`, 400, "amount_malformed"},
		{"1/deposit", `{"amount":"123456789012345678901","idempotency_key":"k"}`, 400, "amount_too_large"},
		{"1/deposit", `{"amount":"1.005","idempotency_key":"k"}`, 422, "amount_scale"},
		{"1/deposit", `{"amount":"1.0000000000000000001","idempotency_key":"k"}`, 422, "amount_scale"},
		{"2/deposit", `{"amount":"1.5","idempotency_key":"k"}`, 422, "amount_scale"},
		{"3/deposit", `{"amount":"1","idempotency_key":"k"}`, 422, "balance_limit"},
		{"3/transfer", `{"amount":"1","to_id":3,"idempotency_key":"k"}`, 400, "same_wallet"},
		{"1/transfer", `{"amount":"1","to_id":2,"idempotency_key":"k"}`, 422, "currency_mismatch"},
		{"1/transfer", `{"amount":"1","to_id":3,"idempotency_key":"k"}`, 422, "balance_limit"},
		{"1/transfer", `{"amount":"1","idempotency_key":"k"}`, 400, "field_missing"},
		{"1/transfer", `{"amount":"1","to_id":"x","idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"1/transfer", `{"amount":"1","to_id":1.5,"idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"1/transfer", `{"amount":"1","to_id":9223372036854775808,"idempotency_key":"k"}`, 400,
			"wallet_id_malformed"},
		{"9/transfer", `{"amount":"1","to_id":10,"idempotency_key":"k"}`, 404, "wallet_not_found"},
		{"1/transfer", `{"amount":"1000","to_id":10,"idempotency_key":"k"}`, 422, "insufficient_funds"},
		{"1/withdraw", `{"amount":"100.01","idempotency_key":"k"}`, 422, "insufficient_funds"},
		{"9/withdraw", `{"amount":"1","idempotency_key":"k"}`, 404, "wallet_not_found"},
		{"1/deposit", `{"amount":"1","currency":"EUR","idempotency_key":"k"}`, 422, "currency_mismatch"},
		{"1/deposit", `{"amount":"1","currency":"usd","idempotency_key":"k"}`, 400, "currency_malformed"},
		{"1/deposit", `{"amount":"1","currency":840,"idempotency_key":"k"}`, 400, "currency_malformed"},
		{"9/deposit", `{"amount":"1","currency":"QQQ","idempotency_key":"k"}`, 422, "currency_unknown"},
		{"1/deposit", `{"amount":"2","idempotency_key":"seed"}`, 422, "idempotency_key_reused"},
		{"1/withdraw", `{"amount":"100","idempotency_key":"seed"}`, 422, "idempotency_key_reused"},
		{"1/transfer", `{"amount":"100","to_id":5,"idempotency_key":"seed"}`, 422, "idempotency_key_reused"},
		{"1/deposit", `{"amount":"100","currency":"EUR","idempotency_key":"seed"}`, 422,
			"idempotency_key_reused"},
		{"1/deposit", `{"amount":"1"}`, 400, "idempotency_key_missing"},
		{"1/deposit", `{"amount":"1","idempotency_key":""}`, 400, "idempotency_key_malformed"},
		{"1/deposit", `{"amount":"1","idempotency_key":5}`, 400, "idempotency_key_malformed"},
		{"1/deposit", `{"amount":"1","idempotency_key":"ключ"}`, 400, "idempotency_key_malformed"},
		{"1/deposit", `{"amount":"1","idempotency_key":"a\nb"}`, 400, "idempotency_key_malformed"},
		{"1/deposit", `{"amount":"1","idempotency_key":"` + strings.Repeat("k", 256) + `"}`, 400,
			"idempotency_key_malformed"},
		{"1/deposit", `{"idempotency_key":"k"}`, 400, "field_missing"},
		{"1/deposit", `{"amount":"1","idempotency_key":"k","note":"x"}`, 400, "field_unknown"},
		{"1/deposit", `{"amount":"1","idempotency_key":"k","to_id":2}`, 400, "field_unknown"},
		{"1/deposit", `{"Amount":"1","idempotency_key":"k"}`, 400, "field_unknown"},
		{"1/deposit", `{"amount":"1","amount":"2","idempotency_key":"k"}`, 400, "field_duplicate"},
		{"1/deposit", `{"amount":"1","idempotency_key":"k"} {}`, 400, "body_malformed"},
		{"1/deposit", `{"amount":"1","idempotency_key":"k"`, 400, "body_malformed"},
		{"1/deposit", `{"amount":null,"idempotency_key":"k"}`, 400, "body_malformed"},
		{"1/deposit", `{"amount":{"x":1},"idempotency_key":"k"}`, 400, "body_malformed"},
		{"1/deposit", `{"amount":["1"],"idempotency_key":"k"}`, 400, "body_malformed"},
		{"1/deposit", `[]`, 400, "body_malformed"},
		{"1/deposit", ``, 400, "body_malformed"},
		{"1/deposit", `amount=1`, 400, "body_malformed"},
		{"1/deposit", big, 413, "body_too_large"},
		{"0/deposit", `{"amount":"1","idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"-1/deposit", `{"amount":"1","idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"01/deposit", `{"amount":"1","idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"9223372036854775808/deposit", `{"amount":"1","idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"abc/deposit", `{"amount":"1","idempotency_key":"k"}`, 400, "wallet_id_malformed"},
		{"1/steal", `{}`, 404, "route_not_found"},
	} {
		a := w.post("/v1/wallets/"+c.path, c.body)
		if a.status != c.status || a.code() != c.code {
			t.Errorf("POST %s %.80s: %s, want %d %s", c.path, c.body, a, c.status, c.code)
			continue
		}
		if got := a.header.Get("Content-Type"); got != "application/problem+json" {
			t.Errorf("POST %s %.80s: content type %s", c.path, c.body, got)
		}
		if p := a.json(t); p["error"] != p["detail"] || p["detail"] == "" || p["title"] == "" ||
			p["request_id"] != a.header.Get("X-Request-Id") {
			t.Errorf("POST %s %.80s: not a whole problem document: %s", c.path, c.body, a)
		}
	}
	for _, c := range []struct {
		path   string
		status int
		code   string
	}{
		{"/v1/wallets/9", 404, "wallet_not_found"},
		{"/v1/wallets/9/balance", 404, "wallet_not_found"},
		{"/v1/wallets/9/history", 404, "wallet_not_found"},
		{"/v1/wallets/1/balance?min_seq=2", 409, "seq_not_reached"},
		{"/v1/wallets/1/balance?min_seq=x", 400, "parameter_malformed"},
		{"/v1/wallets/1/balance?x=1", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?limit=0", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?limit=1001", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?limit=5&limit=6", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?since=yesterday", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?order=up", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?cursor=!!", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?cursor=YS4xLjI&order=asc", 400, "parameter_malformed"},
		{"/v1/wallets/1/history?%zz", 400, "parameter_malformed"},
		{"/v1/transactions/1-9", 404, "transaction_not_found"},
		{"/v1/transactions/1", 400, "transaction_id_malformed"},
		{"/v1/transactions/1-x", 400, "transaction_id_malformed"},
		{"/v1/wallets/x", 400, "wallet_id_malformed"},
		{"/nothing", 404, "route_not_found"},
	} {
		if a := w.get(c.path); a.status != c.status || a.code() != c.code {
			t.Errorf("GET %s: %s, want %d %s", c.path, a, c.status, c.code)
		}
	}
	if a := w.post("/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`, "Content-Type",
		"application/x-www-form-urlencoded"); a.status != 415 || !strings.Contains(a.body, "curl --json") {
		t.Errorf("form: %s", a)
	}
	if a := w.post("/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"k"}`, "Idempotency-Key",
		"other"); a.code() != "idempotency_key_conflict" {
		t.Errorf("two keys: %s", a)
	}
	if a := w.get("/v1/wallets/1/deposit"); a.status != 405 || a.header.Get("Allow") != "POST" ||
		a.code() != "method_not_allowed" {
		t.Errorf("GET of a POST route: %s, Allow %s", a, a.header.Get("Allow"))
	}
	if after := w.mustCount(t); after != before {
		t.Errorf("refusals left something behind: %s, before %s", after, before)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

func TestRefusedOperationMaySucceedLaterWithItsKey(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
	w.mustPost(t, 422, "/v1/wallets/1/withdraw", `{"amount":"2","idempotency_key":"b"}`)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"c"}`)
	if a := w.mustPost(t, 200, "/v1/wallets/1/withdraw",
		`{"amount":"2","idempotency_key":"b"}`).json(t); a["balance"] != "0" {
		t.Errorf("retry after topping up: %v", a)
	}
}

// TestKeyOfPayerAndPayee: a payer's key is in the payee's entry too, and yet the payee may use the same key.
func TestKeyOfPayerAndPayee(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"10","idempotency_key":"same"}`)
	w.mustPost(t, 200, "/v1/wallets/2/deposit", `{"amount":"10","idempotency_key":"same"}`)
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"1","to_id":2,"idempotency_key":"t"}`)
	w.mustPost(t, 200, "/v1/wallets/2/transfer", `{"amount":"1","to_id":1,"idempotency_key":"t"}`)
	checkLedger(t, w.env["DATABASE_URL"])
}

func TestKeyFromHeaderOrBody(t *testing.T) {
	w := start(t, testEnv(t))
	first := w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1"}`, "Idempotency-Key", `a "b" \c`)
	for _, header := range []string{`a "b" \c`, `"a \"b\" \\c"`} {
		if a := w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1"}`, "Idempotency-Key",
			header); a.body != first.body {
			t.Errorf("header %s: %s", header, a)
		}
	}
	if a := w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a \"b\" \\c"}`,
		"Idempotency-Key", `a "b" \c`); a.body != first.body {
		t.Errorf("header and body: %s", a)
	}
	// The event and the history carry it as JSON.
	var items []struct {
		Key string `json:"idempotency_key"`
	}
	if err := json.Unmarshal([]byte(w.get("/v1/wallets/1/history").body), &items); err != nil ||
		len(items) != 1 || items[0].Key != `a "b" \c` {
		t.Errorf("history: %v %v", items, err)
	}
}

func TestCreateWallet(t *testing.T) {
	w := start(t, testEnv(t))
	a := w.mustPost(t, 201, "/v1/wallets", `{"id":7,"currency":"BTC"}`)
	if got := a.json(t); fmt.Sprint(got["wallet_id"]) != "7" || got["currency"] != "BTC" ||
		got["balance"] != "0" || a.header.Get("Location") != "/v1/wallets/7" {
		t.Errorf("created: %s", a)
	}
	if a := w.post("/v1/wallets", `{"id":7,"currency":"BTC"}`); a.status != 409 ||
		a.code() != "wallet_exists" {
		t.Errorf("again without a key: %s", a)
	}
	if a := w.mustPost(t, 400, "/v1/wallets", `{"currency":"EUR"}`); a.code() != "idempotency_key_missing" {
		t.Errorf("neither id nor key: %s", a)
	}
	chosen := w.mustPost(t, 201, "/v1/wallets", `{"currency":"EUR","idempotency_key":"c"}`)
	again := w.mustPost(t, 201, "/v1/wallets", `{"currency":"EUR","idempotency_key":"c"}`)
	if chosen.body != again.body || again.header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("replay: %s, first %s", again, chosen)
	}
	if a := w.mustPost(t, 422, "/v1/wallets",
		`{"currency":"USD","idempotency_key":"c"}`); a.code() != "idempotency_key_reused" {
		t.Errorf("key reused: %s", a)
	}
	w.mustPost(t, 201, "/v1/wallets", `{"id":8,"idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets", `{"id":8,"idempotency_key":"d"}`)
	w.mustPost(t, 422, "/v1/wallets", `{"id":9,"idempotency_key":"d"}`)
	w.mustPost(t, 200, "/v1/wallets/7/deposit", `{"amount":"0.00000001","idempotency_key":"x"}`)
	if a := w.get("/v1/wallets/7"); a.json(t)["balance"] != "0.00000001" {
		t.Errorf("a satoshi: %s", a)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestTransferOpensWallet: the payee is made in the transfer's currency, which is the payer's.
func TestTransferOpensWallet(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","currency":"EUR","idempotency_key":"a"}`)
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"2","to_id":2,"idempotency_key":"b"}`)
	if a := w.get("/v1/wallets/2").json(t); a["currency"] != "EUR" || a["balance"] != "2" {
		t.Errorf("payee: %v", a)
	}
}

// TestSameKeyPostsOnce is the predecessor's own load line, hey -n 1000 -c 50 with one key, against two
// replicas at once: every answer is a 200 with the same bytes, and the money moves once.
func TestSameKeyPostsOnce(t *testing.T) {
	env := testEnv(t)
	replicas := []*running{start(t, env), start(t, env)}
	bodies := make([]string, 1000)
	var clients sync.WaitGroup
	next := make(chan int, len(bodies))
	for i := range bodies {
		next <- i
	}
	close(next)
	for range 50 {
		clients.Go(func() {
			for i := range next {
				bodies[i] = replicas[i%2].post("/v1/wallets/1/deposit",
					`{"amount":"10.50","idempotency_key":"storm"}`).String()
			}
		})
	}
	clients.Wait()
	slices.Sort(bodies)
	if distinct := slices.Compact(bodies); len(distinct) != 1 || !strings.HasPrefix(distinct[0], "200 ") {
		t.Errorf("%d different answers: %.500s", len(distinct), distinct)
	}
	if a := replicas[0].get("/v1/wallets/1").json(t); a["balance"] != "10.5" || fmt.Sprint(a["seq"]) != "1" {
		t.Errorf("wallet: %v", a)
	}
	checkLedger(t, env["DATABASE_URL"])
}

func TestHistory(t *testing.T) {
	w := start(t, testEnv(t))
	for i := range 25 {
		w.mustPost(t, 200, "/v1/wallets/1/deposit", fmt.Sprintf(`{"amount":"1","idempotency_key":"k%d"}`, i))
	}
	type item struct {
		Seq       int64     `json:"seq"`
		CreatedAt time.Time `json:"created_at"`
	}
	page := func(path string) (seqs []int64, items []item, next string) {
		t.Helper()
		a := w.get(path)
		if err := json.Unmarshal([]byte(a.body), &items); err != nil {
			t.Fatalf("GET %s: %s", path, a)
		}
		for _, i := range items {
			seqs = append(seqs, i.Seq)
		}
		toNext := regexp.MustCompile(`^<([^>]+)>; rel="next"$`)
		if link := toNext.FindStringSubmatch(a.header.Get("Link")); link != nil {
			next = link[1]
		}
		return seqs, items, next
	}
	span := func(from, to int64) (seqs []int64) {
		step := int64(1)
		if to < from {
			step = -1
		}
		for s := from; s != to+step; s += step {
			seqs = append(seqs, s)
		}
		return seqs
	}
	_, all, _ := page("/v1/wallets/1/history")
	if len(all) != 25 {
		t.Fatalf("%d items, want 25", len(all))
	}
	at := func(i int) string { return url.QueryEscape(all[i].CreatedAt.Format(time.RFC3339Nano)) }
	for _, c := range []struct {
		path string
		want []int64
	}{
		{"?limit=3", span(1, 3)},
		{"?limit=3&order=desc", span(25, 23)},
		{"?since=" + at(10), span(11, 25)},
		{"?until=" + at(10), span(1, 10)},
		{"?since=" + at(5) + "&until=" + at(8), span(6, 8)},
		{"?since=" + at(5) + "&until=" + at(8) + "&order=desc", span(8, 6)},
		{"?since=2099-01-01T00:00:00Z", nil},
		{"?until=2001-01-01T00:00:00Z", nil},
	} {
		if got, _, _ := page("/v1/wallets/1/history" + c.path); !slices.Equal(got, c.want) {
			t.Errorf("history%s: %v, want %v", c.path, got, c.want)
		}
	}
	if a := w.get("/v1/wallets/1/history?since=2099-01-01T00:00:00Z"); a.body != "[]" {
		t.Errorf("nothing: %s", a)
	}
	for _, c := range []struct {
		order string
		want  []int64
	}{{"asc", span(1, 27)}, {"desc", span(27, 1)}} {
		var seqs []int64
		next := "/v1/wallets/1/history?limit=10&order=" + c.order
		for next != "" {
			var got []int64
			got, _, next = page(next)
			seqs = append(seqs, got...)
			// Writes go on while a client pages: ascending, they come at the end; descending, they are newer
			// than the first page.
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"late1"}`)
			w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"late2"}`)
			if c.order == "desc" {
				w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"late3"}`)
			}
		}
		if !slices.Equal(seqs, c.want) {
			t.Errorf("pages %s: %v, want %v", c.order, seqs, c.want)
		}
	}
}

// TestHistoryBesideTheFirstEntry: a wallet that a deposit makes has an entry from its first moment on.
func TestHistoryBesideTheFirstEntry(t *testing.T) {
	env := testEnv(t)
	w, reader := start(t, env), start(t, env)
	for id := 1; id <= 150; id++ {
		made := make(chan answer)
		go func() {
			made <- w.post(fmt.Sprintf("/v1/wallets/%d/deposit", id), `{"amount":"1","idempotency_key":"a"}`)
		}()
		for seen := false; !seen; {
			switch a := reader.get(fmt.Sprintf("/v1/wallets/%d/history", id)); {
			case a.status == 200 && a.body == "[]":
				t.Errorf("wallet %d exists without an entry", id)
				seen = true
			case a.status == 200:
				seen = true
			case a.status != 404:
				t.Fatal(a)
			}
		}
		if a := <-made; a.status != 200 {
			t.Fatal(a)
		}
	}
}

func TestTransactionByID(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"a"}`)
	sent := w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"2","to_id":2,"idempotency_key":"b"}`)
	want := strings.TrimSuffix(sent.body, "}") + `,"kind":"transfer","idempotency_key":"b"}`
	if a := w.get("/v1/transactions/1-2"); a.body != want {
		t.Errorf("transaction: %s, want %s", a, want)
	}
}

// TestReadsSeeWhatWasAnswered: a read sent after a write's answer sees its effect, from either replica, with
// the cache on.
func TestReadsSeeWhatWasAnswered(t *testing.T) {
	env := testEnv(t)
	a, b := start(t, env), start(t, env)
	for i := range 100 {
		w, r := a, b
		if i%2 == 0 {
			w, r = b, a
		}
		w.mustPost(t, 200, "/v1/wallets/1/deposit", fmt.Sprintf(`{"amount":"1","idempotency_key":"k%d"}`, i))
		want := fmt.Sprintf(`{"wallet_id":1,"currency":"USD","balance":"%d","seq":%d}`, i+1, i+1)
		if got := r.get("/v1/wallets/1/balance"); got.body != want {
			t.Fatalf("balance: %s, want %s", got, want)
		}
		if got := r.get("/v1/wallets/1/balance?min_seq="+fmt.Sprint(i+1), "Cache-Control",
			"no-cache"); got.body != want {
			t.Fatalf("fresh balance: %s, want %s", got, want)
		}
	}
}

func TestStartingAndStopping(t *testing.T) {
	w := start(t, testEnv(t))
	if a := w.get("/healthz"); a.status != 200 {
		t.Errorf("healthz: %s", a)
	}
	w.api.Draining.Store(true)
	if a := w.get("/readyz"); a.status != 503 || a.header.Get("Retry-After") == "" {
		t.Errorf("readyz while draining: %s", a)
	}
	// Open requests are still served, and their connections not kept.
	r := httptest.NewRequest("POST", "/v1/wallets/1/deposit",
		strings.NewReader(`{"amount":"1","idempotency_key":"k"}`))
	r.Header.Set("Content-Type", "application/json")
	recorder := httptest.NewRecorder()
	w.api.public.ServeHTTP(recorder, r)
	if recorder.Code != 200 || recorder.Header().Get("Connection") != "close" {
		t.Errorf("while draining: %d, Connection %q", recorder.Code, recorder.Header().Get("Connection"))
	}
}

// TestEveryProblemIsDocumentedOnce: each code that the code refuses with, in whichever package, is in the
// table, and each in the table is used. The API has a table of its own: no code is in both.
func TestEveryProblemIsDocumentedOnce(t *testing.T) {
	used := make(map[string]bool)
	folders, err := os.ReadDir("internal")
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob("*.go")
	for _, folder := range folders {
		inside, _ := filepath.Glob(filepath.Join("internal", folder.Name(), "*.go"))
		files = append(files, inside...)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		refuses := regexp.MustCompile(`[rR]efuse\(\s*"([a-z_]+)"`)
		for _, match := range refuses.FindAllStringSubmatch(string(source), -1) {
			used[match[1]] = true
		}
	}
	all := api.New(api.Config{Problems: problems}).Problems
	for code := range used {
		if _, known := all[code]; !known {
			t.Errorf("%s is refused with, but has no status", code)
		}
	}
	own := api.New(api.Config{Problems: map[string]api.Problem{}}).Problems
	if len(own)+len(problems) != len(all) {
		t.Errorf("of %d problems and the API's own %d some are the same", len(problems), len(own))
	}
	for code := range all {
		if !used[code] {
			t.Errorf("%s has a status, but nothing is refused with it", code)
		}
	}
}

// -----------------------------------------------------------------------------------------------------------
// Configuration and start
// -----------------------------------------------------------------------------------------------------------

func TestConfigurationRefusals(t *testing.T) {
	read := func(env map[string]string) (*config, error) {
		return readConfig(func(name string) string { return env[name] })
	}
	good := map[string]string{"DATABASE_URL": "postgres://localhost/wallet"}
	for name, bad := range map[string]string{
		"DATABASE_URL": "mysql://x", "WRITERS": "0", "WRITE_BATCH_MAX": "many", "REQUEST_TIMEOUT": "5",
		"LOG_LEVEL": "loud", "LOG_FORMAT": "xml",
		"KAFKA_BROKERS": "broker", "KAFKA_TOPIC": "a b", "REPLICATION_SLOT": "A-B",
		"REDIS_URL": "localhost:6379", "KAFKA_TLS": "perhaps",
		"KAFKA_SASL_MECHANISM": "GSSAPI", "KAFKA_PARTITIONS": "0", "CACHE_TTL": "0s",
	} {
		env := map[string]string{"DATABASE_URL": good["DATABASE_URL"], name: bad}
		if _, err := read(env); err == nil || !strings.HasPrefix(err.Error(), "set "+name+" to ") {
			t.Errorf("%s=%s: %v", name, bad, err)
		}
	}
	for _, half := range []map[string]string{
		{"KAFKA_TLS_CA": "ca.pem"},
		{"KAFKA_TLS": "false", "KAFKA_TLS_CERT": "c.pem", "KAFKA_TLS_KEY": "k.pem"},
		{"KAFKA_TLS": "true", "KAFKA_TLS_KEY": "k.pem"},
		{"KAFKA_TLS": "true", "KAFKA_TLS_CERT": "c.pem"},
		{"KAFKA_SASL_MECHANISM": "PLAIN"},
		{"KAFKA_SASL_USER": "u", "KAFKA_SASL_PASSWORD": "p"},
		{"KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USER": "u"},
	} {
		half["DATABASE_URL"] = good["DATABASE_URL"]
		if _, err := read(half); err == nil || !strings.HasPrefix(err.Error(), "set KAFKA_") {
			t.Errorf("%v: %v", half, err)
		}
	}
	if _, err := read(nil); err == nil || !strings.Contains(err.Error(), "DATABASE_URL") {
		t.Errorf("nothing set: %v", err)
	}
	cfg, err := read(good)
	if err != nil || cfg.migrateURL != cfg.databaseURL || cfg.kafkaTopic != "wallet.events" ||
		cfg.kafkaRetention >= 0 {
		t.Errorf("defaults: %+v %v", cfg, err)
	}
	_, err = read(map[string]string{"DATABASE_URL": "secret-password"})
	if strings.Contains(fmt.Sprint(err), "secret-password") {
		t.Errorf("the sentence shows a secret: %v", err)
	}
}

// TestBadConfigurationExits2 runs the program: one sentence, exit 2.
func TestBadConfigurationExits2(t *testing.T) {
	out, err := walletCommand(t, map[string]string{"DATABASE_URL": "nonsense"}).CombinedOutput()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 ||
		strings.Count(string(out), "\n") != 1 {
		t.Errorf("%v: %s", err, out)
	}
	help, err := walletCommand(t, nil, "-h").Output()
	all, err2 := walletCommand(t, nil, "-settings").Output()
	if err := errors.Join(err, err2); err != nil {
		t.Error(err)
	}
	for _, s := range new(config).settings() {
		if !strings.Contains(string(help), s.Name) || !strings.Contains(string(all), s.Name+" ") ||
			!strings.Contains(string(all), s.Help) {
			t.Errorf("-h or -settings does not name %s, or -settings says not what it is", s.Name)
		}
	}
	if strings.Count(string(help), "\n") > 40 || regexp.MustCompile("(?m)^.{101}").Match(help) {
		t.Errorf("-h does not fit a screen:\n%s", help)
	}

	// Who begins with nothing is told what there must be, and how to do without.
	for command, says := range map[string]string{
		"": "(?s)^wallet: set DATABASE_URL .*KAFKA_BROKERS.*REDIS_URL.*\n" +
			".*`go run -C dev [.]` in a checkout\n$",
		"-audti":              "^wallet: [^\n]*-audti[^\n]*\n$",
		"-new-key alice:reed": `^wallet: "reed" is no scope: there are operate, read, write[^\n]*\n$`,
		"-new-key alice+read": `^wallet: "alice[+]read" is no client's name[^\n]*\n$`,
		"-audit -migrate":     "^wallet: say -audit or -migrate, not both[^\n]*\n$",
		"-audit -since x": "^wallet: -since x: write a while such as 24h or 90m, of at most " +
			"48h[^\n]*\n$",
		"-audit -since -1h":    "^wallet: -since -1h: write a while[^\n]*\n$",
		"-audit -since 49h":    "^wallet: -since 49h: write a while[^\n]*\n$",
		"-since 24h":           "^wallet: say -since with -audit[^\n]*\n$",
		"-adopt somewhere":     `^wallet: leave out "somewhere"[^\n]*\n$`,
		"-migrate -version=no": "^wallet: [^\n]*it takes no value[^\n]*\n$",
	} {
		said, err := walletCommand(t, nil, strings.Fields(command)...).CombinedOutput()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 ||
			strings.Count(string(said), "\n") > 3 || !regexp.MustCompile(says).Match(said) {
			t.Errorf("wallet %s: %v, %s", command, err, said)
		}
	}
}

// TestPortInUse: whose setting it is, and that somebody has the port.
func TestPortInUse(t *testing.T) {
	taken := newListener(t)
	defer taken.Close()
	for _, name := range []string{"LISTEN_ADDR", "OPERATE_ADDR"} {
		env := map[string]string{"DATABASE_URL": "postgres://x@127.0.0.1:1/x", "LISTEN_ADDR": "127.0.0.1:0"}
		env[name] = taken.Addr().String()
		said, err := walletCommand(t, env).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(said)), "\n")
		if last := lines[len(lines)-1]; err == nil || !strings.HasPrefix(last, "wallet: set "+name+" to") ||
			!strings.Contains(last, "address already in use") {
			t.Errorf("%v, %s", err, said)
		}
	}
}

// TestSecondInterruptEndsAtOnce: Ctrl-C drains; who does not want to wait says it again.
func TestSecondInterruptEndsAtOnce(t *testing.T) {
	listener := newListener(t)
	address := listener.Addr().String()
	listener.Close()
	cmd := walletCommand(t, map[string]string{"DATABASE_URL": "postgres://x@127.0.0.1:1/x",
		"DRAIN_DELAY": "1m", "LISTEN_ADDR": address})
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	eventually(t, 10*time.Second, "alive", func() bool {
		response, err := http.Get("http://" + address + "/healthz")
		if err == nil {
			response.Body.Close()
		}
		return err == nil
	})
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-ended:
		t.Fatalf("did not drain: %v, %s", err, said.String())
	case <-time.After(time.Second):
	}
	cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-ended:
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 130 ||
			!strings.Contains(said.String(), "\ninterrupted again: ended at once") {
			t.Errorf("%v, %s", err, said.String())
		}
	case <-time.After(10 * time.Second):
		t.Error("still draining")
	}
}

// TestForeignTablesAreRefused: the predecessor has a table wallet too.
func TestForeignTablesAreRefused(t *testing.T) {
	env := testEnv(t)
	if _, err := connect(t, env["DATABASE_URL"]).Exec(context.Background(),
		`CREATE TABLE wallet (id int)`); err != nil {
		t.Fatal(err)
	}
	out, err := walletCommand(t, env).CombinedOutput()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 ||
		!strings.Contains(string(out), "not ours (wallet)") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestReplicasMigrateTogether: the first applies the schema, and applying it again changes nothing.
func TestReplicasMigrateTogether(t *testing.T) {
	env := testEnv(t)
	cfg, err := readConfig(func(n string) string { return env[n] })
	if err != nil {
		t.Fatal(err)
	}
	var replicas sync.WaitGroup
	for range 5 {
		replicas.Go(func() {
			if err := migrateSchema(context.Background(), cfg); err != nil {
				t.Error(err)
			}
		})
	}
	replicas.Wait()
	keys := texts(t, env["DATABASE_URL"], `
SELECT attname FROM pg_attribute
WHERE attrelid IN ('entry'::regclass, 'wallet'::regclass, 'reference'::regclass)
AND attcollation = '"C"'::regcollation ORDER BY attname COLLATE "C"`)
	if want := []string{"creation_key", "idempotency_key", "reference"}; !slices.Equal(keys, want) {
		t.Errorf("%v compare by their bytes, want %v", keys, want)
	}
	conn := connect(t, env["DATABASE_URL"])
	// So that it is applied once more.
	if _, err := conn.Exec(context.Background(), `DELETE FROM wallet_schema`); err != nil {
		t.Fatal(err)
	}
	if err := migrateSchema(context.Background(), cfg); err != nil {
		t.Error(err)
	}
	var foreignKeys int
	for _, statement := range []string{ // what version 1 had
		`DELETE FROM wallet_schema WHERE version > 1`, `DROP TRIGGER entry_fits_wallet ON entry`,
		`ALTER TABLE entry ADD CONSTRAINT entry_wallet_exists FOREIGN KEY (wallet_id) REFERENCES wallet (id)`,
	} {
		if _, err := conn.Exec(context.Background(), statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := migrateSchema(context.Background(), cfg); err != nil {
		t.Error(err)
	}
	err = conn.QueryRow(context.Background(),
		`SELECT count(*) FROM pg_constraint WHERE conname = 'entry_wallet_exists'`).Scan(&foreignKeys)
	if _, missing := conn.Exec(context.Background(),
		`ALTER TABLE entry DISABLE TRIGGER entry_fits_wallet,
			ENABLE TRIGGER entry_fits_wallet`); err != nil || missing != nil || foreignKeys > 0 {
		t.Error("version 1 was not brought up:", err, missing, foreignKeys)
	}
	if _, err := conn.Exec(context.Background(), `INSERT INTO wallet_schema VALUES (99)`); err != nil {
		t.Fatal(err)
	}
	start(t, env) // a newer schema is fine to serve on
}

// TestSigtermLosesNothing: under load, a process that is told to stop becomes not ready, answers what it has
// taken, confirms what it has published, and exits 0 in time.
func TestSigtermLosesNothing(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers, "DRAIN_DELAY=500ms")
	dropSlotAtEnd(t, env["REPLICATION_SLOT"])
	r := newReplica(t, env, "sigterm-"+env["REPLICATION_SLOT"])
	r.start(t)
	post := func(i int) (status int, body string) {
		request, _ := http.NewRequest("POST", r.url+fmt.Sprintf("/v1/wallets/%d/deposit", 1+i%7),
			strings.NewReader(`{"amount":"1"}`))
		request.Header.Set("Content-Type", "application/json")
		// As a header, so that Go's client repeats a request whose idle connection was just closed.
		request.Header.Set("Idempotency-Key", strconv.Itoa(i))
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return 0, err.Error()
		}
		defer response.Body.Close()
		text, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(text)
	}
	eventually(t, 30*time.Second, "ready", func() bool { status, _ := post(0); return status == 200 })
	eventually(t, 30*time.Second, "leading", r.leads)
	// As behind a load balancer: whoever sees that the service is not ready sends it no further request.
	var notReady atomic.Bool
	var acknowledged, next atomic.Int64
	var clients sync.WaitGroup
	clients.Go(func() {
		for r.isReady() {
			time.Sleep(20 * time.Millisecond)
		}
		notReady.Store(true)
	})
	for range 8 {
		clients.Go(func() {
			for !notReady.Load() {
				if status, body := post(int(next.Add(1))); status == 200 {
					acknowledged.Add(1)
				} else {
					t.Errorf("%d %s", status, body)
				}
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	began := time.Now()
	r.stop(t)
	took := time.Since(began)
	log, err := os.ReadFile(r.log)
	if exit := r.cmd.ProcessState.ExitCode(); err != nil || exit != 0 || took > 10*time.Second {
		t.Errorf("exit status %d after %v, %v\n%s", exit, took, err, log)
	}
	clients.Wait()
	var entries int64
	if err := connect(t, env["DATABASE_URL"]).QueryRow(context.Background(),
		`SELECT count(*) FROM entry`).Scan(&entries); err != nil || entries != acknowledged.Load()+1 {
		t.Errorf("%d entries for %d acknowledged deposits and the first (%v)", entries, acknowledged.Load(),
			err)
	}
	drained := regexp.MustCompile(`msg="relay drained" confirmed=[0-9A-F]+/[0-9A-F]+ error=<nil>`)
	if !drained.Match(log) || !bytes.Contains(log, []byte("msg=stopped")) ||
		bytes.Contains(log, []byte("level=ERROR")) {
		t.Errorf("the log of the end:\n%s", log)
	}
	checkLedger(t, env["DATABASE_URL"])
}

// -----------------------------------------------------------------------------------------------------------
// The pages tell the truth, README.md and docs/: their commands run as printed, their tables match the code,
// their links lead somewhere
// -----------------------------------------------------------------------------------------------------------

func readPage(tb testing.TB, name string) string {
	tb.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}

// pages is README.md, CHANGELOG.md and all of docs/.
func pages(tb testing.TB) []string {
	tb.Helper()
	docs, err := filepath.Glob("docs/*.md")
	if err != nil || len(docs) == 0 {
		tb.Fatalf("docs/*.md: %d pages, %v", len(docs), err)
	}
	return append([]string{"README.md", "CHANGELOG.md"}, docs...)
}

var (
	// A block to run, and what it prints.
	toRun = regexp.MustCompile("(?s)<!-- run -->\n```(sh|sql)\n(.*?)```\n(?:```(?:json|text)\n(.*?)```)?")
	// changing matches what differs from run to run in the answers that the pages show, wrapped what is
	// printed on one line.
	changing = regexp.MustCompile(`("created_at":"|"expires_at":"|"request_id":"|cursor=)[^">]*`)
	wrapped  = regexp.MustCompile(`\s*\n\s*`)
)

// TestReadmeRunsAsPrinted runs the blocks marked <!-- run -->, each page's in order on a service of its own,
// with only the addresses and names replaced by this test's, and compares what they print with the block
// that follows.
func TestReadmeRunsAsPrinted(t *testing.T) {
	for _, name := range pages(t) {
		blocks := toRun.FindAllStringSubmatch(readPage(t, name), -1)
		commands := 0
		for _, block := range blocks {
			commands += len(regexp.MustCompile(`(?m)^(curl|go run) `).FindAllString(block[2], -1))
		}
		if name == "README.md" && commands < 9 {
			t.Fatalf("%d commands of README.md are marked to run", commands)
		}
		if len(blocks) > 0 {
			t.Run(name, func(t *testing.T) { runBlocks(t, blocks) })
		}
	}
}

func runBlocks(t *testing.T, blocks [][]string) {
	w := start(t, testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers))
	operators := httptest.NewServer(w.api.operator)
	defer operators.Close()
	eventually(t, 30*time.Second, "the relay leads", func() bool {
		return (&replica{operate: operators.URL}).leads()
	})
	dev, err := devBinary()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := walletBinary()
	if err != nil {
		t.Fatal(err)
	}
	database, err := url.Parse(w.env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	suffix := fmt.Sprintf("_%d_%d", os.Getpid(), names.Add(1)) // roles belong to the whole cluster
	ours := strings.NewReplacer(
		"http://127.0.0.1:8081", operators.URL,
		"go run -C dev . events", fmt.Sprintf("%s events -data . -brokers %s -topic %s", dev,
			stack(t).KafkaBrokers, w.env["KAFKA_TOPIC"]),
		"go run -C dev . audit", "wallet -audit", // as dev's own tests say
		"go build .", "cp "+binary+" wallet",
		"'wallet_relay'", "'"+w.env["REPLICATION_SLOT"]+"'",
		"wallet_owner", "wallet_owner"+suffix,
		"wallet_service", "wallet_service"+suffix,
		"wallet_relay", "wallet_relay"+suffix,
		"DATABASE wallet", "DATABASE wallet"+suffix,
		"127.0.0.1:5432/wallet", database.Host+"/wallet"+suffix,
	)
	folder := t.TempDir()
	made := "" // the last database that the page has made
	for _, block := range blocks {
		command := strings.ReplaceAll(ours.Replace(block[2]), "http://127.0.0.1:8080", w.http.URL)
		switch strings.TrimSpace(command) { // what no shell can do to a service within this process
		case "systemctl stop wallet":
			checkAudit(t, w.cfg) // which waits until all is published
			w.end()
			// Its server is lost, and the slot with it, once Postgres has let go of it.
			conn := connect(t, w.env["DATABASE_URL"])
			eventually(t, 20*time.Second, "slot dropped", func() bool {
				_, err := conn.Exec(context.Background(), `SELECT pg_drop_replication_slot(slot_name)
					FROM pg_replication_slots WHERE slot_name = $1`, w.env["REPLICATION_SLOT"])
				return err == nil
			})
			continue
		case "systemctl start wallet":
			database.Path = "/" + made
			w.env["DATABASE_URL"] = database.String()
			w = start(t, w.env)
			continue
		}
		if found := regexp.MustCompile(`CREATE DATABASE (\w+)`).FindStringSubmatch(command); found != nil {
			made = found[1]
		}
		if block[1] == "sql" {
			conn := connect(t, w.env["DATABASE_URL"])
			for _, statement := range strings.Split(command, ";\n") {
				if _, err := conn.PgConn().Exec(context.Background(), statement).ReadAll(); err != nil {
					t.Errorf("%s: %v", statement, err)
				}
			}
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		shell := exec.CommandContext(ctx, "bash", "-ec", command)
		shell.WaitDelay = time.Second // else it would wait for what bash has started
		shell.Dir = folder
		shell.Env = append(os.Environ(), "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"))
		for name, value := range w.env {
			shell.Env = append(shell.Env, name+"="+value)
		}
		out, err := shell.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
			continue
		}
		got, want := oneLine(string(out)), oneLine(block[3])
		if block[3] != "" && (got != want || !bytes.HasSuffix(out, []byte("\n"))) {
			t.Errorf("%s\nprints\n%s\nthe page says\n%s", command, got, want)
		}
		if strings.Contains(command, "-audit") && !strings.Contains(command, "|| true") &&
			!strings.Contains(string(out), ": 0 findings") {
			t.Errorf("%s\nprints\n%s", command, out)
		}
		if strings.Contains(command, " events ") {
			for _, id := range []string{"1-1", "1-2", "2-1"} {
				if !strings.Contains(string(out), `"ce_id":"`+id+`"`) {
					t.Errorf("event %s is not in\n%s", id, out)
				}
			}
		}
	}
}

func oneLine(text string) string {
	return changing.ReplaceAllString(wrapped.ReplaceAllString(strings.TrimSpace(text), ""), "$1...")
}

// TestReadmeTables: every setting, route and problem that docs/ lists is the code's, and the other way round.
func TestReadmeTables(t *testing.T) {
	const row = "(?m)^\\| `([A-Z_]+)` \\| (?:`([^`]*)`)? ?\\| (.*) \\|$"
	settings := make(map[string]string)
	for _, s := range new(config).settings() {
		settings[s.Name] = s.Default + " " + s.Help
	}
	same(t, "docs/configuration.md", row, settings)

	refusals := make(map[string]string)
	for code, p := range api.New(api.Config{Problems: problems}).Problems {
		refusals[code] = fmt.Sprint(p.Status, " ", p.Title)
	}
	same(t, "docs/api.md", "(?m)^\\| `([a-z_]+)` \\| ([0-9]{3}) \\| ([^|]*) \\|", refusals)

	listed := readPage(t, "docs/api.md")
	for _, r := range new(server).routes() {
		if !strings.Contains(listed, "`"+r.Method+" "+r.Path+"`") {
			t.Errorf("docs/api.md does not list %s %s", r.Method, r.Path)
		}
	}
}

// TestEventSchema: the schema of events has just the members that entries have in the API, said alike. That
// events are as it says, dev/clients sees.
func TestEventSchema(t *testing.T) {
	type schema struct {
		Required             []string
		AdditionalProperties bool
		Properties           map[string]any
	}
	var c struct {
		Components struct{ Schemas map[string]schema }
	}
	s := &server{Server: api.New(api.Config{Problems: problems})}
	decodeJSON(t, string(s.OpenAPI(s.routes(), apiContract)), &c)
	want := c.Components.Schemas["Entry"]
	var is schema
	decodeJSON(t, readPage(t, "docs/event.schema.json"), &is)
	for name, property := range want.Properties {
		if ref, ok := property.(map[string]any)["$ref"].(string); ok {
			within := c.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")]
			leg := is.Properties[name].(map[string]any)
			property, is.Properties[name] = any(within.Properties), leg["properties"]
		}
		if !reflect.DeepEqual(is.Properties[name], property) {
			t.Errorf("docs/event.schema.json says of %s: %v, the API %v", name, is.Properties[name], property)
		}
		delete(is.Properties, name)
	}
	for name := range is.Properties {
		t.Errorf("docs/event.schema.json has %s, which no entry has", name)
	}
	if !slices.Equal(is.Required, want.Required) || is.AdditionalProperties || want.AdditionalProperties {
		t.Errorf("docs/event.schema.json requires %v, the API %v", is.Required, want.Required)
	}
}

// same compares the rows of a page's tables with what the code says: the row's name, and its other cells.
func same(t *testing.T, name, row string, code map[string]string) {
	t.Helper()
	for _, cells := range regexp.MustCompile(row).FindAllStringSubmatch(readPage(t, name), -1) {
		says, known := code[cells[1]]
		if listed := cells[2] + " " + cells[3]; !known || listed != says {
			t.Errorf("%s says of %s: %q, the code says %q", name, cells[1], listed, says)
		}
		delete(code, cells[1])
	}
	for missing := range code {
		t.Errorf("%s does not list %s", name, missing)
	}
}

// TestReadmeLinksAndWidth: every relative link of the pages leads to a file that is there, and its fragment
// to a heading; no line but of a table or with a URL is wider than 110 columns; README.md stays short.
func TestReadmeLinksAndWidth(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, name := range pages(t) {
		text := readPage(t, name)
		for _, found := range link.FindAllStringSubmatch(text, -1) {
			target, fragment, _ := strings.Cut(found[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			file := filepath.Join(filepath.Dir(name), target)
			if target == "" {
				file = name
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s: %v", name, found[1], err)
			} else if fragment != "" && !anchors(readPage(t, file))[fragment] {
				t.Errorf("%s links to %s, and there is no such heading", name, found[1])
			}
		}
		for i, line := range strings.Split(text, "\n") {
			if len([]rune(line)) > 110 && !strings.HasPrefix(line, "|") && !strings.Contains(line, "://") {
				t.Errorf("%s:%d is wider than 110 columns", name, i+1)
			}
		}
	}
	readme := readPage(t, "README.md")
	if lines, words := strings.Count(readme, "\n"), len(strings.Fields(readme)); lines > 180 || words > 1600 {
		t.Errorf("README.md has %d lines and %d words, at most 180 and 1,600 are meant", lines, words)
	}
}

// anchors is the fragments that a page's headings get: small letters, digits, hyphens for blanks.
func anchors(text string) map[string]bool {
	found := make(map[string]bool)
	for _, heading := range regexp.MustCompile("(?m)^#+ (.*)$").FindAllStringSubmatch(text, -1) {
		found[strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, heading[1])] = true
	}
	return found
}
