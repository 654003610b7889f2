// Clients whose connections another process holds, an edge: see the package origin. To everything else here they are
// clients like others.

package notify

import (
	"maps"
	"net/http"
	"slices"
	"strings"

	"herald/notify/internal/conn"
	"herald/notify/internal/sets"
)

// Carrier is the way to a client that is connected to an edge. Its methods must not block, except one.
type Carrier interface {
	// Edge is the name of the edge.
	Edge() string
	// Subscribing is called when a request may change who the client is, or what it is subscribed to.
	Subscribing()
	// Subscribed is called when the client's subscriptions, or who it is, may have changed by that.
	Subscribed(c *Client, request *http.Request)
	// Bound is called when code of the application has subscribed the client to something, unless it does so whenever
	// the client subscribes: what it did in one process cannot be repeated in another one.
	Bound()
	// Unsubscribed is called when the client has lost keys that it had.
	Unsubscribed(keys []string)
	// AwaitOthers waits, if the client is admitted again after a restart, until the others are that were there with it.
	// Unlike the other methods it may block.
	AwaitOthers()
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

// FullAt notes that the client does not read.
func (c *Client) FullAt() { c.output().FullAt() }

// IsGuest reports whether the client has no valid auth record.
func (c *Client) IsGuest() bool { return c.identity().isGuest() }

// Standing is what the edge keeps of a client, to bring it back after a restart.
type Standing struct {
	Keys []string // that the client has requested
	Own  []string // that code of the application has subscribed it to along with these
	// Positions are those, by key, from which on messages count.
	Positions map[string]Position
	Unstored  bool // some keys are of topics whose messages cannot be had later
}

// carried is what a client that an edge holds has beside others. It is guarded by Client.subsMu.
type carried struct {
	requests  int                 // calls of Carried in progress
	resumes   map[string]Position // where keys continue that are subscribed during these, see ResumeAt
	isChanged bool                // the edge must be told of the fields below
	positions map[string]Position // of what was subscribed during these
	unstored  bool
	requested sets.Of[string] // keys
	own       sets.Of[string] // keys that code of the application has subscribed; some may be gone
}

// Carried calls next, the handlers of a request to subscribe, and then tells the edge what it needs to bring the client
// back: this request is handled again then. So what its handlers subscribe the client to is not lost.
func (c *Client) Carried(request *http.Request, next func() error) error {
	c.subsMu.Lock()
	c.carried.requests++
	c.subsMu.Unlock()
	defer func() {
		c.subsMu.Lock()
		if c.carried.requests--; c.carried.requests == 0 {
			c.carried.resumes = nil
		}
		isChanged := c.carried.isChanged
		c.subsMu.Unlock()
		if isChanged {
			c.carrier.Subscribed(c, request)
		}
	}()
	return next()
}

// TakeStanding returns what the edge must know. Positions that it has returned before are left out.
func (c *Client) TakeStanding() *Standing {
	c.resubscribing.Lock() // else it may have none, for the moment
	keys := c.Keys()
	c.resubscribing.Unlock()
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	k := &c.carried
	standing := &Standing{Positions: k.positions, Unstored: k.unstored}
	k.isChanged, k.positions, k.unstored = false, nil, false
	own := sets.Of[string]{}
	for _, key := range keys {
		if topic := topicOf(key); !isSystemTopic(topic) && !c.notifier.HasHistory(topic) {
			standing.Unstored = true
		}
		if k.own.Has(key) && !k.requested.Has(key) {
			own.Add(key)
			standing.Own = append(standing.Own, key)
		} else {
			standing.Keys = append(standing.Keys, key)
		}
	}
	k.own = own
	return standing
}

// Requested notes that the client requests keys and nothing else. They are about to be subscribed. It waits for the
// history, and so for the disk. Call it within [Client.Carried].
func (c *Client) Requested(keys []string) {
	c.noteHeads(keys)
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.carried.requested = sets.From(keys)
}

// subscribing notes that code of the application is about to subscribe the client to keys.
func (c *Client) subscribing(keys []string) {
	c.subsMu.Lock()
	isReplace, isRepeated := c.resubscribe, c.carried.requests > 0
	c.subsMu.Unlock()
	switch {
	case isReplace:
	case isRepeated:
		c.noteHeads(keys)
		c.subsMu.Lock()
		defer c.subsMu.Unlock()
		if c.carried.own == nil {
			c.carried.own = sets.Of[string]{}
		}
		for _, key := range keys {
			c.carried.own.Add(key)
		}
	default:
		c.carrier.Bound()
	}
}

// noteHeads notes from where on messages count under those of keys that are new to the client. A key that says itself
// where it begins has no position.
func (c *Client) noteHeads(keys []string) {
	n := c.notifier
	c.subsMu.Lock()
	known, resumes := c.knownKeys(), c.carried.resumes
	c.subsMu.Unlock()
	positions, unstored := map[string]Position{}, false
	for _, key := range keys {
		topic := topicOf(key)
		_, isKnown := known[key]
		_, isResumed := resumes[key]
		switch {
		case isSystemTopic(topic):
		case !n.HasHistory(topic):
			unstored = true
		case isKnown, isResumed:
		case newReplay(topic, optionsOf(key)) == nil:
			if head, err := n.history.Settled(topic); err == nil && head.Epoch != "" {
				positions[key] = head
			} else {
				unstored = true
			}
		}
	}
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	k := &c.carried
	maps.Copy(positions, k.positions) // the earlier ones
	k.isChanged, k.positions, k.unstored = true, positions, k.unstored || unstored
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
