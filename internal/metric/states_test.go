package metric

import (
	"strings"
	"testing"
)

// TestStates: all are there, and one is 1.
func TestStates(t *testing.T) {
	var out strings.Builder
	NewWriter(&out).States("s", "S.", "on", "off", "on")
	want := "# HELP s S.\n# TYPE s gauge\n" + `s{state="off"} 0` + "\n" + `s{state="on"} 1` + "\n"
	if out.String() != want {
		t.Errorf("got:\n%s", out.String())
	}
}
