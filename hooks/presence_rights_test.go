package hooks_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

// TestWhoMayWatch: whoever may not look learns nothing, whether there is something or not.
func TestWhoMayWatch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "1", w.ann)
	addChannel(t, w, presenceChannel(map[string]any{"presenceRule": memberRule}))
	addChannel(t, w, map[string]any{"pattern": "plain", "subscribeRule": "*"})
	server := pbtest.Serve(t, w)
	server.Subscribe(t, w.bob, "room/1")
	pbtest.WaitFor(t, "bob is present", func() bool { users, _ := engine(w).PresenceCount("room/1"); return users == 1 })

	_, denied := presentOn(t, server, w.bob, "topic=room/1")
	for _, topic := range []string{"room/1", "room/2", "plain", "nothing", "users", "users/*", "@inbox", "@presence/room/1", ""} {
		for name, auth := range map[string]*core.Record{"bob": w.bob, "guest": nil} {
			status, answer := presentOn(t, server, auth, "topic="+url.QueryEscape(topic))
			if want := 403; topic == "" {
				if status != 400 {
					t.Errorf("%s, %q: status %d", name, topic, status)
				}
			} else if status != want || fmt.Sprint(answer) != fmt.Sprint(denied) {
				t.Errorf("%s, %q: status %d, %v", name, topic, status, answer)
			}
			if topic == "" {
				continue
			}
			client := server.Connect(t)
			began := time.Now()
			if status, answer := client.Try(t, auth, "@presence/"+topic); status != 403 || !strings.Contains(fmt.Sprint(answer), "validation_topic_forbidden") {
				t.Errorf("%s may watch %q: %d %v", name, topic, status, answer)
			}
			if took := time.Since(began); took < 20*time.Millisecond {
				t.Errorf("%s, %q: the denial took %s: one that needs a query can be told apart", name, topic, took)
			}
			client.Close(t)
			if status, _ := presentOn(t, server, auth, "count=1&topic="+url.QueryEscape(topic)); status != 403 {
				t.Errorf("%s may count %q: status %d", name, topic, status)
			}
		}
	}

	watcher := watch(t, server, w.ann, "room/1")
	watcher.await(t, w.bob)
	if status, _ := presentOn(t, server, w.root, "topic=room/1"); status != 200 {
		t.Errorf("superuser: status %d", status)
	}
	for _, topic := range []string{"plain", "nothing", "@inbox"} { // a superuser is told why
		if status, text := server.DoText(t, "GET", "/api/notify/presence?topic="+url.QueryEscape(topic), pbtest.Token(t, w.root), nil); status != 400 || !strings.Contains(text, "validation_no_presence") {
			t.Errorf("superuser, %q: %d %s", topic, status, text)
		}
		if status, text := show(t, server, w.root, map[string]any{"topic": topic, "meta": 1}); status != 400 || !strings.Contains(text, "validation_no_presence") {
			t.Errorf("superuser, %q: %d %s", topic, status, text)
		}
	}
	// the right to look ends
	watcher.Set(t, w.ann, "@presence/room/1", "@denied")
	member, err := w.FindFirstRecordByData("room_members", "user", w.ann.Id)
	if err == nil {
		err = w.Delete(member)
	}
	if err != nil {
		t.Fatal(err)
	}
	for watcher.Next(t).Type != "@denied" {
	}
}

// TestPresenceOfNoTopic: a key without a topic, beside a channel for everything, does no harm.
func TestPresenceOfNoTopic(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"pattern": "{all...}"}))
	server := pbtest.Serve(t, w)
	client := server.Connect(t)
	for _, key := range []string{"?options=%7B%7D", "@presence/", "@presence/?options=%7B%7D"} {
		client.Try(t, w.ann, key, "room/1")
	}
	watcher := watch(t, server, nil, "room/1")
	watcher.await(t, w.ann)
}

// TestMeta: what a user shows, and what is refused.
func TestMeta(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"subscribeRule": `@request.auth.email != "bob@x.com"`, "presenceFields": "name"}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	client := server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)

	atLimit := strings.Repeat("x", notify.DefaultMaxMeta-2)
	for name, test := range map[string]struct {
		auth *core.Record
		body any
		want int
	}{
		"too large":    {w.ann, map[string]any{"topic": "room/1", "meta": atLimit + "x"}, 413},
		"no JSON":      {w.ann, `{"topic": "room/1", "meta": {]}`, 400},
		"unknown":      {w.ann, map[string]any{"topic": "room/1", "mata": 1}, 400},
		"no topic":     {w.ann, map[string]any{"meta": 1}, 400},
		"guest":        {nil, map[string]any{"topic": "room/1", "meta": 1}, 403},
		"denied":       {w.bob, map[string]any{"topic": "room/1", "meta": 1}, 403},
		"no presence":  {w.ann, map[string]any{"topic": "other", "meta": 1}, 403},
		"wrong client": {w.ann, map[string]any{"topic": "room/1", "meta": 1, "clientId": watcher.ID}, 400},
	} {
		if status, text := show(t, server, test.auth, test.body); status != test.want {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}

	forged := map[string]any{"user": "users:x", "fields": map[string]any{"name": "Bob"}}
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "meta": forged, "clientId": client.ID}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	for string(watcher.members[pbtest.Ref(w.ann)].Meta) == "null" {
		watcher.next(t)
	}
	if ann := watcher.members[pbtest.Ref(w.ann)]; string(ann.Fields) != `{"name":"Ann"}` {
		t.Errorf("ann is %+v", ann)
	}
	if len(watcher.last.Join)+len(watcher.last.Leave) > 0 {
		t.Errorf("an update is told as %+v", watcher.last)
	}

	limited := false
	for range 20 {
		status, _ := show(t, server, w.ann, map[string]any{"topic": "room/1", "meta": atLimit})
		if limited = limited || status == 429; status != 204 && status != 429 {
			t.Fatalf("status %d", status)
		}
	}
	if !limited {
		t.Error("20 updates at once are not too many")
	}

	// the name changes, and is told without anybody's doing
	w.ann.Set("name", "Anna")
	save(t, w, w.ann)
	for string(watcher.members[pbtest.Ref(w.ann)].Fields) != `{"name":"Anna"}` {
		watcher.next(t)
	}
}

