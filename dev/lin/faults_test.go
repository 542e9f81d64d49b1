// What goes wrong while the clients go on. Three hands do harm at the same time: one on the replicas' ways to
// Postgres, one on the replicas, one on the servers. Left out is only what docs/design.md does not
// promise to cover: one replica alone without Redis.

package lin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// proxy is one replica's way to Postgres. It knows what the server's answers say, so that one of them can be
// lost, or come late.
type proxy struct {
	url      string // of the database, by this way
	target   string
	listener net.Listener
	aim      atomic.Pointer[aim]

	mu    sync.Mutex
	conns map[net.Conn]bool // to the replica
}

// aim is what happens to the next answer of a kind, which is one of a command: COMMIT, or SELECT.
type aim struct {
	command string
	do      func() (cut bool) // before it is passed on
}

func newProxy(t *testing.T, databaseURL string) *proxy {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{target: u.Host, conns: make(map[net.Conn]bool)}
	if p.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	u.Host = p.listener.Addr().String()
	p.url = u.String()
	go p.serve()
	return p
}

func (p *proxy) close() { p.listener.Close() }

func (p *proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer client.Close()
			server, err := net.Dial("tcp", p.target)
			if err != nil {
				return
			}
			defer server.Close()
			p.mu.Lock()
			p.conns[client] = true
			p.mu.Unlock()
			go func() {
				io.Copy(server, client)
				server.Close()
			}()
			p.answers(client, server)
			p.mu.Lock()
			delete(p.conns, client)
			p.mu.Unlock()
		}()
	}
}

// answers carries the server's messages: a letter, a length that includes itself, and the rest. The
// database's URL says sslmode=disable: there is none without its letter.
func (p *proxy) answers(client, server net.Conn) {
	in := bufio.NewReaderSize(server, 64<<10)
	out := bufio.NewWriterSize(client, 64<<10)
	var head [5]byte
	var body []byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint32(head[1:])) - 4
		body = slices.Grow(body[:0], n)[:n]
		if _, err := io.ReadFull(in, body); err != nil {
			return
		}
		a := p.aim.Load()
		complete := a != nil && head[0] == 'C' && bytes.HasPrefix(body, []byte(a.command)) // CommandComplete
		if complete && p.aim.CompareAndSwap(a, nil) {
			out.Flush()
			if a.do() {
				return
			}
		}
		out.Write(head[:])
		out.Write(body)
		if in.Buffered() == 0 {
			if out.Flush() != nil {
				return
			}
		}
	}
}

// cut ends all connections, in the middle of whatever they carry.
func (p *proxy) cut() (cuts int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for client := range p.conns {
		client.Close()
		cuts++
	}
	return cuts
}

// fault is something that goes wrong; it is over, but for what follows from it, when it returns what it was.
// Empty: it found no occasion.
type fault struct {
	name string
	do   func(r *run, dice *rand.Rand) string
}

// hands: a fault that stands there more than once comes more often.
var hands = [][]fault{
	{loseCommit, loseCommit, stallCommit, stallCommit, stallCommitAcrossGeneration, stallFill, cutWay},
	{killReplica, freezeReplica, freezeReplica, stopReplica, furtherReplica},
	{flushRedis, deleteKeys, deleteKeys, killRedis, snapshotRedis, terminateBackends, terminateBackends,
		crashPostgres, freezeKafka, loseCommitUnpublished},
}

// pauses is how long each hand rests between two faults, at most.
var pauses = []time.Duration{300 * time.Millisecond, 1200 * time.Millisecond, 1200 * time.Millisecond}

func (r *run) harm(hand int) {
	dice := rand.New(rand.NewPCG(*linSeed, uint64(hand)))
	todo := slices.Clone(hands[hand])
	if *linOnly != "" {
		only := strings.Split(*linOnly, ",")
		todo = slices.DeleteFunc(todo, func(f fault) bool { return !slices.Contains(only, f.name) })
	}
	for len(todo) > 0 && time.Now().Before(r.end) {
		f := todo[dice.IntN(len(todo))]
		from := r.now()
		if what := f.do(r, dice); what != "" {
			r.mu.Lock()
			r.faults = append(r.faults, happening{from, r.now(), what})
			r.counts[f.name]++
			r.mu.Unlock()
		}
		time.Sleep(time.Duration(dice.Int64N(int64(pauses[hand]))))
	}
}

// between draws a time, short ones as often as long ones.
func between(dice *rand.Rand, least, most time.Duration) time.Duration {
	return time.Duration(float64(least) * math.Pow(float64(most)/float64(least), dice.Float64()))
}

// some is a replica that no other fault has in hand, until it is given back.
func (r *run) some(dice *rand.Rand) (one *replica, giveBack func()) {
	for {
		one := r.replicas[dice.IntN(len(r.replicas))]
		if one.mu.TryLock() {
			return one, one.mu.Unlock
		}
		time.Sleep(time.Millisecond)
	}
}

