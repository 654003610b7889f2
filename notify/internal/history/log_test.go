package history

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"herald/internal/seed"
)

// maxBytes is how many bytes of data a page has here.
const maxBytes = 256 << 10

// testLog is a history without the rest of the engine, with a clock of its own.
type testLog struct {
	*Log
	path    string
	clock   time.Time
	elapsed time.Duration

	mu        sync.Mutex
	keeps     map[string]Retention
	delivered map[string][]int64 // numbers by topic, in the order of delivery
	random    func() bool        // whether a delivery is said to take long
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
		Now: func() time.Time { return l.clock }, Elapsed: func(time.Time) time.Duration { return l.elapsed },
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

// wait lets time pass, while l.clock alone is a clock that is set.
func (l *testLog) wait(d time.Duration) {
	l.clock, l.elapsed = l.clock.Add(d), l.elapsed+d
}

// numbers returns the numbers of the messages that topic has from there on.
func (l *testLog) numbers(t *testing.T, topic string, from Start) (seqs []int64) {
	t.Helper()
	page, err := l.Read(topic, from, 100, maxBytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range page.Entries {
		seqs = append(seqs, entry.Seq)
	}
	return seqs
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
	isLong := l.random != nil && l.random()
	return entry, l.Append(context.Background(), entry, isLong, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
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
	random := rand.New(rand.NewPCG(seed.Of(t), 0))
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

// TestLogClockPassed has a clock that is ahead by so little that the right time passes its time.
func TestLogClockPassed(t *testing.T) {
	nothing := func(*testing.T, *testLog) {}
	restart := func(_ *testing.T, l *testLog) { l.restart() }
	sweep := func(t *testing.T, l *testLog) {
		if err := l.sweep(); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		before, after func(*testing.T, *testLog)
		kept          []int64 // after another fault
	}{
		"one run":                    {nothing, nothing, []int64{2, 3, 4, 5, 6, 7}}, // more than need be
		"swept":                      {sweep, sweep, []int64{4, 5, 6, 7}},
		"restarted before":           {restart, sweep, []int64{4, 5, 6, 7}},
		"restarted after it is seen": {nothing, func(t *testing.T, l *testLog) { sweep(t, l); restart(t, l) }, []int64{4, 5, 6, 7}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newTestLog(t)
			l.setKeep("topic", Retention{Count: 100, TTL: 8 * time.Minute})
			add := func() {
				t.Helper()
				if _, err := l.add("topic", "", []byte("1")); err != nil {
					t.Fatal(err)
				}
			}
			add()
			l.clock = l.clock.Add(10 * time.Minute)
			add()
			l.clock = l.clock.Add(-10 * time.Minute)
			l.wait(time.Minute)
			add() // 3
			l.wait(5 * time.Minute)
			test.before(t, l)
			add() // 4
			l.wait(6 * time.Minute)
			test.after(t, l)
			if got := l.numbers(t, "topic", Start{Rewind: true, Lasted: 2 * time.Minute}); got != nil {
				t.Errorf("the last two minutes have %v, want nothing", got)
			}
			add()
			l.wait(30 * time.Second)
			for lasted, want := range map[time.Duration][]int64{time.Minute: {5}, 7 * time.Minute: {4, 5}} {
				if got := l.numbers(t, "topic", Start{Rewind: true, Lasted: lasted}); !slices.Equal(got, want) {
					t.Errorf("the last %v have %v, want %v", lasted, got, want)
				}
			}
			if got := l.numbers(t, "topic", Start{}); !slices.Equal(got, []int64{4, 5}) {
				t.Errorf("kept are %v, want 4 and 5", got)
			}

			// and another fault later
			l.clock = l.clock.Add(-20000 * 24 * time.Hour)
			add()
			l.clock = l.clock.Add(20000 * 24 * time.Hour)
			add()
			if got := l.numbers(t, "topic", Start{}); !slices.Equal(got, test.kept) {
				t.Errorf("kept are %v after another fault, want %v", got, test.kept)
			}
		})
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
				add() // 1, 2: over an hour old at the end
				add()
				l.wait(50 * time.Minute)
				add()
				for _, wrong := range test.wrong {
					l.clock = l.clock.Add(wrong)
					add()
					l.clock = l.clock.Add(-wrong)
				}
				l.wait(20 * time.Minute)
				add()
				l.wait(30 * time.Second)
				add()
				if got := l.numbers(t, "topic", Start{Rewind: true, Lasted: time.Minute}); !slices.Equal(got, test.rewound) {
					t.Errorf("the last minute has %v, want %v", got, test.rewound)
				}
				if err := l.sweep(); err != nil {
					t.Fatal(err)
				}
				if got := l.numbers(t, "topic", Start{}); !slices.Equal(got, test.kept) {
					t.Errorf("kept are %v, want %v", got, test.kept)
				}
				// nothing of it is kept any longer than an hour
				l.wait(2 * time.Hour)
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
