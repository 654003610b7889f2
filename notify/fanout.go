// The fan-out puts one message into the queues of its recipients, in the order of its topic.

package notify

import (
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
)

// fanOut puts pub into the queue of every recipient, and counts it.
func (n *Notifier) fanOut(pub *publication) Report {
	start := time.Now()
	report := n.fanOutAt(start, pub)
	n.stats.sent(report, time.Since(start))
	return report
}

func (n *Notifier) fanOutAt(now time.Time, pub *publication) Report {
	f := fanOut{notifier: n, pub: pub, now: now.Unix(), clock: n.conns.Now(), hooked: n.hooked()}
	f.report = Report{ID: pub.ID, Topic: pub.Topic, Epoch: pub.Epoch, Seq: pub.Seq}
	f.narrows = pub.to.narrows()
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
			f.enqueue(s)
		}
	}
	for _, client := range foreign {
		f.enqueueForeign(client)
	}
	stripe.mu.Unlock()

	if f.readyCount <= writeSelf {
		// cheaper than waking a writer
		for _, client := range f.ready[:f.readyCount] {
			if client.Flush() {
				n.conns.Write(client)
			}
		}
	} else {
		f.handOver()
	}
	f.report.Dropped = f.report.Matched - f.report.Queued
	return f.report
}

// writeSelf is the largest number of ready connections that the sender flushes itself instead
// of waking a writer.
const writeSelf = 2

// namedSubscriptions returns the subscriptions of the clients or users that the audience names one
// by one; false if it names none. The cost grows with their number, not with the topic's
// subscribers.
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
	now      int64 // Unix seconds
	clock    int64
	hooked   bool
	private  bool // not for everyone who can connect
	narrows  bool // the audience may exclude a subscriber
	report   Report

	plain     *conn.Frame            // under the topic itself, as most clients subscribe
	frames    map[string]*conn.Frame // under other keys
	enveloped []byte                 // nil until a subscriber wants it

	ready      [64]*conn.Conn // have something to write
	readyCount int
}

// frame returns the message as it is written under the key name. It is encoded once per key.
func (f *fanOut) frame(name string, envelope bool) *conn.Frame {
	if name == f.pub.Topic {
		if f.plain == nil {
			f.plain = f.newFrame(name, f.data(envelope))
		}
		return f.plain
	}
	made := f.frames[name]
	if made == nil {
		if f.frames == nil {
			f.frames = map[string]*conn.Frame{}
		}
		made = f.newFrame(name, f.data(envelope))
		f.frames[name] = made
	}
	return made
}

// frameAfterGap is frame for the first message of a subscriber that has missed earlier ones.
func (f *fanOut) frameAfterGap(name string) *conn.Frame {
	enveloped, err := f.pub.envelope(true)
	if err != nil {
		return f.frame(name, true)
	}
	return f.newFrame(name, enveloped)
}

func (f *fanOut) newFrame(name string, data []byte) *conn.Frame {
	made := conn.NewFrame(name, data, f.private)
	if f.pub.Seq > 0 {
		made.Marked(conn.Mark{Epoch: f.pub.Epoch, Seq: f.pub.Seq})
	}
	return made
}

// data returns what a subscriber gets.
func (f *fanOut) data(envelope bool) []byte {
	if !envelope {
		return f.pub.Data
	}
	if f.enveloped == nil {
		enveloped, err := f.pub.envelope(false)
		if err != nil { // cannot happen for a checked message
			f.notifier.app.Logger().Error("Failed to encode an envelope", slog.String("error", err.Error()))
		}
		f.enveloped = enveloped
	}
	return f.enveloped
}

// enqueue queues the message under each of the keys of s.
func (f *fanOut) enqueue(s *subscription) {
	client := s.client
	if f.narrows && !f.pub.to.isFor(&reader{who: client.auth.Load().at(f.now), connection: client.conn.ID()}) {
		return
	}
	if f.hooked && client.endIfUnseen(&client.conn) {
		return
	}
	outcome := conn.Gone
	for i := range s.keys {
		key := &s.keys[i]
		if key.grant.forUser && !key.grant.holds(client.auth.Load().at(f.now)) {
			key.replay.lapse()
			continue
		}
		var made *conn.Frame
		switch key.replay.takes(f.pub) {
		case replayed:
			outcome = conn.Queued // the history delivers it, or already has
			continue
		case afterGap:
			made = f.frameAfterGap(key.name)
		default:
			made = f.frame(key.name, key.envelope)
		}
		if outcome = client.conn.Enqueue(made); outcome == conn.Ready {
			if f.readyCount == len(f.ready) {
				f.handOver()
			}
			f.ready[f.readyCount] = &client.conn
			f.readyCount++
		}
		if outcome < conn.Queued {
			break
		}
	}
	switch outcome {
	case conn.Gone:
		return
	case conn.Queued, conn.Ready:
		f.report.Queued++
		client.conn.NoteMessage(f.clock)
	}
	f.report.Matched++
}

// handOver gives the ready clients to the writers.
func (f *fanOut) handOver() {
	f.notifier.conns.Write(f.ready[:f.readyCount]...)
	f.readyCount = 0
}

// enqueueForeign is enqueue for a client of other code.
func (f *fanOut) enqueueForeign(client subscriptions.Client) {
	n := f.notifier
	defer n.guard("queueing a message for a realtime client of other code")
	r := reader{who: n.foreignIdentity(client), connection: client.Id()}
	holds := func(key string) bool {
		granted := n.foreign.rightsOf(client).grantOf(key)
		return granted.holds(r.who)
	}
	keys := slices.DeleteFunc(n.keysOf(client, f.pub.Topic), func(key string) bool { return !holds(key) })
	if len(keys) == 0 || client.IsDiscarded() || !f.pub.to.isFor(&r) {
		return
	}
	all := true
	for _, key := range keys {
		data := f.data(strings.Contains(key, "?") && wantsEnvelope(optionsOf(key)))
		// again, in the queue: what was denied meanwhile is not removed from there twice
		all = n.outboxes.enqueue(client, subscriptions.Message{Name: key, Data: data}, func() bool { return holds(key) }) && all
	}
	f.report.Matched++
	if all {
		f.report.Queued++
	}
}
