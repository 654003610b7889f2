package hooks_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
	"herald/notify/edge"
)

// post sends a request to subscribe, and does not wait for longer than ctx.
func post(ctx context.Context, s *pbtest.Server, client *pbtest.Subscriber, keys string) {
	body := fmt.Sprintf(`{"clientId":%q,"subscriptions":[%s]}`, client.ID, keys)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL+"/api/realtime", strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	request.Header.Set("Content-Type", "application/json")
	if response, err := s.Client().Do(request); err == nil {
		response.Body.Close()
	}
}

// TestEdgeAbortedRequest: the SDK cancels its request when it subscribes to more; that costs no connection.
func TestEdgeAbortedRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	entered, release := make(chan struct{}, 2), make(chan struct{})
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *core.RealtimeSubscribeRequestEvent) error {
		entered <- struct{}{}
		<-release
		return e.Next()
	})
	s := pbtest.ServeEdge(t, w)
	client := s.Connect(t)
	ctx, abort := context.WithCancel(t.Context())
	aborted := make(chan struct{})
	go func() {
		defer close(aborted)
		post(ctx, s, client, `"a"`)
	}()
	<-entered
	abort()
	<-aborted
	close(release)
	client.Set(t, nil, "a", "b")
	mustSend(t, w, "b", 1)
	client.Expect(t, "b", "1")
}

// TestEdgeWaitingHandler: a handler that waits for its client does not hold up the end.
func TestEdgeWaitingHandler(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	entered := make(chan struct{}, 1)
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *core.RealtimeSubscribeRequestEvent) error {
		entered <- struct{}{}
		<-e.Request.Context().Done()
		return e.Request.Context().Err()
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	client := s.Connect(t)
	ctx, abort := context.WithCancel(t.Context())
	defer abort()
	go post(ctx, s, client, `"a"`)
	<-entered
	abort()
	o.Close(time.Second)
}

// TestEdgeGhosts: clients that leave while the edge announces them leave the origin, too.
func TestEdgeGhosts(t *testing.T) {
	t.Parallel()
	here, there := pbtest.NATS(t, &server.Options{}), pbtest.NATS(t, &server.Options{})
	w := newWorld(t)
	o := pbtest.NewOrigin(t, w, here)
	var mu sync.Mutex
	isHeld := false
	hold := func(is bool) {
		mu.Lock()
		defer mu.Unlock()
		isHeld = is
	}
	bridge(t, here, there, func(subject string, data []byte, publish func()) {
		mu.Lock()
		defer mu.Unlock()
		if !isHeld || !strings.HasSuffix(subject, ".up") || len(data) < 1000 {
			publish()
		}
	})
	s := o.EdgeWith(t, edge.Config{NATS: there, Name: "edge"})
	keys := make([]string, 1000) // so much that the link takes only some of the clients
	for i := range keys {
		keys[i] = fmt.Sprintf("topic%d?options=%s", i, strings.Repeat("x", 2000))
	}
	all := make([]*pbtest.Subscriber, 6)
	for i := range all {
		all[i] = s.Subscribe(t, nil, keys...)
	}
	o.Close(time.Second)
	hold(true)
	o.Begin(t)
	pbtest.WaitFor(t, "the edge announces its clients", func() bool { return s.EdgeStats().Joined && s.EdgeStats().OnTheWay > 8<<20 })
	for _, client := range all[1:] {
		client.Close(t)
	}
	pbtest.WaitFor(t, "they have left the edge", func() bool { return s.EdgeStats().Connections == 1 })
	hold(false)
	all[0].Set(t, nil, "example") // which waits until it is back
	pbtest.WaitFor(t, "the others are not at the origin", func() bool { return w.SubscriptionsBroker().TotalClients() == 1 && o.Edges()[0].Connections == 1 })
}

// TestEdgeLateHandler: a handler that is bound later is not passed by.
func TestEdgeLateHandler(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	client := pbtest.ServeEdge(t, w).Subscribe(t, nil, "example")
	w.OnRealtimeMessageSend().BindFunc(func(*core.RealtimeMessageEvent) error { return nil }) // stops all
	mustSend(t, w, "example", 1)
	if rest := client.ExpectEnd(t); len(rest) > 0 {
		t.Errorf("got %v", rest)
	}
}

