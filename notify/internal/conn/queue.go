// The bounded queue of a connection. Senders fill it; the connection's writer empties it.

package conn

import (
	"slices"
	"sync"

	"herald/notify/internal/sets"
)

// maxBatch is the maximum number of bytes of frames that are joined for one write.
const maxBatch = 64 << 10

// queue holds what waits to be written to one connection, and the state of the connection.
type queue struct {
	mu     sync.Mutex // guards the fields below
	frames []*Frame   // first in, first out
	inline [2]*Frame  // backs frames while little waits
	bytes  int        // of frames
	writer Writer

	held      int  // number of holders that stop writing for now, see Hold
	excess    bool // the limits may be exceeded until less waits, see Release and AllowExcess
	handed    bool // something private went on to other code, which may still have it
	room      room // for a page
	isClosing bool
	closing   Disconnect // if isClosing: end for this reason once everything is written
	closes    int64      // when it ends regardless, by Group.Now
	ended     bool
	why       Disconnect // if ended
	drained   bool       // it has ended when all was written
}

// Outcome is what became of a frame that should be queued.
type Outcome int

const (
	Gone    Outcome = iota // the connection has ended or is about to
	Dropped                // the queue was full; the connection was ended for it
	Queued
	Ready // queued, and the caller must hand the connection to [Group.Write]
)

// Put queues f and makes sure that it gets written.
func (c *Conn) Put(f *Frame) Outcome {
	outcome := c.Enqueue(f)
	if outcome == Ready {
		c.group.Write(c)
	}
	return outcome
}

// Enqueue appends f. It does not wait for the other side.
//
// A full queue counts against a client only if the client does not take what is written to it. If
// the server is behind because more is sent than it has written so far, the sender writes to the
// connection itself. If it cannot, the queue may grow; see hasRoom.
func (c *Conn) Enqueue(f *Frame) Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if c.ended || c.isClosing {
			return Gone
		}
		if c.hasRoom(f) {
			break
		}
		if c.held > 0 || !c.writer.State().Flushes {
			c.endLocked(QueueFull)
			return Dropped
		}
		c.mu.Unlock()
		if c.Flush() {
			c.group.Write(c)
		}
		c.mu.Lock()
	}

	if r, ok := c.writer.(*relay); ok && c.held == 0 && len(c.frames) == 0 && r.pass(f) {
		return Queued
	}
	c.frames = append(c.frames, f)
	c.bytes += f.size
	if c.held == 0 && c.writer.Wake() {
		return Ready
	}
	return Queued
}

// Hold stops writing, both of what is queued and of what will be, until Release has been called as
// many times as Hold.
func (c *Conn) Hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held++
	if next := c.onto.Load(); next != nil { // what c had may wait there
		next.Hold()
	}
}

// Release undoes one Hold.
func (c *Conn) Release() {
	c.mu.Lock()
	c.held--
	c.excess = !c.isWithinLimits()
	ready := c.writable() > 0 && c.writer.Wake()
	next := c.onto.Load()
	c.mu.Unlock()
	if ready {
		c.group.Write(c)
	}
	if next != nil {
		next.Release()
	}
}

// writable returns the number of frames that may be written. mu is held.
func (c *Conn) writable() int {
	if c.held > 0 {
		return 0
	}
	return len(c.frames)
}

// Remove removes the messages with one of the names from the queue, also at the other end of a trunk. Where it is not
// known what a message that waits there contains, because other code has written it, the connection ends for the reason.
func (c *Conn) Remove(names sets.Of[string], why Disconnect) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames = slices.DeleteFunc(c.frames, func(f *Frame) bool {
		if f.comment || !names.Has(f.name) {
			return false
		}
		c.bytes -= f.size
		return true
	})
	if !c.ended && !c.writer.Retract(names, why) {
		c.endLocked(why)
	}
	c.tellRoomLocked()
	c.endIfDoneLocked()
}

// Excused is the factor by which a limit grows while the client is not at fault.
const Excused = 16

// hasRoom reports whether f may be queued. mu is held.
//
// A client is not at fault for what waits while it is held, until that is written, nor while its
// stream is busy rather than slow. During that time its messages are not counted. Its bytes are, up
// to Excused times the usual limit. (Most of what waits is shared with other clients.)
func (c *Conn) hasRoom(f *Frame) bool {
	config := &c.group.config
	size := c.bytes + f.size
	switch {
	case len(c.frames) == 0:
		return true // whatever its size
	case c.held > 0 || c.excess || c.isBehind():
		return size <= Excused*config.QueueBytes
	}
	return size <= config.QueueBytes && len(c.frames) < config.QueueSize
}

