// The relay: the outbox, out of Postgres' WAL, into Kafka, exactly once for consumers that read committed.
//
// Touches: the replication slot, the two Kafka topics and their transactions, the cache (after publishing).
// It reads the ledger for recovery and audit and never writes it.
// Promises: each wallet's events are in its partition, in order, each once, whatever dies. For that,
// confirmed <= published <= received always holds: what was received was not published yet, what was
// published (with the checkpoint, in one Kafka transaction) may be confirmed to Postgres, and only what was
// confirmed may leave the WAL.
//
// There is one path for start and recovery, lead: hold the slot (whoever holds it leads), make the producer
// (which fences the former leader and settles its transaction), read the checkpoint, drop what it covers,
// publish the rest. Any doubt, above all about a Kafka transaction's outcome, ends in a return to that
// start.
//
// The states, as wallet_relay_state shows them:
//
//	           somebody holds the slot          it is free
//	starting -------------------------> standby ----------+
//	  ^  |                                                |
//	  |  +------------- the slot is free -----------------+
//	  |                                                   v
//	  |        lead: connect, fits, checkTail; where slot or topic is missing something: makeSlot;
//	  |        START_REPLICATION takes the slot, fence, settle
//	  |               | a slot was made            | the slot was there
//	  |               v                            v
//	  |           recovering -- gap filled --> leader
//	  |               |                            |
//	  +--- an error --+----------------------------+      also from standby, and within lead
//	  |
//	  +--- after refusalInterval --- refused <--- a relayRefusal, from anywhere
//
//	every state --- ctx ends; a leader first publishes and confirms what it has ---> stopped
//
// Where a crash may come, what is where then, and what the next start does. T is a transaction that ends
// at E; checkpoint and slot stood at C before:
//
//	crash                                received  checkpoint  confirmed  the next start
//	T received, not yet sent to Kafka       E          C          <= C    gets T again, publishes it
//	T sent, its Kafka transaction open      E          C          <= C    fence aborts; T again, published
//	EndTxn sent, no answer                  E        C or E       <= C    fence settles which; T again
//	published, not yet confirmed            E          E          <= C    T again, dropped: its commit < E
//	confirmed                               E          E            E     Postgres does not send T again
//	slot made at P, gap not filled          -          C            P     C < P is a gap: makeSlot again
//	gap filled in part                      -          C            P     the same, less what the topic has
//	gap filled                              -          P            P     streams from P

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/audit"
	"wallet/internal/book"
	"wallet/internal/kafka"
	"wallet/internal/look"
	"wallet/internal/metric"
	"wallet/internal/moved"
	"wallet/internal/parts"
	"wallet/internal/wal"
)

const (
	publication = "wallet_outbox" // what publications are called, or begin with: schema.sql

	// A Kafka transaction takes what has gathered while the one before was under way, up to these; then the
	// relay stops reading and TCP is the queue. Three such batches may be in memory at once.
	batchEventsMax = 10_000
	batchBytesMax  = 16 << 20

	// A transaction costs the broker milliseconds, whatever it holds. After one, the relay rests for as
	// long as it took, up to this, and the next batch gathers; not so when it works off a backlog.
	restMax = 10 * time.Millisecond

	// walSenderTimeout is how long Postgres keeps the slot for a leader that has gone silent, and so the
	// time of a takeover from one that was cut off. statusInterval must stay well below it.
	walSenderTimeout = 5 * time.Second
	statusInterval   = time.Second
	postgresPatience = 8 * time.Second // without an answer to a status for so long, the connection is dead

	// kafkaPatience is how long a leader may wait for Kafka before it gives the slot up to one that may
	// fare better; it is below the transaction timeout, which is how long a dead leader's open transaction
	// may hold back consumers.
	kafkaPatience = 10 * time.Second
	txnTimeout    = 15 * time.Second

	idleInterval    = 5 * time.Second        // between checkpoints that only follow the rest of the WAL
	standbyInterval = 300 * time.Millisecond // between looks at the slot
	refusalInterval = 15 * time.Second       // between attempts at what only an operator can put right
	drainPatience   = 5 * time.Second        // for the last Kafka transaction at shutdown

	// A new horizon is made so often; a recovery does again what was published since the last.
	horizonInterval = 2 * time.Second
)

// relayRefusal is what only an operator can put right, in one sentence that says how.
type relayRefusal string

func (r relayRefusal) Error() string { return string(r) }

func refusef(format string, args ...any) error { return relayRefusal(fmt.Sprintf(format, args...)) }

// refusalIn finds a refusal in err: one of ours, or one of the brokers and topics.
func refusalIn(err error) (refusal relayRefusal, found bool) {
	var kafkaError kafka.ConfigError
	if errors.As(err, &kafkaError) {
		return relayRefusal(kafkaError), true
	}
	return refusal, errors.As(err, &refusal)
}

var (
	errSlotTaken = errors.New("another relay took the slot")
	errGap       = errors.New("the slot begins after the checkpoint, so it was moved or made anew: " +
		"what lies between must be recovered from the ledger")
	errKafkaSilent    = fmt.Errorf("no answer from Kafka for %v: giving the slot up", kafkaPatience)
	errPostgresSilent = fmt.Errorf("no answer from Postgres for %v", postgresPatience)
	errClockBack      = errors.New("the clock of Postgres has gone back: taking the slot on a new connection")
)

// relay is one replica's: at most one replica's leads at a time, the others stand by.
type relay struct {
	cfg      *relayConfig
	db       *pgxpool.Pool
	cache    *cache // may be nil
	adopting bool   // -adopt: accept another database, recover, and end
	rebuilt  bool   // -rebuild, at its end: nothing need be compared any more

	born time.Time // what is timed counts from here, untouched by steps of the clock

	// gap is the start of a slot that misses events. The next attempt replaces it, if nobody has done so.
	gap atomic.Uint64

	// What writeMetrics and the operators' page show.
	state, refusal                        atomic.Value // string; of the last refusal, until it is over
	progress                              wal.Progress
	stuck                                 kafka.Stuck  // while it leads
	silent                                atomic.Int64 // since when Kafka owes an answer: ns since born, or 0
	recent                                look.Recent  // events
	batches, events, skipped              atomic.Int64
	takeovers, recoveries, restarts       atomic.Int64
	pendingSince, checkpointAt, lastBatch atomic.Int64 // ns since born or 0; Unix ns; ns
}

// age is a time on a clock that never steps.
func (r *relay) age() time.Duration { return time.Since(r.born) }

// relayConfig is what the relay is told, and what runs in its place, -adopt and -audit; see the settings'
// table.
type relayConfig struct {
	databaseURL     string
	replicationURL  string
	replicationSlot string
	outboxRetention time.Duration

	kafkaBrokers         []string
	kafkaTopic           string
	kafkaCheckpointTopic string
	kafkaPartitions      int32
	kafkaReplication     int16
	kafkaRetention       time.Duration
	kafkaTLS             bool
	kafkaTLSCA           string
	kafkaTLSCert         string
	kafkaTLSKey          string
	kafkaSASLMechanism   string
	kafkaSASLUser        string
	kafkaSASLPassword    string
}

