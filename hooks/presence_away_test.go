package hooks_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
)

// away is somebody who is present on room/1, and whose connection was lost a moment ago.
type away struct {
	*world
	server  *pbtest.Server
	channel *core.Record
	watcher *watcher
}

func newAway(t *testing.T, values map[string]any, prepare func(*world)) *away {
	t.Helper()
	w := newWorld(t)
	if prepare != nil {
		prepare(w)
	}
	a := &away{world: w, channel: addChannel(t, w, presenceChannel(values))}
	a.server = pbtest.Serve(t, w)
	a.watcher = watch(t, a.server, nil, "room/1")
	client := a.server.Subscribe(t, w.ann, "room/1")
	a.watcher.await(t, w.ann)
	client.Close(t)
	pbtest.WaitFor(t, "ann has no connection", func() bool { return !engine(w).Online(pbtest.Ref(w.ann)) })
	return a
}

// leave sends a DELETE.
func leave(t testing.TB, server *pbtest.Server, auth *core.Record, topic, clientID, grace string) (int, string) {
	t.Helper()
	query := url.Values{"topic": {topic}, "clientId": {clientID}, "grace": {grace}}
	return server.DoText(t, http.MethodDelete, "/api/notify/presence?"+query.Encode(), pbtest.Token(t, auth), nil)
}

