package k8s

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"wallet/dev/testbed"
)

// cluster runs the containers' commands of the manifest as processes of this machine: their words, their
// environment, with addresses and folders of this machine in the place of the cluster's.
type cluster struct {
	t        *testing.T
	manifest *manifest
	servers  *testbed.Servers
	folder   string
	tools    string // with psql, pg_dump and pg_restore
	binary   string // the service
	here     *strings.Replacer
	starts   int
}

// postgresTools is where Postgres' programs are: the tests' download comes without those of a client.
func postgresTools(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_dump")
	if len(found) == 0 && os.Getenv("CI") == "" {
		t.Skip("install Postgres with its client's programs (Debian: apt install postgresql)")
	} else if len(found) == 0 {
		t.Fatal("no pg_dump in /usr/lib/postgresql/*/bin")
	}
	return filepath.Dir(found[len(found)-1])
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{t: t, tools: postgresTools(t), folder: testbed.Folder(t, "k8s")}
	c.servers = testbed.Start(t, c.folder, "-postgres", c.tools, "-kafka", "embedded", "-redis", "miniredis")
	c.binary = testbed.Build(t, root, filepath.Join(c.folder, "wallet"))
	var err error
	if c.manifest, err = parse(read(t, "k8s.yaml"), settings(t)); err != nil {
		t.Fatal(err)
	}
	postgres, err := url.Parse(c.servers.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(c.folder, "backup"), 0o700); err != nil {
		t.Fatal(err)
	}
	c.here = strings.NewReplacer( // of the passwords too, of which this Postgres asks for none
		"<OWNER_PASSWORD>", "o", "<SERVICE_PASSWORD>", "s", "<RELAY_PASSWORD>", "r",
		"@postgres:5432", "@"+postgres.Host, "/backup/", c.folder+"/backup/",
		"/var/lib/postgresql/initializing", c.folder+"/initializing")
	return c
}

// environment is a container's here.
func (c *cluster) environment(w *workload, container int) []string {
	server, _ := url.Parse(c.servers.DatabaseURL)
	env := append(testbed.Environment(), "PATH="+c.tools+":"+os.Getenv("PATH"), "PGPORT="+server.Port())
	seen := c.manifest.environment(w, w.containers()[container])
	for name, value := range seen {
		switch name {
		case "PGHOST":
			value = server.Hostname()
		case "KAFKA_BROKERS":
			value = c.servers.KafkaBrokers
		case "KAFKA_REPLICATION":
			value = "1"
		case "REDIS_URL":
			value = ""
		}
		env = append(env, name+"="+c.here.Replace(value))
	}
	return env
}

// run does what the containers of a job do, one after the other, and returns what they say.
func (c *cluster) run(job string) (said []string) {
	c.t.Helper()
	w := c.manifest.workload(job)
	for i, container := range w.containers() {
		words := slices.Concat(container.Command, container.Args)
		if strings.HasPrefix(container.Image, "wallet:") { // the image's entry point
			words = slices.Insert(words, 0, c.binary)
		}
		for j := range words {
			words[j] = c.here.Replace(words[j])
		}
		cmd := exec.Command(words[0], words[1:]...)
		cmd.Env = c.environment(w, i)
		out, err := cmd.CombinedOutput()
		if err != nil {
			c.t.Fatalf("%s, container %s: %v\n%s", job, container.Name, err, out)
		}
		said = append(said, string(out))
	}
	return said
}

// migrate applies the schema, as the deployment's first container does.
func (c *cluster) migrate() {
	c.t.Helper()
	w := c.manifest.workload("wallet-server")
	cmd := exec.Command(c.binary, "-migrate")
	cmd.Env = c.environment(w, 0)
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("-migrate: %v\n%s", err, out)
	}
}

// initialize is a volume's first start: an empty database and its roles, by the manifest's own script.
func (c *cluster) initialize() {
	c.t.Helper()
	mark := filepath.Join(c.folder, "initializing")
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		c.t.Fatal(err)
	}
	server, _ := url.Parse(c.servers.DatabaseURL)
	cmd := exec.Command("bash", "-euc", c.here.Replace(c.manifest.configs["postgres-init"]["roles.sh"]))
	cmd.Env = append(testbed.Environment(), "PATH="+c.tools+":"+os.Getenv("PATH"), "POSTGRES_USER=postgres",
		"PGHOST="+server.Hostname(), "PGPORT="+server.Port(), "OWNER_PASSWORD=o", "SERVICE_PASSWORD=s",
		"RELAY_PASSWORD=r")
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("roles.sh: %v\n%s", err, out)
	}
	if _, err := os.Stat(mark); !os.IsNotExist(err) {
		c.t.Errorf("roles.sh left its mark: %v", err)
	}
}

// connect comes to a database as the superuser.
func (c *cluster) connect(database string) *pgx.Conn {
	c.t.Helper()
	server, _ := url.Parse(c.servers.DatabaseURL)
	server.Path = database
	conn, err := pgx.Connect(context.Background(), server.String())
	if err != nil {
		c.t.Fatal(err)
	}
	return conn
}

