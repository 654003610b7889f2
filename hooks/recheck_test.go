package hooks_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// newRooms is a world with channels whose rules look at other records in every way,
// in all of which Ann and Bob may listen to …/42.
func newRooms(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	addMembers(t, w)
	teams := addCollection(t, w, "teams", &core.TextField{Name: "name"})
	pbtest.AddField(t, w, "users", &core.TextField{Name: "role"})
	pbtest.AddField(t, w, "users", &core.RelationField{Name: "team", CollectionId: teams.Id})
	view := core.NewViewCollection("member_view")
	view.ViewQuery = `SELECT id, room, user AS who FROM room_members WHERE muted = FALSE`
	if err := w.Save(view); err != nil {
		t.Fatal(err)
	}
	team := addRecord(t, w, "teams", map[string]any{"name": "42"})
	for _, user := range []**core.Record{&w.ann, &w.bob} {
		fresh, err := w.FindRecordById("users", (*user).Id)
		if err != nil {
			t.Fatal(err)
		}
		fresh.Set("role", "staff")
		fresh.Set("team", team.Id)
		fresh.SetVerified(true)
		save(t, w, fresh)
		*user = fresh
		addMember(t, w, "42", fresh)
	}

	for pattern, rule := range map[string]string{
		"join/{room}":     memberRule,
		"or/{room}":       `@request.auth.role = "none" || (` + memberRule + `)`,
		"alias/{room}":    strings.ReplaceAll(memberRule, "room_members", "room_members:m"),
		"muted/{room}":    memberRule + ` && @collection.room_members.muted ?= false`,
		"back/{room}":     `@request.auth.room_members_via_user.room ?= @request.query.room`,
		"relation/{room}": `@request.auth.team.name = @request.query.room`,
		"view/{room}":     strings.NewReplacer("room_members", "member_view", ".user", ".who").Replace(memberRule),
		"verified/{room}": `@request.auth.verified = true`,
		"role/{room}":     `@request.auth.role = "staff"`,
		"signed-in":       `@request.auth.id != ""`,
		"nobody-else":     `@collection.room_members.user ?!= "" && @collection.room_members.room ?= "42"`,
	} {
		addChannel(t, w, map[string]any{"pattern": pattern, "subscribeRule": rule})
	}
	return w
}

var memberTopics = []string{"join/42", "or/42", "alias/42", "muted/42", "back/42", "view/42"}

