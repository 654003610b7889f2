// Writing to a connection that was taken from net/http: one system call for everything that waits,
// never blocking. Called by the writers (writers.go) and, if the writers are behind, by senders.

package notify

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// WriteTimeout is how long a connection may take none of what is written to it before it is closed.
const WriteTimeout = 10 * time.Second

// slowPiece is how many bytes a slow peer must take within WriteTimeout. At 2 KiB per second it
// still keeps its connection.
const slowPiece = 16 << 10

// socket is a connection that was taken from net/http.
type socket struct {
	conn net.Conn

	// writing is held from taking frames off the queue until they are written, so that they stay in
	// order. It is also held while conn is closed, so that fd is valid under it. Nothing done under
	// it blocks. It is taken before queue.mu.
	writing sync.Mutex
	fd      int // conn's descriptor, non-blocking; -1 if it is closed or not a plain socket

	// set only if conn is not a plain socket, where a peer that does not read looks the same as a
	// server that is busy
	slow *stream
}

func newSocket(conn net.Conn) *socket {
	s := &socket{conn: conn, fd: -1, slow: &stream{}}
	// a listener's own type may contain one of these, but it wants to see what is written
	var plain syscall.Conn
	switch conn := conn.(type) {
	case *net.TCPConn:
		plain = conn
	case *net.UnixConn:
		plain = conn
	default:
		return s
	}
	s.slow = nil
	if raw, err := plain.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { s.fd = int(fd) }) // an error means that it is already closed
		setUserTimeout(raw)
	}
	return s
}

func (s *socket) close() {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.fd = -1
	s.conn.Close()
}

// TakeConn makes conn, whose request has been read, the client's connection. It writes head (the
// response's head) and PocketBase's connect event, then what is queued. From now on the client owns
// conn and closes it.
//
// An idle connection keeps only a few hundred bytes and one goroutine, which waits for the end.
func (c *Client) TakeConn(conn net.Conn, head []byte) {
	s := newSocket(conn)
	connect := c.ConnectMessage()
	first := &frame{message: connect, encoded: append(head, EncodeSSE(c.Id(), connect.Name, connect.Data)...)}
	first.size = len(first.encoded)

	if !c.startServing(func() {
		c.socket = s
		c.frames = append([]*frame{first}, c.frames...)
		c.bytes += first.size
		c.scheduled = true
	}) {
		conn.Close()
		return
	}
	go c.awaitEnd()
	c.notifier.writers.add(c)
}

// connectName is the name of PocketBase's first event.
const connectName = "PB_CONNECT"

// ConnectMessage is PocketBase's first event on a connection; it gives the SDK its client id. Its
// frame is the only one with an id field.
func (c *Client) ConnectMessage() subscriptions.Message {
	return subscriptions.Message{Name: connectName, Data: []byte(`{"clientId":"` + c.Id() + `"}`)}
}

// awaitEnd reads until the other side closes. A client has nothing to send on this connection.
func (c *Client) awaitEnd() {
	defer c.guard("reading from a realtime connection")
	var one [1]byte
	if n, _ := c.socket.conn.Read(one[:]); n > 0 {
		c.end(ReasonUnexpected)
		return
	}
	c.end(ReasonLeft)
}

// flush writes what waits for the connection. It reports whether more waits; if so, the client
// stays on the writers' list.
func (c *Client) flush() (again bool) {
	buffer := buffers.Get().(*[maxBatch]byte)
	defer buffers.Put(buffer)
	return c.flushWith(buffer)
}

// buffers holds buffers in which frames are joined.
var buffers = sync.Pool{New: func() any { return new([maxBatch]byte) }}

func (c *Client) flushWith(buffer *[maxBatch]byte) (again bool) {
	s := c.socket
	s.writing.Lock()
	defer s.writing.Unlock()

	c.mu.Lock()
	c.scheduled = false
	if c.ended || c.blocked {
		c.mu.Unlock()
		return false
	}
	out, shared, _ := c.join(buffer[:0])
	c.busy = true
	c.mu.Unlock()

	written, err := 0, error(nil)
	if len(out) > 0 && s.fd >= 0 {
		written, err = tryWrite(s.fd, out)
	}
	if err != nil {
		c.end(ReasonWriteFailed)
		return false
	}
	c.wrote(written)

	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy = false
	if written < len(out) {
		rest := out[written:]
		if !shared {
			rest = slices.Clone(rest) // the buffer will be reused
		}
		c.blocked = true
		go c.writeSlowly(rest)
		return false
	}
	if c.writable() > 0 && !c.scheduled {
		c.scheduled = true
		return true
	}
	c.endIfDoneLocked()
	return false
}

// settle ends the connection if it was only waiting to finish its writes.
func (c *Client) settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endIfDoneLocked()
}

// wrote counts what was written.
func (c *Client) wrote(bytes int) {
	c.lastWrite.Store(c.notifier.clock.Load())
	if c.below() == nil {
		c.notifier.stats.bytes.Add(int64(bytes))
	}
}

// writePiece waits until piece is written, at most for WriteTimeout.
func (s *socket) writePiece(piece []byte) error {
	write := func() error {
		if err := s.conn.SetWriteDeadline(time.Now().Add(WriteTimeout)); err != nil {
			return err
		}
		_, err := s.conn.Write(piece)
		return err
	}
	if s.slow != nil {
		return s.slow.write(write)
	}
	return write()
}

// isBehind reports whether the server itself may be the slow side.
func (s *socket) isBehind() bool { return s.slow != nil && s.slow.isBehind() }

// writeSlowly writes rest, and what waits behind it, to a peer that did not take everything at
// once, until the peer has caught up.
func (c *Client) writeSlowly(rest []byte) {
	defer c.guard("writing to a realtime connection")
	conn := c.socket.conn
	for {
		for len(rest) > 0 {
			piece := rest[:min(len(rest), slowPiece)]
			err := c.socket.writePiece(piece)
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				c.end(ReasonTooSlow)
				return
			case err != nil:
				c.end(ReasonWriteFailed)
				return
			}
			c.wrote(len(piece))
			rest = rest[len(piece):]
		}
		// before the writers may write again; a deadline that has passed would make them fail
		if conn.SetWriteDeadline(time.Time{}) != nil {
			c.end(ReasonWriteFailed)
			return
		}
		c.mu.Lock()
		rest, _, _ = c.join(nil)
		if len(rest) == 0 {
			c.blocked = false
			c.endIfDoneLocked()
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
}
