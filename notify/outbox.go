package notify

import (
	"log/slog"
	"sync"

	"github.com/pocketbase/pocketbase/tools/routine"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// outboxes are the queues of clients that other code has registered in the
// broker. Their Send may block for as long as it likes (PocketBase's own
// DefaultClient waits for a reader), so it is called from a goroutine: one for
// each client that has something waiting, none for the others.
type outboxes struct {
	limit int                               // messages waiting a client
	evict func(client subscriptions.Client) // called, in a goroutine, for a client over the limit

	mu      sync.Mutex          // guards waiting
	waiting map[string][]queued // by client id; no entry without a goroutine that drains it
}

// queued is a message on its way to a client.
type queued struct {
	client  subscriptions.Client
	message subscriptions.Message
}

// enqueue appends message to the outbox of client; false where it is full.
func (o *outboxes) enqueue(client subscriptions.Client, message subscriptions.Message) bool {
	id := client.Id()

	o.mu.Lock()
	defer o.mu.Unlock()
	waiting, draining := o.waiting[id]
	if len(waiting) >= o.limit {
		o.waiting[id] = waiting[:0]
		go o.evict(client)
		return false
	}
	o.waiting[id] = append(waiting, queued{client, message})
	if !draining {
		go o.drain(id)
	}
	return true
}

// drain sends what waits for the client with id, in order, until nothing does.
func (o *outboxes) drain(id string) {
	for {
		o.mu.Lock()
		waiting := o.waiting[id]
		if len(waiting) == 0 {
			delete(o.waiting, id)
			o.mu.Unlock()
			return
		}
		next := waiting[0]
		o.waiting[id] = waiting[1:]
		o.mu.Unlock()

		_ = routine.SafeWrap(func() error {
			next.client.Send(next.message)
			return nil
		})() // a panic of other code's Send costs that one message
	}
}

// evict takes a client out of the broker, which discards it and so ends a
// blocked Send of PocketBase's DefaultClient.
func (n *Notifier) evict(client subscriptions.Client) {
	n.app.Logger().Warn("Realtime client removed",
		slog.String("clientId", client.Id()), slog.String("reason", ReasonQueueFull))
	n.app.SubscriptionsBroker().Unregister(client.Id())
}
