// Child processes: how they start, end and freeze, and how none is left behind. What they do is no matter.
//
// Three nets, each for the death the one before it does not see:
//   - we end in order: every child is asked to end and waited for;
//   - we are killed: the janitor, a copy of this program that reads from a pipe of ours, sees end of input
//     and ends all that is left, frozen process trees included;
//   - both are killed (pkill -9): Linux itself signals the children (Pdeathsig, process_linux.go).
//
// Every child inherits the lock on the data folder: it is free again only when the last of them is gone.

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// endWait is how long a child may take to end when asked, before it is killed. Above what Kafka needs for a
// controlled shutdown (1-2 s) and below a human's patience.
const endWait = 10 * time.Second

// processes starts children. Its methods may be called from any goroutine.
type processes struct {
	lock    *os.File    // the data folder's lock, inherited by all
	logs    string      // folder of the children's output
	spawn   chan func() // run by one thread that lives as long as we do
	janitor *child

	mu   sync.Mutex // guards what is written to the janitor
	wire io.Writer
}

// child is one process of ours, with all that descends from it.
type child struct {
	name string
	pid  int
	log  string         // file that takes its output
	quit syscall.Signal // asks it to end in order
	in   io.Closer      // its standard input, if it ends by end of input

	wanted atomic.Bool   // its end is our doing
	done   chan struct{} // closed after it ended and what follows is set
	err    error
	ended  time.Time
}

func newProcesses(lock *os.File, logs string) (*processes, error) {
	p := &processes{lock: lock, logs: logs, spawn: make(chan func())}
	go func() {
		// Pdeathsig fires when the *thread* that started the child ends: this one never does.
		runtime.LockOSThread()
		for f := range p.spawn {
			f()
		}
	}()
	cmd, err := self("_janitor")
	if err != nil {
		return nil, err
	}
	wire, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p.janitor, err = p.start("janitor", cmd, 0)
	p.wire = wire
	return p, err
}

// close lets the janitor go, which has nothing left to do when all children ended before.
func (p *processes) close() {
	p.janitor.wanted.Store(true)
	p.mu.Lock()
	p.wire.(io.Closer).Close()
	p.mu.Unlock()
	<-p.janitor.done
}

// self is a command that runs this very program with a hidden subcommand.
func self(args ...string) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return exec.Command(exe, args...), nil
}

