// Package history is the log of the topics with history. Each message gets its topic's next number,
// is stored, and is then delivered in the order stored. The package does not know who may have a
// message or who gets it.
//
// Writing: log.go (Append) → line.go (whose turn it is to write) → store.go (the database).
// Reading: page.go. Deletion: sweep.go. Special cases: lapses.go (a topic had no history for a
// while), times.go (a wrong clock), damaged.go (a damaged file).
package history

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"herald/notify/internal/waits"
)

// ErrUnavailable refuses a message, or a request for missed ones, because the history cannot be
// written or read, for example because the disk is full. The refused message reached nobody. A
// retry may succeed.
var ErrUnavailable = errors.New("the history is not available")

// ErrClosed refuses a message because the log is closed, as the server is stopping. A retry reaches
// its successor.
var ErrClosed = errors.New("the server is shutting down")

const (
	// trimSlack: up to 1/trimSlack more messages than the channel keeps stay on the disk before
	// they are deleted, many at a time. Nobody sees them. minTrimSlack is the smallest such number.
	trimSlack    = 8
	minTrimSlack = 16
	// maxTrim is the maximum number of messages of a topic that are deleted at a time, so that
	// nobody waits for it.
	maxTrim = 256

	// reopenEvery is how often opening is retried after a failure.
	reopenEvery = time.Second
)

// Entry is a message in the log.
type Entry struct {
	ID    string
	Topic string
	Key   string // the same for all attempts to send it; empty if there is only one
	Data  []byte

	// Sender and Audience are for readers of the log; the log itself does not look into them.
	Sender   string
	Audience []byte // nil for everyone

	// set by [Log.Append]
	Epoch string
	Seq   int64
	Time  time.Time // set earlier for a message that is not stored
}

// Retention is how much of a topic is kept.
type Retention struct {
	Count int64         // messages; 0 means that the topic has no history
	TTL   time.Duration // 0 means indefinitely
}

// oldest returns the earliest time at which a kept message may have been sent, in Unix
// milliseconds; 0 means no limit.
func (r Retention) oldest(now time.Time) int64 {
	if r.TTL <= 0 {
		return 0
	}
	return now.Add(-r.TTL).UnixMilli()
}

// Config holds the options of a [Log]. All are required except SweepEvery.
type Config struct {
	Path   string // of the database, which is created when it is needed
	Logger func() *slog.Logger
	// IDWindow is the minimum time for which the key of a message is kept.
	IDWindow   time.Duration
	SweepEvery time.Duration // 0 means never
	Keep       func(topic string) Retention
	// Identify converts what the first versions stored by name to the current format.
	Identify func(sent time.Time, audience []byte, sender string) ([]byte, string)
	Now      func() time.Time
	Elapsed  func(now time.Time) time.Duration // since any moment, by a clock that is never set
	Guard    func(what string)                 // deferred by goroutines; it recovers from panics
}

// Log stores the messages of topics with history. Its methods may be called concurrently.
//
// Senders stand in line. The first one leads: it stores the messages of all waiting senders in one
// transaction (a group commit), delivers them in that order, and passes the lead to a sender that
// arrived in the meantime. So one disk sync serves all senders of that moment, and a single sender
// waits for no other goroutine. (Storing the next group during the delivery of the current one was
// tried: groups become half as large, and throughput drops. Only messages to thousands are
// delivered by their own senders, so that others do not wait for them.)
type Log struct {
	config Config
	clock  clock

	store atomic.Pointer[store] // nil until it is needed; written by the leader

	mu      sync.Mutex // guards the fields below; not held during I/O
	waiting []*turn    // in the order in which they are stored
	// the last of each topic that was stored and is yet to be delivered by its own sender
	undelivered map[string]*turn
	leading     bool
	closed      bool

	// used only by the leader
	crowded   bool // the last group had more than one
	topics    map[string]*topicState
	tried     time.Time // when opening failed
	openError error
	complain  time.Time // when a failure was logged

	stored, groups, failures atomic.Int64 // messages, transactions with them, and those that failed
	damaged                  atomic.Int64 // files that were set aside

	lapses lapses
	shared sharedPages

	closing  chan struct{}  // closed when closed is set
	sweeping sync.WaitGroup // goroutines that sweep or record lapses
	timer    *time.Timer    // guarded by mu; nil until the store is open

	// used only by the sweep
	swept   int64 // id of the topic that was checked last
	empty   int   // topics without messages in this round
	removes bool  // this round removes them
}

