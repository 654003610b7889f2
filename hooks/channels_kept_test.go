package hooks_test

import (
	"encoding/json/v2"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
	"herald/pb_migrations"
)

func TestStrict(t *testing.T) {
	app := pbtest.NewApp(t, func(app core.App) {
		hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Strict: true}})
	})
	root := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
	ann := pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
	addChannel(t, app, map[string]any{"pattern": "news", "subscribeRule": "*"})
	server := pbtest.Serve(t, app)

	client := server.Connect(t)
	for _, topic := range []string{"other", "news/2", "nope/*"} {
		if status, answer := client.Try(t, ann, topic); status != 403 {
			t.Errorf("%s: %d %v", topic, status, answer)
		}
		server.Connect(t).Set(t, root, topic)
	}
	// PocketBase's own topics and Herald's stay
	client.Set(t, ann, "news", "users/*", "users/"+ann.Id, "@inbox", "@denied", "@oauth2")
	mustSend(t, app, "news", 1)
	client.Expect(t, "news", "1")
	ann.Set("name", "Ann")
	save(t, app, ann)
	if event := client.Next(t); !strings.HasPrefix(event.Type, "users/") {
		t.Errorf("got %v", event)
	}
}

// TestOwnCollection: an application that has a collection notify_channels already
// keeps it as it is, and goes without channels.
func TestOwnCollection(t *testing.T) {
	app := pbtest.NewApp(t)
	if err := app.Delete(mustFind(t, app, "notify_channels")); err != nil {
		t.Fatal(err)
	}
	addCollection(t, app, "notify_channels", &core.TextField{Name: "pattern"})
	own := addRecord(t, app, "notify_channels", map[string]any{"pattern": "{"})
	// as if Herald were new here
	if _, err := app.DB().NewQuery("DELETE FROM _migrations WHERE file LIKE '%notify_channels%'").Execute(); err != nil {
		t.Fatal(err)
	}
	if err := app.RunAllMigrations(); err != nil {
		t.Fatal(err)
	}
	app.Settings().Logs.MaxDays = 1
	register(app)
	server := pbtest.Serve(t, app)
	waitForLog(t, app, `channels are off: the application has a collection "notify_channels" of its own`)
	if collection := mustFind(t, app, "notify_channels"); collection.Id == pb_migrations.ChannelsCollectionID || len(collection.Fields) != 2 {
		t.Errorf("the application's collection was changed: %v", collection)
	}
	own.Set("pattern", "news")
	save(t, app, own)
	client := server.Subscribe(t, nil, "news")
	mustSend(t, app, "news", 1)
	client.Expect(t, "news", "1")
	if status, _ := server.Do(t, "POST", "/api/notify/publish", "", `{"topic":"news","data":1}`); status != 403 {
		t.Errorf("publish: %d", status)
	}
	if err := app.Delete(own); err != nil {
		t.Fatal(err)
	}
}

// TestChannelsMigration: down and up again, with those that are later.
func TestChannelsMigration(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	addChannel(t, w, map[string]any{"pattern": "news"})
	runner := core.NewMigrationsRunner(w, core.AppMigrations)
	if _, err := runner.Down(3); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"notify_channels", "notify_triggers", "notify_last_seen"} {
		if _, err := w.FindCollectionByNameOrId(name); err == nil {
			t.Errorf("the collection %q is still there", name)
		}
	}
	server.Subscribe(t, nil, "news") // without the collection there are no rules
	if _, err := runner.Up(); err != nil {
		t.Fatal(err)
	}
	addChannel(t, w, map[string]any{"pattern": "news"})
	mustFind(t, w, "notify_triggers")
	if status, _ := server.Connect(t).Try(t, nil, "news"); status != 403 {
		t.Errorf("subscribe: %d", status)
	}
}

