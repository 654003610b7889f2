// What watchers are told: the state when they begin, and then what changes. Called by
// internal/presence when a window is over, and by replay.go.

package notify

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"hash/maphash"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/types"

	"herald/notify/internal/conn"
	"herald/notify/internal/history"
	"herald/notify/internal/presence"
)

// PresencePrefix begins the system topics on which watchers are told who is present:
// "@presence/chat/42" is about "chat/42".
const PresencePrefix = "@presence/"

const (
	// statePage is how many members a state has. The others are fetched: see Notifier.PresenceFor.
	statePage = 100
	// watchersPerSecond bounds how many watchers of one topic are told per second.
	watchersPerSecond = 20_000
)

// presenceMessage is what watchers are told.
type presenceMessage struct {
	Type   string `json:"type"` // state, diff or count
	Epoch  string `json:"epoch"`
	Seq    int64  `json:"seq"`
	Total  int    `json:"total"`
	Guests int    `json:"guests"`

	Members []PresenceMember `json:"members,omitzero"` // of a state
	Next    *string          `json:"next,omitzero"`
	Renew   float64          `json:"renew,omitzero"` // of a state and a count: how often to renew, in seconds

	Join   []PresenceMember `json:"join,omitzero"` // of a diff
	Update []PresenceMember `json:"update,omitzero"`
	Leave  []string         `json:"leave,omitzero"`
}

// PresenceChange is what has changed on a topic, for the application: see Config.OnPresence.
type PresenceChange struct {
	Topic        string
	Join, Update []PresenceMember
	Leave        []string // "COLLECTION:RECORD_ID"
	Total        int      // users present now
	Guests       int      // connections of guests now
}

// teller is held from taking what has changed in a room until it is in the watchers' queues, and
// while a new watcher gets the state. One for the topics of each hash.
type teller struct {
	sync.Mutex
	// the last state that a new watcher got: after a restart the next ones get the same
	topic   string
	seq     int64
	renew   float64
	encoded []byte
}

// state returns the state of a topic, encoded. The teller is locked.
func (t *teller) state(n *Notifier, topic string) []byte {
	state := n.presence.rooms.State(topic, userRef{}, statePage)
	if m := n.stateOf(topic, &state); t.encoded == nil || t.topic != topic || t.seq != m.Seq || t.renew != m.Renew {
		t.topic, t.seq, t.renew, t.encoded = topic, m.Seq, m.Renew, n.encodePresence(m.with(n, &state))
	}
	return t.encoded
}

// message returns the message for watchers about diff, encoded. The teller is locked.
func (t *teller) message(n *Notifier, topic string, diff *presence.Diff[userRef]) []byte {
	if diff.Kind != presence.Changes {
		return t.state(n, topic)
	}
	leave := diff.Leave
	if leave == nil {
		leave = []string{}
	}
	return n.encodePresence(presenceMessage{
		Type: "diff", Epoch: n.presence.epoch, Seq: diff.Seq, Total: diff.Total, Guests: diff.Guests,
		Join: membersOf(diff.Join), Update: membersOf(diff.Update), Leave: leave,
	})
}

var tellingSeed = maphash.MakeSeed()

func (n *Notifier) telling(topic string) *teller {
	return &n.presence.telling[maphash.String(tellingSeed, topic)%uint64(len(n.presence.telling))]
}

// tellPresence tells the watchers of topic, and the application, what has changed.
func (n *Notifier) tellPresence(topic string) {
	defer n.guard("telling who is present")
	lock := n.telling(topic)
	lock.Lock()
	defer lock.Unlock()
	if n.presence.rooms.DueIn(topic) > 0 {
		return // somebody else has just told of the rest
	}

	watchers := n.index.subscribersOf(PresencePrefix + topic)
	terms := presence.Terms{
		Window: max(presence.Window, time.Duration(watchers)*time.Second/watchersPerSecond),
		Limit:  DefaultPresenceLimit,
	}
	if settings := n.presenceOf(topic); settings != nil {
		terms.Limit, terms.Renew = settings.limit, settings.ttl/3
	}
	diff, any := n.presence.rooms.Take(topic, terms)
	if !any {
		return
	}
	if watchers > 0 {
		n.fanOut(n.presencePublication(topic, lock.message(n, topic, &diff)))
	}
	if n.config.OnPresence != nil {
		n.config.OnPresence(PresenceChange{topic, membersOf(diff.Join), membersOf(diff.Update), diff.Leave, diff.Total, diff.Guests})
	}
}

