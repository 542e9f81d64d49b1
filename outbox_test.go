// The event's shape, the outbox's rows and partitions.

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
)

func TestEventShape(t *testing.T) {
	e := &entry{
		WalletID: 1, Seq: 2, CounterpartyID: 7, CounterpartySeq: 1, Kind: kindTransferOut, Currency: "USD",
		Amount: dec("-10.50"), Balance: dec("9.5"),
		Key: `k"\<1>`, CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 123456000, time.UTC),
	}
	want := `{"wallet_id":1,"seq":2,"transaction_id":"1-2","kind":"transfer_out","currency":"USD",` +
		`"amount":"-10.5","balance_before":"20","balance_after":"9.5",` +
		`"counterparty":{"wallet_id":7,"seq":1},"idempotency_key":"k\"\\<1>",` +
		`"created_at":"2026-01-02T03:04:05.123456Z"}`
	got := appendEvent(nil, e)
	if string(got) != want {
		t.Errorf("\n%s, want\n%s", got, want)
	}
	if !json.Valid(got) {
		t.Error("not JSON")
	}
	if at, err := eventTime(got); err != nil || string(at) != "2026-01-02T03:04:05.123456Z" {
		t.Errorf("time %s, %v", at, err)
	}
	if balance := eventText(got, "balance_after"); balance != "9.5" {
		t.Errorf("balance %s", balance)
	}
	e.Kind, e.Amount, e.Balance = kindTransferIn, dec("10.50"), dec("20")
	if got := appendEvent(nil, e); string(got[:45]) != `{"wallet_id":1,"seq":2,"transaction_id":"7-1"` {
		t.Errorf("a transfer_in names its payer's transaction: %s", got)
	}
	if _, err := eventTime([]byte(`{"x":1}`)); err == nil {
		t.Error("no error for a payload of another shape")
	}

	var record eventRecord
	err := record.set(&event{walletID: 1, seq: 2, payload: []byte(want),
		traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", commitLSN: 0x16B374D848})
	if err != nil {
		t.Fatal(err)
	}
	at := "2026-01-02T03:04:05.123456Z"
	if string(record.Key) != "1" || string(record.Value) != want || record.At.Format(timeFormat) != at {
		t.Errorf("record %s at %v: %s", record.Key, record.At, record.Value)
	}
	if lsn := appendLSN(nil, math.MaxUint64); string(lsn) != pglogrepl.LSN(math.MaxUint64).String() {
		t.Errorf("LSN %s", lsn)
	}
	wantHeaders := map[string]string{
		"ce_specversion": "1.0", "ce_id": "1-2", "ce_source": "/v1/wallets", "ce_type": "wallet.entry.v1",
		"ce_time": "2026-01-02T03:04:05.123456Z", "ce_subject": "1",
		"ce_commitlsn": "16/B374D848", "content-type": "application/json",
		"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
	if len(record.Headers) != len(wantHeaders) {
		t.Errorf("headers %v", record.Headers)
	}
	for _, h := range record.Headers {
		if wantHeaders[string(h.Key)] != string(h.Value) {
			t.Errorf("header %s is %q, want %q", h.Key, h.Value, wantHeaders[string(h.Key)])
		}
	}
}

// TestEventEqualsEntry: the outbox row written with an entry is what the entry alone would give again.
func TestEventEqualsEntry(t *testing.T) {
	w := start(t, testEnv(t))
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"20.00","idempotency_key":"a"}`, "Traceparent",
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	w.mustPost(t, 200, "/v1/wallets/1/transfer", `{"amount":"10.50","to_id":7,"idempotency_key":"b"}`)
	w.mustPost(t, 200, "/v1/wallets/7/withdraw", `{"amount":"0.50","idempotency_key":"c"}`)
	conn := connect(t, w.env["DATABASE_URL"])
	for _, wallet := range []int64{1, 7} {
		entries, err := w.ledger.history(context.Background(), wallet, &page{from: 1, to: 100, limit: 100})
		if err != nil || len(entries) != 2 {
			t.Fatalf("%d entries, %v", len(entries), err)
		}
		for i := range entries {
			var payload, kind, eventOf string
			var trace *string
			err := conn.QueryRow(context.Background(),
				`SELECT payload, event_type, aggregate_type, traceparent FROM outbox
					WHERE aggregate_id = $1 AND seq = $2`,
				wallet, entries[i].Seq).Scan(&payload, &kind, &eventOf, &trace)
			if err != nil || kind != eventType || eventOf != "wallet" ||
				(trace != nil) != (entryID(wallet, entries[i].Seq) == "1-1") {
				t.Errorf("%s %s %v %v", kind, eventOf, trace, err)
			}
			if again := string(appendEvent(nil, entries[i])); again != payload {
				t.Errorf("\n%s from the entry,\n%s in the outbox", again, payload)
			}
		}
	}
}

// TestOutboxPartitions: they exist days ahead. Past ones go when they are old enough and wholly published.
func TestOutboxPartitions(t *testing.T) {
	w := start(t, testEnv(t))
	ctx := context.Background()
	parts, err := listOutboxPartitions(ctx, w.reads)
	if err != nil || len(parts) < 48 || parts[0].StartsAt.After(time.Now()) ||
		time.Until(parts[len(parts)-1].EndsAt) < outboxAhead {
		t.Fatalf("%d partitions, first %+v, %v", len(parts), parts[0], err)
	}
	// Two hours of the day before yesterday.
	conn := connect(t, w.env["DATABASE_URL"])
	day := time.Now().UTC().Add(-48 * time.Hour).Truncate(time.Hour)
	for i := range 2 {
		from := day.Add(time.Duration(i) * time.Hour)
		name := "outbox_" + from.Format("2006010215")
		for _, statement := range []string{
			`CREATE TABLE ` + name + ` (LIKE outbox INCLUDING DEFAULTS)`,
			fmt.Sprintf(`ALTER TABLE outbox ATTACH PARTITION %s FOR VALUES FROM ('%s') TO ('%s')`, name,
				from.Format(time.RFC3339), from.Add(time.Hour).Format(time.RFC3339)),
			fmt.Sprintf(`INSERT INTO outbox (created_at, aggregate_id, seq, event_type, payload)
				VALUES ('%s', 1, 1, 'x', 'x')`, from.Add(time.Minute).Format(time.RFC3339)),
		} {
			if _, err := conn.Exec(ctx, statement); err != nil {
				t.Fatal(err)
			}
		}
	}
	count := func() int {
		t.Helper()
		now, err := listOutboxPartitions(ctx, w.reads)
		if err != nil {
			t.Fatal(err)
		}
		return len(now) - len(parts)
	}
	closed := make(map[string]pglogrepl.LSN)
	if err := dropOutboxPartitions(ctx, w.reads, 24*time.Hour, closed, 1); err != nil || count() != 2 ||
		len(closed) != 2 {
		t.Fatalf("unpublished: %d left, %d closed, %v", count(), len(closed), err)
	}
	if err := dropOutboxPartitions(ctx, w.reads, 72*time.Hour, closed, ^pglogrepl.LSN(0)); err != nil ||
		count() != 2 {
		t.Fatalf("published but young: %d left, %v", count(), err)
	}
	// An open transaction with a row in the hour keeps it: its commit will be later than any position now.
	tx, _ := conn.Begin(ctx)
	tx.Exec(ctx, fmt.Sprintf(`INSERT INTO outbox (created_at, aggregate_id, seq, event_type, payload)
		VALUES ('%s', 1, 2, 'x', 'x')`, day.Add(time.Minute).Format(time.RFC3339)))
	if err := dropOutboxPartitions(ctx, w.reads, 24*time.Hour, make(map[string]pglogrepl.LSN),
		^pglogrepl.LSN(0)); err == nil || count() != 2 {
		t.Fatalf("with an open transaction: %d left, %v", count(), err)
	}
	tx.Rollback(ctx)
	if err := dropOutboxPartitions(ctx, w.reads, 24*time.Hour, closed,
		closed["outbox_"+day.Add(time.Hour).Format("2006010215")]); err != nil || count() != 0 ||
		len(closed) != 0 {
		t.Fatalf("published: %d left, %d closed, %v", count(), len(closed), err)
	}
	if _, err := w.reads.Exec(ctx, `SELECT outbox_drop_partition($1)`, parts[0].Name); err == nil {
		t.Error("the present hour could be dropped")
	}
}

// TestMissingPartitionIsMade: an outbox without its hour stops no write for longer than it takes to make it.
func TestMissingPartitionIsMade(t *testing.T) {
	w := start(t, testEnv(t))
	parts, err := listOutboxPartitions(context.Background(), w.reads)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, w.env["DATABASE_URL"]).Exec(context.Background(),
		`DROP TABLE `+parts[0].Name+`, `+parts[1].Name); err != nil {
		t.Fatal(err)
	}
	w.mustPost(t, 200, "/v1/wallets/1/deposit", `{"amount":"1","idempotency_key":"a"}`)
	if w.ledger.reruns.Load() == 0 {
		t.Error("the write did not miss its partition")
	}
}

func outboxRow(values ...string) []byte {
	row := binary.BigEndian.AppendUint16(nil, uint16(len(values)))
	for _, v := range values {
		if v == "" {
			row = append(row, 'n')
			continue
		}
		row = binary.BigEndian.AppendUint32(append(row, 't'), uint32(len(v)))
		row = append(row, v...)
	}
	return row
}

func TestOutboxRow(t *testing.T) {
	c := outboxColumns{walletID: 1, seq: 2, payload: 5, traceparent: 6}
	row := outboxRow("2026-01-01 00:00:00+00", "7", "3", "wallet", "wallet.entry.v1", "{}", "")
	e, err := c.decode(row)
	if err != nil || e.walletID != 7 || e.seq != 3 || string(e.payload) != "{}" || e.traceparent != "" {
		t.Errorf("%+v, %v", e, err)
	}
	clear(row)
	if string(e.payload) != "{}" {
		t.Error("the event is in the connection's buffer")
	}
	for _, row := range [][]byte{
		outboxRow("", "7", "3", "", "", ""),
		outboxRow("", "x", "3", "", "", "{}"),
		outboxRow(),
		row[:1],
		outboxRow("", "7", "3", "", "", "{}")[:20],
	} {
		if e, err := c.decode(row); err == nil {
			t.Errorf("%q was read as %+v", row, e)
		}
	}
}

func FuzzOutboxRow(f *testing.F) {
	f.Add(outboxRow("2026-01-01 00:00:00+00", "7", "3", "wallet", "wallet.entry.v1", "{}", "t"))
	f.Fuzz(func(t *testing.T, row []byte) {
		c := outboxColumns{walletID: 1, seq: 2, payload: 5, traceparent: 6}
		c.decode(row)
	})
}
