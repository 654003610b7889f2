package hooks_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/internal/seed"
	"herald/notify"
	"herald/notify/edge"
)

// TestEdgeNATSRestarts: what is sent while there is no NATS server arrives when there is one again.
func TestEdgeNATSRestarts(t *testing.T) {
	t.Parallel()
	_, port, err := net.SplitHostPort(pbtest.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	start := func() *server.Server {
		made, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: number, NoSigs: true, NoLog: true})
		if err != nil {
			t.Fatal(err)
		}
		made.Start()
		if !made.ReadyForConnections(pbtest.Timeout) {
			t.Fatal("the NATS server does not listen")
		}
		return made
	}
	stop := func(s *server.Server) {
		s.Shutdown()
		s.WaitForShutdown()
	}
	w := newWorld(t)
	o := pbtest.NewOrigin(t, w, "nats://127.0.0.1:"+port) // before there is a server
	running := start()
	defer func() { stop(running) }()
	s := o.Edge(t, "edge")
	client := s.Subscribe(t, nil, "example")
	sent := 0
	for range 3 {
		stop(running)
		for range 100 {
			mustSend(t, w, "example", sent)
			sent++
		}
		running = start()
	}
	for i := range sent {
		client.Expect(t, "example", fmt.Sprint(i))
	}
}

// TestEdgeSlow: an edge that takes nothing for a while does not hold up another one, and gets everything later.
func TestEdgeSlow(t *testing.T) {
	t.Parallel()
	eachEdgeWay(t, func(t *testing.T, way way) {
		here, there := pbtest.NATS(t, &server.Options{}), pbtest.NATS(t, &server.Options{})
		w := way.newWorld(t)
		o := pbtest.NewOrigin(t, w, here)
		var mu sync.Mutex
		isHeld := false
		bridge(t, here, there, func(subject string, data []byte, publish func()) {
			mu.Lock()
			defer mu.Unlock()
			// beats and acknowledgements go through: the link is slow, not dead
			if !isHeld || !strings.HasSuffix(subject, ".slow.down") || len(data) < 1000 {
				publish()
			}
		})
		hold := func(is bool) {
			mu.Lock()
			defer mu.Unlock()
			isHeld = is
		}
		fast := o.Edge(t, "fast").Subscribe(t, nil, "example")
		slow := o.EdgeWith(t, edge.Config{NATS: there, Name: "slow"}).Subscribe(t, nil, "example")
		hold(true)
		const fit, messages = 85, 130 // as many as may be on the way, and more than that
		text := strings.Repeat("x", 100<<10)
		expect := func(client *pbtest.Subscriber, i int) {
			t.Helper()
			if event := client.Next(t); !strings.HasPrefix(event.Data, fmt.Sprintf(`"%d x`, i)) {
				t.Fatalf("got %.20s, want %d", event.Data, i)
			}
		}
		for i := range messages {
			mustSend(t, w, "example", fmt.Sprint(i, " ", text))
			if i < fit { // the rest at once: a client counts as lost for which there was no room for 10 s, and this machine may be slow
				expect(fast, i)
			}
		}
		for i := range messages - fit {
			expect(fast, fit+i)
		}
		for _, edge := range o.Edges() {
			if edge.OnTheWay > 11<<20 {
				t.Errorf("%d bytes are on the way to %s", edge.OnTheWay, edge.Name)
			}
		}
		hold(false)
		for i := range messages {
			expect(slow, i)
		}
	})
}

// TestEdgeFar: a client that reads well is not ended for what the link takes, however its messages get there.
func TestEdgeFar(t *testing.T) {
	t.Parallel()
	eachEdgeWay(t, func(t *testing.T, way way) {
		here, there := pbtest.NATS(t, &server.Options{}), pbtest.NATS(t, &server.Options{})
		w := way.newWorld(t)
		o := pbtest.NewOrigin(t, w, here)
		bridge(t, here, there, func(_ string, _ []byte, publish func()) { time.AfterFunc(1200*time.Millisecond, publish) })
		client := o.EdgeWith(t, edge.Config{NATS: there, Name: "far"}).Subscribe(t, nil, "example")
		const messages = 400 // more than the queue holds
		for i := range messages {
			mustSend(t, w, "example", i)
			time.Sleep(10 * time.Millisecond) // longer than the way takes, in all
		}
		for i := range messages {
			client.Expect(t, "example", fmt.Sprint(i))
		}
	})
}

