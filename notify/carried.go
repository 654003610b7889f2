// Clients whose connections another process holds, an edge: see the package origin. To everything else here they are
// clients like others.

package notify

import (
	"net/http"
	"slices"
	"strings"

	"herald/notify/internal/conn"
)

// Carrier is the way to a client that is connected to an edge. Its methods must not block, except one.
type Carrier interface {
	// Edge is the name of the edge.
	Edge() string
	// Subscribing is called when a request may change who the client is, or what it is subscribed to.
	Subscribing()
	// Subscribed is called when the client's subscriptions, or who it is, may have changed by that.
	Subscribed(c *Client, request *http.Request, heads Heads)
	// Bound is called when code of the application has subscribed the client to something: what it did in one process
	// cannot be repeated in another one.
	Bound()
	// Unsubscribed is called when the client has lost keys that it had.
	Unsubscribed(keys []string)
	// AwaitOthers waits, if the client is admitted again after a restart, until the others are that were there with it. It
	// reports whether there was anything to wait for. Unlike the other methods it may block.
	AwaitOthers() bool
	// Ended is called once, when the client has ended.
	Ended()
}

// SetCarrier says that the client is connected to an edge. Call it before the client is served.
func (c *Client) SetCarrier(carrier Carrier) { c.carrier = carrier }

// Carrier returns what SetCarrier has set, or nil.
func (c *Client) Carrier() Carrier { return c.carrier }

// Relay makes trunk carry what is queued for the client to the connection that has number at the edge: PocketBase's
// connect event unless the client resumes, then the rest.
func (c *Client) Relay(trunk *conn.Trunk, number uint64, resumes bool) {
	var first *conn.Frame
	if !resumes {
		m := c.ConnectMessage()
		first = conn.NewEncodedFrame(m.Name, m.Data, EncodeSSE(c.Id(), m.Name, m.Data))
	}
	c.output().Relay(trunk, number, first)
}

// CanResume reports whether the client can go on in another process, after a restart: not if other code sees its
// messages.
func (c *Client) CanResume() bool { return c.pair.Load() == nil && !c.notifier.hooked() }

// NewTrunk returns a trunk for clients of one edge.
func (n *Notifier) NewTrunk() *conn.Trunk { return n.conns.NewTrunk() }

// EndAt ends a client that has ended at its edge. undelivered is how many messages waited there.
func (c *Client) EndAt(why Disconnect, undelivered int) {
	c.notifier.stats.dropped.Add(int64(undelivered))
	c.output().EndAt(why)
}

// HasRoomAt notes that the client has room for a page at its edge.
func (c *Client) HasRoomAt() { c.output().HasRoomAt() }

// IsGuest reports whether the client has no valid auth record.
func (c *Client) IsGuest() bool { return c.identity().isGuest() }

// Heads are the positions from which on the messages count that a client gets by new subscriptions.
type Heads struct {
	Positions map[string]Position // by key
	Unstored  bool                // some keys are of topics whose messages cannot be had later
}

// Heads returns the positions of the topics of keys that are new to the client. A key that says itself where it begins
// has none. It waits for the history, and so for the disk.
func (c *Client) Heads(keys []string) Heads {
	n := c.notifier
	c.subsMu.Lock()
	known, resumes := c.knownKeys(), c.resumes
	c.subsMu.Unlock()
	heads := Heads{Positions: map[string]Position{}}
	for _, key := range keys {
		topic := topicOf(key)
		_, isKnown := known[key]
		_, isResumed := resumes[key]
		switch {
		case isSystemTopic(topic):
		case !n.HasHistory(topic):
			heads.Unstored = true
		case isKnown, isResumed:
		case newReplay(topic, optionsOf(key)) == nil:
			if head, err := n.history.Settled(topic); err == nil && head.Epoch != "" {
				heads.Positions[key] = head
			} else {
				heads.Unstored = true
			}
		}
	}
	return heads
}

// putMark tells the edge what the client has of the messages under name.
func (c *Client) putMark(name string, mark conn.Mark) {
	if c.conn.Enqueue(conn.NewMarkFrame(name, mark)) == conn.Ready {
		c.notifier.conns.Write(&c.conn)
	}
}

// Misses reports whether messages under one of keys may have been missed by a client that resumes at positions: the topic
// has history, and it is not known which of its messages the client has.
func (c *Client) Misses(keys []string, positions map[string]Position) bool {
	return slices.ContainsFunc(keys, func(key string) bool {
		topic := topicOf(key)
		_, isKnown := positions[key]
		return !isKnown && !isSystemTopic(topic) && c.notifier.HasHistory(topic) && newReplay(topic, optionsOf(key)) == nil
	})
}

// isSystemTopic reports whether what is sent on topic is said again on a new subscription.
func isSystemTopic(topic string) bool {
	return topic == connectName || topic == BeatTopic || topic == DeniedTopic || strings.HasPrefix(topic, PresencePrefix)
}

// ResumeAt makes the next [Client.Resubscribe] continue after the positions, by key.
func (c *Client) ResumeAt(positions map[string]Position) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.resumes = positions
}

// Keys returns the subscription keys of the client, sorted.
func (c *Client) Keys() []string {
	subscribed := c.Subscriptions()
	keys := make([]string, 0, len(subscribed))
	for key := range subscribed {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
