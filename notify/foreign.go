// The clients in PocketBase's broker that are not ours. Called by the fan-out.

package notify

import (
	"slices"
	"sync"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
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
