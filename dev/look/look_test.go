// Package look opens the operators' page in a real Chromium, as a person would: two replicas under load,
// Kafka stopped, the leader killed, a phone, the keyboard, a key.
//
//	go test -C dev ./look -v
//
// It needs Chromium, and npm for axe-core, which looks for what keeps people out. Where there is no Chromium
// it is skipped, except in CI. With -picture FILE it leaves a picture of the page.
//
// look_test.go is what is tested, rig_test.go the servers, the replicas and the browser.
package look

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

var picture = flag.String("picture", "", "file for a picture of the page (PNG)")

// TestPage is one story, told in order: each part begins where the one before has ended, all well.
func TestPage(t *testing.T) {
	r := newRig(t)
	one, two := r.newReplica("one"), r.newReplica("two")
	one.start()
	one.await("leads", "#verdict", "All is well. This replica leads.")
	two.start()
	two.await("stands by", "#verdict", "All is well. Another replica leads.")

	for _, part := range []struct {
		name string
		do   func(t *testing.T, r *rig, one, two *replica)
	}{
		{"numbers move", numbersMove}, {"arithmetic", arithmetic}, {"findings", findings},
		{"for everybody", forEverybody}, {"live regions are quiet", liveRegionsAreQuiet},
		{"picture", takePicture}, {"Redis stopped", redisStopped}, {"Kafka stopped", kafkaStopped},
		{"a leader is killed", leaderKilled}, {"a key is needed", keyNeeded},
	} {
		going := t.Run(part.name, func(t *testing.T) {
			defer func(whole *testing.T) { r.t = whole }(r.t)
			r.t = t
			part.do(t, r, one, two)
		})
		if !going {
			return
		}
	}
}

// numbersMove: what the page says is what was done.
func numbersMove(t *testing.T, _ *rig, one, two *replica) {
	before := one.text("#at-confirmed")
	const perSecond = 50
	stop := one.load(perSecond)
	defer stop()
	// As many as were sent, while the page's window filled: on a busy machine fewer than meant.
	one.within("movements a second", 30*time.Second, func() bool {
		before := one.sent.Load()
		time.Sleep(6 * time.Second)
		shown, sent := one.number("#movements-rate"), float64(one.sent.Load()-before)/6
		return sent > 5 && shown > .8*sent && shown < 1.2*sent
	})
	two.within("movements of the other replica", 5*time.Second, func() bool {
		return two.number("#movements-rate") == 0
	})
	for _, id := range []string{"write-p50", "write-p99", "batch-mean", "batch-p50", "batch-p99",
		"commit-p50", "commit-p99", "reads-rate", "read-p50", "read-p99", "cache-hits", "txn", "retained",
		"outbox", "partitions"} {
		one.within(id, 10*time.Second, func() bool { return one.number("#"+id) > 0 })
	}
	one.await("slot", "#slot", "reserved, held")
	one.await("cache", "#cache-state", "In use")
	one.within("events a second", 10*time.Second, func() bool { return one.number("#events-rate") > 5 })
	one.within("confirmed moves", 10*time.Second, func() bool {
		return one.text("#at-confirmed") != before && strings.Contains(one.text("#at-confirmed"), "/")
	})
	one.within("twenty events", 10*time.Second, func() bool {
		return one.eval(`document.querySelectorAll("#published tr").length`) == "20"
	})
	if row := one.text("#published tr"); !strings.Contains(row, "deposit") || strings.Contains(row, "USD") {
		t.Errorf("an event is shown as %q", row)
	}
	one.click("#amounts")
	one.await("amounts", "#published tr", "7.25 USD")
	one.click("#amounts")
	one.within("no amounts", 5*time.Second,
		func() bool { return !strings.Contains(one.text("#published"), "USD") })

	one.post("/v1/wallets/1/withdraw", `{"amount":"1000000000","idempotency_key":"too much"}`)
	one.await("refusals", "#refused", "insufficient_funds")
	t.Logf("of the snapshots: %s", one.eval(`(() => {
		const all = performance.getEntriesByType("resource").filter((e) => e.name.includes("status.json"));
		const times = all.map((e) => e.duration).sort((a, b) => a - b);
		return all.at(-1).encodedBodySize + " bytes, median " + times[times.length >> 1] + " ms";
	})()`))
	stop()
	one.within("movements end", 15*time.Second, func() bool { return one.number("#movements-rate") == 0 })
	one.await("positions level", "#behind-confirmed", "level")
}

