package conn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// collector is a response that keeps what is delivered. It takes a message only when one is asked
// for, if it has a gate.
type collector struct {
	gate chan struct{}
	cut  chan struct{}

	mu  sync.Mutex
	got []string
}

func (*collector) Hooked() bool       { return true }
func (*collector) Write([]byte) error { return nil }
func (*collector) Flush() error       { return nil }
func (r *collector) Cut()             { close(r.cut) }

func (r *collector) Deliver(name string, _ []byte) error {
	if r.gate != nil {
		select {
		case <-r.gate:
		case <-r.cut:
			return errors.New("cut")
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, name)
	return nil
}

func (r *collector) await(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		r.mu.Lock()
		got = slices.Clone(r.got)
		r.mu.Unlock()
		if slices.Equal(got, want) {
			return
		}
	}
	t.Fatalf("got %v, want %v", got, want)
}

// noted is an owner that keeps what it was told.
type noted struct {
	why         Disconnect
	undelivered int
}

func (n *noted) Ended(why Disconnect, undelivered int) { n.why, n.undelivered = why, undelivered }
func (*noted) Tick(time.Time, int64)                   {}

func newConn(t *testing.T) (*Conn, *noted) {
	t.Helper()
	group := NewGroup(Config{QueueSize: 10, QueueBytes: 1000}, func(what string, cause any, _ string) {
		t.Errorf("panic while %s: %v", what, cause)
	})
	owner := &noted{}
	c := group.Start(new(Conn), owner, "id")
	t.Cleanup(func() {
		c.End(Left)
		<-c.Done()
	})
	return c, owner
}

func put(c *Conn, names ...string) {
	for _, name := range names {
		c.Put(NewFrame(name, []byte("1"), false))
	}
}

// TestPassOn: a stream that served the first connection serves the one that it is passed on to, and
// neither loses a message.
func TestPassOn(t *testing.T) {
	above, _ := newConn(t)
	below, _ := newConn(t)
	reader := &collector{gate: make(chan struct{}), cut: make(chan struct{})}
	run := above.BeginStream(reader)
	go run(context.Background(), nil)
	put(above, "1", "2")
	reader.gate <- struct{}{}
	reader.await(t, "1")

	if !above.PassOn(below) {
		t.Fatal("nothing served it")
	}
	put(below, "direct")
	for range 2 {
		reader.gate <- struct{}{} // 2 may have been taken before
	}
	through := &collector{cut: make(chan struct{})}
	go above.Serve(context.Background(), through, nil)
	put(above, "3")
	reader.await(t, "1", "2", "direct")
	through.await(t, "3") // and not 2 again
}

// TestReplaced: a stream that something else takes the place of ends, and the connection does not.
func TestReplaced(t *testing.T) {
	c, _ := newConn(t)
	first, second := &collector{cut: make(chan struct{})}, &collector{cut: make(chan struct{})}
	run := c.BeginStream(first)
	ended := make(chan error)
	go func() { ended <- run(context.Background(), nil) }()
	put(c, "1")
	first.await(t, "1")
	go c.Serve(context.Background(), second, nil)
	if err := <-ended; !errors.Is(err, ErrReplaced) {
		t.Errorf("error %v", err)
	}
	put(c, "2")
	second.await(t, "2")
	first.await(t, "1")
}

// TestEnds: what an owner is told, and what a connection does after its end.
func TestEnds(t *testing.T) {
	t.Run("finish", func(t *testing.T) {
		c, owner := newConn(t)
		reader := &collector{gate: make(chan struct{}), cut: make(chan struct{})}
		go c.Serve(context.Background(), reader, nil)
		put(c, "1", "2")
		c.Finish(Lifetime)
		if c.Put(NewFrame("3", nil, false)) != Gone {
			t.Error("it takes more")
		}
		reader.gate <- struct{}{}
		reader.gate <- struct{}{}
		<-c.Done()
		if !c.IsDrained() || owner.why != Lifetime || owner.undelivered != 0 {
			t.Errorf("drained %v, owner %+v", c.IsDrained(), owner)
		}
		reader.await(t, "1", "2")
	})
	t.Run("full", func(t *testing.T) {
		c, owner := newConn(t)
		outcome := Queued
		for i := 0; outcome == Queued; i++ {
			outcome = c.Put(NewFrame(fmt.Sprint(i), nil, false))
		}
		<-c.Done()
		if outcome != Dropped || owner.why != QueueFull || owner.undelivered != 10 || c.IsDrained() {
			t.Errorf("outcome %v, owner %+v", outcome, owner)
		}
	})
	t.Run("private", func(t *testing.T) {
		c, owner := newConn(t)
		put(c, "1")
		if c.EndIfPrivate(Left); c.HasEnded() {
			t.Fatal("nothing private waited")
		}
		c.Put(NewFrame("2", nil, true))
		c.EndIfPrivate(Left)
		<-c.Done()
		if owner.why != Left || owner.undelivered != 2 {
			t.Errorf("owner %+v", owner)
		}
	})
	t.Run("the group is shut down", func(t *testing.T) {
		c, owner := newConn(t)
		reader := &collector{cut: make(chan struct{})}
		go c.Serve(context.Background(), reader, nil)
		put(c, "1")
		reader.await(t, "1")
		c.group.Shutdown(t.Context(), t.Context())
		if !c.HasEnded() || owner.why != Shutdown {
			t.Errorf("owner %+v", owner)
		}
	})
}

// TestHold: nothing is written while somebody holds the connection.
func TestHold(t *testing.T) {
	c, _ := newConn(t)
	reader := &collector{cut: make(chan struct{})}
	go c.Serve(context.Background(), reader, nil)
	put(c, "1")
	reader.await(t, "1")
	c.Hold()
	c.Hold()
	put(c, "2", "3")
	c.Release()
	if c.Queued() != 2 {
		t.Errorf("%d wait", c.Queued())
	}
	c.Remove(map[string]struct{}{"2": {}}, Failed)
	c.Release()
	reader.await(t, "1", "3")
}
