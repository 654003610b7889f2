package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestHistoryOfTopics: one request for the pages of many topics, each of which is answered by itself.
func TestHistoryOfTopics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addLog(t, w, 100)
	addChannel(t, w, map[string]any{"pattern": "secret/{x}", "subscribeRule": "", "history": 10})
	server := pbtest.Serve(t, w)
	for i := range 3 {
		mustSend(t, w, "log/a", i)
	}
	mustSend(t, w, "secret/1", "nobody's")
	ask := func(auth *core.Record, body any) (int, string) {
		return server.DoText(t, http.MethodPost, "/api/notify/history", pbtest.Token(t, auth), body)
	}
	type topics []map[string]any

	status, text := ask(w.ann, map[string]any{"topics": topics{
		{"topic": "log/a", "limit": 2}, {"topic": "secret/1"}, {"topic": "nothing"}, {"topic": "log/b"},
		{"topic": "log/a", "since": "x"}, {"topic": "log/a", "rewind": "1"}, {"topic": ""}, {"topic": "@inbox"}, {"topic": "log/a", "limit": 0},
	}})
	var pages []struct {
		Status int `json:"status"`
		Body   struct {
			notify.HistoryPage
			Status  int            `json:"status"`
			Message string         `json:"message"`
			Errors  map[string]any `json:"data"`
		} `json:"body"`
	}
	if err := json.Unmarshal([]byte(text), &pages); status != 200 || err != nil {
		t.Fatalf("%d %s, error %v", status, text, err)
	}
	var got []string
	for _, page := range pages {
		line := fmt.Sprint(page.Status, " ", len(page.Body.Items))
		for field := range page.Body.Errors {
			line += " " + field
		}
		if page.Status != 200 && (page.Body.Status != page.Status || page.Body.Message == "") {
			t.Errorf("%+v", page)
		}
		got = append(got, line)
	}
	if want := "200 2,403 0 topic,200 0,200 0,400 0 since,200 1,400 0 topic,403 0 topic,400 0 limit"; strings.Join(got, ",") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(got, ","), want)
	}
	if strings.Contains(text, "nobody's") {
		t.Error("a message of a denied topic")
	}

	for name, test := range map[string]struct {
		body any
		want string
	}{
		"a list":        {[]int{1}, "A JSON object is expected"},
		"no topics":     {map[string]any{}, `"topics":{"code":"validation_required"`},
		"too many":      {map[string]any{"topics": make(topics, 101)}, `"code":"validation_length_too_long"`},
		"unknown field": {map[string]any{"topics": topics{{"topics": "a"}}}, `"code":"validation_unknown_field"`},
	} {
		if status, text := ask(nil, test.body); status != 400 || !strings.Contains(text, test.want) {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}

	// together they are not larger than one alone
	large := strings.Repeat("x", 10<<10)
	for range 50 {
		mustSend(t, w, "log/large", large)
	}
	var many topics
	for range 100 {
		many = append(many, map[string]any{"topic": "log/large", "limit": 1000})
	}
	if _, text := ask(nil, map[string]any{"topics": many}); len(text) < 100*16<<10 || len(text) > 100*32<<10 {
		t.Errorf("the answer has %d bytes", len(text))
	}
}