// awaitPublished waits until the relay has confirmed all that was committed so far.
func (c *cluster) awaitPublished() {
	c.t.Helper()
	ctx := context.Background()
	conn := c.connect("/wallet")
	defer conn.Close(ctx)
	var now string
	if err := conn.QueryRow(ctx, `SELECT pg_current_wal_insert_lsn()::text`).Scan(&now); err != nil {
		c.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		var published bool
		err := conn.QueryRow(ctx, `SELECT confirmed_flush_lsn >= $1::pg_lsn FROM pg_replication_slots
			WHERE slot_name = 'wallet_relay'`, now).Scan(&published)
		if err == nil && published {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.t.Fatal("the relay does not publish")
}

// lose takes all away that a volume of Postgres has.
func (c *cluster) lose() {
	c.t.Helper()
	ctx := context.Background()
	conn := c.connect("/postgres")
	defer conn.Close(ctx)
	for _, statement := range []string{
		`SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = 'wallet'`,
		`DROP DATABASE IF EXISTS wallet WITH (FORCE)`,
		`DROP ROLE IF EXISTS wallet_owner, wallet_service, wallet_relay`,
	} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			c.t.Fatal(err)
		}
	}
}

// service runs the service, with the restore job's settings, until end is called, which waits until all is
// published.
func (c *cluster) service() (post func(wallet int, amount, key string) string, end func()) {
	c.t.Helper()
	w := c.manifest.workload("wallet-restore")
	c.starts++
	s := testbed.NewService(c.t, c.servers, c.folder, c.binary, fmt.Sprintf("service-%d", c.starts), "")
	env := append(c.environment(w, len(w.containers())-1), "OPERATE_ADDR=", "DRAIN_DELAY=0s",
		"API_KEYS_FILE=", "LISTEN_ADDR="+strings.TrimPrefix(s.URL, "http://"))
	s.Process = testbed.NewProcess(c.folder, s.Name, env, c.binary)
	s.Start(c.t)
	if !s.IsReady(30 * time.Second) {
		c.t.Fatal("the service is not ready")
	}
	post = func(wallet int, amount, key string) string {
		c.t.Helper()
		body := strings.NewReader(fmt.Sprintf(`{"amount":%q,"idempotency_key":%q}`, amount, key))
		response, err := http.Post(fmt.Sprintf("%s/v1/wallets/%d/deposit", s.URL, wallet),
			"application/json", body)
		if err != nil {
			c.t.Fatal(err)
		}
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != 200 {
			c.t.Fatalf("%s: %s, %v", response.Status, answer, err)
		}
		return string(answer)
	}
	return post, func() {
		c.awaitPublished()
		s.Terminate()
		<-s.Exited
	}
}

// TestBackupJobs: what the containers of the CronJobs run, run: a dump beside the service, of which the last
// 24 are kept. Then Postgres' volume is lost, and the way back gives the ledger that was: out of the dump,
// with what came after it; then out of nothing but the topic. It may be run again.
func TestBackupJobs(t *testing.T) {
	c := newCluster(t)
	dumps := func() []string {
		found, _ := filepath.Glob(filepath.Join(c.folder, "backup", "*"))
		return found
	}
	for hour := range 30 {
		name := fmt.Sprintf("backup/wallet-20250101T%06dZ.dump", hour*100)
		err := os.WriteFile(filepath.Join(c.folder, name), []byte("of an earlier hour"), 0o600)
		if err != nil {
			t.Fatal(err)
		}
	}
	c.lose() // what the servers made for others
	c.initialize()
	c.migrate()
	post, end := c.service()
	before := post(1, "10", "a")
	post(7, "1", "c")
	c.run("wallet-backup")
	if n := len(dumps()); n != 24 {
		t.Errorf("%d dumps are kept", n)
	}
	after := post(1, "5.5", "b")
	end()

	for _, way := range []struct{ name, says string }{
		{"the newest dump", "2 wallets and 3 events in the topic, 1 entries added"},
		{"the topic alone", "2 wallets and 4 events in the topic, 4 entries added"},
	} {
		t.Log(way.name)
		c.lose()
		c.initialize()
		if said := c.run("wallet-restore"); !strings.Contains(said[len(said)-1], way.says) {
			t.Errorf("want %q: %s", way.says, said)
		}
		again := c.run("wallet-restore")
		if !strings.Contains(again[len(again)-1], " 0 entries added") {
			t.Errorf("again: %s", again)
		}
		post, end = c.service()
		if a, b := post(1, "10", "a"), post(1, "5.5", "b"); a != before || b != after {
			t.Errorf("answered %s and %s before, now %s and %s", before, after, a, b)
		}
		if a := post(7, "1", way.name); !strings.Contains(a, `"wallet_id":7`) {
			t.Error(a)
		}
		end()
		for _, file := range dumps() {
			os.Remove(file)
		}
	}
}
