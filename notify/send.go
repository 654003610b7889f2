// Sending: the order of a topic and the fan-out to its subscribers. The entry of
// the engine, called by hooks and by the code of applications.

package notify

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// Send sends msg to the subscribers of its topic that belong to its audience,
// and returns once the message is in their queues. It waits for no subscriber.
//
// A message that is wrong is refused whole with an error of type [Errors].
// Other errors are those of the filter's query and of ctx, and [ErrShutdown];
// then too nobody got the message. ctx is not looked at any more once the fan-out has begun.
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
	return n.sendOnce(ctx, msg, "", func() (*publication, error) { return n.prepare(msg, system) })
}

// sendOnce sends what prepare makes of msg, unless its sender, whose messages have
// ids of their own, has sent one with the same id.
func (n *Notifier) sendOnce(ctx context.Context, msg Message, sender string, prepare func() (*publication, error)) (Report, error) {
	send := func() (Report, error) {
		pub, err := prepare()
		if err != nil {
			return Report{}, err
		}
		if msg.ID != "" {
			pub.Key = sender + msg.ID
		}
		return n.publish(ctx, pub)
	}
	if msg.ID == "" {
		return send()
	}
	if fieldErr := checkID(msg.ID); fieldErr != nil {
		return Report{}, Errors{fieldErr}
	}
	return n.recent.do(ctx, sender, msg.ID, send)
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

	report, done, err := n.deliverUnstored(pub)
	if done || err != nil {
		return report, err
	}
	defer n.storing.Done()
	return n.deliverStored(ctx, pub)
}

// deliverStored delivers pub when it is stored. That is done by the goroutine that stores it,
// together with others': perhaps another sender's.
func (n *Notifier) deliverStored(ctx context.Context, pub *publication) (report Report, err error) {
	if pub.Key != "" {
		// the one with the same id may have been stored before the process began
		before, err := n.history.Find(pub.Topic, pub.Key)
		if err != nil || before.Seq > 0 {
			return Report{ID: pub.ID, Topic: pub.Topic, Epoch: before.Epoch, Seq: before.Seq}, err
		}
	}
	if pub.sender != (userRef{}) {
		pub.Sender = pub.sender.String()
	}
	if pub.Audience, err = pub.to.stored(); err != nil {
		return Report{}, err
	}
	err = n.history.Append(ctx, &pub.Entry, func() { report = n.deliver(pub) })
	return report, err
}

// deliverUnstored delivers pub where its topic has no history. Otherwise it notes in storing
// that it is to be stored, which takes as long as the disk does.
func (n *Notifier) deliverUnstored(pub *publication) (report Report, done bool, err error) {
	n.sending.RLock()
	defer n.sending.RUnlock()
	if n.stopped {
		return Report{}, false, ErrShutdown
	}
	if n.historyOf(pub.Topic).Count > 0 {
		n.storing.Add(1)
		return Report{}, false, nil
	}
	return n.deliver(pub), true, nil
}

// deliver takes pub to its recipients and counts it.
func (n *Notifier) deliver(pub *publication) Report {
	start := time.Now()
	report := n.fanOut(pub)
	n.stats.sent(report, time.Since(start))
	return report
}

// fanOut puts pub into the queue of every recipient.
func (n *Notifier) fanOut(pub *publication) Report {
	f := fanOut{notifier: n, pub: pub, now: time.Now(), clock: n.clock.Load(), hooked: n.hooked()}
	f.report = Report{ID: pub.ID, Topic: pub.Topic, Epoch: pub.Epoch, Seq: pub.Seq}
	f.private = pub.to.looksAtAuth || n.isRestricted(pub.Topic)
	named, isNamed := n.namedSubscriptions(pub)
	foreign := n.foreignClients()

	stripe := n.index.stripe(pub.Topic)
	stripe.mu.Lock()
	if !isNamed {
		named = stripe.subscribers[pub.Topic]
	}
	for _, s := range named {
		if s.at >= 0 {
			f.deliver(s)
		}
	}
	for _, client := range foreign {
		f.deliverForeign(client)
	}
	stripe.mu.Unlock()

	if f.readyCount <= writeSelf {
		// cheaper than to wake a writer
		for _, client := range f.ready[:f.readyCount] {
			if client.flush() {
				n.writers.add(client)
			}
		}
	} else {
		f.handOver()
	}
	f.report.Dropped = f.report.Matched - f.report.Queued
	return f.report
}

// writeSelf is to how many connections a sender writes itself.
const writeSelf = 2

