// Realtime connections: our client replaces PocketBase's, and its messages are written here.

package hooks

import (
	"context"
	"math"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/router"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify"
	"herald/notify/origin"
)

// ownConnectHandlers is the number of handlers that bindConnections binds to
// OnRealtimeConnectRequest.
const ownConnectHandlers = 2

// connections gives every realtime connection a client with a bounded queue and a Send that does
// not block, in place of PocketBase's own.
type connections struct {
	notifier *notify.Notifier
	limits   *limits
}

func bindConnections(app core.App, notifier *notify.Notifier, limits *limits) {
	c := connections{notifier, limits}

	app.OnRealtimeConnectRequest().Bind(&hook.Handler[*core.RealtimeConnectRequestEvent]{
		Id:   "heraldConnect",
		Func: c.connect,
		// before other handlers, which should see the client that stays
		Priority: -999,
	})
	app.OnRealtimeConnectRequest().Bind(&hook.Handler[*core.RealtimeConnectRequestEvent]{
		Id:   "heraldServe",
		Func: c.serve,
		// in place of PocketBase's own loop, which runs after all handlers
		Priority: 99999,
	})
	app.OnRealtimeSubscribeRequest().Bind(&hook.Handler[*core.RealtimeSubscribeRequestEvent]{
		Id:       "heraldNote",
		Func:     c.note,
		Priority: -999, // around all others
	})
	app.OnRealtimeSubscribeRequest().Bind(&hook.Handler[*core.RealtimeSubscribeRequestEvent]{
		Id:   "heraldSubscribe",
		Func: c.subscribe,
		// after other handlers, which may refuse the request or change the client's subscriptions
		// themselves
		Priority: 999,
	})
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldSignOut",
		Func: func(e *core.ServeEvent) error {
			e.Router.Bind(&hook.Handler[*core.RequestEvent]{
				Id:       "heraldArrive",
				Func:     c.arrive,
				Priority: apis.DefaultCorsMiddlewarePriority - 1, // before any that waits
			})
			e.Router.Bind(&hook.Handler[*core.RequestEvent]{Id: "heraldSignOut", Func: c.signOut})
			return e.Next()
		},
	})
}

// connect creates the client of a new connection.
func (c connections) connect(e *core.RealtimeConnectRequestEvent) error {
	if e.Request.Method == http.MethodHead {
		// Go's mux routes HEAD like GET. Nothing written to such a request ends it, so the
		// connection would be held for nobody.
		return e.NoContent(http.StatusOK)
	}
	release, err := c.limits.connect(e.RequestEvent)
	if err != nil {
		return err
	}
	edge := origin.Of(e.Request.Context())
	if edge != nil {
		e.Client = edge.Identify(e.Client)
	}
	client := c.notifier.NewClient(e.Client, release)
	if edge != nil {
		edge.Carry(client)
	}
	e.Client = client
	e.Set(clientKey, client)

	// PocketBase ends a connection after 30 minutes, and after 5 without a message, to find
	// forgotten ones. Heartbeats find those, so only the first limit is kept. It is spread, so that
	// clients that connected together, after a restart, do not reconnect together forever. Handlers
	// may set both.
	e.MaxTimeout = spread(e.MaxTimeout)
	e.Set(idleTimeoutKey, e.IdleTimeout)
	if c.notifier.Config().Heartbeat > 0 {
		e.IdleTimeout = e.MaxTimeout
	}

	defer func() { // also if a handler panics
		if !handedOver(e) {
			client.Close(notify.DisconnectRejected) // has no effect if it has already ended
			<-client.Done()
		}
	}()
	return e.Next()
}

// spread returns d plus or minus up to a tenth of it.
func spread(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()*2-1)*float64(d)/10)
}

// clientKey is the key in the event's store for the client that connect created.
const clientKey = "heraldClient"

// idleTimeoutKey is that for the IdleTimeout that PocketBase has set.
const idleTimeoutKey = "heraldIdleTimeout"

// handedOverKey is set in the event's store if the connection outlives its handlers.
const handedOverKey = "heraldHandedOver"

func handedOver(e *core.RealtimeConnectRequestEvent) bool { return e.Get(handedOverKey) != nil }

// serve writes the client's messages in place of PocketBase's loop.
func (c connections) serve(e *core.RealtimeConnectRequestEvent) error {
	arrived(e.RequestEvent) // what follows may last as long as the connection
	client, ok := e.Client.(*notify.Client)
	if !ok { // a handler has replaced it with its own client
		return c.serveWrapped(e)
	}
	client.SetTimeouts(e.MaxTimeout, e.IdleTimeout)
	return c.write(e, client)
}

func (c connections) serveWrapped(e *core.RealtimeConnectRequestEvent) error {
	client, ok := e.Get(clientKey).(*notify.Client)
	if !ok {
		return e.Next()
	}
	looped := make(chan struct{})
	defer close(looped)
	client.SetTimeouts(e.MaxTimeout, e.IdleTimeout)
	wraps, readsChannel := client.Wrap(e.Client, looped)
	switch {
	case !wraps:
		client.Unlist()
		if idle, ok := e.Get(idleTimeoutKey).(time.Duration); ok && e.IdleTimeout == e.MaxTimeout { // nobody sends heartbeats
			e.IdleTimeout = idle
		}
		return e.Next()
	case readsChannel:
		return c.loop(e, client)
	}
	return c.write(e, client)
}

