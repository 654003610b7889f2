package hooks_test

import (
	"slices"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
)

// awaitFields reads until the fields of a user are those.
func (w *watcher) awaitFields(t testing.TB, user *core.Record, want string) {
	t.Helper()
	for string(w.members[pbtest.Ref(user)].Fields) != want {
		w.next(t)
	}
}

func saveCollection(t testing.TB, app core.App, collection *core.Collection) {
	t.Helper()
	if err := app.Save(collection); err != nil {
		t.Fatal(err)
	}
}

// TestFieldsChange: a field that is not to be shown any more is shown to nobody, whatever takes it
// away.
func TestFieldsChange(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(t *testing.T, w *world, channel *core.Record)
		want   string
	}{
		"presenceFields": {func(t *testing.T, w *world, channel *core.Record) {
			channel.Set("presenceFields", "id")
			save(t, w, channel)
		}, ""},
		"a more specific channel": {func(t *testing.T, w *world, _ *core.Record) {
			addChannel(t, w, presenceChannel(map[string]any{"pattern": "room/1"}))
		}, "{}"},
		"hidden": {func(t *testing.T, w *world, _ *core.Record) {
			users := mustFind(t, w, "users")
			users.Fields.GetByName("name").(*core.TextField).Hidden = true
			saveCollection(t, w, users)
		}, "{}"},
		"renamed": {func(t *testing.T, w *world, _ *core.Record) {
			users := mustFind(t, w, "users")
			users.Fields.GetByName("name").SetName("nick")
			users.Fields.Add(&core.TextField{Name: "name"})
			saveCollection(t, w, users)
		}, `{"name":""}`},
		"removed": {func(t *testing.T, w *world, _ *core.Record) {
			users := mustFind(t, w, "users")
			users.Fields.RemoveByName("name")
			saveCollection(t, w, users)
		}, "{}"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.bob.Set("name", "Bob")
			save(t, w, w.bob)
			channel := addChannel(t, w, presenceChannel(map[string]any{"presenceFields": "name"}))
			server := pbtest.Serve(t, w)
			server.Subscribe(t, w.ann, "room/1")
			lost := server.Subscribe(t, w.bob, "room/1")
			watcher := watch(t, server, nil, "room/1")
			watcher.await(t, w.ann, w.bob)
			watcher.awaitFields(t, w.ann, `{"name":"Ann"}`)
			lost.Close(t) // for the grace he is present without a connection
			pbtest.WaitFor(t, "bob has no connection", func() bool { return !engine(w).Online(pbtest.Ref(w.bob)) })

			test.change(t, w, channel)
			want := test.want
			if want == "" {
				want = `{"id":"` + w.ann.Id + `"}`
			}
			watcher.awaitFields(t, w.ann, want)
			for string(watcher.members[pbtest.Ref(w.bob)].Fields) == `{"name":"Bob"}` {
				watcher.next(t)
			}
			late := watch(t, server, nil, "room/1")
			if got := string(late.members[pbtest.Ref(w.ann)].Fields); got != want {
				t.Errorf("a later watcher gets %s", got)
			}
			_, page := presentOn(t, server, nil, "topic=room/1")
			for _, member := range page.Members {
				if member.User == pbtest.Ref(w.ann) && string(member.Fields) != want {
					t.Errorf("a page has %s", member.Fields)
				}
			}
		})
	}
}

// TestFieldsOfLostConnection: who is gone before anybody was told is told with their fields.
func TestFieldsOfLostConnection(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceFields": "name"}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	client := server.Connect(t)
	client.Set(t, w.ann, "room/1")
	client.Close(t)
	watcher.await(t, w.ann)
	if fields := watcher.members[pbtest.Ref(w.ann)].Fields; string(fields) != `{"name":"Ann"}` {
		t.Errorf("fields %s", fields)
	}
	// and what has changed meanwhile is known when they are back
	pbtest.WaitFor(t, "ann has no connection", func() bool { return !engine(w).Online(pbtest.Ref(w.ann)) })
	w.ann.Set("name", "Anna")
	save(t, w, w.ann)
	server.Subscribe(t, w.ann, "room/1")
	watcher.awaitFields(t, w.ann, `{"name":"Anna"}`)
}

