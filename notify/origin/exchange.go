// A connection of an edge: its requests run through the application's router as if its client had sent them here.

package origin

import (
	"bytes"
	"context"
	"encoding/json/v2"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/link"
	"herald/notify"
)

// Exchange is a connection of an edge, from its request on. It is a [notify.Carrier].
type Exchange struct {
	session *session
	number  uint64
	open    *link.Open
	ctx     context.Context // ends with the connection
	cancel  context.CancelFunc
	cut     chan struct{} // closed when what is written should fail
	done    chan struct{} // closed when nothing is left of it
	release func()        // lets the next client be admitted again

	stating sync.Mutex // held from reading a state until it is on the trunk

	mu          sync.Mutex // guards the fields below
	client      *notify.Client
	taken       bool
	subscribed  bool // by its client, since the session began
	ended       bool // at the edge
	why         notify.Disconnect
	undelivered int
	isCut       bool
	isDone      bool
}

var _ notify.Carrier = (*Exchange)(nil)

func newExchange(s *session, open *link.Open) *Exchange {
	x := &Exchange{session: s, number: open.Number, open: open, cut: make(chan struct{}), done: make(chan struct{}), release: func() {}}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	return x
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

// awaitTurn waits until a client may be admitted again: all of an edge come at once.
func (x *Exchange) awaitTurn() bool {
	turns := x.session.origin.resuming
	select {
	case turns <- struct{}{}:
		x.release = sync.OnceFunc(func() { <-turns })
		return true
	case <-x.ctx.Done():
		return false
	}
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
	if client.CanResume() {
		accepted.ID = client.Id()
	}
	x.open.Request = link.HTTPRequest{} // it lasts as long as the connection otherwise
	x.mu.Lock()
	x.taken = true
	x.mu.Unlock()
	x.control(link.KindAccepted, accepted)
	client.Relay(x.session.trunk, x.number, x.open.ID != "")
	if client.IsDiscarded() { // before it was taken
		x.finish()
	}
	if x.open.State == nil {
		x.release()
		return
	}
	x.session.origin.stopped.Go(func() {
		defer x.release()
		x.resubscribe(client)
		x.open.State = nil
	})
}

// resubscribe subscribes a client that is back to what it had.
func (x *Exchange) resubscribe(client *notify.Client) {
	state := x.open.State
	request := state.Request
	var err error
	request.Body, err = json.Marshal(map[string]any{"clientId": client.Id(), "subscriptions": state.Keys})
	if err != nil {
		client.Close(notify.DisconnectFailed)
		return
	}
	request.Header = request.Header.Clone()
	if request.Header == nil {
		request.Header = http.Header{}
	}
	request.Header.Set("Content-Type", "application/json")
	w := &response{header: http.Header{}}
	x.session.origin.serve(w, newRequest(context.WithValue(x.ctx, resumeKey{}, x), &request))
	switch {
	case w.status >= http.StatusBadRequest:
		// it gets the refusal when it subscribes itself
		client.Close(notify.DisconnectEdge)
	case request.Header.Get("Authorization") != "" && client.IsGuest():
		client.Close(notify.DisconnectTokenExpired)
	default:
		if positions, isStale := Resumes(context.WithValue(x.ctx, resumeKey{}, x)); !isStale && client.Misses(state.Keys, positions) {
			client.Finish(notify.DisconnectGap)
		}
	}
}

type resumeKey struct{}

// Resumes returns the positions, by key, at which the client of a request to subscribe goes on, if it is one that is
// admitted again. isStale says that the client has subscribed itself meanwhile: then the request must do nothing.
func Resumes(ctx context.Context) (positions map[string]notify.Position, isStale bool) {
	x, ok := ctx.Value(resumeKey{}).(*Exchange)
	if !ok {
		return nil, false
	}
	x.mu.Lock()
	isStale = x.subscribed
	x.mu.Unlock()
	positions = map[string]notify.Position{}
	for key, mark := range x.open.State.Marks {
		positions[key] = notify.Position(mark)
	}
	return positions, isStale
}

// Edge implements [notify.Carrier].
func (x *Exchange) Edge() string { return x.session.name }

// Subscribing implements [notify.Carrier]: the client says itself what it wants.
func (x *Exchange) Subscribing() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.subscribed = true
}

