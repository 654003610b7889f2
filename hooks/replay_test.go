package hooks_test

import (
	"bufio"
	"encoding/json/v2"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

func TestReplay(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 5)
	server := pbtest.Serve(t, w)
	epoch := mustSendAll(t, w, "log/first", 1).Epoch
	if epoch == "" {
		t.Fatal("the report has no epoch")
	}
	all := []string{"3:c", "4:d", "5:e", "6:f", "7:g"}
	allAfterGap := append([]string{"3:c gap"}, all[1:]...)
	for i, test := range []struct {
		name, option, value string
		want                []string
		live                string // the first message after these
	}{
		{"since", "since", epoch + ":4", all[2:], "8:live"},
		{"since the oldest that is kept", "since", epoch + ":2", all, "8:live"},
		{"since one that is not kept", "since", epoch + ":1", allAfterGap, "8:live"},
		{"since the last", "since", epoch + ":7", nil, "8:live"},
		{"since one that was never sent", "since", epoch + ":8", allAfterGap, "8:live"},
		{"since another epoch", "since", "other:7", allAfterGap, "8:live"},
		{"rewind", "rewind", "2", all[3:], "8:live"},
		{"rewind more than is kept", "rewind", "50", all, "8:live"},
		{"rewind a minute", "rewind", "1m", all, "8:live"},
		{"rewind no time", "rewind", "0s", nil, "8:live"},
		{"rewind nothing", "rewind", "0", nil, "8:live"},
		{"a topic without messages: rewind", "rewind", "2", nil, "1:live"},
		{"a topic without messages: since", "since", epoch + ":3", nil, "1:live gap"},
		{"no history", "since", epoch + ":3", nil, "0:live"},
	} {
		t.Run(test.name, func(t *testing.T) {
			topic := fmt.Sprint("log/", i)
			switch {
			case test.name == "no history":
				topic = "other"
			case !strings.Contains(test.name, "without messages"):
				mustSendAll(t, w, topic, "a", "b", "c", "d", "e", "f", "g")
			}
			key := withQuery(topic, test.option, test.value)
			client := server.Subscribe(t, nil, key)
			expectEnvelopes(t, client, key, test.want...)
			report := send(t, w, notify.Message{Topic: topic, Data: "live"})
			if report.Matched != 1 || report.Queued != 1 {
				t.Errorf("report %+v", report)
			}
			expectEnvelopes(t, client, key, test.live)
			// what it has is not replayed again when it adds a topic
			client.Set(t, nil, key, "fence")
			mustSend(t, w, "fence", 1)
			client.Expect(t, "fence", "1")
		})
	}
}

// TestReplayKeys: one connection with several keys of a topic, each with its own
// replay, in one order.
func TestReplayKeys(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 1000)
	server := pbtest.Serve(t, w)
	for i := range 300 { // several pages
		mustSend(t, w, "log/a", i)
	}
	keys := []string{"log/a", withQuery("log/a", "rewind", "1000"), withQuery("log/a", "rewind", "3"), withQuery("log/a", "envelope", "true")}
	client := server.Subscribe(t, nil, keys...)
	got := map[string][]string{}
	for i := range 300 + 3 + 4 {
		if i == 300+3 {
			mustSend(t, w, "log/a", "live")
		}
		event := client.Next(t)
		if event.Type == keys[0] {
			got[event.Type] = append(got[event.Type], event.Data)
			continue
		}
		got[event.Type] = append(got[event.Type], decodeEnvelope(t, event.Data).String())
	}
	all := make([]string, 301)
	for i := range all {
		all[i] = fmt.Sprintf("%d:%d", i+1, i)
	}
	all[300] = "301:live"
	for i, want := range [][]string{{`"live"`}, all, all[297:], all[300:]} {
		if !slices.Equal(got[keys[i]], want) {
			t.Errorf("%s: got %v", keys[i], got[keys[i]])
		}
	}
}

