// What comes from the origin.

package edge

import (
	"context"
	"fmt"
	"time"

	"herald/internal/link"
	"herald/notify/internal/conn"
	"herald/notify/internal/sets"
)

// receive takes an item of the origin. It does not block.
func (s *session) receive(item []byte) error {
	switch kind := link.KindOf(item); kind {
	case link.KindMessage:
		return s.deliver(item)
	case link.KindRaw:
		return s.takeNumbered(item, func(c *connection, bytes []byte) {
			// whatever it is, it may be for one user only
			c.conn.Put(conn.NewCarriedFrame("", append([]byte(nil), bytes...), true))
		})
	case link.KindAsk:
		return s.takeNumbered(item, func(c *connection, _ []byte) { go s.answerAsk(c) })
	case link.KindBound:
		return take(item, func(bound *link.Bound) {
			if c := s.edge.connection(bound.Number); c != nil {
				c.bind()
			}
		})
	case link.KindAccepted:
		return take(item, func(accepted *link.Accepted) {
			if c := s.edge.connection(accepted.Number); c != nil {
				c.accepted(s, accepted)
			}
		})
	case link.KindAnswer:
		return take(item, s.answered)
	case link.KindState:
		return take(item, func(state *link.State) {
			if c := s.edge.connection(state.Number); c != nil {
				c.setState(state)
			}
		})
	case link.KindOwn:
		return take(item, func(own *link.Own) {
			if c := s.edge.connection(own.Number); c != nil {
				c.addOwn(own)
			}
		})
	case link.KindUser:
		return take(item, func(user *link.User) {
			if c := s.edge.connection(user.Number); c != nil {
				c.setUser(user.User)
			}
		})
	case link.KindExpect:
		return take(item, func(expect *link.Expect) {
			if c := s.edge.connection(expect.Number); c != nil {
				c.expect(+1)
				go s.answerExpect(expect)
			}
		})
	case link.KindHandled:
		return take(item, func(expect *link.Expect) {
			if c := s.edge.connection(expect.Number); c != nil {
				c.expect(-1)
			}
		})
	case link.KindForget:
		return take(item, func(forget *link.Forget) {
			if c := s.edge.connection(forget.Number); c != nil {
				c.forget(forget.Keys)
			}
		})
	case link.KindEnd:
		return take(item, func(end *link.End) {
			if c := s.edge.connection(end.Number); c != nil {
				c.endedByOrigin(end)
			}
		})
	case link.KindRetract:
		return take(item, func(retract *link.Retract) {
			c := s.edge.connection(retract.Number)
			switch {
			case c == nil:
			case len(retract.Names) > 0:
				c.conn.Remove(sets.From(retract.Names), conn.Disconnect{Code: retract.Code, Reason: retract.Reason})
			default:
				c.conn.EndIfPrivate(conn.Disconnect{Code: retract.Code, Reason: retract.Reason})
			}
		})
	default:
		return fmt.Errorf("the origin sent an item of an unknown kind %q", kind)
	}
}

func take[T any](item []byte, do func(*T)) error {
	value := new(T)
	if err := link.Decode(item, value); err != nil {
		return err
	}
	do(value)
	return nil
}

// takeNumbered takes an item of [link.EncodeNumbered], unless its connection has ended.
func (s *session) takeNumbered(item []byte, do func(c *connection, bytes []byte)) error {
	number, bytes, err := link.DecodeNumbered(item)
	if err != nil {
		return err
	}
	if c := s.edge.connection(number); c != nil {
		do(c, bytes)
	}
	return nil
}

// deliver queues a message for its recipients.
func (s *session) deliver(item []byte) error {
	m := &s.message
	if err := link.DecodeMessage(item, m); err != nil {
		return err
	}
	frame := conn.NewCarriedFrame(m.Name, append([]byte(nil), m.Wire...), m.Private)
	e := s.edge
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, number := range m.To {
		c := e.connections[number]
		if c == nil {
			continue // it has ended, and the origin will know
		}
		if m.Mark.Seq > 0 {
			c.marks[m.Name] = m.Mark
		}
		if len(m.Wire) == 0 {
			continue
		}
		if m.Paged {
			c.conn.AllowExcess()
		}
		if c.conn.Enqueue(frame) == conn.Ready {
			s.ready = append(s.ready, &c.conn)
		}
	}
	return nil
}

// answerAsk tells the origin when a page fits into the queue of c, and if that takes long.
func (s *session) answerAsk(c *connection) {
	defer s.edge.guard("waiting for room in a queue")
	tell := func(kind link.Kind) {
		// an error means that the session is over, and nobody waits any more
		_ = s.stream.Write(link.EncodeNumbered(kind, c.number, nil))
	}
	told := make(chan struct{})
	late := time.AfterFunc(link.FullAfter, func() {
		defer close(told)
		tell(link.KindFull)
	})
	hasRoom := c.conn.AwaitRoom()
	if !late.Stop() {
		<-told
	}
	if hasRoom {
		tell(link.KindRoom)
	}
}

// answerExpect lets the origin go on with a request.
func (s *session) answerExpect(expect *link.Expect) {
	defer s.edge.guard("answering the origin")
	_ = s.write(link.KindReady, expect) // an error means that the session is over, and the origin does not go on
}

// writeReady writes to connections what has come for them with a packet, in one piece.
func (s *session) writeReady() {
	if len(s.ready) > 0 {
		s.edge.group.Write(s.ready...)
		clear(s.ready)
		s.ready = s.ready[:0]
	}
}

// answered takes the answer to a request, or to one to connect.
func (s *session) answered(answer *link.Answer) {
	s.mu.Lock()
	waiting := s.requests[answer.Number]
	delete(s.requests, answer.Number)
	s.mu.Unlock()
	if waiting != nil {
		waiting <- answer
		return
	}
	if c := s.edge.connection(answer.Number); c != nil {
		c.refused(answer)
	}
}

// request lets the origin handle a request, and returns its answer. The error says that there is none: it is not known whether
// the origin has handled it. sent is called when it is on its way.
func (s *session) request(ctx context.Context, r link.Request, sent func()) (*link.Answer, error) {
	r.Number = s.edge.numbers.Add(1)
	answer := make(chan *link.Answer, 1)
	s.mu.Lock()
	if s.requests == nil {
		s.mu.Unlock()
		return nil, s.err
	}
	s.requests[r.Number] = answer
	s.mu.Unlock()
	if err := s.write(link.KindRequest, r); err != nil {
		s.mu.Lock()
		delete(s.requests, r.Number)
		s.mu.Unlock()
		return nil, err
	}
	sent()
	select {
	case got, ok := <-answer:
		if !ok {
			return nil, link.ErrSilent
		}
		return got, nil
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.requests, r.Number)
		s.mu.Unlock()
		return nil, ctx.Err()
	}
}
