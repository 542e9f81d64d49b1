// The load: teams of clients, each on a few fresh wallets for some seconds. A movement of money is sent again
// with its key, to whichever replica, until it is answered: that is one operation. A read that is not
// answered is none.

package lin

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
)

const (
	patience    = 1500 * time.Millisecond // of a client with one request
	pauseMost   = 90 * time.Millisecond   // of a client between two operations
	groupLeast  = 1 * time.Second         // how long a group of wallets is in use
	groupMost   = 7 * time.Second
	centsMost   = 10_000
	openingRead = 5 // reads by each other client while a wallet is made
)

var web = &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// group is some wallets and what was done with them.
type group struct {
	*run
	id   int64
	keys atomic.Int64
	seqs [groupSize]atomic.Int64 // the highest that was answered

	mu       sync.Mutex
	ops      []porcupine.Operation
	open     []porcupine.Operation // writes without an answer: they may have been applied, or may still be
	deposits []before              // that were answered
}

type before struct {
	*request
	body string
}

// team uses one group after the other until the end.
func (r *run) team(dice *rand.Rand) {
	var checks sync.WaitGroup
	defer checks.Wait()
	for time.Now().Before(r.end) {
		g := &group{run: r, id: r.groups.Add(1)}
		g.live(dice)
		checks.Go(func() { r.check(g.id, g.ops) })
	}
}

// live is the whole life of a group.
func (g *group) live(dice *rand.Rand) {
	together := func(do func(client int, dice *rand.Rand)) {
		var all sync.WaitGroup
		for client := range clients {
			own := rand.New(rand.NewPCG(dice.Uint64(), uint64(client)))
			all.Go(func() { do(client, own) })
		}
		all.Wait()
	}
	for i := range groupSize { // each wallet is made while others look
		maker := dice.IntN(clients)
		together(func(client int, dice *rand.Rand) {
			if client == maker {
				q := g.write(dice, []string{deposit, deposit, transfer, create}[dice.IntN(4)])
				if q.wallet = g.wallet(i); q.kind == transfer {
					q.wallet, q.to = g.wallet((i+1)%groupSize), q.wallet
				}
				g.do(client, dice, q)
				return
			}
			for range openingRead {
				kind := []string{history, history, history, read, balance, withdraw}[dice.IntN(6)]
				q := g.request(dice, kind)
				if q.wallet = g.wallet(i); kind == withdraw && dice.IntN(3) > 0 {
					continue // enough to see that it is refused before the first deposit
				}
				g.do(client, dice, q)
			}
		})
	}
	calm := dice.IntN(2) == 0 // what is cached wrongly stays so for longer
	end := time.Now().Add(groupLeast + rand.N(groupMost-groupLeast))
	together(func(client int, dice *rand.Rand) {
		for time.Now().Before(end) {
			kind := mix[dice.IntN(len(mix))]
			if calm && dice.IntN(4) > 0 {
				kind = balance
			}
			g.do(client, dice, g.request(dice, kind))
			time.Sleep(time.Duration(dice.Int64N(int64(pauseMost))))
		}
	})
	for _, one := range g.replicas { // what lasts is seen everywhere
		for i := range groupSize {
			known := g.seqs[i].Load()
			for _, q := range []*request{
				{kind: balance}, {kind: balance, minSeq: known}, {kind: history}, {kind: fresh}} {
				q.wallet = g.wallet(i)
				g.once(0, q, one)
			}
		}
	}
	g.settle()
}

// mix is how often each kind of request is made.
var mix = slices.Concat(
	slices.Repeat([]string{deposit}, 22), slices.Repeat([]string{withdraw}, 10),
	slices.Repeat([]string{transfer}, 12),
	[]string{create}, slices.Repeat([]string{balance}, 32), slices.Repeat([]string{fresh}, 4),
	slices.Repeat([]string{read}, 4), slices.Repeat([]string{history}, 6),
	slices.Repeat([]string{transaction}, 5),
	slices.Repeat([]string{replay}, 4))

