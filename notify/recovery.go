// What a client has missed: pages of a topic's history, reduced to what is meant for the client.
// Called by replay.go for subscriptions, and by hooks/history.go.

package notify

import (
	"context"
	"encoding/json/jsontext"
	"errors"
	"fmt"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/history"
	"herald/notify/internal/sets"
)

const (
	// MaxHistoryPage is the maximum number of messages that [Notifier.History] returns.
	MaxHistoryPage = 1000
	// MaxPageBytes is the maximum number of bytes of data in a page; only the last message may
	// exceed it.
	MaxPageBytes = 256 << 10
)

// HistoryPage is a part of a topic's history.
type HistoryPage struct {
	// Items are the kept messages that are meant for the reader, in their envelopes, oldest first.
	Items []jsontext.Value `json:"items"`
	// Epoch and Head give the position of the topic's last message. Epoch is empty if the topic has
	// no history.
	Epoch string `json:"epoch"`
	Head  int64  `json:"head"`
	// Complete is false if messages between the requested position and the first item may be
	// missing, because they are no longer kept.
	Complete bool `json:"complete"`
	// Next is the position to request next. The page reaches the topic's head when the number in
	// Next is Head.
	Next string `json:"next"`
	// Beat is how often the server sends an event on [BeatTopic] to its subscribers, in seconds; 0
	// means never.
	Beat float64 `json:"beat"`
	// Subscribed says whether the reader's connection had the subscription that it asked about before the page was
	// read: what comes after Head reaches it. Nil if it did not ask.
	Subscribed *bool `json:"subscribed,omitzero"`
}

