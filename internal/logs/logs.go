// Package logs makes a slog.Logger whose lines are written in the background until a bound is reached.
//
// It touches only the writer it is given. A disk or pipe that is slow for a moment delays nobody who logs,
// until bytesMax bytes wait: then whoever logs waits too. Lines come out whole and in order. A process that
// is killed loses its last lines; flush writes them.
package logs

import (
	"fmt"
	"io"
	"log/slog"
	"sync"
)

// New makes a logger. format is text or json. flush writes what still waits, and ends the writing: log
// nothing after it.
func New(w io.Writer, level slog.Leveler, format string) (log *slog.Logger, flush func()) {
	background := newWriter(w)
	return slog.New(handler(background, level, format)), background.close
}

// handler shows a value that has a String method by it, also in JSON, where slog would show its fields or
// number.
func handler(w io.Writer, level slog.Leveler, format string) slog.Handler {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() != slog.KindAny {
			return a
		}
		if v, ok := a.Value.Any().(fmt.Stringer); ok {
			a.Value = slog.StringValue(v.String())
		}
		return a
	}}
	if format == "json" {
		return slog.NewJSONHandler(w, options)
	}
	return slog.NewTextHandler(w, options)
}

// writer hands lines to a goroutine, which writes as many at once as have gathered.
type writer struct {
	mu      sync.Mutex
	changed *sync.Cond
	waiting []byte
	closing bool
	closed  chan struct{}
}

const bytesMax = 1 << 20

func newWriter(to io.Writer) *writer {
	l := &writer{closed: make(chan struct{})}
	l.changed = sync.NewCond(&l.mu)
	go l.run(to)
	return l
}

func (l *writer) run(to io.Writer) {
	defer close(l.closed)
	var lines []byte
	for {
		l.mu.Lock()
		for len(l.waiting) == 0 && !l.closing {
			l.changed.Wait()
		}
		lines, l.waiting = l.waiting, lines[:0]
		l.mu.Unlock()
		if len(lines) == 0 {
			return
		}
		l.changed.Broadcast()
		_, _ = to.Write(lines) // nowhere to report it
	}
}

func (l *writer) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.waiting) > bytesMax {
		l.changed.Wait()
	}
	l.waiting = append(l.waiting, line...)
	l.changed.Broadcast()
	return len(line), nil
}

func (l *writer) close() {
	l.mu.Lock()
	l.closing = true
	l.changed.Broadcast()
	l.mu.Unlock()
	<-l.closed
}
