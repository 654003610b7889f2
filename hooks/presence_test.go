package hooks_test

import (
	"encoding/json/v2"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
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
	event := w.Next(t)
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
	token := ""
	if auth != nil {
		token = pbtest.Token(t, auth)
	}
	status, text := server.DoText(t, http.MethodGet, "/api/notify/presence?"+query, token, nil)
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
	token := ""
	if auth != nil {
		token = pbtest.Token(t, auth)
	}
	return server.DoText(t, http.MethodPut, "/api/notify/presence", token, body)
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
			query := url.Values{"topic": {"room/1"}, "clientId": {client.ID}}
			if status, text := server.DoText(t, http.MethodDelete, "/api/notify/presence?"+query.Encode(), pbtest.Token(t, w.ann), nil); status != 204 {
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

// TestWhoMayWatch: who may not look learns nothing, whether there is something or not.
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
			if status, answer := client.Try(t, auth, "@presence/"+topic); status != 403 || !strings.Contains(fmt.Sprint(answer), "validation_topic_forbidden") {
				t.Errorf("%s may watch %q: %d %v", name, topic, status, answer)
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

// TestOnPresence: the application is told, and a handler that fails or panics does no harm.
func TestOnPresence(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	seen := make(chan string, 100)
	hooks.OnPresence(w).BindFunc(func(e *hooks.PresenceEvent) error {
		for _, member := range e.Join {
			seen <- "join " + member.User
		}
		for _, user := range e.Leave {
			seen <- "leave " + user
		}
		if len(e.Join) > 0 {
			panic("test")
		}
		return errors.New("test")
	})
	server := pbtest.Serve(t, w)
	for range 2 {
		client := server.Subscribe(t, w.ann, "room/1")
		if got := <-seen; got != "join "+pbtest.Ref(w.ann) {
			t.Errorf("got %q", got)
		}
		client.Set(t, w.ann, "other")
		if got := <-seen; got != "leave "+pbtest.Ref(w.ann) {
			t.Errorf("got %q", got)
		}
	}
}
