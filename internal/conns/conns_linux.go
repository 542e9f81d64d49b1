package conns

import (
	"fmt"
	"io"
	"iter"
	"net/netip"
	"syscall"
	"time"
	"unsafe"
)

// Set is connections to one server, numbered from 0. One goroutine uses it. The sockets block: a write ends
// when all is written, and a read begins when epoll says that there is something.
type Set struct {
	epoll    int
	sockets  []int
	readable []syscall.EpollEvent
	response []byte
}

// Dial opens n connections to an address, an IPv4 address with a port.
func Dial(address string, n int) (*Set, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	if !to.Addr().Is4() {
		return nil, fmt.Errorf("%s is not an IPv4 address", address)
	}
	s := &Set{readable: make([]syscall.EpollEvent, n), response: make([]byte, 1<<20)}
	if s.epoll, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return nil, err
	}
	peer := &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	for c := range n {
		socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			s.Close()
			return nil, err
		}
		s.sockets = append(s.sockets, socket)
		if err := syscall.Connect(socket, peer); err != nil {
			s.Close()
			return nil, fmt.Errorf("connect to %s: %w", address, err)
		}
		// Edge-triggered: told once of a response, which is then read to its end. Fd is ours to use.
		event := syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLET&0xffffffff, Fd: int32(c)}
		if err := syscall.EpollCtl(s.epoll, syscall.EPOLL_CTL_ADD, socket, &event); err != nil {
			s.Close()
			return nil, err
		}
	}
	return s, nil
}

// Close closes all connections.
func (s *Set) Close() {
	for _, socket := range s.sockets {
		syscall.Close(socket)
	}
	syscall.Close(s.epoll)
}

// Send writes a whole request to connection c, which must not be waiting for a response.
func (s *Set) Send(c int, request []byte) error {
	for len(request) > 0 {
		n, err := systemCall(syscall.SYS_WRITE, s.sockets[c], unsafe.Pointer(&request[0]), len(request), 0)
		if err != nil {
			return err
		}
		request = request[n:]
	}
	return nil
}

// Answered waits for responses, at most so long or Never. It reads them and yields their connections.
func (s *Set) Answered(most time.Duration) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		var n int
		var err error
		if most == Never {
			events := unsafe.Pointer(&s.readable[0])
			n, err = systemCall(syscall.SYS_EPOLL_PWAIT, s.epoll, events, len(s.readable), -1)
		} else { // at a pace the rest of this process may have work to do, and needs the scheduler
			n, err = syscall.EpollWait(s.epoll, s.readable, int((most+time.Millisecond-1)/time.Millisecond))
		}
		if err != nil && err != syscall.EINTR {
			yield(0, err)
			return
		}
		for _, event := range s.readable[:max(0, n)] {
			if c := int(event.Fd); !yield(c, s.receive(c)) {
				return
			}
		}
	}
}

// receive reads a response: one read, which finds something there, unless the server wrote it in parts.
func (s *Set) receive(c int) error {
	length, err := systemCall(syscall.SYS_READ, s.sockets[c], unsafe.Pointer(&s.response[0]), len(s.response),
		0)
	for n := length; ; length += n {
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if whole, err := wholeOK(s.response[:length]); whole || err != nil {
			return err
		}
		n, err = syscall.Read(s.sockets[c], s.response[length:])
	}
}

// systemCall is one that Go's scheduler does not know of. The scheduler would see a goroutine that never
// yields, take its processor away every 10 ms in the midst of a call, and poll every 20 us for a while each
// time. That is a sixth of all that the load generator spends. The call must not block, since the garbage
// collector waits for it. Only epoll's may, because a signal ends it.
func systemCall(number, fd int, buffer unsafe.Pointer, length, timeout int) (int, error) {
	n, _, err := syscall.RawSyscall6(uintptr(number), uintptr(fd), uintptr(buffer), uintptr(length),
		uintptr(timeout), 0, 0)
	if err != 0 {
		return 0, err
	}
	return int(n), nil
}
