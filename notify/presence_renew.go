// Renewals: on a channel with a presenceTTL, a connection that does not renew in time counts as gone,
// until it does. A proxy may keep the connection of a phone that has died.

package notify

import (
	"maps"
	"time"
)

// The connections that have not renewed are looked for after a tenth of the shortest TTL, within
// these bounds.
const (
	minRenewalCheck = time.Second
	maxRenewalCheck = 10 * time.Second
)

// setRenewing notes whether a client has to renew somewhere.
func (n *Notifier) setRenewing(client *Client, renews bool) {
	if client.renews == renews {
		return
	}
	client.renews = renews
	p := &n.presence
	p.renewMu.Lock()
	defer p.renewMu.Unlock()
	if !renews {
		delete(p.renewing, client)
		return
	}
	p.renewing[client] = struct{}{}
	if p.renewals == nil {
		n.startRenewalsLocked()
	}
}

// startRenewalsLocked plans the next check. renewMu is held.
func (n *Notifier) startRenewalsLocked() {
	p := &n.presence
	if p.stopped {
		return
	}
	within := n.renewalCheck()
	p.due = n.conns.ExactNow() + int64(within)
	p.renewals = time.AfterFunc(within, n.checkRenewals)
}

// renewalCheck returns after what time to look for connections that have not renewed.
func (n *Notifier) renewalCheck() time.Duration {
	shortest := 10 * maxRenewalCheck
	for _, c := range n.channels.Load().all {
		if c.presence != nil && c.presence.ttl > 0 {
			shortest = min(shortest, c.presence.ttl)
		}
	}
	return max(minRenewalCheck, shortest/10)
}

// checkRenewals takes out the connections that have not renewed in time.
func (n *Notifier) checkRenewals() {
	defer n.guard("looking for who has not renewed their presence")
	defer n.checkRenewalsLater()
	p := &n.presence
	p.renewMu.Lock()
	clients := maps.Clone(p.renewing)
	now := n.conns.ExactNow()
	late := max(0, now-p.due) // a server that was stopped, or has no CPU time, could not hear of renewals meanwhile
	p.renewMu.Unlock()
	for client := range clients {
		client.attendAgain(func() {
			for _, s := range client.subs {
				a := s.attendance
				if a == nil || a.ttl <= 0 || a.isOverdue {
					continue
				}
				a.renewed += late
				a.isOverdue = time.Duration(now-a.renewed) >= a.ttl
			}
		})
	}
}

func (n *Notifier) checkRenewalsLater() {
	p := &n.presence
	p.renewMu.Lock()
	defer p.renewMu.Unlock()
	for client := range p.renewing {
		if client.conn.HasEnded() {
			delete(p.renewing, client)
		}
	}
	if p.renewals = nil; len(p.renewing) > 0 {
		n.startRenewalsLocked()
	}
}

func (n *Notifier) stopPresence() {
	p := &n.presence
	p.rooms.Stop()
	p.renewMu.Lock()
	defer p.renewMu.Unlock()
	if p.stopped = true; p.renewals != nil {
		p.renewals.Stop()
	}
}
