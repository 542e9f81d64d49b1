// The stack is tested as its users meet it: the built program, its standard input and output, signals, and
// what is left of it afterwards. Every child holds the lock on the data folder: when it is free, nothing is.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

var program string // the stack, built once

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "dev-test-")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "dev")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%s%v\n", out, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// running is a stack under test.
type running struct {
	t       *testing.T
	cmd     *exec.Cmd
	in      io.WriteCloser
	lines   *bufio.Reader
	stderr  bytes.Buffer
	data    string
	address struct {
		addresses
		PIDs map[string]any `json:"pids"`
	}
}

// start runs the stack on data and waits for the line that says that it is ready.
func start(t *testing.T, data string, args ...string) *running {
	t.Helper()
	return startCommand(t, data, exec.Command(program, append(args, "-data", data)...))
}

func startCommand(t *testing.T, data string, cmd *exec.Cmd) *running {
	t.Helper()
	r := &running{t: t, cmd: cmd, data: data}
	r.in, _ = r.cmd.StdinPipe()
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = &r.stderr
	r.cmd.WaitDelay = 2 * endWait // whoever holds our pipe longer is left behind
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.in.Close()
		r.cmd.Process.Kill()
		r.cmd.Wait()
		if t.Failed() {
			t.Logf("the stack said:\n%s", &r.stderr)
		}
	})
	r.lines = bufio.NewReader(out)
	r.answer(&r.address)
	return r
}

// refused starts the servers on data, which must fail, and returns what was said.
func refused(t *testing.T, data string) string {
	t.Helper()
	cmd := exec.Command(program, "services", "-data", data)
	in, err := cmd.StdinPipe() // open until it ends by itself
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	text, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("it started: %s", text)
	}
	return string(text)
}

func (r *running) answer(to any) {
	r.t.Helper()
	line, err := r.lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, to)
	}
	if err != nil {
		r.cmd.Process.Kill()
		r.cmd.Wait()
		r.t.Fatalf("no JSON line but %q: %v\n%s", line, err, &r.stderr)
	}
}

// order sends a control line and returns the processes that run after it, or the error.
func (r *running) order(line string) (pids map[string]any, refusal string) {
	r.t.Helper()
	fmt.Fprintln(r.in, line)
	var answer struct {
		OK, Error string
		PIDs      map[string]any
	}
	r.answer(&answer)
	if answer.Error == "" && answer.OK != line {
		r.t.Fatalf("%q answered as %q", line, answer.OK)
	}
	return answer.PIDs, answer.Error
}

// obey is an order that must not be refused.
func (r *running) obey(line string) map[string]any {
	r.t.Helper()
	pids, refusal := r.order(line)
	if refusal != "" {
		r.t.Fatalf("%s: %s", line, refusal)
	}
	return pids
}

// end closes standard input and returns the exit status.
func (r *running) end() int {
	r.t.Helper()
	r.in.Close()
	return r.wait()
}

func (r *running) wait() int {
	r.cmd.Wait()
	return r.cmd.ProcessState.ExitCode()
}

// gone waits until all these processes are.
func (r *running) gone(pids []int) {
	r.t.Helper()
	if len(pids) < 4 {
		r.t.Fatalf("only %v were found while it ran", pids)
	}
	if !waitGone(pids, endWait) {
		r.t.Fatalf("some of %v are left", pids)
	}
}

// nothingLeft waits until no process of the stack is left: not those given, and none that holds the lock.
func (r *running) nothingLeft(pids []int) {
	r.t.Helper()
	r.gone(pids)
	lock, err := os.Open(filepath.Join(r.data, "lock"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer lock.Close()
	for end := time.Now().Add(endWait); ; time.Sleep(10 * time.Millisecond) {
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			return
		} else if time.Now().After(end) {
			r.t.Fatal("somebody still holds the data folder's lock")
		}
	}
}

func (r *running) sql(query string) (answer string) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, r.address.DatabaseURL)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close(ctx)
	if strings.HasPrefix(query, "CREATE") {
		_, err = conn.Exec(ctx, query)
	} else {
		err = conn.QueryRow(ctx, query).Scan(&answer)
	}
	if err != nil {
		answer = err.Error()
	}
	return answer
}