func newRelay(cfg *relayConfig, db *pgxpool.Pool, cache *cache) *relay {
	r := &relay{cfg: cfg, db: db, cache: cache, born: time.Now()}
	r.state.Store("starting")
	r.refusal.Store("")
	return r
}

// run leads or stands by until ctx ends; then a leader publishes what it is at, confirms it and frees the
// slot.
func (r *relay) run(ctx context.Context) error {
	for failures := 0; ; failures++ {
		began := time.Now()
		err := r.lead(ctx)
		r.progress.Forget()
		r.state.Store("starting")
		if ctx.Err() != nil {
			r.enter("stopped")
			return nil
		}
		r.restarts.Add(1)
		if time.Since(began) > time.Minute {
			failures = 0
		}
		// At random, so that after a fault on this replica's side another one is first to the slot.
		wait := min(200*time.Millisecond<<min(failures, 5), 5*time.Second)
		wait = time.Duration(float64(wait) * (0.5 + rand.Float64()))
		refusal, refused := refusalIn(err)
		switch {
		case refused:
			if r.refusal.Swap(string(refusal)) != string(refusal) {
				slog.Error("relay refuses to publish", "reason", string(refusal))
			}
			r.silent.Store(0)
			r.enter("refused")
			wait = refusalInterval
		case errors.Is(err, errSlotTaken), errors.Is(err, errGap), errors.Is(err, errClockBack):
			slog.Info("relay starts over", "reason", err)
			wait = standbyInterval
		case errors.Is(err, errKafkaSilent):
			slog.Warn("relay starts over", "reason", err)
			wait = time.Second + time.Duration(rand.Int64N(int64(3*time.Second)))
		default:
			slog.Warn("relay starts over", "reason", err)
		}
		parts.Sleep(ctx, wait)
	}
}

// enter notes a change of state, with one log line.
func (r *relay) enter(state string, args ...any) {
	if r.state.Swap(state) != state {
		slog.Info("relay "+state, args...)
	}
	if state != "refused" { // another leads, or we do: what could not be published is so no longer, or anew
		r.refusal.Store("")
		r.pendingSince.Store(0)
	}
}

// lead waits for the slot, then publishes until something fails or ctx ends.
func (r *relay) lead(ctx context.Context) error {
	// Kafka first: a replica that cannot reach it must not hold the slot.
	s := &stay{relay: r,
		mail: make(chan *batch, 1), ready: make(chan wal.Position), ended: make(chan error, 1)}
	open := func() (*kafka.Client, error) { return kafka.Open(kafkaConfig(r.cfg, s.waitKafka)) }
	r.silent.CompareAndSwap(0, max(1, int64(r.age())))
	k, err := kafka.Within(ctx, kafkaPatience, open, (*kafka.Client).Close)
	if err != nil {
		return fmt.Errorf("kafka: %w", err)
	}
	r.silent.Store(0)
	defer func() { go k.Close() }()

	slot, err := r.awaitSlot(ctx)
	if err != nil {
		return err
	}
	conn, id, err := r.connect(ctx)
	if err != nil {
		return fmt.Errorf("replication connection: %w", err)
	}
	defer func() {
		// Not ctx, which may have ended. Closing tells Postgres to free the slot at once.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		conn.Close(ctx)
	}()
	id.Database = slot.Database

	// Before anything is changed, and without fencing: is this the topics' database?
	look := func() (*checkpoint, error) { return lastCheckpoint(k, r.cfg.kafkaCheckpointTopic) }
	last, err := kafka.Within(ctx, kafkaPatience, look, func(*checkpoint) {})
	if err != nil {
		return fmt.Errorf("read checkpoint: %w", err)
	}
	if err := r.fits(ctx, last, id, k); err != nil {
		return err
	}
	short := false // the topic lost what was published: its volume was put back
	if last != nil && (r.adopting || id.Continues(&last.Mark, math.MaxUint64)) {
		if err := r.checkTail(ctx, k); err != nil {
			return err
		}
		look := func() (bool, error) { return last.Horizon.Beyond(k.Ends) }
		if short, err = kafka.Within(ctx, kafkaPatience, look, func(bool) {}); err != nil {
			return fmt.Errorf("ends of the topic: %w", err)
		}
	}

	s.k, s.id = k, id
	var past *pastLedger
	if !slot.Exists || slot.Lost || uint64(slot.Confirmed) == r.gap.Load() || short || r.adopting {
		// Crash anywhere from here: the slot is missing or begins after the checkpoint, and the next leader
		// comes here again.
		if past, err = r.makeSlot(ctx, conn, slot); err != nil {
			return err
		}
	}
	ours, err := wal.Publication(ctx, r.db, "outbox", publication)
	if err == nil {
		err = wal.Start(ctx, conn, r.cfg.replicationSlot, ours)
	}
	if err != nil {
		past.forget()
		if errors.Is(err, wal.ErrTaken) {
			return errSlotTaken
		}
		return fmt.Errorf("start replication: %w", err)
	}
	r.takeovers.Add(1)
	// The slot is held: this replica leads.
	return newReceiver(s, conn).run(ctx, &publisher{stay: s, past: past})
}

// wayOutOfThePast is what to do when the topic knows more of the ledger than the ledger does.
const wayOutOfThePast = "Bring back the newer data. If they are lost, stop the service and run " +
	"`wallet -rebuild`, which adds what the topic holds beyond this ledger; or set KAFKA_TOPIC and " +
	"KAFKA_CHECKPOINT_TOPIC to new topics, which will get the whole ledger as it is now"

