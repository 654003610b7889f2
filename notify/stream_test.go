package notify

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// stuckResponse takes the connect event, and blocks at the next write.
type stuckResponse struct {
	connected sync.Once
	blocks    chan struct{} // closed when it does
	cut       chan struct{}
}

func newStuckResponse() *stuckResponse {
	return &stuckResponse{blocks: make(chan struct{}), cut: make(chan struct{})}
}

func (r *stuckResponse) Hooked() bool                 { return false }
func (r *stuckResponse) Deliver(string, []byte) error { return nil }
func (r *stuckResponse) Flush() error                 { return nil }
func (r *stuckResponse) Cut()                         { close(r.cut) }

func (r *stuckResponse) Write([]byte) error {
	isConnect := false
	r.connected.Do(func() { isConnect = true })
	if isConnect {
		return nil
	}
	close(r.blocks)
	<-r.cut
	return context.Canceled
}

func newStreamApp(t *testing.T) (*tests.TestApp, *Notifier) {
	t.Helper()
	app, err := tests.NewTestApp(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(app.Cleanup)
	n := New(app, Config{})
	t.Cleanup(func() { n.Shutdown(0) })
	return app, n
}

// serveStuck serves a client of topic over a stream that is stuck in a message to it.
func serveStuck(t *testing.T, n *Notifier, c *Client, to Audience) {
	t.Helper()
	c.Register(c)
	c.Subscribe("topic")
	response := newStuckResponse()
	go c.ServeStream(t.Context(), response)
	if _, err := n.Send(t.Context(), Message{Topic: "topic", Data: 1, To: to}); err != nil {
		t.Fatal(err)
	}
	<-response.blocks
}

func awaitDone(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.Done():
	case <-time.After(30 * time.Second):
		t.Error("the connection does not end")
		c.Close(DisconnectRequested)
	}
}

// TestStuckAfterLifetime: a stream that is stuck is cut, also when its lifetime is over.
func TestStuckAfterLifetime(t *testing.T) {
	t.Parallel()
	_, n := newStreamApp(t)
	c := n.NewClient(subscriptions.NewDefaultClient(), nil)
	c.SetTimeouts(time.Millisecond, 0)
	serveStuck(t, n, c, Audience{})
	awaitDone(t, c)
}

// TestRevokedWhileStreamWrites: what is being written to a user who is signed out is cut.
func TestRevokedWhileStreamWrites(t *testing.T) {
	t.Parallel()
	app, n := newStreamApp(t)
	users, err := app.FindCollectionByNameOrId("users")
	if err != nil {
		t.Fatal(err)
	}
	ann := core.NewRecord(users)
	ann.SetEmail("ann@x.com")
	ann.SetRandomPassword()
	if err := app.Save(ann); err != nil {
		t.Fatal(err)
	}
	c := n.NewClient(subscriptions.NewDefaultClient(), nil)
	c.Set(apis.RealtimeClientAuthKey, ann)
	serveStuck(t, n, c, Audience{Users: []string{"users:" + ann.Id}})
	c.Unset(apis.RealtimeClientAuthKey)
	awaitDone(t, c)
	if ends := n.Stats().Disconnects; ends[DisconnectAuthEnded.Reason] != 1 {
		t.Errorf("it ended for %v", ends)
	}
}
