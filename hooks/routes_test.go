package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"

	"herald/internal/pbtest"
)

func TestRoutes(t *testing.T) {
	w := newWorld(t)
	clone := func(t testing.TB) *tests.TestApp { // a router can be made for an app only once
		app, err := tests.NewTestApp(w.DataDir())
		if err != nil {
			t.Fatal(err)
		}
		register(app)
		return app
	}
	superuser := map[string]string{"Authorization": pbtest.Token(t, w.root)}
	user := map[string]string{"Authorization": pbtest.Token(t, w.ann)}

	// a scenario for each thing that can be wrong with a request, all of which
	// send nothing
	type scenario struct {
		name, method, path, body string
		headers                  map[string]string
		status                   int
		want                     []string // of the answer: "path=part of the value there"
	}
	scenarios := []scenario{
		{"send", "POST", "/api/notify", `{"topic":"x","data":1}`, superuser, 200,
			[]string{"topic=x", "matched=0", "queued=0", "dropped=0", "id="}},
		{"send with everything", "POST", "/api/notify",
			`{"topic":"x","data":null,"id":"m1","to":{"auth":"user","users":["users:1"],"collections":["users"],"filter":"verified = true","clients":["c"]},"except":{"users":["users:2"],"clients":["d"]}}`,
			superuser, 200, []string{"id=m1"}},
		{"to nobody", "POST", "/api/notify", `{"topic":"x","data":1,"to":{"users":[]},"except":{"users":[]},"id":""}`, superuser, 200, []string{"matched=0"}},
		{"half an emoji", "POST", "/api/notify", `{"topic":"a","data":"hi \ud83d"}`, superuser, 200, []string{"topic=a"}},
		{"no topic, no data", "POST", "/api/notify", `{}`, superuser, 400,
			[]string{"data.topic.code=validation_required", "data.topic.message=Cannot be blank.", "data.data.code=validation_required", "status=400", "message=Failed to send the message."}},
		{"topic", "POST", "/api/notify", `{"topic":"a?b","data":1}`, superuser, 400, []string{"data.topic.code=validation_invalid_topic"}},
		{"reserved topic", "POST", "/api/notify", `{"topic":"users/*","data":1}`, superuser, 400, []string{"data.topic.code=validation_reserved_topic"}},
		{"id", "POST", "/api/notify", `{"topic":"a","data":1,"id":"a\nb"}`, superuser, 400, []string{"data.id.code=validation_invalid_id"}},
		{"too large", "POST", "/api/notify", `{"topic":"a","data":"` + strings.Repeat("x", 256<<10) + `"}`, superuser, 413,
			[]string{"data.data.code=validation_too_large", "status=413"}},
		{"auth", "POST", "/api/notify", `{"topic":"a","data":1,"to":{"auth":"x"}}`, superuser, 400, []string{"data.to.auth.code=validation_invalid_audience"}},
		{"users", "POST", "/api/notify", `{"topic":"a","data":1,"to":{"users":["users:1","x"]}}`, superuser, 400, []string{"data.to.users.1.code=validation_invalid_audience"}},
		{"filter", "POST", "/api/notify", `{"topic":"a","data":1,"to":{"filter":"zzz = 1"}}`, superuser, 400, []string{"data.to.filter.code=validation_invalid_filter", "data.to.filter.message=zzz"}},
		{"except", "POST", "/api/notify", `{"topic":"a","data":1,"except":{"users":["x"]}}`, superuser, 400, []string{"data.except.users.0.code=validation_invalid_audience"}},
		{"unknown field", "POST", "/api/notify", `{"topic":"a","data":1,"to":{"user":["users:1"]}}`, superuser, 400, []string{"data.to.user.code=validation_unknown_field"}},
		{"unknown field on top", "POST", "/api/notify", `{"topic":"a","data":1,"users":[]}`, superuser, 400, []string{"data.users.code=validation_unknown_field"}},
		{"type", "POST", "/api/notify", `{"topic":"a","data":1,"to":{"users":["users:1",2]}}`, superuser, 400, []string{"data.to.users.1.code=validation_invalid_value", "data.to.users.1.message=Invalid value: expected a string"}},
		{"no object", "POST", "/api/notify", `[1]`, superuser, 400, []string{"message=Failed to send the message. A JSON object is expected."}},
		{"no JSON", "POST", "/api/notify", `topic=a`, superuser, 400, []string{"message=The request body is not valid JSON"}},
		{"cut off", "POST", "/api/notify", `{"topic":"a"`, superuser, 400, []string{"message=The request body is not valid JSON", "message=unexpected EOF"}},
		{"two names", "POST", "/api/notify", `{"topic":"b","data":{"a":1,"a":2},"topic":"a"}`, superuser, 200, []string{"topic=a"}},
		{"two names and no JSON", "POST", "/api/notify", `{"topic":"b","data":{"a":1,"a":2},"topic":"a"`, superuser, 400, []string{"message=The request body is not valid JSON"}},
		{"empty", "POST", "/api/notify", ``, superuser, 400, []string{"message=The request body is not valid JSON"}},

		{"recheck, a list", "POST", "/api/notify/recheck", `[1]`, superuser, 400, []string{"message=Failed to check the subscriptions again. A JSON object is expected."}},
		{"batch, a list", "POST", "/api/notify/batch", `[1]`, superuser, 400, []string{"message=Failed to send the batch. A JSON object is expected."}},
		{"presence, a list", "PUT", "/api/notify/presence", `[1]`, superuser, 400, []string{"message=Failed to change the presence. A JSON object is expected."}},

		{"batch", "POST", "/api/notify/batch",
			`{"messages":[{"topic":"a","data":1},{"topic":"","data":1},{"topic":1},7,{"topic":"a","data":{"a":1,"a":2}},{"topic":"b","data":2,"to":{"filter":"zzz=1"}},{"topic":"c","data":3,"id":"m7"},{"topic":"c","data":3,"to":{"users":null}}]}`,
			superuser, 200, []string{
				"0.status=200", "0.body.topic=a",
				"1.status=400", "1.body.data.messages.1.topic.code=validation_required",
				"2.body.data.messages.2.topic.code=validation_invalid_value",
				"3.body.data.messages.3.code=validation_invalid_value", "3.body.message=A JSON object is expected",
				"4.status=200",
				"5.body.data.messages.5.to.filter.code=validation_invalid_filter",
				"6.status=200", "6.body.id=m7", "6.body.topic=c", "6.body.matched=0",
				"7.status=400", "7.body.data.messages.7.to.users.code=validation_invalid_audience",
			}},
		{"batch of none", "POST", "/api/notify/batch", `{"messages":[]}`, superuser, 400, []string{"data.messages.code=validation_required"}},
		{"batch without messages", "POST", "/api/notify/batch", `{}`, superuser, 400, []string{"data.messages.code=validation_required"}},
		{"batch that is no list", "POST", "/api/notify/batch", `{"messages":{}}`, superuser, 400, []string{"data.messages.code=validation_invalid_value", "data.messages.message=Invalid value: expected a list"}},
		{"largest batch", "POST", "/api/notify/batch", batchOf(1000), superuser, 200, []string{"0.status=200", "999.status=200"}},
		{"batch too large", "POST", "/api/notify/batch", batchOf(1001), superuser, 400, []string{"data.messages.code=validation_length_too_long", "data.messages.message=1000"}},

		{"topics", "GET", "/api/notify/topics", "", superuser, 200, []string{"items=[]", "page=1", "perPage=30", "totalItems=0", "totalPages=0"}},
		{"clients", "GET", "/api/notify/clients?page=3&perPage=7", "", superuser, 200, []string{"items=[]", "page=3", "perPage=7"}},
		{"clients, limits", "GET", "/api/notify/clients?page=-1&perPage=100000", "", superuser, 200, []string{"page=1", "perPage=1000"}},
		{"clients, bad page", "GET", "/api/notify/clients?page=x&perPage=y", "", superuser, 400, []string{"data.page.code=validation_invalid_number", "data.perPage.code=validation_invalid_number"}},
		{"clients, huge page", "GET", "/api/notify/clients?page=9223372036854775807", "", superuser, 200, []string{"items=[]"}},
		{"clients, bad user", "GET", "/api/notify/clients?user=x", "", superuser, 400, []string{"data.user.code=validation_invalid_audience"}},
		{"disconnect nobody", "DELETE", "/api/notify/clients/x", "", superuser, 404, []string{"status=404"}},
		{"disconnect all", "DELETE", "/api/notify/clients", "", superuser, 400, []string{"data.user.code=validation_required"}},
		{"disconnect a user's none", "DELETE", "/api/notify/clients?user=users:1", "", superuser, 200, []string{"disconnected=0"}},
		{"disconnect a bad user", "DELETE", "/api/notify/clients?user=nope:1", "", superuser, 400, []string{"data.user.code=validation_invalid_audience"}},
	}
	// each route is for superusers only
	for _, route := range []string{"POST /api/notify", "POST /api/notify/batch", "GET /api/notify/topics", "GET /api/notify/clients", "DELETE /api/notify/clients?user=users:1", "DELETE /api/notify/clients/x"} {
		method, path, _ := strings.Cut(route, " ")
		scenarios = append(scenarios,
			scenario{"guest " + route, method, path, `{"topic":"x","data":1}`, nil, 401, []string{"status=401"}},
			scenario{"user " + route, method, path, `{"topic":"x","data":1}`, user, 403, []string{"status=403"}},
		)
	}

	// an audience that came out empty is not everybody
	for body, field := range map[string]string{
		`"to":null`: "to", `"to":{}`: "to", `"to":""`: "to", `"to":{"users":null}`: "to.users", `"to":{"filter":""}`: "to.filter", `"to":{"filter":"  "}`: "to.filter",
		`"to":{"auth":""}`: "to.auth", `"to":{"auth":null}`: "to.auth", `"to":{"collections":null}`: "to.collections", `"to":{"clients":null,"auth":"user"}`: "to.clients",
		`"to":{"users":["users:1"],"users":null}`: "to.users", `"except":null`: "except", `"except":{}`: "except", `"except":{"users":null}`: "except.users", `"except":{"clients":null}`: "except.clients",
	} {
		scenarios = append(scenarios, scenario{body, "POST", "/api/notify", `{"topic":"x","data":1,` + body + `}`, superuser, 400,
			[]string{"data." + field + ".code=validation_invalid_"}})
	}

	for _, s := range scenarios {
		(&tests.ApiScenario{
			Name:               s.name,
			Method:             s.method,
			URL:                s.path,
			Body:               strings.NewReader(s.body),
			Headers:            s.headers,
			ExpectedStatus:     s.status,
			NotExpectedContent: []string{"hooks.", "Go struct"},
			AfterTestFunc: func(t testing.TB, _ *tests.TestApp, response *http.Response) {
				var answer any
				if err := json.UnmarshalRead(response.Body, &answer); err != nil {
					t.Fatal(err)
				}
				for _, want := range s.want {
					path, part, _ := strings.Cut(want, "=")
					if got, ok := at(answer, path); !ok || !strings.Contains(fmt.Sprint(got), part) {
						t.Errorf("%s is %v, want %q in it; the answer is %v", path, got, part, answer)
					}
				}
			},
			TestAppFactory: clone,
		}).Test(t)
	}
}

