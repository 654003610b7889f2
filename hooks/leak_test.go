package hooks_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/internal/seed"
	"herald/notify"
)

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
	random := rand.New(rand.NewPCG(seed.Of(t), 0))
	pick := func(options ...string) string { return options[random.IntN(len(options))] }

	w := newWorld(t)
	addMembers(t, w)
	users := mustFind(t, w, "users")
	pbtest.AddField(t, w, "room_members", &core.RelationField{Name: "guests", CollectionId: users.Id, MaxSelect: 9})
	pbtest.AddField(t, w, "users", &core.TextField{Name: "role"})
	view := core.NewViewCollection("member_view")
	view.ViewQuery = `SELECT id, room, user AS who FROM room_members WHERE muted = FALSE`
	if err := w.Save(view); err != nil {
		t.Fatal(err)
	}
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
			`M.guests:length ?> 1`, `M.guests:length = 2`, `M.guests:each ?= @request.auth.id`, `M.guests:each = @request.auth.id`,
			`M.user.role = "a"`, `M.user.room_members_via_user.muted ?= false`, `M.guests.room_members_via_user.room = @request.query.room`,
			`strftime("%d", M.room) ?= "01"`, `strftime("%d", M.room) = ""`, `geoDistance(M.muted, 1, 1, 1) ?< 1`, `geoDistance(M.muted, 1, 1, 1) < 200`,
			`@collection.member_view.who ?= @request.auth.id`, `@collection.member_view.room ?= @request.query.room`, `@collection.member_view.room = @request.query.room`,
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
