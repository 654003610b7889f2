// The client of a realtime connection. hooks/connections.go makes one for each
// connection; the fan-out and PocketBase send to it. Its queue is in queue.go,
// the two ways of writing it out in socket.go and stream.go.

package notify

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// Why a connection ended, in logs and metrics.
const (
	ReasonLeft         = "left"             // the client closed it, or the network did
	ReasonQueueFull    = "queue full"       // it did not read what was sent to it
	ReasonTooSlow      = "too slow"         // it took nothing for WriteTimeout
	ReasonWriteFailed  = "write failed"     // e.g. reset by the peer
	ReasonUnexpected   = "unexpected data"  // it sent something where a client has nothing to say
	ReasonDisconnected = "disconnected"     // somebody asked for it, see Notifier.Disconnect
	ReasonUnregistered = "unregistered"     // other code took it out of PocketBase's broker
	ReasonLifetime     = "lifetime over"    // RealtimeConnectRequestEvent.MaxTimeout
	ReasonIdle         = "idle"             // RealtimeConnectRequestEvent.IdleTimeout
	ReasonTokenExpired = "token expired"    // its SDK comes back with the token it has by now
	ReasonAuthEnded    = "auth ended"       // what was queued for the user must not be written any more
	ReasonHandlers     = "handlers changed" // an OnRealtimeMessageSend handler was bound after it connected
	ReasonShutdown     = "shutdown"         // the server stops
	ReasonFailed       = "internal error"   // a panic in its path
	ReasonRejected     = "handler returned" // a handler of the connect request ended it
	ReasonRuleFailed   = "rule failed"      // a channel's rule could not be asked
)

// Client is a realtime connection whose Send never blocks: it puts the message
// into a bounded queue. A connection whose queue is full is closed, rather than
// left with a hole in what it received.
//
// It wraps the client that PocketBase made for the connection and keeps that
// one's id, subscriptions and store. What it adds it keeps in the notifier's
// index: its topics and its user.
//
// After [Notifier.NewClient] either [Client.TakeConn] or [Client.ServeStream]
// writes out what is queued, or else somebody reads [Client.Channel].
type Client struct {
	subscriptions.Client

	notifier  *Notifier
	connected time.Time
	onEnd     func()
	done      chan struct{} // closed when the connection has ended and all is cleaned up

	queue // the messages that wait, and the state of the connection

	// what the connection was asked to be, set before it is served
	lifetime, idle time.Duration

	// When it was written to, had a message and a beat last, by Notifier.clock.
	lastWrite, lastMessage, lastBeat atomic.Int64

	beat beatState // whether it wants beats, see serving.go

	// serving and socket are set once, under queue.mu, when serving begins
	socket *socket
	stream *stream

	authMu  sync.Mutex // orders changes of auth with those of the index
	auth    atomic.Pointer[core.Record]
	expires atomic.Int64 // when auth's token does, in Unix seconds; 0: never

	resubscribing sync.Mutex // held by Resubscribe

	// subsMu guards what follows and is taken before the lock of any stripe.
	subsMu      sync.Mutex
	subs        []*subscription
	replays     []pendingReplay  // are to be run
	replaying   bool             // a goroutine does so
	admitted    map[string]grant // by key, of the Subscribe that is to come
	version     int              // counts Resubscribes, and the checks that ended something
	resubscribe bool             // an Unsubscribe is about to be followed by a Subscribe
	unchecked   bool             // the rules should have been asked again meanwhile
	signingOut  int              // SignOuts under way
	unlisted    bool             // keeps out of the index, for good

	pair atomic.Pointer[pair] // of a wrapped client, and the one that writes for it: see wrapped.go
}

var _ subscriptions.Client = (*Client)(nil)

// NewClient wraps base, the client of a connection that begins now. onEnd, which
// may be nil, is called once when the connection has ended, whoever ended it.
// The connection has to be ended at some time: by [Client.Close], by
// [Client.Discard] or by its other side.
func (n *Notifier) NewClient(base subscriptions.Client, onEnd func()) *Client {
	c := &Client{Client: base, notifier: n, connected: time.Now(), onEnd: onEnd, done: make(chan struct{})}
	c.frames = c.inline[:0]
	return c
}

// unlist takes the client out of the index for good.
func (c *Client) unlist() {
	c.subsMu.Lock()
	c.unlisted = true
	c.reindex(nil)
	c.subsMu.Unlock()

	c.authMu.Lock()
	defer c.authMu.Unlock()
	c.setAuthLocked(nil)
}

// Set implements [subscriptions.Client].
func (c *Client) Set(key string, value any) {
	if key == apis.RealtimeClientAuthKey {
		auth, _ := value.(*core.Record)
		c.authMu.Lock()
		defer c.authMu.Unlock()
		c.setAuthLocked(auth)
	}
	c.Client.Set(key, value)
}

// Unset implements [subscriptions.Client].
func (c *Client) Unset(key string) {
	if key == apis.RealtimeClientAuthKey {
		c.authMu.Lock()
		defer c.authMu.Unlock()
		c.setAuthLocked(nil)
	}
	c.Client.Unset(key)
}