func (r *running) kafka(opts ...kgo.Opt) *kgo.Client {
	r.t.Helper()
	client, err := kgo.NewClient(append(opts,
		kgo.SeedBrokers(strings.Split(r.address.KafkaBrokers, ",")...))...)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(client.Close)
	return client
}

func (r *running) makeTopic(name string) {
	r.t.Helper()
	request := kmsg.NewPtrCreateTopicsRequest()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = name, 1, -1
	request.Topics = append(request.Topics, topic)
	answer, err := request.RequestWith(r.t.Context(), r.kafka())
	if err != nil || answer.Topics[0].ErrorCode != 0 {
		r.t.Fatal(err, answer)
	}
}

// produce writes one value in a transaction of its own, which it commits or aborts.
func (r *running) produce(topic, value string, commit kgo.TransactionEndTry) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	client := r.kafka(kgo.TransactionalID("t"))
	err := client.BeginTransaction()
	if err == nil {
		record := &kgo.Record{Topic: topic, Key: []byte("1"), Value: []byte(value),
			Headers: []kgo.RecordHeader{{Key: "ce_id", Value: []byte("1-1")}}}
		err = client.ProduceSync(ctx, record).FirstErr()
	}
	if err == nil {
		err = client.EndTransaction(ctx, commit)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	client.Close()
}

// events runs the subcommand and returns its lines.
func (r *running) events(args ...string) []string {
	r.t.Helper()
	return r.eventsAfter(func() {}, args...)
}

// eventsAfter is events, which calls speaks when the subcommand first says something on standard error.
func (r *running) eventsAfter(speaks func(), args ...string) []string {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{"events", "-data", r.data}, args...)...)
	stderr := &listener{speaks: sync.OnceFunc(speaks)}
	cmd.Stderr = stderr
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatalf("events %v: %v after %s%s", args, err, out, &stderr.said)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// listener is told what a program says.
type listener struct {
	said   bytes.Buffer
	speaks func()
}

func (l *listener) Write(text []byte) (int, error) {
	l.speaks()
	return l.said.Write(text)
}

func TestServicesObeyAndLeaveNothing(t *testing.T) {
	for _, redis := range []string{"auto", "miniredis"} {
		t.Run(redis, func(t *testing.T) {
			t.Parallel()
			r := start(t, t.TempDir(), "services", "-redis", redis, "-pgset", "max_connections=50")
			if is := r.sql("SHOW wal_level") + r.sql("SHOW max_connections"); is != "logical50" {
				t.Errorf("settings: %s", is)
			}
			r.sql("CREATE TABLE kept AS SELECT 1")
			if _, refusal := r.order("kill kafka"); !strings.Contains(refusal, "-kafka apache") {
				t.Errorf("kill of the embedded Kafka: %q", refusal)
			}
			for _, nonsense := range []string{"", "kill", "kill what", "start redis", "stop redis immediate",
				"resume redis now"} {
				if _, refusal := r.order(nonsense); refusal == "" {
					t.Errorf("%q was obeyed", nonsense)
				}
			}
			for _, script := range []string{"kill postgres", "stop postgres", "stop postgres fast",
				"stop postgres immediate", "stop kafka", "kill redis", "stop redis"} {
				name := strings.Fields(script)[1]
				if pids := r.obey(script); pids[name] != nil || len(pids) != 2 {
					t.Errorf("%s leaves %v", script, pids)
				}
				if pids := r.obey("start " + name); pids[name] == r.address.PIDs[name] || len(pids) != 3 {
					t.Errorf("start %s: %v", name, pids)
				}
			}
			r.obey("pause postgres")
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			if conn, err := pgx.Connect(ctx, r.address.DatabaseURL); err == nil {
				t.Error("a frozen Postgres took a connection")
				conn.Close(ctx)
			}
			cancel()
			r.obey("resume postgres")
			if is := r.sql("SELECT count(*)::text FROM kept"); is != "1" {
				t.Errorf("after all that: %s", is)
			}
			r.obey("pause kafka")
			pids := tree(r.cmd.Process.Pid)
			if code := r.end(); code != 0 {
				t.Errorf("exit status %d", code)
			}
			r.nothingLeft(pids)
		})
	}
}

