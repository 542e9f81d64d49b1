// Package conns is the connections of an HTTP/1.1 load generator that shares a machine with the server it
// loads. One goroutine drives all of them: it sends whole requests, which it writes by hand, and waits for
// whole responses. A client of net/http would cost as much processor time as the server.
//
// On Linux epoll tells which connections have a response. Elsewhere a goroutine reads each, at twice the
// cost. A response must have a Content-Length and the status 200 or 201. Anything else is an error.
package conns

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"time"
)

// Never is how long to wait for a response where only a response can end the wait.
const Never = time.Duration(math.MaxInt64)

// wholeOK is whether a response has arrived to its end. One that is no success is an error.
func wholeOK(response []byte) (bool, error) {
	head, body, found := bytes.Cut(response, []byte("\r\n\r\n"))
	if !found {
		return false, nil
	}
	_, rest, found := bytes.Cut(head, []byte("\r\nContent-Length: "))
	digits, _, _ := bytes.Cut(rest, []byte("\r\n"))
	length, err := strconv.Atoi(string(digits))
	if !found || err != nil || len(body) > length {
		return false, fmt.Errorf("not a response with a length: %s", response)
	}
	if len(body) < length {
		return false, nil
	}
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) && !bytes.HasPrefix(head, []byte("HTTP/1.1 201 ")) {
		return false, fmt.Errorf("%s", response)
	}
	return true, nil
}
