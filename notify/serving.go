// The connections that are being served, and what each of them needs once in a
// while: heartbeats, the end of its time. One timer for all.

package notify

import (
	"context"
	"time"

	"github.com/pocketbase/pocketbase/apis"

	"herald/notify/internal/waits"
)

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
			c.put(heartbeat)
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
	waits.For(patience, n.storing.Wait)

	n.serving.mu.Lock()
	n.serving.closed = true
	n.serving.mu.Unlock()

	clients := n.serving.all()
	for _, client := range clients {
		if client.above() == nil { // else it is to write what comes from there first
			client.Finish(ReasonShutdown)
		}
	}
	defer context.AfterFunc(patience, func() {
		for _, client := range clients {
			client.Close(ReasonShutdown)
		}
	})()
	waits.For(end, func() {
		for _, client := range clients {
			<-client.Done()
		}
	})
	waits.For(patience, n.outboxes.wait)
	n.buckets.stop()
	waits.For(end, n.changes.checks.Wait)
	waits.For(end, n.replaying.Wait)
	n.history.Close(end)
}
