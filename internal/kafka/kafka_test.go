package kafka

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/IBM/sarama"
)

// TestSCRAM: the examples of RFC 5802 section 5 and RFC 7677 section 3.
func TestSCRAM(t *testing.T) {
	for _, c := range []struct {
		hash                        func() hash.Hash
		nonce, serverFirst, p, last string
	}{
		{sha1.New, "fyko+d2lbbFgONRv9qkxdawL",
			"r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096",
			"v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=", "v=rmF9pqV8S7suAoZWja4dJRkFsKQ="},
		{sha256.New, "rOprNGfwEbeRWgbNEkqO",
			"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
			"dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=", "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="},
	} {
		s := &scram{hash: c.hash, nonce: c.nonce}
		s.Begin("user", "pencil", "")
		first, err := s.Step("")
		if err != nil || first != "n,,n=user,r="+c.nonce {
			t.Fatalf("%q, %v", first, err)
		}
		nonce, _, _ := strings.Cut(strings.TrimPrefix(c.serverFirst, "r="), ",")
		final, err := s.Step(c.serverFirst)
		if err != nil || final != "c=biws,r="+nonce+",p="+c.p || s.Done() {
			t.Fatalf("%q, %v", final, err)
		}
		if _, err := s.Step(c.last); err != nil || !s.Done() {
			t.Fatal(err)
		}
		impostor := &scram{hash: c.hash, nonce: c.nonce}
		impostor.Begin("user", "pencil", "")
		impostor.Step("")
		impostor.Step(c.serverFirst)
		if _, err := impostor.Step("v=AAAA"); err == nil {
			t.Error("a server that does not know the password was believed")
		}
		foreign := &scram{hash: c.hash, nonce: "another"}
		foreign.Begin("user", "pencil", "")
		foreign.Step("")
		if _, err := foreign.Step(c.serverFirst); err == nil {
			t.Error("a nonce that is not ours was accepted")
		}
	}
}

// TestRecordBatches: a partition's are in order, small enough for a broker, and numbered on, also past the
// highest sequence number.
func TestRecordBatches(t *testing.T) {
	to := topicPartition{"messages", 0}
	sequence := int32(math.MaxInt32 - 1000)
	c := &Client{cfg: Config{Topic: "messages", Checkpoints: "checkpoints"}, partitions: 1,
		partitioner: newPartitioner("messages")}
	p := &Producer{c: c, sequences: map[topicPartition]int32{to: sequence}}
	began := time.Date(2026, 1, 2, 3, 4, 5, 123456000, time.UTC)
	messages := make([]*Message, 5000)
	for i := range messages {
		value := fmt.Appendf(nil, `{"number":%d,"text":"%s"}`, i, strings.Repeat("k", 500))
		messages[i] = &Message{At: began.Add(time.Duration(i*7%1000) * time.Second),
			Record: Record{Key: []byte("7"), Value: value}}
		for range i % 10 {
			header := &Header{Key: []byte("name"), Value: []byte("of something")}
			messages[i].Headers = append(messages[i].Headers, header)
		}
	}
	batches, err := p.pack(messages, []byte("{}"))
	if err != nil || len(batches) != 2 || len(batches[to]) < 3 {
		t.Fatalf("%d batches in %d partitions, %v", len(batches[to]), len(batches), err)
	}
	n := 0
	for _, b := range batches[to] {
		if b.FirstSequence != sequence || int(b.LastOffsetDelta) != len(b.Records)-1 || !b.IsTransactional {
			t.Errorf("a batch of %d records begins at %d and ends at offset %d, want %d",
				len(b.Records), b.FirstSequence, b.LastOffsetDelta, sequence)
		}
		size := 0
		for i, r := range b.Records {
			at := b.FirstTimestamp.Add(r.TimestampDelta)
			if r.OffsetDelta != int64(i) || !bytes.Equal(r.Value, messages[n].Value) ||
				!at.Equal(messages[n].At.Truncate(time.Millisecond)) || at.After(b.MaxTimestamp) {
				t.Fatalf("record %d: offset %d, %v until %v, %s",
					n, r.OffsetDelta, at, b.MaxTimestamp, r.Value)
			}
			size += len(r.Key) + len(r.Value)
			for _, h := range r.Headers {
				size += len(h.Key) + len(h.Value)
			}
			if n++; sequence == math.MaxInt32 {
				sequence = 0
			} else {
				sequence++
			}
		}
		if size > recordBatchBytesMax {
			t.Errorf("a batch of %d bytes", size)
		}
	}
	if n != len(messages) {
		t.Errorf("%d of %d records", n, len(messages))
	}
}

// TestWithinDiscards: an answer that comes too late is closed, not leaked.
func TestWithinDiscards(t *testing.T) {
	late := make(chan int, 1)
	given := make(chan struct{}) // not a sleep: on a busy machine an answer by the clock may be in time
	slow := func() (int, error) { <-given; return 7, nil }
	_, err := Within(context.Background(), 10*time.Millisecond, slow, func(n int) { late <- n })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	close(given)
	if n := <-late; n != 7 {
		t.Error(n)
	}
	fast := func() (int, error) { return 8, nil }
	if n, err := Within(context.Background(), time.Second, fast, nil); n != 8 || err != nil {
		t.Error(n, err)
	}
}

// TestConfigErrorsNameSettings: by the names that the operator knows.
func TestConfigErrorsNameSettings(t *testing.T) {
	names := Settings{TLSCA: "CA", TLSCert: "CERT", TLSKey: "KEY", Retention: "KEEP"}
	absent := t.TempDir() + "/absent"
	none := t.TempDir() + "/none"
	if err := os.WriteFile(none, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	forever := Config{Topic: "messages", Retention: -1, Settings: names}
	for want, ask := range map[string]func() error{
		"set CA to a file that can be read: open " + absent +
			": no such file or directory": func() error {
			_, err := Open(Config{TLS: true, TLSCA: absent, Settings: names})
			return err
		},
		"set CA to a file with PEM certificates: " + none + " holds none": func() error {
			_, err := Open(Config{TLS: true, TLSCA: none, Settings: names})
			return err
		},
		"set CERT and KEY to a certificate and its key: open " + absent +
			": no such file or directory": func() error {
			_, err := Open(Config{TLS: true, TLSCert: absent, TLSKey: absent, Settings: names})
			return err
		},
		"topic messages has retention.ms=1000 but needs -1: alter it with kafka-configs, " +
			"or set KEEP to what it has": func() error {
			return forever.topics()[0].check([]sarama.ConfigEntry{{Name: "retention.ms", Value: "1000"}})
		},
	} {
		var refusal ConfigError
		if err := ask(); !errors.As(err, &refusal) || string(refusal) != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// TestOnlyWhatStaysOpenIsStuck: a transaction that is seen again and again at the same place; not one that
// ended in between, nor a partition that always has some transaction or other.
func TestOnlyWhatStaysOpenIsStuck(t *testing.T) {
	var seen openings
	began := time.Now()
	stays := Unstable{Topic: "messages", Partition: 1, From: 7}
	for second := range 60 {
		looked := []Unstable{{Topic: "messages", From: int64(second), End: 100}} // always another one
		if stays.End = int64(second); second >= 10 {
			looked = append(looked, stays)
		}
		if second%20 < 15 {
			looked = append(looked, Unstable{Topic: "checkpoints", From: 9}) // it ends, and comes again
		}
		old := seen.olderThan(30*time.Second, looked, began.Add(time.Duration(second)*time.Second))
		if want := second >= 40; want != (len(old) == 1) || want && old[0] != stays {
			t.Errorf("after %d s: %+v", second, old)
		}
	}
}