// catch aims at an answer and waits until it is there. It is passed on, or lost, when the function is called.
func (p *proxy) catch(command string) (pass func(cut bool)) {
	reached, passed := make(chan struct{}), make(chan bool, 1)
	a := &aim{command, func() bool { close(reached); return <-passed }}
	if !p.aim.CompareAndSwap(nil, a) {
		return nil // another hand aims here
	}
	select {
	case <-reached:
	case <-time.After(500 * time.Millisecond):
		if p.aim.CompareAndSwap(a, nil) {
			return nil
		}
		<-reached
	}
	return func(cut bool) { passed <- cut }
}

var loseCommit = fault{"lose an answer to COMMIT", func(r *run, dice *rand.Rand) string {
	one := r.replicas[dice.IntN(len(r.replicas))]
	pass := one.way.catch("COMMIT")
	if pass == nil {
		return ""
	}
	pass(true)
	return "an answer to COMMIT is lost on its way to " + one.Name
}}

// loseCommitUnpublished: with the relay held up, nobody but the writer brings the balance into the cache.
var loseCommitUnpublished = fault{"lose answers to COMMIT while Kafka is frozen",
	func(r *run, dice *rand.Rand) string {
		r.servers.Obey(r.t, "pause kafka")
		lost := 0
		for range 3 {
			if pass := r.replicas[dice.IntN(len(r.replicas))].way.catch("COMMIT"); pass != nil {
				pass(true)
				lost++
			}
			time.Sleep(between(dice, 50*time.Millisecond, 500*time.Millisecond))
		}
		r.servers.Obey(r.t, "resume kafka")
		return fmt.Sprintf("Kafka is frozen, and %d answers to COMMIT are lost", lost)
	}}

var stallCommit = fault{"stall an answer to COMMIT", func(r *run, dice *rand.Rand) string {
	one := r.replicas[dice.IntN(len(r.replicas))]
	pass := one.way.catch("COMMIT")
	if pass == nil {
		return ""
	}
	d := between(dice, 10*time.Millisecond, 1500*time.Millisecond)
	time.Sleep(d)
	pass(false)
	return fmt.Sprintf("an answer to COMMIT comes %v late to %s", d.Round(time.Millisecond), one.Name)
}}

var stallCommitAcrossGeneration = fault{"stall an answer to COMMIT while a replica starts",
	func(r *run, dice *rand.Rand) string {
		one := r.replicas[dice.IntN(len(r.replicas))]
		pass := one.way.catch("COMMIT")
		if pass == nil {
			return ""
		}
		what := "an answer to COMMIT comes late to " + one.Name + ", after a further replica has started"
		end := r.further(dice)
		time.Sleep(between(dice, 10*time.Millisecond, 300*time.Millisecond))
		if dice.IntN(2) == 0 {
			r.deleteKeys(100)
			what += " and all keys in Redis are deleted"
		}
		pass(false)
		end()
		return what
	}}

var stallFill = fault{"stall an answer to a read while keys are deleted",
	func(r *run, dice *rand.Rand) string {
		one := r.replicas[dice.IntN(len(r.replicas))]
		r.deleteKeys(100) // so that there is something to fill in, and for us, if nobody else, to ask for
		wallet := max(1, r.groups.Load()-dice.Int64N(teams))*10 + 1 + dice.Int64N(groupSize)
		go func() {
			response, err := web.Get(fmt.Sprintf("%s/v1/wallets/%d/balance", one.URL, wallet))
			if err == nil {
				response.Body.Close()
			}
		}()
		pass := one.way.catch("SELECT")
		if pass == nil {
			return ""
		}
		time.Sleep(between(dice, 20*time.Millisecond, 800*time.Millisecond))
		r.deleteKeys(100)
		pass(false)
		return "an answer to a SELECT comes late to " + one.Name + ", after all cached balances were deleted"
	}}

var cutWay = fault{"cut a replica's connections to Postgres", func(r *run, dice *rand.Rand) string {
	one := r.replicas[dice.IntN(len(r.replicas))]
	return fmt.Sprintf("%d connections of %s to Postgres are cut", one.way.cut(), one.Name)
}}

var killReplica = fault{"kill a replica", func(r *run, dice *rand.Rand) string {
	one, giveBack := r.some(dice)
	defer giveBack()
	one.Kill()
	time.Sleep(between(dice, time.Millisecond, time.Second))
	one.Start(r.t)
	return one.Name + " is killed and started"
}}

var stopReplica = fault{"stop a replica", func(r *run, dice *rand.Rand) string {
	one, giveBack := r.some(dice)
	defer giveBack()
	one.Terminate()
	select {
	case <-one.Exited:
	case <-time.After(20 * time.Second):
		r.t.Errorf("%s does not stop within 20 s of SIGTERM", one.Name)
		one.Kill()
	}
	one.Start(r.t)
	return one.Name + " is stopped in order and started"
}}