// TestEdgeWritesAfterwards: what a handler writes after its request is over fails, and does not wait for ever.
func TestEdgeWritesAfterwards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	over := make(chan error, 1)
	w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
		e.Response.Header().Set("Content-Type", "text/event-stream")
		if _, err := io.WriteString(e.Response, ":\n\n"); err != nil {
			return err
		}
		returned := e.Request.Context().Done()
		go func() {
			<-returned
			for {
				if _, err := e.Response.Write(bytes.Repeat([]byte(":\n"), 100<<10)); err != nil {
					over <- err
					return
				}
			}
		}()
		return nil
	})
	s := pbtest.ServeEdge(t, w)
	response, err := s.Client().Get(s.URL + "/api/realtime")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	select {
	case <-over:
	case <-time.After(pbtest.Timeout):
		t.Fatal("it still writes")
	}
}

// TestEdgeOddHeader: a request whose headers are no UTF-8 counts like any other. Here it is a sign-out, at the origin
// itself.
func TestEdgeOddHeader(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "own/{user}", "subscribeRule": `@request.auth.id = @request.query.user`, "history": 100})
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "history": 100})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	own := "own/" + w.ann.Id
	client := s.Subscribe(t, w.ann, own, "open")
	for _, at := range []*pbtest.Server{o.Server, s} {
		body := fmt.Sprintf(`{"clientId":%q,"subscriptions":["open"]}`, client.ID)
		peer, err := net.Dial("tcp", at.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		fmt.Fprintf(peer, "POST /api/realtime HTTP/1.1\r\nHost: x\r\nX-Title: Caf\xe9\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		if line, err := bufio.NewReader(peer).ReadString('\n'); err != nil || !strings.Contains(line, "204") {
			t.Errorf("%q %v", line, err)
		}
	}
	o.Close(time.Second)
	mustSend(t, w, own, "secret")
	mustSend(t, w, "open", 1)
	o.Begin(t)
	client.Expect(t, "open", "1")
}

// TestEdgeSmallPayload: a NATS server that takes only small messages.
func TestEdgeSmallPayload(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{MaxPayload: 64 << 10})).Edge(t, "edge")
	client := s.Subscribe(t, nil, "example")
	big := strings.Repeat("x", 100<<10)
	mustSend(t, w, "example", big)
	client.Expect(t, "example", fmt.Sprintf("%q", big))
}

// TestEdgeRewindOfNothing: a client that has rewound a topic without messages misses none.
func TestEdgeRewindOfNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addLog(t, w, 100)
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	client := o.Edge(t, "edge").Subscribe(t, nil, withQuery("log/a", "rewind", "2"))
	o.Close(time.Second)
	mustSendAll(t, w, "log/a", 1, 2, 3, 4, 5)
	o.Begin(t)
	for i := range 5 {
		if event := client.Next(t); !strings.Contains(event.Data, fmt.Sprintf(`"data":%d`, i+1)) {
			t.Fatalf("got %v", event)
		}
	}
}

// TestEdgeHistoryLater: a client that had subscribed before its topic had history, and may have missed something, must know.
func TestEdgeHistoryLater(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	channel := addLog(t, w, 0)
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	client := o.Edge(t, "edge").Subscribe(t, nil, "log/a")
	channel.Set("history", 100)
	save(t, w, channel)
	client.Set(t, nil, "log/a", notify.DeniedTopic)
	o.Close(time.Second)
	mustSend(t, w, "log/a", "missed")
	o.Begin(t)
	client.ExpectEnd(t)
}

// TestEdgeHeaderAfterwards: a middleware may set headers when the handler has returned.
func TestEdgeHeaderAfterwards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.BindFunc(func(e *core.RequestEvent) error {
			err := e.Next()
			for i := range 1000 {
				e.Response.Header().Set(fmt.Sprint("X-Time-", i%50), "1")
			}
			return err
		})
		return e.Next()
	})
	s := pbtest.ServeEdge(t, w)
	for range 100 {
		s.Connect(t)
	}
}

// TestEdgeOfStoppingOrigin: while the origin stops, a request is answered as one that can be tried again.
func TestEdgeOfStoppingOrigin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	client := pbtest.ServeEdge(t, w).Subscribe(t, nil, "a")
	engine(w).Shutdown(time.Second) // the first half of a graceful stop
	if status, answer := client.Try(t, nil, "a", "b"); status != http.StatusServiceUnavailable {
		t.Errorf("%d %v", status, answer)
	}
}
