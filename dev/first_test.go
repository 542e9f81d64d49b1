// What a newcomer meets first: ports that stay, errors that say what to do.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// portsOf is where a stack's servers listen.
func (r *running) portsOf() (ports [3]string) {
	for i, address := range []string{r.address.DatabaseURL, r.address.RedisURL,
		"kafka://" + r.address.KafkaBrokers} {
		u, err := url.Parse(address)
		if err != nil {
			r.t.Fatal(err)
		}
		ports[i] = u.Port()
	}
	return ports
}

// TestPortsStay: a start finds its servers where the last one had them. A port that another took meanwhile is
// given up with a word, a fixed one never.
func TestPortsStay(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	r := start(t, data, "services", "-redis", "miniredis")
	first := r.portsOf()
	r.end()
	r = start(t, data, "services", "-redis", "miniredis", "-fresh")
	if again := r.portsOf(); again != first {
		t.Errorf("ports %v, at the last start %v", again, first)
	}
	r.end()

	taken, err := net.Listen("tcp", "127.0.0.1:"+first[0])
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	r = start(t, data, "services", "-redis", "miniredis")
	moved := r.portsOf()
	if moved[0] == first[0] || moved[1] != first[1] || moved[2] != first[2] {
		t.Errorf("ports %v, at the last start %v", moved, first)
	}
	if want := fmt.Sprintf("port %s, which postgres had at the last start, is taken: postgres has %s now",
		first[0], moved[0]); !strings.Contains(r.stderr.String(), want) {
		t.Errorf("nothing says %q", want)
	}
	r.end()

	fixed := exec.Command(program, "services", "-data", data, "-port", "postgres="+first[0])
	if _, err := fixed.StdinPipe(); err != nil { // its end would stop the stack before it looks at the port
		t.Fatal(err)
	}
	said, err := fixed.CombinedOutput()
	if err == nil || strings.Count(string(said), "dev: ") != 1 ||
		!strings.Contains(string(said), "port "+first[0]+", which -port gives to postgres, is taken") {
		t.Errorf("a fixed port that is taken: %v, %s", err, said)
	}
	taken.Close()
	r = start(t, data, "services", "-redis", "miniredis", "-port", "postgres="+first[0])
	if fixed := r.portsOf(); fixed != first {
		t.Errorf("ports %v, postgres fixed to %s", fixed, first[0])
	}
	r.end()
}

// TestPorts: no port twice, none that another server had, and every -port is of a server.
func TestPorts(t *testing.T) {
	data := t.TempDir()
	quiet := func(string, ...any) {}
	p, err := newPorts(data, list{"kafka2=7"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	p.kept = map[string]int{"redis": p.next}
	a, err1 := p.of("postgres")
	b, err2 := p.of("redis")
	c, err3 := p.of("kafka")
	if err := errors.Join(err1, err2, err3); err != nil || a == b || b == c || a == c ||
		b != p.kept["redis"] {
		t.Error(a, b, c, err)
	}
	if err := p.keep(data); err == nil || !strings.Contains(err.Error(),
		"-port kafka2: there is no such server here, only kafka, postgres, redis") {
		t.Error(err)
	}
	p.fixed = nil
	if err := p.keep(data); err != nil {
		t.Fatal(err)
	}
	if p, err = newPorts(data, nil, quiet); err != nil || p.kept["kafka"] != c {
		t.Error(p.kept, err)
	}
	if who := suspect(5432); !strings.Contains(who, "Docker, Homebrew") || suspect(1) != "" {
		t.Error(who)
	}
}

// TestGuideOfASecuredStack: whoever writes a consumer finds all that it needs.
func TestGuideOfASecuredStack(t *testing.T) {
	c := credentials{dir: "/the/folder", password: "secret"}
	s := &stack{cfg: config{data: "/data"}, address: addresses{HTTP: []string{"http://a"},
		Operate: []string{"http://b"}, KafkaBrokers: "k:1", SecureKafka: c.settings([]string{"k:2"})}}
	for _, part := range []string{"k:1\n", "k:2", "/the/folder/ca.pem", "/the/folder/client.pem",
		"/the/folder/client.key", "wallet secret", "SCRAM-SHA-512"} {
		if !strings.Contains(s.guide(), part) {
			t.Errorf("no %s in%s", part, s.guide())
		}
	}
}

// TestAdvice: a full disk, no network and an old Go are met by programs that only say what failed.
func TestAdvice(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("no /dev/full")
	}
	logs := t.TempDir()
	full := &child{name: "initdb", log: filepath.Join(logs, "initdb.log"), err: errors.New("exit status 1")}
	out, _ := exec.Command("cp", "/proc/self/comm", "/dev/full").CombinedOutput()
	if err := os.WriteFile(full.log, out, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := full.failure("failed"); !strings.Contains(advise(err), "free some space") {
		t.Errorf("%v: %q", err, advise(err))
	}
	file, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteString("x")
	if !strings.Contains(advise(fmt.Errorf("unpacking: %w", err)), "free some space") {
		t.Errorf("%v: %q", err, advise(err))
	}

	// Go itself: a module that cannot be fetched, and one for a newer Go.
	module := t.TempDir()
	write := func(mod string) {
		for name, text := range map[string]string{"go.mod": mod,
			"main.go": "package main\nimport _ \"rsc.io/quote\"\nfunc main() {}\n"} {
			if err := os.WriteFile(filepath.Join(module, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	build := func() error {
		cmd := exec.Command("go", "build", "-mod=mod", ".")
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "GOPROXY=http://127.0.0.1:1", "GOTOOLCHAIN=local", "GOFLAGS=",
			"GOMODCACHE="+t.TempDir())
		out, err := cmd.CombinedOutput()
		failed := &child{name: "go-build", log: filepath.Join(logs, "go.log"), err: err}
		if err := os.WriteFile(failed.log, out, 0o600); err != nil {
			t.Fatal(err)
		}
		return failed.failure("failed")
	}
	write("module m\n\ngo 1.26\n\nrequire rsc.io/quote v1.5.2\n")
	if err := build(); !strings.Contains(advise(err), "GOPROXY") {
		t.Errorf("%v: %q", err, advise(err))
	}
	write("module m\n\ngo 1.999\n")
	if err := build(); !strings.Contains(advise(err), "newer Go") {
		t.Errorf("%v: %q", err, advise(err))
	}

	// Our own download.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err = download(ctx, "http://127.0.0.1:1/x", filepath.Join(logs, "x"), "", func(int) {})
	err = fmt.Errorf("no download: %w; and %w", err, errors.New("no postgres on this machine"))
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(advise(err), "go online") {
		t.Errorf("%v: %q", err, advise(err))
	}
	if advice := advise(errors.New("-kafka embedded: what?")); advice != "" {
		t.Error(advice)
	}
}

// TestOldGo: what README asks for is what both modules need.
func TestOldGo(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, module := range []string{".", ".."} {
		out, err := exec.Command("go", "-C", module, "mod", "edit", "-json").Output()
		var mod struct{ Go string }
		if err == nil {
			err = json.Unmarshal(out, &mod)
		}
		needs := "You need Go " + strings.TrimSuffix(mod.Go, ".0") + " "
		if err != nil || !strings.Contains(string(readme), needs) {
			t.Errorf("README.md does not say that %s needs Go %s: %v", module, mod.Go, err)
		}
	}
}