// TestPresenceOfRenamedCollection: watchers know users by the name that they were told.
func TestPresenceOfRenamedCollection(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceFields": "name"}))
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "room/1")
	watcher := watch(t, server, nil, "room/1")
	watcher.await(t, w.ann)
	users := mustFind(t, w, "users")
	users.Name = "people"
	saveCollection(t, w, users)
	renamed := mustFindRecord(t, w, "people", w.ann.Id)
	watcher.await(t, renamed)
	watcher.awaitFields(t, w.ann, "")
	watcher.awaitFields(t, renamed, `{"name":"Ann"}`)
	if late := watch(t, server, nil, "room/1"); !slices.Equal(late.users(), watcher.users()) {
		t.Errorf("a later watcher sees %v", late.users())
	}
	engine(w).Disconnect(client.ID)
	watcher.await(t)
}

// TestPresenceTTLChanges: a presenceTTL that is set later leaves time to hear of it.
func TestPresenceTTLChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	channel := addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	server.Subscribe(t, w.ann, "room/1")
	watcher := watch(t, server, nil, "room/1")
	watcher.await(t, w.ann)
	time.Sleep(3 * time.Second) // older than the TTL

	channel.Set("presenceTTL", 3)
	began := time.Now() // it counts from within the save
	save(t, w, channel)
	watcher.next(t)
	if watcher.last.Type != "state" || watcher.last.Total != 1 || watcher.last.Renew != 1 {
		t.Fatalf("%+v", watcher.last)
	}
	watcher.await(t)
	if took := time.Since(began); took < 3*time.Second {
		t.Errorf("ann is out after %s", took)
	}
	channel.Set("presenceTTL", 0) // nobody has to renew any more
	save(t, w, channel)
	watcher.await(t, w.ann)
}

// TestRenewals: those who have to renew are told so also where they are too many to be listed, and
// guests can.
func TestRenewals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceTTL": 3, "presenceLimit": 1}))
	server := pbtest.Serve(t, w)
	ann, guest := server.Subscribe(t, w.ann, "room/1"), server.Subscribe(t, nil, "room/1")
	server.Subscribe(t, w.bob, "room/1")
	pbtest.WaitFor(t, "both have come", func() bool { users, guests := engine(w).PresenceCount("room/1"); return users == 2 && guests == 1 })
	watcher := watch(t, server, nil, "room/1")
	for watcher.last.Type != "count" {
		watcher.next(t)
	}
	if watcher.last.Renew != 1 {
		t.Errorf("%+v", watcher.last)
	}
	for i := 0; watcher.last.Total != 1; i++ { // until bob is out
		if i == 100 {
			t.Fatal("bob is not taken out")
		}
		for auth, client := range map[*core.Record]*pbtest.Subscriber{w.ann: ann, nil: guest} {
			if status, text := show(t, server, auth, map[string]any{"topic": "room/1", "clientId": client.ID}); status != 204 && status != 429 {
				t.Fatalf("%d %s", status, text)
			}
		}
		select {
		case event := <-watcher.Events():
			t.Log(event.Data)
		case <-time.After(500 * time.Millisecond):
		}
		watcher.last.Total, watcher.last.Guests = engine(w).PresenceCount("room/1")
	}
	if watcher.last.Guests != 1 {
		t.Errorf("%d guests", watcher.last.Guests)
	}
	if status, _ := show(t, server, nil, map[string]any{"topic": "room/1", "clientId": guest.ID, "meta": 1}); status != 403 {
		t.Errorf("a guest shows something: status %d", status)
	}
	if status, _ := show(t, server, nil, map[string]any{"topic": "room/1"}); status != 400 {
		t.Errorf("a guest without an id: status %d", status)
	}
}

// TestPresenceLimitChanges: who was told numbers gets the list when it is allowed, and the other way
// round.
func TestPresenceLimitChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	channel := addChannel(t, w, presenceChannel(map[string]any{"presenceLimit": 1}))
	server := pbtest.Serve(t, w)
	server.Subscribe(t, w.ann, "room/1")
	server.Subscribe(t, w.bob, "room/1")
	watcher := watch(t, server, nil, "room/1")
	for watcher.last.Total != 2 || watcher.last.Type != "count" {
		watcher.next(t)
	}
	channel.Set("presenceLimit", 100)
	save(t, w, channel)
	watcher.await(t, w.ann, w.bob)
	channel.Set("presenceLimit", 1)
	save(t, w, channel)
	for watcher.last.Type != "count" {
		watcher.next(t)
	}
}

