package notify

import "github.com/pocketbase/pocketbase/tools/subscriptions"

// TakeQueued takes all messages off the queue of a client that nothing writes.
func (c *Client) TakeQueued() []subscriptions.Message {
	var messages []subscriptions.Message
	c.conn.Drain(func(name string, data []byte) {
		messages = append(messages, subscriptions.Message{Name: name, Data: data})
	})
	return messages
}

// DropQueued empties the queue of a client that nothing writes.
func (c *Client) DropQueued() {
	c.conn.Drain(func(string, []byte) {})
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
