// Edges: processes that hold realtime connections for this server. See herald/notify/origin.

package hooks

import (
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/notify"
	"herald/notify/origin"
)

// edgesPatience is how long a stopping server takes what it has written to its edges.
const edgesPatience = time.Second

// edges makes the server the origin of edges, if it is to be one.
type edges struct {
	app      core.App
	notifier *notify.Notifier
	config   origin.Config

	mu     sync.Mutex // guards origin
	origin *origin.Origin
}

// bind begins when the server's routes are complete, and ends after [bindServer] has ended the connections.
func (l *edges) bind() {
	if l.config.NATS == "" {
		return
	}
	l.app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldEdges",
		Func: func(e *core.ServeEvent) error {
			if err := e.Next(); err != nil {
				return err
			}
			if e.Server == nil || e.Server.Handler == nil {
				return errors.New("edges need the server of the ServeEvent, which a handler of OnServe has taken away")
			}
			return l.begin(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { e.Server.Handler.ServeHTTP(w, r) }))
		},
		Priority: -9999, // around the others
	})
	l.app.OnTerminate().Bind(&hook.Handler[*core.TerminateEvent]{
		Id: "heraldEdges",
		Func: func(e *core.TerminateEvent) error {
			l.mu.Lock()
			begun := l.origin
			l.mu.Unlock()
			if begun != nil {
				begun.Close(edgesPatience)
			}
			return e.Next()
		},
		Priority: -9999,
	})
}

func (l *edges) begin(handler http.Handler) error {
	begun, err := origin.New(l.app, l.notifier, l.config)
	if err != nil {
		return err
	}
	if err := begun.Serve(handler); err != nil {
		begun.Close(0)
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.origin = begun
	return nil
}

// list returns the edges that are connected.
func (l *edges) list() []origin.Edge {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.origin == nil {
		return nil
	}
	return l.origin.Edges()
}
