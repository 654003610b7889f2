package presence

import (
	"cmp"
	"encoding/json/jsontext"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"herald/internal/seed"
)

var histories = flag.Int("histories", 500, "how many random histories to try")

// world is the rooms with one topic, who is there by the rules of the package, and what watchers
// know of it.
type world struct {
	rooms *Rooms[string]
	// of each user (empty: the guests): connections, and the ends of the graces of lost ones
	live   map[string]int
	lost   map[string][]time.Time
	since  map[string]int64
	meta   map[string]string
	hidden map[string]bool
	kept   map[string]time.Time
	rename int // how often the users were renamed

	mu       sync.Mutex // guards the fields below: two timers may fire at once
	terms    Terms
	watchers []*watcher
	diffs    int
}

// watcher is what a client puts together from a state and diffs.
type watcher struct {
	seq     int64
	members map[string]Entry[string] // by name; nil: only the numbers are told
	counts  Counts
	renew   time.Duration
}

const topic = "topic"

func newWorld() *world {
	w := &world{live: map[string]int{}, lost: map[string][]time.Time{}, since: map[string]int64{}, meta: map[string]string{}, hidden: map[string]bool{}, kept: map[string]time.Time{}, terms: Terms{Window: Window, Limit: 1000}}
	w.rooms = New(Config[string]{Compare: cmp.Compare[string], Due: w.tell, Grace: Grace})
	return w
}

// tell applies the next diff to all watchers.
func (w *world) tell(string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	diff, any := w.rooms.Take(topic, w.terms)
	if !any {
		return
	}
	w.diffs++
	for _, watcher := range w.watchers {
		if watcher.apply(&diff); diff.Kind == Whole {
			w.read(watcher)
		}
	}
}

func (w *world) about(_, user string) (About, Basis) {
	renamed := strconv.Itoa(w.rename)
	return About{user + renamed, jsontext.Value(`{"renamed":` + renamed + `}`)}, Basis(w.rename + 1)
}

func (w *world) join(user string, isHidden bool) {
	w.rooms.Join(topic, user, isHidden, func() (About, Basis) { return w.about(topic, user) })
}

func (r *watcher) apply(diff *Diff[string]) {
	if diff.Seq <= r.seq {
		panic(fmt.Sprintf("diff %d after %d", diff.Seq, r.seq))
	}
	r.seq, r.counts = diff.Seq, diff.Counts
	switch {
	case diff.Kind == Numbers:
		r.members = nil
		return
	case diff.Kind == Whole:
		return // it reads the state
	case r.members == nil:
		panic("changes of a list that is not known")
	}
	for _, e := range diff.Join {
		if _, isThere := r.members[e.Name]; isThere {
			panic(e.Name + " joins twice")
		}
		r.members[e.Name] = *e
	}
	for _, e := range diff.Update {
		if before, isThere := r.members[e.Name]; !isThere || before.equal(e) {
			panic(e.Name + " is updated for nothing")
		}
		r.members[e.Name] = *e
	}
	for _, user := range diff.Leave {
		if _, isThere := r.members[user]; !isThere {
			panic(user + " leaves twice")
		}
		delete(r.members, user)
	}
}

// watch adds a watcher.
func (w *world) watch() {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &watcher{}
	w.read(r)
	w.watchers = append(w.watchers, r)
}

// read lets a watcher read the state, in pages of two.
func (w *world) read(r *watcher) {
	r.members = map[string]Entry[string]{}
	for after := ""; ; {
		state := w.rooms.State(topic, after, 2)
		r.seq, r.counts, r.renew = state.Seq, state.Counts, state.Renew
		for _, e := range state.Members {
			r.members[e.Name] = *e
			after = e.User
		}
		if state.Numbers {
			r.members = nil
			return
		}
		if !state.More {
			return
		}
	}
}

// pass lets time go by.
func (w *world) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
	now := time.Now()
	for user, ends := range w.lost {
		before := w.connections(user)
		w.lost[user] = slices.DeleteFunc(ends, func(end time.Time) bool { return !end.After(now) })
		if before > 0 {
			w.forgetIfGone(user)
		}
	}
	for user, until := range w.kept {
		if !until.After(now) {
			delete(w.kept, user)
			if w.connections(user) == 0 {
				w.forget(user)
			}
		}
	}
}