// TestWhileAway: what changes while somebody has no connection is told at once, and not after the
// grace.
func TestWhileAway(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		values map[string]any
		change func(t *testing.T, a *away)
		want   string // fields; empty: ann is out
	}{
		"deleted": {nil, func(t *testing.T, a *away) {
			if err := a.Delete(a.ann); err != nil {
				t.Fatal(err)
			}
		}, ""},
		"presence is switched off": {nil, func(t *testing.T, a *away) {
			a.channel.Set("presence", false)
			save(t, a, a.channel)
		}, ""},
		"address made private": {map[string]any{"presenceFields": "name,email"}, func(t *testing.T, a *away) {
			record := mustFindRecord(t, a, "users", a.ann.Id)
			record.SetEmailVisibility(false)
			save(t, a, record)
		}, `{"name":"Ann"}`},
		"another collection": {map[string]any{"presenceFields": "name,email"}, func(t *testing.T, a *away) {
			saveCollection(t, a, core.NewBaseCollection("unrelated"))
		}, `{"email":"ann@x.com","name":"Ann"}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAway(t, test.values, func(w *world) {
				w.ann.SetEmailVisibility(true)
				save(t, w, w.ann)
			})
			began := time.Now()
			test.change(t, a)
			if test.want != "" {
				a.watcher.awaitFields(t, a.ann, test.want)
			} else if name == "deleted" {
				a.watcher.await(t)
			}
			pbtest.WaitFor(t, "it is so in a page, too", func() bool {
				members := engine(a).Presence("room/1", "", 10).Members
				return test.want == "" && len(members) == 0 || len(members) == 1 && string(members[0].Fields) == test.want
			})
			if took := time.Since(began); took > 9*time.Second {
				t.Errorf("it took %s: as long as the grace", took)
			}
		})
	}
}

// TestSetWhileAway: what is set while the connection is lost counts for the next one, also when the
// grace ends before that comes.
func TestSetWhileAway(t *testing.T) {
	t.Parallel()
	a := newAway(t, nil, nil)
	time.Sleep(8 * time.Second)
	if status, text := show(t, a.server, a.ann, map[string]any{"topic": "room/1", "visible": false, "meta": "away"}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	a.watcher.await(t)
	time.Sleep(4 * time.Second) // the grace is over, the 10 seconds after the request are not
	a.server.Subscribe(t, a.ann, "room/1")
	a.server.Subscribe(t, a.bob, "room/1")
	a.watcher.await(t, a.bob)
	if a.watcher.last.Total != 1 {
		t.Errorf("%+v", a.watcher.last)
	}
}

// TestHiddenIsHidden: nobody can tell that somebody hidden is there: neither by a message, nor by
// the numbers of answers, nor when presence is switched off and on.
func TestHiddenIsHidden(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	channel := addChannel(t, w, presenceChannel(map[string]any{"presenceTTL": 60}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	if watcher.last.Renew != 20 { // whoever hides has to renew, too
		t.Errorf("%+v", watcher.last)
	}
	server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "visible": false}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	watcher.await(t)
	moves := func(topic string) bool {
		_, before := presentOn(t, server, nil, "topic="+topic)
		time.Sleep(5 * time.Millisecond)
		_, after := presentOn(t, server, nil, "topic="+topic)
		return after.Seq != before.Seq
	}
	if moves("room/1") != moves("room/2") {
		t.Error("the number tells that somebody is there")
	}
	for _, on := range []bool{false, true} {
		channel.Set("presence", on)
		save(t, w, channel)
	}
	again := watch(t, server, nil, "room/1")
	server.Subscribe(t, w.ann, withQuery("room/2", "visible", "false"))
	other := watch(t, server, nil, "room/2")
	server.Subscribe(t, w.bob, "room/1", "room/2") // a fence
	again.await(t, w.bob)
	other.await(t, w.bob)
	if again.frames != 2 || other.frames != 2 {
		t.Errorf("%d and %d frames", again.frames, other.frames)
	}
}

// TestRenamedUsers: after their collection was renamed, users are still found when they change.
func TestRenamedUsers(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		w.ann.SetEmailVisibility(true)
		save(t, w, w.ann)
		addChannel(t, w, presenceChannel(map[string]any{"presenceFields": "email"}))
		server := serve(t, w)
		server.Subscribe(t, w.ann, "room/1")
		server.Subscribe(t, w.bob, "room/1")
		users := mustFind(t, w, "users")
		users.Name = "people"
		saveCollection(t, w, users)
		ann, bob := mustFindRecord(t, w, "people", w.ann.Id), mustFindRecord(t, w, "people", w.bob.Id)
		watcher := watch(t, server, nil, "room/1")
		watcher.await(t, ann, bob)
		ann.SetEmailVisibility(false)
		save(t, w, ann)
		watcher.awaitFields(t, ann, "{}")
		bob.RefreshTokenKey()
		save(t, w, bob)
		watcher.await(t, ann)
		if err := w.Delete(ann); err != nil {
			t.Fatal(err)
		}
		watcher.await(t)
	})
}

// TestLeavingAndSubscribingAnew: who has left is back with another subscription, or if they said so
// in time.
func TestLeavingAndSubscribingAnew(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	client := server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)
	for i := range 2 {
		if status, text := leave(t, server, w.ann, "room/1", client.ID, ""); status != 204 {
			t.Fatalf("%d %s", status, text)
		}
		watcher.await(t)
		client.Set(t, w.ann, "room/1", withQuery("room/1", "key", fmt.Sprint(i)))
		watcher.await(t, w.ann)
	}
	seq := watcher.last.Seq
	if status, text := leave(t, server, w.ann, "room/1", client.ID, "5"); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "clientId": client.ID}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	server.Subscribe(t, w.bob, "room/1")
	watcher.await(t, w.ann, w.bob)
	if watcher.last.Seq != seq+1 {
		t.Errorf("it was told that she has left and come: %+v", watcher.last)
	}
	if status, text := leave(t, server, w.ann, "room/1", client.ID, "1"); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	watcher.await(t, w.bob)
	// a grace is for the time that it was asked for
	leave(t, server, w.ann, "room/1", client.ID, "9") // she has left already
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "clientId": client.ID}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	watcher.await(t, w.ann, w.bob)
	began := time.Now()
	client.Set(t, w.ann)
	watcher.await(t, w.bob)
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("it took %s to unsubscribe", took)
	}
	for _, grace := range []string{"x", "-1", "11", "NaN"} {
		if status, text := leave(t, server, w.ann, "room/1", client.ID, grace); status != 400 || !strings.Contains(text, "validation_invalid_number") {
			t.Errorf("%q: %d %s", grace, status, text)
		}
	}
}

// TestPresenceOfExpiredToken: whose token ends is gone, after the grace in which most come back with
// another one.
func TestPresenceOfExpiredToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	token, err := w.ann.NewStaticAuthToken(2 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	client := server.Connect(t)
	if status, answer := server.Do(t, http.MethodPost, "/api/realtime", token, map[string]any{"clientId": client.ID, "subscriptions": []string{"room/1"}}); status != 204 {
		t.Fatalf("%d %v", status, answer)
	}
	watcher.await(t, w.ann)
	client.ExpectEnd(t)
	watcher.await(t)
}

// TestPresenceOfStalled: somebody whose connection is not read is cut, and is gone after the grace.
// Other watchers do not notice anything else.
func TestPresenceOfStalled(t *testing.T) {
	t.Parallel()
	for name, serve := range map[string]func(testing.TB, core.App) *pbtest.Server{"HTTP/1": pbtest.Serve, "HTTP/2": pbtest.ServeHTTP2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			addChannel(t, w, presenceChannel(nil))
			server := serve(t, w)
			watcher := watch(t, server, nil, "room/1")
			id, _ := open(t, server)
			status, answer := server.Do(t, http.MethodPost, "/api/realtime", pbtest.Token(t, w.ann),
				map[string]any{"clientId": id, "subscriptions": []string{"room/1", "@presence/room/1", "flood"}})
			if status != http.StatusNoContent {
				t.Fatalf("%d %v", status, answer)
			}
			watcher.await(t, w.ann)
			sendUntilDropped(t, w, "flood", func() {})
			bob := server.Subscribe(t, w.bob, "room/1")
			watcher.await(t, w.ann, w.bob) // she may come back
			watcher.await(t, w.bob)
			bob.Set(t, w.bob)
			watcher.await(t)
		})
	}
}