// arithmetic calls the page's own functions.
func arithmetic(t *testing.T, _ *rig, one, _ *replica) {
	for expression, want := range map[string]string{
		`lsn(0x1_0000_00AB)`: "1/AB",
		`lsn(undefined)`:     "–",
		`bytes(999)`:         "999 B",
		`bytes(1234567)`:     "1.2 MB",
		`count(12345)`:       "12,345",
		`count(0.126)`:       "0.13",
		`duration(0.00125)`:  "1.3 ms",
		`duration(61)`:       "1 min 1 s",
		`duration(7260)`:     "2 h 1 min",
		`isWrite('method="POST",route="/v1/wallets/{id}/deposit",status="200"')`: "true",
		`isWrite('method="GET",route="/v1/wallets/{id}/balance",status="200"')`:  "false",
		`isWrite('method="POST",route="/v1/wallets/{id}/deposit",status="422"')`: "false",
		// Ten up to 1, ninety up to 2: the median is 4/9 of the way between.
		`quantile({bounds: [1, 2], counts: [10, 90, 0], total: 100}, .5).toFixed(3)`: "1.444",
		`quantile({bounds: [1, 2], counts: [10, 0, 90], total: 100}, .5)`:            "Infinity",
		`quantile({bounds: [1, 2], counts: [0, 0, 0], total: 0}, .5)`:                "undefined",
	} {
		if got := one.eval(`String(` + expression + `)`); got != want {
			t.Errorf("%s is %q, want %q", expression, got, want)
		}
	}
}

// findings: each of them, from a healthy snapshot in which one thing is changed; and docs/operate.md says
// more of each.
func findings(t *testing.T, _ *rig, one, _ *replica) {
	operate, err := os.ReadFile("../../docs/operate.md")
	if err != nil {
		t.Fatal(err)
	}
	for change, want := range map[string]string{
		``:                            "",
		`s.phase = "starting"`:        "starting",
		`delete m.wallet_relay_state`: "no-relay",
		`s.refusal = "topic x is so"`: "refused",
		`m.wallet_relay_kafka_silent_seconds = 3`:                                        "kafka",
		`m.wallet_relay_lag_seconds = 3`:                                                 "lag",
		`m.wallet_relay_slot_active = 0; m.wallet_relay_state = {'state="starting"': 1}`: "no-leader",
		`m.wallet_relay_stuck_partitions = 1`:                                            "stuck",
		`delete m.wallet_relay_slot`:                                                     "postgres",
		`m.wallet_relay_slot = {'status="lost"': 1}`:                                     "slot",
		`m.wallet_relay_slot = {'status="unreserved"': 1}`:                               "slot",
		`m.wallet_relay_slot_retained_bytes = 2e9`:                                       "disk",
		`m.wallet_outbox_bytes = 21e9`:                                                   "disk",
		`m.wallet_outbox_partitions = 2`:                                                 "partitions",
		`m.wallet_cache_in_use = 0`:                                                      "cache",
		`m.wallet_queue_operations = 2001`:                                               "queue",
		`m.wallet_http_refusals_total['code="overloaded"'] = 1`:                          "overloaded",
		`m.wallet_http_refusals_total['code="unavailable"'] = 1`:                         "unavailable",
		`m.wallet_http_refusals_total['code="internal"'] = 1`:                            "internal",
	} {
		got := one.eval(`(() => {
			const real = snapshots, a = structuredClone(newest()), s = structuredClone(a), m = s.metrics;
			a.uptime_seconds -= 5;
			` + change + `;
			snapshots = [a, s];
			try { return findings().map((f) => f.id + "|" + f.see).join(); } finally { snapshots = real; }
		})()`)
		id, see, _ := strings.Cut(got, "|")
		if id != want {
			t.Errorf("%q: found %q, want %q", change, got, want)
		}
		if id != "" && !strings.Contains(string(operate), "\n## "+see+"\n") {
			t.Errorf("docs/operate.md has no heading %q", see)
		}
	}
}

// forEverybody: no finding of axe-core, in light and dark; nothing to scroll sideways on a phone; Tab leads
// to what can be used.
func forEverybody(t *testing.T, _ *rig, one, _ *replica) {
	for _, scheme := range []string{"light", "dark"} {
		one.scheme(scheme)
		one.accessible(t, scheme)
	}
	one.scheme("light")
	for _, width := range []int64{320, 390, 768} {
		one.width(width)
		one.fits(t, width)
	}
	one.width(1280)
	way := ""
	for range 3 {
		one.run(chromedp.KeyEvent(kb.Tab))
		way += one.eval(`document.activeElement.id`) + " "
	}
	if !strings.Contains(way, "amounts ") {
		t.Errorf("Tab leads to %q", way)
	}
}

