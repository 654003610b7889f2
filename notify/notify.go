// Package notify sends custom realtime messages to the subscribers of a
// PocketBase application: to a topic, narrowed to an audience, without ever
// waiting for a slow one.
//
// It is an engine without routes and flags; the package herald/hooks binds it
// to an application. A message's way through it:
//
//	accept   an id that was sent lately is not sent again (send.go, recent.go)
//	check    validate, encode once, compile the audience (message.go, topic.go, audience.go, filter.go)
//	record   store it, where the topic has history (send.go, internal/history)
//	fanOut   find the recipients, in the topic's order (fanout.go, index.go)
//	enqueue  into each connection's bounded queue (queue.go; outbox.go for clients of other code)
//	write    all that waits, at once (writers.go and socket.go; stream.go; channel.go)
//
// Who may subscribe: access.go, and again when rights change: changes.go, recheck.go. The rules
// are internal/rules. What was missed: recovery.go, replay.go.
//
// # Locks
//
// In the order in which they are taken. Those of one line are not taken under each other.
//
//	Notifier.sending
//	Client.resubscribing
//	Client.authMu
//	Client.subsMu
//	stripe.mu, changes.mu, foreign.mu
//	socket.writing
//	queue.mu, serving.mu, outboxes.mu, writers.mu, index.usersMu, recent.mu, stats.mu
//
// Those of internal/history are taken under none of these, nor these under them.
package notify

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/history"
	"herald/notify/internal/sets"
)

// Notifier sends messages to the realtime connections of one application.
// All its methods may be called concurrently.
type Notifier struct {
	app    core.App
	config Config

	index   *index
	writers *writers
	serving serving
	foreign foreign
	stats   stats

	registered atomic.Int64 // how many of our clients are in the broker
	wrapped    sync.Map     // client ids to the *Client that other code has wrapped
	started    time.Time
	clock      atomic.Int64 // nanoseconds since started, at the last tick

	sending sync.RWMutex   // held for reading while a message that is not stored goes into the queues
	stopped bool           // guarded by sending
	storing sync.WaitGroup // the sends of messages that are stored; begun with sending held

	outboxes outboxes
	recent   recent

	channels   atomic.Pointer[channels]
	hadHistory sets.Of[string] // patterns of channels that had history at some time; used by activate only
	changes    changes
	buckets    buckets

	history     *history.Log
	replaying   sync.WaitGroup // goroutines of replays
	replaySlots chan struct{}  // held while a page is read for a subscription
}

// storeKey is where an application keeps its Notifier: in [core.App.Store],
// which the copies of app that PocketBase makes for transactions share.
const storeKey = "heraldNotifier"

// New returns the Notifier of app. There is one an application, because the
// order of a topic is kept by one; the first call makes it with config, every
// later one returns the same and ignores config. app must not be the app of a
// transaction (New panics), since the Notifier outlives it.
func New(app core.App, config Config) *Notifier {
	return app.Store().GetOrSet(storeKey, func() any {
		if app.IsTransactional() {
			panic("notify.New: called with the app of a transaction")
		}
		config = config.withDefaults()
		n := &Notifier{app: app, config: config, index: newIndex(), writers: newWriters(), started: time.Now()}
		n.serving = serving{tick: n.tick, clients: map[*Client]struct{}{}}
		n.stats.disconnects = map[string]int64{}
		n.outboxes = outboxes{limit: config.QueueSize, byClient: map[string]*outbox{}, evict: n.evict, guard: n.guard}
		n.outboxes.released = sync.NewCond(&n.outboxes.mu)
		n.recent = recent{window: config.IDWindow, byID: map[string]*result{}, bySender: map[string][]*result{}}
		n.channels.Store(unknownChannels)
		n.hadHistory = sets.Of[string]{}
		n.history = n.newHistory()
		n.changes.pending = sets.Of[*Change]{}
		n.changes.waiting = map[*Client]int{}
		n.replaySlots = make(chan struct{}, history.MaxReads)
		n.buckets.byClient = map[bucketKey]*bucket{}
		return n
	}).(*Notifier)
}

// Of returns the Notifier that [New] made for app, nil where it has not been called. app may
// be the app of a transaction.
func Of(app core.App) *Notifier {
	n, _ := app.Store().Get(storeKey).(*Notifier)
	return n
}

// Config returns the configuration in force, with the defaults filled in.
func (n *Notifier) Config() Config { return n.config }

// Notify sends data to all subscribers of topic. It is the short form of
// [Notifier.Send].
//
// Called with the app of a transaction it checks the message at once, sends it
// after the commit, and does not send it when the transaction is rolled back.
// (That needs a Notifier made beforehand by [New]; hooks.Register makes one.)
func Notify(app core.App, topic string, data any) error {
	if !app.IsTransactional() {
		_, err := New(app, Config{}).Send(context.Background(), Message{Topic: topic, Data: data})
		return err
	}

	n := Of(app)
	if n == nil {
		return errors.New("notify: call notify.New(app, …) once before the first transaction that notifies")
	}
	// encoded now: what data points to may have changed by the commit
	pub, err := n.check(Message{Topic: topic, Data: data}, false)
	if err != nil {
		return err
	}
	app.TxInfo().OnComplete(func(txErr error) error {
		if txErr != nil {
			return nil
		}
		// an error returned here would be reported as the error of a
		// transaction that has been committed
		if _, err := n.record(context.Background(), pub); err != nil {
			n.app.Logger().Warn("Failed to send a message after a commit",
				slog.String("topic", topic), slog.String("error", err.Error()))
		}
		return nil
	})
	return nil
}
