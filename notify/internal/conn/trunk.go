// The way of many connections to another process, which writes them to their clients: an edge. A message for a
// thousand of them is carried once, with a list.

package conn

import (
	"cmp"
	"errors"
	"os"
	"sync"
	"time"

	"herald/notify/internal/sets"
)

// maxCargo is how many bytes wait in a trunk before its connections keep what they have.
const maxCargo = 1 << 20

// Cargo is what a trunk carries: one of its fields To, Raw, Ends, Retracts, Asks and Control is set.
type Cargo struct {
	Frame *Frame
	To    []uint64 // the connections that get Frame, by their numbers at the other end

	// Number is the connection that the fields below are about.
	Number uint64
	// Raw are whole events that were written by other code.
	Raw []byte
	// Ends says that the connection has ended. IsDrained: after all that was carried for it before has been written.
	Ends      *Disconnect
	IsDrained bool
	// Retracts says that private messages must not be written any more, or those named Names if there are any.
	Retracts *Disconnect
	Names    sets.Of[string]
	// Asks says that the other end is to answer when the connection's queue has room for a page: see [Conn.HasRoomAt].
	Asks bool
	// Control is what the owner of the trunk has put in between.
	Control any
}

// Trunk carries messages of connections until its owner takes them off. Its methods may be called concurrently.
type Trunk struct {
	group  *Group
	limits load          // of a queue at the other end
	ready  chan struct{} // has something while there is cargo

	mu       sync.Mutex // guards the fields below; taken under a connection's lock
	cargo    []Cargo
	at       map[*Frame]int // where in cargo
	latest   *Frame         // was looked up last: one message goes to many, one after another
	latestAt int
	round    uint64 // counts Takes
	bytes    int
	blocked  []*relay
	room     room
	full     time.Time // since when it has been full; zero if it is not
	closed   bool
}

// NewTrunk returns a trunk for connections of g, whose queues at the other end hold size messages with bytes bytes. Zero stands
// for as much as those of g.
func (g *Group) NewTrunk(size, bytes int) *Trunk {
	return &Trunk{
		group: g, limits: load{cmp.Or(size, g.config.QueueSize), cmp.Or(bytes, g.config.QueueBytes)},
		ready: make(chan struct{}, 1), at: map[*Frame]int{},
	}
}

// Ready has a value when there is cargo to take.
func (t *Trunk) Ready() <-chan struct{} { return t.ready }

// Take takes off what is to be carried, in order.
func (t *Trunk) Take() []Cargo {
	t.mu.Lock()
	cargo, blocked := t.cargo, t.blocked
	t.cargo, t.blocked, t.bytes, t.full = nil, nil, 0, time.Time{}
	clear(t.at)
	t.latest = nil
	t.round++
	t.room.tell()
	t.mu.Unlock()
	for _, r := range blocked {
		r.unblock()
	}
	return cargo
}

// Bytes returns about how many bytes of cargo there are; 0 only if there is none.
func (t *Trunk) Bytes() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes + len(t.cargo)
}

// Close drops what has not been taken off, and whatever comes later.
func (t *Trunk) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.Take()
}

// Control puts value in between what is carried.
func (t *Trunk) Control(value any) { t.put(Cargo{Control: value}) }

func (t *Trunk) put(c Cargo) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.append(c)
}

func (t *Trunk) append(c Cargo) {
	if t.closed {
		return
	}
	t.cargo = append(t.cargo, c)
	select {
	case t.ready <- struct{}{}:
	default:
	}
}

// noteFull notes since when there is no room. mu is held.
func (t *Trunk) noteFull() {
	if t.full.IsZero() {
		t.full = time.Now()
	}
}

// write carries events of the connection with number. It waits for room in the trunk, until cut is closed.
func (t *Trunk) write(number uint64, events []byte, cut <-chan struct{}) error {
	t.mu.Lock()
	for t.bytes > maxCargo && !t.closed {
		t.noteFull()
		room := t.room.await()
		t.mu.Unlock()
		select {
		case <-room:
		case <-cut:
			return os.ErrDeadlineExceeded
		}
		t.mu.Lock()
	}
	defer t.mu.Unlock()
	if t.closed {
		return errTrunkClosed
	}
	t.bytes += len(events)
	t.append(Cargo{Number: number, Raw: append([]byte(nil), events...)})
	return nil
}

var errTrunkClosed = errors.New("the way to the client is closed")

// isBehind reports whether the trunk, rather than a client, may be what is slow.
func (t *Trunk) isBehind() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.full.IsZero() && time.Since(t.full) < WriteTimeout
}

// relay is the [Writer] of one connection on a trunk.
type relay struct {
	conn   *Conn
	trunk  *Trunk
	number uint64

	// guarded by Conn.mu
	scheduled bool // on the writers' list
	blocked   bool // the trunk was full
	gone      bool // the connection has ended at the other end
	credit

	// where in the trunk the connection's last message is; guarded by Trunk.mu
	round uint64
	last  int
}

