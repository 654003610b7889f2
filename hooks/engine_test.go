package hooks_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

func engine(app core.App) *notify.Notifier { return notify.New(app, notify.Config{}) }

func send(t *testing.T, app core.App, msg notify.Message) notify.Report {
	t.Helper()
	report, err := engine(app).Send(t.Context(), msg)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// awaitReason waits until a connection has ended for reason.
func awaitReason(t *testing.T, app core.App, reason string) {
	t.Helper()
	pbtest.WaitFor(t, "a connection ends: "+reason, func() bool { return engine(app).Stats().Disconnects[reason] > 0 })
}

// TestResponseHead compares what a client sees of a taken connection's response
// with PocketBase's own.
func TestResponseHead(t *testing.T) {
	stock := pbtest.Serve(t, pbtest.NewApp(t, addMiddleware))
	own := pbtest.Serve(t, pbtest.NewApp(t, register, addMiddleware))
	head := func(server *pbtest.Server, protocol string) (*http.Response, net.Conn) {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "GET /api/realtime HTTP/%s\r\nHost: x\r\nOrigin: http://front.end\r\n\r\n", protocol)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		return response, conn
	}
	for _, protocol := range []string{"1.1", "1.0"} {
		want, _ := head(stock, protocol)
		got, _ := head(own, protocol)
		if got.Status != want.Status || got.Proto != want.Proto {
			t.Errorf("HTTP/%s: %s %s, want %s %s", protocol, got.Proto, got.Status, want.Proto, want.Status)
		}
		for _, header := range []http.Header{want.Header, got.Header} {
			if header.Get("Date") == "" {
				t.Errorf("HTTP/%s: no date", protocol)
			}
			header.Del("Date")
			header.Del("Connection")        // ends with the connection
			header.Del("Transfer-Encoding") // and has no chunks
		}
		if !maps.EqualFunc(got.Header, want.Header, slices.Equal) {
			t.Errorf("HTTP/%s:\n%v, want\n%v", protocol, got.Header, want.Header)
		}
		line, err := bufio.NewReader(got.Body).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "id:") {
			t.Errorf("HTTP/%s: got %q, error %v", protocol, line, err)
		}
	}
	if stats := engine(own.App).Stats(); stats.Taken != 2 {
		t.Errorf("%d connections were taken", stats.Taken)
	}
}

func addMiddleware(app core.App) {
	app.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.Bind(apis.CORS(apis.DefaultCORSConfig))
		e.Router.BindFunc(func(e *core.RequestEvent) error {
			e.Response.Header().Add("X-Two", "one\r\nX-Forged: 1")
			e.Response.Header().Add("X-Two", "two")
			return e.Next()
		})
		return e.Next()
	})
}

// TestNotTaken is about requests whose connection must stay with net/http.
func TestNotTaken(t *testing.T) {
	w := newWorld(t)
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.BindFunc(func(e *core.RequestEvent) error {
			if e.Request.URL.Query().Has("wrap") {
				e.Response = shouting{e.Response}
			}
			return e.Next()
		})
		return e.Next()
	})
	server := pbtest.Serve(t, w)

	t.Run("a middleware sees what is written", func(t *testing.T) {
		response, err := server.Client().Get(server.URL + "/api/realtime?wrap")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		line, err := bufio.NewReader(response.Body).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "ID:") {
			t.Errorf("got %q, error %v", line, err)
		}
	})
	if stats := engine(w).Stats(); stats.Taken != 0 {
		t.Errorf("%d connections were taken", stats.Taken)
	}
}

// shouting is what a compressing middleware puts around the response.
type shouting struct{ http.ResponseWriter }

