// The client of a realtime connection. hooks/connections.go creates one per connection; the fan-out
// and PocketBase send to it. It has the rights and the subscriptions; its connection (internal/conn)
// has the queue and writes it out.

package notify

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
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

	notifier *Notifier
	onEnd    func()
	conn     conn.Conn
	counted  counted // among Notifier.registered

	lastBeat atomic.Int64 // by conn.Group.Now
	beat     beatState    // whether it wants beats, see beat.go

	channelMu sync.Mutex
	channel   chan subscriptions.Message // see Channel

	authMu  sync.Mutex // orders changes of auth with those of the index
	auth    atomic.Pointer[identity]
	expires int64 // of the auth record, and of one that is set next; guarded by authMu
	coming  coming

	requests order // locked by Resubscribe

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
	attends     bool             // some of subs have an attendance
	renews      bool             // some of these have a TTL

	carrier Carrier // nil unless an edge holds the connection; set before it is served
	carried carried

	pair atomic.Pointer[pair] // for a wrapped client and the one that writes for it: see wrapped.go
}

var _ subscriptions.Client = (*Client)(nil)

// NewClient wraps base, the client of a connection that begins now. onEnd, which may be nil, is
// called once when the connection has ended, for whatever reason. The connection must end at some
// point: by [Client.Close], by [Client.Discard] or from its other side.
func (n *Notifier) NewClient(base subscriptions.Client, onEnd func()) *Client {
	c := &Client{Client: base, notifier: n, onEnd: onEnd}
	c.auth.Store(guest)
	n.conns.Start(&c.conn, owner{c}, base.Id())
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
	if key != apis.RealtimeClientAuthKey {
		c.Client.Set(key, value)
		return
	}
	auth, _ := value.(*core.Record)
	c.authMu.Lock()
	defer c.authMu.Unlock()
	if auth == nil { // a sign-out takes effect before the record is gone
		c.setAuthLocked(nil)
		c.Client.Set(key, value)
		return
	}
	c.Client.Set(key, value) // first, because the user's presence shows fields of the record
	c.setAuthLocked(auth)
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
	if key == apis.RealtimeClientAuthKey && c.identity().isGuest() {
		return nil
	}
	return c.Client.Get(key)
}

// setAuthLocked sets the client's auth record. authMu is held.
func (c *Client) setAuthLocked(auth *core.Record) {
	switch isComing := c.coming != (coming{}); {
	case auth == nil:
		c.expires = 0
	case isComing && (refOf(auth) == c.coming.user || refOf(auth) != c.auth.Load().user): // not a newer version of who it is
		c.expires = c.coming.expires
	}
	after := identityOf(auth, c.expires)
	before := c.auth.Swap(after)
	if before.user == after.user { // still a guest, or a newer version of the same record
		c.refreshPresence()
		return
	}
	if !before.isGuest() {
		c.conn.EndIfPrivate(DisconnectAuthEnded)
	}
	c.subsMu.Lock()
	isOver := c.unlisted
	c.subsMu.Unlock()
	if isOver {
		after = guest
	} else if c.carrier != nil {
		c.carrier.Identified(after.name())
	}
	c.notifier.index.setUser(c, before.user, after.user)
	c.subsMu.Lock()
	c.attend()
	c.subsMu.Unlock()
	c.authChanged()
}

// coming is a user as whom the client may be signed in next. It is guarded by Client.authMu.
type coming struct {
	user    userRef
	expires int64 // in Unix seconds, 0 means never
}

// ExpectAuth calls next, which may set auth as the client's auth record, or another one in its place, with a token that
// expires at the time; the zero time means never. If next does not, nothing changes.
// After that time the client counts as a guest, and its connection is closed within a second, so that
// its SDK returns with its current token.
func (c *Client) ExpectAuth(auth *core.Record, expires time.Time, next func() error) error {
	if auth == nil {
		return next()
	}
	expect := func(who coming) {
		c.authMu.Lock()
		defer c.authMu.Unlock()
		c.coming = who
	}
	who := coming{user: refOf(auth)}
	if !expires.IsZero() {
		who.expires = expires.Unix()
	}
	expect(who)
	defer expect(coming{})
	return next()
}

