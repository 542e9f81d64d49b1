// Holds, reversals, references, metadata and states, over HTTP on two replicas.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wallet/internal/pg"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var when = regexp.MustCompile(`"(created_at|expires_at)":"[^"]*"`)

// says compares an answer with what is expected of it, times left out.
func says(t *testing.T, a answer, status int, want string) {
	t.Helper()
	got := strings.ReplaceAll(when.ReplaceAllString(a.body, ""), ",,", ",")
	got = strings.ReplaceAll(got, ",}", "}")
	if a.status != status || got != want {
		t.Errorf("%d %s\nwant %d %s", a.status, got, status, want)
	}
}

// refuses expects a problem of a code, with words in its detail.
func refuses(t *testing.T, a answer, status int, code, words string) {
	t.Helper()
	if a.status != status || a.code() != code || !strings.Contains(a.body, words) {
		t.Errorf("%s, want %d %s: ...%s...", a, status, code, words)
	}
}

// two starts two replicas of one service.
func two(t *testing.T, more ...string) (a, b *running) {
	env := testEnv(t, more...)
	return start(t, env), start(t, env)
}

// TestHolds: placed, seen, captured in parts and whole, voided; each answer again by its key, from the other
// replica.
func TestHolds(t *testing.T) {
	w, v := two(t)
	again := func(status int, path, body, want string) {
		t.Helper()
		first := w.post(path, body)
		says(t, first, status, want)
		second := v.post(path, body)
		if second.status != status || second.body != first.body ||
			second.header.Get("Idempotent-Replayed") != "true" {
			t.Errorf("the same again: %s\nfirst: %s", second, first)
		}
	}
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	again(201, "/v1/wallets/1/holds", `{"amount":"40","to_id":7,"expires_in":"15m","idempotency_key":"h1"}`,
		`{"hold_id":"1-2","wallet_id":1,"currency":"USD","amount":"40","remaining":"40","status":"open",`+
			`"to_id":7,"balance":"100","held":"40","available":"60","seq":2}`)
	says(t, v.get("/v1/holds/1-2"), 200, `{"hold_id":"1-2","wallet_id":1,"currency":"USD","amount":"40",`+
		`"captured":"0","remaining":"40","status":"open","to_id":7}`)
	for _, replica := range []*running{w, v} {
		says(t, replica.get("/v1/wallets/1/balance"), 200,
			`{"wallet_id":1,"currency":"USD","balance":"100","held":"40","available":"60","seq":2}`)
	}
	says(t, v.get("/v1/wallets/1"), 200,
		`{"wallet_id":1,"currency":"USD","balance":"100","held":"40","available":"60","seq":2}`)

	refuses(t, w.post("/v1/wallets/1/withdraw", `{"amount":"60.01","idempotency_key":"w"}`),
		422, "insufficient_funds", "60 available")
	refuses(t, w.post("/v1/wallets/1/holds", `{"amount":"61","idempotency_key":"h2"}`),
		422, "insufficient_funds", "60 available")
	refuses(t, w.post("/v1/holds/1-2/capture", `{"amount":"40.01","idempotency_key":"c"}`),
		422, "hold_exceeded", "remains 40")
	refuses(t, w.post("/v1/holds/1-2/capture", `{"to_id":8,"idempotency_key":"c"}`),
		422, "payee_mismatch", "wallet 7")
	refuses(t, w.post("/v1/holds/1-1/capture", `{"idempotency_key":"c"}`), 404, "hold_not_found", "1-1")
	refuses(t, w.post("/v1/holds/1-2/capture", `{"to_id":1,"idempotency_key":"c"}`), 400, "same_wallet", "")
	refuses(t, w.post("/v1/wallets/1/holds", `{"amount":"1","to_id":1,"idempotency_key":"c"}`),
		400, "same_wallet", "")

	again(200, "/v1/holds/1-2/capture", `{"amount":"10","final":false,"idempotency_key":"c1"}`,
		`{"transaction_id":"1-3","from_id":1,"to_id":7,"currency":"USD","amount":"10","from_balance":"90",`+
			`"to_balance":"10","from_seq":3,"to_seq":1,"hold_id":"1-2","remaining":"30","held":"30"}`)
	again(200, "/v1/holds/1-2/capture", `{"amount":"25","to_id":7,"idempotency_key":"c2"}`,
		`{"transaction_id":"1-4","from_id":1,"to_id":7,"currency":"USD","amount":"25","from_balance":"65",`+
			`"to_balance":"35","from_seq":4,"to_seq":2,"hold_id":"1-2","remaining":"0","held":"0"}`)
	says(t, v.get("/v1/holds/1-2"), 200, `{"hold_id":"1-2","wallet_id":1,"currency":"USD","amount":"40",`+
		`"captured":"35","remaining":"0","status":"captured","to_id":7}`)
	refuses(t, w.post("/v1/holds/1-2/capture", `{"idempotency_key":"c3"}`), 409, "hold_closed", "captured")
	refuses(t, w.post("/v1/holds/1-2/void", `{"idempotency_key":"c3"}`), 409, "hold_closed", "captured")
	// Another request by a used key.
	refuses(t, w.post("/v1/holds/1-2/capture", `{"amount":"25","final":false,"idempotency_key":"c2"}`),
		422, "idempotency_key_reused", "1-4")
	refuses(t, w.post("/v1/holds/1-2/capture", `{"idempotency_key":"c2"}`), 422, "idempotency_key_reused", "")
	refuses(t, w.post("/v1/wallets/1/holds",
		`{"amount":"40","to_id":7,"expires_in":"16m","idempotency_key":"h1"}`),
		422, "idempotency_key_reused", "1-2")
	refuses(t, w.post("/v1/wallets/1/holds", `{"amount":"40","expires_in":"15m","idempotency_key":"h1"}`),
		422, "idempotency_key_reused", "1-2")

	// Without a payee the money leaves, all that remains by default.
	again(201, "/v1/wallets/1/holds", `{"amount":"5","idempotency_key":"h3"}`,
		`{"hold_id":"1-5","wallet_id":1,"currency":"USD","amount":"5","remaining":"5","status":"open",`+
			`"balance":"65","held":"5","available":"60","seq":5}`)
	again(200, "/v1/holds/1-5/capture", `{"idempotency_key":"c4"}`,
		`{"transaction_id":"1-6","wallet_id":1,"currency":"USD","amount":"5","balance":"60","seq":6,`+
			`"hold_id":"1-5","remaining":"0","held":"0"}`)
	// A payee may be named at the capture.
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"4","idempotency_key":"h4"}`)
	again(200, "/v1/holds/1-7/capture", `{"to_id":9,"amount":"3","idempotency_key":"c5"}`,
		`{"transaction_id":"1-8","from_id":1,"to_id":9,"currency":"USD","amount":"3","from_balance":"57",`+
			`"to_balance":"3","from_seq":8,"to_seq":1,"hold_id":"1-7","remaining":"0","held":"0"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"7","idempotency_key":"h5"}`)
	again(200, "/v1/holds/1-9/void", `{"idempotency_key":"v1"}`,
		`{"hold_id":"1-9","wallet_id":1,"currency":"USD","released":"7","remaining":"0","status":"voided",`+
			`"balance":"57","held":"0","available":"57","seq":10}`)

	// One event each, with what it says besides.
	want := []string{
		`"kind":"deposit","currency":"USD","amount":"100","balance_before":"0","balance_after":"100",` +
			`"idempotency_key":"d"`,
		`"kind":"hold","currency":"USD","amount":"0","balance_before":"100","balance_after":"100",` +
			`"held_before":"0","held_after":"40","remaining":"40","idempotency_key":"h1","to_id":7`,
		`"kind":"transfer_out","currency":"USD","amount":"-10","balance_before":"100","balance_after":"90",` +
			`"held_before":"40","held_after":"30","of_seq":2,"remaining":"30",` +
			`"counterparty":{"wallet_id":7,"seq":1},"idempotency_key":"c1","partial":true`,
		`"kind":"transfer_out","currency":"USD","amount":"-25","balance_before":"90","balance_after":"65",` +
			`"held_before":"30","held_after":"0","of_seq":2,"remaining":"0",` +
			`"counterparty":{"wallet_id":7,"seq":2},"idempotency_key":"c2"`,
		`"kind":"hold","currency":"USD","amount":"0","balance_before":"65","balance_after":"65",` +
			`"held_before":"0","held_after":"5","remaining":"5","idempotency_key":"h3"`,
		`"kind":"withdrawal","currency":"USD","amount":"-5","balance_before":"65","balance_after":"60",` +
			`"held_before":"5","held_after":"0","of_seq":5,"remaining":"0","idempotency_key":"c4","all":true`,
	}
	var history []json.RawMessage
	if err := json.Unmarshal([]byte(v.get("/v1/wallets/1/history").body), &history); err != nil ||
		len(history) != 10 {
		t.Fatalf("%d entries, %v", len(history), err)
	}
	for i, members := range want {
		got := strings.ReplaceAll(when.ReplaceAllString(string(history[i]), ""), ",,", ",")
		if got != fmt.Sprintf(`{"wallet_id":1,"seq":%d,"transaction_id":"1-%d",%s,}`, i+1, i+1, members) {
			t.Errorf("entry %d: %s\nwant ...%s", i+1, got, members)
		}
	}
	last := string(history[9])
	if !strings.Contains(last, `"kind":"release"`) || !strings.Contains(last, `"reason":"void"`) {
		t.Error(last)
	}

	// A list of them, page by page.
	page := v.get("/v1/wallets/1/holds?limit=3")
	link := regexp.MustCompile(`<([^>]*)>`).FindStringSubmatch(page.header.Get("Link"))
	if !strings.HasPrefix(page.body,
		`{"wallet_id":1,"currency":"USD","balance":"57","held":"0","available":"57",`+
			`"seq":10,"holds":[{"hold_id":"1-2",`) ||
		strings.Count(page.body, "hold_id") != 3 || link == nil {
		t.Fatal(page, page.header)
	}
	if rest := v.get(link[1]); strings.Count(rest.body, "hold_id") != 1 || rest.header.Get("Link") != "" {
		t.Error(rest)
	}
	if open := v.get("/v1/wallets/1/holds?status=open"); !strings.HasSuffix(open.body, `"holds":[]}`) {
		t.Error(open)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestHoldsExpire: by the clock, not by the sweep; whoever lacks funds does not wait for it.
func TestHoldsExpire(t *testing.T) {
	w, v := two(t)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"90","expires_in":"3s","idempotency_key":"h1"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"10","expires_in":"3s","idempotency_key":"h2"}`)
	refuses(t, v.post("/v1/wallets/1/withdraw", `{"amount":"50","idempotency_key":"w1"}`),
		422, "insufficient_funds", "0 available")
	eventually(t, 8*time.Second, "withdrawn", func() bool {
		return v.post("/v1/wallets/1/withdraw", `{"amount":"50","idempotency_key":"w1"}`).status == 200
	})
	eventually(t, 8*time.Second, "both are due", func() bool { // reads may lag by the sweep's second
		return w.get("/v1/holds/1-3").json(t)["status"] == "expired"
	})
	refuses(t, w.post("/v1/holds/1-2/capture", `{"idempotency_key":"c"}`), 409, "hold_expired", "expired at")
	refuses(t, w.post("/v1/holds/1-3/void", `{"idempotency_key":"c"}`), 409, "hold_expired", "expired at")
	eventually(t, 8*time.Second, "released", func() bool {
		return strings.Contains(w.get("/v1/wallets/1/balance").body, `"balance":"50","seq":6`)
	})
	for _, id := range []string{"1-2", "1-3"} {
		if h := v.get("/v1/holds/" + id).json(t); h["status"] != "expired" || h["remaining"] != "0" {
			t.Errorf("hold %s: %v", id, h)
		}
	}
	history := w.get("/v1/wallets/1/history").body
	if strings.Count(history, `"kind":"release"`) != 2 || strings.Count(history, `"reason":"expiry"`) != 2 {
		t.Error(history)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestDueHoldsAreReleasedForWhoLacksFunds: at the moment of expiry, without waiting for the sweep.
func TestDueHoldsAreReleasedForWhoLacksFunds(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"10","idempotency_key":"d"}`)
	for i := range 4 {
		body := fmt.Sprintf(`{"amount":"10","expires_in":"1s","idempotency_key":"h%d"}`, i)
		at, err := time.Parse(time.RFC3339Nano,
			w.mustPost(t, 201, "/v1/wallets/1/holds", body).json(t)["expires_at"].(string))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(at.Add(2 * time.Millisecond)))
		for id := 1; id <= 2; id++ {
			body := fmt.Sprintf(`{"amount":"10","to_id":%d,"idempotency_key":"t%d"}`, 3-id, i)
			w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/transfer", id), body)
		}
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestHoldsEndOnce: capture, void and the clock race for each hold, at two replicas, around the very moment
// that it expires. One of them ends it, and only who did is told so.
func TestHoldsEndOnce(t *testing.T) {
	w, v := two(t)
	const holds = 60
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1000","idempotency_key":"d"}`)
	var ids []string
	var expire []time.Time
	for i := range holds {
		body := fmt.Sprintf(`{"amount":"1","to_id":2,"expires_in":"2s","idempotency_key":"h%d"}`, i)
		a := w.mustPost(t, 201, "/v1/wallets/1/holds", body).json(t)
		at, err := time.Parse(time.RFC3339Nano, a["expires_at"].(string))
		if err != nil {
			t.Fatal(err)
		}
		ids, expire = append(ids, a["hold_id"].(string)), append(expire, at)
	}
	answers := make([][2]answer, holds)
	var racing sync.WaitGroup
	for i, id := range ids {
		racing.Go(func() { // from 30 ms before to 10 ms after
			time.Sleep(time.Until(expire[i].Add(time.Duration(i%40-30) * time.Millisecond)))
			racing.Go(func() {
				body := fmt.Sprintf(`{"idempotency_key":"c%d"}`, i)
				answers[i][0] = w.post("/v1/holds/"+id+"/capture", body)
			})
			answers[i][1] = v.post("/v1/holds/"+id+"/void", fmt.Sprintf(`{"idempotency_key":"v%d"}`, i))
		})
	}
	racing.Wait()
	eventually(t, 5*time.Second, "nothing is held", func() bool {
		return w.get("/v1/wallets/1").json(t)["held"] == nil
	})
	checkEnds(t, v, ids, answers)
	checkTimesOfEnds(t, w.env["DATABASE_URL"])
	checkLedger(t, w.env["DATABASE_URL"])
}

