// Writing to a connection that was taken from net/http: one system call for everything that waits,
// never blocking. Flushed by the writers (writers.go) and by senders.

package conn

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"herald/notify/internal/sets"
)

// WriteTimeout is how long a connection may take none of what is written to it before it is closed.
const WriteTimeout = 10 * time.Second

// slowPiece is how many bytes are written to a slow peer at once. It must take them within WriteTimeout where a deadline
// that passes would break the connection (TLS of a listener's own), and some of them elsewhere.
const slowPiece = 16 << 10

// pieceTimeout is how long such a peer may take for all of them.
const pieceTimeout = 6 * WriteTimeout

// socket is the [Writer] of a connection that was taken from net/http.
type socket struct {
	conn *Conn
	peer net.Conn

	// writing is held from taking frames off the queue until they are written, so that they stay in
	// order. It is also held while peer is closed, so that fd is valid under it. Nothing done under
	// it blocks. It is taken before Conn.mu.
	writing sync.Mutex
	fd      int // peer's descriptor, non-blocking; -1 if it is closed or not a plain socket

	// guarded by Conn.mu
	scheduled bool // on the writers' list
	busy      bool // what was taken off the queue is being written
	blocked   bool // peer takes no more for now; a goroutine waits for it

	// set only if peer is not a plain socket, where a peer that does not read looks the same as a
	// server that is busy
	slow *progress
}

var _ Writer = (*socket)(nil)

func newSocket(c *Conn, peer net.Conn) *socket {
	s := &socket{conn: c, peer: peer, fd: -1, slow: &progress{}}
	// a listener's own type may contain one of these, but it wants to see what is written
	var plain syscall.Conn
	switch peer := peer.(type) {
	case *net.TCPConn:
		plain = peer
	case *net.UnixConn:
		plain = peer
	default:
		boundSendBuffer(peer)
		return s
	}
	s.slow = nil
	if raw, err := plain.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { s.fd = int(fd) }) // an error means that it is already closed
		setUserTimeout(raw)
	}
	return s
}

// Take makes peer, whose request has been read, what the connection is written to: first, which is
// the response's head and the first event, then what is queued. From now on the connection owns peer
// and closes it.
//
// An idle connection keeps only a few hundred bytes and one goroutine, which waits for the end.
func (c *Conn) Take(peer net.Conn, first *Frame) {
	s := newSocket(c, peer)
	if !c.serve(s, func() {
		c.frames = append([]*Frame{first}, c.frames...)
		c.bytes += first.size
		s.scheduled = true
	}) {
		peer.Close()
		return
	}
	go s.awaitEnd()
	c.group.Write(c)
}

// awaitEnd reads until the other side closes. A client has nothing to send on this connection.
func (s *socket) awaitEnd() {
	defer s.conn.Guard("reading from a realtime connection")
	var one [1]byte
	if n, _ := s.peer.Read(one[:]); n > 0 {
		s.conn.End(Unexpected)
		return
	}
	s.conn.End(Left)
}

// Wake implements [Writer].
func (s *socket) Wake() (ready bool) {
	if s.scheduled || s.blocked {
		return false
	}
	s.scheduled = true
	return true
}

// State implements [Writer]. The remainder that a slow peer has not taken counts as private.
func (s *socket) State() State {
	return State{
		Flushes: !s.blocked,
		Writing: s.scheduled || s.busy || s.blocked,
		Private: s.blocked,
		Behind:  s.slow != nil && s.slow.isBehind(),
	}
}

// Retract implements [Writer]: what was written is with the client.
func (s *socket) Retract(sets.Of[string], Disconnect) bool { return true }

// Close implements [Writer].
func (s *socket) Close() {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.fd = -1
	s.peer.Close()
}

// Flush implements [Writer]. If it returns true, the connection stays on the writers' list.
func (s *socket) Flush(buffer *Buffer) (more bool) {
	c := s.conn
	s.writing.Lock()
	defer s.writing.Unlock()

	c.mu.Lock()
	s.scheduled = false
	if c.ended || s.blocked {
		c.mu.Unlock()
		return false
	}
	out, shared, _ := c.join(buffer[:0])
	s.busy = true
	c.mu.Unlock()

	written, err := 0, error(nil)
	if len(out) > 0 && s.fd >= 0 {
		written, err = tryWrite(s.fd, out)
	}
	if err != nil {
		c.End(WriteFailed)
		return false
	}
	c.wrote(written)

	c.mu.Lock()
	defer c.mu.Unlock()
	s.busy = false
	if written < len(out) {
		rest := out[written:]
		if !shared {
			rest = slices.Clone(rest) // the buffer will be reused
		}
		s.blocked = true
		go s.writeSlowly(rest)
		return false
	}
	if c.writable() > 0 && !s.scheduled {
		s.scheduled = true
		return true
	}
	c.endIfDoneLocked()
	return false
}

// writePiece waits until piece is written, for as long as peer takes some of it within WriteTimeout.
func (s *socket) writePiece(piece []byte) error {
	if s.slow != nil { // a deadline that passes may break it, as it does TLS
		return s.slow.write(func() error {
			_, err := s.writeWithin(WriteTimeout, piece)
			return err
		})
	}
	start := time.Now()
	for last := start; ; {
		written, err := s.writeWithin(retryAfter, piece)
		now := time.Now()
		if written > 0 {
			last = now
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || now.Sub(last) >= WriteTimeout || now.Sub(start) >= pieceTimeout {
			return err
		}
		piece = piece[written:]
	}
}

func (s *socket) writeWithin(timeout time.Duration, piece []byte) (written int, err error) {
	if err := s.peer.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	return s.peer.Write(piece)
}

// writeSlowly writes rest, and what waits behind it, to a peer that did not take everything at
// once, until the peer has caught up.
func (s *socket) writeSlowly(rest []byte) {
	c := s.conn
	defer c.Guard("writing to a realtime connection")
	for {
		for len(rest) > 0 {
			piece := rest[:min(len(rest), slowPiece)]
			err := s.writePiece(piece)
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				c.End(TooSlow)
				return
			case err != nil:
				c.End(WriteFailed)
				return
			}
			c.wrote(len(piece))
			rest = rest[len(piece):]
		}
		// before the writers may write again; a deadline that has passed would make them fail
		if s.peer.SetWriteDeadline(time.Time{}) != nil {
			c.End(WriteFailed)
			return
		}
		c.mu.Lock()
		rest, _, _ = c.join(nil)
		if len(rest) == 0 {
			s.blocked = false
			c.endIfDoneLocked()
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
}
