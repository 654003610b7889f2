// Clients that a handler of OnRealtimeConnectRequest has put around ours: "e.Client =
// &mine{e.Client}". Made by hooks/connections.go.
//
// The wrapper sees each message in its Send and passes it on. So there are two of our clients for
// such a connection. The wrapped one is in the index and has the rights, the queue and the replays
// like any other; it "writes" by calling the wrapper's Send. What comes out of that, and what
// PocketBase sends, goes to a second one, which writes it to the connection and has nothing to do
// with topics.

package notify

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/tools/routine"
	"github.com/pocketbase/pocketbase/tools/security"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/sets"
)

// stockIdleTimeout is PocketBase's: see realtimeConnect in its apis/realtime.go.
const stockIdleTimeout = 5 * time.Minute

// pair is a client that was wrapped, and the one that writes for it.
type pair struct {
	above, below *Client
	wrapper      subscriptions.Client
	handed       atomic.Bool     // the wrapper has had a message that was for the user
	denied       sets.Of[string] // keys of the one above that ended; guarded by its subsMu
	looped       <-chan struct{} // nil: no other code's loop reads a channel
	undelivered  int             // by the one below; set before its done is closed
}

// below returns the client that writes for c, or nil if c writes for itself.
func (c *Client) below() *Client {
	if both := c.pair.Load(); both != nil && both.above == c {
		return both.below
	}
	return nil
}

// above returns the client that c writes for, or nil if it writes for itself.
func (c *Client) above() *Client {
	if both := c.pair.Load(); both != nil && both.below == c {
		return both.above
	}
	return nil
}

// Wrap makes messages for c go through wrapper. It returns the client that writes to the connection
// instead of c: by TakeConn or ServeStream or, if readsChannel is true, through a loop of other
// code that reads the wrapper's own Channel. The client is nil if wrapper passes nothing on to c.
// Call Wrap before c is served, and after SetTimeouts.
//
// c ends after such a loop, which may still have a message to write. Close looped when the loop has
// ended; c waits for it for at most a second.
func (c *Client) Wrap(wrapper subscriptions.Client, looped <-chan struct{}) (writer *Client, readsChannel bool) {
	if !c.isReachedBy(wrapper) {
		return nil, false
	}
	below := &Client{Client: c.Client, notifier: c.notifier, connected: c.connected, done: make(chan struct{}), unlisted: true}
	below.frames = below.inline[:0]
	both := &pair{above: c, below: below, wrapper: wrapper, denied: sets.Of[string]{}}
	below.pair.Store(both)

	// A wrapper may put a channel of its own before ours, once: then it keeps this one. Where
	// it has done so already, it goes on with the one that it has, and so does the pump.
	c.mu.Lock()
	channel := c.channel
	c.mu.Unlock()
	isRead := channel != nil
	if !isRead {
		channel = make(chan subscriptions.Message)
	}
	below.channel = channel
	below.writesToChannel()
	c.pair.Store(both)
	if readsChannel = wrapper.Channel() != channel || isRead; !readsChannel {
		below.mu.Lock()
		below.channel, below.stream, below.wake = nil, nil, nil
		below.mu.Unlock()
	} else {
		both.looped = looped
		if c.idle == c.lifetime { // there are no heartbeats on this way, to find those who have left
			c.idle = min(c.idle, stockIdleTimeout)
		}
		below.startServing(func() {
			if !isRead {
				go below.pump()
			}
		})
		c.mu.Lock()
		c.wakeLocked() // the pump that there is: it goes on with below
		c.mu.Unlock()
	}
	c.notifier.wrapped.Store(c.Id(), c)
	if c.IsDiscarded() { // before it could know of below
		below.end(ReasonUnregistered)
		c.notifier.wrapped.Delete(c.Id())
	}
	go func() {
		defer c.guard("passing messages through a client that wraps another")
		_ = c.serveStream(context.Background(), through{c, wrapper}, below.isReady) // its methods return none
	}()
	return below, readsChannel
}

