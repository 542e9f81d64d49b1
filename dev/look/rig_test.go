// The servers, the replicas as processes, and the browser, each replica's page in a tab of its own.

package look

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"wallet/dev/testbed"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

type rig struct {
	t       *testing.T
	folder  string
	binary  string // the service
	browser context.Context
	axe     string // axe-core's source

	*testbed.Servers
}

func newRig(t *testing.T) *rig {
	chromium, err := exec.LookPath("chromium")
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("install Chromium (Debian: apt install chromium)")
	} else if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, folder: testbed.Folder(t, "look")}
	r.axe = axeCore(t)
	r.Servers = testbed.Start(t, r.folder, "-kafka", "embedded") // which starts within a second
	r.binary = testbed.Build(t, "../..", filepath.Join(r.folder, "wallet"))
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]), chromedp.ExecPath(chromium),
		chromedp.Flag("disable-dev-shm-usage", true))
	if os.Getuid() == 0 { // whose sandbox Chromium does not make
		options = append(options, chromedp.NoSandbox)
	}
	allocator, end := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(end)
	var close context.CancelFunc
	r.browser, close = chromedp.NewContext(allocator)
	t.Cleanup(close)
	if err := chromedp.Do(r.browser); err != nil { // which starts it
		t.Fatal(err)
	}
	return r
}

// axeCore is the source of axe-core, out of npm's registry. It is checked, since it is run.
func axeCore(t *testing.T) string {
	t.Helper()
	const version, sum = "4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	cache = filepath.Join(cache, "wallet-dev")
	file := filepath.Join(cache, "axe-core-"+version+".tgz")
	content, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(cache, 0o755); err != nil {
			t.Fatal(err)
		}
		pack := exec.Command("npm", "pack", "--silent", "--pack-destination", cache, "axe-core@"+version)
		pack.Dir = t.TempDir()
		if out, err := pack.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", pack, err, out)
		}
		content, err = os.ReadFile(file)
	}
	if err != nil {
		t.Fatal(err)
	}
	if is := sha256.Sum256(content); hex.EncodeToString(is[:]) != sum {
		t.Fatalf("%s has another SHA-256 than the one pinned", file)
	}
	source, err := exec.Command("tar", "-xzOf", file, "package/axe.min.js").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(source)
}

// replica is the service as a process, and its page in a tab.
type replica struct {
	*rig
	name, url string // url is the API's
	operate   string // host:port
	env       []string
	process   *exec.Cmd
	tab       context.Context
	sent      atomic.Int64

	mu    sync.Mutex
	wrong []string // errors on the console, requests to others
}

func (r *rig) newReplica(name string, more ...string) *replica {
	r.t.Helper()
	p := &replica{rig: r, name: name, operate: freeAddress(r.t)}
	api := freeAddress(r.t)
	p.url = "http://" + api
	p.env = append(testbed.Environment(), "DATABASE_URL="+r.DatabaseURL, "REDIS_URL="+r.RedisURL,
		"KAFKA_BROKERS="+r.KafkaBrokers, "RATE_LIMIT=0", "LOG_LEVEL=warn", "LISTEN_ADDR="+api,
		"OPERATE_ADDR="+p.operate)
	p.env = append(p.env, more...)
	return p
}

func freeAddress(t *testing.T) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// makeKey makes a key, and has the replica, not started yet, demand it.
func (p *replica) makeKey(scopes string) (key string) {
	p.t.Helper()
	out, err := exec.Command(p.binary, "-new-key", "test:"+scopes).Output()
	words := strings.Fields(string(out))
	if err != nil || len(words) < 2 {
		p.t.Fatalf("-new-key: %v %s", err, out)
	}
	p.env = append(p.env, "API_KEYS="+words[len(words)-1])
	return words[slices.Index(words, "Bearer")+1]
}

// start starts the process, waits until it is ready, and opens its page.
func (p *replica) start() {
	p.t.Helper()
	logFile, err := os.Create(filepath.Join(p.folder, p.name+".log"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer logFile.Close()
	p.process = exec.Command(p.binary)
	p.process.Env, p.process.Stderr = p.env, logFile
	if err := p.process.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		p.kill()
		if said, _ := os.ReadFile(logFile.Name()); p.t.Failed() {
			p.t.Logf("%s said:\n%s", p.name, said[max(0, len(said)-4000):])
		}
	})
	p.within("ready", 30*time.Second, func() bool {
		response, err := http.Get("http://" + p.operate + "/readyz")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == 200
	})
	var end context.CancelFunc
	p.tab, end = chromedp.NewContext(p.browser)
	p.t.Cleanup(end)
	if err := errors.Join(chromedp.Do(p.tab), chromedp.Listen(p.tab, p.watch)); err != nil {
		p.t.Fatal(err)
	}
	command(p, network.Enable, network.EnableParams{})
	command(p, log.Enable, cdp.Empty{})
	command(p, runtime.Enable, cdp.Empty{})
	command(p, emulation.SetFocusEmulationEnabled, emulation.SetFocusEmulationEnabledParams{Enabled: true})
	p.run(chromedp.Navigate("http://" + p.operate + "/"))
}

