// The bounded queue of a connection, and how a connection ends, which a full queue can cause. The
// fan-out fills the queue; socket.go and stream.go empty it.

package notify

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// maxBatch is the maximum number of bytes of frames that are joined for one write.
const maxBatch = 64 << 10

// queue holds what waits to be written to one connection.
type queue struct {
	mu     sync.Mutex // guards the fields below; of a wrapped client the mu below it is locked under it, nothing else
	frames []*frame   // first in, first out
	inline [2]*frame  // backs frames while little waits
	bytes  int        // of frames

	scheduled bool          // on the writers' list
	busy      bool          // what was taken off the queue is being written to the socket
	blocked   bool          // the socket takes no more for now; a goroutine waits for it
	held      int           // number of holders that stop writing for now, see hold
	excess    bool          // the limits may be exceeded until less waits, see release and allowExcess
	room      chan struct{} // closed when there is room for a page of a replay; nil if no replay waits
	wake      chan struct{} // tells the stream or channel reader that something waits; nil for a socket
	inFlight  bool          // a stream is writing something private
	closing   string        // if not empty, end for this reason once everything is written
	closes    int64         // when it ends regardless, by Notifier.clock
	ended     bool
	drained   bool // it has ended when all was written
	counted   bool // among Notifier.registered

	channel chan subscriptions.Message // see Client.Channel
}

// outcome is what became of a frame that should be queued.
type outcome int

const (
	gone    outcome = iota // the connection has ended or is about to
	dropped                // the queue was full; the connection was ended for it
	queued
	ready // queued, and the caller must hand the client to the writers
)

// enqueue appends f. It does not wait for the other side.
//
// A full queue counts against a client only if the client does not take what is written to it. If
// the server is behind because more is sent than it has written so far, the sender writes to the
// connection itself. If it cannot, the queue may grow; see hasRoom.
func (c *Client) enqueue(f *frame) outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if c.ended || c.closing != "" {
			return gone
		}
		if c.hasRoom(f) {
			break
		}
		if c.socket == nil || c.blocked || c.held > 0 {
			c.endLocked(ReasonQueueFull)
			return dropped
		}
		c.mu.Unlock()
		if c.flush() {
			c.notifier.writers.add(c)
		}
		c.mu.Lock()
	}

	c.frames = append(c.frames, f)
	c.bytes += f.size
	if c.socket != nil {
		if c.scheduled || c.blocked || c.held > 0 {
			return queued
		}
		c.scheduled = true
		return ready
	}
	c.wakeLocked()
	return queued
}

// hold stops writing, both of what is queued and of what will be, until release has been called as
// many times as hold.
func (c *Client) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held++
}

func (c *Client) release() {
	c.mu.Lock()
	c.held--
	c.excess = !c.isWithinLimits()
	again := c.held == 0 && c.socket != nil && len(c.frames) > 0 && !c.scheduled && !c.blocked
	c.scheduled = c.scheduled || again
	c.wakeLocked()
	c.mu.Unlock()
	if again {
		c.notifier.writers.add(c)
	}
}

// writable returns the number of frames that may be written. mu is held.
func (c *Client) writable() int {
	if c.held > 0 {
		return 0
	}
	return len(c.frames)
}

// removeQueued removes the frames for which match is true from the queue.
func (c *Client) removeQueued(match func(*frame) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames = slices.DeleteFunc(c.frames, func(f *frame) bool {
		if !match(f) {
			return false
		}
		c.bytes -= f.size
		return true
	})
	c.tellRoomLocked()
	c.endIfDoneLocked()
}

// excused is the factor by which a queue's byte limit grows while the client is not at fault.
const excused = 16

// hasRoom reports whether f may be queued. mu is held.
//
// A client is not at fault for what waits while it is held, until that is written, nor while its
// stream is busy rather than slow. During that time its messages are not counted. Its bytes are, up
// to excused times the usual limit. (Most of what waits is shared with other clients.)
func (c *Client) hasRoom(f *frame) bool {
	config := &c.notifier.config
	size := c.bytes + f.size
	switch {
	case len(c.frames) == 0:
		return true // whatever its size
	case c.held > 0 || c.excess || c.isBehind():
		return size <= excused*config.QueueBytes
	}
	return size <= config.QueueBytes && len(c.frames) < config.QueueSize
}

// isBehind reports whether the server may be what is slow. mu is held; of a wrapped client
// the one below is asked, whose mu is taken under it.
func (c *Client) isBehind() bool {
	if below := c.below(); below != nil {
		return below.mayGrow()
	}
	return c.stream != nil && c.stream.isBehind() || c.socket != nil && c.socket.isBehind()
}