// Get implements [subscriptions.Client]. The auth record is nil once its token
// has expired.
func (c *Client) Get(key string) any {
	if key == apis.RealtimeClientAuthKey && c.auth.Load() != nil && c.expired(time.Now()) {
		return nil
	}
	return c.Client.Get(key)
}

// setAuthLocked notes who the client is. authMu is held.
func (c *Client) setAuthLocked(auth *core.Record) {
	before := c.auth.Swap(auth)
	if auth == nil {
		c.expires.Store(0)
	}
	if before != nil && auth != nil && refOf(before) == refOf(auth) {
		return // a newer version of the same record
	}
	if before == nil && auth == nil {
		return
	}
	if before != nil {
		c.endIfPrivate()
		if both := c.pair.Load(); both != nil && both.handed.Load() {
			c.end(ReasonAuthEnded) // the wrapper may have something for that user still
		}
	}
	c.subsMu.Lock()
	unlisted := c.unlisted
	c.subsMu.Unlock()
	if unlisted {
		auth = nil
	}
	c.notifier.index.setUser(c, before, auth)
	c.authChanged()
}

// SetExpiry tells when the token of the client's auth record expires; the zero
// time is never. From then on the client counts as a guest, and its connection
// is closed within a second, so that its SDK comes back with the token that it
// has by then.
func (c *Client) SetExpiry(at time.Time) {
	if at.IsZero() {
		c.expires.Store(0)
	} else {
		c.expires.Store(at.Unix())
	}
}

// SetTimeouts limits how long the connection lasts, and how long without a
// message. Zero is no limit. To be called before it is served.
func (c *Client) SetTimeouts(lifetime, idle time.Duration) {
	c.lifetime, c.idle = lifetime, idle
}

// Register puts the client into PocketBase's broker, where its subscriptions can
// be set and other code finds it. It leaves the broker when it ends.
//
// as is what other code finds there: the client itself, or its wrapper.
func (c *Client) Register(as subscriptions.Client) {
	broker := c.notifier.app.SubscriptionsBroker()
	broker.Register(as)
	c.countRegistered()
	if c.IsDiscarded() { // before it was there to be taken out
		broker.Unregister(c.Id())
	}
}

// Unlist keeps the client out of the index of who gets messages: for one that
// other code has wrapped by a client of its own, which gets them instead.
func (c *Client) Unlist() { c.unlist() }

// Connected returns when the connection began.
func (c *Client) Connected() time.Time { return c.connected }

// Done is closed when the connection has ended and nothing of it is left.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection at once; what is queued is not written. The SDK on
// the other side will reconnect. reason is for logs and metrics.
func (c *Client) Close(reason string) { c.end(reason) }

// Discard implements [subscriptions.Client]: it ends the connection.
func (c *Client) Discard() { c.end(ReasonUnregistered) }

// Send queues m. It does not block. What PocketBase sends in this way (record
// events) was checked against the client's auth record.
func (c *Client) Send(m subscriptions.Message) {
	if m.Name == "" || !safeKey(m.Name) {
		return
	}
	send := func(m subscriptions.Message) outcome { return c.put(newFrame(m, true)) }
	if below := c.below(); below != nil {
		send = func(m subscriptions.Message) outcome { return c.passOn(below, m) }
	} else if c.notifier.hooked() && c.isTaken() {
		c.Finish(ReasonHandlers)
		return
	}
	if send(m) >= queued {
		c.lastMessage.Store(c.notifier.clock.Load())
	}
}

// cleanup is what remains to be done when the connection has ended, on a
// goroutine of its own, since it takes locks that the one who ends it may hold.
func (c *Client) cleanup(reason string, undelivered int) {
	defer close(c.done)
	defer c.guard("ending a realtime connection")
	if c.socket != nil {
		c.socket.close()
	}
	if c.stream != nil {
		c.stream.cut()
	}
	n := c.notifier
	n.serving.remove(c)
	if above := c.above(); above != nil {
		c.pair.Load().undelivered = undelivered
		above.end(reason)
		return
	}
	c.unlist()
	defer func() { // also when other code panics
		if c.onEnd != nil {
			c.onEnd()
		}
		n.stats.ended(reason, undelivered)
		c.logEnd(reason, undelivered)
	}()
	isRegistered := false
	if registered, err := n.app.SubscriptionsBroker().ClientById(c.Id()); err == nil {
		isRegistered = n.own(registered) == c
	}
	undelivered += c.endBelow(reason)
	c.Client.Discard()
	if isRegistered { // last: a wrapper's Discard may do anything
		n.app.SubscriptionsBroker().Unregister(c.Id())
	}
}

func (c *Client) logEnd(reason string, undelivered int) {
	level := slog.LevelDebug
	switch reason {
	case ReasonQueueFull, ReasonTooSlow, ReasonUnexpected, ReasonFailed, ReasonHandlers:
		level = slog.LevelWarn
	}
	c.notifier.app.Logger().Log(context.Background(), level, "Realtime connection closed",
		slog.String("clientId", c.Id()), slog.String("reason", reason), slog.Int("undelivered", undelivered))
}