func (g *group) wallet(i int) int64 { return g.id*10 + int64(i) + 1 }

// write is a request that moves money or makes a wallet, with a key of its own.
func (g *group) write(dice *rand.Rand, kind string) *request {
	i := dice.IntN(groupSize)
	q := &request{kind: kind, wallet: g.wallet(i), cents: 1 + dice.Int64N(centsMost)}
	q.key = fmt.Sprintf("%d-%d", g.id, g.keys.Add(1))
	switch kind {
	case transfer:
		q.to = g.wallet((i + 1 + dice.IntN(groupSize-1)) % groupSize)
	case create:
		q.cents = 0
	}
	return q
}

func (g *group) request(dice *rand.Rand, kind string) *request {
	i := dice.IntN(groupSize)
	q := &request{kind: kind, wallet: g.wallet(i)}
	switch kind {
	case deposit, withdraw, transfer, create:
		return g.write(dice, kind)
	case replay:
		g.mu.Lock()
		defer g.mu.Unlock()
		if len(g.deposits) == 0 {
			q.kind = read
			break
		}
		was := g.deposits[dice.IntN(len(g.deposits))]
		*q = *was.request
		q.kind, q.before = replay, was.body
	case balance:
		if dice.IntN(4) == 0 { // what is known; at times the one after
			q.minSeq = g.seqs[i].Load() + dice.Int64N(4)/3
		}
	case history:
		q.descending = dice.IntN(2) == 0
	case transaction:
		q.seq = 1 + dice.Int64N(g.seqs[i].Load()+2)
	}
	return q
}

// do has one request answered. Reads and replays are sent once.
func (g *group) do(client int, dice *rand.Rand, q *request) {
	once := q.kind != deposit && q.kind != withdraw && q.kind != transfer && q.kind != create
	first, uncertain, notes := g.now(), false, ""
	for {
		one := g.replicas[dice.IntN(len(g.replicas))]
		if once {
			g.once(client, q, one)
			return
		}
		call := g.now()
		a, trouble := g.send(q, one)
		if a == nil {
			uncertain = true
			notes += fmt.Sprintf("%s at %s, ", trouble, one.Name)
			g.retries.Add(1)
			time.Sleep(time.Duration(dice.Int64N(int64(20 * time.Millisecond))))
			if g.closing.Load() && time.Since(g.end) > time.Minute {
				g.t.Errorf("%s %d key %s: no answer a minute after the last fault", q.kind, q.wallet, q.key)
				g.leaveOpen(client, q, first, notes)
				return
			}
			continue
		}
		notes += "answered by " + one.Name
		if !q.writes(a) {
			// This request was refused. Those sent before it may still be applied, whatever has been answered
			// to this one.
			g.add(client, q, call, a, notes)
			if uncertain {
				g.leaveOpen(client, q, first, notes)
			}
			return
		}
		g.add(client, q, first, a, notes)
		return
	}
}

func (g *group) leaveOpen(client int, q *request, first int64, notes string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	op := porcupine.Operation{ClientId: clients + client, Input: q, Call: first, Return: whenever}
	op.Metadata = "not answered; " + notes
	g.open = append(g.open, op)
}

// once is a request whose answer is of use only if it comes.
func (g *group) once(client int, q *request, one *replica) {
	call := g.now()
	if a, _ := g.send(q, one); a != nil {
		g.add(client, q, call, a, "answered by "+one.Name)
	}
}

// add keeps an operation that was answered just now.
func (g *group) add(client int, q *request, call int64, a *response, notes string) {
	op := porcupine.Operation{ClientId: client, Input: q, Call: call, Output: a, Return: g.now()}
	op.Metadata = notes
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ops = append(g.ops, op)
	if !writes(op) {
		return
	}
	for _, wallet := range []int64{q.wallet, q.to} {
		if wallet == 0 {
			continue
		}
		known := &g.seqs[place(wallet)]
		known.Store(max(known.Load(), saw(q, a, wallet))) // under the lock
	}
	if q.kind == deposit {
		g.deposits = append(g.deposits, before{q, a.body})
	}
}

