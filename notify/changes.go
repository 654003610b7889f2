// Changes of rights, from before their commit until the rules have been re-evaluated.
// hooks/channels.go reports them.
//
// Meanwhile every client that may be affected is held: messages go into the connection's queue and
// no further. So nothing sent after the commit reaches a client that may no longer have it, and a
// client that may have it misses nothing.

package notify

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

// changes holds the changes of rights in progress, and counts the finished ones.
type changes struct {
	mu         sync.Mutex // guards the fields below; only clients' queue.mu is locked under it
	generation uint64     // counts finished changes
	pending    sets.Of[*Change]
	waiting    map[*Client]int // clients waiting for a recheck, and how often each is held for it
	foreign    int             // how often the clients of other code are held for it
	checking   bool            // a goroutine is rechecking

	checks sync.WaitGroup // that goroutine
}

// quietSince reports whether no rights have changed since generation and no change is in progress.
func (c *changes) quietSince(generation uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation == generation && len(c.pending) == 0
}

func (c *changes) current() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation
}

// Change is a change of rights in progress.
type Change struct {
	n     *Notifier
	find  func() []*Client
	timer *time.Timer

	// guarded by changes.mu
	held sets.Of[*Client] // nil once it is over
}

// maxChange is the maximum duration of a change. A transaction that panics never reports its end;
// without the limit, its clients would be held forever.
const maxChange = time.Minute

// beginChange must be called before a change of rights is committed; find returns the connections
// that it may affect. [Change.End] must be called when the change is over. Until then, clients that
// subscribe are held too, because their rules may have been evaluated before the commit.
func (n *Notifier) beginChange(find func() []*Client) *Change {
	change := &Change{n: n, find: find, held: sets.Of[*Client]{}}
	n.changes.mu.Lock()
	n.changes.pending[change] = struct{}{}
	change.timer = time.AfterFunc(maxChange, func() { change.End(true) })
	n.changes.mu.Unlock()

	n.outboxes.hold() // it is unknown which of other code's clients the change affects
	clients := find() // from here on no client is overlooked, see admitted

	n.changes.mu.Lock()
	defer n.changes.mu.Unlock()
	for _, client := range clients {
		change.add(client)
	}
	return change
}

// add holds client. changes.mu is held.
func (c *Change) add(client *Client) {
	if c.held == nil {
		return // it took too long
	}
	if _, ok := c.held[client]; !ok {
		c.held[client] = struct{}{}
		client.conn.Hold()
	}
}

// End ends the change. Unless the change was rolled back, the rules are re-evaluated on another
// goroutine. It may be called on nil.
func (c *Change) End(committed bool) { EndAll(committed, c) }

// EndAll is [Change.End] for all changes of one transaction, so that a client that several of them
// affect is rechecked once. Some may be nil.
func EndAll(committed bool, changes ...*Change) {
	changes = slices.DeleteFunc(changes, func(c *Change) bool { return c == nil })
	if len(changes) == 0 {
		return
	}
	n := changes[0].n
	held := map[*Client]int{} // client to its number of holds
	foreign := 0
	var late []*Change // changes that exceeded maxChange before they were committed
	n.changes.mu.Lock()
	for _, c := range changes {
		c.timer.Stop()
		delete(n.changes.pending, c)
		if c.held == nil {
			late = append(late, c)
		} else {
			foreign++
		}
		for client := range c.held {
			held[client]++
		}
		c.held = nil
	}
	n.changes.generation++
	n.changes.mu.Unlock()

	for _, c := range late {
		for _, client := range c.find() {
			held[client]++
			client.conn.Hold()
		}
		n.outboxes.hold()
		foreign++
	}
	if !committed || len(n.foreignClients()) == 0 { // whoever comes from now on is decided on by the rules as they are
		n.outboxes.release(foreign)
		foreign = 0
	}
	if !committed {
		for client, holds := range held {
			for range holds {
				client.conn.Release()
			}
		}
		return
	}
	n.checkLater(held, foreign)
}

