package book

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/shopspring/decimal"
)

// TestEventsReadBack: of whatever is asked for, each entry's event is read back to that entry.
func TestEventsReadBack(t *testing.T) {
	dice, l, kinds := rand.New(rand.NewPCG(7, 1)), newLedger(), make(map[string]int)
	for n := range 6000 {
		op := l.anyOperation(dice, n)
		switch dice.IntN(4) {
		case 0:
			op.Key = fmt.Sprintf("%d \"\\ \x01é", n)
		case 1:
			op.Note.Reference, op.Note.Metadata = "r \" \\u0041 \u2028", `{"a":"\\\"}","created_at":"x"}`
		}
		l.now = l.now.Add(time.Duration(dice.IntN(2000)) * time.Microsecond)
		p := l.begin([]*Operation{op})
		p.Settle(op, op.Forget())
		l.commit(p)
	}
	for _, entries := range l.entries {
		for i := range entries {
			e := &entries[i]
			payload := AppendEvent(nil, e)
			got, err := ParseEvent(payload)
			if err != nil {
				t.Fatalf("%v: %s", err, payload)
			}
			if !sameEntry(&got, e) {
				t.Fatalf("%s is read as %+v %+v, was %+v %+v", payload, got, got.Says(), e, e.Says())
			}
			if wrong := got.Misfit(); wrong != "" {
				t.Fatalf("%s: %s", payload, wrong)
			}
			kinds[e.Kind]++
		}
	}
	if len(kinds) < 7 {
		t.Errorf("too few kinds are drawn: %v", kinds)
	}
}

func sameEntry(a, b *Entry) bool {
	d, o := a.Says(), b.Says()
	return a.WalletID == b.WalletID && a.Seq == b.Seq && a.CounterpartyID == b.CounterpartyID &&
		a.CounterpartySeq == b.CounterpartySeq && a.Kind == b.Kind && a.Currency == b.Currency &&
		a.Amount.Equal(b.Amount) && a.Balance.Equal(b.Balance) && a.Key == b.Key &&
		a.CreatedAt.Equal(b.CreatedAt) && d.OfSeq == o.OfSeq && d.HeldChange.Equal(o.HeldChange) &&
		d.Held.Equal(o.Held) && d.Remaining.Equal(o.Remaining) && d.NoteText == o.NoteText &&
		d.Note == o.Note
}