// at returns what stands at path in decoded JSON.
func at(value any, path string) (any, bool) {
	for _, name := range strings.Split(path, ".") {
		switch inner := value.(type) {
		case map[string]any:
			var ok bool
			if value, ok = inner[name]; !ok {
				return nil, false
			}
		case []any:
			i, err := strconv.Atoi(name)
			if err != nil || i >= len(inner) {
				return nil, false
			}
			value = inner[i]
		default:
			return nil, false
		}
	}
	return value, true
}

func batchOf(count int) string {
	return `{"messages":[` + strings.Repeat(`{"topic":"x","data":1},`, count-1) + `{"topic":"x","data":1}]}`
}

// TestSend is the whole way, over real connections.
func TestSend(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	token := pbtest.Token(t, w.root)

	guest := server.Subscribe(t, nil, "example", "fence")
	tab := server.Subscribe(t, w.ann, "example", `example?options=%7B%22query%22%3A%7B%22a%22%3A%221%22%7D%7D`, "fence")
	phone := server.Subscribe(t, w.ann, "example", "fence")
	bob := server.Subscribe(t, w.bob, "example2", "fence")

	send := func(body string, want int) {
		t.Helper()
		status, answer := server.Do(t, "POST", "/api/notify", token, body)
		if status != http.StatusOK || answer.(map[string]any)["queued"] != float64(want) {
			t.Fatalf("%d %v, want %d queued", status, answer, want)
		}
	}
	send(`{"topic":"example","data":{"n": 1.0,
		"text":"a\nb"}}`, 3)
	send(`{"topic":"example","data":2,"to":{"users":["`+pbtest.Ref(w.ann)+`"]}}`, 2)
	send(`{"topic":"example","data":3,"to":{"auth":"guest"}}`, 1)
	send(`{"topic":"fence","data":"end"}`, 4)

	first := `{"n":1.0,"text":"a\nb"}`
	guest.Expect(t, "example", first)
	guest.Expect(t, "example", "3")
	phone.Expect(t, "example", first)
	phone.Expect(t, "example", "2")
	for _, data := range []string{first, first, "2", "2"} { // its two keys, in any order
		if event := tab.Next(t); event.Data != data || !strings.HasPrefix(event.Type, "example") {
			t.Errorf("got %v, want data %s", event, data)
		}
	}
	for _, subscriber := range []*pbtest.Subscriber{guest, tab, phone, bob} {
		subscriber.Expect(t, "fence", `"end"`) // and nothing before it
	}

	// a batch keeps its order, and goes on after a bad message
	var messages []map[string]any
	for i := range 50 {
		messages = append(messages, map[string]any{"topic": "example2", "data": i})
	}
	messages[20]["topic"] = "@bad"
	status, answer := server.Do(t, "POST", "/api/notify/batch", token, map[string]any{"messages": messages})
	if status != http.StatusOK || len(answer.([]any)) != 50 {
		t.Fatalf("%d %v", status, answer)
	}
	for i := range 50 {
		if i != 20 {
			bob.Expect(t, "example2", fmt.Sprint(i))
		}
	}

	// a retry is not sent again
	for range 3 {
		send(`{"topic":"example2","data":"once","id":"retry"}`, 1)
	}
	send(`{"topic":"fence","data":"end"}`, 4)
	bob.Expect(t, "example2", `"once"`)
	bob.Expect(t, "fence", `"end"`)
}

