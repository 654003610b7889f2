package history

import (
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// maxBytes is how many bytes of data a page has here.
const maxBytes = 256 << 10

// testLog is a history without the rest of the engine, with a clock of its own.
type testLog struct {
	*Log
	path  string
	clock time.Time

	mu        sync.Mutex
	keeps     map[string]Retention
	delivered map[string][]int64 // numbers by topic, in the order of delivery
}

func newTestLog(t testing.TB) *testLog {
	t.Helper()
	l := &testLog{
		path: filepath.Join(t.TempDir(), "history.db"), clock: time.UnixMilli(1_800_000_000_000),
		keeps: map[string]Retention{}, delivered: map[string][]int64{},
	}
	l.restart()
	t.Cleanup(func() { l.Close(context.Background()) })
	return l
}

// restart closes the log and opens it again.
func (l *testLog) restart() {
	if l.Log != nil {
		l.Close(context.Background())
	}
	l.Log = New(Config{
		Path: l.path, Logger: slog.Default, IDWindow: 5 * time.Minute, Guard: func(string) {},
		Now: func() time.Time { return l.clock },
		Keep: func(topic string) Retention {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.keeps[topic]
		},
	})
}

func (l *testLog) setKeep(topic string, keep Retention) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keeps[topic] = keep
}

// add sends a message with an id, unless that is empty.
func (l *testLog) add(topic, id string, data []byte) (*Entry, error) {
	entry := &Entry{ID: id, Topic: topic, Key: id, Data: data}
	if id != "" {
		found, err := l.Find(topic, id)
		if err != nil || found.Seq > 0 {
			entry.Epoch, entry.Seq = found.Epoch, found.Seq
			return entry, err
		}
	}
	return entry, l.Append(context.Background(), entry, func() {
		l.delivered[topic] = append(l.delivered[topic], entry.Seq)
	})
}

// model is what a topic's log has to do, in the simplest way.
type model struct {
	sent []modelMessage // number i + 1 at i
	keep Retention
	lost int64
	ids  map[string]int64
}

type modelMessage struct {
	at   time.Time
	data string
}

func (m *model) kept(now time.Time) (first int64) {
	first = max(1, int64(len(m.sent))-m.keep.Count+1, m.lost+1)
	for m.keep.TTL > 0 && first <= int64(len(m.sent)) && m.sent[first-1].at.Before(now.Add(-m.keep.TTL)) {
		first++
	}
	return first
}

