// A violation, made small. Each step weakens what is demanded of the history: if the smaller one cannot be,
// neither can the whole. A write cannot simply be left out, since those after it carry higher seqs; so its
// time is widened to "whenever", and those that everything else comes after become the state that the rest
// starts from.

package lin

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

const (
	checkLimit  = 60 * time.Second // of one group's check; it takes milliseconds
	shrinkLimit = 2 * time.Second  // of each smaller one; one that takes longer counts as possible
	shrinkMost  = 40 * time.Second // of all of them
	partReads   = 12
	whenever    = int64(math.MaxInt64 / 4)
)

type violation struct {
	model model
	ops   []porcupine.Operation
	until time.Time // when to be content with what there is
}

func input(op porcupine.Operation) *request   { return op.Input.(*request) }
func output(op porcupine.Operation) *response { return op.Output.(*response) }
func writes(op porcupine.Operation) bool      { return input(op).writes(output(op)) }

func (v violation) stands() bool { return v.check(shrinkLimit) == porcupine.Illegal }

func (v violation) check(limit time.Duration) porcupine.CheckResult {
	ops, possible := v.model.order(v.ops)
	if !possible {
		return porcupine.Illegal
	}
	return porcupine.CheckOperationsTimeout(v.model.porcupine(), ops, limit)
}

// find looks for a violation: first in parts, each of one wallet's writes and some of what else was answered
// about it, then in the whole. What cannot be is seen in a part within milliseconds, where the whole, with
// its many reads side by side, might take for ever; what can be is seen in the whole as fast.
func (v violation) find(limit time.Duration) (porcupine.CheckResult, violation) {
	for i := range groupSize {
		if !v.model.wallets[i] {
			continue
		}
		one := model{start: v.model.start}
		one.wallets[i] = true
		var moved, rest []porcupine.Operation
		for _, op := range v.ops {
			switch {
			case !one.touches(input(op), output(op)):
			case writes(op):
				moved = append(moved, op)
			default:
				rest = append(rest, op)
			}
		}
		for some := range slices.Chunk(rest, partReads) {
			part := violation{model: one, ops: slices.Concat(moved, some)}
			if part.stands() {
				return porcupine.Illegal, part
			}
		}
	}
	return v.check(limit), v
}

// try puts a smaller one in v's place if it is still impossible.
func (v *violation) try(smaller violation) bool {
	if smaller.until = v.until; time.Now().Before(v.until) && smaller.stands() {
		*v = smaller
		return true
	}
	return false
}

