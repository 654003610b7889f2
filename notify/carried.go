// Clients whose connections another process holds, an edge: see the package origin. To everything else here they are
// clients like others.

package notify

import (
	"net/http"
	"slices"
	"strings"

	"herald/notify/internal/conn"
	"herald/notify/internal/sets"
)

// Carrier is the way to a client that is connected to an edge. Expect and AwaitOthers may block, the others must not.
type Carrier interface {
	// Edge is the name of the edge.
	Edge() string
	// Expect is called before a request can change who the client is, or what it is subscribed to. An error means that the
	// edge does not answer, and that the request must do nothing. Calls for a request that one has returned have no effect.
	Expect(request *http.Request) (Expected, error)
	// Identified is called when the client has become another user, or "" for a guest.
	Identified(user string)
	// Subscribed is called when requests have changed what the client is subscribed to, in the order in which they do:
	// by is the one by which it is as it is.
	Subscribed(by *Replacement, standing *Standing)
	// Owned is called when code of the application has subscribed the client to keys while a request of the client was
	// handled. It does that again when the request is.
	Owned(keys []string, heads Heads)
	// Bound is called when code of the application has subscribed the client to something at another time: what it did in
	// one process cannot be repeated in another one.
	Bound()
	// Unsubscribed is called when the client has lost keys that it had.
	Unsubscribed(keys []string)
	// Line is what carries to the edge what other code writes to the connection.
	Line() *Line
	// AwaitOthers waits, if the client is admitted again after a restart, until the others are that were there with it.
	AwaitOthers()
	// Ended is called once, when the client has ended.
	Ended()
}

