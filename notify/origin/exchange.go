// A connection of an edge: its requests run through the application's router as if its client had sent them here.

package origin

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"sync"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/link"
	"herald/notify"
	"herald/notify/internal/conn"
)

// Exchange is a connection of an edge, from its request on. It is a [notify.Carrier].
type Exchange struct {
	session *session
	number  uint64
	open    *link.Open
	ctx     context.Context // ends with the connection
	cancel  context.CancelFunc
	cut     chan struct{} // closed when what is written should fail
	line    *conn.Line    // for what handlers write
	done    chan struct{} // closed when nothing is left of it
	release func()        // gives back its turn to be admitted again
	admit   func()        // notes that it is admitted again, or will not be
	settled chan struct{} // closed when the request that brings it back has been handled, if there is one

	cutWrites func() // closes cut
	finish    func() // forgets the connection
	settle    func() // closes settled

	mu          sync.Mutex // guards the fields below
	client      *notify.Client
	taken       bool
	back        bool     // the request that brings it back has taken effect
	denied      []string // by that
	bound       bool
	requests    uint64                   // that the edge was told to expect
	expected    map[uint64]chan struct{} // closed when the edge is ready for the request
	ended       bool                     // at the edge
	why         notify.Disconnect
	undelivered int
}

var _ notify.Carrier = (*Exchange)(nil)

func newExchange(s *session, open *link.Open) *Exchange {
	x := &Exchange{
		session: s, number: open.Number, open: open, cut: make(chan struct{}), done: make(chan struct{}), settled: make(chan struct{}),
		release: func() {}, admit: func() {}, expected: map[uint64]chan struct{}{},
	}
	x.settle = sync.OnceFunc(func() { close(x.settled) })
	if open.State == nil {
		x.settle()
	}
	if open.ID != "" {
		x.admit = sync.OnceFunc(s.admitted)
	}
	x.line = s.trunk.NewLine(x.number, x.cut)
	x.ctx, x.cancel = context.WithCancel(notify.ArrivedFirst(context.Background())) // others wait for what brings it back
	x.cutWrites = sync.OnceFunc(func() { close(x.cut) })
	x.finish = sync.OnceFunc(func() {
		x.cancel()
		x.cutWrites() // of code that goes on
		x.admit()
		x.settle()
		s.remove(x)
		close(x.done)
	})
	return x
}

// Line returns the line for what handlers write to the connection of an edge that the request of ctx has opened, or nil.
func Line(ctx context.Context) *conn.Line {
	if x := Of(ctx); x != nil {
		return x.line
	}
	return nil
}

type contextKey struct{}

// Of returns the connection of an edge that the request of ctx wants to open, or nil.
func Of(ctx context.Context) *Exchange {
	x, _ := ctx.Value(contextKey{}).(*Exchange)
	return x
}

// Identify returns client, or one with the id that it has had before.
func (x *Exchange) Identify(client subscriptions.Client) subscriptions.Client {
	if x.open.ID == "" {
		return client
	}
	return identified{client, x.open.ID}
}

// Carry says that client is the one of the connection. Call it before the client is served.
func (x *Exchange) Carry(client *notify.Client) {
	client.SetCarrier(x)
	x.mu.Lock()
	x.client = client
	ended, why, undelivered := x.ended, x.why, x.undelivered
	x.mu.Unlock()
	if ended {
		client.EndAt(why, undelivered)
	}
}

// identified is a client with another id.
type identified struct {
	subscriptions.Client
	id string
}

func (c identified) Id() string { return c.id }

// run lets the application handle the request to connect.
func (x *Exchange) run() {
	if x.open.ID != "" && !x.awaitTurn() {
		x.finish()
		return
	}
	if x.open.ID != "" && x.session.origin.hasClient(x.open.ID) {
		// it is one of another edge, or of this server
		x.control(link.KindAnswer, link.Answer{Number: x.number, Status: http.StatusConflict})
		x.release()
		x.finish()
		return
	}
	w := &response{exchange: x, header: http.Header{}}
	x.session.origin.serve(w, newRequest(context.WithValue(x.ctx, contextKey{}, x), &x.open.Request))
	x.mu.Lock()
	taken := x.taken
	x.mu.Unlock()
	if taken {
		return // until Ended
	}
	x.release()
	if w.streams {
		left := notify.DisconnectLeft
		x.control(link.KindEnd, link.End{Number: x.number, Code: left.Code, Reason: left.Reason, Finish: true})
	} else {
		x.control(link.KindAnswer, w.answer(x.number))
	}
	x.finish()
}

func (o *Origin) hasClient(id string) bool {
	_, err := o.app.SubscriptionsBroker().ClientById(id)
	return err == nil
}

// Take makes the edge write what is sent to client, with header in its response, and reports whether it does. It does
// not if w is not the response to the request of a connection of an edge.
func Take(w http.ResponseWriter, client *notify.Client) bool {
	r, ok := w.(*response)
	if !ok || r.exchange == nil {
		return false
	}
	r.exchange.take(client, r.header)
	return true
}

