package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

const withEnvelope = "?options=%7B%22query%22%3A%7B%22envelope%22%3A%22true%22%7D%7D"

const publishPath = "/api/notify/publish"

func TestPublish(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "42", w.ann)
	addMember(t, w, "42", w.bob)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule, "publishRule": memberRule, "maxSize": 20})
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "publishRule": "*"})
	addChannel(t, w, map[string]any{"pattern": "{any}", "subscribeRule": "*", "publishRule": "*"})
	addChannel(t, w, map[string]any{"pattern": "users/{id...}", "subscribeRule": "*", "publishRule": "*"})
	addChannel(t, w, map[string]any{"pattern": "broken/{x}", "publishRule": `@collection.room_members.room ?= @request.query.x`})
	server := pbtest.Serve(t, w)
	ann := server.Subscribe(t, w.ann, "chat/42", "fence")
	phone := server.Subscribe(t, w.ann, "chat/42", "fence")
	bob := server.Subscribe(t, w.bob, "chat/42"+withEnvelope, "chat/42", "fence")
	guest := server.Subscribe(t, nil, "fence")
	everyone := []*pbtest.Subscriber{ann, phone, bob, guest}

	long := strings.Repeat("x", 300)
	for _, test := range []struct {
		name   string
		who    *core.Record
		body   string
		status int
		want   []string // of the answer, "path=value"
		gets   []*pbtest.Subscriber
	}{
		{"to all", w.ann, `{"topic":"chat/42","data":{"b":1,"a":2.50}}`, 200, []string{"topic=chat/42"}, []*pbtest.Subscriber{ann, phone, bob}},
		{"with id", w.ann, `{"topic":"chat/42","data":1,"id":"m1"}`, 200, []string{"id=m1"}, []*pbtest.Subscriber{ann, phone, bob}},
		{"the same again", w.ann, `{"topic":"chat/42","data":1,"id":"m1"}`, 200, []string{"id=m1"}, nil},
		{"another's id", w.bob, `{"topic":"chat/42","data":1,"id":"m1"}`, 200, []string{"id=m1"}, []*pbtest.Subscriber{ann, phone, bob}},
		{"without myself", w.ann, `{"topic":"chat/42","data":1,"self":false,"clientId":"` + ann.ID + `"}`, 200, nil, []*pbtest.Subscriber{phone, bob}},
		{"with myself", w.ann, `{"topic":"chat/42","data":1,"self":true,"clientId":"` + ann.ID + `"}`, 200, nil, []*pbtest.Subscriber{ann, phone, bob}},
		{"without Bob", w.ann, `{"topic":"chat/42","data":1,"except":{"users":["users:` + w.bob.Id + `"]}}`, 200, nil, []*pbtest.Subscriber{ann, phone}},
		{"without a client", w.ann, `{"topic":"chat/42","data":1,"except":{"clients":["` + bob.ID + `"]}}`, 200, nil, []*pbtest.Subscriber{ann, phone}},
		{"large enough", w.ann, `{"topic":"chat/42","data":   "123456789012345678"   }`, 200, nil, []*pbtest.Subscriber{ann, phone, bob}},
		{"spaces do not count", w.ann, `{"topic":"chat/42","data":[1,            2,            3]}`, 200, nil, []*pbtest.Subscriber{ann, phone, bob}},
		{"superuser", w.root, `{"topic":"chat/42","data":"as large as the server takes"}`, 200, []string{"matched=3", "queued=3"}, []*pbtest.Subscriber{ann, phone, bob}},

		{"somebody else's client", w.ann, `{"topic":"chat/42","data":1,"self":false,"clientId":"` + bob.ID + `"}`, 400, []string{"data.clientId.code=validation_invalid_client"}, nil},
		{"a guest's client", w.ann, `{"topic":"chat/42","data":1,"clientId":"` + guest.ID + `"}`, 400, []string{"data.clientId.code=validation_invalid_client"}, nil},
		{"no client", w.ann, `{"topic":"chat/42","data":1,"self":false,"clientId":"nope"}`, 400, []string{"data.clientId.code=validation_invalid_client"}, nil},
		{"without a client's id", w.ann, `{"topic":"chat/42","data":1,"self":false}`, 400, []string{"data.clientId.code=validation_invalid_client"}, nil},
		{"too large", w.ann, `{"topic":"chat/42","data":"1234567890123456789"}`, 413, []string{"data.data.code=validation_too_large", "status=413"}, nil},
		{"not in the room", w.ann, `{"topic":"chat/43","data":1}`, 403, []string{"status=403", "message=You are not allowed to publish to this topic."}, nil},
		{"not in the room, too large", w.ann, `{"topic":"chat/43","data":"` + long + `"}`, 403, nil, nil},
		{"guest", nil, `{"topic":"chat/42","data":1}`, 403, nil, nil},
		{"no channel", w.ann, `{"topic":"a/b/c/d","data":1}`, 403, []string{"message=You are not allowed to publish to this topic."}, nil},
		{"system topic", w.ann, `{"topic":"@inbox","data":1}`, 403, []string{"message=You are not allowed to publish to this topic."}, nil},
		{"PB_CONNECT", w.ann, `{"topic":"PB_CONNECT","data":1}`, 403, nil, nil},
		{"record topic", w.ann, `{"topic":"users/*","data":1}`, 403, nil, nil},
		{"collection", w.ann, `{"topic":"users","data":1}`, 403, nil, nil},
		{"record", w.ann, `{"topic":"users/` + w.bob.Id + `","data":1}`, 403, nil, nil},
		{"system topic, superuser", w.root, `{"topic":"@inbox","data":1}`, 400, []string{"data.topic.code=validation_reserved_topic"}, nil},
		{"no topic", w.ann, `{"data":1}`, 400, []string{"data.topic.code=validation_required"}, nil},
		{"bad topic", w.ann, `{"topic":"a?b","data":1}`, 400, []string{"data.topic.code=validation_invalid_topic"}, nil},
		{"long topic", w.ann, `{"topic":"` + long + `","data":1}`, 400, []string{"data.topic.code=validation_invalid_topic"}, nil},
		{"no data", w.ann, `{"topic":"chat/42"}`, 400, []string{"data.data.code=validation_required"}, nil},
		{"bad id", w.ann, `{"topic":"chat/42","data":1,"id":"a\u0000"}`, 400, []string{"data.id.code=validation_invalid_id"}, nil},
		{"an exception that is nobody", w.ann, `{"topic":"chat/42","data":1,"except":{"users":["room_members:x","no_such_collection:x","users:` + w.bob.Id + `"]}}`, 200, nil, []*pbtest.Subscriber{ann, phone}},
		{"bad exception", w.ann, `{"topic":"chat/42","data":1,"except":{"users":["x"]}}`, 400, []string{"data.except.users.0.code=validation_invalid_audience"}, nil},
		{"forged sender", w.ann, `{"topic":"chat/42","data":1,"from":"users:` + w.bob.Id + `"}`, 400, []string{"data.from.code=validation_unknown_field"}, nil},
		{"an audience", w.ann, `{"topic":"chat/42","data":1,"to":{"auth":"any"}}`, 400, []string{"data.to.code=validation_unknown_field"}, nil},
		{"no JSON", w.ann, `topic`, 400, []string{"message=The request body is not valid JSON"}, nil},
		{"two names", w.ann, `{"topic":"chat/42","data":{"a":1,"a":2}}`, 200, nil, []*pbtest.Subscriber{ann, phone, bob}},
		{"half an emoji", w.ann, `{"topic":"chat/42","data":"hi \ud83d"}`, 200, nil, []*pbtest.Subscriber{ann, phone, bob}},
		{"no exception", w.ann, `{"topic":"chat/42","data":1,"except":{"users":null}}`, 400, []string{"data.except.users.code=validation_invalid_audience"}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, answer := server.Do(t, "POST", publishPath, pbtest.Token(t, test.who), test.body)
			if status != test.status {
				t.Errorf("%d %v", status, answer)
			}
			if _, tells := at(answer, "matched"); tells && test.who != w.root {
				t.Errorf("a client is told how many listen: %v", answer)
			}
			if text := fmt.Sprint(answer); test.who != nil && strings.Contains(text, w.bob.Id) {
				t.Errorf("the answer names Bob: %s", text)
			}
			for _, want := range test.want {
				path, part, _ := strings.Cut(want, "=")
				if got, ok := at(answer, path); !ok || !strings.Contains(fmt.Sprint(got), part) {
					t.Errorf("%s is %v, want %q; the answer is %v", path, got, part, answer)
				}
			}
			mustSend(t, w, "fence", "over")
			for _, subscriber := range everyone {
				got := 0
				for event := subscriber.Next(t); event.Type != "fence"; event = subscriber.Next(t) {
					got++
				}
				want := 0
				for _, s := range test.gets {
					if s == subscriber {
						if want = 1; s == bob {
							want = 2 // under both keys
						}
					}
				}
				if got != want {
					t.Errorf("got %d messages, want %d", got, want)
				}
			}
		})
	}

	// the header
	request, err := http.NewRequest("POST", server.URL+publishPath, strings.NewReader(`{"topic":"chat/42","data":1,"self":false}`))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Authorization", pbtest.Token(t, w.ann))
	request.Header.Set("X-Client-Id", ann.ID)
	response, err := server.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if body, _ := io.ReadAll(response.Body); response.StatusCode != 200 {
		t.Errorf("%d %s", response.StatusCode, body)
	}
	mustSend(t, w, "chat/42", 2)
	ann.Expect(t, "chat/42", "2")
	phone.Expect(t, "chat/42", "1")
}

