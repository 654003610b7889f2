// One edge: what it is told, and what it tells.

package origin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"herald/internal/link"
	"herald/notify"
	"herald/notify/internal/conn"
)

// session is the session of one edge.
type session struct {
	origin *Origin
	name   string
	boot   uint64
	id     uint64
	stream *link.Stream
	trunk  *conn.Trunk
	ctx    context.Context // ends with the stream
	cancel context.CancelFunc
	over   chan struct{} // closed when its clients have ended, too
	settle func()        // closes settled
	// settled is closed when the clients that the edge has kept are admitted
	settled chan struct{}

	mu        sync.Mutex // guards the fields below
	exchanges map[uint64]*Exchange
	isOver    bool
	admitting int  // clients that are announced again and not admitted yet
	announced bool // no more of them will come
	carried   int  // bytes that were taken off the trunk and are not on the stream yet
}

// endPatience is how long the end of a session waits for handlers of the application.
const endPatience = 5 * time.Second

// aliveBeats is after how many silent beats another process may take the place of an edge.
const aliveBeats = 2

func (o *Origin) newSession(name string, hello link.Hello) *session {
	s := &session{
		origin: o, name: name, boot: hello.Boot, id: hello.Session, trunk: o.notifier.NewTrunk(hello.QueueSize, hello.QueueBytes),
		over: make(chan struct{}), settled: make(chan struct{}), exchanges: map[uint64]*Exchange{},
	}
	s.settle = sync.OnceFunc(func() { close(s.settled) })
	s.ctx, s.cancel = context.WithCancel(context.Background())
	subject := o.subjects.Down(name)
	s.stream = link.NewStream(hello.Session, link.ConfigFor(o.nc), func(p []byte) error { return o.nc.Publish(subject, p) }, s.receive, s.streamEnded)
	o.stopped.Go(s.carry)
	return s
}

func (s *session) isAlive() bool { return s.stream.Err() == nil && s.stream.Silent() < aliveBeats }

// count returns the number of connections.
func (s *session) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.exchanges)
}

// carry takes what is sent to the edge's clients to the stream, until that ends. While much is on the way, it waits
// there, and the clients' queues fill.
func (s *session) carry() {
	defer s.origin.guard("carrying messages to an edge")
	for {
		select {
		case <-s.trunk.Ready():
		case <-s.ctx.Done():
			return
		}
		cargo := s.take()
		items := make([][]byte, 0, len(cargo))
		for i := range cargo {
			item, err := itemOf(&cargo[i])
			if err != nil { // cannot happen; the edge must not go on without it
				s.origin.app.Logger().Error("Failed to encode for an edge", slog.String("error", err.Error()))
				s.stream.End()
				return
			}
			items = append(items, item)
		}
		if err := s.stream.Write(items...); err != nil {
			return
		}
		s.mu.Lock()
		s.carried = 0
		s.mu.Unlock()
	}
}

// take takes cargo off the trunk, and counts it until it is on the stream.
func (s *session) take() []conn.Cargo {
	s.mu.Lock()
	s.carried = s.trunk.Bytes()
	s.mu.Unlock()
	return s.trunk.Take()
}

// onTheWay returns how many bytes have not arrived at the edge.
func (s *session) onTheWay() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trunk.Bytes() + s.carried + s.stream.OnTheWay()
}

// control is what an origin puts on a trunk between messages.
type control struct {
	kind  link.Kind
	value any
}

// itemOf returns cargo as it goes over the link.
func itemOf(c *conn.Cargo) ([]byte, error) {
	switch {
	case c.Frame != nil:
		return link.AppendMessage(nil, &link.Message{
			Name: c.Frame.Name(), Mark: link.Mark(c.Frame.Mark()), Private: c.Frame.Private(), Paged: c.Frame.IsPaged(), Wire: c.Frame.Wire(), To: c.To,
		}), nil
	case c.Raw != nil:
		return link.EncodeNumbered(link.KindRaw, c.Number, c.Raw), nil
	case c.Asks:
		return link.EncodeNumbered(link.KindAsk, c.Number, nil), nil
	case c.Ends != nil:
		return link.Encode(link.KindEnd, link.End{Number: c.Number, Code: c.Ends.Code, Reason: c.Ends.Reason, Finish: c.IsDrained})
	case c.Retracts != nil:
		retract := link.Retract{Number: c.Number, Code: c.Retracts.Code, Reason: c.Retracts.Reason}
		for name := range c.Names {
			retract.Names = append(retract.Names, name)
		}
		return link.Encode(link.KindRetract, retract)
	}
	control := c.Control.(control)
	return link.Encode(control.kind, control.value)
}

