// Beats: events that tell a client that its connection is alive.

package notify

import (
	"strconv"
	"sync/atomic"
	"time"

	"herald/notify/internal/conn"
)

// BeatTopic is a system topic. A client that subscribes to it gets a small event, {"every":
// SECONDS}, at once and then at each heartbeat. (The heartbeat itself is a comment, which
// EventSource does not show.) A client whose beats are overdue knows that its connection is dead
// although nobody has closed it. every is 0 if heartbeats are off; then only the first event is
// sent.
const BeatTopic = "@beat"

// beatState is the state of a connection's beats on [BeatTopic].
type beatState int32

const (
	beatNone beatState = iota
	beatDue            // just subscribed: the next tick sends one
	beating
)

func (s *beatState) load() beatState  { return beatState(atomic.LoadInt32((*int32)(s))) }
func (s *beatState) set(to beatState) { atomic.StoreInt32((*int32)(s), int32(to)) }

// wantBeats records that the client wants beats under keys; known are the keys that it already had.
// subsMu is held.
func (c *Client) wantBeats(keys []subscriptionKey, known map[string]subscriptionKey) {
	if len(keys) == 0 {
		c.beat.set(beatNone)
		return
	}
	for _, key := range keys {
		if _, isKnown := known[key.name]; !isKnown {
			c.beat.set(beatDue)
		}
	}
}

// sendBeat sends a beat to a client that wants them, if one is due.
func (n *Notifier) sendBeat(c *Client, now int64) {
	state := c.beat.load()
	every := max(n.config.Heartbeat, 0)
	isDue := state == beatDue || state == beating && every > 0 && time.Duration(now-c.lastBeat.Load()) >= every
	if !isDue {
		return
	}
	c.lastBeat.Store(now)
	c.beat.set(beating) // before the keys are looked up, so that a key added now makes a beat due again
	s := c.subscriptionTo(BeatTopic)
	if s == nil {
		return
	}
	data := []byte(`{"every":` + strconv.FormatFloat(every.Seconds(), 'f', -1, 64) + `}`)
	for _, name := range c.namesOf(s) {
		c.conn.Put(conn.NewFrame(name, data, false))
	}
}
