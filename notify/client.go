// The client of a realtime connection, with its bounded queue. hooks/connections.go
// makes one for each connection; the fan-out and PocketBase send to it.

package notify

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// The reasons for which the server ends a connection.
const (
	ReasonQueueFull    = "queue full"   // it did not read what was sent to it
	ReasonDisconnected = "disconnected" // somebody asked for it, see Notifier.Disconnect
)

// Client is a realtime connection whose Send never blocks: it puts the message
// into a bounded queue, from which PocketBase's realtime loop writes it to the
// socket. A connection whose queue is full is closed, rather than left with a
// hole in what it received.
//
// It wraps the client that PocketBase made for the connection and keeps that
// one's id, subscriptions and store, and beside these its subscription keys by
// topic: asking PocketBase's client for them costs it several allocations, which
// every message would pay for every connection.
type Client struct {
	subscriptions.Client

	connected time.Time
	onClose   func(reason string)

	mu        sync.Mutex // held for sends to queue and for closing it
	queue     chan subscriptions.Message
	discarded bool

	keysMu sync.RWMutex
	keys   map[string][]string // subscription keys by topic; a slice is replaced, never changed
	held   map[string][]string // in force in place of keys during a Resubscribe; else nil
}

var _ subscriptions.Client = (*Client)(nil)

// NewClient wraps base, the client of a connection that begins now, with a
// queue of size messages.
//
// onClose is called on a goroutine of its own, at most once, when the server
// ends the connection; it has to cut the connection even where a write to it is
// stuck. reason is one of the Reason… constants.
func NewClient(base subscriptions.Client, size int, onClose func(reason string)) *Client {
	return &Client{
		Client:    base,
		connected: time.Now(),
		onClose:   onClose,
		queue:     make(chan subscriptions.Message, size),
		keys:      map[string][]string{},
	}
}

// Subscribe implements [subscriptions.Client].
func (c *Client) Subscribe(keys ...string) {
	c.keysMu.Lock()
	defer c.keysMu.Unlock()
	c.Client.Subscribe(keys...)
	for _, key := range keys {
		topic := topicOf(key)
		if known := c.keys[topic]; key != "" && safeKey(key) && !slices.Contains(known, key) {
			c.keys[topic] = append(slices.Clip(known), key)
		}
	}
	c.held = nil
}

// Unsubscribe implements [subscriptions.Client]; no keys are all keys.
func (c *Client) Unsubscribe(keys ...string) {
	c.keysMu.Lock()
	defer c.keysMu.Unlock()
	c.Client.Unsubscribe(keys...)
	if len(keys) == 0 {
		clear(c.keys)
	}
	for _, key := range keys {
		topic := topicOf(key)
		left := slices.DeleteFunc(slices.Clone(c.keys[topic]), func(known string) bool { return known == key })
		if c.keys[topic] = left; len(left) == 0 {
			delete(c.keys, topic)
		}
	}
}

// Resubscribe calls replace, which is to replace the client's subscriptions by
// an Unsubscribe from all and a Subscribe, as PocketBase does whenever a client
// adds a topic. Up to that Subscribe the client still gets messages by the keys
// it had: between the two calls it would miss them.
func (c *Client) Resubscribe(replace func() error) error {
	c.hold(true)
	defer c.hold(false)
	return replace()
}

func (c *Client) hold(on bool) {
	c.keysMu.Lock()
	defer c.keysMu.Unlock()
	c.held = nil
	if on {
		c.held = maps.Clone(c.keys)
	}
}

// keysOf returns the keys by which the client is subscribed to topic.
func (c *Client) keysOf(topic string) []string {
	c.keysMu.RLock()
	defer c.keysMu.RUnlock()
	if c.held != nil {
		return c.held[topic]
	}
	return c.keys[topic]
}

// Channel returns the queue. It is closed by Discard; messages that are in it
// by then can still be received.
func (c *Client) Channel() chan subscriptions.Message { return c.queue }

// Send queues m. It does not block.
func (c *Client) Send(m subscriptions.Message) { c.enqueue(m) }

func (c *Client) enqueue(m subscriptions.Message) bool {
	// An SSE parser takes one space after "event:" away (WHATWG HTML, 9.2.6),
	// and PocketBase writes none of its own.
	if m.Name != "" && m.Name[0] == ' ' {
		m.Name = " " + m.Name
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.discarded {
		return false
	}
	select {
	case c.queue <- m:
		return true
	default:
		c.closeLocked(ReasonQueueFull)
		return false
	}
}

// Queued returns how many messages wait to be written.
func (c *Client) Queued() int { return len(c.queue) }

// Connected returns when the connection began.
func (c *Client) Connected() time.Time { return c.connected }

// Close ends the connection. The SDK on the other side will reconnect.
func (c *Client) Close(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.discarded {
		c.closeLocked(reason)
	}
}

func (c *Client) closeLocked(reason string) {
	c.discardLocked()
	go c.onClose(reason) // may do I/O, and a sender must not wait for it
}

// Discard implements [subscriptions.Client]: nothing can be queued any more.
func (c *Client) Discard() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.discarded {
		c.discardLocked()
	}
}

func (c *Client) discardLocked() {
	c.discarded = true
	close(c.queue)
	c.Client.Discard()
}

// IsDiscarded implements [subscriptions.Client].
func (c *Client) IsDiscarded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.discarded
}
