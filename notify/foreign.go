// The clients in PocketBase's broker that are altogether other code's: those that it has
// registered itself, or that a handler has put in the place of ours. We see nothing of what is
// done with them.

package notify

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
	"golang.org/x/sync/errgroup"

	"herald/notify/internal/sets"
)

// foreign finds the clients that other code has registered. The broker does not announce
// registrations, but it knows its number of clients. Only if there are more than we know of do we
// look at all of them.
type foreign struct {
	mu    sync.Mutex
	known []subscriptions.Client // replaced, never changed

	rightsMu sync.Mutex               // guards rights and what is in it
	rights   map[string]*foreignState // by client id
}

// foreignState is what is kept of a client of other code that has asked for subscriptions.
type foreignState struct {
	requests order // locked by ResubscribeForeign
	rights   *foreignRights
}

// foreignRights are what such a client may have. They are not changed after they were made.
type foreignRights struct {
	grants  map[string]grant // by subscription key; a key without is one of the server's own code
	expires time.Time        // when the token of its auth record does; zero: never
}

// grantOf returns the grant by which the client has key. It may be called on nil.
func (r *foreignRights) grantOf(key string) grant {
	if r == nil {
		return grant{}
	}
	return r.grants[key]
}

// stateOf returns the state of a client of other code, which it makes where there is none.
func (f *foreign) stateOf(client subscriptions.Client) *foreignState {
	id := client.Id()
	f.rightsMu.Lock()
	defer f.rightsMu.Unlock()
	state := f.rights[id]
	if state == nil {
		state = &foreignState{}
		f.rights[id] = state
	}
	return state
}

// rightsOf returns the rights of a client of other code, nil where it has asked for nothing.
func (f *foreign) rightsOf(client subscriptions.Client) *foreignRights {
	id := client.Id()
	f.rightsMu.Lock()
	defer f.rightsMu.Unlock()
	if state := f.rights[id]; state != nil {
		return state.rights
	}
	return nil
}

// change makes what next returns for the present rights the rights of state.
func (f *foreign) change(state *foreignState, next func(now *foreignRights) *foreignRights) {
	f.rightsMu.Lock()
	defer f.rightsMu.Unlock()
	state.rights = next(state.rights)
}

// forgetGone forgets the rights of clients that are not in the broker any more.
func (f *foreign) forgetGone(broker *subscriptions.Broker) {
	f.rightsMu.Lock()
	defer f.rightsMu.Unlock()
	maps.DeleteFunc(f.rights, func(id string, _ *foreignState) bool {
		_, err := broker.ClientById(id)
		return err != nil
	})
}

func (n *Notifier) foreignClients() []subscriptions.Client {
	f := &n.foreign
	f.mu.Lock()
	defer f.mu.Unlock()

	broker := n.app.SubscriptionsBroker()
	if slices.ContainsFunc(f.known, isGone) {
		f.known = slices.DeleteFunc(slices.Clone(f.known), isGone)
		f.forgetGone(broker)
	}
	// registered counts a client of ours after it came and until before it
	// goes, so it is never too high, and nobody is overlooked
	if broker.TotalClients() == int(n.registered.Load())+len(f.known) {
		return f.known
	}
	f.known = nil
	var mu sync.Mutex // guards known
	n.walkClients(func(client subscriptions.Client) {
		if own := n.own(client); own != nil {
			own.counted.in(&n.registered)
		} else if !isGone(client) {
			mu.Lock()
			defer mu.Unlock()
			f.known = append(f.known, client)
		}
	})
	return f.known
}

// clientsChunk is how many clients one goroutine of walkClients looks at, as in the example of
// PocketBase's documentation ("Realtime messaging").
const clientsChunk = 300

// walkClients calls f, concurrently, for every client in PocketBase's broker, other code's included.
// It returns when all calls have. A client on which f panics is left out.
func (n *Notifier) walkClients(f func(client subscriptions.Client)) {
	group := new(errgroup.Group)
	for _, chunk := range n.app.SubscriptionsBroker().ChunkedClients(clientsChunk) {
		group.Go(func() error {
			for _, client := range chunk {
				func() {
					defer n.guard("looking at a realtime client")
					f(client)
				}()
			}
			return nil
		})
	}
	_ = group.Wait() // no call fails
}

// isGone reports whether a client of other code has ended, or fails to tell.
func isGone(client subscriptions.Client) (gone bool) {
	defer func() { gone = recover() != nil || gone }()
	return client.IsDiscarded()
}

// ResubscribeForeign is [Client.Resubscribe] for a client of other code. expires is when the token
// that signed it in expires. A message sent in the meantime may be lost. The error is [ErrOvertaken] or replace's.
func (n *Notifier) ResubscribeForeign(client subscriptions.Client, a *Admission, expires time.Time, replace func() error) error {
	state := n.foreign.stateOf(client)
	state.requests.Lock()
	defer state.requests.Unlock()
	if state.requests.overtook(a.place, a.who.user) {
		return ErrOvertaken
	}
	n.outboxes.hold() // until it is known that a holds still
	defer n.outboxes.release(1)

	was := n.foreignIdentity(client)
	n.foreign.change(state, func(before *foreignRights) *foreignRights {
		both := maps.Clone(a.grants) // until it is replaced it has what it had, too
		if before != nil {
			for key, had := range before.grants {
				if _, ok := both[key]; !ok {
					both[key] = had
				}
			}
		}
		return &foreignRights{both, expires}
	})
	if err := replace(); err != nil {
		if n.foreignIdentity(client).user == was.user { // it has not signed the client in before that
			expires = was.expiry()
		}
		n.foreign.change(state, func(now *foreignRights) *foreignRights {
			if now == nil { // it has gone
				return nil
			}
			return &foreignRights{now.grants, expires}
		})
		return err
	}
	state.requests.tookEffect(a.place)
	n.foreign.change(state, func(*foreignRights) *foreignRights { return &foreignRights{a.grants, expires} })
	n.foreignClients() // so that it is known, and its rights are forgotten when it goes
	if !n.changes.quietSince(a.generation) {
		n.recheckForeign(client, n.newMemo())
	}
	return nil
}

// recheckForeign evaluates the rules again for what a client of other code has subscribed to
// by request, and ends what is denied now. Where that cannot be told the client has to go: it
// comes back, and is decided on anew.
func (n *Notifier) recheckForeign(client subscriptions.Client, memo *memo) (checked, ended int) {
	for {
		before := n.foreign.rightsOf(client)
		if before == nil {
			return 0, 0
		}
		auth, err := memo.user(n.foreignIdentity(client))
		next := &foreignRights{map[string]grant{}, before.expires}
		var denied []string
		for key, had := range before.grants {
			if err != nil {
				break
			}
			if had.never {
				next.grants[key] = had
				continue
			}
			a := memo.decide(key, auth)
			if err = a.err; a.ok {
				next.grants[key] = a.grant
			} else {
				// it is subscribed until that has been undone
				next.grants[key] = grant{byRule: true, never: true}
				denied = append(denied, key)
			}
		}
		if err != nil {
			n.outboxes.end(client, DisconnectRuleFailed)
			return len(before.grants), 0
		}
		isCurrent := false
		n.foreign.change(n.foreign.stateOf(client), func(now *foreignRights) *foreignRights {
			if isCurrent = now == before; isCurrent {
				return next
			}
			return now
		})
		if !isCurrent {
			continue // it has subscribed anew
		}
		if len(denied) > 0 {
			client.Unsubscribe(denied...)
			n.outboxes.remove(client.Id(), sets.From(denied))
		}
		return len(before.grants), len(denied)
	}
}
