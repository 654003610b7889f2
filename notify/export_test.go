package notify

import "github.com/pocketbase/pocketbase/tools/subscriptions"

// TakeQueued takes all messages off the queue of a client that nothing writes.
func (c *Client) TakeQueued() []subscriptions.Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	var messages []subscriptions.Message
	for _, f := range c.frames {
		messages = append(messages, f.message)
	}
	c.dropLocked(len(c.frames))
	return messages
}

// DropQueued empties the queue of a client that nothing writes.
func (c *Client) DropQueued() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(len(c.frames))
}

// HoldReplays keeps replays from reading until the function that it returns is called.
func (n *Notifier) HoldReplays() (release func()) {
	for range cap(n.replaySlots) {
		n.replaySlots <- struct{}{}
	}
	return func() {
		for range cap(n.replaySlots) {
			<-n.replaySlots
		}
	}
}