// liveRegionsAreQuiet: numbers move, and nothing is read out that was said before.
func liveRegionsAreQuiet(t *testing.T, _ *rig, one, _ *replica) {
	defer one.load(20)()
	one.within("load", 10*time.Second, func() bool { return one.number("#movements-rate") > 5 })
	one.eval(`(() => {
		window.spoken = 0; window.moved = 0;
		const all = { childList: true, subtree: true, characterData: true, attributes: true };
		for (const node of document.querySelectorAll("[role=status], [aria-live], #advice")) {
			let before = node.innerText; // what is news may be told: this machine may be busy
			new MutationObserver(() => {
				if (node.innerText === before) window.spoken++;
				before = node.innerText;
			}).observe(node, all);
		}
		new MutationObserver((list) => { window.moved += list.length; }).observe(document.body, all);
		return "";
	})()`)
	time.Sleep(4 * time.Second)
	if spoken, moved := one.eval(`window.spoken`), one.eval(`window.moved`); spoken != "0" || moved == "0" {
		t.Errorf("%s changes in live regions that say nothing new, %s on the page", spoken, moved)
	}
}

func redisStopped(_ *testing.T, r *rig, one, _ *replica) {
	defer one.load(5)() // whoever asks Redis for nothing does not know
	r.Obey(r.t, "stop redis")
	one.await("words", "#advice", "nothing to do but to mend Redis", "“Redis is away”")
	one.await("words", "#cache-state", "Not in use")
	r.Obey(r.t, "start redis")
	one.await("over", "#verdict", "All is well.")
}

func kafkaStopped(t *testing.T, r *rig, one, two *replica) {
	stop := one.load(20)
	defer stop()
	r.Obey(r.t, "stop kafka")
	one.within("lag in time", 20*time.Second, func() bool { return one.number("#lag") > 1 })
	one.await("words", "#verdict", "Kafka is away since ")
	one.await("words", "#advice", "Nothing is lost", "Mend Kafka", "“The lag grows”")
	if !strings.Contains(one.eval(`document.title`), "⚠") {
		t.Error("the title does not say so")
	}
	first := one.eval(`sample(newest(), "wallet_relay_lag_bytes")`)
	one.within("lag in bytes grows", 10*time.Second, func() bool {
		now, _ := strconv.ParseFloat(one.eval(`sample(newest(), "wallet_relay_lag_bytes")`), 64)
		before, _ := strconv.ParseFloat(first, 64)
		return now > before
	})
	one.accessible(t, "with advice")
	one.scheme("dark")
	one.accessible(t, "with advice, dark")
	one.scheme("light")
	one.width(320)
	one.fits(t, 320)
	one.width(1280)
	stop()
	r.Obey(r.t, "start kafka")
	one.within("all is well again", 40*time.Second, func() bool {
		return strings.HasPrefix(one.text("#verdict"), "All is well. ") &&
			strings.HasPrefix(two.text("#verdict"), "All is well. ")
	})
}

func leaderKilled(t *testing.T, _ *rig, one, two *replica) {
	leader, other := one, two
	one.within("one leads", 20*time.Second, func() bool {
		if strings.Contains(two.text("#verdict"), "This replica leads") {
			leader, other = two, one
		}
		return strings.Contains(leader.text("#verdict"), "This replica leads") &&
			strings.Contains(other.text("#verdict"), "Another replica leads")
	})
	leader.clean(t)
	leader.kill()
	other.await("takes over", "#verdict", "All is well. This replica leads.")
	leader.await("the page of one that is gone", "#advice", "does not answer since",
		"Look at the page of another replica")
	other.post("/v1/wallets/7/deposit", `{"amount":"1","idempotency_key":"after"}`)
	other.await("publishes", "#published", "7-1")
	other.clean(t)
}

