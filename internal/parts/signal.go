// The end that a terminal or a supervisor asks for.

package parts

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// again is how long after the first signal an interrupt is taken for a second one. A supervisor may pass on
// the Ctrl-C that the terminal has sent us too.
const again = 300 * time.Millisecond

// UntilSignal returns a context that ends at SIGINT or SIGTERM. A Ctrl-C after that is from somebody who does
// not want to wait: it is said, and the program exits at once, as if killed.
func UntilSignal(say io.Writer, exit func(int)) context.Context {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	return untilSignal(signals, say, exit)
}

func untilSignal(signals <-chan os.Signal, say io.Writer, exit func(int)) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-signals
		cancel()
		for first := time.Now(); ; {
			if s := <-signals; s == syscall.SIGINT && time.Since(first) > again {
				fmt.Fprintln(say, "interrupted again: ended at once, without waiting for what was open. "+
					"What was answered is safe; ask again for the rest, with the same keys")
				exit(130) // 128 and SIGINT, as a shell says it
				return
			}
		}
	}()
	return ctx
}
