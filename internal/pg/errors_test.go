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
	if State(of("40P01")) != "40P01" || State(io.EOF) != "" {
		t.Error("SQLSTATE")
	}
}
