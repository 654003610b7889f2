// Re-evaluating the rules for clients that are already subscribed, and ending what is now denied.

package notify

import (
	"encoding/json/v2"
	"maps"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
	"herald/notify/internal/sets"
)

// checkLater re-evaluates the rules for held clients on another goroutine, and then releases each
// as often as it is held. It does the same for clients of other code.
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

// recheckHeld rechecks a client that is held the given number of times, and releases it as often.
func (n *Notifier) recheckHeld(client *Client, holds int, memo *memo) {
	defer func() {
		for range holds {
			client.conn.Release()
		}
	}()
	defer client.guard("checking the rights of a realtime connection")
	n.recheckClient(client, memo)
}

// recheckAllForeign is recheckHeld for all clients of other code.
func (n *Notifier) recheckAllForeign(holds int, memo *memo) {
	defer n.outboxes.release(holds)
	defer n.guard("checking the rights of realtime clients of other code")
	for _, client := range n.foreignClients() {
		n.recheckForeignOrEnd(client, memo)
	}
}

// recheckForeignOrEnd is recheckForeign for a client that may panic: then it ends, as its rights
// are not known.
func (n *Notifier) recheckForeignOrEnd(client subscriptions.Client, memo *memo) {
	defer n.guard("checking the rights of a realtime client of other code")
	isChecked := false
	defer func() {
		if !isChecked {
			n.outboxes.end(client, DisconnectFailed)
		}
	}()
	n.recheckForeign(client, memo)
	isChecked = true
}

// admitted is called for a held client once its admission a is in the index. If the decision is
// stale, or rights have changed since it began or are about to change, admitted decides again
// before the hold ends.
func (n *Notifier) admitted(client *Client, a *Admission, stale bool) {
	n.changes.mu.Lock()
	stale = stale || a.generation != n.changes.generation
	for change := range n.changes.pending {
		change.add(client)
	}
	n.changes.mu.Unlock()
	if stale || a.who.user != client.auth.Load().user {
		n.recheckClient(client, n.newMemo())
	}
}

// RecheckFilter selects the subscriptions to recheck. Empty fields select all.
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

// Recheck re-evaluates the rules and returns when everything is done. The error is of type
// [Errors], with the field "user".
func (n *Notifier) Recheck(filter RecheckFilter) (RecheckReport, error) {
	clients, err := n.selectClients(ConnectionFilter(filter))
	if err != nil {
		return RecheckReport{}, err
	}
	n.changes.mu.Lock()
	n.changes.generation++ // for clients that are subscribing right now
	n.changes.mu.Unlock()

	var report RecheckReport
	memo := n.newMemo()
	for _, client := range clients {
		var checked, ended int
		if own := n.own(client); own != nil {
			own.conn.Hold()
			checked, ended = n.recheckClient(own, memo)
			own.conn.Release()
		} else {
			checked, ended = n.recheckForeign(client, memo)
		}
		report.Checked += checked
		report.Ended += ended
	}
	return report, nil
}

// recheckClient re-evaluates the rules for the client's subscriptions, and ends what is now denied.
// The client should be held.
func (n *Notifier) recheckClient(client *Client, memo *memo) (checked, ended int) {
	for {
		keys, version := client.ruled()
		if len(keys) == 0 {
			return 0, 0
		}
		auth, err := memo.user(client.identity())
		if err != nil {
			client.Close(DisconnectRuleFailed) // as below
			return len(keys), 0
		}
		grants := make(map[string]grant, len(keys))
		var denied []string
		for _, key := range keys {
			a := memo.decide(key, auth)
			switch {
			case a.err != nil:
				// not the client's fault: it reconnects and is decided anew
				client.Close(DisconnectRuleFailed)
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

// ruled returns the keys that the client asked for, and the version of its subscriptions. It
// returns no keys while the client is subscribing, because admitted handles that.
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

// setGrants replaces grants of the client and ends its subscriptions to the denied keys. What waits
// under those keys is not written. It returns false, and does nothing, if the client's
// subscriptions have changed since version.
func (c *Client) setGrants(version int, grants map[string]grant, denied []string) bool {
	c.subsMu.Lock()
	if c.version != version {
		c.subsMu.Unlock()
		return false
	}
	if len(denied) > 0 {
		c.Client.Unsubscribe(denied...)
		c.version++
		if c.carrier != nil {
			c.carrier.Unsubscribed(denied)
		}
	}
	c.reindex(grants)
	c.startReplays()
	gone, both := sets.From(denied), c.pair.Load()
	if both != nil {
		maps.Copy(both.denied, gone)
	}
	c.subsMu.Unlock()
	if len(denied) == 0 {
		return true
	}

	// no longer in the index, so nothing more arrives under these keys
	c.conn.Remove(gone, DisconnectDenied)
	if both != nil {
		both.below.Remove(gone, DisconnectDenied)
	}
	denials := make([]Denial, len(denied))
	for i, key := range denied {
		denials[i] = forbidden(key)
	}
	c.AnnounceDenied(denials...)
	return true
}

// authChanged rechecks what the client was granted under its previous identity.
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

// denial tells a client about a topic that it may not listen to.
type denial struct {
	Topic   string `json:"topic"`
	Status  int    `json:"status"`
	Message string `json:"message"`
}

// AnnounceDenied announces the topics of denials to the client, if it listens to [DeniedTopic].
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
			continue // the topic is not UTF-8, so no message has it
		}
		for _, name := range c.namesOf(s) {
			c.conn.Put(conn.NewFrame(name, data, false))
		}
	}
}