// TestSetBeforeSubscribing: somebody who hides first is never seen.
func TestSetBeforeSubscribing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "visible": false}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	server.Subscribe(t, w.ann, "room/1")
	server.Subscribe(t, w.bob, "room/1")
	watcher.await(t, w.bob)
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "visible": true}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	watcher.await(t, w.ann, w.bob)
	if watcher.frames != 3 {
		t.Errorf("%d frames", watcher.frames)
	}
}

// TestWatchStrict: with --notifyStrict nobody watches topics without a channel, either.
func TestWatchStrict(t *testing.T) {
	t.Parallel()
	app := pbtest.NewApp(t, func(app core.App) {
		hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Strict: true}})
	})
	root := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
	ann := pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
	addChannel(t, app, presenceChannel(nil))
	server := pbtest.Serve(t, app)
	server.Subscribe(t, ann, "room/1")
	watcher := watch(t, server, nil, "room/1")
	watcher.await(t, ann)
	for _, auth := range []*core.Record{nil, ann, root} {
		if status, _ := server.Connect(t).Try(t, auth, "@presence/other"); status != 403 {
			t.Errorf("status %d", status)
		}
	}
}

// TestPresenceFieldsAreChecked: a name that no user has is a mistake.
func TestPresenceFieldsAreChecked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	channel := addChannel(t, w, presenceChannel(nil))
	for fields, want := range map[string]bool{
		"name": true, "name, avatar": true, "*": true, "id,collectionName": true, "name:excerpt(20,true),email": true, "": true,
		"nam": false, "name,nope": false, "name avatar": false, "name;avatar": false, "password": false, "tokenKey": false, "expand.x": false,
		"name:nope(1)": false, ",": true,
	} {
		channel.Set("presenceFields", fields)
		if err := w.Save(channel); (err == nil) != want || err != nil && !strings.Contains(err.Error(), "presenceFields") {
			t.Errorf("%q: error %v", fields, err)
		}
	}
}

// TestWrongVisible: what cannot be understood is refused, and never taken for visible.
func TestWrongVisible(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	client := server.Connect(t)
	for _, value := range []string{"no", "maybe", ""} {
		if status, answer := client.Try(t, w.ann, withQuery("room/1", "visible", value)); status != 400 || !strings.Contains(fmt.Sprint(answer), "visible") {
			t.Errorf("%q: %d %v", value, status, answer)
		}
	}
	client.Set(t, w.ann, withQuery("room/1", "visible", "0"))
	server.Subscribe(t, w.bob, withQuery("room/1", "visible", "true"))
	watcher.await(t, w.bob)
	if watcher.frames != 2 {
		t.Errorf("%d frames", watcher.frames)
	}
}

// TestGivingUp: a connection that was lost leaves at once if its user says so. Nobody else can.
func TestGivingUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	ann, bob := server.Subscribe(t, w.ann, "room/1"), server.Subscribe(t, w.bob, "room/1")
	watcher.await(t, w.ann, w.bob)
	ann.Close(t)
	pbtest.WaitFor(t, "ann has no connection", func() bool { return !engine(w).Online(pbtest.Ref(w.ann)) })
	if status, _ := leave(t, server, nil, "room/1", ann.ID, ""); status != 400 {
		t.Errorf("a guest: status %d", status)
	}
	if status, _ := leave(t, server, w.bob, "room/1", ann.ID, ""); status != 204 { // he has lost none
		t.Errorf("bob: status %d", status)
	}
	if status, _ := leave(t, server, w.ann, "room/1", bob.ID, ""); status != 400 {
		t.Errorf("ann, of bob's: status %d", status)
	}
	if users, _ := engine(w).PresenceCount("room/1"); users != 2 {
		t.Errorf("%d users", users)
	}
	if status, _ := leave(t, server, w.ann, "room/1", ann.ID, ""); status != 204 {
		t.Errorf("ann: status %d", status)
	}
	if users, _ := engine(w).PresenceCount("room/1"); users != 1 {
		t.Errorf("%d users", users)
	}
	watcher.await(t, w.bob)
}