// Expected is a request that the edge knows of.
type Expected struct {
	Request *http.Request // to go on with
	Handled func()        // to call when it has been handled
	Waited  bool          // time has passed: what was known of the request's auth and of the client may be out of date
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

// NewTrunk returns a trunk for clients of one edge, whose queues there hold size messages with bytes bytes.
func (n *Notifier) NewTrunk(size, bytes int) *conn.Trunk { return n.conns.NewTrunk(size, bytes) }

// EndAt ends a client that has ended at its edge. undelivered is how many messages waited there.
func (c *Client) EndAt(why Disconnect, undelivered int) {
	c.notifier.stats.dropped.Add(int64(undelivered))
	c.output().EndAt(why)
	c.conn.End(why) // where that is another one: with this reason, before the request's end gives one
}

// HasRoomAt notes that the client has room for a page at its edge.
func (c *Client) HasRoomAt() { c.output().HasRoomAt() }

// FullAt notes that the client does not read.
func (c *Client) FullAt() { c.output().FullAt() }

// User is whom the client is signed in as, with a name that [Carrier.Identified] gets; "" if it is a guest.
func (c *Client) User() string { return c.identity().name() }

// Heads are the positions from which on the messages count that a client gets by new subscriptions.
type Heads struct {
	Positions map[string]Position // by key
	Unstored  bool                // some keys are of topics whose messages cannot be had later
}

// Standing is what the edge keeps of a client, to bring it back after a restart.
type Standing struct {
	Keys []string // that the client has requested
	Own  []string // that code of the application has subscribed it to along with these
	Heads
}

// Replacement is what an edge needs to know about a request that replaces the subscriptions of a client. Heads are those from before it.
type Replacement struct {
	Request *http.Request
	Heads   Heads
	Denied  []string // keys that it has requested and that it was told it may not have
}

// carried is what a client that an edge holds has beside others. It is guarded by Client.subsMu.
type carried struct {
	requests int                 // calls of Carried in progress
	resumes  map[string]Position // where keys continue that are subscribed during these, see ResumeAt
	own      sets.Of[string]     // keys that code of the application has subscribed
	replaced bool                // subscriptions have changed during the Resubscribe in progress
}

// Carried calls next, the handlers of a request to subscribe. What code of the application subscribes the client to
// meanwhile, it subscribes again after a restart, when the request is handled again.
func (c *Client) Carried(next func() error) error {
	c.subsMu.Lock()
	c.carried.requests++
	c.subsMu.Unlock()
	defer func() {
		c.subsMu.Lock()
		defer c.subsMu.Unlock()
		if c.carried.requests--; c.carried.requests == 0 {
			c.carried.resumes = nil
		}
	}()
	return next()
}

// signedOut tells the edge that request has made the client a guest, unless it is a user again.
func (c *Client) signedOut(request *http.Request) {
	c.requests.Lock()
	defer c.requests.Unlock()
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if c.User() == "" {
		c.tellCarrier(&Replacement{Request: request})
	}
}

// tellCarrier tells the edge what it needs to bring the client back, by another request like this one. requests and
// subsMu are held.
func (c *Client) tellCarrier(by *Replacement) {
	standing := Standing{Heads: by.Heads}
	for _, key := range c.Keys() {
		standing.Unstored = standing.Unstored || c.isUnstored(key)
		if c.carried.own.Has(key) {
			standing.Own = append(standing.Own, key)
		} else {
			standing.Keys = append(standing.Keys, key)
		}
	}
	c.carrier.Subscribed(by, &standing)
}

// isUnstored reports whether messages under key cannot be had later.
func (c *Client) isUnstored(key string) bool {
	topic := topicOf(key)
	return !isSystemTopic(topic) && !c.notifier.HasHistory(topic)
}

// headsOfOwn returns the Heads of those keys that code of the application is about to subscribe the client to, where
// they matter.
func (c *Client) headsOfOwn(keys []string) Heads {
	c.subsMu.Lock()
	isRepeated, own := c.carried.requests > 0, c.ownOf(keys)
	c.subsMu.Unlock()
	if !isRepeated || len(own) == 0 {
		return Heads{}
	}
	return c.Heads(own)
}

// noteOwn tells the edge that code of the application has subscribed the client to keys. subsMu is held since before
// that.
func (c *Client) noteOwn(keys []string, heads Heads) {
	own := c.ownOf(keys)
	switch {
	case len(own) == 0:
	case c.carried.requests == 0:
		c.carrier.Bound()
	default:
		if c.carried.own == nil {
			c.carried.own = sets.Of[string]{}
		}
		for _, key := range own {
			c.carried.own.Add(key)
			heads.Unstored = heads.Unstored || c.isUnstored(key)
		}
		c.carrier.Owned(own, heads)
	}
}

// ownOf returns those of keys that no request subscribes just now. subsMu is held.
func (c *Client) ownOf(keys []string) []string {
	return slices.DeleteFunc(slices.Clone(keys), func(key string) bool { _, isAdmitted := c.admitted[key]; return isAdmitted })
}

// disown notes that the client is not subscribed to keys any more, or to nothing without keys. subsMu is held.
func (c *Client) disown(keys []string) {
	if len(keys) == 0 {
		c.carried.own = nil
	}
	for _, key := range keys {
		delete(c.carried.own, key)
	}
}

// Heads returns the positions of the topics of keys that are new to the client. A key that says itself where it begins
// has none. It waits for the history, and so for the disk.
func (c *Client) Heads(keys []string) Heads {
	n := c.notifier
	c.subsMu.Lock()
	known, resumes := c.knownKeys(), c.carried.resumes
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

// Lacks reports whether the client is not subscribed to all of keys.
func (c *Client) Lacks(keys []string) bool {
	subscribed := c.Subscriptions()
	return slices.ContainsFunc(keys, func(key string) bool { _, has := subscribed[key]; return !has })
}

// isSystemTopic reports whether what is sent on topic is said again on a new subscription.
func isSystemTopic(topic string) bool {
	return topic == connectName || topic == BeatTopic || topic == DeniedTopic || strings.HasPrefix(topic, PresencePrefix)
}

// ResumeAt makes what is subscribed until the end of [Client.Carried] continue after the positions, by key.
func (c *Client) ResumeAt(positions map[string]Position) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.carried.resumes = positions
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
