package hooks_test

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

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
	awaitReason(t, w, notify.DisconnectRuleFailed)
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

		const many, size = 100, 30 << 10 // 3 MB
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
		awaitReason(t, w, notify.DisconnectQueueFull)
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
