// Package lin holds the service against a model of itself, with porcupine: replicas as processes, clients
// that move and read money through all of them, faults all the while, and then the question whether what was
// answered could have been answered by one ledger that does one thing after the other. If not, a minimal
// history is printed, and drawn in a file.
//
//	go test -C dev ./lin -v -timeout 60m -lin 30m
//
// What is demanded is what README.md guarantees. Everything that Postgres answers is linearizable: an
// operation takes effect at one moment between its request and its answer. A balance out of the cache is
// behind no operation that had been answered before it was asked for; of what others still wait for it may
// show more than Postgres does, or less.
//
// lin_test.go is the run, clients_test.go the load, faults_test.go what goes wrong, model_test.go what is
// right, order_test.go what makes it quick to see, shrink_test.go what is shown.
package lin

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/jackc/pgx/v5"

	"wallet/dev/testbed"
)

var (
	linFor  = flag.Duration("lin", 40*time.Second, "how long clients and faults go on")
	linSeed = flag.Uint64("lin.seed", uint64(time.Now().UnixNano()), "the order of all but its timing")
	linOnly = flag.String("lin.only", "", "faults to have, comma-separated; default: all")
	service = flag.String("lin.service", "../..", "folder of the service's module, perhaps a mutant")
)

const (
	replicas     = 3
	teams        = 3 // groups of wallets in use at a time
	clients      = 4 // of a team
	findingsMost = 8 // minimal histories that are printed, and the first of each further kind
	showMost     = 2 * time.Minute
)

// replica is the service as a process, whose way to Postgres is ours to cut. Its relay has a way of its own.
type replica struct {
	*testbed.Service
	way *proxy
	mu  sync.Mutex // held by the fault that has it in hand
}

func newReplica(t *testing.T, s *testbed.Servers, folder, binary, name string) *replica {
	t.Helper()
	way := newProxy(t, s.DatabaseURL)
	return &replica{Service: testbed.NewService(t, s, folder, binary, name, way.url), way: way}
}

// run is the whole run.
type run struct {
	t        *testing.T
	servers  *testbed.Servers
	folder   string
	binary   string
	replicas []*replica
	began    time.Time
	end      time.Time
	groups   atomic.Int64
	requests atomic.Int64 // that were sent
	retries  atomic.Int64
	closing  atomic.Bool // the faults are over

	mu       sync.Mutex
	checked  int // operations
	refused  int
	found    []finding
	slowest  time.Duration // of a group's check
	faults   []happening
	counts   map[string]int // of faults
	internal map[string]int // answers of status 500, by body
}

// finding is a group whose history cannot be.
type finding struct {
	group int64
	all   int // operations
	violation
}

// happening is a fault and its time.
type happening struct {
	from, to int64
	what     string
}

func (r *run) now() int64 { return time.Since(r.began).Nanoseconds() }

func TestLinearizable(t *testing.T) {
	folder := testbed.Folder(t, "lin") // of logs, and of drawings
	t.Logf("-lin.seed %d", *linSeed)
	r := &run{t: t, folder: folder, counts: make(map[string]int), internal: make(map[string]int)}
	r.servers = testbed.Start(t, folder)
	r.binary = testbed.Build(t, *service, filepath.Join(folder, "wallet"))
	for i := range replicas {
		one := newReplica(t, r.servers, folder, r.binary, string(rune('A'+i)))
		r.replicas = append(r.replicas, one)
		one.Start(t)
		t.Cleanup(func() {
			one.mu.Lock()
			defer one.mu.Unlock()
			one.Kill()
		})
		if !one.IsReady(30 * time.Second) {
			t.Fatalf("%s is not ready, see %s", one.Name, one.Log)
		}
	}
	r.began = time.Now()
	r.end = r.began.Add(*linFor)

	var faults, load sync.WaitGroup
	for hand := range hands {
		faults.Go(func() { r.harm(hand) })
	}
	for team := range teams {
		load.Go(func() { r.team(rand.New(rand.NewPCG(*linSeed, uint64(1000+team)))) })
	}
	faults.Wait()
	r.closing.Store(true)
	load.Wait()
	r.report()
}

