// What becomes due: the ends of windows and of graces. Each shard has one timer.

package presence

import (
	"slices"
	"time"
)

// makeDue makes the room tell what has changed when its window is over.
func (s *shard[U]) makeDue(room *room[U], now time.Time) {
	if room.isDue {
		return
	}
	room.isDue, room.dueAt = true, now.Add(Window)
	if room.dueAt.Before(room.earliest) {
		room.dueAt = room.earliest
	}
	s.due = append(s.due, room)
	s.wakeAt(room.dueAt)
}

// DueIn returns how long it takes until what has changed on a topic may be told. It is at most 0 if it may be now, or nothing has.
func (r *Rooms[U]) DueIn(topic string) time.Duration {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	if room := s.byTopic[topic]; room != nil && room.isDue {
		return time.Until(room.dueAt)
	}
	return 0
}

// part remembers the end of a grace.
func (s *shard[U]) part(p parting[U]) {
	at, _ := slices.BinarySearchFunc(s.leaving, p.at, func(other parting[U], at time.Time) int {
		if other.at.After(at) {
			return +1
		}
		return -1 // equal ones go behind
	})
	s.leaving = slices.Insert(s.leaving, at, p)
	s.wakeAt(p.at)
}

// wakeAt makes the timer fire at the given time, or earlier.
func (s *shard[U]) wakeAt(at time.Time) {
	if s.stopped || !s.timerAt.IsZero() && !at.Before(s.timerAt) {
		return
	}
	s.timerAt = at
	if s.timer == nil {
		s.timer = time.AfterFunc(time.Until(at), s.tick)
	} else {
		s.timer.Reset(time.Until(at))
	}
}

// tick does what is due.
func (s *shard[U]) tick() {
	for _, topic := range s.takeDue() {
		s.rooms.config.Due(topic)
	}
}

// takeDue ends graces, and returns the topics whose window is over.
func (s *shard[U]) takeDue() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil
	}
	now := time.Now()
	s.timerAt = time.Time{}
	over := 0
	for ; over < len(s.leaving) && !s.leaving[over].at.After(now); over++ {
		s.expire(&s.leaving[over], now)
	}
	if s.leaving = s.leaving[over:]; len(s.leaving) == 0 {
		s.leaving = nil
	} else {
		s.wakeAt(s.leaving[0].at)
	}
	var topics []string
	for _, room := range s.due {
		if room.dueAt.After(now) {
			s.wakeAt(room.dueAt)
		} else {
			topics = append(topics, room.topic)
		}
	}
	s.due = slices.DeleteFunc(s.due, func(room *room[U]) bool { return !room.dueAt.After(now) })
	return topics
}

// expire ends the grace of p.
func (s *shard[U]) expire(p *parting[U], now time.Time) {
	room := s.byTopic[p.topic]
	if room == nil {
		return
	}
	var guest U
	if p.user == guest {
		if room.guests.expire(now) {
			s.makeDue(room, now)
		}
		return
	}
	m := room.members[p.user]
	switch {
	case m == nil:
	case m.connections.expire(now):
		s.left(room, m, now)
	case m.isOver(now):
		delete(room.members, p.user)
		s.dropIfEmpty(room)
	}
}

func (s *shard[U]) dropIfEmpty(room *room[U]) {
	if len(room.members) == 0 && room.guests.count() == 0 && !room.isDue {
		delete(s.byTopic, room.topic)
	}
}

// Stop ends the timers. Nothing becomes due any more.
func (r *Rooms[U]) Stop() {
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		s.stopped = true
		if s.timer != nil {
			s.timer.Stop()
		}
		s.mu.Unlock()
	}
}