// TestLogAgainstModel runs thousands of random histories against the model.
func TestLogAgainstModel(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	const topics, steps = 2000, 8000
	l := newTestLog(t)
	models := make([]*model, topics)
	name := func(i int) string { return fmt.Sprintf("topic/%d", i) }
	randomKeep := func() Retention {
		keep := Retention{Count: []int64{1, 2, 5, 20, 100}[random.IntN(5)]}
		if random.IntN(3) == 0 {
			keep.TTL = time.Duration(1+random.IntN(600)) * time.Second
		}
		return keep
	}
	for i := range models {
		models[i] = &model{keep: randomKeep(), lost: -1, ids: map[string]int64{}}
		l.setKeep(name(i), models[i].keep)
	}
	epoch := ""
	var pending []*Lapse
	notePending := func() {
		for _, lapse := range pending {
			if err := l.noteLapse(lapse); err != nil {
				t.Fatal(err)
			}
		}
		pending = nil
	}

	add := func(i int, id string) {
		m, data := models[i], fmt.Sprintf(`"%d"`, random.Uint64())
		report, err := l.add(name(i), id, []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		if epoch == "" {
			epoch = report.Epoch
		}
		if known := m.ids[id]; known > 0 {
			if report.Seq != known {
				t.Fatalf("%s: id %q got %d again, want %d", name(i), id, report.Seq, known)
			}
			return
		}
		m.sent = append(m.sent, modelMessage{l.clock, data})
		if report.Seq != int64(len(m.sent)) || report.Epoch != epoch {
			t.Fatalf("%s: got %d of %s, want %d of %s", name(i), report.Seq, report.Epoch, len(m.sent), epoch)
		}
		if id != "" {
			m.ids[id] = report.Seq
		}
	}
	read := func(i int) {
		m := models[i]
		head, first := int64(len(m.sent)), m.kept(l.clock)
		limit := 1 + random.IntN(120)
		var from Start
		want, complete := first, true
		switch random.IntN(4) {
		case 0: // all that is kept
		case 1:
			since := Position{epoch, random.Int64N(head + 1)}
			from.Since = &since
			complete = since.Seq+1 >= first && since.Seq > m.lost
			want = max(first, since.Seq+1)
		case 2:
			from.Rewind = true
			from.Count = 1 + random.Int64N(50)
			want = max(first, head-from.Count+1)
		case 3:
			from.Rewind = true
			from.Lasted = time.Duration(1+random.IntN(400)) * time.Second
			for want <= head && m.sent[want-1].at.Before(l.clock.Add(-from.Lasted)) {
				want++
			}
		}
		page, err := l.Read(name(i), from, limit, maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		var got, expected []string
		for _, entry := range page.Entries {
			got = append(got, fmt.Sprintf("%d %s %s", entry.Seq, entry.Data, entry.Time.Format(time.TimeOnly)))
		}
		for seq := want; seq <= min(head, want+int64(limit)-1); seq++ {
			s := m.sent[seq-1]
			expected = append(expected, fmt.Sprintf("%d %s %s", seq, s.data, s.at.UTC().Format(time.TimeOnly)))
		}
		if !slices.Equal(got, expected) || page.Complete != complete || page.Head != head {
			t.Fatalf("%s, %+v, from %+v (head %d, kept from %d):\ngot  %v complete %v head %d\nwant %v complete %v",
				name(i), m.keep, from, head, first, got, page.Complete, page.Head, expected, complete)
		}
	}

	add(0, "") // which tells the epoch
	ids := 0
	for range steps {
		i := random.IntN(topics)
		m := models[i]
		switch n := random.IntN(1000); {
		case n < 500:
			for range 1 + random.IntN(4) {
				add(i, "")
			}
		case n < 560:
			ids++
			id := fmt.Sprint("id", ids)
			add(i, id)
			if random.IntN(2) == 0 {
				add(i, "")
				l.clock = l.clock.Add(time.Duration(random.IntN(60)) * time.Second)
				add(i, id) // within its window
			}
		case n < 900:
			read(i)
		case n < 950:
			l.clock = l.clock.Add(time.Duration(random.IntN(20_000)) * time.Millisecond)
		case n < 980:
			// Another number and age. What was not kept may be kept again where it
			// was not deleted yet, which the model does not know: so never more.
			keep := randomKeep()
			if keep.Count > m.keep.Count || m.keep.TTL > 0 && (keep.TTL == 0 || keep.TTL > m.keep.TTL) {
				break
			}
			m.keep = keep
			l.setKeep(name(i), keep)
		case n < 990:
			// no history for a while
			l.setKeep(name(i), Retention{})
			if random.IntN(2) == 0 {
				if err := l.sweep(); err != nil {
					t.Fatal(err)
				}
			}
			if page, err := l.Read(name(i), Start{}, 10, maxBytes); err != nil || len(page.Entries) > 0 || page.Epoch != "" {
				t.Fatalf("without a history there is %v %v", page, err)
			}
			pending = append(pending, l.Lapsed(func(topic string) bool { return topic == name(i) }, false))
			l.setKeep(name(i), m.keep)
			if random.IntN(2) == 0 {
				notePending()
			}
			if len(m.sent) > 0 {
				m.lost = int64(len(m.sent))
			}
		case n < 999:
			if err := l.sweep(); err != nil {
				t.Fatal(err)
			}
		default:
			notePending()
			l.restart()
		}
	}
	notePending()
	l.restart()
	for i := range models {
		read(i)
		add(i, "")
		read(i)
	}
	for i := range models {
		if got := l.delivered[name(i)]; len(got) != len(models[i].sent) || !slices.IsSorted(got) {
			t.Fatalf("%s: delivered %v", name(i), got)
		}
	}

	// what nobody sees any more is deleted
	l.clock = l.clock.Add(time.Hour)
	for range topics/sweepTopics + 5 {
		if err := l.sweep(); err != nil {
			t.Fatal(err)
		}
	}
	var messages, kept, left int64
	for _, m := range models {
		kept += int64(len(m.sent)) - m.kept(l.clock) + 1
	}
	s := l.store.Load()
	if err := s.read.QueryRow("SELECT (SELECT count(*) FROM messages), (SELECT count(*) FROM ids WHERE NOT EXISTS "+
		"(SELECT 1 FROM messages WHERE topic = ids.topic AND seq = ids.seq))").Scan(&messages, &left); err != nil {
		t.Fatal(err)
	}
	if messages != kept || left != 0 {
		t.Errorf("%d messages are stored of %d that are kept; %d ids are left", messages, kept, left)
	}
	for i := range models {
		read(i)
	}
}

// TestLogClock: a clock that was wrong for a while costs what was sent meanwhile, not what
// was sent before and after.
func TestLogClock(t *testing.T) {
	day := 24 * time.Hour
	for name, test := range map[string]struct {
		wrong   []time.Duration // by how much the clock is wrong for one message each
		rewound []int64         // the numbers that "the last minute" has at the end
		kept    []int64         // those that a TTL of an hour leaves
	}{
		// what an hour ago is, a clock that is ahead says too
		"ahead":            {[]time.Duration{365 * day}, []int64{4, 5, 6}, []int64{4, 5, 6}},
		"ahead, many":      {[]time.Duration{365 * day, 366 * day, 2 * day}, []int64{5, 6, 7, 8}, []int64{5, 6, 7, 8}},
		"a little ahead":   {[]time.Duration{2 * time.Second}, []int64{5, 6}, []int64{3, 4, 5, 6}},
		"behind":           {[]time.Duration{-20000 * day}, []int64{5, 6}, []int64{3, 4, 5, 6}},
		"behind, many":     {[]time.Duration{-20000 * day, -20000 * day, -20000 * day}, []int64{7, 8}, []int64{3, 4, 5, 6, 7, 8}},
		"behind, twice":    {[]time.Duration{-50 * time.Hour, -49 * time.Hour, -100 * time.Hour}, []int64{7, 8}, []int64{3, 4, 5, 6, 7, 8}},
		"behind and ahead": {[]time.Duration{-100 * day, 100 * day}, []int64{5, 6, 7}, []int64{5, 6, 7}},
	} {
		for _, restarts := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", restarts ", restarts), func(t *testing.T) {
				l := newTestLog(t)
				l.setKeep("topic", Retention{Count: 100, TTL: time.Hour})
				add := func() {
					t.Helper()
					if restarts {
						l.restart()
					}
					if _, err := l.add("topic", "", []byte("1")); err != nil {
						t.Fatal(err)
					}
					if err := l.sweep(); err != nil {
						t.Fatal(err)
					}
				}
				numbers := func(from Start) (seqs []int64) {
					t.Helper()
					page, err := l.Read("topic", from, 100, maxBytes)
					if err != nil {
						t.Fatal(err)
					}
					for _, entry := range page.Entries {
						seqs = append(seqs, entry.Seq)
					}
					return seqs
				}
				add() // 1, 2: over an hour old at the end
				add()
				l.clock = l.clock.Add(50 * time.Minute)
				add()
				for _, wrong := range test.wrong {
					l.clock = l.clock.Add(wrong)
					add()
					l.clock = l.clock.Add(-wrong)
				}
				l.clock = l.clock.Add(20 * time.Minute)
				add()
				l.clock = l.clock.Add(30 * time.Second)
				add()
				if got := numbers(Start{Rewind: true, Lasted: time.Minute}); !slices.Equal(got, test.rewound) {
					t.Errorf("the last minute has %v, want %v", got, test.rewound)
				}
				if err := l.sweep(); err != nil {
					t.Fatal(err)
				}
				if got := numbers(Start{}); !slices.Equal(got, test.kept) {
					t.Errorf("kept are %v, want %v", got, test.kept)
				}
				// nothing of it is kept any longer than an hour
				l.clock = l.clock.Add(2 * time.Hour)
				if err := l.sweep(); err != nil {
					t.Fatal(err)
				}
				var left int
				if err := l.store.Load().read.QueryRow("SELECT count(*) FROM messages").Scan(&left); err != nil || left > 0 {
					t.Errorf("%d messages are left (%v)", left, err)
				}
			})
		}
	}
}

