// Sending: the engine's entry point, called by hooks and by application code. A message is accepted
// once, checked, recorded if its topic has history, and fanned out.

package notify

import (
	"context"
	"fmt"

	"herald/notify/internal/sets"
)

// Send sends msg to the subscribers of its topic that belong to its audience,
// and returns once the message is in their queues. It waits for no subscriber.
//
// A message that is wrong is refused as a whole with an error of type [Errors]. Other errors come
// from the filter's query, from ctx and from the history ([ErrHistory]), or are [ErrShutdown]; in
// those cases nobody got the message either. ctx is ignored once the fan-out has begun.
//
// Messages sent one after another reach each connection in that order. If messages are sent to one
// topic concurrently, all subscribers see the same order.
func (n *Notifier) Send(ctx context.Context, msg Message) (Report, error) {
	return n.accept(ctx, msg, false)
}

// SendSystem is [Notifier.Send] for the server's own topics, such as "@inbox", which are otherwise
// reserved. Never give it a topic that a client chose.
func (n *Notifier) SendSystem(ctx context.Context, msg Message) (Report, error) {
	return n.accept(ctx, msg, true)
}

func (n *Notifier) accept(ctx context.Context, msg Message, system bool) (Report, error) {
	return n.acceptOnce(ctx, msg, "", "", func() (*publication, error) { return n.check(msg, system) })
}

// acceptOnce takes what check makes of msg to its recipients, unless its sender, whose
// messages have ids of their own, has sent one with the same id. limited is who has a limit
// of ids that are remembered; empty: nobody.
func (n *Notifier) acceptOnce(ctx context.Context, msg Message, limited, sender string, check func() (*publication, error)) (Report, error) {
	send := func() (Report, error) {
		pub, err := check()
		if err != nil {
			return Report{}, err
		}
		if msg.ID != "" {
			pub.Key = sender + msg.ID
		}
		return n.record(ctx, pub)
	}
	if msg.ID == "" {
		return send()
	}
	if fieldErr := checkID(msg.ID); fieldErr != nil {
		return Report{}, Errors{fieldErr}
	}
	return n.recent.do(ctx, limited, sender+msg.ID, send)
}

// record stores pub if its topic has history, and delivers it to its recipients.
func (n *Notifier) record(ctx context.Context, pub *publication) (Report, error) {
	if pub.to.filter != nil {
		if err := n.resolveFilter(ctx, pub); err != nil {
			return Report{}, fmt.Errorf("resolve the audience's filter: %w", err)
		}
	}
	if err := ctx.Err(); err != nil {
		return Report{}, err
	}
	report, done, err := n.fanOutUnstored(pub)
	if done || err != nil {
		return report, err
	}
	defer n.storing.Done()
	return n.fanOutStored(ctx, pub)
}

// fanOutUnstored delivers pub if its topic has no history. Otherwise it adds the send to storing,
// because storing takes as long as the disk does.
func (n *Notifier) fanOutUnstored(pub *publication) (report Report, done bool, err error) {
	n.sending.RLock()
	defer n.sending.RUnlock()
	if n.stopped {
		return Report{}, false, ErrShutdown
	}
	if n.HasHistory(pub.Topic) {
		n.storing.Add(1)
		return Report{}, false, nil
	}
	return n.fanOut(pub), true, nil
}

// usersOfClients maps the ids of connections to the users to whom they belong now.
func (n *Notifier) usersOfClients(ids sets.Of[string]) map[string]string {
	var users map[string]string
	for id := range ids {
		client, err := n.app.SubscriptionsBroker().ClientById(id)
		if err != nil {
			continue
		}
		if who := n.identityOf(client); !who.isGuest() {
			if users == nil {
				users = map[string]string{}
			}
			users[id] = who.user.String()
		}
	}
	return users
}

// manySubscribers is how many subscribers make a topic so large that others should not wait for its fan-out (half a
// millisecond).
const manySubscribers = 500

// fanOutStored stores pub and then delivers it. The goroutine that stores it, together with other messages, may
// belong to another sender, and so may the one that fans it out.
func (n *Notifier) fanOutStored(ctx context.Context, pub *publication) (report Report, err error) {
	if pub.Key != "" {
		// a message with the same id may have been stored before this process started
		before, err := n.history.Find(pub.Topic, pub.Key)
		if err != nil {
			return Report{}, err
		}
		if before.Seq > 0 {
			return Report{ID: pub.ID, Topic: pub.Topic, Epoch: before.Epoch, Seq: before.Seq}, nil
		}
	}
	if pub.sender != (userRef{}) {
		pub.Sender = pub.sender.String()
	}
	pub.to.clientUsers = n.usersOfClients(pub.to.clients)
	if pub.Audience, err = pub.to.stored(); err != nil {
		return Report{}, err
	}
	isLong := n.index.subscribersOf(pub.Topic) >= manySubscribers
	err = n.history.Append(ctx, &pub.Entry, isLong, func() { report = n.fanOut(pub) })
	return report, err
}
