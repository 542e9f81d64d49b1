package cmdline

import (
	"fmt"
	"strings"
	"testing"

	"wallet/internal/env"
)

var shop = Program{
	Name: "shop", Serves: "sell",
	Jobs: []Job{{Name: "close", Help: "close the shop", Options: []Job{{Name: "until", Argument: "WHEN",
		Help: "then open it"}}}, {Name: "order", Argument: "WHAT", Help: "order something"}},
	Settings: []env.Setting{
		{Name: "TILL", Group: "Money", Main: true, Help: "where money goes; required. Or not"},
		{Name: "COINS", Default: "5", Help: "how many"}, {Name: "DOOR", Group: "House", Help: "which"}},
	Try: "Try it: shop & co",
}

func TestParse(t *testing.T) {
	for _, c := range []struct{ args, job, argument, option, ends, says string }{
		{args: ""},
		{args: "-close", job: "close"},
		{args: "-close -until noon", job: "close", option: "noon"},
		{args: "-until noon", ends: "2 true", says: "say -until with -close"},
		{args: "-order tea -until noon", ends: "2 true", says: "say -until with -close"},
		{args: "--order tea", job: "order", argument: "tea"},
		{args: "-order=tea", job: "order", argument: "tea"},
		{args: "-h", ends: "0 true", says: "Usage:"},
		{args: "-help", ends: "0 true", says: "Usage:"},
		{args: "-settings", ends: "0 true", says: "how many (default 5)"},
		{args: "-close=perhaps", ends: "2 true", says: "it takes no value"},
		{args: "-clsoe", ends: "2 true", says: "flag provided but not defined: -clsoe"},
		{args: "-order", ends: "2 true", says: "flag needs an argument: -order"},
		{args: "close", ends: "2 true", says: `leave out "close"`},
		{args: "-close -order tea", ends: "2 true", says: "say -close or -order, not both"},
	} {
		var stdout, stderr strings.Builder
		asked, status, done := shop.Parse(strings.Fields(c.args), &stdout, &stderr)
		if c.ends == "" {
			c.ends = "0 false"
		}
		if ends := fmt.Sprint(status, done); asked.Job != c.job ||
			asked.Argument != c.argument || asked.Options["until"] != c.option || ends != c.ends {
			t.Errorf("%s: %+v %s", c.args, asked, ends)
		}
		said, other := &stdout, &stderr
		if status != 0 {
			said, other = other, said
			if strings.Count(said.String(), "\n") != 1 || !strings.HasPrefix(said.String(), "shop: ") {
				t.Errorf("%s: no line: %s", c.args, said)
			}
		}
		if !strings.Contains(said.String(), c.says) || other.Len() > 0 {
			t.Errorf("%s: says %q, and on the other stream %q", c.args, said, other)
		}
	}
}

func TestHelp(t *testing.T) {
	var out strings.Builder
	shop.help(&out)
	const want = `Usage:
  shop                         sell
  shop -close                  close the shop
      -until WHEN              then open it
  shop -order WHAT             order something
  shop -settings               print each setting with its default and meaning, then exit

Settings are environment variables. These matter:
  TILL          where money goes; required. Or not

The others have defaults (shop -settings tells them):
  Money     COINS
  House     DOOR

Try it: shop & co
`
	if out.String() != want {
		t.Errorf("%s", out.String())
	}
}