// fits checks that the topics' checkpoint is this database's. Without a checkpoint everything fits.
func (r *relay) fits(ctx context.Context, c *checkpoint, id wal.Identity, k *kafka.Client) error {
	switch {
	case c == nil:
		return nil
	case c.Partitions != k.Partitions():
		return refusef("topic %s has %d partitions but had %d when its events were written, which breaks "+
			"each wallet's order: set KAFKA_TOPIC and KAFKA_CHECKPOINT_TOPIC to new topics, which will get "+
			"the whole ledger", r.cfg.kafkaTopic, k.Partitions(), c.Partitions)
	case r.adopting:
		return nil
	case c.System == id.System && c.DatabaseOID == id.Database && c.Slot == r.cfg.replicationSlot:
		var flushed string // read after the checkpoint, which it can only be ahead of
		var behind bool
		err := r.db.QueryRow(ctx, `
SELECT pg_current_wal_flush_lsn()::text, pg_current_wal_flush_lsn() < $1::pg_lsn`, c.EndLSN).Scan(
			&flushed, &behind)
		if err != nil {
			return fmt.Errorf("end of the WAL: %w", err)
		}
		if behind && c.Timeline == id.Timeline {
			return refusef("topic %s follows this database to %s, and its WAL ends at %s: its data are "+
				"those of an earlier day. "+wayOutOfThePast, r.cfg.kafkaTopic, c.EndLSN, flushed)
		}
		if !id.Descends(c.Timeline) {
			return refusef("topic %s follows timeline %d of this database, and this server is on timeline "+
				"%d, which does not descend from it: connect to the server that was promoted, or run "+
				"`wallet -adopt` if this one was restored in its place",
				r.cfg.kafkaTopic, c.Timeline, id.Timeline)
		}
		return nil
	}
	return refusef("topic %s belongs to database %s/%d (slot %s), this one is %s/%d (slot %s): if it is the "+
		"same ledger, stop the service and run `wallet -rebuild` where data were lost, `wallet -adopt` "+
		"where none were; else set KAFKA_TOPIC and KAFKA_CHECKPOINT_TOPIC to topics of its own",
		r.cfg.kafkaTopic, c.System, c.DatabaseOID, c.Slot, id.System, id.Database, r.cfg.replicationSlot)
}

// checkTail checks that the ledger holds the last event of each partition, byte for byte. An event is
// published after its entry's commit, so it always does, unless the data are those of an earlier day and
// went on from there: then the same numbers mean other entries, and the WAL's positions other commits. The
// positions alone may have overtaken the checkpoint.
func (r *relay) checkTail(ctx context.Context, k *kafka.Client) error {
	for p := range k.Partitions() {
		look := func() (*kafka.Committed, error) { return k.Last(r.cfg.kafkaTopic, p) }
		tail, err := kafka.Within(ctx, kafkaPatience, look, func(*kafka.Committed) {})
		if err != nil {
			return fmt.Errorf("last event of partition %d: %w", p, err)
		}
		if tail == nil {
			continue
		}
		walletID, seq, err := eventIDOf(tail)
		if err != nil {
			return refusef("topic %s holds something else than this service's events (%v): set KAFKA_TOPIC "+
				"to a topic of its own", r.cfg.kafkaTopic, err)
		}
		held, err := holdsEvent(ctx, r.db, walletID, seq, tail.Value)
		if err == nil && !held {
			// Postgres sends a commit that still waits for a synchronous standby, and shows it only
			// afterwards.
			timed, cancel := context.WithTimeout(ctx, kafkaPatience)
			err = wal.AwaitTransactions(timed, r.db)
			cancel()
			if err == nil {
				held, err = holdsEvent(ctx, r.db, walletID, seq, tail.Value)
			}
		}
		if err != nil {
			return fmt.Errorf("look for event %s in the ledger: %w", book.EntryID(walletID, seq), err)
		}
		if !held {
			return refusef("topic %s holds event %s, and this ledger has no such entry: its data are those "+
				"of an earlier day. "+wayOutOfThePast, r.cfg.kafkaTopic, book.EntryID(walletID, seq))
		}
	}
	return nil
}

// adopt is `wallet -adopt`: it makes this database the topics', by the recovery that a lost slot gets.
func adopt(ctx context.Context, cfg *relayConfig) error {
	db, err := pgxpool.New(ctx, cfg.databaseURL)
	if err != nil {
		return err
	}
	defer db.Close()
	r := newRelay(cfg, db, nil)
	r.adopting = true
	return r.lead(ctx)
}

// ---------------------------------------------------------------------------------------------------------
// Postgres: slot and replication connection
// ---------------------------------------------------------------------------------------------------------

func (r *relay) readSlot(ctx context.Context, db wal.Querier) (wal.Slot, error) {
	ctx, cancel := context.WithTimeout(ctx, walSenderTimeout)
	defer cancel()
	s, err := wal.ReadSlot(ctx, db, r.cfg.replicationSlot)
	if errors.Is(err, wal.ErrElsewhere) {
		err = refusef("replication slot %s belongs to another database of this Postgres cluster: "+
			"set REPLICATION_SLOT to a name of its own", r.cfg.replicationSlot)
	}
	if err != nil {
		return s, fmt.Errorf("look at slot %s: %w", r.cfg.replicationSlot, err)
	}
	return s, nil
}

// awaitSlot stands by until nobody holds the slot. It touches nothing: a standby that made a producer would
// fence a healthy leader.
func (r *relay) awaitSlot(ctx context.Context) (wal.Slot, error) {
	for {
		s, err := r.readSlot(ctx, r.db)
		if err != nil || !s.Active {
			return s, err
		}
		if r.adopting {
			return s, refusef("slot %s is in use: stop the service that publishes from this database first",
				r.cfg.replicationSlot)
		}
		r.enter("standby", "slot", r.cfg.replicationSlot)
		pause := time.Duration(float64(standbyInterval) * (0.75 + rand.Float64()/2))
		if err := parts.Sleep(ctx, pause); err != nil {
			return s, err
		}
	}
}

// connect opens the replication connection. From START_REPLICATION on one goroutine owns it.
func (r *relay) connect(ctx context.Context) (*pgconn.PgConn, wal.Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, walSenderTimeout)
	defer cancel()
	return wal.Connect(ctx, r.cfg.replicationURL, "wallet relay", walSenderTimeout)
}

// ---------------------------------------------------------------------------------------------------------
// Leading
// ---------------------------------------------------------------------------------------------------------

// batch is what one Kafka transaction carries: events, and where the checkpoint stands after them. One
// without events moves only the checkpoint, one without a position only publishes.
type batch struct {
	events      []event
	bytes       int
	upTo        wal.Position
	committedAt time.Time     // of the last commit, by Postgres' clock
	since       time.Duration // since born: when its first commit was, or 0 without events
}

// stay is one stay in office, as far as its two goroutines share it: the receiver, which keeps the slot, and
// the publisher, which keeps the producer. Nothing of it outlives the stay.
type stay struct {
	*relay
	k  *kafka.Client // both may use it at once
	id wal.Identity  // neither changes it

	// mail holds at most one batch. The receiver takes an unread one back to add to it: that is how Kafka
	// transactions grow under load and stay small when idle.
	mail  chan *batch
	ready chan wal.Position // the publisher's first word: where to go on from
	ended chan error        // its last

	published atomic.Uint64               // end LSN: committed in Kafka, checkpoint included
	waiting   atomic.Int64                // since when the publisher waits for Kafka: ns since born, or 0
	horizon   atomic.Pointer[wal.Horizon] // a new one, for the next checkpoint
	settled   atomic.Int64                // the XID of the checkpoint's horizon
}

