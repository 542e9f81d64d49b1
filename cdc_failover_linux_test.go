// The set-piece of a Postgres failover, and memory while servers stand still. For Linux: /proc tells how the stack starts its Postgres,
// for the standby, and what the service holds.

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// TestChaosFailover: the primary is killed under load and its synchronous standby promoted, with the slot synchronised to it, and
// without: then the new primary has no slot, and the gap is filled from the ledger.
func TestChaosFailover(t *testing.T) {
	for _, synchronised := range []bool{true, false} {
		t.Run(map[bool]string{true: "synchronised slot", false: "no slot"}[synchronised], func(t *testing.T) {
			if os.Getenv("WALLET_TEST_KAFKA") != "apache" {
				t.Skip("needs WALLET_TEST_KAFKA=apache")
			}
			s, err := startServers()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.stop)
			c := &chaos{t: t, servers: s, took: make(map[string][]time.Duration)}
			database := s.database(t)
			admin := connect(t, s.DatabaseURL)
			var version int
			var folder string
			if err := admin.QueryRow(context.Background(), `SELECT current_setting('server_version_num')::int, current_setting('data_directory')`).Scan(&version, &folder); err != nil {
				t.Fatal(err)
			}
			if version < 170000 {
				t.Skip("before 17 there are no failover slots, and what was published may be lost with the primary: a stated non-guarantee")
			}
			port := c.startStandby(admin, folder, synchronised)
			c.env = map[string]string{"DATABASE_URL": withHost(t, database, port), "REDIS_URL": s.RedisURL, "KAFKA_BROKERS": s.KafkaBrokers, "KAFKA_PARTITIONS": "6", "REQUEST_TIMEOUT": "3s"}
			c.begin()
			standby := connect(t, onlyHost(t, s.DatabaseURL, port))
			if synchronised {
				eventually(t, 90*time.Second, "slot on the standby", func() bool {
					var ready bool
					err := standby.QueryRow(context.Background(), `SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = $1 AND synced AND NOT temporary`, c.cfg.replicationSlot).Scan(&ready)
					return err == nil && ready
				})
			}
			time.Sleep(5 * time.Second)
			c.command("kill postgres")
			began := time.Now()
			if _, err := standby.Exec(context.Background(), `SELECT pg_promote()`); err != nil {
				t.Fatal(err)
			}
			eventually(t, 60*time.Second, "publishing from the new primary", func() bool { return lastCheckpointOf(t, c.cfg).Timeline == 2 })
			t.Logf("publishing %v after the primary's death", time.Since(began).Round(10*time.Millisecond))
			time.Sleep(5 * time.Second)
			c.finish()
		})
	}
}

