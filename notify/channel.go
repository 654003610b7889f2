// Delivery through a channel that a loop of other code reads, as PocketBase's own loop does.

package notify

import (
	"context"
	"errors"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
)

// Channel implements [subscriptions.Client], for a loop of other code that reads the messages and
// writes them to the connection. The channel is closed when the connection ends. Herald's own ways
// of writing do not use it: once one of them serves the client, nothing more comes out.
func (c *Client) Channel() chan subscriptions.Message {
	c.channelMu.Lock()
	defer c.channelMu.Unlock()
	if c.channel == nil {
		c.channel = make(chan subscriptions.Message)
		if c.pair.Load() != nil || c.conn.IsServed() { // somebody reads the messages already: two would have a half each
			go func() {
				<-c.Done()
				close(c.channel)
			}()
		} else {
			c.writeToChannel(&c.conn, c.channel)
		}
	}
	return c.channel
}

// writeToChannel makes channel what output is written to. It is closed when that is over.
func (c *Client) writeToChannel(output *conn.Conn, channel chan subscriptions.Message) {
	to := toChannel{channel, make(chan struct{}), nil}
	if c.carrier != nil {
		to.line = c.carrier.Line()
	}
	run := output.BeginStream(to)
	go func() {
		defer close(channel)
		defer c.guard("passing a realtime connection's messages on")
		if run == nil {
			return
		}
		if err := run(context.Background(), nil); errors.Is(err, conn.ErrReplaced) {
			<-c.Done()
		}
	}()
}

// toChannel is the "response" of a client whose messages go through a channel.
type toChannel struct {
	channel chan<- subscriptions.Message
	cut     chan struct{}
	line    *Line // to which the loop writes, if an edge holds the connection
}

var (
	_ conn.Response = toChannel{}
	_ conn.Keeper   = toChannel{}
)

func (toChannel) Hooked() bool       { return true }
func (toChannel) Write([]byte) error { return nil } // a heartbeat, for which there is no message
func (toChannel) Flush() error       { return nil }
func (t toChannel) Cut()             { close(t.cut) }
func (t toChannel) Kept() *Line      { return t.line }

func (t toChannel) Deliver(name string, data []byte) error {
	select {
	case t.channel <- subscriptions.Message{Name: name, Data: data}:
	case <-t.cut: // the loop ends too
	}
	return nil
}
