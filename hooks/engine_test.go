package hooks_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
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
	"github.com/pocketbase/pocketbase/tools/hook"

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
func awaitReason(t *testing.T, app core.App, why notify.Disconnect) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(engine(app).Stats().Disconnects)
		}
	})
	pbtest.WaitFor(t, "a connection ends: "+why.Reason, func() bool { return engine(app).Stats().Disconnects[why.Reason] > 0 })
}

// TestConnContext: an application's own ConnContext stays.
func TestConnContext(t *testing.T) {
	type key struct{}
	w := newWorld(t)
	w.OnServe().Bind(&hook.Handler[*core.ServeEvent]{Priority: -1, Func: func(e *core.ServeEvent) error {
		e.Server.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return context.WithValue(ctx, key{}, "kept") }
		e.Router.GET("/kept", func(e *core.RequestEvent) error { return e.String(200, fmt.Sprint(e.Request.Context().Value(key{}))) })
		return e.Next()
	}})
	if _, answer := pbtest.Serve(t, w).DoText(t, "GET", "/kept", "", nil); answer != "kept" {
		t.Errorf("got %s", answer)
	}
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
	pbtest.WaitFor(t, "both are gone", func() bool { return engine(w).Stats().Disconnects[notify.DisconnectUnexpected.Reason] == 2 })
	if count := w.SubscriptionsBroker().TotalClients(); count != 0 {
		t.Errorf("%d clients are left", count)
	}
}

// TestGhosts: a client that has sent more than it should is missed when it is gone. Go's server reads on to notice
// that, but only one byte.
func TestGhosts(t *testing.T) {
	t.Parallel() // it waits most of the time
	for _, way := range ways {
		if strings.Contains(way.name, "HTTP2") || strings.Contains(way.name, "own channel") {
			continue // HTTP/2 has frames for what is sent; PocketBase's loop writes no heartbeats, but has a time limit
		}
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			app, server := way.serveBeating(t, 20*time.Millisecond)
			for _, pieces := range [][]string{
				{"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n", "\x00garbage"},
				{"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\nGET /api/health HTTP/1.1\r\nHost: x\r\n\r\n"},
				{"GET /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nand more"},
			} {
				conn, err := net.Dial("tcp", server.Listener.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if server.TLS != nil {
					conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
				}
				if err := conn.SetReadDeadline(time.Now().Add(pbtest.Timeout)); err != nil {
					t.Fatal(err)
				}
				answer := bufio.NewReader(conn)
				for i, piece := range pieces {
					fmt.Fprint(conn, piece)
					if i == 0 {
						_, _ = answer.ReadString('{') // it is connected, or refused
					}
				}
				conn.Close()
			}
			pbtest.WaitFor(t, "nobody is held", func() bool { return app.SubscriptionsBroker().TotalClients() == 0 })
		})
	}
}

func TestHeartbeat(t *testing.T) {
	t.Parallel() // it waits most of the time
	for _, way := range ways {
		if strings.Contains(way.name, "own channel") {
			continue // PocketBase's loop writes none
		}
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			_, server := way.serveBeating(t, time.Millisecond)
			_, lines := open(t, server)
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
	awaitReason(t, w, notify.DisconnectFailed)
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
