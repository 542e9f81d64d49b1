package pg

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestMeaning(t *testing.T) {
	of := func(state string) error { return fmt.Errorf("wrapped: %w", &pgconn.PgError{Code: state}) }
	for _, c := range []struct {
		err                 error
		passes, unreachable bool
	}{
		{of("40P01"), true, true}, {of("57014"), true, true}, {of("25006"), true, true}, {of("53100"), true,
			true},
		{of("23514"), false, false}, {of("42P01"), false, false}, {of("22003"), false, false},
		{errors.New("something else"), true, false}, {io.ErrUnexpectedEOF, true, true},
		{context.DeadlineExceeded, true, true},
	} {
		if Passes(c.err) != c.passes || Unreachable(c.err) != c.unreachable {
			t.Errorf("%v: passes %v, unreachable %v", c.err, Passes(c.err), Unreachable(c.err))
		}
	}
	for _, c := range []struct {
		err               *pgconn.PgError
		state, constraint string
		noPartition       bool
	}{
		{&pgconn.PgError{Code: "23505", ConstraintName: "wallet_pkey"}, "23505", "wallet_pkey", false},
		{&pgconn.PgError{Code: "23505", ConstraintName: "wallet_pkey_102216"}, "23505", "wallet_pkey", false},
		{&pgconn.PgError{Code: "23514", ConstraintName: "note_at_most_8"}, "23514", "note_at_most_8", false},
		{&pgconn.PgError{Code: "23514", Message: `no partition of relation "outbox" found for row`},
			"23514", "", true},
		{&pgconn.PgError{Code: "23514", Message: `new row violates check constraint "x"`},
			"23514", "", false},
		{&pgconn.PgError{Code: "XX000",
			Message: `duplicate key value violates unique constraint "wallet_pkey_102216"`},
			"23505", "wallet_pkey", false},
		{&pgconn.PgError{Code: "XX000",
			Message: `insert or update on table "e" violates foreign key constraint "f_102009"`},
			"23503", "f", false},
		{&pgconn.PgError{Code: "XX000", Message: `no partition of relation "outbox_102300" found for row`},
			"23514", "", true},
		{&pgconn.PgError{Code: "XX000", Message: "tuple concurrently updated"}, "XX000", "", false},
	} {
		err := fmt.Errorf("wrapped: %w", c.err)
		if State(err) != c.state || Constraint(err) != c.constraint || NoPartition(err) != c.noPartition {
			t.Errorf("%+v: state %s, constraint %s, no partition %v", c.err, State(err), Constraint(err),
				NoPartition(err))
		}
	}
	if Constraint(io.EOF) != "" || NoPartition(io.EOF) {
		t.Error("of no error of Postgres")
	}
	if State(of("40P01")) != "40P01" || State(io.EOF) != "" {
		t.Error("SQLSTATE")
	}
}
