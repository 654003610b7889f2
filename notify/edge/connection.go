// One connection: its client is here, and it is a client of the origin.

package edge

import (
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"herald/internal/link"
	"herald/notify/internal/conn"
)

// connection is a realtime connection. Its fields are guarded by Edge.mu where nothing else is said.
type connection struct {
	edge    *Edge
	number  uint64
	request link.HTTPRequest // to connect
	conn    conn.Conn

	answer    chan *link.Answer   // gets one if the origin refuses it
	accept    chan *link.Accepted // gets one if it does not
	over      chan struct{}       // closed when its session was lost before that
	isSettled bool                // one of these has happened

	session   *session             // the last one that knew it
	id        string               // the client's; empty if it cannot resume
	user      string               // see link.User
	state     *link.State          // but for Own
	own       []string             // see link.Own
	unstored  bool                 // some of own are
	marks     map[string]link.Mark // by key
	expected  int                  // see link.Expect
	isLeaving bool                 // it is about to be ended
	isEnded   bool                 // by the origin
	isOpening bool                 // the origin is not told of it yet
	late      *link.End            // it has ended meanwhile

	resuming chan struct{} // closed when it is admitted again; nil if it is not being
	last     chan struct{} // closed when the last request about it is on its way; nil if there was none
}

// newConnection adds a connection whose client has sent r.
func (e *Edge) newConnection(s *session, r link.HTTPRequest) *connection {
	c := &connection{
		edge: e, number: e.numbers.Add(1), request: r, session: s, isOpening: true, marks: map[string]link.Mark{},
		answer: make(chan *link.Answer, 1), accept: make(chan *link.Accepted, 1), over: make(chan struct{}),
	}
	e.group.Start(&c.conn, (*owner)(c), "")
	e.mu.Lock()
	defer e.mu.Unlock()
	e.connections[c.number] = c
	return c
}

// connection returns the connection with number, or nil.
func (e *Edge) connection(number uint64) *connection {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.connections[number]
}

// owner is what the connection reports to.
type owner connection

var _ conn.Owner = (*owner)(nil)

// Tick implements [conn.Owner].
func (*owner) Tick(time.Time, int64) {}

// Ended implements [conn.Owner]: the origin's client ends, too.
func (o *owner) Ended(why conn.Disconnect, undelivered int) {
	c := (*connection)(o)
	e := c.edge
	e.mu.Lock()
	delete(e.connections, c.number)
	if e.byID[c.id] == c {
		delete(e.byID, c.id)
	}
	session, isEnded := c.session, c.isEnded
	end := link.End{Number: c.number, Code: why.Code, Reason: why.Reason, Undelivered: undelivered}
	if c.isOpening { // else it would overtake that
		c.late, isEnded = &end, true
	}
	c.settle(func() { close(c.over) })
	c.resumed()
	e.mu.Unlock()
	if !isEnded && session != nil {
		// an error means that the session is over, and its clients with it
		_ = session.write(link.KindClosed, end)
	}
}

// open tells the origin of the connection.
func (c *connection) open(s *session, open link.Open) error {
	err := s.write(link.KindOpen, open)
	c.edge.mu.Lock()
	c.isOpening = false
	late := c.late
	c.late = nil
	c.edge.mu.Unlock()
	if late != nil && err == nil {
		err = s.write(link.KindClosed, late)
	}
	return err
}

// settle calls f unless it is already known what becomes of the request. Edge.mu is held.
func (c *connection) settle(f func()) {
	if !c.isSettled {
		c.isSettled = true
		f()
	}
}

// resumed lets those go on who wait until the connection is admitted again. Edge.mu is held.
func (c *connection) resumed() {
	if c.resuming != nil {
		close(c.resuming)
		c.resuming = nil
	}
}

// accepted notes that the origin has admitted the connection, for the first time or again.
func (c *connection) accepted(s *session, accepted *link.Accepted) {
	e := c.edge
	e.mu.Lock()
	defer e.mu.Unlock()
	c.settle(func() { c.accept <- accepted })
	if c.id != "" && accepted.ID != c.id { // other code sees its messages now
		c.isLeaving = true
		go c.conn.Finish(disconnectResync)
	}
	c.id = accepted.ID
	if c.id != "" {
		e.byID[c.id] = c
	}
	if c.state == nil { // there is nothing more to wait for
		c.resumed()
	}
}

// refused ends a connection that the origin does not admit.
func (c *connection) refused(answer *link.Answer) {
	c.edge.mu.Lock()
	c.isEnded = true
	wasSettled := c.isSettled
	c.settle(func() { c.answer <- answer })
	c.edge.mu.Unlock()
	if wasSettled { // it was to resume
		c.conn.Finish(disconnectResync)
	}
}

// lostSession notes the end of s. Edge.mu is held.
func (c *connection) lostSession(s *session) {
	if c.session == s {
		c.settle(func() { close(c.over) })
	}
}

