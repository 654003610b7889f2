// Package pbtest is the test kit: a PocketBase application with Herald in a
// temporary folder, behind a real HTTP server, and real SSE connections to it.
package pbtest

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json/v2"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"
	"go.uber.org/goleak"

	"herald/notify"
	"herald/notify/edge"
)

// Timeout is how long the kit waits for what has to come. It is long because it
// only matters where a test fails.
const Timeout = 30 * time.Second

// NewApp returns an application with an empty database, in which all migrations
// that the test binary imports have run. register binds to it what is tested.
func NewApp(t testing.TB, register ...func(core.App)) *tests.TestApp {
	t.Helper()
	return NewAppFrom(t, migrated, register...)
}

// NewAppFrom is NewApp with a copy of the data that a [Template] or a [Folder] has.
func NewAppFrom(t testing.TB, template func() (folder string, err error), register ...func(core.App)) *tests.TestApp {
	t.Helper()
	folder, err := template()
	if err != nil {
		t.Fatal(err)
	}
	app, err := tests.NewTestApp(folder) // a copy of it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(app.Cleanup)
	// the counters that PocketBase's test app binds would count as handlers
	// that want to see each message and the end of each connection
	app.OnRealtimeConnectRequest().UnbindAll()
	app.OnRealtimeMessageSend().UnbindAll()
	countQueries(t, app)
	for _, f := range register {
		f(app)
	}
	return app
}

// Folder is a template that is there already, such as the data directory of another application.
func Folder(folder string) func() (string, error) {
	return func() (string, error) { return folder, nil }
}

// migrated has a data directory in which all migrations have run: with the race detector
// they take a second for each app.
var migrated = Template(nil)

var templates sync.Map // their folders

// Template has a data directory in which all migrations have run and fill, unless it is nil, has added something. It is
// made when it is used first.
func Template(fill func(core.App) error) func() (folder string, err error) {
	return sync.OnceValues(func() (string, error) {
		from, err := os.MkdirTemp("", "")
		if err != nil {
			return "", err
		}
		defer os.RemoveAll(from)
		app, err := tests.NewTestApp(from)
		if err != nil {
			return "", err
		}
		templates.Store(app.DataDir(), nil)
		if fill != nil {
			if err := fill(app); err != nil {
				return "", err
			}
		}
		event := &core.TerminateEvent{}
		event.App = app
		return app.DataDir(), app.OnTerminate().Trigger(event, func(*core.TerminateEvent) error { return app.ClearBootstrap() })
	})
}

// Main runs the tests of a package, and fails where they leave goroutines behind.
func Main(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for folder := range templates.Range {
			_ = os.RemoveAll(folder.(string))
		}
		os.Exit(code)
	}))
}

// AddField adds a field to the collection with the name.
func AddField(t testing.TB, app core.App, collectionName string, field core.Field) {
	t.Helper()
	collection, err := app.FindCollectionByNameOrId(collectionName)
	if err != nil {
		t.Fatal(err)
	}
	collection.Fields.Add(field)
	if err := app.Save(collection); err != nil {
		t.Fatal(err)
	}
}

// AddAuth adds an auth record with values to the collection with the name.
func AddAuth(t testing.TB, app core.App, collectionName, email string, values map[string]any) *core.Record {
	t.Helper()
	record, err := TryAddAuth(app, collectionName, email, values)
	if err != nil {
		t.Fatal(err)
	}
	return record
}

// TryAddAuth is AddAuth without a test.
func TryAddAuth(app core.App, collectionName, email string, values map[string]any) (*core.Record, error) {
	collection, err := app.FindCollectionByNameOrId(collectionName)
	if err != nil {
		return nil, err
	}
	// a hash that is quickly made: with the race detector a usual one takes most
	// of a test's time
	if password, ok := collection.Fields.GetByName(core.FieldNamePassword).(*core.PasswordField); ok {
		password.Cost = 4
	}
	record := core.NewRecord(collection)
	record.SetEmail(email)
	record.SetPassword("1234567890")
	record.Load(values)
	return record, app.Save(record)
}