// SetTimeouts limits how long the connection lasts, and how long it lasts without a message. Zero
// means no limit.
func (c *Client) SetTimeouts(lifetime, idle time.Duration) { c.conn.SetTimeouts(lifetime, idle) }

// Register puts the client into PocketBase's broker, where its subscriptions can be set and other
// code finds it. It leaves the broker when it ends.
//
// as is what other code finds there: the client itself or its wrapper.
func (c *Client) Register(as subscriptions.Client) {
	broker := c.notifier.app.SubscriptionsBroker()
	broker.Register(as)
	c.counted.in(&c.notifier.registered)
	if c.IsDiscarded() { // before it was there to be taken out
		broker.Unregister(c.Id())
	}
}

// Unlist keeps the client out of the index, so it gets no messages. It is for a client that other
// code has replaced with a client of its own, which gets the messages instead.
func (c *Client) Unlist() { c.unlist() }

// Connected returns when the connection began.
func (c *Client) Connected() time.Time { return c.conn.Begun() }

// Done is closed when the connection has ended and is fully cleaned up.
func (c *Client) Done() <-chan struct{} { return c.conn.Done() }

// Queued returns the number of messages that wait to be written.
func (c *Client) Queued() int { return c.conn.Queued() }

// Close ends the connection at once; what is queued is not written. The SDK on the other side will
// reconnect. why appears in logs and metrics.
func (c *Client) Close(why Disconnect) { c.conn.End(why) }

// Finish ends the connection once everything queued has been written, or after a minute. Nothing
// more is queued from now on.
func (c *Client) Finish(why Disconnect) { c.conn.Finish(why) }

// Discard implements [subscriptions.Client]: it ends the connection.
func (c *Client) Discard() {
	c.counted.out(&c.notifier.registered) // before the broker removes it, see Notifier.foreignClients
	c.conn.End(DisconnectUnregistered)
}

// IsDiscarded implements [subscriptions.Client].
func (c *Client) IsDiscarded() bool { return c.conn.HasEnded() }

// TakeConn makes peer, whose request has been read, the client's connection. It writes head (the
// response's head) and PocketBase's connect event, then what is queued. From now on the client owns
// peer and closes it.
func (c *Client) TakeConn(peer net.Conn, head []byte) {
	m := c.ConnectMessage()
	c.output().Take(peer, conn.NewEncodedFrame(m.Name, m.Data, append(head, EncodeSSE(c.Id(), m.Name, m.Data)...)))
}

// ServeStream writes PocketBase's connect event and then what is queued to response. It returns
// when the connection has ended because ctx ended, a write failed or the client was closed. The
// error comes from one of response's methods.
func (c *Client) ServeStream(ctx context.Context, response Response) error {
	m := c.ConnectMessage()
	return c.output().Serve(ctx, response, conn.NewEncodedFrame(m.Name, m.Data, EncodeSSE(c.Id(), m.Name, m.Data)))
}

// output returns the connection that writes what is sent to c.
func (c *Client) output() *conn.Conn {
	if both := c.pair.Load(); both != nil {
		return &both.below
	}
	return &c.conn
}

// connectName is the name of PocketBase's first event.
const connectName = "PB_CONNECT"

// ConnectMessage is PocketBase's first event on a connection; it gives the SDK its client id. Its
// frame is the only one with an id field.
func (c *Client) ConnectMessage() subscriptions.Message {
	return subscriptions.Message{Name: connectName, Data: []byte(`{"clientId":"` + c.Id() + `"}`)}
}