// awaitTold waits until watchers of topic, and the application, have been told of everybody who is there by now, or cancel
// is closed.
func (n *Notifier) awaitTold(topic string, cancel <-chan struct{}) {
	if wait := n.presence.rooms.DueIn(topic); wait > 0 {
		select {
		case <-time.After(wait):
		case <-cancel:
		}
	}
	n.tellPresence(topic)
}

// stateOf returns what watchers have been told so far, for those who have not, without the members.
func (n *Notifier) stateOf(topic string, state *presence.State[userRef]) presenceMessage {
	m := presenceMessage{
		Type: "count", Epoch: n.presence.epoch, Seq: state.Seq, Total: state.Total, Guests: state.Guests, Renew: state.Renew.Seconds(),
	}
	if settings := n.presenceOf(topic); state.Renew == 0 && settings != nil { // nobody there was told yet
		m.Renew = (settings.ttl / 3).Seconds()
	}
	if !state.Numbers {
		m.Type = "state"
	}
	return m
}

// with returns m with the members, if they are to be listed.
func (m presenceMessage) with(n *Notifier, state *presence.State[userRef]) presenceMessage {
	if m.Type == "state" {
		page := n.pageOf(state)
		m.Members, m.Next = page.Members, &page.Next
	}
	return m
}

func (n *Notifier) encodePresence(m presenceMessage) []byte {
	encoded, err := json.Marshal(m)
	if err != nil { // cannot happen: its parts are JSON
		n.app.Logger().Error("Failed to encode who is present", slog.String("error", err.Error()))
	}
	return encoded
}

func (n *Notifier) presencePublication(topic string, data []byte) *publication {
	return &publication{
		Entry: history.Entry{ID: core.GenerateDefaultRandomId(), Topic: PresencePrefix + topic, Time: time.Now(), Data: data},
		to:    &audience{auth: AuthAny},
	}
}

func membersOf(entries []*presence.Entry[userRef]) []PresenceMember {
	members := make([]PresenceMember, len(entries))
	for i, e := range entries {
		since, _ := types.ParseDateTime(time.UnixMilli(e.Since))
		members[i] = PresenceMember{e.Name, jsontext.Value(`"` + since.String() + `"`), e.Connections, e.Fields, e.Meta}
		if e.Meta == nil {
			members[i].Meta = jsontext.Value("null")
		}
	}
	return members
}

// sendState gives a new watcher the state; from then on it gets what changes.
func (c *Client) sendState(p pendingReplay) {
	n, topic := c.notifier, p.topic[len(PresencePrefix):]
	s := c.subscriptionTo(p.topic)
	if s == nil {
		return
	}
	lock := n.telling(topic)
	lock.Lock()
	defer lock.Unlock()
	stripe := n.index.stripe(p.topic)
	isWanted := func() (at int, is bool) {
		at = slices.IndexFunc(s.keys, func(key subscriptionKey) bool { return key.replay == p.replay })
		// else it is live, unsubscribed, about to be denied, or the next grant makes it begin again
		return at, s.at >= 0 && at >= 0 && !p.replay.live && s.keys[at].grant.holds(c.identity())
	}
	stripe.mu.Lock()
	_, is := isWanted()
	stripe.mu.Unlock()
	if !is {
		return
	}
	state := lock.state(n, topic)

	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	at, is := isWanted()
	if !is {
		return
	}
	p.replay.live = true
	c.conn.AllowExcess() // a state may be larger than the queue
	if c.conn.Enqueue(conn.NewFrame(p.name, n.inEnvelope(state, p.topic, s.keys[at].envelope), true)) == conn.Ready {
		n.conns.Write(&c.conn)
	}
}

// inEnvelope returns data in the envelope of a message on topic, if that is wanted.
func (n *Notifier) inEnvelope(data []byte, topic string, isWanted bool) []byte {
	if !isWanted {
		return data
	}
	pub := n.presencePublication(topic[len(PresencePrefix):], data)
	if enveloped, err := pub.envelope(false); err == nil {
		return enveloped
	}
	return data
}
