// Package wal is what a consumer of a Postgres logical replication slot needs, whatever it consumes: whose
// slot it is, who holds it and what it costs; a new one with a view of the data as of its begin; the stream
// and its transactions; which history a position belongs to, and how far one has got.
//
// It touches the replication connection, which it opens and its caller owns, and reads the server's state by
// SQL; it makes a slot only when asked. It promises that a position is never taken for one of another
// history, and that a row is told to be consumed before if and only if the position to go on from covers it.
package wal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"wallet/internal/parts"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

var (
	// ErrElsewhere is ReadSlot's: slots are the cluster's, and this one was made in another of its databases.
	ErrElsewhere = errors.New("the slot belongs to another database of this Postgres cluster")
	// ErrTaken is Start's: somebody else holds the slot.
	ErrTaken = errors.New("the slot is in use")
)

// Querier is a pool, a connection or a transaction.
type Querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// ---------------------------------------------------------------------------------------------------------
// Slot
// ---------------------------------------------------------------------------------------------------------

// Slot is a slot as Postgres shows it to everybody. Two that are equal are the same slot, unmoved.
type Slot struct {
	Exists, Active, Lost bool
	Confirmed            pglogrepl.LSN
	Database             uint32 // the OID of the one that was asked
	ServerVersion        int    // as server_version_num: 180004
}

const querySlot = `
SELECT s.slot_name IS NOT NULL, coalesce(s.active, false), coalesce(s.wal_status = 'lost', false),
       coalesce(s.confirmed_flush_lsn::text, '0/0'),
       coalesce(s.datoid <> d.oid, false), d.oid, current_setting('server_version_num')::int
FROM pg_database d LEFT JOIN pg_replication_slots s ON s.slot_name = $1
WHERE d.datname = current_database()`

// ReadSlot looks at a slot, which need not exist.
func ReadSlot(ctx context.Context, db Querier, name string) (Slot, error) {
	var s Slot
	var confirmed string
	var elsewhere bool
	err := db.QueryRow(ctx, querySlot, name).Scan(&s.Exists, &s.Active, &s.Lost, &confirmed,
		&elsewhere, &s.Database, &s.ServerVersion)
	if err == nil && elsewhere {
		err = ErrElsewhere
	}
	if err == nil {
		s.Confirmed, err = pglogrepl.ParseLSN(confirmed)
	}
	return s, err
}

// Make makes a slot for pgoutput, which must not exist, and exports a snapshot of the data as of exactly its
// begin, at. The snapshot lives until the connection's next command. It waits for the transactions that are
// under way.
func Make(ctx context.Context, conn *pgconn.PgConn, name string, serverVersion int) (
	at pglogrepl.LSN, snapshot string, err error) {
	options := "(SNAPSHOT 'export')"
	if serverVersion >= 170000 {
		options = "(SNAPSHOT 'export', FAILOVER true)" // so that a standby keeps a copy of it
	}
	made, err := pglogrepl.CreateReplicationSlot(ctx, conn, name, "pgoutput",
		pglogrepl.CreateReplicationSlotOptions{Mode: pglogrepl.LogicalReplication, SnapshotAction: options})
	var refused *pgconn.PgError
	if errors.As(err, &refused) && strings.Contains(refused.Message, "wal_level") {
		err = fmt.Errorf("this Postgres keeps no logical WAL: as a superuser run "+
			"ALTER SYSTEM SET wal_level = logical and restart it, or connect to the server that was meant "+
			"(one of Docker or Homebrew may have taken its port): %w", err)
	}
	if err != nil {
		return 0, "", err
	}
	at, err = pglogrepl.ParseLSN(made.ConsistentPoint)
	return at, made.SnapshotName, err
}

