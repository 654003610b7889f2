// Topics with history: each message gets the topic's next number, is stored, and
// then delivered, in the order stored. Called by send.go for messages, by
// channels.go for changes of channels. The database is in store.go, reading in
// recovery.go.

package notify

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/core"
)

// ErrHistory refuses a message, or a request for missed ones, because the history
// cannot be written or read: the disk is full, for example. Such a message reached
// nobody. A retry may succeed.
var ErrHistory = errors.New("the history is not available")

const (
	// maxGroup is how many messages are stored in one transaction, and
	// maxGroupBytes how many bytes of data, but for the last one.
	maxGroup      = 512
	maxGroupBytes = 4 << 20

	// trimSlack is how many messages more than the channel says, as a part of that
	// number, are left on the disk before they are deleted, many at a time. Nobody
	// sees them.
	trimSlack    = 8
	minTrimSlack = 16
	// maxTrim is how many messages of a topic are deleted at a time, so that
	// nobody waits for it.
	maxTrim = 256

	// sweepEvery is how often some topics are looked at for messages that are
	// over their time, or have lost their channel, and sweepTopics how many.
	sweepEvery  = 2 * time.Second
	sweepTopics = 200
	// maxEmpty is how many topics without messages may be left, before the rows of all
	// those are deleted that nobody uses. Who recovers on such a topic then may be told that
	// something is missing where nothing is: so it is to be rare.
	maxEmpty = 10_000

	// idleTopic is how long what is known of a topic stays in memory.
	idleTopic = time.Minute

	// reopenEvery is how often a database that could not be opened is tried.
	reopenEvery = time.Second
)

