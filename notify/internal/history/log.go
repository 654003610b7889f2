// Package history is the log of the topics with history: each message gets its topic's next
// number, is stored, and then delivered, in the order stored. It knows neither who may have a
// message nor who gets it.
//
// A message's way: log.go (Append) → line.go (whose turn it is to write) → store.go (the
// database). Reading: page.go. What goes: sweep.go. What may be wrong: lapses.go (a topic had
// no history for a while), times.go (the clock), damaged.go (the file).
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

// ErrUnavailable refuses a message, or a request for missed ones, because the history
// cannot be written or read: the disk is full, for example. Such a message reached
// nobody. A retry may succeed.
var ErrUnavailable = errors.New("the history is not available")

// ErrClosed refuses a message because the log is closed, as the server stops. A retry reaches
// its successor.
var ErrClosed = errors.New("the server is shutting down")

const (
	// trimSlack is how many messages more than the channel says, as a part of that
	// number, are left on the disk before they are deleted, many at a time. Nobody
	// sees them.
	trimSlack    = 8
	minTrimSlack = 16
	// maxTrim is how many messages of a topic are deleted at a time, so that
	// nobody waits for it.
	maxTrim = 256

	// reopenEvery is how often a database that could not be opened is tried.
	reopenEvery = time.Second
)

// Entry is a message in the log.
type Entry struct {
	ID    string
	Topic string
	Key   string // the same for all attempts to send it; empty: there is one
	Data  []byte

	// Sender and Audience are for who reads the log; it does not look into them.
	Sender   string
	Audience []byte // nil: everybody

	// set by [Log.Append]
	Epoch string
	Seq   int64
	Time  time.Time // also set before, where it is not stored
}

// Retention is what is kept of a topic.
type Retention struct {
	Count int64         // messages; 0: the topic has no history
	TTL   time.Duration // 0: for any time
}

// oldest returns when the oldest message that is kept may have been sent, in Unix
// milliseconds.
func (r Retention) oldest(now time.Time) int64 {
	if r.TTL <= 0 {
		return 0
	}
	return now.Add(-r.TTL).UnixMilli()
}

// Config is what a [Log] has to be told. All of it is needed but SweepEvery.
type Config struct {
	Path   string // of the database, which is made when it is needed
	Logger func() *slog.Logger
	// IDWindow is how long the key of a message is kept at least.
	IDWindow   time.Duration
	SweepEvery time.Duration // 0: never
	Keep       func(topic string) Retention
	// Identify brings what the first versions stored, by name, into the form of this one.
	Identify func(sent time.Time, audience []byte, sender string) ([]byte, string)
	Now      func() time.Time
	Guard    func(what string) // deferred by goroutines: it recovers
}

// Log stores the messages of topics with history. Its methods may be called concurrently.
//
// Who sends stands in line. The first leads: it stores all who wait in one
// transaction (a group commit), delivers in that order, and passes the lead to who
// came meanwhile. So there is one sync of the disk for all who send at that time, and
// one who sends alone waits for no other goroutine. (To store the next group while one
// is delivered was tried: groups are half as large then, and less goes through.)
type Log struct {
	config Config

	store atomic.Pointer[store] // nil until it is needed; written by who leads

	mu      sync.Mutex // guards what follows; not held over I/O
	waiting []*turn    // in the order in which they are stored
	leading bool
	closed  bool

	// used by who leads only
	crowded   bool // the last group had more than one
	topics    map[string]*topicState
	tried     time.Time // when opening failed
	openError error
	complain  time.Time // when a failure was logged

	stored, groups, failures atomic.Int64 // messages, transactions with them, and those that failed
	damaged                  atomic.Int64 // files that were set aside

	lapses lapses

	closing  chan struct{}  // closed when closed is set
	sweeping sync.WaitGroup // goroutines that sweep, or note lapses
	timer    *time.Timer    // guarded by mu; nil until the store is open

	// used by the sweep only
	swept   int64 // id of the topic that was looked at last
	empty   int   // topics without messages in this round
	removes bool  // in this round they go
}

// topicState is what is known of a topic that is in use.
type topicState struct {
	topicRow
	used time.Time
}

// New returns a log that opens its database when it is needed first.
func New(config Config) *Log {
	return &Log{config: config, topics: map[string]*topicState{}, closing: make(chan struct{})}
}

// Counts are of what has happened so far.
type Counts struct {
	Stored, Groups int64 // messages, and the transactions that these took
	Failures       int64 // transactions that failed
	Damaged        int64 // files that were set aside
}

// Counts returns the counts as of now.
func (h *Log) Counts() Counts {
	return Counts{h.stored.Load(), h.groups.Load(), h.failures.Load(), h.damaged.Load()}
}

