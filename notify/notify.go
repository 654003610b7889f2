// Package notify sends custom realtime messages to the subscribers of a
// PocketBase application. A message goes to a topic, narrowed to an audience,
// and never waits for a slow subscriber.
//
// The package is an engine without routes and flags; the package herald/hooks
// binds it to an application. A message passes through these steps:
//
//	accept   do not send an id again that was sent recently (send.go, recent.go)
//	check    validate, encode once, compile the audience (message.go, topic.go, audience.go, filter.go)
//	record   store the message if its topic has history (send.go, internal/history)
//	fanOut   find the recipients, in the topic's order (fanout.go, index.go)
//	enqueue  into each connection's bounded queue (internal/conn; outbox.go for clients of other code)
//	write    everything that waits, at once (internal/conn)
//
// carried.go is about clients whose connections an edge holds (the packages origin and edge). To everything else they
// are clients like others.
//
// presence.go reports who is subscribed to internal/presence, and presence_watch.go tells watchers.
// access.go decides who may subscribe; changes.go and recheck.go decide it again when rights change. The
// rules are in internal/rules. recovery.go and replay.go deliver missed messages.
//
// # Locks
//
// Locks are taken in this order. Never hold two locks of the same line at once.
//
//	Notifier.sending
//	Client.requests
//	Client.authMu
//	Client.subsMu
//	attendances.telling, attendances.renewMu
//	stripe.mu, changes.mu, foreign.mu, Client.channelMu
//	the locks of internal/presence
//	the locks of internal/conn
//	outboxes.mu, index.usersMu, recent.mu, stats.mu, bases.mu
//	foreign.rightsMu, lapses.mu of internal/history
//
// The other locks of internal/history are never held together with these, in either order.
package notify

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/conn"
	"herald/notify/internal/history"
	"herald/notify/internal/presence"
	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

// Notifier sends messages to the realtime connections of one application.
// All its methods may be called concurrently.
type Notifier struct {
	app    core.App
	config Config

	index   *index
	conns   *conn.Group
	foreign foreign
	stats   stats

	registered atomic.Int64 // number of our clients in the broker
	wrapped    sync.Map     // client id to the *Client that other code has wrapped

	sending sync.RWMutex   // held for reading while a message that is not stored goes into the queues
	stopped bool           // guarded by sending
	storing sync.WaitGroup // sends of stored messages; each begins with sending held
	places  atomic.Uint64  // of requests to subscribe: see order.go

	presence attendances
	basis    bases

	outboxes outboxes
	recent   recent

	channels   atomic.Pointer[channels]
	statements *rules.Statements
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

// New returns the Notifier of app. There is one per application, because one Notifier must keep the
// order of each topic. The first call creates it with config; every later call returns the same one
// and ignores config. app must not be the app of a transaction (New panics), because the Notifier
// outlives it.
func New(app core.App, config Config) *Notifier {
	return app.Store().GetOrSet(storeKey, func() any {
		if app.IsTransactional() {
			panic("notify.New: called with the app of a transaction")
		}
		config = config.withDefaults()
		n := &Notifier{app: app, config: config, index: newIndex()}
		n.conns = conn.NewGroup(conn.Config{QueueSize: config.QueueSize, QueueBytes: config.QueueBytes, Heartbeat: config.Heartbeat},
			func(what string, cause any, id string) { n.logPanic(what, cause, slog.String("clientId", id)) })
		n.stats.disconnects = map[string]int64{}
		n.outboxes = outboxes{limit: config.QueueSize, byClient: map[string]*outbox{}, evict: n.evict, guard: n.guard}
		n.foreign.rights = map[string]*foreignState{}
		n.outboxes.released = sync.NewCond(&n.outboxes.mu)
		n.recent = recent{window: config.IDWindow, byID: map[string]*result{}, bySender: map[string][]*result{}}
		n.channels.Store(unknownChannels)
		n.statements = rules.NewStatements(app)
		n.presence = n.newAttendances()
		n.basis = bases{app: app, known: map[basis]presence.Basis{}}
		n.hadHistory = sets.Of[string]{}
		n.history = n.newHistory()
		n.changes.pending = sets.Of[*Change]{}
		n.changes.waiting = map[*Client]int{}
		n.replaySlots = make(chan struct{}, history.MaxReads)
		n.buckets.byClient = map[bucketKey]*bucket{}
		return n
	}).(*Notifier)
}

// Of returns the Notifier that [New] made for app, or nil if New has not been called. app may be
// the app of a transaction.
func Of(app core.App) *Notifier {
	n, _ := app.Store().Get(storeKey).(*Notifier)
	return n
}

// Config returns the configuration in force, with the defaults filled in.
func (n *Notifier) Config() Config { return n.config }

// Notify sends data to all subscribers of topic. It is the short form of
// [Notifier.Send].
//
// If app is the app of a transaction, Notify checks the message at once and sends it after the
// commit. It does not send it if the transaction is rolled back. (This needs a Notifier made
// beforehand by [New]; hooks.Register makes one.)
func Notify(app core.App, topic string, data any) error {
	if !app.IsTransactional() {
		_, err := New(app, Config{}).Send(context.Background(), Message{Topic: topic, Data: data})
		return err
	}

	n := Of(app)
	if n == nil {
		return errors.New("notify: call notify.New(app, …) once before the first transaction that notifies")
	}
	// encode now: what data points to may change before the commit
	pub, err := n.check(Message{Topic: topic, Data: data}, false)
	if err != nil {
		return err
	}
	app.TxInfo().OnComplete(func(txErr error) error {
		if txErr != nil {
			return nil
		}
		// an error returned here would be reported as the error of a transaction that has already
		// been committed
		if _, err := n.record(context.Background(), pub); err != nil {
			n.app.Logger().Warn("Failed to send a message after a commit",
				slog.String("topic", topic), slog.String("error", err.Error()))
		}
		return nil
	})
	return nil
}
