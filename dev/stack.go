// The stack: which servers there are, in which order they start and stop, who watches them, and the control
// lines by which tests kill, stop, freeze and start them again.
//
// One goroutine, run, owns all of it once everything is up: deaths, control lines and the wish to stop reach
// it through channels, so that no two of them interleave.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// readyWait bounds every wait for a server to be ready; a long crash recovery must fit.
const readyWait = 3 * time.Minute

// config is what the flags say; stackConfig reads them and says what each means.
type config struct {
	services bool // servers only, driven by standard input
	ports    list // name=number, fixed

	data        string // empty: a temporary folder
	dataNamed   bool   // by a flag: it must be said again where it matters
	fresh       bool
	postgres    string
	postgresSet []string
	redis       string
	kafka       string
	brokers     int
	secure      bool
	logDirs     int // of each broker
	clocks      bool
	disks       bool
	java        string

	listen    string
	replicas  int
	json      bool
	key       bool // the service demands an API key
	rateLimit bool
}

// server is one thing that runs: how to start it and to know it ready, and its process while it has one.
type server struct {
	name   string
	start  func(context.Context) (*child, error)
	ready  func(context.Context) error
	quit   syscall.Signal // stops it in order, where that is not what the child knows
	noKill string         // why SIGKILL is refused, if it is
	clock  *clock         // nil unless it can be stepped
	disk   *disk          // nil unless it can be filled

	child *child // nil while it is down by our doing; one that has ended waits for room on its disk
}

type stack struct {
	cfg   config
	out   io.Writer // standard output
	procs *processes
	lock  *os.File
	ports *ports
	began time.Time

	servers []*server   // in the order they start; the reverse is the order they stop
	died    chan *child // those that ended without our doing

	address addresses
}

// addresses is what the JSON line says, and what stack.json in the data folder keeps for `events`.
type addresses struct {
	HTTP         []string `json:"http,omitempty"`
	Operate      []string `json:"operate,omitempty"` // metrics and profiles
	APIKey       string   `json:"api_key,omitempty"` // under -key
	DatabaseURL  string   `json:"database_url"`
	RedisURL     string   `json:"redis_url"`
	KafkaBrokers string   `json:"kafka_brokers"`
	// Under -secure: the service's settings, KAFKA_BROKERS included.
	SecureKafka map[string]string `json:"secure_kafka,omitempty"`
	PIDs        map[string]any    `json:"pids"`
}

const addressFile = "stack.json"

// ours are the names that a data folder may hold; -fresh removes these and nothing else.
var ours = []string{"postgres-*", "redis", "kafka-*", "logs", "wallet", addressFile}