// keyNeeded: the keyboard alone leads in. The key is nowhere but in the page's memory.
func keyNeeded(t *testing.T, r *rig, _, _ *replica) {
	three := r.newReplica("three", "KAFKA_BROKERS=")
	key := three.makeKey("operate")
	three.start()
	three.await("the door", "#verdict", "A key is needed.")
	if got := three.eval(`document.activeElement.id`); got != "key" {
		t.Errorf("%q has the focus", got)
	}
	// By Tab alone, from wherever that one leads: there are two things that can have the focus.
	presses := 0
	for three.run(chromedp.KeyEvent(kb.Tab)); three.eval(`document.activeElement.id`) != "key"; presses++ {
		if presses > 4 {
			t.Fatal("Tab does not lead to the key's field")
		}
		three.run(chromedp.KeyEvent(kb.Tab))
	}
	three.accessible(t, "the door")
	three.width(320)
	three.fits(t, 320)
	three.width(1280)
	three.clean(t) // up to here nothing was refused: without a key nothing is asked

	three.run(chromedp.KeyEvent("wrong" + kb.Enter))
	three.await("a wrong key", "#verdict", "This key does not do")
	three.forgive()
	three.run(chromedp.KeyEvent(key + kb.Enter)) // it has the focus still
	three.await("inside", "#advice", "This service runs without a relay")
	if three.eval(`String(document.querySelector("#cards").hidden)`) != "false" {
		t.Error("no numbers")
	}
	three.clean(t)
	three.click("#amounts")
	three.await("amounts", "#amounts-no", "does not have the scope read")
	three.forgive()

	if kept := three.eval(`localStorage.length + sessionStorage.length`); kept != "0" {
		t.Errorf("the page stores %s items", kept)
	}
	everywhere := three.eval(`JSON.stringify([document.cookie, location.href, history.state,
		document.documentElement.outerHTML, document.querySelector("#key").value,
		performance.getEntries().map((e) => e.name)])`)
	if strings.Contains(everywhere, key) {
		t.Errorf("the key is kept: %s", everywhere)
	}
	three.click("#forget")
	three.await("forgotten", "#verdict", "The key is forgotten.")
	time.Sleep(1500 * time.Millisecond)
	if three.eval(`String(document.querySelector("#cards").hidden)`) != "true" {
		t.Error("it goes on without its key")
	}
	three.run(chromedp.Reload())
	three.await("a reload forgets it", "#verdict", "A key is needed.")
	three.clean(t)
}

// takePicture is for README.md.
func takePicture(t *testing.T, _ *rig, one, _ *replica) {
	if *picture == "" {
		return
	}
	defer one.load(400)()
	time.Sleep(45 * time.Second)
	command(one, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
		Width: 1120, Height: 880, DeviceScaleFactor: 1})
	one.eval(`scrollTo(0, 0)`)
	time.Sleep(1500 * time.Millisecond)
	shot, err := chromedp.Run(one.tab, chromedp.CaptureScreenshot())
	if err != nil {
		t.Fatal(err)
	}
	if shot, err = fewColours(shot); err == nil {
		err = os.WriteFile(*picture, shot, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	one.width(1280)
}

// fewColours makes a picture a third as large: its 255 most frequent colours will do.
func fewColours(in []byte) ([]byte, error) {
	all, err := png.Decode(bytes.NewReader(in))
	if err != nil {
		return nil, err
	}
	counts := make(map[color.Color]int)
	for y := range all.Bounds().Dy() {
		for x := range all.Bounds().Dx() {
			counts[all.At(x, y)]++
		}
	}
	more := func(a, b color.Color) int { return counts[b] - counts[a] }
	palette := slices.SortedFunc(maps.Keys(counts), more)
	few := image.NewPaletted(all.Bounds(), palette[:min(255, len(palette))])
	draw.Draw(few, few.Bounds(), all, image.Point{}, draw.Src)
	var out bytes.Buffer
	err = (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, few)
	return out.Bytes(), err
}

// accessible runs axe-core on what is shown.
func (p *replica) accessible(t *testing.T, what string) {
	t.Helper()
	p.eval(p.axe + `; ""`)
	var violations []struct {
		ID, Help string
		Nodes    []struct{ HTML, FailureSummary string }
	}
	found := p.eval(`axe.run().then((found) => JSON.stringify(found.violations))`)
	if err := json.Unmarshal([]byte(found), &violations); err != nil {
		t.Fatalf("axe: %v: %.200s", err, found)
	}
	for _, v := range violations {
		for _, n := range v.Nodes {
			t.Errorf("%s: axe: %s: %s: %s: %s", what, v.ID, v.Help, n.HTML, n.FailureSummary)
		}
	}
}

// fits: nothing to scroll sideways.
func (p *replica) fits(t *testing.T, width int64) {
	t.Helper()
	wide := p.eval(`[...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right >
		document.documentElement.clientWidth + .5).map((e) => e.tagName + "#" + e.id).join(" ")`)
	if shown := p.eval(`document.documentElement.scrollWidth`); shown != fmt.Sprint(width) || wide != "" {
		t.Errorf("%d wide, the page takes %s: %s", width, shown, wide)
	}
}
