package hooks_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestPromises is the table "promise × way": what is promised of a message holds on every
// way that it can go, live, replayed and fetched. A new way is a line in ways; it fails
// until everything here holds.
func TestPromises(t *testing.T) {
	t.Parallel()
	for _, way := range append(slices.Clone(ways), replaced) {
		for _, promise := range promises {
			t.Run(way.name+"/"+promise.name, func(t *testing.T) {
				if way.isForeign && promise.isOfWriting {
					return // it is for who writes to keep it
				}
				t.Parallel()
				w := way.newWorld(t)
				addMembers(t, w)
				addMember(t, w, "42", w.ann)
				addMember(t, w, "42", w.bob)
				addChannel(t, w, map[string]any{"pattern": "room/{room}", "subscribeRule": memberRule, "history": 1000})
				addChannel(t, w, map[string]any{"pattern": "open/{name}", "subscribeRule": "*", "history": 1000})
				promise.check(t, way, w, way.serve(t, w))
			})
		}
	}
}

var promises = []struct {
	name        string
	isOfWriting bool
	check       func(t *testing.T, way way, w *world, server *pbtest.Server)
}{
	{"in one order and once", false, inOneOrderAndOnce},
	{"only to whom it may go", false, onlyToWhomItMayGo},
	{"ends with the right", false, endsWithTheRight},
	{"ends with the sign-out", true, endsWithTheSignOut},
	{"ends with the token", false, endsWithTheToken},
	{"bounded", false, bounded},
	{"cut when stuck", true, cutWhenStuck},
	{"tells that it is alive", true, tellsThatItIsAlive},
	{"counted", true, counted},
}

// dataOf returns the data of an envelope, or of a message without.
func dataOf(t *testing.T, text string) string {
	t.Helper()
	if strings.HasPrefix(text, "{") {
		return fmt.Sprint(decodeEnvelope(t, text).Data)
	}
	return strings.Trim(text, `"`)
}

// read returns the data of the next messages of client, up to the one with the data last.
func read(t *testing.T, client *pbtest.Subscriber, last string) (got []string) {
	t.Helper()
	for {
		data := dataOf(t, client.Next(t).Data)
		if data == last {
			return got
		}
		got = append(got, data)
	}
}

// fetched returns the data of all that is kept of topic for who.
func fetched(t *testing.T, server *pbtest.Server, who *core.Record, topic string) (got []string) {
	t.Helper()
	for _, item := range historyOf(t, server, who, topic, "", 1000).Items {
		got = append(got, fmt.Sprint(item.Data))
	}
	return got
}

func inOneOrderAndOnce(t *testing.T, way way, w *world, server *pbtest.Server) {
	const senders, messages = 3, 60
	token := pbtest.Token(t, w.root)
	live := []*pbtest.Subscriber{server.Subscribe(t, w.ann, "room/42"), server.Subscribe(t, w.bob, "room/42")}
	var group sync.WaitGroup
	for sender := range senders {
		group.Go(func() {
			for i := range messages {
				body := fmt.Sprintf(`{"topic":"room/42","data":"%d:%d"}`, sender, i)
				if status, answer := server.Do(t, "POST", "/api/notify", token, body); status != http.StatusOK {
					t.Errorf("%d %v", status, answer)
				}
			}
		})
	}
	group.Wait()
	mustSend(t, w, "room/42", "last")

	want := read(t, live[0], "last")
	if len(want) != senders*messages {
		t.Errorf("%d messages came", len(want))
	}
	next := map[string]int{}
	for _, data := range want {
		sender, number, _ := strings.Cut(data, ":")
		if number != fmt.Sprint(next[sender]) {
			t.Fatalf("%s came when %d was due", data, next[sender])
		}
		next[sender]++
	}
	others := map[string][]string{"another": read(t, live[1], "last"), "fetched": upTo(fetched(t, server, w.bob, "room/42"), "last")}
	if !way.isForeign {
		others["replayed"] = read(t, server.Subscribe(t, w.ann, withQuery("room/42", "rewind", "1000")), "last")
	}
	for name, got := range others {
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v\nwant %v", name, got, want)
		}
	}
}

