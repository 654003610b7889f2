package history

import (
	"database/sql"
	"errors"
	"sync"
	"time"
)

// clock reads the wall clock, and notices when it is set.
type clock struct {
	now     func() time.Time
	elapsed func(now time.Time) time.Duration // by a clock that is never set

	mu     sync.Mutex
	offset int64 // of the wall clock from the other, in milliseconds
	since  int64
}

// read returns the time, and since when the clock has not been set as far as is known: the time at
// which that was noticed, or that of the first reading (Unix milliseconds).
func (c *clock) read() (now time.Time, since int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now = c.now()
	offset := now.UnixMilli() - c.elapsed(now).Milliseconds()
	if c.since == 0 || max(offset-c.offset, c.offset-offset) > evenedOut {
		c.since = now.UnixMilli()
	}
	c.offset = offset
	return now, c.since
}

// fall describes where the times of a topic fall: see schema.
type fall struct{ fell, dipped, peak int64 }

// evenedOut is how many milliseconds a clock may go back without a fall: up to that, later messages
// get the time of the last one before.
const evenedOut = 5000

// stamp sets lastTime for the message head. The clock has not been set since the time since.
func (t *topicState) stamp(s *store, now, since int64) error {
	if t.fall != (fall{}) && !t.isUneven() { // the messages before the fall are gone
		t.fall = fall{}
		if err := s.saveFall(t.id, t.fall); err != nil {
			return err
		}
	}
	if now < t.lastTime-evenedOut {
		if t.fall == (fall{}) {
			t.fall = fall{dipped: t.head, peak: t.lastTime}
		}
		t.fall.fell, t.lastTime = t.head, now
		return s.saveFall(t.id, t.fall)
	}
	if t.isDip(since) {
		if err := s.even(t.id, t.fall.dipped, t.fall.peak); err != nil {
			return err
		}
		t.fall, t.lastTime = fall{}, t.fall.peak
	}
	t.lastTime = max(t.lastTime, now)
	return nil
}

// saveFall stores where the times of a topic fall.
func (s *store) saveFall(topicID int64, f fall) error {
	_, err := s.markFall.Exec(f.fell, f.dipped, f.peak, topicID)
	return err
}

// even sets the time of the messages from seq on, so that the topic's times no longer fall.
func (s *store) even(topicID, seq, time int64) error {
	if _, err := s.saveTimes.Exec(time, topicID, seq); err != nil {
		return err
	}
	return s.saveFall(topicID, fall{})
}

// lower sets the times of the messages before seq that are later than its own to that, so that the
// topic's times no longer fall.
func (s *store) lower(topicID, seq int64) error {
	if _, err := s.lowerTimes.Exec(topicID, seq); err != nil {
		return err
	}
	return s.saveFall(topicID, fall{})
}

// notBefore returns the number of the first message of t that was sent at the time or later (Unix
// milliseconds), or t.head + 1 if there is none. Numbers have no gaps, and times do not fall unless
// a clock was wrong, so it uses a binary search. The clock has not been set since the time since.
func (s *store) notBefore(t topicRow, time, since int64) (int64, error) {
	if t.isUneven() {
		return s.notBeforeUneven(t, time, since)
	}
	low, high := t.first, t.head+1
	for low < high {
		middle := low + (high-low)/2
		at, err := s.timeOf(t.id, middle)
		switch {
		case errors.Is(err, sql.ErrNoRows): // trimmed in the meantime
			low = middle + 1
		case err != nil:
			return 0, err
		case at < time:
			low = middle + 1
		default:
			high = middle
		}
	}
	return low, nil
}

// notBeforeUneven is notBefore for a topic whose times fall somewhere. It returns what follows the
// last message from before the time.
func (s *store) notBeforeUneven(t topicRow, time, since int64) (int64, error) {
	upTo := t.head + 1
	switch isDip := t.isDip(since); {
	case isDip && t.fall.peak < time:
		return upTo, nil
	case isDip:
		upTo = t.fall.dipped // messages from there on count as sent at the peak
	}
	var last int64
	err := s.selectBefore.QueryRow(t.id, upTo, time).Scan(&last)
	if errors.Is(err, sql.ErrNoRows) {
		return t.first, nil
	}
	return max(last+1, t.first), err
}

// isUneven reports whether times fall among the stored messages.
func (t *topicRow) isUneven() bool { return t.fall.fell > t.first }

// isDip interprets the place where the times first fall. Either the clock was ahead before it and
// has been right since, or it has been behind for a while (a machine without a battery, until it
// has queried the time). In the former case it reaches the time before the fall, the peak, by running;
// in the latter it is set to a time after it. If nobody has watched it, the latter is assumed: most
// clocks that are ahead are so by more than a server's next start.
func (t *topicRow) isDip(since int64) bool {
	return t.isUneven() && since >= t.fall.peak && t.lastTime < t.fall.peak
}

// isPassed reports whether the times fall only once, and the clock has reached the peak by running. Only
// this process knows that, so it is time to call lower.
func (t *topicRow) isPassed(now, since int64) bool {
	return t.isUneven() && t.fall.fell == t.fall.dipped && since < t.fall.peak && t.fall.peak <= now
}

func (s *store) timeOf(topicID, seq int64) (at int64, err error) {
	err = s.selectTime.QueryRow(topicID, seq).Scan(&at)
	return at, err
}
