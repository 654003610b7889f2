// Limits against abuse: the maximum numbers of connections and subscriptions. Called by
// connections.go.

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

// Limits bound what clients may use of the server; zero means no limit.
type Limits struct {
	// Connections is the maximum number of realtime connections in all. One more gets 503.
	Connections int
	// ConnectionsPerIP is the maximum number of connections from one IP, according to PocketBase's
	// trusted proxy settings. One more gets 429.
	ConnectionsPerIP int
	// ConnectionsPerUser is the maximum number of connections of one auth record. PocketBase's SDKs
	// sign in when they subscribe, so the subscriptions of one more connection get 429.
	ConnectionsPerUser int
	// Subscriptions is the maximum number of subscriptions of one connection. More get 429.
	// (PocketBase itself allows 1000.)
	Subscriptions int
}

// retryAfter tells refused clients when to try again, in seconds.
const retryAfter = 10

// limits counts connections.
type limits struct {
	Limits
	notifier *notify.Notifier

	mu    sync.Mutex // guards the fields below
	total int
	byIP  map[string]int
}

func newLimits(config Limits, notifier *notify.Notifier) *limits {
	return &limits{Limits: config, notifier: notifier, byIP: map[string]int{}}
}

// connect counts a new connection or refuses it. release must be called when the connection has
// ended.
func (l *limits) connect(e *core.RequestEvent) (release func(), err error) {
	ip := e.RealIP()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.notifier.Stopping():
		return nil, refuse(e, retryAfter, http.StatusServiceUnavailable, "The server is shutting down.")
	case l.Connections > 0 && l.total >= l.Connections:
		return nil, refuse(e, retryAfter, http.StatusServiceUnavailable, "The server has too many realtime connections.")
	case l.ConnectionsPerIP > 0 && l.byIP[ip] >= l.ConnectionsPerIP:
		return nil, refuse(e, retryAfter, http.StatusTooManyRequests, fmt.Sprintf(
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

// subscriptions refuses too many subscriptions.
func (l *limits) subscriptions(e *core.RealtimeSubscribeRequestEvent) error {
	if l.Subscriptions > 0 && len(e.Subscriptions) > l.Subscriptions {
		return refuse(e.RequestEvent, retryAfter, http.StatusTooManyRequests, fmt.Sprintf(
			"There are too many subscriptions, no more than %d are allowed.", l.Subscriptions))
	}
	return nil
}

// connectionsOfUser signs the client in, or refuses to if the user has too many connections.
func (l *limits) connectionsOfUser(e *core.RealtimeSubscribeRequestEvent) error {
	if l.ConnectionsPerUser <= 0 || e.Auth == nil {
		return nil
	}
	// count and sign in under one lock: otherwise two concurrent requests could both see room for
	// one
	l.mu.Lock()
	defer l.mu.Unlock()
	others := 0
	for _, id := range l.notifier.ClientsOf(e.Auth) {
		if id != e.Client.Id() {
			others++
		}
	}
	if others >= l.ConnectionsPerUser {
		return refuse(e.RequestEvent, retryAfter, http.StatusTooManyRequests, fmt.Sprintf(
			"You have too many realtime connections, no more than %d are allowed.", l.ConnectionsPerUser))
	}
	e.Client.Set(apis.RealtimeClientAuthKey, e.Auth)
	return nil
}

// refuse returns an error to answer with, and sets Retry-After, in seconds.
func refuse(e *core.RequestEvent, after, status int, message string) error {
	e.Response.Header().Set("Retry-After", strconv.Itoa(after))
	return e.Error(status, message, nil)
}
