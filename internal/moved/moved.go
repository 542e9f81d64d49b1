// Package moved reads a ledger's log of what moved: which keys got entries since a transaction, and the first
// number that each got. The log is the table moved, which a trigger keeps within the transactions that add
// the entries (schema.sql).
//
// It touches the log only, and removes from it what is told to be old. It promises that a key that moved is
// never left out, whatever clocks do and however long transactions take, and that memory stays bounded
// whatever moved.
package moved

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// Lot is some of the keys that moved: all of those above After and up to Upto.
type Lot struct {
	After, Upto int64
	Keys        []int64         // in order
	First       map[int64]int64 // the first number that each got
}

// Stream visits what moved: keys and, of each, a number. A key may come again, with another number: the
// lowest one counts. It is called again for each further lot. What is visited is lent.
type Stream func(visit func(keys, numbers []int64)) error

// Lots hands what moved to do, in lots of at most max keys by their order.
func Lots(stream Stream, max int, do func(*Lot) error) error {
	for after := int64(0); ; {
		l := &Lot{After: after, Upto: math.MaxInt64, First: make(map[int64]int64)}
		err := stream(func(keys, numbers []int64) {
			for i, key := range keys {
				if key <= l.After || key > l.Upto {
					continue
				}
				if first, known := l.First[key]; !known || numbers[i] < first {
					l.First[key] = numbers[i]
				}
			}
			if len(l.First) > 2*max {
				l.cut(max)
			}
		})
		if err != nil {
			return err
		}
		l.cut(max)
		if err := do(l); err != nil || l.Upto == math.MaxInt64 {
			return err
		}
		after = l.Upto
	}
}

// cut keeps the lowest keys, at most max of them.
func (l *Lot) cut(max int) {
	l.Keys = l.Keys[:0]
	for key := range l.First {
		l.Keys = append(l.Keys, key)
	}
	slices.Sort(l.Keys)
	if len(l.Keys) <= max {
		return
	}
	for _, key := range l.Keys[max:] {
		delete(l.First, key)
	}
	l.Keys = l.Keys[:max]
	l.Upto = l.Keys[max-1]
}

// Querier is a pool, a connection or a transaction.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Since streams what moved by the transactions numbered xid and above.
func Since(ctx context.Context, db Querier, xid int64) Stream {
	return func(visit func(keys, numbers []int64)) error {
		rows, _ := db.Query(ctx, `SELECT ids, seqs FROM moved WHERE xid >= $1`, xid)
		var keys, numbers []int64
		_, err := pgx.ForEachRow(rows, []any{&keys, &numbers}, func() error {
			if len(keys) != len(numbers) {
				return fmt.Errorf("a row names %d keys and %d numbers", len(keys), len(numbers))
			}
			visit(keys, numbers)
			return nil
		})
		if err != nil {
			return fmt.Errorf("read what moved: %w", err)
		}
		return nil
	}
}

// From is the number of a transaction: it and all above are in the log.
func From(ctx context.Context, db Querier) (xid int64, err error) {
	if err := db.QueryRow(ctx, `SELECT from_xid FROM moved_kept`).Scan(&xid); err != nil {
		return 0, fmt.Errorf("read from where on the log of what moved is whole: %w", err)
	}
	return xid, nil
}

// Point finds where in the log a moment by Postgres' clock is: every transaction that had not ended then has
// this number or one above. known is false where the log begins later.
func Point(ctx context.Context, db Querier, at time.Time) (xid int64, known bool, err error) {
	low, err := From(ctx, db)
	if err != nil {
		return 0, false, err
	}
	var high int64
	if err := db.QueryRow(ctx, `SELECT coalesce(max(xid), 0) + 1 FROM moved`).Scan(&high); err != nil {
		return 0, false, fmt.Errorf("end of the log of what moved: %w", err)
	}
	for low < high { // between what was written before and after; numbers and times rise together
		middle := low + (high-low)/2
		var found, oldest int64
		var written time.Time
		err := db.QueryRow(ctx, `
SELECT xid, xid_oldest, at FROM moved WHERE xid >= $1 ORDER BY xid LIMIT 1`, middle).Scan(
			&found, &oldest, &written)
		if err != nil {
			return 0, false, fmt.Errorf("look for %v in the log of what moved: %w", at, err)
		}
		if found < high && written.Before(at) {
			xid, known, low = oldest, true, found+1
		} else {
			high = middle
		}
	}
	return xid, known, nil
}

// Forget removes what is older than age, if its transaction's number is below.
func Forget(ctx context.Context, db Querier, below int64, age time.Duration) error {
	const bites = 20 // of 10,000 rows each, and one a minute is more than a busy ledger adds
	for range bites {
		var more bool
		err := db.QueryRow(ctx, `SELECT moved_forget($1, $2)`, below, age).Scan(&more)
		if err != nil {
			return fmt.Errorf("forget what moved long ago: %w", err)
		}
		if !more {
			break
		}
	}
	return nil
}
