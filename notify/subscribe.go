// A client's subscriptions, and how they change without a gap.

package notify

import (
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// Subscribe implements [subscriptions.Client].
func (c *Client) Subscribe(keys ...string) {
	var heads Heads
	if c.carrier != nil {
		heads = c.headsOfOwn(keys) // before what is sent meanwhile
	}
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.Client.Subscribe(keys...)
	c.carried.replaced = c.resubscribe
	if c.carrier != nil {
		c.noteOwn(keys, heads)
	}
	c.reindex(c.admitted)
	c.startReplays()
}

// Unsubscribe implements [subscriptions.Client]; without keys it removes all.
func (c *Client) Unsubscribe(keys ...string) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.Client.Unsubscribe(keys...)
	c.disown(keys)
	if c.resubscribe {
		c.carried.replaced = true
		return
	}
	if c.carrier == nil {
		c.reindex(nil)
		return
	}
	known := c.knownKeys()
	c.reindex(nil)
	now := c.knownKeys()
	maps.DeleteFunc(known, func(key string, _ subscriptionKey) bool { _, stays := now[key]; return stays })
	if len(known) > 0 {
		c.carrier.Unsubscribed(slices.Collect(maps.Keys(known)))
	}
}

// Resubscribe calls replace, which must replace the client's subscriptions by an Unsubscribe from
// all and a Subscribe to the admitted keys, as PocketBase does whenever a client adds a topic.
// Until that Subscribe, the client still gets messages by its old keys; otherwise it would miss
// messages between the two calls. What it gets in the meantime is written only once it is known
// that it may have it.
//
// by is what the edge that holds the client is told, if the subscriptions are replaced; nil if none does. The error is [ErrOvertaken],
// and replace has not been called, or that of replace.
func (c *Client) Resubscribe(a *Admission, by *Replacement, replace func() error) error {
	c.requests.Lock()
	defer c.requests.Unlock()
	if c.requests.overtook(a.place, a.who.user) {
		return ErrOvertaken
	}
	c.conn.Hold()
	defer c.conn.Release()

	stale := c.beginResubscribe(a)
	finished := false
	defer func() { // also if replace panics
		stale = c.endResubscribe(a, by) || stale || !finished
		c.notifier.admitted(c, a, stale)
		c.subsMu.Lock()
		defer c.subsMu.Unlock()
		c.startReplays()
	}()
	err := replace()
	finished = err == nil
	return err
}

// beginResubscribe makes the client get messages by its old keys and the admitted ones. It reports
// whether the client may no longer have what it had when it was admitted.
func (c *Client) beginResubscribe(a *Admission) (stale bool) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.resubscribe, c.carried.replaced = true, false
	stale = c.version != a.version
	c.version++
	c.admitted = a.grants
	// If replace signs the client in, there must be no gap in what both identities may have, the
	// one before and the one after.
	meanwhile := map[string]grant{}
	for key, granted := range a.grants {
		meanwhile[key] = grant{byRule: granted.byRule}
	}
	c.reindex(meanwhile)
	return stale
}

// endResubscribe leaves the client with the keys that it has now. It reports whether a check of
// the rules was skipped.
func (c *Client) endResubscribe(a *Admission, by *Replacement) (unchecked bool) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.resubscribe = false
	c.version++
	c.reindex(a.grants)
	c.admitted = nil
	if c.carried.replaced {
		c.requests.tookEffect(a.place)
	}
	if by != nil && c.carried.replaced { // also if something failed afterwards
		c.tellCarrier(by)
	}
	unchecked = c.unchecked
	c.unchecked = false
	return unchecked
}

// SignOut makes the client a guest, if it is none, because of the request of one, and calls next, which may subscribe as a guest. From then
// on the client no longer gets what it had as a user. Subscriptions that a guest may not have end afterwards. The edge that holds
// the client is told of the request if tells is true. The error is [ErrOvertaken], and next has not been called, or that of next.
func (c *Client) SignOut(request *http.Request, tells bool, next func() error) error {
	wasUser, err := c.beginSignOut(request)
	if err != nil {
		return err
	}
	if !wasUser {
		return next()
	}
	defer func() {
		c.countSignOut(-1)
		c.authChanged()
	}()
	if c.carrier != nil && tells { // also if the rest of the request is refused
		c.signedOut(request)
	}
	return next()
}