// topicState is what is known about a topic in use.
type topicState struct {
	topicRow
	used time.Time
}

// New returns a log that opens its database when it is first needed.
func New(config Config) *Log {
	return &Log{config: config, clock: clock{now: config.Now, elapsed: config.Elapsed}, topics: map[string]*topicState{}, undelivered: map[string]*turn{}, shared: newSharedPages(), closing: make(chan struct{})}
}

// Counts are totals since the start.
type Counts struct {
	Stored, Groups int64 // messages, and the transactions that stored them
	Failures       int64 // transactions that failed
	Damaged        int64 // files that were set aside
}

// Counts returns the current counts.
func (h *Log) Counts() Counts {
	return Counts{h.stored.Load(), h.groups.Load(), h.failures.Load(), h.damaged.Load()}
}

// Append stores entry, sets its number, time and epoch, and calls deliver, in the order of the topic's
// numbers. isLong says that deliver takes long: then the messages of other topics do not wait for it. deliver runs on
// the leader's goroutine, which may be another sender's, or on the caller's. Append returns after deliver has
// returned. ctx counts only while entry waits in line.
func (h *Log) Append(ctx context.Context, entry *Entry, isLong bool, deliver func()) error {
	return h.take(ctx, &turn{entry: entry, isLong: isLong, deliver: deliver})
}

// Find returns the position of the message of topic that came with key. Its number is 0 if there is
// none.
func (h *Log) Find(topic, key string) (Position, error) {
	s, err := h.opened()
	if err != nil {
		return Position{}, err
	}
	seq, err := s.findID(topic, key)
	if err != nil {
		return Position{}, h.reading(s, err)
	}
	return Position{s.epoch, seq}, nil
}

// opened returns the store, and opens it if necessary.
func (h *Log) opened() (*store, error) {
	if s := h.store.Load(); s != nil {
		return s, nil
	}
	var opened *store
	err := h.exclusive(func(s *store) error {
		opened = s
		return nil
	})
	return opened, err
}

// Settled returns the position of the topic's last message once everything stored has been
// delivered.
func (h *Log) Settled(topic string) (head Position, err error) {
	if h.config.Keep(topic).Count == 0 {
		return Position{}, nil
	}
	var last *turn
	err = h.take(context.Background(), &turn{reads: true, do: func(s *store) error {
		state, err := h.state(s, topic)
		if err == nil {
			head = Position{s.epoch, state.head}
		}
		h.mu.Lock()
		last = h.undelivered[topic]
		h.mu.Unlock()
		return err
	}})
	if last != nil {
		<-last.delivered
	}
	return head, err
}

// Epoch returns the epoch of the log, or "" if the log is not open.
func (h *Log) Epoch() string {
	if s := h.store.Load(); s != nil {
		return s.epoch
	}
	return ""
}

// append stores the messages of group, each with the next number of its topic.
func (h *Log) append(s *store, group []*turn) error {
	now, since := h.clock.read()
	lapses := h.lapses.pending()
	lapsed := lapsedIn(group, lapses)
	all := func() error {
		for _, topic := range lapsed {
			if err := h.loseHead(s, topic); err != nil {
				return err
			}
		}
		for _, t := range group {
			state, err := h.state(s, t.entry.Topic)
			if err != nil {
				return err
			}
			if state.id == 0 {
				if err := s.addTopic(&state.topicRow); err != nil {
					return err
				}
			}
			state.used = now
			state.head++
			if err := state.stamp(s, now.UnixMilli(), since); err != nil {
				return err
			}

			t.entry.Epoch, t.entry.Seq, t.entry.Time = s.epoch, state.head, unixMilli(state.lastTime)
			if err := s.addEntry(state.id, t.entry); err != nil {
				return err
			}
			if err := h.trimOnSend(s, state, h.config.Keep(state.name)); err != nil {
				return err
			}
		}
		return nil
	}
	if len(group) == 1 && len(lapsed) == 0 && group[0].entry.Key == "" && h.isSteady(group[0].entry.Topic, now.UnixMilli()) {
		return all() // a single statement is its own transaction and costs a third less
	}
	return record(lapses, lapsed, func() error { return s.transaction(all) })
}