// TestHiddenFromTheBeginning: who subscribes as not visible is never listed, also after their
// connection was ended.
func TestHiddenFromTheBeginning(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	hidden := withQuery("room/1", "visible", "false")
	client := server.Subscribe(t, w.ann, hidden)
	server.Subscribe(t, w.bob, "room/1")
	watcher.await(t, w.bob)

	engine(w).Disconnect(client.ID) // no grace
	client = server.Subscribe(t, w.ann, hidden)
	third := pbtest.AddAuth(t, w, "users", "cleo@x.com", nil)
	server.Subscribe(t, third, "room/1")
	watcher.await(t, w.bob, third)
	if watcher.frames != 3 {
		t.Errorf("%d frames", watcher.frames)
	}
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "visible": true}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	watcher.await(t, w.ann, w.bob, third)
	client.Set(t, w.ann, "room/1", hidden) // nothing new
	client.Set(t, w.ann, "room/1")
	client.Set(t, w.ann, "room/1", hidden) // hides again
	watcher.await(t, w.bob, third)
	if _, guests := engine(w).PresenceCount("room/1"); guests != 0 {
		t.Errorf("%d guests", guests)
	}
}

// TestPresenceIsNoOracle: who may not listen learns nothing from an attempt to show something, to
// leave, or to use another's connection.
func TestPresenceIsNoOracle(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"pattern": "secret/{x}", "subscribeRule": "", "presenceRule": ""}))
	server := pbtest.Serve(t, w)
	for name, request := range map[string]func(topic string, auth *core.Record) (int, string){
		"clientId": func(topic string, auth *core.Record) (int, string) {
			return show(t, server, auth, map[string]any{"topic": topic, "clientId": "nope"})
		},
		"meta": func(topic string, auth *core.Record) (int, string) {
			return show(t, server, auth, map[string]any{"topic": topic, "meta": 1})
		},
		"nothing": func(topic string, auth *core.Record) (int, string) {
			return show(t, server, auth, map[string]any{"topic": topic})
		},
		"DELETE": func(topic string, auth *core.Record) (int, string) {
			return leave(t, server, auth, topic, "nope", "")
		},
	} {
		for who, auth := range map[string]*core.Record{"bob": w.bob, "guest": nil} {
			began := time.Now()
			status, text := request("secret/1", auth)
			nothingStatus, nothingText := request("nothing/1", auth)
			if took := time.Since(began); took < 2*20*time.Millisecond {
				t.Errorf("%s, %s: two denials took %s: one that needs a query can be told apart", name, who, took)
			}
			if status != 403 || nothingStatus != 403 || text != nothingText {
				t.Errorf("%s, %s: %d %s, without a channel %d %s", name, who, status, text, nothingStatus, nothingText)
			}
		}
	}
}

// TestWatcherInDoubt: a watcher who was somebody else for a moment has missed what was told then,
// and gets a state.
func TestWatcherInDoubt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "1", w.ann)
	addMember(t, w, "1", w.bob)
	addChannel(t, w, presenceChannel(map[string]any{"presenceRule": memberRule}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, w.ann, "room/1")
	client, err := w.SubscriptionsBroker().ClientById(watcher.ID)
	if err != nil {
		t.Fatal(err)
	}
	for i, auth := range []*core.Record{w.bob, w.ann, w.bob} {
		// code of the application signs it in as another
		client.Set(apis.RealtimeClientAuthKey, auth)
		member := pbtest.AddAuth(t, w, "users", string(rune('a'+i))+"@x.com", nil)
		tab := server.Subscribe(t, member, "room/1")
		watcher.await(t, member)
		tab.Set(t, member)
		watcher.await(t)
	}
}

// TestHiddenWhileAway: who is hidden, and then overdue or away, comes back hidden.
func TestHiddenWhileAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceTTL": 2}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, w.bob, "room/1")
	ann := server.Subscribe(t, w.ann, "room/1")
	put := func(body map[string]any) {
		t.Helper()
		body["topic"], body["clientId"] = "room/1", ann.ID
		if status, text := show(t, server, w.ann, body); status != 204 {
			t.Fatalf("%d %s", status, text)
		}
	}
	watcher.await(t, w.ann)
	put(map[string]any{"visible": false})
	watcher.await(t)
	frames := watcher.frames
	time.Sleep(4 * time.Second) // overdue
	put(map[string]any{})
	if status, text := leave(t, server, w.ann, "room/1", ann.ID, ""); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	put(map[string]any{"meta": 1})
	server.Subscribe(t, w.bob, "room/1") // a fence
	watcher.await(t, w.bob)
	if watcher.frames != frames+1 {
		t.Errorf("%d frames after %d: %+v", watcher.frames, frames, watcher.last)
	}
	put(map[string]any{"visible": true})
	for watcher.members[pbtest.Ref(w.ann)].User == "" {
		watcher.next(t)
	}
}
