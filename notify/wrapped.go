// Clients that a handler of OnRealtimeConnectRequest has put around ours: "e.Client =
// &mine{e.Client}". Made by hooks/connections.go.
//
// The wrapper sees each message in its Send and passes it on. So such a client has two connections
// (internal/conn). Its own is filled like any other's, by the index, the rights and the
// replays; it is "written" by calling the wrapper's Send. What comes out of that, and what
// PocketBase sends, goes to a second connection, which writes it out and has nothing to do with
// topics.

package notify

import (
	"context"
	"time"

	"github.com/pocketbase/pocketbase/tools/routine"
	"github.com/pocketbase/pocketbase/tools/security"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
	"herald/notify/internal/sets"
)

// stockIdleTimeout is PocketBase's: see realtimeConnect in its apis/realtime.go.
const stockIdleTimeout = 5 * time.Minute

// pair is a client that was wrapped, and the connection that writes for it.
type pair struct {
	above       *Client
	below       conn.Conn
	wrapper     subscriptions.Client
	denied      sets.Of[string] // keys of the one above that ended; guarded by its subsMu
	looped      <-chan struct{} // nil: no other code's loop reads a channel
	undelivered int             // by the one below; set before its Done is closed
}

// Ended implements [conn.Owner] for the one below.
func (p *pair) Ended(why Disconnect, undelivered int) {
	p.undelivered = undelivered
	p.above.conn.End(why)
}

// Tick implements [conn.Owner] for the one below.
func (p *pair) Tick(time.Time, int64) { p.above.endIfUnseen(&p.below) }

// Wrap makes messages for c go through wrapper, and reports whether wrapper passes anything on to c
// at all. If readsChannel is true, other code must run a loop that reads the wrapper's own Channel;
// otherwise call TakeConn or ServeStream. Call Wrap before c is served, and after SetTimeouts.
//
// c ends after such a loop, which may still have a message to write. Close looped when the loop has
// ended; c waits for it for less than a second.
func (c *Client) Wrap(wrapper subscriptions.Client, looped <-chan struct{}) (wraps, readsChannel bool) {
	if !c.isReachedBy(wrapper) {
		return false, false
	}
	both := &pair{above: c, wrapper: wrapper, denied: sets.Of[string]{}}
	c.notifier.conns.Start(&both.below, both, c.Id())

	// A wrapper may put a channel of its own before ours, once. If it has done so already, our
	// channel goes on with the messages of the connection below.
	c.channelMu.Lock()
	isRead := c.channel != nil
	if !isRead {
		c.channel = make(chan subscriptions.Message)
	}
	channel := c.channel
	c.channelMu.Unlock()
	c.pair.Store(both)
	isWritten := c.conn.PassOn(&both.below)
	if readsChannel = wrapper.Channel() != channel || isRead; readsChannel {
		both.looped = looped
		if lifetime, idle := c.conn.Timeouts(); idle == lifetime { // there are no heartbeats on this way, to find those who have left
			c.SetTimeouts(lifetime, min(idle, stockIdleTimeout))
		}
		if !isWritten {
			c.writeToChannel(&both.below, channel)
		}
	} else {
		c.channelMu.Lock()
		c.channel = nil // it passes on the messages of nobody
		c.channelMu.Unlock()
	}
	c.notifier.wrapped.Store(c.Id(), c)
	if c.IsDiscarded() { // before it could know of the one below
		both.below.End(DisconnectUnregistered)
		c.notifier.wrapped.Delete(c.Id())
	}
	if run := c.conn.BeginStream(through{c, wrapper}); run != nil {
		go func() {
			defer c.guard("passing messages through a client that wraps another")
			_ = run(context.Background(), nil) // its methods return no errors
		}()
	}
	return true, readsChannel
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

var _ conn.Response = through{}

func (through) Hooked() bool       { return true }
func (through) Write([]byte) error { return nil } // a heartbeat, which the connection handles itself
func (through) Flush() error       { return nil }
func (through) Cut()               {}

func (t through) Deliver(name string, data []byte) error {
	// a panic of other code's Send costs that one message
	_ = routine.SafeWrap(func() error {
		if t.wants(name) {
			t.wrapper.Send(subscriptions.Message{Name: name, Data: data})
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

// passOn takes what has come through the wrapper, or from PocketBase, to the connection. It drops
// messages under a key that was denied in the meantime.
func (c *Client) passOn(both *pair, m subscriptions.Message) conn.Outcome {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if both.denied.Has(m.Name) {
		return conn.Gone
	}
	return c.putMessage(&both.below, m)
}

// loopGrace is how long the end of a client waits for other code's loop. It is over within the second that Shutdown has.
const loopGrace = shutdownGrace * 9 / 10

// endBelow ends the connection that writes for c. If c ended by finishing, that one writes what it
// has first. It returns the number of messages that were not written.
func (c *Client) endBelow(why Disconnect) (undelivered int) {
	both := c.pair.Load()
	if both == nil {
		return 0
	}
	isFinished := c.conn.IsDrained()
	if isFinished {
		both.below.Finish(why)
	} else {
		both.below.End(why)
	}
	<-both.below.Done()
	isFinished = isFinished && both.below.IsDrained() // else the loop is stuck
	if both.looped != nil && isFinished {
		select {
		case <-both.looped:
		case <-time.After(loopGrace):
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