// startStandby copies the stack's Postgres and starts the copy as its synchronous standby; port is the copy's.
func (c *chaos) startStandby(admin *pgx.Conn, folder string, synchronised bool) (port string) {
	t := c.t
	c.exec(admin, `SELECT pg_create_physical_replication_slot('standby1')`)
	// The copy runs as the original does, but for folder and port.
	pidFile, err := os.ReadFile(filepath.Join(folder, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, _, _ := strings.Cut(string(pidFile), "\n")
	line, err := os.ReadFile("/proc/" + pid + "/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Readlink("/proc/" + pid + "/exe")
	if err != nil {
		t.Fatal(err)
	}
	arguments := strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")[1:]
	listener := newListener(t)
	_, port, _ = net.SplitHostPort(listener.Addr().String())
	listener.Close()
	c.command("stop postgres")
	copied := folder + "-standby"
	if out, err := exec.Command("cp", "-a", folder, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	u, _ := url.Parse(c.servers.DatabaseURL)
	settings := fmt.Sprintf("\nprimary_conninfo = 'host=127.0.0.1 port=%s user=%s dbname=postgres application_name=standby1'\nprimary_slot_name = 'standby1'\nhot_standby_feedback = on\nsync_replication_slots = %v\n",
		u.Port(), u.User.Username(), synchronised)
	conf, err := os.OpenFile(filepath.Join(copied, "postgresql.auto.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	conf.WriteString(settings)
	conf.Close()
	os.WriteFile(filepath.Join(copied, "standby.signal"), nil, 0o644)
	os.Remove(filepath.Join(copied, "postmaster.pid"))
	c.command("start postgres")

	log, err := os.Create(filepath.Join(testFolder, "standby.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for i, argument := range arguments {
		if argument == folder {
			arguments[i] = copied
		}
	}
	cmd := exec.Command(program, append(arguments, "-c", "port="+port, "-c", "wal_receiver_status_interval=1s")...)
	cmd.Stdout, cmd.Stderr = log, log
	if os.Getuid() == 0 { // Postgres will not be root; in a namespace of its own it is somebody else, and yet may touch root's files
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 0, Size: 1}}, GidMappings: []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 0, Size: 1}}}
		if info, err := os.Stat(copied); err == nil {
			if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}}
			}
		}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Signal(syscall.SIGQUIT); cmd.Wait() })

	primary := connect(t, c.servers.DatabaseURL)
	eventually(t, 30*time.Second, "standby streams", func() bool {
		var streams bool
		err := primary.QueryRow(context.Background(), `SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = 'standby1' AND state = 'streaming'`).Scan(&streams)
		return err == nil && streams
	})
	c.exec(primary, `ALTER SYSTEM SET synchronous_standby_names = 'standby1'`)
	c.exec(primary, `ALTER SYSTEM SET synchronized_standby_slots = 'standby1'`)
	c.exec(primary, `SELECT pg_reload_conf()`)
	return port
}

// withHost names a second host in a URL, and asks for whichever is the primary.
func withHost(t *testing.T, databaseURL, port string) string {
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(databaseURL, u.Host, u.Host+",127.0.0.1:"+port, 1) + "&target_session_attrs=read-write"
}

func onlyHost(t *testing.T, databaseURL, port string) string {
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(databaseURL, u.Host, "127.0.0.1:"+port, 1)
}

// TestMemoryIsBoundedWhileServersStandStill: Kafka, then Postgres is frozen under load. What piles up is refused or stays where it is.
func TestMemoryIsBoundedWhileServersStandStill(t *testing.T) {
	s, err := startServers()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	r := newReplica(t, map[string]string{"DATABASE_URL": s.DatabaseURL, "REDIS_URL": s.RedisURL, "KAFKA_BROKERS": s.KafkaBrokers, "RATE_LIMIT": "0"}, "memory")
	r.start(t)
	eventually(t, 20*time.Second, "leading", r.leads)
	var stop atomic.Bool
	var answered, refused atomic.Int64
	var clients sync.WaitGroup
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 200}}
	for c := range 100 {
		clients.Go(func() {
			for i := 0; !stop.Load(); i++ {
				body := fmt.Sprintf(`{"amount":"1","idempotency_key":"%d-%d"}`, c, i)
				response, err := client.Post(fmt.Sprintf("%s/v1/wallets/%d/deposit", r.url, c+1), "application/json", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				response.Body.Close()
				if response.StatusCode == 200 {
					answered.Add(1)
				} else {
					refused.Add(1)
				}
			}
		})
	}
	for _, server := range []string{"kafka", "postgres"} {
		time.Sleep(time.Second)
		s.command(t, "pause "+server)
		time.Sleep(7 * time.Second)
		s.command(t, "resume "+server)
	}
	time.Sleep(2 * time.Second)
	stop.Store(true)
	clients.Wait()
	eventually(t, 60*time.Second, "published", func() bool {
		return r.metric("wallet_relay_events_total") >= float64(answered.Load())
	})
	highest := r.memory("VmHWM")
	t.Logf("%d answered, %d refused, at most %.0f MB resident", answered.Load(), refused.Load(), highest)
	if highest == 0 || highest > 120 {
		t.Errorf("%.0f MB resident", highest)
	}
	checkLedger(t, s.DatabaseURL)
}
