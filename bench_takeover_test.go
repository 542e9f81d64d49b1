// How long events stand still when a leader goes behind a huge Postgres transaction, and where the time goes.
// That nothing is lost or repeated meanwhile, the loop that kills shows.

package main

import (
	"context"
	"errors"
	"flag"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

var benchHuge = flag.Int("bench.huge", 500_000, "rows of BenchmarkTakeover's transaction")

// BenchmarkTakeover: seconds since the fault until the slot is free, another leads, the next event comes.
func BenchmarkTakeover(b *testing.B) {
	if !*large {
		b.Skip("some minutes: pass -large")
	}
	c := newChaos(b, nil)
	c.load.end()
	conn := connect(b, c.env["DATABASE_URL"])
	c.exec(conn, `SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0`)
	for _, s := range []struct {
		name    string
		commits bool // before the fault
		fault   string
	}{
		{"open-killed-successor-cut-off", false, "kill and cut"},
		{"committed-killed", true, "kill"},
		{"committed-cut-off", true, "cut"},
	} {
		tx, err := conn.Begin(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		c.fromHere++
		insertByHand(b, tx, 1_000_000+c.fromHere, *benchHuge)
		end := func() {
			if err := tx.Commit(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
		if s.commits {
			end()
		}
		r := c.leader(nil)
		var took takeover
		if s.fault == "cut" {
			heal := r.kafka[0].hole()
			took = c.follow(r)
			heal()
		} else {
			r.kill()
			if s.fault == "kill and cut" {
				r.start(b)
				next := c.leader(nil)
				heal := next.kafka[0].hole()
				took = c.follow(next)
				heal()
			} else {
				took = c.follow(r)
				r.start(b)
			}
		}
		for what, is := range map[string]time.Duration{"free": took.free, "leads": took.leads,
			"event": took.event} {
			b.ReportMetric(is.Seconds(), s.name+"-"+what+"-s")
		}
		if !s.commits {
			end()
		}
		c.awaitAll(3 * time.Minute)
	}
	b.ReportMetric(0, "ns/op")
	checkStream(b, c.cfg)
}

// takeover is how long it took since the fault.
type takeover struct{ free, leads, event time.Duration }

// follow waits until another than a replica has taken over from it, and published something.
func (c *chaos) follow(from *replica) (took takeover) {
	c.t.Helper()
	began := time.Now()
	conn := connect(c.t, c.env["DATABASE_URL"])
	var held int
	slot := func() (pid int) {
		err := conn.QueryRow(context.Background(), `SELECT coalesce(active_pid, 0)
			FROM pg_replication_slots WHERE slot_name = $1`, c.cfg.replicationSlot).Scan(&pid)
		if err != nil && !errors.Is(err, pgx.ErrNoRows) {
			c.t.Fatal(err)
		}
		return pid
	}
	held = slot()
	events := lastCheckpointOf(c.t, c.cfg).Events
	c.load.post(c.writer.url, 7) // else there may be none to follow
	for next := (*replica)(nil); took.event == 0; time.Sleep(5 * time.Millisecond) {
		now := time.Since(began).Round(10 * time.Millisecond)
		if now > 5*time.Minute {
			c.t.Fatal("nothing published for 5 minutes")
		}
		if took.free == 0 && slot() != held {
			took.free = now
		}
		for _, r := range c.replicas {
			if next == nil && r != from && r.leads() {
				next, took.leads = r, now
			}
		}
		if next != nil && lastCheckpointOf(c.t, c.cfg).Events > events {
			took.event = time.Since(began).Round(10 * time.Millisecond)
		}
	}
	return took
}

// awaitAll waits until all that is in the ledger is published.
func (c *chaos) awaitAll(within time.Duration) {
	c.t.Helper()
	conn := connect(c.t, c.env["DATABASE_URL"])
	eventually(c.t, within, "all published", func() bool {
		var n int64
		err := conn.QueryRow(context.Background(), `SELECT count(*) FROM entry`).Scan(&n)
		return err == nil && lastCheckpointOf(c.t, c.cfg).Events >= n
	})
}
