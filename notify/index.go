// The index maps topics to their subscribers and users to their connections. The clients themselves
// maintain it (client.go); the fan-out reads it. PocketBase's broker stays the registry of
// connections. Thanks to the index, a message's cost grows with its recipients, not with everyone
// connected.

package notify

import (
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// index finds our clients by topic and by user.
type index struct {
	seed    maphash.Seed
	stripes [256]stripe

	usersMu sync.RWMutex // guards users; nothing else is locked under it
	users   map[userRef][]*Client

	subscriptions atomic.Int64
	guests        atomic.Int64 // keys granted to a guest by a rule that looks at the auth record
}

// stripe holds the topics that share one hash.
//
// Its lock is held while a message of such a topic goes into the queues, so that all subscribers of
// a topic see the same order. Only the locks of clients' queues are taken under it, and nothing
// waits for a subscriber.
type stripe struct {
	mu          sync.Mutex
	subscribers map[string][]*subscription // by topic
}

// subscription is the subscription of one client to one topic.
type subscription struct {
	client *Client
	topic  string

	attendance *attendance // nil if it does not count for the presence on its topic; guarded by the client's subsMu

	// guarded by the lock of the topic's stripe; keys is written only with the client's subsMu held
	// as well
	keys []subscriptionKey // replaced, never changed
	at   int               // position among the topic's subscribers; -1 if it has ended
}

// subscriptionKey is a key by which a client is subscribed to a topic.
type subscriptionKey struct {
	name     string // the topic itself, or with options
	envelope bool   // the subscriber wants the message with its envelope
	hides    bool   // the subscriber is not to be listed among who is present
	grant    grant
	replay   *replay // nil if it asked for no history
}

func newIndex() *index {
	return &index{seed: maphash.MakeSeed(), users: map[userRef][]*Client{}}
}

func (x *index) stripe(topic string) *stripe {
	return &x.stripes[maphash.String(x.seed, topic)%uint64(len(x.stripes))]
}

func (x *index) add(s *subscription) {
	stripe := x.stripe(s.topic)
	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	if stripe.subscribers == nil {
		stripe.subscribers = map[string][]*subscription{}
	}
	s.at = len(stripe.subscribers[s.topic])
	stripe.subscribers[s.topic] = append(stripe.subscribers[s.topic], s)
	x.subscriptions.Add(1)
	x.guests.Add(guestKeys(s.keys))
}

func (x *index) setKeys(s *subscription, keys []subscriptionKey) {
	stripe := x.stripe(s.topic)
	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	x.guests.Add(guestKeys(keys) - guestKeys(s.keys))
	s.keys = keys
}

// guestKeys counts the keys that are granted to guests only.
func guestKeys(keys []subscriptionKey) (count int64) {
	for i := range keys {
		if g := &keys[i].grant; g.forUser && g.user == (userRef{}) {
			count++
		}
	}
	return count
}

func (x *index) remove(s *subscription) {
	stripe := x.stripe(s.topic)
	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	all := stripe.subscribers[s.topic]
	last := len(all) - 1
	all[s.at] = all[last]
	all[s.at].at = s.at
	all[last] = nil
	s.at = -1
	if last == 0 {
		delete(stripe.subscribers, s.topic)
	} else {
		stripe.subscribers[s.topic] = all[:last]
	}
	x.subscriptions.Add(-1)
	x.guests.Add(-guestKeys(s.keys))
}

// clientsOn returns the clients that are subscribed to topic.
func (x *index) clientsOn(topic string) []*Client {
	stripe := x.stripe(topic)
	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	clients := make([]*Client, 0, len(stripe.subscribers[topic]))
	for _, s := range stripe.subscribers[topic] {
		clients = append(clients, s.client)
	}
	return clients
}

// subscribersOf returns the number of clients that are subscribed to topic.
func (x *index) subscribersOf(topic string) int {
	stripe := x.stripe(topic)
	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	return len(stripe.subscribers[topic])
}

// hasSubscribers reports whether any client is subscribed to topic.
func (x *index) hasSubscribers(topic string) bool {
	return x.subscribersOf(topic) > 0
}

// clientsWhere returns the clients subscribed to topics for which match is true. It looks at all
// topics.
func (x *index) clientsWhere(match func(topic string) bool) []*Client {
	var clients []*Client
	for i := range x.stripes {
		stripe := &x.stripes[i]
		stripe.mu.Lock()
		for topic, subscribers := range stripe.subscribers {
			if match(topic) {
				for _, s := range subscribers {
					clients = append(clients, s.client)
				}
			}
		}
		stripe.mu.Unlock()
	}
	return clients
}

// topics returns the number of topics that have subscribers.
func (x *index) topics() int {
	count := 0
	for i := range x.stripes {
		stripe := &x.stripes[i]
		stripe.mu.Lock()
		count += len(stripe.subscribers)
		stripe.mu.Unlock()
	}
	return count
}

// setUser moves client from the connections of one user to those of another. Either may be a guest,
// who has none.
func (x *index) setUser(client *Client, from, to userRef) {
	x.usersMu.Lock()
	defer x.usersMu.Unlock()
	if from != (userRef{}) {
		left := slices.DeleteFunc(x.users[from], func(c *Client) bool { return c == client })
		if x.users[from] = left; len(left) == 0 {
			delete(x.users, from)
		}
	}
	if to != (userRef{}) {
		x.users[to] = append(x.users[to], client)
	}
}

// clientsOf returns the connections of a user.
func (x *index) clientsOf(user userRef) []*Client {
	x.usersMu.RLock()
	defer x.usersMu.RUnlock()
	return slices.Clone(x.users[user])
}

// clientsIn returns the connections of the users of a collection.
func (x *index) clientsIn(collectionID string) []*Client {
	x.usersMu.RLock()
	defer x.usersMu.RUnlock()
	var clients []*Client
	for user, of := range x.users {
		if user.collectionID == collectionID {
			clients = append(clients, of...)
		}
	}
	return clients
}

// namesOf returns the keys of s as the client knows them.
func (c *Client) namesOf(s *subscription) []string {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	names := make([]string, len(s.keys))
	for i, key := range s.keys {
		names[i] = key.name
	}
	return names
}

// subscriptionTo returns the client's subscription to topic, or nil if it has none.
func (c *Client) subscriptionTo(topic string) *subscription {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	for _, s := range c.subs {
		if s.topic == topic {
			return s
		}
	}
	return nil
}

// own returns our client that client is or wraps. It returns nil if client belongs entirely to
// other code.
func (n *Notifier) own(client subscriptions.Client) *Client {
	if c, ok := client.(*Client); ok {
		return c
	}
	if client == nil {
		return nil
	}
	c, _ := n.wrapped.Load(client.Id())
	own, _ := c.(*Client)
	return own
}