// Token returns an auth token of record; "" for nil, a guest.
func Token(t testing.TB, record *core.Record) string {
	t.Helper()
	if record == nil {
		return ""
	}
	token, err := record.NewAuthToken()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// Ref returns record as an audience names it: "users:ID".
func Ref(record *core.Record) string { return record.Collection().Name + ":" + record.Id }

// Server is a listening HTTP server of an application.
type Server struct {
	*httptest.Server
	App core.App

	edge   *edge.Edge // that the clients connect to; nil: to the application
	origin *Origin
}

// IsEdge reports whether the clients connect to an edge, which keeps them when the application stops.
func (s *Server) IsEdge() bool { return s.edge != nil }

// AwaitLink waits until all that the origin has sent has arrived at its edges, if the server is one of them.
func (s *Server) AwaitLink(t testing.TB) {
	t.Helper()
	WaitFor(t, "nothing is on the way to an edge", func() bool { return s.origin == nil || !s.isOnTheWay() })
}

func (s *Server) isOnTheWay() bool {
	for _, edge := range s.origin.Edges() {
		if edge.OnTheWay > 0 {
			return true
		}
	}
	return false
}

// Queued returns how many messages wait to be written to the only client.
func (s *Server) Queued(client *notify.Client) int {
	queued := client.Queued()
	if s.edge != nil {
		queued += s.edge.Stats().QueuedMessages
	}
	return queued
}

// Serve starts app's router, with what is bound to OnServe, on a real listener.
func Serve(t testing.TB, app core.App) *Server {
	t.Helper()
	return serve(t, app, (*httptest.Server).Start)
}

// ServeHTTP2 is [Serve] over TLS with HTTP/2.
func ServeHTTP2(t testing.TB, app core.App) *Server {
	t.Helper()
	return serveTLS(t, app, true)
}

// ServeTLS is [Serve] over TLS, with HTTP/1.1.
func ServeTLS(t testing.TB, app core.App) *Server {
	t.Helper()
	return serveTLS(t, app, false)
}

func serveTLS(t testing.TB, app core.App, http2 bool) *Server {
	t.Helper()
	return serve(t, app, func(server *httptest.Server) {
		server.EnableHTTP2 = http2
		server.StartTLS()
	})
}

func serve(t testing.TB, app core.App, start func(*httptest.Server)) *Server {
	t.Helper()
	config := httpServer(t, app)
	server := httptest.NewUnstartedServer(config.Handler)
	server.Config.ConnContext = config.ConnContext
	start(server)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return &Server{Server: server, App: app}
}

// Handler returns app's router, with what is bound to OnServe.
func Handler(t testing.TB, app core.App) http.Handler {
	t.Helper()
	return httpServer(t, app).Handler
}

func httpServer(t testing.TB, app core.App) *http.Server {
	t.Helper()
	router, err := apis.NewRouter(app)
	if err != nil {
		t.Fatal(err)
	}
	event := &core.ServeEvent{App: app, Router: router, Server: &http.Server{}}
	err = app.OnServe().Trigger(event, func(e *core.ServeEvent) error {
		handler, err := e.Router.BuildMux()
		e.Server.Handler = handler
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// what runs at a certain time of day does not belong to a test
	app.Cron().Stop()
	return event.Server
}

// Do sends a request with a JSON body, unless body is nil, and returns the
// status and the decoded answer.
func (s *Server) Do(t testing.TB, method, path, token string, body any) (int, any) {
	t.Helper()
	status, content := s.DoText(t, method, path, token, body)
	if content == "" {
		return status, nil
	}
	var answer any
	if err := json.Unmarshal([]byte(content), &answer); err != nil {
		t.Fatalf("%s %s: %v in %s", method, path, err, content)
	}
	return status, answer
}

// DoText is Do without decoding the answer.
func (s *Server) DoText(t testing.TB, method, path, token string, body any) (int, string) {
	t.Helper()
	var reader io.Reader
	switch body := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(body)
	default:
		encoded, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		reader = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, reader)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	if token != "" {
		request.Header.Set("Authorization", token)
	}
	response, err := s.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(content)
}

// WaitFor waits until condition holds.
func WaitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Timeout); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// CountQueries counts the reads of app's database from now on; the function it
// returns tells how many there were.
func CountQueries(t testing.TB, app core.App) func() int64 {
	t.Helper()
	count, ok := app.Store().Get(queriesKey).(*atomic.Int64)
	if !ok {
		t.Fatal("the application is not of NewApp")
	}
	before := count.Load()
	return func() int64 { return count.Load() - before }
}

// queriesKey is the key of the number of queries in an application's store.
const queriesKey = "pbtestQueries"

// countQueries counts from the beginning: later the database is in use.
func countQueries(t testing.TB, app core.App) {
	t.Helper()
	db, ok := app.ConcurrentDB().(*dbx.DB)
	if !ok {
		t.Fatalf("unexpected database type %T", app.ConcurrentDB())
	}
	count := new(atomic.Int64)
	app.Store().Set(queriesKey, count)
	db.QueryLogFunc = func(context.Context, time.Duration, string, *sql.Rows, error) { count.Add(1) }
}
