package hooks_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/internal/seed"
)

// seat is a connection of the model.
type seat struct {
	*pbtest.Subscriber
	user  *core.Record
	isOn  bool // subscribed to room/1
	isEnd bool
}

// TestPresenceModel plays random histories on a real server: users connect, subscribe, sign in as
// others, lose their connection or their right, and are kicked. In the end each watcher, whenever it
// came, knows who is there, with how many connections.
func TestPresenceModel(t *testing.T) {
	t.Parallel()
	first := seed.Of(t)
	for i := range uint64(3) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			playPresence(t, rand.New(rand.NewPCG(first+i, 0)))
		})
	}
}

func playPresence(t *testing.T, random *rand.Rand) {
	w := newWorld(t)
	addMembers(t, w)
	addChannel(t, w, presenceChannel(map[string]any{"subscribeRule": memberRule}))
	server := pbtest.Serve(t, w)
	users := []*core.Record{w.ann, w.bob}
	for i := range 3 {
		users = append(users, pbtest.AddAuth(t, w, "users", fmt.Sprintf("user%d@x.com", i), nil))
	}
	members := map[string]*core.Record{} // by user, who may listen
	for _, user := range users {
		members[user.Id] = addMember(t, w, "1", user)
	}
	var seats []*seat
	watchers := []*watcher{watch(t, server, nil, "room/1")}
	for range 60 {
		user := users[random.IntN(len(users))]
		var s *seat
		if open := slices.DeleteFunc(slices.Clone(seats), func(s *seat) bool { return s.isEnd }); len(open) > 0 {
			s = open[random.IntN(len(open))]
		}
		switch step := random.IntN(10); {
		case step < 3 || s == nil:
			s = &seat{Subscriber: server.Connect(t)}
			seats = append(seats, s)
			s.enter(t, user, members)
		case step == 3: // signs in as another
			s.enter(t, user, members)
		case step == 4:
			s.Set(t, s.user, "other")
			s.isOn = false
		case step == 5:
			s.Close(t)
			s.isEnd, s.isOn = true, false
		case step == 6:
			engine(w).Disconnect(s.ID)
			s.isEnd, s.isOn = true, false
		case step == 7:
			if member := members[user.Id]; member != nil {
				if err := w.Delete(member); err != nil {
					t.Fatal(err)
				}
				delete(members, user.Id)
				for _, s := range seats {
					if !s.isOn || s.user.Id != user.Id {
						continue
					}
					s.isOn = false
					// one that gets the right back before it is checked keeps its subscription
					pbtest.WaitFor(t, "a lost right ends the subscription", func() bool {
						client, err := w.SubscriptionsBroker().ClientById(s.ID)
						return err != nil || !client.HasSubscription("room/1")
					})
				}
			} else {
				members[user.Id] = addMember(t, w, "1", user)
			}
		case step == 8:
			watchers = append(watchers, watch(t, server, nil, "room/1"))
		case step == 9:
			time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond) // windows end in between
		}
	}
	want := map[string]int{}
	for _, s := range seats {
		if s.isOn {
			want[pbtest.Ref(s.user)]++
		}
	}
	for i, watcher := range watchers {
		got := func() map[string]int {
			connections := map[string]int{}
			for user, member := range watcher.members {
				connections[user] = member.Connections
			}
			return connections
		}
		for fmt.Sprint(got()) != fmt.Sprint(want) {
			select {
			case event, isOpen := <-watcher.Events():
				if !isOpen {
					t.Fatalf("watcher %d has ended", i)
				}
				watcher.take(t, event)
			case <-time.After(pbtest.Timeout):
				t.Fatalf("watcher %d of %d knows %v, want %v", i, len(watchers), got(), want)
			}
		}
	}
}

// enter subscribes as user, who may be another one than before.
func (s *seat) enter(t *testing.T, user *core.Record, members map[string]*core.Record) {
	t.Helper()
	if s.user != nil && s.user.Id != user.Id { // PocketBase wants it to sign out in between
		s.Set(t, nil, "other")
	}
	s.user, s.isOn = user, members[user.Id] != nil
	if status, answer := s.Try(t, user, "other", "room/1"); status != 204 && (s.isOn || status != 403) {
		t.Fatalf("%d %v", status, answer)
	}
}
