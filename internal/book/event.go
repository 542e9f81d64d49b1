package book

import (
	"bytes"
	"fmt"
	"strconv"

	"wallet/internal/jsontext"
	"wallet/internal/money"
)

// AppendEvent appends the event's JSON: one object, no white space, names in this order. Amounts are
// decimal strings without trailing zeros, amount signed (negative leaves the wallet); times have
// jsontext.TimeFormat. What an entry does not say has no member: a plain deposit, withdrawal or transfer
// has those of version 2 only.
func AppendEvent(dst []byte, e *Entry) []byte {
	dst = append(dst, `{"wallet_id":`...)
	dst = strconv.AppendInt(dst, e.WalletID, 10)
	dst = append(dst, `,"seq":`...)
	dst = strconv.AppendInt(dst, e.Seq, 10)
	dst = append(dst, `,"transaction_id":"`...)
	dst = e.AppendTransactionID(dst)
	dst = append(dst, `","kind":"`...)
	dst = append(dst, e.Kind...)
	dst = append(dst, `","currency":"`...)
	dst = append(dst, e.Currency...)
	dst = append(dst, `","amount":"`...)
	dst = money.Append(dst, e.Amount)
	dst = append(dst, `","balance_before":"`...)
	dst = money.Append(dst, e.Balance.Sub(e.Amount))
	dst = append(dst, `","balance_after":"`...)
	dst = money.Append(dst, e.Balance)
	dst = append(dst, '"')
	if d := e.More; d != nil {
		if !d.Held.IsZero() || !d.HeldChange.IsZero() {
			dst = append(dst, `,"held_before":"`...)
			dst = money.Append(dst, d.Held.Sub(d.HeldChange))
			dst = append(dst, `","held_after":"`...)
			dst = append(money.Append(dst, d.Held), '"')
		}
		if d.OfSeq != 0 {
			dst = append(dst, `,"of_seq":`...)
			dst = strconv.AppendInt(dst, d.OfSeq, 10)
		}
		if d.OfSeq != 0 || e.Kind == KindHold {
			dst = append(dst, `,"remaining":"`...)
			dst = append(money.Append(dst, d.Remaining), '"')
		}
	}
	if e.CounterpartyID != 0 {
		dst = append(dst, `,"counterparty":{"wallet_id":`...)
		dst = strconv.AppendInt(dst, e.CounterpartyID, 10)
		dst = append(dst, `,"seq":`...)
		dst = strconv.AppendInt(dst, e.CounterpartySeq, 10)
		dst = append(dst, '}')
	}
	dst = append(dst, `,"idempotency_key":`...)
	dst = jsontext.AppendText(dst, e.Key)
	if e.More != nil && e.More.NoteText != "" {
		inner := e.More.NoteText[1 : len(e.More.NoteText)-1]
		dst = append(append(dst, ','), inner...)
	}
	dst = append(dst, `,"created_at":"`...)
	dst = e.CreatedAt.UTC().AppendFormat(dst, jsontext.TimeFormat)
	return append(dst, `"}`...)
}

// EventTime is the entry's time out of an event's JSON, as text in jsontext.TimeFormat. It reads what
// AppendEvent wrote: the last member.
func EventTime(payload []byte) ([]byte, error) {
	tail := len(payload) - len(`"}`)
	at := tail - len(jsontext.TimeFormat)
	if at < 0 || !bytes.HasSuffix(payload[:at], []byte(`,"created_at":"`)) {
		return nil, fmt.Errorf("outbox payload does not end in created_at: %.300q", payload)
	}
	return payload[at:tail], nil
}

// EventText is a text member out of an event's JSON, by its name, or empty where it has none. It looks at
// those before the idempotency key, the first free text: no text there can look like a member.
func EventText(payload []byte, name string) string {
	head, _, _ := bytes.Cut(payload, []byte(`,"idempotency_key":`))
	_, rest, _ := bytes.Cut(head, []byte(`,"`+name+`":"`))
	text, _, closed := bytes.Cut(rest, []byte{'"'})
	if !closed {
		return ""
	}
	return string(text)
}