// Subscribed implements [notify.Carrier]: the edge keeps what it needs to bring the client back.
func (x *Exchange) Subscribed(client *notify.Client, request *http.Request, heads notify.Heads) {
	x.stating.Lock() // what is read last is told last
	defer x.stating.Unlock()
	state := link.State{
		Number: x.number, Keys: client.Keys(), Unstored: heads.Unstored, Marks: map[string]link.Mark{},
		Request: link.HTTPRequest{
			Method: http.MethodPost, URI: request.URL.RequestURI(), Host: request.Host, Remote: request.RemoteAddr, Header: request.Header.Clone(),
		},
	}
	for _, name := range []string{"Content-Length", "Content-Type", "Content-Encoding"} {
		state.Request.Header.Del(name)
	}
	if client.IsGuest() {
		state.Request.Header.Del("Authorization")
	}
	for key, position := range heads.Positions {
		state.Marks[key] = link.Mark(position)
	}
	x.control(link.KindState, state)
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

func (x *Exchange) cutWrites() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.isCut {
		x.isCut = true
		close(x.cut)
	}
}

// finish forgets the connection.
func (x *Exchange) finish() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.isDone {
		return
	}
	x.isDone = true
	x.cancel()
	x.session.remove(x)
	close(x.done)
}

func (x *Exchange) control(kind link.Kind, value any) { x.session.trunk.Control(control{kind, value}) }

// answer lets the application handle a request about connections, and answers it.
func (s *session) answer(request *link.Request) {
	w := &response{header: http.Header{}}
	if s.origin.notifier.Stopping() { // its client is gone, and will be back
		w.header.Set("Content-Type", "application/json")
		w.header.Set("Access-Control-Allow-Origin", "*")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte(`{"status":503,"message":"The server is shutting down.","data":{}}`)) // into memory
	} else {
		s.origin.serve(w, newRequest(s.ctx, &request.Request))
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

// newRequest returns the request as net/http would have read it.
func newRequest(ctx context.Context, r *link.HTTPRequest) *http.Request {
	request, err := http.NewRequestWithContext(ctx, r.Method, "http://localhost/", bytes.NewReader(r.Body))
	if err != nil { // of a method that the edge does not accept
		request, _ = http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/", nil)
	}
	if parsed, err := request.URL.Parse(r.URI); err == nil && strings.HasPrefix(r.URI, "/") {
		request.URL = parsed
		request.URL.Scheme, request.URL.Host = "", ""
	}
	request.RequestURI, request.Host, request.RemoteAddr = r.URI, r.Host, r.Remote
	if r.Header != nil {
		request.Header = r.Header
	}
	request.ContentLength = int64(len(r.Body))
	if len(r.Body) == 0 {
		request.Body = http.NoBody
	} else {
		request.Body = io.NopCloser(bytes.NewReader(r.Body))
	}
	return request
}

// response is the response to a request that came over the link. A stream of events goes back piece by piece, anything
// else when it is complete.
type response struct {
	exchange *Exchange // nil unless the request opens a connection
	header   http.Header
	status   int
	body     bytes.Buffer
	streams  bool
}

var _ http.Flusher = (*response)(nil)

func (r *response) Header() http.Header { return r.header }

func (r *response) WriteHeader(status int) {
	if r.status != 0 || status < 200 {
		return
	}
	r.status = status
	if x := r.exchange; x != nil && status == http.StatusOK && strings.HasPrefix(r.header.Get("Content-Type"), "text/event-stream") {
		r.streams = true
		x.control(link.KindAccepted, link.Accepted{Number: x.number, Status: status, Header: r.header.Clone()})
	}
}

func (r *response) Write(p []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	if !r.streams {
		return r.body.Write(p)
	}
	if err := r.exchange.session.trunk.Write(r.exchange.number, p, r.exchange.cut); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements [http.Flusher].
func (r *response) Flush() { r.WriteHeader(http.StatusOK) }

// SetWriteDeadline makes writes fail, if at is in the past: see [http.ResponseController].
func (r *response) SetWriteDeadline(at time.Time) error {
	if r.exchange != nil && !at.IsZero() && at.Before(time.Now()) {
		r.exchange.cutWrites()
	}
	return nil
}

// SetReadDeadline does nothing: the request has been read.
func (r *response) SetReadDeadline(time.Time) error { return nil }

// answer returns what was written.
func (r *response) answer(number uint64) link.Answer {
	status := r.status
	if status == 0 {
		status = http.StatusOK
	}
	return link.Answer{Number: number, Status: status, Header: r.header, Body: r.body.Bytes()}
}
