// Evaluating the rules again for clients that listen already, and ending what is denied now.

package notify

import (
	"encoding/json/v2"
	"maps"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/sets"
)

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
	defer n.guard("checking the rights of realtime clients of other code")
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
	if c.below() != nil {
		maps.Copy(c.pair.Load().denied, sets.From(denied))
	}
	c.subsMu.Unlock()
	if len(denied) == 0 {
		return true
	}

	// out of the index: nothing comes after this
	gone := sets.From(denied)
	for _, queue := range []*Client{c, c.below()} {
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
			c.put(newFrame(subscriptions.Message{Name: name, Data: data}, false))
		}
	}
}
