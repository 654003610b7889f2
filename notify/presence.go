// Presence: which users are subscribed to the topics of channels with presence. Clients report it
// whenever their subscriptions, their rights or their user change; internal/presence keeps it.
// presence_watch.go tells the watchers.

package notify

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/picker"
	"github.com/pocketbase/pocketbase/tools/tokenizer"

	"herald/notify/internal/presence"
	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

const (
	// DefaultPresenceLimit is how many members a topic may have before its watchers are only told
	// their number, unless the channel says otherwise.
	DefaultPresenceLimit = 1000
	// DefaultMaxMeta is the default of Config.MaxMeta, and MaxMeta the highest value of it.
	DefaultMaxMeta = 1 << 10
	MaxMeta        = 4 << 10
	// metaRate is how often per second a user may change what they show on the topics of a channel.
	metaRate = 5
)

// presenceSettings are the presence of a channel. They never change after creation.
type presenceSettings struct {
	channelID string
	rule      *rules.Rule // who may watch
	fields    string      // of the auth record, for picker.Pick; empty: none
	limit     int
	ttl       time.Duration // 0: connections need not renew
}

// newPresenceSettings reads a channel's record. The error is about the fields.
func newPresenceSettings(record *core.Record, rule *rules.Rule) (*presenceSettings, error) {
	p := &presenceSettings{
		channelID: record.Id,
		rule:      rule,
		fields:    strings.TrimSpace(record.GetString(channelPresenceFields)),
		limit:     cmp.Or(record.GetInt(channelPresenceLimit), DefaultPresenceLimit),
		ttl:       time.Duration(record.GetInt(channelPresenceTTL)) * time.Second,
	}
	if strings.Contains(p.fields, "expand") {
		return p, errors.New("must be fields of the user, without expand")
	}
	if p.fields != "" {
		if _, err := picker.Pick(map[string]any{}, p.fields); err != nil {
			p.fields = "id"
			return p, err
		}
	}
	return p, nil
}

// unknownField returns the first of fields (see picker.Pick) that no user has, or that is hidden for
// all, or "".
func (n *Notifier) unknownField(fields string) string {
	collections, err := n.authCollections()
	if err != nil || fields == "" {
		return ""
	}
	parts, err := tokenizer.NewFromString(fields).ScanAll() // as Pick does
	if err != nil {
		return fields
	}
	for _, part := range parts {
		name, _, _ := strings.Cut(strings.TrimSpace(part), ".")
		name, _, _ = strings.Cut(name, ":")
		if name == "*" || name == core.FieldNameCollectionId || name == core.FieldNameCollectionName {
			continue
		}
		if !slices.ContainsFunc(collections, func(collection *core.Collection) bool {
			known := collection.Fields.GetByName(name)
			return known != nil && !known.GetHidden()
		}) {
			return name
		}
	}
	return ""
}

// attendances are who is present.
type attendances struct {
	rooms   *presence.Rooms[userRef]
	epoch   string
	telling [64]teller
	isUsed  atomic.Bool // a channel has or had presence

	renewMu  sync.Mutex       // guards the fields below
	renewing sets.Of[*Client] // have to renew somewhere
	renewals *time.Timer      // runs while there are some
	due      int64            // when it ends, by conn.Group.ExactNow
	stopped  bool
}

func (n *Notifier) newAttendances() attendances {
	return attendances{
		epoch:    core.GenerateDefaultRandomId(),
		renewing: sets.Of[*Client]{},
		rooms:    presence.New(presence.Config[userRef]{Compare: compareUsers, Due: n.tellPresence, Grace: presence.Grace}),
	}
}

func compareUsers(a, b userRef) int {
	return cmp.Or(cmp.Compare(a.collectionID, b.collectionID), cmp.Compare(a.id, b.id))
}

// attendance is what a subscription contributes to the presence on its topic. Guarded by the
// client's subsMu.
type attendance struct {
	user      userRef // zero for a guest
	isPresent bool    // rooms has counted user
	hasLeft   bool    // the client asked not to be counted
	hides     bool    // it asked not to be listed when it subscribed
	wasHidden bool    // when it left: the user comes back as they have left

	grace time.Duration // when it leaves

	ttl       time.Duration // within which it has to renew; 0: never
	renewed   int64         // when it did, by conn.Group.ExactNow
	isOverdue bool          // it did not
}

// presenceOf returns the presence of the channel of topic, or nil.
func (n *Notifier) presenceOf(topic string) *presenceSettings {
	set := n.channels.Load()
	if !set.hasPresence || topic == "" {
		return nil
	}
	c, _, found := set.tree.Match(topic)
	if !found || c.presence == nil || n.reserved(topic) != "" {
		return nil
	}
	return c.presence
}

// attend brings what the client contributes up to date with its subscriptions, its rights and its
// user. subsMu is held.
func (c *Client) attend() {
	n := c.notifier
	if !c.attends && !n.channels.Load().hasPresence {
		return
	}
	// while it subscribes it is not known yet who it is; when it has ended, depart says how
	if c.resubscribe || c.conn.HasEnded() {
		return
	}
	who := c.identity()
	renews := false
	c.attends = false
	for _, s := range c.subs {
		c.attendTo(s, who)
		c.attends = c.attends || s.attendance != nil
		renews = renews || s.attendance != nil && s.attendance.ttl > 0
	}
	n.setRenewing(c, renews)
}