func TestKilledStackLeavesNothing(t *testing.T) {
	t.Parallel()
	r := start(t, t.TempDir(), "services")
	r.makeTopic("t")
	r.produce("t", `"before"`, kgo.TryCommit)
	r.obey("pause postgres")
	r.obey("pause kafka")
	pids := tree(r.cmd.Process.Pid)
	r.cmd.Process.Kill()
	// Not waiting: who starts again on the same folder is made to.
	again := start(t, r.data, "services")
	r.gone(pids)
	again.produce("t", `"after"`, kgo.TryCommit)
	if lines := again.events("-topic", "t", "-from", "start", "-n", "2"); len(lines) != 2 {
		t.Errorf("events: %v", lines)
	}
	again.end()
}

func TestKilledGoRunLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			data := t.TempDir()
			cmd := exec.Command("go", "run", ".", "services", "-redis", "miniredis", "-data", data)
			r := startCommand(t, data, cmd)
			pids := tree(cmd.Process.Pid)
			cmd.Process.Signal(sig) // to it alone: a terminal would signal all of the group
			if sig == syscall.SIGINT {
				r.in.Close() // go run ignores that one and waits for us
			}
			cmd.Wait()
			r.nothingLeft(pids)
		})
	}
}

func TestSignalsStopInOrder(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		r := start(t, data, "services")
		pids := tree(r.cmd.Process.Pid)
		r.cmd.Process.Signal(sig)
		if code := r.wait(); code != 0 {
			t.Errorf("%v: exit status %d\n%s", sig, code, &r.stderr)
		}
		r.nothingLeft(pids)
	}
}

