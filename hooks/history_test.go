package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

// withQuery returns the subscription key of topic with a query, as the SDK makes it.
func withQuery(topic, name, value string) string {
	return topic + "?options=" + url.QueryEscape(fmt.Sprintf(`{"query":{%q:%q}}`, name, value))
}

// envelope is a message as subscribers with history get it.
type envelope struct {
	ID    string `json:"id"`
	Topic string `json:"topic"`
	Epoch string `json:"epoch"`
	Seq   int64  `json:"seq"`
	Time  string `json:"time"`
	From  string `json:"from"`
	Data  any    `json:"data"`
	Gap   bool   `json:"gap"`
}

func (e envelope) String() string {
	gap := ""
	if e.Gap {
		gap = " gap"
	}
	return fmt.Sprintf("%d:%v%s", e.Seq, e.Data, gap)
}

func decodeEnvelope(t testing.TB, text string) envelope {
	t.Helper()
	var e envelope
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return e
}

// expectEnvelopes waits for the next messages under key and compares "seq:data".
func expectEnvelopes(t testing.TB, client *pbtest.Subscriber, key string, want ...string) (last envelope) {
	t.Helper()
	for _, w := range want {
		event := client.Next(t)
		if event.Type != key {
			t.Fatalf("got event %q with %s, want %q with %s", event.Type, event.Data, key, w)
		}
		if last = decodeEnvelope(t, event.Data); last.String() != w {
			t.Fatalf("got %s, want %s", last, w)
		}
	}
	return last
}

func mustSendAll(t *testing.T, app core.App, topic string, data ...any) (last notify.Report) {
	t.Helper()
	for _, d := range data {
		last = send(t, app, notify.Message{Topic: topic, Data: d})
	}
	return last
}

// addLog adds a channel log/{name} with the last messages kept, open to all.
func addLog(t testing.TB, app core.App, history int) *core.Record {
	t.Helper()
	return addChannel(t, app, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "publishRule": "*", "history": history})
}

// TestHistoryRegained: a topic that gets its history back, since a more specific channel
// got another pattern, knows that it has missed something.
func TestHistoryRegained(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	last := mustSendAll(t, w, "log/a", "a", "b")
	specific := addChannel(t, w, map[string]any{"pattern": "log/a", "subscribeRule": "*"})
	mustSend(t, w, "log/a", "not stored")
	specific.Set("pattern", "log/zzz")
	save(t, w, specific)
	mustSend(t, w, "log/a", "c")
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":2", 0); p.Complete || !slices.Equal(p.list(), []string{"3:c"}) {
		t.Errorf("since 2: %v, complete %v", p.list(), p.Complete)
	}
}

// page is the answer of GET /api/notify/history.
type page struct {
	Items    []envelope `json:"items"`
	Epoch    string     `json:"epoch"`
	Head     int64      `json:"head"`
	Complete bool       `json:"complete"`
	Next     string     `json:"next"`
}

func (p page) list() (list []string) {
	for _, item := range p.Items {
		list = append(list, item.String())
	}
	return list
}

func historyPath(topic, since string, limit int) string {
	query := url.Values{"topic": {topic}}
	if since != "" {
		query.Set("since", since)
	}
	if limit != 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return "/api/notify/history?" + query.Encode()
}

