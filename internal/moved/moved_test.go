package moved

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestLots: every key that moved is in one lot, with its lowest number; lots are in order and of at most max
// keys, and memory never holds more than twice that and one row's.
func TestLots(t *testing.T) {
	for _, max := range []int{1, 3, 10, 1000} {
		t.Run(fmt.Sprint(max), func(t *testing.T) {
			dice := rand.New(rand.NewPCG(1, uint64(max)))
			type row struct{ keys, numbers []int64 }
			var rows []row
			want := make(map[int64]int64)
			for range 50 {
				var r row
				for range dice.IntN(8) {
					key, number := 1+dice.Int64N(60), 1+dice.Int64N(1000)
					r.keys, r.numbers = append(r.keys, key), append(r.numbers, number)
					if first, known := want[key]; !known || number < first {
						want[key] = number
					}
				}
				rows = append(rows, r)
			}
			got, last := make(map[int64]int64), int64(0)
			err := Lots(func(visit func(keys, numbers []int64)) error {
				for _, r := range rows {
					visit(r.keys, r.numbers)
				}
				return nil
			}, max, func(l *Lot) error {
				if l.After != last || len(l.Keys) > max || len(l.Keys) != len(l.First) ||
					!slices.IsSorted(l.Keys) {
					t.Errorf("%+v follows %d", l, last)
				}
				last = l.Upto
				for key, first := range l.First {
					if _, twice := got[key]; twice || key <= l.After || key > l.Upto {
						t.Errorf("key %d is in the lot from %d to %d, twice %v", key, l.After, l.Upto, twice)
					}
					got[key] = first
				}
				return nil
			})
			if err != nil || !maps.Equal(got, want) || last != math.MaxInt64 {
				t.Errorf("%v up to %d, want %v; %v", got, last, want, err)
			}
		})
	}
}

// TestLotsFail: an error of either side is the end.
func TestLotsFail(t *testing.T) {
	wrong := fmt.Errorf("wrong")
	two := func(visit func(keys, numbers []int64)) error { visit([]int64{1, 2}, []int64{1, 1}); return nil }
	calls := 0
	if err := Lots(two, 1, func(*Lot) error { calls++; return wrong }); err != wrong || calls != 1 {
		t.Errorf("%v after %d lots", err, calls)
	}
	if err := Lots(func(func(keys, numbers []int64)) error { return wrong }, 1, nil); err != wrong {
		t.Error(err)
	}
}