func (x *Exchange) take(client *notify.Client, header http.Header) {
	accepted := link.Accepted{Number: x.number, Status: http.StatusOK, Header: header.Clone()} // middlewares may still change theirs
	x.open.Request = link.HTTPRequest{}                                                        // it lasts as long as the connection otherwise
	x.mu.Lock()
	if client.CanResume() && !x.bound {
		accepted.ID = client.Id()
	}
	x.taken = true
	x.control(link.KindAccepted, accepted)
	x.mu.Unlock()
	client.Relay(x.session.trunk, x.number, x.open.ID != "")
	if client.IsDiscarded() { // before it was taken
		x.finish()
	}
	if x.open.State == nil {
		x.release()
		x.admit()
		if x.open.ID != "" {
			x.endIfOther(client)
		}
		return
	}
	x.session.origin.stopped.Go(func() {
		defer x.settle()
		defer x.admit()
		defer x.release()
		x.resubscribe(client)
		x.open.State = nil
	})
}

// Edge implements [notify.Carrier].
func (x *Exchange) Edge() string { return x.session.name }

// Identified implements [notify.Carrier].
func (x *Exchange) Identified(user string) {
	x.control(link.KindUser, link.User{Number: x.number, User: user})
}

// Subscribed implements [notify.Carrier]: the edge keeps what it needs to bring the client back.
func (x *Exchange) Subscribed(by *notify.Replacement, standing *notify.Standing) {
	request := by.Request
	if request.Context().Value(resumeKey{}) == x {
		x.mu.Lock()
		x.back, x.denied = true, by.Denied
		x.mu.Unlock()
		// what code of the application has subscribed it to, it may be about to do again
		before := x.open.State
		standing.Unstored = standing.Unstored || before.Unstored && len(before.Own) > 0
		for _, key := range before.Own {
			if !slices.Contains(standing.Own, key) && !slices.Contains(standing.Keys, key) {
				standing.Own = append(standing.Own, key)
			}
		}
	}
	state := link.State{
		Number: x.number, Keys: standing.Keys, Own: standing.Own, Unstored: standing.Unstored, Marks: marksOf(standing.Heads),
		Request: link.HTTPRequest{
			Method: http.MethodPost, URI: request.URL.RequestURI(), Host: request.Host, Remote: request.RemoteAddr, Header: request.Header.Clone(),
		},
	}
	for _, name := range []string{"Content-Length", "Content-Type", "Content-Encoding"} {
		state.Request.Header.Del(name)
	}
	x.control(link.KindState, state)
}

// Owned implements [notify.Carrier].
func (x *Exchange) Owned(keys []string, heads notify.Heads) {
	x.control(link.KindOwn, link.Own{Number: x.number, Keys: keys, Unstored: heads.Unstored, Marks: marksOf(heads)})
}

func marksOf(heads notify.Heads) map[string]link.Mark {
	marks := make(map[string]link.Mark, len(heads.Positions))
	for key, position := range heads.Positions {
		marks[key] = link.Mark(position)
	}
	return marks
}

// Bound implements [notify.Carrier].
func (x *Exchange) Bound() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.bound = true
	if x.taken { // otherwise it is said with that
		x.control(link.KindBound, link.Bound{Number: x.number})
	}
}

// Unsubscribed implements [notify.Carrier].
func (x *Exchange) Unsubscribed(keys []string) {
	x.control(link.KindForget, link.Forget{Number: x.number, Keys: keys})
}

// Ended implements [notify.Carrier].
func (x *Exchange) Ended() {
	x.mu.Lock()
	taken := x.taken
	x.mu.Unlock()
	if taken { // otherwise the handler returns now
		x.finish()
	}
}

// endAt ends a connection that has ended at the edge.
func (x *Exchange) endAt(why notify.Disconnect, undelivered int) {
	x.mu.Lock()
	x.ended, x.why, x.undelivered = true, why, undelivered
	client := x.client
	x.mu.Unlock()
	if client != nil {
		client.EndAt(why, undelivered)
	}
	x.cutWrites()
	x.cancel()
}

// hasRoom notes that a page fits into the connection's queue at the edge.
func (x *Exchange) hasRoom() {
	x.line.HasRoomAt()
	if client := x.carries(); client != nil {
		client.HasRoomAt()
	}
}

// isFull notes that there has been no room for a while.
func (x *Exchange) isFull() {
	x.line.FullAt()
	if client := x.carries(); client != nil {
		client.FullAt()
	}
}

// carries returns the client of the connection; nil before [Exchange.Carry].
func (x *Exchange) carries() *notify.Client {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.client
}

func (x *Exchange) control(kind link.Kind, value any) { x.session.trunk.Control(control{kind, value}) }

// answer lets the application handle a request about connections, and answers it. ctx says when it has arrived.
func (s *session) answer(ctx context.Context, request *link.Request) {
	w := &response{header: http.Header{}}
	if s.origin.notifier.Stopping() { // its client is gone, and will be back
		w.header.Set("Content-Type", "application/json")
		w.header.Set("Access-Control-Allow-Origin", "*")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte(`{"status":503,"message":"The server is shutting down.","data":{}}`)) // into memory
	} else {
		s.origin.serve(w, newRequest(context.WithValue(ctx, wayKey{}, way{s, request.Connection}), &request.Request))
	}
	s.trunk.Control(control{link.KindAnswer, w.answer(request.Number)})
}

// serve lets the application handle a request. Like net/http, it survives a panic.
func (o *Origin) serve(w *response, r *http.Request) {
	defer func() {
		if cause := recover(); cause != nil {
			o.app.Logger().Error("Panic while handling a request of an edge", slog.Any("cause", cause))
			w.WriteHeader(http.StatusInternalServerError)
		}
	}()
	o.mu.Lock()
	handler := o.handler
	o.mu.Unlock()
	handler.ServeHTTP(w, r)
}
