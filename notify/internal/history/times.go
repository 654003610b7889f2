package history

import (
	"database/sql"
	"errors"
)

// fall describes where the times of a topic fall: see schema.
type fall struct{ fell, dipped, peak int64 }

// evenedOut is how many milliseconds a clock may go back without a fall: up to that, later messages
// get the time of the last one before.
const evenedOut = 5000

// stamp sets lastTime for the message head.
func (t *topicState) stamp(s *store, now int64) error {
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
	if t.isDip(now) {
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

// notBefore returns the number of the first message of t that was sent at the time or later (Unix
// milliseconds), or t.head + 1 if there is none. Numbers have no gaps, and times do not fall unless
// a clock was wrong, so it uses a binary search.
func (s *store) notBefore(t topicRow, time, now int64) (int64, error) {
	if t.isUneven() {
		return s.notBeforeUneven(t, time, now)
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
func (s *store) notBeforeUneven(t topicRow, time, now int64) (int64, error) {
	upTo := t.head + 1
	switch isDip := t.isDip(now); {
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
// has queried the time). If the time before the fall, the peak, is reached again, the latter is
// assumed: most wrong clocks are so far ahead that the peak is not reached again otherwise, and
// after a clock that was only minutes ahead, the times are off by minutes only.
func (t *topicRow) isDip(now int64) bool {
	return t.isUneven() && now >= t.fall.peak && t.lastTime < t.fall.peak
}

func (s *store) timeOf(topicID, seq int64) (at int64, err error) {
	err = s.selectTime.QueryRow(topicID, seq).Scan(&at)
	return at, err
}
