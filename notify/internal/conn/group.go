// What all connections share: their limits, a clock, the writers, and one timer for what is due from
// time to time.

package conn

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"herald/notify/internal/waits"
)

// Config holds the limits of the connections of a [Group].
type Config struct {
	// QueueSize and QueueBytes are how many messages and bytes may wait for one connection.
	QueueSize, QueueBytes int
	// Heartbeat is how long a connection may be without a write before it gets a comment; none if
	// not positive.
	Heartbeat time.Duration
}

// Group is a set of connections. Its methods may be called concurrently.
type Group struct {
	config   Config
	logPanic func(what string, cause any, id string)
	writers  *writers
	started  time.Time
	clock    atomic.Int64 // nanoseconds since started, at the last tick
	bytes    atomic.Int64 // written

	mu     sync.Mutex // guards the fields below; never taken under a connection's lock
	served map[*Conn]struct{}
	timer  *time.Timer // runs only while there are some
	closed bool        // no more connections are served
}

// tickEvery is the precision of heartbeats, timeouts and [Owner.Tick].
const tickEvery = time.Second

// NewGroup returns a group without connections. logPanic logs a panic in a goroutine of the
// connection with id.
func NewGroup(config Config, logPanic func(what string, cause any, id string)) *Group {
	return &Group{config: config, logPanic: logPanic, writers: newWriters(), started: time.Now(), served: map[*Conn]struct{}{}}
}

// Now returns the time in nanoseconds since the group was made, as of the last tick.
func (g *Group) Now() int64 { return g.clock.Load() }

// ExactNow is Now as of this moment. A server that is stopped, or has no CPU time, has no ticks.
func (g *Group) ExactNow() int64 { return int64(time.Since(g.started)) }

// setClock sets and returns the time that the connections use.
func (g *Group) setClock() int64 {
	now := g.ExactNow()
	g.clock.Store(now)
	return now
}

// Write makes the group's goroutines write to connections that are [Ready].
func (g *Group) Write(conns ...*Conn) { g.writers.add(conns...) }

// Bytes returns how many bytes were written so far.
func (g *Group) Bytes() int64 { return g.bytes.Load() }

// Shutdown ends all connections once everything queued for them is written, or when patience is
// over. It returns when all have ended, or when end is over. The group serves no more connections.
func (g *Group) Shutdown(patience, end context.Context) {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()

	conns := g.Served()
	for _, c := range conns {
		if !c.isNext { // it must first write what is passed on to it
			c.Finish(Shutdown)
		}
	}
	defer context.AfterFunc(patience, func() {
		for _, c := range conns {
			c.End(Shutdown)
		}
	})()
	waits.For(end, func() {
		for _, c := range conns {
			<-c.Done()
		}
	})
}

// Served returns the connections that are served.
func (g *Group) Served() []*Conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	conns := make([]*Conn, 0, len(g.served))
	for c := range g.served {
		conns = append(conns, c)
	}
	return conns
}

// Totals are numbers of the connections that are served.
type Totals struct {
	Taken                       int // are written to without net/http
	QueuedMessages, QueuedBytes int // wait to be written
}

// Totals returns the present numbers.
func (g *Group) Totals() (t Totals) {
	for _, c := range g.Served() {
		c.mu.Lock()
		if _, isTaken := c.writer.(*socket); isTaken {
			t.Taken++
		}
		t.QueuedMessages += len(c.frames)
		t.QueuedBytes += c.bytes
		c.mu.Unlock()
	}
	return t
}

func (g *Group) add(c *Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.served[c] = struct{}{}
	if g.timer == nil {
		g.timer = time.AfterFunc(tickEvery, g.tick)
	}
	return true
}

func (g *Group) remove(c *Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.served, c)
	if len(g.served) == 0 && g.timer != nil {
		g.timer.Stop()
		g.timer = nil
	}
}

func (g *Group) tick() {
	for _, c := range g.Served() {
		c.tick(time.Now(), g.setClock())
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.timer != nil {
		g.timer.Reset(tickEvery)
	}
}
