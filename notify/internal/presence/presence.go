// Package presence keeps who is present on topics, and what their watchers have been told. It knows
// no connections, no rules and no PocketBase.
//
// Each topic with somebody present has a room. A user is in it once, however many connections they
// have; guests are only counted. A change makes the room due: when its window is over, [Rooms.Take]
// returns the difference between what watchers were told before and what is true now, so that what
// cancels out within a window is never told. A state that a new watcher gets is always the one that
// was told last, so that the next difference applies to it.
package presence

import (
	"bytes"
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
	users   map[U]int    // in how many rooms of this shard a user is
	timer   *time.Timer
	timerAt time.Time // when it fires; zero: it does not run
	stopped bool
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

	told     Counts
	toldList []*Entry[U] // in order, for pages; nil: to be made
}

// crowd counts connections.
type crowd struct {
	live int
	lost []time.Time // when the grace of each lost one ends, in order
}

func (c *crowd) count() int { return c.live + len(c.lost) }

// come adds a connection. One that was lost may be the same one.
func (c *crowd) come() {
	c.live++
	if len(c.lost) > 0 {
		c.lost = slices.Delete(c.lost, 0, 1)
	}
}

// leave removes a connection: at once, or when its grace is over.
func (c *crowd) leave(graceEnds time.Time) {
	c.live--
	if !graceEnds.IsZero() {
		c.lost = append(c.lost, graceEnds)
	}
}

// expire removes those whose grace is over.
func (c *crowd) expire(now time.Time) (changed bool) {
	over := 0
	for over < len(c.lost) && !c.lost[over].After(now) {
		over++
	}
	if c.lost = slices.Delete(c.lost, 0, over); len(c.lost) == 0 {
		c.lost = nil
	}
	return over > 0
}

// member is a user in a room.
type member[U comparable] struct {
	user        U
	connections crowd
	since       int64 // Unix milliseconds
	keepUntil   int64 // Unix milliseconds: meta and isHidden were set before the user came
	meta        jsontext.Value
	fields      jsontext.Value // nil: to be looked up
	isHidden    bool
	isListed    bool      // counts in the room's total
	isChanged   bool      // among the room's changed
	told        *Entry[U] // nil: watchers do not know of the user
}

// Entry is a member as watchers are told. It never changes.
type Entry[U comparable] struct {
	User        U
	Since       int64 // Unix milliseconds
	Connections int
	Fields      jsontext.Value
	Meta        jsontext.Value
}

func (e *Entry[U]) equal(other *Entry[U]) bool {
	return e.Since == other.Since && e.Connections == other.Connections &&
		bytes.Equal(e.Fields, other.Fields) && bytes.Equal(e.Meta, other.Meta)
}

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

// New returns rooms without anybody.
func New[U comparable](config Config[U]) *Rooms[U] {
	r := &Rooms[U]{config: config, seed: maphash.MakeSeed()}
	for i := range r.shards {
		r.shards[i] = shard[U]{rooms: r, byTopic: map[string]*room[U]{}, users: map[U]int{}}
	}
	return r
}

func (r *Rooms[U]) shard(topic string) *shard[U] {
	return &r.shards[maphash.String(r.seed, topic)%uint64(len(r.shards))]
}

// Join adds a connection of user.
func (r *Rooms[U]) Join(topic string, user U) {
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
		m.since = now.UnixMilli()
		s.users[user]++
	}
	m.connections.come()
	m.keepUntil = 0
	s.change(room, m, now)
}

// Leave removes a connection of user that Join has added. If it was lost, it stays for the grace.
func (r *Rooms[U]) Leave(topic string, user U, isLost bool) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	var graceEnds time.Time
	if isLost {
		graceEnds = now.Add(r.config.Grace)
		s.part(parting[U]{graceEnds, topic, user})
	}
	room := s.room(topic)
	var guest U
	if user == guest {
		room.guests.leave(graceEnds)
		s.makeDue(room, now)
		return
	}
	m := s.member(room, user)
	m.connections.leave(graceEnds)
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
		if m.meta = *meta; string(m.meta) == "null" {
			m.meta = nil
		}
	}
	if isHidden != nil {
		m.isHidden = *isHidden
	}
	if m.connections.count() == 0 {
		until := now.Add(r.config.Grace)
		m.keepUntil = until.UnixMilli()
		s.part(parting[U]{until, topic, user})
		return
	}
	s.change(room, m, now)
}

// Refresh makes the fields of a user be looked up again.
func (r *Rooms[U]) Refresh(topic string, user U) {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	if room == nil || room.members[user] == nil {
		return
	}
	m := room.members[user]
	m.fields = nil
	s.change(room, m, time.Now())
}

// Has reports whether a user has a connection in the room, or had one that was lost a moment ago.
func (r *Rooms[U]) Has(topic string, user U) bool {
	s := r.shard(topic)
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.byTopic[topic]
	return room != nil && room.members[user] != nil && room.members[user].connections.count() > 0
}

// TopicsOf returns the topics on which a user is, in no order. It looks at all rooms.
func (r *Rooms[U]) TopicsOf(user U) []string {
	var topics []string
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		if s.users[user] > 0 {
			for topic, room := range s.byTopic {
				if m := room.members[user]; m != nil && m.isListed {
					topics = append(topics, topic)
				}
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
		found = &room[U]{topic: topic, members: map[U]*member[U]{}, seq: firstSeq()}
		s.byTopic[topic] = found
	}
	return found
}

// started is when the process began.
var started = time.Now()

// firstSeq returns a number that is larger than any of a room of the same topic that there was
// before in this process. A room has less than one difference per millisecond.
func firstSeq() int64 { return time.Since(started).Milliseconds() + 1 }

func (s *shard[U]) member(room *room[U], user U) *member[U] {
	m := room.members[user]
	if m == nil {
		m = &member[U]{user: user}
		room.members[user] = m
	}
	return m
}

// left does what follows when connections of m are gone.
func (s *shard[U]) left(room *room[U], m *member[U], now time.Time) {
	if m.connections.count() == 0 {
		m.meta, m.isHidden = nil, false
		if s.users[m.user]--; s.users[m.user] == 0 {
			delete(s.users, m.user)
		}
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

// part remembers the end of a grace.
func (s *shard[U]) part(p parting[U]) {
	s.leaving = append(s.leaving, p)
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
		delete(room.members, m.user)
		s.dropIfEmpty(room)
	}
}

// forgetKept forgets what was set for somebody who did not come in time.
func (m *member[U]) forgetKept(now time.Time) {
	if m.keepUntil > 0 && now.UnixMilli() >= m.keepUntil && m.connections.count() == 0 {
		m.meta, m.isHidden, m.keepUntil = nil, false, 0
	}
}

// isOver reports whether nothing has to be kept of m.
func (m *member[U]) isOver(now time.Time) bool {
	return m.connections.count() == 0 && !m.isChanged && m.told == nil && now.UnixMilli() >= m.keepUntil
}

func (s *shard[U]) dropIfEmpty(room *room[U]) {
	if len(room.members) == 0 && room.guests.count() == 0 && !room.isDue {
		delete(s.byTopic, room.topic)
	}
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