func TestTopicsAndClients(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	token := pbtest.Token(t, w.root)

	guest := server.Subscribe(t, nil, "example")
	tab := server.Subscribe(t, w.ann, "example", "@inbox")
	phone := server.Subscribe(t, w.ann, "example?options=%7B%7D")
	bob := server.Subscribe(t, w.bob, "other")

	list := func(path string) (ids []string, items []any) {
		t.Helper()
		status, answer := server.Do(t, "GET", path, token, nil)
		if status != http.StatusOK {
			t.Fatalf("%d %v", status, answer)
		}
		items = answer.(map[string]any)["items"].([]any)
		for _, item := range items {
			id, _ := item.(map[string]any)["id"].(string)
			ids = append(ids, id)
		}
		return ids, items
	}

	_, topics := list("/api/notify/topics")
	if got, want := fmt.Sprint(topics), "[map[subscribers:1 topic:@inbox users:1] map[subscribers:3 topic:example users:1] map[subscribers:1 topic:other users:1]]"; got != want {
		t.Errorf("topics %s, want %s", got, want)
	}

	for path, want := range map[string][]string{
		"":                               {guest.ID, tab.ID, phone.ID, bob.ID},
		"?perPage=3&page=2":              {bob.ID},
		"?topic=example":                 {guest.ID, tab.ID, phone.ID},
		"?user=" + pbtest.Ref(w.ann):     {tab.ID, phone.ID},
		"?topic=other&user=users:nobody": nil,
	} {
		if ids, _ := list("/api/notify/clients" + path); fmt.Sprint(ids) != fmt.Sprint(want) {
			t.Errorf("clients%s: %v, want %v", path, ids, want)
		}
	}
	_, items := list("/api/notify/clients")
	client := items[1].(map[string]any)
	if client["auth"] != pbtest.Ref(w.ann) || client["name"] != "Ann" || client["ip"] != "127.0.0.1" ||
		fmt.Sprint(client["subscriptions"]) != "[@inbox example]" || client["queued"] != float64(0) || client["connected"] == nil {
		t.Errorf("client %v", client)
	}
	if name := items[3].(map[string]any)["name"]; name != "bob@x.com" {
		t.Errorf("name %v, want the email of one without a name", name)
	}
	if auth := items[0].(map[string]any)["auth"]; auth != nil {
		t.Errorf("auth %v of a guest", auth)
	}

	if status, _ := server.Do(t, "DELETE", "/api/notify/clients/"+guest.ID, token, nil); status != http.StatusNoContent {
		t.Errorf("status %d", status)
	}
	guest.ExpectEnd(t)
	status, answer := server.Do(t, "DELETE", "/api/notify/clients?user="+pbtest.Ref(w.ann), token, nil)
	if status != http.StatusOK || answer.(map[string]any)["disconnected"] != float64(2) {
		t.Errorf("%d %v", status, answer)
	}
	tab.ExpectEnd(t)
	phone.ExpectEnd(t)
	if ids, _ := list("/api/notify/clients"); fmt.Sprint(ids) != fmt.Sprint([]string{bob.ID}) {
		t.Errorf("left: %v", ids)
	}
}

// TestRateLimit checks that PocketBase's own limits hold for the routes.
func TestRateLimit(t *testing.T) {
	w := newWorld(t)
	w.Settings().RateLimits.Enabled = true
	w.Settings().RateLimits.Rules = []core.RateLimitRule{{Label: "POST /api/notify", MaxRequests: 2, Duration: 60}}
	server := pbtest.Serve(t, w)

	for i, want := range []int{401, 401, 429} {
		if status, _ := server.Do(t, "POST", "/api/notify", "", `{}`); status != want {
			t.Errorf("request %d: status %d, want %d", i, status, want)
		}
	}
	body := `{"topic":"x","data":"` + strings.Repeat("x", 33<<20) + `"}`
	if status, _ := server.Do(t, "POST", "/api/notify", pbtest.Token(t, w.root), body); status != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d for 33 MiB, want 413", status)
	}
}
