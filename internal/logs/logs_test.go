package logs

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// lsn is a number that has a form of its own, like pglogrepl.LSN.
type lsn uint64

func (l lsn) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// TestStringersAreShownByTheirForm, in either format, through the whole logger.
func TestStringersAreShownByTheirForm(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		log, flush := New(&out, slog.LevelInfo, format)
		log.Info("relay", "from", lsn(0x16B374D848), "seconds", 0.5)
		log.Debug("unseen")
		flush()
		line := out.String()
		if !strings.Contains(line, "16/B374D848") || !strings.Contains(line, "0.5") ||
			strings.Contains(line, "unseen") {
			t.Errorf("%s: %s", format, line)
		}
	}
}

// slowDisk takes a while for each write.
type slowDisk struct {
	bytes.Buffer
	writes int
}

func (d *slowDisk) Write(p []byte) (int, error) {
	time.Sleep(20 * time.Millisecond)
	d.writes++
	return d.Buffer.Write(p)
}

// TestLogLinesAreWrittenTogether: all of them, in order, a slow disk taking several at once; and what waits
// is bounded.
func TestLogLinesAreWrittenTogether(t *testing.T) {
	disk := new(slowDisk)
	l := newWriter(disk)
	var want strings.Builder
	for i := range 4000 {
		line := fmt.Sprintf("%d %s\n", i, strings.Repeat("x", 2000))
		want.WriteString(line)
		l.Write([]byte(line))
		l.mu.Lock()
		if len(l.waiting) > bytesMax+len(line) {
			t.Fatalf("%d bytes wait", len(l.waiting))
		}
		l.mu.Unlock()
	}
	l.close()
	if disk.String() != want.String() || disk.writes > 500 {
		t.Errorf("%d bytes in %d writes, want %d bytes in order", disk.Len(), disk.writes, want.Len())
	}
}