func (s shouting) Write(p []byte) (int, error) { return s.ResponseWriter.Write(bytes.ToUpper(p)) }
func (s shouting) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func TestGarbage(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	for name, pieces := range map[string][]string{
		"later":   {"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n", "\x00garbage"},
		"at once": {"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\nGET /api/health HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		buffer := make([]byte, 4<<10)
		for i, piece := range pieces {
			if i > 0 {
				if _, err := conn.Read(buffer); err != nil {
					t.Fatal(err)
				}
			}
			fmt.Fprint(conn, piece)
		}
		if err := conn.SetReadDeadline(time.Now().Add(pbtest.Timeout)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: the connection stays open", name)
		}
	}
	pbtest.WaitFor(t, "both are gone", func() bool { return engine(w).Stats().Disconnects[notify.ReasonUnexpected] == 2 })
	if count := w.SubscriptionsBroker().TotalClients(); count != 0 {
		t.Errorf("%d clients are left", count)
	}
}

func TestHeartbeat(t *testing.T) {
	t.Parallel() // it waits most of the time
	for name, serve := range map[string]func(testing.TB, core.App) *pbtest.Server{"taken": pbtest.Serve, "HTTP2": pbtest.ServeHTTP2} {
		t.Run(name, func(t *testing.T) {
			app := pbtest.NewApp(t, func(app core.App) {
				hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Heartbeat: time.Millisecond}})
			})
			_, lines := open(t, serve(t, app))
			for beats := 0; beats < 2 && lines.Scan(); {
				switch line := lines.Text(); {
				case line == ":":
					beats++
				case line == "" && beats > 0:
					t.Fatal("an empty line after a heartbeat, which some parsers take for an event")
				case line == "", line == `event:PB_CONNECT`:
				default:
					if !strings.HasPrefix(line, "data:{\"clientId\"") {
						t.Fatalf("got %q", line)
					}
				}
			}
			if lines.Err() != nil {
				t.Error(lines.Err())
			}
		})
	}
}

// TestBeat: who subscribes to it gets beats that EventSource shows, and nobody else does.
func TestBeat(t *testing.T) {
	t.Parallel() // it waits most of the time
	for every, want := range map[time.Duration][]string{
		time.Millisecond: {`{"every":0.001}`, `{"every":0.001}`, `{"every":0.001}`},
		-1:               {`{"every":0}`},
	} {
		for name, serve := range map[string]func(testing.TB, core.App) *pbtest.Server{"taken": pbtest.Serve, "HTTP2": pbtest.ServeHTTP2} {
			t.Run(fmt.Sprint(name, every), func(t *testing.T) {
				app := pbtest.NewApp(t, func(app core.App) {
					hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Heartbeat: every}})
				})
				server := serve(t, app)
				key := withQuery("@beat", "a", "b")
				stock, asks := server.Subscribe(t, nil, "example"), server.Subscribe(t, nil, "@beat", key, "example")
				for _, beat := range want {
					asks.Expect(t, "@beat", beat)
					asks.Expect(t, key, beat)
				}
				asks.Set(t, nil, "example") // enough
				mustSend(t, app, "example", 1)
				stock.Expect(t, "example", "1")
				for event := asks.Next(t); event.Type != "example"; event = asks.Next(t) {
					if !strings.HasPrefix(event.Type, "@beat") {
						t.Errorf("got %v", event)
					}
				}
			})
		}
	}
}

// TestHead: a request that wants no body is answered and done, whatever it sends besides.
func TestHead(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		response, err := server.Client().Head(server.URL + "/api/realtime")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if kind := response.Header.Get("Content-Type"); response.StatusCode != http.StatusOK || kind != "text/event-stream" {
			t.Errorf("%s %s", response.Status, kind)
		}
		if address, isPlain := strings.CutPrefix(server.URL, "http://"); isPlain {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprint(conn, "HEAD /api/realtime HTTP/1.1\r\nHost: x\r\n\r\nG") // the beginning of another
			if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 200") {
				t.Errorf("%q %v", line, err)
			}
		}
		if count := w.SubscriptionsBroker().TotalClients(); count != 0 {
			t.Errorf("%d clients are held", count)
		}
	})
}

// TestTimeouts checks that what a handler sets holds, and that what was sent
// before the end arrives.
func TestTimeouts(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		lifetime, idle := time.Hour, time.Hour
		w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
			if d := e.MaxTimeout; d < 27*time.Minute || d > 33*time.Minute {
				t.Errorf("the lifetime is %v, not about 30 minutes", d)
			}
			if e.IdleTimeout != e.MaxTimeout {
				t.Errorf("ends when idle for %v", e.IdleTimeout)
			}
			e.MaxTimeout, e.IdleTimeout = lifetime, idle
			return e.Next()
		})
		server := serve(t, w)

		lifetime = time.Millisecond
		subscriber := server.Subscribe(t, nil, "example")
		if report := send(t, w, notify.Message{Topic: "example", Data: 1}); report.Queued == 1 {
			subscriber.Expect(t, "example", "1")
		}
		subscriber.ExpectEnd(t)
		awaitReason(t, w, notify.ReasonLifetime)

		lifetime, idle = time.Hour, time.Millisecond
		server.Connect(t).ExpectEnd(t)
		awaitReason(t, w, notify.ReasonIdle)
	})
}

