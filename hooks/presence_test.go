package hooks_test

import (
	"encoding/json/v2"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/tmaxmax/go-sse"

	"herald/internal/pbtest"
	"herald/notify"
)

// presenceChannel is a channel with presence that everyone may listen to and watch.
func presenceChannel(values map[string]any) map[string]any {
	all := map[string]any{"pattern": "room/{room}", "subscribeRule": "*", "presence": true, "presenceRule": "*"}
	for name, value := range values {
		all[name] = value
	}
	return all
}

// told is what watchers are told.
type told struct {
	Type    string                  `json:"type"`
	Epoch   string                  `json:"epoch"`
	Seq     int64                   `json:"seq"`
	Total   int                     `json:"total"`
	Guests  int                     `json:"guests"`
	Members []notify.PresenceMember `json:"members"`
	Next    *string                 `json:"next"`
	Renew   float64                 `json:"renew"`
	Join    []notify.PresenceMember `json:"join"`
	Update  []notify.PresenceMember `json:"update"`
	Leave   []string                `json:"leave"`
}

// watcher puts together who is present, as a client does.
type watcher struct {
	*pbtest.Subscriber
	topic   string
	members map[string]notify.PresenceMember
	last    told
	frames  int
}

func watch(t testing.TB, server *pbtest.Server, auth *core.Record, topic string) *watcher {
	t.Helper()
	w := &watcher{Subscriber: server.Subscribe(t, auth, "@presence/"+topic), topic: topic}
	if w.next(t); w.last.Type == "diff" {
		t.Fatalf("a diff before the state: %+v", w.last)
	}
	return w
}

func (w *watcher) next(t testing.TB) {
	t.Helper()
	w.take(t, w.Next(t))
}

// take takes what has come.
func (w *watcher) take(t testing.TB, event sse.Event) {
	t.Helper()
	if event.Type != "@presence/"+w.topic {
		t.Fatalf("got %q: %s", event.Type, event.Data)
	}
	before := w.last.Seq
	w.last = told{}
	if err := json.Unmarshal([]byte(event.Data), &w.last, json.RejectUnknownMembers(true)); err != nil {
		t.Fatalf("%s: %v", event.Data, err)
	}
	if w.frames++; w.last.Seq <= before {
		t.Errorf("number %d after %d", w.last.Seq, before)
	}
	switch w.last.Type {
	case "state":
		w.members = map[string]notify.PresenceMember{}
		w.put(w.last.Members)
	case "diff":
		for _, member := range w.last.Join {
			if _, isThere := w.members[member.User]; isThere {
				t.Errorf("%s joins twice", member.User)
			}
		}
		w.put(w.last.Join)
		w.put(w.last.Update)
		for _, user := range w.last.Leave {
			if _, isThere := w.members[user]; !isThere {
				t.Errorf("%s leaves, and was not there", user)
			}
			delete(w.members, user)
		}
	case "count":
		w.members = nil
	}
	if w.members != nil && (w.last.Next == nil || *w.last.Next == "") && len(w.members) != w.last.Total {
		t.Errorf("%d members, and the total is %d", len(w.members), w.last.Total)
	}
}

func (w *watcher) put(members []notify.PresenceMember) {
	for _, member := range members {
		w.members[member.User] = member
	}
}

// await reads until exactly these users are present.
func (w *watcher) await(t testing.TB, users ...*core.Record) {
	t.Helper()
	want := []string{}
	for _, user := range users {
		want = append(want, pbtest.Ref(user))
	}
	slices.Sort(want)
	for !slices.Equal(w.users(), want) {
		w.next(t)
	}
}

func (w *watcher) users() []string {
	users := []string{}
	for user := range w.members {
		users = append(users, user)
	}
	slices.Sort(users)
	return users
}

