// The client of a realtime connection. hooks/connections.go creates one per connection; the fan-out
// and PocketBase send to it. queue.go holds its queue; socket.go and stream.go are the two ways of
// writing it out.

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
	ReasonUnexpected   = "unexpected data"  // it sent something, though a client has nothing to send
	ReasonDisconnected = "disconnected"     // requested, see Notifier.Disconnect
	ReasonUnregistered = "unregistered"     // other code removed it from PocketBase's broker
	ReasonLifetime     = "lifetime over"    // RealtimeConnectRequestEvent.MaxTimeout
	ReasonIdle         = "idle"             // RealtimeConnectRequestEvent.IdleTimeout
	ReasonTokenExpired = "token expired"    // its SDK returns with its current token
	ReasonAuthEnded    = "auth ended"       // what was queued for the user must not be written any more
	ReasonHandlers     = "handlers changed" // an OnRealtimeMessageSend handler was bound after it connected
	ReasonShutdown     = "shutdown"         // the server is stopping
	ReasonFailed       = "internal error"   // a panic in its path
	ReasonRejected     = "handler returned" // a handler of the connect request ended it
	ReasonRuleFailed   = "rule failed"      // a channel's rule could not be evaluated
)

// Client is a realtime connection whose Send never blocks: it puts the message into a bounded
// queue. A connection whose queue is full is closed, rather than left with a gap in what it
// received.
//
// It wraps the client that PocketBase made for the connection and keeps that client's id,
// subscriptions and store. It keeps its topics and its user in the notifier's index.
//
// After [Notifier.NewClient], either [Client.TakeConn] or [Client.ServeStream] writes out what is
// queued, or a reader of [Client.Channel] does.
type Client struct {
	subscriptions.Client

	notifier  *Notifier
	connected time.Time
	onEnd     func()
	done      chan struct{} // closed when the connection has ended and everything is cleaned up

	queue // the messages that wait, and the state of the connection

	// limits requested for the connection, set before it is served
	lifetime, idle time.Duration

	// When it last was written to, had a message and had a beat, by Notifier.clock.
	lastWrite, lastMessage, lastBeat atomic.Int64

	beat beatState // whether it wants beats, see beat.go

	// socket or stream is set once, under queue.mu, when serving begins
	socket *socket
	stream *stream

	authMu  sync.Mutex // orders changes of auth with those of the index
	auth    atomic.Pointer[core.Record]
	expires atomic.Int64 // when auth's token expires, in Unix seconds; 0 means never

	resubscribing sync.Mutex // held by Resubscribe

	// subsMu guards the fields below and is taken before the lock of any stripe.
	subsMu      sync.Mutex
	subs        []*subscription
	replays     []pendingReplay  // waiting to run
	replaying   bool             // a goroutine is running replays
	admitted    map[string]grant // by key, for the coming Subscribe
	version     int              // counts Resubscribes, and the checks that ended something
	resubscribe bool             // an Unsubscribe is about to be followed by a Subscribe
	unchecked   bool             // a recheck of the rules was skipped and is due
	signingOut  int              // SignOuts in progress
	unlisted    bool             // stays out of the index for good

	pair atomic.Pointer[pair] // for a wrapped client and the one that writes for it: see wrapped.go
}

var _ subscriptions.Client = (*Client)(nil)

// NewClient wraps base, the client of a connection that begins now. onEnd, which may be nil, is
// called once when the connection has ended, for whatever reason. The connection must end at some
// point: by [Client.Close], by [Client.Discard] or from its other side.
func (n *Notifier) NewClient(base subscriptions.Client, onEnd func()) *Client {
	c := &Client{Client: base, notifier: n, connected: time.Now(), onEnd: onEnd, done: make(chan struct{})}
	c.frames = c.inline[:0]
	return c
}

// unlist removes the client from the index for good.
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

// Get implements [subscriptions.Client]. The auth record is nil once its token has expired.
func (c *Client) Get(key string) any {
	if key == apis.RealtimeClientAuthKey && c.auth.Load() != nil && c.expired(time.Now()) {
		return nil
	}
	return c.Client.Get(key)
}

// setAuthLocked sets the client's auth record. authMu is held.
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

// SetExpiry sets when the token of the client's auth record expires; the zero time means never.
// After that the client counts as a guest, and its connection is closed within a second, so that
// its SDK returns with its current token.
func (c *Client) SetExpiry(at time.Time) {
	if at.IsZero() {
		c.expires.Store(0)
	} else {
		c.expires.Store(at.Unix())
	}
}

// SetTimeouts limits how long the connection lasts, and how long it lasts without a message. Zero
// means no limit. Call it before the connection is served.
func (c *Client) SetTimeouts(lifetime, idle time.Duration) {
	c.lifetime, c.idle = lifetime, idle
}

// Register puts the client into PocketBase's broker, where its subscriptions can be set and other
// code finds it. It leaves the broker when it ends.
//
// as is what other code finds there: the client itself or its wrapper.
func (c *Client) Register(as subscriptions.Client) {
	broker := c.notifier.app.SubscriptionsBroker()
	broker.Register(as)
	c.countRegistered()
	if c.IsDiscarded() { // before it was there to be taken out
		broker.Unregister(c.Id())
	}
}

// Unlist keeps the client out of the index, so it gets no messages. It is for a client that other
// code has replaced with a client of its own, which gets the messages instead.
func (c *Client) Unlist() { c.unlist() }

// Connected returns when the connection began.
func (c *Client) Connected() time.Time { return c.connected }

// Done is closed when the connection has ended and is fully cleaned up.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection at once; what is queued is not written. The SDK on the other side will
// reconnect. reason appears in logs and metrics.
func (c *Client) Close(reason string) { c.end(reason) }

// Discard implements [subscriptions.Client]: it ends the connection.
func (c *Client) Discard() { c.end(ReasonUnregistered) }

// Send queues m. It does not block. PocketBase sends record events this way, and has checked them
// against the client's auth record.
func (c *Client) Send(m subscriptions.Message) {
	if m.Name == "" || !safeKey(m.Name) {
		return
	}
	var result outcome
	if below := c.below(); below != nil {
		result = c.passOn(below, m)
	} else {
		result = c.putMessage(m)
	}
	if result >= queued {
		c.lastMessage.Store(c.notifier.clock.Load())
	}
}

// putMessage queues a message of other code, unless handlers want to see it and cannot any more.
func (c *Client) putMessage(m subscriptions.Message) outcome {
	if c.notifier.hooked() && c.isTaken() {
		c.top().Finish(ReasonHandlers)
		return gone
	}
	return c.put(newFrame(m, true))
}

// cleanup does what remains when the connection has ended. It has its own goroutine, since it takes
// locks that the caller that ends the connection may hold.
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
	defer func() { // also if other code panics
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
