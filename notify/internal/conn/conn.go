// Package conn is one realtime connection of the server: its bounded queue, the ways to write it
// out, and its end. It knows no topics, no rights and no PocketBase.
//
// A sender puts frames into the queue (queue.go) and never waits. A [Writer] takes them off and
// writes them: a socket that was taken from net/http (socket.go), or a stream, written by a goroutine
// of its own (stream.go). A [Group] holds what all connections share: the goroutines that write to
// sockets (writers.go), and the timer for heartbeats and timeouts (group.go).
//
// # Locks
//
// They are taken in this order: a socket's writing, Conn.mu (a connection's before that of the one it
// passes on to), then those of the group.
package conn

import (
	"sync/atomic"
	"time"
)

// Owner is what a connection reports to.
type Owner interface {
	// Ended is called once when the connection has ended, on a goroutine of its own. Nothing more is
	// written then. undelivered is the number of frames that were queued and not taken off.
	Ended(why Disconnect, undelivered int)
	// Tick is called about once per second while the connection is served. now is [Group.Now].
	Tick(wall time.Time, now int64)
}

// Conn is one connection. Its methods may be called concurrently.
type Conn struct {
	group *Group
	owner Owner
	id    string
	begun time.Time
	done  chan struct{}

	lifetime, idle atomic.Int64 // durations, see SetTimeouts

	// when it last was written to and last had a message, by Group.Now
	lastWrite, lastMessage atomic.Int64

	// onto is the connection that gets what is written to this one, after other code has seen it;
	// nil if there is none. Set once.
	onto   atomic.Pointer[Conn]
	isNext bool // another one passes on to it; set before it is served

	queue
}

// Start makes c a connection of the group that begins now, and returns it. c must be zero.
func (g *Group) Start(c *Conn, owner Owner, id string) *Conn {
	c.group, c.owner, c.id = g, owner, id
	c.begun, c.done = time.Now(), make(chan struct{})
	c.frames = c.inline[:0]
	c.writer = unserved{}
	return c
}

// ID returns the id that the connection was started with.
func (c *Conn) ID() string { return c.id }

// Begun returns when the connection began.
func (c *Conn) Begun() time.Time { return c.begun }

// Done is closed when the connection has ended and its owner is done with it.
func (c *Conn) Done() <-chan struct{} { return c.done }

// SetTimeouts limits how long the connection lasts, and how long it lasts without a message. Zero
// means no limit.
func (c *Conn) SetTimeouts(lifetime, idle time.Duration) {
	c.lifetime.Store(int64(lifetime))
	c.idle.Store(int64(idle))
}

// Timeouts returns what SetTimeouts has set.
func (c *Conn) Timeouts() (lifetime, idle time.Duration) {
	return time.Duration(c.lifetime.Load()), time.Duration(c.idle.Load())
}

// NoteMessage records that the connection had a message at the time now, by [Group.Now].
func (c *Conn) NoteMessage(now int64) { c.lastMessage.Store(now) }

// PassOn makes next the connection that c's messages are written to in the end: what is written to
// c must come out in next's queue. c then waits for room there, and is as patient as next is. A
// stream that serves c already serves next from now on; PassOn reports whether there is one. Call it
// once.
func (c *Conn) PassOn(next *Conn) (served bool) {
	c.mu.Lock()
	next.mu.Lock()
	next.isNext = true
	next.held += c.held
	s, served := c.writer.(*stream)
	if served {
		next.writer, c.writer = s, unserved{}
		s.conn.Store(next)
		s.Wake()
	}
	next.mu.Unlock()
	c.onto.Store(next)
	c.mu.Unlock()
	if served {
		next.begin(s)
	}
	return served
}

// serve makes writer the one that writes from now on; it calls begin, if not nil, with the
// connection's lock held. It returns false if the connection has ended or the group is closed.
func (c *Conn) serve(writer Writer, begin func()) bool {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return false
	}
	if before, ok := c.writer.(*stream); ok { // somebody's Channel, which gets nothing more
		before.conn.Store(nil)
		before.Wake()
	}
	c.writer = writer
	if begin != nil {
		begin()
	}
	c.mu.Unlock()
	return c.begin(writer)
}

// begin makes the group look after the connection, which writer writes.
func (c *Conn) begin(writer Writer) bool {
	now := c.group.setClock()
	c.lastWrite.Store(now)
	c.lastMessage.Store(now)
	if !c.group.add(c) {
		c.End(Shutdown)
		return false
	}
	if c.HasEnded() { // meanwhile; its cleanup may have run before the add
		c.group.remove(c)
		return false
	}
	return true
}

// IsTaken reports whether the connection is written past the response of its request.
func (c *Conn) IsTaken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.writer.(type) {
	case *socket, *relay:
		return true
	}
	return false
}

// IsServed reports whether something writes the connection.
func (c *Conn) IsServed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writer != Writer(unserved{})
}

// tick does what is due for c.
func (c *Conn) tick(wall time.Time, now int64) {
	defer c.Guard("looking after a realtime connection")
	elapsed := func(since int64, limit time.Duration) bool {
		return limit > 0 && time.Duration(now-since) >= limit
	}
	if c.endIfOverdue(now) { // anything else that is due would wait for this write
		return
	}
	c.owner.Tick(wall, now)
	lifetime, idle := c.Timeouts()
	switch {
	case lifetime > 0 && wall.Sub(c.begun) >= lifetime:
		c.Finish(Lifetime)
	case elapsed(c.lastMessage.Load(), idle):
		c.Finish(Idle)
	case elapsed(c.lastWrite.Load(), c.group.config.Heartbeat):
		c.lastWrite.Store(now)
		if c.Queued() == 0 {
			c.Put(heartbeat)
		}
	}
}

// wrote counts what was written.
func (c *Conn) wrote(bytes int) {
	c.lastWrite.Store(c.group.Now())
	if c.onto.Load() == nil {
		c.group.bytes.Add(int64(bytes))
	}
}

// cleanup does what remains when the connection has ended. It has its own goroutine, since its
// owner takes locks that the caller that ends the connection may hold.
func (c *Conn) cleanup(why Disconnect, undelivered int) {
	defer close(c.done)
	defer c.Guard("ending a realtime connection")
	c.mu.Lock()
	writer := c.writer
	c.mu.Unlock()
	writer.Close()
	c.group.remove(c)
	c.owner.Ended(why, undelivered)
}

// Guard ends the connection if its goroutine panics. Each goroutine of a connection must defer it.
func (c *Conn) Guard(what string) {
	if cause := recover(); cause != nil {
		c.End(Failed)
		c.group.logPanic(what, cause, c.id)
	}
}