// report says what was done, and fails if too little was.
func (r *run) report() {
	for _, one := range r.replicas {
		log, err := os.ReadFile(one.Log)
		crashed := bytes.Contains(log, []byte("\npanic: ")) || bytes.Contains(log, []byte("\nfatal error: "))
		if err != nil || crashed {
			r.t.Errorf("%s crashed, see %s (%v)", one.Name, one.Log, err)
		}
	}
	for body, times := range r.internal {
		r.t.Errorf("500 %d times, such as %s", times, body)
	}
	r.t.Logf("%d operations on %d groups of wallets, %d of them refused, in %v",
		r.checked, r.groups.Load(), r.refused, time.Since(r.began).Round(time.Second))
	r.t.Logf("%d requests sent, %d of them again; slowest check %v",
		r.requests.Load(), r.retries.Load(), r.slowest.Round(time.Millisecond))
	for _, name := range slices.Sorted(maps.Keys(r.counts)) {
		r.t.Logf("%4d times: %s", r.counts[name], name)
	}
	if len(r.found) > 0 {
		r.show()
	}
	if r.checked == 0 {
		r.t.Error("nothing was checked")
	}
}

// check asks porcupine about one group, once nothing more happens to it.
func (r *run) check(group int64, ops []porcupine.Operation) {
	began := time.Now()
	v := violation{model: whole, ops: relax(ops)}
	result, _ := v.find(checkLimit)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checked += len(ops)
	for _, op := range ops {
		if output(op).status >= 300 {
			r.refused++
		}
	}
	r.slowest = max(r.slowest, time.Since(began))
	switch result {
	case porcupine.Ok:
		return
	case porcupine.Unknown:
		whole := filepath.Join(r.folder, fmt.Sprintf("group-%d.txt", group))
		os.WriteFile(whole, []byte(v.String()), 0o644)
		r.t.Errorf("group %d: its %d operations were not checked within %v, see %s",
			group, len(ops), checkLimit, whole)
		return
	}
	r.found = append(r.found, finding{group, len(ops), v})
}

// show makes violations small, draws and prints them. What one group saw may be several: without the reads of
// one it is asked again.
func (r *run) show() {
	kinds := make(map[string]int)
	printed := 0
	until := time.Now().Add(showMost)
	for _, f := range r.found {
		before := maps.Clone(kinds)
		for left := f.violation; time.Now().Before(until); {
			result, v := left.find(shrinkLimit)
			if result != porcupine.Illegal {
				if len(left.ops) == len(f.ops) {
					r.t.Errorf("group %d: %d operations cannot be, but were not made fewer", f.group, f.all)
				}
				break
			}
			v.shrink()
			kind := v.kind()
			kinds[kind]++
			if kinds[kind] == 1 || kinds[kind] == before[kind]+1 && printed < findingsMost {
				printed++
				r.print(f, v, kind, printed)
			}
			ops := slices.DeleteFunc(slices.Clone(left.ops), func(op porcupine.Operation) bool {
				shown := func(in porcupine.Operation) bool { return in.Input == op.Input }
				return !writes(op) && slices.ContainsFunc(v.ops, shown)
			})
			if len(ops) == len(left.ops) {
				break // the writes alone cannot be
			}
			left.ops = ops
		}
	}
	r.t.Errorf("%d groups of wallets saw what one ledger could not have answered", len(r.found))
	r.t.Errorf("minimal histories by what they end in: %v", kinds)
}