// EncodeSSE returns an SSE event in the form that PocketBase writes, with an id field unless id is
// empty. Line breaks in data become further data fields; name must have none.
func EncodeSSE(id, name string, data []byte) []byte { return conn.EncodeSSE(id, name, data) }

// Send queues m. It does not block. PocketBase sends record events this way, and has checked them
// against the client's auth record.
func (c *Client) Send(m subscriptions.Message) {
	if m.Name == "" || !safeKey(m.Name) {
		return
	}
	var result conn.Outcome
	if both := c.pair.Load(); both != nil {
		result = c.passOn(both, m)
	} else {
		result = c.putMessage(&c.conn, m)
	}
	if result >= conn.Queued {
		c.conn.NoteMessage(c.notifier.conns.Now())
	}
}

// putMessage queues a message of other code on output, which is c's, unless handlers want to see it
// and cannot any more.
func (c *Client) putMessage(output *conn.Conn, m subscriptions.Message) conn.Outcome {
	if c.endIfUnseen(output) {
		return conn.Gone
	}
	return output.Put(conn.NewFrame(m.Name, m.Data, true))
}

// endIfUnseen ends the connection if handlers want to see what is written to output and cannot:
// it was taken before they wanted to.
func (c *Client) endIfUnseen(output *conn.Conn) bool {
	if !c.notifier.hooked() || !output.IsTaken() {
		return false
	}
	c.conn.Finish(DisconnectHandlers)
	return true
}

// owner is what a client's connection reports to. It has its own type so that its methods are not
// the client's.
type owner struct{ client *Client }

var _ conn.Owner = owner{}

// Tick implements [conn.Owner].
func (o owner) Tick(wall time.Time, now int64) {
	c := o.client
	if c.beat.load() != beatNone {
		c.notifier.sendBeat(c, now)
	}
	if who := c.auth.Load(); who.at(wall.Unix()) != who {
		c.Close(DisconnectTokenExpired)
		c.Unset(apis.RealtimeClientAuthKey)
	}
	c.endIfUnseen(&c.conn)
}

// Ended implements [conn.Owner].
func (o owner) Ended(why Disconnect, undelivered int) {
	c, n := o.client, o.client.notifier
	c.unlist()
	defer func() { // also if other code panics
		if c.onEnd != nil {
			c.onEnd()
		}
		if c.carrier != nil {
			c.carrier.Ended()
		}
		n.stats.ended(why.Reason, undelivered)
		c.logEnd(why, undelivered)
	}()
	isRegistered := false
	if registered, err := n.app.SubscriptionsBroker().ClientById(c.Id()); err == nil {
		isRegistered = n.own(registered) == c
	}
	undelivered += c.endBelow(why)
	c.counted.out(&n.registered)
	c.Client.Discard()
	if isRegistered { // last: a wrapper's Discard may do anything
		n.app.SubscriptionsBroker().Unregister(c.Id())
	}
}

func (c *Client) logEnd(why Disconnect, undelivered int) {
	level := slog.LevelDebug
	switch why {
	case DisconnectQueueFull, DisconnectTooSlow, DisconnectUnexpected, DisconnectFailed, DisconnectHandlers:
		level = slog.LevelWarn
	}
	c.notifier.app.Logger().Log(context.Background(), level, "Realtime connection closed",
		slog.String("clientId", c.Id()), slog.Int("code", why.Code), slog.String("reason", why.Reason),
		slog.Int("undelivered", undelivered))
}

// counted says whether a client is counted as one in PocketBase's broker: not yet, now or no more.
type counted struct{ state atomic.Int32 }

// in counts the client in total, unless it was counted before.
func (c *counted) in(total *atomic.Int64) {
	if c.state.CompareAndSwap(0, 1) {
		total.Add(1)
	}
}

// out takes the client out of total for good.
func (c *counted) out(total *atomic.Int64) {
	if c.state.Swap(2) == 1 {
		total.Add(-1)
	}
}
