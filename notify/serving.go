// The connections that are being served, and what each of them needs once in a
// while: heartbeats, the end of its time. One timer for all.

package notify

import (
	"context"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// BeatTopic is the system topic on which a client that subscribes to it gets a small
// event, {"every": SECONDS}, at once and then at each heartbeat: a heartbeat proper is a
// comment, which EventSource does not show. A client whose beats are overdue knows that
// its connection is dead although nobody has closed it. every is 0 where heartbeats are
// off; then there is only the first one.
const BeatTopic = "@beat"

// beatState is what a connection gets on [BeatTopic].
type beatState int32

const (
	beatNone beatState = iota
	beatDue            // subscribed just now: the next tick sends one
	beating
)

func (s *beatState) load() beatState  { return beatState(atomic.LoadInt32((*int32)(s))) }
func (s *beatState) set(to beatState) { atomic.StoreInt32((*int32)(s), int32(to)) }

// wantBeats notes that the client wants beats by keys, of which it had the known ones.
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
	c.beat.set(beating) // before the keys are looked up: one that comes now is due again
	s := c.subscriptionTo(BeatTopic)
	if s == nil {
		return
	}
	data := []byte(`{"every":` + strconv.FormatFloat(every.Seconds(), 'f', -1, 64) + `}`)
	for _, name := range c.namesOf(s) {
		c.deliver(newFrame(subscriptions.Message{Name: name, Data: data}, false))
	}
}

// tickEvery is how exact heartbeats, timeouts and the expiry of tokens are.
const tickEvery = time.Second

// serving holds the connections that are written to. Its timer runs only while
// there are some.
type serving struct {
	tick func(*Client)

	mu      sync.Mutex // guards what follows; never taken under a client's queue.mu
	clients map[*Client]struct{}
	timer   *time.Timer
	closed  bool // no more connections are served
}

func (s *serving) add(c *Client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.clients[c] = struct{}{}
	if s.timer == nil {
		s.timer = time.AfterFunc(tickEvery, s.tickAll)
	}
	return true
}

func (s *serving) remove(c *Client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clients, c)
	if len(s.clients) == 0 && s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}

func (s *serving) all() []*Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	clients := make([]*Client, 0, len(s.clients))
	for client := range s.clients {
		clients = append(clients, client)
	}
	return clients
}

func (s *serving) tickAll() {
	for _, client := range s.all() {
		s.tick(client)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Reset(tickEvery)
	}
}

// startServing notes that the connection is written to from now on: begin is
// called with its queue locked. False: it has ended, or the server stops.
func (c *Client) startServing(begin func()) bool {
	now := c.notifier.setClock()
	c.lastWrite.Store(now)
	c.lastMessage.Store(now)

	c.mu.Lock()
	ended := c.ended
	if !ended {
		begin()
	}
	c.mu.Unlock()
	if ended {
		return false
	}
	if !c.notifier.serving.add(c) {
		c.Close(ReasonShutdown)
		return false
	}
	if c.IsDiscarded() { // in between; its cleanup may have come too early to find it
		c.notifier.serving.remove(c)
		return false
	}
	return true
}

// setClock sets and returns the time that the connections go by.
func (n *Notifier) setClock() int64 {
	now := int64(time.Since(n.started))
	n.clock.Store(now)
	return now
}

// tick does what is due for c.
func (n *Notifier) tick(c *Client) {
	defer c.guard("looking after a realtime connection")
	wall, now := time.Now(), n.setClock()

	if c.beat.load() != beatNone {
		n.sendBeat(c, now)
	}
	elapsed := func(since int64, limit time.Duration) bool {
		return limit > 0 && time.Duration(now-since) >= limit
	}
	c.endIfOverdue(now)
	switch {
	case c.stream != nil && c.stream.isStuck(): // whatever else is due, it would wait for that
		c.Close(ReasonTooSlow)
	case c.auth.Load() != nil && c.expired(wall):
		c.Close(ReasonTokenExpired)
		c.Unset(apis.RealtimeClientAuthKey)
	case c.lifetime > 0 && wall.Sub(c.connected) >= c.lifetime:
		c.Finish(ReasonLifetime)
	case elapsed(c.lastMessage.Load(), c.idle):
		c.Finish(ReasonIdle)
	case elapsed(c.lastWrite.Load(), n.config.Heartbeat):
		c.lastWrite.Store(now)
		if c.Queued() == 0 {
			c.deliver(heartbeat)
		}
	case c.socket != nil && n.hooked():
		// it was taken when no handler wanted to see its messages
		c.top().Finish(ReasonHandlers)
	}
}

// Stopping reports whether Shutdown has been called: no connection is served any
// more.
func (n *Notifier) Stopping() bool {
	n.sending.RLock()
	defer n.sending.RUnlock()
	return n.stopped
}

// shutdownGrace is how long Shutdown goes on after its timeout, to end what is left at once.
const shutdownGrace = time.Second

// Shutdown ends all connections as soon as what is queued for them is written,
// or timeout is over. From its start on messages are refused with
// [ErrShutdown]: what was accepted before is in the queues. It returns when
// all have ended, and a second after timeout in any case: a disk that does not answer,
// or other code that does not return, is left behind.
func (n *Notifier) Shutdown(timeout time.Duration) {
	patience, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	end, cancelEnd := context.WithTimeout(context.Background(), timeout+shutdownGrace)
	defer cancelEnd()

	n.sending.Lock() // waits for the messages that go into the queues
	n.stopped = true
	n.sending.Unlock()
	waitFor(patience, n.storing.Wait)

	n.serving.mu.Lock()
	n.serving.closed = true
	n.serving.mu.Unlock()

	clients := n.serving.all()
	for _, client := range clients {
		if client.above == nil { // else it is to write what comes from there first
			client.Finish(ReasonShutdown)
		}
	}
	defer context.AfterFunc(patience, func() {
		for _, client := range clients {
			client.Close(ReasonShutdown)
		}
	})()
	waitFor(end, func() {
		for _, client := range clients {
			<-client.Done()
		}
	})
	waitFor(patience, n.outboxes.wait)
	n.buckets.stop()
	waitFor(end, n.changes.checks.Wait)
	waitFor(end, n.replaying.Wait)
	n.history.Close(end)
}

// waitFor calls wait, and returns when that does or ctx is done.
func waitFor(ctx context.Context, wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
