// What a client has missed: pages of a topic's history, of which it gets what is
// meant for it. Called by replay.go for subscriptions and by hooks/history.go.

package notify

import (
	"context"
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"slices"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/history"
	"herald/notify/internal/sets"
)

const (
	// MaxHistoryPage is how many messages [Notifier.History] returns at most.
	MaxHistoryPage = 1000
	// maxPageBytes is how many bytes of data a page has at most, but for its last
	// message.
	maxPageBytes = 256 << 10
)

// HistoryPage is a part of a topic's history.
type HistoryPage struct {
	// Items are messages in their envelopes, oldest first: of those that are kept
	// the ones that are meant for who asks.
	Items []jsontext.Value `json:"items"`
	// Epoch and Head tell the position of the topic's last message. Epoch is empty
	// where the topic has no history.
	Epoch string `json:"epoch"`
	Head  int64  `json:"head"`
	// Complete is false where messages between the position asked for and the
	// first item may be missing, since they are not kept any more.
	Complete bool `json:"complete"`
	// Next is the position to ask for next. The page reaches the topic's head
	// when its number is Head.
	Next string `json:"next"`
	// Beat is how often the server sends an event on [BeatTopic] to who subscribes to
	// it, in seconds; 0: never.
	Beat float64 `json:"beat"`
}

// History returns messages of topic, from a start on, that p may have: up to limit
// (1 to [MaxHistoryPage]) and 256 KiB of data. A position of another epoch is the
// oldest message that is kept, but not complete.
//
// The rule is the one for subscribing. The error is of type [Errors], with the
// fields "topic" and "limit", [ErrForbidden], [ErrHistory] or that of a query.
func (n *Notifier) History(ctx context.Context, p Publisher, topic string, from Start, limit int) (*HistoryPage, error) {
	if err := n.checkTopic(topic, false); err != nil {
		if errors.Is(err, ErrReservedTopic) && !p.isSuperuser() {
			return nil, ErrForbidden // which names are the server's, nobody is told
		}
		return nil, Errors{err}
	}
	if limit < 1 || limit > MaxHistoryPage {
		return nil, Errors{invalid("limit", ErrOutOfRange, "must be between 1 and %d", MaxHistoryPage)}
	}
	generation, err := n.mayListen(p, topic)
	if err != nil {
		return nil, err
	}
	page, err := n.history.Read(topic, from, limit, maxPageBytes)
	if err != nil {
		return nil, err
	}
	answer := &HistoryPage{Items: []jsontext.Value{}, Epoch: page.Epoch, Head: page.Head, Complete: page.Complete, Beat: max(n.config.Heartbeat, 0).Seconds()}
	if page.Epoch != "" {
		answer.Next = page.Next().String()
	}
	see := n.newViewer(ctx, p.Auth, "", p.ClientIDs)
	for _, entry := range page.Entries {
		pub := storedPublication(entry)
		verdict, err := see.sees(pub)
		if err != nil {
			return nil, err
		}
		if verdict != forViewer {
			answer.Complete = answer.Complete && verdict != forWhom
			continue
		}
		pub.from = n.nameOf(pub.sender)
		item, err := pub.envelope(false)
		if err != nil {
			return nil, err
		}
		answer.Items = append(answer.Items, item)
	}
	// What was read may have been sent after p has lost the right to it. A change
	// that is under way may be committed already.
	if n.changes.quietSince(generation) {
		return answer, nil
	}
	if p.Auth, err = n.newMemo().user(p.Auth); err != nil {
		return nil, err
	}
	_, err = n.mayListen(p, topic)
	return answer, err
}

// mayListen asks the subscribe rule of topic for a request. The generation is of
// changes of rights, as it was before.
func (n *Notifier) mayListen(p Publisher, topic string) (generation uint64, err error) {
	generation = n.changes.current()
	c, values := n.channelOf(topic)
	if c == nil {
		if n.config.Strict && !p.isSuperuser() {
			return 0, ErrForbidden
		}
		return generation, nil
	}
	allowed, err := n.passes(c, c.subscribe, values, p.Auth, p.Headers)
	switch {
	case err != nil:
		return 0, fmt.Errorf("ask the subscribe rule of %q: %w", c.pattern.Text, err)
	case !allowed:
		return 0, ErrForbidden
	}
	return generation, nil
}