// TestThrownOut changes rights in every way and checks that what is sent right
// after the change does not reach who may not have it any more, and does reach
// the others.
func TestThrownOut(t *testing.T) {
	other := []string{"relation/42", "verified/42", "role/42", "signed-in"}
	all := slices.Concat(memberTopics, other)
	membership := func(t *testing.T, w *world, user *core.Record) *core.Record {
		t.Helper()
		record, err := w.FindFirstRecordByData("room_members", "user", user.Id)
		if err != nil {
			t.Fatal(err)
		}
		return record
	}
	update := func(t *testing.T, app core.App, record *core.Record, name string, value any) {
		t.Helper()
		fresh, err := app.FindRecordById(record.Collection(), record.Id)
		if err != nil {
			t.Fatal(err)
		}
		fresh.Set(name, value)
		save(t, app, fresh)
	}
	remove := func(t *testing.T, app core.App, record *core.Record) {
		t.Helper()
		if err := app.Delete(record); err != nil {
			t.Fatal(err)
		}
	}

	for _, test := range []struct {
		name   string
		change func(t *testing.T, w *world, server *pbtest.Server)
		denied []string // to Ann
	}{
		{"membership deleted", func(t *testing.T, w *world, _ *pbtest.Server) {
			remove(t, w, membership(t, w, w.ann))
		}, memberTopics},
		{"membership deleted over HTTP", func(t *testing.T, w *world, server *pbtest.Server) {
			status, answer := server.Do(t, "DELETE", "/api/collections/room_members/records/"+membership(t, w, w.ann).Id, pbtest.Token(t, w.root), nil)
			if status != 204 {
				t.Fatalf("%d %v", status, answer)
			}
		}, memberTopics},
		{"membership deleted in a transaction", func(t *testing.T, w *world, _ *pbtest.Server) {
			record := membership(t, w, w.ann)
			err := w.RunInTransaction(func(tx core.App) error { return tx.Delete(record) })
			if err != nil {
				t.Fatal(err)
			}
		}, memberTopics},
		{"moved to another room", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, membership(t, w, w.ann), "room", "43")
		}, memberTopics},
		{"membership given away", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, membership(t, w, w.ann), "user", w.bob.Id)
		}, memberTopics},
		{"muted", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, membership(t, w, w.ann), "muted", true)
		}, []string{"muted/42", "view/42"}},
		{"another team", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, w.ann, "team", "")
		}, []string{"relation/42"}},
		{"not verified", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, w.ann, "verified", false)
		}, []string{"verified/42"}},
		{"another role", func(t *testing.T, w *world, server *pbtest.Server) {
			status, answer := server.Do(t, "PATCH", "/api/collections/users/records/"+w.ann.Id, pbtest.Token(t, w.root), map[string]any{"role": "guest"})
			if status != 200 {
				t.Fatalf("%d %v", status, answer)
			}
		}, []string{"role/42"}},
		{"password changed", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, w.ann, "password", "another-one-123")
		}, all},
		{"user deleted", func(t *testing.T, w *world, _ *pbtest.Server) {
			remove(t, w, w.ann)
		}, all},
		{"rule changed", func(t *testing.T, w *world, _ *pbtest.Server) {
			channel, err := w.FindFirstRecordByData("notify_channels", "pattern", "role/{room}")
			if err != nil {
				t.Fatal(err)
			}
			update(t, w, channel, "subscribeRule", `@request.auth.id = "`+w.bob.Id+`"`)
		}, []string{"role/42"}},
		{"pattern changed", func(t *testing.T, w *world, _ *pbtest.Server) {
			channel, err := w.FindFirstRecordByData("notify_channels", "pattern", "role/{room}")
			if err != nil {
				t.Fatal(err)
			}
			addChannel(t, w, map[string]any{"pattern": "role/42", "subscribeRule": `@request.auth.id = "` + w.bob.Id + `"`})
			update(t, w, channel, "pattern", "roles/{room}")
		}, []string{"role/42"}},
		{"more specific channel", func(t *testing.T, w *world, _ *pbtest.Server) {
			addChannel(t, w, map[string]any{"pattern": "role/42", "subscribeRule": `@request.auth.id = "` + w.bob.Id + `"`})
		}, []string{"role/42"}},
		{"raw SQL and recheck of the topic", func(t *testing.T, w *world, server *pbtest.Server) {
			if _, err := w.DB().NewQuery("DELETE FROM room_members WHERE user = '" + w.ann.Id + "'").Execute(); err != nil {
				t.Fatal(err)
			}
			status, answer := server.Do(t, "POST", "/api/notify/recheck", pbtest.Token(t, w.root), `{"topic":"join/42"}`)
			if ended, _ := at(answer, "ended"); status != 200 || ended != float64(len(memberTopics)) {
				t.Fatalf("%d %v", status, answer)
			}
		}, memberTopics},
		{"raw SQL and recheck of the user", func(t *testing.T, w *world, server *pbtest.Server) {
			if _, err := w.DB().NewQuery("UPDATE users SET verified = FALSE").Execute(); err != nil {
				t.Fatal(err)
			}
			status, answer := server.Do(t, "POST", "/api/notify/recheck", pbtest.Token(t, w.root), `{"user":"users:`+w.ann.Id+`"}`)
			if ended, _ := at(answer, "ended"); status != 200 || ended != 1.0 {
				t.Fatalf("%d %v", status, answer)
			}
		}, []string{"verified/42"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newRooms(t)
			server := pbtest.Serve(t, w)
			keys := slices.Concat(all, []string{"fence", "@denied"})
			ann := server.Subscribe(t, w.ann, keys...)
			bob := server.Subscribe(t, w.bob, keys...)

			test.change(t, w, server)
			for _, topic := range all {
				mustSend(t, w, topic, "after")
			}
			mustSend(t, w, "fence", "over")

			for _, topic := range all {
				bob.Expect(t, topic, `"after"`)
			}
			left := slices.Clone(test.denied)
			messages := map[string]bool{}
			for len(left) > 0 || !messages["fence"] {
				event := ann.Next(t)
				if event.Type != "@denied" {
					messages[event.Type] = true
					continue
				}
				topic, _ := at(decoded(t, event.Data), "topic")
				i := slices.Index(left, fmt.Sprint(topic))
				if i < 0 || event.Data != denied(fmt.Sprint(topic)) {
					t.Fatalf("got %s", event.Data)
				}
				left = slices.Delete(left, i, i+1)
			}
			for _, topic := range all {
				if messages[topic] == slices.Contains(test.denied, topic) {
					t.Errorf("%s: got a message: %v", topic, messages[topic])
				}
			}
		})
	}
}

