// The clients in PocketBase's broker that are altogether other code's: those that it has
// registered itself, or that a handler has put in the place of ours. What they may have is
// kept in their own store, since we see nothing of what is done with them.

package notify

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/sets"
)

// foreign finds the clients that other code has registered. The broker tells
// nobody of a registration, but it tells how many clients it has: only when
// these are more than are known, all of them are looked at.
type foreign struct {
	mu    sync.Mutex
	known []subscriptions.Client // replaced, never changed
}

func (n *Notifier) foreignClients() []subscriptions.Client {
	f := &n.foreign
	f.mu.Lock()
	defer f.mu.Unlock()

	if slices.ContainsFunc(f.known, subscriptions.Client.IsDiscarded) {
		f.known = slices.DeleteFunc(slices.Clone(f.known), subscriptions.Client.IsDiscarded)
	}
	// registered counts a client of ours after it came and until before it
	// goes, so it is never too high, and nobody is overlooked
	broker := n.app.SubscriptionsBroker()
	if broker.TotalClients() == int(n.registered.Load())+len(f.known) {
		return f.known
	}
	f.known = nil
	for _, client := range broker.Clients() {
		if own := n.own(client); own != nil {
			own.countRegistered()
		} else if !client.IsDiscarded() {
			f.known = append(f.known, client)
		}
	}
	return f.known
}

// replace makes client have next where it has before still.
func (f *foreign) replace(client subscriptions.Client, before, next *foreignRights) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if rightsOf(client) != before {
		return false
	}
	client.Set(foreignKey, next)
	return true
}

// ResubscribeForeign is [Client.Resubscribe] for a client of other code, with the end of the
// token by which it is signed in. A message that is sent meanwhile may be lost.
func (n *Notifier) ResubscribeForeign(client subscriptions.Client, a *Admission, expires time.Time, replace func() error) error {
	for done := false; !done; {
		before := rightsOf(client)
		both := maps.Clone(a.grants) // until it is replaced it has what it had, too
		if before != nil {
			for key, had := range before.grants {
				if _, ok := both[key]; !ok {
					both[key] = had
				}
			}
		}
		done = n.foreign.replace(client, before, &foreignRights{both, expires})
	}
	if err := replace(); err != nil {
		return err
	}
	client.Set(foreignKey, &foreignRights{a.grants, expires})
	if n.changes.current() != a.generation {
		n.recheckForeign(client, n.newMemo())
	}
	return nil
}

// recheckForeign asks the rules again for what a client of other code has subscribed to by
// request, and ends what is denied now. Where that cannot be told the client has to go: it
// comes back, and is decided on anew.
func (n *Notifier) recheckForeign(client subscriptions.Client, memo *memo) (checked, ended int) {
	for {
		before := rightsOf(client)
		if before == nil {
			return 0, 0
		}
		auth, err := memo.user(foreignAuth(client))
		next := &foreignRights{map[string]grant{}, before.expires}
		var denied []string
		for key := range before.grants {
			if err != nil {
				break
			}
			a := memo.decide(key, auth)
			if err = a.err; a.ok {
				next.grants[key] = a.grant
			} else {
				denied = append(denied, key)
			}
		}
		switch {
		case err != nil:
			n.outboxes.end(client, ReasonRuleFailed)
			return len(before.grants), 0
		case !n.foreign.replace(client, before, next):
			continue // it has subscribed anew
		case len(denied) > 0:
			client.Unsubscribe(denied...)
			n.outboxes.remove(client.Id(), sets.From(denied))
		}
		return len(before.grants), len(denied)
	}
}
