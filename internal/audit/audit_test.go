package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fake is a ledger and a topic of two partitions, odd keys in partition 1.
type fake struct {
	ledger  []Event         // in order
	now     map[int64]int64 // of the ledger, where it differs from its snapshot
	topic   [2][]Event      // a zero event is something else than an event
	deleted [2]int          // from the head of each partition
	late    Event           // arrives while the topic is read
	looks   int
}

func newFake() *fake {
	f := &fake{now: make(map[int64]int64)}
	for key := int64(1); key <= 4; key++ {
		for number := int64(1); number <= 5; number++ {
			e := Event{key, number, fmt.Appendf(nil, "event %d-%d", key, number)}
			f.ledger = append(f.ledger, e)
			f.topic[key%2] = append(f.topic[key%2], e)
		}
	}
	return f
}

// index is where an event stands in its partition.
func (f *fake) index(key, number int64) (*[]Event, int) {
	list := &f.topic[key%2]
	return list, slices.IndexFunc(*list, func(e Event) bool { return e.Key == key && e.Number == number })
}

func (f *fake) remove(key, number int64) Event {
	list, i := f.index(key, number)
	e := (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	return e
}

// compare compares everything, or where since is there what those keys got from these numbers on, with
// the topic read from the offsets of begins at first.
func (f *fake) compare(t *testing.T, since map[int64]int64, begins [2]int64) (Totals, string, int) {
	var said bytes.Buffer
	report := NewReport(&said)
	eventsOf := func(visit func(Event) error, wanted func(Event) bool) error {
		for _, e := range f.ledger {
			if wanted(e) {
				if err := visit(e); err != nil {
					return err
				}
			}
		}
		return nil
	}
	ledger := Ledger{Noun: "wallet",
		Heads: func(_ context.Context, after int64, n int) (map[int64]int64, int64, error) {
			heads, last := make(map[int64]int64), int64(0)
			for _, e := range f.ledger {
				if e.Key > after {
					heads[e.Key] = e.Number
					last = e.Key
				}
			}
			return heads, last, nil
		},
		Events: func(_ context.Context, after, last int64, visit func(Event) error) error {
			return eventsOf(visit, func(e Event) bool { return e.Key > after && e.Key <= last })
		},
		Lots: func(_ context.Context, n int, do func(*Moved) error) error {
			m := &Moved{Last: 100, Keys: slices.Sorted(maps.Keys(since))}
			for _, key := range m.Keys {
				m.Firsts = append(m.Firsts, since[key])
			}
			return do(m)
		},
		HeadsOf: func(_ context.Context, keys []int64, visit func(key, number int64)) error {
			for _, key := range keys {
				head := int64(0)
				for _, e := range f.ledger {
					if e.Key == key {
						head = e.Number
					}
				}
				visit(key, head)
			}
			return nil
		},
		EventsFrom: func(_ context.Context, m *Moved, visit func(Event) error) error {
			return eventsOf(visit, func(e Event) bool {
				first, moved := since[e.Key]
				return moved && e.Number >= first
			})
		},
		Now: func(_ context.Context, keys []int64, visit func(key, number int64)) error {
			for _, key := range keys {
				now, other := f.now[key]
				for _, e := range f.ledger {
					if e.Key == key && !other {
						now = e.Number
					}
				}
				visit(key, now)
			}
			return nil
		},
	}
	topic := Topic{Partitions: 2,
		Partition: func(key int64) (int32, error) { return int32(key % 2), nil },
		Bounds: func(p int32) (from, to int64, err error) {
			if f.looks++; f.looks == 6 && f.late.Key != 0 {
				f.topic[f.late.Key%2] = append(f.topic[f.late.Key%2], f.late)
			}
			return int64(f.deleted[p]), int64(len(f.topic[p])), nil
		},
		OffsetAt: func(p int32, _ time.Time) (int64, error) { return begins[p], nil },
		Scan: func(_ context.Context, p int32, from, to int64, visit Visit) error {
			for offset := from; offset < to; offset++ {
				e := f.topic[p][offset]
				var err error
				if e.Key == 0 {
					err = errors.New("not an event")
				}
				visit(offset, e, err)
			}
			return nil
		},
	}
	compare := func() (Totals, error) { return Compare(t.Context(), ledger, topic, report) }
	if since != nil {
		compare = func() (Totals, error) {
			return CompareSince(t.Context(), ledger, topic, time.Now(), report)
		}
	}
	totals, err := compare()
	if err != nil {
		t.Fatal(err)
	}
	return totals, said.String(), report.Findings()
}

// TestCompareFinds: each thing that must not be is one finding, and what may be is none.
func TestCompareFinds(t *testing.T) {
	add := func(f *fake, p int32, e Event) { f.topic[p] = append(f.topic[p], e) }
	for name, c := range map[string]struct {
		want  string // among what is said
		n     int    // findings
		stage func(f *fake)
	}{
		"equal": {"", 0, func(f *fake) {}},
		"repeated": {"event 3-5 is repeated", 1, func(f *fake) {
			add(f, 1, Event{3, 5, []byte("event 3-5")})
		}},
		"gap": {"event 2-4 follows number 2: those between are missing", 1, func(f *fake) {
			f.remove(2, 3)
		}},
		"two gaps": {"event 2-4 follows number 2: those between are missing", 1, func(f *fake) {
			f.remove(2, 3)
			f.remove(2, 5) // one finding is enough for a wallet whose order is lost
		}},
		"begins late": {"event 2-2 is the wallet's first: those before it are missing", 1, func(f *fake) {
			f.remove(2, 1)
		}},
		"ends early": {"wallet 3: events 5 to 5 are not in the topic", 1, func(f *fake) {
			f.remove(3, 5)
		}},
		"missing": {"wallet 4: events 1 to 5 are not in the topic", 1, func(f *fake) {
			for n := range int64(5) {
				f.remove(4, n+1)
			}
		}},
		"reordered": {"event 1-5 follows number 3", 2, func(f *fake) {
			list, i := f.index(1, 4)
			(*list)[i], (*list)[i+1] = (*list)[i+1], (*list)[i]
		}},
		"misplaced": {"event 1-1 is in the wrong partition, want 1", 1, func(f *fake) {
			for n := range int64(5) {
				add(f, 0, f.remove(1, n+1))
			}
		}},
		"differing": {"wallet 2: among events 1 to 5 of the topic at least one differs", 1, func(f *fake) {
			list, i := f.index(2, 3)
			(*list)[i].Value = []byte("another")
		}},
		"exchanged": {"wallet 2: among events 1 to 5 of the topic at least one differs", 1, func(f *fake) {
			list, i := f.index(2, 3)
			(*list)[i].Value, (*list)[i+1].Value = (*list)[i+1].Value, (*list)[i].Value
		}},
		"foreign": {"not an event", 1, func(f *fake) {
			add(f, 0, Event{})
		}},
		"invented": {"event 9-1 is in the topic, but the ledger ends at number 0", 1, func(f *fake) {
			add(f, 1, Event{9, 1, nil})
		}},
		"younger": {"", 0, func(f *fake) {
			add(f, 1, Event{1, 6, nil})
			add(f, 1, Event{9, 1, nil})
			f.now[1], f.now[9] = 6, 1
		}},
		"late":         {"", 0, func(f *fake) { f.late = f.remove(4, 5) }},
		"head deleted": {"", 0, func(f *fake) { f.deleted = [2]int{3, 7} }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				c.stage(f)
				_, said, findings := f.compare(t, nil, [2]int64{})
				if findings != c.n || !strings.Contains(said, c.want) {
					t.Errorf("%d findings, want %d, with %q\n%s", findings, c.n, c.want, said)
				}
			})
		})
	}
}

