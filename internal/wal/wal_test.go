package wal

import (
	"testing"

	"github.com/jackc/pglogrepl"
)

// TestTimelineHistory: as Postgres writes the file, and nonsense.
func TestTimelineHistory(t *testing.T) {
	history, err := parseTimelineHistory([]byte(
		"1\t0/3000060\tno recovery target specified\n\n# by hand\n2\t1/A0\tbefore 2026-01-02\n"))
	if err != nil || len(history) != 2 || history[1] != 0x3000060 || history[2] != 0x1000000A0 {
		t.Fatalf("%v, %v", history, err)
	}
	for _, nonsense := range []string{"1\tnonsense\n", "1\n", "x\t0/1\twhy\n"} {
		if history, err := parseTimelineHistory([]byte(nonsense)); err == nil {
			t.Errorf("%q was read as %v", nonsense, history)
		}
	}
}

// TestContinues: a position holds on its own timeline, and on one that split off at or after it.
func TestContinues(t *testing.T) {
	id := Identity{System: "7", Database: 5, Timeline: 3, History: map[int32]pglogrepl.LSN{1: 100, 2: 200}}
	for _, c := range []struct {
		name     string
		system   string
		database uint32
		timeline int32
		lsn      pglogrepl.LSN
		want     bool
		descends bool
	}{
		{"this timeline", "7", 5, 3, 900, true, true},
		{"a former one, before its end", "7", 5, 1, 99, true, true},
		{"a former one, at its end", "7", 5, 1, 100, true, true},
		{"a former one, after its end", "7", 5, 1, 101, false, true},
		{"the one between", "7", 5, 2, 101, true, true},
		{"a sibling", "7", 5, 4, 1, false, false},
		{"another system", "8", 5, 3, 1, false, true},
		{"another database", "7", 6, 3, 1, false, true},
	} {
		if got := id.Continues(c.system, c.database, c.timeline, c.lsn); got != c.want {
			t.Errorf("%s: continues: %v", c.name, got)
		}
		if got := id.Descends(c.timeline); got != c.descends {
			t.Errorf("%s: descends: %v", c.name, got)
		}
	}
	first := Identity{System: "7", Database: 5, Timeline: 1}
	if !first.Continues("7", 5, 1, 900) || first.Continues("7", 5, 2, 1) || first.Descends(2) {
		t.Error("a first timeline has no history")
	}
}

// TestCoversWholeTransactions: a transaction was consumed if and only if it committed before the position's
// end.
func TestCoversWholeTransactions(t *testing.T) {
	for _, c := range []struct {
		name   string
		p      Position
		commit pglogrepl.LSN
		want   int64
	}{
		{"before", Position{End: 100}, 99, -1},
		{"begins exactly where the position ends", Position{End: 100}, 100, 0},
		{"after", Position{End: 100}, 101, 0},
		{"consumed in part", Position{End: 100, Commit: 140, Rows: 7}, 140, 7},
		{"before one consumed in part", Position{End: 100, Commit: 140, Rows: 7}, 99, -1},
		{"after one consumed in part", Position{End: 100, Commit: 140, Rows: 7}, 141, 0},
	} {
		if got := c.p.Covered(c.commit); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// TestPositionOnALaterTimeline: one that split off at 100.
func TestPositionOnALaterTimeline(t *testing.T) {
	for _, c := range []struct {
		from, want Position
		whole      bool
	}{
		{Position{End: 90}, Position{End: 90}, true},
		{Position{End: 100}, Position{End: 100}, true},
		{Position{End: 110}, Position{End: 100}, false},
		{Position{End: 90, Commit: 95, Rows: 3}, Position{End: 90, Commit: 95, Rows: 3}, true},
		{Position{End: 90, Commit: 100, Rows: 3}, Position{End: 90}, false}, // a commit of the other timeline
	} {
		if got, whole := c.from.Until(100); got != c.want || whole != c.whole {
			t.Errorf("%v: %v, %v", c.from, got, whole)
		}
	}
}
