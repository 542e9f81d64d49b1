package env

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestReadTakesValueThenDefault(t *testing.T) {
	var s, unset string
	var n int
	var d time.Duration
	var on bool
	var level slog.Level
	var hosts []string
	var ranges []netip.Prefix
	settings := []Setting{
		{Name: "S", Default: "x", Set: Text(&s)}, {Name: "UNSET", Set: Text(&unset)},
		{Name: "N", Default: "5", Set: Int(&n, 1, 9)},
		{Name: "D", Default: "1m", Set: Duration(&d, 0, time.Hour)},
		{Name: "ON", Set: Bool(&on)}, {Name: "LEVEL", Set: Level(&level)},
		{Name: "HOSTS", Set: HostPorts(&hosts)}, {Name: "RANGES", Set: Prefixes(&ranges)},
	}
	given := map[string]string{"N": "9", "ON": "true", "LEVEL": "warn",
		"HOSTS": "a:1, b:2", "RANGES": "10.0.0.0/8"}
	if err := Read(settings, func(name string) string { return given[name] }); err != nil {
		t.Fatal(err)
	}
	if s != "x" || unset != "" || n != 9 || d != time.Minute || !on || level != slog.LevelWarn ||
		!slices.Equal(hosts, []string{"a:1", "b:2"}) || len(ranges) != 1 {
		t.Error(s, unset, n, d, on, level, hosts, ranges)
	}
}

func TestRefusalsSayWhatToDo(t *testing.T) {
	var s string
	var n int
	var d time.Duration
	var hosts []string
	var ranges []netip.Prefix
	for _, c := range []struct {
		value string
		set   func(string) error
		want  string
	}{
		{"0", Int(&n, 1, 9), "a whole number from 1 to 9"},
		{"10", Int(&n, 1, 9), "a whole number from 1 to 9"},
		{"2h", Duration(&d, 0, time.Hour), "a duration from 0s to 1h0m0s, such as"},
		{"ftp://x", URL(&s, "http", "https"), "a URL that begins with http://"},
		{"c", OneOf(&s, "", "a", "b"), "one of a, b"},
		{"abcd", Matching(&s, 3, "abcd"), "at most 3 characters"},
		{"x", Matching(&s, 3, "abc"), "at most 3 characters"},
		{"a:70000", HostPorts(&hosts), "host:port"},
		{":1", HostPorts(&hosts), "host:port"},
		{"10.0.0.1", Prefixes(&ranges), "address ranges"},
	} {
		read := func(secret bool) error {
			setting := Setting{Name: "X", Help: "what it is", Secret: secret, Set: c.set}
			return Read([]Setting{setting}, func(string) string { return c.value })
		}
		err := read(false)
		if err == nil || !strings.HasPrefix(err.Error(), "set X to "+c.want) ||
			!strings.HasSuffix(err.Error(), ": what it is") ||
			!strings.Contains(err.Error(), `(it is "`+c.value+`")`) {
			t.Errorf("%q: %v", c.value, err)
		}
		if err := read(true); !strings.Contains(err.Error(), `(it is "a secret, not shown")`) {
			t.Errorf("a secret is shown: %v", err)
		}
	}
}

func TestPrint(t *testing.T) {
	var out strings.Builder
	Print(&out, []Setting{{Name: "A", Default: "1s", Help: "how long"}, {Name: "B", Help: "whom"}})
	const want = "  A                       how long (default 1s)\n  B                       whom\n"
	if out.String() != want {
		t.Errorf("%q", out.String())
	}
}