func TestDataSurvivesUntilFresh(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	r := start(t, data, "services", "-fresh")
	r.sql("CREATE TABLE kept AS SELECT 1")
	r.makeTopic("t")
	r.produce("t", `{"n":1}`, kgo.TryCommit)

	if text := refused(t, data); strings.Count(text, "\n") != 1 || !strings.Contains(text, "runs already") ||
		!strings.Contains(text, r.address.DatabaseURL) || !strings.Contains(text, data) {
		t.Errorf("a second stack on the same folder says %q", text)
	}
	r.end()

	again := start(t, data, "services")
	if is := again.sql("SELECT count(*)::text FROM kept"); is != "1" {
		t.Errorf("Postgres after a restart: %s", is)
	}
	if lines := again.events("-topic", "t", "-from", "start", "-n", "1"); !strings.Contains(lines[0],
		`"value":{"n":1}`) {
		t.Errorf("Kafka after a restart: %v", lines)
	}
	again.end()

	if err := os.WriteFile(filepath.Join(data, "mine"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	fresh := start(t, data, "services", "-fresh")
	if is := fresh.sql("SELECT count(*)::text FROM kept"); !strings.Contains(is, "42P01") {
		t.Errorf("Postgres after -fresh: %s", is)
	}
	if _, err := os.Stat(filepath.Join(data, "mine")); err != nil {
		t.Errorf("-fresh removed what is not its own: %v", err)
	}
	fresh.end()
}

func TestUncleanEmbeddedKafkaIsRefused(t *testing.T) {
	t.Parallel()
	r := start(t, t.TempDir(), "services")
	kafka := int(r.address.PIDs["kafka"].(float64))
	syscall.Kill(kafka, syscall.SIGKILL)
	if code := r.wait(); code != 1 || !strings.Contains(r.stderr.String(), "kafka ended by itself") {
		t.Errorf("a server died: exit status %d\n%s", code, &r.stderr)
	}
	if text := refused(t, r.data); !strings.Contains(text, "-fresh") {
		t.Errorf("start after a killed kfake: %s", text)
	}
	start(t, r.data, "services", "-fresh").end()
}

func TestEventsPrintsCommittedOnly(t *testing.T) {
	t.Parallel()
	r := start(t, t.TempDir(), "services")
	waiting := make(chan []string, 1)
	waits := make(chan struct{})
	go func() { // before there is a topic: all of it is new
		waiting <- r.eventsAfter(func() { close(waits) }, "-topic", "t", "-n", "1")
	}()
	select {
	case <-waits:
	case <-time.After(30 * time.Second):
		t.Fatal("it does not say that it waits for the topic")
	}
	r.makeTopic("t")
	r.produce("t", `{"n":1}`, kgo.TryCommit)
	r.produce("t", `{"n":2}`, kgo.TryAbort)
	r.produce("t", `not JSON`, kgo.TryCommit)
	const first = `{"partition":0,"offset":0,"key":"1","headers":{"ce_id":"1-1"},"value":{"n":1}}`
	if lines := <-waiting; lines[0] != first {
		t.Errorf("waiting for new events: %v", lines)
	}
	lines := r.events("-topic", "t", "-from", "start", "-n", "2")
	if len(lines) != 2 || lines[0] != first || !strings.Contains(lines[1], `"value":"not JSON"`) {
		t.Errorf("from start: %v", lines)
	}
	go func() { waiting <- r.events("-brokers", r.address.KafkaBrokers, "-topic", "t", "-n", "1") }()
	for i := 10; ; i++ { // until it listens
		r.produce("t", fmt.Sprintf(`{"n":%d}`, i), kgo.TryCommit)
		select {
		case lines := <-waiting:
			if strings.Contains(lines[0], `"offset":0`) {
				t.Errorf("new events only: %v", lines)
			}
			r.end()
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// idleCheckout is one of a service that does nothing but be ready, which nobody else may enter.
func idleCheckout(t *testing.T) (root string) {
	t.Helper()
	root = t.TempDir()
	files := map[string]string{
		"dev/go.mod": "module wallet/dev\n",
		"go.mod":     "module wallet\n\ngo 1.26\n",
		"main.go": `package main

import ("encoding/json"; "net/http"; "os")

func main() {
	if len(os.Args) > 1 && os.Args[1] == "-audit" {
		println("audited", os.Getenv("DATABASE_URL"), os.Getenv("KAFKA_BROKERS"), os.Getenv("KAFKA_TOPIC"))
		os.Exit(1)
	}
	http.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /environment", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(os.Environ())
	})
	http.HandleFunc("GET /die", func(http.ResponseWriter, *http.Request) {
		println("the last words")
		os.Exit(3)
	})
	for _, name := range []string{"DATABASE_URL", "REDIS_URL", "KAFKA_BROKERS"} {
		if os.Getenv(name) == "" { panic(name) }
	}
	panic(http.ListenAndServe(os.Getenv("LISTEN_ADDR"), nil))
}
`}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(files[name]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestWholeStack(t *testing.T) {
	t.Parallel()
	root := idleCheckout(t)
	// Its own data folder, dev/.data: none is named.
	cmd := exec.Command(program, "-json", "-replicas", "2", "-listen", "127.0.0.1:8790")
	cmd.Dir = filepath.Join(root, "dev")
	r := startCommand(t, filepath.Join(root, "dev", ".data"), cmd)
	if urls := r.address.HTTP; !slices.Equal(urls,
		[]string{"http://127.0.0.1:8790", "http://127.0.0.1:8791"}) {
		t.Fatalf("http: %v", urls)
	}
	if wallets, _ := r.address.PIDs["wallet"].([]any); len(wallets) != 2 || len(r.address.PIDs) != 4 {
		t.Errorf("pids: %v", r.address.PIDs)
	}

	// Its audit is the service's own, of this stack whatever the environment says; its status is passed on.
	audit := exec.Command(program, "audit")
	audit.Dir = root
	audit.Env = append(os.Environ(), "DATABASE_URL=elsewhere", "KAFKA_TOPIC=elsewhere")
	said, err := audit.CombinedOutput()
	want := fmt.Sprintf("audited %s %s \n", r.address.DatabaseURL, r.address.KafkaBrokers)
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 1 || string(said) != want {
		t.Errorf("audit: %v, %q", err, said)
	}

	second := exec.Command(program, "-listen", "127.0.0.1:8790")
	second.Dir = root
	if said, err = second.CombinedOutput(); err == nil || strings.Count(string(said), "\n") != 1 ||
		!strings.Contains(string(said), "runs already (process "+fmt.Sprint(cmd.Process.Pid)+
			", the service at http://127.0.0.1:8790 ") {
		t.Errorf("a second stack says %v, %q", err, said)
	}
	elsewhere := exec.Command(program, "-listen", "127.0.0.1:8790", "-data", t.TempDir())
	elsewhere.Dir = root
	if said, err = elsewhere.CombinedOutput(); err == nil || strings.Count(string(said), "\n") != 1 ||
		!strings.Contains(string(said), "cannot listen on 127.0.0.1:8790") {
		t.Errorf("another stack on the same address says %v, %q", err, said)
	}

	pids := tree(cmd.Process.Pid)
	http.Get(r.address.HTTP[1] + "/die")
	if code := r.wait(); code != 1 || !strings.Contains(r.stderr.String(), "the last words") {
		t.Errorf("a replica died: exit status %d\n%s", code, &r.stderr)
	}
	r.nothingLeft(pids)
}

// TestPostgresAsNobody is the other way of not being root, for where containers forbid user namespaces.
func TestPostgresAsNobody(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("about root only")
	}
	data := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	home, err := identity{uid: 65534}.home(data)
	if err != nil || home == data {
		t.Fatalf("a private folder is said to be within reach: %s, %v", home, err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	command := func(args ...string) *exec.Cmd {
		cmd := exec.Command(program, append([]string{"services", "-redis", "miniredis", "-data", data},
			args...)...)
		cmd.Env = append(os.Environ(), "WALLET_DEV_USERNS=off")
		return cmd
	}
	r := startCommand(t, data, command())
	r.sql("CREATE TABLE kept AS SELECT 1")
	r.obey("kill postgres")
	r.obey("start postgres")
	pids := tree(r.cmd.Process.Pid)
	r.end()
	r.nothingLeft(pids)
	r = startCommand(t, data, command())
	if is := r.sql("SELECT count(*)::text FROM kept"); is != "1" {
		t.Errorf("after a restart: %s", is)
	}
	r.end()
	r = startCommand(t, data, command("-fresh"))
	if is := r.sql("SELECT count(*)::text FROM kept"); !strings.Contains(is, "42P01") {
		t.Errorf("after -fresh: %s", is)
	}
	r.end()
}

// startAs starts services with Postgres, as root, in a namespace or, where that is "off", as the user nobody.
// Kafka is Apache's in the first case, if the tests are asked for that.
func startAs(t *testing.T, namespace string, args ...string) (r *running, kafka string) {
	t.Helper()
	data := t.TempDir()
	if err := os.Chmod(filepath.Dir(data), 0o755); err != nil {
		t.Fatal(err)
	}
	kafka = "embedded"
	if os.Getenv("WALLET_TEST_KAFKA") == "apache" && namespace == "" {
		kafka = "apache"
	}
	cmd := exec.Command(program, append([]string{"services", "-kafka", kafka, "-data", data}, args...)...)
	cmd.Env = append(os.Environ(), "WALLET_DEV_USERNS="+namespace)
	return startCommand(t, data, cmd), kafka
}

// TestClocksAreStepped: each server's clock goes where it is told while the server runs, stays there over a
// restart, and comes back. As root, Postgres runs in a namespace first, then as the user nobody, who must be
// able to read its clock's file.
func TestClocksAreStepped(t *testing.T) {
	t.Parallel()
	for _, namespace := range []string{"", "off"} {
		r, kafka := startAs(t, namespace, "-clocks")
		// stands tells that a clock is that far from ours, but for what asking takes.
		stands := func(name string, offset time.Duration, now func() time.Time) {
			t.Helper()
			began := time.Now()
			is := now().Add(-offset)
			if is.Before(began.Add(-2*time.Second)) || is.After(time.Now().Add(time.Second)) {
				t.Errorf("the clock of %s is %v from ours, want %v", name, is.Add(offset).Sub(began), offset)
			}
		}
		for name, now := range map[string]func() time.Time{"postgres": r.postgresTime, "kafka": r.kafkaTime} {
			if name == "kafka" && kafka == "embedded" {
				_, refusal := r.order("clock kafka +1h")
				if !strings.Contains(refusal, "only Postgres and Apache Kafka") {
					t.Errorf("clock of the embedded Kafka: %q", refusal)
				}
				continue
			}
			stands(name, 0, now)
			r.obey("clock " + name + " -3h")
			stands(name, -3*time.Hour, now)
			r.obey("stop " + name)
			r.obey("clock " + name + " +90s")
			r.obey("start " + name)
			stands(name, 90*time.Second, now)
			r.obey("clock " + name + " 2d")
			stands(name, 48*time.Hour, now)
			r.obey("clock " + name + " 0")
			stands(name, 0, now)
		}
		for _, nonsense := range []string{"clock postgres", "clock what 0", "clock redis 0",
			"clock postgres soon", "clock postgres xd"} {
			if _, refusal := r.order(nonsense); refusal == "" {
				t.Errorf("%q was obeyed", nonsense)
			}
		}
		r.end()
	}
}

// TestDisksFill: on a full disk Postgres refuses what needs more of it, and goes on with the rest; when its
// WAL needs more it dies, which does not end the stack. With room again it has what it confirmed. Kafka's
// broker dies of it, and is brought back. Other disks are not full meanwhile.
func TestDisksFill(t *testing.T) {
	t.Parallel()
	for _, namespace := range []string{"", "off"} {
		r, kafka := startAs(t, namespace, "-disks", "-redis", "miniredis")
		const fill = `WITH new AS (INSERT INTO kept SELECT repeat('x', 1000) FROM generate_series(1, 5000)
			RETURNING 1) SELECT count(*)::text FROM new`
		r.sql("CREATE TABLE kept (x text)")
		r.sql(fill)
		r.obey("full postgres")
		if said := r.sql(fill); !strings.Contains(said, "53100") { // disk_full
			t.Errorf("an INSERT on a full disk: %q", said)
		}
		if count := r.sql("SELECT count(*)::text FROM kept"); count != "5000" {
			t.Errorf("a SELECT on a full disk: %s rows", count)
		}
		r.obey("room postgres")
		if said := r.sql(fill); said != "5000" {
			t.Errorf("with room again: %s", said)
		}
		r.obey("full postgres")
		var ended string
		for range 40 { // segments of 16 MB: more than it keeps ready
			const next = "SELECT pg_switch_wal()::text FROM pg_logical_emit_message(false, 'x', 'x')"
			if ended = r.sql(next); !regexp.MustCompile(`^[0-9A-F]+/[0-9A-F]+$`).MatchString(ended) {
				break
			}
		}
		log, err := os.ReadFile(filepath.Join(r.data, "logs", "postgres.log"))
		if err != nil || !strings.Contains(string(log), "PANIC:  could not write to file") {
			t.Errorf("Postgres did not die for want of WAL: %s, %v", ended, err)
		}
		r.obey("room postgres")
		if count := r.sql("SELECT count(*)::text FROM kept"); count != "10000" {
			t.Errorf("after the crash: %s rows", count)
		}
		if kafka == "embedded" {
			for _, line := range []string{"full kafka", "room kafka", "full postgres nowhere", "full redis"} {
				if _, refusal := r.order(line); refusal == "" {
					t.Errorf("%q was obeyed", line)
				}
			}
			r.end()
			continue
		}
		r.makeTopic("t")
		r.produce("t", `{"n":0}`, kgo.TryCommit)
		before := r.address.PIDs["kafka"]
		r.obey("full kafka")
		client := r.kafka(kgo.RecordDeliveryTimeout(5 * time.Second))
		client.ProduceSync(t.Context(), &kgo.Record{Topic: "t", Value: []byte("x")})
		time.Sleep(time.Second) // it halts a moment after
		r.obey("room kafka")
		pids, _ := r.order("room kafka") // once more changes nothing
		if pids["kafka"] == before || pids["kafka"] == nil {
			t.Errorf("the broker was process %v and is %v", before, pids["kafka"])
		}
		r.produce("t", `{"n":1}`, kgo.TryCommit)
		if lines := r.events("-topic", "t", "-from", "start", "-n", "2"); len(lines) != 2 {
			t.Errorf("events: %v", lines)
		}
		r.end()
	}
}

func (r *running) postgresTime() time.Time {
	r.t.Helper()
	const utc = `SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')`
	now, err := time.Parse(time.DateTime, r.sql(utc))
	if err != nil {
		r.t.Fatal(err)
	}
	return now
}

// kafkaTime is what the broker stamps on a record.
func (r *running) kafkaTime() time.Time {
	r.t.Helper()
	client := r.kafka()
	request := kmsg.NewPtrCreateTopicsRequest()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = "clock", 1, -1
	stamped, broker := kmsg.NewCreateTopicsRequestTopicConfig(), "LogAppendTime"
	stamped.Name, stamped.Value = "message.timestamp.type", &broker
	topic.Configs = append(topic.Configs, stamped)
	request.Topics = append(request.Topics, topic)
	if _, err := request.RequestWith(r.t.Context(), client); err != nil { // or it is there already
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	record, err := client.ProduceSync(ctx, &kgo.Record{Topic: "clock", Value: []byte("x")}).First()
	if err != nil {
		r.t.Fatal(err)
	}
	// The producer keeps a time of its own: what the broker wrote is what it reads back.
	at := map[string]map[int32]kgo.Offset{"clock": {0: kgo.NewOffset().At(record.Offset)}}
	records := r.kafka(kgo.ConsumePartitions(at)).PollRecords(ctx, 1).Records()
	if len(records) != 1 {
		r.t.Fatal("the record is not there to read")
	}
	return records[0].Timestamp
}

func TestBadFlagsAreOneSentence(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"what", "services -kafka x", "services -redis x", "services -pgset x",
		"services -brokers 3", "services -secure", "services -logdirs 2",
		"services -port postgres", "-port redis=70000", "audit more", "events -from x",
		"-replicas 0", "services more", "-nonsense", "events -n x"} {
		out, err := exec.Command(program, strings.Fields(args)...).CombinedOutput()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 ||
			strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v, %s", args, err, out)
		}
	}
}

// TestApacheSurvivesKills needs Java, and Maven once: WALLET_TEST_KAFKA=apache asks for it.
func TestApacheSurvivesKills(t *testing.T) {
	if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
		t.Skip("set WALLET_TEST_KAFKA=apache")
	}
	for _, brokers := range []int{1, 3} {
		t.Run(fmt.Sprint(brokers), func(t *testing.T) {
			data := t.TempDir()
			args := []string{"services", "-redis", "miniredis", "-kafka", "apache", "-brokers",
				fmt.Sprint(brokers)}
			r := start(t, data, args...)
			r.makeTopic("t")
			name := map[int]string{1: "kafka", 3: "kafka2"}[brokers]
			for i, command := range []string{"kill", "stop", "kill"} {
				r.produce("t", fmt.Sprintf(`{"n":%d}`, i), kgo.TryCommit)
				r.obey(command + " " + name)
				r.obey("start " + name)
			}
			r.obey("pause " + name)
			pids := tree(r.cmd.Process.Pid)
			r.cmd.Process.Kill()
			r.cmd.Wait()
			r.nothingLeft(pids)
			again := start(t, data, args...)
			if lines := again.events("-topic", "t", "-from", "start", "-n", "3"); len(lines) != 3 {
				t.Errorf("events: %v", lines)
			}
			again.end()
		})
	}
}

// TestSecuredApache: the service is told how to use the secured listener, which refuses whoever lacks any of
// it, also when the same cluster is started again.
func TestSecuredApache(t *testing.T) {
	if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
		t.Skip("set WALLET_TEST_KAFKA=apache")
	}
	root := idleCheckout(t)
	var password string
	for range 2 {
		cmd := exec.Command(program, "-json", "-redis", "miniredis", "-kafka", "apache", "-secure", "-listen",
			"127.0.0.1:8792")
		cmd.Dir = root
		r := startCommand(t, filepath.Join(root, "dev", ".data"), cmd)
		settings := r.address.SecureKafka
		response, err := http.Get(r.address.HTTP[0] + "/environment")
		if err != nil {
			t.Fatal(err)
		}
		var environment []string
		if err := json.NewDecoder(response.Body).Decode(&environment); err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		for name, value := range settings {
			if !slices.Contains(environment, name+"="+value) {
				t.Errorf("the service does not have %s=%s", name, value)
			}
		}
		if password != "" && password != settings["KAFKA_SASL_PASSWORD"] {
			t.Error("the password changed, but not the controller's data")
		}
		password = settings["KAFKA_SASL_PASSWORD"]

		authority, err := os.ReadFile(settings["KAFKA_TLS_CA"])
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := tls.LoadX509KeyPair(settings["KAFKA_TLS_CERT"], settings["KAFKA_TLS_KEY"])
		if err != nil {
			t.Fatal(err)
		}
		secured := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{certificate}}
		secured.RootCAs.AppendCertsFromPEM(authority)
		nobody := &tls.Config{RootCAs: secured.RootCAs}
		user := settings["KAFKA_SASL_USER"]
		for _, c := range []struct {
			name    string
			opts    []kgo.Opt
			refused bool
		}{
			{"PLAIN", []kgo.Opt{kgo.DialTLSConfig(secured),
				kgo.SASL(plain.Auth{User: user, Pass: password}.AsMechanism())}, false},
			{"SCRAM-SHA-256", []kgo.Opt{kgo.DialTLSConfig(secured),
				kgo.SASL(scram.Auth{User: user, Pass: password}.AsSha256Mechanism())}, false},
			{"SCRAM-SHA-512", []kgo.Opt{kgo.DialTLSConfig(secured),
				kgo.SASL(scram.Auth{User: user, Pass: password}.AsSha512Mechanism())}, false},
			{"PLAIN, wrong password", []kgo.Opt{kgo.DialTLSConfig(secured),
				kgo.SASL(plain.Auth{User: user, Pass: "wrong"}.AsMechanism())}, true},
			{"SCRAM-SHA-256, wrong password",
				[]kgo.Opt{kgo.DialTLSConfig(secured),
					kgo.SASL(scram.Auth{User: user, Pass: "wrong"}.AsSha256Mechanism())}, true},
			{"SCRAM-SHA-512, wrong password",
				[]kgo.Opt{kgo.DialTLSConfig(secured),
					kgo.SASL(scram.Auth{User: user, Pass: "wrong"}.AsSha512Mechanism())}, true},
			{"no SASL", []kgo.Opt{kgo.DialTLSConfig(secured)}, true},
			{"no client certificate", []kgo.Opt{kgo.DialTLSConfig(nobody),
				kgo.SASL(plain.Auth{User: user, Pass: password}.AsMechanism())}, true},
			{"no TLS", []kgo.Opt{kgo.SASL(plain.Auth{User: user, Pass: password}.AsMechanism())}, true},
		} {
			client, err := kgo.NewClient(append(c.opts, kgo.SeedBrokers(settings["KAFKA_BROKERS"]),
				kgo.RequestRetries(0))...)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			err = client.Ping(ctx)
			cancel()
			client.Close()
			if (err != nil) != c.refused || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		cmd.Process.Signal(syscall.SIGTERM)
		if code := r.wait(); code != 0 {
			t.Errorf("exit status %d", code)
		}
	}
}
