// Package presence keeps who is present on topics, and what their watchers have been told. It knows
// no connections, no rules and no PocketBase.
//
// Each topic with somebody present has a room. A user is in it once, however many connections they
// have; guests are only counted. A change makes the room due: when its window is over, [Rooms.Take]
// returns the difference between what watchers were told before and what is true now, so that what
// cancels out within a window is never told. A state that a new watcher gets is always the one that
// was told last, so that the next difference applies to it. In a room with too many members to list,
// watchers are told numbers.
package presence

import (
	"encoding/json/jsontext"
	"hash/maphash"
	"slices"
	"sync"
	"time"
)

// Grace is how long somebody whose connection was lost stays: a reload, a tunnel, or a server's
// restart of the connection is no leave.
const Grace = 10 * time.Second

// Window is the shortest time between two differences of a room.
const Window = 250 * time.Millisecond

// Config binds [Rooms] to their user.
type Config[U comparable] struct {
	// Compare orders users for pages.
	Compare func(a, b U) int
	// Due is called when a room's window is over, on the goroutine of a timer. It must call Take.
	Due func(topic string)
	// Grace is [Grace], or another time in tests.
	Grace time.Duration
}

// Rooms are all rooms. The zero U is a guest. Its methods may be called concurrently; they do not
// block.
type Rooms[U comparable] struct {
	config Config[U]
	seed   maphash.Seed
	shards [64]shard[U]
}

// shard holds the rooms whose topics share a hash. It has one timer, which runs only while something
// is due.
type shard[U comparable] struct {
	rooms *Rooms[U]

	mu      sync.Mutex // guards everything in the shard
	byTopic map[string]*room[U]
	due     []*room[U]   // in which something has changed that was not told
	leaving []parting[U] // whose grace ends, in order
	timer   *time.Timer
	timerAt time.Time // when it fires; zero: it does not run
	stopped bool
	lastSeq int64 // the largest of a difference
}

// parting is an end of a grace.
type parting[U comparable] struct {
	at    time.Time
	topic string
	user  U
}

// room is a topic with somebody present, or with something to tell.
type room[U comparable] struct {
	topic   string
	members map[U]*member[U]
	guests  crowd
	total   int // of the members that are listed
	seq     int64
	changed []*member[U] // since the last difference

	isDue    bool
	dueAt    time.Time
	earliest time.Time // of the next difference

	told        Counts
	toldList    []*Entry[U]   // in order, for pages; nil: to be made
	toldNumbers bool          // watchers do not have the list
	toldRenew   time.Duration // see Terms
}

// New returns rooms without anybody.
func New[U comparable](config Config[U]) *Rooms[U] {
	r := &Rooms[U]{config: config, seed: maphash.MakeSeed()}
	for i := range r.shards {
		r.shards[i] = shard[U]{rooms: r, byTopic: map[string]*room[U]{}}
	}
	return r
}

func (r *Rooms[U]) shard(topic string) *shard[U] {
	return &r.shards[maphash.String(r.seed, topic)%uint64(len(r.shards))]
}

// Join adds a connection of user, who is not listed from now on if it wants that. about is called
// before Join returns, for a user without another connection; the room is locked meanwhile.
func (r *Rooms[U]) Join(topic string, user U, isHidden bool, about func() (About, Basis)) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	room := s.room(topic)
	var guest U
	if user == guest {
		room.guests.come()
		s.makeDue(room, now)
		return
	}
	m := s.member(room, user)
	m.forgetKept(now)
	if m.connections.count() == 0 {
		m.edit().Since = now.UnixMilli()
	}
	if m.connections.live == 0 {
		e := m.edit()
		e.About, m.basis = about()
	}
	m.connections.come()
	m.isHidden = m.isHidden || isHidden
	m.keepUntil = 0
	s.change(room, m, now)
}

// Leave removes a connection of user that Join has added. It stays for the grace, which is at most
// that of the rooms. It reports whether the user was hidden.
func (r *Rooms[U]) Leave(topic string, user U, grace time.Duration) (wasHidden bool) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	var graceEnds time.Time
	if grace > 0 {
		graceEnds = now.Add(min(grace, r.config.Grace))
		s.part(parting[U]{graceEnds, topic, user})
	}
	room := s.room(topic)
	var guest U
	if user == guest {
		room.guests.leave(graceEnds)
		s.makeDue(room, now)
		return false
	}
	m := s.member(room, user)
	wasHidden = m.isHidden
	m.connections.leave(graceEnds)
	s.left(room, m, now)
	return wasHidden
}

// GiveUp makes the grace of a connection of user that was lost, if there is one, end after grace, if
// that is sooner.
func (r *Rooms[U]) GiveUp(topic string, user U, grace time.Duration) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	if room == nil || room.members[user] == nil || len(room.members[user].connections.lost) == 0 {
		return
	}
	m, now := room.members[user], time.Now()
	ends := now.Add(grace)
	last := len(m.connections.lost) - 1
	if !ends.Before(m.connections.lost[last]) {
		return
	}
	m.connections.lost = m.connections.lost[:last]
	if grace > 0 {
		m.connections.lose(ends)
		s.part(parting[U]{ends, topic, user})
		return
	}
	s.left(room, m, now)
}

