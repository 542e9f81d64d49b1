// Package parts runs the parts of a program: in groups that stop one after the other, after the servers that
// they need have been waited for.
//
// It touches the collector's settings, where asked to. It promises that the first part that fails is told of,
// and that a group has stopped when Stop says so.
package parts

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"sync"
	"time"
)

// Group runs parts that stop together.
type Group struct {
	ctx    context.Context
	cancel context.CancelFunc
	parts  sync.WaitGroup
	failed chan<- error
}

// NewGroup makes a group without parts. failed gets the error of the first part that fails.
func NewGroup(failed chan<- error) *Group {
	g := &Group{failed: failed}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// Run starts a part.
func (g *Group) Run(part func(context.Context) error) {
	g.parts.Go(func() {
		if err := part(g.ctx); err != nil && g.ctx.Err() == nil {
			select {
			case g.failed <- err:
			default:
			}
		}
	})
}

// Stop ends the group's context and waits for its parts, or false at the deadline.
func (g *Group) Stop(deadline context.Context) bool {
	g.cancel()
	done := make(chan struct{})
	go func() { g.parts.Wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-deadline.Done():
		return false
	}
}

type final struct{ error }

// Final marks an error that waiting does not cure.
func Final(err error) error { return final{err} }

// WaitFor calls try until it succeeds, with a log line whenever the reason changes and at least every 10 s.
func WaitFor(ctx context.Context, what string, try func(context.Context) error) error {
	var last string
	var logged time.Time
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		err := try(ctx)
		var cureless final
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &cureless):
			return err
		case err.Error() != last || time.Since(logged) > 10*time.Second:
			last, logged = err.Error(), time.Now()
			slog.Warn("waiting for "+what, "error", err)
		}
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// TuneCollector spends memory on fewer collections while serving: a few MB live, so that by Go's default a
// fifth of the processor time under load went into collecting every few milliseconds. GOGC and GOMEMLIMIT,
// where set, decide instead: thousands of connections live in more than 90 MB, and the collector would work
// hard to no avail.
func TuneCollector() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(90 << 20)
	}
}

// LimitMemory makes the collector work harder from there on, unless GOMEMLIMIT says where.
func LimitMemory(bytes int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(bytes)
	}
}

// Sleep waits that long, unless ctx ends before: then its error is ctx's.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Pipe has do work on what produce hands over, one after the other, while produce makes the next one. It
// returns when both have ended. The first error ends both, produce by its context.
func Pipe[T any](ctx context.Context, do func(T) error,
	produce func(ctx context.Context, put func(T) error) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	made, ended := make(chan T), make(chan error, 1)
	go func() {
		defer close(made)
		ended <- produce(ctx, func(v T) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			select {
			case made <- v:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	var failed error
	for v := range made {
		if failed == nil {
			if failed = do(v); failed != nil {
				stop()
			}
		}
	}
	if err := <-ended; failed == nil {
		return err
	}
	return failed
}
