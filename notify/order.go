// The order of a client's requests to subscribe. Each replaces all that the client is subscribed to, and PocketBase's SDK
// sends the next one without waiting for the answer to the one before. So the last one that arrived counts, in whichever
// order they are handled. Called by hooks/subscribe.go.

package notify

import (
	"context"
	"errors"
	"sync"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// ErrOvertaken says that a request to subscribe has had no effect, because one that arrived later was handled before.
var ErrOvertaken = errors.New("a later request has been handled before")

type placeKey struct{}

// Arrived returns ctx with the next place in the order of requests, or ctx itself if it has one. Call it for each request
// to subscribe when it arrives. It may be called concurrently.
func (n *Notifier) Arrived(ctx context.Context) context.Context {
	if ctx.Value(placeKey{}) != nil {
		return ctx
	}
	return context.WithValue(ctx, placeKey{}, n.places.Add(1))
}

// ArrivedFirst is [Notifier.Arrived] for a request that counts as if it had come before all others, which wait for it.
func ArrivedFirst(ctx context.Context) context.Context {
	return context.WithValue(ctx, placeKey{}, uint64(0))
}

// placeOf returns the place of a request in the order of requests, 0 if it has none or is the first.
func placeOf(ctx context.Context) uint64 {
	place, _ := ctx.Value(placeKey{}).(uint64)
	return place
}

// order is what a client's earlier requests are compared with.
type order struct {
	sync.Mutex        // held while a request takes effect; guards the fields
	replaced   uint64 // place of the request that the subscriptions are from
	last       uint64 // place of the last request, which may have been refused
	as         userRef
}

// overtook reports whether a request does not count any more. Earlier ones than a refused one still do, but not as somebody
// else: the browser has another user by now, or none.
func (o *order) overtook(place uint64, as userRef) bool {
	return place != 0 && (place < o.replaced || place < o.last && as != o.as)
}

// tookEffect notes that the subscriptions are from the request at place.
func (o *order) tookEffect(place uint64) { o.replaced = max(o.replaced, place) }

// note notes that a request has come, unless it does not count any more.
func (o *order) note(place uint64, as userRef) error {
	if o.overtook(place, as) {
		return ErrOvertaken
	}
	if place > o.last {
		o.last, o.as = place, as
	}
	return nil
}

// NoteRequest notes that a request to subscribe client has come, with the auth record auth; nil for a guest's. ctx is the request's.
// It waits for one that is taking effect, and returns ErrOvertaken if that or another one came later. It may be called again.
func (n *Notifier) NoteRequest(ctx context.Context, client subscriptions.Client, auth *core.Record) error {
	var requests *order
	if own := n.own(client); own != nil {
		requests = &own.requests
	} else {
		requests = &n.foreign.stateOf(client).requests
	}
	requests.Lock()
	defer requests.Unlock()
	return requests.note(placeOf(ctx), identityOf(auth, 0).user)
}