// TestWhatIsNoEvent: a text that says the same in another way is not taken.
func TestWhatIsNoEvent(t *testing.T) {
	const event = `{"wallet_id":7,"seq":3,"transaction_id":"7-3","kind":"deposit","currency":"USD",` +
		`"amount":"1.5","balance_before":"2","balance_after":"3.5","idempotency_key":"k",` +
		`"created_at":"2026-01-02T03:04:05.000006Z"}`
	if _, err := ParseEvent([]byte(event)); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{`"1.5"`, `"1.50"`}, {`"1.5"`, `"01.5"`}, {`"1.5"`, `"+1.5"`}, {`"1.5"`,
		`""`},
		{`:7,`, `:07,`}, {`:7,`, `:-7,`}, {`"7-3"`, `"7-4"`}, {`before":"2"`, `before":"3"`}, {`"k"`,
			`"\u006b"`},
		{`"k"`, `"k`}, {`"k"`, `"k\`}, {`"k",`, `"k","x":1,`}, {`"k",`, `"k","reference":"a","all":true,`},
		{`"k",`, `"k", `}, {`.000006Z`, `.000006+00:00`}, {`.000006Z`, `.00006Z`}, {`"}`, `"} `},
		{`"1.5"`, `"1e3"`}, {`"1.5"`, `"1.5.0"`}, {`"currency":"USD",`, ``}} {
		text := strings.Replace(event, c[0], c[1], 1)
		if e, err := ParseEvent([]byte(text)); !errors.Is(err, ErrNotEvent) || text == event {
			t.Errorf("%s: %v, %+v", text, err, e)
		}
	}
}

func FuzzParseEvent(f *testing.F) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	one, held := decimal.New(15, -1), &Details{HeldChange: decimal.New(15, -1), Held: decimal.New(15, -1),
		Remaining: decimal.New(15, -1), Note: Note{ExpiresAt: at, Reference: "a\"b", Metadata: `{"a":"b"}`}}
	held.NoteText = held.Note.json()
	for _, e := range []Entry{
		{WalletID: 1, Seq: 1, Kind: KindDeposit, Currency: "USD", Amount: one, Balance: one, Key: "k"},
		{WalletID: 1, Seq: 2, Kind: KindHold, Currency: "USD", Balance: one, Key: "k\\", More: held},
		{WalletID: 1, Seq: 3, Kind: KindTransferOut, Currency: "ETH", Amount: one.Neg(), Key: "«expiry 3»",
			CounterpartyID: 1<<63 - 1, CounterpartySeq: 9,
			More: &Details{OfSeq: 2, HeldChange: one.Neg(), Note: Note{All: true}, NoteText: `{"all":true}`}},
		{WalletID: 2, Seq: 4, Kind: KindState, Currency: "USD", Balance: decimal.New(1, 19), Key: "s",
			More: &Details{Note: Note{State: "open", Text: "\x1f"},
				NoteText: `{"state":"open","note":"\u001f"}`}},
	} {
		e.CreatedAt = at
		f.Add(AppendEvent(nil, &e))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := ParseEvent(payload)
		if err != nil {
			return
		}
		if again := AppendEvent(nil, &e); string(again) != string(payload) {
			t.Fatalf("%q is read as the entry of %q", payload, again)
		}
		_ = e.Misfit()
	})
}

func BenchmarkParseEvent(b *testing.B) {
	const event = `{"wallet_id":70123,"seq":3,"transaction_id":"70123-3","kind":"transfer_out",` +
		`"currency":"USD","amount":"-1.5","balance_before":"5","balance_after":"3.5",` +
		`"counterparty":{"wallet_id":2,"seq":17},` +
		`"idempotency_key":"c12-000123","created_at":"2026-01-02T03:04:05.000006Z"}`
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseEvent([]byte(event)); err != nil {
			b.Fatal(err)
		}
	}
}

// TestMisfits: what no constraint of the schema would let in is told before it is tried.
func TestMisfits(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	n := func(s string) decimal.Decimal { return decimal.RequireFromString(s) }
	deposit := Entry{WalletID: 7, Seq: 3, Kind: KindDeposit, Currency: "USD", Amount: n("1"), Balance: n("2"),
		Key: "k", CreatedAt: at}
	hold := deposit
	hold.Kind, hold.Amount = KindHold, decimal.Decimal{}
	hold.More = &Details{HeldChange: n("1"), Held: n("1"), Remaining: n("1"), Note: Note{ExpiresAt: at}}
	state := deposit
	state.Kind, state.Amount, state.More = KindState, decimal.Decimal{},
		&Details{Note: Note{State: StateOpen}}
	capture := deposit
	capture.Kind, capture.Amount = KindWithdrawal, n("-1")
	capture.More = &Details{OfSeq: 2, HeldChange: n("-1")}
	for _, e := range []Entry{deposit, hold, state, capture} {
		if wrong := e.Misfit(); wrong != "" {
			t.Fatalf("%+v: %s", e, wrong)
		}
	}
	for i, c := range []struct {
		e     Entry
		alter func(e *Entry, d *Details)
	}{
		{deposit, func(e *Entry, _ *Details) { e.Kind = "gift" }},
		{deposit, func(e *Entry, _ *Details) { e.Amount = n("-1") }},
		{deposit, func(e *Entry, _ *Details) { e.Amount = n("0.0000000000000000001") }},
		{deposit, func(e *Entry, _ *Details) { e.Balance = n("0.5") }},
		{deposit, func(e *Entry, _ *Details) { e.Balance = n("100000000000000000000") }},
		{deposit, func(e *Entry, _ *Details) { e.Seq = 0 }},
		{deposit, func(e *Entry, _ *Details) { e.Key = "" }},
		{deposit, func(e *Entry, _ *Details) { e.Key = "a\x00" }},
		{deposit, func(e *Entry, _ *Details) { e.Key = "a\xff" }},
		{deposit, func(e *Entry, _ *Details) { e.CounterpartyID, e.CounterpartySeq = 9, 1 }},
		{deposit, func(e *Entry, d *Details) { e.More = d; d.OfSeq = 3 }},
		{deposit, func(e *Entry, d *Details) { e.More = d; d.NoteText = strings.Repeat("x", 9000) }},
		{deposit, func(e *Entry, d *Details) { e.More = d; d.OfSeq, d.HeldChange = 2, n("-1") }},
		{hold, func(e *Entry, d *Details) { d.HeldChange = n("-1") }},
		{hold, func(e *Entry, d *Details) { d.Remaining = n("0.5") }},
		{hold, func(e *Entry, d *Details) { d.Note.ExpiresAt = time.Time{} }},
		{hold, func(e *Entry, _ *Details) { e.Amount = n("1") }},
		{hold, func(e *Entry, _ *Details) { e.Kind = KindRelease }},
		{state, func(e *Entry, d *Details) { d.Note.State = "odd" }},
		{state, func(e *Entry, d *Details) { d.Note.State = StateClosed }},
		{capture, func(e *Entry, d *Details) { d.HeldChange = n("-0.5") }},
		{capture, func(e *Entry, d *Details) { d.OfSeq = 0 }},
		{capture, func(e *Entry, d *Details) { d.Remaining = n("-1") }},
	} {
		d := *c.e.Says()
		if c.e.More != nil {
			c.e.More = &d
		}
		c.alter(&c.e, &d)
		if c.e.Misfit() == "" {
			t.Errorf("%d: %+v %+v fits", i, c.e, c.e.Says())
		}
	}
}
