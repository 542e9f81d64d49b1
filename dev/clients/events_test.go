// Events, as Kafka has them, against docs/event.schema.json. Its own movements make one of every kind, with
// every member; what the clients made comes with it.

package clients

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/twmb/franz-go/pkg/kgo"
)

const eventSchema = "../../docs/event.schema.json"

const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

func (l *lab) events(t *testing.T) {
	l.stack.wait(t)
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	schema, err := compiler.Compile(eventSchema)
	if err != nil {
		t.Fatal(err)
	}
	missing := make(map[string]bool) // kinds and members that no event had yet
	for name := range schema.Properties {
		missing["member "+name] = true
	}
	kinds := schema.Properties["kind"].Enum.Values
	for _, kind := range kinds {
		missing["kind "+kind.(string)] = true
	}

	wanted := l.everyKind(t) // by wallet, the seqs that no event had yet
	example := make(map[string]map[string]any)
	traced := false
	count := 0
	l.consume(t, func(record *kgo.Record) (done bool) {
		count++
		event, err := jsonschema.UnmarshalJSON(bytes.NewReader(record.Value))
		if err == nil {
			err = schema.Validate(event)
		}
		if err != nil {
			t.Errorf("%s: %v", record.Value, err)
			return t.Failed()
		}
		members := event.(map[string]any)
		for name := range members {
			delete(missing, "member "+name)
		}
		kind := members["kind"].(string)
		delete(missing, "kind "+kind)
		example[kind] = members
		wallet, seq := fmt.Sprint(members["wallet_id"]), fmt.Sprint(members["seq"])
		delete(wanted, wallet+"-"+seq)
		traced = checkHeaders(t, record, wallet, wallet+"-"+seq) == traceparent || traced
		return len(wanted) == 0
	})
	t.Logf("%d events", count)
	if len(wanted) > 0 || len(missing) > 0 || !traced {
		t.Errorf("not seen: the events %v, %v, or a traceparent (%v)", wanted, missing, traced)
	}
	refuses(t, schema, example)
}

// checkHeaders demands those that docs/consumers.md lists, and returns the one that an event may lack.
func checkHeaders(t *testing.T, record *kgo.Record, wallet, id string) (trace string) {
	headers := make(map[string]string)
	for _, h := range record.Headers {
		headers[h.Key] = string(h.Value)
	}
	trace = headers["traceparent"]
	at, lsn := headers["ce_time"], headers["ce_commitlsn"]
	delete(headers, "traceparent")
	want := map[string]string{"ce_specversion": "1.0", "ce_id": id, "ce_source": "/v1/wallets",
		"ce_type": "wallet.entry.v1", "ce_time": at, "ce_subject": wallet, "ce_commitlsn": lsn,
		"content-type": "application/json"}
	if !maps.Equal(headers, want) || string(record.Key) != wallet || at == "" || lsn == "" {
		t.Errorf("key %s, headers %v of %s", record.Key, headers, record.Value)
	}
	return trace
}

// refuses demands that the schema says no to events that are not quite as they were.
func refuses(t *testing.T, schema *jsonschema.Schema, example map[string]map[string]any) {
	for _, c := range []struct {
		kind, member string
		value        any // nil: none
	}{
		{"deposit", "amount", json.Number("1")}, {"deposit", "amount", "-1"}, {"withdrawal", "amount", "1"},
		{"deposit", "shape", "round"}, {"deposit", "kind", "gift"}, {"deposit", "seq", json.Number("0")},
		{"deposit", "created_at", "yesterday"}, {"deposit", "reason", "void"}, {"deposit", "state", "open"},
		{"transfer_out", "counterparty", nil}, {"transfer_in", "counterparty", nil},
		{"hold", "expires_at", nil}, {"hold", "held_after", nil}, {"hold", "amount", "1"},
		{"release", "reason", nil}, {"release", "of_seq", nil}, {"state", "state", nil},
	} {
		event := maps.Clone(example[c.kind])
		if c.value == nil {
			delete(event, c.member)
		} else {
			event[c.member] = c.value
		}
		if schema.Validate(any(event)) == nil {
			t.Errorf("the schema lets a %s through whose %s is %v", c.kind, c.member, c.value)
		}
	}
}