// forgetIfGone forgets what a user shows, unless it was set for when they come back.
func (w *world) forgetIfGone(user string) {
	if _, isKept := w.kept[user]; w.connections(user) == 0 && !isKept {
		w.forget(user)
	}
}

func (w *world) forget(user string) {
	delete(w.meta, user)
	delete(w.hidden, user)
}

func (w *world) connections(user string) int { return w.live[user] + len(w.lost[user]) }

// step does something at random.
func (w *world) step(random *rand.Rand) {
	user := []string{"", "ann", "bob", "cleo", "dan", "eve"}[random.IntN(6)]
	switch random.IntN(10) {
	case 0, 1, 2:
		if w.connections(user) == 0 {
			w.since[user] = time.Now().UnixMilli()
		}
		delete(w.kept, user)
		w.live[user]++
		if len(w.lost[user]) > 0 {
			w.lost[user] = w.lost[user][1:]
		}
		isHidden := user != "" && random.IntN(10) == 0
		if isHidden {
			w.hidden[user] = true
		}
		w.join(user, isHidden)
	case 3, 4:
		if w.live[user] == 0 {
			return
		}
		w.live[user]--
		grace := []time.Duration{0, 0, Grace / 3, Grace}[random.IntN(4)]
		if grace > 0 {
			w.lost[user] = append(w.lost[user], time.Now().Add(grace))
			slices.SortFunc(w.lost[user], time.Time.Compare)
		}
		w.rooms.Leave(topic, user, grace)
		w.forgetIfGone(user)
	case 5:
		if user == "" {
			return
		}
		meta := jsontext.Value(strconv.Itoa(random.IntN(3)))
		w.meta[user] = string(meta)
		w.rooms.Set(topic, user, &meta, nil)
		w.keep(user)
	case 6:
		if user == "" {
			return
		}
		isHidden := random.IntN(2) == 0
		w.hidden[user] = isHidden
		w.rooms.Set(topic, user, nil, &isHidden)
		w.keep(user)
	case 7:
		w.watch()
	case 9:
		if user == "" {
			return
		}
		grace := []time.Duration{0, Grace / 5}[random.IntN(2)]
		if last := len(w.lost[user]) - 1; last >= 0 && time.Now().Add(grace).Before(w.lost[user][last]) {
			if w.lost[user] = w.lost[user][:last]; grace > 0 {
				w.lost[user] = append(w.lost[user], time.Now().Add(grace))
				slices.SortFunc(w.lost[user], time.Time.Compare)
			}
			w.forgetIfGone(user)
		}
		w.rooms.GiveUp(topic, user, grace)
	case 8:
		if random.IntN(3) == 0 {
			w.rename++
		}
		w.mu.Lock()
		w.terms.Limit, w.terms.Renew = []int{1, 2, 1000}[random.IntN(3)], time.Duration(random.IntN(2))*time.Second
		w.mu.Unlock()
		w.rooms.RefreshAll(func(string, string) Basis { return Basis(w.rename + 1) }, w.about)
	}
	if random.IntN(2) == 0 {
		w.pass([]time.Duration{time.Millisecond, 100 * time.Millisecond, Window, 3 * time.Second, Grace + time.Second}[random.IntN(5)])
	}
}

func (w *world) keep(user string) {
	if w.live[user] == 0 {
		w.kept[user] = time.Now().Add(Grace)
	}
}

// want is what every watcher knows in the end.
func (w *world) want() string {
	var list []string
	for user := range w.since {
		if user != "" && w.connections(user) > 0 && !w.hidden[user] {
			about, _ := w.about(topic, user)
			list = append(list, fmt.Sprint(about, w.since[user], w.connections(user), w.meta[user]))
		}
	}
	slices.Sort(list)
	return fmt.Sprint(len(list), w.connections(""), list)
}