// isReachedBy reports whether what is done with wrapper is done with c.
func (c *Client) isReachedBy(wrapper subscriptions.Client) bool {
	probe := "herald" + security.PseudorandomString(10)
	wrapper.Set(probe, probe)
	defer wrapper.Unset(probe)
	if c.Client.Get(probe) != probe || wrapper.Id() != c.Id() {
		return false
	}
	wrapper.Subscribe(probe)
	has := c.Client.HasSubscription(probe)
	wrapper.Unsubscribe(probe)
	return has && !c.Client.HasSubscription(probe)
}

// subscriptionsNow returns the subscriptions of c as other code has them.
func (c *Client) subscriptionsNow() map[string]subscriptions.SubscriptionOptions {
	if both := c.pair.Load(); both != nil {
		return both.wrapper.Subscriptions()
	}
	return c.Client.Subscriptions()
}

// through is the "response" to which a wrapped client writes.
type through struct {
	client  *Client
	wrapper subscriptions.Client
}

func (through) Hooked() bool       { return true }
func (through) Write([]byte) error { return nil } // a heartbeat, which the connection handles itself
func (through) Flush() error       { return nil }
func (through) Cut()               {}

func (t through) Deliver(message subscriptions.Message) error {
	if message.Name == connectName {
		return nil // that is written to the connection itself
	}
	// a panic of other code's Send costs that one message
	_ = routine.SafeWrap(func() error {
		if t.wants(message.Name) {
			t.wrapper.Send(message)
		}
		return nil
	})()
	return nil
}

// wants reports whether the wrapper shows the subscription key, of which it may hide some for
// a while. That PocketBase has taken all away for a moment, to replace them, does not count.
func (t through) wants(key string) bool {
	before, isReplacing := t.client.state()
	if _, shows := t.wrapper.Subscriptions(key)[key]; shows || isReplacing {
		return true
	}
	after, isReplacing := t.client.state()
	return isReplacing || before != after
}

// state returns the version of what c is subscribed to, and whether it is being replaced.
func (c *Client) state() (version int, isReplacing bool) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	return c.version, c.resubscribe
}

// isReady waits until little waits to be written by c, which is below another client: that
// one's queue is the connection's. It is false where the connection has ended.
func (c *Client) isReady() bool {
	if !c.awaitRoom() {
		return false
	}
	c.allowExcess() // a message may be larger than the queue
	return true
}

// passOn takes what has come through the wrapper, or from PocketBase, to the connection. It drops
// messages under a key that was denied in the meantime.
func (c *Client) passOn(below *Client, m subscriptions.Message) outcome {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if c.pair.Load().denied.Has(m.Name) {
		return gone
	}
	return below.putMessage(m)
}

// mayGrow reports whether it is not the other side's fault that messages wait for c: that
// takes what is written to it, or it is not known yet that it does not.
func (c *Client) mayGrow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.socket != nil && c.socket.slow == nil {
		return !c.blocked
	}
	return c.isBehind()
}

// top returns the client that has the rights and the queue of a connection.
func (c *Client) top() *Client {
	if above := c.above(); above != nil {
		return above
	}
	return c
}

// endBelow ends the client that writes for c. If c ended by finishing, that client writes what it
// has first. It returns the number of messages that were not written.
func (c *Client) endBelow(reason string) (undelivered int) {
	below, both := c.below(), c.pair.Load()
	if below == nil {
		return 0
	}
	c.mu.Lock()
	isFinished := c.drained
	c.mu.Unlock()
	if isFinished {
		below.Finish(reason)
	} else {
		below.end(reason)
	}
	<-below.done
	below.mu.Lock()
	isFinished = isFinished && below.drained // else the loop is stuck
	below.mu.Unlock()
	if both.looped != nil && isFinished {
		select {
		case <-both.looped:
		case <-time.After(shutdownGrace):
		}
	}
	c.notifier.wrapped.Delete(c.Id())
	return both.undelivered
}

// Own returns our client that client, from PocketBase's broker, is or wraps.
func (n *Notifier) Own(client subscriptions.Client) (*Client, bool) {
	own := n.own(client)
	return own, own != nil
}
