package hooks_test

import (
	"encoding/json/v2"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"
	"github.com/pocketbase/pocketbase/tools/logger"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
	"herald/pb_migrations"
)

func newNotification(t testing.TB, app core.App, user *core.Record, title string) *core.Record {
	t.Helper()
	collection, err := app.FindCollectionByNameOrId("notifications")
	if err != nil {
		t.Fatal(err)
	}
	record := core.NewRecord(collection)
	record.Set("user", user.Id)
	record.Set("title", title)
	return record
}

func save(t testing.TB, app core.App, record *core.Record) {
	t.Helper()
	if err := app.Save(record); err != nil {
		t.Fatal(err)
	}
}

// expectInbox waits for the next event and compares it with the fields in want.
func expectInbox(t testing.TB, subscriber *pbtest.Subscriber, want map[string]any) {
	t.Helper()
	event := subscriber.Next(t)
	if topic, _, _ := strings.Cut(event.Type, "?"); topic != "@inbox" {
		t.Fatalf("got event %q with %s", event.Type, event.Data)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(event.Data), &got); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"action", "id", "title", "body", "data", "read", "unread"} {
		if _, ok := got[name]; !ok {
			t.Errorf("%q is missing in %s", name, event.Data)
		}
	}
	for name, value := range want {
		if fmt.Sprint(got[name]) != fmt.Sprint(value) {
			t.Errorf("%s is %v, want %v", name, got[name], value)
		}
	}
}