// attendTo is attend for one subscription.
func (c *Client) attendTo(s *subscription, who *identity) {
	n := c.notifier
	settings := n.presenceOf(s.topic)
	if settings == nil || !s.holds(who) {
		c.depart(s)
		return
	}
	a := s.attendance
	if a == nil {
		a = &attendance{renewed: n.conns.ExactNow(), ttl: settings.ttl}
		s.attendance = a
	}
	if a.ttl != settings.ttl { // nobody has known of it
		a.ttl, a.renewed, a.isOverdue = settings.ttl, n.conns.ExactNow(), false
	}
	rooms, isAway := n.presence.rooms, a.hasLeft || a.isOverdue
	if a.isPresent && (isAway || a.user != who.user) {
		a.wasHidden = rooms.Leave(s.topic, a.user, a.grace)
		a.isPresent, a.grace = false, 0
	}
	hid := a.hides
	a.hides = s.hides()
	switch {
	case !a.isPresent && !isAway:
		isHidden := a.hides || a.wasHidden && a.user == who.user
		a.user, a.isPresent, a.wasHidden, a.grace = who.user, true, false, 0
		rooms.Join(s.topic, a.user, isHidden, func() (presence.About, presence.Basis) { return n.aboutOf(settings, a.user, n.authOf(c)) })
	case a.isPresent && a.hides && !hid && !who.isGuest():
		rooms.Set(s.topic, a.user, nil, &a.hides)
	}
}

// hides reports whether a key of the subscription asks not to list its user. The client's subsMu is
// held.
func (s *subscription) hides() bool {
	return slices.ContainsFunc(s.keys, func(key subscriptionKey) bool { return key.hides })
}

// holds reports whether who gets messages by the subscription. The client's subsMu is held.
func (s *subscription) holds(who *identity) bool {
	for i := range s.keys {
		if s.keys[i].grant.holds(who) {
			return true
		}
	}
	return false
}

// depart ends what a subscription contributes, at least for now. subsMu is held.
func (c *Client) depart(s *subscription) {
	a := s.attendance
	if a == nil {
		return
	}
	if a.isPresent {
		grace := time.Duration(0)
		if c.isLost() {
			grace = presence.Grace
		}
		a.wasHidden = c.notifier.presence.rooms.Leave(s.topic, a.user, grace)
		a.isPresent = false
	}
	a.ttl = 0
}

// askedAgain lets a subscription that has left, or is overdue, count again: its client has asked for
// the topic anew. subsMu is held.
func (s *subscription) askedAgain(now int64) {
	if a := s.attendance; a != nil {
		a.hasLeft, a.isOverdue, a.renewed = false, false, now
	}
}

// isLost reports whether the client's connection has ended in a way that says nothing about what the
// user wants: they may be back in a moment.
func (c *Client) isLost() bool {
	why, hasEnded := c.conn.Why()
	switch why {
	case DisconnectRequested, DisconnectAuthEnded, DisconnectUnregistered, DisconnectRejected:
		return false
	}
	return hasEnded
}

// refreshPresence tells watchers what has changed in the auth record.
func (c *Client) refreshPresence() {
	n := c.notifier
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if !c.attends {
		return
	}
	auth := n.authOf(c)
	for _, s := range c.subs {
		if a := s.attendance; a != nil && a.isPresent && a.user != (userRef{}) {
			about, basis := n.aboutOf(n.presenceOf(s.topic), a.user, auth)
			n.presence.rooms.Refresh(s.topic, a.user, about, basis)
		}
	}
}

// attendAll is [Client.attend] for all clients, when the channels or the collections have changed.
func (n *Notifier) attendAll() {
	clients := n.attending()
	for client := range clients {
		client.attendAgain(func() {})
	}
	if n.presence.isUsed.Load() {
		// Only after the loop: now every client that joined under the former settings is in a room.
		basisOf := func(topic string, user userRef) presence.Basis { return n.basis.of(n.presenceOf(topic), user) }
		n.presence.rooms.RefreshAll(basisOf, func(topic string, user userRef) (presence.About, presence.Basis) {
			return n.aboutOf(n.presenceOf(topic), user, n.authOfUser(user))
		})
	}
}

// UserChanged must be called when an auth record was changed or deleted (after is nil): it may be of
// somebody whose connection was lost a moment ago, and who is still shown.
func (n *Notifier) UserChanged(before, after *core.Record) {
	if !n.presence.isUsed.Load() {
		return
	}
	user := refOf(before)
	for _, topic := range n.presence.rooms.InGrace(user) {
		if after == nil {
			n.presence.rooms.GiveUpAll(topic, user)
		} else {
			about, basis := n.aboutOf(n.presenceOf(topic), user, after)
			n.presence.rooms.Refresh(topic, user, about, basis)
		}
	}
}

// attendAgain changes what the client contributes.
func (c *Client) attendAgain(change func()) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	change()
	c.attend()
}

// attending returns all clients if one may be present somewhere.
func (n *Notifier) attending() map[*Client]struct{} {
	set := n.channels.Load()
	if set.hasPresence {
		n.presence.isUsed.Store(true)
	}
	if !n.presence.isUsed.Load() {
		return nil
	}
	all := map[*Client]struct{}{}
	for _, client := range n.index.clientsWhere(func(string) bool { return true }) {
		if set.hasPresence || client.mayAttend() {
			all[client] = struct{}{}
		}
	}
	return all
}

func (c *Client) mayAttend() bool {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	return c.attends
}
