package parts

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := make(chan error, 1)
		a, b := NewGroup(failed), NewGroup(failed)
		ended := make(chan string, 2)
		a.Run(func(ctx context.Context) error {
			<-ctx.Done()
			ended <- "a"
			return errors.New("not told of")
		})
		b.Run(func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			ended <- "b"
			return nil
		})
		first := errors.New("first")
		b.Run(func(context.Context) error { return first })
		synctest.Wait()
		b.Run(func(context.Context) error { return errors.New("second") })
		synctest.Wait()
		if err := <-failed; err != first {
			t.Errorf("%v", err)
		}
		deadline, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if !a.Stop(deadline) || <-ended != "a" {
			t.Error("a has not stopped")
		}
		if b.Stop(deadline) {
			t.Error("b has stopped before its part")
		}
		if !b.Stop(t.Context()) || <-ended != "b" {
			t.Error("b has not stopped")
		}
		select {
		case err := <-failed:
			t.Errorf("a part that was asked to end has failed: %v", err)
		default:
		}
	})
}

func TestWaitFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		began := time.Now()
		err := WaitFor(t.Context(), "a server", func(context.Context) error {
			if tries++; tries < 10 {
				return errors.New("not yet")
			}
			return nil
		})
		took := time.Since(began)
		if err != nil || tries != 10 || took < 2*time.Second || took > 30*time.Second {
			t.Errorf("%v after %d tries in %v", err, tries, took)
		}
		never := errors.New("never")
		err = WaitFor(t.Context(), "a server", func(context.Context) error { return Final(never) })
		if err == nil {
			t.Error("waited for what waiting does not cure")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err = WaitFor(ctx, "a server", func(context.Context) error { return errors.New("not yet") })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

func TestUntilSignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signals := make(chan os.Signal)
		var said strings.Builder
		status := 0
		ctx := untilSignal(signals, &said, func(is int) { status = is })
		synctest.Wait()
		if ctx.Err() != nil {
			t.Fatal("ended without a signal")
		}
		signals <- syscall.SIGTERM
		synctest.Wait()
		if ctx.Err() == nil {
			t.Fatal("not ended by a signal")
		}
		time.Sleep(again / 2)
		signals <- syscall.SIGINT // passed on by a supervisor
		time.Sleep(time.Hour)
		signals <- syscall.SIGTERM // an order to stop in order, once more
		synctest.Wait()
		if status != 0 || said.Len() > 0 {
			t.Fatalf("ended at once: %d %s", status, said.String())
		}
		signals <- syscall.SIGINT
		synctest.Wait()
		if status != 130 || strings.Count(said.String(), "\n") != 1 {
			t.Errorf("%d %q", status, said.String())
		}
	})
}

// TestPipe: all that is made is done, in order and beside the making; either side's error ends both.
func TestPipe(t *testing.T) {
	count := func(ctx context.Context, put func(int) error) error {
		for i := range 5 {
			time.Sleep(time.Second)
			if err := put(i); err != nil {
				return err
			}
		}
		return nil
	}
	wrong := errors.New("wrong")
	for name, c := range map[string]struct {
		failing int // what do fails at
		produce func(context.Context, func(int) error) error
		done    int
		took    time.Duration
		want    error
	}{
		"all":      {-1, count, 5, 6 * time.Second, nil},
		"do fails": {2, count, 2, 4 * time.Second, wrong},
		"produce fails": {-1, func(_ context.Context, put func(int) error) error {
			put(0)
			return wrong
		}, 1, time.Second, wrong},
		"produce waits": {0, func(ctx context.Context, put func(int) error) error {
			put(0)
			return Sleep(ctx, time.Hour)
		}, 0, 0, wrong},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began, done := time.Now(), 0
				err := Pipe(t.Context(), func(v int) error {
					if v == c.failing {
						return wrong
					}
					time.Sleep(time.Second)
					if v != done {
						t.Errorf("%d came as number %d", v, done)
					}
					done++
					return nil
				}, c.produce)
				if took := time.Since(began); err != c.want || done != c.done || took != c.took {
					t.Errorf("%d done in %v, %v", done, took, err)
				}
			})
		})
	}
}
