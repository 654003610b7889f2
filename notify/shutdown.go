// The shutdown.

package notify

import (
	"context"
	"time"

	"herald/notify/internal/waits"
)

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

	n.stopPresence() // those who leave now come back, and nobody is told
	n.conns.Shutdown(patience, end)
	waits.For(patience, n.outboxes.wait)
	n.buckets.stop()
	waits.For(end, n.changes.checks.Wait)
	waits.For(end, n.replaying.Wait)
	n.history.Close(end)
}
