package conns

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

const (
	request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	ok      = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
)

// serve answers each connection's first request with the given pieces, a moment apart, and hangs up after the
// last if told to.
func serve(t *testing.T, hangsUp bool, pieces ...string) (address string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go func() {
				io.ReadFull(conn, make([]byte, len(request)))
				for _, piece := range pieces {
					io.WriteString(conn, piece)
					time.Sleep(20 * time.Millisecond)
				}
				if hangsUp {
					conn.Close()
				}
			}()
		}
	}()
	return listener.Addr().String()
}

// ask sends a request on each of n connections and returns how many whole responses came, or the first error.
func ask(t *testing.T, address string, n int) (int, error) {
	t.Helper()
	s, err := Dial(address, n)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for c := range n {
		if err := s.Send(c, []byte(request)); err != nil {
			t.Fatal(err)
		}
	}
	answered := make(map[int]bool)
	for len(answered) < n {
		for c, err := range s.Answered(Never) {
			if err != nil {
				return len(answered), err
			}
			answered[c] = true
		}
	}
	for c := range s.Answered(50 * time.Millisecond) {
		t.Errorf("connection %d has a second response", c)
	}
	return len(answered), nil
}

// TestResponses: each connection's comes once and whole, also in parts. What is not a whole 200 is an error.
func TestResponses(t *testing.T) {
	for name, c := range map[string]struct {
		hangsUp bool
		pieces  []string
		want    string // of the error
	}{
		"whole":            {false, []string{ok}, ""},
		"in parts":         {false, []string{ok[:9], ok[9:30], ok[30:]}, ""},
		"another status":   {false, []string{strings.Replace(ok, "200 OK", "503 No", 1)}, "503 No"},
		"without a length": {false, []string{"HTTP/1.1 200 OK\r\n\r\n"}, "not a response with a length"},
		"too long":         {false, []string{ok + "!"}, "not a response with a length"},
		"cut short":        {true, []string{ok[:len(ok)-1]}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := ask(t, serve(t, c.hangsUp, c.pieces...), 5)
			if c.want == "" && (n != 5 || err != nil) {
				t.Errorf("%d responses, %v", n, err)
			}
			if c.want != "" && !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
}

// TestWaitEnds: at a pace the wait for a response ends in time.
func TestWaitEnds(t *testing.T) {
	s, err := Dial(serve(t, false), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	began := time.Now()
	for c, err := range s.Answered(30 * time.Millisecond) {
		t.Errorf("connection %d: %v", c, err)
	}
	if took := time.Since(began); took < 20*time.Millisecond || took > 5*time.Second {
		t.Errorf("the wait took %v", took)
	}
}

func TestNobodyListens(t *testing.T) {
	if s, err := Dial("127.0.0.1:1", 2); err == nil {
		s.Close()
		t.Error("connected to nobody")
	}
}
