// The traps that other ledgers fell into, by the name of whose report tells of it, over HTTP on two replicas.
// Each is a few requests on wallets of its own. Where another test covers the same ground at length, the
// trap's comment names it.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/shopspring/decimal"

	"wallet/internal/migrate"
)

// trap is what a subtest has: two replicas, and two wallets that no other has, the first with 100.
type trap struct {
	*testing.T
	w, v        *running
	id, another int64
}

// place places a hold at one replica and returns its id.
func (x *trap) place(amount, in, key string) string {
	x.Helper()
	a := x.w.mustPost(x.T, 201, x.on("holds"),
		fmt.Sprintf(`{"amount":%q,"expires_in":%q,"idempotency_key":%q}`, amount, in, key))
	return a.json(x.T)["hold_id"].(string)
}

// on is a path of the first wallet.
func (x *trap) on(route string) string { return fmt.Sprintf("/v1/wallets/%d/%s", x.id, route) }

// is expects what a wallet has and what of it is available, at the other replica.
func (x *trap) is(wallet int64, balance, available string) {
	x.Helper()
	a := x.v.get(fmt.Sprintf("/v1/wallets/%d", wallet)).json(x.T)
	if a["available"] == nil {
		a["available"] = a["balance"]
	}
	if a["balance"] != balance || a["available"] != available {
		x.Errorf("wallet %d has %v, want %s, %s of it available", wallet, a, balance, available)
	}
}

// ends waits until a hold has ended as status says.
func (x *trap) ends(hold, status string) {
	x.Helper()
	eventually(x.T, 8*time.Second, hold+" is "+status, func() bool {
		return x.v.get("/v1/holds/" + hold).json(x.T)["status"] == status
	})
}

// key is a body with a key alone.
func key(name string) string { return fmt.Sprintf(`{"idempotency_key":%q}`, name) }

// both posts to a path under two keys at once, at two replicas, and counts what was answered by status.
func (x *trap) both(path, body string, n int) map[int]int {
	x.Helper()
	statuses := make(map[int]int)
	var mu sync.Mutex
	var racing sync.WaitGroup
	for i := range n {
		racing.Go(func() {
			one := []*running{x.w, x.v}[i%2]
			a := one.post(path, fmt.Sprintf(body, i))
			mu.Lock()
			defer mu.Unlock()
			statuses[a.status]++
			if a.status >= 500 {
				x.Error(a)
			}
		})
	}
	racing.Wait()
	return statuses
}

