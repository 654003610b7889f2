// What watchers are told: differences, and the state that the next difference applies to.

package presence

import (
	"slices"
	"time"
)

// Counts are the numbers of a room.
type Counts struct {
	Total  int // listed users
	Guests int // connections of guests
}

// NumbersWindow is the shortest time between two differences of a room that has too many members to
// list.
const NumbersWindow = time.Second

// Terms are how watchers are told.
type Terms struct {
	Window time.Duration // at least until the next difference
	// Limit is how many members a room may have before watchers are told numbers only. They are told
	// the list again when nine tenths of it are left.
	Limit int
	Renew time.Duration // after which watchers are to renew their presence; 0: never
}

// Kind is what watchers learn about a difference.
type Kind int

const (
	// Changes are those of the list.
	Changes Kind = iota
	// Whole is the whole list: watchers do not have it, or are to renew in another rhythm.
	Whole
	// Numbers are the Counts only.
	Numbers
)

// Diff is what has changed in a room since the one before.
type Diff[U comparable] struct {
	Kind
	Seq int64 // one more than that of the diff before
	Counts
	Join, Update []*Entry[U]
	Leave        []string // the names by which watchers knew them
}

// Take returns what has changed on a topic since the last Take, and whether anything has.
func (r *Rooms[U]) Take(topic string, terms Terms) (d Diff[U], any bool) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	if room == nil || !room.isDue {
		return d, false
	}
	now := time.Now()
	room.isDue = false
	s.forgetDue(room)
	defer s.dropIfEmpty(room)
	changed := room.changed
	room.changed = nil
	for _, m := range changed {
		m.isChanged = false
		d.add(m)
		if m.isOver(now) {
			delete(room.members, m.entry.User)
		}
	}
	d.Counts = Counts{room.total, room.guests.count()}
	isOther := room.accept(terms, &d)
	if room.earliest = now.Add(terms.Window); room.toldNumbers {
		room.earliest = now.Add(max(terms.Window, NumbersWindow))
	}
	if !isOther && room.told == d.Counts && len(d.Join)+len(d.Update)+len(d.Leave) == 0 {
		return d, false
	}
	if room.told == (Counts{}) {
		room.seq = max(room.seq, s.firstSeq()) // see State
	}
	room.seq++
	s.lastSeq = max(s.lastSeq, room.seq)
	room.told, room.toldList = d.Counts, nil
	d.Seq = room.seq
	return d, true
}

// accept decides the kind of d, and reports whether the terms have changed for watchers.
func (room *room[U]) accept(terms Terms, d *Diff[U]) (isOther bool) {
	if room.told == (Counts{}) {
		room.toldRenew = 0 // those who have come since do not know of it
	}
	before, isOther := room.toldNumbers, room.toldRenew != terms.Renew
	if isOther && d.Counts == (Counts{}) && room.told == (Counts{}) {
		isOther = false // only hidden users have come, and nobody may notice
	} else {
		room.toldRenew = terms.Renew
	}
	switch {
	case d.Total > terms.Limit:
		room.toldNumbers = true
	case d.Total <= terms.Limit-terms.Limit/10:
		room.toldNumbers = false
	}
	switch {
	case room.toldNumbers:
		d.Kind = Numbers
	case before || isOther:
		d.Kind = Whole
	}
	return isOther || before != room.toldNumbers
}

func (s *shard[U]) forgetDue(gone *room[U]) {
	s.due = slices.DeleteFunc(s.due, func(r *room[U]) bool { return r == gone })
}

// add adds the change of m, if there is one to tell.
func (d *Diff[U]) add(m *member[U]) {
	before := m.told
	if count := m.connections.count(); m.isListed && count != m.entry.Connections {
		m.edit().Connections = count
	}
	if m.told = nil; m.isListed {
		m.told = m.entry
	}
	switch {
	case before == nil && m.told == nil:
	case before == nil:
		d.Join = append(d.Join, m.told)
	case m.told == nil:
		d.Leave = append(d.Leave, before.Name)
		copied := *m.entry // others may still have it
		m.entry = &copied
	case before.equal(m.told):
		m.told, m.entry = before, before
	case before.Name != m.told.Name:
		d.Leave = append(d.Leave, before.Name)
		d.Join = append(d.Join, m.told)
	default:
		d.Update = append(d.Update, m.told)
	}
}

// State is what watchers of a topic have been told so far.
type State[U comparable] struct {
	Seq int64
	Counts
	Members []*Entry[U] // in order, from the cursor on; do not change it
	More    bool        // there are members after these
	Numbers bool        // watchers are told numbers only
	Renew   time.Duration
}

// State returns at most limit members that come after a user in order; the zero U begins with the
// first.
func (r *Rooms[U]) State(topic string, after U, limit int) State[U] {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	if room == nil || room.told == (Counts{}) {
		return State[U]{Seq: s.firstSeq()} // as if there was nobody, also where somebody is hidden
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
	return State[U]{room.seq, room.told, list[:count:count], count < len(list), room.toldNumbers, room.toldRenew}
}