var freezeReplica = fault{"freeze a replica", func(r *run, dice *rand.Rand) string {
	one, giveBack := r.some(dice)
	defer giveBack()
	d := between(dice, 10*time.Millisecond, 3*time.Second)
	one.Freeze(d)
	return fmt.Sprintf("%s is frozen for %v", one.Name, d.Round(time.Millisecond))
}}

// further starts one more replica, which forgets what is cached, and waits until it serves.
func (r *run) further(dice *rand.Rand) (end func()) {
	one := newReplica(r.t, r.servers, r.folder, r.binary, "further")
	one.Start(r.t)
	one.IsReady(between(dice, 100*time.Millisecond, 1500*time.Millisecond))
	return func() {
		one.Kill()
		one.way.close()
	}
}

var furtherReplica = fault{"start a further replica", func(r *run, dice *rand.Rand) string {
	end := r.further(dice)
	time.Sleep(between(dice, 10*time.Millisecond, time.Second))
	end()
	return "a further replica starts, and is killed"
}}

// redis runs commands; while Redis is away they are in vain.
func (r *run) redis(do func(ctx context.Context, c *redis.Client)) {
	options, err := redis.ParseURL(r.servers.RedisURL)
	if err != nil {
		r.t.Error(err)
		return
	}
	c := redis.NewClient(options)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	do(ctx, c)
}

var flushRedis = fault{"flush Redis", func(r *run, dice *rand.Rand) string {
	r.redis(func(ctx context.Context, c *redis.Client) { c.FlushAll(ctx) })
	return "FLUSHALL"
}}

// deleteKeys deletes a part of the cached balances, in percent.
func (r *run) deleteKeys(percent int) {
	r.redis(func(ctx context.Context, c *redis.Client) {
		keys, _ := c.Keys(ctx, "*").Result()
		keys = slices.DeleteFunc(keys, func(string) bool { return rand.IntN(100) >= percent })
		if len(keys) > 0 {
			c.Del(ctx, keys...)
		}
	})
}

var deleteKeys = fault{"delete keys in Redis", func(r *run, dice *rand.Rand) string {
	percent := 1 + dice.IntN(100)
	r.deleteKeys(percent)
	return fmt.Sprintf("%d%% of the keys in Redis are deleted", percent)
}}

var killRedis = fault{"kill Redis", func(r *run, dice *rand.Rand) string {
	r.servers.Obey(r.t, "kill redis")
	time.Sleep(between(dice, time.Millisecond, 500*time.Millisecond))
	r.servers.Obey(r.t, "start redis")
	return "Redis is killed and started"
}}

var snapshotRedis = fault{"put Redis back to a snapshot", func(r *run, dice *rand.Rand) string {
	// miniredis takes none, and comes back empty.
	r.redis(func(ctx context.Context, c *redis.Client) { c.Save(ctx) })
	time.Sleep(between(dice, 10*time.Millisecond, time.Second))
	r.servers.Obey(r.t, "kill redis", "start redis")
	return "Redis takes a snapshot, is killed and started with it"
}}

var terminateBackends = fault{"terminate backends", func(r *run, dice *rand.Rand) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, r.servers.DatabaseURL)
	if err != nil {
		return ""
	}
	defer conn.Close(ctx)
	tag, err := conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() LIMIT $1`, 1+dice.IntN(12))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%d backends of Postgres are terminated", tag.RowsAffected())
}}

var crashPostgres = fault{"crash Postgres", func(r *run, dice *rand.Rand) string {
	r.servers.Obey(r.t, "stop postgres immediate")
	time.Sleep(between(dice, time.Millisecond, 500*time.Millisecond))
	r.servers.Obey(r.t, "start postgres")
	return "Postgres stops immediately and is started"
}}

// freezeKafka makes the relay late: what it puts into the cache then is old, and the first of it is all for a
// while, since Kafka is frozen again at once. At times everything that is cached is forgotten before.
var freezeKafka = fault{"freeze Kafka", func(r *run, dice *rand.Rand) string {
	r.servers.Obey(r.t, "pause kafka")
	time.Sleep(between(dice, 100*time.Millisecond, 2*time.Second))
	what := "Kafka is frozen twice"
	switch dice.IntN(3) {
	case 0:
		r.further(dice)()
		what += "; before it thaws, a further replica starts"
	case 1:
		r.deleteKeys(100)
		what += "; before it thaws, all keys in Redis are deleted"
	}
	r.servers.Obey(r.t, "resume kafka")
	time.Sleep(between(dice, time.Millisecond, 40*time.Millisecond))
	r.servers.Obey(r.t, "pause kafka")
	time.Sleep(between(dice, 50*time.Millisecond, 500*time.Millisecond))
	r.servers.Obey(r.t, "resume kafka")
	return what
}}