// TestChannelsDisappear: what a channel closed stays closed when the collection is gone, on
// the running server and after a restart, until a superuser says otherwise.
func TestChannelsDisappear(t *testing.T) {
	for name, strict := range map[string]bool{"": false, "strict": true} {
		t.Run(name, func(t *testing.T) {
			register := func(app core.App) { hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Strict: strict}}) }
			app := pbtest.NewApp(t, register)
			app.Settings().Logs.MaxDays = 1
			root := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
			ann := pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
			addChannel(t, app, map[string]any{"pattern": "news", "subscribeRule": "*", "publishRule": "*", "history": 10})
			own := `@request.auth.id = @request.query.id`
			private := addChannel(t, app, map[string]any{
				"pattern": "private/{id}", "subscribeRule": own, "publishRule": own, "history": 10, "presence": true, "presenceRule": own,
			})
			server := pbtest.Serve(t, app)
			topic := "private/" + ann.Id
			listener, reader := server.Subscribe(t, ann, topic, "@denied"), server.Subscribe(t, nil, "news")
			mustSend(t, app, topic, "before")
			listener.Expect(t, topic, `"before"`)
			status := func(server *pbtest.Server, who *core.Record, topic string) int {
				t.Helper()
				status, _ := server.Connect(t).Try(t, who, topic)
				return status
			}
			closed := func() {
				t.Helper()
				for who, want := range map[*core.Record]int{nil: 403, ann: 403, root: 204} {
					if got := status(server, who, topic); got != want {
						t.Errorf("%v: %d, want %d", who, got, want)
					}
				}
				if got := status(server, nil, "news"); got != 204 {
					t.Errorf("news: %d", got)
				}
				if got, _ := server.Do(t, "GET", historyPath(topic, "", 10), "", nil); got != 403 {
					t.Errorf("its history: %d", got)
				}
				for _, who := range []*core.Record{nil, ann} {
					if got, _ := server.Do(t, "POST", publishPath, pbtest.Token(t, who), map[string]any{"topic": topic, "data": 1}); got != 403 {
						t.Errorf("publishing to it: %d", got)
					}
					if got, _ := server.Do(t, "GET", "/api/notify/presence?topic="+topic, pbtest.Token(t, who), nil); got != 403 {
						t.Errorf("who is there: %d", got)
					}
				}
			}

			// an import of other collections
			kept := []map[string]any{}
			for _, name := range []string{"users"} {
				encoded, err := json.Marshal(mustFind(t, app, name))
				if err != nil {
					t.Fatal(err)
				}
				kept = append(kept, decoded(t, string(encoded)).(map[string]any))
			}
			encoded, err := json.Marshal(mustFind(t, app, "notify_channels"))
			if err != nil {
				t.Fatal(err)
			}
			if err := app.ImportCollections(kept, true); err != nil {
				t.Fatal(err)
			}
			if _, err := app.FindCollectionByNameOrId("notify_channels"); err == nil {
				t.Fatal("it is there still")
			}
			listener.Expect(t, "@denied", denied(topic))
			closed()
			mustSend(t, app, "news", 1)
			reader.Expect(t, "news", "1")
			waitForLog(t, app, "channels are off: their collection%stay closed")

			// the server is started again
			restarted := pbtest.Serve(t, pbtest.NewAppFrom(t, pbtest.Folder(app.DataDir()), register))
			for who, want := range map[*core.Record]int{nil: 403, ann: 204} {
				if got := status(restarted, who, topic); got != want {
					t.Errorf("after a restart %v: %d, want %d", who, got, want)
				}
			}
			if page := historyOf(t, restarted, ann, topic, "", 10); len(page.Items) != 1 {
				t.Errorf("after a restart there is %v", page.Items)
			}

			// the collection is imported again
			if err := app.ImportCollections(append(kept, decoded(t, string(encoded)).(map[string]any)), false); err != nil {
				t.Fatal(err)
			}
			listener = server.Subscribe(t, ann, topic)
			mustSend(t, app, topic, "after")
			listener.Expect(t, topic, `"after"`)
			if got := status(server, nil, topic); got != 403 {
				t.Errorf("a guest: %d", got)
			}

			// with a rule that does not compile any more, and a new channel of a superuser
			addMembers(t, app)
			addChannel(t, app, map[string]any{"pattern": "room/{room}", "subscribeRule": memberRule})
			if err := app.ImportCollections(kept, true); err != nil {
				t.Fatal(err)
			}
			if err := app.ImportCollections([]map[string]any{decoded(t, string(encoded)).(map[string]any)}, false); err != nil {
				t.Fatal(err)
			}
			addChannel(t, app, map[string]any{"pattern": "other", "subscribeRule": "*"})
			for _, topic := range []string{"room/x", topic} {
				if got := status(server, nil, topic); got != 403 {
					t.Errorf("%s: %d", topic, got)
				}
			}

			// a superuser says otherwise
			private, err = app.FindRecordById("notify_channels", private.Id)
			if err != nil {
				t.Fatal(err)
			}
			if err := app.Delete(private); err != nil {
				t.Fatal(err)
			}
			if err := app.Delete(mustFind(t, app, "notify_channels")); err != nil {
				t.Fatal(err)
			}
			want := 204
			if strict {
				want = 403
			}
			if got := status(server, nil, topic); got != want {
				t.Errorf("without a channel: %d", got)
			}
		})
	}
}

