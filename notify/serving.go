// What each served connection needs from time to time, such as heartbeats and timeouts, and the
// shutdown. One timer serves all connections.

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
	case c.stream != nil && c.stream.isStuck(): // anything else that is due would wait for this write
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
		// it was taken before a handler wanted to see its messages
		c.top().Finish(ReasonHandlers)
	}
}

// Stopping reports whether Shutdown has been called. No more connections are served then.
func (n *Notifier) Stopping() bool {
	n.sending.RLock()
	defer n.sending.RUnlock()
	return n.stopped
}

// shutdownGrace is how long Shutdown continues after its timeout, to end at once what is left.
const shutdownGrace = time.Second

// Shutdown ends all connections once everything queued for them is written, or when timeout is
// over. From its start, messages are refused with [ErrShutdown]; messages accepted earlier are in
// the queues. It returns when all connections have ended, and at the latest a second after timeout.
// It abandons a disk that does not answer and other code that does not return.
func (n *Notifier) Shutdown(timeout time.Duration) {
	patience, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	end, cancelEnd := context.WithTimeout(context.Background(), timeout+shutdownGrace)
	defer cancelEnd()

	n.sending.Lock() // waits for messages that are going into the queues
	n.stopped = true
	n.sending.Unlock()
	waits.For(patience, n.storing.Wait)

	n.serving.mu.Lock()
	n.serving.closed = true
	n.serving.mu.Unlock()

	clients := n.serving.all()
	for _, client := range clients {
		if client.above() == nil { // otherwise it must first write what comes from the client above
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