// DependsOn reports whether a subscription may depend on records of collection, so that
// [Notifier.ChangeOfRecord] must be called for their changes.
func (n *Notifier) DependsOn(collection *core.Collection) bool {
	set := n.channels.Load()
	return len(set.authFieldsOf(collection)) > 0 || set.collections[collection.Id] != nil
}

// ChangeOfRecord begins the change of a record, from before (nil for a new one) to after (nil for a
// deleted one). It must be called before the change is committed. The result is nil if no
// subscription can depend on the change.
func (n *Notifier) ChangeOfRecord(before, after *core.Record) *Change {
	set := n.channels.Load()
	record := after
	if record == nil {
		record = before
	}
	collection := record.Collection()
	authFields := set.authFieldsOf(collection)
	ofUser := len(authFields) > 0 && before != nil
	if !ofUser && set.collections[collection.Id] == nil {
		return nil
	}

	changed := rules.ChangedFields(before, after)
	ofUser = ofUser && (after == nil || rules.Meets(authFields, changed))
	ofOthers := rules.Meets(set.collections[collection.Id], changed)
	if !ofUser && !ofOthers {
		return nil
	}
	return n.beginChange(func() []*Client {
		var clients []*Client
		if ofUser {
			clients = n.index.clientsOf(refOf(before))
		}
		if !ofOthers {
			return clients
		}
		for _, c := range set.all {
			for _, rule := range c.listening() {
				if d := rule.Collections[collection.Id]; d != nil && rules.Meets(d.Fields, changed) {
					clients = append(clients, n.concerned(c, rule, d.Concern(c.pattern, before, after, changed))...)
				}
			}
		}
		return clients
	})
}

// concerned returns the connections that concern selects, on topics of c's rule.
func (n *Notifier) concerned(c *channel, rule listeningRule, concern rules.Concern) []*Client {
	if concern.All {
		return n.index.clientsWhere(rule.topics(c.pattern))
	}
	var clients []*Client
	for id := range concern.Users {
		clients = append(clients, n.clientsWithID(id, rule.topics(c.pattern))...)
	}
	for topic := range concern.Topics {
		clients = append(clients, n.index.clientsOn(rule.prefix+topic)...)
	}
	return clients
}

// clientsWithID returns the connections of the auth records with id, in any collection. "" selects
// the guests on topics.
func (n *Notifier) clientsWithID(id string, topics func(string) bool) []*Client {
	if id == "" {
		if n.index.guests.Load() == 0 {
			return nil // nearly always
		}
		return slices.DeleteFunc(n.index.clientsWhere(topics), func(client *Client) bool { return !client.identity().isGuest() })
	}
	collections, err := n.authCollections()
	if err != nil {
		return nil
	}
	var clients []*Client
	for _, collection := range collections {
		clients = append(clients, n.index.clientsOf(userRef{collection.Id, id})...)
	}
	return clients
}

// ChangeOfChannel is ChangeOfRecord for the record of a channel. [Notifier.SetChannels] must be
// called before the change ends.
func (n *Notifier) ChangeOfChannel(before, after *core.Record) *Change {
	var patterns []*rules.Pattern
	for _, record := range []*core.Record{before, after} {
		if record == nil {
			continue
		}
		if p, err := rules.ParsePattern(record.GetString(channelPattern)); err == nil {
			patterns = append(patterns, p)
		}
	}
	return n.beginChange(func() []*Client {
		var clients []*Client
		for _, p := range patterns {
			clients = append(clients, n.index.clientsWhere(func(topic string) bool { return p.Matcher()(strings.TrimPrefix(topic, PresencePrefix)) })...)
		}
		return clients
	})
}

// ChangeOfAll begins a change that may affect everyone.
func (n *Notifier) ChangeOfAll() *Change {
	return n.beginChange(func() []*Client {
		return n.index.clientsWhere(func(string) bool { return true })
	})
}
