// Postgres: where its programs come from, who it runs as, and a cluster of its own in the data folder. The
// programs are the machine's own, or those of Maven Central's io.zonky.test.postgres, pinned by checksum.
//
// At worst the cluster is as a killed machine leaves it: fsync is on, and initdb works in another place.
// A data folder holds one cluster per major version, so that no other version touches it.

package main

import (
	"archive/tar"
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/xi2/xz"
)

const pinnedPostgres = "18.6.0"

// pinnedArchives: platform as Go names it, as the archives do, and the jar's SHA-256.
var pinnedArchives = map[string][2]string{
	"linux/amd64":  {"linux-amd64", "008ee189eaa7ca2b58bd01dd950291e638b998392cf982297acd4779ec898ac1"},
	"linux/arm64":  {"linux-arm64v8", "5f54e016723afa6213925a8acb939bac52944b1d348f65c7a20f0cd2928c31be"},
	"darwin/amd64": {"darwin-amd64", "690941008aac9ee360820fde9bb7870a4f3dcac5e9e2f9e45e42333a436ad0f9"},
	"darwin/arm64": {"darwin-arm64v8", "8f6ed6f38195b50a40712ada8b2a12060b6193c1a6977a6eb5cff053bb5a1b89"},
}

// postgres is how to run it: bin and data are reachable for the identity it runs as.
type postgres struct {
	procs *processes
	as    identity
	bin   string // folder with postgres and initdb
	data  string // the cluster
	port  int
	set   []string // further settings, name=value
	clock *clock
	disk  *disk
}

// identity is who Postgres runs as: it refuses root. The zero value is ourselves.
type identity struct {
	uid, gid  int  // nobody's, when we are root
	namespace bool // in a user namespace: real owner of its files is root
}

// notRoot prefers the namespace, where folders of mode 0700 are no obstacle and nothing changes its owner;
// containers often forbid it. WALLET_DEV_USERNS=off tries the other way where both work.
func notRoot() (identity, error) {
	if os.Geteuid() != 0 {
		return identity{}, nil
	}
	nobody, err := user.Lookup("nobody") // initdb wants its uid in passwd
	if err != nil {
		return identity{}, fmt.Errorf("postgres refuses to run as root, "+
			"and there is no user nobody to run it as: %w", err)
	}
	var id identity
	id.uid, _ = strconv.Atoi(nobody.Uid)
	id.gid, _ = strconv.Atoi(nobody.Gid)
	if os.Getenv("WALLET_DEV_USERNS") != "off" {
		if probe, err := self("_true"); err == nil {
			probe.SysProcAttr = &syscall.SysProcAttr{}
			id.namespace = inUserNamespace(probe.SysProcAttr, id.uid, id.gid) && probe.Run() == nil
		}
	}
	return id, nil
}

func (id identity) command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	switch {
	case id.namespace:
		inUserNamespace(cmd.SysProcAttr, id.uid, id.gid)
	case id.uid != 0:
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(id.uid), Gid: uint32(id.gid)}
	}
	return cmd
}

// own hands a folder of an earlier start, perhaps under another identity, to this one.
func (id identity) own(dir string) error {
	uid, gid := id.uid, id.gid
	if id.namespace {
		uid, gid = 0, 0
	}
	if info, err := os.Stat(dir); err != nil || os.Geteuid() != 0 ||
		int(info.Sys().(*syscall.Stat_t).Uid) == uid {
		return err
	}
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, uid, gid))
	})
}

// home is a folder inside data, or instead of it, where this identity can work.
func (id identity) home(data string) (string, error) {
	if id.namespace || id.uid == 0 {
		return data, nil
	}
	for dir := data; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return "", err
		}
		if info.Mode()&0o001 == 0 {
			break
		}
		if dir == "/" {
			return data, nil
		}
	}
	public, err := publicFolder()
	if err != nil {
		return "", err
	}
	sum := fnv.New64a()
	io.WriteString(sum, data)
	home := filepath.Join(public, fmt.Sprintf("data-%x", sum.Sum64()))
	return home, os.MkdirAll(home, 0o755)
}

