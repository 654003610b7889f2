// Delivery through a channel that a loop of other code reads, as PocketBase's own loop does.

package notify

import "github.com/pocketbase/pocketbase/tools/subscriptions"

// Channel implements [subscriptions.Client], for a loop of other code that reads the messages and
// writes them to the connection. The channel is closed when the connection ends. Herald's own ways
// of writing do not use it.
func (c *Client) Channel() chan subscriptions.Message {
	if below := c.below(); below != nil {
		return below.Channel()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.channel == nil {
		c.channel = make(chan subscriptions.Message)
		if c.socket == nil && c.stream == nil && !c.ended {
			c.writesToChannel()
			go c.pump()
			c.wakeLocked()
		} else { // somebody reads the messages already: two would have a half each
			go func() {
				<-c.done
				close(c.channel)
			}()
		}
	}
	return c.channel
}

// writesToChannel makes the channel the way in which c writes. mu is held, or nobody else knows c.
func (c *Client) writesToChannel() {
	c.stream, c.wake = &stream{cut: func() {}}, make(chan struct{}, 1)
}

// pump moves messages from the queue to the channel until the connection ends. Where c has
// been wrapped meanwhile it goes on with the client below it.
func (c *Client) pump() {
	c.mu.Lock()
	channel := c.channel
	c.mu.Unlock()
	defer close(channel)
	defer c.guard("passing a realtime connection's messages on")
	for {
		if below := c.below(); below != nil {
			c = below
		}
		c.mu.Lock()
		s, wake := c.stream, c.wake
		if c.below() != nil {
			c.mu.Unlock()
			continue // wake may be that of the goroutine that serves c now
		}
		var next *frame
		if c.inFlight = false; c.writable() > 0 {
			next = c.frames[0]
			c.inFlight = next.private
			c.dropLocked(1)
		}
		if next == nil {
			c.endIfDoneLocked()
		}
		ended := c.ended
		c.mu.Unlock()

		switch {
		case ended:
			return
		case next == nil:
			<-wake // also at the end
		case !next.comment:
			_ = s.write(func() error {
				select {
				case channel <- next.message:
					c.wrote(next.size)
				case <-c.done: // the loop ends too
				}
				return nil
			})
		}
	}
}