// storedPublication returns a message as it was stored, of which the audience is not read yet.
func storedPublication(entry *history.Entry) *publication {
	return &publication{Entry: *entry, sender: refFrom(entry.Sender)}
}

// viewer tells which stored messages are meant for somebody. It asks each filter
// once.
type viewer struct {
	n        *Notifier
	ctx      context.Context
	auth     *core.Record // nil: a guest
	clientID string       // empty: not on a realtime connection
	earlier  []string     // ids of connections that it says it has had
	filters  map[viewedFilter]verdictOf
}

type viewedFilter struct{ text, meaning string }

// verdictOf is whether a stored message is meant for a viewer.
type verdictOf int

const (
	forOthers verdictOf = iota
	forViewer
	forWhom // cannot be told any more: it is not shown, and missing
)

func (n *Notifier) newViewer(ctx context.Context, auth *core.Record, clientID string, earlier []string) *viewer {
	return &viewer{n: n, ctx: ctx, auth: auth, clientID: clientID, earlier: earlier, filters: map[viewedFilter]verdictOf{}}
}

// sees reports whether pub is meant for the viewer, by the auth record as it is
// now. The error is that of a filter's query.
func (v *viewer) sees(pub *publication) (verdictOf, error) {
	if pub.Audience == nil {
		return forViewer, nil
	}
	stored, to := readStored(pub.Audience)
	if to == nil {
		return forWhom, nil
	}
	pub.to = to
	switch {
	case to.clients != nil && !to.clients.Has(v.clientID) && !v.hadOneOf(stored.ClientUsers):
		return forOthers, nil
	case to.exceptClients.Has(v.clientID) || slices.ContainsFunc(v.earlier, to.exceptClients.Has):
		return forOthers, nil
	case to.looksAtAuth && !to.matchAuth(v.auth):
		return forOthers, nil
	case (to.collections != nil || stored.FilterOn != nil) && v.auth != nil && v.auth.Collection().Created.Time().After(pub.Time):
		// PocketBase makes ids of collections from their names: this is another
		// collection of the id, the one that was meant is gone
		return forOthers, nil
	case stored.FilterOn == nil:
		return forViewer, nil
	case v.auth == nil:
		return forOthers, nil
	}
	meaning, applies := stored.FilterOn[v.auth.Collection().Id]
	if !applies {
		return forOthers, nil
	}
	key := viewedFilter{stored.Filter, meaning}
	verdict, known := v.filters[key]
	if !known {
		var err error
		if verdict, err = v.passes(stored.Filter, meaning); err != nil {
			return forWhom, fmt.Errorf("resolve the filter of message %d of %q: %w", pub.Seq, pub.Topic, err)
		}
		v.filters[key] = verdict
	}
	return verdict, nil
}

// hadOneOf reports whether one of the clients that a message was sent to was an earlier
// connection of the viewer. That is known only of users: users says whose it was then.
func (v *viewer) hadOneOf(users map[string]string) bool {
	return v.auth != nil && slices.ContainsFunc(v.earlier, func(id string) bool { return users[id] == refOf(v.auth).String() })
}

// passes asks a filter, which had a meaning when the message was sent.
func (v *viewer) passes(text, meaning string) (verdictOf, error) {
	collection := v.auth.Collection()
	filter, err := v.n.compileFor(collection, text)
	if err != nil || filter.meaning != meaning {
		return forWhom, nil // a collection or a field is gone, or a name is another's
	}
	allowed, err := v.n.filterUsers(v.ctx, []collectionFilter{filter}, map[string]sets.Of[string]{collection.Id: {v.auth.Id: {}}})
	if err != nil {
		return forWhom, err
	}
	if allowed.Has(refOf(v.auth)) {
		return forViewer, nil
	}
	return forOthers, nil
}