// TestChannelsDisappearMeanwhile: nor does it open if the collection goes while another program has the data.
func TestChannelsDisappearMeanwhile(t *testing.T) {
	register := func(app core.App) { hooks.MustRegister(app, nil, hooks.Config{}) }
	app := pbtest.NewApp(t, register)
	pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
	addChannel(t, app, map[string]any{"pattern": "private", "subscribeRule": `@request.auth.id != ""`})
	pbtest.Serve(t, app)
	engine(app).Shutdown(time.Second)

	stock := pbtest.NewAppFrom(t, pbtest.Folder(app.DataDir()))
	if err := stock.ImportCollections([]map[string]any{{"name": "other", "type": "base"}}, true); err != nil {
		t.Fatal(err)
	}
	if _, err := stock.FindCollectionByNameOrId("notify_channels"); err == nil {
		t.Fatal("it is there still")
	}
	server := pbtest.Serve(t, pbtest.NewAppFrom(t, pbtest.Folder(stock.DataDir()), register))
	if status, answer := server.Connect(t).Try(t, nil, "private"); status != 403 {
		t.Errorf("a guest: %d %v", status, answer)
	}
}

func mustFind(t testing.TB, app core.App, collectionName string) *core.Collection {
	t.Helper()
	collection, err := app.FindCollectionByNameOrId(collectionName)
	if err != nil {
		t.Fatal(err)
	}
	return collection
}

// TestChannelThatBreaks: a rule that no longer compiles lets nobody pass.
func TestChannelThatBreaks(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "42", w.ann)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "chat/42", "@denied")
	members := mustFind(t, w, "room_members")
	members.Name = "room_people"
	if err := w.Save(members); err != nil {
		t.Fatal(err)
	}
	client.Expect(t, "@denied", denied("chat/42"))
	if status, _ := server.Connect(t).Try(t, w.ann, "chat/42"); status != 403 {
		t.Errorf("subscribe: %d", status)
	}
	server.Subscribe(t, w.root, "chat/42")

	// back again
	members.Name = "room_members"
	if err := w.Save(members); err != nil {
		t.Fatal(err)
	}
	client.Set(t, w.ann, "chat/42", "@denied")
}

func TestChannelBesideRecordEventsIsTold(t *testing.T) {
	t.Parallel()
	w := newRooms(t)
	w.Settings().Logs.MaxDays = 1
	addChannel(t, w, map[string]any{"pattern": "teams/{id}"})
	waitForLog(t, w, `A channel's pattern matches topics to which it does not apply%collection "teams"`)
}

// TestChannelHelp: each field explains itself in the dashboard.
func TestChannelHelp(t *testing.T) {
	w := newWorld(t)
	collection, err := w.FindCollectionByNameOrId("notify_channels")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pattern", "subscribeRule", "publishRule", "presenceRule", "history", "historyTTL", "presence", "presenceFields", "presenceLimit", "presenceTTL", "rateLimit", "maxSize"} {
		encoded, err := json.Marshal(collection.Fields.GetByName(name))
		if err != nil {
			t.Fatal(err)
		}
		if help, _ := at(decoded(t, string(encoded)), "help"); help == nil || help == "" {
			t.Errorf("%s has no help: %s", name, encoded)
		}
	}
}
