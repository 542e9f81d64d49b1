package migrate

import (
	"os"
	"strings"
	"testing"
)

func TestSteps(t *testing.T) {
	steps := Steps("-- a head that is left out\n\n-- step 2: tables\nCREATE a;\n-- step 3: kinds (alone)\n" +
		"ALTER b;\n-- a step 4: in a comment is none\n-- step 3: rules\nALTER c;\n")
	want := []Step{
		{2, "tables", "\nCREATE a;\n"},
		{3, "kinds (alone)", "\nALTER b;\n-- a step 4: in a comment is none\n"},
		{3, "rules", "\nALTER c;\n"},
	}
	for i := range want {
		if len(steps) != len(want) || steps[i] != want[i] {
			t.Fatalf("%+v, want %+v", steps, want)
		}
	}
	if steps := Steps("nothing"); steps != nil {
		t.Errorf("%+v", steps)
	}
}

// TestOurFile: the versions of the service's own file do not decrease, and a new label of a type stands
// alone, since it can be used only after its commit.
func TestOurFile(t *testing.T) {
	file, err := os.ReadFile("../../schema.sql")
	if err != nil {
		t.Fatal(err)
	}
	last := 0
	for _, s := range Steps(string(file)) {
		if s.Version < last {
			t.Errorf("step %d (%s) comes after one of version %d", s.Version, s.Title, last)
		}
		last = s.Version
		if strings.Contains(s.SQL, "ADD VALUE") && strings.Contains(s.SQL, "CHECK") {
			t.Errorf("step %d (%s) adds a label and rules", s.Version, s.Title)
		}
	}
	if last == 0 {
		t.Error("no steps")
	}
}