// runStack is a stack's life. It returns when ctx ends or a server dies, and with services at end of input.
func runStack(ctx context.Context, cfg config, in io.Reader, out io.Writer) (err error) {
	s := &stack{cfg: cfg, out: out, began: time.Now(), died: make(chan *child, 16)}
	temporary := cfg.data == ""
	if temporary {
		if s.cfg.data, err = os.MkdirTemp("", "wallet-dev-"); err != nil {
			return err
		}
		defer os.RemoveAll(s.cfg.data)
		if err := os.Chmod(s.cfg.data, 0o755); err != nil { // nobody must reach what is in it
			return err
		}
	}
	if err := s.openData(ctx); err != nil {
		return err
	}
	defer s.lock.Close()
	if s.ports, err = newPorts(s.cfg.data, cfg.ports, s.say("stack")); err != nil {
		return err
	}
	if s.procs, err = newProcesses(s.lock, filepath.Join(s.cfg.data, "logs")); err != nil {
		return err
	}
	defer s.procs.close()
	if temporary {
		s.procs.removeAtEnd(s.cfg.data)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var lines chan string
	if cfg.services {
		lines = make(chan string)
		go func() {
			for input := bufio.NewScanner(in); input.Scan(); {
				select {
				case lines <- input.Text():
				case <-ctx.Done():
					return
				}
			}
			cancel(errInputEnded)
		}()
	}
	defer s.stop()
	if err := s.start(ctx); err != nil {
		if ctx.Err() != nil {
			return s.stopping(ctx) // before all was up
		}
		return err
	}
	if err := errors.Join(s.ports.keep(s.cfg.data), s.announce()); err != nil {
		return err
	}
	return s.run(ctx, lines)
}

var errInputEnded = errors.New("standard input ended")

// openData makes the data folder, locks it and wipes it if that was asked for and the stack can start.
func (s *stack) openData(ctx context.Context) error {
	var err error
	if s.cfg.data, err = filepath.Abs(s.cfg.data); err != nil {
		return err
	}
	if err := os.MkdirAll(s.cfg.data, 0o755); err != nil {
		return err
	}
	if s.lock, err = os.OpenFile(filepath.Join(s.cfg.data, "lock"), os.O_CREATE|os.O_RDWR,
		0o644); err != nil {
		return err
	}
	for {
		err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		}
		// The servers hold the lock too. If their stack was killed, they need a moment to end.
		owner, _ := os.ReadFile(filepath.Join(s.cfg.data, "lock"))
		pid, _ := strconv.Atoi(string(owner))
		if _, alive := processTable()[pid]; alive || time.Since(s.began) > 2*endWait {
			return inUse(s.cfg.data, pid)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	if !s.cfg.services {
		if _, err := s.cfg.listenAddresses(); err != nil { // now rather than after minutes of downloads
			return err
		}
	}
	if err := errors.Join(s.lock.Truncate(0), writeAt(s.lock, strconv.Itoa(os.Getpid()))); err != nil {
		return err
	}
	wipe := []string{"logs", addressFile}
	if s.cfg.fresh {
		wipe = ours
	}
	for _, pattern := range wipe {
		found, _ := filepath.Glob(filepath.Join(s.cfg.data, pattern))
		for _, path := range found {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return os.MkdirAll(filepath.Join(s.cfg.data, "logs"), 0o755)
}

// inUse says of a data folder that a stack runs on it, and where that can be met.
func inUse(data string, pid int) error {
	where := "it is starting"
	if stack, err := runningStack(data); err == nil {
		where = "Postgres at " + stack.DatabaseURL
		if len(stack.HTTP) > 0 {
			where = "the service at " + strings.Join(stack.HTTP, " ")
		}
	}
	return fmt.Errorf("the stack runs already (process %d, %s): use that one or stop it, or start another "+
		"with its own -data folder and -listen address; the data folder in use is %s", pid, where, data)
}

func writeAt(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// say reports progress, for humans.
func (s *stack) say(name string) func(string, ...any) {
	return func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%5.1fs %-8s  %s\n", time.Since(s.began).Seconds(), name,
			fmt.Sprintf(format, args...))
	}
}

// start brings everything up: the servers side by side, then the service.
func (s *stack) start(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(s.cfg.data, portsFile)); err != nil && !s.cfg.services {
		s.say("stack")("a first start: it downloads Postgres and compiles the service, " +
			"which takes a minute or two")
	}
	ports := make([]int, 2)
	for i, name := range []string{"postgres", "redis"} {
		var err error
		if ports[i], err = s.ports.of(name); err != nil {
			return err
		}
	}
	// One goroutine makes all Kafka servers and takes all ports from here on.
	var database, cache *server
	var kafka []*server
	var binary, faketime string
	if s.cfg.clocks {
		var err error
		if faketime, err = findFaketime(); err != nil {
			return err
		}
	}
	group, together := errgroup.WithContext(ctx)
	group.Go(func() error {
		p, err := newPostgres(together, s.procs, s.cfg.postgres, s.cfg.data, ports[0], s.cfg.postgresSet,
			s.cfg.fresh, s.say("postgres"))
		if err != nil {
			return err
		}
		if p.clock, err = newClock(faketime, p.data+".clock"); err != nil {
			return err
		}
		if p.disk, err = newDisk(together, s.procs, s.cfg.disks, p.data); err != nil {
			return err
		}
		s.address.DatabaseURL = p.url("wallet")
		database = &server{name: "postgres", start: p.start, ready: p.ready, clock: p.clock, disk: p.disk}
		return s.up(together, database)
	})
	group.Go(func() error {
		r, err := newRedis(s.procs, s.cfg.redis, filepath.Join(s.cfg.data, "redis"), ports[1], s.say("redis"))
		if err != nil {
			return err
		}
		s.address.RedisURL = "redis://" + r.address()
		cache = &server{name: "redis", start: r.start, ready: r.ready}
		return s.up(together, cache)
	})
	group.Go(func() error {
		var servers []*server
		var err error
		switch s.cfg.kafka {
		case "embedded":
			servers = make([]*server, 1)
			var port int
			if port, err = s.ports.of("kafka"); err == nil {
				servers[0], s.address.KafkaBrokers, err = newEmbedded(s.procs,
					filepath.Join(s.cfg.data, "kafka-embedded"), port)
			}
		case "apache":
			servers, s.address.KafkaBrokers, s.address.SecureKafka, err = newApache(together, s.procs, s.cfg,
				faketime, s.ports.of, s.say("kafka"))
		default:
			s.address.KafkaBrokers = s.cfg.kafka
		}
		if err != nil {
			return err
		}
		kafka = servers
		var starts errgroup.Group
		for _, server := range kafka {
			starts.Go(func() error { return s.up(together, server) })
		}
		return starts.Wait()
	})
	if !s.cfg.services {
		group.Go(func() (err error) {
			binary, err = buildService(together, s.procs, s.cfg.data, s.say("wallet"))
			return err
		})
	}
	err := group.Wait()
	for _, server := range append([]*server{database, cache}, kafka...) {
		if server != nil {
			s.servers = append(s.servers, server)
		}
	}
	if err != nil || s.cfg.services {
		return err
	}
	return s.startService(ctx, binary)
}

// up starts a server and waits until it is ready.
func (s *stack) up(ctx context.Context, server *server) error {
	c, err := server.start(ctx)
	if err != nil {
		return err
	}
	server.child = c
	go func() {
		<-c.done
		if !c.wanted.Load() {
			s.died <- c
		}
	}()
	return s.await(ctx, server)
}

// await waits until a server is ready.
func (s *stack) await(ctx context.Context, server *server) error {
	c := server.child
	ctx, cancel := context.WithTimeoutCause(ctx, readyWait,
		fmt.Errorf("%s is not ready after %v; its log is %s", server.name, readyWait, c.log))
	defer cancel()
	ready := make(chan error, 1)
	go func() { ready <- server.ready(ctx) }()
	select {
	case <-c.done:
		return c.failure("ended by itself")
	case err := <-ready:
		if err != nil && !c.alive() {
			return c.failure("ended by itself")
		}
		if err != nil {
			return err
		}
	}
	s.say(server.name)("ready (process %d)", c.pid)
	return nil
}

// revive has a server run whose disk was full: as a supervisor would, it starts one that has ended.
func (s *stack) revive(ctx context.Context, server *server) error {
	for range 2 { // it may look ready once more while what went before ends it
		if err := sleep(ctx, diskSettles); err != nil {
			return err
		}
		if !server.child.alive() {
			return s.up(ctx, server)
		}
		if err := s.await(ctx, server); err != nil {
			if server.child.alive() {
				return err
			}
			return s.up(ctx, server)
		}
	}
	return nil
}

// buried says that the end of a process needs no answer, or has got one.
func (s *stack) buried(ctx context.Context, c *child) error {
	i := slices.IndexFunc(s.servers, func(x *server) bool { return x.child == c })
	if i < 0 {
		return nil // it has a successor already
	}
	server := s.servers[i]
	switch {
	case !server.disk.excuses(c.ended):
		return c.failure("ended by itself")
	case server.disk.filled:
		s.say(server.name)("ended: its disk is full")
		return nil
	}
	return s.revive(ctx, server)
}

// announce says where everything listens: the JSON line and stack.json, and for humans what to try.
func (s *stack) announce() error {
	s.address.PIDs = s.pids()
	line, err := json.Marshal(s.address)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.cfg.data, addressFile), append(line, '\n'), 0o644); err != nil {
		return err
	}
	if s.cfg.services || s.cfg.json {
		_, err = fmt.Fprintf(s.out, "%s\n", line)
		return err
	}
	_, err = io.WriteString(s.out, s.guide())
	return err
}

