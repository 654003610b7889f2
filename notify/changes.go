// Changes of rights, from before their commit until the rules have been evaluated again.
// hooks/channels.go tells of them.
//
// Whoever may be affected is held meanwhile: messages go into the connection's queue and no
// further. So nothing that is sent after the commit reaches a client that is not allowed to
// have it any more, and one that is misses nothing.

package notify

import (
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

// changes are the changes of rights, those that are over and those under way.
type changes struct {
	mu         sync.Mutex // guards what follows; of other locks only clients' queue.mu is taken under it
	generation uint64     // counts the ones that are over
	pending    sets.Of[*Change]
	waiting    map[*Client]int // whose rules are to be asked again, and how often each is held for that
	foreign    int             // how often the clients of other code are held for that
	checking   bool            // a goroutine does so

	checks sync.WaitGroup // that goroutine
}

// quietSince reports whether nobody's rights have changed since generation, and
// no change is under way.
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

// Change is a change of rights that is under way.
type Change struct {
	n     *Notifier
	find  func() []*Client
	timer *time.Timer

	// guarded by changes.mu
	held sets.Of[*Client] // nil when it is over
}

// maxChange is how long a change may be under way. A transaction that panics
// never tells of its end, and whom it concerns would be held for good.
const maxChange = time.Minute

// beginChange has to be called before a change of rights is committed; find
// returns the connections that it may affect. [Change.End] has to be called when
// it is over. Until then who subscribes is held too: the rules may have been
// asked before the commit.
func (n *Notifier) beginChange(find func() []*Client) *Change {
	change := &Change{n: n, find: find, held: sets.Of[*Client]{}}
	n.changes.mu.Lock()
	n.changes.pending[change] = struct{}{}
	change.timer = time.AfterFunc(maxChange, func() { change.End(true) })
	n.changes.mu.Unlock()

	n.outboxes.hold() // of other code's clients nobody knows whom it concerns
	clients := find() // from here on nobody is overlooked, see admitted

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
		client.hold()
	}
}

// End says that the change is over. Unless it was rolled back the rules are asked
// again, on another goroutine. It may be called on nil.
func (c *Change) End(committed bool) { EndAll(committed, c) }

// EndAll is [Change.End] for all changes of one transaction: whom several of them concern
// is checked once. Some may be nil.
func EndAll(committed bool, changes ...*Change) {
	changes = slices.DeleteFunc(changes, func(c *Change) bool { return c == nil })
	if len(changes) == 0 {
		return
	}
	n := changes[0].n
	held := map[*Client]int{} // and how often
	foreign := 0
	var late []*Change // they took too long, and are committed only now
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
			client.hold()
		}
		n.outboxes.hold()
		foreign++
	}
	if !committed {
		n.outboxes.release(foreign)
		for client, holds := range held {
			for range holds {
				client.release()
			}
		}
		return
	}
	n.checkLater(held, foreign)
}

// DependsOn reports whether a subscription may hang on records of collection, so
// that [Notifier.ChangeOfRecord] has to be told of their changes.
func (n *Notifier) DependsOn(collection *core.Collection) bool {
	set := n.channels.Load()
	return collection.IsAuth() && len(set.authFields) > 0 || set.collections[collection.Id] != nil
}

// ChangeOfRecord begins the change of a record, from before (nil for a new one)
// to after (nil for one that is deleted). It has to be called before the change
// is committed. The result is nil where no subscription can hang on it.
func (n *Notifier) ChangeOfRecord(before, after *core.Record) *Change {
	set := n.channels.Load()
	record := after
	if record == nil {
		record = before
	}
	collection := record.Collection()
	ofUser := collection.IsAuth() && len(set.authFields) > 0 && before != nil
	if !ofUser && set.collections[collection.Id] == nil {
		return nil
	}

	changed := rules.ChangedFields(before, after)
	ofUser = ofUser && (after == nil || rules.Meets(set.authFields, changed))
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
			if d := c.subscribe.Collections[collection.Id]; d != nil && rules.Meets(d.Fields, changed) {
				clients = append(clients, n.concerned(c, d.Concern(c.pattern, before, after, changed))...)
			}
		}
		return clients
	})
}

// concerned returns the connections that concern names, on topics of c.
func (n *Notifier) concerned(c *channel, concern rules.Concern) []*Client {
	if concern.All {
		return n.index.clientsWhere(c.pattern.Matcher())
	}
	var clients []*Client
	for id := range concern.Users {
		clients = append(clients, n.clientsWithID(c, id)...)
	}
	for topic := range concern.Topics {
		clients = append(clients, n.index.clientsOn(topic)...)
	}
	return clients
}

// clientsWithID returns the connections of the auth records with id, in whichever
// collection. "" is the guests on topics of c.
func (n *Notifier) clientsWithID(c *channel, id string) []*Client {
	if id == "" {
		if n.index.guests.Load() == 0 {
			return nil // nearly always
		}
		now := time.Now()
		return slices.DeleteFunc(n.index.clientsWhere(c.pattern.Matcher()), func(client *Client) bool { return client.authAt(now) != nil })
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

// ChangeOfChannel does the same for the record of a channel. Before its end
// [Notifier.SetChannels] has to be called.
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
			clients = append(clients, n.index.clientsWhere(p.Matcher())...)
		}
		return clients
	})
}

// ChangeOfAll begins a change that may concern everyone.
func (n *Notifier) ChangeOfAll() *Change {
	return n.beginChange(func() []*Client {
		return n.index.clientsWhere(func(string) bool { return true })
	})
}
