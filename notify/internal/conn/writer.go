// The seam where a connection's bytes leave: what the queue needs of a way to write.

package conn

import "herald/notify/internal/sets"

// Writer writes what waits in the queue of one connection: see socket.go and stream.go.
//
// Wake, State and Retract are called with the connection's lock held, and must not block.
type Writer interface {
	// Wake is called when something waits to be written, and when the connection has ended. It
	// reports whether the caller must hand the connection to [Group.Write].
	Wake() (ready bool)
	// Flush writes what waits without blocking, and reports whether more waits. It joins frames in
	// buffer. Only writers whose State says Flushes are flushed.
	Flush(buffer *Buffer) (more bool)
	State() State
	// Retract takes back, where what was written is in the queue of another process, messages with one of names, or private
	// ones if there are no names. Where what waits there is not known, the other process ends the connection for why. It
	// returns false if something may come there later: then the connection must end here.
	Retract(names sets.Of[string], why Disconnect) bool
	// Close makes a write in progress fail, and closes what is written to. It is called once, when
	// the connection has ended.
	Close()
}

// State is what a Writer is doing.
type State struct {
	Flushes bool // Flush would write now
	Writing bool // what it took off the queue is not all written yet
	Private bool // some of that may be private
	Behind  bool // the server may be what is slow, rather than the other side
	Stuck   bool // the other side has taken nothing for WriteTimeout
}

// unserved is the writer of a connection that is not served yet.
type unserved struct{}

func (unserved) Wake() bool                { return false }
func (unserved) Flush(*Buffer) (more bool) { return false }
func (unserved) State() State              { return State{} }
func (unserved) Close()                    {}

func (unserved) Retract(sets.Of[string], Disconnect) bool { return true }