// TestEdgeAddresses: an application sees its clients' addresses through an edge, on both ways that their requests
// take, and a client cannot claim another one.
func TestEdgeAddresses(t *testing.T) {
	t.Parallel()
	for _, trusts := range []bool{false, true} {
		app := pbtest.NewApp(t, func(app core.App) {
			hooks.MustRegister(app, nil, hooks.Config{Limits: hooks.Limits{ConnectionsPerIP: 2}})
		})
		if trusts {
			app.Settings().TrustedProxy.Headers = []string{"X-Forwarded-For"}
		}
		app.OnServe().BindFunc(func(e *core.ServeEvent) error {
			e.Router.GET("/ip", func(e *core.RequestEvent) error { return e.String(http.StatusOK, e.RealIP()) })
			return e.Next()
		})
		s := pbtest.ServeEdge(t, app)
		from := func(ip string) *http.Client {
			dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
			transport := &http.Transport{DialContext: dialer.DialContext}
			t.Cleanup(transport.CloseIdleConnections)
			return &http.Client{Transport: transport}
		}
		do := func(client *http.Client, method, path, body string) (*http.Response, string) {
			t.Helper()
			request, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Content-Type", "application/json")
			request.Header.Set("X-Forwarded-For", "9.9.9.9")
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { response.Body.Close() })
			if response.Header.Get("Content-Type") == "text/event-stream" {
				return response, ""
			}
			text, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			return response, string(text)
		}
		one, other := from("127.0.0.2"), from("127.0.0.3")
		if _, ip := do(one, "GET", "/ip", ""); trusts && ip != "127.0.0.2" {
			t.Errorf("over the proxy the address is %s", ip)
		}
		for range 2 {
			if response, text := do(one, "GET", "/api/realtime", ""); response.StatusCode != http.StatusOK {
				t.Fatalf("%s %s", response.Status, text)
			}
		}
		if response, text := do(one, "GET", "/api/realtime", ""); response.StatusCode != http.StatusTooManyRequests || response.Header.Get("Retry-After") == "" {
			t.Errorf("%s %s", response.Status, text)
		}
		connections, err := engine(app).Connections(notify.ConnectionFilter{})
		if err != nil || len(connections) != 2 || connections[0].IP != "127.0.0.2" {
			t.Fatalf("%+v %v", connections, err)
		}
		body := fmt.Sprintf(`{"clientId":%q,"subscriptions":["example"]}`, connections[0].ID)
		if response, text := do(other, "POST", "/api/realtime", body); response.StatusCode != http.StatusBadRequest {
			t.Errorf("another address may subscribe: %s %s", response.Status, text)
		}
		if response, text := do(one, "POST", "/api/realtime", body); response.StatusCode != http.StatusNoContent {
			t.Errorf("%s %s", response.Status, text)
		}
	}
}

// TestEdgeLargeRequest: a request that is larger than a NATS message.
func TestEdgeLargeRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := pbtest.ServeEdge(t, w)
	client := s.Connect(t)
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprintf("topic%d?options=%s", i, strings.Repeat("x", 2000))
	}
	client.Set(t, nil, keys...)
	if stats := engine(w).Stats(); stats.Subscriptions != 1000 {
		t.Errorf("%d subscriptions", stats.Subscriptions)
	}
	if status, answer := s.Do(t, "POST", "/api/realtime", "", strings.Repeat("x", 33<<20)); status != http.StatusRequestEntityTooLarge {
		t.Errorf("%d %v", status, answer)
	}
	big := strings.Repeat("x", 200<<10)
	mustSend(t, w, "topic0", big)
	if event := client.Next(t); len(event.Data) != len(big)+2 {
		t.Errorf("%d bytes came", len(event.Data))
	}
}

// TestEdgeBadLink sends over a NATS network that loses, doubles and reorders 2 of 100 messages.
func TestEdgeBadLink(t *testing.T) {
	t.Parallel()
	here, there := pbtest.NATS(t, &server.Options{}), pbtest.NATS(t, &server.Options{})
	random := rand.New(rand.NewPCG(seed.Of(t), 1))
	var mu sync.Mutex
	isBad := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(100) < 2
	}
	bridge(t, here, there, func(_ string, _ []byte, publish func()) {
		if isBad() {
			return
		}
		if isBad() {
			publish()
		}
		if isBad() {
			time.AfterFunc(30*time.Millisecond, publish)
			return
		}
		publish()
	})
	w := newWorld(t)
	o := pbtest.NewOrigin(t, w, here)
	s := o.EdgeWith(t, edge.Config{NATS: there, Name: "edge"})
	const clients, messages = 10, 500
	var all []*pbtest.Subscriber
	for i := range clients {
		all = append(all, s.Subscribe(t, []*core.Record{nil, w.ann, w.bob}[i%3], "example"))
	}
	for i := range messages {
		mustSend(t, w, "example", i)
		if i%50 == 0 {
			all[i/50].Set(t, nil, "example", "other") // signs out, or subscribes anew
		}
		time.Sleep(time.Millisecond) // so that there is more than one packet
	}
	for _, client := range all {
		for i := range messages {
			client.Expect(t, "example", fmt.Sprint(i))
		}
	}
	if stats := engine(w).Stats(); stats.Dropped > 0 || len(stats.Disconnects) > 0 {
		t.Errorf("stats %+v", stats)
	}
}

// bridge carries messages between two NATS servers: carry gets each, and publishes it on the other server or not.
func bridge(t *testing.T, here, there string, carry func(subject string, data []byte, publish func())) {
	t.Helper()
	connect := func(address string) *nats.Conn {
		nc, err := nats.Connect(address, nats.NoEcho())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	a, b := connect(here), connect(there)
	for from, to := range map[*nats.Conn]*nats.Conn{a: b, b: a} {
		if _, err := from.Subscribe("herald.>", func(m *nats.Msg) {
			carry(m.Subject, m.Data, func() { _ = to.PublishMsg(&nats.Msg{Subject: m.Subject, Reply: m.Reply, Data: m.Data}) })
		}); err != nil {
			t.Fatal(err)
		}
	}
}
