// Command release makes what a release consists of, out of a commit: static programs for four platforms, what
// each is made of (CycloneDX), and SHA256SUMS over all of that.
//
//	go run -C dev ./release                 of the commit that is checked out, into dist/
//	go run -C dev ./release -snapshot       also where CHANGELOG.md's top is "Unreleased"
//
// It builds a copy of the commit, so that nothing of the working tree gets in. The same commit gives the same
// bytes, whoever builds it and where: no paths, no times, no VCS stamp, one version of Go.
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// platforms are those that a release is for.
var platforms = []string{"linux/amd64", "linux/arm64", "darwin/amd64", "darwin/arm64"}

func main() {
	out := flag.String("out", "dist", "`folder`, in the checkout, for what is made; it must not be there yet")
	snapshot := flag.Bool("snapshot", false, "release what is not released: the version is the commit's")
	only := flag.String("platforms", strings.Join(platforms, ","), "comma-separated")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, ".", *out, *snapshot, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

// run releases the commit that is checked out around dir.
func run(ctx context.Context, dir, out string, snapshot bool, platforms []string) error {
	root, err := output(ctx, dir, "git", "rev-parse", "--show-toplevel")
	if err != nil {
		return fmt.Errorf("run this in a git checkout: %w", err)
	}
	if changed, err := output(ctx, root, "git", "status", "--porcelain"); err != nil {
		return err
	} else if changed != "" {
		return fmt.Errorf("commit or stash these first: a release is of a commit\n%s", changed)
	}
	commit, err := output(ctx, root, "git", "rev-parse", "--short=12", "HEAD")
	if err != nil {
		return err
	}
	if !filepath.IsAbs(out) {
		out = filepath.Join(root, out)
	}
	if err := os.Mkdir(out, 0o755); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("remove %s first: what is in it may be of another commit", out)
	} else if err != nil {
		return err
	}
	source, err := os.MkdirTemp("", "release-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(source)
	if err := export(ctx, root, source); err != nil {
		return err
	}
	version, err := topVersion(source)
	switch {
	case err != nil:
		return err
	case version == "" && !snapshot:
		return errors.New("give CHANGELOG.md's top a version, as in `## 1.0.0`, and commit that; " +
			"or say -snapshot")
	case version == "":
		version = "snapshot-" + commit
	}
	if err := sameGo(ctx, source); err != nil {
		return err
	}
	var files []string
	for _, platform := range platforms {
		name := fmt.Sprintf("wallet-%s-%s", version, strings.ReplaceAll(platform, "/", "-"))
		fmt.Fprintln(os.Stderr, "release: building", name)
		program := filepath.Join(out, name)
		if err := build(ctx, source, program, version, platform); err != nil {
			return err
		}
		if err := writeSBOM(program, version); err != nil {
			return err
		}
		files = append(files, name, name+".cdx.json")
	}
	// The one that runs here says the version that CHANGELOG.md says.
	here := fmt.Sprintf("wallet-%s-%s-%s", version, runtime.GOOS, runtime.GOARCH)
	if slices.Contains(files, here) {
		says, err := output(ctx, out, filepath.Join(out, here), "-version")
		if err != nil || says != version {
			return fmt.Errorf("%s -version says %q, not %q: %w", here, says, version, err)
		}
	}
	return writeSums(out, files)
}

// output runs a command and returns what it prints, trimmed.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s %s: %w %s", name, strings.Join(args, " "), err, &stderr)
	}
	return strings.TrimSpace(string(out)), err
}

// export writes the commit's files into a folder.
func export(ctx context.Context, root, folder string) error {
	cmd := exec.CommandContext(ctx, "git", "archive", "HEAD")
	cmd.Dir = root
	archive, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("git archive: %w", err)
	}
	for files := tar.NewReader(bytes.NewReader(archive)); ; {
		head, err := files.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		path := filepath.Join(folder, filepath.Clean("/"+head.Name))
		switch head.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeReg:
			var content []byte
			if content, err = io.ReadAll(files); err == nil {
				err = os.WriteFile(path, content, 0o644)
			}
		}
		if err != nil {
			return err
		}
	}
}

var heading = regexp.MustCompile(`(?m)^## (\S+)`)

// topVersion is that of CHANGELOG.md's first chapter; empty where that is not released yet.
func topVersion(source string) (string, error) {
	text, err := os.ReadFile(filepath.Join(source, "CHANGELOG.md"))
	if err != nil {
		return "", err
	}
	top := heading.FindSubmatch(text)
	switch {
	case top == nil:
		return "", errors.New("CHANGELOG.md has no chapter")
	case string(top[1]) == "Unreleased":
		return "", nil
	case !regexp.MustCompile(`^\d+\.\d+\.\d+$`).Match(top[1]):
		return "", fmt.Errorf("CHANGELOG.md's top is %q: a version is three numbers, as in 1.0.0", top[1])
	}
	return string(top[1]), nil
}

