// Drills: Postgres is lost under load, three times over, and comes back in the three ways that there are: a
// base backup with the archive of its WAL, nothing at all, a dump. Each time -rebuild adds what came after.

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"wallet/internal/proctest"
)

var drillFor = flag.Duration("drill", time.Second, "how long a drill moves money before Postgres is lost")

// drill is a service under load whose Postgres may be lost.
type drill struct {
	t       *testing.T
	servers *servers
	env     map[string]string
	cfg     *config
	folder  string // of Postgres' data
	program string // postgres
	replica *replica
	known   known
	runs    int

	mu           sync.Mutex
	acknowledged []acknowledgement
}

// acknowledgement is a movement that a client was told was done, and when.
type acknowledgement struct {
	movement
	at time.Time
}

func newDrill(t *testing.T, settings ...string) *drill {
	linuxOnly(t, "how Postgres was started")
	var flags []string
	for _, s := range settings {
		flags = append(flags, "-pgset", s)
	}
	s, err := startServers(flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	d := &drill{t: t, servers: s, env: testEnv(t, "DATABASE_URL="+s.database(t), "REDIS_URL="+s.RedisURL,
		"KAFKA_BROKERS="+s.KafkaBrokers, "KAFKA_PARTITIONS=3")}
	if d.cfg, err = readConfig(func(name string) string { return d.env[name] }); err != nil {
		t.Fatal(err)
	}
	admin := connect(t, s.DatabaseURL)
	if err := admin.QueryRow(context.Background(), `SHOW data_directory`).Scan(&d.folder); err != nil {
		t.Fatal(err)
	}
	pidFile, err := os.ReadFile(filepath.Join(d.folder, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	firstLine, _, _ := strings.Cut(string(pidFile), "\n")
	pid, _ := strconv.Atoi(firstLine)
	if d.program, _, err = proctest.CommandLine(pid); err != nil {
		t.Fatal(err)
	}
	return d
}

// serve starts the service.
func (d *drill) serve() {
	d.t.Helper()
	d.runs++
	d.replica = newReplica(d.t, d.env, fmt.Sprintf("drill-%d-%d", names.Add(1), d.runs))
	d.replica.start(d.t)
	eventually(d.t, 30*time.Second, "leading", d.replica.leads)
}

// post sends one request; 0 is no answer.
func (d *drill) post(path, body string) answer {
	response, err := replicaClient.Post(d.replica.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		return answer{}
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{}
	}
	// As the harness has answers: without the line's end.
	return answer{response.StatusCode, response.Header, strings.TrimSuffix(string(text), "\n")}
}

// load moves money until end is called.
func (d *drill) load() (end func()) {
	var stop atomic.Bool
	var working sync.WaitGroup
	for c := range 8 {
		working.Go(func() {
			dice := rand.New(rand.NewPCG(uint64(c), uint64(d.runs)))
			for i := 0; !stop.Load(); i++ {
				m := d.known.draw(dice, 30, fmt.Sprintf("d%d-%d-%d", d.runs, c, i))
				for !stop.Load() {
					a := d.post(m.path, m.body)
					if a.status/100 == 2 && a.final() {
						m.status, m.answer = a.status, a.body
						if err := m.read([]byte(a.body)); err != nil {
							d.t.Errorf("%s: %v", a, err)
						}
						d.known.learn(m.posted)
						d.mu.Lock()
						d.acknowledged = append(d.acknowledged, acknowledgement{m, time.Now()})
						d.mu.Unlock()
					}
					if a.status >= 200 && a.status < 500 && a.final() {
						break
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
		})
	}
	return func() { stop.Store(true); working.Wait() }
}

// lose kills Postgres under load, and then the service, which has had the time to publish what it had.
func (d *drill) lose() (when time.Time) {
	d.t.Helper()
	end := d.load()
	time.Sleep(*drillFor)
	when = time.Now()
	d.servers.command(d.t, "kill postgres")
	time.Sleep(300 * time.Millisecond)
	end()
	d.replica.kill()
	return when
}

// wallet runs the program with an option, as an operator does.
func (d *drill) wallet(option string) string {
	d.t.Helper()
	out, err := walletCommand(d.t, d.env, option).CombinedOutput()
	if err != nil {
		d.t.Fatalf("wallet %s: %v\n%s", option, err, out)
	}
	return string(out)
}

// recover rebuilds the ledger, and checks that all is there but what the relay had not published when
// Postgres was lost; then the service goes on.
func (d *drill) recover(lost time.Time) {
	t := d.t
	t.Helper()
	published := lastCheckpointOf(t, d.cfg).CommittedAt
	d.wallet("-migrate")
	began := time.Now()
	said := d.wallet("-rebuild")
	t.Logf("rebuilt in %v: %s", time.Since(began).Round(time.Millisecond), said)
	checkAudit(t, d.cfg)

	there := d.keys()
	missing, kept := 0, d.acknowledged[:0]
	for _, a := range d.acknowledged {
		whole := true
		for _, p := range a.posted {
			if there[fmt.Sprintf("%d %s", max(p.WalletID, p.FromID), p.key)] {
				continue
			}
			whole = false
			missing++
			if before := published.Sub(a.at); before > 50*time.Millisecond {
				t.Errorf("%s %s was answered %v before the last commit that was published, and is lost",
					a.path,
					p.key, before)
			}
		}
		if whole {
			kept = append(kept, a)
		}
	}
	d.acknowledged = kept
	t.Logf("%d acknowledged movements are there, %d are lost: the relay was %v behind", len(kept), missing,
		lost.Sub(published).Round(time.Millisecond))

	d.serve()
	var asking sync.WaitGroup
	for c := range 8 {
		asking.Go(func() {
			for i := c; i < len(kept); i += 8 {
				a := &kept[i]
				body, want := a.accepted()
				if body == "" {
					continue
				}
				got := d.post(a.path, body)
				if got.status != a.status || got.body != want ||
					got.header.Get("Idempotent-Replayed") != "true" {
					t.Errorf("acknowledged %s %s as %s, now %s", a.path, a.body, a.answer, got)
					return
				}
			}
		})
	}
	asking.Wait()
	if len(kept) < 100 {
		t.Errorf("only %d movements: this has proven little", len(kept))
	}
}

// keys are those of the ledger, each "<wallet> <key>".
func (d *drill) keys() map[string]bool {
	d.t.Helper()
	conn := connect(d.t, d.cfg.databaseURL)
	rows, _ := conn.Query(context.Background(),
		`SELECT wallet_id || ' ' || idempotency_key FROM entry WHERE kind <> 'transfer_in'`)
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		d.t.Fatal(err)
	}
	found := make(map[string]bool, len(list))
	for _, key := range list {
		found[key] = true
	}
	return found
}

// sh runs a script as the shell of an operator who may do anything.
func (d *drill) sh(script string, args ...string) {
	d.t.Helper()
	cmd := exec.Command("sh", append([]string{"-ec", script, "-"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		d.t.Fatalf("%v: %s", err, out)
	}
}

// baseBackup copies the data folder of a running Postgres, as the manual's "Making a Base Backup Using the
// Low Level API" says: the download of the tests has no pg_basebackup.
func (d *drill) baseBackup() (copied string) {
	t := d.t
	t.Helper()
	conn := connect(t, d.servers.DatabaseURL)
	if _, err := conn.Exec(context.Background(),
		`SELECT pg_backup_start('drill', fast => true)`); err != nil {
		t.Fatal(err)
	}
	copied = d.folder + "-base"
	d.sh(`cp -a "$1" "$2" 2>/dev/null || test -e "$2/PG_VERSION" # files come and go meanwhile
rm -rf "$2"/pg_wal/* "$2"/pg_replslot/* "$2/postmaster.pid"`, d.folder, copied)
	var label string
	if err := conn.QueryRow(context.Background(), `SELECT labelfile FROM pg_backup_stop()`).Scan(
		&label); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(copied, "backup_label"), []byte(label), 0o644); err != nil {
		t.Fatal(err)
	}
	return copied
}

// awaitArchive waits until the WAL up to now is in the archive.
func (d *drill) awaitArchive() {
	t := d.t
	t.Helper()
	conn := connect(t, d.servers.DatabaseURL)
	var file string
	err := conn.QueryRow(context.Background(), `SELECT pg_walfile_name(pg_switch_wal())`).Scan(&file)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "archived", func() bool {
		var archived bool
		err := conn.QueryRow(context.Background(),
			`SELECT last_archived_wal >= $1 FROM pg_stat_archiver`, file).Scan(&archived)
		return err == nil && archived
	})
}

// restoreBase makes Postgres' data those of a base backup and of the archive up to a time.
func (d *drill) restoreBase(copied, archive, to string) {
	t := d.t
	t.Helper()
	d.sh(`rm -rf "$1"; cp -a "$2" "$1"
printf "\nrestore_command = 'cp \"%s/%%f\" \"%%p\"'\nrecovery_target_time = '%s'
recovery_target_action = 'promote'\n" "$3" "$4" >>"$1/postgresql.auto.conf"
touch "$1/recovery.signal"
chown -R --reference="$2/PG_VERSION" "$1"`, d.folder, copied, archive, to)
	d.servers.command(t, "start postgres")
	conn := connect(t, d.servers.DatabaseURL)
	eventually(t, 60*time.Second, "recovered", func() bool {
		var recovering bool
		err := conn.QueryRow(context.Background(), `SELECT pg_is_in_recovery()`).Scan(&recovering)
		return err == nil && !recovering
	})
	conn.Close(context.Background())
}

// startEmpty makes a new cluster in the place of the old one, with an empty database of the same name.
func (d *drill) startEmpty() {
	t := d.t
	t.Helper()
	owner := filepath.Dir(d.folder)
	d.sh(`rm -rf "$1"; mkdir -m 700 "$1"; chown --reference="$2" "$1"`, d.folder, owner)
	initdb := exec.Command(filepath.Join(filepath.Dir(d.program), "initdb"), "-D", d.folder, "-U", "postgres",
		"-A",
		"trust", "-E", "UTF8", "--no-locale", "--no-sync")
	initdb.Dir = d.folder
	var err error
	if initdb.SysProcAttr, err = proctest.NotRoot(d.folder); err != nil {
		t.Fatal(err)
	}
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.servers.command(t, "start postgres")
	conn := connect(t, d.servers.DatabaseURL)
	if _, err := conn.Exec(context.Background(),
		"CREATE DATABASE "+databaseOf(d.cfg.databaseURL)); err != nil {
		t.Fatal(err)
	}
	conn.Close(context.Background())
}

// dump is the ledger as of one snapshot, and the way to put it into an empty database.
func (d *drill) dump() (restore func()) {
	t := d.t
	t.Helper()
	tools := filepath.Dir(d.program)
	if _, err := os.Stat(filepath.Join(tools, "pg_dump")); errors.Is(err, os.ErrNotExist) {
		return d.dumpRows()
	}
	file := filepath.Join(testFolder, fmt.Sprintf("drill-%d.dump", names.Add(1)))
	d.sh(`"$1/pg_dump" -Fc -f "$2" "$3"`, tools, file, d.cfg.databaseURL)
	t.Log("dumped by pg_dump")
	return func() {
		t.Helper()
		d.sh(`"$1/pg_restore" --exit-on-error -d "$3" "$2"`, tools, file, d.cfg.databaseURL)
	}
}

// dumpRows does what pg_dump and pg_restore do to our tables, where there are none (the download of the
// tests): each table's rows of one snapshot, put into the same schema with triggers off.
func (d *drill) dumpRows() (restore func()) {
	t := d.t
	t.Helper()
	ctx := context.Background()
	tables := []string{"wallet", "entry", "hold", "reversal", "reference"}
	rows := make(map[string][]byte)
	err := pgx.BeginTxFunc(ctx, connect(t, d.cfg.databaseURL), pgx.TxOptions{IsoLevel: pgx.RepeatableRead},
		func(tx pgx.Tx) error {
			for _, table := range tables {
				var text bytes.Buffer
				if _, err := tx.Conn().PgConn().CopyTo(ctx, &text, "COPY "+table+" TO STDOUT"); err != nil {
					return err
				}
				rows[table] = text.Bytes()
			}
			return nil
		})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("dumped by COPY, since this Postgres came without pg_dump")
	return func() {
		t.Helper()
		d.wallet("-migrate")
		conn := connect(t, d.cfg.databaseURL)
		if _, err := conn.Exec(ctx, `SET session_replication_role = replica`); err != nil {
			t.Fatal(err)
		}
		for _, table := range tables {
			if _, err := conn.PgConn().CopyFrom(ctx, bytes.NewReader(rows[table]),
				"COPY "+table+" FROM STDIN"); err != nil {
				t.Fatal(err)
			}
		}
		conn.Close(ctx)
	}
}

// TestDrills: a base backup and a dump are taken in the middle of the load. Then Postgres is lost three
// times. Whatever comes back, the ledger is whole but for what the relay had not published yet, who sends
// again is answered as before, no number is used twice, and the service goes on.
func TestDrills(t *testing.T) {
	archive := filepath.Join(testFolder, fmt.Sprintf("archive-%d", names.Add(1)))
	if err := errors.Join(os.Mkdir(archive, 0o777), os.Chmod(archive, 0o777)); err != nil {
		t.Fatal(err)
	}
	d := newDrill(t, "archive_mode=on", `archive_command=cp "%p" "`+archive+`/%f"`)
	d.serve()
	end := d.load()
	time.Sleep(*drillFor / 2)
	base := d.baseBackup()
	time.Sleep(*drillFor / 2)
	restoreDump := d.dump()
	time.Sleep(*drillFor / 2)
	var moment string
	if err := connect(t, d.servers.DatabaseURL).QueryRow(context.Background(), `SELECT now()::text`).Scan(
		&moment); err != nil {
		t.Fatal(err)
	}
	time.Sleep(*drillFor / 2)
	end()
	d.awaitArchive()

	t.Log("a base backup, and the archive up to a moment within the load")
	lost := d.lose()
	d.restoreBase(base, archive, moment)
	d.recover(lost)

	t.Log("the data folder is gone")
	lost = d.lose()
	d.startEmpty()
	d.recover(lost)

	t.Log("a dump of before all that")
	lost = d.lose()
	d.startEmpty()
	restoreDump()
	d.recover(lost)

	end = d.load()
	time.Sleep(*drillFor)
	end()
	checkStream(t, d.cfg) // while the relay is there: one that stops leaves the last events to the next
	d.replica.stop(t)
	checkLedgerButOutbox(t, d.cfg.databaseURL)
}

// checkLedgerButOutbox is checkLedger where entries came back without outbox rows: those were published.
func checkLedgerButOutbox(t *testing.T, databaseURL string) {
	t.Helper()
	conn := connect(t, databaseURL)
	if _, err := conn.Exec(context.Background(), `
INSERT INTO outbox (aggregate_id, seq, event_type, payload)
SELECT wallet_id, seq, '', '' FROM entry e
WHERE NOT EXISTS (SELECT FROM outbox o WHERE o.aggregate_id = e.wallet_id AND o.seq = e.seq)`); err != nil {
		t.Fatal(err)
	}
	checkLedger(t, databaseURL)
}
