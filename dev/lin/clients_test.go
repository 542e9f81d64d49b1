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
	answered []before              // writes of some kinds
	holds    []*request            // that were answered; seq is the hold's
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
				kind := []string{history, history, history, read, balance, withdraw, hold}[dice.IntN(7)]
				q := g.request(dice, kind)
				q.payee = 0
				if q.wallet = g.wallet(i); (kind == withdraw || kind == hold) && dice.IntN(3) > 0 {
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
				{kind: balance}, {kind: balance, minSeq: known}, {kind: history}, {kind: fresh},
				{kind: openHolds}} {
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
	slices.Repeat([]string{replay}, 4), slices.Repeat([]string{hold}, 10),
	slices.Repeat([]string{capture}, 12), slices.Repeat([]string{void}, 3),
	slices.Repeat([]string{oneHold}, 3), slices.Repeat([]string{openHolds}, 3))

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
	case hold: // most end while the group is in use
		q.in = []time.Duration{time.Second, time.Second, 2 * time.Second, 15 * time.Minute}[dice.IntN(4)]
		if dice.IntN(2) == 0 {
			q.payee = g.wallet((i + 1 + dice.IntN(groupSize-1)) % groupSize)
		}
	}
	return q
}

// of makes a request about one of the last holds that the clients were told of; nil where there is none.
func (g *group) of(dice *rand.Rand, kind string) *request {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.holds) == 0 {
		return nil
	}
	h := g.holds[len(g.holds)-1-dice.IntN(min(len(g.holds), 5))]
	q := &request{kind: kind, wallet: h.wallet, seq: h.seq}
	if kind == oneHold {
		return q
	}
	q.key = fmt.Sprintf("%d-%d", g.id, g.keys.Add(1))
	if kind == void {
		return q
	}
	q.to, q.partial = h.payee, dice.IntN(2) == 0
	other := g.wallet((place(h.wallet) + 1 + dice.IntN(groupSize-1)) % groupSize)
	switch n := dice.IntN(6); {
	case h.payee == 0 && n < 3 || n == 0: // at times not the one that the hold is for
		q.to, q.named = other, true
	case h.payee != 0 && n < 3:
		q.named = true
	}
	if dice.IntN(2) == 0 { // at times more than there is
		q.cents = 1 + dice.Int64N(h.cents+h.cents/8)
	}
	return q
}

func (g *group) request(dice *rand.Rand, kind string) *request {
	i := dice.IntN(groupSize)
	q := &request{kind: kind, wallet: g.wallet(i)}
	switch kind {
	case deposit, withdraw, transfer, create, hold:
		return g.write(dice, kind)
	case capture, void, oneHold:
		if about := g.of(dice, kind); about != nil {
			return about
		}
		q.kind, q.seq = oneHold, 1+dice.Int64N(2) // mostly none
	case replay:
		g.mu.Lock()
		defer g.mu.Unlock()
		if len(g.answered) == 0 {
			q.kind = read
			break
		}
		was := g.answered[dice.IntN(len(g.answered))]
		return &request{kind: replay, wallet: was.wallet, again: was.request, before: was.body}
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
	once := !slices.Contains(writeKinds, q.kind)
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
	g.narrow(&op)
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
	switch q.kind {
	case hold:
		told := *q
		told.seq = a.receipt.Seq
		g.holds = append(g.holds, &told)
		fallthrough
	case deposit, capture, void:
		g.answered = append(g.answered, before{q, a.body})
	}
}

// clockSlack is more than the machine's clock can have been set by, against the monotonic one that times are
// counted by.
const clockSlack = 5 * time.Millisecond

// narrow has a write begin no earlier than its entry's time: the database's clock is read under the wallets'
// locks, and what comes of it is seen after. So a request that was frozen for seconds, or an expiry, which
// nobody asked for, is not tried at all the moments before.
func (r *run) narrow(op *porcupine.Operation) {
	if !writes(*op) || input(*op).kind == create {
		return
	}
	at, err := time.Parse(timeFormat, output(*op).receipt.CreatedAt)
	if err != nil {
		r.t.Errorf("the time of %v: %v", describe(input(*op), output(*op)), err)
		return
	}
	since := at.Sub(r.began.Round(0)) // by the clock, not by the monotonic one
	op.Call = max(op.Call, (since - clockSlack).Nanoseconds())
}

// send sends a request once. Nil: it was not answered, or only that the outcome may be unknown.
func (g *group) send(q *request, one *replica) (*response, string) {
	g.requests.Add(1)
	r, err := q.http(one.URL)
	if err != nil {
		g.t.Error(err)
		return nil, "not sent"
	}
	asked := time.Now().UTC().Format(timeFormat)
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
	a.asked, a.answered = asked, time.Now().UTC().Format(timeFormat)
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
	case replay:
		return q.again.http(url)
	case hold:
		payee := ""
		if q.payee != 0 {
			payee = fmt.Sprintf(`,"to_id":%d`, q.payee)
		}
		return post(at("/holds"), `{"amount":%q,"expires_in":"%ds","idempotency_key":%q%s}`,
			amount(q.cents), int(q.in.Seconds()), q.key, payee)
	case capture:
		says := ""
		if q.named {
			says = fmt.Sprintf(`,"to_id":%d`, q.to)
		}
		if q.cents != 0 {
			says += fmt.Sprintf(`,"amount":%q`, amount(q.cents))
		}
		return post(url+"/v1/holds/"+id(q.wallet, q.seq)+"/capture", `{"final":%v,"idempotency_key":%q%s}`,
			!q.partial, q.key, says)
	case void:
		return post(url+"/v1/holds/"+id(q.wallet, q.seq)+"/void", `{"idempotency_key":%q}`, q.key)
	case oneHold:
		path = url + "/v1/holds/" + id(q.wallet, q.seq)
	case openHolds:
		path = at("/holds?status=open&limit=1000")
	case deposit:
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
			g.narrow(&op)
			g.ops = append(g.ops, op)
		}
	}
	for wallet, entries := range l.entries {
		for i := range entries { // what the clock did: after its own time, and before now
			if e := &entries[i]; e.Reason == "expiry" {
				q := &request{kind: expire, wallet: wallet, seq: e.OfSeq, key: e.Key}
				op := porcupine.Operation{ClientId: 2*clients + 1, Input: q, Output: l.answer(q)}
				op.Return, op.Metadata = g.now(), "read in Postgres"
				g.narrow(&op)
				g.ops = append(g.ops, op)
			}
		}
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