// receive takes an item of the edge. It does not block.
func (s *session) receive(item []byte) error {
	switch kind := link.KindOf(item); kind {
	case link.KindOpen:
		var open link.Open
		if err := link.Decode(item, &open); err != nil {
			return err
		}
		return s.open(&open)
	case link.KindRequest:
		var request link.Request
		if err := link.Decode(item, &request); err != nil {
			return err
		}
		arrived := s.origin.notifier.Arrived(s.ctx)
		s.origin.stopped.Go(func() { s.answer(arrived, &request) })
	case link.KindClosed:
		var end link.End
		if err := link.Decode(item, &end); err != nil {
			return err
		}
		if x := s.exchange(end.Number); x != nil {
			x.endAt(notify.Disconnect{Code: end.Code, Reason: end.Reason}, end.Undelivered)
		}
	case link.KindReady:
		var expect link.Expect
		if err := link.Decode(item, &expect); err != nil {
			return err
		}
		if x := s.exchange(expect.Number); x != nil {
			x.ready(expect.Request)
		}
	case link.KindAll:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.announced = true
		s.settleIfAll()
	case link.KindRoom, link.KindFull:
		number, _, err := link.DecodeNumbered(item)
		if err != nil {
			return err
		}
		switch x := s.exchange(number); {
		case x == nil:
		case kind == link.KindRoom:
			x.hasRoom()
		default:
			x.isFull()
		}
	default:
		return fmt.Errorf("the edge sent an item of an unknown kind %q", kind)
	}
	return nil
}

// open begins a connection.
func (s *session) open(open *link.Open) error {
	x := newExchange(s, open)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exchanges[open.Number] != nil {
		return fmt.Errorf("the edge opened connection %d twice", open.Number)
	}
	if s.isOver {
		return errors.New("the session is over")
	}
	s.exchanges[open.Number] = x
	if open.ID != "" {
		s.admitting++
	}
	s.origin.stopped.Go(x.run)
	return nil
}

// isSettled reports whether the clients that the edge has kept are admitted.
func (s *session) isSettled() bool {
	select {
	case <-s.settled:
		return true
	default:
		return false
	}
}

// admitted notes that a client that was announced again is there, or will not come.
func (s *session) admitted() {
	s.origin.lastBack.Store(new(time.Now()))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.admitting--
	s.settleIfAll()
}

// settleIfAll notes that all clients of the edge are there, if they are. mu is held.
func (s *session) settleIfAll() {
	if s.announced && s.admitting == 0 {
		s.settle()
	}
}

// exchange returns the connection with number, or nil.
func (s *session) exchange(number uint64) *Exchange {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exchanges[number]
}

func (s *session) remove(x *Exchange) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exchanges[x.number] == x {
		delete(s.exchanges, x.number)
	}
}

// drain waits until everything for the edge has arrived there.
func (s *session) drain(ctx context.Context) {
	for every := time.NewTicker(5 * time.Millisecond); ctx.Err() == nil && s.stream.Err() == nil; <-every.C {
		if s.onTheWay() == 0 {
			return
		}
	}
}

// streamEnded ends the session's clients, who may come back with another session.
func (s *session) streamEnded(err error) {
	defer s.origin.guard("ending the session of an edge")
	defer close(s.over)
	s.cancel()
	s.settle()
	if !errors.Is(err, link.ErrClosed) {
		s.origin.app.Logger().Warn("An edge is lost", slog.String("edge", s.name), slog.String("error", err.Error()))
	}
	s.mu.Lock()
	s.isOver = true
	exchanges := slices.Collect(maps.Values(s.exchanges))
	s.mu.Unlock()
	s.trunk.Close()
	for _, x := range exchanges {
		x.endAt(notify.DisconnectEdge, 0)
	}
	patience, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	for _, x := range exchanges {
		select {
		case <-x.done:
		case <-patience.Done():
		}
	}
	o := s.origin
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sessions[s.name] == s {
		delete(o.sessions, s.name)
	}
}