// isBehind reports whether the server may be what is slow. mu is held; of a connection that is passed
// on the next one is asked, whose mu is taken under it.
func (c *Conn) isBehind() bool {
	if next := c.onto.Load(); next != nil {
		return next.mayGrow()
	}
	return c.writer.State().Behind
}

// mayGrow reports whether it is not the other side's fault that messages wait to be passed on to c:
// it takes what is written to it, or it is not known yet that it does not.
func (c *Conn) mayGrow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := c.writer.State()
	return state.Flushes || state.Behind
}

// AllowExcess excuses what is queued next, until as little waits as usual.
func (c *Conn) AllowExcess() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.excess = true
}

// isWithinLimits reports whether the queue is within its usual limits. mu is held.
func (c *Conn) isWithinLimits() bool {
	config := &c.group.config
	return c.bytes <= config.QueueBytes && len(c.frames) <= config.QueueSize
}

// dropLocked removes the first count frames of the queue. mu is held.
func (c *Conn) dropLocked(count int) {
	for _, f := range c.frames[:count] {
		c.bytes -= f.size
	}
	c.excess = c.excess && !c.isWithinLimits()
	left := copy(c.frames, c.frames[count:])
	clear(c.frames[left:])
	c.frames = c.frames[:left]
	if left == 0 && cap(c.frames) > 4*len(c.inline) {
		c.frames = c.inline[:0] // an idle connection should be small
	}
	c.tellRoomLocked()
}

// PageShare is the part of a queue, as 1/PageShare, that may be filled before another page of
// earlier messages is queued. The rest is for messages sent in the meantime.
const PageShare = 4

// hasRoomForPage reports whether a page may be queued. What waits at the other end of a trunk counts as well. mu is held.
func (c *Conn) hasRoomForPage() bool {
	waiting, limits := load{len(c.frames), c.bytes}, load{c.group.config.QueueSize, c.group.config.QueueBytes}
	if r, ok := c.writer.(*relay); ok {
		waiting.add(r.away)
		limits = r.trunk.limits
	}
	return waiting.leavesRoom(limits)
}

// AwaitRoom waits until a page fits into the queue. It returns false if the connection ends.
func (c *Conn) AwaitRoom() bool {
	for {
		c.mu.Lock()
		if c.ended || c.isClosing {
			c.mu.Unlock()
			return false
		}
		if c.hasRoomForPage() {
			c.mu.Unlock()
			return true
		}
		room := c.room.await()
		if r, ok := c.writer.(*relay); ok {
			r.askIfAwaited()
		}
		c.mu.Unlock()
		<-room
	}
}

// tellRoomLocked wakes who waits for room or for the end of the connection.
func (c *Conn) tellRoomLocked() {
	if c.room.isAwaited() && (c.ended || c.isClosing || c.hasRoomForPage()) {
		c.room.tell()
	}
}

// take takes the first frame off the queue, or returns nil if none may be written. mu is held.
func (c *Conn) take() *Frame {
	if c.writable() == 0 {
		return nil
	}
	f := c.frames[0]
	c.dropLocked(1)
	return f
}

// Drain takes all messages off the queue, for tests of connections that nothing writes.
func (c *Conn) Drain(each func(name string, data []byte)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.frames {
		each(f.name, f.data)
	}
	c.dropLocked(len(c.frames))
}

// join takes as many frames off the queue as fit into one write. It returns their bytes (none if
// nothing waits), and whether some are private. Several frames are copied into buffer (or a larger
// one). A single frame's own bytes are returned as they are: they are shared, so do not write to
// them. mu is held.
func (c *Conn) join(buffer []byte) (out []byte, shared, private bool) {
	size, count := 0, 0
	for _, f := range c.frames[:c.writable()] {
		if size += f.size; size > maxBatch && count > 0 {
			break
		}
		count++
		private = private || f.private
	}
	switch count {
	case 0:
		return nil, true, false
	case 1:
		out, shared = c.frames[0].wire(), true
	default:
		out = buffer[:0]
		for _, f := range c.frames[:count] {
			out = append(out, f.wire()...)
		}
	}
	c.dropLocked(count)
	return out, shared, private
}

// Queued returns the number of messages that wait to be written.
func (c *Conn) Queued() int {
	waiting := 0
	if next := c.onto.Load(); next != nil {
		waiting = next.Queued()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return waiting + len(c.frames)
}
