// Sending: the order of a topic and the fan-out to its subscribers. The entry of
// the engine, called by hooks and by the code of applications.

package notify

import (
	"context"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync/atomic"

	"github.com/pocketbase/pocketbase/tools/routine"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
	"golang.org/x/sync/errgroup"
)

// Send sends msg to the subscribers of its topic that belong to its audience,
// and returns once the message is in their queues. It waits for no subscriber.
//
// A message that is wrong is refused whole with an error of type [Errors].
// Other errors are those of the filter's query and of ctx; then too nobody got
// the message. ctx is not looked at any more once the fan-out has begun.
//
// Messages that are sent one after another reach each connection in that order.
// Of concurrent sends to one topic all subscribers see the same order.
func (n *Notifier) Send(ctx context.Context, msg Message) (Report, error) {
	return n.send(ctx, msg, false)
}

// SendSystem is [Notifier.Send] for the server's own topics, such as "@inbox",
// that are reserved otherwise. Never give it a topic that a client chose.
func (n *Notifier) SendSystem(ctx context.Context, msg Message) (Report, error) {
	return n.send(ctx, msg, true)
}

func (n *Notifier) send(ctx context.Context, msg Message, system bool) (Report, error) {
	sendOnce := func() (Report, error) {
		pub, err := n.prepare(msg, system)
		if err != nil {
			return Report{}, err
		}
		return n.publish(ctx, pub)
	}
	if msg.ID == "" {
		return sendOnce()
	}
	if fieldErr := checkID(msg.ID); fieldErr != nil {
		return Report{}, Errors{fieldErr}
	}
	return n.recent.do(ctx, msg.ID, sendOnce)
}

// publish takes pub to its recipients.
func (n *Notifier) publish(ctx context.Context, pub *publication) (Report, error) {
	if pub.to.filter != nil {
		if err := n.resolveFilter(ctx, pub); err != nil {
			return Report{}, fmt.Errorf("resolve the audience's filter: %w", err)
		}
	}
	if err := ctx.Err(); err != nil {
		return Report{}, err
	}

	order := &n.order[maphash.String(n.seed, pub.topic)%uint64(len(n.order))]
	order.Lock()
	defer order.Unlock()

	return n.fanOut(pub), nil
}

// fanOut puts pub into the queue of every recipient.
func (n *Notifier) fanOut(pub *publication) Report {
	var matched, queued atomic.Int64

	group := new(errgroup.Group)
	for _, chunk := range n.app.SubscriptionsBroker().ChunkedClients(n.config.ChunkSize) {
		group.Go(routine.SafeWrap(func() error {
			for _, client := range chunk {
				isMatch, isQueued := n.deliver(client, pub)
				if isMatch {
					matched.Add(1)
				}
				if isQueued {
					queued.Add(1)
				}
			}
			return nil
		}))
	}
	if err := group.Wait(); err != nil {
		// only a client type of other code can panic in there
		n.app.Logger().Error("Panic in a realtime client during a fan-out", slog.String("error", err.Error()))
	}

	report := Report{ID: pub.id, Topic: pub.topic, Matched: int(matched.Load()), Queued: int(queued.Load())}
	report.Dropped = report.Matched - report.Queued
	return report
}

// deliver queues pub for client under each of the keys by which client has
// subscribed to its topic.
func (n *Notifier) deliver(client subscriptions.Client, pub *publication) (matched, queued bool) {
	keys := keysOf(client, pub.topic)
	if len(keys) == 0 || client.IsDiscarded() || !pub.to.match(client) {
		return false, false
	}
	queued = true
	for _, key := range keys {
		queued = n.enqueue(client, subscriptions.Message{Name: key, Data: pub.data}) && queued
	}
	return true, queued
}

// enqueue gives message to client without blocking. It reports false where the
// client's queue is full; the client is then disconnected.
func (n *Notifier) enqueue(client subscriptions.Client, message subscriptions.Message) bool {
	if own, ok := client.(*Client); ok {
		return own.enqueue(message)
	}
	return n.outboxes.enqueue(client, message)
}
