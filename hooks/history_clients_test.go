package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestHistoryOfConnections: what was sent to a connection, or left it out, is still so when
// the same user comes back with another one.
func TestHistoryOfConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addLog(t, w, 100)
	server := pbtest.Serve(t, w)
	tab := server.Subscribe(t, w.ann, "log/a")
	other := server.Subscribe(t, w.ann, "log/a")
	guest := server.Subscribe(t, nil, "log/a")
	send(t, w, notify.Message{Topic: "log/a", Data: "to the tab", To: notify.Audience{Clients: []string{tab.ID}}})
	send(t, w, notify.Message{Topic: "log/a", Data: "to a guest", To: notify.Audience{Clients: []string{guest.ID}}})
	status, answer := server.Do(t, "POST", publishPath, pbtest.Token(t, w.ann),
		fmt.Sprintf(`{"topic":"log/a","data":"from the tab","self":false,"clientId":%q}`, tab.ID))
	if status != http.StatusOK {
		t.Fatal(status, answer)
	}
	mustSend(t, w, "log/a", "last")
	tab.Expect(t, "log/a", `"to the tab"`)
	tab.Expect(t, "log/a", `"last"`)
	other.Expect(t, "log/a", `"from the tab"`)
	tab.Close(t)

	for _, test := range []struct {
		name string
		who  *core.Record
		ids  string
		want []string
	}{
		{"the tab", w.ann, "x," + tab.ID, []string{"to the tab", "last"}},
		{"another tab", w.ann, other.ID, []string{"from the tab", "last"}},
		{"nobody says", w.ann, "", []string{"from the tab", "last"}},
		{"another user", w.bob, tab.ID, []string{"last"}},
		{"a guest with a user's connection", nil, tab.ID, []string{"last"}},
		{"a guest", nil, guest.ID, []string{"from the tab", "last"}},
		{"many", w.ann, tab.ID + strings.Repeat(",x", 20), []string{"from the tab", "last"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, text := server.DoText(t, "GET", historyPath("log/a", "", 100)+"&clientId="+test.ids, pbtest.Token(t, test.who), nil)
			var p page
			if err := json.Unmarshal([]byte(text), &p); err != nil || status != http.StatusOK {
				t.Fatal(status, text)
			}
			got := []string{}
			for _, item := range p.Items {
				got = append(got, fmt.Sprint(item.Data))
			}
			if !slices.Equal(got, test.want) || !p.Complete {
				t.Errorf("fetched %q, complete %v", got, p.Complete)
			}

			key := "log/a?options=" + url.QueryEscape(fmt.Sprintf(`{"query":{"clientId":%q,"rewind":"100"}}`, test.ids))
			client := server.Subscribe(t, test.who, key)
			for _, want := range test.want {
				if e := decodeEnvelope(t, client.Next(t).Data); e.Data != want {
					t.Errorf("replayed %v, not %q", e.Data, want)
				}
			}
		})
	}
}

// TestSubscribed: a page says whether what comes after it reaches the reader's connection.
func TestSubscribed(t *testing.T) {
	t.Parallel()
	for _, way := range append(slices.Clone(ways), replaced) {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			w := way.newWorld(t)
			addLog(t, w, 100)
			server := way.serve(t, w)
			key := withQuery("log/a", "key", "1")
			client := server.Subscribe(t, nil, key)
			ask := func(clientID, key string) (subscribed any) {
				t.Helper()
				_, one := server.Do(t, "GET", historyPath("log/a", "", 1)+"&clientId="+clientID+"&subscription="+url.QueryEscape(key), "", nil)
				subscribed, _ = at(one, "subscribed")
				_, several := server.Do(t, "POST", "/api/notify/history", "", map[string]any{
					"topics": []any{map[string]any{"topic": "log/a", "subscription": key}}, "clientId": clientID,
				})
				if got, _ := at(several, "0.body.subscribed"); got != subscribed {
					t.Errorf("%v by one request, %v by the other", subscribed, got)
				}
				return subscribed
			}
			for _, test := range []struct {
				name, clientID, key string
				want                any
			}{
				{"its subscription", client.ID, key, true},
				{"after others", "x,y," + client.ID, key, true},
				{"before others", client.ID + ",x", key, false},
				{"nobody's", "", key, false},
				{"another subscription to the topic", client.ID, withQuery("log/a", "key", "2"), false},
				{"the topic", client.ID, "log/a", false},
				{"no question", client.ID, "", nil},
				{"another topic", client.ID, "log/ab", false},
			} {
				if got := ask(test.clientID, test.key); got != test.want {
					t.Errorf("%s: got %v", test.name, got)
				}
			}
			client.Set(t, nil, "log/a")
			if got := ask(client.ID, key); got != false {
				t.Errorf("when it has ended: got %v", got)
			}
			if got := ask(client.ID, "log/a"); got != true {
				t.Errorf("after another request: got %v", got)
			}
			client.Close(t)
			waitGone(t, w, client.ID)
			if got := ask(client.ID, "log/a"); got != false {
				t.Errorf("without a connection: got %v", got)
			}
		})
	}
}
