package hooks_test

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// newMemberships is a world with a channel whose rule joins count memberships, in
// 1,000 rooms, and the index that such a rule wants. Ann is in room 42.
func newMemberships(t testing.TB, count int) *world {
	t.Helper()
	w := newWorld(t)
	addMembers(t, w)
	members := mustFind(t, w, "room_members")
	members.AddIndex("idx_room_members", false, "user, room", "")
	if err := w.Save(members); err != nil {
		t.Fatal(err)
	}
	_, err := w.DB().NewQuery(fmt.Sprintf(`
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO room_members (id, room, user) SELECT 'm' || i, i %% 1000, 'user' || (i / 100) FROM n`, count)).Execute()
	if err != nil {
		t.Fatal(err)
	}
	addMember(t, w, "42", w.ann)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule})
	return w
}

// TestJoinRulePlan: the rule of a private room finds a membership by its index.
func TestJoinRulePlan(t *testing.T) {
	w := newMemberships(t, 10_000)
	server := pbtest.Serve(t, w)
	client := server.Connect(t)
	db := w.ConcurrentDB().(*dbx.DB)
	var mu sync.Mutex
	var queries []string
	db.QueryLogFunc = func(_ context.Context, _ time.Duration, query string, _ *sql.Rows, _ error) {
		mu.Lock()
		defer mu.Unlock()
		if strings.Contains(query, "notify_channels") {
			queries = append(queries, query)
		}
	}
	client.Set(t, w.ann, "chat/42")
	db.QueryLogFunc = nil
	if len(queries) != 1 {
		t.Fatalf("%d queries of the rule: %q", len(queries), queries)
	}

	plan := []struct {
		Detail string `db:"detail"`
	}{}
	if err := w.DB().NewQuery("EXPLAIN QUERY PLAN " + queries[0]).All(&plan); err != nil {
		t.Fatal(err)
	}
	t.Log(queries[0])
	usesIndex := false
	for _, step := range plan {
		t.Log(step.Detail)
		usesIndex = usesIndex || strings.Contains(step.Detail, "idx_room_members (user=? AND room=?)")
		if strings.HasPrefix(step.Detail, "SCAN") {
			t.Error("reads a whole table")
		}
	}
	if !usesIndex {
		t.Error("does not use the index")
	}
}

// BenchmarkSubscribe measures a subscribe over HTTP: to a topic without a channel,
// and to one whose rule joins 100,000 memberships. x-open is the time of the latter
// divided by that of the former.
func BenchmarkSubscribe(b *testing.B) {
	w := newMemberships(b, 100_000)
	server := pbtest.Serve(b, w)
	client := server.Connect(b)
	var open, ruled time.Duration
	for b.Loop() {
		start := time.Now()
		client.Set(b, w.ann, "open")
		middle := time.Now()
		client.Set(b, w.ann, "chat/42")
		open += middle.Sub(start)
		ruled += time.Since(middle)
	}
	b.ReportMetric(float64(open.Nanoseconds())/float64(b.N), "ns/open")
	b.ReportMetric(float64(ruled.Nanoseconds())/float64(b.N), "ns/ruled")
	b.ReportMetric(float64(ruled)/float64(open), "x-open")
}

// BenchmarkMembershipChange measures the save of a membership that concerns one of
// many who listen: without channels, and with one whose rule looks at it. x-off is
// the time of the latter divided by that of the former.
func BenchmarkMembershipChange(b *testing.B) {
	var took [2]time.Duration
	var worlds [2]*world
	for i := range worlds {
		worlds[i] = newMemberships(b, 100_000)
		if i == 0 {
			channels, err := worlds[i].FindAllRecords("notify_channels")
			if err != nil {
				b.Fatal(err)
			}
			for _, channel := range channels {
				if err := worlds[i].Delete(channel); err != nil {
					b.Fatal(err)
				}
			}
		}
		server := pbtest.Serve(b, worlds[i])
		for range 1000 {
			server.Subscribe(b, worlds[i].ann, "chat/42")
		}
	}
	for b.Loop() {
		for i, w := range worlds {
			start := time.Now()
			member := core.NewRecord(mustFind(b, w, "room_members"))
			member.Load(map[string]any{"room": "42", "user": w.bob.Id})
			if err := w.Save(member); err != nil {
				b.Fatal(err)
			}
			if err := w.Delete(member); err != nil {
				b.Fatal(err)
			}
			took[i] += time.Since(start)
		}
	}
	b.ReportMetric(float64(took[0].Nanoseconds())/float64(b.N), "ns/off")
	b.ReportMetric(float64(took[1].Nanoseconds())/float64(b.N), "ns/on")
	b.ReportMetric(float64(took[1])/float64(took[0]), "x-off")
}

// BenchmarkSendHistory measures sends of concurrent senders to 10 subscribers on a
// topic with history, and on one without, in turns. x-without is the time of the
// former divided by that of the latter.
func BenchmarkSendHistory(b *testing.B) {
	for _, senders := range []int{1, 8, 64} {
		b.Run(fmt.Sprint(senders), func(b *testing.B) {
			w := newWorld(b)
			addLog(b, w, 1000)
			server := pbtest.Serve(b, w)
			topics := []string{"log/a", "other"}
			for range 10 {
				client := server.Subscribe(b, nil, topics...)
				go func() {
					for range client.Events() {
					}
				}()
			}
			const each = 256
			var took [2]time.Duration
			for b.Loop() {
				for i, topic := range topics {
					start := time.Now()
					var wg sync.WaitGroup
					for range senders {
						wg.Go(func() {
							for range each / senders {
								if _, err := engine(w).Send(b.Context(), notify.Message{Topic: topic, Data: "about one hundred bytes of data, which is what a chat message or a progress report has, or a little less"}); err != nil {
									b.Error(err)
								}
							}
						})
					}
					wg.Wait()
					took[i] += time.Since(start)
				}
			}
			count := float64(b.N * each)
			b.ReportMetric(count/took[0].Seconds(), "with/s")
			b.ReportMetric(count/took[1].Seconds(), "without/s")
			b.ReportMetric(float64(took[0])/float64(took[1]), "x-without")
		})
	}
}

// BenchmarkReplay measures how long it takes until a subscriber has 10,000 missed
// messages, over SSE and as pages of 1,000.
func BenchmarkReplay(b *testing.B) {
	const count = 10_000
	w := newWorld(b)
	addLog(b, w, count)
	server := pbtest.Serve(b, w)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for range count / 64 {
				mustSend(b, w, "log/a", "about one hundred bytes of data, which is what a chat message or a progress report has, or a little less")
			}
		})
	}
	wg.Wait()
	head := historyOf(b, server, nil, "log/a", "", 1).Head
	var streamed, paged time.Duration
	for b.Loop() {
		start := time.Now()
		client := server.Subscribe(b, nil, withQuery("log/a", "rewind", fmt.Sprint(count)))
		for range head {
			client.Next(b)
		}
		streamed += time.Since(start)
		client.Close(b)

		start = time.Now()
		for since, got := "", int64(0); got < head; {
			page := historyOf(b, server, nil, "log/a", since, 1000)
			got += int64(len(page.Items))
			since = page.Next
		}
		paged += time.Since(start)
	}
	b.ReportMetric(float64(streamed.Milliseconds())/float64(b.N), "ms/stream")
	b.ReportMetric(float64(paged.Milliseconds())/float64(b.N), "ms/pages")
}