// TestEnvelope: what those get who ask for it.
func TestEnvelope(t *testing.T) {
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "publishRule": "*"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.bob, "open"+withEnvelope)
	off := server.Subscribe(t, w.bob, "open"+strings.Replace(withEnvelope, "true", "false", 1), "open?options=nonsense", "open?options=%7B%22query%22%3A%7B%22envelope%22%3A%22maybe%22%7D%7D")

	for _, test := range []struct {
		send func() error
		from string
	}{
		{func() error { return notify.Notify(w, "open", map[string]any{"a": "<b>"}) }, "null"},
		{func() error { return publishAs(t, server, w.ann, `{"topic":"open","data":{"a":"<b>"}}`) }, `"users:` + w.ann.Id + `"`},
		{func() error { return publishAs(t, server, nil, `{"topic":"open","data":{"a":"<b>"}}`) }, "null"},
		{func() error { return publishAs(t, server, w.root, `{"topic":"open","data":{"a":"<b>"}}`) }, `"_superusers:` + w.root.Id + `"`},
	} {
		if err := test.send(); err != nil {
			t.Fatal(err)
		}
		event := client.Next(t)
		var envelope struct {
			ID    string         `json:"id"`
			Topic string         `json:"topic"`
			Epoch *string        `json:"epoch"`
			Seq   *int           `json:"seq"`
			Time  string         `json:"time"`
			From  *string        `json:"from"`
			Data  map[string]any `json:"data"`
		}
		if err := json.Unmarshal([]byte(event.Data), &envelope, json.RejectUnknownMembers(true)); err != nil {
			t.Fatalf("%v in %s", err, event.Data)
		}
		for _, part := range []string{`"id":"` + envelope.ID + `"`, `"topic":"open"`, `"epoch":`, `"seq":`, `"time":"20`, `"from":` + test.from, `"data":{"a":"<b>"}`} {
			if !strings.Contains(event.Data, part) || envelope.ID == "" {
				t.Errorf("%s is missing in %s", part, event.Data)
			}
		}
		for range 3 {
			if event := off.Next(t); event.Data != `{"a":"<b>"}` {
				t.Errorf("got %s", event.Data)
			}
		}
	}
}

