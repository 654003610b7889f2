// Realtime connections: ours in the place of PocketBase's client.

package hooks

import (
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/notify"
)

// bindConnections gives every realtime connection a client whose queue is
// bounded and whose Send does not block, in place of PocketBase's own, and lets
// it miss nothing while its subscriptions are replaced.
func bindConnections(app core.App, notifier *notify.Notifier) {
	app.OnRealtimeConnectRequest().Bind(&hook.Handler[*core.RealtimeConnectRequestEvent]{
		Id: "heraldConnect",
		Func: func(e *core.RealtimeConnectRequestEvent) error {
			wire := &wire{control: http.NewResponseController(e.Response)}
			defer wire.release()

			id, logger := e.Client.Id(), e.App.Logger()
			e.Client = notify.NewClient(e.Client, notifier.Config().QueueSize, func(reason string) {
				logger.Warn("Realtime connection closed by the server",
					slog.String("clientId", id), slog.String("reason", reason))
				wire.cut()
			})

			return e.Next()
		},
		// before the handlers of others, who are to see the client that stays
		Priority: -999,
	})

	app.OnRealtimeSubscribeRequest().Bind(&hook.Handler[*core.RealtimeSubscribeRequestEvent]{
		Id: "heraldSubscribe",
		Func: func(e *core.RealtimeSubscribeRequestEvent) error {
			if client, ok := e.Client.(*notify.Client); ok {
				return client.Resubscribe(e.Next)
			}
			return e.Next()
		},
		// after the handlers of others, who may refuse the request or change
		// the client's subscriptions on their own
		Priority: 999,
	})
}

// wire cuts the connection of a request from outside of its handler.
type wire struct {
	mu      sync.Mutex // cut and release race
	control *http.ResponseController
}

// cut makes the handler's write fail, also one that is stuck because the other
// side does not read: PocketBase's realtime loop then returns and net/http
// closes the connection.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.control != nil {
		// not supported by e.g. a httptest.ResponseRecorder; there the closed
		// queue alone ends the loop
		_ = w.control.SetWriteDeadline(time.Unix(1, 0))
	}
}

// release has to be called before the handler returns: net/http forbids the use
// of a ResponseWriter after that (with HTTP/2 it panics).
func (w *wire) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.control = nil
}
