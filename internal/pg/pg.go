// Package pg connects a service to Postgres that asks for rows by their keys, in short transactions, and must
// not lose what it acknowledged.
//
// It touches its connections' settings only. It promises that no statement reads a whole table, that no
// stalled client holds locks for long, and that a commit is on disk when it is answered.
package pg

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Pool makes a pool of connections. No connection is made before the first is needed; entered is told of each
// one which ledger of the world it leads to (system, database, schema) and which life of its server
// (timeline, start). It may be nil. Each of the settings below may stand in the URL instead, as in
// ?plan_cache_mode=auto, which a coordinator of several nodes needs.
func Pool(url, name string, connections int, entered func(database, life string)) (*pgxpool.Pool, error) {
	pool, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	pool.MaxConns = int32(connections)
	pool.MaxConnIdleTime = 10 * time.Minute
	pool.ConnConfig.ConnectTimeout = 3 * time.Second
	for name, value := range map[string]string{
		"application_name": name,
		// A statement prepared while its table is empty is planned for an empty table and stays so. All of
		// ours are lookups by an index: leave the planner nothing else, plan once, and do not compile.
		"enable_seqscan":   "off",
		"enable_hashjoin":  "off",
		"enable_mergejoin": "off",
		"plan_cache_mode":  "force_generic_plan",
		"jit":              "off",
		// A stalled writer holds row locks that stall every replica; each of these makes its batch run again.
		"lock_timeout":                        "500ms",
		"statement_timeout":                   "4s",
		"idle_in_transaction_session_timeout": "2s",
		"tcp_user_timeout":                    "5s",
		"tcp_keepalives_idle":                 "5",
		"tcp_keepalives_interval":             "2",
		"tcp_keepalives_count":                "3",
	} {
		if _, given := pool.ConnConfig.RuntimeParams[name]; !given { // the URL's own comes first
			pool.ConnConfig.RuntimeParams[name] = value
		}
	}
	pool.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		// Fails on a standby, as it should. An acknowledged write is on disk: asynchronous commit is not for
		// us.
		var database, life string
		err := conn.QueryRow(ctx, `
SELECT format('%s.%s.%s', system_identifier, d.oid, current_schema()),
       format('%s.%s', substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8),
              extract(epoch FROM pg_postmaster_start_time())),
       CASE WHEN current_setting('synchronous_commit') = 'off'
            THEN set_config('synchronous_commit', 'on', false) END
FROM pg_control_system(), pg_database d WHERE d.datname = current_database()`).Scan(&database, &life, nil)
		if err == nil && entered != nil {
			entered(database, life)
		}
		return err
	}
	return pgxpool.NewWithConfig(context.Background(), pool)
}
