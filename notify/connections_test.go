package notify_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/pocketbase/pocketbase/apis"

	"herald/internal/pbtest"
	"herald/notify"
)

func TestConnections(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	ann := pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
	guest := connect(app, nil, "a", "users/*")
	tab := connect(app, ann, "a", "a?options=%7B%7D", "@inbox")
	phone := connect(app, ann, "a", "b")
	guest.Set(apis.RealtimeClientIPKey, "1.2.3.4")
	if _, err := n.Send(t.Context(), notify.Message{Topic: "b", Data: 1}); err != nil {
		t.Fatal(err)
	}

	want := []notify.TopicInfo{{"@inbox", 1, 1}, {"a", 3, 1}, {"b", 1, 1}, {"users/*", 1, 0}}
	if got := n.Topics(); !slices.Equal(got, want) {
		t.Errorf("topics %v, want %v", got, want)
	}

	list := func(filter notify.ConnectionFilter) (ids []string) {
		connections, err := n.Connections(filter)
		if err != nil {
			t.Fatal(err)
		}
		for _, connection := range connections {
			ids = append(ids, connection.ID)
		}
		return ids
	}
	for name, test := range map[string]struct {
		filter notify.ConnectionFilter
		want   []string
	}{
		"all":            {notify.ConnectionFilter{}, []string{guest.Id(), tab.Id(), phone.Id()}},
		"topic":          {notify.ConnectionFilter{Topic: "b"}, []string{phone.Id()}},
		"user":           {notify.ConnectionFilter{User: pbtest.Ref(ann)}, []string{tab.Id(), phone.Id()}},
		"topic and user": {notify.ConnectionFilter{Topic: "@inbox", User: pbtest.Ref(ann)}, []string{tab.Id()}},
		"none":           {notify.ConnectionFilter{Topic: "zzz"}, nil},
	} {
		if got := list(test.filter); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
	if _, err := n.Connections(notify.ConnectionFilter{User: "x"}); !errors.Is(err, notify.ErrInvalidAudience) {
		t.Errorf("error %v", err)
	}

	all, _ := n.Connections(notify.ConnectionFilter{})
	if all[0].IP != "1.2.3.4" || all[0].Auth != nil || all[1].Auth.Id != ann.Id || all[2].Queued != 1 || all[0].Connected.IsZero() ||
		!slices.Equal(all[1].Subscriptions, []string{"@inbox", "a", "a?options=%7B%7D"}) {
		t.Errorf("connections %+v", all)
	}

	if !n.HasSubscribers("b", pbtest.Ref(ann)) || n.HasSubscribers("users/*", pbtest.Ref(ann)) || n.HasSubscribers("b", "?") {
		t.Error("HasSubscribers is wrong")
	}

	if n.Disconnect("nobody") {
		t.Error("disconnected nobody")
	}
	if !n.Disconnect(guest.Id()) || !guest.IsDiscarded() {
		t.Error("the guest is still there")
	}
	if _, err := n.DisconnectUser(""); !errors.Is(err, notify.ErrRequired) {
		t.Errorf("error %v", err)
	}
	if count, err := n.DisconnectUser(pbtest.Ref(ann)); count != 2 || err != nil || !tab.IsDiscarded() {
		t.Errorf("disconnected %d, error %v", count, err)
	}
	if got := list(notify.ConnectionFilter{}); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}