func (c *Client) beginSignOut(request *http.Request) (wasUser bool, err error) {
	c.requests.Lock()
	defer c.requests.Unlock()
	if err := c.requests.note(placeOf(request.Context()), userRef{}); err != nil {
		return false, err
	}
	if c.Get(apis.RealtimeClientAuthKey) == nil {
		return false, nil
	}
	c.countSignOut(+1)
	c.Unset(apis.RealtimeClientAuthKey)
	return true, nil
}

func (c *Client) countSignOut(by int) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	c.signingOut += by
}

// reindex brings the index up to date with the client's subscriptions. A key gets its grant from
// grants, or keeps its previous one. subsMu is held.
func (c *Client) reindex(grants map[string]grant) {
	wanted := map[string][]subscriptionKey{}
	known := c.knownKeys()
	if !c.unlisted {
		for name, options := range c.subscriptionsNow() {
			if safeKey(name) {
				topic := topicOf(name)
				key, isKnown := known[name]
				if !isKnown {
					key = subscriptionKey{name: name, envelope: wantsEnvelope(options), hides: wantsToHide(options)}
					key.replay = newReplay(topic, options)
					if c.carried.resumes != nil {
						key.replay = c.resume(&key, options)
					}
				}
				granted, isGranted := grants[name]
				if isGranted {
					key.grant = granted
				}
				if key.replay != nil && (!isKnown || isGranted && key.replay.isState) {
					c.replays = append(c.replays, pendingReplay{topic, name, key.replay})
				}
				wanted[topic] = append(wanted[topic], key)
				if both := c.pair.Load(); both != nil {
					delete(both.denied, name)
				}
			}
		}
	}
	c.wantBeats(wanted[BeatTopic], known)
	index := c.notifier.index
	c.subs = slices.DeleteFunc(c.subs, func(s *subscription) bool {
		keys, ok := wanted[s.topic]
		if !ok {
			index.remove(s)
			c.depart(s)
			return true
		}
		delete(wanted, s.topic)
		if slices.ContainsFunc(keys, func(key subscriptionKey) bool { _, isKnown := known[key.name]; return !isKnown }) {
			s.askedAgain(c.notifier.conns.ExactNow())
		}
		if sortKeys(keys); !slices.Equal(keys, s.keys) {
			index.setKeys(s, keys)
		}
		return false
	})
	for topic, keys := range wanted {
		sortKeys(keys)
		s := &subscription{client: c, topic: topic, keys: keys}
		index.add(s)
		c.subs = append(c.subs, s)
	}
	c.attend()
}

// resume returns the replay that key begins with when the client is back after a restart, or nil. subsMu is held.
func (c *Client) resume(key *subscriptionKey, options subscriptions.SubscriptionOptions) *replay {
	at, isResumed := c.carried.resumes[key.name]
	switch {
	case isResumed:
		return &replay{from: Start{Since: &at}, earlier: clientIDsOf(options), plain: !key.envelope}
	case key.replay != nil && key.replay.from.Rewind:
		key.replay.from = Start{} // there was nothing when it rewound, or it would have a position
	case key.replay != nil:
		key.replay.resumes = true
	}
	return key.replay
}

func sortKeys(keys []subscriptionKey) {
	slices.SortFunc(keys, func(a, b subscriptionKey) int { return strings.Compare(a.name, b.name) })
}

// knownKeys returns the keys that the client has, by name. subsMu is held.
func (c *Client) knownKeys() map[string]subscriptionKey {
	known := make(map[string]subscriptionKey, len(c.subs))
	for _, s := range c.subs {
		for _, key := range s.keys {
			known[key.name] = key
		}
	}
	return known
}
