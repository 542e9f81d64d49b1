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
	"maps"
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

// Schema is what a service's database must have.
type Schema struct {
	File      string   // see Steps
	Version   int      // of its last step
	ServerMin int      // as server_version_num: 150000
	Table     string   // holds the versions that were applied: version, and since some of them program_min
	Tables    []string // further ones that say, where Table is missing, that the database is somebody else's
}

// Unfit is why a database can never do, in one sentence that says what to do.
type Unfit struct{ why string }

func (u Unfit) Error() string { return u.why }

func unfit(format string, args ...any) error { return Unfit{fmt.Sprintf(format, args...)} }

// Has is the version that the database has; 0 where it has none of the tables. Tables of the same names that
// are not ours are Unfit, and so is a schema that asks for a newer program.
func (s *Schema) Has(ctx context.Context, db interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}) (int, error) {
	var ours bool
	var server int
	var foreign string
	err := db.QueryRow(ctx, `
SELECT current_setting('server_version_num')::int, to_regclass($1) IS NOT NULL,
       coalesce((SELECT string_agg(t, ', ') FROM unnest($2::text[]) AS t
                 WHERE to_regclass(t) IS NOT NULL), '')`,
		s.Table, s.Tables).Scan(&server, &ours, &foreign)
	switch {
	case err != nil:
		return 0, err
	case server < s.ServerMin:
		return 0, unfit("this Postgres is too old (server_version_num %d): use version %d or later", server,
			s.ServerMin/10000)
	case !ours && foreign != "":
		return 0, unfit("this database has tables of our names that are not ours (%s): "+
			"give the service a database of its own", foreign)
	case !ours:
		return 0, nil
	}
	var version, least int
	err = db.QueryRow(ctx, `
SELECT coalesce(max(version), 0), coalesce(max((to_jsonb(s) ->> 'program_min')::int), 0) FROM `+s.Table+` s`,
	).Scan(&version, &least)
	if err == nil && least > s.Version {
		return version, unfit("the schema is at version %d and asks for a program that knows version %d, "+
			"this one knows %d: run a newer release", version, least, s.Version)
	}
	return version, err
}

// Apply runs, one after the other, the steps of later versions than the database has; settings are those of
// each step's transaction, besides a search_path of the present schema. It returns the version of before.
func (s *Schema) Apply(ctx context.Context, conn *pgx.Conn, settings map[string]string) (has int, err error) {
	if has, err = s.Has(ctx, conn); err != nil || has >= s.Version {
		return has, err
	}
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtext($1))`, s.lock()); err != nil {
		return has, err
	}
	defer conn.Exec(context.Background(), `SELECT pg_advisory_unlock(hashtext($1))`, s.lock())
	if has, err = s.Has(ctx, conn); err != nil || has >= s.Version {
		return has, err // another replica came first
	}
	settings = maps.Clone(settings)
	settings["client_min_messages"] = "warning"
	var path string
	err = conn.QueryRow(ctx, `SELECT quote_ident(current_schema()) || ', pg_temp'`).Scan(&path)
	if err != nil {
		return has, err
	}
	settings["search_path"] = path
	for _, step := range Steps(s.File) {
		if step.Version <= has {
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
				_, err := tx.Conn().PgConn().Exec(ctx, step.SQL).ReadAll()
				return err
			})
		})
		if err != nil {
			return has, fmt.Errorf("step %d (%s): %w", step.Version, step.Title, err)
		}
	}
	slog.Info("schema applied", "version", s.Version)
	return has, nil
}

// lock is the name of the advisory lock that one migration holds.
func (s *Schema) lock() string { return strings.Replace(s.Table, "_", ".", 1) }

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
func (s *Schema) Validate(ctx context.Context, conn *pgx.Conn) error {
	name := s.lock()
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
