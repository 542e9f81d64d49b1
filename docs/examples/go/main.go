// Command consumer keeps the balances of all wallets in an SQLite file, by their events alone.
//
//	go run . 127.0.0.1:9092 wallet.events balances.db
//
// Kill it at any moment and start it again: no event counts twice, and none is left out. With -stop it ends
// once it has read what there is. It ends with status 3 when the chain of a wallet's events is broken.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	_ "modernc.org/sqlite"
)

const whatToDo = `Broken chain: %v.
Nothing of this batch was stored; what was stored before is right. Do not skip the event. Run "wallet -audit",
which compares the topic with the ledger. If it finds nothing, this file was made of another topic: delete it
and start again, and all is read from the beginning. If it finds something, keep the file for who mends it.
`

func main() {
	stop := flag.Bool("stop", false, "end once everything is read")
	flag.Parse()
	if flag.NArg() != 3 {
		log.Fatal("usage: consumer [-stop] BROKERS TOPIC DATABASE")
	}
	err := consume(context.Background(), flag.Arg(0), flag.Arg(1), flag.Arg(2), *stop)
	var chain broken
	if errors.As(err, &chain) {
		fmt.Fprintf(os.Stderr, whatToDo, err)
		os.Exit(3)
	} else if err != nil {
		log.Fatal(err)
	}
}

func consume(ctx context.Context, brokers, topic, file string, stop bool) error {
	db, err := sql.Open("sqlite", "file:"+file+"?_pragma=journal_mode(WAL)&_pragma=busy_timeout(5000)")
	if err != nil {
		return err
	}
	if _, err := db.Exec(schema); err != nil {
		return err
	}
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(brokers, ",")...),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()), // else there are events that were never committed
		kgo.KeepControlRecords(),                     // the ends of Kafka's transactions have offsets too
		kgo.ConsumeResetOffset(kgo.NoResetOffset()))  // an offset that is gone is for a human to see
	if err != nil {
		return err
	}
	ends, err := kadm.NewClient(client).ListCommittedOffsets(ctx, topic)
	if err := errors.Join(err, ends.Error()); err != nil {
		return err
	}
	// There is no consumer group: the database alone says where to go on, as it moves with the balances.
	next, from := make(map[int32]int64), make(map[int32]kgo.Offset)
	for partition := range ends[topic] {
		var offset int64
		if err := db.QueryRow(beginOrGoOn, partition).Scan(&offset); err != nil {
			return err
		}
		next[partition], from[partition] = offset, kgo.NewOffset().At(offset)
	}
	client.AddConsumePartitions(map[string]map[int32]kgo.Offset{topic: from})
	behind := func() (is bool) {
		ends.Each(func(end kadm.ListedOffset) { is = is || next[end.Partition] < end.Offset })
		return is
	}
	for !stop || behind() {
		fetches := client.PollRecords(ctx, 500) // what a transaction of the database takes at most
		if err := fetches.Err(); err != nil {
			return err
		}
		if err := store(db, fetches.Records()); err != nil {
			return err
		}
		fetches.EachRecord(func(r *kgo.Record) { next[r.Partition] = r.Offset + 1 })
	}
	return nil
}

// store applies a batch and moves the position, in one transaction: killed before it is committed, we read
// the batch again; killed afterwards, never more.
func store(db *sql.DB, records []*kgo.Record) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	events := 0
	for _, r := range records {
		event := 0
		if !r.Attrs.IsControl() {
			event = 1
			if err := apply(tx, r.Value); err != nil {
				return fmt.Errorf("%s, in partition %d at offset %d: %w", r.Value, r.Partition, r.Offset, err)
			}
		}
		moved, err := tx.Exec(move, r.Offset, event, r.Partition)
		if err != nil {
			return err
		}
		if rows, _ := moved.RowsAffected(); rows == 0 {
			return errors.New("another process has moved the position: only one may use a file")
		}
		events += event
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	fmt.Println("stored", events)
	return nil
}
