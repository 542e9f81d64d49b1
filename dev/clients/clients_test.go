// Package clients proves that clients can be generated from the service's own OpenAPI document, and that
// events are as their schema says.
//
//	go test -C dev ./clients -v -parallel 8
//
// It starts the service twice through the development stack, with keys and without, and installs generators
// and linters into a temporary folder. Four generators make a client each; a program in testdata is compiled
// with it and moves money. Two linters read the document, with no more exceptions than testdata names, and
// schemathesis asks the service for what the document does not say. It needs Node, npm, Python, Java 17 and
// Maven, and registries.
//
// What is installed is pinned in the folder pins, each kind in the file that its own tools read.
// clients_test.go is the run, events_test.go the events.
package clients

import (
	"flag"
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
	"testing"
	"time"

	"wallet/dev/testbed"
)

var (
	service  = flag.String("clients.service", "../..", "folder of the service's module, perhaps a mutant")
	fuzzTime = flag.Duration("clients.fuzz", 40*time.Second, "how long schemathesis goes on")
	fuzzSeed = flag.Uint64("clients.seed", 1, "what it begins with; CI has the same each time")
)

// task is work that is done once, as soon as somebody waits for it.
type task struct {
	once sync.Once
	do   func() error
	err  error
}

func (k *task) wait(t *testing.T) {
	t.Helper()
	k.once.Do(func() { k.err = k.do() })
	if k.err != nil {
		t.Fatal(k.err)
	}
}

// lab is where everything is.
type lab struct {
	folder string
	env    []string // of all programs, besides the machine's

	npm, pip, maven, golang, stack task

	topic         string
	brokers       string
	keyed, open   string // URLs of the service with keys, and of the one without
	key           string
	documents     [2]string // files: with keys, without
	services      []*exec.Cmd
	servers       *testbed.Servers
	serviceBinary string
}

func TestClients(t *testing.T) {
	l := &lab{folder: testbed.Folder(t, "clients")}
	// None of the tools shall ask or tell anybody what it does, or write elsewhere.
	l.env = append(os.Environ(), "CI=true", "REDOCLY_TELEMETRY=off", "REDOCLY_SUPPRESS_UPDATE_NOTICE=true",
		"NO_COLOR=1", "PIP_DISABLE_PIP_VERSION_CHECK=1", "GOFLAGS=-mod=mod", "SCHEMATHESIS_HOOKS=hooks",
		"PATH="+l.path("python", "venv", "bin")+":"+os.Getenv("PATH"))
	l.npm.do, l.pip.do, l.maven.do, l.golang.do, l.stack.do = l.installNode, l.installPython, l.installJava,
		l.installGo, l.start
	t.Cleanup(l.stop)
	for name, run := range map[string]func(*testing.T){
		"Go": l.goClient, "TypeScript": l.typeScriptClient, "Python": l.pythonClient, "Java": l.javaClient,
		"Redocly": l.redocly, "Spectral": l.spectral, "Schemathesis": l.schemathesis, "Events": l.events,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			run(t)
			t.Logf("%.1f s", time.Since(began).Seconds())
		})
	}
}

// run runs a program to its end, in a folder of the lab.
func (l *lab) run(in string, command string, args ...string) (string, error) {
	cmd := exec.Command(command, args...)
	cmd.Dir = filepath.Join(l.folder, in)
	cmd.Env = append(slices.Clone(l.env), "WALLET_URL="+l.keyed, "WALLET_KEY="+l.key)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out), err
}