// findPostgres returns the folder of the programs for the -postgres flag: download, local or a folder.
func findPostgres(
	ctx context.Context, procs *processes, as identity, choice string, say func(string, ...any),
) (string, error) {
	switch choice {
	case "download":
		bin, err := downloadPostgres(ctx, as, say)
		if err == nil {
			// Also the proof that it runs here at all: musl has another libc.
			err = procs.run(ctx, "postgres-version", as.command(filepath.Join(bin, "postgres"), "--version"))
		}
		if err == nil || ctx.Err() != nil {
			return bin, err
		}
		local, localErr := localPostgres()
		if localErr != nil {
			return "", fmt.Errorf("no download: %w; and %w", err, localErr)
		}
		say("no download (%v); taking the machine's own", err)
		return local, nil
	case "local":
		return localPostgres()
	}
	if !hasPrograms(choice) {
		return "", fmt.Errorf("-postgres %s: not download, not local, "+
			"and not a folder with postgres and initdb", choice)
	}
	return filepath.Abs(choice)
}

func hasPrograms(dir string) bool {
	_, err1 := exec.LookPath(filepath.Join(dir, "postgres"))
	_, err2 := exec.LookPath(filepath.Join(dir, "initdb"))
	return err1 == nil && err2 == nil
}

// localPostgres looks in PATH, then where Debian, Red Hat and Homebrew put them, newest first.
func localPostgres() (string, error) {
	var dirs []string
	if path, err := exec.LookPath("postgres"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	var found []string
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin",
		"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin"} {
		match, _ := filepath.Glob(pattern)
		found = append(found, match...)
	}
	slices.SortFunc(found, func(a, b string) int { return majorIn(b) - majorIn(a) })
	for _, dir := range append(dirs, found...) {
		if hasPrograms(dir) {
			return dir, nil
		}
	}
	return "", errors.New("no postgres on this machine " +
		"(looked in PATH, /usr/lib/postgresql/*/bin and Homebrew)")
}

var number = regexp.MustCompile(`\d+`)

func majorIn(s string) int {
	n, _ := strconv.Atoi(number.FindString(s))
	return n
}

func downloadPostgres(ctx context.Context, as identity, say func(string, ...any)) (string, error) {
	pin, ok := pinnedArchives[runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("there is no archive for %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	folder := cacheFolder
	if as.uid != 0 && !as.namespace {
		folder = publicFolder // nobody must be able to reach it
	}
	cache, err := folder()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "postgres-"+pinnedPostgres)
	err = once(ctx, dir, func(tmp string) error {
		name := "embedded-postgres-binaries-" + pin[0]
		url := fmt.Sprintf("https://repo1.maven.org/maven2/io/zonky/test/postgres/%s/%s/%[1]s-%[2]s.jar",
			name, pinnedPostgres)
		jar := filepath.Join(tmp, "jar")
		say("downloading Postgres %s (once)", pinnedPostgres)
		err := download(ctx, url, jar, pin[1], func(percent int) { say("downloading %d%%", percent) })
		if err != nil {
			return err
		}
		say("unpacking")
		return errors.Join(unpackPostgres(jar, tmp), os.Remove(jar))
	})
	return filepath.Join(dir, "bin"), err
}

// unpackPostgres unpacks the one .txz that the jar holds.
func unpackPostgres(jar, dir string) error {
	zipped, err := zip.OpenReader(jar)
	if err != nil {
		return err
	}
	defer zipped.Close()
	i := slices.IndexFunc(zipped.File, func(f *zip.File) bool { return strings.HasSuffix(f.Name, ".txz") })
	if i < 0 {
		return errors.New("the archive holds no .txz")
	}
	packed, err := zipped.File[i].Open()
	if err != nil {
		return err
	}
	defer packed.Close()
	unpacked, err := xz.NewReader(packed, 0)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir) // no entry can lead out of dir
	if err != nil {
		return err
	}
	defer root.Close()
	for files := tar.NewReader(unpacked); ; {
		head, err := files.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		name := filepath.Clean(head.Name)
		if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		switch head.Typeflag {
		case tar.TypeReg:
			err = writeFile(root, name, files, fs.FileMode(head.Mode)|0o444)
		case tar.TypeSymlink:
			err = root.Symlink(head.Linkname, name)
		case tar.TypeLink:
			err = root.Link(filepath.Clean(head.Linkname), name)
		}
		if err != nil {
			return err
		}
	}
}