func (r *run) print(f finding, v violation, kind string, number int) {
	_, info := porcupine.CheckOperationsVerbose(v.model.porcupine(), v.ops, checkLimit)
	drawing := filepath.Join(r.folder, fmt.Sprintf("finding-%d.html", number))
	if err := porcupine.VisualizePath(v.model.porcupine(), info, drawing); err != nil {
		r.t.Error(err)
	}
	r.t.Errorf("%s: %d of group %d's %d operations cannot be (drawn in %s):\n%s%s",
		kind, len(v.ops), f.group, f.all, drawing, v, r.around(v.ops))
}

// around lists the faults near a history.
func (r *run) around(ops []porcupine.Operation) string {
	first, last := whenever, -whenever
	for _, op := range ops {
		for _, at := range []int64{op.Call, op.Return} {
			if at != whenever && at != -whenever {
				first, last = min(first, at), max(last, at)
			}
		}
	}
	var text strings.Builder
	slices.SortFunc(r.faults, func(a, b happening) int { return cmp.Compare(a.from, b.from) })
	for _, h := range r.faults {
		if h.to > first-1e9 && h.from < last {
			fmt.Fprintf(&text, "  %10s %10s          fault: %s\n", moment(h.from), moment(h.to), h.what)
		}
	}
	return text.String()
}

// relax gives cached balances the time that docs/design.md allows. They may be behind whatever was not
// answered before they were asked for, although a read of Postgres has shown it: they begin at the last
// answer of a write to their wallet. And they may be ahead of Postgres, in which a commit becomes visible a
// moment after the WAL, and so the relay, have it: they end with the answer of the write that they show, if
// that had been asked for before.
func relax(ops []porcupine.Operation) []porcupine.Operation {
	ops = slices.Clone(ops)
	for i := range ops {
		read := &ops[i]
		wallet, shows := input(*read).wallet, output(*read).stands.Seq
		if input(*read).kind != balance || output(*read).status != 200 {
			continue
		}
		since, until := int64(-1), read.Return
		for _, write := range ops {
			q := input(write)
			if !writes(write) || q.wallet != wallet && q.to != wallet {
				continue
			}
			if write.Return < read.Call {
				since = max(since, write.Return)
			}
			if saw(q, output(write), wallet) == shows && write.Call < read.Return {
				until = max(until, write.Return)
			}
		}
		asked, answered := moment(read.Call), moment(read.Return)
		read.Metadata = fmt.Sprintf("%v, from %s to %s", read.Metadata, asked, answered)
		read.Call, read.Return = since+1, until
	}
	return ops
}

// ledger reads a group's wallets from Postgres itself.
type ledger struct {
	entries   map[int64][]entry
	creations map[string]standing // by key
}

const readEntries = `
SELECT e.wallet_id, e.seq, e.kind::text, e.amount::text, (e.balance - e.amount)::text, e.balance::text,
       coalesce(e.counterparty_id, 0), coalesce(e.counterparty_seq, 0), e.idempotency_key,
       to_char(e.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
       CASE WHEN coalesce(held, 0) <> 0 OR coalesce(held_change, 0) <> 0
            THEN (coalesce(held, 0) - coalesce(held_change, 0))::text ELSE '' END,
       CASE WHEN coalesce(held, 0) <> 0 OR coalesce(held_change, 0) <> 0
            THEN coalesce(held, 0)::text ELSE '' END,
       coalesce(of_seq, 0), coalesce(remaining::text, ''), coalesce(note, '{}')
FROM entry e WHERE e.wallet_id = ANY ($1) ORDER BY 1, 2`

const readCreations = `
SELECT id, creation_key, to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') FROM wallet
WHERE id = ANY ($1) AND creation_key IS NOT NULL`