func upTo(all []string, last string) []string {
	if i := slices.Index(all, last); i >= 0 {
		return all[:i]
	}
	return all
}

func onlyToWhomItMayGo(t *testing.T, way way, w *world, server *pbtest.Server) {
	ann := []string{pbtest.Ref(w.ann)}
	messages := []struct {
		data   string
		to     notify.Audience
		except notify.Except
		want   string // of Ann, Bob, a guest and a superuser
	}{
		{"all", notify.Audience{}, notify.Except{}, "abgs"},
		{"user", notify.Audience{Users: ann}, notify.Except{}, "a"},
		{"nobody", notify.Audience{Users: []string{}}, notify.Except{}, ""},
		{"users", notify.Audience{Auth: notify.AuthUser}, notify.Except{}, "ab"},
		{"guests", notify.Audience{Auth: notify.AuthGuest}, notify.Except{}, "g"},
		{"superusers", notify.Audience{Auth: notify.AuthSuperuser}, notify.Except{}, "s"},
		{"collection", notify.Audience{Collections: []string{"users"}}, notify.Except{}, "ab"},
		{"filter", notify.Audience{Filter: `name = "Ann"`}, notify.Except{}, "a"},
		{"except", notify.Audience{}, notify.Except{Users: ann}, "bgs"},
		{"both", notify.Audience{Auth: notify.AuthUser}, notify.Except{Users: ann}, "b"},
	}
	viewers := map[string]*core.Record{"a": w.ann, "b": w.bob, "g": nil, "s": w.root}
	live := map[string]*pbtest.Subscriber{}
	for name, viewer := range viewers {
		live[name] = server.Subscribe(t, viewer, "open/a")
	}
	want := map[string][]string{}
	for _, m := range messages {
		report := send(t, w, notify.Message{Topic: "open/a", Data: m.data, To: m.to, Except: m.except})
		if report.Queued != len(m.want) {
			t.Errorf("%s: report %+v", m.data, report)
		}
		for name := range viewers {
			if strings.Contains(m.want, name) {
				want[name] = append(want[name], m.data)
			}
		}
	}
	mustSend(t, w, "open/a", "last")
	for name, viewer := range viewers {
		got := map[string][]string{"live": read(t, live[name], "last"), "fetched": upTo(fetched(t, server, viewer, "open/a"), "last")}
		if !way.isForeign {
			got["replayed"] = read(t, server.Subscribe(t, viewer, withQuery("open/a", "rewind", "1000")), "last")
		}
		for how, data := range got {
			if !slices.Equal(data, want[name]) {
				t.Errorf("%s, %s: %v, not %v", name, how, data, want[name])
			}
		}
	}
}

func endsWithTheRight(t *testing.T, way way, w *world, server *pbtest.Server) {
	ann := server.Subscribe(t, w.ann, "room/42", "open/fence", "@denied")
	bob := server.Subscribe(t, w.bob, "room/42")
	mustSend(t, w, "room/42", "before")
	ann.Expect(t, "room/42", `"before"`)

	member, err := w.FindFirstRecordByData("room_members", "user", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Delete(member); err != nil {
		t.Fatal(err)
	}
	for i := range 20 { // the rules may not have been asked again yet
		mustSend(t, w, "room/42", fmt.Sprint("after ", i))
	}
	mustSend(t, w, "room/42", "last")
	if got := read(t, bob, "last"); len(got) != 21 {
		t.Errorf("who has the right still got %v", got)
	}
	if !way.isForeign {
		if event := ann.Next(t); event.Type != notify.DeniedTopic || !strings.Contains(event.Data, "room/42") {
			t.Errorf("got %s %s", event.Type, event.Data)
		}
	}
	pbtest.WaitFor(t, "the subscription ends", func() bool {
		client, err := w.SubscriptionsBroker().ClientById(ann.ID)
		return err == nil && !client.HasSubscription("room/42")
	})
	mustSend(t, w, "open/fence", 1)
	ann.Expect(t, "open/fence", "1") // and nothing before it

	for _, key := range []string{"room/42", withQuery("room/42", "rewind", "1000")} {
		if status, answer := server.Connect(t).Try(t, w.ann, key); status != http.StatusForbidden {
			t.Errorf("%s: %d %v", key, status, answer)
		}
	}
	if status, text := server.DoText(t, "GET", historyPath("room/42", "", 1000), pbtest.Token(t, w.ann), nil); status != http.StatusForbidden {
		t.Errorf("fetched: %d %s", status, text)
	}
}

func endsWithTheSignOut(t *testing.T, _ way, w *world, server *pbtest.Server) {
	ann := server.Subscribe(t, w.ann, "room/42", "open/fence")
	ann.Set(t, nil, "open/fence")
	for _, to := range []notify.Message{
		{Topic: "room/42", Data: 1},
		{Topic: "open/fence", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}},
	} {
		if report := send(t, w, to); report.Matched != 0 {
			t.Errorf("report %+v", report)
		}
	}
	mustSend(t, w, "open/fence", 2)
	ann.Expect(t, "open/fence", "2")
}

