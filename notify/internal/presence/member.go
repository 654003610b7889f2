// A member of a room: their connections, and what watchers know about them.

package presence

import (
	"bytes"
	"encoding/json/jsontext"
	"slices"
	"time"
)

// crowd counts connections.
type crowd struct {
	live int
	lost []time.Time // when the grace of each lost one ends, in order
}

func (c *crowd) count() int { return c.live + len(c.lost) }

// come adds a connection. One that was lost may be the same one.
func (c *crowd) come() {
	c.live++
	c.forgetLost(min(1, len(c.lost)))
}

// forgetLost forgets the first count of those that were lost.
func (c *crowd) forgetLost(count int) {
	if c.lost = c.lost[count:]; len(c.lost) == 0 {
		c.lost = nil
	}
}

// leave removes a connection: at once, or when its grace is over.
func (c *crowd) leave(graceEnds time.Time) {
	c.live--
	if !graceEnds.IsZero() {
		c.lose(graceEnds)
	}
}

// lose adds a connection that was lost.
func (c *crowd) lose(graceEnds time.Time) {
	at, _ := slices.BinarySearchFunc(c.lost, graceEnds, time.Time.Compare)
	c.lost = slices.Insert(c.lost, at, graceEnds)
}

// expire removes those whose grace is over.
func (c *crowd) expire(now time.Time) (changed bool) {
	over := 0
	for over < len(c.lost) && !c.lost[over].After(now) {
		over++
	}
	c.forgetLost(over)
	return over > 0
}

// member is a user in a room.
type member[U comparable] struct {
	entry       *Entry[U] // as it is now, but for Connections; changed through edit
	told        *Entry[U] // as watchers know it; nil: they do not. Maybe the same one
	connections crowd
	keepUntil   int64 // Unix milliseconds: meta and isHidden were set before the user came
	basis       Basis // of the entry's About
	isHidden    bool
	isListed    bool // counts in the room's total
	isChanged   bool // among the room's changed
}

// edit returns the entry to be changed: a copy, if others may have it.
func (m *member[U]) edit() *Entry[U] {
	if m.entry == m.told {
		copied := *m.entry
		m.entry = &copied
	}
	return m.entry
}

// About is what watchers see of a user, whatever the user does.
type About struct {
	Name   string // by which watchers know the user
	Fields jsontext.Value
}

// Basis stands for what an [About] depends on beside the user's record; 0 for nothing.
type Basis uint32

func (a *About) equal(other *About) bool {
	return a.Name == other.Name && bytes.Equal(a.Fields, other.Fields)
}

// Entry is a member as watchers are told. It never changes.
type Entry[U comparable] struct {
	User U
	About
	Since       int64 // Unix milliseconds
	Connections int
	Meta        jsontext.Value
}

func (e *Entry[U]) equal(other *Entry[U]) bool {
	return e.About.equal(&other.About) && e.Since == other.Since && e.Connections == other.Connections &&
		bytes.Equal(e.Meta, other.Meta)
}

// forgetKept forgets what was set for somebody who did not come in time.
func (m *member[U]) forgetKept(now time.Time) {
	if m.keepUntil > 0 && now.UnixMilli() >= m.keepUntil && m.connections.count() == 0 {
		m.edit().Meta, m.isHidden, m.keepUntil = nil, false, 0
	}
}

// isOver reports whether nothing has to be kept of m.
func (m *member[U]) isOver(now time.Time) bool {
	return m.connections.count() == 0 && !m.isChanged && m.told == nil && now.UnixMilli() >= m.keepUntil
}