func publishAs(t testing.TB, server *pbtest.Server, auth *core.Record, body string) error {
	t.Helper()
	if status, answer := server.Do(t, "POST", publishPath, pbtest.Token(t, auth), body); status != 200 {
		return fmt.Errorf("%d %v", status, answer)
	}
	return nil
}

// TestPublishRate: each user, and each guest's IP, has their own limit in each
// channel.
func TestPublishRate(t *testing.T) {
	w := newWorld(t)
	for _, pattern := range []string{"a/{x}", "b/{x}"} {
		// so slow that no test is slower
		addChannel(t, w, map[string]any{"pattern": pattern, "publishRule": "*", "rateLimit": 0.001})
	}
	burst := addChannel(t, w, map[string]any{"pattern": "burst", "publishRule": "*", "rateLimit": 3.5})
	server := pbtest.Serve(t, w)
	try := func(auth *core.Record, topic string) (int, http.Header) {
		t.Helper()
		request, err := http.NewRequest("POST", server.URL+publishPath, strings.NewReader(`{"topic":"`+topic+`","data":1}`))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Authorization", pbtest.Token(t, auth))
		request.Header.Set("Content-Type", "application/json")
		response, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if response.StatusCode == 429 {
			var answer map[string]any
			if err := json.UnmarshalRead(response.Body, &answer); err != nil || answer["status"] != 429.0 {
				t.Errorf("%v %v", answer, err)
			}
		}
		return response.StatusCode, response.Header
	}
	for _, auth := range []*core.Record{w.ann, w.bob, nil} {
		for _, topic := range []string{"a/1", "b/1"} {
			if status, _ := try(auth, topic); status != 200 {
				t.Errorf("%s: %d", topic, status)
			}
			status, header := try(auth, strings.Replace(topic, "1", "2", 1))
			seconds, err := strconv.Atoi(header.Get("Retry-After"))
			if status != 429 || err != nil || seconds < 900 || seconds > 1000 {
				t.Errorf("%s: %d, Retry-After %q", topic, status, header.Get("Retry-After"))
			}
		}
	}
	for range 5 {
		if status, _ := try(w.root, "a/1"); status != 200 {
			t.Errorf("superuser: %d", status)
		}
	}

	// a user may use a second's number at once, and a change counts at once
	allowed := 0
	for range 20 {
		if status, _ := try(w.ann, "burst"); status == 200 {
			allowed++
		}
	}
	if allowed < 4 || allowed == 20 {
		t.Errorf("%d of 20 in a burst", allowed)
	}
	burst.Set("rateLimit", 0)
	save(t, w, burst)
	for range 20 {
		if status, _ := try(w.ann, "burst"); status != 200 {
			t.Errorf("without a limit: %d", status)
		}
	}
}