// presentOn gets who is present.
func presentOn(t testing.TB, server *pbtest.Server, auth *core.Record, query string) (int, told) {
	t.Helper()
	status, text := server.DoText(t, http.MethodGet, "/api/notify/presence?"+query, pbtest.Token(t, auth), nil)
	var answer told
	if status == http.StatusOK {
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	return status, answer
}

func show(t testing.TB, server *pbtest.Server, auth *core.Record, body any) (int, string) {
	t.Helper()
	return server.DoText(t, http.MethodPut, "/api/notify/presence", pbtest.Token(t, auth), body)
}

// TestPresence: who comes and goes, with tabs and guests.
func TestPresence(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceFields": "name,email"}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	if watcher.last.Type != "state" || watcher.last.Total != 0 || watcher.last.Epoch == "" {
		t.Fatalf("state %+v", watcher.last)
	}

	tab := server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)
	ann := watcher.members[pbtest.Ref(w.ann)]
	if string(ann.Fields) != `{"name":"Ann"}` || string(ann.Meta) != "null" || ann.Connections != 1 { // the address is not public
		t.Errorf("ann is %+v", ann)
	}

	other := server.Subscribe(t, w.ann, "room/1")
	for watcher.members[pbtest.Ref(w.ann)].Connections != 2 {
		watcher.next(t)
	}
	server.Subscribe(t, nil, "room/1")
	server.Subscribe(t, w.bob, "room/1", "room/2")
	watcher.await(t, w.ann, w.bob)
	for watcher.last.Guests != 1 {
		watcher.next(t)
	}
	if status, answer := presentOn(t, server, nil, "topic=room/1"); status != 200 || answer.Total != 2 || answer.Guests != 1 || len(answer.Members) != 2 || answer.Seq != watcher.last.Seq {
		t.Errorf("%d %+v", status, answer)
	}

	other.Set(t, w.ann) // one of two tabs unsubscribes
	for watcher.members[pbtest.Ref(w.ann)].Connections != 1 {
		watcher.next(t)
	}
	tab.Set(t, w.ann, "room/2")
	watcher.await(t, w.bob)
	if users, guests := engine(w).PresenceCount("room/2"); users != 2 || guests != 0 {
		t.Errorf("%d users, %d guests", users, guests)
	}
	if topics, err := engine(w).PresentOn(pbtest.Ref(w.bob)); err != nil || len(topics) != 2 || !engine(w).Online(pbtest.Ref(w.bob)) {
		t.Errorf("bob is on %v, error %v", topics, err)
	}
}

// TestPresenceEnds: each way of leaving that is meant takes effect at once, not after the grace.
func TestPresenceEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(t *testing.T, w *world, server *pbtest.Server, client *pbtest.Subscriber, channel *core.Record){
		"unsubscribe": func(t *testing.T, w *world, _ *pbtest.Server, client *pbtest.Subscriber, _ *core.Record) {
			client.Set(t, w.ann, "other")
		},
		"sign-out": func(t *testing.T, _ *world, _ *pbtest.Server, client *pbtest.Subscriber, _ *core.Record) {
			client.Try(t, nil, "room/1")
		},
		"membership deleted": func(t *testing.T, w *world, _ *pbtest.Server, _ *pbtest.Subscriber, _ *core.Record) {
			member, err := w.FindFirstRecordByData("room_members", "user", w.ann.Id)
			if err == nil {
				err = w.Delete(member)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"kick": func(t *testing.T, w *world, _ *pbtest.Server, client *pbtest.Subscriber, _ *core.Record) {
			engine(w).Disconnect(client.ID)
		},
		"tokens revoked": func(t *testing.T, w *world, _ *pbtest.Server, _ *pbtest.Subscriber, _ *core.Record) {
			w.ann.RefreshTokenKey()
			save(t, w, w.ann)
		},
		"user deleted": func(t *testing.T, w *world, _ *pbtest.Server, _ *pbtest.Subscriber, _ *core.Record) {
			if err := w.Delete(w.ann); err != nil {
				t.Fatal(err)
			}
		},
		"DELETE": func(t *testing.T, w *world, server *pbtest.Server, client *pbtest.Subscriber, _ *core.Record) {
			if status, text := leave(t, server, w.ann, "room/1", client.ID, ""); status != 204 {
				t.Fatalf("%d %s", status, text)
			}
		},
		"rule changed": func(t *testing.T, w *world, _ *pbtest.Server, _ *pbtest.Subscriber, channel *core.Record) {
			channel.Set("subscribeRule", `@request.auth.email = "bob@x.com"`)
			save(t, w, channel)
		},
		"hidden": func(t *testing.T, w *world, server *pbtest.Server, _ *pbtest.Subscriber, _ *core.Record) {
			if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "visible": false}); status != 204 {
				t.Fatalf("%d %s", status, text)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			addMembers(t, w)
			addMember(t, w, "1", w.ann)
			addMember(t, w, "1", w.bob)
			channel := addChannel(t, w, presenceChannel(map[string]any{"subscribeRule": memberRule}))
			server := pbtest.Serve(t, w)
			watcher := watch(t, server, nil, "room/1")
			client := server.Subscribe(t, w.ann, "room/1")
			server.Subscribe(t, w.bob, "room/1")
			watcher.await(t, w.ann, w.bob)
			began := time.Now()
			end(t, w, server, client, channel)
			watcher.await(t, w.bob)
			if took := time.Since(began); took > 9*time.Second {
				t.Errorf("it took %s: as long as the grace", took)
			}
		})
	}
}