func (p *replica) kill() {
	p.process.Process.Kill()
	p.process.Wait()
}

// watch notes what must not be: errors and warnings on the console, requests to another address.
func (p *replica) watch(event any) {
	wrong := ""
	switch e := event.(type) {
	case *network.EventRequestWillBeSent:
		if u, err := url.Parse(e.Request.URL); err != nil || u.Host != p.operate && u.Scheme != "data" {
			wrong = "a request to " + e.Request.URL
		}
	case *log.EventEntryAdded:
		wrong = fmt.Sprintf("console: %s: %s %s", e.Entry.Level, e.Entry.Text, e.Entry.URL)
	case *runtime.EventConsoleAPICalled:
		wrong = "console: " + string(e.Type)
	case *runtime.EventExceptionThrown:
		wrong = "exception: " + (&chromedp.ExceptionError{ExceptionDetails: e.ExceptionDetails}).Error()
	}
	if wrong != "" {
		p.mu.Lock()
		p.wrong = append(p.wrong, wrong)
		p.mu.Unlock()
	}
}

// clean: nothing wrong was noted.
func (p *replica) clean(t *testing.T) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, wrong := range p.wrong {
		t.Errorf("page of %s: %s", p.name, wrong)
	}
}

// forgive forgets what was noted: the browser itself notes each answer of 401 or 403 as an error.
func (p *replica) forgive() {
	time.Sleep(100 * time.Millisecond)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wrong = slices.DeleteFunc(p.wrong,
		func(wrong string) bool { return strings.Contains(wrong, "status of 40") })
}

func (p *replica) run(steps ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.tab, 20*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		p.t.Fatalf("page of %s: %v", p.name, err)
	}
}

// command runs a command of the browser's protocol in the page's tab.
func command[P, R any](p *replica, c cdp.Command[P, R], params P) {
	p.t.Helper()
	if _, err := chromedp.Call(p.tab, c, params); err != nil {
		p.t.Fatalf("page of %s: %v", p.name, err)
	}
}

// eval is the value of an expression, or of its promise, as text.
func (p *replica) eval(expression string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.tab, 30*time.Second)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[any](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatalf("page of %s: %v", p.name, err)
	}
	if number, is := value.(float64); is {
		return strconv.FormatFloat(number, 'f', -1, 64)
	}
	return fmt.Sprint(value)
}

// text is what an element shows.
func (p *replica) text(selector string) string {
	p.t.Helper()
	return p.eval(fmt.Sprintf(`document.querySelector(%q)?.innerText ?? ""`, selector))
}

// number is the number that an element's text begins with, in seconds where it is a time; -1 where there is
// none.
func (p *replica) number(selector string) float64 {
	p.t.Helper()
	value, unit, _ := strings.Cut(strings.ReplaceAll(p.text(selector), ",", ""), " ")
	n, err := strconv.ParseFloat(value, 64)
	switch {
	case err != nil:
		return -1
	case strings.HasPrefix(unit, "ms"):
		return n / 1000
	}
	return n
}

func (p *replica) within(what string, most time.Duration, is func() bool) {
	p.t.Helper()
	for end := time.Now().Add(most); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			shown := ""
			if p.tab != nil {
				shown = p.text("body")
			}
			p.t.Fatalf("replica %s, within %v: not %s. The page shows:\n%s", p.name, most, what, shown)
		}
	}
}

// await waits until an element says all these words.
func (p *replica) await(what, selector string, words ...string) {
	p.t.Helper()
	p.within(fmt.Sprintf("%s: %s says %q", what, selector, words), 30*time.Second, func() bool {
		text := p.text(selector)
		return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(text, word) })
	})
}

func (p *replica) click(selector string) {
	p.t.Helper()
	p.run(chromedp.Click(chromedp.CSS(selector)))
}

func (p *replica) width(width int64) {
	p.t.Helper()
	command(p, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
		Width: width, Height: 800, DeviceScaleFactor: 1, Mobile: width < 700})
}

func (p *replica) scheme(scheme string) {
	p.t.Helper()
	feature := &emulation.MediaFeature{Name: "prefers-color-scheme", Value: scheme}
	command(p, emulation.SetEmulatedMedia,
		emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{feature}})
}

func (p *replica) post(path, body string) {
	discard(http.Post(p.url+path, "application/json", strings.NewReader(body)))
}

func (p *replica) get(path string) { discard(http.Get(p.url + path)) }

func discard(response *http.Response, err error) {
	if err == nil {
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
}

// load sends deposits of 7.25, so many a second, and reads a balance after each, until stop is called.
func (p *replica) load(perSecond int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var sending sync.WaitGroup
	sending.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for ctx.Err() == nil {
			select {
			case <-tick.C:
				sending.Go(func() {
					n := p.sent.Add(1)
					p.post(fmt.Sprintf("/v1/wallets/%d/deposit", 1+n%5),
						fmt.Sprintf(`{"amount":"7.25","idempotency_key":"%s-%d"}`, p.name, n))
					p.get(fmt.Sprintf("/v1/wallets/%d/balance", 1+n%5))
				})
			case <-ctx.Done():
			}
		}
	})
	return func() {
		cancel()
		sending.Wait()
	}
}
