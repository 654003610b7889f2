package notify_test

import (
	"bytes"
	"encoding/json/jsontext"
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pocketbase/pocketbase/core"
	"github.com/tmaxmax/go-sse"

	"herald/internal/pbtest"
	"herald/notify"
)

func TestTopics(t *testing.T) {
	app := pbtest.NewApp(t)
	if err := app.Save(core.NewBaseCollection("chat")); err != nil {
		t.Fatal(err)
	}
	n := notify.New(app, notify.Config{})
	users, _ := app.FindCollectionByNameOrId("users")
	recordID := core.GenerateDefaultRandomId()

	for topic, want := range map[string]error{
		"example":                    nil,
		"chat/42":                    nil, // no record's id
		"chat/42/typing":             nil,
		"chat/" + recordID + "/more": nil,
		"no-collection/*":            nil,
		"a/" + recordID:              nil,
		"Ünïcødé/日本":                 nil,
		" spaces and: colons ":       nil,
		"*":                          nil,
		"PB_CONNECTED":               nil,
		strings.Repeat("x", 255):     nil,

		"":                       notify.ErrRequired,
		strings.Repeat("x", 256): notify.ErrInvalidTopic,
		strings.Repeat("é", 128): notify.ErrInvalidTopic, // 256 bytes
		"a?b":                    notify.ErrInvalidTopic,
		"?":                      notify.ErrInvalidTopic,
		"a\nb":                   notify.ErrInvalidTopic,
		"a\rb":                   notify.ErrInvalidTopic,
		"a\x00b":                 notify.ErrInvalidTopic,
		"a\x7fb":                 notify.ErrInvalidTopic,
		"a\u0085b":               notify.ErrInvalidTopic,
		"a\xffb":                 notify.ErrInvalidTopic,
		"@":                      notify.ErrReservedTopic,
		"@inbox":                 notify.ErrReservedTopic,
		"@oauth2":                notify.ErrReservedTopic,
		"PB_CONNECT":             notify.ErrReservedTopic,
		"users":                  notify.ErrReservedTopic,
		"Users":                  notify.ErrReservedTopic, // PocketBase's names ignore case
		users.Id:                 notify.ErrReservedTopic,
		"users/*":                notify.ErrReservedTopic,
		users.Id + "/*":          notify.ErrReservedTopic,
		"users/" + recordID:      notify.ErrReservedTopic, // there is no such record yet
		"chat/" + recordID:       notify.ErrReservedTopic,
		"_superusers":            notify.ErrReservedTopic,
	} {
		_, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: 1})
		if !errors.Is(err, want) {
			t.Errorf("topic %q: error %v, want %v", topic, err, want)
		}
		var errs notify.Errors
		if want != nil && (!errors.As(err, &errs) || errs[0].Field != "topic") {
			t.Errorf("topic %q: error %v does not name the field", topic, err)
		}
	}
}

func TestSystemTopics(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	client := connect(app, nil, "@inbox")

	if _, err := n.SendSystem(t.Context(), notify.Message{Topic: "@inbox", Data: 1}); err != nil {
		t.Fatal(err)
	}
	if len(received(client)) != 1 {
		t.Error("the system message did not arrive")
	}
	if _, err := n.SendSystem(t.Context(), notify.Message{Topic: "@a\nb", Data: 1}); !errors.Is(err, notify.ErrInvalidTopic) {
		t.Errorf("error %v, want %v", err, notify.ErrInvalidTopic)
	}
}

func TestKeys(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	for key, want := range map[string]bool{
		"example":                             true,
		`example?options={"query":{"a":"1"}}`: true,
		"example?options=%7B%7D":              true,
		"example?":                            true,
		"example2":                            false,
		"example2?options=%7B%7D":             false,
		"exampl":                              false,
		"example/1":                           false,
		"Example":                             false,
		"example?a\nevent:forged":             false, // would break its own stream
	} {
		client := connect(app, nil, key)
		if _, err := n.Send(t.Context(), notify.Message{Topic: "example", Data: 1}); err != nil {
			t.Fatal(err)
		}
		messages := received(client)
		if got := len(messages) == 1; got != want {
			t.Errorf("key %q: got %v, want %v", key, got, want)
		} else if got && messages[0].Name != key {
			t.Errorf("key %q: the message came under %q", key, messages[0].Name)
		}
		app.SubscriptionsBroker().Unregister(client.Id())
	}
}

func TestUnsubscribe(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	client := connect(app, nil, "a", "a", "a?options=%7B%7D", "b", "", "@x")

	expect := func(step string, want map[string]int) {
		t.Helper()
		for topic, count := range want {
			if _, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: 1}); err != nil {
				t.Fatal(err)
			}
			if got := len(received(client)); got != count {
				t.Errorf("%s: topic %q came %d times, want %d", step, topic, got, count)
			}
			stock := len(client.Subscriptions(topic + "?"))
			if stock != count {
				t.Errorf("%s: PocketBase's client has %d keys of %q, want %d", step, stock, topic, count)
			}
		}
	}
	expect("at first", map[string]int{"a": 2, "b": 1, "c": 0})
	client.Unsubscribe("a", "c")
	expect("without a", map[string]int{"a": 1, "b": 1})
	client.Unsubscribe("a?options=%7B%7D")
	expect("without its options", map[string]int{"a": 0, "b": 1})
	client.Subscribe("a", "c")
	expect("with a again", map[string]int{"a": 1, "b": 1, "c": 1})
	client.Unsubscribe()
	expect("without any", map[string]int{"a": 0, "b": 0, "c": 0})
}