// history stores the messages of topics with history.
//
// Who sends stands in line. The first leads: it stores all who wait in one
// transaction (a group commit), delivers in that order, and passes the lead to who
// came meanwhile. So there is one sync of the disk for all who send at that time, and
// one who sends alone waits for no other goroutine. (To store the next group while one
// is delivered was tried: groups are half as large then, and less goes through.)
type history struct {
	app      core.App
	path     string
	idWindow time.Duration
	every    time.Duration // between sweeps; 0: none
	deliver  func(*publication) Report
	identify func(sent time.Time, audience []byte, sender string) ([]byte, string)
	keep     func(topic string) retention
	now      func() time.Time
	guard    func(what string) // see guard.go

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

// retention is what a channel keeps of a topic.
type retention struct {
	count int64         // messages; 0: the topic has no history
	ttl   time.Duration // 0: for any time
}

// oldest returns when the oldest message that is kept may have been sent, in Unix
// milliseconds.
func (r retention) oldest(now time.Time) int64 {
	if r.ttl <= 0 {
		return 0
	}
	return now.Add(-r.ttl).UnixMilli()
}

// topicState is what is known of a topic that is in use.
type topicState struct {
	topicRow
	used time.Time
}

// turn is one who waits to write.
type turn struct {
	pub     *publication
	message stored
	do      func(*store) error // in the place of pub
	last    bool               // nothing comes after it

	leads chan bool // receives true: lead; false: it is done
	led   bool      // it has been told to lead; guarded by history.mu

	report Report
	err    error
}

func newHistory(n *Notifier) *history {
	h := &history{
		app:      n.app,
		path:     n.config.HistoryPath,
		idWindow: n.config.IDWindow,
		deliver:  n.deliver,
		identify: n.identify,
		keep:     n.historyOf,
		every:    sweepEvery,
		now:      time.Now,
		guard:    n.guard,
		topics:   map[string]*topicState{},
		closing:  make(chan struct{}),
	}
	if h.path == "" {
		h.path = filepath.Join(n.app.DataDir(), "notify_history.db")
	}
	return h
}

// send stores pub and delivers it. That ctx is done is looked at while it waits
// in line only.
func (h *history) send(ctx context.Context, pub *publication) (Report, error) {
	if pub.key != "" {
		if report, ok, err := h.sentBefore(pub); ok || err != nil {
			return report, err
		}
	}
	t := &turn{pub: pub, message: stored{id: pub.id, data: pub.data}}
	if pub.sender != (userRef{}) {
		t.message.sender = pub.sender.String()
	}
	var err error
	if t.message.audience, err = pub.to.stored(); err != nil {
		return Report{}, err
	}
	if err := h.take(ctx, t); err != nil {
		return Report{}, err
	}
	return t.report, nil
}

// sentBefore returns the report of a message that came with the same id: the
// first one may have been stored before the process began.
func (h *history) sentBefore(pub *publication) (Report, bool, error) {
	s, err := h.opened()
	if err != nil {
		return Report{}, false, err
	}
	seq, err := s.findID(pub.topic, pub.key)
	if err != nil {
		return Report{}, false, h.reading(s, err)
	}
	return Report{ID: pub.id, Topic: pub.topic, Epoch: s.epoch, Seq: seq}, seq > 0, nil
}

// exclusive calls do while nobody stores anything.
func (h *history) exclusive(do func(*store) error) error {
	return h.take(context.Background(), &turn{do: do})
}

// opened returns the store, which it opens if it is not.
func (h *history) opened() (*store, error) {
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

// settled returns the position of the topic's last message when all that is stored has been
// delivered.
func (h *history) settled(topic string) (head Position, err error) {
	if h.keep(topic).count == 0 {
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

// epoch returns that of the log, empty where none is open.
func (h *history) epoch() string {
	if s := h.store.Load(); s != nil {
		return s.epoch
	}
	return ""
}

// take waits in line and returns when t is done.
func (h *history) take(ctx context.Context, t *turn) error {
	t.leads = make(chan bool, 1)
	h.mu.Lock()
	if h.closed && !t.last {
		h.mu.Unlock()
		return ErrShutdown
	}
	h.waiting = append(h.waiting, t)
	first := !h.leading
	h.leading = true
	h.mu.Unlock()
	if first {
		h.lead()
		return t.err
	}

	lead := false
	select {
	case lead = <-t.leads:
	case <-ctx.Done():
		if h.withdraw(t) {
			return ctx.Err()
		}
		lead = <-t.leads
	}
	if lead {
		h.lead()
	}
	return t.err
}

// withdraw takes t out of the line; false where it is no longer in it.
func (h *history) withdraw(t *turn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.Index(h.waiting, t)
	if i < 0 || t.led {
		return false
	}
	h.waiting = slices.Delete(h.waiting, i, i+1)
	return true
}

// lead serves a group, of which the caller is the first.
func (h *history) lead() {
	if h.crowded {
		runtime.Gosched() // let those of the last group stand in line again
	}
	group := h.group()
	h.crowded = len(group) > 1
	err := h.serve(group)
	for i, t := range group {
		if t.err = err; err == nil && t.pub != nil {
			h.deliverOne(t)
		}
		if i > 0 { // the first is the caller
			t.leads <- false
		}
	}
	h.passOn()
}

func (h *history) deliverOne(t *turn) {
	defer func() { // or those behind it would wait for good
		if cause := recover(); cause != nil {
			h.app.Logger().Error("Panic while delivering a message", slog.Any("cause", cause), slog.String("stack", string(debug.Stack())))
		}
	}()
	t.report = h.deliver(t.pub)
}

// serve stores what the group wants stored.
func (h *history) serve(group []*turn) (err error) {
	var s *store
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v\n%s", cause, debug.Stack())
		}
		if err != nil && s != nil {
			err = h.failed(s, err)
		}
	}()
	if group[0].last {
		if s := h.store.Swap(nil); s != nil {
			return s.close()
		}
		return nil
	}
	if s, err = h.open(); err != nil {
		return err
	}
	if do := group[0].do; do != nil {
		return do(s)
	}
	if err = h.append(s, group); err == nil {
		h.stored.Add(int64(len(group)))
		h.groups.Add(1)
	}
	return err
}

// group takes from the line those who are served together.
func (h *history) group() []*turn {
	h.mu.Lock()
	defer h.mu.Unlock()
	count, size := 0, 0
	for _, t := range h.waiting {
		isOther := t.pub == nil
		if isOther && count > 0 || count == maxGroup || size > maxGroupBytes {
			break
		}
		count++
		if isOther {
			break
		}
		size += len(t.message.data)
	}
	group := slices.Clone(h.waiting[:count])
	h.waiting = slices.Delete(h.waiting, 0, count)
	return group
}

// passOn makes the next in line lead.
func (h *history) passOn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leading = len(h.waiting) > 0; h.leading {
		next := h.waiting[0]
		next.led = true
		next.leads <- true
	}
}

// append stores the messages of group, each with the next number of its topic.
func (h *history) append(s *store, group []*turn) error {
	now := h.now()
	var lapsed []string
	all := func() error {
		for _, t := range group {
			state, err := h.state(s, t.pub.topic)
			if err != nil {
				return err
			}
			if !slices.Contains(lapsed, state.name) && h.lapses.concerns(state.name) {
				lapsed = append(lapsed, state.name)
				if state.id != 0 {
					if err := s.lose(state.id, state.head); err != nil {
						return err
					}
					state.lost = state.head
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

			t.message.seq, t.message.time = state.head, state.lastTime
			t.pub.epoch, t.pub.seq, t.pub.time = s.epoch, state.head, unixMilli(state.lastTime)
			if err := s.addMessage(state.id, &t.message, t.pub.key); err != nil {
				return err
			}
			if err := h.trimOnSend(s, state, h.keep(state.name)); err != nil {
				return err
			}
		}
		return nil
	}
	if len(group) == 1 && group[0].pub.key == "" && h.isSteady(group[0].pub.topic, now.UnixMilli()) {
		return all() // one statement, which is a transaction of its own at a third less
	}
	if err := s.transaction(all); err != nil {
		return err
	}
	for _, topic := range lapsed {
		h.lapses.note(topic)
	}
	return nil
}

// isSteady reports whether a message on topic takes no more than its own row.
func (h *history) isSteady(topic string, now int64) bool {
	state := h.topics[topic]
	return state != nil && state.id != 0 && !h.lapses.concerns(topic) && !state.isOver(h.keep(topic), 1) && state.fall == fall{} && now >= state.lastTime-evenedOut
}

// isOver reports whether some messages are to be deleted, when there are as many more.
func (t *topicState) isOver(keep retention, more int64) bool {
	excess := t.head + more - keep.count - t.first + 1
	return keep.count > 0 && excess >= max(minTrimSlack, keep.count/trimSlack)
}

// trimOnSend deletes some of the messages that are more than are kept.
func (h *history) trimOnSend(s *store, state *topicState, keep retention) error {
	if !state.isOver(keep, 0) {
		return nil
	}
	return h.trim(s, &state.topicRow, state.head-keep.count)
}

// trim deletes messages of t up to the number upTo, at most maxTrim of them, and
// the ids of those that are gone.
func (h *history) trim(s *store, t *topicRow, upTo int64) error {
	upTo = max(t.first-1, min(upTo, t.first+maxTrim-1))
	now := h.now()
	if err := s.trim(t.id, upTo, now.Add(-h.idWindow).UnixMilli(), now.UnixMilli()+evenedOut); err != nil {
		return err
	}
	t.first = max(t.first, upTo+1)
	return nil
}

// state returns what is known of a topic. Only who leads may call it.
func (h *history) state(s *store, topic string) (*topicState, error) {
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

// failed is told of an error of the store. It returns the one for the sender.
func (h *history) failed(s *store, err error) error {
	h.failures.Add(1)
	clear(h.topics) // what was counted in memory did not happen
	if errors.Is(err, errBroken) || isDamaged(err) {
		h.store.Store(nil)
		_ = s.close()
	}
	if isDamaged(err) {
		err = errors.Join(err, h.setAside(err))
	}
	h.log(err)
	return fmt.Errorf("%w: %w", ErrHistory, err)
}

// log tells of a failure, not more than once in a while.
func (h *history) log(err error) {
	if now := time.Now(); now.Sub(h.complain) > 10*time.Second {
		h.complain = now
		h.app.Logger().Error("The history of topics cannot be written", slog.String("path", h.path), slog.String("error", err.Error()))
	}
}

// open returns the store. Only who leads may call it.
func (h *history) open() (*store, error) {
	if s := h.store.Load(); s != nil {
		return s, nil
	}
	if time.Since(h.tried) > reopenEvery {
		h.tried = time.Now()
		s, err := openStore(h.path, h.identify)
		if isDamaged(err) && h.setAside(err) == nil {
			s, err = openStore(h.path, h.identify)
		}
		if h.openError = err; err == nil {
			h.tried = time.Time{}
			clear(h.topics)
			h.store.Store(s)
			h.startSweeping()
			return s, nil
		}
		h.log(err)
	}
	return nil, fmt.Errorf("%w: %w", ErrHistory, h.openError)
}

func (h *history) startSweeping() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer == nil && !h.closed && h.every > 0 {
		h.timer = time.AfterFunc(h.every, h.sweepAndAgain)
	}
}

func (h *history) sweepAndAgain() {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return
	}
	h.sweeping.Add(1)
	h.mu.Unlock()
	defer h.sweeping.Done()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if !h.closed {
			h.timer.Reset(h.every)
		}
	}()
	defer h.guard("trimming the history of topics")

	if err := h.sweep(); err != nil && !errors.Is(err, ErrShutdown) {
		h.app.Logger().Warn("Failed to trim the history of topics", slog.String("error", err.Error()))
	}
}

// sweep looks at some topics, deletes messages that are not kept any more, and
// forgets topics that are not in use.
func (h *history) sweep() error {
	s := h.store.Load()
	if s == nil {
		return nil
	}
	now := h.now()
	topics, err := s.topicsAfter(h.swept, sweepTopics)
	if err != nil {
		return h.reading(s, err)
	}
	if len(topics) == 0 {
		h.swept = 0
	}
	var trims []trimming
	var empty []topicRow
	for i, t := range topics {
		trim, err := h.trimmingOf(s, t, now)
		if err != nil {
			return err
		}
		if trim.lost || trim.upTo >= t.first || t.leftIDs {
			trims = append(trims, trim)
		} else if t.first > t.head {
			empty = append(empty, t)
		}
		if trim.upTo >= t.first+maxTrim {
			break // some of it remains for the next time
		}
		if h.swept = t.id; i+1 == len(topics) && len(topics) < sweepTopics {
			h.swept = 0 // that was the last one
		}
	}
	h.empty += len(empty)
	if !h.removes {
		empty = nil
	}
	if h.swept == 0 {
		h.removes, h.empty = h.empty > maxEmpty, 0
	}
	return h.exclusive(func(s *store) error {
		for topic, state := range h.topics {
			if now.Sub(state.used) > idleTopic {
				delete(h.topics, topic)
			}
		}
		empty = slices.DeleteFunc(empty, func(t topicRow) bool { return h.topics[t.name] != nil })
		if len(trims) == 0 && len(empty) == 0 {
			return nil
		}
		return s.transaction(func() error {
			if len(empty) > 0 {
				if err := s.removeTopics(empty); err != nil {
					return err
				}
			}
			for _, trim := range trims {
				if err := h.applyTrimming(s, trim); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// trimming is what is to be done with a topic.
type trimming struct {
	topic topicRow
	upTo  int64 // messages up to this number are not kept
	lost  bool  // it has no history any more
}

func (h *history) trimmingOf(s *store, t topicRow, now time.Time) (trimming, error) {
	keep := h.keep(t.name)
	if keep.count == 0 {
		return trimming{t, t.head, t.lost < t.head}, nil
	}
	upTo := max(t.lost, t.head-keep.count)
	if oldest := keep.oldest(now); oldest > 0 {
		first, err := s.notBefore(t, oldest, now.UnixMilli())
		if err != nil {
			return trimming{}, err
		}
		upTo = max(upTo, first-1)
	}
	return trimming{topic: t, upTo: upTo}, nil
}

// applyTrimming does it, within a transaction.
func (h *history) applyTrimming(s *store, trim trimming) error {
	t := &trim.topic
	if state := h.topics[t.name]; state != nil {
		t = &state.topicRow // it may have got messages since
	}
	if trim.lost && h.keep(t.name).count == 0 {
		if err := s.lose(t.id, t.head); err != nil {
			return err
		}
		t.lost = t.head
	}
	return h.trim(s, t, trim.upTo)
}

// close ends it when those who are in line are served.
// Where that takes longer than ctx they are left behind.
func (h *history) close(ctx context.Context) {
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
	waitFor(ctx, h.sweeping.Wait)
	waitFor(ctx, func() { // and where it is left behind it closes at last all the same
		if err := h.take(context.Background(), &turn{last: true}); err != nil {
			h.app.Logger().Warn("Failed to close the history of topics", slog.String("error", err.Error()))
		}
	})
}

// OpenHistory opens the database of the history where there is one, so that a server tells
// at its start whether it can be read, and not at the first message.
func (n *Notifier) OpenHistory() error {
	if _, err := os.Stat(n.history.path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_, err := n.history.opened()
	return err
}

// SnapshotHistory writes a copy of the history's database for a backup, beside
// it, while messages go on. It returns the paths of the database and of the copy,
// which the caller removes; the latter is empty where there is no history.
//
// Where the copy is found alone it is taken for the database, with another epoch:
// what was sent after it was made is not in it.
func (n *Notifier) SnapshotHistory(ctx context.Context) (path, snapshot string, err error) {
	h := n.history
	if h.store.Load() == nil {
		if _, err := os.Stat(h.path); errors.Is(err, fs.ErrNotExist) {
			return h.path, "", nil
		}
	}
	s, err := h.opened()
	if err != nil {
		return h.path, "", err
	}
	snapshot, err = s.snapshot(ctx, h.path)
	if err != nil {
		return h.path, "", fmt.Errorf("copy the history: %w", h.reading(s, err))
	}
	return h.path, snapshot, nil
}