// consume hands on records, committed ones alone, until it is told that these were all.
func (l *lab) consume(t *testing.T, hand func(*kgo.Record) (done bool)) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(l.brokers, ",")...), kgo.ConsumeTopics(l.topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchIsolationLevel(kgo.ReadCommitted()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for done := false; !done; {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			t.Errorf("reading %s: %v", l.topic, err)
			return
		}
		fetches.EachRecord(func(r *kgo.Record) { done = hand(r) || done })
	}
}

// everyKind makes entries of all kinds, with all that they may say, and returns their events' ids.
func (l *lab) everyKind(t *testing.T) (ids map[string]bool) {
	keys := 0
	post := func(path, body string) map[string]any {
		keys++
		return l.call(t, "POST", path, body, "Idempotency-Key", fmt.Sprint("event-", keys))
	}
	create := func() string { return fmt.Sprint(post("/v1/wallets", `{"currency":"USD"}`)["wallet_id"]) }
	payer, payee := create(), create()
	move := func(wallet, how, body string) map[string]any {
		return post("/v1/wallets/"+wallet+"/"+how, body)
	}
	transaction := func(receipt map[string]any) string { return fmt.Sprint(receipt["transaction_id"]) }
	hold := func(body string) string { return fmt.Sprint(move(payer, "holds", body)["hold_id"]) }

	came := move(payer, "deposit", `{"amount":"100","reference":"invoice 7 é","metadata":{"cart":"c-19"}}`)
	went := move(payer, "withdraw", `{"amount":"1.5"}`)
	paid := move(payer, "transfer", `{"amount":"10","to_id":`+payee+`}`)

	first := hold(`{"amount":"5"}`)
	post("/v1/holds/"+first+"/capture", `{"amount":"2","final":false}`)
	post("/v1/holds/"+first+"/capture", `{"to_id":`+payee+`,"reference":"the rest"}`)
	post("/v1/holds/"+hold(`{"amount":"5","to_id":`+payee+`}`)+"/capture", `{"amount":"1"}`)
	post("/v1/holds/"+hold(`{"amount":"5","metadata":{"a":"b"}}`)+"/void", `{}`)
	expires := hold(`{"amount":"5","expires_in":"1s"}`)

	for _, is := range []map[string]any{came, went, paid} {
		post("/v1/transactions/"+transaction(is)+"/reverse", `{"amount":"1"}`)
		post("/v1/transactions/"+transaction(is)+"/reverse", `{"amount":"0.25"}`)
	}
	post("/v1/transactions/"+transaction(went)+"/reverse", `{}`)
	post("/v1/batches", `{"operations":[{"op":"deposit","wallet_id":`+payer+`,"amount":"1"},`+
		`{"op":"transfer","wallet_id":`+payer+`,"to_id":`+payee+`,"amount":"2"}]}`)
	move(payer, "state", `{"state":"frozen","note":"court order 12"}`)
	move(payer, "state", `{"state":"open"}`)
	move(payee, "withdraw", `{"amount":"all"}`)
	move(payee, "state", `{"state":"closed"}`)

	for range 100 { // until the service has swept it
		if l.call(t, "GET", "/v1/holds/"+expires, "")["status"] == "expired" {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	ids = make(map[string]bool)
	for _, wallet := range []string{payer, payee} {
		last, _ := strconv.Atoi(fmt.Sprint(l.call(t, "GET", "/v1/wallets/"+wallet, "")["seq"]))
		for seq := range last {
			ids[fmt.Sprintf("%s-%d", wallet, seq+1)] = true
		}
	}
	return ids
}

// call asks the service, which must do it.
func (l *lab) call(t *testing.T, method, path, body string, headers ...string) (answer map[string]any) {
	t.Helper()
	r, err := http.NewRequest(method, l.keyed+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+l.key)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Traceparent", traceparent)
	for pair := range slices.Chunk(headers, 2) {
		r.Header.Set(pair[0], pair[1])
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	decoder.UseNumber()
	if err := decoder.Decode(&answer); err != nil || response.StatusCode >= 300 {
		t.Fatalf("%s %s %s: %s %v %v", method, path, body, response.Status, answer, err)
	}
	return answer
}
