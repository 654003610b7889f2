// How a connection ends: at once, or when everything that waits has been written.

package conn

import (
	"slices"
	"time"
)

// finishTimeout is how long a connection that should end may take to read what is queued.
const finishTimeout = time.Minute

// End ends the connection at once. What is queued is not written.
func (c *Conn) End(why Disconnect) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		c.endLocked(why)
	}
}

// Finish ends the connection once everything queued has been written, or after a minute. Nothing
// more is queued from now on.
func (c *Conn) Finish(why Disconnect) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.isClosing {
		return
	}
	c.isClosing, c.closing, c.closes = true, why, c.group.Now()+int64(finishTimeout)
	c.tellRoomLocked()
	c.endIfDoneLocked()
}

// EndIfPrivate ends the connection for why if something private waits in the queue, is being
// written, or was handed to other code that may still have it.
func (c *Conn) EndIfPrivate(why Disconnect) {
	if next := c.onto.Load(); next != nil {
		next.EndIfPrivate(why)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	if c.handed || c.writer.State().Private || slices.ContainsFunc(c.frames, isPrivate) {
		c.endLocked(why)
	} else if !c.writer.Retract(nil, why) {
		c.endLocked(why)
	}
}

func isPrivate(f *Frame) bool { return f.private }

// HasEnded reports whether the connection has ended.
func (c *Conn) HasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// Why returns why the connection has ended, and whether it has.
func (c *Conn) Why() (Disconnect, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.why, c.ended
}

// IsDrained reports whether the connection has ended because it was to, with everything written.
func (c *Conn) IsDrained() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.drained
}

// endIfOverdue ends a connection that should have ended by now, and reports whether it has ended.
func (c *Conn) endIfOverdue(now int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended:
	case c.isClosing && now >= c.closes:
		c.endLocked(c.closing)
	case c.writer.State().Stuck:
		c.endLocked(TooSlow)
	}
	return c.ended
}

// settle ends the connection if it was only waiting to finish its writes.
func (c *Conn) settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endIfDoneLocked()
}

// endIfDoneLocked ends a connection that is closing and has nothing left to write. mu is held.
func (c *Conn) endIfDoneLocked() {
	if c.isClosing && !c.ended && len(c.frames) == 0 && !c.writer.State().Writing {
		c.drained = true
		c.endLocked(c.closing)
	}
}

func (c *Conn) endLocked(why Disconnect) {
	undelivered := len(c.frames)
	c.ended, c.why = true, why
	c.frames, c.bytes = nil, 0
	clear(c.inline[:])
	c.tellRoomLocked()
	c.writer.Wake()
	go c.cleanup(why, undelivered)
}