// Set changes what a user shows. Nil leaves it as it is; meta "null" removes it. If the user is not
// in the room, it is kept for as long as the grace, for when they come.
func (r *Rooms[U]) Set(topic string, user U, meta *jsontext.Value, isHidden *bool) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	room := s.room(topic)
	m := s.member(room, user)
	m.forgetKept(now)
	if meta != nil {
		m.edit().Meta = *meta
		if string(*meta) == "null" {
			m.edit().Meta = nil
		}
	}
	if isHidden != nil {
		m.isHidden = *isHidden
	}
	if m.connections.live == 0 {
		until := now.Add(r.config.Grace)
		m.keepUntil = until.UnixMilli()
		s.part(parting[U]{until, topic, user})
	}
	if m.connections.count() > 0 {
		s.change(room, m, now)
	}
}

// Refresh changes what is told about a user.
func (r *Rooms[U]) Refresh(topic string, user U, about About, basis Basis) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	if room := s.byTopic[topic]; room != nil && room.members[user] != nil {
		s.refresh(room, room.members[user], about, basis, time.Now())
	}
}

func (s *shard[U]) refresh(room *room[U], m *member[U], about About, basis Basis, now time.Time) {
	if m.basis = basis; !m.entry.About.equal(&about) {
		m.edit().About = about
		s.change(room, m, now)
	}
}

// RefreshAll updates what watchers see of all users, after a change of what that depends on.
// basisOf returns the present [Basis]; 0 means that nobody is present on the topic any
// more, and who has lost their connection does not come back. Only of those for whom it is another
// one, aboutOf returns the rest; the room is locked meanwhile. Watchers are told at once, also of
// other [Terms].
func (r *Rooms[U]) RefreshAll(basisOf func(topic string, user U) Basis, aboutOf func(topic string, user U) (About, Basis)) {
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		now := time.Now()
		for topic, room := range s.byTopic {
			for user, m := range room.members {
				if m.connections.count() == 0 {
					continue
				}
				switch basis := basisOf(topic, user); {
				case basis == 0:
					s.giveUp(room, m, now)
				case basis != m.basis:
					about, basis := aboutOf(topic, user)
					s.refresh(room, m, about, basis, now)
				}
			}
			s.makeDue(room, now)
			room.dueAt = now
			s.wakeAt(now)
		}
		s.mu.Unlock()
	}
}

// giveUp ends all graces of m.
func (s *shard[U]) giveUp(room *room[U], m *member[U], now time.Time) {
	if len(m.connections.lost) > 0 {
		m.connections.lost = nil
		s.left(room, m, now)
	}
}

// InGrace returns the topics on which a user has a connection that was lost a moment ago.
func (r *Rooms[U]) InGrace(user U) []string {
	var topics []string
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		for _, p := range s.leaving {
			if p.user == user {
				topics = append(topics, p.topic)
			}
		}
		s.mu.Unlock()
	}
	slices.Sort(topics)
	return slices.Compact(topics)
}

// GiveUpAll ends the graces of a user on a topic.
func (r *Rooms[U]) GiveUpAll(topic string, user U) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	if room := s.byTopic[topic]; room != nil && room.members[user] != nil {
		s.giveUp(room, room.members[user], time.Now())
	}
}

// IsConnected reports whether a user has a connection in the room. One that was lost a moment ago
// does not count.
func (r *Rooms[U]) IsConnected(topic string, user U) bool {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	return room != nil && room.members[user] != nil && room.members[user].connections.live > 0
}

// TopicsOf returns the topics on which a user is, in no order. It looks at all rooms.
func (r *Rooms[U]) TopicsOf(user U) []string {
	var topics []string
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		for topic, room := range s.byTopic {
			if m := room.members[user]; m != nil && m.isListed {
				topics = append(topics, topic)
			}
		}
		s.mu.Unlock()
	}
	return topics
}

// Count returns the numbers of a room as they are now.
func (r *Rooms[U]) Count(topic string) Counts {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	if room := s.byTopic[topic]; room != nil {
		return Counts{room.total, room.guests.count()}
	}
	return Counts{}
}

// room returns the room of a topic; it makes a missing one.
func (s *shard[U]) room(topic string) *room[U] {
	found := s.byTopic[topic]
	if found == nil {
		found = &room[U]{topic: topic, members: map[U]*member[U]{}, seq: s.firstSeq()}
		s.byTopic[topic] = found
	}
	return found
}

// started is when the process began.
var started = time.Now()

// firstSeq returns a number from which a room without history goes on: no smaller than any of a room
// of the same topic before it. It follows the clock so as not to tell how busy other topics are.
func (s *shard[U]) firstSeq() int64 { return max(s.lastSeq, time.Since(started).Milliseconds()+1) }

func (s *shard[U]) member(room *room[U], user U) *member[U] {
	m := room.members[user]
	if m == nil {
		m = &member[U]{entry: &Entry[U]{User: user}}
		room.members[user] = m
	}
	return m
}

// left does what follows when connections of m are gone.
func (s *shard[U]) left(room *room[U], m *member[U], now time.Time) {
	if m.connections.count() == 0 && now.UnixMilli() >= m.keepUntil {
		m.edit().Meta, m.isHidden, m.keepUntil = nil, false, 0
	}
	s.change(room, m, now)
}

// change notes that m may have to be told.
func (s *shard[U]) change(room *room[U], m *member[U], now time.Time) {
	if isListed := !m.isHidden && m.connections.count() > 0; isListed != m.isListed {
		m.isListed = isListed
		if isListed {
			room.total++
		} else {
			room.total--
		}
	}
	if !m.isChanged {
		m.isChanged = true
		room.changed = append(room.changed, m)
	}
	s.makeDue(room, now)
}
