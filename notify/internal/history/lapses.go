package history

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Lapses: topics that had no history for a while. Messages sent during that time were not stored,
// so a client that has seen everything before the lapse has missed something.

// lapses holds the lapses that are not yet recorded in the log for all their topics. Recording
// takes time if there are many topics or the disk is slow, and nobody waits for it. Until then,
// storing a message on such a topic records the lapse first, and reading goes by this list.
type lapses struct {
	mu  sync.Mutex // orders changes of all
	all atomic.Pointer[[]*Lapse]
}

// Lapse is one change by which topics have regained their history.
type Lapse struct {
	regained func(topic string) bool
	isAgain  bool     // some of the topics may have had history before, and no message then
	noted    sync.Map // noting of topics
}

// noting is what became of a lapse for a topic.
type noting int

const (
	unnoted   noting = iota
	beingDone        // a transaction that notes it may be committed any moment
	noted
)

// pending returns the lapses that are not in the log yet for all of their topics.
func (l *lapses) pending() []*Lapse {
	if all := l.all.Load(); all != nil {
		return *all
	}
	return nil
}

// stateOf returns the state of the topic's lapses among all; noted where it has none.
func stateOf(all []*Lapse, topic string) noting {
	state := noted
	for _, lapse := range all {
		of, known := lapse.noted.Load(topic)
		switch {
		case !known && lapse.regained(topic):
			state = min(state, unnoted)
		case known:
			state = min(state, of.(noting))
		}
	}
	return state
}

// record calls transaction, which puts the lapses among all of topics into the log. Readers of
// these topics wait meanwhile.
func record(all []*Lapse, topics []string, transaction func() error) (err error) {
	committed := false
	mark := func(state noting) {
		for _, lapse := range all {
			for _, topic := range topics {
				if was, known := lapse.noted.Load(topic); known && was == noted {
					continue
				}
				if state == unnoted {
					lapse.noted.Delete(topic)
				} else {
					lapse.noted.Store(topic, state)
				}
			}
		}
	}
	mark(beingDone)
	defer func() { // also if it panics
		if committed {
			mark(noted)
		} else {
			mark(unnoted)
		}
	}()
	err = transaction()
	committed = err == nil
	return err
}

// reachEmpty reports whether a topic that has no row may have one.
func (l *lapses) reachEmpty() bool {
	return slices.ContainsFunc(l.pending(), func(lapse *Lapse) bool { return lapse.isAgain })
}

func (l *lapses) change(f func(all []*Lapse) []*Lapse) (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := f(slices.Clone(l.pending()))
	l.all.Store(&all)
	return len(all)
}

// Lapsed begins a lapse of the topics that regain their history now. isAgain says that some
// may have had it before: a client may know such a topic, though it never had a message that
// is stored.
func (h *Log) Lapsed(regained func(topic string) bool, isAgain bool) *Lapse {
	l := &Lapse{regained: regained, isAgain: isAgain}
	h.lapses.change(func(all []*Lapse) []*Lapse { return append(all, l) })
	return l
}

// NoteLater records l in the log, on another goroutine.
func (h *Log) NoteLater(l *Lapse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.sweeping.Go(func() {
		defer h.config.Guard("noting what topics have missed")
		for {
			err := h.noteLapse(l)
			if err == nil || errors.Is(err, ErrClosed) {
				return
			}
			h.config.Logger().Error("Failed to record what topics missed while they had no history", slog.String("error", err.Error()))
			select {
			case <-time.After(reopenEvery):
			case <-h.closing:
				return
			}
		}
	})
}

// lapseTopics is how many topics are read at a time while recording a lapse.
const lapseTopics = 200

// noteLapse records l in the log, topic by topic. First it marks the log as incomplete, so that a
// process that opens the log after a crash gives it a new epoch.
func (h *Log) noteLapse(l *Lapse) error {
	err := h.exclusive(func(s *store) error {
		if !l.isAgain {
			return s.setPending(true)
		}
		for name, state := range h.topics {
			if state.id == 0 { // it is to begin above the floor as it is then
				delete(h.topics, name)
			}
		}
		// of topics that have no row nothing else can be noted
		return errors.Join(s.setPending(true), s.raiseFloor(s.floor.Load()+1))
	})
	for id := int64(0); err == nil; {
		var topics []topicRow
		s := h.store.Load()
		if s == nil {
			return fmt.Errorf("%w: it was closed in the meantime", ErrUnavailable)
		}
		if topics, err = s.topicsAfter(id, lapseTopics); err != nil || len(topics) == 0 {
			break
		}
		id = topics[len(topics)-1].id
		topics = slices.DeleteFunc(topics, func(t topicRow) bool { return !l.regained(t.name) })
		err = h.exclusive(func(s *store) error { return h.noteTopics(s, l, topics) })
	}
	if err != nil {
		return err
	}
	return h.exclusive(func(s *store) error {
		left := h.lapses.change(func(all []*Lapse) []*Lapse {
			return slices.DeleteFunc(all, func(other *Lapse) bool { return other == l })
		})
		if left > 0 {
			return nil // the last one does
		}
		return s.setPending(false)
	})
}

func (h *Log) noteTopics(s *store, l *Lapse, topics []topicRow) error {
	// a topic that got a message since it was read is already recorded
	topics = slices.DeleteFunc(topics, func(t topicRow) bool {
		_, known := l.noted.Load(t.name)
		return known
	})
	if len(topics) == 0 {
		return nil
	}
	names := make([]string, len(topics))
	for i, t := range topics {
		names[i] = t.name
		delete(h.topics, t.name) // it is read again when it is needed
	}
	return record([]*Lapse{l}, names, func() error {
		return s.transaction(func() error {
			for _, t := range topics {
				if err := s.lose(t.id, t.head); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// topicNow returns a topic as it is in the log, with its lapses applied.
func (h *Log) topicNow(s *store, name string) (topicRow, error) {
	for {
		before := stateOf(h.lapses.pending(), name)
		t, err := s.topic(name)
		after := stateOf(h.lapses.pending(), name)
		switch {
		case err != nil:
			return t, err
		case before == noted && after == noted:
			return t, nil
		case before == unnoted && after == unnoted:
			if t.id != 0 || h.lapses.reachEmpty() {
				t.lost = t.head
			}
			return t, nil
		}
		// it is being noted: for as long as a commit takes
		select {
		case <-time.After(time.Millisecond):
		case <-h.closing:
			return t, ErrClosed
		}
	}
}