// lapsedIn returns the topics of group that have one of lapses.
func lapsedIn(group []*turn, lapses []*Lapse) (topics []string) {
	if len(lapses) == 0 {
		return nil // nearly always
	}
	for _, t := range group {
		if topic := t.entry.Topic; !slices.Contains(topics, topic) && stateOf(lapses, topic) != noted {
			topics = append(topics, topic)
		}
	}
	return topics
}

// loseHead notes that messages of topic after its last one have not been stored.
func (h *Log) loseHead(s *store, topic string) error {
	state, err := h.state(s, topic)
	if err != nil {
		return err
	}
	if state.id != 0 || h.lapses.reachEmpty() {
		state.lost = state.head
	}
	if state.id == 0 {
		return nil // its row is to come
	}
	return s.lose(state.id, state.head)
}

// isSteady reports whether a message on topic needs no write except its own row.
func (h *Log) isSteady(topic string, now int64) bool {
	state := h.topics[topic]
	return state != nil && state.id != 0 && !state.isOver(h.config.Keep(topic), 1) && state.fall == fall{} && now >= state.lastTime-evenedOut
}

// isOver reports whether some messages should be deleted once the given number of further messages
// has been stored.
func (t *topicState) isOver(keep Retention, more int64) bool {
	excess := t.head + more - keep.Count - t.first + 1
	return keep.Count > 0 && excess >= max(minTrimSlack, keep.Count/trimSlack)
}

// trimOnSend deletes some of the messages in excess of those kept.
func (h *Log) trimOnSend(s *store, state *topicState, keep Retention) error {
	if !state.isOver(keep, 0) {
		return nil
	}
	return h.trim(s, &state.topicRow, state.head-keep.Count)
}

// trim deletes messages of t up to the number upTo, at most maxTrim of them, and ids of deleted
// messages.
func (h *Log) trim(s *store, t *topicRow, upTo int64) error {
	upTo = max(t.first-1, min(upTo, t.first+maxTrim-1))
	now := h.config.Now()
	if err := s.trim(t.id, upTo, now.Add(-h.config.IDWindow).UnixMilli(), now.UnixMilli()+evenedOut); err != nil {
		return err
	}
	t.first = max(t.first, upTo+1)
	return nil
}

// state returns what is known about a topic. Only the leader may call it.
func (h *Log) state(s *store, topic string) (*topicState, error) {
	if state := h.topics[topic]; state != nil {
		return state, nil
	}
	row, err := s.topic(topic)
	if err != nil {
		return nil, err
	}
	state := &topicState{topicRow: row}
	h.topics[topic] = state
	return state, nil
}

// Close closes the log once everyone in line has been served. If that takes longer than ctx, it
// returns without waiting further.
func (h *Log) Close(ctx context.Context) {
	h.mu.Lock()
	again := h.closed
	h.closed = true
	if h.timer != nil {
		h.timer.Stop()
	}
	h.mu.Unlock()
	if again {
		return
	}
	close(h.closing)
	waits.For(ctx, h.sweeping.Wait)
	waits.For(ctx, func() { // even if Close stops waiting, this still closes the log in the end
		if err := h.take(context.Background(), &turn{last: true}); err != nil {
			h.config.Logger().Warn("Failed to close the history of topics", slog.String("error", err.Error()))
		}
	})
}

// Open opens the database if it exists.
func (h *Log) Open() error {
	if _, err := os.Stat(h.config.Path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_, err := h.opened()
	return err
}

// Snapshot writes a copy of the history's database for a backup, beside the database, while
// messages continue. It returns the paths of the database and of the copy, which the caller
// removes. The copy's path is empty if there is no history.
//
// If the copy is found alone, it becomes the database, with another epoch, because it lacks what
// was sent after it was made.
func (h *Log) Snapshot(ctx context.Context) (path, snapshot string, err error) {
	if h.store.Load() == nil {
		if _, err := os.Stat(h.config.Path); errors.Is(err, fs.ErrNotExist) {
			return h.config.Path, "", nil
		}
	}
	s, err := h.opened()
	if err != nil {
		return h.config.Path, "", err
	}
	snapshot, err = s.snapshot(ctx, h.config.Path)
	if err != nil {
		return h.config.Path, "", fmt.Errorf("copy the history: %w", h.reading(s, err))
	}
	return h.config.Path, snapshot, nil
}