// allowExcess excuses what is queued next, until as little waits as usual.
func (c *Client) allowExcess() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.excess = true
}

// isWithinLimits reports whether the queue is within its usual limits. mu is held.
func (c *Client) isWithinLimits() bool {
	config := &c.notifier.config
	return c.bytes <= config.QueueBytes && len(c.frames) <= config.QueueSize
}

func (c *Client) wakeLocked() {
	select {
	case c.wake <- struct{}{}:
	default: // nobody to wake yet, or it is awake
	}
}

// put queues f and makes sure that it gets written.
func (c *Client) put(f *frame) outcome {
	outcome := c.enqueue(f)
	if outcome == ready {
		c.notifier.writers.add(c)
	}
	return outcome
}

// dropLocked removes the first count frames of the queue. mu is held.
func (c *Client) dropLocked(count int) {
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

// hasRoomForPage reports whether a page of a replay may be queued. Part of the queue is reserved
// for messages sent in the meantime. mu is held.
func (c *Client) hasRoomForPage() bool {
	config := &c.notifier.config
	return len(c.frames) <= config.QueueSize/replayShare && c.bytes <= config.QueueBytes/replayShare
}

// tellRoomLocked wakes the replay that waits for room or for the end of the connection.
func (c *Client) tellRoomLocked() {
	if c.room != nil && (c.ended || c.closing != "" || c.hasRoomForPage()) {
		close(c.room)
		c.room = nil
	}
}

// join takes as many frames off the queue as fit into one write. It returns their bytes (none if
// nothing waits), and whether some are private. Several frames are copied into buffer (or a larger
// one). A single frame's own bytes are returned as they are: they are shared, so do not write to
// them. mu is held.
func (c *Client) join(buffer []byte) (out []byte, shared, private bool) {
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
func (c *Client) Queued() int {
	waiting := 0
	if below := c.below(); below != nil {
		waiting = below.Queued()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return waiting + len(c.frames)
}

// finishTimeout is how long a connection that should end may take to read what is queued.
const finishTimeout = time.Minute

// Finish ends the connection once everything queued has been written, or after finishTimeout.
// Nothing more is queued from now on.
func (c *Client) Finish(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.closing != "" {
		return
	}
	c.closing, c.closes = reason, c.notifier.clock.Load()+int64(finishTimeout)
	c.tellRoomLocked()
	c.endIfDoneLocked()
	c.wakeLocked()
}

// endIfOverdue ends a connection that should have ended by now.
func (c *Client) endIfOverdue(now int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended && c.closing != "" && now >= c.closes {
		c.endLocked(c.closing)
	}
}

// endIfDoneLocked ends a connection that is closing and has nothing left to
// write. mu is held.
func (c *Client) endIfDoneLocked() {
	idle := len(c.frames) == 0 && !c.scheduled && !c.busy && !c.blocked && (c.stream == nil || !c.stream.isWriting())
	if c.closing != "" && idle && !c.ended {
		c.drained = true
		c.endLocked(c.closing)
	}
}

func isPrivate(f *frame) bool { return f.private }

// endIfPrivate ends the connection if something meant for its auth record waits in the queue or is
// being written, or its wrapper may still have it. The remainder that a slow socket has not taken
// counts as private.
func (c *Client) endIfPrivate() {
	isHanded := false
	if below := c.below(); below != nil {
		below.endIfPrivate()
		isHanded = c.pair.Load().handed.Load()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended && (isHanded || c.blocked || c.inFlight || slices.ContainsFunc(c.frames, isPrivate)) {
		c.endLocked(ReasonAuthEnded)
	}
}

func (c *Client) end(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		c.endLocked(reason)
	}
}

func (c *Client) endLocked(reason string) {
	undelivered := len(c.frames)
	c.ended = true
	c.frames, c.bytes = nil, 0
	clear(c.inline[:])
	c.tellRoomLocked()
	if c.counted {
		// before the broker removes it, see Notifier.foreign
		c.counted = false
		c.notifier.registered.Add(-1)
	}
	c.wakeLocked()
	go c.cleanup(reason, undelivered)
}

// IsDiscarded implements [subscriptions.Client].
func (c *Client) IsDiscarded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// isTaken reports whether the client's messages bypass net/http.
func (c *Client) isTaken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.socket != nil
}

// countRegistered counts the client as registered in the broker.
func (c *Client) countRegistered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended && !c.counted {
		c.counted = true
		c.notifier.registered.Add(1)
	}
}

// guard ends the connection if its goroutine panics. Each goroutine of a connection must defer it.
func (c *Client) guard(what string) {
	if cause := recover(); cause != nil {
		c.end(ReasonFailed)
		c.notifier.logPanic(what, cause, slog.String("clientId", c.Id()))
	}
}
