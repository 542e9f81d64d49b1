// The ports of a stack: found once, then kept in the data folder, so that a psql, a scraper or a consumer
// that was set up yesterday still works today. -port fixes one.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// portsFile is in the data folder. -fresh leaves it: it wipes data, and these are no data.
const portsFile = "ports.json"

// ports gives each server its port. Not for several goroutines.
type ports struct {
	next  int            // the next one to try, where none was kept
	fixed map[string]int // by -port
	kept  map[string]int // of the last start
	given map[string]int // of this one
	say   func(string, ...any)
}

// newPorts reads what was kept. A file that cannot be read is as good as none.
func newPorts(data string, fixed list, say func(string, ...any)) (*ports, error) {
	// Stacks that start at the same time search from different places: between finding a port and using it
	// another may take it. Below 32768: a client's own port must never be a server's, or it can connect to
	// itself while the server is down.
	p := &ports{next: 10000 + os.Getpid()%1100*20, fixed: map[string]int{}, given: map[string]int{}, say: say}
	for _, f := range fixed {
		name, value, _ := strings.Cut(f, "=")
		n, err := strconv.Atoi(value)
		if name == "" || err != nil || n < 1 || n > 65535 {
			return nil, usageError(fmt.Sprintf("-port %s: say NAME=NUMBER, as in -port postgres=5432", f))
		}
		p.fixed[name] = n
	}
	if file, err := os.ReadFile(filepath.Join(data, portsFile)); err == nil {
		if json.Unmarshal(file, &p.kept) != nil {
			p.kept = nil
		}
	}
	return p, nil
}

// of is the port of a server: the fixed one, else that of the last start, else one that is free.
func (p *ports) of(name string) (int, error) {
	port, fixed := p.fixed[name]
	kept := p.kept[name]
	switch {
	case fixed && !p.free(port):
		return 0, fmt.Errorf("port %d, which -port gives to %s, is taken by another program%s: stop that "+
			"one, or choose another port", port, name, suspect(port))
	case fixed:
	case kept != 0 && p.free(kept):
		port = kept
	default:
		for port = 0; port == 0; p.next++ {
			if p.next >= 32768 {
				p.next = 10000
			}
			// Nor one that another of our servers had, who comes for it later.
			if p.free(p.next) && !slices.Contains(slices.Collect(maps.Values(p.kept)), p.next) {
				port = p.next
			}
		}
		if kept != 0 {
			p.say("port %d, which %s had at the last start, is taken: %s has %d now", kept, name, name, port)
		}
	}
	p.given[name] = port
	return port, nil
}

// free says whether nobody listens on a port of loopback, nor is to.
func (p *ports) free(port int) bool {
	for _, given := range p.given {
		if given == port {
			return false
		}
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil {
		l.Close()
	}
	return err == nil
}

// suspect names who it is that mostly has a port.
func suspect(port int) string {
	who := map[int]string{5432: "a Postgres of Docker, Homebrew or the system", 6379: "a Redis",
		9092: "a Kafka"}
	if who[port] == "" {
		return ""
	}
	return " (perhaps " + who[port] + ")"
}

// keep writes the ports down for the next start. Those of servers that this start had not stay.
func (p *ports) keep(data string) error {
	for name := range p.fixed {
		if p.given[name] == 0 {
			return usageError(fmt.Sprintf("-port %s: there is no such server here, only %s", name,
				strings.Join(slices.Sorted(maps.Keys(p.given)), ", ")))
		}
	}
	all := map[string]int{}
	maps.Copy(all, p.kept)
	maps.Copy(all, p.given)
	text, err := json.MarshalIndent(all, "", " ")
	return errors.Join(err, os.WriteFile(filepath.Join(data, portsFile), append(text, '\n'), 0o644))
}
