// Writing from a goroutine that may block. This is for connections that cannot be taken from
// net/http (HTTP/2, TLS, a ResponseWriter that a middleware wraps), for those whose messages other
// code must see, and for messages that go through a channel.

package conn

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"herald/notify/internal/sets"
)

// Response is what a stream writes to. Its methods are called one at a time, except for Cut.
type Response interface {
	// Hooked reports whether other code wants to see each message. If so, messages go to Deliver;
	// otherwise they are joined and go to Write.
	Hooked() bool
	// Deliver lets other code see, change or stop the message, writes it and flushes it.
	Deliver(name string, data []byte) error
	// Write writes events, or a part of them. It may block.
	Write(events []byte) error
	Flush() error
	// Cut makes a Write or Deliver in progress fail. It may be called at any time, at most once.
	Cut()
}

// Keeper is a [Response] behind which what was written may wait, for as long as the other side is slow.
type Keeper interface {
	// Kept returns the line at whose end it waits, or nil.
	Kept() *Line
}

// ErrReplaced is what a stream returns that ended because something else writes the connection now.
var ErrReplaced = errors.New("something else writes the connection")

// stream is the [Writer] of a goroutine that writes to a response.
type stream struct {
	progress
	response Response
	wake     chan struct{}        // tells the goroutine to look again
	conn     atomic.Pointer[Conn] // changed under the lock of the connection; nil once replaced
	private  bool                 // it is writing something private; guarded by Conn.mu
	line     *Line                // where response is a Keeper that keeps; else nil
}

var _ Writer = (*stream)(nil)

// Wake implements [Writer].
func (s *stream) Wake() (ready bool) {
	select {
	case s.wake <- struct{}{}:
	default: // it is awake
	}
	return false
}

// Flush implements [Writer].
func (s *stream) Flush(*Buffer) (more bool) { return false }

// State implements [Writer].
func (s *stream) State() State {
	isBehind := s.isBehind()
	if s.line != nil { // what is slow may be the way to its other end, too
		isBehind = (isBehind || s.line.trunk.isBehind()) && !s.line.isFull()
	}
	return State{Writing: s.isWriting(), Private: s.private, Behind: isBehind, Stuck: s.isStuck()}
}

// Retract implements [Writer]. If something private had been written to the line, the connection would end instead.
func (s *stream) Retract(names sets.Of[string], why Disconnect) bool {
	switch {
	case s.line == nil || len(names) == 0:
		return true
	case s.isWriting() || s.line.isWriting():
		return false
	}
	s.line.retract(why)
	return true
}

// Close implements [Writer]. What waits at the end of a line is not written either, unless all was to be.
func (s *stream) Close() {
	if c := s.conn.Load(); c != nil && s.line != nil && !c.IsDrained() {
		switch why, _ := c.Why(); why {
		case Shutdown, Left, WriteFailed, Rejected: // the request has ended by itself
		default:
			s.line.end(why)
		}
	}
	s.response.Cut()
}

// Serve writes first, unless it is nil, and then what is queued to response. It returns when the
// connection has ended because ctx ended, a write failed or the connection was ended. The error
// comes from one of response's methods.
func (c *Conn) Serve(ctx context.Context, response Response, first *Frame) error {
	run := c.BeginStream(response)
	if run == nil {
		return nil
	}
	return run(ctx, first)
}

// BeginStream makes response what the connection is written to, by the function that it returns:
// see Serve. The function is nil if the connection has ended.
func (c *Conn) BeginStream(response Response) (run func(ctx context.Context, first *Frame) error) {
	s := &stream{response: response, wake: make(chan struct{}, 1)}
	if keeper, ok := response.(Keeper); ok {
		s.line = keeper.Kept()
	}
	s.conn.Store(c)
	if !c.serve(s, nil) {
		return nil
	}
	return s.run
}

