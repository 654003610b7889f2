// Being thrown out: rights that change while somebody listens. hooks/channels.go
// tells of changes before they are committed.
//
// Who may be affected is held from before the commit until the rules have been
// asked again: messages go into its queue and no further. So nothing that is sent
// after the commit reaches one who is not allowed to have it any more, and one
// who is misses nothing.

package notify

import (
	"encoding/json/v2"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

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

// checkLater asks the rules again for held clients and releases them as often as they are
// held, on another goroutine; likewise for those of other code.
func (n *Notifier) checkLater(held map[*Client]int, foreign int) {
	c := &n.changes
	c.mu.Lock()
	defer c.mu.Unlock()
	for client, holds := range held {
		c.waiting[client] += holds
	}
	c.foreign += foreign
	if !c.checking && (len(c.waiting) > 0 || c.foreign > 0) {
		c.checking = true
		c.checks.Go(n.checkWaiting)
	}
}

func (n *Notifier) checkWaiting() {
	c := &n.changes
	for {
		c.mu.Lock()
		clients := c.waiting
		c.waiting = map[*Client]int{}
		foreign := c.foreign
		c.foreign = 0
		c.checking = len(clients) > 0 || foreign > 0
		isOver := !c.checking
		c.mu.Unlock()
		if isOver {
			return
		}
		memo := n.newMemo()
		for client, holds := range clients {
			n.recheckHeld(client, holds, memo)
		}
		if foreign > 0 {
			n.recheckAllForeign(foreign, memo)
		}
	}
}

// recheckHeld checks a client that is held some times, and releases it as often.
func (n *Notifier) recheckHeld(client *Client, holds int, memo *memo) {
	defer func() {
		for range holds {
			client.release()
		}
	}()
	defer client.guard("checking the rights of a realtime connection")
	n.recheckClient(client, memo)
}

// recheckAllForeign does the same for those of other code.
func (n *Notifier) recheckAllForeign(holds int, memo *memo) {
	defer n.outboxes.release(holds)
	for _, client := range n.foreignClients() {
		func() {
			defer n.guard("checking the rights of a realtime client of other code")
			isChecked := false
			defer func() {
				if !isChecked {
					n.outboxes.end(client, ReasonFailed)
				}
			}()
			n.recheckForeign(client, memo)
			isChecked = true
		}()
	}
}

// admitted is called for a held client when what a was admitted for is in the
// index. Where the decision is stale, or rights have changed since it began or are
// about to, it is made again before the hold ends.
func (n *Notifier) admitted(client *Client, a *Admission, stale bool) {
	n.changes.mu.Lock()
	stale = stale || a.generation != n.changes.generation
	for change := range n.changes.pending {
		change.add(client)
	}
	n.changes.mu.Unlock()
	if stale || !isSameUser(a.auth, client.auth.Load()) {
		n.recheckClient(client, n.newMemo())
	}
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

// RecheckFilter selects whose subscriptions are checked again. Empty fields
// select all.
type RecheckFilter struct {
	Topic string `json:"topic"`
	// User is an auth record as "COLLECTION:RECORD_ID".
	User string `json:"user"`
}

// RecheckReport counts subscriptions.
type RecheckReport struct {
	Checked int `json:"checked"`
	Ended   int `json:"ended"`
}

// Recheck asks the rules again and returns when all has been done. The error is
// of type [Errors], with the field "user".
func (n *Notifier) Recheck(filter RecheckFilter) (RecheckReport, error) {
	clients, err := n.selectClients(ConnectionFilter(filter))
	if err != nil {
		return RecheckReport{}, err
	}
	n.changes.mu.Lock()
	n.changes.generation++ // for who is subscribing just now
	n.changes.mu.Unlock()

	var report RecheckReport
	memo := n.newMemo()
	for _, client := range clients {
		checked, ended := 0, 0
		if own := n.own(client); own != nil {
			own.hold()
			checked, ended = n.recheckClient(own, memo)
			own.release()
		} else {
			checked, ended = n.recheckForeign(client, memo)
		}
		report.Checked += checked
		report.Ended += ended
	}
	return report, nil
}

// recheckClient asks the rules again for what client subscribed to, and ends what
// is denied now. The client should be held.
func (n *Notifier) recheckClient(client *Client, memo *memo) (checked, ended int) {
	for {
		keys, version := client.ruled()
		if len(keys) == 0 {
			return 0, 0
		}
		auth, err := memo.user(client.authAt(time.Now()))
		if err != nil {
			client.Close(ReasonRuleFailed) // as below
			return len(keys), 0
		}
		grants := make(map[string]grant, len(keys))
		var denied []string
		for _, key := range keys {
			a := memo.decide(key, auth)
			switch {
			case a.err != nil:
				// not its fault: it comes back, and is decided on anew
				client.Close(ReasonRuleFailed)
				return len(keys), 0
			case a.ok:
				grants[key] = a.grant
			default:
				denied = append(denied, key)
			}
		}
		if client.setGrants(version, grants, denied) {
			return len(keys), len(denied)
		}
	}
}

// ruled returns the keys that the client asked for, and the version of what it
// has; none while it is subscribing, of which admitted takes care.
func (c *Client) ruled() (keys []string, version int) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if c.resubscribe {
		c.unchecked = true
		return nil, 0
	}
	for _, s := range c.subs {
		for _, key := range s.keys {
			if key.grant.byRule {
				keys = append(keys, key.name)
			}
		}
	}
	return keys, c.version
}

// setGrants replaces grants of the client and ends its subscriptions to the
// denied keys: what waits for it under these is not written. False: it has
// subscribed anew since version, and nothing was done.
func (c *Client) setGrants(version int, grants map[string]grant, denied []string) bool {
	c.subsMu.Lock()
	if c.version != version {
		c.subsMu.Unlock()
		return false
	}
	if len(denied) > 0 {
		c.Client.Unsubscribe(denied...)
		c.version++
	}
	c.reindex(grants)
	if c.below.Load() != nil {
		if c.denied == nil {
			c.denied = sets.Of[string]{}
		}
		maps.Copy(c.denied, sets.From(denied))
	}
	c.subsMu.Unlock()
	if len(denied) == 0 {
		return true
	}

	// out of the index: nothing comes after this
	gone := sets.From(denied)
	for _, queue := range []*Client{c, c.below.Load()} {
		if queue != nil {
			queue.removeQueued(func(f *frame) bool { return !f.comment && gone.Has(f.message.Name) })
		}
	}
	denials := make([]Denial, len(denied))
	for i, key := range denied {
		denials[i] = forbidden(key)
	}
	c.AnnounceDenied(denials...)
	return true
}

// authChanged has decided anew on what the client was granted as somebody else.
func (c *Client) authChanged() {
	c.subsMu.Lock()
	concerned := false
	for _, s := range c.subs {
		for _, key := range s.keys {
			concerned = concerned || key.grant.forUser
		}
	}
	concerned = concerned && !c.resubscribe && !c.unlisted && c.signingOut == 0
	c.subsMu.Unlock()
	if concerned {
		c.notifier.beginChange(func() []*Client { return []*Client{c} }).End(true)
	}
}

// denial tells a client of a topic that it may not listen to.
type denial struct {
	Topic   string `json:"topic"`
	Status  int    `json:"status"`
	Message string `json:"message"`
}

// AnnounceDenied tells the client of the topics of denials, if it listens to
// [DeniedTopic].
func (c *Client) AnnounceDenied(denials ...Denial) {
	s := c.subscriptionTo(DeniedTopic)
	if s == nil {
		return
	}
	told := sets.Of[denial]{}
	for _, d := range denials {
		announced := denial{topicOf(d.Key), d.Status, d.Message}
		if told.Has(announced) {
			continue
		}
		told[announced] = struct{}{}
		data, err := json.Marshal(announced)
		if err != nil {
			continue // the topic is no UTF-8, which no message has
		}
		for _, name := range c.namesOf(s) {
			c.deliver(newFrame(subscriptions.Message{Name: name, Data: data}, false))
		}
	}
}
