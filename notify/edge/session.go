// The session with the origin: how it begins, what comes over it, and what happens to the connections when it ends.

package edge

import (
	"context"
	"encoding/json/v2"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"herald/internal/link"
	"herald/notify/internal/conn"
)

// session is a session with one process of the origin.
type session struct {
	edge   *Edge
	origin uint64 // the boot of the origin
	id     uint64
	stream *link.Stream
	ended  chan struct{} // closed when the stream has ended

	message link.Message // of the current item, reused
	ready   []*conn.Conn // have something to write since the current packet

	mu       sync.Mutex // guards the fields below
	requests map[uint64]chan *link.Answer
	err      error // if it has ended
}

// upBeats is after how many silent beats the origin counts as gone: no new connection is accepted then.
const upBeats = 3

// isUp reports whether requests can be sent to the origin. It may be called on nil.
func (s *session) isUp() bool {
	return s != nil && s.hasBegun() && s.stream.Err() == nil && s.stream.Silent() < upBeats
}

// up returns the current session if requests can be sent over it, or nil.
func (e *Edge) up() *session {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopped || !e.session.isUp() {
		return nil
	}
	return e.session
}

// joinEvery is how often an edge without an origin tries to join one.
const joinEvery = 500 * time.Millisecond

// join joins the origin again and again, until ctx ends or the origin refuses.
func (e *Edge) join(ctx context.Context) error {
	for subject, receive := range map[string]nats.MsgHandler{
		e.subjects.Down(e.config.Name): e.packet,
		e.subjects.Beat():              e.hearBeat,
	} {
		if err := link.Subscribe(e.nc, subject, receive); err != nil {
			return err
		}
	}
	var before uint64 // the boot of the last origin
	lostIt := false   // it may have gone on without this edge
	var noted time.Time
	for ctx.Err() == nil {
		s, err := e.begin(before, lostIt)
		switch {
		case errors.Is(err, link.ErrRefused):
			return err
		case err != nil:
			if time.Since(noted) > 10*time.Second {
				noted = time.Now()
				e.config.Logger.Warn("The origin cannot be joined yet. Does it run, with --notifyNATS for the same server and the same --notifyApp?",
					slog.String("app", e.config.App), slog.String("error", err.Error()))
			}
			e.endIfAlone()
			select {
			case <-ctx.Done():
			case <-time.After(joinEvery):
			}
			continue
		}
		noted = time.Time{}
		e.config.Logger.Info("Joined the origin", slog.String("app", e.config.App), slog.String("edge", e.config.Name))
		before = s.origin
		select {
		case <-s.ended:
			lostIt = !errors.Is(s.err, link.ErrClosed)
			e.config.Logger.Warn("The origin is lost; connections stay open for it to come back", slog.String("error", s.err.Error()))
		case <-ctx.Done():
		}
	}
	return nil
}

// begin begins a session and announces the connections that can resume. before is the boot of the last origin, and
// lostIt says that it may have gone on.
func (e *Edge) begin(before uint64, lostIt bool) (*session, error) {
	id := rand.Uint64() | 1
	s := &session{edge: e, id: id, ended: make(chan struct{}), requests: map[uint64]chan *link.Answer{}}
	subject := e.subjects.Up(e.config.Name)
	s.stream = link.NewStream(id, link.ConfigFor(e.nc), func(p []byte) error { return e.nc.Publish(subject, p) }, s.receive, s.streamEnded)
	e.mu.Lock()
	e.session = s // what comes may come before the answer
	e.mu.Unlock()

	welcome, err := link.Greet(e.nc, e.subjects, e.config.Name, link.Hello{
		Version: link.Version, App: e.config.App, Boot: e.boot, Session: id, QueueSize: e.config.QueueSize, QueueBytes: e.config.QueueBytes,
	})
	if err != nil {
		e.mu.Lock()
		e.session = nil
		e.mu.Unlock()
		s.stream.Close()
		return nil, err
	}
	e.mu.Lock()
	for _, c := range e.connections { // before their requests can overtake them
		if c.resuming == nil && c.id != "" {
			c.resuming = make(chan struct{})
		}
	}
	s.mu.Lock()
	s.origin = welcome.Boot
	s.mu.Unlock()
	e.mu.Unlock()
	e.announce(s, lostIt || before == welcome.Boot)
	return s, nil
}

// announce makes the origin admit the connections again. If the last one has, or may have, gone on meanwhile, what it has
// sent is lost where there is no history: those clients must connect anew, which they notice.
func (e *Edge) announce(s *session, hasLost bool) {
	e.mu.Lock()
	all := slices.Collect(maps.Values(e.connections))
	e.mu.Unlock()
	var ending []*connection
	for _, c := range all {
		open, canResume := c.resume(hasLost)
		if !canResume {
			ending = append(ending, c)
		} else if c.open(s, open) != nil {
			return
		}
	}
	if s.stream.Write([]byte{byte(link.KindAll)}) != nil {
		return // the session is over
	}
	e.endSpread(ending, disconnectResync)
}

// packet takes a packet of the origin.
func (e *Edge) packet(m *nats.Msg) {
	defer e.guard("taking a packet of the origin")
	e.mu.Lock()
	s := e.session
	e.mu.Unlock()
	if s == nil {
		return
	}
	if boot, isReset := link.ResetBy(m.Data); isReset && link.Session(m.Data) == s.id {
		s.heard(boot)
	}
	s.stream.Packet(m.Data)
	s.writeReady()
}

// hearBeat notices that another process is the origin now.
func (e *Edge) hearBeat(m *nats.Msg) {
	var beat link.Beat
	if json.Unmarshal(m.Data, &beat) != nil || beat.Boot == 0 {
		return
	}
	e.mu.Lock()
	s := e.session
	e.mu.Unlock()
	if s == nil {
		return
	}
	s.heard(beat.Boot)
}

// heard notes which process is the origin: if it is another one, the session is over.
func (s *session) heard(boot uint64) {
	s.mu.Lock()
	isOther := s.origin != 0 && boot != 0 && s.origin != boot
	s.mu.Unlock()
	if isOther {
		s.stream.End()
	}
}

// streamEnded fails the requests that wait for an answer.
func (s *session) streamEnded(err error) {
	defer s.edge.guard("ending the session with the origin")
	s.mu.Lock()
	s.err = err
	for _, answer := range s.requests {
		close(answer)
	}
	s.requests = nil
	s.mu.Unlock()
	close(s.ended)
	e := s.edge
	e.mu.Lock()
	defer e.mu.Unlock()
	if s.hasBegun() {
		e.lost = time.Now().Add(-time.Duration(s.stream.Silent()) * link.BeatEvery)
	}
	for _, c := range e.connections {
		c.lostSession(s)
	}
}

func (s *session) hasBegun() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.origin != 0
}

// write writes an item to the origin.
func (s *session) write(kind link.Kind, value any) error {
	item, err := link.Encode(kind, value)
	if err != nil {
		return err
	}
	return s.stream.Write(item)
}