// namedSubscriptions returns the subscriptions of those whom the audience names
// one by one; false where it names nobody. They cost what they are, however many
// others listen to the topic.
func (n *Notifier) namedSubscriptions(pub *publication) ([]*subscription, bool) {
	var clients []*Client
	switch {
	case pub.to.clients != nil:
		for id := range pub.to.clients {
			if client, err := n.app.SubscriptionsBroker().ClientById(id); err == nil {
				if own := n.own(client); own != nil {
					clients = append(clients, own)
				}
			}
		}
	case pub.to.users != nil:
		for user := range pub.to.users {
			clients = append(clients, n.index.clientsOf(user)...)
		}
	default:
		return nil, false
	}
	named := make([]*subscription, 0, len(clients))
	for _, client := range clients {
		if s := client.subscriptionTo(pub.Topic); s != nil {
			named = append(named, s)
		}
	}
	return named, true
}

// fanOut is one message on its way into the queues.
type fanOut struct {
	notifier *Notifier
	pub      *publication
	now      time.Time
	clock    int64
	hooked   bool
	private  bool // not for everyone who can connect
	report   Report

	plain     *frame            // under the topic itself, which most subscribe to
	frames    map[string]*frame // under other keys
	enveloped []byte            // nil until somebody wants it

	ready      [64]*Client // are to be written to
	readyCount int
}

// frame returns the message as it is written under key; it is encoded once.
func (f *fanOut) frame(name string, envelope bool) *frame {
	if name == f.pub.Topic {
		if f.plain == nil {
			f.plain = newFrame(f.message(name, envelope), f.private)
		}
		return f.plain
	}
	made := f.frames[name]
	if made == nil {
		if f.frames == nil {
			f.frames = map[string]*frame{}
		}
		made = newFrame(f.message(name, envelope), f.private)
		f.frames[name] = made
	}
	return made
}

// frameAfterGap is frame for a subscriber whose first message it is, and who has
// missed some before it.
func (f *fanOut) frameAfterGap(name string) *frame {
	enveloped, err := f.pub.envelope(true)
	if err != nil {
		return f.frame(name, true)
	}
	return newFrame(subscriptions.Message{Name: name, Data: enveloped}, f.private)
}

// message returns the message under a key.
func (f *fanOut) message(name string, envelope bool) subscriptions.Message {
	if !envelope {
		return subscriptions.Message{Name: name, Data: f.pub.Data}
	}
	if f.enveloped == nil {
		enveloped, err := f.pub.envelope(false)
		if err != nil { // of a checked message there is none
			f.notifier.app.Logger().Error("Failed to encode an envelope", slog.String("error", err.Error()))
		}
		f.enveloped = enveloped
	}
	return subscriptions.Message{Name: name, Data: f.enveloped}
}

// deliver queues the message under each of the keys of s.
func (f *fanOut) deliver(s *subscription) {
	client := s.client
	if !f.pub.to.matchClient(client, f.now) {
		return
	}
	if f.hooked && client.isTaken() {
		client.Finish(ReasonHandlers)
		return
	}
	outcome := gone
	for i := range s.keys {
		key := &s.keys[i]
		if key.grant.forUser && !key.grant.holds(client.authAt(f.now)) {
			continue
		}
		var made *frame
		switch key.replay.takes(f.pub) {
		case replayed:
			outcome = queued // it comes, or has come, from the history
			continue
		case afterGap:
			made = f.frameAfterGap(key.name)
		default:
			made = f.frame(key.name, key.envelope)
		}
		if outcome = client.enqueue(made); outcome == ready {
			if f.readyCount == len(f.ready) {
				f.handOver()
			}
			f.ready[f.readyCount] = client
			f.readyCount++
		}
		if outcome < queued {
			break
		}
	}
	switch outcome {
	case gone:
		return
	case queued, ready:
		f.report.Queued++
		client.lastMessage.Store(f.clock)
	}
	f.report.Matched++
}

// handOver gives those who are ready to the writers.
func (f *fanOut) handOver() {
	f.notifier.writers.add(f.ready[:f.readyCount]...)
	f.readyCount = 0
}

// deliverForeign does the same for a client of other code.
func (f *fanOut) deliverForeign(client subscriptions.Client) {
	defer func() {
		if cause := recover(); cause != nil {
			f.notifier.app.Logger().Error("Panic in a realtime client during a fan-out", slog.Any("cause", cause))
		}
	}()
	auth, rights := foreignAuth(client), rightsOf(client)
	keys := slices.DeleteFunc(f.notifier.keysOf(client, f.pub.Topic), func(key string) bool { return !rights.grantOf(key).holds(auth) })
	if len(keys) == 0 || client.IsDiscarded() || !f.pub.to.match(client, auth) {
		return
	}
	all := true
	for _, key := range keys {
		message := f.message(key, strings.Contains(key, "?") && wantsEnvelope(optionsOf(key)))
		all = f.notifier.outboxes.enqueue(client, message) && all
	}
	f.report.Matched++
	if all {
		f.report.Queued++
	}
}
