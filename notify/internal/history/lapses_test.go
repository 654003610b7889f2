package history

import (
	"testing"
)

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
