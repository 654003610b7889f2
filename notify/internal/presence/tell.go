// What watchers are told: differences, and the state that the next difference applies to.

package presence

import (
	"encoding/json/jsontext"
	"slices"
	"time"
)

// Counts are the numbers of a room.
type Counts struct {
	Total  int // listed users
	Guests int // connections of guests
}

// Diff is what has changed in a room since the one before.
type Diff[U comparable] struct {
	Seq    int64 // one more than that of the diff before
	Before Counts
	Counts
	Join, Update []*Entry[U]
	Leave        []U
}

// Take returns what has changed on a topic since the last Take, and whether anything has. The next
// difference is at least window later. fieldsOf returns the fields of a user, whose room is locked
// meanwhile.
func (r *Rooms[U]) Take(topic string, window time.Duration, fieldsOf func(user U) jsontext.Value) (d Diff[U], any bool) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	if room == nil || !room.isDue {
		return d, false
	}
	now := time.Now()
	room.isDue, room.earliest = false, now.Add(window)
	s.forgetDue(room)
	changed := room.changed
	room.changed = nil
	for _, m := range changed {
		m.isChanged = false
		if m.isListed {
			if m.fields == nil {
				m.fields = fieldsOf(m.user)
			}
			d.add(m)
		} else if m.told != nil {
			m.told = nil
			d.Leave = append(d.Leave, m.user)
		}
		if m.isOver(now) {
			delete(room.members, m.user)
		}
	}
	d.Before, d.Counts = room.told, Counts{room.total, room.guests.count()}
	defer s.dropIfEmpty(room)
	if d.Before == d.Counts && len(d.Join)+len(d.Update)+len(d.Leave) == 0 {
		return d, false
	}
	room.seq++
	room.told, room.toldList = d.Counts, nil
	d.Seq = room.seq
	return d, true
}

func (s *shard[U]) forgetDue(gone *room[U]) {
	s.due = slices.DeleteFunc(s.due, func(r *room[U]) bool { return r == gone })
}

// add adds what is to be told of a listed member.
func (d *Diff[U]) add(m *member[U]) {
	entry := &Entry[U]{m.user, m.since, m.connections.count(), m.fields, m.meta}
	switch {
	case m.told == nil:
		d.Join = append(d.Join, entry)
	case m.told.equal(entry):
		return
	default:
		d.Update = append(d.Update, entry)
	}
	m.told = entry
}

// State is what watchers of a topic have been told so far.
type State[U comparable] struct {
	Seq int64
	Counts
	Members []*Entry[U] // in order, from the cursor on; do not change it
	More    bool        // there are members after these
}

// State returns at most limit members that come after a user in order; the zero U begins with the
// first.
func (r *Rooms[U]) State(topic string, after U, limit int) State[U] {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	if room == nil {
		return State[U]{Seq: firstSeq()}
	}
	if room.toldList == nil {
		room.toldList = make([]*Entry[U], 0, room.told.Total)
		for _, m := range room.members {
			if m.told != nil {
				room.toldList = append(room.toldList, m.told)
			}
		}
		slices.SortFunc(room.toldList, func(a, b *Entry[U]) int { return r.config.Compare(a.User, b.User) })
	}
	list := room.toldList
	var first U
	if after != first {
		at, found := slices.BinarySearchFunc(list, after, func(e *Entry[U], user U) int { return r.config.Compare(e.User, user) })
		if found {
			at++
		}
		list = list[at:]
	}
	count := min(limit, len(list))
	return State[U]{room.seq, room.told, list[:count:count], count < len(list)}
}
