package history

import (
	"errors"
	"log/slog"
	"slices"
	"time"
)

const (
	// sweepTopics is how many topics a sweep checks for messages that have expired or have lost
	// their channel.
	sweepTopics = 200
	// maxEmpty is how many topics without messages may remain before the rows of all unused ones
	// are deleted. A client that recovers on such a topic may then be told that something is
	// missing although nothing is, so this should be rare.
	maxEmpty = 10_000
	// idleTopic is how long an unused topic's state stays in memory.
	idleTopic = time.Minute
)

func (h *Log) startSweeping() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer == nil && !h.closed && h.config.SweepEvery > 0 {
		h.timer = time.AfterFunc(h.config.SweepEvery, h.sweepAndAgain)
	}
}

func (h *Log) sweepAndAgain() {
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
			h.timer.Reset(h.config.SweepEvery)
		}
	}()
	defer h.config.Guard("trimming the history of topics")

	if err := h.sweep(); err != nil && !errors.Is(err, ErrClosed) {
		h.config.Logger().Warn("Failed to trim the history of topics", slog.String("error", err.Error()))
	}
}

// sweep checks some topics, deletes messages that are no longer kept, and drops the state of unused
// topics from memory.
func (h *Log) sweep() error {
	s := h.store.Load()
	if s == nil {
		return nil
	}
	now, since := h.clock.read()
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
		trim, err := h.trimmingOf(s, t, now, since)
		if err != nil {
			return err
		}
		if trim.lost || trim.upTo >= t.first || t.leftIDs || trim.passed {
			trims = append(trims, trim)
		} else if t.first > t.head {
			empty = append(empty, t)
		}
		if trim.upTo >= t.first+maxTrim {
			break // the next sweep continues with this topic
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

// trimming is what a sweep must do with a topic.
type trimming struct {
	topic  topicRow
	upTo   int64 // messages up to this number are not kept
	lost   bool  // it no longer has history
	passed bool  // its times fall because a clock was ahead, which is to be mended
}

func (h *Log) trimmingOf(s *store, t topicRow, now time.Time, since int64) (trimming, error) {
	keep := h.config.Keep(t.name)
	if keep.Count == 0 {
		return trimming{topic: t, upTo: t.head, lost: t.lost < t.head}, nil
	}
	upTo := max(t.lost, t.head-keep.Count)
	if oldest := keep.oldest(now); oldest > 0 {
		first, err := s.notBefore(t, oldest, since)
		if err != nil {
			return trimming{}, err
		}
		upTo = max(upTo, first-1)
	}
	return trimming{topic: t, upTo: upTo, passed: t.isPassed(now.UnixMilli(), since)}, nil
}

// applyTrimming applies trim, within a transaction.
func (h *Log) applyTrimming(s *store, trim trimming) error {
	t := &trim.topic
	if state := h.topics[t.name]; state != nil {
		t = &state.topicRow // it may have received messages since
	}
	if trim.lost && h.config.Keep(t.name).Count == 0 {
		if err := s.lose(t.id, t.head); err != nil {
			return err
		}
		t.lost = t.head
	}
	if trim.passed && t.fall == trim.topic.fall {
		if err := s.lower(t.id, t.fall.dipped); err != nil {
			return err
		}
		t.fall = fall{}
	}
	return h.trim(s, t, trim.upTo)
}