// checkEnds: each hold ended once, and only who ended it was told so; answers are those to its capture and to
// its void.
func checkEnds(t *testing.T, w *running, ids []string, answers [][2]answer) {
	t.Helper()
	ends := make(map[string]int)
	for i, id := range ids {
		h := w.get("/v1/holds/" + id).json(t)
		captured, voided := answers[i][0].status == 200, answers[i][1].status == 200
		status := h["status"].(string)
		ends[status]++
		if captured != (status == "captured") || voided != (status == "voided") {
			t.Errorf("hold %s is %s; capture: %s; void: %s", id, status, answers[i][0], answers[i][1])
		}
		for _, a := range answers[i] {
			lost := a.status == 409 && (a.code() == "hold_closed" || a.code() == "hold_expired")
			if a.status != 200 && !lost {
				t.Error(a)
			}
		}
	}
	t.Logf("%v", ends)
}

// checkTimesOfEnds: no hold expired before its time, and none was captured or voided after.
func checkTimesOfEnds(t *testing.T, databaseURL string) {
	t.Helper()
	var early, late int
	err := connect(t, databaseURL).QueryRow(context.Background(), `
SELECT count(*) FILTER (WHERE expiry AND at < expires_at),
       count(*) FILTER (WHERE NOT expiry AND at >= expires_at)
FROM (SELECT h.expires_at, e.created_at AS at, coalesce(e.note LIKE '%"reason":"expiry"%', false) AS expiry
      FROM hold h JOIN entry e ON e.wallet_id = h.wallet_id AND e.of_seq = h.seq AND e.held_change < 0
) ends`).Scan(&early, &late)
	if err != nil || early > 0 || late > 0 {
		t.Errorf("%d holds expired early, %d were captured or voided late, %v", early, late, err)
	}
}

// TestHoldsExpireByTheDatabasesClock: not by a replica's, nor by the time that has passed. The clock of
// Postgres is stepped ahead and back, while two replicas go on.
func TestHoldsExpireByTheDatabasesClock(t *testing.T) {
	if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
		t.Skip("needs WALLET_TEST_KAFKA=apache and libfaketime, as the chaos tests do")
	}
	s, err := startStores("-clocks")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	env := map[string]string{"DATABASE_URL": s.database(t), "REDIS_URL": s.RedisURL, "RATE_LIMIT": "0",
		"LISTEN_ADDR": "127.0.0.1:0"}
	w, v := start(t, env), start(t, env)
	clock := time.Duration(0) // how far ahead it is
	step := func(t *testing.T, by time.Duration) {
		t.Helper()
		clock += by
		s.command(t, fmt.Sprintf("clock postgres %s", clock))
	}
	// Postgres counts its own timeouts by its clock, so that a request may have to be sent again.
	post := func(t *testing.T, one *running, path, body string) (a answer) {
		t.Helper()
		eventually(t, 20*time.Second, "an answer to "+path, func() bool {
			a = one.post(path, body)
			return a.status != 503
		})
		return a
	}
	must := func(t *testing.T, one *running, status int, path, body string) map[string]any {
		t.Helper()
		a := post(t, one, path, body)
		if a.status != status {
			t.Fatalf("%s %s: %s, want %d", path, body, a, status)
		}
		return a.json(t)
	}
	place := func(t *testing.T, wallet, amount int, in, key string) string {
		t.Helper()
		return must(t, w, 201, fmt.Sprintf("/v1/wallets/%d/holds", wallet), fmt.Sprintf(
			`{"amount":"%d","expires_in":%q,"idempotency_key":%q}`, amount, in, key))["hold_id"].(string)
	}
	status := func(t *testing.T, hold string) any { return v.get("/v1/holds/" + hold).json(t)["status"] }
	ends := func(t *testing.T, hold, as string) {
		t.Helper()
		eventually(t, 10*time.Second, hold+" is "+as, func() bool { return status(t, hold) == as })
	}

	t.Run("ahead", func(t *testing.T) {
		must(t, w, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
		a, b := place(t, 1, 10, "15m", "ha"), place(t, 1, 10, "15m", "hb")
		c, d := place(t, 1, 70, "15m", "hc"), place(t, 1, 10, "20m", "hd")
		must(t, v, 200, "/v1/holds/"+a+"/capture", `{"idempotency_key":"ca"}`)
		step(t, 16*time.Minute)
		refuses(t, post(t, w, "/v1/holds/"+b+"/capture", `{"idempotency_key":"cb"}`), 409, "hold_expired", "")
		refuses(t, post(t, v, "/v1/holds/"+c+"/void", `{"idempotency_key":"vc"}`), 409, "hold_expired", "")
		// Who lacks funds waits for no sweep.
		must(t, v, 200, "/v1/wallets/1/withdraw", `{"amount":"80","idempotency_key":"w"}`)
		must(t, w, 200, "/v1/holds/"+d+"/capture", `{"idempotency_key":"cd"}`)
		ends(t, b, "expired")
		ends(t, c, "expired")
	})
	t.Run("back", func(t *testing.T) {
		must(t, w, 200, "/v1/wallets/2/deposit", `{"amount":"100","idempotency_key":"d"}`)
		e, f := place(t, 2, 50, "2s", "e"), place(t, 2, 50, "2s", "f")
		step(t, -time.Hour)
		time.Sleep(4 * time.Second) // the sweep has been there, if anybody counts by another clock
		if status(t, e) != "open" || status(t, f) != "open" {
			t.Errorf("a hold expired before its time: %v, %v", status(t, e), status(t, f))
		}
		refuses(t, post(t, v, "/v1/wallets/2/withdraw", `{"amount":"1","idempotency_key":"w"}`), 422,
			"insufficient_funds", "0 available")
		must(t, v, 200, "/v1/holds/"+e+"/capture", `{"idempotency_key":"ce"}`)
		step(t, time.Hour)
		ends(t, f, "expired")
		must(t, v, 200, "/v1/wallets/2/withdraw", `{"amount":"50","idempotency_key":"w"}`)
	})
	t.Run("back, the wallet stays ahead", func(t *testing.T) {
		must(t, w, 200, "/v1/wallets/3/deposit", `{"amount":"100","idempotency_key":"d"}`)
		g, h := place(t, 3, 10, "2h", "g"), place(t, 3, 90, "30m", "h")
		step(t, 45*time.Minute)
		must(t, w, 200, "/v1/wallets/3/deposit", `{"amount":"1","idempotency_key":"d2"}`)
		step(t, -45*time.Minute)
		// Whatever it does now has that deposit's time at least: for this wallet the hold's is over, be it
		// that the sweep was quick enough to see it or not.
		refuses(t, post(t, w, "/v1/holds/"+h+"/capture", `{"idempotency_key":"ch"}`), 409, "hold_expired", "")
		refuses(t, post(t, v, "/v1/holds/"+h+"/void", `{"idempotency_key":"vh"}`), 409, "hold_expired", "")
		must(t, v, 200, "/v1/wallets/3/withdraw", `{"amount":"91","idempotency_key":"w"}`)
		ends(t, h, "expired")
		must(t, w, 200, "/v1/holds/"+g+"/capture", `{"idempotency_key":"cg"}`)
	})
	// Capture, void, who lacks funds and the sweep race while the clock jumps over the holds' end, at times
	// back over it and again ahead.
	t.Run("race", func(t *testing.T) {
		const rounds, holds = 10, 12
		var ids []string
		var answers [][2]answer
		for round := range rounds {
			wallet := 10 + round
			body := fmt.Sprintf(`{"amount":"%d","idempotency_key":"d"}`, holds)
			must(t, w, 200, fmt.Sprintf("/v1/wallets/%d/deposit", wallet), body)
			first := len(ids)
			for i := range holds {
				ids = append(ids, place(t, wallet, 1, "10m", fmt.Sprintf("h%d", i)))
			}
			answers = append(answers, make([][2]answer, holds)...)
			var racing sync.WaitGroup
			for i := range holds {
				hold, got := "/v1/holds/"+ids[first+i], &answers[first+i]
				racing.Go(func() {
					time.Sleep(time.Duration(i) * 5 * time.Millisecond)
					racing.Go(func() {
						got[0] = post(t, w, hold+"/capture",
							`{"idempotency_key":"c`+ids[first+i]+`"}`)
					})
					got[1] = post(t, v, hold+"/void", `{"idempotency_key":"v`+ids[first+i]+`"}`)
				})
			}
			racing.Go(func() { // takes what the holds' ends give back, as it comes
				for i := range 20 {
					post(t, v, fmt.Sprintf("/v1/wallets/%d/withdraw", wallet),
						fmt.Sprintf(`{"amount":"1","idempotency_key":"w%d"}`, i))
				}
			})
			time.Sleep(20 * time.Millisecond)
			step(t, 10*time.Minute)
			if round%2 == 1 {
				time.Sleep(10 * time.Millisecond)
				step(t, -10*time.Minute)
				time.Sleep(20 * time.Millisecond)
				step(t, 10*time.Minute)
			}
			racing.Wait()
		}
		eventually(t, 10*time.Second, "nothing is held", func() bool {
			for round := range rounds {
				if w.get(fmt.Sprintf("/v1/wallets/%d", 10+round)).json(t)["held"] != nil {
					return false
				}
			}
			return true
		})
		checkEnds(t, v, ids, answers)
	})
	checkTimesOfEnds(t, env["DATABASE_URL"])
	checkLedger(t, env["DATABASE_URL"])
}