var traps = []struct {
	name string
	fall func(x *trap)
}{
	// Holds. More: TestHolds, TestHoldsEndOnce, TestHoldsExpireByTheDatabasesClock.
	{"holds do not count in spending, blnk 181", func(x *trap) {
		x.place("60", "1h", "h")
		for _, route := range []string{"withdraw", "holds"} {
			refuses(x.T, x.v.post(x.on(route), `{"amount":"41","idempotency_key":"s"}`), 422,
				"insufficient_funds", "40 available")
		}
		refuses(x.T, x.v.post(x.on("transfer"),
			fmt.Sprintf(`{"amount":"41","to_id":%d,"idempotency_key":"s"}`, x.another)),
			422, "insufficient_funds", "40 available")
		x.is(x.id, "100", "40")
	}},
	{"committed twice in parallel, midaz 1519", func(x *trap) {
		h := x.place("60", "1h", "h")
		got := x.both("/v1/holds/"+h+"/capture", fmt.Sprintf(`{"to_id":%d,"idempotency_key":"c%%d"}`,
			x.another), 16)
		if got[200] != 1 || got[409] != 15 {
			x.Errorf("%v", got)
		}
		x.is(x.id, "40", "40")
		x.is(x.another, "60", "60")
	}},
	{"voided twice, blnk 41", func(x *trap) {
		h := x.place("60", "1h", "h")
		x.place("30", "1h", "h2")
		if got := x.both("/v1/holds/"+h+"/void", `{"idempotency_key":"v%d"}`, 16); got[200] != 1 ||
			got[409] != 15 {
			x.Errorf("%v", got)
		}
		x.is(x.id, "100", "70")
	}},
	{"a refused hold is committed by its id, blnk 182", func(x *trap) {
		refuses(x.T, x.w.post(x.on("holds"), `{"amount":"101","idempotency_key":"h"}`), 422,
			"insufficient_funds", "")
		for seq := 1; seq <= 3; seq++ {
			path := fmt.Sprintf("/v1/holds/%d-%d/capture", x.id, seq)
			refuses(x.T, x.v.post(path, key("c")), 404, "hold_not_found", "")
		}
		x.is(x.id, "100", "100")
	}},
	{"a hold's state is wrong after its commit, blnk 293", func(x *trap) {
		a := x.w.mustPost(x.T, 201, x.on("holds"),
			`{"amount":"60","reference":"r","metadata":{"status":"open"},"idempotency_key":"h"}`)
		h := a.json(x.T)["hold_id"].(string)
		x.v.mustPost(x.T, 200, "/v1/holds/"+h+"/capture", `{"amount":"20","idempotency_key":"c"}`)
		for _, one := range []*running{x.w, x.v} {
			is := one.get("/v1/holds/" + h).json(x.T)
			if is["status"] != "captured" || is["captured"] != "20" || is["remaining"] != "0" ||
				fmt.Sprint(is["metadata"]) != "map[status:open]" || is["reference"] != "r" {
				x.Error(is)
			}
		}
	}},
	{"expired and yet counted, tigerbeetle 2118", func(x *trap) {
		h := x.place("100", "1s", "h")
		x.ends(h, "expired")
		x.is(x.id, "100", "100")
		x.w.mustPost(x.T, 200, x.on("withdraw"), `{"amount":"100","idempotency_key":"w"}`)
	}},
	{"half of it is done before the refusal, tigerbeetle 2000", func(x *trap) {
		h := x.place("60", "1h", "h")
		other := fmt.Sprintf("/v1/wallets/%d/", x.another)
		x.w.mustPost(x.T, 200, other+"deposit", `{"amount":"1","idempotency_key":"d"}`)
		x.w.mustPost(x.T, 200, other+"state", `{"state":"frozen","idempotency_key":"s"}`)
		before := x.v.get(x.on("history")).body + x.v.get(other+"history").body
		for path, body := range map[string]string{
			"/v1/holds/" + h + "/capture": fmt.Sprintf(`{"to_id":%d,"idempotency_key":"c"}`, x.another),
			x.on("transfer"): fmt.Sprintf(`{"to_id":%d,"amount":"1","idempotency_key":"t"}`,
				x.another),
		} {
			refuses(x.T, x.w.post(path, body), 409, "wallet_frozen", "")
		}
		refuses(x.T, x.w.post("/v1/holds/"+h+"/capture", `{"amount":"61","idempotency_key":"c"}`), 422,
			"hold_exceeded", "")
		after := x.v.get(x.on("history")).body + x.v.get(other+"history").body
		if before != after {
			x.Errorf("%s\nbefore the refusals: %s", after, before)
		}
		x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture", key("c")) // its key is not used up
	}},
	{"a crash after the hold keeps it for ever, blnk queue", func(x *trap) {
		third := start(x.T, x.w.env) // the only one that is told of the hold, and is gone before it is due
		a := third.mustPost(x.T, 201, x.on("holds"),
			`{"amount":"100","expires_in":"1s","idempotency_key":"h"}`)
		third.end()
		x.ends(a.json(x.T)["hold_id"].(string), "expired")
		x.is(x.id, "100", "100")
	}},
	{"a timeout restores nothing, mojaloop 868", func(x *trap) {
		h := x.place("60", "1s", "h")
		x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture",
			`{"amount":"10","final":false,"idempotency_key":"c"}`)
		x.ends(h, "expired")
		x.is(x.id, "90", "90") // what was captured stays captured, the rest is free
	}},
	{"a timeout fires on the finished, mojaloop 2810", func(x *trap) {
		captured, voided := x.place("20", "1s", "h1"), x.place("30", "1s", "h2")
		other := x.place("40", "1s", "h3") // shows when the sweep has been there
		x.w.mustPost(x.T, 200, "/v1/holds/"+captured+"/capture", key("c"))
		x.w.mustPost(x.T, 200, "/v1/holds/"+voided+"/void", key("v"))
		x.ends(other, "expired")
		x.ends(captured, "captured")
		x.ends(voided, "voided")
		if n := strings.Count(x.v.get(x.on("history")).body, `"reason":"expiry"`); n != 1 {
			x.Errorf("%d expiries", n)
		}
		x.is(x.id, "80", "80")
	}},
	{"a late capture is missed or reopens the hold, hcb 13589 and blnk 42", func(x *trap) {
		h := x.place("60", "1s", "h")
		x.ends(h, "expired")
		refuses(x.T, x.v.post("/v1/holds/"+h+"/capture", key("c")), 409, "hold_expired", "")
		// It is an ordinary payment, which says what it is for.
		a := x.v.mustPost(x.T, 200, x.on("withdraw"),
			fmt.Sprintf(`{"amount":"60","reference":"hold %s","idempotency_key":"late"}`, h)).json(x.T)
		found := x.w.get("/v1/transactions?reference=hold+" + h)
		if !strings.Contains(found.body, fmt.Sprintf(`"transaction_id":"%s"`, a["transaction_id"])) {
			x.Error(found)
		}
		x.ends(h, "expired")
		x.is(x.id, "40", "40")
	}},

	// Reversals. More: TestReversals.
	{"a repeat is refused and undoes the refund, blnk 374 and 152", func(x *trap) {
		tx := x.pay("10", "t")
		first := x.w.mustPost(x.T, 200, "/v1/transactions/"+tx+"/reverse", key("r"))
		for range 3 {
			if again := x.v.post("/v1/transactions/"+tx+"/reverse", key("r")); again.status != 200 ||
				again.body != first.body {
				x.Error(again)
			}
		}
		x.is(x.id, "100", "100")
		x.is(x.another, "0", "0")
	}},
	{"two keys reverse the same, open-bank 528 and strichliste 86", func(x *trap) {
		tx := x.pay("10", "t")
		x.pay("50", "t2") // so that no lack of funds hides it
		got := x.both("/v1/transactions/"+tx+"/reverse", `{"idempotency_key":"r%d"}`, 16)
		if got[200] != 1 || got[422] != 15 {
			x.Errorf("%v", got)
		}
		x.is(x.id, "50", "50")
	}},
	{"parts of it come to more than the whole, open-bank 579", func(x *trap) {
		tx := x.pay("10", "t")
		x.pay("50", "t2")
		got := x.both("/v1/transactions/"+tx+"/reverse", `{"amount":"3","idempotency_key":"r%d"}`, 16)
		if got[200] != 3 || got[422] != 13 {
			x.Errorf("%v", got)
		}
		x.is(x.another, "51", "51")
	}},
	{"a refund overdraws, blnk", func(x *trap) {
		tx := x.pay("10", "t")
		x.w.mustPost(x.T, 201, fmt.Sprintf("/v1/wallets/%d/holds", x.another),
			`{"amount":"4","idempotency_key":"h"}`)
		refuses(x.T, x.v.post("/v1/transactions/"+tx+"/reverse", key("r")), 422, "insufficient_funds",
			"6 available")
		x.is(x.another, "10", "6")
	}},
	{"a capture cannot be reversed, midaz 1265", func(x *trap) {
		h := x.place("60", "1h", "h")
		tx := x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture", key("c")).json(x.T)["transaction_id"].(string)
		x.v.mustPost(x.T, 200, "/v1/transactions/"+tx+"/reverse", key("r"))
		x.is(x.id, "100", "100")
		x.ends(h, "captured")
	}},

	// Reference and metadata. More: TestReferenceAndMetadata.
	{"metadata changes afterwards, formance 1229 and 1230", func(x *trap) {
		body := `{"amount":"1","reference":"r-%d","metadata":{"a":"%s"},"idempotency_key":"m"}`
		x.w.mustPost(x.T, 200, x.on("deposit"), fmt.Sprintf(body, x.id, "b"))
		refuses(x.T, x.v.post(x.on("deposit"), fmt.Sprintf(body, x.id, "c")), 422, "idempotency_key_reused",
			"")
		db := connect(x.T, x.w.env["DATABASE_URL"])
		_, err := db.Exec(context.Background(), `UPDATE entry SET note = NULL WHERE wallet_id = $1`, x.id)
		if err == nil {
			x.Error("an entry was changed")
		}
	}},
	{"metadata is empty in the past, formance 1416 and 1709", func(x *trap) {
		body := `{"amount":"1","metadata":{"a":"b"},"idempotency_key":"m"}`
		at := x.w.mustPost(x.T, 200, x.on("deposit"), body).json(x.T)["created_at"].(string)
		next := x.w.mustPost(x.T, 200, x.on("deposit"), `{"amount":"1","idempotency_key":"m2"}`).json(x.T)
		span := fmt.Sprintf("?since=%s&until=%s", at, next["created_at"])
		for _, path := range []string{"statement" + span, "history" + span} {
			if past := x.v.get(x.on(path)); !strings.Contains(past.body, `"metadata":{"a":"b"}`) {
				x.Error(past)
			}
		}
	}},
	{"a filter finds the wrong ones, midaz 674 and 1002, formance 1408", func(x *trap) {
		for i, reference := range []string{"inv 1", "inv 10", "INV 1", "inv 1 "} {
			x.w.mustPost(x.T, 200, x.on("deposit"),
				fmt.Sprintf(`{"amount":"%d","reference":"%d %s","idempotency_key":"m%d"}`, i+1, x.id,
					reference, i))
		}
		found := x.v.get(fmt.Sprintf("/v1/transactions?reference=%d+inv+1", x.id))
		if strings.Count(found.body, "transaction_id") != 1 || !strings.Contains(found.body, `"amount":"1"`) {
			x.Error(found)
		}
	}},

	// Reads. More: TestHistory, TestBalanceAsItWas, TestStatement.
	{"a filter that is wrong is a 500, blnk 257", func(x *trap) {
		for _, path := range []string{"history?since=x", "history?limit=-1", "history?cursor=%00",
			"statement?until=1",
			"balance?at=x", "balance?seq=x", "holds?status=x", "holds?cursor=%FF",
			"transactions?idempotency_key="} {
			if a := x.v.get(x.on(path)); a.status != 400 {
				x.Errorf("%s: %s", path, a)
			}
		}
	}},
	{"a hold and its capture are two payments, blnk 218", func(x *trap) {
		h := x.place("60", "1h", "h")
		x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture", key("c"))
		var entries []struct{ Amount decimal.Decimal }
		if err := json.Unmarshal([]byte(x.v.get(x.on("history")).body), &entries); err != nil {
			x.Fatal(err)
		}
		var sum decimal.Decimal
		payments := 0
		for _, e := range entries {
			if sum = sum.Add(e.Amount); e.Amount.IsNegative() {
				payments++
			}
		}
		if payments != 1 || sum.String() != "40" {
			x.Errorf("%d payments, %s in all", payments, sum)
		}
	}},
	{"the time is ignored, formance 1062", func(x *trap) {
		a := x.w.mustPost(x.T, 200, x.on("deposit"), `{"amount":"1","idempotency_key":"m"}`)
		at := a.json(x.T)["created_at"].(string)
		if since := x.v.get(x.on("history?since=" + at)); strings.Count(since.body, `"seq"`) != 1 {
			x.Error(since)
		}
		if until := x.v.get(x.on("history?until=" + at)); strings.Contains(until.body,
			`"idempotency_key":"m"`) {
			x.Error(until)
		}
	}},
	{"a sparse filter crawls, formance 1685", func(x *trap) { // so there is none
		for _, path := range []string{"/v1/wallets?currency=USD", "/v1/wallets?metadata=x",
			x.on("history?kind=hold")} {
			if a := x.v.get(path); a.status != 400 || !strings.Contains(a.body, "no parameter") {
				x.Errorf("%s: %s", path, a)
			}
		}
	}},

	// States. More: TestStates.
	{"one of the flags is forgotten, midaz 1449", func(x *trap) {
		tx := x.pay("10", "t")
		h := x.place("20", "1h", "h")
		into := func(wallet int64) string {
			return fmt.Sprintf(`{"amount":"1","to_id":%d,"idempotency_key":"f"}`, wallet)
		}
		posts := map[string]string{
			x.on("deposit"):                       `{"amount":"1","idempotency_key":"f"}`,
			x.on("withdraw"):                      `{"amount":"1","idempotency_key":"f"}`,
			x.on("holds"):                         `{"amount":"1","idempotency_key":"f"}`,
			x.on("transfer"):                      into(x.another),
			"/v1/holds/" + h + "/capture":         key("f"),
			"/v1/transactions/" + tx + "/reverse": key("f"), // pays into it
			fmt.Sprintf("/v1/wallets/%d/transfer", x.another):  into(x.id),
			fmt.Sprintf("/v1/transactions/%d-1/reverse", x.id): key("g"), // pays out of it
		}
		x.w.mustPost(x.T, 200, x.on("state"), `{"state":"frozen","idempotency_key":"s"}`)
		for path, body := range posts {
			refuses(x.T, x.v.post(path, body), 409, "wallet_frozen", "")
		}
	}},
	{"history does not show the flags, midaz", func(x *trap) {
		x.w.mustPost(x.T, 200, x.on("state"), `{"state":"no_out","note":"n","idempotency_key":"s"}`)
		if a := x.v.get(x.on("history")); !strings.Contains(a.body, `"kind":"state"`) ||
			!strings.Contains(a.body, `"state":"no_out","note":"n"`) {
			x.Error(a)
		}
	}},
	{"may a hold be voided in a closed account, tigerbeetle 3278", func(x *trap) {
		h := x.place("100", "1h", "h") // there is none: what is held must be gone first
		refuses(x.T, x.v.post(x.on("state"), `{"state":"closed","idempotency_key":"s"}`), 409,
			"wallet_not_empty", "")
		x.w.mustPost(x.T, 200, x.on("state"), `{"state":"frozen","idempotency_key":"f"}`)
		x.v.mustPost(x.T, 200, "/v1/holds/"+h+"/void", key("v"))
	}},
	{"deleted with money inside, midaz 563", func(x *trap) {
		refuses(x.T, x.v.post(x.on("state"), `{"state":"closed","idempotency_key":"s"}`), 409,
			"wallet_not_empty", "100")
		_, err := connect(x.T, x.w.env["DATABASE_URL"]).Exec(context.Background(),
			`UPDATE wallet SET state = 'closed', state_seq = seq WHERE id = $1`, x.id)
		var no *pgconn.PgError
		if !errors.As(err, &no) || no.ConstraintName != "closed_wallet_is_empty" {
			x.Error(err)
		}
	}},

	// Batches.
	{"atomic by refunding, blnk 183", func(x *trap) { // what is refused leaves nothing, not even an entry
		before := x.v.get(x.on("history")).body
		body := x.batch("b", `{"op":"transfer","wallet_id":%[1]d,"to_id":%[2]d,"amount":"60"}`,
			`{"op":"transfer","wallet_id":%[1]d,"to_id":%[2]d,"amount":"60"}`)
		a := x.w.post("/v1/batches", body)
		if refuses(x.T, a, 422, "insufficient_funds", ""); a.json(x.T)["operation"] != json.Number("1") {
			x.Error(a)
		}
		if after := x.v.get(x.on("history")).body; after != before {
			x.Errorf("%s\nbefore: %s", after, before)
		}
		x.w.mustPost(x.T, 200, x.on("deposit"), `{"amount":"20","idempotency_key":"d2"}`)
		x.w.mustPost(x.T, 200, "/v1/batches", body) // its key is not used up
		x.is(x.id, "0", "0")
		x.is(x.another, "120", "120")
	}},
	{"holds placed together cannot be captured, blnk 195", func(x *trap) {
		a := x.w.mustPost(x.T, 200, "/v1/batches", x.batch("b",
			`{"op":"hold","wallet_id":%[1]d,"amount":"10"}`, `{"op":"hold","wallet_id":%[1]d,"amount":"20"}`,
			`{"op":"capture","hold_id":"%[1]d-2","to_id":%[2]d}`))
		if strings.Count(a.body, `"hold_id"`) != 3 {
			x.Error(a)
		}
		x.v.mustPost(x.T, 200, fmt.Sprintf("/v1/holds/%d-3/capture", x.id), key("c"))
		x.is(x.id, "70", "70")
	}},
	{"what was rolled back is listed as done, formance bulk", func(x *trap) {
		a := x.w.post("/v1/batches", x.batch("b", `{"op":"deposit","wallet_id":%[1]d,"amount":"1"}`,
			`{"op":"withdraw","wallet_id":%[1]d,"amount":"102"}`))
		refuses(x.T, a, 422, "insufficient_funds", "")
		if strings.Contains(a.body, "transaction_id") || strings.Contains(a.body, "results") {
			x.Error(a)
		}
	}},
	{"it stops midway, formance stack 1596", func(x *trap) { // each by itself: what follows a refusal is done
		a := x.w.mustPost(x.T, 200, "/v1/batches", fmt.Sprintf(`{"atomic":false,"operations":[
{"op":"withdraw","wallet_id":%[1]d,"amount":"1","idempotency_key":"b1"},
{"op":"withdraw","wallet_id":%[1]d,"amount":"1000","idempotency_key":"b2"},
{"op":"withdraw","wallet_id":%[1]d,"amount":"2","idempotency_key":"b3"}]}`, x.id))
		if strings.Count(a.body, `"status":200`) != 2 || strings.Count(a.body, "insufficient_funds") != 1 {
			x.Error(a)
		}
		x.is(x.id, "97", "97")
	}},
	{"equal keys in one batch crash it, formance stack 1633", func(x *trap) { // one is a replay of the other
		a := x.w.mustPost(x.T, 200, "/v1/batches", fmt.Sprintf(`{"atomic":false,"operations":[
{"op":"withdraw","wallet_id":%[1]d,"amount":"1","idempotency_key":"b"},
{"op":"withdraw","wallet_id":%[1]d,"amount":"1","idempotency_key":"b"},
{"op":"withdraw","wallet_id":%[1]d,"amount":"2","idempotency_key":"b"}]}`, x.id))
		if strings.Count(a.body, `"status":200`) != 2 ||
			strings.Count(a.body, `"code":"idempotency_key_reused"`) != 1 {
			x.Error(a)
		}
		x.is(x.id, "99", "99")
	}},
	{"a group of many wallets starves, ours", func(x *trap) {
		stop := make(chan struct{})
		var busy sync.WaitGroup
		for c := range 8 { // single movements on two of its wallets all the while
			busy.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					x.w.post(fmt.Sprintf("/v1/wallets/%d/deposit", []int64{x.id, x.another}[c%2]),
						fmt.Sprintf(`{"amount":"1","idempotency_key":"busy %d %d"}`, c, i))
				}
			})
		}
		legs := []string{`{"op":"transfer","wallet_id":%[1]d,"to_id":%[2]d,"amount":"1"}`}
		for i := range 40 {
			legs = append(legs, fmt.Sprintf(`{"op":"deposit","wallet_id":%d%%[1]d,"amount":"1"}`, 100+i))
		}
		began := time.Now()
		x.v.mustPost(x.T, 200, "/v1/batches", x.batch("b", legs...))
		if took := time.Since(began); took > 5*time.Second {
			x.Errorf("it waited for %v", took)
		}
		close(stop)
		busy.Wait()
	}},

	// Our own.
	{"two captures in one batch do not see each other, ours 1", func(x *trap) {
		h := x.place("60", "1h", "h")
		got := x.both("/v1/holds/"+h+"/capture", `{"amount":"7","final":false,"idempotency_key":"c%d"}`, 64)
		if got[200] != 8 || got[422] != 56 { // 8 times 7 are 56, and 4 remain
			x.Errorf("%v", got)
		}
		x.is(x.id, "44", "40")
	}},
	{"an operation knows two wallets, ours 2", func(x *trap) { // a capture has a payer, a hold and a payee
		h := x.place("60", "1h", "h")
		x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture",
			fmt.Sprintf(`{"amount":"10","final":false,"to_id":%d,"idempotency_key":"c1"}`, x.another))
		x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture",
			fmt.Sprintf(`{"to_id":%d,"idempotency_key":"c2"}`, x.another+1_000_000))
		x.is(x.another, "10", "10")
		x.is(x.another+1_000_000, "50", "50")
	}},
	{"an older program serves on the newer schema, ours 3", func(x *trap) { // more: TestFormerRelease
		x.place("60", "1h", "h")
		db := connect(x.T, x.w.env["DATABASE_URL"])
		var least int
		if err := db.QueryRow(context.Background(),
			`SELECT max(program_min) FROM wallet_schema`).Scan(&least); err != nil ||
			least < 3 {
			x.Error(least, err)
		}
		for constraint, balance := range map[string]string{"held_within_balance": "59",
			"entry_fits_wallet": "99"} {
			_, err := db.Exec(context.Background(), fmt.Sprintf(`
UPDATE wallet SET seq = 3, balance = %s, entry_at = 'epoch' WHERE id = %d;
INSERT INTO entry (wallet_id, seq, created_at, kind, amount, balance, idempotency_key)
VALUES (%[2]d, 3, 'epoch', 'withdrawal', %[1]s - 100, %[1]s, 'old')`, balance, x.id))
			var no *pgconn.PgError
			if !errors.As(err, &no) || no.ConstraintName != constraint {
				x.Errorf("%v, want %s", err, constraint)
			}
		}
	}},
	{"a new label is used in its own transaction, ours 4", func(x *trap) { // more: migrate's TestOurFile
		for _, step := range schemaSteps(x.T) {
			if strings.Contains(step.SQL, "ADD VALUE") &&
				regexp.MustCompile(`'hold'|'release'|'state'`).MatchString(
					regexp.MustCompile(`ADD VALUE[^;]*;`).ReplaceAllString(step.SQL, "")) {
				x.Errorf("step %d (%s) uses the label that it adds", step.Version, step.Title)
			}
		}
	}},
	{"a CHECK reads a large table under its lock, ours 5", func(x *trap) { // more: BenchmarkMigration
		alters := regexp.MustCompile(`(?s)ALTER TABLE (wallet|entry)\b[^;]*;`)
		for _, step := range schemaSteps(x.T) {
			for _, alter := range alters.FindAllString(step.SQL, -1) {
				for _, add := range strings.Split(alter, "ADD CONSTRAINT ")[1:] {
					if !strings.Contains(add, "NOT VALID") {
						x.Errorf("step %d (%s): %s", step.Version, step.Title, add)
					}
				}
			}
		}
	}},
	{"a cached balance of another form is read, ours 6", func(x *trap) { // more: TestFormerRelease
		x.w.get(x.on("balance"))
		x.place("60", "1h", "h")
		for _, one := range []*running{x.w, x.v} {
			if a := one.get(x.on("balance")); !strings.Contains(a.body, `"held":"60","available":"40"`) {
				x.Error(a)
			}
		}
	}},
	{"an answer tells of what came later, ours 7", func(x *trap) {
		body := `{"amount":"60","expires_in":"1h","idempotency_key":"h"}`
		first := x.w.mustPost(x.T, 201, x.on("holds"), body)
		h := first.json(x.T)["hold_id"].(string)
		part := x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture",
			`{"amount":"10","final":false,"idempotency_key":"c"}`)
		x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/void", key("v"))
		if again := x.v.post(x.on("holds"), body); again.body != first.body || again.status != 201 {
			x.Error(again)
		}
		if again := x.v.post("/v1/holds/"+h+"/capture",
			`{"amount":"10","final":false,"idempotency_key":"c"}`); again.body != part.body {
			x.Error(again)
		}
	}},
	{"the state is looked at before the key, tigerbeetle 2335 and formance wallets", func(x *trap) {
		h := x.place("60", "1h", "h")
		last := x.w.mustPost(x.T, 200, "/v1/holds/"+h+"/capture", key("c"))
		x.w.mustPost(x.T, 200, x.on("state"), `{"state":"frozen","idempotency_key":"s"}`)
		if again := x.v.post("/v1/holds/"+h+"/capture", key("c")); again.status != 200 ||
			again.body != last.body {
			x.Error(again)
		}
	}},
}