// Append stores entry, which gets its number, time and epoch, and calls deliver: on the
// goroutine of whoever writes then, which may be another sender's, in the order of the
// numbers, and before the next message of any topic is stored. It returns when deliver has. That
// ctx is done is looked at while entry waits in line only.
func (h *Log) Append(ctx context.Context, entry *Entry, deliver func()) error {
	return h.take(ctx, &turn{entry: entry, deliver: deliver})
}

// Find returns the position of the message of topic that came with key: its number is 0
// where there is none.
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

// opened returns the store, which it opens if it is not.
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

// Settled returns the position of the topic's last message when all that is stored has been
// delivered.
func (h *Log) Settled(topic string) (head Position, err error) {
	if h.config.Keep(topic).Count == 0 {
		return Position{}, nil
	}
	err = h.exclusive(func(s *store) error {
		state, err := h.state(s, topic)
		if err == nil {
			head = Position{s.epoch, state.head}
		}
		return err
	})
	return head, err
}

// Epoch returns that of the log, empty where none is open.
func (h *Log) Epoch() string {
	if s := h.store.Load(); s != nil {
		return s.epoch
	}
	return ""
}

// append stores the messages of group, each with the next number of its topic.
func (h *Log) append(s *store, group []*turn) error {
	now := h.config.Now()
	var lapsed []string
	all := func() error {
		for _, t := range group {
			state, err := h.state(s, t.entry.Topic)
			if err != nil {
				return err
			}
			if !slices.Contains(lapsed, state.name) && h.lapses.concerns(state.name) {
				lapsed = append(lapsed, state.name)
				h.lapses.mark([]string{state.name}, beingDone)
				if state.id != 0 || h.lapses.reachEmpty() {
					state.lost = state.head
				}
				if state.id != 0 {
					if err := s.lose(state.id, state.head); err != nil {
						return err
					}
				}
			}
			if state.id == 0 {
				if err := s.addTopic(&state.topicRow); err != nil {
					return err
				}
			}
			state.used = now
			state.head++
			if err := state.stamp(s, now.UnixMilli()); err != nil {
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
	if len(group) == 1 && group[0].entry.Key == "" && h.isSteady(group[0].entry.Topic, now.UnixMilli()) {
		return all() // one statement, which is a transaction of its own at a third less
	}
	if err := s.transaction(all); err != nil {
		h.lapses.mark(lapsed, unnoted)
		return err
	}
	h.lapses.mark(lapsed, noted)
	return nil
}

// isSteady reports whether a message on topic takes no more than its own row.
func (h *Log) isSteady(topic string, now int64) bool {
	state := h.topics[topic]
	return state != nil && state.id != 0 && !h.lapses.concerns(topic) && !state.isOver(h.config.Keep(topic), 1) && state.fall == fall{} && now >= state.lastTime-evenedOut
}

// isOver reports whether some messages are to be deleted, when there are as many more.
func (t *topicState) isOver(keep Retention, more int64) bool {
	excess := t.head + more - keep.Count - t.first + 1
	return keep.Count > 0 && excess >= max(minTrimSlack, keep.Count/trimSlack)
}

// trimOnSend deletes some of the messages that are more than are kept.
func (h *Log) trimOnSend(s *store, state *topicState, keep Retention) error {
	if !state.isOver(keep, 0) {
		return nil
	}
	return h.trim(s, &state.topicRow, state.head-keep.Count)
}

// trim deletes messages of t up to the number upTo, at most maxTrim of them, and
// the ids of those that are gone.
func (h *Log) trim(s *store, t *topicRow, upTo int64) error {
	upTo = max(t.first-1, min(upTo, t.first+maxTrim-1))
	now := h.config.Now()
	if err := s.trim(t.id, upTo, now.Add(-h.config.IDWindow).UnixMilli(), now.UnixMilli()+evenedOut); err != nil {
		return err
	}
	t.first = max(t.first, upTo+1)
	return nil
}

// state returns what is known of a topic. Only who leads may call it.
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

// Close ends it when those who are in line are served.
// Where that takes longer than ctx they are left behind.
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
	waits.For(ctx, func() { // and where it is left behind it closes at last all the same
		if err := h.take(context.Background(), &turn{last: true}); err != nil {
			h.config.Logger().Warn("Failed to close the history of topics", slog.String("error", err.Error()))
		}
	})
}

// Open opens the database where there is one.
func (h *Log) Open() error {
	if _, err := os.Stat(h.config.Path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_, err := h.opened()
	return err
}

// Snapshot writes a copy of the history's database for a backup, beside
// it, while messages go on. It returns the paths of the database and of the copy,
// which the caller removes; the latter is empty where there is no history.
//
// Where the copy is found alone it is taken for the database, with another epoch:
// what was sent after it was made is not in it.
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
