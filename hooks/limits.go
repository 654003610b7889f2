// Limits against abuse: how many connections and subscriptions there may be.
// Asked by connections.go.

package hooks

import (
	"fmt"
	"net/http"
	"strconv"
	"sync"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
)

// Limits bound what clients may take of the server; zero is no limit.
type Limits struct {
	// Connections is how many realtime connections there may be in all. One
	// more is answered with 503.
	Connections int
	// ConnectionsPerIP is how many may come from one IP, as PocketBase's
	// trusted proxy settings tell it. One more is answered with 429.
	ConnectionsPerIP int
	// ConnectionsPerUser is how many one auth record may have. PocketBase's
	// SDKs sign in with their subscriptions, so it is those of one more that
	// are answered with 429.
	ConnectionsPerUser int
	// Subscriptions is how many subscriptions one connection may have. More
	// are answered with 429. (PocketBase itself allows 1000.)
	Subscriptions int
}

// retryAfter tells clients that were refused when to come again, in seconds.
const retryAfter = 10

// limits counts connections.
type limits struct {
	Limits
	notifier *notify.Notifier

	mu    sync.Mutex // guards what follows
	total int
	byIP  map[string]int
}

func newLimits(config Limits, notifier *notify.Notifier) *limits {
	return &limits{Limits: config, notifier: notifier, byIP: map[string]int{}}
}

// connect counts a connection that begins, or refuses it. release is to be
// called when it has ended.
func (l *limits) connect(e *core.RequestEvent) (release func(), err error) {
	ip := e.RealIP()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.notifier.Stopping():
		return nil, refuse(e, http.StatusServiceUnavailable, "The server is shutting down.")
	case l.Connections > 0 && l.total >= l.Connections:
		return nil, refuse(e, http.StatusServiceUnavailable, "The server has too many realtime connections.")
	case l.ConnectionsPerIP > 0 && l.byIP[ip] >= l.ConnectionsPerIP:
		return nil, refuse(e, http.StatusTooManyRequests, fmt.Sprintf(
			"There are too many realtime connections from your address, no more than %d are allowed.", l.ConnectionsPerIP))
	}
	l.total++
	l.byIP[ip]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.total--
		if l.byIP[ip]--; l.byIP[ip] == 0 {
			delete(l.byIP, ip)
		}
	}, nil
}

// subscriptions refuses subscriptions that are too many.
func (l *limits) subscriptions(e *core.RealtimeSubscribeRequestEvent) error {
	if l.Subscriptions > 0 && len(e.Subscriptions) > l.Subscriptions {
		return refuse(e.RequestEvent, http.StatusTooManyRequests, fmt.Sprintf(
			"There are too many subscriptions, no more than %d are allowed.", l.Subscriptions))
	}
	return nil
}

// connectionsOfUser signs the client in, or refuses that where the user has too
// many connections.
func (l *limits) connectionsOfUser(e *core.RealtimeSubscribeRequestEvent) error {
	if l.ConnectionsPerUser <= 0 || e.Auth == nil {
		return nil
	}
	// counted and signed in under one lock: of two that come at once both would
	// see room for one
	l.mu.Lock()
	defer l.mu.Unlock()
	others := 0
	for _, id := range l.notifier.ClientsOf(e.Auth) {
		if id != e.Client.Id() {
			others++
		}
	}
	if others >= l.ConnectionsPerUser {
		return refuse(e.RequestEvent, http.StatusTooManyRequests, fmt.Sprintf(
			"You have too many realtime connections, no more than %d are allowed.", l.ConnectionsPerUser))
	}
	e.Client.Set(apis.RealtimeClientAuthKey, e.Auth)
	return nil
}

// refuse returns an error to answer with, and sets when to try again.
func refuse(e *core.RequestEvent, status int, message string) error {
	e.Response.Header().Set("Retry-After", strconv.Itoa(retryAfter))
	return e.Error(status, message, nil)
}