func TestReplayOptions(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 10)
	addChannel(t, w, map[string]any{"pattern": "secret", "history": 10})
	server := pbtest.Serve(t, w)
	mustSend(t, w, "log/a", 1)
	for value, message := range map[string]string{
		withQuery("log/a", "since", "7"):                       `since: "7" must be of the form EPOCH:SEQ`,
		withQuery("log/a", "since", "x:-1"):                    `since: "x:-1" must be of the form EPOCH:SEQ`,
		withQuery("log/a", "rewind", "soon"):                   `rewind: "soon" must be a number of messages such as 50 or a duration such as 2m`,
		withQuery("log/a", "rewind", "-5"):                     `rewind: "-5" must be a number of messages such as 50 or a duration such as 2m`,
		withQuery("log/a", "rewind", "-5s"):                    `rewind: "-5s" must be a number of messages such as 50 or a duration such as 2m`,
		`log/a?options={"query":{"since":"e:1","rewind":"5"}}`: "since and rewind exclude each other",
	} {
		client := server.Subscribe(t, nil, "@denied", "log/b")
		status, answer := client.Try(t, nil, "@denied", "log/b", value)
		fields, _ := answer.(map[string]any)
		subscriptions, _ := fields["data"].(map[string]any)["subscriptions"].(map[string]any)
		if status != http.StatusBadRequest || !strings.Contains(fmt.Sprint(subscriptions["2"]), "validation_invalid_position") {
			t.Errorf("%s: %d %v", value, status, answer)
		}
		// among others it is left out
		client.Set(t, nil, "@denied", "log/b", "log/c", value)
		want, err := json.Marshal(map[string]any{"topic": "log/a", "status": 400, "message": message}, json.Deterministic(true))
		if err != nil {
			t.Fatal(err)
		}
		event := client.Next(t)
		var got any
		if err := json.Unmarshal([]byte(event.Data), &got); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(got, json.Deterministic(true))
		if err != nil || string(again) != string(want) {
			t.Errorf("announced %s, want %s", again, want)
		}
		mustSend(t, w, "log/c", "fine")
		client.Expect(t, "log/c", `"fine"`)
	}

	// a denied topic is not read
	stats := engine(w).Stats().Replayed
	if status, answer := server.Connect(t).Try(t, w.ann, withQuery("secret", "rewind", "5")); status != http.StatusForbidden {
		t.Errorf("denied: %d %v", status, answer)
	}
	if now := engine(w).Stats().Replayed; now != stats {
		t.Errorf("%d messages were replayed", now-stats)
	}
}

// TestReplayWithSmallQueue: a replay ends also where a page, or one message, is larger than
// the queue.
func TestReplayWithSmallQueue(t *testing.T) {
	for name, serve := range map[string]func(testing.TB, core.App) *pbtest.Server{"taken": pbtest.Serve, "HTTP2": pbtest.ServeHTTP2} {
		t.Run(name, func(t *testing.T) {
			app := pbtest.NewApp(t, func(app core.App) {
				hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{QueueBytes: 64 << 10}})
			})
			addLog(t, app, 1000)
			server := serve(t, app)
			const large, small = 20, 100
			for range large {
				mustSend(t, app, "log/a", strings.Repeat("y", 250<<10))
			}
			for range small {
				mustSend(t, app, "log/a", strings.Repeat("x", 4000))
			}
			for range 3 {
				client := server.Connect(t)
				key := withQuery("log/a", "rewind", "1000")
				client.Set(t, nil, key)
				for range large + small {
					client.Next(t)
				}
			}
			if ends := engine(app).Stats().Disconnects; ends[notify.DisconnectQueueFull.Reason] > 0 {
				t.Errorf("disconnects: %v", ends)
			}
		})
	}
}

// TestHistoryHandOver: many send while subscribers come, replay, and go: each of
// them gets each message once, in order, from where it began.
func TestHistoryHandOver(t *testing.T) {
	const senders, subscribers, rounds, topics = 4, 8, 10, 2
	w := newWorld(t)
	addLog(t, w, 100_000)
	server := pbtest.Serve(t, w)
	n := engine(w)
	epoch := mustSendAll(t, w, "log/0", 0).Epoch
	mustSendAll(t, w, "log/1", 0)

	stop := make(chan struct{})
	var sending, listening sync.WaitGroup
	var heads [topics]atomic.Int64
	for sender := range senders {
		sending.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(100+sender*37) * time.Microsecond): // the pace; nothing waits for it
				}
				topic := i % topics
				report, err := n.Send(t.Context(), notify.Message{Topic: fmt.Sprint("log/", topic), Data: i})
				if err != nil {
					t.Error(err)
					return
				}
				for head := heads[topic].Load(); head < report.Seq && !heads[topic].CompareAndSwap(head, report.Seq); head = heads[topic].Load() {
				}
			}
		})
	}
	for subscriber := range subscribers {
		listening.Go(func() {
			topic := subscriber % topics
			seen := int64(0)
			for round := range rounds {
				key := withQuery(fmt.Sprint("log/", topic), "since", fmt.Sprintf("%s:%d", epoch, seen))
				client := server.Subscribe(t, nil, key)
				until := heads[topic].Load() + int64(20+10*(round%3))
				for seen < until {
					e := decodeEnvelope(t, client.Next(t).Data)
					if e.Seq != seen+1 || e.Gap {
						t.Errorf("got %v after %d", e, seen)
						return
					}
					seen = e.Seq
				}
				client.Close(t)
			}
		})
	}
	listening.Wait()
	close(stop)
	sending.Wait()
}