// TestLogIDs: a clock that goes back a little forgets no id.
func TestLogIDs(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("topic", Retention{Count: 1})
	first, err := l.add("topic", "first", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	l.clock = l.clock.Add(-2 * time.Second)
	for i := range 100 {
		if _, err := l.add("topic", fmt.Sprint(i), []byte("1")); err != nil {
			t.Fatal(err)
		}
	}
	if again, err := l.add("topic", "first", []byte("1")); err != nil || again.Seq != first.Seq {
		t.Errorf("sent again: %+v %v", again, err)
	}
}

// TestLogGroups: many send at once; each topic has numbers without holes, stored
// and delivered in that order.
func TestLogGroups(t *testing.T) {
	const senders, each, topics = 64, 50, 3
	l := newTestLog(t)
	for i := range topics {
		l.setKeep(fmt.Sprint("topic", i), Retention{Count: 10_000})
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[string][]int64{}
	for sender := range senders {
		wg.Go(func() {
			for i := range each {
				topic := fmt.Sprint("topic", (sender+i)%topics)
				report, err := l.add(topic, "", fmt.Appendf(nil, `"%d/%d"`, sender, i))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				got[topic] = append(got[topic], report.Seq)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for topic, seqs := range got {
		slices.Sort(seqs)
		for i, seq := range seqs {
			if seq != int64(i+1) || l.delivered[topic][i] != seq {
				t.Fatalf("%s: number %d at %d, delivered %d", topic, seq, i, l.delivered[topic][i])
			}
		}
	}
	if groups := l.groups.Load(); groups > senders*each/2 {
		t.Errorf("%d transactions for %d messages", groups, senders*each)
	}
}

// TestLogWithdraw: who gives up while it waits in line sends nothing.
func TestLogWithdraw(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("topic", Retention{Count: 10})
	inside, goOn := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = l.exclusive(func(*store) error {
			close(inside)
			<-goOn
			return nil
		})
	})
	<-inside
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		failed <- l.Append(ctx, &Entry{Topic: "topic", Data: []byte("1")}, func() {})
	}()
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(goOn)
	wg.Wait()
	if report, err := l.add("topic", "", []byte("2")); err != nil || report.Seq != 1 {
		t.Errorf("got %v %v", report, err)
	}
}

// TestLogFull: where nothing can be written the sender is told, what is stored
// can be read, and it goes on when there is room.
func TestLogFull(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("topic", Retention{Count: 1000})
	if _, err := l.add("topic", "", []byte("1")); err != nil {
		t.Fatal(err)
	}
	large, err := json.Marshal(strings.Repeat("x", 100_000))
	if err != nil {
		t.Fatal(err)
	}
	s := l.store.Load()
	for _, state := range []struct{ broken, mended string }{
		{"PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000"}, // SQLITE_FULL
		{"PRAGMA query_only = 1", "PRAGMA query_only = 0"},               // SQLITE_READONLY
	} {
		before, err := l.Read("topic", Start{}, 100, maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.write.ExecContext(t.Context(), state.broken); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := l.add("topic", state.broken, large); !errors.Is(err, ErrUnavailable) {
					t.Errorf("%s: got %v", state.broken, err)
				}
			})
		}
		wg.Wait()
		page, err := l.Read("topic", Start{}, 100, maxBytes)
		if err != nil || page.Head != before.Head || len(page.Entries) != len(before.Entries) {
			t.Errorf("%s: read %v %v", state.broken, page, err)
		}
		if _, err := s.write.ExecContext(t.Context(), state.mended); err != nil {
			t.Fatal(err)
		}
		report, err := l.add("topic", state.broken, large)
		if err != nil || report.Seq != before.Head+1 {
			t.Errorf("%s: got %v %v", state.mended, report, err)
		}
	}
}

// TestLogCannotOpen: a database that cannot be opened is tried again.
func TestLogCannotOpen(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("topic", Retention{Count: 1000})
	path := l.config.Path
	l.config.Path = filepath.Join(path, "no", "folder")
	if _, err := l.add("topic", "", []byte("1")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	if _, err := l.Read("topic", Start{}, 100, maxBytes); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	l.config.Path = path
	l.tried = time.Now().Add(-2 * reopenEvery)
	if report, err := l.add("topic", "", []byte("1")); err != nil || report.Seq != 1 {
		t.Errorf("got %v %v", report, err)
	}
}

// TestLogEpoch: the epoch stays over a restart, and is another one where the
// database is lost, was copied or comes from a backup.
func TestLogEpoch(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("topic", Retention{Count: 1000})
	add := func() *Entry {
		t.Helper()
		report, err := l.add("topic", "", []byte("1"))
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	first := add()
	l.restart()
	if second := add(); second.Epoch != first.Epoch || second.Seq != 2 {
		t.Fatalf("after a restart: %v, before %v", second, first)
	}

	snapshot, err := l.store.Load().snapshot(t.Context(), l.path)
	if err != nil {
		t.Fatal(err)
	}
	add() // is not in it
	l.Close(context.Background())
	original := l.path
	l.path = filepath.Join(t.TempDir(), "restored.db")
	mustRename(t, snapshot, l.path+snapshotSuffix)
	l.restart()
	restored := add()
	if restored.Epoch == first.Epoch || restored.Seq != 3 {
		t.Fatalf("from a backup: %v, before %v", restored, first)
	}
	page, err := l.Read("topic", Start{Since: &Position{first.Epoch, 3}}, 10, maxBytes)
	if err != nil || page.Complete || len(page.Entries) != 3 {
		t.Errorf("since a number that was given out twice: %v %v", page, err)
	}

	// moved it is the same, a copy is not
	l.Close(context.Background())
	moved := filepath.Join(t.TempDir(), "moved.db")
	mustRename(t, l.path, moved)
	l.path = moved
	l.restart()
	if again := add(); again.Epoch != restored.Epoch {
		t.Errorf("moved: %v, before %v", again, restored)
	}
	l.Close(context.Background())
	mustCopy(t, original, moved)
	l.restart()
	if copied := add(); copied.Epoch == first.Epoch || copied.Epoch == restored.Epoch || copied.Seq != 4 {
		t.Errorf("copied: %v", copied)
	}

	l.Close(context.Background())
	l.path = filepath.Join(t.TempDir(), "lost.db")
	l.restart()
	if lost := add(); lost.Epoch == first.Epoch || lost.Seq != 1 {
		t.Errorf("lost: %v", lost)
	}
}

func mustRename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// mustCopy copies a file into the place of another.
func mustCopy(t testing.TB, from, to string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(to); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestLogForgets: what is known of a topic leaves the memory when nobody sends on it,
// and its numbers go on.
func TestLogForgets(t *testing.T) {
	const topics = 2000
	l := newTestLog(t)
	var wg sync.WaitGroup
	for i := range topics {
		topic := fmt.Sprint("topic", i)
		l.setKeep(topic, Retention{Count: 10})
		wg.Go(func() {
			if _, err := l.add(topic, "", []byte("1")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if known := len(l.topics); known != topics {
		t.Errorf("%d topics are known", known)
	}
	l.clock = l.clock.Add(idleTopic + time.Second)
	if report, err := l.add("topic1", "", []byte("1")); err != nil || report.Seq != 2 {
		t.Errorf("report %v %v", report, err)
	}
	if err := l.sweep(); err != nil {
		t.Fatal(err)
	}
	if known := len(l.topics); known != 1 {
		t.Errorf("%d topics are known after a while", known)
	}
	if report, err := l.add("topic2", "", []byte("1")); err != nil || report.Seq != 2 {
		t.Errorf("report %v %v", report, err)
	}
}

// TestLogTrimsInSteps: a number that is set lower deletes no more than a few messages
// with each send, and nobody sees the others.
func TestLogTrimsInSteps(t *testing.T) {
	const count = 2000
	l := newTestLog(t)
	l.setKeep("topic", Retention{Count: count})
	var wg sync.WaitGroup
	for range count {
		wg.Go(func() {
			if _, err := l.add("topic", "", []byte("1")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l.setKeep("topic", Retention{Count: 10})
	for range 3 {
		before := l.topics["topic"].first
		if _, err := l.add("topic", "", []byte("1")); err != nil {
			t.Fatal(err)
		}
		if first := l.topics["topic"].first; first != before+maxTrim {
			t.Errorf("the first was %d and is %d", before, first)
		}
		if page, err := l.Read("topic", Start{}, 100, maxBytes); err != nil || len(page.Entries) != 10 {
			t.Errorf("read %v %v", page, err)
		}
	}
}

// A server that is killed before it has noted for all topics what they have missed gives the
// log a new epoch: positions from before then tell nothing.
func TestLapseThatIsNotNoted(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("a", Retention{Count: 10})
	first, err := l.add("a", "", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	lapse := l.Lapsed(func(string) bool { return true }, false)
	if err := l.exclusive(func(s *store) error { return s.setPending(true) }); err != nil {
		t.Fatal(err)
	}
	l.restart()
	since := Position{first.Epoch, first.Seq}
	page, err := l.Read("a", Start{Since: &since}, 10, maxBytes)
	if err != nil || page.Complete || page.Epoch == first.Epoch {
		t.Errorf("page %+v, error %v", page, err)
	}

	since.Epoch = page.Epoch
	l.restart() // an epoch is enough
	if page, err = l.Read("a", Start{Since: &since}, 10, maxBytes); err != nil || !page.Complete || page.Epoch != since.Epoch {
		t.Errorf("page %+v, error %v", page, err)
	}
	if err := l.noteLapse(lapse); err != nil { // it is not in the list any more, and does no harm
		t.Fatal(err)
	}
	l.restart()
	if page, err = l.Read("a", Start{Since: &since}, 10, maxBytes); err != nil || page.Complete || page.Epoch != since.Epoch {
		t.Errorf("page %+v, error %v", page, err)
	}
}

// The rows of topics that have no messages any more do not stay for ever, and no number is
// given out twice for it.
func TestEmptyTopicsGo(t *testing.T) {
	l := newTestLog(t)
	rows := func() (count int) {
		t.Helper()
		if err := l.store.Load().read.QueryRow("SELECT count(*) FROM topics").Scan(&count); err != nil {
			t.Fatal(err)
		}
		return count
	}
	sweepAll := func() {
		t.Helper()
		for l.swept = 0; ; {
			if err := l.sweep(); err != nil {
				t.Fatal(err)
			}
			if l.swept == 0 {
				return
			}
		}
	}
	for _, topic := range []string{"kept", "old", "new"} {
		l.setKeep(topic, Retention{Count: 100, TTL: time.Minute})
	}
	var old *Entry
	for range 5 {
		var err error
		if old, err = l.add("old", "", []byte("1")); err != nil {
			t.Fatal(err)
		}
	}
	l.clock = l.clock.Add(time.Hour)
	sweepAll()
	kept, err := l.add("kept", "", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	sweepAll()
	if count := rows(); count != 2 {
		t.Fatalf("of a few none goes: %d", count)
	}
	if err := l.exclusive(func(s *store) error {
		return s.transaction(func() error {
			for i := range maxEmpty {
				if err := s.addTopic(&topicRow{name: fmt.Sprint("many/", i), head: 3, lost: -1}); err != nil {
					return err
				}
			}
			return nil
		})
	}); err != nil {
		t.Fatal(err)
	}
	sweepAll() // their channel is gone, which is noted first
	sweepAll()
	sweepAll()
	if count := rows(); count != 1 {
		t.Fatalf("%d are left", count)
	}

	check := func() {
		t.Helper()
		for seq, complete := range map[int64]bool{4: false, 5: true} {
			since := Position{old.Epoch, seq}
			page, err := l.Read("old", Start{Since: &since}, 10, maxBytes)
			if err != nil || page.Complete != complete || page.Head < 5 {
				t.Errorf("since %d: %+v %v", seq, page, err)
			}
		}
	}
	check()
	for _, topic := range []string{"old", "new"} {
		if report, err := l.add(topic, "", []byte("2")); err != nil || report.Seq != 6 {
			t.Errorf("%s: %+v %v", topic, report, err)
		}
	}
	if report, err := l.add("kept", "", []byte("2")); err != nil || report.Seq != kept.Seq+1 {
		t.Errorf("kept: %+v %v", report, err)
	}
	since := Position{old.Epoch, 5}
	page, err := l.Read("old", Start{Since: &since}, 10, maxBytes)
	if err != nil || !page.Complete || len(page.Entries) != 1 {
		t.Errorf("%+v %v", page, err)
	}
}

// The messages of one group, the first ones since their topic has its history back.
func TestLapseBeforeAGroup(t *testing.T) {
	l := newTestLog(t)
	for _, topic := range []string{"new", "old"} {
		l.setKeep(topic, Retention{Count: 10})
	}
	before, err := l.add("old", "", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	lapse := l.Lapsed(func(string) bool { return true }, false)
	var group []*turn
	for range 3 {
		for _, topic := range []string{"new", "old"} {
			group = append(group, &turn{entry: &Entry{Topic: topic, Data: []byte("2")}})
		}
	}
	if err := l.exclusive(func(s *store) error { return l.append(s, group) }); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		for topic, first := range map[string]int64{"new": 1, "old": 2} {
			since := Position{before.Epoch, first - 1}
			page, err := l.Read(topic, Start{Since: &since}, 10, maxBytes)
			if err != nil || len(page.Entries) != 3 || page.Entries[0].Seq != first || page.Complete != (topic == "new") {
				t.Errorf("%s: %+v %v", topic, page, err)
			}
		}
	}
	check()
	if err := l.noteLapse(lapse); err != nil {
		t.Fatal(err)
	}
	check()
}

// A topic that had history, and no message then; what was sent while it had none is missing.
func TestLapseOfAnEmptyTopic(t *testing.T) {
	l := newTestLog(t)
	for _, topic := range []string{"known", "other"} {
		l.setKeep(topic, retention())
	}
	first, err := l.add("other", "", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	since := Position{first.Epoch, 0}
	complete := func(position Position) bool {
		t.Helper()
		page, err := l.Read("known", Start{Since: &position}, 10, maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		return page.Complete
	}
	if !complete(since) {
		t.Error("nothing is missing yet")
	}
	lapse := l.Lapsed(func(topic string) bool { return topic == "known" }, true)
	if complete(since) {
		t.Error("before it is noted")
	}
	if err := l.noteLapse(lapse); err != nil {
		t.Fatal(err)
	}
	if complete(since) {
		t.Error("after it is noted")
	}
	page, err := l.Read("known", Start{}, 10, maxBytes)
	if err != nil || !complete(page.Next()) {
		t.Errorf("from now on nothing is missing: %+v %v", page, err)
	}
	next := page.Next()
	l.restart()
	if added, err := l.add("known", "", []byte("2")); err != nil || added.Seq != next.Seq+1 || complete(since) || !complete(next) {
		t.Errorf("%+v %v", added, err)
	}
}

func retention() Retention { return Retention{Count: 10} }

// An id of a row that is gone may be given to another topic: a reader that has it still gets
// nothing of that one. And a row is not removed that has got a message meanwhile.
func TestRowsThatGoWhileTheyAreUsed(t *testing.T) {
	l := newTestLog(t)
	for _, topic := range []string{"public", "secret"} {
		l.setKeep(topic, retention())
	}
	if _, err := l.add("public", "", []byte("1")); err != nil {
		t.Fatal(err)
	}
	s := l.store.Load()
	row, err := s.topic("public")
	if err != nil {
		t.Fatal(err)
	}
	remove := func() {
		t.Helper()
		if err := l.exclusive(func(s *store) error {
			return s.transaction(func() error { return s.removeTopics([]topicRow{row}) })
		}); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	if after, err := s.topic("public"); err != nil || after.id != row.id {
		t.Errorf("a topic with a message was removed: %+v %v", after, err)
	}
	if err := l.exclusive(func(s *store) error {
		_, err := s.write.ExecContext(t.Context(), "DELETE FROM messages")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	remove()
	clear(l.topics)
	secret, err := l.add("secret", "", []byte(`"secret"`))
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := s.entries(row, 0, 10, maxBytes); err != nil || len(entries) > 0 {
		t.Errorf("a reader of public got %v %v", entries, err)
	}
	if page, err := l.Read("secret", Start{}, 10, maxBytes); err != nil || len(page.Entries) != 1 || page.Entries[0].Seq != secret.Seq {
		t.Errorf("%+v %v", page, err)
	}
}
