// What an error means for whoever called: by its SQLSTATE
// (https://www.postgresql.org/docs/current/errcodes-appendix.html), or as one of pgx and the network.

package pg

import (
	"errors"
	"io"
	"net"

	"github.com/jackc/pgx/v5/pgconn"
)

// State is an error's SQLSTATE, or empty where it has none.
func State(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
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