// TestSignOut: a guest's subscribe for the connection of a user ends what only the
// user may have.
func TestSignOut(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "join/42", "open", "@denied")
	if status, answer := client.Try(t, nil, "join/42", "open", "@denied"); status != http.StatusNoContent {
		t.Fatalf("%d %v", status, answer)
	}
	client.Expect(t, "@denied", denied("join/42"))
	mustSend(t, w, "join/42", 1)
	if _, err := notify.New(w, notify.Config{}).Send(t.Context(), notify.Message{Topic: "open", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}); err != nil {
		t.Fatal(err)
	}
	mustSend(t, w, "open", 2)
	client.Expect(t, "open", "2")

	// and in again, as somebody else
	client.Set(t, w.bob, "join/42", "open", "@denied")
	mustSend(t, w, "join/42", 3)
	client.Expect(t, "join/42", "3")

	// one user's connection is not another's to have, as in PocketBase
	if status, _ := client.Try(t, w.ann, "open"); status != http.StatusForbidden {
		t.Errorf("status %d", status)
	}
	mustSend(t, w, "join/42", 4)
	client.Expect(t, "join/42", "4")
	for _, body := range []string{``, `{`, `{"clientId":"nope"}`, `{"clientId":7}`, `[]`} {
		if status, answer := server.DoText(t, "POST", "/api/realtime", "", body); status != 400 && status != 404 {
			t.Errorf("%s: %d %v", body, status, answer)
		}
	}
}

// TestPartlyDenied: among allowed topics a denied one breaks nothing.
func TestPartlyDenied(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "join/42", "@denied")
	options := "?options=%7B%22query%22%3A%7B%22a%22%3A%22b%22%7D%7D"
	client.Set(t, w.ann, "join/42", "@denied", "join/43", "join/43"+options, "role/42", "nothing/here")
	client.Expect(t, "@denied", denied("join/43"))
	mustSend(t, w, "join/43", 1)
	mustSend(t, w, "role/42", 2)
	mustSend(t, w, "join/42", 3)
	client.Expect(t, "role/42", "2")
	client.Expect(t, "join/42", "3")

	// all of what is new is denied: all stays as it was
	if status, answer := client.Try(t, w.ann, "join/43", "join/44"); status != 403 {
		t.Errorf("%d %v", status, answer)
	}
	mustSend(t, w, "role/42", 4)
	client.Expect(t, "role/42", "4")

	// nothing new: that is no refusal
	client.Set(t, w.ann, "role/42")
	mustSend(t, w, "join/42", 5)
	mustSend(t, w, "role/42", 6)
	client.Expect(t, "role/42", "6")

	// who is not signed in hears the same of what there is and of what there is not
	_, locked := server.Connect(t).Try(t, nil, "join/42")
	_, unknown := server.Connect(t).Try(t, nil, "join/99")
	if a, b := fmt.Sprint(locked), strings.ReplaceAll(fmt.Sprint(unknown), "99", "42"); a != b {
		t.Errorf("%s\n%s", a, b)
	}
}

// TestHeldMessages: who may still listen after a change that is under way, or that
// comes to nothing, misses nothing, and who may not gets nothing.
func TestHeldMessages(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	ann := server.Subscribe(t, w.ann, "join/42", "@denied")
	bob := server.Subscribe(t, w.bob, "join/42", "@denied")
	record, err := w.FindFirstRecordByData("room_members", "user", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	rollback := errors.New("rollback")
	for _, result := range []error{rollback, nil} {
		err := w.RunInTransaction(func(tx core.App) error {
			if err := tx.Delete(record); err != nil {
				return err
			}
			mustSend(t, w, "join/42", "within")
			bob.Expect(t, "join/42", `"within"`) // nobody else has to wait
			return result
		})
		if err != result {
			t.Fatal(err)
		}
		mustSend(t, w, "join/42", "after")
		bob.Expect(t, "join/42", `"after"`)
		if result == rollback {
			ann.Expect(t, "join/42", `"within"`)
			ann.Expect(t, "join/42", `"after"`)
		}
	}
	ann.Expect(t, "@denied", denied("join/42"))

	// a handler that panics
	w.OnRecordUpdateExecute("room_members").BindFunc(func(e *core.RecordEvent) error {
		if e.Record.GetString("room") == "panic" {
			panic("x")
		}
		return e.Next()
	})
	bobs, err := w.FindFirstRecordByData("room_members", "user", w.bob.Id)
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() { _ = recover() }()
		bobs.Set("room", "panic")
		_ = w.Save(bobs)
	}()
	mustSend(t, w, "join/42", "still here")
	bob.Expect(t, "join/42", `"still here"`)
}

