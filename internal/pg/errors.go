// What an error means for whoever called: by its SQLSTATE
// (https://www.postgresql.org/docs/current/errcodes-appendix.html), or as one of pgx and the network.

package pg

import (
	"errors"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// State is an error's SQLSTATE, or empty where it has none. A coordinator of several nodes passes some errors
// on as internal ones (XX000, seen of Citus), whose text is still that of the node: then it is that text's.
func State(err error) string {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return ""
	}
	if pgErr.Code == "XX000" {
		for text, state := range map[string]string{
			"duplicate key value violates unique constraint ": "23505",
			"violates foreign key constraint ":                "23503",
			"violates check constraint ":                      "23514",
			"no partition of relation ":                       "23514",
		} {
			if strings.Contains(pgErr.Message, text) {
				return state
			}
		}
	}
	return pgErr.Code
}

// Constraint is the name of the constraint that an error is about, or empty. A shard's has its number behind
// it (wallet_pkey_102216), which is left out, and from a coordinator it may be in the text only.
func Constraint(err error) string {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return ""
	}
	name := pgErr.ConstraintName
	if name == "" && pgErr.Code == "XX000" {
		if _, after, found := strings.Cut(pgErr.Message, ` constraint "`); found {
			name, _, _ = strings.Cut(after, `"`)
		}
	}
	if i := strings.LastIndexByte(name, '_'); i > 0 && len(name)-i > 6 &&
		strings.Trim(name[i+1:], "0123456789") == "" {
		name = name[:i] // shards are numbered from 102008 on
	}
	return name
}

// NoPartition says whether a row was for a partition that is not there.
func NoPartition(err error) bool {
	var pgErr *pgconn.PgError
	return State(err) == "23514" && errors.As(err, &pgErr) &&
		strings.Contains(pgErr.Message, "no partition of relation ")
}

// Passes says whether a transaction that failed may succeed when it is run again as it was. Of an error
// without SQLSTATE (a lost connection, a timeout) nobody knows the outcome: it passes as well.
func Passes(err error) bool {
	state := State(err)
	if state == "" {
		return true
	}
	switch state[:2] {
	case "08", // connection exception
		"55", // lock_timeout
		"25", // idle_in_transaction_session_timeout; read-only after a failover
		"40", // serialization failure, deadlock
		"53", // out of connections, disk, memory
		"57", // statement_timeout, shutdown, crash, not up yet
		"58": // system error
		return true
	}
	return false
}

// Unreachable says whether a read failed because Postgres was not there, too slow, or not as a primary.
func Unreachable(err error) bool {
	var connectErr *pgconn.ConnectError
	var netErr net.Error
	switch {
	case pgconn.Timeout(err), errors.As(err, &connectErr), errors.As(err, &netErr), errors.Is(err, io.EOF),
		errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return true
	}
	return State(err) != "" && Passes(err)
}
