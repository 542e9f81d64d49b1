// Redis: the machine's redis-server, else miniredis in a process of its own. The cache is never
// authoritative, so a killed Redis comes back with its last snapshot at best, and miniredis with nothing.

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
)

type redis struct {
	procs  *processes
	server string // path of redis-server; empty: miniredis
	data   string
	port   int
}

func newRedis(procs *processes, choice, data string, port int, say func(string, ...any)) (*redis, error) {
	r := &redis{procs: procs, data: data, port: port}
	path, err := exec.LookPath("redis-server")
	switch {
	case choice == "miniredis":
	case err == nil:
		r.server = path
	case choice == "auto":
		say("no redis-server in PATH: taking miniredis, whose speed says nothing about Redis")
	default:
		return nil, fmt.Errorf("-redis redis-server: none in PATH; install it, or take -redis miniredis")
	}
	return r, os.MkdirAll(data, 0o755)
}

func (r *redis) start(context.Context) (*child, error) {
	if r.server == "" {
		cmd, err := self("_miniredis", r.address())
		if err != nil {
			return nil, err
		}
		return r.procs.start("redis", cmd, 0)
	}
	cmd := exec.Command(r.server, "--bind", "127.0.0.1", "--port", strconv.Itoa(r.port), "--dir", r.data,
		"--save", "3600", "1", "--appendonly", "no", "--daemonize", "no")
	cmd.Dir = r.data
	return r.procs.start("redis", cmd, syscall.SIGTERM)
}

func (r *redis) address() string { return "127.0.0.1:" + strconv.Itoa(r.port) }

func (r *redis) ready(ctx context.Context) error {
	for {
		if r.ping() {
			return nil
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

func (r *redis) ping() bool {
	conn, err := net.DialTimeout("tcp", r.address(), time.Second)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	io.WriteString(conn, "*1\r\n$4\r\nPING\r\n") // miniredis knows no inline commands
	answer, _ := bufio.NewReader(conn).ReadString('\n')
	return strings.HasPrefix(answer, "+PONG")
}

// runMiniredis is the hidden subcommand: it ends by end of input.
func runMiniredis(address string) error {
	server := miniredis.NewMiniRedis()
	if err := server.StartAddr(address); err != nil {
		return err
	}
	defer server.Close()
	go func() {
		for range time.Tick(time.Second) {
			server.FastForward(time.Second) // its time passes no other way
		}
	}()
	untilEndOfInput()
	return nil
}