// setState keeps what the connection is subscribed to.
func (c *connection) setState(state *link.State) {
	c.edge.mu.Lock()
	defer c.edge.mu.Unlock()
	c.state, c.own, c.unstored = state, state.Own, false
	maps.DeleteFunc(c.marks, func(key string, _ link.Mark) bool {
		return !slices.Contains(state.Keys, key) && !slices.Contains(state.Own, key)
	})
	c.addMarks(state.Marks)
	c.resumed()
}

// setUser keeps who the client is.
func (c *connection) setUser(user string) {
	c.edge.mu.Lock()
	defer c.edge.mu.Unlock()
	c.user = user
}

// expect counts the requests that come by another way.
func (c *connection) expect(by int) {
	c.edge.mu.Lock()
	defer c.edge.mu.Unlock()
	c.expected += by
}

// addOwn keeps what else the connection is subscribed to.
func (c *connection) addOwn(own *link.Own) {
	c.edge.mu.Lock()
	defer c.edge.mu.Unlock()
	for _, key := range own.Keys {
		if !slices.Contains(c.own, key) {
			c.own = append(slices.Clip(c.own), key)
		}
	}
	c.unstored = c.unstored || own.Unstored
	c.addMarks(own.Marks)
}

// addMarks keeps the positions of keys, unless messages have come that are newer. Older ones may have come when the
// connection was not subscribed to their key any more. Edge.mu is held.
func (c *connection) addMarks(marks map[string]link.Mark) {
	for key, mark := range marks {
		if known := c.marks[key]; known.Epoch != mark.Epoch || known.Seq < mark.Seq {
			c.marks[key] = mark
		}
	}
}

// bind makes the connection one that cannot resume.
func (c *connection) bind() {
	e := c.edge
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.byID[c.id] == c {
		delete(e.byID, c.id)
	}
	c.id = ""
}

// forget forgets keys that the client may not come back with.
func (c *connection) forget(keys []string) {
	c.edge.mu.Lock()
	defer c.edge.mu.Unlock()
	isForgotten := func(key string) bool { return slices.Contains(keys, key) }
	// new slices: the others may be on their way to the origin
	c.own = slices.DeleteFunc(slices.Clone(c.own), isForgotten)
	if c.state != nil {
		c.state.Keys = slices.DeleteFunc(slices.Clone(c.state.Keys), isForgotten)
	}
	for _, key := range keys {
		delete(c.marks, key)
	}
}

// endedByOrigin ends the connection because the origin's client has ended.
func (c *connection) endedByOrigin(end *link.End) {
	c.edge.mu.Lock()
	c.isEnded = true
	c.edge.mu.Unlock()
	why := conn.Disconnect{Code: end.Code, Reason: end.Reason}
	if end.Finish {
		c.conn.Finish(why)
	} else {
		c.conn.End(why)
	}
}

// resume returns what makes the origin admit the connection again; false if its client must connect anew.
func (c *connection) resume(hasLost bool) (open link.Open, canResume bool) {
	e := c.edge
	e.mu.Lock()
	defer e.mu.Unlock()
	isUnstored := c.state != nil && c.state.Unstored || c.unstored
	isIncomplete := c.state == nil && len(c.own) > 0 // there is no request to repeat
	isInDoubt := c.expected > 0
	if e.connections[c.number] != c || c.id == "" || c.isLeaving || c.isEnded || isIncomplete || isInDoubt || hasLost && isUnstored {
		c.isLeaving = true
		return link.Open{}, false
	}
	c.session, c.isOpening = e.session, true
	if c.resuming == nil {
		c.resuming = make(chan struct{})
	}
	open = link.Open{Number: c.number, Request: c.request, ID: c.id, User: c.user}
	if c.state != nil {
		state := *c.state
		state.Own, state.Unstored = c.own, isUnstored
		state.Marks = maps.Clone(c.marks)
		open.State = &state
	}
	return open, true
}

// awaitTurn waits until a request about the connection may go to the origin: it is admitted again, if it was being
// admitted, and those that came before the request are on their way. Call sent when it is on its way, too, or will not be.
func (c *connection) awaitTurn(done <-chan struct{}) (sent func()) {
	last := make(chan struct{})
	c.edge.mu.Lock()
	resuming, before := c.resuming, c.last
	c.last = last
	c.edge.mu.Unlock()
	for _, happens := range []<-chan struct{}{resuming, before} {
		if happens != nil {
			select {
			case <-happens:
			case <-done:
			}
		}
	}
	return sync.OnceFunc(func() { close(last) })
}

// response is the response of a request whose connection cannot be taken from net/http.
type response struct {
	*conn.Cutter
	w http.ResponseWriter
}

var _ conn.Response = (*response)(nil)

func (*response) Hooked() bool                 { return false }
func (*response) Deliver(string, []byte) error { return nil }

func (r *response) Write(events []byte) error {
	_, err := r.w.Write(events)
	return err
}

func (r *response) Flush() error { return http.NewResponseController(r.w).Flush() }