func (s *stream) run(ctx context.Context, first *Frame) (err error) {
	why := Failed // unless another reason is set below, this is a panic
	defer func() {
		if c := s.conn.Load(); c != nil {
			c.End(why)
		}
	}()

	if first != nil {
		err = s.write(func() error { return s.writeFirst(first) })
	}
	for {
		for more := true; more && err == nil; {
			if !s.isReady() {
				return s.endOf()
			}
			err = s.write(func() (err error) {
				more, err = s.writeBatch()
				return err
			})
		}
		c := s.conn.Load()
		if c == nil {
			return ErrReplaced
		}
		if err != nil {
			why = WriteFailed
			return err
		}
		c.settle()
		select {
		case <-ctx.Done():
			why = Left
			return nil
		case <-s.wake:
		}
		if c := s.conn.Load(); c == nil || c.HasEnded() {
			return s.endOf()
		}
	}
}

// endOf returns ErrReplaced if that is why s has nothing to write.
func (s *stream) endOf() error {
	if s.conn.Load() == nil {
		return ErrReplaced
	}
	return nil
}

// isReady waits until little waits to be written by the connection that this one is passed on to, or
// at the end of its line: the queue there is what bounds both. It returns false if the connection has ended.
func (s *stream) isReady() bool {
	if s.line != nil {
		s.line.awaitRoom()
	}
	c := s.conn.Load()
	if c == nil {
		return false
	}
	next := c.onto.Load()
	if next == nil {
		return true
	}
	if !next.AwaitRoom() {
		<-c.done // it ends because of the next one, or the next one because of it
		return false
	}
	next.AllowExcess() // a message may be larger than the queue
	return true
}

func (s *stream) writeFirst(f *Frame) error {
	if s.response.Hooked() {
		return s.response.Deliver(f.name, f.data)
	}
	return s.writeFlushed(f)
}

func (s *stream) writeFlushed(f *Frame) error {
	if err := s.response.Write(f.wire()); err != nil {
		return err
	}
	return s.response.Flush()
}

// streamBuffers holds *[]byte in which frames are joined, so that an idle connection needs no
// buffer.
var streamBuffers = sync.Pool{New: func() any { return new([]byte) }}

// writeBatch writes some of what waits. It reports whether there was anything to write.
func (s *stream) writeBatch() (any bool, err error) {
	c := s.lockConn()
	if c == nil {
		return false, nil
	}
	s.private = false // the previous write is finished
	if s.response.Hooked() {
		f := c.take()
		if f == nil {
			c.mu.Unlock()
			return false, nil
		}
		s.private = f.private
		c.handed = c.handed || f.private && (s.line != nil || c.onto.Load() != nil)
		c.mu.Unlock()
		c.wrote(f.size)
		if f.comment {
			return true, s.writeFlushed(f)
		}
		return true, s.response.Deliver(f.name, f.data)
	}

	buffer := streamBuffers.Get().(*[]byte)
	defer streamBuffers.Put(buffer)
	out, shared, private := c.join(*buffer)
	s.private = private
	c.handed = c.handed || private && s.line != nil
	last := c.writable() == 0
	c.mu.Unlock()
	if !shared {
		*buffer = out[:0]
	}
	if len(out) == 0 {
		return false, nil
	}
	size := maxBatch // each part is given its time
	if s.line != nil {
		size = len(out) // at its end, as whole events, they are a queue again
	}
	for piece := range slices.Chunk(out, size) {
		s.began()
		if err := s.response.Write(piece); err != nil {
			return true, err
		}
	}
	c.wrote(len(out))
	if last {
		return true, s.response.Flush()
	}
	return true, nil
}

// lockConn returns the connection that s writes, with its lock held; nil if there is none any more.
func (s *stream) lockConn() *Conn {
	for {
		c := s.conn.Load()
		if c == nil {
			return nil
		}
		c.mu.Lock()
		if s.conn.Load() == c {
			return c
		}
		c.mu.Unlock() // it was passed on meanwhile
	}
}