// TestDatabaseFails: a database that does not answer is no reason to deny anybody anything.
// Connections of which nobody can tell whether they may listen are ended, and come back.
func TestDatabaseFails(t *testing.T) {
	w := newRooms(t)
	addChannel(t, w, map[string]any{"pattern": "members/only", "subscribeRule": `@request.auth.id != ""`})
	server := pbtest.Serve(t, w)
	ann := server.Subscribe(t, w.ann, "members/only", "@denied")
	if _, err := w.NonconcurrentDB().NewQuery("ALTER TABLE users RENAME TO gone").Execute(); err != nil {
		t.Fatal(err)
	}
	if _, err := engine(w).Recheck(notify.RecheckFilter{}); err != nil {
		t.Fatal(err)
	}
	if events := ann.ExpectEnd(t); len(events) > 0 {
		t.Errorf("it got %v", events)
	}
	awaitReason(t, w, notify.ReasonRuleFailed)
	if _, err := w.NonconcurrentDB().NewQuery("ALTER TABLE gone RENAME TO users").Execute(); err != nil {
		t.Fatal(err)
	}
	again := server.Subscribe(t, w.ann, "members/only")
	mustSend(t, w, "members/only", 1)
	again.Expect(t, "members/only", "1")
}

// TestManyBytes: who reads loses nothing because much comes at once, or while it is held;
// what may wait is bounded all the same.
func TestManyBytes(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		addMembers(t, w)
		member := addMember(t, w, "42", w.ann)
		addChannel(t, w, map[string]any{"pattern": "join/{room}", "subscribeRule": memberRule})
		server := serve(t, w)
		ann := server.Subscribe(t, w.ann, "join/42")
		expect := func(count, size int) {
			t.Helper()
			for i := range count {
				if event := ann.Next(t); len(event.Data) != size+2 {
					t.Fatalf("message %d has %d bytes", i, len(event.Data))
				}
			}
		}
		const large = 200 << 10
		messages := make([]string, 20)
		for i := range messages {
			messages[i] = fmt.Sprintf(`{"topic":"join/42","data":"%s"}`, strings.Repeat("x", large))
		}
		if status, answer := server.Do(t, "POST", "/api/notify/batch", pbtest.Token(t, w.root), `{"messages":[`+strings.Join(messages, ",")+`]}`); status != http.StatusOK {
			t.Fatal(status, answer)
		}
		expect(len(messages), large)

		const many, size = 300, 30 << 10 // 9 MB
		if err := w.RunInTransaction(func(tx core.App) error {
			member.Set("room", " 42 ")
			if err := tx.Save(member); err != nil {
				return err
			}
			member.Set("room", "42")
			if err := tx.Save(member); err != nil {
				return err
			}
			for range many {
				if report := send(t, w, notify.Message{Topic: "join/42", Data: strings.Repeat("y", size)}); report.Queued != 1 {
					t.Fatalf("report %+v", report)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for range 5 { // while those are written
			mustSend(t, w, "join/42", strings.Repeat("z", size))
		}
		expect(many+5, size)

		// without an end it is not
		if err := w.RunInTransaction(func(tx core.App) error {
			if err := tx.Delete(member); err != nil {
				return err
			}
			for i := range 40 << 20 / (250 << 10) {
				if report := send(t, w, notify.Message{Topic: "join/42", Data: strings.Repeat("y", 250<<10)}); report.Queued == 0 {
					if i < 16<<20/(251<<10) {
						t.Errorf("closed after %d messages", i)
					}
					return nil
				}
			}
			t.Error("40 MiB wait")
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		awaitReason(t, w, notify.ReasonQueueFull)
	})
}

// TestChangeOfMany: a transaction with many changes, of which each concerns
// everybody, checks everybody once.
func TestChangeOfMany(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	ann := server.Subscribe(t, w.ann, "view/42", "@denied")
	queries := pbtest.CountQueries(t, w)
	var before int64
	err := w.RunInTransaction(func(tx core.App) error {
		for i := range 300 {
			addMember(t, tx, strconv.Itoa(1000+i), w.bob)
		}
		before = queries()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	mustSend(t, w, "view/42", 1)
	ann.Expect(t, "view/42", "1")
	if got := queries() - before; got != 2 { // for the user and the rule
		t.Errorf("%d queries", got)
	}
}

// TestOnlyAffectedAreChecked counts the queries of changes while many listen.
func TestOnlyAffectedAreChecked(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	var others []*pbtest.Subscriber
	for i := range 40 {
		user := pbtest.AddAuth(t, w, "users", fmt.Sprintf("u%d@x.com", i), nil)
		addMember(t, w, "42", user)
		others = append(others, server.Subscribe(t, user, "join/42", "muted/42"))
	}
	ann := server.Subscribe(t, w.ann, "join/42", "@denied")
	record, err := w.FindFirstRecordByData("room_members", "user", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	queries := pbtest.CountQueries(t, w)
	if err := w.Delete(record); err != nil {
		t.Fatal(err)
	}
	ann.Expect(t, "@denied", denied("join/42"))
	if got := queries(); got > 20 {
		t.Errorf("%d queries", got)
	}
	mustSend(t, w, "join/42", 1)
	for _, other := range others {
		other.Expect(t, "join/42", "1")
	}
}

// TestChangeOfFreshRecord: records that the same code has created, or changed
// before, lead to those whom they concern, too.
func TestChangeOfFreshRecord(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	channel := addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule})
	server := pbtest.Serve(t, w)
	member := addMember(t, w, "1", w.ann)
	check := func(what, topic string, change func() error) {
		t.Helper()
		ann := server.Subscribe(t, w.ann, topic, "@denied", "fence")
		if err := change(); err != nil {
			t.Fatal(err)
		}
		mustSend(t, w, topic, what)
		ann.Expect(t, "@denied", denied(topic))
		mustSend(t, w, "fence", what)
		ann.Expect(t, "fence", fmt.Sprintf("%q", what))
		ann.Close(t)
	}
	moveTo := func(room string) func() error {
		return func() error {
			member.Set("room", room)
			return w.Save(member)
		}
	}
	check("moved", "chat/1", moveTo("2"))
	check("moved again", "chat/2", moveTo("3"))
	check("deleted", "chat/3", func() error { return w.Delete(member) })

	addMember(t, w, "4", w.ann)
	check("another pattern", "chat/4", func() error {
		channel.Set("pattern", "{any}/{room}")
		channel.Set("subscribeRule", "")
		return w.Save(channel)
	})
}

// TestNoLeak changes memberships while others send without a pause: no message
// that was sent after a change was committed reaches one who lost a right by it.
func TestNoLeak(t *testing.T) {
	t.Run("HTTP/1.1", func(t *testing.T) { testNoLeak(t, pbtest.Serve, false) })
	t.Run("HTTP/2", func(t *testing.T) { testNoLeak(t, pbtest.ServeHTTP2, false) })
	t.Run("with handlers of each message", func(t *testing.T) { testNoLeak(t, pbtest.Serve, true) })
}

func testNoLeak(t *testing.T, serve func(testing.TB, core.App) *pbtest.Server, hooked bool) {
	const clients, rounds, senders = 6, 12, 3
	w := newRooms(t)
	server := serve(t, w)
	if hooked {
		w.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error { return e.Next() })
	}
	n := notify.New(w, notify.Config{})

	var next atomic.Int64 // number of the next message
	stop := make(chan struct{})
	var sending, listening sync.WaitGroup
	pace := make(chan struct{}, senders) // so that the queues do not run over
	for range senders {
		sending.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-pace:
				}
				number := next.Add(1)
				for _, topic := range []string{"join/42", "back/42"} {
					if _, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: number}); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	sending.Go(func() {
		for {
			select {
			case <-stop:
				return
			case pace <- struct{}{}:
			}
		}
	})

	for i := range clients {
		listening.Go(func() {
			user := pbtest.AddAuth(t, w, "users", fmt.Sprintf("u%d@x.com", i), nil)
			fence := "fence/" + user.Id
			client := server.Subscribe(t, user, fence, "@denied")
			for round := range rounds {
				member := addMember(t, w, "42", user)
				keys := []string{"join/42", "back/42", fence, "@denied"}
				leave := func() {
					var err error
					if round%2 == 0 {
						err = w.Delete(member)
					} else {
						err = w.RunInTransaction(func(tx core.App) error { return tx.Delete(member) })
					}
					if err != nil {
						t.Error(err)
					}
				}
				if round%3 == 2 { // both at once
					var leaving sync.WaitGroup
					leaving.Go(leave)
					if status, answer := client.Try(t, user, keys...); status != http.StatusNoContent && status != http.StatusForbidden {
						t.Errorf("subscribe: %d %v", status, answer)
					}
					leaving.Wait()
				} else {
					client.Set(t, user, keys...)
					for client.Next(t).Type != "join/42" {
					}
					leave()
				}
				last := next.Load()
				pbtest.WaitFor(t, "more messages", func() bool { return next.Load() >= last+20 })
				mustSend(t, w, fence, round)
				for {
					event := client.Next(t)
					if event.Type == fence {
						break
					}
					if event.Type == "@denied" {
						continue
					}
					if number, _ := strconv.ParseInt(event.Data, 10, 64); number > last {
						t.Errorf("round %d: got message %d of %s, the last one before the change was %d", round, number, event.Type, last)
					}
				}
			}
		})
	}
	listening.Wait()
	close(stop)
	sending.Wait()
}

// TestRecheckRoute: its answers.
func TestRecheckRoute(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	server.Subscribe(t, w.ann, "join/42", "role/42", "@inbox")
	server.Subscribe(t, w.bob, "join/42")
	for _, test := range []struct {
		who    *core.Record
		body   string
		status int
		want   string
	}{
		{w.root, ``, 200, "checked=4"},
		{w.root, `{}`, 200, "ended=0"},
		{w.root, `{"topic":"role/42"}`, 200, "checked=3"},
		{w.root, `{"topic":"nope"}`, 200, "checked=0"},
		{w.root, `{"user":"users:` + w.bob.Id + `"}`, 200, "checked=1"},
		{w.root, `{"user":"x"}`, 400, "data.user.code=validation_invalid_audience"},
		{w.root, `{"users":"x"}`, 400, "data.users.code=validation_unknown_field"},
		{w.root, `[`, 400, "status=400"},
		{w.ann, `{}`, 403, "status=403"},
		{nil, `{}`, 401, "status=401"},
	} {
		status, answer := server.Do(t, "POST", "/api/notify/recheck", pbtest.Token(t, test.who), test.body)
		path, want, _ := strings.Cut(test.want, "=")
		if got, _ := at(answer, path); status != test.status || fmt.Sprint(got) != want {
			t.Errorf("%q: %d %v, want %d %s", test.body, status, answer, test.status, test.want)
		}
	}
}

// TestNobodyOverlooked makes random rules and random changes of what they look at:
// after each, a check of everybody finds nobody whom the check of those who are
// affected has overlooked.
func TestNobodyOverlooked(t *testing.T) {
	const rules, changes = 10, 10
	t.Parallel()
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	pick := func(options ...string) string { return options[random.IntN(len(options))] }

	w := newWorld(t)
	addMembers(t, w)
	users := mustFind(t, w, "users")
	pbtest.AddField(t, w, "room_members", &core.RelationField{Name: "guests", CollectionId: users.Id, MaxSelect: 9})
	pbtest.AddField(t, w, "users", &core.TextField{Name: "role"})
	server := pbtest.Serve(t, w)
	eve := pbtest.AddAuth(t, w, "users", "eve@x.com", nil)
	people := []*core.Record{w.ann, w.bob, eve}
	person := func() string { return pick(w.ann.Id, w.bob.Id, eve.Id, "") }

	condition := func() string {
		join := pick("@collection.room_members", "@collection.room_members", "@collection.room_members:x")
		return strings.ReplaceAll(pick(
			`M.room ?= @request.query.room`, `@request.query.room ?= M.room`, `M.room = @request.query.room`, `M.room ?!= @request.query.room`,
			`M.user ?= @request.auth.id`, `@request.auth.id ?= M.user`, `M.user = @request.auth.id`, `M.user ?!= @request.auth.id`,
			`M.guests ?= @request.auth.id`, `M.guests.id ?= @request.auth.id`, `M.user.role ?= "a"`, `M.user ?= @request.query.who`,
			`M.muted ?= false`, `M.muted = true`, `M.id ?= ""`, `M.room ?~ @request.query.room`, `M.room:lower ?= @request.query.room`,
			`@request.auth.role = "a"`, `@request.auth.verified = true`, `@request.query.who = @request.auth.id`,
			`@request.auth.room_members_via_user.room ?= @request.query.room`, `@request.auth.room_members_via_guests.muted ?= false`,
		), "M", join)
	}
	var rule func(depth int) string
	rule = func(depth int) string {
		if depth == 0 {
			return condition()
		}
		text := rule(depth - 1)
		for range random.IntN(3) {
			text += pick(" && ", " && ", " || ") + rule(depth-1)
		}
		return "(" + text + ")"
	}
	change := func() error {
		var record *core.Record
		records, err := w.FindAllRecords("room_members")
		if err != nil {
			return err
		}
		isNew := len(records) == 0 || random.IntN(3) == 0
		switch {
		case random.IntN(4) == 0:
			if record, err = w.FindRecordById("users", people[random.IntN(len(people))].Id); err != nil {
				return err
			}
			record.Set("role", pick("a", "b"))
			record.SetVerified(random.IntN(2) == 0)
			return w.Save(record)
		case isNew:
			record = core.NewRecord(mustFind(t, w, "room_members"))
		default:
			record = records[random.IntN(len(records))]
			if random.IntN(3) == 0 {
				return w.Delete(record)
			}
		}
		for _, set := range []func(){
			func() { record.Set("room", pick("1", "2", "")) },
			func() { record.Set("user", person()) },
			func() { record.Set("guests", []string{person(), person()}) },
			func() { record.Set("muted", random.IntN(2) == 0) },
		} {
			if isNew || random.IntN(2) == 0 {
				set()
			}
		}
		return w.Save(record)
	}

	type listener struct {
		*pbtest.Subscriber
		auth *core.Record
		keys []string
	}
	var listeners []listener
	for i, user := range append(people, nil) {
		fence := fmt.Sprintf("fence/%d", i)
		keys := []string{fence}
		for _, room := range []string{"1", "2"} {
			for _, who := range people {
				keys = append(keys, "c/"+room+"/"+who.Id)
			}
		}
		listeners = append(listeners, listener{server.Subscribe(t, user, fence), user, keys})
	}
	checkAll := func(rule string) {
		t.Helper()
		for _, l := range listeners { // who is held hears of it when it was checked
			mustSend(t, w, l.keys[0], 1)
			l.Expect(t, l.keys[0], "1")
		}
		report, err := notify.New(w, notify.Config{}).Recheck(notify.RecheckFilter{})
		if err != nil || report.Ended > 0 {
			t.Fatalf("%d overlooked by %s (%v)", report.Ended, rule, err)
		}
	}
	ended := 0
	for range rules {
		channel := core.NewRecord(mustFind(t, w, "notify_channels"))
		text := rule(2)
		channel.Load(map[string]any{"pattern": "c/{room}/{who}", "subscribeRule": text})
		if err := w.Save(channel); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		for range changes {
			var subscribing sync.WaitGroup
			for _, l := range listeners {
				subscribing.Go(func() {
					if status, answer := l.Try(t, l.auth, l.keys...); status != http.StatusNoContent && status != http.StatusForbidden {
						t.Errorf("subscribe: %d %v", status, answer)
					}
				})
			}
			subscribing.Wait()
			checkAll(text)
			count := func() (count int) {
				for _, l := range listeners {
					client, err := w.SubscriptionsBroker().ClientById(l.ID)
					if err != nil {
						t.Fatal(err)
					}
					count += len(client.Subscriptions())
				}
				return count
			}
			before := count()
			if err := change(); err != nil {
				t.Fatal(err)
			}
			checkAll(text)
			ended += before - count()
		}
		if err := w.Delete(channel); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d subscriptions ended", ended)
}