func (r *run) readLedger(wallets []int64) (*ledger, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, r.servers.DatabaseURL)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	l := &ledger{entries: make(map[int64][]entry), creations: make(map[string]standing)}
	rows, _ := conn.Query(ctx, readEntries, wallets)
	var e entry
	var amount, before, after, note string
	_, err = pgx.ForEachRow(rows, []any{&e.WalletID, &e.Seq, &e.Kind, &amount, &before, &after,
		&e.Counterparty.WalletID, &e.Counterparty.Seq, &e.Key, &e.CreatedAt, &e.HeldBefore, &e.HeldAfter,
		&e.OfSeq, &e.Remaining, &note}, func() error {
		e.said = said{}
		if err := json.Unmarshal([]byte(note), &e.said); err != nil {
			return err
		}
		e.HeldBefore, e.HeldAfter = plain(e.HeldBefore), plain(e.HeldAfter)
		e.Remaining = plain(e.Remaining)
		e.Currency, e.Amount = "USD", plain(amount)
		e.BalanceBefore, e.BalanceAfter = plain(before), plain(after)
		e.TransactionID = id(e.WalletID, e.Seq)
		if e.Kind == "transfer_in" {
			e.TransactionID = id(e.Counterparty.WalletID, e.Counterparty.Seq)
		}
		l.entries[e.WalletID] = append(l.entries[e.WalletID], e)
		return nil
	})
	if err != nil {
		return nil, err
	}
	rows, _ = conn.Query(ctx, readCreations, wallets)
	var key string
	s := standing{Currency: "USD", Balance: "0"}
	_, err = pgx.ForEachRow(rows, []any{&s.WalletID, &key, &s.CreatedAt}, func() error {
		l.creations[key] = s
		return nil
	})
	return l, err
}

// ofHold is the answer to the hold, or to the end of one, that the entry is of.
func (e *entry) ofHold() receipt {
	change := cents(e.HeldAfter) - cents(e.HeldBefore)
	r := receipt{HoldID: id(e.WalletID, e.Seq), WalletID: e.WalletID, Currency: "USD",
		Remaining: e.Remaining, Status: "open", ExpiresAt: e.ExpiresAt, ToID: e.ToID,
		Balance: e.BalanceAfter, Held: e.HeldAfter, Seq: e.Seq, CreatedAt: e.CreatedAt}
	r.Available = amount(cents(e.BalanceAfter) - cents(e.HeldAfter))
	switch e.Reason {
	case "":
		r.Amount = amount(change)
		return r
	case "void":
		r.Status = "voided"
	case "expiry":
		r.Status = "expired"
	}
	r.HoldID, r.Released = id(e.WalletID, e.OfSeq), amount(-change)
	return r
}

// plain takes the trailing zeros off a decimal number.
func plain(number string) string {
	if strings.Contains(number, ".") {
		number = strings.TrimRight(strings.TrimRight(number, "0"), ".")
	}
	return number
}

// answer is what a request that nobody answered would have been answered, or nil if it was never applied.
func (l *ledger) answer(q *request) *response {
	if q.kind == create {
		if s, ok := l.creations[q.key]; ok {
			return &response{status: 201, stands: s}
		}
		return nil
	}
	for _, e := range l.entries[q.wallet] {
		if e.Key != q.key || e.Kind == "transfer_in" {
			continue
		}
		got := receipt{TransactionID: e.TransactionID, Currency: "USD", CreatedAt: e.CreatedAt}
		got.Amount = strings.TrimPrefix(e.Amount, "-")
		if q.kind == hold || q.kind == void || q.kind == expire {
			return &response{status: q.success(), receipt: e.ofHold()}
		}
		if q.kind == capture {
			got.HoldID, got.Remaining, got.Held = id(q.wallet, e.OfSeq), e.Remaining, e.HeldAfter
		}
		if e.Kind == "transfer_out" {
			got.FromID, got.FromSeq, got.FromBalance = q.wallet, e.Seq, e.BalanceAfter
			got.ToID, got.ToSeq = q.to, e.Counterparty.Seq
			for _, other := range l.entries[q.to] {
				if other.Seq == got.ToSeq {
					got.ToBalance = other.BalanceAfter
				}
			}
		} else {
			got.WalletID, got.Balance, got.Seq = q.wallet, e.BalanceAfter, e.Seq
		}
		return &response{status: 200, receipt: got}
	}
	return nil
}
