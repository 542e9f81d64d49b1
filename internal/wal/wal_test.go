package wal

import (
	"encoding/binary"
	"encoding/json"
	"errors"
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
		mark     Mark
		lsn      pglogrepl.LSN
		want     bool
		descends bool
	}{
		{"this timeline", Mark{System: "7", DatabaseOID: 5, Timeline: 3}, 900, true, true},
		{"a former one, before its end", Mark{System: "7", DatabaseOID: 5, Timeline: 1}, 99, true, true},
		{"a former one, at its end", Mark{System: "7", DatabaseOID: 5, Timeline: 1}, 100, true, true},
		{"a former one, after its end", Mark{System: "7", DatabaseOID: 5, Timeline: 1}, 101, false, true},
		{"the one between", Mark{System: "7", DatabaseOID: 5, Timeline: 2}, 101, true, true},
		{"a sibling", Mark{System: "7", DatabaseOID: 5, Timeline: 4}, 1, false, false},
		{"another system", Mark{System: "8", DatabaseOID: 5, Timeline: 3}, 1, false, true},
		{"another database", Mark{System: "7", DatabaseOID: 6, Timeline: 3}, 1, false, true},
	} {
		if got := id.Continues(&c.mark, c.lsn); got != c.want {
			t.Errorf("%s: continues: %v", c.name, got)
		}
		if got := id.Descends(c.mark.Timeline); got != c.descends {
			t.Errorf("%s: descends: %v", c.name, got)
		}
	}
	first := Identity{System: "7", Database: 5, Timeline: 1}
	own := Mark{System: "7", DatabaseOID: 5, Timeline: 1}
	other := Mark{System: "7", DatabaseOID: 5, Timeline: 2}
	if !first.Continues(&own, 900) || first.Continues(&other, 1) || first.Descends(2) {
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

// TestMarkKeepsItsPosition: through JSON and back, whole and in part.
func TestMarkKeepsItsPosition(t *testing.T) {
	m := Mark{System: "7", DatabaseOID: 5, Timeline: 2, Slot: "s"}
	for _, c := range []struct {
		p    Position
		want string
	}{
		{Position{End: 0x16B374D848, Commit: 0x16B374D900, Rows: 3},
			`,"end_lsn":"16/B374D848","commit_lsn":"16/B374D900","rows":3}`},
		{Position{End: 0x16B374D900}, `,"end_lsn":"16/B374D900"}`},
	} {
		m.Move(c.p)
		text, err := json.Marshal(m)
		want := `{"system_identifier":"7","database_oid":5,"timeline":2,"slot":"s"` + c.want
		if err != nil || string(text) != want {
			t.Errorf("%s, %v, want %s", text, err, want)
		}
		var read Mark
		if err := json.Unmarshal(text, &read); err != nil {
			t.Error(err)
		}
		if p, err := read.Position(); err != nil || p != c.p {
			t.Errorf("%v, %v, want %v", p, err, c.p)
		}
	}
	for _, bad := range []Mark{{}, {EndLSN: "x"}, {EndLSN: "0/1", CommitLSN: "x"}} {
		if p, err := bad.Position(); err == nil {
			t.Errorf("%+v is at %v", bad, p)
		}
	}
}

func begin(commit pglogrepl.LSN) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(commit)), make([]byte, 8+4)...)
}

func commit(at, end pglogrepl.LSN) []byte {
	data := binary.BigEndian.AppendUint64([]byte{0}, uint64(at))
	return append(binary.BigEndian.AppendUint64(data, uint64(end)), make([]byte, 8)...)
}

// TestBeyond: a horizon lies beyond a topic that has lost the end of any partition.
func TestBeyond(t *testing.T) {
	none := (*Horizon)(nil)
	h := &Horizon{Offsets: []int64{5, 0, 7}}
	for _, c := range []struct {
		horizon *Horizon
		ends    []int64
		beyond  bool
	}{
		{none, []int64{0, 0, 0}, false}, {h, []int64{5, 0, 7}, false}, {h, []int64{9, 9, 9}, false},
		{h, []int64{5, 0, 6}, true}, {h, []int64{4, 9, 9}, true}, {h, []int64{0, 0, 0}, true},
	} {
		beyond, err := c.horizon.Beyond(func() ([]int64, error) { return c.ends, nil })
		if beyond != c.beyond || err != nil {
			t.Errorf("%v of ends %v: %v, %v", c.horizon, c.ends, beyond, err)
		}
	}
	lost := errors.New("lost")
	if _, err := h.Beyond(func() ([]int64, error) { return nil, lost }); err != lost {
		t.Errorf("an error of Kafka's: %v", err)
	}
}

// TestTransactionsAreConsumedOnce: a stream that begins before the position, which lies inside of a
// transaction.
func TestTransactionsAreConsumedOnce(t *testing.T) {
	tx := TransactionsFrom(Position{End: 100, Commit: 140, Rows: 2})
	for _, c := range []struct {
		commit, end pglogrepl.LSN
		rows        []bool // which were consumed before
		before      bool
	}{
		{90, 100, []bool{true, true, true}, true},
		{140, 150, []bool{true, true, false}, false},
		{150, 160, []bool{false, false}, false},
	} {
		if tx.Open() {
			t.Errorf("before %v: open", c.commit)
		}
		if err := tx.Begin(begin(c.commit)); err != nil || !tx.Open() || tx.CommitLSN() != c.commit {
			t.Fatalf("%+v, %v", tx, err)
		}
		for i, want := range c.rows {
			if before := tx.Row(); before != want {
				t.Errorf("%v, row %d: %v", c.commit, i+1, before)
			}
			if p := tx.Inside(7); p != (Position{End: 7, Commit: c.commit, Rows: int64(i + 1)}) {
				t.Errorf("%v, row %d: at %v", c.commit, i+1, p)
			}
		}
		m, before, err := tx.Commit(commit(c.commit, c.end))
		if err != nil || before != c.before || m.TransactionEndLSN != c.end || tx.Open() {
			t.Errorf("%v: %+v, %v, %v", c.commit, m, before, err)
		}
	}
	if err := tx.Begin(begin(200)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tx.Commit(commit(201, 210)); err == nil {
		t.Error("another transaction's end was taken for this one's")
	}
	if _, _, err := tx.Commit(nil); err == nil || tx.Begin(nil) == nil {
		t.Error("an empty message was read")
	}
}