func TestResubscribe(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	client := connect(app, nil, "a", "b")
	gets := func(want string) {
		t.Helper()
		got := ""
		for _, topic := range []string{"a", "b", "c"} {
			if _, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: 1}); err != nil {
				t.Fatal(err)
			}
			if len(received(client)) > 0 {
				got += topic
			}
		}
		if got != want {
			t.Errorf("gets %q, want %q", got, want)
		}
	}

	resubscribe := func(replace func() error, keys ...string) error {
		admission, err := n.Admit(t.Context(), client, nil, keys)
		if err != nil {
			t.Fatal(err)
		}
		return client.Resubscribe(admission, nil, replace)
	}
	err := resubscribe(func() error {
		client.Unsubscribe()
		gets("ab")
		client.Subscribe("b", "c")
		gets("bc")
		return nil
	}, "b", "c")
	if err != nil {
		t.Fatal(err)
	}
	gets("bc")

	refused := errors.New("refused")
	if err := resubscribe(func() error { return refused }, "d"); err != refused {
		t.Errorf("error %v", err)
	}
	gets("bc")

	// to nothing at all
	if err := resubscribe(func() error { client.Unsubscribe(); client.Subscribe(); return nil }); err != nil {
		t.Fatal(err)
	}
	gets("")
}

// FuzzFrame sends whatever passes the checks and reads the frame back with a
// parser that follows the SSE standard: it has to find one event, under the key
// the client subscribed to, with the same data.
func FuzzFrame(f *testing.F) {
	for _, topic := range []string{"example", " lead", "a:b", "@x", "a\nb", "日本", "a\u2028b", "a\xffb", "PB_CONNECT", "id:x"} {
		for _, data := range []string{`{"a":1}`, "{\n \"a\" :\r\n [1, 2]\n}", `"\n\ndata: x"`, "null", "\ufeff1", `"` + "\u2028\u0085" + `"`, `{"a":1,"a":2}`, "", "1 2", "\"a\nb\""} {
			f.Add(topic, "", data)
			f.Add(topic, `{"query":{"x":"y"}}`, data)
		}
	}
	app := pbtest.NewApp(f)
	n := notify.New(app, notify.Config{})

	f.Fuzz(func(t *testing.T, topic, options, data string) {
		key := topic
		if options != "" {
			key += "?options=" + url.QueryEscape(options)
		}
		client := connect(app, nil, key)
		defer app.SubscriptionsBroker().Unregister(client.Id())

		report, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: jsontext.Value(data)})
		messages := received(client)
		if err != nil {
			if len(messages) != 0 {
				t.Fatalf("refused with %v, and sent", err)
			}
			return
		}
		if report.Queued != 1 || len(messages) != 1 {
			t.Fatalf("report %+v and %d messages, want 1", report, len(messages))
		}
		if !utf8.ValidString(topic) || strings.ContainsAny(topic, "?\r\n\x00") || len(topic) > notify.MaxTopicLength || topic == "" {
			t.Fatalf("topic %q was not refused", topic)
		}

		frame := bytes.NewReader(notify.EncodeSSE("", messages[0].Name, messages[0].Data))
		var events []sse.Event
		for event, err := range sse.Read(frame, &sse.ReadConfig{MaxEventSize: 1 << 20}) {
			if err != nil {
				t.Fatal(err)
			}
			events = append(events, event)
		}
		if len(events) != 1 {
			t.Fatalf("%d events in the frame: %q", len(events), events)
		}
		if events[0].Type != key {
			t.Errorf("event %q, want %q", events[0].Type, key)
		}
		want := jsontext.Value(data)
		if !want.IsValid() { // half an emoji, or a name twice
			if want, err = notify.NormalizeJSON(want); err != nil {
				t.Fatal(err)
			}
		}
		if err := want.Compact(); err != nil {
			t.Fatal(err)
		}
		if events[0].Data != string(want) {
			t.Errorf("data %q, want %q", events[0].Data, want)
		}
	})
}

// FuzzTopic checks what the engine says of a topic against the broker: a topic
// is taken only if it finds exactly the subscriptions to it.
func FuzzTopic(f *testing.F) {
	for _, topic := range []string{"a", "a/b", "users", "users/*", "@a", "a?b", "\x00", "\xff", strings.Repeat("x", 256)} {
		f.Add(topic)
	}
	app := pbtest.NewApp(f)
	n := notify.New(app, notify.Config{})

	f.Fuzz(func(t *testing.T, topic string) {
		clients := []*notify.Client{connect(app, nil, topic), connect(app, nil, topic+"x"), connect(app, nil, "x"+topic)}
		defer func() {
			for _, client := range clients {
				app.SubscriptionsBroker().Unregister(client.Id())
			}
		}()
		_, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: 1})
		var got []int
		for _, client := range clients {
			got = append(got, len(received(client)))
		}
		want := []int{1, 0, 0}
		if err != nil {
			want = []int{0, 0, 0}
		}
		if !slices.Equal(got, want) {
			t.Errorf("topic %q (error %v): received %v, want %v", topic, err, got, want)
		}
	})
}