// receiver is the goroutine that owns the replication connection: it receives, decodes, hands batches over
// and confirms what was published.
type receiver struct {
	*stay
	conn *pgconn.PgConn
	tick *time.Ticker // for a status while it waits for the publisher

	received   pglogrepl.LSN
	confirmed  pglogrepl.LSN
	heard      time.Time // when the last message came, by our clock
	serverTime time.Time // when Postgres sent it, by its own

	relations outboxRelations
	tx        wal.Transactions

	building *batch
	handed   pglogrepl.LSN // end of the last whole transaction given to the publisher
	handedAt time.Time
}

func newReceiver(s *stay, conn *pgconn.PgConn) *receiver {
	return &receiver{stay: s, conn: conn, tick: time.NewTicker(statusInterval),
		relations: make(outboxRelations), building: new(batch)}
}

// run keeps the slot: it receives, sends a status every second whatever Kafka does, and gives up when
// either side is silent. Meanwhile p publishes.
func (r *receiver) run(ctx context.Context, p *publisher) error {
	defer r.tick.Stop()
	// The publisher is to finish its transaction when ctx ends, and to stop when we leave.
	publishing, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	receiving, wake := context.WithCancel(ctx)
	defer wake()
	go func() {
		err := p.run(publishing)
		r.ended <- err
		wake()
	}()

	var from wal.Position // what was published before this stay
	for started := false; !started; {
		select {
		case from = <-r.ready:
			r.received = from.End
			r.published.Store(uint64(from.End))
			started = true
		case err := <-r.ended:
			return err
		case <-r.tick.C:
			if err := r.sendStatus(); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if r.adopting {
		return nil
	}
	r.handed, r.tx = from.End, wal.TransactionsFrom(from)
	r.enter("leader", "from", from.End, "timeline", r.id.Timeline)
	go r.keepOutbox(publishing)
	go r.keepHorizon(publishing)
	go r.stuck.Watch(publishing, r.k)

	err := r.receive(receiving)
	select {
	case err = <-r.ended:
		return err
	default:
		if ctx.Err() == nil {
			return err
		}
	}
	// Shutdown: publish what was handed over, confirm it, go.
	close(r.mail)
	deadline := time.After(drainPatience)
	for {
		select {
		case err := <-r.ended:
			if err == nil {
				err = r.sendStatus()
			}
			slog.Info("relay drained", "confirmed", r.confirmed, "error", err)
			return err
		case <-r.tick.C:
			if err := r.sendStatus(); err != nil {
				return err
			}
		case <-deadline:
			return errKafkaSilent
		}
	}
}

// receive reads from the slot and hands batches to the publisher, until ctx ends or something fails.
func (r *receiver) receive(ctx context.Context) error {
	// One deadline for all messages until the next status, rather than a context that pgx would have to
	// watch for each.
	socket := r.conn.Conn()
	defer context.AfterFunc(ctx, func() { _ = socket.SetReadDeadline(time.Unix(1, 0)) })()
	r.heard = time.Now()
	for {
		_ = socket.SetReadDeadline(time.Now().Add(statusInterval))
		for ctx.Err() == nil {
			m, err := wal.Next(r.conn)
			if pgconn.Timeout(err) {
				break
			}
			if err != nil {
				return err
			}
			r.heard = time.Now()
			if err := r.take(ctx, m); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(r.heard) > postgresPatience {
			return errPostgresSilent
		}
		if err := r.sendStatus(); err != nil {
			return err
		}
	}
}

// take handles one message of the replication stream.
func (r *receiver) take(ctx context.Context, m wal.Message) error {
	r.received = max(r.received, m.LSN)
	// Postgres counts wal_sender_timeout by its clock: after a step back it would wait for as long as the
	// step before it took the slot from a leader that has gone silent. On a new connection it counts anew.
	if m.ServerTime.Before(r.serverTime.Add(-statusInterval)) {
		return errClockBack
	}
	r.serverTime = m.ServerTime
	if m.Keepalive {
		r.idle(m)
		return nil
	}
	return r.decode(ctx, m.Data)
}

// idle moves the checkpoint over WAL that holds no event, so that a quiet outbox in a busy database does
// not keep it for ever. The WAL's end may be passed only while nothing received is unpublished; and the
// checkpoint goes first, Postgres hears of it after. At once if Postgres asks, which it does when it cannot
// shut down before it is confirmed.
func (r *receiver) idle(alive wal.Message) {
	end := max(alive.LSN, r.handed)
	if end == r.handed && r.horizon.Load() == nil {
		return // nothing new
	}
	due := time.Since(r.handedAt) >= idleInterval || alive.ReplyRequested
	if r.tx.Open() || r.published.Load() != uint64(r.handed) || !due {
		return
	}
	r.handed, r.handedAt = end, time.Now()
	r.mail <- &batch{upTo: wal.Position{End: end}} // empty: all that was handed is published
}

// decode handles one message of pgoutput, protocol version 1:
// https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
func (r *receiver) decode(ctx context.Context, data []byte) error {
	switch pglogrepl.MessageType(data[0]) {
	case pglogrepl.MessageTypeInsert:
		return r.insert(ctx, data[1:])
	case pglogrepl.MessageTypeBegin:
		return r.tx.Begin(data[1:])
	case pglogrepl.MessageTypeCommit:
		m, before, err := r.tx.Commit(data[1:])
		if err != nil || before {
			return err
		}
		r.building.upTo, r.building.committedAt = wal.Position{End: m.TransactionEndLSN}, m.CommitTime
		if r.building.since == 0 { // both times are by Postgres' clock
			r.building.since = max(1, r.age()-max(0, r.serverTime.Sub(m.CommitTime)))
		}
		r.handed = m.TransactionEndLSN
		r.received = max(r.received, r.handed)
		return r.hand(ctx)
	case pglogrepl.MessageTypeRelation:
		return r.relations.add(data[1:])
	}
	return nil
}

// insert adds an outbox row to the batch. A transaction of any size passes through in pieces of
// batchEventsMax rows.
func (r *receiver) insert(ctx context.Context, data []byte) error {
	if !r.tx.Open() {
		return errors.New("outbox row outside a transaction")
	}
	if before := r.tx.Row(); before {
		r.skipped.Add(1)
		return nil
	}
	e, err := r.relations.decode(data)
	if errors.Is(err, errNotOutbox) {
		return refusef("the publication %s (or %[1]s_SCHEMA) holds more than the outbox: "+
			"remove the other tables from it", publication)
	}
	if err != nil {
		return err
	}
	e.commitLSN = r.tx.CommitLSN()
	b := r.building
	b.events, b.bytes = append(b.events, e), b.bytes+len(e.payload)
	if len(b.events) < batchEventsMax && b.bytes < batchBytesMax {
		return nil
	}
	b.upTo = r.tx.Inside(r.handed)
	return r.hand(ctx)
}

// hand gives the batch to the publisher, together with one that still waits there. It blocks while a full
// batch waits, and goes on sending status meanwhile: a slow Kafka must not cost the slot.
func (r *receiver) hand(ctx context.Context) error {
	b := r.building
	r.building = new(batch)
	r.handedAt = time.Now()
	r.progress.Show(r.received, pglogrepl.LSN(r.published.Load()), r.confirmed)
	select {
	case waiting := <-r.mail:
		if len(waiting.events)+len(b.events) <= batchEventsMax && waiting.bytes+b.bytes <= batchBytesMax {
			waiting.events, waiting.bytes = append(waiting.events, b.events...), waiting.bytes+b.bytes
			waiting.upTo, waiting.since = b.upTo, cmp.Or(waiting.since, b.since)
			if !b.committedAt.IsZero() {
				waiting.committedAt = b.committedAt
			}
			b = waiting
		} else {
			r.mail <- waiting
		}
	default:
	}
	for {
		select {
		case r.mail <- b:
			return nil
		case <-r.tick.C:
			if err := r.sendStatus(); err != nil {
				return err
			}
			r.heard = time.Now() // it is not Postgres that is silent: nobody listens
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendStatus keeps the slot, confirms what was published, and asks for an answer. It fails when the
// publisher has waited too long.
func (r *receiver) sendStatus() error {
	if since := r.waiting.Load(); since != 0 && r.age()-time.Duration(since) > kafkaPatience {
		return errKafkaSilent
	}
	// Before the start is settled this is 0, which confirms nothing.
	published := pglogrepl.LSN(r.published.Load())
	if published < r.confirmed || published > r.received {
		panic(fmt.Sprintf("confirmed %v <= published %v <= received %v does not hold",
			r.confirmed, published, r.received))
	}
	r.confirmed = published // from here on Postgres may forget everything that ends before
	r.progress.Show(r.received, published, r.confirmed)
	return wal.Confirm(r.conn, published, postgresPatience)
}

// keepOutbox drops old partitions of the outbox, and forgets what moved long ago, while this replica leads:
// it knows what was published, and how far back a recovery would look.
func (s *stay) keepOutbox(ctx context.Context) {
	closed := make(map[string]pglogrepl.LSN)
	for parts.Sleep(ctx, time.Minute) == nil {
		published := pglogrepl.LSN(s.published.Load())
		err := dropOutboxPartitions(ctx, s.db, s.cfg.outboxRetention, closed, published)
		err = errors.Join(err, moved.Forget(ctx, s.db, s.settled.Load(), movedKept))
		if err != nil && ctx.Err() == nil {
			slog.Warn("outbox not kept small, will try again", "error", err)
		}
	}
}

// ---------------------------------------------------------------------------------------------------------
// Publishing
// ---------------------------------------------------------------------------------------------------------

// checkpoint is the last record of its topic, written in the same Kafka transaction as the events it covers.
type checkpoint struct {
	wal.Mark                 // how far the events were published
	Partitions  int32        `json:"partitions"`        // of the events topic
	Events      int64        `json:"events"`            // published in all
	CommittedAt time.Time    `json:"committed_at"`      // of the last published commit, by Postgres' clock
	WrittenAt   time.Time    `json:"written_at"`        // by the relay's
	Horizon     *wal.Horizon `json:"horizon,omitempty"` // where a recovery may begin; nil is the beginning
}

// publisher is the goroutine that owns the producer: it recovers what is missing, then publishes what the
// receiver hands over, in Kafka transactions that carry the checkpoint.
type publisher struct {
	*stay
	past *pastLedger // when the slot was made by this replica, until it has recovered

	producer *kafka.Producer
	records  eventRecords // of the transaction under way
	last     checkpoint   // as last committed, or as found
	ticket   ticket       // for the cache

	streaming bool // the receiver has begun: until then nothing is confirmed
}

// run settles where to go on from, then publishes what the receiver hands over. Any error ends the stay: a
// transaction whose outcome is unknown must not be repeated, aborted or followed, only looked up by the
// next start.
func (p *publisher) run(ctx context.Context) error {
	defer p.past.forget()
	if err := p.waitKafka(p.fence); err != nil {
		return err
	}
	from, err := p.settle(ctx)
	if err != nil {
		return err
	}
	// A connection of the pool that answers now belongs to the same life of the database as ours: so do the
	// events.
	if err := p.db.Ping(ctx); err != nil {
		return err
	}
	p.ticket = p.cache.ticket()
	p.ticket.early = true
	p.streaming = true
	select {
	case p.ready <- from:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		select {
		case b, more := <-p.mail:
			if !more {
				return nil
			}
			began := time.Now()
			if err := p.commit(b); err != nil {
				return err
			}
			if len(b.events) < batchEventsMax/2 {
				_ = parts.Sleep(ctx, min(time.Since(began), restMax))
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// waitKafka marks the time that op takes as waiting for Kafka, which the receiver limits. Within another wait
// it is part of that one.
func (s *stay) waitKafka(op func() error) error {
	if !s.waiting.CompareAndSwap(0, max(1, int64(s.age()))) {
		return op()
	}
	s.silent.CompareAndSwap(0, s.waiting.Load())
	defer s.waiting.Store(0)
	err := op()
	if err == nil {
		s.silent.Store(0)
	}
	return err
}

// fence makes the producer: from here on no former leader can publish, and what it last tried is committed
// or aborted. It is called here only, after the slot was taken: one made "to be safe" by a leader that had
// lost it would fence its successor.
func (p *publisher) fence() error {
	c, err := lastCheckpoint(p.k, p.cfg.kafkaCheckpointTopic)
	if err == nil && c != nil && c.System != p.id.System { // adopting
		if _, err := p.k.NewProducer(transactionalID(c.System, c.Slot)); err != nil {
			return fmt.Errorf("fence the former database's relay: %w", err)
		}
	}
	if p.producer, err = p.k.NewProducer(transactionalID(p.id.System, p.cfg.replicationSlot)); err != nil {
		return fmt.Errorf("producer: %w", err)
	}
	return nil
}

// settle reads the checkpoint, which is final now, and finds where to go on from; a gap is filled first.
func (p *publisher) settle(ctx context.Context) (from wal.Position, err error) {
	var found *checkpoint
	err = p.waitKafka(func() (err error) {
		// An orphaned transaction would hide the last checkpoint, and from a recovery the last events.
		topics := []string{p.cfg.kafkaCheckpointTopic}
		if p.past != nil {
			topics = append(topics, p.cfg.kafkaTopic)
		}
		if err = p.k.Whole(topics...); err == nil {
			found, err = lastCheckpoint(p.k, p.cfg.kafkaCheckpointTopic)
		}
		return err
	})
	if err != nil {
		return from, fmt.Errorf("read checkpoint: %w", err)
	}
	if err := p.fits(ctx, found, p.id, p.k); err != nil {
		return from, err
	}
	if found != nil {
		p.last = *found
		if from, err = found.Position(); err != nil {
			return from, fmt.Errorf("checkpoint: %w", err)
		}
		if !p.holds(found) {
			p.last.Horizon = nil
		}
	}
	p.last.System, p.last.DatabaseOID = p.id.System, p.id.Database
	p.last.Slot, p.last.Partitions = p.cfg.replicationSlot, p.k.Partitions()
	if p.past != nil {
		err := p.recover(ctx)
		p.past.forget() // its snapshot keeps vacuum from cleaning up
		return wal.Position{End: p.past.at}, err
	}
	if end, changed := p.id.History[p.last.Timeline]; changed && p.last.Timeline != p.id.Timeline {
		from = switchTimeline(from, end)
	}
	p.last.Timeline = p.id.Timeline
	// The checkpoint is always at or past what was confirmed, since it moves first.
	slot, err := p.readSlot(ctx, p.db)
	if err != nil {
		return from, err
	}
	if from.End < slot.Confirmed {
		p.gap.Store(uint64(slot.Confirmed))
		return from, fmt.Errorf("%w (checkpoint %v, slot %v)", errGap, from.End, slot.Confirmed)
	}
	return from, nil
}

// holds says whether a checkpoint's horizon holds here.
func (p *publisher) holds(c *checkpoint) bool {
	if c.Horizon == nil || p.adopting || len(c.Horizon.Offsets) != int(p.k.Partitions()) {
		return false
	}
	lsn, err := pglogrepl.ParseLSN(c.Horizon.LSN)
	return err == nil && p.id.Continues(&c.Mark, lsn)
}

// switchTimeline is where to go on from after a promotion: what was published beyond the point where the
// timelines part was never committed on this one.
func switchTimeline(from wal.Position, end pglogrepl.LSN) wal.Position {
	held, whole := from.Until(end)
	if !whole {
		slog.Warn("the new primary lacks transactions that were published: their events stay in the topic; "+
			"set synchronized_standby_slots (Postgres 17 and later) to rule this out",
			"published", max(from.End, from.Commit), "timeline_ended", end)
	}
	return held
}

// commit publishes one batch in one Kafka transaction, with the checkpoint that covers it.
func (p *publisher) commit(b *batch) error {
	began := time.Now()
	next := p.last
	next.Events += int64(len(b.events))
	next.WrittenAt = began.UTC()
	if !b.committedAt.IsZero() {
		next.CommittedAt = b.committedAt.UTC()
	}
	p.pendingSince.Store(int64(b.since))
	next.Move(b.upTo)
	var record []byte
	if b.upTo != (wal.Position{}) {
		if h := p.horizon.Swap(nil); h != nil {
			next.Horizon = h
		}
		var err error
		if record, err = json.Marshal(next); err != nil {
			return err
		}
	}
	messages, err := p.records.of(b.events)
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	err = p.waitKafka(func() error {
		if err := p.producer.Send(messages, record); err != nil {
			return fmt.Errorf("publish: %w", kafka.Explain(err))
		}
		if err := p.producer.Commit(); err != nil {
			return fmt.Errorf("commit Kafka transaction, its outcome is unknown: %w", kafka.Explain(err))
		}
		return nil
	})
	if err != nil {
		return err
	}
	// Published. A crash from here to the confirmation repeats nothing: the checkpoint says so.
	p.last = next
	if record != nil {
		if p.streaming {
			p.published.Store(uint64(b.upTo.End))
		}
		p.checkpointAt.Store(time.Now().UnixNano())
		if next.Horizon != nil {
			p.settled.Store(next.Horizon.XID)
		}
	}
	p.pendingSince.Store(0)
	p.batches.Add(1)
	p.events.Add(int64(len(b.events)))
	for _, e := range b.events[max(0, len(b.events)-look.RecentMax):] {
		p.recent.Add(book.EntryID(e.walletID, e.seq), e.payload)
	}
	p.lastBatch.Store(int64(time.Since(began)))
	slog.Debug("batch published",
		"events", len(b.events), "end", b.upTo.End, "seconds", time.Since(began).Seconds())
	if p.cache != nil {
		// A writer that died after its commit may have left them out.
		p.cache.put(p.ticket, newestBalances(b.events))
	}
	return nil
}

// ---------------------------------------------------------------------------------------------------------
// Recovery: what a slot that was lost, dropped, made anew or never made did not deliver
// ---------------------------------------------------------------------------------------------------------

// pastLedger is the ledger as of exactly where a slot begins that this replica made.
type pastLedger struct {
	*pgx.Conn // in a transaction that only reads
	at        pglogrepl.LSN
}

// forget may be called on nil, and again.
func (p *pastLedger) forget() {
	if p != nil {
		p.Close(context.Background())
	}
}

// makeSlot replaces the slot, found as it is now, by one that begins now. conn is the replication connection.
func (r *relay) makeSlot(ctx context.Context, conn *pgconn.PgConn, found wal.Slot) (
	past *pastLedger, err error) {
	db, err := pgx.ConnectConfig(ctx, r.db.Config().ConnConfig.Copy())
	if err != nil {
		return nil, fmt.Errorf("recovery connection: %w", err)
	}
	defer func() {
		if err != nil {
			db.Close(context.Background())
		}
	}()
	// One recovery at a time. The lock ends with the connection.
	var locked bool
	lock := `SELECT pg_try_advisory_lock(hashtext('wallet.relay_recovery'))`
	if err := db.QueryRow(ctx, lock).Scan(&locked); err != nil {
		return nil, err
	}
	now, err := r.readSlot(ctx, db)
	if err != nil {
		return nil, err
	}
	if !locked || now != found {
		return nil, errSlotTaken
	}
	if now.Exists {
		var atOnce pglogrepl.DropReplicationSlotOptions
		err := pglogrepl.DropReplicationSlot(ctx, conn, r.cfg.replicationSlot, atOnce)
		if err != nil {
			return nil, fmt.Errorf("drop the slot: %w", err)
		}
	}
	slog.Info("relay makes its slot", "slot", r.cfg.replicationSlot, "existed", now.Exists, "lost", now.Lost)
	at, snapshot, err := wal.Make(ctx, conn, r.cfg.replicationSlot, now.ServerVersion)
	if err != nil {
		return nil, fmt.Errorf("make the slot: %w", err)
	}
	if err := wal.Import(ctx, db, snapshot); err != nil {
		return nil, err
	}
	return &pastLedger{db, at}, nil
}

// keepHorizon makes a new horizon every horizonInterval while events are published.
func (s *stay) keepHorizon(ctx context.Context) {
	for made := int64(-1); parts.Sleep(ctx, horizonInterval) == nil; {
		events := s.events.Load()
		if events == made {
			continue
		}
		h, err := wal.MakeHorizon(ctx, s.db, s.k.Ends, s.published.Load)
		if err != nil {
			if ctx.Err() == nil {
				slog.Warn("no new horizon for a recovery, will try again", "error", err)
			}
			continue
		}
		s.horizon.Store(h)
		made = events
	}
}

const recoveryWalletsMax = 500_000 // whose state is in memory at a time; each lot reads the topic once more

// errNoHorizon: the checkpoint's horizon cannot be used, and the recovery begins at the beginning.
var errNoHorizon = errors.New("the checkpoint's horizon does not hold")

// recover publishes the entries of the ledger, as of the slot's begin, that the topic lacks, each wallet's
// in order; the last Kafka transaction sets the checkpoint to the slot's begin. After a crash the slot
// still begins after the checkpoint, so the next leader recovers again, with less to do.
func (p *publisher) recover(ctx context.Context) error {
	p.enter("recovering", "slot_begins", p.past.at, "checkpoint", p.last.EndLSN)
	p.recoveries.Add(1)
	if p.rebuilt { // and nobody writes
		p.last.Timeline = p.id.Timeline
		return p.commit(&batch{upTo: wal.Position{End: p.past.at}})
	}
	began, from := time.Now(), "the beginning"
	g := &gap{publisher: p, batch: new(batch)}
	h := p.last.Horizon
	err := errNoHorizon
	if h != nil {
		err = g.fillSince(ctx, h)
		from = h.LSN
	}
	if errors.Is(err, errNoHorizon) {
		slog.Warn("relay recovers from the beginning", "reason", err)
		from = "the beginning"
		if h != nil { // it goes with the first batch: in a topic grown again it would look as if it held
			p.last.Horizon = nil
			g.batch.upTo, _ = p.last.Position() // settle has read it
		}
		err = g.fillAll(ctx)
	}
	if err != nil {
		return err
	}
	p.last.Timeline = p.id.Timeline
	g.batch.upTo = wal.Position{End: p.past.at}
	if err := p.commit(g.batch); err != nil {
		return err
	}
	if beyond := g.seen - g.held; beyond > 0 {
		slog.Warn("the topic holds events of entries that this ledger lacks: they were published before a "+
			"failover or restore that lost them; `wallet -audit` names them", "wallets", beyond)
	}
	slog.Info("relay recovered", "events", g.events, "wallets", g.wallets, "from", from,
		"checkpoint", p.past.at, "seconds", time.Since(began).Seconds())
	return nil
}

// gap is a recovery under way.
type gap struct {
	*publisher
	spans           []kafka.Span // of the topic: what it may hold already lies there
	batch           *batch       // read and not published yet
	wallets, events int
	seen, held      int // wallets with events in the spans; those of them whose last one there has its entry
}

// fillSince publishes what lies beyond a horizon, and looks at no wallet that did not move since. A wallet's
// events are in the topic in order, so what it lacks is what follows the last one there. Where the topic
// holds none beyond the horizon, it lacks all entries that are not below: those that are not published are
// the end of the wallet's chain.
func (g *gap) fillSince(ctx context.Context, h *wal.Horizon) (err error) {
	var next, from int64
	query := `SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint`
	if err := g.past.QueryRow(ctx, query).Scan(&next); err != nil {
		return fmt.Errorf("distance of the horizon: %w", err)
	}
	if from, err = moved.From(ctx, g.past); err != nil {
		return err
	}
	if h.XID < from || h.XID > next {
		return fmt.Errorf("%w: what moved is known for the transactions from %d to %d, and it is at %d",
			errNoHorizon, from, next, h.XID)
	}
	if g.spans, err = g.spansSince(h); err != nil {
		return err
	}
	return moved.Lots(moved.Since(ctx, g.past, h.XID), recoveryWalletsMax, func(l *moved.Lot) error {
		return g.fill(ctx, l, func(ctx context.Context, lacks map[int64]int64, visit entryVisit) error {
			first := make([]int64, len(l.Keys))
			for i, id := range l.Keys {
				if first[i] = l.First[id]; lacks[id] > 0 {
					first[i] = lacks[id] - 1 // the last one that the topic holds
				}
			}
			return readChainsFrom(ctx, g.past.Conn, l.Keys, first, visit)
		})
	})
}

// fillAll publishes what the topic lacks of the whole ledger.
func (g *gap) fillAll(ctx context.Context) (err error) {
	if g.spans, err = g.spansSince(nil); err != nil {
		return err
	}
	for l, more := new(moved.Lot), true; more; {
		l.After = l.Upto
		if l.First, l.Upto, err = readWalletSeqs(ctx, g.past.Conn, l.After, recoveryWalletsMax); err != nil {
			return err
		}
		if more = len(l.First) == recoveryWalletsMax; len(l.First) == 0 {
			break
		}
		err := g.fill(ctx, l, func(ctx context.Context, _ map[int64]int64, visit entryVisit) error {
			return readChains(ctx, g.past.Conn, l.After, l.Upto, visit)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// fill publishes what the topic lacks of a lot's wallets, but for a last part that stays in g.batch. read is
// told the number that the topic lacks first, of each wallet that it has something of, and reads on while
// the batch before is at Kafka.
func (g *gap) fill(ctx context.Context, l *moved.Lot,
	read func(ctx context.Context, lacks map[int64]int64, visit entryVisit) error) error {
	lacks := make(map[int64]int64)
	for _, s := range g.spans {
		err := g.k.Scan(ctx, s, func(r *kafka.Committed) error {
			id, seq, err := eventIDOf(r)
			if _, ours := l.First[id]; ours && err == nil {
				lacks[id] = max(lacks[id], seq+1)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	g.wallets, g.seen = g.wallets+len(l.First), g.seen+len(lacks)
	return parts.Pipe(ctx, g.commit, func(ctx context.Context, publish func(*batch) error) error {
		return read(ctx, lacks, func(e *book.Entry) error {
			if e.Seq < lacks[e.WalletID] {
				if e.Seq == lacks[e.WalletID]-1 {
					g.held++
				}
				return nil
			}
			b := g.batch
			b.events = append(b.events, event{walletID: e.WalletID, seq: e.Seq,
				payload: book.AppendEvent(nil, e), commitLSN: g.past.at})
			g.events++
			if len(b.events) < batchEventsMax {
				return nil
			}
			g.batch = new(batch)
			return publish(b)
		})
	})
}

// ---------------------------------------------------------------------------------------------------------
// Kafka
// ---------------------------------------------------------------------------------------------------------

// kafkaConfig is for kafka.Open. busy may be nil.
func kafkaConfig(cfg *relayConfig, busy func(func() error) error) kafka.Config {
	return kafka.Config{
		Brokers:     cfg.kafkaBrokers,
		ClientID:    "wallet-relay",
		Topic:       cfg.kafkaTopic,
		Checkpoints: cfg.kafkaCheckpointTopic,
		Partitions:  cfg.kafkaPartitions, Replication: cfg.kafkaReplication, Retention: cfg.kafkaRetention,
		TLS: cfg.kafkaTLS, TLSCA: cfg.kafkaTLSCA, TLSCert: cfg.kafkaTLSCert, TLSKey: cfg.kafkaTLSKey,
		SASLMechanism: cfg.kafkaSASLMechanism,
		SASLUser:      cfg.kafkaSASLUser, SASLPassword: cfg.kafkaSASLPassword,
		Settings: kafka.Settings{Checkpoints: "KAFKA_CHECKPOINT_TOPIC", Retention: "KAFKA_RETENTION",
			TLSCA: "KAFKA_TLS_CA", TLSCert: "KAFKA_TLS_CERT", TLSKey: "KAFKA_TLS_KEY"},
		MetadataMaxAge:     10 * time.Minute,
		TransactionTimeout: txnTimeout,
		Patience:           kafkaPatience,
		Busy:               busy,
	}
}

func transactionalID(system, slot string) string { return "wallet-relay-" + system + "-" + slot }

// lastCheckpoint returns nil if there is none.
func lastCheckpoint(k *kafka.Client, topic string) (*checkpoint, error) {
	last, err := k.Last(topic, 0)
	if err != nil || last == nil {
		return nil, err
	}
	c := new(checkpoint)
	if err := json.Unmarshal(last.Value, c); err != nil {
		return nil, refusef("topic %s holds something else than this service's checkpoints (%v): "+
			"set KAFKA_CHECKPOINT_TOPIC to a topic of its own", topic, err)
	}
	return c, nil
}

// spansSince gives the span of each partition of the events topic in which all events beyond a horizon lie;
// nil is the beginning. It refuses where some of them have been deleted.
func (p *publisher) spansSince(h *wal.Horizon) ([]kafka.Span, error) {
	var offsets []int64
	if h != nil {
		offsets = h.Offsets
	}
	spans, err := p.k.Since(offsets)
	var outside *kafka.OffsetError
	if !errors.As(err, &outside) {
		return spans, err
	}
	if outside.Offset > outside.End {
		return nil, fmt.Errorf("%w: partition %d ends at offset %d, and had %d",
			errNoHorizon, outside.Partition, outside.End, outside.Offset)
	}
	return nil, refusef("the slot has a gap that cannot be filled exactly, since partition %d of topic %s "+
		"was truncated to offset %d, within the span in question: set KAFKA_TOPIC and "+
		"KAFKA_CHECKPOINT_TOPIC to new topics, which will get the whole ledger",
		outside.Partition, p.cfg.kafkaTopic, outside.Start)
}

// ---------------------------------------------------------------------------------------------------------
// Audit
// ---------------------------------------------------------------------------------------------------------

// runAudit is `wallet -audit`: the ledger's own invariants, and ledger against topic, read_committed:
// missing, repeated, reordered, misplaced and differing events. It may run beside the live service: entries
// younger than its start are left to the next one. Since is how far back an audit of what moved goes; 0 is
// to the beginning.
func runAudit(ctx context.Context, cfg *relayConfig, since time.Duration, out io.Writer) (
	findings int, err error) {
	if len(cfg.kafkaBrokers) == 0 {
		return 0, errors.New("set KAFKA_BROKERS to host:port of a broker: " +
			"the audit compares the ledger with the topic")
	}
	a, err := openAuditedLedger(ctx, cfg.databaseURL, out)
	if err != nil {
		return 0, err
	}
	defer a.close()
	k, err := kafka.Open(kafkaConfig(cfg, nil))
	if err != nil {
		return 0, fmt.Errorf("kafka: %w", err)
	}
	defer k.Close()
	ledger := audit.Ledger{Noun: "wallet", Heads: a.heads, Events: a.events, Now: a.seqsNow,
		Lots: a.lots, HeadsOf: a.headsOf, EventsFrom: a.eventsFrom}
	topic := auditedTopic(k, cfg.kafkaTopic)
	var totals audit.Totals
	var at time.Time
	if since == 0 {
		totals, err = audit.Compare(ctx, ledger, topic, a.report)
	} else if at, err = a.goBack(ctx, since); err == nil {
		totals, err = audit.CompareSince(ctx, ledger, topic, at, a.report)
	}
	if err == nil {
		err = a.legs(ctx)
	}
	if err != nil {
		return a.report.Findings(), err
	}
	return a.conclude(totals, k.Partitions()), nil
}

// ---------------------------------------------------------------------------------------------------------
// Metrics
// ---------------------------------------------------------------------------------------------------------

func (r *relay) writeMetrics(w *metric.Writer) {
	seconds := func(unixNano int64) float64 { return float64(unixNano) / 1e9 }

	w.States("wallet_relay_state",
		"1 for what this replica's relay is; refused needs an operator, and the log says why.",
		r.state.Load().(string), "starting", "standby", "recovering", "leader", "refused", "stopped")
	ago := func(since int64) float64 { // ns since born, or 0, which stays 0
		return seconds(min(since, 1) * (int64(r.age()) - since))
	}
	w.Gauge("wallet_relay_lag_seconds",
		"Age of the oldest commit that is being published, or could not be by this replica; 0 if none.",
		ago(r.pendingSince.Load()))
	w.Gauge("wallet_relay_kafka_silent_seconds",
		"How long Kafka has owed this replica an answer; 0 while it owes none.", ago(r.silent.Load()))
	w.Gauge("wallet_relay_stuck_partitions", "Leader: partitions of its topics whose readers of what is "+
		"committed get no further, since a transaction is open that nobody ends.", r.stuck.Partitions())
	w.Gauge("wallet_relay_checkpoint_timestamp_seconds",
		"Leader: when its checkpoint last moved.", seconds(r.checkpointAt.Load()))
	w.Gauge("wallet_relay_last_batch_seconds",
		"Leader: how long the last Kafka transaction took.", seconds(r.lastBatch.Load()))
	w.Counter("wallet_relay_batches_total", "Kafka transactions committed.", float64(r.batches.Load()))
	w.Counter("wallet_relay_events_total", "Events published.", float64(r.events.Load()))
	w.Counter("wallet_relay_already_published_total",
		"Outbox rows received again and dropped, being published.", float64(r.skipped.Load()))
	w.Counter("wallet_relay_takeovers_total",
		"Times that this replica became leader.", float64(r.takeovers.Load()))
	w.Counter("wallet_relay_recoveries_total",
		"Times that a slot was made and the gap filled from the ledger.", float64(r.recoveries.Load()))
	w.Counter("wallet_relay_restarts_total",
		"Returns to the start, for whatever reason.", float64(r.restarts.Load()))

	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	wal.WriteMetrics(ctx, w, "wallet_relay", r.db, r.cfg.replicationSlot, &r.progress)
	if partitions, size, err := outboxSize(ctx, r.db); err == nil { // what cannot be known is left out
		w.Gauge("wallet_outbox_partitions", "Partitions of the outbox, those made ahead too.", partitions)
		w.Gauge("wallet_outbox_bytes", "Size of the outbox.", size)
	}
}