// TestReversals: the opposite movement, in parts up to the whole, and no further.
func TestReversals(t *testing.T) {
	w, v := two(t)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"to_id":2,"amount":"10","idempotency_key":"t"}`)
	w.mustPost(t, 200, "/v1/wallets/1/withdraw", `{"amount":"20","idempotency_key":"w"}`)
	says(t, w.post("/v1/transactions/1-2/reverse", `{"amount":"4","idempotency_key":"r1"}`), 200,
		`{"transaction_id":"2-2","from_id":2,"to_id":1,"currency":"USD","amount":"4","from_balance":"6",`+
			`"to_balance":"74","from_seq":2,"to_seq":4,"reverses":"1-2","reversible":"6"}`)
	first := v.post("/v1/transactions/1-2/reverse", `{"amount":"4","idempotency_key":"r1"}`)
	if first.status != 200 || first.header.Get("Idempotent-Replayed") != "true" ||
		!strings.Contains(first.body, `"reverses":"1-2","reversible":"6"`) {
		t.Error(first)
	}
	if tx := v.get("/v1/transactions/1-2").json(t); tx["reversed"] != "4" {
		t.Error(tx)
	}
	refuses(t, v.post("/v1/transactions/1-2/reverse", `{"amount":"6.01","idempotency_key":"r2"}`),
		422, "reversal_exceeds", "6 left")
	refuses(t, v.post("/v1/transactions/2-2/reverse", `{"idempotency_key":"r2"}`), 422, "not_reversible",
		"itself")
	w.mustPost(t, 200, "/v1/wallets/2/withdraw", `{"amount":"1","idempotency_key":"w"}`)
	refuses(t, v.post("/v1/transactions/1-2/reverse", `{"idempotency_key":"r2"}`),
		422, "insufficient_funds", "5 available")
	w.mustPost(t, 200, "/v1/wallets/2/deposit", `{"amount":"1","idempotency_key":"d"}`)
	says(t, v.post("/v1/transactions/1-2/reverse", `{"idempotency_key":"r2"}`), 200,
		`{"transaction_id":"2-5","from_id":2,"to_id":1,"currency":"USD","amount":"6","from_balance":"0",`+
			`"to_balance":"80","from_seq":5,"to_seq":5,"reverses":"1-2","reversible":"0"}`)
	refuses(t, v.post("/v1/transactions/1-2/reverse", `{"idempotency_key":"r3"}`), 422, "reversal_exceeds",
		"0 left")
	says(t, w.post("/v1/transactions/1-3/reverse", `{"idempotency_key":"r3"}`), 200,
		`{"transaction_id":"1-6","wallet_id":1,"currency":"USD","amount":"20","balance":"100","seq":6,`+
			`"reverses":"1-3","reversible":"0"}`)
	says(t, w.post("/v1/transactions/1-1/reverse", `{"amount":"99","idempotency_key":"r4"}`), 200,
		`{"transaction_id":"1-7","wallet_id":1,"currency":"USD","amount":"99","balance":"1","seq":7,`+
			`"reverses":"1-1","reversible":"1"}`)
	// A capture can be undone, and revives no hold; a hold cannot.
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"1","to_id":2,"idempotency_key":"h"}`)
	refuses(t, v.post("/v1/transactions/1-8/reverse", `{"idempotency_key":"r5"}`), 422, "not_reversible",
		"voided")
	w.mustPost(t, 200, "/v1/holds/1-8/capture", `{"idempotency_key":"c"}`)
	says(t, w.post("/v1/transactions/1-9/reverse", `{"idempotency_key":"r5"}`), 200,
		`{"transaction_id":"2-7","from_id":2,"to_id":1,"currency":"USD","amount":"1","from_balance":"0",`+
			`"to_balance":"1","from_seq":7,"to_seq":10,"reverses":"1-9","reversible":"0"}`)
	if h := v.get("/v1/holds/1-8").json(t); h["status"] != "captured" {
		t.Error(h)
	}
	refuses(t, w.post("/v1/transactions/7-1/reverse", `{"idempotency_key":"x"}`), 404,
		"transaction_not_found", "7-1")
	refuses(t, w.post("/v1/transactions/7/reverse", `{"idempotency_key":"x"}`), 400,
		"transaction_id_malformed", "")
	// Each leg says what it undoes of its own wallet.
	if e := w.get("/v1/wallets/1/history").body; !strings.Contains(e,
		`"of_seq":2,"remaining":"6","counterparty":`+
			`{"wallet_id":2,"seq":2},"idempotency_key":"r1"`) {
		t.Error(e)
	}
	if e := w.get("/v1/wallets/2/history").body; !strings.Contains(e,
		`"of_seq":1,"remaining":"6","counterparty":`+
			`{"wallet_id":1,"seq":4},"idempotency_key":"r1"`) {
		t.Error(e)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestStates: what each state lets in and out, and that closed is the end.
func TestStates(t *testing.T) {
	w, v := two(t)
	state := func(status int, state string) answer {
		t.Helper()
		return w.mustPost(t, status, "/v1/wallets/1/state",
			fmt.Sprintf(`{"state":%q,"note":"court order 12","idempotency_key":"%s %d"}`, state, state,
				time.Now().UnixNano()))
	}
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 200, "/v1/wallets/2/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"10","idempotency_key":"h1"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"20","idempotency_key":"h2"}`)
	says(t, state(200, "no_out"), 200,
		`{"transaction_id":"1-4","wallet_id":1,"currency":"USD","state":"no_out",`+
			`"note":"court order 12","balance":"100","held":"30","available":"70","seq":4}`)
	if is := v.get("/v1/wallets/1").json(t); is["state"] != "no_out" {
		t.Error(is)
	}
	in, out := `/v1/wallets/1/deposit`, `/v1/wallets/1/withdraw`
	refuses(t, v.post(out, `{"amount":"1","idempotency_key":"x"}`), 409, "wallet_frozen", "lets none out")
	refuses(t, v.post("/v1/wallets/1/transfer", `{"amount":"1","to_id":2,"idempotency_key":"x"}`), 409,
		"wallet_frozen", "")
	refuses(t, v.post("/v1/wallets/1/holds", `{"amount":"1","idempotency_key":"x"}`), 409, "wallet_frozen",
		"")
	refuses(t, v.post("/v1/transactions/1-1/reverse", `{"amount":"1","idempotency_key":"x"}`), 409,
		"wallet_frozen", "")
	v.mustPost(t, 200, in, `{"amount":"1","idempotency_key":"in"}`)
	v.mustPost(t, 200, "/v1/holds/1-2/capture",
		`{"to_id":2,"amount":"5","final":false,"idempotency_key":"c1"}`)

	state(200, "frozen")
	refuses(t, v.post(in, `{"amount":"1","idempotency_key":"x"}`), 409, "wallet_frozen",
		"nothing goes in or out")
	refuses(t, v.post(out, `{"amount":"1","idempotency_key":"x"}`), 409, "wallet_frozen", "")
	refuses(t, v.post("/v1/wallets/2/transfer", `{"amount":"1","to_id":1,"idempotency_key":"x"}`), 409,
		"wallet_frozen", "Wallet 1")
	refuses(t, v.post("/v1/holds/1-2/capture", `{"to_id":2,"idempotency_key":"x"}`), 409, "wallet_frozen", "")
	// The first answer stays the answer; releases pass.
	v.mustPost(t, 200, in, `{"amount":"1","idempotency_key":"in"}`)
	v.mustPost(t, 200, "/v1/holds/1-3/void", `{"idempotency_key":"v1"}`)
	v.mustPost(t, 200, "/v1/holds/1-2/void", `{"idempotency_key":"v2"}`)

	state(200, "open")
	refuses(t, state(409, "closed"), 409, "wallet_not_empty", "96")
	says(t, v.post("/v1/wallets/1/transfer", `{"amount":"all","to_id":2,"idempotency_key":"all"}`), 200,
		`{"transaction_id":"1-11","from_id":1,"to_id":2,"currency":"USD","amount":"96","from_balance":"0",`+
			`"to_balance":"201","from_seq":11,"to_seq":3}`)
	refuses(t, v.post(out, `{"amount":"all","idempotency_key":"all2"}`), 422, "insufficient_funds",
		"0 available")
	refuses(t, v.post("/v1/wallets/1/transfer", `{"amount":"96","to_id":2,"idempotency_key":"all"}`),
		422, "idempotency_key_reused", "")
	state(200, "closed")
	refuses(t, v.post(in, `{"amount":"1","idempotency_key":"x"}`), 409, "wallet_closed", "Wallet 1 is closed")
	refuses(t, v.post("/v1/wallets/2/transfer", `{"amount":"1","to_id":1,"idempotency_key":"x"}`), 409,
		"wallet_closed", "")
	refuses(t, state(409, "open"), 409, "wallet_closed", "")
	if e := w.get("/v1/wallets/1/history?order=desc&limit=1").body; !strings.Contains(e,
		`"kind":"state","currency":"USD","amount":"0","balance_before":"0","balance_after":"0",`+
			`"idempotency_key":"closed`) ||
		!strings.Contains(e, `"state":"closed","note":"court order 12","created_at"`) {
		t.Error(e)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestReferenceAndMetadata: in answer, history and both legs' events; a part of what a key stands for; found
// again.
func TestReferenceAndMetadata(t *testing.T) {
	w, v := two(t)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	body := `{"amount":"10","to_id":2,"reference":"invoice 7 é",` +
		`"metadata":{"b":"2\"","a":"<1>","c":"\u0000"},"idempotency_key":"t"}`
	says(t, w.post("/v1/wallets/1/transfer", body), 200,
		`{"transaction_id":"1-2","from_id":1,"to_id":2,"currency":"USD","amount":"10","from_balance":"90",`+
			`"to_balance":"10","from_seq":2,"to_seq":1,"reference":"invoice 7 é",`+
			`"metadata":{"a":"<1>","b":"2\"","c":"\u0000"}}`)
	same := `{"metadata":{"a":"<1>","c":"\u0000","b":"2\""},"amount":"10.0","to_id":2,` +
		`"reference":"invoice 7 é","idempotency_key":"t"}`
	if a := v.post("/v1/wallets/1/transfer", same); a.status != 200 ||
		a.header.Get("Idempotent-Replayed") != "true" {
		t.Error(a)
	}
	for _, other := range []string{strings.Replace(body, "<1>", "1", 1),
		strings.Replace(body, "7 é", "8", 1)} {
		refuses(t, v.post("/v1/wallets/1/transfer", other), 422, "idempotency_key_reused", "1-2")
	}
	tail := `"idempotency_key":"t","reference":"invoice 7 é",` +
		`"metadata":{"a":"<1>","b":"2\"","c":"\u0000"},"created_at"`
	for _, id := range []string{"1", "2"} {
		if e := v.get("/v1/wallets/" + id + "/history").body; !strings.Contains(e, tail) {
			t.Error(e)
		}
	}
	w.mustPost(t, 200, "/v1/wallets/2/withdraw",
		`{"amount":"1","reference":"invoice 7 é","idempotency_key":"w"}`)
	found := v.get("/v1/transactions?reference=invoice+7+%C3%A9&limit=1")
	link := regexp.MustCompile(`<([^>]*)>`).FindStringSubmatch(found.header.Get("Link"))
	if !strings.HasPrefix(found.body, `[{"transaction_id":"1-2"`) || link == nil {
		t.Fatal(found, found.header)
	}
	if rest := v.get(link[1]); !strings.HasPrefix(rest.body, `[{"transaction_id":"2-2"`) ||
		rest.header.Get("Link") != "" {
		t.Error(rest)
	}
	if none := v.get("/v1/transactions?reference=none"); none.body != "[]" {
		t.Error(none)
	}
	if landed := v.get("/v1/wallets/1/transactions?idempotency_key=t"); !strings.HasPrefix(landed.body,
		`[{"transaction_id":"1-2"`) {
		t.Error(landed)
	}
	if none := v.get("/v1/wallets/9/transactions?idempotency_key=t"); none.status != 200 ||
		none.body != "[]" {
		t.Error(none)
	}
	many := make([]string, 17)
	for i := range many {
		many[i] = fmt.Sprintf(`"m%d":"x"`, i)
	}
	for metadata, words := range map[string]string{
		`{"a":{"b":"c"}}`: "", `{"a":1}`: "", `{"a":null}`: "", `{"a":["b"]}`: "", `{"a":"1","a":"2"}`: "",
		`{"":"x"}`: "", `{"a":"\ud800"}`: "", "{\"a\":\"\xff\"}": "", `{` + strings.Join(many,
			",") + `}`: "16",
		`{"a":"` + strings.Repeat("x", 2041) + `"}`:                             "2048",
		`{"a":` + strings.Repeat(`{"a":`, 500) + `1` + strings.Repeat("}", 501): "",
	} {
		a := v.post("/v1/wallets/1/deposit", `{"amount":"1","metadata":`+metadata+`,"idempotency_key":"x"}`)
		refuses(t, a, 400, "metadata_malformed", words)
	}
	v.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","metadata":{"a":"`+strings.Repeat("x",
		2040)+`"},"idempotency_key":"big"}`)
	for _, reference := range []string{`""`, `1`, `"a\u0000"`, `"` + strings.Repeat("x", 256) + `"`,
		"\"\xff\"", `"\u0007"`} {
		a := v.post("/v1/wallets/1/deposit", `{"amount":"1","reference":`+reference+`,"idempotency_key":"x"}`)
		refuses(t, a, 400, "reference_malformed", "255")
	}
	refuses(t, v.post("/v1/wallets/1/deposit", `{"amount":"1","metadata":"x","idempotency_key":"x"}`), 400,
		"body_malformed", "an object")
	for _, in := range []string{`"0s"`, `"366d"`, `"1w"`, `15`, `"-1m"`, `"1.5h"`, `""`, `"9999999999999d"`,
		`"01m"`} {
		a := v.post("/v1/wallets/1/holds", `{"amount":"1","expires_in":`+in+`,"idempotency_key":"x"}`)
		refuses(t, a, 400, "expires_in_malformed", "365d")
	}
	refuses(t, v.post("/v1/holds/1-1/capture", `{"final":"no","idempotency_key":"x"}`), 400, "body_malformed",
		"true or false")
	refuses(t, v.post("/v1/wallets/1/state", `{"state":"shut","idempotency_key":"x"}`), 400,
		"state_malformed", "no_out")
	if list := v.get("/v1/wallets?limit=1"); !strings.HasPrefix(list.body, `[{"wallet_id":1,`) ||
		list.header.Get("Link") == "" {
		t.Error(list)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestClient: who did it is stored with the initiating entry, and is no part of what a key stands for.
func TestClient(t *testing.T) {
	keys := hashed("shop", "read+write", "a") + "," + hashed("till", "read+write", "b")
	w := start(t, testEnv(t, "API_KEYS="+keys))
	by := func(key string) []string { return []string{"Authorization", "Bearer " + key} }
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"d"}`, by("a")...)
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"5","to_id":2,"idempotency_key":"t"}`, by("b")...)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"5","idempotency_key":"d"}`, by("b")...)
	history := w.get("/v1/wallets/1/history", by("a")...).body
	if !strings.Contains(history, `"idempotency_key":"d","client":"shop","created_at"`) ||
		!strings.Contains(history, `"idempotency_key":"t","client":"till","created_at"`) {
		t.Error(history)
	}
	if payee := w.get("/v1/wallets/2/history", by("a")...).body; strings.Contains(payee, "client") {
		t.Error(payee)
	}
	refuses(t, w.post("/v1/wallets/1/state", `{"state":"frozen","idempotency_key":"s"}`, by("a")...), 403,
		"forbidden", "")
	var stored string
	if err := connect(t, w.env["DATABASE_URL"]).QueryRow(context.Background(),
		`SELECT note FROM entry WHERE wallet_id = 1 AND seq = 1`).Scan(&stored); err != nil ||
		stored != `{"client":"shop"}` {
		t.Error(stored, err)
	}
}

// TestBalanceAsItWas: at a time, and after an entry; final once nothing can come before it any more.
func TestBalanceAsItWas(t *testing.T) {
	w, v := two(t)
	var times []string
	for i := range 5 {
		a := w.mustPost(t, 200, "/v1/wallets/1/deposit",
			fmt.Sprintf(`{"amount":"10","idempotency_key":"d%d"}`, i))
		times = append(times, a.json(t)["created_at"].(string))
	}
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"7","idempotency_key":"h"}`)
	says(t, v.get("/v1/wallets/1/balance?at="+times[2]), 200,
		`{"wallet_id":1,"currency":"USD","balance":"30",`+
			`"held":"0","available":"30","seq":3,"at":"`+times[2]+`","final":true}`)
	says(t, v.get("/v1/wallets/1/balance?seq=4"), 200, `{"wallet_id":1,"currency":"USD","balance":"40",`+
		`"held":"0","available":"40","seq":4,"final":true}`)
	says(t, v.get("/v1/wallets/1/balance?seq=0"), 200, `{"wallet_id":1,"currency":"USD","balance":"0",`+
		`"held":"0","available":"0","seq":0,"final":true}`)
	says(t, v.get("/v1/wallets/1/balance?at=1999-01-01T00:00:00Z"), 200, `{"wallet_id":1,"currency":"USD",`+
		`"balance":"0","held":"0","available":"0","seq":0,"at":"1999-01-01T00:00:00.000000Z","final":true}`)
	refuses(t, v.get("/v1/wallets/1/balance?seq=7"), 409, "seq_not_reached", "")
	refuses(t, v.get("/v1/wallets/2/balance?seq=0"), 404, "wallet_not_found", "")
	refuses(t, v.get("/v1/wallets/1/balance?seq=1&min_seq=1"), 400, "parameter_malformed", "one of")
	future := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	if now := v.get("/v1/wallets/1/balance?at=" + future).json(t); now["final"] != false ||
		now["held"] != "7" {
		t.Error(now)
	}
	// A batch that has begun may still commit what belongs before now.
	conn := connect(t, w.env["DATABASE_URL"])
	ctx := context.Background()
	if _, err := conn.Exec(ctx,
		`SET application_name = 'wallet write'; BEGIN; SELECT pg_current_xact_id()`); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Millisecond)
	now := time.Now().UTC().Format(time.RFC3339Nano)
	time.Sleep(10 * time.Millisecond)
	if is := v.get("/v1/wallets/1/balance?at=" + now).json(t); is["final"] != false {
		t.Error(is)
	}
	if _, err := conn.Exec(ctx, `COMMIT`); err != nil {
		t.Fatal(err)
	}
	if is := v.get("/v1/wallets/1/balance?at=" + now).json(t); is["final"] != true || is["held"] != "7" {
		t.Error(is)
	}
}

