// Package testbed runs what tests from outside need, each a process of its own: the servers, which are `dev
// services`, the service, and whatever else is to be killed. It is for tests of packages one folder below
// this module's.
package testbed

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"wallet/internal/proctest"
)

// Folder makes a folder that Postgres, which may run as somebody else, can reach. It is kept if the test
// fails, within proctest.Folder's bounds.
func Folder(t *testing.T, name string) string {
	t.Helper()
	folder, err := proctest.Folder(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs are in %s", folder)
		} else {
			os.RemoveAll(folder)
		}
	})
	return folder
}

// Build compiles the program of a module.
func Build(t *testing.T, module, binary string) string {
	t.Helper()
	if err := Compile(module, binary); err != nil {
		t.Fatal(err)
	}
	return binary
}

// Compile compiles the program of a module.
func Compile(module, binary string) error {
	if out, err := exec.Command("go", "build", "-C", module, "-o", binary, ".").CombinedOutput(); err != nil {
		return fmt.Errorf("go build -C %s: %w\n%s", module, err, out)
	}
	return nil
}

// Environment is the machine's, without what may stand there of a real deployment.
func Environment() []string {
	foreign := []string{"MIGRATE_URL", "REPLICATION_URL", "PG", "KAFKA_", "API_KEYS", "TLS_", "OPERATE_ADDR"}
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return slices.ContainsFunc(foreign, func(prefix string) bool { return strings.HasPrefix(v, prefix) })
	})
}

// Servers is `dev services`.
type Servers struct {
	DatabaseURL  string `json:"database_url"`
	RedisURL     string `json:"redis_url"`
	KafkaBrokers string `json:"kafka_brokers"`

	mu     sync.Mutex // one command at a time
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
}

// Start starts servers as Open does. They end with the test.
func Start(t *testing.T, folder string, more ...string) *Servers {
	t.Helper()
	s, err := Open(folder, more...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Open starts the servers that the WALLET_TEST_ variables choose, but for what more, which are arguments of
// `dev services`, says otherwise. They run until Close.
func Open(folder string, more ...string) (*Servers, error) {
	binary := filepath.Join(folder, "dev")
	if err := Compile("..", binary); err != nil {
		return nil, err
	}
	args := []string{"services", "-data", filepath.Join(folder, "data")}
	for _, server := range []string{"kafka", "postgres", "redis"} {
		if value := os.Getenv("WALLET_TEST_" + strings.ToUpper(server)); value != "" {
			args = append(args, "-"+server, value)
		}
	}
	var said bytes.Buffer
	s := &Servers{cmd: exec.Command(binary, append(args, more...)...)}
	s.cmd.Stderr = &said
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.stdout = bufio.NewReader(out)
	line, err := s.stdout.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, s)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("%v: %w\n%s", s.cmd, err, &said)
	}
	return s, nil
}

// Close ends the servers.
func (s *Servers) Close() {
	s.stdin.Close()
	s.cmd.Wait()
}

// Obey sends control lines and waits until they are done.
func (s *Servers) Obey(t *testing.T, lines ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, line := range lines {
		fmt.Fprintln(s.stdin, line)
		answer, err := s.stdout.ReadBytes('\n')
		var done struct{ Error string }
		if err == nil {
			err = json.Unmarshal(answer, &done)
		}
		if err != nil || done.Error != "" {
			t.Errorf("%s: %v %s", line, err, done.Error)
			return
		}
	}
}

// Process is a program that is killed and started again. It fails the test if it ends by itself.
type Process struct {
	Name   string
	Log    string // file of all that it says
	Exited chan struct{}

	args   []string
	env    []string
	cmd    *exec.Cmd
	killed atomic.Bool // by us, or it may end
}

// NewProcess is one that is still to be started.
func NewProcess(folder, name string, env []string, args ...string) *Process {
	return &Process{Name: name, Log: filepath.Join(folder, name+".log"), env: env, args: args}
}

// Start starts it.
func (p *Process) Start(t *testing.T) {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Error(err)
		return
	}
	defer log.Close()
	cmd := exec.Command(p.args[0], p.args[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = p.env, log, log
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	exited := make(chan struct{})
	p.killed.Store(false)
	p.cmd, p.Exited = cmd, exited
	go func() {
		cmd.Wait()
		if !p.killed.Load() {
			t.Errorf("%s ended by itself: %v", p.Name, cmd.ProcessState)
		}
		close(exited)
	}()
}

// Kill kills it, and returns when it is gone.
func (p *Process) Kill() {
	p.killed.Store(true)
	p.cmd.Process.Kill()
	<-p.Exited
}

// Terminate asks it to end.
func (p *Process) Terminate() {
	p.killed.Store(true)
	p.cmd.Process.Signal(syscall.SIGTERM)
}

// Freeze stops it for a while.
func (p *Process) Freeze(d time.Duration) {
	p.cmd.Process.Signal(syscall.SIGSTOP)
	time.Sleep(d)
	p.cmd.Process.Signal(syscall.SIGCONT)
}

// Service is one replica of the service.
type Service struct {
	*Process
	URL string
}

// NewService is a replica that is still to be started. databaseURL is its way to Postgres, but for its relay
// and its schema, which have the servers' own.
func NewService(t *testing.T, s *Servers, folder, binary, name, databaseURL string) *Service {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	address := listener.Addr().String()
	env := append(Environment(), "DATABASE_URL="+databaseURL, "MIGRATE_URL="+s.DatabaseURL,
		"REPLICATION_URL="+s.DatabaseURL, "REDIS_URL="+s.RedisURL, "KAFKA_BROKERS="+s.KafkaBrokers,
		"LISTEN_ADDR="+address, "RATE_LIMIT=0", "REQUEST_TIMEOUT=2s")
	return &Service{NewProcess(folder, name, env, binary), "http://" + address}
}

// IsReady waits until the replica says so.
func (s *Service) IsReady(most time.Duration) bool {
	client := http.Client{Timeout: time.Second}
	for deadline := time.Now().Add(most); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		response, err := client.Get(s.URL + "/readyz")
		if err != nil {
			continue
		}
		response.Body.Close()
		if response.StatusCode == 200 {
			return true
		}
	}
	return false
}
