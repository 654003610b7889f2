// Writing from the goroutine of the request. This is for connections that cannot be taken from
// net/http (HTTP/2, TLS, a ResponseWriter that a middleware wraps), and for those whose messages
// OnRealtimeMessageSend handlers must see. Called by hooks/connections.go.

package notify

import (
	"context"
	"sync"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// Response is the response of a realtime request as [Client.ServeStream] uses it. Its methods are
// called one at a time, except for Cut.
type Response interface {
	// Hooked reports whether other code wants to see each message. If so, messages go to Deliver;
	// otherwise they are joined and go to Write.
	Hooked() bool
	// Deliver lets other code see, change or stop the message, writes it with id, and flushes it.
	Deliver(message subscriptions.Message) error
	// Write writes whole events. It may block.
	Write(events []byte) error
	Flush() error
	// Cut makes a Write in progress fail. It may be called at any time, at most once.
	Cut()
}

// ServeStream writes PocketBase's connect event and then what is queued to response. It returns
// when the connection has ended because ctx ended, a write failed or the client was closed. The
// error comes from one of response's methods.
func (c *Client) ServeStream(ctx context.Context, response Response) error {
	return c.serveStream(ctx, response, func() bool { return true })
}

// serveStream is ServeStream for a response that may be written to only after ready returns true.
// If ready returns false, the response has ended, and c is about to.
func (c *Client) serveStream(ctx context.Context, response Response, ready func() bool) (err error) {
	s := &stream{cut: response.Cut}
	wake := make(chan struct{}, 1)
	if !c.startServing(func() { c.stream, c.wake = s, wake }) {
		return nil
	}
	reason := ReasonFailed // unless another reason is set below, this is a panic
	defer func() { c.end(reason) }()

	connect := c.ConnectMessage()
	err = s.write(func() error {
		if response.Hooked() {
			return response.Deliver(connect)
		}
		if err := response.Write(EncodeSSE(c.Id(), connect.Name, connect.Data)); err != nil {
			return err
		}
		return response.Flush()
	})
	for {
		for more := true; more && err == nil; {
			if !ready() {
				<-c.done
				return nil
			}
			err = s.write(func() (err error) {
				more, err = c.writeBatch(response)
				return err
			})
		}
		if err != nil {
			reason = ReasonWriteFailed
			return err
		}
		c.settle()
		select {
		case <-ctx.Done():
			reason = ReasonLeft
			return nil
		case <-wake:
		}
		if c.IsDiscarded() {
			return nil
		}
	}
}

// streamBuffers holds *[]byte in which frames are joined, so that an idle connection needs no
// buffer.
var streamBuffers = sync.Pool{New: func() any { return new([]byte) }}

// writeBatch writes some of what waits. It reports whether there was anything to write.
func (c *Client) writeBatch(response Response) (any bool, err error) {
	c.mu.Lock()
	c.inFlight = false // the previous write is finished
	if response.Hooked() {
		if c.writable() == 0 {
			c.mu.Unlock()
			return false, nil
		}
		f := c.frames[0]
		c.inFlight = f.private
		c.dropLocked(1)
		c.mu.Unlock()
		if both := c.pair.Load(); both != nil && f.private {
			both.handed.Store(true)
		}
		if !f.comment {
			c.wrote(f.size)
			return true, response.Deliver(f.message)
		}
		if err := response.Write(f.wire()); err != nil {
			return true, err
		}
		return true, response.Flush()
	}

	buffer := streamBuffers.Get().(*[]byte)
	defer streamBuffers.Put(buffer)
	out, shared, private := c.join(*buffer)
	c.inFlight = private
	last := c.writable() == 0
	c.mu.Unlock()
	if !shared {
		*buffer = out[:0]
	}
	if len(out) == 0 {
		return false, nil
	}
	if err := response.Write(out); err != nil {
		return true, err
	}
	c.wrote(len(out))
	if last {
		return true, response.Flush()
	}
	return true, nil
}
