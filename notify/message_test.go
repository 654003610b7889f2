package notify_test

import (
	"encoding/json/jsontext"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

func TestData(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{MaxSize: 100})
	client := connect(app, nil, "t")

	for name, test := range map[string]struct {
		data any
		want string
		err  error
	}{
		"nil":                  {data: nil, want: "null"},
		"map":                  {data: map[string]any{"b": 1, "a": "<é>"}, want: `{"a":"<é>","b":1}`},
		"struct":               {data: struct{ A []int }{}, want: `{"A":[]}`},
		"string with a break":  {data: "a\nb", want: `"a\nb"`},
		"raw, pretty":          {data: jsontext.Value("{\r\n  \"b\": 1.0,\n  \"a\": [ ]\n}"), want: `{"b":1.0,"a":[]}`},
		"raw, big number":      {data: jsontext.Value("12345678901234567890"), want: "12345678901234567890"},
		"raw, escapes":         {data: jsontext.Value(`"\u00e9\/"`), want: `"\u00e9\/"`},
		"raw, missing":         {data: jsontext.Value(nil), err: notify.ErrRequired},
		"raw, broken":          {data: jsontext.Value(`{"a":`), err: notify.ErrInvalidData},
		"raw, two values":      {data: jsontext.Value(`1 2`), err: notify.ErrInvalidData},
		"raw, double name":     {data: jsontext.Value(`{"b":1,"a":[1.0,{}],"b":{"c":2,"c":3}}`), want: `{"a":[1.0,{}],"b":{"c":3}}`},
		"raw, invalid UTF-8":   {data: jsontext.Value("\"\xff\""), want: "\"\ufffd\""},
		"half an emoji":        {data: map[string]any{"a": jsontext.Value(`"hi \ud83d"`)}, want: "{\"a\":\"hi \ufffd\"}"},
		"both halves":          {data: jsontext.Value(`["\ud83d\ude00","\ud83d"]`), want: "[\"😀\",\"\ufffd\"]"},
		"double, and broken":   {data: jsontext.Value(`{"a":1,"a":2`), err: notify.ErrInvalidData},
		"no JSON":              {data: math.NaN(), err: notify.ErrInvalidData},
		"channel":              {data: make(chan int), err: notify.ErrInvalidData},
		"as large as allowed":  {data: strings.Repeat("x", 98), want: `"` + strings.Repeat("x", 98) + `"`},
		"too large":            {data: strings.Repeat("x", 99), err: notify.ErrTooLarge},
		"space is not counted": {data: jsontext.Value(strings.Repeat(" ", 200) + "1"), want: "1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: test.data})
			if !errors.Is(err, test.err) {
				t.Fatalf("error %v, want %v", err, test.err)
			}
			messages := received(client)
			if test.err != nil {
				var errs notify.Errors
				if !errors.As(err, &errs) || errs[0].Field != "data" {
					t.Errorf("error %v does not name the field", err)
				}
				if len(messages) != 0 {
					t.Errorf("sent %q", messages)
				}
				return
			}
			if len(messages) != 1 || string(messages[0].Data) != test.want {
				t.Errorf("sent %q, want %q", messages, test.want)
			}
		})
	}
}

func TestAllFaultsAreNamed(t *testing.T) {
	n := notify.New(pbtest.NewApp(t), notify.Config{})
	_, err := n.Send(t.Context(), notify.Message{Topic: "@x", Data: make(chan int), To: notify.Audience{Auth: "x"}})
	for _, want := range []error{notify.ErrReservedTopic, notify.ErrInvalidData, notify.ErrInvalidAudience} {
		if !errors.Is(err, want) {
			t.Errorf("%v does not hold %v", err, want)
		}
	}
}

func TestNewIsOneAnApp(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{MaxSize: 7})
	if notify.New(app, notify.Config{}) != n || n.Config().MaxSize != 7 {
		t.Error("a second Notifier was made")
	}
}

func TestNotify(t *testing.T) {
	app := pbtest.NewApp(t)
	data := map[string]any{"test": 123}
	err := app.RunInTransaction(func(txApp core.App) error { return notify.Notify(txApp, "example", data) })
	if err == nil || !strings.Contains(err.Error(), "notify.New") {
		t.Errorf("in a transaction, before there is a Notifier: error %v does not tell what to do", err)
	}
	client := connect(app, nil, "example")

	expect := func(t *testing.T, want ...string) {
		t.Helper()
		messages := received(client)
		if len(messages) != len(want) {
			t.Fatalf("received %q, want %q", messages, want)
		}
		for i := range want {
			if messages[i].Name != "example" || string(messages[i].Data) != want[i] {
				t.Errorf("received %q, want %q", messages, want)
			}
		}
	}

	t.Run("at once", func(t *testing.T) {
		if err := notify.Notify(app, "example", data); err != nil {
			t.Fatal(err)
		}
		expect(t, `{"test":123}`)
	})
	t.Run("invalid", func(t *testing.T) {
		if err := notify.Notify(app, "a?b", data); !errors.Is(err, notify.ErrInvalidTopic) {
			t.Errorf("error %v", err)
		}
		expect(t)
	})
	t.Run("after the commit", func(t *testing.T) {
		err := app.RunInTransaction(func(txApp core.App) error {
			mine := map[string]any{"n": 1}
			if err := notify.Notify(txApp, "example", mine); err != nil {
				return err
			}
			mine["n"] = 2
			if err := notify.Notify(txApp, "example", mine); err != nil {
				return err
			}
			if err := notify.Notify(txApp, "", mine); !errors.Is(err, notify.ErrRequired) {
				t.Errorf("error %v", err)
			}
			expect(t)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		expect(t, `{"n":1}`, `{"n":2}`)
	})
	t.Run("not after a rollback", func(t *testing.T) {
		rollback := errors.New("rollback")
		err := app.RunInTransaction(func(txApp core.App) error {
			if err := notify.Notify(txApp, "example", data); err != nil {
				return err
			}
			return rollback
		})
		if !errors.Is(err, rollback) {
			t.Fatal(err)
		}
		expect(t)
	})
}