func (v *violation) shrink() {
	v.until = time.Now().Add(shrinkMost)
	v.fewerWallets()
	v.drop(func(op porcupine.Operation) bool { return !writes(op) })
	v.trim()
	v.widen()
	v.fold()
	v.widen()
	slices.SortStableFunc(v.ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
}

// fewerWallets looks for one wallet, else two, that show it alone.
func (v *violation) fewerWallets() {
	for _, wallets := range [][groupSize]bool{{true}, {false, true}, {false, false, true},
		{true, true}, {true, false, true}, {false, true, true}} {
		m := v.model
		for i := range wallets { // what the history is about, at most: of the others it may lack operations
			wallets[i] = wallets[i] && v.model.wallets[i]
		}
		if m.wallets = wallets; wallets == [groupSize]bool{} || wallets == v.model.wallets {
			continue
		}
		ops := slices.DeleteFunc(slices.Clone(v.ops), func(op porcupine.Operation) bool {
			return !m.touches(input(op), output(op))
		})
		if v.try(violation{model: m, ops: ops}) {
			return
		}
	}
}

// drop leaves out what can be left out among the operations that may be, in pieces of falling size.
func (v *violation) drop(may func(porcupine.Operation) bool) {
	for size := len(v.ops); size > 0; size /= 2 {
		for at := 0; at < len(v.ops); {
			end := min(at+size, len(v.ops))
			ops := slices.Clone(v.ops[:at])
			for _, op := range v.ops[at:end] {
				if !may(op) {
					ops = append(ops, op)
				}
			}
			kept := len(ops)
			ops = append(ops, v.ops[end:]...)
			if len(ops) == len(v.ops) || !v.try(violation{model: v.model, ops: ops}) {
				at = end
			} else {
				at = kept
			}
		}
	}
}

// trim leaves out the last writes of each wallet, as far as nobody has seen them. One it leaves, to say that
// there is a wallet.
func (v *violation) trim() {
	unseen := func(i int) bool {
		for _, wallet := range []int64{input(v.ops[i]).wallet, input(v.ops[i]).to} {
			if wallet == 0 || !v.model.sees(wallet) {
				continue
			}
			mine := saw(input(v.ops[i]), output(v.ops[i]), wallet)
			for j, other := range v.ops {
				if j != i && saw(input(other), output(other), wallet) >= mine {
					return false
				}
			}
		}
		return true
	}
	left := 0
	for _, op := range v.ops {
		if writes(op) {
			left++
		}
	}
	for trimmed := true; trimmed && left > 1; left-- {
		trimmed = false
		for i := len(v.ops) - 1; i >= 0 && !trimmed; i-- {
			without := slices.Delete(slices.Clone(v.ops), i, i+1)
			trimmed = writes(v.ops[i]) && unseen(i) && v.try(violation{model: v.model, ops: without})
		}
	}
}

// widen takes the times from as many writes as it can: first their beginnings, then their ends.
func (v *violation) widen() {
	for _, wide := range []func(op *porcupine.Operation){
		func(op *porcupine.Operation) { op.Call, op.Return = -whenever, whenever },
		func(op *porcupine.Operation) { op.Call = -whenever },
		func(op *porcupine.Operation) { op.Return = whenever },
	} {
		for size := len(v.ops); size > 0; size /= 2 {
			for at := 0; at < len(v.ops); at += size {
				ops := slices.Clone(v.ops)
				changed := false
				for i := at; i < min(at+size, len(ops)); i++ {
					if was := ops[i]; writes(was) {
						wide(&ops[i])
						changed = changed || was.Call != ops[i].Call || was.Return != ops[i].Return
					}
				}
				if changed {
					v.try(violation{model: v.model, ops: ops})
				}
			}
		}
	}
}

// fold makes the first writes of a single wallet the state to start from, if all that is left saw them.
func (v *violation) fold() {
	wallets := 0
	for _, sees := range v.model.wallets {
		if sees {
			wallets++
		}
	}
	refused := func(op porcupine.Operation) bool { return output(op).status >= 300 }
	if wallets != 1 || slices.ContainsFunc(v.ops, refused) {
		return // a refusal may have come before any of them
	}
	seqOf := func(op porcupine.Operation) int64 {
		if input(op).to != 0 && v.model.sees(input(op).to) {
			return saw(input(op), output(op), input(op).to)
		}
		return saw(input(op), output(op), input(op).wallet)
	}
	ordered := slices.Clone(v.ops)
	bySeq := func(a, b porcupine.Operation) int { return cmp.Compare(seqOf(a), seqOf(b)) }
	slices.SortStableFunc(ordered, bySeq)
	lowest := int64(everything)
	for _, op := range ordered {
		if !writes(op) {
			lowest = min(lowest, seqOf(op))
		}
	}
	for most := len(ordered); most > 0; most-- {
		smaller := violation{model: v.model}
		folded, possible := int64(0), true
		for i, op := range ordered {
			switch {
			case i >= most || !writes(op):
				smaller.ops = append(smaller.ops, op)
			case seqOf(op) > lowest:
				possible = false
			default:
				var ok bool
				if ok, smaller.model.start = v.model.step(smaller.model.start, input(op), output(op)); !ok {
					return // the writes themselves do not fit
				}
				folded++
			}
		}
		if possible && folded > 0 && v.try(smaller) {
			return
		}
	}
}

// kind is what the history's last answer was to.
func (v violation) kind() string {
	last := v.ops[0]
	for _, op := range v.ops {
		later := op.Return > last.Return || writes(last) && !writes(op)
		if last.Return == whenever || op.Return != whenever && later {
			last = op
		}
	}
	return strings.TrimSpace(input(last).kind + " " + output(last).code)
}

// String is the history in the order of its calls. Times are in ms since the run began.
func (v violation) String() string {
	var text strings.Builder
	fmt.Fprintf(&text, "  before: %s\n", v.model.describe(v.model.start))
	fmt.Fprintf(&text, "  %10s %10s  %6s  %s\n", "call", "return", "client", "operation -> answer")
	for _, op := range v.ops {
		var where string
		if note, ok := op.Metadata.(string); ok {
			where = "  (" + note + ")"
		}
		fmt.Fprintf(&text, "  %10s %10s  %6d  %s%s\n", moment(op.Call), moment(op.Return), op.ClientId,
			describe(input(op), output(op)), where)
	}
	return text.String()
}

func moment(at int64) string {
	if at == whenever || at == -whenever {
		return "whenever"
	}
	return fmt.Sprintf("%.2f", float64(at)/1e6)
}

// TestOneStaleReadIsFoundAndShownAlone: a history that can be is found to be so; with one balance that is
// behind by one, what is left of it is that read and the write that it missed.
func TestOneStaleReadIsFoundAndShownAlone(t *testing.T) {
	var ops []porcupine.Operation
	at := int64(0)
	add := func(q *request, status int, body string) {
		a, err := q.parse(status, body)
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, porcupine.Operation{Input: q, Output: a, Call: at + 1, Return: at + 2})
		at += 2
	}
	const created = "2026-01-02T03:04:05.000006Z"
	deposited := func(wallet, seq int64) {
		receipt := `{"transaction_id":"%d-%d","wallet_id":%[1]d,"currency":"USD","amount":"1.5",` +
			`"balance":%[3]q,"seq":%[2]d,"created_at":%[4]q}`
		add(&request{kind: deposit, wallet: wallet, cents: 150, key: fmt.Sprint(seq)}, 200,
			fmt.Sprintf(receipt, wallet, seq, amount(150*seq), created))
	}
	stands := func(seq int64) {
		add(&request{kind: balance, wallet: 12}, 200,
			fmt.Sprintf(`{"wallet_id":12,"currency":"USD","balance":%q,"seq":%d}`, amount(150*seq), seq))
	}
	add(&request{kind: history, wallet: 12}, 404, `{"code":"wallet_not_found"}`)
	deposited(11, 1)
	add(&request{kind: transfer, wallet: 11, to: 12, cents: 150, key: "t"}, 200, `{"transaction_id":"11-2",
"from_id":11,"to_id":12,"currency":"USD","amount":"1.5","from_balance":"0","to_balance":"1.5","from_seq":2,
"to_seq":1,"created_at":"`+created+`"}`)
	stands(1)
	for seq := int64(2); seq <= 40; seq++ {
		deposited(12, seq)
		stands(seq)
	}
	add(&request{kind: withdraw, wallet: 12, cents: 1 << 40, key: "w"}, 422, `{"code":"insufficient_funds"}`)
	v := violation{model: whole, ops: relax(ops)}
	if result, _ := v.find(checkLimit); result != porcupine.Ok {
		t.Fatalf("a history that can be is %s", result)
	}
	// Entry 41 is shown by the cache while its client waits, and not yet by Postgres.
	stands(41)
	add(&request{kind: fresh, wallet: 12}, 200, `{"wallet_id":12,"currency":"USD","balance":"60","seq":40}`)
	deposited(12, 41)
	ops[len(ops)-1].Call = ops[len(ops)-3].Call
	if result, _ := (violation{model: whole, ops: relax(ops)}).find(checkLimit); result != porcupine.Ok {
		t.Fatalf("a balance that is ahead of Postgres is %s", result)
	}
	stands(40)
	stands(41)
	result, v := violation{model: whole, ops: relax(ops)}.find(checkLimit)
	if result != porcupine.Illegal {
		t.Fatalf("a balance that is behind is %s", result)
	}
	v.shrink()
	var seen []int64
	for _, op := range v.ops {
		seen = append(seen, saw(input(op), output(op), 12))
	}
	if !slices.Equal(seen, []int64{41, 40}) {
		t.Errorf("shown as\n%s", v)
	}
}
