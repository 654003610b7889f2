package hooks_test

import (
	"sync"
	"testing"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/pbtest"
	"herald/notify"
)

// way is a way in which messages are written to a connection.
type way struct {
	name    string
	prepare func(app core.App) // nil: nothing
	serve   func(testing.TB, core.App) *pbtest.Server
}

// ways are all of them. What is promised holds on each: see promises_test.go.
var ways = []way{
	{"taken", nil, pbtest.Serve},
	{"TLS", nil, pbtest.ServeTLS},
	{"HTTP2", nil, pbtest.ServeHTTP2},
	{"handlers", func(app core.App) {
		app.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error { return e.Next() })
	}, pbtest.Serve},
	{"wrapped", func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} })
	}, pbtest.Serve},
	{"wrapped, HTTP2", func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} })
	}, pbtest.ServeHTTP2},
	{"own channel", func(app core.App) {
		wrapClients(app, func(client subscriptions.Client) subscriptions.Client { return &channelWrapper{Client: client} })
	}, pbtest.Serve},
}

// eachWay runs a test over all ways.
func eachWay(t *testing.T, test func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server)) {
	t.Helper()
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			w := newWorld(t)
			if way.prepare != nil {
				way.prepare(w)
			}
			test(t, w, way.serve)
		})
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
