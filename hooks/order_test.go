package hooks_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
)

// slowRequests holds requests to subscribe to the topic "slow".
type slowRequests struct {
	arrived chan struct{} // gets one for each
	proceed chan struct{} // lets one go on
}

func (s *slowRequests) hold(isSlow bool) {
	if isSlow {
		s.arrived <- struct{}{}
		<-s.proceed
	}
}

// users are those of w by their names; a guest is none.
func users(w *world) map[string]*core.Record {
	return map[string]*core.Record{"ann": w.ann, "bob": w.bob}
}

// TestOvertaken: of the requests of a client the last one that arrived counts, in whichever order they are handled.
func TestOvertaken(t *testing.T) {
	t.Parallel()
	type request struct {
		as     string // ann, bob or guest
		topics []string
		status int
	}
	for name, c := range map[string]struct {
		before, slow, later request
		as                  string   // in the end
		topics              []string // likewise
	}{
		"more topics": {
			request{"ann", []string{"a"}, 204}, request{"ann", []string{"a", "slow"}, 204}, request{"ann", []string{"a", "b"}, 204}, "ann", []string{"a", "b"},
		},
		"signed in": {
			request{"guest", []string{"a"}, 204}, request{"guest", []string{"a", "slow"}, 204}, request{"ann", []string{"a", "b"}, 204}, "ann", []string{"a", "b"},
		},
		"signed out and in": {
			request{"ann", []string{"a"}, 204}, request{"guest", []string{"a", "slow"}, 204}, request{"ann", []string{"a", "b"}, 204}, "ann", []string{"a", "b"},
		},
		"signed in and out": {
			request{"guest", []string{"a"}, 204}, request{"ann", []string{"a", "slow"}, 204}, request{"guest", []string{"a", "b"}, 204}, "guest", []string{"a", "b"},
		},
		"signed in and out, refused": {
			request{"guest", []string{"a"}, 204}, request{"ann", []string{"a", "slow"}, 204}, request{"guest", []string{"room/42"}, 403}, "guest", []string{"a"},
		},
		"another user, refused": {
			request{"guest", []string{"a"}, 204}, request{"ann", []string{"a", "slow"}, 204}, request{"bob", []string{"room/42"}, 403}, "guest", []string{"a"},
		},
		"the later one refused": {
			request{"ann", []string{"a"}, 204}, request{"ann", []string{"a", "slow"}, 204}, request{"ann", []string{"room/43"}, 403}, "ann", []string{"a", "slow", "slow/more"},
		},
	} {
		for _, place := range []string{"handler", "middleware"} {
			t.Run(name+", slow "+place, func(t *testing.T) {
				t.Parallel()
				for _, way := range append(slices.Clone(ways), replaced) {
					if !slices.Contains([]string{"taken", "wrapped", "edge", "replaced"}, way.name) {
						continue // the others differ in how messages are written
					}
					if way.isForeign && name == "signed out and in" {
						continue // PocketBase signs nobody out
					}
					t.Run(way.name, func(t *testing.T) {
						t.Parallel()
						w := way.newWorld(t)
						addMembers(t, w)
						addMember(t, w, "42", w.ann)
						addChannel(t, w, map[string]any{"pattern": "room/{room}", "subscribeRule": memberRule})
						slow := slowRequests{make(chan struct{}), make(chan struct{})}
						if place == "handler" {
							w.OnRealtimeSubscribeRequest().BindFunc(func(e *core.RealtimeSubscribeRequestEvent) error {
								isSlow := slices.Contains(e.Subscriptions, "slow")
								slow.hold(isSlow)
								err := e.Next()
								if isSlow && err == nil { // as applications do it: what comes before is replaced
									e.Client.Subscribe("slow/more")
								}
								return err
							})
						} else {
							w.OnServe().BindFunc(func(e *core.ServeEvent) error {
								e.Router.Bind(&hook.Handler[*core.RequestEvent]{Priority: -1, Func: func(e *core.RequestEvent) error {
									body := map[string]any{}
									_ = e.BindBody(&body) // of others it is not JSON
									topics, _ := body["subscriptions"].([]any)
									slow.hold(slices.Contains(topics, any("slow")))
									return e.Next()
								}})
								return e.Next()
							})
						}
						server := way.serve(t, w)
						client := server.Connect(t)
						ask := func(r request) {
							if status, answer := client.Try(t, users(w)[r.as], r.topics...); status != r.status {
								t.Errorf("%v: %d %v", r, status, answer)
							}
						}
						ask(c.before)
						var asking sync.WaitGroup
						first := c.slow
						if way.isForeign && name == "signed in" && place == "middleware" {
							first.status = 403 // PocketBase compares the users first
						}
						asking.Go(func() { ask(first) })
						<-slow.arrived
						ask(c.later)
						close(slow.proceed)
						asking.Wait()

						topics := c.topics
						if place == "middleware" {
							topics = slices.DeleteFunc(slices.Clone(topics), func(topic string) bool { return topic == "slow/more" })
						}
						want := fmt.Sprint(topics, " ")
						if who := users(w)[c.as]; who != nil {
							want += who.Id
						}
						if got := standingOf(w)[client.ID]; got != want {
							t.Errorf("%s, not %s", got, want)
						}
					})
				}
			})
		}
	}
}