func historyOf(t testing.TB, server *pbtest.Server, who *core.Record, topic, since string, limit int) page {
	t.Helper()
	status, text := server.DoText(t, "GET", historyPath(topic, since, limit), pbtest.Token(t, who), nil)
	if status != http.StatusOK {
		t.Fatalf("history: %d %s", status, text)
	}
	var p page
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestHistoryRoute(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "42", w.ann)
	addLog(t, w, 10)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule, "history": 10})
	addChannel(t, w, map[string]any{"pattern": "admin", "history": 10})
	addChannel(t, w, map[string]any{"pattern": "vip", "subscribeRule": `@request.headers.x_vip = "yes"`, "history": 10})
	addChannel(t, w, map[string]any{"pattern": "live", "subscribeRule": "*"})
	server := pbtest.Serve(t, w)
	last := mustSendAll(t, w, "log/a", "a", "b", "c", "d", "e")
	for _, topic := range []string{"chat/42", "admin", "vip"} {
		mustSend(t, w, topic, 1)
	}

	t.Run("pages", func(t *testing.T) {
		var got []string
		pages, since := 0, ""
		for {
			p := historyOf(t, server, nil, "log/a", since, 2)
			got = append(got, p.list()...)
			if p.Epoch != last.Epoch || p.Head != 5 || !p.Complete {
				t.Fatalf("page %+v", p)
			}
			pages++
			if since = p.Next; since == fmt.Sprintf("%s:%d", p.Epoch, p.Head) {
				break
			}
		}
		if pages != 3 || !slices.Equal(got, []string{"1:a", "2:b", "3:c", "4:d", "5:e"}) {
			t.Errorf("%d pages: %v", pages, got)
		}
	})
	t.Run("an envelope", func(t *testing.T) {
		p := historyOf(t, server, nil, "log/a", last.Epoch+":4", 0)
		if len(p.Items) != 1 {
			t.Fatalf("page %+v", p)
		}
		item := p.Items[0]
		sent, err := time.Parse("2006-01-02 15:04:05.000Z", item.Time)
		if err != nil || time.Since(sent).Abs() > time.Minute {
			t.Errorf("time %q", item.Time)
		}
		if item.ID != last.ID || item.Topic != "log/a" || item.Epoch != last.Epoch || item.From != "" {
			t.Errorf("envelope %+v", item)
		}
	})
	t.Run("incomplete", func(t *testing.T) {
		for _, since := range []string{"other:3", last.Epoch + ":6"} {
			if p := historyOf(t, server, nil, "log/a", since, 0); p.Complete || len(p.Items) != 5 {
				t.Errorf("since %s: %+v", since, p)
			}
		}
	})
	t.Run("without history", func(t *testing.T) {
		for topic, complete := range map[string]string{"live": "", "no/channel": ""} {
			if p := historyOf(t, server, nil, topic, complete, 0); p.Epoch != "" || p.Head != 0 || len(p.Items) != 0 || !p.Complete || p.Next != "" {
				t.Errorf("%s: %+v", topic, p)
			}
			if p := historyOf(t, server, nil, topic, "e:1", 0); p.Complete {
				t.Errorf("%s since a position: %+v", topic, p)
			}
		}
	})

	for _, test := range []struct {
		name   string
		who    *core.Record
		path   string
		status int
		want   string
	}{
		{"a member", w.ann, historyPath("chat/42", "", 0), 200, `"seq":1`},
		{"no member", w.bob, historyPath("chat/42", "", 0), 403, "not allowed to listen"},
		{"a guest", nil, historyPath("chat/42", "", 0), 403, "not allowed to listen"},
		{"no room", w.bob, historyPath("chat/43", "", 0), 403, "not allowed to listen"},
		{"a superuser", w.root, historyPath("admin", "", 0), 200, `"seq":1`},
		{"no superuser", w.ann, historyPath("admin", "", 0), 403, "not allowed to listen"},
		{"headers", w.ann, historyPath("vip", "", 0), 403, "not allowed to listen"},
		{"a system topic", w.ann, historyPath("@inbox", "", 0), 403, "not allowed to listen"},
		{"a system topic, superuser", w.root, historyPath("@inbox", "", 0), 400, "validation_reserved_topic"},
		{"record events", w.ann, historyPath("users", "", 0), 403, "not allowed to listen"},
		{"no topic", w.ann, "/api/notify/history", 400, "validation_required"},
		{"a bad topic", w.ann, historyPath("a?b", "", 0), 400, "validation_invalid_topic"},
		{"a bad position", w.ann, historyPath("log/a", "7", 0), 400, "validation_invalid_position"},
		{"a bad rewind", w.ann, "/api/notify/history?topic=log/a&rewind=soon", 400, `"rewind":{"code":"validation_invalid_position"`},
		{"both", w.ann, "/api/notify/history?topic=log/a&rewind=1&since=e:1", 400, "exclude each other"},
		{"rewind", w.ann, "/api/notify/history?topic=log/a&rewind=2", 200, `"next":"` + last.Epoch + `:5"`},
		{"rewind nothing", w.ann, "/api/notify/history?topic=log/a&rewind=0", 200, `{"items":[],`},
		{"a bad limit", w.ann, "/api/notify/history?topic=log/a&limit=many", 400, "validation_invalid_number"},
		{"a large limit", w.ann, historyPath("log/a", "", 1_000_000), 200, `"head":5`},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, text := server.DoText(t, "GET", test.path, pbtest.Token(t, test.who), nil)
			if status != test.status || !strings.Contains(text, test.want) {
				t.Errorf("%d %s", status, text)
			}
		})
	}
	t.Run("the headers of the request", func(t *testing.T) {
		request, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+historyPath("vip", "", 0), nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("X-VIP", "yes")
		response, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK || response.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%d %v", response.StatusCode, response.Header)
		}
	})
	t.Run("strict", func(t *testing.T) {
		app := pbtest.NewApp(t, func(app core.App) {
			hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Strict: true}})
		})
		if status, text := pbtest.Serve(t, app).DoText(t, "GET", historyPath("any", "", 0), "", nil); status != http.StatusForbidden {
			t.Errorf("%d %s", status, text)
		}
	})
}