func (s *stack) pids() map[string]any {
	pids := map[string]any{}
	var wallets []int
	for _, server := range s.servers {
		switch {
		case server.child == nil || !server.child.alive():
		case strings.HasPrefix(server.name, "wallet"):
			wallets = append(wallets, server.child.pid)
			pids["wallet"] = wallets
		default:
			pids[server.name] = server.child.pid
		}
	}
	return pids
}

// run watches and obeys until the end.
func (s *stack) run(ctx context.Context, lines <-chan string) error {
	for {
		select {
		case <-ctx.Done():
			return s.stopping(ctx)
		case c := <-s.died:
			if err := s.buried(ctx, c); err != nil {
				return err
			}
		case line := <-lines:
			answer := map[string]any{}
			if err := s.obey(ctx, strings.Fields(line)); err != nil {
				answer["error"] = err.Error()
			} else {
				answer["ok"] = line
				answer["pids"] = s.pids()
			}
			text, err := json.Marshal(answer)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(s.out, "%s\n", text); err != nil {
				return err
			}
		}
	}
}

// stopSignals are the ways to stop Postgres; the others know one.
var stopSignals = map[string]syscall.Signal{"fast": syscall.SIGINT, "immediate": syscall.SIGQUIT}

// obey does what one control line says and returns when it is done.
func (s *stack) obey(ctx context.Context, words []string) error {
	usage := errors.New("say: kill NAME, stop NAME [fast|immediate], start NAME, pause NAME, resume NAME, " +
		"clock NAME OFFSET, full NAME [FOLDER], room NAME")
	if len(words) < 2 || len(words) > 3 ||
		len(words) > 2 && !slices.Contains([]string{"stop", "clock", "full"}, words[0]) {
		return usage
	}
	i := slices.IndexFunc(s.servers, func(x *server) bool { return x.name == words[1] })
	if i < 0 {
		var names []string
		for _, x := range s.servers {
			names = append(names, x.name)
		}
		return fmt.Errorf("there is no %q here, only %s", words[1], strings.Join(names, ", "))
	}
	server := s.servers[i]
	if words[0] == "clock" { // also of one that is down
		if len(words) < 3 {
			return usage
		}
		offset, err := parseOffset(words[2])
		if err != nil {
			return err
		}
		return server.clock.step(offset)
	}
	switch words[0] { // also of one that is down
	case "full":
		return server.disk.fill(strings.Join(words[2:], ""))
	case "room":
		part, err := server.disk.free()
		if err != nil || server.child == nil || part && server.child.alive() {
			return err
		}
		return s.revive(ctx, server)
	}
	if up := server.child != nil; up == (words[0] == "start") {
		return fmt.Errorf("%s is %s", server.name, map[bool]string{true: "up already", false: "down"}[up])
	}
	switch words[0] {
	case "start":
		err := s.up(ctx, server)
		if err != nil && server.child != nil { // down as before, for another try
			server.child.kill()
			server.child = nil
		}
		return err
	case "kill":
		if server.noKill != "" {
			return errors.New(server.noKill)
		}
		server.child.kill()
		server.child = nil
	case "stop":
		how := server.quit
		if len(words) == 3 {
			if how = stopSignals[words[2]]; how == 0 || server.name != "postgres" {
				return usage
			}
		}
		// Postgres ends once its WAL senders have delivered everything: behind a backlog that takes a while.
		err := server.child.endWithin(how, time.Minute)
		server.child = nil
		return err
	case "pause":
		server.child.pause()
	case "resume":
		server.child.resume()
	default:
		return usage
	}
	return nil
}

func (s *stack) stopping(ctx context.Context) error {
	s.say("stack")("stopping: %v (a second Ctrl-C ends at once)", context.Cause(ctx))
	return nil
}

// stop ends everything in order: what uses a server before the server.
func (s *stack) stop() {
	os.Remove(filepath.Join(s.cfg.data, addressFile))
	for _, server := range slices.Backward(s.servers) {
		if server.child == nil || !server.child.alive() {
			continue
		}
		if err := server.child.end(server.quit); err != nil {
			s.say(server.name)("%v", err)
		}
	}
	s.say("stack")("stopped")
}
