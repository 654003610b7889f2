package hooks_test

import (
	"bytes"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
	"herald/notify/edge"
)

// way is a way in which messages are written to a connection.
type way struct {
	name    string
	prepare func(app core.App) // nil: nothing
	serve   func(testing.TB, core.App) *pbtest.Server
	// isForeign: what writes is not ours, and need not find out who does not read
	isForeign bool
}

// ways are all of them. What is promised holds on each: see promises_test.go.
var ways = []way{
	{name: "taken", serve: pbtest.Serve},
	{name: "a listener's own connections", serve: func(t testing.TB, app core.App) *pbtest.Server {
		return pbtest.ServeConns(t, app, func(conn net.Conn) net.Conn { return &recordingConn{TCPConn: conn.(*net.TCPConn)} })
	}},
	{name: "TLS", serve: pbtest.ServeTLS},
	{name: "HTTP2", serve: pbtest.ServeHTTP2},
	{name: "handlers", serve: pbtest.Serve, prepare: func(app core.App) {
		app.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error { return e.Next() })
	}},
	{name: "wrapped", serve: pbtest.Serve, prepare: func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} })
	}},
	{name: "wrapped, HTTP2", serve: pbtest.ServeHTTP2, prepare: func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} })
	}},
	{name: "edge", serve: pbtest.ServeEdge},
	{name: "edge, handlers", serve: pbtest.ServeEdge, prepare: func(app core.App) {
		app.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error { return e.Next() })
	}},
	{name: "edge, wrapped", serve: pbtest.ServeEdge, prepare: func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} })
	}},
	{name: "own channel", serve: pbtest.Serve, prepare: func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &channelWrapper{Client: client} })
	}},
	{name: "edge, own channel", serve: pbtest.ServeEdge, prepare: func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &channelWrapper{Client: client} })
	}},
	{name: "own channel, taken early", serve: pbtest.Serve, prepare: func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client {
			wrapper := &channelWrapper{Client: client}
			wrapper.Channel()
			return wrapper
		})
	}},
}

// replaced is the way of a client that has nothing to do with ours.
var replaced = way{name: "replaced", serve: pbtest.Serve, isForeign: true, prepare: func(app core.App) {
	wrapClients(app, func(client subscriptions.Client) subscriptions.Client {
		other := subscriptions.NewDefaultClient()
		other.Set(apis.RealtimeClientIPKey, client.Get(apis.RealtimeClientIPKey))
		return other
	})
}}

// newWorld is a world whose messages go that way.
func (w *way) newWorld(t testing.TB) *world {
	t.Helper()
	world := newWorld(t)
	if w.prepare != nil {
		w.prepare(world)
	}
	return world
}

// serveBeating serves an application whose messages go that way, with that time between heartbeats.
func (w *way) serveBeating(t testing.TB, every time.Duration) (core.App, *pbtest.Server) {
	t.Helper()
	app := pbtest.NewApp(t, func(app core.App) {
		hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Heartbeat: every}})
	})
	if w.prepare != nil {
		w.prepare(app)
	}
	if !strings.HasPrefix(w.name, "edge") {
		return app, w.serve(t, app)
	}
	o := pbtest.NewOrigin(t, app, pbtest.NATS(t, &server.Options{}))
	return app, o.EdgeWith(t, edge.Config{NATS: o.NATS, Name: "edge", Heartbeat: every})
}

// eachWay runs a test over all ways, at the same time.
func eachWay(t *testing.T, test func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server)) {
	t.Helper()
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			test(t, way.newWorld(t), way.serve)
		})
	}
}

// eachEdgeWay runs a test over the ways through an edge and further ones, at the same time.
func eachEdgeWay(t *testing.T, test func(t *testing.T, way way), further ...way) {
	t.Helper()
	for _, way := range append(slices.Clone(ways), further...) {
		if strings.HasPrefix(way.name, "edge") {
			t.Run(way.name, func(t *testing.T) {
				t.Parallel()
				test(t, way)
			})
		}
	}
}

// wrapClients puts a client of the application's own around each.
func wrapClients(app core.App, wrap func(subscriptions.Client) subscriptions.Client) {
	app.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
		e.Client = wrap(e.Client)
		return e.Next()
	})
}

// wrapper passes everything on.
type wrapper struct{ subscriptions.Client }

// channelWrapper also reads the channel of the client that it is put around.
type channelWrapper struct {
	subscriptions.Client
	once sync.Once
	out  chan subscriptions.Message
}

func (w *channelWrapper) Channel() chan subscriptions.Message {
	w.once.Do(func() {
		w.out = make(chan subscriptions.Message)
		in := w.Client.Channel()
		go func() {
			defer close(w.out)
			for message := range in {
				select {
				case w.out <- message:
				case <-w.Client.(*notify.Client).Done():
				}
			}
		}()
	})
	return w.out
}

// recordingConn is a connection of a listener that wants to see what is written, as one
// that counts or encrypts does. The *net.TCPConn in it is not to be written past it.
type recordingConn struct {
	*net.TCPConn
	mu      sync.Mutex
	written bytes.Buffer
}

func (c *recordingConn) Write(data []byte) (int, error) {
	n, err := c.TCPConn.Write(data)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written.Write(data[:n])
	return n, err
}

func (c *recordingConn) has(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Contains(c.written.Bytes(), []byte(text))
}