// TestPresenceEachWay: users count, and are told who is present, whatever way they are connected.
func TestPresenceEachWay(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		addMembers(t, w)
		member := addMember(t, w, "1", w.ann)
		addMember(t, w, "1", w.bob)
		addChannel(t, w, presenceChannel(map[string]any{"subscribeRule": memberRule}))
		server := serve(t, w)
		watcher := watch(t, server, nil, "room/1")
		server.Subscribe(t, w.ann, "room/1")
		server.Subscribe(t, w.bob, "room/1")
		watcher.await(t, w.ann, w.bob)
		if err := w.Delete(member); err != nil {
			t.Fatal(err)
		}
		watcher.await(t, w.bob)
		if count, err := engine(w).DisconnectUser(pbtest.Ref(w.bob)); count != 1 || err != nil {
			t.Errorf("%d connections, error %v", count, err)
		}
		watcher.await(t)
		if late := watch(t, server, nil, "room/1"); late.last.Total != 0 || late.last.Seq < watcher.last.Seq {
			t.Errorf("state %+v after %+v", late.last, watcher.last)
		}
	})
}

// TestPresenceSurvives: a connection that is lost and comes back within the grace is no leave, and
// one that does not is.
func TestPresenceSurvives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	client := server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "meta": map[string]any{"typing": true}}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	for string(watcher.members[pbtest.Ref(w.ann)].Meta) != `{"typing":true}` {
		watcher.next(t)
	}
	seq := watcher.last.Seq

	client.Close(t)
	client = server.Subscribe(t, w.ann, "room/1")
	server.Subscribe(t, w.bob, "room/1") // a fence
	watcher.await(t, w.ann, w.bob)
	if watcher.last.Seq != seq+1 || len(watcher.last.Update) > 0 {
		t.Errorf("the reload was told: %+v", watcher.last)
	}
	client.Close(t)
	watcher.await(t, w.bob) // after the grace
}

// TestPresenceIsSwitched: presence is turned off and on, and the channel is deleted.
func TestPresenceIsSwitched(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	channel := addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	server.Subscribe(t, w.ann, "room/1")
	watcher := watch(t, server, nil, "room/1")
	watcher.await(t, w.ann)

	channel.Set("presence", false)
	save(t, w, channel)
	pbtest.WaitFor(t, "nobody is present", func() bool { users, _ := engine(w).PresenceCount("room/1"); return users == 0 })
	if status, _ := presentOn(t, server, w.ann, "topic=room/1"); status != 403 {
		t.Errorf("status %d", status)
	}
	if status, _ := watcher.Try(t, nil, "@presence/room/1"); status != 403 {
		t.Errorf("status %d", status)
	}
	channel.Set("presence", true)
	save(t, w, channel)
	if again := watch(t, server, nil, "room/1"); again.last.Total != 1 {
		again.await(t, w.ann)
	}
	if err := w.Delete(channel); err != nil {
		t.Fatal(err)
	}
	pbtest.WaitFor(t, "nobody is present", func() bool { users, _ := engine(w).PresenceCount("room/1"); return users == 0 })
}

// TestPresenceLimit: above the limit watchers get numbers, and below it a state again.
func TestPresenceLimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceLimit": 1}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)
	bob := server.Subscribe(t, w.bob, "room/1")
	for watcher.last.Type != "count" {
		watcher.next(t)
	}
	if late := watch(t, server, nil, "room/1"); watcher.last.Total != 2 || late.last.Type != "count" || late.last.Total != 2 {
		t.Errorf("%+v, later %+v", watcher.last, late.last)
	}
	if status, answer := presentOn(t, server, nil, "topic=room/1&limit=1"); status != 200 || len(answer.Members) != 1 || *answer.Next == "" {
		t.Errorf("%d %+v", status, answer)
	} else if status, answer := presentOn(t, server, nil, "topic=room/1&cursor="+url.QueryEscape(*answer.Next)); status != 200 || len(answer.Members) != 1 || *answer.Next != "" {
		t.Errorf("%d %+v", status, answer)
	}
	bob.Set(t, w.bob)
	watcher.await(t, w.ann)
	if watcher.last.Type != "state" {
		t.Errorf("%+v", watcher.last)
	}
}

// TestPresenceTTL: who does not renew is taken out, and is back when they do.
func TestPresenceTTL(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(map[string]any{"presenceTTL": 2}))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	client := server.Subscribe(t, w.ann, "room/1")
	watcher.await(t, w.ann)
	watcher.await(t)
	if status, text := show(t, server, w.ann, map[string]any{"topic": "room/1", "clientId": client.ID}); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	watcher.await(t, w.ann)
}