// TestStatement: its edges are those of the chain, its sums those of its entries, its hash that of the
// events; in three forms.
func TestStatement(t *testing.T) {
	w, v := two(t)
	var times []string
	for i := range 2500 {
		a := w.mustPost(t, 200, "/v1/wallets/1/deposit",
			fmt.Sprintf(`{"amount":"1","idempotency_key":"=d%d"}`, i))
		times = append(times, a.json(t)["created_at"].(string))
	}
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"7","idempotency_key":"h"}`)
	w.mustPost(t, 200, "/v1/holds/1-2501/capture",
		`{"amount":"5","to_id":2,"reference":"@r","idempotency_key":"c"}`)
	type edge struct{ Balance, Held string }
	var st struct {
		Final            bool
		Opening, Closing edge
		FirstSeq         int `json:"first_seq"`
		LastSeq          int `json:"last_seq"`
		Entries          []json.RawMessage
		Totals           map[string]struct {
			Count int
			Sum   string
		}
		SHA256 string
	}
	a := v.get("/v1/wallets/1/statement?since=" + times[99])
	if err := json.Unmarshal([]byte(a.body), &st); err != nil || a.status != 200 {
		t.Fatal(err, a.body[:200])
	}
	sum := sha256.New()
	for _, e := range st.Entries {
		fmt.Fprintf(sum, "%s\n", e)
	}
	hash := fmt.Sprintf("%x", sum.Sum(nil))
	if st.Opening != (edge{"99", "0"}) || st.Closing != (edge{"2495", "0"}) || st.FirstSeq != 100 ||
		st.LastSeq != 2502 || len(st.Entries) != 2403 || st.SHA256 != hash || st.Final ||
		fmt.Sprint(st.Totals) != "map[deposit:{2401 2401} hold:{1 0} transfer_out:{1 -5}]" {
		st.Entries = nil
		t.Errorf("%+v, hash of its entries %s", st, hash)
	}
	until := "/v1/wallets/1/statement?since=" + times[99] + "&until=" + times[101]
	says(t, v.get(until), 200, `{"wallet_id":1,"currency":"USD","since":"`+times[99]+`","until":"`+times[101]+
		`","final":true,"opening":{"balance":"99","held":"0"},"closing":{"balance":"101","held":"0"},`+
		`"first_seq":100,"last_seq":101,"entries":[`+string(untimed(st.Entries[0]))+`,`+
		string(untimed(st.Entries[1]))+
		`],"totals":{"deposit":{"count":2,"sum":"2"}},"sha256":"`+hashOf(st.Entries[:2])+`"}`)
	says(t, v.get("/v1/wallets/1/statement?since=2999-01-01T00:00:00Z&until=1999-01-01T00:00:00Z"), 200,
		`{"wallet_id":1,"currency":"USD","since":"2999-01-01T00:00:00.000000Z",`+
			`"until":"1999-01-01T00:00:00.000000Z",`+
			`"final":true,"opening":{"balance":"0","held":"0"},"closing":{"balance":"0","held":"0"},`+
			`"entries":[],`+
			`"totals":{},"sha256":"`+hashOf(nil)+`"}`)
	lines := strings.Split(v.get(until, "Accept", "application/x-ndjson").body, "\n")
	if len(lines) != 4 || lines[0] != string(st.Entries[0]) || !strings.HasPrefix(lines[2],
		`{"statement":{"wallet_id":1,`) {
		t.Errorf("%q", lines)
	}
	table := v.get("/v1/wallets/1/statement?since="+times[2498], "Accept", "text/csv")
	want := "seq,created_at,transaction_id,kind,credit,debit,balance,held,counterparty," +
		"reference,metadata,idempotency_key\n" +
		"2498,,,opening,,,2498,0,,,,\n2499,T,1-2499,deposit,1,,2499,0,,,,'=d2498\n" +
		"2500,T,1-2500,deposit,1,,2500,0,,,,'=d2499\n" +
		"2501,T,1-2501,hold,,,2500,7,,,,h\n2502,T,1-2502,transfer_out,,5,2495,0,2,'@r,,c\n" +
		"2502,,,closing,,,2495,0,,,,\n"
	if got := regexp.MustCompile(`,20[^,]*Z,`).ReplaceAllString(table.body, ",T,"); got != want ||
		table.header.Get("Content-Type") != "text/csv" {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	refuses(t, v.get(until, "Accept", "text/html"), 406, "not_acceptable", "text/csv")
	refuses(t, v.get("/v1/wallets/3/statement"), 404, "wallet_not_found", "")
}