var _ Writer = (*relay)(nil)

// Relay makes the trunk carry what is queued to the connection that has number at the other end: first, unless it is
// nil, then the rest. It returns false if the connection has ended.
func (c *Conn) Relay(t *Trunk, number uint64, first *Frame) bool {
	r := &relay{conn: c, trunk: t, number: number}
	t.mu.Lock()
	r.after(len(t.cargo) - 1)
	t.mu.Unlock()
	if !c.serve(r, func() {
		if first != nil {
			c.frames = append([]*Frame{first}, c.frames...)
			c.bytes += first.size
		}
		r.scheduled = true
	}) {
		return false
	}
	c.group.Write(c)
	return true
}

// EndAt ends a connection that has ended at the other end of its trunk.
func (c *Conn) EndAt(why Disconnect) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.writer.(*relay); ok {
		r.gone = true
	}
	if !c.ended {
		c.endLocked(why)
	}
}

// Wake implements [Writer].
func (r *relay) Wake() (ready bool) {
	if r.scheduled || r.blocked {
		return false
	}
	r.scheduled = true
	return true
}

// State implements [Writer]. What is private at the other end is retracted there.
func (r *relay) State() State {
	return State{Flushes: !r.blocked && !r.full, Writing: r.scheduled, Behind: r.blocked && r.trunk.isBehind()}
}

// Flush implements [Writer].
func (r *relay) Flush(*Buffer) (more bool) {
	c := r.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	r.scheduled = false
	if c.ended || r.blocked {
		return false
	}
	count, bytes := r.carry(c.frames[:c.writable()])
	r.blocked = count < c.writable()
	c.dropLocked(count)
	r.askIfAwaited()
	c.wrote(bytes)
	c.endIfDoneLocked()
	return false
}

// pass puts f on the trunk if there is room, so that it need not wait in a queue. Nothing may wait there. Conn.mu is
// held.
func (r *relay) pass(f *Frame) bool {
	if r.scheduled || r.blocked {
		return false
	}
	one := [1]*Frame{f}
	count, bytes := r.carry(one[:])
	if count == 0 {
		r.blocked = true // until there is room, when f is in the queue
		return false
	}
	r.askIfAwaited()
	r.conn.wrote(bytes)
	return true
}

// carry puts frames on the trunk, and returns how many of them it took. Conn.mu is held.
func (r *relay) carry(frames []*Frame) (count, bytes int) {
	t := r.trunk
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.round != t.round {
		r.after(-1)
	}
	for _, f := range frames {
		if t.bytes > maxCargo && !t.closed {
			t.noteFull()
			t.blocked = append(t.blocked, r)
			break
		}
		count++
		bytes += f.size
		if f.comment || t.closed {
			continue // the other end has heartbeats of its own
		}
		// One connection's messages stay in order: a frame that is already carried counts only if it comes after the
		// connection's last one.
		at, isCarried := t.latestAt, t.latest == f
		if !isCarried {
			at, isCarried = t.at[f]
		}
		if !isCarried || at <= r.last {
			at = len(t.cargo)
			t.append(Cargo{Frame: f})
			t.at[f] = at
			t.bytes += f.size
		}
		t.latest, t.latestAt = f, at
		t.cargo[at].To = append(t.cargo[at].To, r.number)
		r.after(at)
	}
	r.away.add(load{count, bytes})
	return count, bytes
}

// unblock writes again.
func (r *relay) unblock() {
	c := r.conn
	c.mu.Lock()
	r.blocked = false
	ready := c.writable() > 0 && r.Wake()
	c.endIfDoneLocked()
	c.mu.Unlock()
	if ready {
		c.group.Write(c)
	}
}

// Close implements [Writer]. A connection that ends with the server goes on at the other end, and comes back.
func (r *relay) Close() {
	why, _ := r.conn.Why()
	isDrained := r.conn.IsDrained()
	r.conn.mu.Lock()
	gone := r.gone
	r.conn.mu.Unlock()
	if !gone && why != Shutdown {
		r.trunk.put(Cargo{Number: r.number, Ends: &why, IsDrained: isDrained})
	}
}

// Retract implements [Writer].
func (r *relay) Retract(names sets.Of[string], why Disconnect) bool {
	t := r.trunk
	t.mu.Lock()
	defer t.mu.Unlock()
	t.append(Cargo{Number: r.number, Retracts: &why, Names: names})
	r.after(len(t.cargo) - 1)
	return true
}

// after makes what is carried next for the connection come after the cargo at that place. Trunk.mu is held.
func (r *relay) after(at int) { r.round, r.last = r.trunk.round, at }
