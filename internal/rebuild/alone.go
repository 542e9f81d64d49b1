// Alone with ledger and topic: nobody else writes either while they are compared and made equal.

package rebuild

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/kafka"
	"wallet/internal/parts"
	"wallet/internal/pg"
)

// Guard keeps writers out of a ledger, as long as its connection lives.
type Guard struct {
	mu   sync.Mutex
	conn *pgx.Conn
}

// Every batch adds to the outbox, so a service that is started meanwhile posts nothing: its clients are told
// to try again. Two rebuilds exclude each other as well.
const lockOutbox = `
BEGIN;
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL lock_timeout = '2s';
LOCK TABLE ONLY outbox IN SHARE ROW EXCLUSIVE MODE`

const querySessions = `
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name IN ('wallet read', 'wallet write', 'wallet relay')`

// KeepOut takes the ledger for itself, as the owner of its tables. It fails where a service is at work.
func KeepOut(ctx context.Context, ownerURL string) (*Guard, error) {
	cfg, err := pgx.ParseConfig(ownerURL)
	if err != nil {
		return nil, fmt.Errorf("MIGRATE_URL: %w", err)
	}
	cfg.RuntimeParams["tcp_keepalives_idle"] = "10" // it says nothing for as long as the check takes
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect with MIGRATE_URL: %w", err)
	}
	g := &Guard{conn: conn}
	if err := g.lock(ctx); err != nil {
		g.Release()
		return nil, err
	}
	return g, nil
}

func (g *Guard) lock(ctx context.Context) error {
	const stop = "stop all replicas of the service, and any other rebuild, first"
	var sessions int
	if err := g.conn.QueryRow(ctx, querySessions).Scan(&sessions); err != nil {
		return err
	}
	if sessions > 0 {
		return fmt.Errorf("%d connections of the service are open to this database: %s", sessions, stop)
	}
	_, err := g.conn.Exec(ctx, lockOutbox, pgx.QueryExecModeSimpleProtocol)
	switch pg.State(err) {
	case "":
		return err
	case "55P03": // lock_not_available
		return errors.New("somebody writes to this ledger: " + stop)
	case "42501": // insufficient_privilege
		return fmt.Errorf("set MIGRATE_URL to the tables' owner, who may keep writers out: %w", err)
	}
	return fmt.Errorf("keep writers out: %w", err)
}

// Check fails when the connection was lost, and others may write.
func (g *Guard) Check(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, err := g.conn.Exec(ctx, `SELECT`); err != nil {
		return fmt.Errorf("the lock that keeps writers out is lost, so run this again: %w", err)
	}
	return nil
}

// Release lets writers in again.
func (g *Guard) Release() { g.conn.Close(context.Background()) }

// Pool makes the connections for a rebuild.
func Pool(url string) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = writers + 1
	for name, value := range map[string]string{
		"application_name":  "wallet rebuild",
		"statement_timeout": "0",
		// Everything is looked up by its key. A plan made while a table was empty would stay.
		"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
		"plan_cache_mode": "force_generic_plan", "jit": "off",
	} {
		cfg.ConnConfig.RuntimeParams[name] = value
	}
	return pgxpool.NewWithConfig(context.Background(), cfg)
}

// openPatience is above the time after which brokers abort the transaction of a relay that died.
const openPatience = 30 * time.Second

// ReadTopic is a topic as far as it was committed. Whoever published to it was fenced before. id reads the
// wallet and the number out of a record.
func ReadTopic(ctx context.Context, k *kafka.Client, name string,
	id func(*kafka.Committed) (walletID, seq int64, err error)) (Topic, error) {
	t := Topic{Name: name}
	t.Partition = func(walletID int64) (int32, error) {
		return k.Partition(strconv.AppendInt(nil, walletID, 10))
	}
	for began := time.Now(); ; {
		ends, err := k.Ends()
		if err != nil {
			return t, err
		}
		open := -1
		t.Partitions = t.Partitions[:0]
		for p, end := range ends {
			s, err := k.Bounds(name, int32(p))
			if err != nil {
				return t, err
			}
			if s.To < end {
				open = p
			}
			t.Partitions = append(t.Partitions, Partition{s.From, s.To})
		}
		if open < 0 {
			break
		}
		if time.Since(began) > openPatience {
			return t, fmt.Errorf("partition %d of topic %s ends at offset %d, and can be read up to %d "+
				"only: some producer's transaction is open there. Stop that producer, or abort the "+
				"transaction with "+
				"kafka-transactions.sh", open, name, ends[open], t.Partitions[open].To)
		}
		if err := parts.Sleep(ctx, 200*time.Millisecond); err != nil {
			return t, err
		}
	}
	t.Scan = func(ctx context.Context, p int32, visit func(*Event) error) error {
		s := kafka.Span{Topic: name, Partition: p, From: t.Partitions[p].From, To: t.Partitions[p].To}
		return k.Scan(ctx, s, func(r *kafka.Committed) error {
			e := Event{Payload: r.Value, Offset: r.Offset}
			var err error
			if e.WalletID, e.Seq, err = id(r); err != nil {
				return fmt.Errorf("topic %s holds something else than this service's events (%w): set "+
					"KAFKA_TOPIC to the topic of this ledger's", name, err)
			}
			return visit(&e)
		})
	}
	return t, nil
}

// Unchanged fails if somebody has published since ReadTopic.
func (t *Topic) Unchanged(k *kafka.Client) error {
	ends, err := k.Ends()
	if err != nil {
		return err
	}
	for p, end := range ends {
		if end != t.Partitions[p].To {
			return fmt.Errorf("somebody has published to topic %s meanwhile (partition %d): stop all "+
				"relays that do, and run this again", t.Name, p)
		}
	}
	return nil
}