func endsWithTheToken(t *testing.T, _ way, w *world, server *pbtest.Server) {
	client := server.Connect(t)
	token, err := w.ann.NewStaticAuthToken(3 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	status, answer := server.Do(t, "POST", "/api/realtime", token, map[string]any{"clientId": client.ID, "subscriptions": []string{"room/42", "open/a"}})
	if status != http.StatusNoContent {
		t.Fatalf("%d %v", status, answer)
	}
	messages := []notify.Message{
		{Topic: "room/42", Data: 1},
		{Topic: "open/a", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}},
	}
	for _, message := range messages {
		if report := send(t, w, message); report.Queued != 1 {
			t.Fatalf("report %+v", report)
		}
		client.Expect(t, message.Topic, "1")
	}
	for _, message := range messages {
		pbtest.WaitFor(t, "the token expires", func() bool { return send(t, w, message).Matched == 0 })
	}
}

func bounded(t *testing.T, _ way, w *world, server *pbtest.Server) {
	id := stall(t, server, nil, "flood")
	sendUntilDropped(t, w, "flood", func() {})
	waitGone(t, w, id)
}

func cutWhenStuck(t *testing.T, _ way, w *world, server *pbtest.Server) {
	id := stall(t, server, nil, "flood")
	client, err := w.SubscriptionsBroker().ClientById(id)
	if err != nil {
		t.Fatal(err)
	}
	own, _ := engine(w).Own(client)
	fill(t, server, notify.Message{Topic: "flood", Data: strings.Repeat("x", 100<<10)})
	<-own.Done()
	awaitReason(t, w, notify.DisconnectTooSlow)
	waitGone(t, w, id)
}

func tellsThatItIsAlive(t *testing.T, _ way, w *world, server *pbtest.Server) {
	client := server.Subscribe(t, nil, notify.BeatTopic)
	client.Expect(t, notify.BeatTopic, `{"every":25}`)
}

func counted(t *testing.T, _ way, w *world, server *pbtest.Server) {
	client := server.Subscribe(t, w.ann, "room/42", "open/a")
	for i := range 3 {
		mustSend(t, w, "room/42", i)
		client.Expect(t, "room/42", fmt.Sprint(i))
	}
	stats := engine(w).Stats()
	if stats.Connections != 1 || stats.Subscriptions != 2 || stats.Topics != 2 || stats.Users != 1 || stats.Deliveries != 3 || stats.Dropped != 0 || stats.QueuedMessages != 0 {
		t.Errorf("stats %+v", stats)
	}
	connections, err := engine(w).Connections(notify.ConnectionFilter{User: pbtest.Ref(w.ann), Topic: "room/42"})
	if err != nil || len(connections) != 1 || connections[0].ID != client.ID || connections[0].IP == "" || connections[0].Connected.IsZero() {
		t.Errorf("connections %+v %v", connections, err)
	}
	client.Close(t)
	awaitReason(t, w, notify.DisconnectLeft)
	stats = engine(w).Stats()
	if stats.Connections != 0 || stats.Subscriptions != 0 || stats.Users != 0 || len(stats.Disconnects) != 1 || stats.Bytes == 0 {
		t.Errorf("stats %+v", stats)
	}
}
