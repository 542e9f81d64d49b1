// The service itself, as a user of the stack runs it: built from the module above this one, one process per
// replica, configured by environment alone.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// checkout finds the folder of the service's module from anywhere inside it; this module is its folder dev.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if mod, err := os.ReadFile(filepath.Join(dir, "dev", "go.mod")); err == nil &&
			strings.HasPrefix(string(mod), "module wallet/dev\n") {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("not inside the checkout: change into it, then `go run -C dev .`")
		}
	}
}

func buildService(
	ctx context.Context, procs *processes, data string, say func(string, ...any),
) (string, error) {
	root, err := checkout()
	if err != nil {
		return "", err
	}
	say("compiling the service (slow the first time)")
	began := time.Now()
	binary := filepath.Join(data, binaryName)
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Dir = root
	defer every(15*time.Second, func() { say("still compiling: all that it is made of, once") })()
	if err := procs.run(ctx, "go-build", build); err != nil {
		return "", err
	}
	if took := time.Since(began); took > 5*time.Second {
		say("compiled in %.0f s", took.Seconds())
	}
	return binary, nil
}

// binaryName is the service's program in the data folder.
const binaryName = "wallet"

// every calls f now and then until stop is called, for who would take silence for an end.
func every(pause time.Duration, f func()) (stop func()) {
	ticks, done := time.NewTicker(pause), make(chan struct{})
	go func() {
		for {
			select {
			case <-ticks.C:
				f()
			case <-done:
				return
			}
		}
	}()
	return func() { ticks.Stop(); close(done) }
}

// listenAddresses are those of all replicas: -listen and the ports after it.
func (c config) listenAddresses() ([]string, error) {
	host, port, err := net.SplitHostPort(c.listen)
	first, err2 := strconv.Atoi(port)
	if err != nil || err2 != nil {
		return nil, fmt.Errorf("-listen %s: say host:port, as in 127.0.0.1:8080", c.listen)
	}
	var all []string
	for i := range c.replicas {
		address := net.JoinHostPort(host, strconv.Itoa(first+i))
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("the service cannot listen on %s (%w): stop what listens there, "+
				"or choose another place with -listen 127.0.0.1:8090", address, err)
		}
		l.Close()
		all = append(all, address)
	}
	return all, nil
}

// startService starts the replicas one after the other: the first applies the schema.
func (s *stack) startService(ctx context.Context, binary string) error {
	listen, err := s.cfg.listenAddresses()
	if err != nil {
		return err
	}
	environment := s.address.environment()
	if !s.cfg.rateLimit {
		environment = append(environment, "RATE_LIMIT=0")
	}
	if s.cfg.key {
		key, line, err := newKey(ctx, binary)
		if err != nil {
			return err
		}
		s.address.APIKey = key
		environment = append(environment, "API_KEYS="+line)
	}
	for i, address := range listen {
		w := &server{name: "wallet"}
		if len(listen) > 1 {
			w.name = fmt.Sprintf("wallet%d", i+1)
		}
		port, err := s.ports.of("operators" + strings.TrimPrefix(w.name, "wallet"))
		if err != nil {
			return err
		}
		operators := fmt.Sprintf("127.0.0.1:%d", port)
		w.start = func(context.Context) (*child, error) {
			cmd := exec.Command(binary)
			cmd.Dir = s.cfg.data
			cmd.Env = append(slices.Clone(environment), "LISTEN_ADDR="+address, "OPERATE_ADDR="+operators)
			return s.procs.start(w.name, cmd, syscall.SIGTERM)
		}
		w.ready = func(ctx context.Context) error { return untilReady(ctx, "http://"+address+"/readyz") }
		s.servers = append(s.servers, w)
		s.address.HTTP = append(s.address.HTTP, "http://"+address)
		s.address.Operate = append(s.address.Operate, "http://"+operators)
		if err := s.up(ctx, w); err != nil {
			return err
		}
	}
	return nil
}

// newKey has the service make an API key for everything: the key, and the line that admits it.
func newKey(ctx context.Context, binary string) (key, line string, err error) {
	out, err := exec.CommandContext(ctx, binary, "-new-key", "dev:read+write+operate").Output()
	words := strings.Fields(string(out))
	if err != nil || len(words) < 2 {
		return "", "", fmt.Errorf("wallet -new-key: %w %s", err, out)
	}
	return words[slices.Index(words, "Bearer")+1], words[len(words)-1], nil
}

func untilReady(ctx context.Context, url string) error {
	client := http.Client{Timeout: 2 * time.Second}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// guide is what a human sees once all is ready.
func (s *stack) guide() string {
	var data string
	if s.cfg.dataNamed {
		data = " -data " + s.cfg.data
	}
	var key string
	if s.address.APIKey != "" {
		key = "-H 'Authorization: Bearer " + s.address.APIKey + "' "
	}
	kafka := s.address.KafkaBrokers
	if secure := s.address.SecureKafka; secure != nil {
		kafka += fmt.Sprintf(`
  by TLS    %s, which the service uses; for another client:
            CA certificate      %s
            client certificate  %s
            its key             %s
            user and password   %s %s (SASL %s, or PLAIN)`, secure["KAFKA_BROKERS"], secure["KAFKA_TLS_CA"],
			secure["KAFKA_TLS_CERT"], secure["KAFKA_TLS_KEY"], secure["KAFKA_SASL_USER"],
			secure["KAFKA_SASL_PASSWORD"], secure["KAFKA_SASL_MECHANISM"])
	}
	return fmt.Sprintf(`
The wallet service is ready.

  look here %[2]s (a page that shows it at work; metrics and profiles too)
  service   %[1]s
  postgres  %[3]s
  redis     %s
  kafka     %s
  data      %s (logs in logs/)

Try, in another terminal:

  curl %[8]s--json '{"amount":"100","idempotency_key":"d1"}' %[7]s/v1/wallets/1/deposit
  curl %[8]s--json '{"amount":"10.50","to_id":2,"idempotency_key":"t1"}' %[7]s/v1/wallets/1/transfer
  curl %[8]s%[7]s/v1/wallets/1/balance
  curl %[8]s%[7]s/v1/wallets/1/history
  curl %[8]s%[10]s/metrics
  go run -C dev . events%[9]s -from start
  go run -C dev . audit%[9]s

Ports stay the same at the next start. Ctrl-C stops everything; the data stays.
`, strings.Join(s.address.HTTP, "  "), strings.Join(s.address.Operate, "  "), s.address.DatabaseURL,
		s.address.RedisURL, kafka, s.cfg.data, s.address.HTTP[0], key, data, s.address.Operate[0])
}
