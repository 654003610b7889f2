package hooks_test

import (
	"net/http"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
)

func TestLimits(t *testing.T) {
	limited := func(t *testing.T, limits hooks.Limits) *pbtest.Server {
		return pbtest.Serve(t, pbtest.NewApp(t, func(app core.App) { hooks.MustRegister(app, nil, hooks.Config{Limits: limits}) }))
	}
	get := func(t *testing.T, server *pbtest.Server, ip string) *http.Response {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/api/realtime", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("X-Real-Ip", ip)
		response, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { response.Body.Close() })
		return response
	}
	refused := func(t *testing.T, response *http.Response, status int) {
		t.Helper()
		if response.StatusCode != status || response.Header.Get("Retry-After") == "" {
			t.Errorf("%s, Retry-After %q", response.Status, response.Header.Get("Retry-After"))
		}
	}

	t.Run("connections", func(t *testing.T) {
		server := limited(t, hooks.Limits{Connections: 2})
		first := server.Connect(t)
		server.Connect(t)
		refused(t, get(t, server, ""), http.StatusServiceUnavailable)
		first.Close(t)
		server.Connect(t) // its place is free again
		refused(t, get(t, server, ""), http.StatusServiceUnavailable)
	})
	t.Run("connections of an IP", func(t *testing.T) {
		server := limited(t, hooks.Limits{ConnectionsPerIP: 1})
		server.App.Settings().TrustedProxy.Headers = []string{"X-Real-Ip"}
		for _, ip := range []string{"1.2.3.4", "1.2.3.5"} {
			if response := get(t, server, ip); response.StatusCode != http.StatusOK {
				t.Errorf("%s: %s", ip, response.Status)
			}
			refused(t, get(t, server, ip), http.StatusTooManyRequests)
		}
	})
	t.Run("connections of a user", func(t *testing.T) {
		server := limited(t, hooks.Limits{ConnectionsPerUser: 1})
		ann := pbtest.AddAuth(t, server.App, "users", "ann@x.com", nil)
		bob := pbtest.AddAuth(t, server.App, "users", "bob@x.com", nil)
		first := server.Subscribe(t, ann, "a")
		first.Set(t, ann, "a", "b") // the same connection again
		server.Subscribe(t, bob, "a")
		second := server.Connect(t)
		body := map[string]any{"clientId": second.ID, "subscriptions": []string{"a"}}
		status, answer := server.Do(t, "POST", "/api/realtime", pbtest.Token(t, ann), body)
		if status != http.StatusTooManyRequests {
			t.Errorf("%d %v", status, answer)
		}
		first.Close(t)
		pbtest.WaitFor(t, "the place is free", func() bool {
			status, _ := server.Do(t, "POST", "/api/realtime", pbtest.Token(t, ann), body)
			return status == http.StatusNoContent
		})
	})
	t.Run("subscriptions", func(t *testing.T) {
		server := limited(t, hooks.Limits{Subscriptions: 2})
		subscriber := server.Subscribe(t, nil, "a", "b")
		status, answer := server.Do(t, "POST", "/api/realtime", "",
			map[string]any{"clientId": subscriber.ID, "subscriptions": []string{"a", "b", "c"}})
		if status != http.StatusTooManyRequests {
			t.Errorf("%d %v", status, answer)
		}
		client, err := server.App.SubscriptionsBroker().ClientById(subscriber.ID)
		if err != nil || len(client.Subscriptions()) != 2 {
			t.Errorf("what it had is lost (error %v)", err)
		}
	})
}