// TestTotals: what is said to have been compared.
func TestTotals(t *testing.T) {
	f := newFake()
	f.topic[1] = append(f.topic[1], Event{1, 6, nil})
	f.now[1] = 6
	if totals, said, _ := f.compare(t, nil, [2]int64{}); totals != (Totals{Keys: 4, Events: 21, Younger: 1}) {
		t.Errorf("%+v\n%s", totals, said)
	}
}

// TestCompareSinceFinds: keys 1 and 2 got their events from number 4 on since. What is wrong with those is
// found, wherever the topic is read from at first; what is wrong before is not asked for.
func TestCompareSinceFinds(t *testing.T) {
	add := func(f *fake, p int32, e Event) { f.topic[p] = append(f.topic[p], e) }
	for name, c := range map[string]struct {
		want  string
		n     int
		stage func(f *fake)
	}{
		"equal":  {"", 0, func(f *fake) {}},
		"before": {"", 0, func(f *fake) { f.ledger[0].Value = []byte("another") }},
		"ends early": {"wallet 1: events 5 to 5 are not in the topic", 1, func(f *fake) {
			f.remove(1, 5)
		}},
		"missing": {"wallet 1: events 4 to 5 are not in the topic", 1, func(f *fake) {
			f.remove(1, 4)
			f.remove(1, 5)
		}},
		"gap": {"event 2-5 follows number 3: those between are missing", 1, func(f *fake) {
			f.remove(2, 4)
		}},
		"differing": {"wallet 2: among events 4 to 5 of the topic at least one differs", 1, func(f *fake) {
			list, i := f.index(2, 4)
			(*list)[i].Value = []byte("another")
		}},
		"repeated": {"event 1-4 is repeated", 1, func(f *fake) { add(f, 1, Event{1, 4, nil}) }},
		"invented": {"event 9-1 is in the topic, but the ledger ends at number 0", 1, func(f *fake) {
			add(f, 1, Event{9, 1, nil})
		}},
		"invented of one that did not move": {"event 4-6 is in the topic, but the ledger ends at number 5", 1,
			func(f *fake) { add(f, 0, Event{4, 6, nil}) }},
		"unmoved ends early": {"wallet 4: events 5 to 5 are not in the topic", 1, func(f *fake) {
			f.remove(4, 5)
		}},
		"younger": {"", 0, func(f *fake) {
			add(f, 1, Event{1, 6, nil})
			f.now[1] = 6
		}},
		"late": {"", 0, func(f *fake) { f.late = f.remove(2, 5) }},
	} {
		for begins, offsets := range map[string][2]int64{"begin": {}, "early": {2, 2}, "late": {9, 9},
			"end": {100, 100}} {
			if begins != "begin" && begins != "early" && name == "unmoved ends early" {
				continue // the reading may begin behind what it has of wallet 4
			}
			t.Run(name+" from the "+begins, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFake()
					c.stage(f)
					totals, said, findings := f.compare(t, map[int64]int64{1: 4, 2: 4}, offsets)
					if findings != c.n || !strings.Contains(said, c.want) || totals.Keys != 2 {
						t.Errorf("%d findings, want %d, with %q, %+v\n%s", findings, c.n, c.want, totals,
							said)
					}
				})
			})
		}
	}
}