// pay transfers from the first wallet to the other, and returns the transaction's id.
func (x *trap) pay(amount, key string) string {
	x.Helper()
	a := x.w.mustPost(x.T, 200, x.on("transfer"),
		fmt.Sprintf(`{"amount":%q,"to_id":%d,"idempotency_key":%q}`, amount, x.another, key))
	return a.json(x.T)["transaction_id"].(string)
}

// batch is the body of an atomic one; its operations are formats of both wallets.
func (x *trap) batch(key string, operations ...string) string {
	for i, op := range operations {
		operations[i] = fmt.Sprintf(op+"%[3]s", x.id, x.another, "")
	}
	return fmt.Sprintf(`{"idempotency_key":%q,"operations":[%s]}`, key, strings.Join(operations, ","))
}

func schemaSteps(t *testing.T) []migrate.Step {
	t.Helper()
	file, err := os.ReadFile("schema.sql")
	if err != nil {
		t.Fatal(err)
	}
	return migrate.Steps(string(file))
}

func TestPeersTraps(t *testing.T) {
	w, v := two(t)
	t.Cleanup(func() { checkLedger(t, w.env["DATABASE_URL"]) }) // when all of them have ended
	for i, c := range traps {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			x := &trap{T: t, w: w, v: v, id: int64(2*i + 1), another: int64(2*i + 2)}
			w.mustPost(t, 200, x.on("deposit"), `{"amount":"100","idempotency_key":"d"}`)
			c.fall(x)
		})
	}
}
