// The server's lifecycle: shutdown, and what keeps the server from accepting connections.

package hooks

import (
	"context"
	"fmt"
	"log"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/notify"
)

// flushTimeout is how long a stopping server writes what it has accepted.
const flushTimeout = 5 * time.Second

func bindServer(app core.App, notifier *notify.Notifier) {
	app.OnTerminate().Bind(&hook.Handler[*core.TerminateEvent]{
		Id: "heraldShutdown",
		Func: func(e *core.TerminateEvent) error {
			notifier.Shutdown(flushTimeout)
			return e.Next()
		},
		// before PocketBase's "pbGracefulShutdown" (-9999), which cancels the
		// realtime requests
		Priority: -10000,
	})

	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldServer",
		Func: func(e *core.ServeEvent) error {
			if e.Server != nil {
				e.Server.ConnContext = keepConn(e.Server.ConnContext)
				e.Server.ErrorLog = log.New(&acceptLog{app: e.App, next: e.Server.ErrorLog, notifier: notifier}, "", 0)
			}
			return e.Next()
		},
	})
}

// keepConn returns next, which may be nil, with what [notify.BoundSendBuffer] needs.
func keepConn(next func(context.Context, net.Conn) context.Context) func(context.Context, net.Conn) context.Context {
	if next == nil {
		return notify.ConnContext
	}
	return func(ctx context.Context, peer net.Conn) context.Context {
		return next(notify.ConnContext(ctx, peer), peer)
	}
}

// acceptLog makes the file-descriptor limit visible. PocketBase logs all errors of net/http at
// debug level only, and this one makes the server look as if it hangs.
type acceptLog struct {
	app      core.App
	next     *log.Logger // may be nil
	notifier *notify.Notifier

	mu   sync.Mutex
	last time.Time // of the warning; net/http retries many times per second
}

func (l *acceptLog) Write(line []byte) (int, error) {
	if l.next != nil {
		l.next.Print(string(line))
	}
	if !strings.Contains(string(line), "too many open files") { // EMFILE, ENFILE
		return len(line), nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.last) < 10*time.Second {
		return len(line), nil
	}
	l.last = time.Now()
	text := fmt.Sprintf("No new connection can be accepted: the process is out of file descriptors. "+
		"The %d realtime connections use one each. Raise the limit (ulimit -n; LimitNOFILE in systemd).",
		l.notifier.Stats().Connections)
	l.app.Logger().Error(text)
	log.Print(text) // PocketBase's log sometimes needs a free descriptor, and may be unreadable now
	return len(line), nil
}