func TestTokenExpiry(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		subscriber := server.Connect(t)
		token, err := w.ann.NewStaticAuthToken(3 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		status, answer := server.Do(t, "POST", "/api/realtime", "Bearer "+token, map[string]any{"clientId": subscriber.ID, "subscriptions": []string{"example"}})
		if status != http.StatusNoContent {
			t.Fatalf("%d %v", status, answer)
		}
		message := notify.Message{Topic: "example", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}
		if report := send(t, w, message); report.Queued != 1 {
			t.Fatalf("report %+v", report)
		}
		subscriber.Expect(t, "example", "1")

		pbtest.WaitFor(t, "the token expires", func() bool { return send(t, w, message).Matched == 0 })
		for _, event := range subscriber.ExpectEnd(t) {
			if event.Data != "1" {
				t.Errorf("got %v", event)
			}
		}
		awaitReason(t, w, notify.ReasonTokenExpired)
	})
}

// fill sends msg to a client that does not read until some of it waits in the
// queue, for good.
func fill(t *testing.T, app core.App, client *notify.Client, msg notify.Message) {
	t.Helper()
	for range 1000 {
		if report := send(t, app, msg); report.Queued != 1 {
			t.Fatalf("report %+v", report)
		}
		patience := time.Now().Add(300 * time.Millisecond)
		for client.Queued() > 0 && time.Now().Before(patience) {
			time.Sleep(time.Millisecond)
		}
		if client.Queued() > 1 {
			return
		}
	}
	t.Fatal("the client takes everything")
}

// TestRevoked lets a user's messages wait for a connection that does not read
// when the user is signed out: these must not be written any more.
func TestRevoked(t *testing.T) {
	t.Parallel() // it waits most of the time
	for name, revoke := range map[string]func(w *world) error{
		"new password": func(w *world) error { w.ann.SetPassword("0987654321"); return w.Save(w.ann) },
		"deleted":      func(w *world) error { return w.Delete(w.ann) },
		"new secret": func(w *world) error {
			users, err := w.FindCollectionByNameOrId("users")
			if err != nil {
				return err
			}
			users.AuthToken.Secret = strings.Repeat("x", 50)
			return w.Save(users)
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
				server := serve(t, w)
				id := stall(t, server, w.ann, "private")
				client, err := w.SubscriptionsBroker().ClientById(id)
				if err != nil {
					t.Fatal(err)
				}
				message := notify.Message{Topic: "private", Data: strings.Repeat("x", 200<<10), To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}
				own, _ := engine(w).Own(client)
				fill(t, w, own, message)
				if err := revoke(w); err != nil {
					t.Fatal(err)
				}
				<-own.Done()
				awaitReason(t, w, notify.ReasonAuthEnded)
			})
		})
	}
}

// TestLateHandler binds a handler when connections have been taken already: it
// must not be passed by.
func TestLateHandler(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, nil, "example")
	send(t, w, notify.Message{Topic: "example", Data: 1})
	w.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error {
		if e.Message.Name == "example" {
			return nil // stops it
		}
		return e.Next()
	})
	if report := send(t, w, notify.Message{Topic: "example", Data: 2}); report.Matched != 0 {
		t.Errorf("report %+v", report)
	}
	subscriber.Expect(t, "example", "1")
	if rest := subscriber.ExpectEnd(t); len(rest) != 0 {
		t.Errorf("passed by the handler: %v", rest)
	}
	again := server.Subscribe(t, nil, "example", "fence")
	send(t, w, notify.Message{Topic: "example", Data: 3})
	send(t, w, notify.Message{Topic: "fence", Data: 4})
	again.Expect(t, "fence", "4")
}

// TestPanickingHandler lets a handler panic for one connection.
func TestPanickingHandler(t *testing.T) {
	w := newWorld(t)
	var unlucky string
	w.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error {
		if e.Client.Id() == unlucky {
			panic("test")
		}
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	victim, other := server.Subscribe(t, nil, "example"), server.Subscribe(t, nil, "example")
	unlucky = victim.ID
	for i := range 2 {
		send(t, w, notify.Message{Topic: "example", Data: i})
		other.Expect(t, "example", fmt.Sprint(i))
	}
	victim.ExpectEnd(t)
	awaitReason(t, w, notify.ReasonFailed)
	if count := w.SubscriptionsBroker().TotalClients(); count != 1 {
		t.Errorf("%d clients are registered", count)
	}
}

// TestPanicWhileConnecting: a handler's panic frees the place of the connection.
func TestPanicWhileConnecting(t *testing.T) {
	app := pbtest.NewApp(t, func(app core.App) {
		hooks.MustRegister(app, nil, hooks.Config{Limits: hooks.Limits{Connections: 1, ConnectionsPerIP: 1}})
	})
	panics := 0
	app.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
		if panics++; panics <= 3 {
			panic("test")
		}
		return e.Next()
	})
	server := pbtest.Serve(t, app)
	for range 3 {
		response, err := server.Client().Get(server.URL + "/api/realtime")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusInternalServerError {
			t.Error(response.Status)
		}
	}
	server.Subscribe(t, nil, "example")
}

