// The connections that are being written to, and one timer for all of them.

package notify

import (
	"sync"
	"time"
)

// tickEvery is the precision of heartbeats, timeouts and the expiry of tokens.
const tickEvery = time.Second

// serving holds the connections that are written to. Its timer runs only while there are some.
type serving struct {
	tick func(*Client)

	mu      sync.Mutex // guards the fields below; never taken under a client's queue.mu
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

// startServing marks the connection as written to from now on; it calls begin with the queue
// locked. It returns false if the connection has ended or the server is stopping.
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
	if c.IsDiscarded() { // meanwhile; its cleanup may have run before the add
		c.notifier.serving.remove(c)
		return false
	}
	return true
}

// setClock sets and returns the time that the connections use.
func (n *Notifier) setClock() int64 {
	now := int64(time.Since(n.started))
	n.clock.Store(now)
	return now
}
