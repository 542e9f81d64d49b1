// What others see of a slot and its consumer: numbers for metrics.

package wal

import (
	"context"
	"sync/atomic"

	"github.com/jackc/pglogrepl"

	"wallet/internal/metric"
)

// Progress is how far a consumer is, as it last showed it: received, published, confirmed. The three belong
// to one moment. Safe for concurrent use; empty until Show, and after Forget.
type Progress struct {
	shown atomic.Pointer[[3]pglogrepl.LSN]
}

// Show is called by the consumer. It shows nothing before it has confirmed where it goes on from.
func (p *Progress) Show(received, published, confirmed pglogrepl.LSN) {
	if confirmed == 0 {
		return
	}
	p.shown.Store(&[3]pglogrepl.LSN{received, published, confirmed})
}

// Forget says that there is no consumer here any more.
func (p *Progress) Forget() { p.shown.Store(nil) }

// queryRetained: the slot's costs, and where the WAL ends. A slot that is missing keeps nothing.
const queryRetained = `
SELECT coalesce(s.wal_status, 'missing'), coalesce(s.active, false)::int::float8,
       coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn), 0)::float8,
       coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn), 0)::float8,
       coalesce(pg_wal_lsn_diff(s.confirmed_flush_lsn, '0/0'), 0)::float8,
       pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8
FROM (SELECT) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = $1`

// WriteMetrics writes, under names that begin with prefix, how far a slot and its consumer here are, and what
// the slot costs its server. What the server does not tell is left out.
func WriteMetrics(
	ctx context.Context, w *metric.Writer, prefix string, db Querier, slot string, p *Progress,
) {
	var status string
	var active, retained, unconfirmed, confirmed, end float64
	err := db.QueryRow(ctx, queryRetained, slot).Scan(
		&status, &active, &retained, &unconfirmed, &confirmed, &end)
	var positions []metric.Sample
	at := func(of string, lsn float64) {
		positions = append(positions, metric.Sample{Labels: `of="` + of + `"`, Value: lsn})
	}
	// The consumer's own are read last: so the end of the WAL is the only one that may seem to be passed.
	if shown := p.shown.Load(); shown != nil {
		at("received", float64(shown[0]))
		at("published", float64(shown[1]))
		at("confirmed", float64(shown[2]))
		end = max(end, float64(shown[0]))
	} else if err == nil {
		at("confirmed", confirmed)
	}
	if err == nil {
		at("end", end)
	}
	w.Gauges(prefix+"_position_bytes", "Positions in the WAL, in bytes since its begin: X/X is the upper "+
		"and the lower 32 bits. The leader has all, others those that Postgres tells.", positions...)
	if err != nil {
		return
	}
	w.Gauges(prefix+"_slot", "1 for the slot's wal_status: reserved, extended, unreserved, lost; or missing.",
		metric.Sample{Labels: `status="` + status + `"`, Value: 1})
	w.Gauge(prefix+"_slot_active", "1 while some replica holds the slot.", active)
	w.Gauge(prefix+"_slot_retained_bytes", "WAL that Postgres keeps for the slot.", retained)
	w.Gauge(prefix+"_lag_bytes", "WAL between the last confirmed position and the end.", unconfirmed)
}