// send sends a request once. Nil: it was not answered, or only that the outcome may be unknown.
func (g *group) send(q *request, one *replica) (*response, string) {
	g.requests.Add(1)
	r, err := q.http(one.URL)
	if err != nil {
		g.t.Error(err)
		return nil, "not sent"
	}
	response, err := web.Do(r)
	if err != nil {
		return nil, "no answer"
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return nil, "half an answer"
	case response.StatusCode == 503:
		return nil, "503"
	case response.StatusCode == 500:
		g.run.mu.Lock()
		defer g.run.mu.Unlock()
		g.internal[fmt.Sprintf("%s by %s", q.kind, one.Name)]++
		return nil, "500"
	}
	a, err := q.parse(response.StatusCode, string(body))
	if err != nil {
		g.t.Errorf("%s %d: %d %s: %v", q.kind, q.wallet, response.StatusCode, body, err)
		return nil, "nonsense"
	}
	return a, ""
}

func (q *request) http(url string) (*http.Request, error) {
	at := func(route string) string { return fmt.Sprintf("%s/v1/wallets/%d%s", url, q.wallet, route) }
	post := func(path, format string, args ...any) (*http.Request, error) {
		r, err := http.NewRequest("POST", path, strings.NewReader(fmt.Sprintf(format, args...)))
		if err == nil {
			r.Header.Set("Content-Type", "application/json")
		}
		return r, err
	}
	path := ""
	switch q.kind {
	case create:
		return post(url+"/v1/wallets", `{"id":%d,"currency":"USD","idempotency_key":%q}`, q.wallet, q.key)
	case deposit, replay:
		return post(at("/deposit"), `{"amount":%q,"idempotency_key":%q}`, amount(q.cents), q.key)
	case withdraw:
		return post(at("/withdraw"), `{"amount":%q,"idempotency_key":%q}`, amount(q.cents), q.key)
	case transfer:
		return post(at("/transfer"), `{"to_id":%d,"amount":%q,"idempotency_key":%q}`,
			q.to, amount(q.cents), q.key)
	case balance, fresh:
		path = at("/balance")
		if q.minSeq > 0 {
			path += fmt.Sprintf("?min_seq=%d", q.minSeq)
		}
	case read:
		path = at("")
	case history:
		path = at("/history?limit=1000")
		if q.descending {
			path += "&order=desc"
		}
	case transaction:
		path = url + "/v1/transactions/" + id(q.wallet, q.seq)
	}
	r, err := http.NewRequest("GET", path, nil)
	if err == nil && q.kind == fresh {
		r.Header.Set("Cache-Control", "no-cache")
	}
	return r, err
}

// settle reads the ledger itself, last of all: what it holds is one more history of each wallet, and it tells
// what became of the writes that nobody answered. One that is not in it took effect after everything that was
// seen, if ever.
func (g *group) settle() {
	var wallets []int64
	for i := range groupSize {
		wallets = append(wallets, g.wallet(i))
	}
	var l *ledger
	var err error
	call := g.now()
	for deadline := time.Now().Add(time.Minute); l == nil; time.Sleep(20 * time.Millisecond) {
		if l, err = g.readLedger(wallets); err != nil {
			if l = nil; time.Now().After(deadline) {
				g.t.Errorf("the ledger cannot be read: %v", err)
				return
			}
		}
	}
	for _, op := range g.open {
		if a := l.answer(input(op)); a != nil {
			op.Output = a
			g.ops = append(g.ops, op)
		}
	}
	for wallet, entries := range l.entries {
		a := &response{status: 200, entries: int64(len(entries))}
		if len(entries) > historyMost {
			g.t.Errorf("wallet %d has more entries than a page holds: make a group's life shorter", wallet)
		}
		for i := range entries {
			a.sum = entries[i].add(a.sum)
		}
		g.add(2*clients, &request{kind: history, wallet: wallet}, call, a, "read in Postgres")
	}
}

const historyMost = 1000
