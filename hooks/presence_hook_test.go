package hooks_test

import (
	"errors"
	"testing"

	"herald/hooks"
	"herald/internal/pbtest"
)

// TestOnPresence: the application is told, and a handler that fails or panics does no harm.
func TestOnPresence(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	seen := make(chan string, 100)
	hooks.OnPresence(w).BindFunc(func(e *hooks.PresenceEvent) error {
		for _, member := range e.Join {
			seen <- "join " + member.User
		}
		for _, user := range e.Leave {
			seen <- "leave " + user
		}
		if len(e.Join) > 0 {
			panic("test")
		}
		return errors.New("test")
	})
	server := pbtest.Serve(t, w)
	for range 2 {
		client := server.Subscribe(t, w.ann, "room/1")
		if got := <-seen; got != "join "+pbtest.Ref(w.ann) {
			t.Errorf("got %q", got)
		}
		client.Set(t, w.ann, "other")
		if got := <-seen; got != "leave "+pbtest.Ref(w.ann) {
			t.Errorf("got %q", got)
		}
	}
}