// got is what r knows; that it only knows the numbers is right above the limit.
func (w *world) got(r *watcher) string {
	if total := r.counts.Total; r.members == nil && total > w.terms.Limit-w.terms.Limit/10 {
		if want := w.want(); strings.HasPrefix(want, fmt.Sprint(total, r.counts.Guests)+" ") {
			return want
		}
	} else if total > w.terms.Limit {
		return "a list"
	}
	if len(r.members) > 0 && w.terms.Renew > 0 && r.renew != w.terms.Renew {
		return "renew in another rhythm"
	}
	var list []string
	for _, e := range r.members {
		list = append(list, fmt.Sprint(e.About, e.Since, e.Connections, string(e.Meta)))
	}
	slices.Sort(list)
	return fmt.Sprint(r.counts.Total, r.counts.Guests, list)
}

// TestModel plays random histories. In the end each watcher, whenever it came, knows what is true.
// For more: -histories 10000.
func TestModel(t *testing.T) {
	first := seed.Of(t)
	for i := range *histories {
		random := rand.New(rand.NewPCG(first, uint64(i)))
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			w.watch()
			for range 5 + random.IntN(60) {
				w.step(random)
			}
			for before := ""; before != w.want(); { // a grace may end just now
				before = w.want()
				w.pass(2 * NumbersWindow)
			}
			w.watch()
			w.mu.Lock()
			for n, r := range w.watchers {
				if w.got(r) != w.want() {
					t.Fatalf("history %d, watcher %d of %d: %s, want %s", i, n, len(w.watchers), w.got(r), w.want())
				}
			}
			w.mu.Unlock()
			// when all have left, nothing is kept
			for user, count := range maps.Clone(w.live) {
				for range count {
					w.rooms.Leave(topic, user, 0)
				}
			}
			w.pass(2 * Grace)
			for i := range w.rooms.shards {
				s := &w.rooms.shards[i]
				if len(s.byTopic)+len(s.due)+len(s.leaving) > 0 {
					t.Fatalf("history %d: something is left: %v", i, s.byTopic)
				}
			}
			w.rooms.Stop()
		})
	}
}

// TestCancelsOut: who comes and goes within a window, or comes back within the grace, is not told.
func TestCancelsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.rooms.Stop()
		w.join("ann", false)
		w.pass(Window)
		for range 10 {
			w.join("bob", false)
			w.rooms.Leave(topic, "bob", 0)
			w.rooms.Leave(topic, "ann", Grace)
			w.pass(Grace - time.Second)
			w.join("ann", false)
			w.pass(2 * Grace)
		}
		if w.diffs != 1 {
			t.Errorf("%d diffs", w.diffs)
		}
		if topics := w.rooms.TopicsOf("ann"); !slices.Equal(topics, []string{topic}) {
			t.Errorf("ann is on %v", topics)
		}
	})
}

// TestStorm: the number of diffs does not grow with the number of those who come.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.rooms.Stop()
		w.watch()
		for i := range 1000 {
			w.join(fmt.Sprint("user", i), false)
			w.pass(10 * time.Millisecond)
		}
		w.pass(Window)
		if got := w.watchers[0]; w.diffs > 40 || len(got.members) != 1000 {
			t.Errorf("%d diffs, %d members", w.diffs, len(got.members))
		}
	})
}

// TestSeqOfNewRoom: a room goes on behind the numbers of the one before, also where new terms are told
// at once and all happens within a millisecond.
func TestSeqOfNewRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.watch() // which panics where a number comes again
		for i := range 10 {
			w.join("ann", false)
			for range 2 {
				w.terms.Renew = time.Duration(w.diffs+1) * time.Second
				w.rooms.RefreshAll(func(string, string) Basis { return 1 }, w.about)
				synctest.Wait()
			}
			w.rooms.Leave(topic, "ann", 0)
			w.rooms.RefreshAll(func(string, string) Basis { return 1 }, w.about)
			synctest.Wait()
			if rooms := len(w.rooms.shard(topic).byTopic); rooms > 0 || w.diffs != 3*(i+1) {
				t.Fatalf("%d rooms, %d differences", rooms, w.diffs)
			}
		}
	})
}
