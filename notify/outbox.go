// Queues for clients that are not ours. The fan-out fills them.

package notify

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/routine"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
	"herald/notify/internal/sets"
)

// outboxes are the queues of clients that other code has registered in the broker. Their Send may
// block for as long as it likes (PocketBase's own DefaultClient waits for a reader), so a goroutine
// calls it. Only clients with something waiting have such a goroutine.
type outboxes struct {
	limit int                               // messages waiting for a client
	evict func(box *outbox, why Disconnect) // called on its own goroutine
	guard func(what string)                 // see guard.go

	mu       sync.Mutex         // guards the fields below and the contents of the outboxes
	byClient map[string]*outbox // by client id; each has a goroutine that drains it
	held     int                // number of holders that stop sending for now
	released *sync.Cond         // signaled when held drops to 0, or a box is evicted
}

type outbox struct {
	client  subscriptions.Client
	waiting []subscriptions.Message
	evicted bool
	drained chan struct{} // closed when nothing waits and no Send is in progress
}

// enqueue appends message to the outbox of client where mayHave says that it may have it;
// false where the outbox is full.
func (o *outboxes) enqueue(client subscriptions.Client, message subscriptions.Message, mayHave func() bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !mayHave() {
		return false
	}
	box := o.of(client)
	if box.evicted {
		return false
	}
	limit := o.limit
	if o.held > 0 { // the client is not at fault
		limit *= conn.Excused
	}
	if len(box.waiting) >= limit {
		o.endLocked(box, DisconnectQueueFull)
		return false
	}
	box.waiting = append(box.waiting, message)
	return true
}

// of returns the outbox of client; it creates a missing one. mu is held.
func (o *outboxes) of(client subscriptions.Client) *outbox {
	id := client.Id()
	box := o.byClient[id]
	if box == nil {
		box = &outbox{client: client, drained: make(chan struct{})}
		o.byClient[id] = box
		go o.drain(id, box)
	}
	return box
}

// end removes client from the broker. Nothing more is sent to it.
func (o *outboxes) end(client subscriptions.Client, why Disconnect) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if box := o.of(client); !box.evicted {
		o.endLocked(box, why)
	}
}

func (o *outboxes) endLocked(box *outbox, why Disconnect) {
	box.evicted, box.waiting = true, nil
	o.released.Broadcast()
	go o.evict(box, why)
}

// hold stops sending, both of what waits and of what will, until release has undone every hold.
func (o *outboxes) hold() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.held++
}

func (o *outboxes) release(times int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.held -= times; o.held == 0 {
		o.released.Broadcast()
	}
}

// remove drops the messages that wait for a client under keys.
func (o *outboxes) remove(clientID string, keys sets.Of[string]) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if box := o.byClient[clientID]; box != nil {
		box.waiting = slices.DeleteFunc(box.waiting, func(m subscriptions.Message) bool { return keys.Has(m.Name) })
	}
}

// wait returns when nothing waits.
func (o *outboxes) wait() {
	o.mu.Lock()
	boxes := slices.Collect(maps.Values(o.byClient))
	o.mu.Unlock()
	for _, box := range boxes {
		<-box.drained
	}
}

// drain sends what waits in box, in order, until box is empty.
func (o *outboxes) drain(id string, box *outbox) {
	defer close(box.drained)
	defer o.guard("sending to a realtime client of other code")
	for {
		o.mu.Lock()
		for o.held > 0 && len(box.waiting) > 0 {
			o.released.Wait()
		}
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

// evict removes the client of box from the broker. First it reads from the client's channel to end
// a Send that is stuck in it: Unregister closes that channel, which must not happen during a Send.
func (n *Notifier) evict(box *outbox, why Disconnect) {
	defer n.guard("removing a realtime client of other code")
	id := box.client.Id()
	giveUp := time.NewTimer(5 * time.Second) // for a Send that waits for something else
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
	n.app.Logger().Warn("Realtime client removed", slog.String("clientId", id), slog.String("reason", why.Reason))
}
