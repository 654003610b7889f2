package history

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

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