// start starts cmd with its output in a log file. A child whose quit signal is 0 ends by end of input.
func (p *processes) start(name string, cmd *exec.Cmd, quit syscall.Signal) (*child, error) {
	c := &child{name: name, quit: quit, log: filepath.Join(p.logs, name+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(c.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = out
	}
	cmd.Stderr = out // the same file, never ours: a child that outlives us must not hold a test's pipe open
	cmd.ExtraFiles = []*os.File{p.lock}
	if quit == 0 && cmd.Stdin == nil {
		if c.in, err = cmd.StdinPipe(); err != nil {
			return nil, err
		}
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // a Ctrl-C is for us alone: we stop them in order
	dieWithParent(cmd.SysProcAttr, quit)

	started := make(chan error, 1)
	p.spawn <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("%s did not start: %w", name, err)
	}
	c.pid = cmd.Process.Pid
	p.tell("+ %d %d", c.pid, quit)
	go func() {
		c.err, c.ended = cmd.Wait(), time.Now()
		p.tell("- %d", c.pid)
		close(c.done)
	}()
	return c, nil
}

// run starts a tool and waits for its end. If ctx ends first, the tool is killed with all that it started.
func (p *processes) run(ctx context.Context, name string, cmd *exec.Cmd) error {
	c, err := p.start(name, cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		c.kill()
		return context.Cause(ctx)
	case <-c.done:
		if c.err != nil {
			return c.failure("failed")
		}
		return nil
	}
}

// removeAtEnd has the janitor remove dir after the children, should we not come to it.
func (p *processes) removeAtEnd(dir string) { p.tell("rm %s", dir) }

func (p *processes) tell(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wire != nil {
		fmt.Fprintf(p.wire, format+"\n", args...)
	}
}

// janitor is the hidden subcommand: it reads which children there are, and at end of input ends them.
func janitor(in io.Reader) {
	// Its pipe alone says when to end; a signal for everyone is not for it.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	quits := map[int]syscall.Signal{}
	var remove []string
	for lines := bufio.NewScanner(in); lines.Scan(); {
		op, rest, _ := strings.Cut(lines.Text(), " ")
		pid, sig, _ := strings.Cut(rest, " ")
		n, _ := strconv.Atoi(pid)
		s, _ := strconv.Atoi(sig)
		switch op {
		case "+":
			quits[n] = syscall.Signal(s)
		case "-":
			delete(quits, n)
		case "rm":
			remove = append(remove, rest)
		}
	}
	var all []int
	for pid, quit := range quits {
		if pid == os.Getpid() {
			continue
		}
		pids := tree(pid)
		all = append(all, pids...)
		signalAll(pids, syscall.SIGCONT)
		if quit != 0 { // else the end of its input is what ends it
			syscall.Kill(pid, quit)
		}
	}
	if !waitGone(all, endWait) {
		signalAll(all, syscall.SIGKILL)
		waitGone(all, endWait)
	}
	for _, dir := range remove {
		os.RemoveAll(dir)
	}
}

// end asks the child to end, by the given signal or in its own way, and waits. After endWait it kills the
// child, and an error says so.
func (c *child) end(sig syscall.Signal) error { return c.endWithin(sig, endWait) }

func (c *child) endWithin(sig syscall.Signal, wait time.Duration) error {
	c.wanted.Store(true)
	c.resume()
	switch {
	case sig != 0:
		syscall.Kill(c.pid, sig)
	case c.quit != 0:
		syscall.Kill(c.pid, c.quit)
	default:
		c.in.Close()
	}
	select {
	case <-c.done:
		return nil
	case <-time.After(wait):
		c.kill()
		return fmt.Errorf("%s did not end within %v and was killed", c.name, wait)
	}
}

// kill ends the whole process tree at once, as a crash of its machine would.
func (c *child) kill() {
	c.wanted.Store(true)
	pids := c.pause() // frozen first, so that none can start another or notice that its parent died
	signalAll(pids, syscall.SIGKILL)
	<-c.done
	waitGone(pids, endWait)
}

// pause freezes the whole tree and returns its process ids.
func (c *child) pause() []int {
	for known := 0; ; {
		pids := tree(c.pid)
		signalAll(pids, syscall.SIGSTOP)
		if len(pids) == known { // none was born while we looked
			return pids
		}
		known = len(pids)
	}
}

func (c *child) resume() { signalAll(tree(c.pid), syscall.SIGCONT) }

func (c *child) alive() bool {
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// failure describes an end that nobody asked for, with the end of the log.
func (c *child) failure(verb string) error {
	const lines = 15
	how := "exit status 0"
	if c.err != nil {
		how = c.err.Error()
	}
	log, _ := os.ReadFile(c.log)
	all := strings.Split(strings.TrimSpace(string(log)), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return fmt.Errorf("%s %s (%s); the end of %s:\n    %s", c.name, verb, how, c.log,
		strings.Join(all, "\n    "))
}

// tree lists the process and all its descendants. Postgres gives each of its processes a session of its own,
// so process groups do not find them.
func tree(pid int) []int {
	parents := processTable()
	if _, ok := parents[pid]; !ok {
		return nil
	}
	pids := []int{pid}
	for i := 0; i < len(pids); i++ {
		for p, parent := range parents {
			if parent == pids[i] {
				pids = append(pids, p)
			}
		}
	}
	return pids
}

func signalAll(pids []int, sig syscall.Signal) {
	for _, pid := range pids {
		syscall.Kill(pid, sig)
	}
}

func waitGone(pids []int, wait time.Duration) bool {
	for end := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		table, left := processTable(), false
		for _, pid := range pids {
			_, ok := table[pid]
			left = left || ok
		}
		if !left || time.Now().After(end) {
			return !left
		}
	}
}

// untilParentEnds ends ctx when our parent is gone: `go run` passes on neither SIGTERM nor SIGKILL.
func untilParentEnds(ctx context.Context) context.Context {
	parent := os.Getppid()
	if parent == 1 {
		return ctx // we are a container's program, or were a daemon from the start
	}
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		defer cancel(nil)
		for ctx.Err() == nil {
			if os.Getppid() != parent {
				cancel(errors.New("the process that started the stack is gone"))
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
	}()
	return ctx
}
