package hooks_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

func TestStats(t *testing.T) {
	app := pbtest.NewApp(t, func(app core.App) { hooks.MustRegister(app, nil, hooks.Config{MetricsToken: "scraper's secret"}) })
	root := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
	ann := pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
	server := pbtest.Serve(t, app)
	first := server.Subscribe(t, ann, "a", "b")
	second := server.Subscribe(t, nil, "a")
	send(t, app, notify.Message{Topic: "a", Data: 1})
	first.Expect(t, "a", "1")
	second.Expect(t, "a", "1")
	second.Close(t)
	awaitReason(t, app, notify.DisconnectLeft)

	status, answer := server.Do(t, "GET", "/api/notify/stats", pbtest.Token(t, root), nil)
	if status != http.StatusOK {
		t.Fatalf("%d %v", status, answer)
	}
	stats := answer.(map[string]any)
	for name, want := range map[string]float64{
		"connections": 1, "taken": 1, "subscriptions": 2, "topics": 2, "users": 1,
		"queuedMessages": 0, "messages": 1, "deliveries": 2, "dropped": 0,
	} {
		if stats[name] != want {
			t.Errorf("%s is %v, want %v", name, stats[name], want)
		}
	}
	if stats["bytes"].(float64) == 0 || stats["disconnects"].(map[string]any)[notify.DisconnectLeft.Reason] != 1.0 ||
		stats["fanOut"].(map[string]any)["count"] != 1.0 {
		t.Errorf("stats %v", stats)
	}

	metrics := func(token string) (int, string) {
		return server.DoText(t, http.MethodGet, "/api/notify/metrics", token, nil)
	}
	for _, token := range []string{pbtest.Token(t, root), "Bearer scraper's secret"} {
		status, text := metrics(token)
		if status != http.StatusOK {
			t.Fatalf("%d %s", status, text)
		}
		for _, line := range []string{
			"herald_connections 1", "herald_messages_total 1", "herald_deliveries_total 2",
			`herald_disconnects_total{reason="left"} 1`, `herald_disconnects_total{reason="queue full"} 0`, "herald_fan_out_seconds_count 1", "go_goroutines",
		} {
			if !strings.Contains(text, line) {
				t.Errorf("%q is missing in\n%s", line, text)
			}
		}
	}
	for path, tokens := range map[string][]string{
		"/api/notify/metrics": {"", "Bearer wrong", pbtest.Token(t, ann)},
		"/api/notify/stats":   {"", "Bearer scraper's secret", pbtest.Token(t, ann)},
	} {
		for _, token := range tokens {
			if status, answer := server.Do(t, "GET", path, token, nil); status != http.StatusUnauthorized && status != http.StatusForbidden {
				t.Errorf("%s: %d %v", path, status, answer)
			}
		}
	}

	t.Run("from the environment", func(t *testing.T) {
		t.Setenv("HERALD_METRICS_TOKEN", "scraper's other secret")
		server := pbtest.Serve(t, newWorld(t))
		for token, want := range map[string]int{"Bearer scraper's other secret": http.StatusOK, "Bearer ": http.StatusUnauthorized} {
			if status, _ := server.DoText(t, "GET", "/api/notify/metrics", token, nil); status != want {
				t.Errorf("%q: status %d", token, status)
			}
		}
	})

	t.Run("no token is no password", func(t *testing.T) {
		server := pbtest.Serve(t, newWorld(t))
		if status, _ := server.Do(t, "GET", "/api/notify/metrics", "", nil); status != http.StatusUnauthorized {
			t.Errorf("status %d", status)
		}
	})
}
