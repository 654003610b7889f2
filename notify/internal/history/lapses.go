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

// Lapses: topics that had no history for a while. What was sent meanwhile was not stored,
// so that who has seen what came before it has missed something.

// lapses are those that are not noted in the log for all topics yet. It takes its time where
// these are many, or the disk is slow, and nobody waits for it: until then who stores a
// message on such a topic notes it first, and who reads goes by the list.
type lapses struct {
	mu  sync.Mutex // orders changes of all
	all atomic.Pointer[[]*Lapse]
}

// Lapse is one change by which topics have regained their history.
type Lapse struct {
	regained func(topic string) bool
	noted    sync.Map // the topics for which it is in the log
}

// concerns reports whether topic has a lapse that is not in the log yet.
func (l *lapses) concerns(topic string) bool {
	all := l.all.Load()
	if all == nil {
		return false
	}
	return slices.ContainsFunc(*all, func(lapse *Lapse) bool {
		if _, noted := lapse.noted.Load(topic); noted {
			return false
		}
		return lapse.regained(topic)
	})
}

// note says that all lapses of a topic are in the log.
func (l *lapses) note(topic string) {
	if all := l.all.Load(); all != nil {
		for _, lapse := range *all {
			lapse.noted.Store(topic, struct{}{})
		}
	}
}

func (l *lapses) change(f func(all []*Lapse) []*Lapse) (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*Lapse
	if before := l.all.Load(); before != nil {
		all = slices.Clone(*before)
	}
	all = f(all)
	l.all.Store(&all)
	return len(all)
}

// Lapsed begins a lapse of the topics that regain their history now.
func (h *Log) Lapsed(regained func(topic string) bool) *Lapse {
	l := &Lapse{regained: regained}
	h.lapses.change(func(all []*Lapse) []*Lapse { return append(all, l) })
	return l
}

// NoteLater notes l in the log, on another goroutine.
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
			h.config.Logger().Error("Failed to note what topics have missed while they had no history", slog.String("error", err.Error()))
			select {
			case <-time.After(reopenEvery):
			case <-h.closing:
				return
			}
		}
	})
}

// lapseTopics is how many topics are looked at while nobody stores anything.
const lapseTopics = 200

// noteLapse notes l in the log, topic by topic. That it is not done yet is in the log first:
// who opens it then gives it a new epoch.
func (h *Log) noteLapse(l *Lapse) error {
	err := h.exclusive(func(s *store) error { return s.setPending(true) })
	for id := int64(0); err == nil; {
		var topics []topicRow
		s := h.store.Load()
		if s == nil {
			return fmt.Errorf("%w: it was closed meanwhile", ErrUnavailable)
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
	left := h.lapses.change(func(all []*Lapse) []*Lapse {
		return slices.DeleteFunc(all, func(other *Lapse) bool { return other == l })
	})
	if left > 0 {
		return nil
	}
	return h.exclusive(func(s *store) error { return s.setPending(false) })
}

func (h *Log) noteTopics(s *store, l *Lapse, topics []topicRow) error {
	// one that got a message since it was read was noted then
	topics = slices.DeleteFunc(topics, func(t topicRow) bool {
		_, noted := l.noted.Load(t.name)
		return noted
	})
	if len(topics) == 0 {
		return nil
	}
	err := s.transaction(func() error {
		for _, t := range topics {
			if err := s.lose(t.id, t.head); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, t := range topics {
		delete(h.topics, t.name)
		l.noted.Store(t.name, struct{}{})
	}
	return nil
}

// topicNow returns a topic as the log has it, with its lapses.
func (h *Log) topicNow(s *store, name string) (topicRow, error) {
	for {
		before := h.lapses.concerns(name)
		t, err := s.topic(name)
		switch after := h.lapses.concerns(name); {
		case err != nil:
			return t, err
		case before && after:
			if t.id != 0 {
				t.lost = t.head
			}
			return t, nil
		case !before && !after:
			return t, nil
		}
		// it changed while the topic was read
	}
}
