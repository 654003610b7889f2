// Credit: connections at the other end of a trunk have queues of their own there. What is sent faster than their clients
// read, such as pages of earlier messages, waits until the other end says that there is room.

package conn

import (
	"os"
	"sync"
)

// load is an amount of messages.
type load struct{ count, bytes int }

func (l *load) add(other load)  { l.count, l.bytes = l.count+other.count, l.bytes+other.bytes }
func (l *load) take(other load) { l.count, l.bytes = l.count-other.count, l.bytes-other.bytes }

// leavesRoom reports whether a queue with these limits, in which so much waits, has room for a page.
func (l *load) leavesRoom(limits load) bool {
	return l.count <= limits.count/PageShare && l.bytes <= limits.bytes/PageShare
}

// credit counts what was sent to the other end of a trunk and may still wait there.
type credit struct {
	away  load
	asked load // the part of away that a question is about
	asks  bool // there is one
	full  bool // there has been no room for a while
}

// ask asks for room at the other end, where the connection has number, unless it does already.
func (k *credit) ask(t *Trunk, number uint64) {
	if !k.asks && k.away.count > 0 {
		k.asks, k.asked = true, k.away
		t.put(Cargo{Number: number, Asks: true})
	}
}

// granted notes the answer: what was sent before the question leaves room.
func (k *credit) granted() {
	k.away.take(k.asked)
	k.asks, k.asked, k.full = false, load{}, false
}

// askIfAwaited asks for room if somebody waits for it. Conn.mu is held.
func (r *relay) askIfAwaited() {
	if r.conn.room.isAwaited() {
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

// FullAt notes that there has been no room for a while at the other end of the trunk: the client does not read. The time
// that the way takes is not in that while. An answer to the question follows if there is room later.
func (c *Conn) FullAt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.writer.(*relay); ok {
		r.full = true
	}
}

// Line carries events that other code writes to one connection at the other end of a trunk.
type Line struct {
	trunk  *Trunk
	number uint64
	cut    <-chan struct{}

	mu sync.Mutex // guards the fields below; taken after Conn.mu and before Trunk.mu
	credit
	room    room
	writing int // writes in progress
}

// NewLine returns a line to the connection with number. Its writes fail when cut is closed.
func (t *Trunk) NewLine(number uint64, cut <-chan struct{}) *Line {
	return &Line{trunk: t, number: number, cut: cut}
}

// Write carries events. It waits for room, at both ends.
func (l *Line) Write(events []byte) error {
	l.count(+1)
	defer l.count(-1)
	if !l.awaitRoom() {
		return os.ErrDeadlineExceeded
	}
	l.mu.Lock()
	l.away.add(load{1, len(events)})
	l.mu.Unlock()
	return l.trunk.write(l.number, events, l.cut)
}

// awaitRoom waits for room at the other end. It returns false if writes fail from now on.
func (l *Line) awaitRoom() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.away.leavesRoom(l.trunk.limits) {
		room := l.room.await()
		l.ask(l.trunk, l.number)
		l.mu.Unlock()
		select {
		case <-room:
		case <-l.cut:
			l.mu.Lock()
			return false
		}
		l.mu.Lock()
	}
	return true
}

func (l *Line) count(by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writing += by
}

// retract ends the connection at the other end for the reason, if anything waits there.
func (l *Line) retract(why Disconnect) { l.trunk.put(Cargo{Number: l.number, Retracts: &why}) }

// end ends the connection at the other end, and writes nothing more there.
func (l *Line) end(why Disconnect) { l.trunk.put(Cargo{Number: l.number, Ends: &why}) }

func (l *Line) isWriting() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writing > 0
}

// isFull reports whether there has been no room for a while.
func (l *Line) isFull() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.full
}

// FullAt is as [Conn.FullAt].
func (l *Line) FullAt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.full = true
}

// HasRoomAt is as [Conn.HasRoomAt].
func (l *Line) HasRoomAt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.granted()
	l.room.tell()
}