// must is run in a test.
func (l *lab) must(t *testing.T, in string, command string, args ...string) string {
	t.Helper()
	out, err := l.run(in, command, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// copy copies files of this folder into one of the lab, which it makes.
func (l *lab) copy(to string, files ...string) error {
	to = filepath.Join(l.folder, to)
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, filepath.Base(file)), content, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) path(elements ...string) string {
	return filepath.Join(append([]string{l.folder}, elements...)...)
}

// -----------------------------------------------------------------------------------------------------------
// The service
// -----------------------------------------------------------------------------------------------------------

// start starts servers and two processes of the service, and saves the document of each.
func (l *lab) start() error {
	l.serviceBinary = l.path("wallet")
	if err := testbed.Compile(*service, l.serviceBinary); err != nil {
		return err
	}
	var err error
	if l.servers, err = testbed.Open(l.folder); err != nil {
		return err
	}
	made, err := exec.Command(l.serviceBinary, "-new-key", "clients:read+write+operate").Output()
	if err != nil {
		return err
	}
	words := strings.Fields(string(made))
	l.key = words[slices.Index(words, "Bearer")+1]
	l.topic, l.brokers = "wallet.events", l.servers.KafkaBrokers
	env := append(testbed.Environment(), "DATABASE_URL="+l.servers.DatabaseURL,
		"REDIS_URL="+l.servers.RedisURL,
		"KAFKA_BROKERS="+l.servers.KafkaBrokers, "RATE_LIMIT=1000000", "RATE_BURST=1000000")
	if l.keyed, err = l.startService("keyed", append(env, "API_KEYS="+words[len(words)-1])); err != nil {
		return err
	}
	if l.open, err = l.startService("open", env); err != nil {
		return err
	}
	for i, from := range []string{l.keyed, l.open} {
		answer, err := http.Get(from + "/openapi.json")
		if err != nil {
			return err
		}
		document, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil {
			return err
		}
		l.documents[i] = l.path([]string{"keyed.json", "open.json"}[i])
		if err := os.WriteFile(l.documents[i], document, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// startService starts a process of the service, which is ready then.
func (l *lab) startService(name string, env []string) (url string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	address := listener.Addr().String()
	listener.Close()
	log, err := os.Create(l.path(name + ".log"))
	if err != nil {
		return "", err
	}
	defer log.Close()
	cmd := exec.Command(l.serviceBinary)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(slices.Clone(env), "LISTEN_ADDR="+address), log, log
	if err := cmd.Start(); err != nil {
		return "", err
	}
	l.services = append(l.services, cmd)
	url = "http://" + address
	for range 300 {
		if answer, err := http.Get(url + "/readyz"); err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return url, nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return "", fmt.Errorf("the service is not ready, see %s", log.Name())
}

func (l *lab) stop() {
	for _, cmd := range l.services {
		cmd.Process.Kill()
		cmd.Wait()
	}
	if l.servers != nil {
		l.servers.Close()
	}
}

// -----------------------------------------------------------------------------------------------------------
// Clients
// -----------------------------------------------------------------------------------------------------------

func (l *lab) installGo() error {
	err := l.copy("go", "pins/go.mod", "pins/go.sum", "testdata/main.go")
	if err == nil {
		_, err = l.run("go", "go", "build", "-o", "oapi-codegen",
			"github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen")
	}
	return err
}

func (l *lab) goClient(t *testing.T) {
	l.golang.wait(t)
	l.stack.wait(t)
	if err := l.copy("go/walletapi"); err != nil {
		t.Fatal(err)
	}
	l.must(t, "go", "./oapi-codegen", "-generate", "types,client", "-package", "walletapi",
		"-o", "walletapi/walletapi.go", l.documents[0])
	l.must(t, "go", "go", "vet", "./walletapi", ".")
	l.must(t, "go", "go", "run", ".")
}

func (l *lab) installNode() error {
	err := l.copy("node", "pins/package.json", "pins/package-lock.json", "testdata/main.ts",
		"testdata/redocly.yaml", "testdata/spectral.yaml")
	if err == nil {
		_, err = l.run("node", "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	}
	return err
}

func (l *lab) typeScriptClient(t *testing.T) {
	l.npm.wait(t)
	l.stack.wait(t)
	l.must(t, "node", "node_modules/.bin/openapi-typescript", l.documents[0], "-o", "schema.d.ts")
	l.must(t, "node", "node_modules/.bin/tsc", "--strict", "--noUncheckedIndexedAccess", "--target", "es2022",
		"--module", "nodenext", "--moduleResolution", "nodenext", "main.ts")
	l.must(t, "node", "node", "main.js")
}

func (l *lab) installPython() error {
	err := l.copy("python", "pins/requirements.txt", "testdata/main.py", "testdata/hooks.py",
		"testdata/schemathesis.toml")
	if err == nil {
		_, err = l.run("python", "python3", "-m", "venv", "venv")
	}
	if err == nil {
		_, err = l.run("python", "venv/bin/pip", "install", "-q", "--no-deps", "-r", "requirements.txt")
	}
	return err
}

func (l *lab) pythonClient(t *testing.T) {
	l.pip.wait(t)
	l.stack.wait(t)
	l.must(t, "python", "venv/bin/openapi-python-client", "generate", "--meta", "none", "--fail-on-warning",
		"--path", l.documents[0], "--output-path", "wallet_client")
	l.must(t, "python", "venv/bin/mypy", "--strict", "--follow-imports=silent", "wallet_client/models",
		"wallet_client/api", "main.py")
	l.must(t, "python", "venv/bin/python", "main.py")
}

func (l *lab) installJava() error {
	err := l.copy("java", "pins/pom.xml", "testdata/Main.java")
	if err == nil {
		_, err = l.run("java", "mvn", "-q", "-B",
			"org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies",
			"-DincludeScope=runtime", "-DoutputDirectory=jars")
	}
	return err
}

func (l *lab) javaClient(t *testing.T) {
	l.maven.wait(t)
	l.stack.wait(t)
	jar, err := filepath.Glob(l.path("java", "jars", "openapi-generator-cli-*.jar"))
	if err != nil || len(jar) != 1 {
		t.Fatalf("the generator: %v, %v", jar, err)
	}
	l.must(t, "java", "java", "-XX:TieredStopAtLevel=1", "-jar", jar[0], "generate", "-g", "java",
		"--library", "native", "-i", l.documents[0], "-o", "client")
	sources := []string{"-nowarn", "-d", "classes", "-cp", "jars/*", "Main.java"}
	err = filepath.WalkDir(l.path("java", "client", "src", "main"),
		func(path string, _ os.DirEntry, err error) error {
			if strings.HasSuffix(path, ".java") {
				sources = append(sources, path)
			}
			return err
		})
	if err != nil {
		t.Fatal(err)
	}
	l.must(t, "java", "javac", sources...)
	l.must(t, "java", "java", "-XX:TieredStopAtLevel=1", "-cp", "classes:jars/*", "Main")
}

// -----------------------------------------------------------------------------------------------------------
// The document
// -----------------------------------------------------------------------------------------------------------

func (l *lab) redocly(t *testing.T) {
	l.npm.wait(t)
	l.stack.wait(t)
	t.Log(l.must(t, "node", "node_modules/.bin/redocly", "lint", "--config", "redocly.yaml",
		l.documents[0], l.documents[1]))
}

func (l *lab) spectral(t *testing.T) {
	l.npm.wait(t)
	l.stack.wait(t)
	t.Log(l.must(t, "node", "node_modules/.bin/spectral", "lint", "--ruleset", "spectral.yaml",
		"--fail-severity", "hint", l.documents[0], l.documents[1]))
}

// schemathesis asks the service without keys for a while, and the one with keys once through: whether each
// route demands one.
func (l *lab) schemathesis(t *testing.T) {
	l.pip.wait(t)
	l.stack.wait(t)
	common := []string{"run", "--checks", "all", "--warnings", "off", "--seed", fmt.Sprint(*fuzzSeed)}
	open := append(slices.Clone(common), "--max-time", fmt.Sprint(int(fuzzTime.Seconds())),
		l.open+"/openapi.json")
	keyed := append(slices.Clone(common), "--phases", "examples,coverage",
		"-H", "Authorization: Bearer "+l.key, l.keyed+"/openapi.json")
	for _, args := range [][]string{open, keyed} {
		if out, err := l.run("python", "venv/bin/st", args...); err != nil {
			t.Error(err)
		} else {
			t.Log(out)
		}
	}
}