// History returns messages of topic that p may have, beginning at from: up to limit (1 to
// [MaxHistoryPage]) and maxBytes of data (up to [MaxPageBytes]). A position of another epoch starts at the oldest kept
// message, and the page is not complete.
//
// The subscribe rule applies. The error is of type [Errors], with the fields "topic" and "limit",
// [ErrForbidden], [ErrHistory] or an error of a query.
func (n *Notifier) History(ctx context.Context, p Publisher, topic string, from Start, limit, maxBytes int) (*HistoryPage, error) {
	if err := n.checkTopic(topic, false); err != nil {
		if errors.Is(err, ErrReservedTopic) && !p.isSuperuser() {
			return nil, ErrForbidden // do not reveal which names are the server's
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
	page, err := n.history.Read(topic, from, limit, min(maxBytes, MaxPageBytes))
	if err != nil {
		return nil, err
	}
	answer := &HistoryPage{Items: []jsontext.Value{}, Epoch: page.Epoch, Head: page.Head, Complete: page.Complete, Beat: max(n.config.Heartbeat, 0).Seconds()}
	if page.Epoch != "" {
		answer.Next = page.Next().String()
	}
	see := n.newViewer(ctx, reader{who: p.identity(), earlier: p.ClientIDs})
	for _, entry := range page.Entries {
		pub, verdict, err := see.read(entry)
		if err != nil {
			return nil, err
		}
		if verdict != forViewer {
			answer.Complete = answer.Complete && verdict != forWhom
			continue
		}
		item, err := pub.envelopeOn(page, false)
		if err != nil {
			return nil, err
		}
		answer.Items = append(answer.Items, item)
	}
	// The entries may have been sent after p lost the right to them. A change in progress may
	// already be committed.
	if n.changes.quietSince(generation) {
		return answer, nil
	}
	if p.Auth, err = n.newMemo().user(p.identity()); err != nil {
		return nil, err
	}
	_, err = n.mayListen(p, topic)
	return answer, err
}

// mayListen evaluates the subscribe rule of topic for a request. generation counts the changes of
// rights before the evaluation.
func (n *Notifier) mayListen(p Publisher, topic string) (generation uint64, err error) {
	generation = n.changes.current()
	a := n.newMemo().mayListen(topic, p.Auth, "", p.headers)
	switch {
	case a.err != nil:
		return 0, a.err
	case !a.ok:
		return 0, ErrForbidden
	}
	return generation, nil
}

// viewer decides which stored messages are meant for one reader. It evaluates each filter once.
type viewer struct {
	n   *Notifier
	ctx context.Context
	reader
	filters map[viewedFilter]verdictOf
}

type viewedFilter struct{ text, meaning string }

// verdictOf says whether a stored message is meant for a viewer.
type verdictOf int

const (
	forOthers verdictOf = iota
	forViewer
	forWhom // the audience is no longer known: the message is not shown and counts as missing
)

func (n *Notifier) newViewer(ctx context.Context, r reader) *viewer {
	return &viewer{n, ctx, r, map[viewedFilter]verdictOf{}}
}

// read returns a stored message, as a viewer for whom it is meant gets it.
func (v *viewer) read(entry *history.Entry) (*publication, verdictOf, error) {
	pub := &publication{Entry: *entry, sender: refFrom(entry.Sender)}
	verdict, err := v.sees(pub)
	if verdict == forViewer {
		pub.from = v.n.nameOf(pub.sender)
	}
	return pub, verdict, err
}

// encodedAs identifies a message of a page in one of its envelopes.
type encodedAs struct {
	seq  int64
	from string // depends on the present name of a collection
	gap  bool
}

// envelopeOn is envelope for a message of page. All who have the page share it.
func (p *publication) envelopeOn(page *history.Page, gap bool) ([]byte, error) {
	key := encodedAs{p.Seq, p.from, gap}
	if known, ok := page.Encoded.Load(key); ok {
		return known.([]byte), nil
	}
	encoded, err := p.envelope(gap)
	if err == nil {
		page.Encoded.Store(key, encoded)
	}
	return encoded, err
}

// sees reports whether pub is meant for the viewer, according to the auth record as it is now. An
// error comes from a filter's query.
func (v *viewer) sees(pub *publication) (verdictOf, error) {
	if pub.Audience == nil {
		return forViewer, nil
	}
	stored, to := readStored(pub.Audience)
	if to == nil {
		return forWhom, nil
	}
	pub.to = to
	to.allowed = sets.Of[userRef]{v.who.user: {}} // whether the filter allows it is resolved last
	if !to.isFor(&v.reader) {
		return forOthers, nil
	}
	if v.who.isGuest() || to.collections == nil && !to.filtered {
		return forViewer, nil
	}
	collection, err := v.n.app.FindCachedCollectionByNameOrId(v.who.user.collectionID)
	switch {
	case err != nil || collection.Id != v.who.user.collectionID:
		return forWhom, nil
	case collection.Created.Time().After(pub.Time):
		// PocketBase derives collection ids from names: this is another collection with the same
		// id, and the intended one is gone
		return forOthers, nil
	case !to.filtered:
		return forViewer, nil
	}
	return v.resolve(collection, &stored, pub)
}

// resolve reports whether the filter of a stored message allows the viewer, a record of collection.
func (v *viewer) resolve(collection *core.Collection, stored *storedAudience, pub *publication) (verdictOf, error) {
	meaning, applies := stored.FilterOn[collection.Id]
	if !applies {
		return forOthers, nil
	}
	key := viewedFilter{stored.Filter, meaning}
	verdict, known := v.filters[key]
	if !known {
		var err error
		if verdict, err = v.passes(collection, stored.Filter, meaning); err != nil {
			return forWhom, fmt.Errorf("resolve the filter of message %d of %q: %w", pub.Seq, pub.Topic, err)
		}
		v.filters[key] = verdict
	}
	return verdict, nil
}

// passes evaluates a filter that had meaning when the message was sent.
func (v *viewer) passes(collection *core.Collection, text, meaning string) (verdictOf, error) {
	filter, err := v.n.compileFor(collection, text)
	if err != nil || filter.meaning != meaning {
		return forWhom, nil // a collection or field is gone, or a name now stands for another one
	}
	allowed, err := v.n.filterUsers(v.ctx, []collectionFilter{filter}, map[string]sets.Of[string]{collection.Id: {v.who.user.id: {}}})
	if err != nil {
		return forWhom, err
	}
	if allowed.Has(v.who.user) {
		return forViewer, nil
	}
	return forOthers, nil
}
