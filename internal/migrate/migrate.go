// Package migrate applies an SQL file to a Postgres database that others are using, step by step.
//
// It touches what the file says. It promises that each step is wholly applied or not at all, that it is tried
// again rather than waited for where somebody holds a lock (whoever waits for a table's lock holds up all who
// come after), and that replicas that start together take turns.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Step is one transaction of a file.
type Step struct {
	Version    int // that it belongs to
	Title, SQL string
}

var stepLine = regexp.MustCompile(`(?m)^-- step ([0-9]+): (.*)$`)

// Steps splits a file at its lines "-- step VERSION: title". What stands before the first one is left out.
func Steps(file string) []Step {
	var steps []Step
	marks := stepLine.FindAllStringSubmatchIndex(file, -1)
	for i, m := range marks {
		end := len(file)
		if i+1 < len(marks) {
			end = marks[i+1][0]
		}
		version, _ := strconv.Atoi(file[m[2]:m[3]])
		steps = append(steps, Step{version, file[m[4]:m[5]], file[m[1]:end]})
	}
	return steps
}

const (
	lockTimeout = `SET LOCAL lock_timeout = '200ms'` // for any one lock, while others queue behind us
	pauseMax    = time.Second                        // between two tries
)

// Apply runs, one after the other, the steps of later versions than the database has. version reads that, under
// the advisory lock named name; settings are those of each step's transaction. It says whether it ran any.
func Apply(ctx context.Context, conn *pgx.Conn, name string, steps []Step, settings map[string]string,
	version func(context.Context, *pgx.Conn) (int, error)) (applied bool, err error) {
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtext($1))`, name); err != nil {
		return false, err
	}
	defer conn.Exec(context.Background(), `SELECT pg_advisory_unlock(hashtext($1))`, name)
	has, err := version(ctx, conn)
	if err != nil {
		return false, err
	}
	for _, s := range steps {
		if s.Version <= has {
			continue
		}
		err := patiently(ctx, func() error {
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, lockTimeout); err != nil {
					return err
				}
				for name, value := range settings {
					if _, err := tx.Exec(ctx, `SELECT set_config($1, $2, true)`, name, value); err != nil {
						return err
					}
				}
				_, err := tx.Conn().PgConn().Exec(ctx, s.SQL).ReadAll()
				return err
			})
		})
		if err != nil {
			return applied, fmt.Errorf("step %d (%s): %w", s.Version, s.Title, err)
		}
		applied = true
	}
	return applied, nil
}

// patiently calls try, under a short lock_timeout, until nobody's lock is in its way.
func patiently(ctx context.Context, try func() error) error {
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, pauseMax) {
		err := try()
		var pgErr *pgconn.PgError
		if !errors.As(err, &pgErr) || pgErr.Code != "55P03" { // lock_not_available
			return err
		}
		slog.Info("migration waits for a lock", "reason", pgErr.Message)
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return err
		}
	}
}

// Validate validates the constraints of the present schema that are NOT VALID: they bind what is new already,
// and this checks what is old. It reads whole tables, under a lock that neither readers nor writers wait for.
func Validate(ctx context.Context, conn *pgx.Conn, name string) error {
	var ours bool
	err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock(hashtext($1))`, name+".validate").Scan(&ours)
	if err != nil || !ours {
		return err // somebody else is at it
	}
	defer conn.Exec(context.Background(), `SELECT pg_advisory_unlock(hashtext($1))`, name+".validate")
	rows, _ := conn.Query(ctx, `
SELECT format('ALTER TABLE %s VALIDATE CONSTRAINT %I', conrelid::regclass, conname) FROM pg_constraint
WHERE NOT convalidated AND connamespace = current_schema()::regnamespace ORDER BY oid`)
	commands, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, command := range commands {
		err := patiently(ctx, func() error {
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				for _, sql := range []string{lockTimeout, `SET LOCAL statement_timeout = 0`, command} {
					if _, err := tx.Exec(ctx, sql); err != nil {
						return err
					}
				}
				return nil
			})
		})
		if err != nil {
			return fmt.Errorf("%s: %w", strings.TrimPrefix(command, "ALTER TABLE "), err)
		}
	}
	return nil
}
