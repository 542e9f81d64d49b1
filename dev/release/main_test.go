package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// checkout is this tree's program in a repository of its own, whose CHANGELOG.md begins as given.
func checkout(t *testing.T, changelog string) (root string) {
	t.Helper()
	root = t.TempDir()
	for _, name := range []string{"go.mod", "go.sum", "schema.sql", "Dockerfile", "docs/schemas.json",
		"internal", "."} {
		from := filepath.Join("../..", name)
		files := []string{from}
		switch name {
		case "internal":
			files, _ = filepath.Glob(from + "/*/*.*")
		case ".":
			files, _ = filepath.Glob(from + "/*.go")
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(root, strings.TrimPrefix(file, "../../")), string(content))
		}
	}
	write(t, filepath.Join(root, "CHANGELOG.md"), changelog)
	git(t, root, "init", "-q")
	commit(t, root)
	return root
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func git(t *testing.T, root string, args ...string) {
	t.Helper()
	who := []string{"-c", "user.name=test", "-c", "user.email=test@localhost"}
	cmd := exec.Command("git", append(who, args...)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

func commit(t *testing.T, root string) {
	t.Helper()
	git(t, root, "add", "-A")
	git(t, root, "commit", "-qm", "all of it")
}

// TestReleaseIsReproducible: two checkouts in two places, the second one compiled without anything of the
// first, come out the same byte for byte. What they say of themselves is CHANGELOG.md's.
func TestReleaseIsReproducible(t *testing.T) {
	const version = "98.76.5"
	here := runtime.GOOS + "/" + runtime.GOARCH
	var made [2]map[string]string
	for i := range made {
		root := checkout(t, "# Changelog\n\n## "+version+" (today)\n\n## 1.0.0\n")
		out := filepath.Join(t.TempDir(), "out")
		if i == 1 {
			t.Setenv("GOCACHE", t.TempDir())
			t.Setenv("GOFLAGS", "-race") // a developer's own
		}
		if err := run(t.Context(), root, out, false, []string{here}); err != nil {
			t.Fatal(err)
		}
		made[i] = make(map[string]string)
		files, err := os.ReadDir(out)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			content, err := os.ReadFile(filepath.Join(out, f.Name()))
			if err != nil {
				t.Fatal(err)
			}
			made[i][f.Name()] = string(content)
		}
		if i > 0 {
			continue
		}
		program := filepath.Join(out, "wallet-"+version+"-"+runtime.GOOS+"-"+runtime.GOARCH)
		says, err := exec.Command(program, "-version").Output()
		if err != nil || string(says) != version+"\n" {
			t.Errorf("-version says %q, %v", says, err)
		}
		if out, err := exec.Command("go", "version", "-m", program).Output(); err != nil ||
			bytes.Contains(out, []byte(root)) || !bytes.Contains(out, []byte("CGO_ENABLED=0")) {
			t.Errorf("go version -m: %s %v", out, err)
		}
	}
	if len(made[0]) != 3 {
		t.Errorf("made: %d files", len(made[0]))
	}
	sums := made[0]["SHA256SUMS"]
	for name, content := range made[0] {
		if made[1][name] != content {
			t.Errorf("%s is another one the second time", name)
		}
		line := fmt.Sprintf("%x  %s\n", sha256.Sum256([]byte(content)), name)
		if name != "SHA256SUMS" && !strings.Contains(sums, line) {
			t.Errorf("SHA256SUMS does not say %s", line)
		}
	}

	var list sbom
	name := "wallet-" + version + "-" + strings.ReplaceAll(here, "/", "-") + ".cdx.json"
	if err := json.Unmarshal([]byte(made[0][name]), &list); err != nil {
		t.Fatal(err)
	}
	is := make(map[string]component)
	for _, c := range list.Components {
		is[c.Name] = c
	}
	sum, err := os.ReadFile("../../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	for _, direct := range []string{"github.com/IBM/sarama", "github.com/jackc/pglogrepl",
		"github.com/jackc/pgx/v5", "github.com/redis/go-redis/v9", "github.com/shopspring/decimal"} {
		c := is[direct]
		if len(c.Properties) != 1 ||
			!strings.Contains(string(sum), direct+" "+c.Version+" "+c.Properties[0].Value+"\n") {
			t.Errorf("of %s the list says %+v, go.sum something else", direct, c)
		}
	}
	if is["std"].Version != runtime.Version() || len(list.Depends[0].On) != len(list.Components) {
		t.Errorf("std %s, %d components, %d dependencies", is["std"].Version, len(list.Components),
			len(list.Depends[0].On))
	}
}

func TestReleaseRefuses(t *testing.T) {
	root := checkout(t, "# Changelog\n\n## Unreleased\n")
	out := filepath.Join(t.TempDir(), "out")
	refused := func(says string) {
		t.Helper()
		err := run(t.Context(), root, out, false, nil)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %s", err, says)
		}
		os.Remove(out)
	}
	refused("give CHANGELOG.md's top a version")
	write(t, filepath.Join(root, "new.go"), "package main\n")
	refused("commit or stash these first")
	write(t, filepath.Join(root, "CHANGELOG.md"), "# Changelog\n\n## v1\n")
	commit(t, root)
	refused("a version is three numbers")
	write(t, filepath.Join(root, "CHANGELOG.md"), "# Changelog\n\n## 1.0.0\n")
	write(t, filepath.Join(root, "Dockerfile"), "FROM golang:1.2.3-alpine AS build\n")
	commit(t, root)
	refused("set GOTOOLCHAIN=go1.2.3")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(out, "x"), "")
	refused("remove " + out + " first")
	root = t.TempDir()
	refused("run this in a git checkout")
}
