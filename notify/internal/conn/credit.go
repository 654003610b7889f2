// Credit: connections at the other end of a trunk have queues of their own there. What is sent faster than their clients
// read, such as pages of earlier messages, waits until the other end says that there is room.

package conn

import (
	"os"
	"sync"
	"time"
)

// load is an amount of messages.
type load struct{ count, bytes int }

func (l *load) add(other load)  { l.count, l.bytes = l.count+other.count, l.bytes+other.bytes }
func (l *load) take(other load) { l.count, l.bytes = l.count-other.count, l.bytes-other.bytes }

// leavesRoom reports whether a queue in which so much waits has room for a page.
func (l *load) leavesRoom(config *Config) bool {
	return l.count <= config.QueueSize/PageShare && l.bytes <= config.QueueBytes/PageShare
}

// credit counts what was sent to the other end of a trunk and may still wait there.
type credit struct {
	away  load
	asked load // the part of away that a question is about
	asks  bool // there is one
	since time.Time
}

// answerTime is how long an answer may take before it is the client that does not read.
const answerTime = time.Second

// ask asks for room at the other end, where the connection has number, unless it does already.
func (k *credit) ask(t *Trunk, number uint64) {
	if !k.asks && k.away.count > 0 {
		k.asks, k.asked, k.since = true, k.away, time.Now()
		t.put(Cargo{Number: number, Asks: true})
	}
}

// isRefused reports whether there has been no room for a while.
func (k *credit) isRefused() bool { return k.asks && time.Since(k.since) > answerTime }

// granted notes the answer: what was sent before the question leaves room.
func (k *credit) granted() {
	k.away.take(k.asked)
	k.asks, k.asked = false, load{}
}

// askIfAwaited asks for room if somebody waits for it. Conn.mu is held.
func (r *relay) askIfAwaited() {
	if r.conn.room != nil {
		r.ask(r.trunk, r.number)
	}
}

// HasRoomAt notes that the connection has room for a page at the other end of its trunk: the answer to a [Cargo] that Asks.
func (c *Conn) HasRoomAt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.writer.(*relay); ok {
		r.granted()
		c.tellRoomLocked()
		r.askIfAwaited()
	}
}

// Line carries events that other code writes to one connection at the other end of a trunk.
type Line struct {
	trunk  *Trunk
	number uint64
	cut    <-chan struct{}

	mu sync.Mutex // guards the fields below; taken before Trunk.mu
	credit
	room chan struct{} // closed when there is room; nil if nobody waits
}

// NewLine returns a line to the connection with number. Its writes fail when cut is closed.
func (t *Trunk) NewLine(number uint64, cut <-chan struct{}) *Line {
	return &Line{trunk: t, number: number, cut: cut}
}

// Write carries events. It waits for room, at both ends.
func (l *Line) Write(events []byte) error {
	l.mu.Lock()
	for !l.away.leavesRoom(&l.trunk.group.config) {
		if l.room == nil {
			l.room = make(chan struct{})
		}
		room := l.room
		l.ask(l.trunk, l.number)
		l.mu.Unlock()
		select {
		case <-room:
		case <-l.cut:
			return os.ErrDeadlineExceeded
		}
		l.mu.Lock()
	}
	l.away.add(load{1, len(events)})
	l.mu.Unlock()
	return l.trunk.write(l.number, events, l.cut)
}

// HasRoomAt is as [Conn.HasRoomAt].
func (l *Line) HasRoomAt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.granted()
	if l.room != nil {
		close(l.room)
		l.room = nil
	}
}
