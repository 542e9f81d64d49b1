// The README tells the truth: its commands run as printed, its tables match the code.

package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// changing matches what differs from run to run in the answers that the README shows.
var changing = regexp.MustCompile(`("created_at":"|"request_id":")[^"]*`)

// TestReadmeRunsAsPrinted runs the blocks marked <!-- run --> in order, with only the addresses replaced by this test's, and compares
// what they print with the block that follows.
func TestReadmeRunsAsPrinted(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	w := start(t, testEnv(t, "KAFKA_BROKERS="+stack(t).KafkaBrokers))
	dev, err := devBinary()
	if err != nil {
		t.Fatal(err)
	}
	addresses := strings.NewReplacer(
		"http://127.0.0.1:8080", w.http.URL,
		"go run -C dev . events", fmt.Sprintf("%s events -brokers %s -topic %s", dev, stack(t).KafkaBrokers, w.env["KAFKA_TOPIC"]),
	)
	blocks := regexp.MustCompile("(?s)<!-- run -->\n```sh\n(.*?)```\n(?:```json\n(.*?)```)?").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) < 5 {
		t.Fatalf("%d blocks are marked to run", len(blocks))
	}
	for _, block := range blocks {
		command := addresses.Replace(block[1])
		if command == block[1] {
			t.Errorf("no address of ours in %s", command)
		}
		out, err := exec.Command("bash", "-ec", command).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
			continue
		}
		got, want := changing.ReplaceAllString(strings.TrimSpace(string(out)), "$1..."), changing.ReplaceAllString(strings.TrimSpace(block[2]), "$1...")
		if block[2] != "" && got != want {
			t.Errorf("%s\nprints\n%s\nthe README says\n%s", command, got, want)
		}
		if strings.Contains(command, " events ") {
			lines := strings.Split(string(out), "\n")
			for i, id := range []string{"1-1", "1-2", "2-1"} {
				if !strings.Contains(string(out), `"ce_id":"`+id+`"`) {
					t.Errorf("event %d, %s, is not in\n%s", i, id, strings.Join(lines, "\n"))
				}
			}
		}
	}
}

// TestReadmeTables: every setting, route and problem that the README lists is the code's, and the other way round.
func TestReadmeTables(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| (?:`([^`]*)`)? ?\\| (.*) \\|$").FindAllStringSubmatch(string(readme), -1) {
		listed[row[1]] = row[2] + " " + row[3]
	}
	for _, s := range new(config).settings() {
		if want := s.Default + " " + s.Help; listed[s.Name] != want {
			t.Errorf("the README says of %s: %q, -h says %q", s.Name, listed[s.Name], want)
		}
		delete(listed, s.Name)
	}
	for name := range listed {
		t.Errorf("the README lists %s, which is not read", name)
	}
	for _, r := range new(server).routes() {
		path := r.Path
		for _, short := range []string{path, strings.Replace(path, "/v1/wallets/{id}", "...", 1)} {
			if strings.Contains(string(readme), short+"`") {
				path = ""
			}
		}
		if path != "" {
			t.Errorf("the README does not list %s %s", r.Method, r.Path)
		}
	}
}
