//go:build !linux

package conns

import (
	"iter"
	"net"
	"time"
)

// Set is connections to one server, numbered from 0. One goroutine uses it; one more per connection reads.
type Set struct {
	conns     []net.Conn
	responses chan response
}

// response is that a connection has a whole one, or why there is none.
type response struct {
	c   int
	err error
}

// Dial opens n connections to an address, an IPv4 address with a port.
func Dial(address string, n int) (*Set, error) {
	s := &Set{responses: make(chan response, n)}
	for c := range n {
		conn, err := net.Dial("tcp4", address)
		if err != nil {
			s.Close()
			return nil, err
		}
		s.conns = append(s.conns, conn)
		go s.receive(c, conn)
	}
	return s, nil
}

// Close closes all connections.
func (s *Set) Close() {
	for _, conn := range s.conns {
		conn.Close()
	}
}

// Send writes a whole request to connection c, which must not be waiting for a response.
func (s *Set) Send(c int, request []byte) error {
	_, err := s.conns[c].Write(request)
	return err
}

// Answered waits for a response, at most so long or Never, and yields its connection.
func (s *Set) Answered(most time.Duration) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		select {
		case r := <-s.responses:
			yield(r.c, r.err)
		case <-time.After(most):
		}
	}
}

func (s *Set) receive(c int, conn net.Conn) {
	buffer, length := make([]byte, 1<<16), 0
	for {
		n, err := conn.Read(buffer[length:])
		length += n
		whole := false
		if err == nil {
			whole, err = wholeOK(buffer[:length])
		}
		if whole || err != nil {
			s.responses <- response{c, err}
			length = 0
		}
		if err != nil {
			return
		}
	}
}
