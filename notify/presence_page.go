// Reading who is present. Called by hooks/presence.go, by presence_watch.go and by applications.

package notify

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"fmt"
	"slices"
	"sync"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/picker"

	"herald/notify/internal/presence"
)

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
	return n.pageOf(&state)
}

func (n *Notifier) pageOf(state *presence.State[userRef]) PresencePage {
	page := PresencePage{n.presence.epoch, state.Seq, state.Total, state.Guests, membersOf(state.Members), ""}
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
	if n.presenceOf(topic) == nil {
		return noPresence(p)
	}
	a := n.newMemo().mayWatch(topic, p.Auth, "", p.headers)
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
	topics := n.presence.rooms.TopicsOf(ref)
	slices.Sort(topics)
	return topics, nil
}

// aboutOf returns what watchers are told about a user by the settings of a channel. auth is the
// user's record as one of their connections has it: no query. It may be nil.
func (n *Notifier) aboutOf(settings *presenceSettings, user userRef, auth *core.Record) (presence.About, presence.Basis) {
	about, basis := presence.About{Name: n.nameOf(user), Fields: jsontext.Value("{}")}, n.basis.of(settings, user)
	if settings == nil || settings.fields == "" || auth == nil || refOf(auth) != user {
		return about, basis
	}
	picked, err := picker.Pick(n.upToDate(auth).PublicExport(), settings.fields)
	if err != nil {
		return about, basis
	}
	if encoded, err := json.Marshal(picked, json.Deterministic(true)); err == nil {
		about.Fields = encoded
	}
	return about, basis
}

// bases numbers what a user's presence depends on beside their record: which fields are shown, and
// the collection.
type bases struct {
	app core.App

	mu    sync.Mutex // guards known
	known map[basis]presence.Basis
}

type basis struct {
	fields, collectionID, name, updated string
}

// of returns the basis of a user on a topic with settings; 0 without settings.
func (b *bases) of(settings *presenceSettings, user userRef) presence.Basis {
	if settings == nil {
		return 0
	}
	key := basis{fields: settings.fields, collectionID: user.collectionID}
	if collection, err := b.app.FindCachedCollectionByNameOrId(user.collectionID); err == nil && collection.Id == user.collectionID {
		key.name, key.updated = collection.Name, collection.Updated.String()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	number, isKnown := b.known[key]
	if !isKnown { // as often as somebody edits a channel or a collection
		number = presence.Basis(len(b.known) + 1)
		b.known[key] = number
	}
	return number
}

// upToDate returns a copy of record as its collection is now: a field may have been hidden, renamed
// or removed since it was read.
func (n *Notifier) upToDate(record *core.Record) *core.Record {
	before := record.Collection()
	collection, err := n.app.FindCachedCollectionByNameOrId(before.Id)
	if err != nil || collection.Id != before.Id || collection == before {
		return record.Fresh()
	}
	current := core.NewRecord(collection)
	current.MarkAsNotNew()
	for _, field := range collection.Fields {
		if known := before.Fields.GetById(field.GetId()); known != nil {
			current.SetRaw(field.GetName(), record.GetRaw(known.GetName()))
		}
	}
	return current
}

// authOfUser returns the record of a user as one of their connections has it, or nil.
func (n *Notifier) authOfUser(user userRef) *core.Record {
	for _, client := range n.index.clientsOf(user) {
		if auth := n.authOf(client); auth != nil && refOf(auth) == user {
			return auth
		}
	}
	return nil
}