// TestHistoryReports: what senders are told.
func TestHistoryReports(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	root := pbtest.Token(t, w.root)
	_, answer := server.Do(t, "POST", "/api/notify", root, `{"topic":"log/a","data":1,"id":"m1"}`)
	first := answer.(map[string]any)
	if first["seq"] != 1.0 || first["epoch"] == "" {
		t.Fatalf("answer %v", answer)
	}
	_, text := server.DoText(t, "POST", publishPath, pbtest.Token(t, w.ann), `{"topic":"log/a","data":2,"id":"m1"}`)
	if want := fmt.Sprintf(`{"id":"m1","topic":"log/a","epoch":%q,"seq":2}`, first["epoch"]); strings.TrimSpace(text) != want {
		t.Errorf("published: %s, want %s", text, want)
	}
	if _, text := server.DoText(t, "POST", "/api/notify", root, `{"topic":"other","data":1}`); strings.Contains(text, "seq") || strings.Contains(text, "epoch") {
		t.Errorf("without history: %s", text)
	}
	p := historyOf(t, server, nil, "log/a", "", 0)
	if len(p.Items) != 2 || p.Items[0].From != "" || p.Items[1].From != pbtest.Ref(w.ann) {
		t.Errorf("history %+v", p)
	}
}

// TestHistoryPaused: a topic that had no history for a while says so to those who
// come back.
func TestHistoryPaused(t *testing.T) {
	w := newWorld(t)
	channel := addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	last := mustSendAll(t, w, "log/a", "a", "b")
	live := server.Subscribe(t, nil, "log/a"+withEnvelope)
	set := func(history int) {
		t.Helper()
		channel.Set("history", history)
		save(t, w, channel)
	}
	set(0)
	mustSend(t, w, "log/a", "unstored")
	if e := decodeEnvelope(t, live.Next(t).Data); e.Epoch != "" || e.Seq != 0 || e.Data != "unstored" {
		t.Errorf("envelope %+v", e)
	}
	if p := historyOf(t, server, nil, "log/a", "", 0); len(p.Items) != 0 {
		t.Errorf("without history: %+v", p)
	}
	set(10)
	key := withQuery("log/a", "since", last.Epoch+":2")
	client := server.Subscribe(t, nil, key)
	mustSendAll(t, w, "log/a", "c", "d")
	expectEnvelopes(t, client, key, "3:c gap", "4:d")
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":2", 0); p.Complete || !slices.Equal(p.list(), []string{"3:c", "4:d"}) {
		t.Errorf("since before: %+v", p)
	}
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":3", 0); !p.Complete || !slices.Equal(p.list(), []string{"4:d"}) {
		t.Errorf("since after: %+v", p)
	}
}