// Import begins a transaction that only reads, in the exported snapshot. It lasts until the connection ends,
// without a limit to its time.
func Import(ctx context.Context, conn *pgx.Conn, snapshot string) error {
	if err := AwaitTransactions(ctx, conn); err != nil {
		return err
	}
	_, err := conn.Exec(ctx, `
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET TRANSACTION SNAPSHOT '`+snapshot+`';
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0`, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return fmt.Errorf("import the slot's snapshot: %w", err)
	}
	return nil
}

// AwaitTransactions waits until every transaction that has begun to write by now has ended.
//
// No exported snapshot may be used before that. It takes for ended whatever has its commit in the WAL, but
// a backend marks its transaction in pg_xact a moment after. A reader in between takes the transaction for
// aborted and leaves that behind in the rows' hint bits, for all to see: an old version of a row comes back
// to life beside the new one. A loop that kills has met it, on Postgres 18.6 and a busy machine: a row whose
// last update was lost for good while another table's row of the same transaction was there.
func AwaitTransactions(ctx context.Context, db Querier) error {
	// A number of one's own is above all that were given out; a snapshot's xmax would not be.
	var end, oldest int64
	if err := db.QueryRow(ctx, `SELECT pg_current_xact_id()::text::bigint`).Scan(&end); err != nil {
		return err
	}
	for {
		err := db.QueryRow(ctx, `SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint`).Scan(&oldest)
		if err != nil || oldest >= end {
			return err
		}
		if err := parts.Sleep(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

// ---------------------------------------------------------------------------------------------------------
// Connection
// ---------------------------------------------------------------------------------------------------------

// Connect opens a replication connection and asks whose WAL it is; Identity.Database is left to the caller,
// since Slot tells it. Postgres frees a slot whose holder has been silent for senderTimeout.
func Connect(ctx context.Context, url, application string, senderTimeout time.Duration) (
	*pgconn.PgConn, Identity, error) {
	var id Identity
	cfg, err := pgconn.ParseConfig(url)
	if err != nil {
		return nil, id, err
	}
	cfg.RuntimeParams["replication"] = "database"
	cfg.RuntimeParams["application_name"] = application
	cfg.RuntimeParams["options"] = strings.TrimSpace(fmt.Sprintf("%s -c wal_sender_timeout=%dms",
		cfg.RuntimeParams["options"], senderTimeout.Milliseconds()))
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, id, err
	}
	sys, err := pglogrepl.IdentifySystem(ctx, conn)
	if err == nil && sys.Timeline > 1 {
		var file pglogrepl.TimelineHistoryResult
		if file, err = pglogrepl.TimelineHistory(ctx, conn, sys.Timeline); err == nil {
			id.History, err = parseTimelineHistory(file.Content)
		}
	}
	if err != nil {
		conn.Close(ctx)
		return nil, id, err
	}
	id.System, id.Timeline = sys.SystemID, sys.Timeline
	return conn, id, nil
}

// Publication is the name of the publication of a table of the present schema: prefix itself, or
// prefix_SCHEMA where several schemas of a database have such a table.
func Publication(ctx context.Context, db Querier, table, prefix string) (name string, err error) {
	err = db.QueryRow(ctx, `
SELECT p.pubname FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
WHERE r.prrelid = to_regclass($1)
  AND p.pubname IN ($2::text::name, ($2::text || '_' || current_schema())::name)
ORDER BY p.pubname LIMIT 1`, table, prefix).Scan(&name)
	if errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("%s is in no publication named %s or %[2]s_SCHEMA: create it as schema.sql does",
			table, prefix)
	}
	return name, err
}

// Start takes the slot and begins its stream. From here on one goroutine may use the connection.
func Start(ctx context.Context, conn *pgconn.PgConn, slot, publication string) error {
	// An identifier, within a string:
	// https://www.postgresql.org/docs/current/protocol-logical-replication.html
	name := strings.ReplaceAll(pgx.Identifier{publication}.Sanitize(), "'", "''")
	options := pglogrepl.StartReplicationOptions{
		PluginArgs: []string{"proto_version '1'", "publication_names '" + name + "'"}}
	// From 0/0, which means from what was confirmed: a start beyond the WAL's end would skip everything
	// without an error.
	err := pglogrepl.StartReplication(ctx, conn, slot, 0, options)
	var refused *pgconn.PgError
	if errors.As(err, &refused) && refused.Code == "55006" { // object_in_use
		return fmt.Errorf("%w: %w", ErrTaken, err)
	}
	return err
}

// Message is one of a stream.
type Message struct {
	Data       []byte        // pgoutput's, lent until the next message; none in a keepalive
	LSN        pglogrepl.LSN // where Data stands, or how far a keepalive's sender has got
	ServerTime time.Time     // when it was sent, by Postgres' clock

	Keepalive      bool
	ReplyRequested bool // Postgres waits for a confirmation
}

// Next waits for the next message, until the connection's read deadline. pgconn.Timeout knows that error.
func Next(conn *pgconn.PgConn) (Message, error) {
	for {
		msg, err := conn.ReceiveMessage(context.Background())
		if err != nil {
			return Message{}, fmt.Errorf("replication connection: %w", err)
		}
		switch msg := msg.(type) {
		case *pgproto3.ErrorResponse:
			return Message{}, fmt.Errorf("replication stream: %w", pgconn.ErrorResponseToPgError(msg))
		case *pgproto3.CopyData:
			switch msg.Data[0] {
			case pglogrepl.PrimaryKeepaliveMessageByteID:
				alive, err := pglogrepl.ParsePrimaryKeepaliveMessage(msg.Data[1:])
				return Message{LSN: alive.ServerWALEnd, ServerTime: alive.ServerTime,
					Keepalive: true, ReplyRequested: alive.ReplyRequested}, err
			case pglogrepl.XLogDataByteID:
				x, err := pglogrepl.ParseXLogData(msg.Data[1:])
				return Message{Data: x.WALData, LSN: x.WALStart, ServerTime: x.ServerTime}, err
			}
		}
	}
}

// Confirm allows Postgres to forget everything that ends before lsn, and asks for an answer. It takes no
// longer than patience.
func Confirm(conn *pgconn.PgConn, lsn pglogrepl.LSN, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_ = conn.Conn().SetWriteDeadline(time.Now().Add(patience))
	// All three positions: pglogrepl copies the first into those that are zero.
	status := pglogrepl.StandbyStatusUpdate{WALWritePosition: lsn, WALFlushPosition: lsn,
		WALApplyPosition: lsn, ReplyRequested: true}
	if err := pglogrepl.SendStandbyStatusUpdate(ctx, conn, status); err != nil {
		return fmt.Errorf("confirm %v: %w", lsn, err)
	}
	return nil
}

// ---------------------------------------------------------------------------------------------------------
// Histories and positions
// ---------------------------------------------------------------------------------------------------------

// Identity is which history of which database WAL positions belong to.
type Identity struct {
	System   string
	Database uint32 // its OID
	Timeline int32
	// History gives where each former timeline ended: empty on the first one.
	History map[int32]pglogrepl.LSN
}

// Descends says whether this server's timeline is that one or split off from it, at whatever point.
func (id *Identity) Descends(timeline int32) bool {
	_, ancestor := id.History[timeline]
	return ancestor || timeline == id.Timeline
}

// Continues says whether what was true at lsn where the mark was made is so here as well: this is its
// server, or a descendant that split off no earlier.
func (id *Identity) Continues(m *Mark, lsn pglogrepl.LSN) bool {
	if m.System != id.System || m.DatabaseOID != id.Database {
		return false
	}
	end, ancestor := id.History[m.Timeline]
	return m.Timeline == id.Timeline || ancestor && lsn <= end
}

// parseTimelineHistory reads a timeline history file: "<timeline>\t<LSN where it ended>\t<why>" per line.
func parseTimelineHistory(file []byte) (map[int32]pglogrepl.LSN, error) {
	history := make(map[int32]pglogrepl.LSN)
	for line := range strings.Lines(string(file)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		timeline, err := strconv.ParseInt(fields[0], 10, 32)
		if err != nil || len(fields) < 2 {
			return nil, fmt.Errorf("timeline history: %.100q", line)
		}
		end, err := pglogrepl.ParseLSN(fields[1])
		if err != nil {
			return nil, fmt.Errorf("timeline history: %w", err)
		}
		history[int32(timeline)] = end
	}
	return history, nil
}

// Position is how far the stream has been consumed: all transactions that end at or before End and, if
// Commit is not zero, the first rows of the one that commits there. A transaction's end is exclusive: the
// next COMMIT may start there.
type Position struct {
	End    pglogrepl.LSN
	Commit pglogrepl.LSN
	Rows   int64
}

// Covered tells how many rows of the transaction that commits at commit were consumed: -1 means all of them.
func (p Position) Covered(commit pglogrepl.LSN) int64 {
	switch {
	case commit < p.End: // not <=: a transaction that starts where the last one ended is a new one
		return -1
	case commit == p.Commit:
		return p.Rows
	}
	return 0
}

// Until is how much of the position a timeline holds that split off at end. Whole is false if it is not all:
// then what was consumed beyond end was never committed there.
func (p Position) Until(end pglogrepl.LSN) (held Position, whole bool) {
	if p.End <= end && p.Commit < end {
		return p, true
	}
	return Position{End: min(p.End, end)}, false
}

// Mark is a position and whose it is, as JSON: what a consumer keeps together with what it made of the
// stream, and goes on from when it starts again.
type Mark struct {
	System      string `json:"system_identifier"`
	DatabaseOID uint32 `json:"database_oid"`
	Timeline    int32  `json:"timeline"`
	Slot        string `json:"slot"`
	EndLSN      string `json:"end_lsn"`
	CommitLSN   string `json:"commit_lsn,omitempty"` // of a transaction that was consumed in part
	Rows        int64  `json:"rows,omitempty"`       // consumed of it
}

// Position is where the mark stands.
func (m *Mark) Position() (p Position, err error) {
	if p.End, err = pglogrepl.ParseLSN(m.EndLSN); err == nil && m.CommitLSN != "" {
		p.Commit, err = pglogrepl.ParseLSN(m.CommitLSN)
		p.Rows = m.Rows
	}
	return p, err
}

// Move sets the mark's position.
func (m *Mark) Move(p Position) {
	m.EndLSN, m.CommitLSN, m.Rows = p.End.String(), "", p.Rows
	if p.Commit != 0 {
		m.CommitLSN = p.Commit.String()
	}
}

// Transactions follows the transactions of a stream, and tells what of them was consumed before.
type Transactions struct {
	from    Position
	open    bool          // between BEGIN and COMMIT
	commit  pglogrepl.LSN // of the last that began
	covered int64         // rows of it that were consumed before: -1 means all
	row     int64
}

// TransactionsFrom follows a stream that is consumed from a position on. It may begin earlier.
func TransactionsFrom(p Position) Transactions { return Transactions{from: p} }

// Open says whether one has begun and not ended.
func (t *Transactions) Open() bool { return t.open }

// CommitLSN is the last one's that began.
func (t *Transactions) CommitLSN() pglogrepl.LSN { return t.commit }

// Begin reads pgoutput's Begin message.
func (t *Transactions) Begin(data []byte) error {
	var m pglogrepl.BeginMessage
	if err := m.Decode(data); err != nil {
		return err
	}
	t.open, t.commit, t.row, t.covered = true, m.FinalLSN, 0, t.from.Covered(m.FinalLSN)
	return nil
}

// Row counts a row of the open transaction, and says whether it was consumed before.
func (t *Transactions) Row() (before bool) {
	t.row++
	return t.covered < 0 || t.row <= t.covered
}

// Inside is the position within the open transaction after its last row, when end is where the one before
// ended.
func (t *Transactions) Inside(end pglogrepl.LSN) Position {
	return Position{End: end, Commit: t.commit, Rows: t.row}
}

// Commit reads pgoutput's Commit message, and says whether the whole transaction was consumed before.
func (t *Transactions) Commit(data []byte) (m pglogrepl.CommitMessage, before bool, err error) {
	if err := m.Decode(data); err != nil {
		return m, false, err
	}
	if m.CommitLSN != t.commit {
		return m, false, fmt.Errorf("transaction began with commit LSN %v and ended with %v",
			t.commit, m.CommitLSN)
	}
	t.open = false
	return m, t.covered < 0, nil
}

// ---------------------------------------------------------------------------------------------------------
// Horizon
// ---------------------------------------------------------------------------------------------------------

// Horizon bounds what somebody has to look at who lost the stream, by no clock: every transaction with a
// number below XID has ended, and what it wrote has been published; what all others wrote lies at or beyond
// Offsets of where it is published to, if it is there at all.
//
// MakeHorizon goes in this order: it reads the offsets; it takes a transaction number of its own, which is
// above all that were given out; it waits until all below that have ended, and notes where the WAL ends
// then; it waits until everything up to there is published. What is below XID had committed before LSN,
// hence it is published. What is not committed after the offsets were read, hence it lies beyond. A
// transaction that is open for an hour only keeps the horizon from moving.
type Horizon struct {
	XID     int64     `json:"xid,string"` // with its epoch: it never wraps
	LSN     string    `json:"lsn"`        // published when this horizon was made
	Offsets []int64   `json:"offsets"`    // by partition
	At      time.Time `json:"at"`         // by Postgres' clock; a release of before 2026-12 asks for it
}

// Beyond says whether a partition of the topic ends before this horizon, and so has lost events since. Nil is
// beyond nothing.
func (h *Horizon) Beyond(ends func() ([]int64, error)) (bool, error) {
	if h == nil {
		return false, nil
	}
	is, err := ends()
	for p := range min(len(is), len(h.Offsets)) {
		if h.Offsets[p] > is[p] {
			return true, nil
		}
	}
	return false, err
}

// MakeHorizon waits for as long as it takes. ends gives the offsets, published how far the stream was.
func MakeHorizon(ctx context.Context, db Querier, ends func() ([]int64, error), published func() uint64) (
	h *Horizon, err error) {
	h = new(Horizon)
	if h.Offsets, err = ends(); err != nil {
		return nil, err
	}
	if h.XID, h.LSN, h.At, err = boundary(ctx, db); err != nil {
		return nil, err
	}
	end, err := pglogrepl.ParseLSN(h.LSN)
	if err != nil {
		return nil, err
	}
	for published() < uint64(end) {
		if err := parts.Sleep(ctx, 50*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// boundary takes the number of a transaction, xid, which is above all that were given out, and waits until
// all below have ended: they committed before the position lsn, or never. at is when it took the number, by
// Postgres' clock. Numbers come with their epoch: they never wrap.
func boundary(ctx context.Context, db Querier) (xid int64, lsn string, at time.Time, err error) {
	query := `SELECT pg_current_xact_id()::text::bigint, clock_timestamp()`
	if err := db.QueryRow(ctx, query).Scan(&xid, &at); err != nil {
		return 0, "", at, fmt.Errorf("number of a transaction: %w", err)
	}
	for oldest := int64(0); oldest < xid; {
		// The snapshot is taken before the position is read.
		err := db.QueryRow(ctx, `
SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint, pg_current_wal_insert_lsn()::text`).Scan(
			&oldest, &lsn)
		if err == nil && oldest < xid {
			err = parts.Sleep(ctx, 200*time.Millisecond)
		}
		if err != nil {
			return 0, "", at, fmt.Errorf("wait for the transactions below %d: %w", xid, err)
		}
	}
	return xid, lsn, at, nil
}
