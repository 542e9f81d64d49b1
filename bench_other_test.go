//go:build !linux

// The load generator's connections where there is no epoll: a goroutine reads each.

package main

import (
	"iter"
	"net"
	"time"
)

type connections struct {
	conns     []net.Conn
	responses chan response
}

// response is that a connection has a whole one, or why there is none.
type response struct {
	c   int
	err error
}

func dial(address string, n int) (*connections, error) {
	s := &connections{responses: make(chan response, n)}
	for c := range n {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return nil, err
		}
		s.conns = append(s.conns, conn)
		go s.receive(c)
	}
	return s, nil
}

func (s *connections) close() {
	for _, conn := range s.conns {
		conn.Close()
	}
}

func (s *connections) send(c int, request []byte) error {
	_, err := s.conns[c].Write(request)
	return err
}

// answered waits until a response arrives, at most so long or for ever, and yields its connection.
func (s *connections) answered(most time.Duration) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		select {
		case r := <-s.responses:
			yield(r.c, r.err)
		case <-time.After(most):
		}
	}
}

func (s *connections) receive(c int) {
	buffer, length := make([]byte, 1<<16), 0
	for {
		n, err := s.conns[c].Read(buffer[length:])
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