// write writes client's messages: past net/http if the connection can be taken from it, otherwise
// from this goroutine.
func (c connections) write(e *core.RealtimeConnectRequestEvent, client *notify.Client) error {
	client.Register(e.Client)
	if c.canTake(e) {
		return c.take(e, client)
	}
	if c.relay(e, client) {
		return c.handOver(e, client)
	}
	response := newResponse(e)
	defer response.Release()
	if err := client.ServeStream(e.Request.Context(), response); err != nil {
		e.App.Logger().Debug("Realtime connection closed (failed to deliver message)", "clientId", client.Id(), "error", err.Error())
	}
	<-client.Done() // client logs the reason
	return nil
}

// loop lets PocketBase's loop write what it reads from the channel of a wrapper, until client ends.
func (c connections) loop(e *core.RealtimeConnectRequestEvent, client *notify.Client) error {
	e.MaxTimeout, e.IdleTimeout = math.MaxInt64, math.MaxInt64
	// the loop must end after the client, which knows the reason
	left := e.Request.Context()
	ctx, cancel := context.WithCancel(context.WithoutCancel(left))
	defer cancel()
	defer context.AfterFunc(left, func() { client.Close(notify.DisconnectLeft) })()
	e.Request = e.Request.WithContext(ctx)
	response := newResponse(e)
	defer response.Release()
	go func() {
		<-client.Done()
		cancel()
		response.Cut()
	}()
	return e.Next()
}

// canTake reports whether the bytes of the response can bypass e.Response.
func (c connections) canTake(e *core.RealtimeConnectRequestEvent) bool {
	if e.App.OnRealtimeMessageSend().Length() > 0 {
		return false // each message goes through the handlers, with this event
	}
	// A wrapper (a middleware that compresses or counts) wants to see what is written. HTTP/2 has
	// no separate connection for a response, and TLS has no write that does not wait.
	tracker, ok := e.Response.(*router.ResponseWriter)
	if !ok || tracker.Written() || e.Request.TLS != nil {
		return false
	}
	if _, ok := tracker.ResponseWriter.(http.Hijacker); !ok {
		return false
	}
	if _, ok := tracker.ResponseWriter.(router.RWUnwrapper); ok {
		return false
	}
	// a HEAD request gets no body, and a request body must not be left unread
	return e.Request.Method == http.MethodGet && e.Request.ContentLength == 0 &&
		e.Response.Header().Get("Content-Encoding") == ""
}

// take takes the connection from net/http and gives it to client.
func (c connections) take(e *core.RealtimeConnectRequestEvent, client *notify.Client) error {
	conn, buffered, err := http.NewResponseController(e.Response).Hijack()
	if err != nil {
		return e.InternalServerError("Failed to initialize SSE connection.", err)
	}
	if buffered.Reader.Buffered() > 0 {
		conn.Close()
		client.Close(notify.DisconnectUnexpected)
		return nil
	}
	client.TakeConn(conn, notify.ResponseHead(e.Request.ProtoMinor, e.Response.Header()))
	return c.handOver(e, client)
}

// relay lets the edge write that holds the connection, and reports whether there is one and nobody wants to see what
// is written.
func (c connections) relay(e *core.RealtimeConnectRequestEvent, client *notify.Client) bool {
	tracker, ok := e.Response.(*router.ResponseWriter)
	return ok && !tracker.Written() && e.App.OnRealtimeMessageSend().Length() == 0 &&
		e.Response.Header().Get("Content-Encoding") == "" && origin.Take(tracker.ResponseWriter, client)
}

// handOver ends the request of a connection that is written to without it.
func (c connections) handOver(e *core.RealtimeConnectRequestEvent, client *notify.Client) error {
	if e.App.OnRealtimeConnectRequest().Length() > ownConnectHandlers {
		<-client.Done() // code of handlers after e.Next must run when the client leaves
		return nil
	}
	e.Set(handedOverKey, true)
	return nil
}

// response is the response of a realtime request, for notify.Client.ServeStream.
type response struct {
	*notify.Cutter
	event *core.RealtimeConnectRequestEvent
}

var _ notify.Response = (*response)(nil)

func newResponse(e *core.RealtimeConnectRequestEvent) *response {
	notify.BoundSendBuffer(e.Request, e.Response.Header())
	return &response{notify.NewCutter(e.Response), e}
}

// Kept returns the line to the edge where what is written may wait, if there is one: see conn.Keeper.
func (r *response) Kept() *notify.Line { return origin.Line(r.event.Request.Context()) }

func (r *response) Hooked() bool { return r.event.App.OnRealtimeMessageSend().Length() > 0 }

// Deliver lets the handlers of OnRealtimeMessageSend see the message, as PocketBase's loop does.
func (r *response) Deliver(name string, data []byte) error {
	event := new(core.RealtimeMessageEvent)
	event.RequestEvent = r.event.RequestEvent
	event.Client = r.event.Client
	event.Message = &subscriptions.Message{Name: name, Data: data}
	return r.event.App.OnRealtimeMessageSend().Trigger(event, func(e *core.RealtimeMessageEvent) error {
		if _, err := e.Response.Write(notify.EncodeSSE(e.Client.Id(), e.Message.Name, e.Message.Data)); err != nil {
			return err
		}
		return e.Flush()
	})
}

func (r *response) Write(events []byte) error {
	_, err := r.event.Response.Write(events)
	return err
}

func (r *response) Flush() error { return r.event.Flush() }
