// Presence: which users are subscribed to the topics of channels with presence. Clients report it
// whenever their subscriptions, their rights or their user change; internal/presence keeps it.
// presence_watch.go tells the watchers.

package notify

import (
	"cmp"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/picker"

	"herald/notify/internal/presence"
	"herald/notify/internal/rules"
)

const (
	// DefaultPresenceLimit is how many members a topic may have before its watchers are only told
	// their number, unless the channel says otherwise.
	DefaultPresenceLimit = 1000
	// DefaultMaxMeta is the default of Config.MaxMeta, and MaxMeta the highest value of it.
	DefaultMaxMeta = 1 << 10
	MaxMeta        = 4 << 10
	// metaRate is how often per second a user may change what they show on a topic.
	metaRate = 5
)

// presenceSettings are the presence of a channel. They never change after creation.
type presenceSettings struct {
	rule   *rules.Rule // who may watch
	fields string      // of the auth record, for picker.Pick; empty: none
	limit  int
	ttl    time.Duration // 0: connections need not renew
}

// newPresenceSettings reads a channel's record. The error is about the fields.
func newPresenceSettings(record *core.Record, rule *rules.Rule) (*presenceSettings, error) {
	p := &presenceSettings{
		rule:   rule,
		fields: strings.TrimSpace(record.GetString(channelPresenceFields)),
		limit:  cmp.Or(record.GetInt(channelPresenceLimit), DefaultPresenceLimit),
		ttl:    time.Duration(record.GetInt(channelPresenceTTL)) * time.Second,
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

// attendances are who is present.
type attendances struct {
	rooms *presence.Rooms[userRef]
	epoch string
	// telling is held from taking what has changed in a room until it is in the watchers' queues,
	// and while a new watcher gets the state. One for the topics of each hash.
	telling [64]sync.Mutex
	sweep   *time.Timer // runs while a channel wants connections to renew; guarded by sweepMu
	sweepMu sync.Mutex
}

func (n *Notifier) newAttendances() attendances {
	return attendances{
		epoch: core.GenerateDefaultRandomId(),
		rooms: presence.New(presence.Config[userRef]{Compare: compareUsers, Due: n.tellPresence, Grace: presence.Grace}),
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
	hasLeft   bool    // the client asked not to be counted, or has not renewed
	renewed   int64   // by conn.Group.Now
}

// presenceOf returns the presence of the channel of topic, or nil.
func (n *Notifier) presenceOf(topic string) *presenceSettings {
	set := n.channels.Load()
	if !set.hasPresence {
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
	c.attends = false
	for _, s := range c.subs {
		c.attendTo(s, who)
		c.attends = c.attends || s.attendance != nil
	}
}

// attendTo is attend for one subscription.
func (c *Client) attendTo(s *subscription, who *identity) {
	n := c.notifier
	if n.presenceOf(s.topic) == nil || !s.holds(who) {
		c.depart(s)
		return
	}
	a := s.attendance
	if a == nil {
		a = &attendance{renewed: n.conns.Now()}
		s.attendance = a
	}
	if a.isPresent && (a.hasLeft || a.user != who.user) {
		n.presence.rooms.Leave(s.topic, a.user, false)
		a.isPresent = false
	}
	if !a.isPresent && !a.hasLeft {
		a.user, a.isPresent = who.user, true
		n.presence.rooms.Join(s.topic, a.user)
	}
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

// depart ends what a subscription contributes. subsMu is held.
func (c *Client) depart(s *subscription) {
	a := s.attendance
	s.attendance = nil
	if a != nil && a.isPresent {
		c.notifier.presence.rooms.Leave(s.topic, a.user, c.isLost())
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

// refreshPresence makes the fields of the client's user be looked up again.
func (c *Client) refreshPresence() {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	for _, s := range c.subs {
		if a := s.attendance; a != nil && a.isPresent && a.user != (userRef{}) {
			c.notifier.presence.rooms.Refresh(s.topic, a.user)
		}
	}
}

// attendAll is [Client.attend] for all clients, when the channels have changed.
func (n *Notifier) attendAll() {
	for client := range n.attending() {
		client.subsMu.Lock()
		client.attend()
		client.subsMu.Unlock()
	}
	n.sweepLater()
}

// attending returns all clients if one may be present somewhere.
func (n *Notifier) attending() map[*Client]struct{} {
	all := map[*Client]struct{}{}
	set := n.channels.Load()
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

// sweepEveryTTL is how often connections that have not renewed are looked for.
const sweepEveryTTL = time.Second

// sweepLater starts the timer that looks for connections that have not renewed, if a channel has
// a TTL.
func (n *Notifier) sweepLater() {
	hasTTL := false
	for _, c := range n.channels.Load().all {
		hasTTL = hasTTL || c.presence != nil && c.presence.ttl > 0
	}
	p := &n.presence
	p.sweepMu.Lock()
	defer p.sweepMu.Unlock()
	switch {
	case p.sweep == nil && hasTTL:
		p.sweep = time.AfterFunc(sweepEveryTTL, n.sweepAttendances)
	case p.sweep != nil && !hasTTL:
		p.sweep.Stop()
		p.sweep = nil
	}
}

// sweepAttendances takes out those that have not renewed in time.
func (n *Notifier) sweepAttendances() {
	defer n.guard("looking for who has not renewed their presence")
	now := n.conns.Now()
	for client := range n.attending() {
		client.subsMu.Lock()
		for _, s := range client.subs {
			a, p := s.attendance, n.presenceOf(s.topic)
			if a != nil && p != nil && p.ttl > 0 && time.Duration(now-a.renewed) >= p.ttl {
				a.hasLeft = true
			}
		}
		client.attend()
		client.subsMu.Unlock()
	}
	n.presence.sweepMu.Lock()
	defer n.presence.sweepMu.Unlock()
	if n.presence.sweep != nil {
		n.presence.sweep.Reset(sweepEveryTTL)
	}
}

func (n *Notifier) stopPresence() {
	n.presence.rooms.Stop()
	n.presence.sweepMu.Lock()
	defer n.presence.sweepMu.Unlock()
	if n.presence.sweep != nil {
		n.presence.sweep.Stop()
		n.presence.sweep = nil
	}
}

// PresenceUpdate is what a user changes about how they are shown on a topic. A nil part stays as it
// is.
type PresenceUpdate struct {
	// Meta is any JSON of at most Config.MaxMeta bytes; null removes it.
	Meta *jsontext.Value
	// Visible false keeps the user out of the list, while they go on listening.
	Visible *bool
	// ClientID is the connection that this comes from; empty means all of the user's. It counts as
	// present again if it had left, or not renewed in time.
	ClientID string
}

// SetPresence changes how p is shown on topic. If p is not subscribed yet, the change is kept for a
// moment, for when they are. The error is of type [Errors], with the fields "topic", "meta" and
// "clientId", [ErrForbidden] (for guests, too, who are only counted), a [*TooManyError], or comes
// from a query.
func (n *Notifier) SetPresence(p Publisher, topic string, update PresenceUpdate) error {
	if err := n.checkPresence(topic); err != nil {
		return err
	}
	if p.Auth == nil {
		return ErrForbidden
	}
	user := refOf(p.Auth)
	if update.Meta != nil {
		if err := n.checkMeta(*update.Meta); err != nil {
			return Errors{err}
		}
	}
	clients, err := n.attendeesOf(p, update.ClientID)
	if err != nil {
		return err
	}
	if !n.presence.rooms.Has(topic, user) { // else they may: it would have ended otherwise
		if _, err := n.mayListen(p, topic); err != nil {
			return err
		}
	}
	if wait := n.buckets.take(bucketKey{"presence " + topic, p.key()}, metaRate, time.Now()); wait > 0 {
		return &TooManyError{wait}
	}
	if update.Meta != nil || update.Visible != nil {
		var isHidden *bool
		if update.Visible != nil {
			isHidden = new(bool)
			*isHidden = !*update.Visible
		}
		n.presence.rooms.Set(topic, user, update.Meta, isHidden)
	}
	n.markAttendances(clients, topic, false)
	return nil
}

func (n *Notifier) checkMeta(meta jsontext.Value) *FieldError {
	if !meta.IsValid() {
		return invalid("meta", ErrInvalidData, "must be JSON")
	}
	if len(meta) > n.config.MaxMeta {
		return invalid("meta", ErrTooLarge, "must be no larger than %d bytes, has %d", n.config.MaxMeta, len(meta))
	}
	return nil
}

// LeavePresence takes a connection of p (empty: all) out of the presence on topic at once, although
// it stays subscribed, until it calls SetPresence or subscribes anew. The error is as for
// SetPresence.
func (n *Notifier) LeavePresence(p Publisher, topic, clientID string) error {
	if err := n.checkPresence(topic); err != nil {
		return err
	}
	clients, err := n.attendeesOf(p, clientID)
	if err != nil {
		return err
	}
	n.markAttendances(clients, topic, true)
	return nil
}

// checkPresence refuses a topic without presence, as if it was forbidden.
func (n *Notifier) checkPresence(topic string) error {
	if err := n.checkTopic(topic, true); err != nil {
		return Errors{err}
	}
	if n.presenceOf(topic) == nil {
		return ErrForbidden
	}
	return nil
}

// attendeesOf returns the connections of p: the one with an id, or all.
func (n *Notifier) attendeesOf(p Publisher, clientID string) ([]*Client, error) {
	if clientID == "" {
		if p.Auth == nil {
			return nil, Errors{invalid("clientId", ErrRequired, "cannot be blank")}
		}
		return n.index.clientsOf(refOf(p.Auth)), nil
	}
	client, err := n.OwnClient(p, clientID)
	if err != nil {
		return nil, err
	}
	if own := n.own(client); own != nil {
		return []*Client{own}, nil
	}
	return nil, nil
}

// markAttendances lets connections that are subscribed to topic leave or come back.
func (n *Notifier) markAttendances(clients []*Client, topic string, hasLeft bool) {
	for _, client := range clients {
		client.subsMu.Lock()
		for _, s := range client.subs {
			if s.topic == topic && s.attendance != nil {
				s.attendance.hasLeft, s.attendance.renewed = hasLeft, n.conns.Now()
			}
		}
		client.attend()
		client.subsMu.Unlock()
	}
}

// fieldsOf returns the fields of a user that watchers are shown. It takes them from the record that
// a connection of the user has: no query.
func (n *Notifier) fieldsOf(settings *presenceSettings, user userRef) jsontext.Value {
	const none = "{}"
	if settings == nil || settings.fields == "" {
		return jsontext.Value(none)
	}
	for _, client := range n.index.clientsOf(user) {
		auth := n.authOf(client)
		if auth == nil || refOf(auth) != user {
			continue
		}
		picked, err := picker.Pick(auth.Fresh().PublicExport(), settings.fields)
		if err != nil {
			break
		}
		encoded, err := json.Marshal(picked, json.Deterministic(true))
		if err != nil {
			break
		}
		return encoded
	}
	return jsontext.Value(none)
}

// PresenceMember is a user who is present on a topic.
type PresenceMember struct {
	// User is "COLLECTION:RECORD_ID".
	User string `json:"user"`
	// Since is when the first of their connections came.
	Since jsontext.Value `json:"since"`
	// Connections is the number of their connections, including one that was lost a moment ago.
	Connections int `json:"connections"`
	// Fields are those of the auth record that the channel's presenceFields name.
	Fields jsontext.Value `json:"fields"`
	// Meta is what the user's own clients have set; null if nothing.
	Meta jsontext.Value `json:"meta"`
}

// PresencePage is a part of who is present on a topic.
type PresencePage struct {
	Epoch string `json:"epoch"` // new at each start of the server
	Seq   int64  `json:"seq"`   // of the last difference that it includes
	// Total is the number of users, Guests that of connections of guests.
	Total   int              `json:"total"`
	Guests  int              `json:"guests"`
	Members []PresenceMember `json:"members"`
	// Next is the cursor for the next page; empty if this is the last one.
	Next string `json:"next"`
}

// MaxPresencePage is the maximum number of members that [Notifier.Presence] returns.
const MaxPresencePage = 1000

// Presence returns who is present on topic: at most limit members (1 to [MaxPresencePage]) that come
// after cursor, which is empty for the first page. It is what watchers have been told, and at most a
// window behind. It evaluates no rule: see [Notifier.PresenceFor].
func (n *Notifier) Presence(topic, cursor string, limit int) PresencePage {
	state := n.presence.rooms.State(topic, refFrom(cursor), min(max(limit, 1), MaxPresencePage))
	page := PresencePage{n.presence.epoch, state.Seq, state.Total, state.Guests, n.membersOf(state.Members), ""}
	if state.More {
		page.Next = state.Members[len(state.Members)-1].User.String()
	}
	return page
}

// PresenceFor is [Notifier.Presence] for a request of p, to whom the channel's presenceRule applies.
// The error is of type [Errors], with the fields "topic" and "limit", [ErrForbidden] or comes from a
// query.
func (n *Notifier) PresenceFor(p Publisher, topic, cursor string, limit int) (PresencePage, error) {
	if limit < 1 || limit > MaxPresencePage {
		return PresencePage{}, Errors{invalid("limit", ErrOutOfRange, "must be between 1 and %d", MaxPresencePage)}
	}
	if err := n.mayWatch(p, topic); err != nil {
		return PresencePage{}, err
	}
	return n.Presence(topic, cursor, limit), nil
}

// PresenceCountFor is [Notifier.PresenceCount] for a request of p. The error is as for PresenceFor.
func (n *Notifier) PresenceCountFor(p Publisher, topic string) (users, guests int, err error) {
	if err := n.mayWatch(p, topic); err != nil {
		return 0, 0, err
	}
	users, guests = n.PresenceCount(topic)
	return users, guests, nil
}

func (n *Notifier) mayWatch(p Publisher, topic string) error {
	if err := n.checkTopic(topic, true); err != nil {
		return Errors{err}
	}
	a := n.newMemo().mayWatch(topic, p.Auth, "", func() map[string]string { return p.Headers })
	switch {
	case a.err != nil:
		return fmt.Errorf("may watch: %w", a.err)
	case !a.ok:
		return ErrForbidden
	}
	return nil
}

// PresenceCount returns how many users are listed on topic, and how many connections guests have.
func (n *Notifier) PresenceCount(topic string) (users, guests int) {
	counts := n.presence.rooms.Count(topic)
	return counts.Total, counts.Guests
}

// Online reports whether user ("COLLECTION:RECORD_ID") has a realtime connection.
func (n *Notifier) Online(user string) bool {
	ref, err := n.resolveUser("user", user)
	return err == nil && len(n.index.clientsOf(ref)) > 0
}

// PresentOn returns the topics on which user ("COLLECTION:RECORD_ID") is listed, sorted. The error is
// of type [Errors], with the field "user".
func (n *Notifier) PresentOn(user string) ([]string, error) {
	ref, fieldErr := n.resolveUser("user", user)
	if fieldErr != nil {
		return nil, Errors{fieldErr}
	}
	return n.presence.rooms.TopicsOf(ref), nil
}