func TestInbox(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	tab := server.Subscribe(t, w.ann, "@inbox")
	phone := server.Subscribe(t, w.ann, "@inbox?options=%7B%7D")
	others := []*pbtest.Subscriber{
		server.Subscribe(t, w.bob, "@inbox", "fence"),
		server.Subscribe(t, w.root, "@inbox", "fence"),
		server.Subscribe(t, nil, "@inbox", "fence"),
	}
	both := func(want map[string]any) {
		t.Helper()
		expectInbox(t, tab, want)
		expectInbox(t, phone, want)
	}

	// as the dashboard does it
	status, answer := server.Do(t, "POST", "/api/collections/notifications/records", pbtest.Token(t, w.root),
		map[string]any{"user": w.ann.Id, "title": "Hello", "body": "World", "data": map[string]any{"n": 1}})
	if status != http.StatusOK {
		t.Fatalf("%d %v", status, answer)
	}
	first := answer.(map[string]any)["id"].(string)
	both(map[string]any{"action": "create", "id": first, "title": "Hello", "body": "World", "data": map[string]any{"n": 1}, "read": "", "unread": 1})

	second := newNotification(t, w, w.ann, "Again")
	save(t, w, second)
	both(map[string]any{"action": "create", "title": "Again", "data": nil, "unread": 2})

	save(t, w, newNotification(t, w, w.bob, "not Ann's"))
	expectInbox(t, others[0], map[string]any{"title": "not Ann's", "unread": 1})

	path := "/api/collections/notifications/records/" + first
	if status, answer := server.Do(t, "PATCH", path, pbtest.Token(t, w.ann), map[string]any{"read": "2026-01-02 03:04:05.000Z"}); status != http.StatusOK {
		t.Fatalf("%d %v", status, answer)
	}
	both(map[string]any{"action": "update", "id": first, "read": "2026-01-02 03:04:05.000Z", "unread": 1})

	if status, _ := server.Do(t, "DELETE", path, pbtest.Token(t, w.ann), nil); status != http.StatusNoContent {
		t.Fatalf("status %d", status)
	}
	both(map[string]any{"action": "delete", "id": first, "title": "Hello", "unread": 1})

	t.Run("after the commit only", func(t *testing.T) {
		rollback := errors.New("rollback")
		err := w.RunInTransaction(func(txApp core.App) error {
			save(t, txApp, newNotification(t, txApp, w.ann, "never"))
			return rollback
		})
		if !errors.Is(err, rollback) {
			t.Fatal(err)
		}
		err = w.RunInTransaction(func(txApp core.App) error {
			save(t, txApp, newNotification(t, txApp, w.ann, "one"))
			save(t, txApp, newNotification(t, txApp, w.ann, "two"))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		both(map[string]any{"title": "one", "unread": 3})
		both(map[string]any{"title": "two", "unread": 3})
	})

	t.Run("it is given to another user", func(t *testing.T) {
		moved := newNotification(t, w, w.ann, "for Ann")
		save(t, w, moved)
		both(map[string]any{"action": "create", "unread": 4})
		moved, err := w.FindRecordById("notifications", moved.Id)
		if err != nil {
			t.Fatal(err)
		}
		moved.Set("user", w.bob.Id)
		moved.Set("title", "for Bob")
		save(t, w, moved)
		both(map[string]any{"action": "delete", "id": moved.Id, "title": "for Ann", "unread": 3})
		expectInbox(t, others[0], map[string]any{"action": "update", "id": moved.Id, "title": "for Bob", "unread": 2})
	})

	t.Run("the owner's record goes", func(t *testing.T) {
		if err := w.Delete(w.ann); err != nil {
			t.Fatal(err)
		}
		count, err := w.CountRecords("notifications")
		if err != nil || count != 2 {
			t.Errorf("%d notifications left, want Bob's two (error %v)", count, err)
		}
	})

	if err := notify.Notify(w, "fence", 1); err != nil {
		t.Fatal(err)
	}
	for _, other := range others {
		other.Expect(t, "fence", "1")
	}
}

// TestInboxCounts creates notifications concurrently: whatever the order of the
// messages, the last has to hold the count that is true in the end.
func TestInboxCounts(t *testing.T) {
	const count = 40
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, w.ann, "@inbox")

	var group sync.WaitGroup
	for i := range count {
		group.Go(func() {
			if err := w.Save(newNotification(t, w, w.ann, fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	last := 0
	for range count {
		var event struct {
			Unread int `json:"unread"`
		}
		if err := json.Unmarshal([]byte(subscriber.Next(t).Data), &event); err != nil {
			t.Fatal(err)
		}
		if event.Unread < last {
			t.Errorf("the count fell from %d to %d", last, event.Unread)
		}
		last = event.Unread
	}
	if last != count {
		t.Errorf("the last count is %d, want %d", last, count)
	}
}

func TestInboxRules(t *testing.T) {
	w := newWorld(t)
	record := newNotification(t, w, w.ann, "Hello")
	record.Set("data", map[string]any{"n": 1})
	save(t, w, record)
	staff := core.NewAuthCollection("staff")
	if err := w.Save(staff); err != nil {
		t.Fatal(err)
	}
	pbtest.AddAuth(t, w, "staff", "twin@x.com", nil)
	if _, err := w.DB().NewQuery("UPDATE staff SET id = '" + w.ann.Id + "'").Execute(); err != nil {
		t.Fatal(err)
	}
	twin, err := w.FindRecordById("staff", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	server := pbtest.Serve(t, w)
	one, all := "/api/collections/notifications/records/"+record.Id, "/api/collections/notifications/records"

	for _, test := range []struct {
		who          *core.Record
		method, path string
		body         any
		want         int
	}{
		{w.ann, "GET", one, nil, 200},
		{w.bob, "GET", one, nil, 404},
		{nil, "GET", one, nil, 404},
		{twin, "GET", one, nil, 404},
		{w.root, "GET", one, nil, 200},
		{w.ann, "POST", all, map[string]any{"user": w.ann.Id, "title": "x"}, 403},
		{nil, "POST", all, map[string]any{"user": w.ann.Id, "title": "x"}, 403},
		{w.ann, "PATCH", one, map[string]any{"title": "x"}, 404},
		{w.ann, "PATCH", one, map[string]any{"body": "x", "read": "2026-01-01"}, 404},
		{w.ann, "PATCH", one, map[string]any{"data": 2}, 404},
		{w.ann, "PATCH", one, map[string]any{"user": w.bob.Id}, 404},
		{w.bob, "PATCH", one, map[string]any{"read": "2026-01-01"}, 404},
		{w.ann, "PATCH", one, map[string]any{"read": "2026-01-01 00:00:00.000Z"}, 200},
		{w.ann, "PATCH", one, map[string]any{"read": ""}, 200},
		{w.bob, "DELETE", one, nil, 404},
		{twin, "DELETE", one, nil, 404},
		{w.ann, "DELETE", one, nil, 204},
	} {
		who := "guest"
		if test.who != nil {
			who = test.who.Email()
		}
		if status, answer := server.Do(t, test.method, test.path, pbtest.Token(t, test.who), test.body); status != test.want {
			t.Errorf("%s %s %s %v: %d %v, want %d", who, test.method, test.path, test.body, status, answer, test.want)
		}
	}
}

func TestInboxMigration(t *testing.T) {
	runner := func(app core.App) *core.MigrationsRunner {
		return core.NewMigrationsRunner(app, core.AppMigrations)
	}
	has := func(app core.App, nameOrID string) bool {
		_, err := app.FindCollectionByNameOrId(nameOrID)
		return err == nil
	}
	down := func(t *testing.T, app core.App) {
		t.Helper()
		if _, err := runner(app).Down(len(core.AppMigrations.Items())); err != nil {
			t.Fatal(err)
		}
	}
	up := func(t *testing.T, app core.App) {
		t.Helper()
		if _, err := runner(app).Up(); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("down and up", func(t *testing.T) {
		app := pbtest.NewApp(t)
		if !has(app, pb_migrations.InboxCollectionID) {
			t.Fatal("the collection was not made")
		}
		down(t, app)
		if has(app, "notifications") {
			t.Error("the collection is still there")
		}
		up(t, app)
		if !has(app, pb_migrations.InboxCollectionID) {
			t.Error("the collection was not made again")
		}
	})

	// starts serving, with the inbox off, and says why
	startsWithout := func(t *testing.T, app *tests.TestApp, reason string) {
		t.Helper()
		hooks.MustRegister(app, nil, hooks.Config{})
		app.Settings().Logs.MaxDays = 1
		server := pbtest.Serve(t, app)
		if status, _ := server.Do(t, "GET", "/api/health", "", nil); status != http.StatusOK {
			t.Errorf("status %d", status)
		}
		waitForLog(t, app, "inbox is off%"+reason)
	}

	t.Run("an application's own collection", func(t *testing.T) {
		app := pbtest.NewApp(t)
		down(t, app)
		own := core.NewBaseCollection("notifications")
		own.Fields.Add(&core.TextField{Name: "mine"})
		if err := app.Save(own); err != nil {
			t.Fatal(err)
		}
		up(t, app)
		startsWithout(t, app, "collection \"notifications\" of its own")

		record := core.NewRecord(own)
		record.Set("mine", "x")
		save(t, app, record)

		down(t, app)
		if !has(app, own.Id) {
			t.Error("the application's collection was deleted")
		}
	})

	t.Run("no users", func(t *testing.T) {
		app := pbtest.NewApp(t)
		down(t, app)
		users, err := app.FindCollectionByNameOrId("users")
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Delete(users); err != nil {
			t.Fatal(err)
		}
		up(t, app)
		startsWithout(t, app, "no auth collection")
	})

	t.Run("removed in the dashboard", func(t *testing.T) {
		app := pbtest.NewApp(t)
		inbox, err := app.FindCollectionByNameOrId("notifications")
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Delete(inbox); err != nil {
			t.Fatal(err)
		}
		startsWithout(t, app, "was removed")
	})
}

// waitForLog waits for a log line that contains the pattern of SQL's LIKE. The
// application has to keep its logs for a day at least.
func waitForLog(t testing.TB, app core.App, pattern string) {
	t.Helper()
	pbtest.WaitFor(t, "the log tells "+pattern, func() bool {
		if batch, ok := app.Logger().Handler().(*logger.BatchHandler); ok {
			_ = batch.WriteAll(t.Context()) // else every 3 seconds
		}
		var count int
		err := app.AuxDB().NewQuery("SELECT COUNT(*) FROM _logs WHERE message LIKE {:pattern}").
			Bind(dbx.Params{"pattern": "%" + pattern + "%"}).Row(&count)
		if err != nil {
			t.Fatal(err)
		}
		return count == 1
	})
}