// TestWrappedClient has a handler that puts a client of its own around ours.
func TestWrappedClient(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	seen := 0
	w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
		e.Client = &counting{Client: e.Client, count: func() { mu.Lock(); seen++; mu.Unlock() }}
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, nil, "example")
	for i := range 10 {
		if report := send(t, w, notify.Message{Topic: "example", Data: i}); report.Queued != 1 {
			t.Fatalf("report %+v", report)
		}
	}
	for i := range 10 {
		subscriber.Expect(t, "example", fmt.Sprint(i))
	}
	mu.Lock()
	defer mu.Unlock()
	if seen != 10 {
		t.Errorf("the wrapper saw %d messages", seen)
	}
}

type counting struct {
	subscriptions.Client
	count func()
}

func (c *counting) Send(m subscriptions.Message) { c.count(); c.Client.Send(m) }

// TestShutdown sends until the server stops: what it accepted has to arrive.
func TestShutdown(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		token := pbtest.Token(t, w.root)
		var subscribers []*pbtest.Subscriber
		for range 20 {
			subscribers = append(subscribers, server.Subscribe(t, nil, "example"))
		}
		started, accepted := make(chan struct{}), make(chan int)
		go func() {
			for i := 0; ; i++ {
				status, answer := server.Do(t, "POST", "/api/notify", token, fmt.Sprintf(`{"topic":"example","data":%d}`, i))
				if status == http.StatusServiceUnavailable {
					accepted <- i
					return
				}
				if status != http.StatusOK {
					t.Errorf("%d %v", status, answer)
				}
				if i == 50 {
					close(started)
				}
			}
		}()
		<-started
		engine(w).Shutdown(5 * time.Second)
		want := <-accepted
		for _, subscriber := range subscribers {
			if got := len(subscriber.ExpectEnd(t)); got != want {
				t.Errorf("%d of %d messages arrived", got, want)
			}
		}
		if _, err := engine(w).Send(t.Context(), notify.Message{Topic: "example"}); !errors.Is(err, notify.ErrShutdown) {
			t.Errorf("error %v", err)
		}
		status, answer := server.Do(t, "GET", "/api/realtime", "", nil)
		if status != http.StatusServiceUnavailable {
			t.Errorf("%d %v", status, answer)
		}
		if count := w.SubscriptionsBroker().TotalClients(); count != 0 {
			t.Errorf("%d clients are left", count)
		}
	})
}

// TestShutdownOfStalled is about clients that never take what is queued.
func TestShutdownOfStalled(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		id := stall(t, server, nil, "flood")
		client, err := w.SubscriptionsBroker().ClientById(id)
		if err != nil {
			t.Fatal(err)
		}
		own, _ := engine(w).Own(client)
		fill(t, w, own, notify.Message{Topic: "flood", Data: strings.Repeat("x", 200<<10)})
		engine(w).Shutdown(10 * time.Millisecond)
		if w.SubscriptionsBroker().TotalClients() != 0 {
			t.Error("the client is still there")
		}
	})
}

func TestListenersOwnConnection(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	var conns []*recordingConn
	server := pbtest.ServeConns(t, w, func(conn net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, &recordingConn{TCPConn: conn.(*net.TCPConn)})
		return conns[len(conns)-1]
	})
	subscriber := server.Subscribe(t, nil, "example")
	mustSend(t, w, "example", "seen by the listener")
	subscriber.Expect(t, "example", `"seen by the listener"`)
	pbtest.WaitFor(t, "the listener's connection sees the message", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return slices.ContainsFunc(conns, func(c *recordingConn) bool { return c.has("seen by the listener") })
	})
}

// panickingWrapper is a client of the application's own that fails.
type panickingWrapper struct{ subscriptions.Client }

func (w panickingWrapper) Send(m subscriptions.Message) {
	if string(m.Data) == "1" {
		panic("test")
	}
	w.Client.Send(m)
}

// A panic of other code costs the message that it is about, and nothing after it.
func TestPanicInAWrapper(t *testing.T) {
	w := newWorld(t)
	wrapClients(w, func(client subscriptions.Client) subscriptions.Client { return panickingWrapper{client} })
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, nil, "example")
	for i := range 3 {
		mustSend(t, w, "example", i)
	}
	subscriber.Expect(t, "example", "0")
	subscriber.Expect(t, "example", "2")
}