// untimed is a history item without its time, as says wants it.
func untimed(raw json.RawMessage) []byte {
	return []byte(strings.ReplaceAll(when.ReplaceAllString(string(raw), ""), ",}", "}"))
}

func hashOf(entries []json.RawMessage) string {
	sum := sha256.New()
	for _, e := range entries {
		fmt.Fprintf(sum, "%s\n", e)
	}
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// TestConstraintsStateTheRulesOfMovements: the database refuses by itself, by the rule's name.
func TestConstraintsStateTheRulesOfMovements(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"40","idempotency_key":"h"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"1","idempotency_key":"h2"}`)
	w.mustPost(t, 200, "/v1/holds/1-3/void", `{"idempotency_key":"v"}`)
	w.mustPost(t, 200, "/v1/transactions/1-1/reverse", `{"amount":"10","idempotency_key":"r"}`)
	for _, id := range []string{"2", "3", "4"} { // wallets of other states, with entry 1 a deposit
		w.mustPost(t, 200, "/v1/wallets/"+id+"/deposit", `{"amount":"5","idempotency_key":"d"}`)
	}
	w.mustPost(t, 200, "/v1/wallets/4/withdraw", `{"amount":"all","idempotency_key":"w"}`)
	w.mustPost(t, 200, "/v1/wallets/2/state", `{"state":"no_out","idempotency_key":"s"}`)
	w.mustPost(t, 200, "/v1/wallets/3/state", `{"state":"frozen","idempotency_key":"s"}`)
	w.mustPost(t, 200, "/v1/wallets/4/state", `{"state":"closed","idempotency_key":"s"}`)
	conn := connect(t, w.env["DATABASE_URL"])
	insert := func(values string) string {
		return `INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key, of_seq,
			held_change, held, remaining, note) VALUES (` + values + `)`
	}
	to := func(id, seq int, balance string) string {
		return fmt.Sprintf(`UPDATE wallet SET seq = %d, balance = %s, entry_at = 'epoch' WHERE id = %d; `,
			seq, balance, id)
	}
	next := to(1, 6, "90")
	for _, c := range []struct{ constraint, statement string }{
		{"held_within_balance", `UPDATE wallet SET held = 90.01 WHERE id = 1`},
		{"held_within_balance", `UPDATE wallet SET held = -1 WHERE id = 1`},
		{"held_within_balance",
			`UPDATE wallet SET balance = 39 WHERE id = 1`}, // what an older program would spend
		{"wallet_state_known", `UPDATE wallet SET state = 'shut', state_seq = 1 WHERE id = 1`},
		{"wallet_state_known", `UPDATE wallet SET state = 'open' WHERE id = 1`},
		{"closed_wallet_is_empty", `UPDATE wallet SET state = 'closed', state_seq = 1 WHERE id = 1`},
		{"entry_held_within_balance",
			insert(`1, 6, 'epoch', 'deposit', 1, 91, 'k', NULL, NULL, 92, NULL, NULL`)},
		{"entry_held_within_balance",
			insert(`1, 6, 'epoch', 'deposit', 1, 91, 'k', NULL, NULL, 0, NULL, NULL`)},
		{"held_before_within_balance", insert(`1, 6, 'epoch', 'hold', 0, 90, 'k', NULL, 50, 40, 50, NULL`)},
		{"held_change_fits_kind", insert(`1, 6, 'epoch', 'hold', 0, 90, 'k', NULL, NULL, 40, NULL, NULL`)},
		{"held_change_fits_kind", insert(`1, 6, 'epoch', 'hold', 0, 90, 'k', NULL, 5, 45, 4, NULL`)},
		{"held_change_fits_kind", insert(`1, 6, 'epoch', 'release', 0, 90, 'k', NULL, -40, NULL, 0, NULL`)},
		{"held_change_fits_kind", insert(`1, 6, 'epoch', 'release', 0, 90, 'k', 2, -40, NULL, 1, NULL`)},
		{"held_change_fits_kind", insert(`1, 6, 'epoch', 'withdrawal', -41, 49, 'k', 2, -40, NULL, 0, NULL`)},
		{"held_change_fits_kind", insert(`1, 6, 'epoch', 'deposit', 1, 91, 'k', 2, -40, NULL, 0, NULL`)},
		{"amount_sign_fits_kind", insert(`1, 6, 'epoch', 'state', 1, 91, 'k', NULL, NULL, 40, NULL, NULL`)},
		{"of_an_earlier_entry", insert(`1, 6, 'epoch', 'withdrawal', -1, 89, 'k', 6, NULL, 40, 1, NULL`)},
		{"of_an_earlier_entry", insert(`1, 6, 'epoch', 'withdrawal', -1, 89, 'k', 1, NULL, 40, NULL, NULL`)},
		{"of_an_earlier_entry", insert(`1, 6, 'epoch', 'withdrawal', -1, 89, 'k', 1, NULL, 40, -1, NULL`)},
		{"note_at_most_8_kib",
			insert(`1, 6, 'epoch', 'deposit', 1, 91, 'k', NULL, NULL, 40, NULL, repeat('x', 8193)`)},
		// Another held than the wallet's: what an older program writes.
		{"entry_fits_wallet", to(1, 6,
			"91") + insert(`1, 6, 'epoch', 'deposit', 1, 91, 'k', NULL, NULL, NULL, NULL, NULL`)},
		{"entry_fits_wallet",
			next + insert(`1, 6, 'epoch', 'state', 0, 90, 'k', NULL, NULL, 39, NULL, NULL`)},
		// States.
		{"state_allows_entry", to(2, 3,
			"4") + insert(`2, 3, 'epoch', 'withdrawal', -1, 4, 'k', NULL, NULL, NULL, NULL, NULL`)},
		{"state_allows_entry", to(2, 3,
			"4") + insert(`2, 3, 'epoch', 'withdrawal', -1, 4, 'k', 1, NULL, NULL, 4, NULL`)},
		{"state_allows_entry", to(2, 3, "5") + `UPDATE wallet SET held = 1 WHERE id = 2; ` +
			insert(`2, 3, 'epoch', 'hold', 0, 5, 'k', NULL, 1, 1, 1, NULL`)},
		{"state_allows_entry", to(3, 3,
			"6") + insert(`3, 3, 'epoch', 'deposit', 1, 6, 'k', NULL, NULL, NULL, NULL, NULL`)},
		{"state_allows_entry", to(4, 4,
			"0") + insert(`4, 4, 'epoch', 'state', 0, 0, 'k', NULL, NULL, NULL, NULL, NULL`)},
		// Holds, reversals, references.
		{"hold_captured_at_most_its_amount", `UPDATE hold SET captured = 1 WHERE seq = 2`},
		{"open_hold_is_whole", `UPDATE hold SET remaining = 39 WHERE seq = 2`},
		{"open_hold_is_whole", `UPDATE hold SET captured = 40, remaining = 0 WHERE seq = 2`},
		{"ended_hold_holds_nothing", `UPDATE hold SET status = 'voided' WHERE seq = 2`},
		{"hold_status_known", `UPDATE hold SET status = 'gone', remaining = 0 WHERE seq = 2`},
		{"captured_not_negative", `UPDATE hold SET captured = -1, remaining = 41 WHERE seq = 2`},
		{"hold_last_seq_not_before", `UPDATE hold SET last_seq = 1 WHERE seq = 2`},
		{"hold_pkey", `INSERT INTO hold SELECT * FROM hold`},
		{"reversed_at_most_its_amount", `UPDATE reversal SET reversed = 100.01`},
		{"reversed_positive", `INSERT INTO reversal VALUES (1, 2, 1, 0)`},
		{"reference_1_to_255", `INSERT INTO reference VALUES ('', 1, 1)`},
	} {
		var pgErr *pgconn.PgError
		_, err := conn.Exec(context.Background(), c.statement)
		if !errors.As(err, &pgErr) || pgErr.ConstraintName != c.constraint {
			t.Errorf("%s: %v, want %s", c.statement, err, c.constraint)
		}
	}
	for _, statement := range []string{ // by trigger
		`UPDATE wallet SET state = 'open' WHERE id = 4`, `UPDATE hold SET status = 'expired' WHERE seq = 3`,
		`UPDATE hold SET amount = 41 WHERE seq = 2`, `DELETE FROM hold`, `DELETE FROM reversal`,
		`UPDATE reversal SET reversed = 9`,
	} {
		if _, err := conn.Exec(context.Background(), statement); pg.State(err) != "23001" {
			t.Errorf("%s: %v", statement, err)
		}
	}
	checkLedger(t, w.env["DATABASE_URL"])
	var unvalidated int
	if err := conn.QueryRow(context.Background(),
		`SELECT count(*) FROM pg_constraint WHERE NOT convalidated`).Scan(&unvalidated); err != nil ||
		unvalidated > 0 {
		t.Errorf("%d constraints are not validated, %v", unvalidated, err)
	}
}

// TestFormerRelease: the program of schema version 2 runs on, while the new one brings the schema up under
// load and both serve side by side, an open hold included. Nothing is lost, nothing held is spent, and the
// events of all that stay byte for byte what they are made of.
func TestFormerRelease(t *testing.T) {
	env := testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers)
	old := startFormer(t, env)
	post := func(path, body string) answer { return old.post(t, path, body) }
	var acknowledged []string // path, body, answer
	for i := range 30 {
		path := fmt.Sprintf("/v1/wallets/%d/deposit", 1+i%3)
		body := fmt.Sprintf(`{"amount":"100","idempotency_key":"before %d"}`, i)
		a := post(path, body)
		if a.status != 200 {
			t.Fatal(a)
		}
		acknowledged = append(acknowledged, path, body, a.body)
	}

	// Load on the old program while the new one starts; the longest time without an answer is told.
	var clients sync.WaitGroup
	var mu sync.Mutex
	var longest time.Duration
	stop := make(chan struct{})
	for c := range 8 {
		clients.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				path := fmt.Sprintf("/v1/wallets/%d/transfer", 1+c%3)
				body := fmt.Sprintf(`{"amount":"0.01","to_id":%d,"idempotency_key":"c%d-%d"}`, 1+(c+1)%3, c,
					i)
				began := time.Now()
				a := post(path, body)
				mu.Lock()
				longest = max(longest, time.Since(began))
				if a.status == 200 {
					acknowledged = append(acknowledged, path, body, a.body)
				} else {
					t.Errorf("while the schema was brought up: %s", a)
				}
				mu.Unlock()
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	w := start(t, env)
	time.Sleep(500 * time.Millisecond)
	close(stop)
	clients.Wait()
	t.Logf("the longest request while the schema was brought up took %v", longest)

	// Both at once, on the same wallets.
	w.mustPost(t, 200, "/v1/wallets/10/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/10/holds", `{"amount":"40","idempotency_key":"h"}`)
	for _, c := range []struct{ path, body string }{
		{"/v1/wallets/10/withdraw", `{"amount":"100","idempotency_key":"old 1"}`}, // would spend what is held
		{"/v1/wallets/10/withdraw",
			`{"amount":"1","idempotency_key":"old 2"}`}, // would break the chain of held
		{"/v1/wallets/10/deposit", `{"amount":"1","idempotency_key":"old 3"}`},
		{"/v1/wallets/1/transfer", `{"amount":"1","to_id":10,"idempotency_key":"old 4"}`},
	} {
		if a := post(c.path, c.body); a.status != 500 {
			t.Errorf("the former release on a wallet with an open hold: %s", a)
		}
	}
	for i := range 20 { // what touches no hold goes on, on either
		path, key := fmt.Sprintf("/v1/wallets/%d/transfer", 1+i%3), fmt.Sprintf("both %d", i)
		body := fmt.Sprintf(`{"amount":"0.5","to_id":%d,"idempotency_key":%q}`, 1+(i+1)%3, key)
		a, b := post(path, body), w.post(path, body)
		if a.status != 200 || b.body != a.body || b.header.Get("Idempotent-Replayed") != "true" {
			t.Errorf("the same key on both: %s, %s", a, b)
		}
		acknowledged = append(acknowledged, path, body, a.body)
	}
	// Neither serves what the other cached.
	for _, read := range []func(string) answer{func(path string) answer { return w.get(path) }, old.get(t)} {
		if a := read("/v1/wallets/10/balance"); !strings.Contains(a.body, `"balance":"100"`) {
			t.Error(a)
		}
	}
	if a := w.get("/v1/wallets/10/balance"); !strings.Contains(a.body, `"held":"40","available":"60"`) {
		t.Error(a)
	}
	w.mustPost(t, 200, "/v1/holds/10-2/capture", `{"to_id":1,"idempotency_key":"c"}`)
	if a := post("/v1/wallets/10/withdraw", `{"amount":"60","idempotency_key":"old 5"}`); a.status != 200 {
		t.Errorf("the former release once nothing is held: %s", a)
	}
	old.end()
	for i := 0; i < len(acknowledged); i += 3 {
		if a := w.post(acknowledged[i], acknowledged[i+1]); a.status != 200 || a.body != acknowledged[i+2] {
			t.Fatalf("acknowledged by the former release as %s, now %s", acknowledged[i+2], a)
		}
	}
	checkLedger(t, env["DATABASE_URL"])
	var said bytes.Buffer
	findings, err := runAudit(context.Background(), &w.cfg.relayConfig, 0, &said)
	if err != nil || findings > 0 {
		t.Errorf("%d findings, %v\n%s", findings, err, said.String())
	}
}

// former is a process of the former release.
type former struct {
	url string
	end func()
}

// startFormer builds and starts the program of testdata/release-2.tar.gz, which knows schema version 2.
func startFormer(t testing.TB, env map[string]string) *former {
	t.Helper()
	folder := t.TempDir()
	archive, err := filepath.Abs("testdata/release-2.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{"tar", "-xzf", archive},
		{"go", "build", "-buildvcs=false", "-o", "wallet", "."}} {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Dir = folder
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	listener := newListener(t)
	address := listener.Addr().String()
	listener.Close()
	cmd := exec.Command(filepath.Join(folder, "wallet"))
	cmd.Env = os.Environ()
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Env = append(cmd.Env, "LISTEN_ADDR="+address)
	var logged bytes.Buffer
	cmd.Stderr = &logged
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f := &former{url: "http://" + address}
	f.end = sync.OnceFunc(func() {
		cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the former release ended with: %v\n%s", err, logged.String())
		}
	})
	t.Cleanup(f.end)
	eventually(t, 20*time.Second, "the former release is ready", func() bool {
		return f.do(t, "GET", "/readyz", "").status == 200
	})
	return f
}

func (f *former) post(t testing.TB, path, body string) answer { return f.do(t, "POST", path, body) }

func (f *former) get(t testing.TB) func(string) answer {
	return func(path string) answer { return f.do(t, "GET", path, "") }
}

func (f *former) do(t testing.TB, method, path, body string) answer {
	r, err := http.NewRequest(method, f.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer response.Body.Close()
	read, _ := io.ReadAll(response.Body)
	// This release's answers end with a line's end, which running.do leaves out. The former release's do not.
	// Nothing else may differ.
	if bytes.HasSuffix(read, []byte("\n")) {
		return answer{body: fmt.Sprintf("the former release ends with a line's end: %q", read)}
	}
	return answer{response.StatusCode, response.Header, string(read)}
}

// -----------------------------------------------------------------------------------------------------------
// Batches
// -----------------------------------------------------------------------------------------------------------

// batchOf is the body of an atomic batch.
func batchOf(key string, operations ...string) string {
	return `{"idempotency_key":"` + key + `","operations":[` + strings.Join(operations, ",") + `]}`
}

// eachOf is the body of a batch whose operations stand by themselves.
func eachOf(operations ...string) string {
	return `{"atomic":false,"operations":[` + strings.Join(operations, ",") + `]}`
}

// resultsOf are the outcomes in a batch's answer, each as it was sent.
func resultsOf(t *testing.T, a answer) (results []string) {
	t.Helper()
	var body struct{ Results []json.RawMessage }
	if err := json.Unmarshal([]byte(a.body), &body); err != nil {
		t.Fatalf("%v: %s", err, a)
	}
	for _, one := range body.Results {
		results = append(results, string(one))
	}
	return results
}

// TestAtomicBatch: every kind at once, each seeing those before it; each answer is its own route's; the same
// again by the key; and the events say that they belong together.
func TestAtomicBatch(t *testing.T) {
	w, v := two(t)
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"10","idempotency_key":"h1"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"20","to_id":7,"idempotency_key":"h2"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"5","idempotency_key":"h3"}`)
	body := batchOf("b", `{"op":"deposit","wallet_id":2,"amount":"3"}`,
		`{"op":"transfer","wallet_id":1,"to_id":2,"amount":"40","reference":"r"}`,
		`{"op":"transfer","wallet_id":2,"to_id":9,"amount":"all"}`,
		`{"op":"capture","hold_id":"1-2"}`, `{"op":"capture","hold_id":"1-3","amount":"15"}`,
		`{"op":"void","hold_id":"1-4"}`, `{"op":"reverse","transaction_id":"1-1","amount":"1"}`,
		`{"op":"hold","wallet_id":9,"amount":"43","expires_in":"1h"}`,
		`{"op":"withdraw","wallet_id":1,"amount":"34"}`)
	a := w.mustPost(t, 200, "/v1/batches", body)
	results := resultsOf(t, a)
	for i, want := range []string{
		`{"transaction_id":"2-1","wallet_id":2,"currency":"USD","amount":"3","balance":"3","seq":1}`,
		`{"transaction_id":"1-5","from_id":1,"to_id":2,"currency":"USD","amount":"40","from_balance":"60",` +
			`"to_balance":"43","from_seq":5,"to_seq":2,"reference":"r"}`,
		`{"transaction_id":"2-3","from_id":2,"to_id":9,"currency":"USD","amount":"43","from_balance":"0",` +
			`"to_balance":"43","from_seq":3,"to_seq":1}`,
		`{"transaction_id":"1-6","wallet_id":1,"currency":"USD","amount":"10","balance":"50","seq":6,` +
			`"hold_id":"1-2","remaining":"0","held":"25"}`,
		`{"transaction_id":"1-7","from_id":1,"to_id":7,"currency":"USD","amount":"15","from_balance":"35",` +
			`"to_balance":"15","from_seq":7,"to_seq":1,"hold_id":"1-3","remaining":"0","held":"5"}`,
		`{"hold_id":"1-4","wallet_id":1,"currency":"USD","released":"5","remaining":"0","status":"voided",` +
			`"balance":"35","held":"0","available":"35","seq":8}`,
		`{"transaction_id":"1-9","wallet_id":1,"currency":"USD","amount":"1","balance":"34","seq":9,` +
			`"reverses":"1-1","reversible":"99"}`,
		`{"hold_id":"9-2","wallet_id":9,"currency":"USD","amount":"43","remaining":"43","status":"open",` +
			`"balance":"43","held":"43","available":"0","seq":2}`,
		`{"transaction_id":"1-10","wallet_id":1,"currency":"USD","amount":"34","balance":"0","seq":10}`,
	} {
		says(t, answer{status: 200, body: results[i]}, 200, want)
	}
	counts := w.mustCount(t)
	again := v.mustPost(t, 200, "/v1/batches", body)
	if again.body != a.body || again.header.Get("Idempotent-Replayed") != "true" ||
		a.header.Get("Idempotent-Replayed") != "" || v.mustCount(t) != counts {
		t.Errorf("sent again: %s %v, first %s %v", again, again.header, a, a.header)
	}
	single := w.get("/v1/transactions/1-10").json(t)
	if single["idempotency_key"] != "b#8" {
		t.Errorf("the last one by itself: %v", single)
	}
	var payload string
	err := connect(t, w.env["DATABASE_URL"]).QueryRow(context.Background(),
		`SELECT payload FROM outbox WHERE aggregate_id = 7 AND seq = 1`).Scan(&payload)
	if want := `"batch":{"id":"2-1","index":4,"of":9}`; err != nil || !strings.Contains(payload, want) {
		t.Errorf("the event of wallet 7 is %s, %v", payload, err)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestAtomicBatchRefused: the problem of the operation at fault, and which it is; nothing is left behind, and
// the key is free.
func TestAtomicBatchRefused(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"100","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"10","idempotency_key":"h"}`)
	counts, before := w.mustCount(t), w.get("/v1/wallets/1/balance").body
	deposit := `{"op":"deposit","wallet_id":5,"amount":"1"}`
	for _, bad := range []struct {
		operation, code string
		status          int
	}{
		{`{"op":"withdraw","wallet_id":1,"amount":"91"}`, "insufficient_funds", 422},
		{`{"op":"withdraw","wallet_id":4,"amount":"1"}`, "wallet_not_found", 404},
		{`{"op":"transfer","wallet_id":1,"to_id":1,"amount":"1"}`, "same_wallet", 400},
		{`{"op":"transfer","wallet_id":1,"amount":"1"}`, "field_missing", 400},
		{`{"op":"deposit","wallet_id":1,"amount":"0.001"}`, "amount_scale", 422},
		{`{"op":"deposit","wallet_id":1,"amount":"x"}`, "amount_malformed", 400},
		{`{"op":"deposit","wallet_id":1,"amount":"1","to_id":2}`, "field_unknown", 400},
		{`{"op":"deposit","wallet_id":1,"amount":"1","metadata":{"a":1}}`, "metadata_malformed", 400},
		{`{"op":"deposit","wallet_id":1,"amount":"1","idempotency_key":"k"}`,
			"idempotency_key_conflict", 400},
		{`{"op":"deposit","amount":"1"}`, "field_missing", 400},
		{`{"op":"state","wallet_id":1,"state":"frozen"}`, "field_unknown", 400},
		{`{"op":"pay","wallet_id":1}`, "operation_unknown", 400},
		{`{"wallet_id":1}`, "operation_unknown", 400},
		{`{"op":"capture","hold_id":"1-9"}`, "hold_not_found", 404},
		{`{"op":"capture","hold_id":"1-2","amount":"11"}`, "hold_exceeded", 422},
		{`{"op":"void","hold_id":"1-1"}`, "hold_not_found", 404},
		{`{"op":"reverse","transaction_id":"8-1"}`, "transaction_not_found", 404},
		{`{"op":"reverse","transaction_id":"1-1","amount":"101"}`, "reversal_exceeds", 422},
		{`{"op":"deposit","wallet_id":1,"amount":"1"`, "body_malformed", 400},
		{`7`, "body_malformed", 400},
	} {
		capture := `{"op":"capture","hold_id":"1-2","amount":"1","final":false}`
		a := w.post("/v1/batches", batchOf("b", deposit, capture, bad.operation))
		refuses(t, a, bad.status, bad.code, `"operation":2`)
	}
	for _, body := range []string{`{"idempotency_key":"b"}`, `{"idempotency_key":"b","operations":[]}`,
		`{"idempotency_key":"b","operations":{}}`, batchOf("b", deposit) + "x",
		batchOf("b", slices.Repeat([]string{deposit}, 1001)...),
		`{"idempotency_key":"b","operations":[` + deposit + `],"operations":[` + deposit + `]}`} {
		if a := w.post("/v1/batches", body); a.status != 400 {
			t.Errorf("%.100s: %s", body, a)
		}
	}
	refuses(t, w.post("/v1/batches", `{"operations":[`+deposit+`]}`), 400, "idempotency_key_missing", "")
	refuses(t, w.post("/v1/batches", batchOf(strings.Repeat("k", 252), deposit)), 400,
		"idempotency_key_malformed", "1 to 251")
	large := batchOf("b", `{"op":"deposit","wallet_id":5,"amount":"1"`+strings.Repeat(" ", 1<<20)+`}`)
	refuses(t, w.post("/v1/batches", large), 413, "body_too_large", "1048576")
	if after := w.mustCount(t); after != counts || w.get("/v1/wallets/1/balance").body != before {
		t.Errorf("refusals left %s, before %s; %s", after, counts, w.get("/v1/wallets/1/balance"))
	}
	if a := w.get("/v1/wallets/5"); a.status != 404 {
		t.Errorf("wallet 5: %s", a)
	}
	w.mustPost(t, 200, "/v1/batches", batchOf("b", deposit, deposit))
	for _, other := range []string{batchOf("b", deposit), batchOf("b", deposit, deposit, deposit),
		batchOf("b", deposit, strings.Replace(deposit, "5", "6", 1)),
		batchOf("b", deposit, strings.Replace(deposit, `"1"`, `"2"`, 1))} {
		refuses(t, w.post("/v1/batches", other), 422, "idempotency_key_reused", "")
	}
	refuses(t, w.post("/v1/wallets/5/deposit", `{"amount":"1","idempotency_key":"b#1"}`), 422,
		"idempotency_key_reused", "")
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestEachOfABatch: each operation has the status and the body that it would have had by itself; those on one
// wallet are decided in order, whatever the number.
func TestEachOfABatch(t *testing.T) {
	w, v := two(t)
	body := eachOf(`{"op":"deposit","wallet_id":1,"amount":"10","idempotency_key":"a"}`,
		`{"op":"withdraw","wallet_id":1,"amount":"11","idempotency_key":"b"}`,
		`{"op":"hold","wallet_id":1,"amount":"4","idempotency_key":"c"}`,
		`{"op":"deposit","wallet_id":1,"amount":"-1","idempotency_key":"d"}`,
		`{"op":"deposit","wallet_id":1,"amount":"1"}`,
		`{"op":"capture","hold_id":"7-7","idempotency_key":"e"}`,
		`{"op":"transfer","wallet_id":1,"to_id":2,"amount":"all","idempotency_key":"f"}`)
	a := w.mustPost(t, 200, "/v1/batches", body)
	for i, want := range []struct {
		status int
		has    string
	}{{200, `"balance":"10"`}, {422, `"code":"insufficient_funds"`}, {201, `"hold_id":"1-2"`},
		{400, `"code":"amount_not_positive"`}, {400, `"code":"idempotency_key_missing"`},
		{404, `"code":"hold_not_found"`}, {200, `"amount":"6"`}} {
		one := resultsOf(t, a)[i]
		if !strings.HasPrefix(one, fmt.Sprintf(`{"status":%d,"body":{`, want.status)) ||
			!strings.Contains(one, want.has) {
			t.Errorf("%d: %s, want %d ... %s", i, one, want.status, want.has)
		}
	}
	counts := w.mustCount(t)
	again := v.mustPost(t, 200, "/v1/batches", body)
	for i, one := range resultsOf(t, again) {
		first := resultsOf(t, a)[i]
		if strings.HasPrefix(first, `{"status":2`) && one != first {
			t.Errorf("sent again: %s, first %s", one, first)
		}
	}
	if v.mustCount(t) != counts {
		t.Error("sent again, it moved money")
	}
	refuses(t, w.post("/v1/batches", strings.Replace(body, "{", `{"idempotency_key":"k",`, 1)), 400,
		"idempotency_key_conflict", "")

	// In turns one that is refused unless the one before it was posted.
	var turns []string
	for i := range 500 {
		const in = `{"op":"deposit","wallet_id":3,"amount":"1","idempotency_key":"d%d"}`
		const out = `{"op":"transfer","wallet_id":3,"to_id":4,"amount":"1","idempotency_key":"t%d"}`
		turns = append(turns, fmt.Sprintf(in, i), fmt.Sprintf(out, i))
	}
	for i, one := range resultsOf(t, w.mustPost(t, 200, "/v1/batches", eachOf(turns...))) {
		if !strings.HasPrefix(one, `{"status":200`) {
			t.Fatalf("operation %d: %s", i, one)
		}
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestBatchReleasesDueHolds: as a single movement does, when funds lack.
func TestBatchReleasesDueHolds(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"10","idempotency_key":"d"}`)
	w.mustPost(t, 201, "/v1/wallets/1/holds", `{"amount":"10","expires_in":"1s","idempotency_key":"h"}`)
	time.Sleep(1050 * time.Millisecond) // the sweep may be first; then this asks less
	w.mustPost(t, 200, "/v1/batches", batchOf("b", `{"op":"withdraw","wallet_id":1,"amount":"4"}`,
		`{"op":"withdraw","wallet_id":1,"amount":"6"}`))
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestOppositeBatches: atomic batches over the same wallets, in opposite orders and of all sizes, at two
// replicas at once: all are answered, soon, and money is what it was.
func TestOppositeBatches(t *testing.T) {
	w, v := two(t)
	const wallets, clients, each = 40, 8, 15
	for id := 1; id <= wallets; id++ {
		path := fmt.Sprintf("/v1/wallets/%d/deposit", id)
		w.mustPost(t, 200, path, `{"amount":"1000","idempotency_key":"d"}`)
	}
	var working sync.WaitGroup
	var longest atomic.Int64
	for c := range clients {
		working.Go(func() {
			for i := range each {
				var operations []string
				for n := range 1 + (c+i)*7%wallets {
					from, to := 1+(n+i)%wallets, 1+(n+i+1)%wallets
					if c%2 == 1 {
						from, to = wallets+1-from, wallets+1-to
					}
					operations = append(operations, fmt.Sprintf(
						`{"op":"transfer","wallet_id":%d,"to_id":%d,"amount":"1"}`, from, to))
				}
				began := time.Now()
				replica := []*running{w, v}[(c/2)%2]
				a := replica.post("/v1/batches", batchOf(fmt.Sprint(c, "-", i), operations...))
				if a.status != 200 {
					t.Errorf("%s", a)
				}
				for took := time.Since(began).Nanoseconds(); ; {
					if was := longest.Load(); took <= was || longest.CompareAndSwap(was, took) {
						break
					}
				}
			}
		})
	}
	working.Wait()
	t.Logf("the longest took %v", time.Duration(longest.Load()))
	if n := w.ledger.splits.Load() + v.ledger.splits.Load(); n > 0 {
		t.Errorf("%d batches were split", n)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestStalledWalletInABatch: a wallet that somebody else holds keeps its own batch waiting, and no other
// request on that batch's wallets.
func TestStalledWalletInABatch(t *testing.T) {
	w := start(t, testEnv(t))
	for id := 1; id <= 3; id++ {
		w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", id), `{"amount":"10","idempotency_key":"a"}`)
	}
	tx := holdWallet(t, w, 1)
	operations := []string{`{"op":"transfer","wallet_id":2,"to_id":1,"amount":"1"`,
		`{"op":"transfer","wallet_id":2,"to_id":3,"amount":"1"`, `{"op":"deposit","wallet_id":4,"amount":"1"`}
	var together, each, keyed []string
	for i, o := range operations {
		together = append(together, o+"}")
		each = append(each, fmt.Sprintf(`%s,"idempotency_key":"e%d"}`, o, i))
	}
	answers := make(chan answer, 2)
	go func() { answers <- w.post("/v1/batches", batchOf("b", together...)) }()
	go func() { answers <- w.post("/v1/batches", eachOf(each...)) }()
	time.Sleep(1500 * time.Millisecond) // by now both have waited for the lock, and been put off
	for i := range 2 {
		var took []time.Duration
		for n := range 4 {
			began := time.Now()
			w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", 2+i),
				fmt.Sprintf(`{"amount":"0.25","idempotency_key":"s%d"}`, n))
			took = append(took, time.Since(began).Round(time.Millisecond))
		}
		keyed = append(keyed, fmt.Sprint(took))
		if slices.Sort(took); took[1] > 300*time.Millisecond { // a short wait for the lock, at most
			t.Errorf("deposits to wallet %d took %v", 2+i, took)
		}
	}
	t.Logf("deposits beside it took %v", keyed)
	tx.Rollback(context.Background())
	for range 2 {
		a := <-answers
		if a.status != 200 || strings.Count(a.body, `"transaction_id"`) != 3 {
			t.Errorf("%s", a)
		}
	}
	if got := w.get("/v1/wallets/2").json(t); got["balance"] != "7" {
		t.Errorf("wallet 2: %v", got)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestSeqSince: the entry that a time falls on is found, however entries lie in time.
func TestSeqSince(t *testing.T) {
	env := testEnv(t)
	start(t, env)
	conn := connect(t, env["DATABASE_URL"])
	if _, err := conn.Exec(context.Background(), `
SET session_replication_role = replica; -- no triggers
CREATE TEMP TABLE made AS
SELECT w, row_number() OVER (PARTITION BY w ORDER BY at) AS seq, at FROM (
    SELECT 1 AS w, timestamptz '2020-01-01' + random() * interval '2000 days' AS at
    FROM generate_series(1, 20000)
    UNION ALL -- a thousand at once, and a day of silence
    SELECT 2, timestamptz '2020-01-01' + g / 1000 * interval '1 day' + g % 10 * interval '1 ms'
    FROM generate_series(1, 20000) g
    UNION ALL -- all but a few at the beginning; and all but a few at the end
    SELECT 3, timestamptz '2020-01-01' + exp(random() * 25) * interval '1 us' FROM generate_series(1, 20000)
    UNION ALL
    SELECT 4, timestamptz '2020-01-01' - exp(random() * 25) * interval '1 us' FROM generate_series(1, 20000)
    UNION ALL
    SELECT 5, timestamptz '2020-01-01' FROM generate_series(1, 20000)
    UNION ALL
    SELECT 6, timestamptz '2020-01-01' + g * interval '1 day' FROM generate_series(1, 70) g
    UNION ALL
    SELECT 7, timestamptz '2020-01-01') x;
CREATE INDEX ON made (w, at);
INSERT INTO wallet (id, currency, balance, seq, created_at, entry_at)
SELECT w, 'EUR', 1, max(seq), '2019-01-01', max(at) FROM made GROUP BY w;
INSERT INTO wallet (id, currency, created_at) VALUES (8, 'EUR', '2019-01-01');
INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
SELECT w, seq, at, 'deposit', 1, 1, 'k' || seq FROM made`); err != nil {
		t.Fatal(err)
	}
	rows, _ := conn.Query(context.Background(), `
SELECT format('wallet %s at %s: %s, want %s', w, at, found, want)
FROM (SELECT w, at, seq_since(w, at) AS found, (
          SELECT coalesce(min(n.seq), (SELECT max(a.seq) + 1 FROM made a WHERE a.w = m.w))
          FROM made n WHERE n.w = m.w AND n.at >= m.at) AS want
      FROM (SELECT w, at + d * interval '1 us' AS at FROM made, unnest(array[-1, 0, 1]) d
            WHERE random() < 0.02 OR seq < 3 OR w > 5
            UNION ALL
            SELECT w, at FROM generate_series(1, 7) w,
                unnest(array['infinity', '-infinity', '0001-01-01', '2040-01-01']::timestamptz[]) at) m) x
WHERE found <> want`)
	wrong, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(wrong) > 0 {
		t.Error(len(wrong), "are wrong, such as", wrong[:min(3, len(wrong))], err)
	}
	none := texts(t, env["DATABASE_URL"], `SELECT seq_since(w, now())::text FROM unnest(array[8, 9]) w`)
	if !slices.Equal(none, []string{"1", "1"}) {
		t.Error("without an entry, and without a wallet:", none)
	}
}

// TestPiecesStayInOrder: what waits for a locked wallet holds up the operations behind it on its other
// wallet, however far behind they stand, and no others.
func TestPiecesStayInOrder(t *testing.T) {
	w := start(t, testEnv(t))
	for id := 1; id <= 2; id++ {
		w.mustPost(t, 200, fmt.Sprintf("/v1/wallets/%d/deposit", id), `{"amount":"10","idempotency_key":"a"}`)
	}
	tx := holdWallet(t, w, 1)
	operations := []string{`{"op":"transfer","wallet_id":2,"to_id":1,"amount":"1","idempotency_key":"first"}`}
	const pieces = 10
	for id := range pieces * pieceMax {
		operations = append(operations,
			fmt.Sprintf(`{"op":"deposit","wallet_id":%d,"amount":"1","idempotency_key":"d"}`, 10+id))
		if id%pieceMax == 0 {
			operations = append(operations, fmt.Sprintf(
				`{"op":"withdraw","wallet_id":2,"amount":"0.1","idempotency_key":"w%d"}`, id))
		}
	}
	operations = append(operations,
		`{"op":"withdraw","wallet_id":2,"amount":"2","idempotency_key":"last"}`)
	answers := make(chan answer, 1)
	go func() { answers <- w.post("/v1/batches", eachOf(operations...)) }()
	eventually(t, 10*time.Second, "the others are posted", func() bool {
		return w.get(fmt.Sprintf("/v1/wallets/%d", 9+pieces*pieceMax)).status == 200
	})
	if got := w.get("/v1/wallets/2").json(t); got["balance"] != "10" {
		t.Errorf("wallet 2 while it waits: %v", got)
	}
	before := w.ledger.batches.Load()
	tx.Rollback(context.Background())
	if a := <-answers; a.status != 200 || strings.Count(a.body, `"transaction_id"`) != len(operations) {
		t.Errorf("%s", a)
	}
	if n := w.ledger.batches.Load() - before; n >= pieces/2 { // what all pieces put off goes on together
		t.Errorf("%d batches after the wallet was free", n)
	}
	history := w.get("/v1/wallets/2/history").body
	first, last := strings.Index(history, `"first"`), strings.Index(history, `"last"`)
	if first < 0 || last < first {
		t.Errorf("not in the order given: %s", history)
	}
	checkLedger(t, w.env["DATABASE_URL"])
}

// TestBatchesAtOnce: no more than so many are in memory at a time, however slowly they are sent.
func TestBatchesAtOnce(t *testing.T) {
	w := start(t, testEnv(t))
	body := batchOf("b", `{"op":"deposit","wallet_id":1,"amount":"1"}`)
	var slow []net.Conn
	for range manyAtOnce {
		conn, err := net.Dial("tcp", w.http.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /v1/batches HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\n"+
			"Content-Length: %d\r\n\r\n{", len(body))
		slow = append(slow, conn)
	}
	eventually(t, 8*time.Second, "all are being read", func() bool {
		return w.ledger.manyNow.Load() == manyAtOnce
	})
	refuses(t, w.post("/v1/batches", body), 503, "overloaded", "")
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"d"}`)
	slow[0].Close()
	eventually(t, 8*time.Second, "a place is free", func() bool {
		return w.post("/v1/batches", body).status == 200
	})
}

// TestBatchCounts: against the client's rate, into debt once, and against the queue's bound.
func TestBatchCounts(t *testing.T) {
	w := start(t, testEnv(t, "RATE_LIMIT=1", "RATE_BURST=20"))
	began := time.Now()
	deposits := slices.Repeat([]string{`{"op":"deposit","wallet_id":1,"amount":"1"}`}, 40)
	a := w.mustPost(t, 200, "/v1/batches", batchOf("b", deposits...))
	b := w.post("/v1/batches", batchOf("c", deposits...))
	refuses(t, b, 429, "rate_limited", "")
	var full int // until the burst is there again
	if n, _ := fmt.Sscanf(a.header.Get("RateLimit"), `"default";r=0;t=%d`, &full); n != 1 {
		t.Errorf("40 of a burst of 20 leave %s", a.header.Get("RateLimit"))
	}
	wait, _ := strconv.Atoi(b.header.Get("Retry-After"))
	took := int(math.Ceil(time.Since(began).Seconds())) // they pay some of it meanwhile
	if full > 40 || full < 40-took || wait > 21 || wait < 21-took {
		t.Errorf("in debt of 20, at 1 a second: %v, Retry-After %d", a.header, wait)
	}

	w = start(t, testEnv(t, "WRITE_QUEUE_MAX=50"))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
	tx := holdWallet(t, w, 1)
	first := make(chan answer)
	go func() { first <- w.post("/v1/batches", batchOf("b", deposits...)) }()
	eventually(t, 3*time.Second, "it waits", func() bool { return w.ledger.reruns.Load() > 0 })
	go w.post("/v1/batches", batchOf("c", deposits...))
	eventually(t, 2*time.Second, "it waits as well", func() bool { return w.ledger.queue.Waiting() >= 40 })
	refuses(t, w.post("/v1/batches", batchOf("d", deposits[:20]...)), 503, "overloaded", "")
	keyed := slices.Repeat([]string{`{"op":"deposit","wallet_id":1,"amount":"1","idempotency_key":"x"}`}, 20)
	refuses(t, w.post("/v1/batches", eachOf(keyed...)), 503, "overloaded", "")
	tx.Rollback(context.Background())
	if a := <-first; a.status != 200 {
		t.Error(a)
	}
}