func writeFile(root *os.Root, name string, from io.Reader, mode fs.FileMode) error {
	to, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode&0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// newPostgres finds the programs and makes the cluster unless the data folder has one.
func newPostgres(ctx context.Context, procs *processes, choice, data string, port int, set []string,
	fresh bool, say func(string, ...any)) (*postgres, error) {
	as, err := notRoot()
	if err != nil {
		return nil, err
	}
	p := &postgres{procs: procs, as: as, port: port, set: set}
	if p.bin, err = findPostgres(ctx, procs, as, choice, say); err != nil {
		return nil, err
	}
	home, err := as.home(data)
	if err != nil {
		return nil, err
	}
	if home != data {
		say("%s is out of reach for the user nobody: the cluster is in %s", data, home)
	}
	version, err := exec.CommandContext(ctx, filepath.Join(p.bin, "postgres"), "--version").Output()
	if err != nil {
		return nil, err
	}
	p.data = filepath.Join(home, fmt.Sprintf("postgres-%d", majorIn(string(version))))
	if fresh { // the data folder is wiped already; this is about a home elsewhere
		if err := os.RemoveAll(p.data); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(p.data); err == nil {
		return p, as.own(p.data)
	}
	say("making a cluster (%s)", strings.TrimSpace(string(version)))
	tmp := p.data + ".tmp"
	if err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o700), as.own(tmp)); err != nil {
		return nil, err
	}
	// --no-sync saves seconds on a busy disk. A power failure in the first seconds costs an empty cluster.
	initdb := as.command(filepath.Join(p.bin, "initdb"), "-D", tmp, "-U", "postgres", "-A", "trust", "-E",
		"UTF8", "--no-locale", "--no-sync")
	initdb.Dir = tmp // one that it may be in
	if err := procs.run(ctx, "initdb", initdb); err != nil {
		return nil, err
	}
	return p, os.Rename(tmp, p.data)
}

func (p *postgres) start(context.Context) (*child, error) {
	args := []string{"-D", p.data}
	settings := []string{
		"listen_addresses=127.0.0.1",
		"port=" + strconv.Itoa(p.port),
		"unix_socket_directories=", // Debian's default folder is not nobody's to write
		"wal_level=logical",
		"max_wal_senders=32",
		"max_replication_slots=32",
		"max_connections=200",
		"shared_buffers=256MB",       // as k8s.yaml has it
		"max_slot_wal_keep_size=4GB", // a dead relay must not fill the disk
		"fsync=on",
		"log_line_prefix=%m [%p] ",
	}
	if p.hasLibrary("pg_stat_statements") {
		settings = append(settings, "shared_preload_libraries=pg_stat_statements")
	}
	for _, setting := range append(settings, p.set...) { // the last of two wins
		args = append(args, "-c", setting)
	}
	cmd := p.as.command(filepath.Join(p.bin, "postgres"), args...)
	cmd.Dir = p.data
	p.clock.give(cmd)
	p.disk.give(cmd)
	return p.procs.start("postgres", cmd, syscall.SIGINT)
}

func (p *postgres) hasLibrary(name string) bool {
	for _, dir := range []string{"../lib", "../lib/postgresql"} {
		found, _ := filepath.Glob(filepath.Join(p.bin, dir, name+".*"))
		if slices.ContainsFunc(found, func(f string) bool { return !strings.HasSuffix(f, ".bc") }) {
			return true
		}
	}
	return false
}

func (p *postgres) url(database string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%d/%s?sslmode=disable", p.port, database)
}

// ready waits until it takes connections, crash recovery included, and makes the database wallet if need be.
func (p *postgres) ready(ctx context.Context) error {
	for {
		conn, err := pgx.Connect(ctx, p.url("postgres"))
		if err != nil {
			if err := sleep(ctx, 20*time.Millisecond); err != nil {
				return err
			}
			continue
		}
		defer conn.Close(context.WithoutCancel(ctx))
		var exists bool
		err = conn.QueryRow(ctx,
			"SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'wallet')").Scan(&exists)
		if err == nil && !exists {
			_, err = conn.Exec(ctx, "CREATE DATABASE wallet")
		}
		return err
	}
}