// TestReplayToStalled: a client that does not read its replay keeps a part of its queue for it and no more, and nobody
// else waits.
func TestReplayToStalled(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		stalled, reader, waiting := beginReplay(t, w, server)
		healthy := server.Subscribe(t, nil, "log/b")
		n := engine(w)
		for i := range 100 {
			mustSend(t, w, "log/b", i)
			healthy.Expect(t, "log/b", fmt.Sprint(i))
			reader.upTo(t, i/4) // a little: however slow the machine is, it is not one that takes nothing for 10 seconds
		}
		if bytes := waiting(); bytes > 2<<20 || n.Stats().Disconnects[notify.DisconnectQueueFull.Reason] != 0 {
			t.Errorf("%d bytes wait, %+v", bytes, n.Stats())
		}
		if _, err := w.SubscriptionsBroker().ClientById(stalled); err != nil {
			t.Fatal("the stalled client was disconnected")
		}
		// it reads at last
		reader.upTo(t, muchToReplay)
	})
}

// muchToReplay is how many messages of 50 KB are more than the sockets' buffers hold, and than a queue may for once.
const muchToReplay = 170

// beginReplay opens a connection with so many messages to replay, of which nobody reads any yet. waiting are the bytes in its
// queue, which is filled as far as it may be.
func beginReplay(t *testing.T, w *world, server *pbtest.Server) (clientID string, reader *numbered, waiting func() int) {
	t.Helper()
	addLog(t, w, 10_000)
	large := strings.Repeat("x", 50_000)
	for range muchToReplay {
		mustSend(t, w, "log/a", large)
	}
	clientID, lines := openOn(t, server, nil, withQuery("log/a", "rewind", "10000"))
	n := engine(w)
	waiting = func() int { return n.Stats().QueuedBytes + server.EdgeStats().QueuedBytes }
	pbtest.WaitFor(t, "the queue is filled as far as it may", func() bool { return waiting() > 200<<10 })
	return clientID, &numbered{lines: lines}, waiting
}

// TestSlowReader: who reads 100 KB a second, of much that waits, is not one who takes nothing for 10 seconds.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		id, reader, _ := beginReplay(t, w, server)
		for start := time.Now(); time.Since(start) < 12*time.Second; time.Sleep(100 * time.Millisecond) {
			reader.upTo(t, int(2*time.Since(start).Seconds()))
			if _, err := w.SubscriptionsBroker().ClientById(id); err != nil {
				t.Fatalf("disconnected: %v", engine(w).Stats().Disconnects)
			}
		}
	})
}

// numbered reads messages of a topic with history, from the first on, each once and in order.
type numbered struct {
	lines *bufio.Scanner
	seq   int64
}

// upTo reads until there have been count messages.
func (n *numbered) upTo(t *testing.T, count int) {
	t.Helper()
	for n.seq < int64(count) && n.lines.Scan() {
		data, ok := strings.CutPrefix(n.lines.Text(), "data:")
		if !ok || strings.Contains(data, "clientId") {
			continue
		}
		if n.seq++; decodeEnvelope(t, data).Seq != n.seq {
			t.Fatalf("got %.100s, want %d", data, n.seq)
		}
	}
	if n.seq < int64(count) {
		t.Fatalf("ended after %d: %v", n.seq, n.lines.Err())
	}
}

// TestReplayThrownOut: who loses the right in the middle of a replay, or asks for
// the history, gets nothing that was sent after it.
func TestReplayThrownOut(t *testing.T) {
	t.Parallel() // it waits most of the time
	const rounds = 30
	w := newWorld(t)
	addMembers(t, w)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule, "history": 50})
	server := pbtest.Serve(t, w)
	n := engine(w)
	var head atomic.Int64
	stop := repeatedly(func() bool {
		report, err := n.Send(t.Context(), notify.Message{Topic: "chat/42", Data: 1})
		if err != nil {
			t.Error(err)
			return false
		}
		head.Store(report.Seq)
		return true
	})
	defer stop()
	key := withQuery("chat/42", "rewind", "50")
	for round := range rounds {
		member := addMember(t, w, "42", w.bob)
		client := server.Connect(t)
		var both sync.WaitGroup
		var answer string
		both.Go(func() { client.Try(t, w.bob, "fence", key) })
		both.Go(func() {
			_, answer = server.DoText(t, "GET", historyPath("chat/42", "", 50), pbtest.Token(t, w.bob), nil)
		})
		both.Go(func() {
			if err := w.Delete(member); err != nil {
				t.Error(err)
			}
		})
		both.Wait()
		last := head.Load() + 1 // one may be on its way since before the change
		pbtest.WaitFor(t, "more messages", func() bool { return head.Load() > last+20 })
		mustSend(t, w, "fence", round)
		for {
			event := client.Next(t)
			if event.Type == "fence" {
				break
			}
			if e := decodeEnvelope(t, event.Data); e.Seq > last {
				t.Fatalf("round %d: replayed %d, the last one before the change was %d", round, e.Seq, last)
			}
		}
		var p page
		if err := json.Unmarshal([]byte(answer), &p); err == nil && len(p.Items) > 0 && p.Items[len(p.Items)-1].Seq > last {
			t.Fatalf("round %d: the history had %v, the last one before the change was %d", round, p.Items[len(p.Items)-1], last)
		}
	}
}