// sameGo refuses another Go than the image is built with: it would make other bytes.
func sameGo(ctx context.Context, source string) error {
	dockerfile, err := os.ReadFile(filepath.Join(source, "Dockerfile"))
	if err != nil {
		return err
	}
	wants := regexp.MustCompile(`(?m)^FROM golang:([\d.]+)`).FindSubmatch(dockerfile)
	if wants == nil {
		return errors.New("the Dockerfile does not say FROM golang:VERSION")
	}
	has, err := output(ctx, source, "go", "env", "GOVERSION")
	if err == nil && has != "go"+string(wants[1]) {
		err = fmt.Errorf("this is %s, a release is built by go%s (Dockerfile): "+
			"set GOTOOLCHAIN=go%[2]s, which fetches it", has, wants[1])
	}
	return err
}

// build makes the service's program as the Dockerfile does.
func build(ctx context.Context, source, program, version, platform string) error {
	system, machine, _ := strings.Cut(platform, "/")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X main.stamp="+version, "-o", program, ".")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+system, "GOARCH="+machine, "GOFLAGS=",
		"GOAMD64=v1", "GOARM64=v8.0", "GOEXPERIMENT=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", platform, err, out)
	}
	return nil
}

// writeSums writes SHA256SUMS, as `sha256sum -c` reads it.
func writeSums(folder string, files []string) error {
	var text strings.Builder
	for _, name := range slices.Sorted(slices.Values(files)) {
		content, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil {
			return err
		}
		fmt.Fprintf(&text, "%x  %s\n", sha256.Sum256(content), name)
	}
	return os.WriteFile(filepath.Join(folder, "SHA256SUMS"), []byte(text.String()), 0o644)
}

// The part of CycloneDX 1.5 (https://cyclonedx.org/docs/1.5/json/) that says what a program is made of.
type (
	sbom struct {
		Schema      string      `json:"$schema"`
		Format      string      `json:"bomFormat"`
		SpecVersion string      `json:"specVersion"`
		Version     int         `json:"version"`
		Metadata    metadata    `json:"metadata"`
		Components  []component `json:"components"`
		Depends     []depends   `json:"dependencies"`
	}
	metadata struct {
		Component component `json:"component"`
	}
	component struct {
		Ref        string     `json:"bom-ref"`
		Type       string     `json:"type"`
		Name       string     `json:"name"`
		Version    string     `json:"version"`
		Purl       string     `json:"purl,omitempty"`
		Properties []property `json:"properties,omitempty"`
	}
	property struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	}
	depends struct {
		Ref string   `json:"ref"`
		On  []string `json:"dependsOn"`
	}
)

// writeSBOM writes beside a program which modules are linked into it, as the program itself says, with the
// checksums of go.sum. There is no time and no serial number in it: the same program has the same one.
func writeSBOM(program, version string) error {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return err
	}
	self := component{Ref: "wallet", Type: "application", Name: "wallet", Version: version}
	for _, s := range info.Settings {
		if s.Key == "GOOS" || s.Key == "GOARCH" {
			self.Properties = append(self.Properties, property{"go:" + s.Key, s.Value})
		}
	}
	std := component{Ref: "pkg:golang/std@" + info.GoVersion, Type: "library", Name: "std",
		Version: info.GoVersion, Purl: "pkg:golang/std@" + info.GoVersion}
	list := sbom{Schema: "http://cyclonedx.org/schema/bom-1.5.schema.json", Format: "CycloneDX",
		SpecVersion: "1.5", Version: 1, Metadata: metadata{self}, Components: []component{std}}
	for _, m := range info.Deps {
		if m.Replace != nil {
			return fmt.Errorf("%s is replaced: a release is made of published modules", m.Path)
		}
		purl := "pkg:golang/" + m.Path + "@" + m.Version
		list.Components = append(list.Components, component{Ref: purl, Type: "library", Name: m.Path,
			Version: m.Version, Purl: purl, Properties: []property{{"go:sum", m.Sum}}})
	}
	on := depends{Ref: self.Ref}
	for _, c := range list.Components {
		on.On = append(on.On, c.Ref)
	}
	list.Depends = []depends{on}
	text, err := json.MarshalIndent(list, "", " ")
	return errors.Join(err, os.WriteFile(program+".cdx.json", append(text, '\n'), 0o644))
}
