// What binds the engine to the life of the server: its end, and what keeps it
// from accepting connections.

package hooks

import (
	"fmt"
	"log"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/notify"
)

// flushTimeout is how long a server that stops writes what it has accepted.
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
		Id: "heraldServerLog",
		Func: func(e *core.ServeEvent) error {
			if e.Server != nil {
				e.Server.ErrorLog = log.New(&acceptLog{app: e.App, next: e.Server.ErrorLog, notifier: notifier}, "", 0)
			}
			return e.Next()
		},
	})
}

// acceptLog makes the file-descriptor limit visible. PocketBase logs all errors
// of net/http for debugging only, and this one looks like a server that hangs.
type acceptLog struct {
	app      core.App
	next     *log.Logger // may be nil
	notifier *notify.Notifier

	mu   sync.Mutex
	last time.Time // of the warning; net/http tries again many times a second
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
	text := fmt.Sprintf("No new connection can be accepted: the process is out of file descriptors, "+
		"of which %d realtime connections use one each. Raise its limit (ulimit -n; LimitNOFILE in systemd).",
		l.notifier.Stats().Connections)
	l.app.Logger().Error(text)
	log.Print(text) // PocketBase's log needs a free descriptor at times, and nobody may be able to read it
	return len(line), nil
}