// TestOnPublish: an application sees, changes and refuses what clients publish.
func TestOnPublish(t *testing.T) {
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": "*", "publishRule": `@request.auth.id != ""`, "maxSize": 150})
	hooks.OnPublish(w).BindFunc(func(e *hooks.PublishEvent) error {
		if e.Channel.GetString("pattern") != "chat/{room}" || e.Topic != "chat/1" {
			t.Errorf("channel %v, topic %q", e.Channel, e.Topic)
		}
		if info, err := e.RequestInfo(); err != nil || info.Body["topic"] != e.Topic {
			t.Errorf("request %v %v", info, err)
		}
		switch data := e.Data.(type) {
		case string:
			if strings.Contains(data, "damn") {
				return e.BadRequestError("Mind your language.", nil)
			}
			if data == "quiet" {
				return nil // neither sent nor answered by itself
			}
			if data == "channel" {
				e.Data = make(chan int)
			}
			if data == "half" {
				e.Data = "hi \xed\xa0\xbd" // half an emoji
			}
		case map[string]any:
			data["name"] = e.Auth.GetString("name")
			if data["owner"] != nil {
				data["owner"] = int64(1234567890123456789)
				delete(data, "was")
			}
			if ids, ok := data["ids"].([]any); ok {
				data["ids"] = append([]any{"x"}, ids...)
				data["copy"], data["count"] = data["of"], 1.0
			}
			e.ExceptUsers = append(e.ExceptUsers, pbtest.Ref(w.bob))
		}
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	ann := server.Subscribe(t, w.ann, "chat/1")
	bob := server.Subscribe(t, w.bob, "chat/1")

	for _, test := range []struct {
		data     string
		status   int
		ann, bob string
	}{
		{`"hello"`, 200, `"hello"`, `"hello"`},
		{`12345678901234567890.10`, 200, `12345678901234567890.10`, `12345678901234567890.10`},
		{`{"text":"hi"}`, 200, `{"name":"Ann","text":"hi"}`, ``},
		// an integer that no float64 holds, beside what is changed
		{`{"id":9007199254740993,"l":[{"n":1.10},1.0]}`, 200, `{"id":9007199254740993,"l":[{"n":1.10},1.0],"name":"Ann"}`, ``},
		// such integers in a list that has become longer, two of which are one float64
		{`{"ids":[9007199254740993,9007199254740992,{"n":-9007199254740995,"short":1.0}],"of":9007199254740997}`, 200,
			`{"copy":9007199254740997,"count":1,"ids":["x",9007199254740993,9007199254740992,{"n":-9007199254740995,"short":1}],"name":"Ann","of":9007199254740997}`, ``},
		// an exact integer of the handler's own, which is one float64 with a client's
		{`{"owner":1,"was":1234567890123456700}`, 200, `{"name":"Ann","owner":1234567890123456789}`, ``},
		// one in many characters is no pattern for others
		{`{"was":1.0000000000000000,"ids":[1,1]}`, 200, `{"copy":null,"count":1,"ids":["x",1,1],"name":"Ann","was":1.0000000000000000}`, ``},
		{`"half"`, 200, "\"hi \ufffd\ufffd\ufffd\"", "\"hi \ufffd\ufffd\ufffd\""},
		{`"hi \ud83d"`, 200, "\"hi \ufffd\"", "\"hi \ufffd\""},
		{`{"a":1,"b":2,"a":3}`, 200, `{"a":3,"b":2,"name":"Ann"}`, ``},
		{`"damn it"`, 400, ``, ``},
		{`"quiet"`, 204, ``, ``},
		{`"channel"`, 400, ``, ``},
		{`[{"z":1,"a":[]}]`, 200, `[{"z":1,"a":[]}]`, `[{"z":1,"a":[]}]`},
		{`"` + strings.Repeat("x", 160) + `"`, 413, ``, ``},
	} {
		status, answer := server.DoText(t, "POST", publishPath, pbtest.Token(t, w.ann), `{"topic":"chat/1","data":`+test.data+`}`)
		if status != test.status && !(test.status == 204 && status == 200 && answer == "") {
			t.Errorf("%s: %d %s", test.data, status, answer)
		}
		if test.ann != "" {
			ann.Expect(t, "chat/1", test.ann)
		}
		if test.bob != "" {
			bob.Expect(t, "chat/1", test.bob)
		}
	}
	// the server's own messages are not its business
	mustSend(t, w, "chat/1", "damn")
	ann.Expect(t, "chat/1", `"damn"`)
	bob.Expect(t, "chat/1", `"damn"`)
}

// TestGuestsIDs: guests behind one address cannot take each other's ids, and a retry of one
// is one.
func TestGuestsIDs(t *testing.T) {
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "publishRule": "*"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "open", "fence")
	for _, data := range []string{"one", "two", "one"} {
		if status, text := server.DoText(t, "POST", publishPath, "", fmt.Sprintf(`{"topic":"open","data":%q,"id":"1"}`, data)); status != 200 {
			t.Fatal(text)
		}
	}
	mustSend(t, w, "fence", 1)
	client.Expect(t, "open", `"one"`)
	client.Expect(t, "open", `"two"`)
	client.Expect(t, "fence", `1`)
}

// TestPublishRequest: the rule sees the request's headers, and a bad token is none.
func TestPublishRequest(t *testing.T) {
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "publishRule": `@request.auth.id != "" && @request.headers.x_key = "1"`})
	server := pbtest.Serve(t, w)
	if status, _ := server.Do(t, "POST", publishPath, "not.a.token", `{"topic":"open","data":1}`); status != 403 {
		t.Errorf("status %d", status)
	}
	if status, _ := server.Do(t, "POST", publishPath, pbtest.Token(t, w.ann), `{"topic":"open","data":1}`); status != 403 {
		t.Errorf("without the header: %d", status)
	}
	request, err := http.NewRequest("POST", server.URL+publishPath, strings.NewReader(`{"topic":"open","data":1}`))
	if err != nil {
		t.Fatal(err)
	}
	request.Header = http.Header{"Authorization": {pbtest.Token(t, w.ann)}, "X-Key": {"1"}}
	response, err := server.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != 200 {
		t.Errorf("status %d", response.StatusCode)
	}
}
