// Queues for the clients that are not ours. Called by the fan-out.

package notify

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/routine"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// outboxes are the queues of clients that other code has registered in the
// broker. Their Send may block for as long as it likes (PocketBase's own
// DefaultClient waits for a reader), so it is called from a goroutine: one for
// each client that has something waiting, none for the others.
type outboxes struct {
	limit int               // messages waiting for a client
	evict func(box *outbox) // called, on a goroutine of its own, for a client over the limit

	mu       sync.Mutex         // guards byClient and what the outboxes hold
	byClient map[string]*outbox // by client id; each has a goroutine that drains it
}

type outbox struct {
	client  subscriptions.Client
	waiting []subscriptions.Message
	evicted bool
	drained chan struct{} // closed when nothing waits any more and no Send is under way
}

// enqueue appends message to the outbox of client; false where it is full.
func (o *outboxes) enqueue(client subscriptions.Client, message subscriptions.Message) bool {
	id := client.Id()

	o.mu.Lock()
	defer o.mu.Unlock()
	box, draining := o.byClient[id]
	if !draining {
		box = &outbox{client: client, drained: make(chan struct{})}
		o.byClient[id] = box
		go o.drain(id, box)
	}
	if box.evicted {
		return false
	}
	if len(box.waiting) >= o.limit {
		box.evicted, box.waiting = true, nil
		go o.evict(box)
		return false
	}
	box.waiting = append(box.waiting, message)
	return true
}

// wait returns when nothing waits any more, or expired fires.
func (o *outboxes) wait(expired <-chan time.Time) {
	o.mu.Lock()
	boxes := slices.Collect(maps.Values(o.byClient))
	o.mu.Unlock()
	for _, box := range boxes {
		select {
		case <-box.drained:
		case <-expired:
			return
		}
	}
}

// drain sends what waits in box, in order, until nothing does.
func (o *outboxes) drain(id string, box *outbox) {
	defer close(box.drained)
	for {
		o.mu.Lock()
		if len(box.waiting) == 0 {
			delete(o.byClient, id)
			o.mu.Unlock()
			return
		}
		next := box.waiting[0]
		box.waiting = box.waiting[1:]
		o.mu.Unlock()

		_ = routine.SafeWrap(func() error {
			box.client.Send(next)
			return nil
		})() // a panic of other code's Send costs that one message
	}
}

// evict takes the client of box out of the broker. First it reads from the
// client's channel, to end the Send that is stuck in it: Unregister closes that
// channel, which must not happen while somebody sends to it.
func (n *Notifier) evict(box *outbox) {
	id := box.client.Id()
	giveUp := time.NewTimer(5 * time.Second) // a Send that waits for something else
	defer giveUp.Stop()
	for stuck := true; stuck; {
		select {
		case <-box.client.Channel():
		case <-box.drained:
			stuck = false
		case <-giveUp.C:
			stuck = false
		}
	}
	n.app.SubscriptionsBroker().Unregister(id)
	n.app.Logger().Warn("Realtime client removed", slog.String("clientId", id), slog.String("reason", ReasonQueueFull))
}
