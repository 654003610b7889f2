package history

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"herald/internal/seed"
)

// TestSharedPages: many readers beside writers of several topics. Each page has everything that was
// delivered before it was asked for.
func TestSharedPages(t *testing.T) {
	begin := seed.Of(t)
	l := newTestLog(t)
	topics := []string{"a", "b", "c"}
	for _, topic := range topics {
		l.setKeep(topic, Retention{Count: 40})
	}
	var mu sync.Mutex
	heads := map[string]int64{}
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	for _, topic := range topics {
		writers.Go(func() {
			for range 60 {
				entry := &Entry{Topic: topic, Data: []byte(`1`)}
				if err := l.Append(context.Background(), entry, false, func() {
					mu.Lock()
					defer mu.Unlock()
					heads[topic] = entry.Seq
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 2 {
		readers.Go(func() {
			random := rand.New(rand.NewPCG(begin, uint64(i)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				topic := topics[random.IntN(len(topics))]
				mu.Lock()
				head := heads[topic]
				mu.Unlock()
				page, err := l.Read(topic, Start{Rewind: true, Count: 20}, 100, 1<<20)
				if err != nil {
					t.Error(err)
					return
				}
				if page.Last < head {
					t.Errorf("a page up to %d, and %d was delivered before", page.Last, head)
				}
				for n := 1; n < len(page.Entries); n++ {
					if page.Entries[n].Seq != page.Entries[n-1].Seq+1 {
						t.Errorf("%d after %d", page.Entries[n].Seq, page.Entries[n-1].Seq)
					}
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()

	// nobody writes: the same page for all
	first, err := l.Read("a", Start{}, 100, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := l.Read("a", Start{}, 100, 1<<20)
	if first != second {
		t.Error("the page was read twice")
	}
	other, _ := l.Read("a", Start{Since: &Position{first.Epoch, first.Last - 1}}, 100, 1<<20)
	if len(other.Entries) != 1 {
		t.Errorf("%d messages since the last but one", len(other.Entries))
	}
	if err := l.Append(context.Background(), &Entry{Topic: "a", Data: []byte(`2`)}, false, func() {}); err != nil {
		t.Fatal(err)
	}
	if third, _ := l.Read("a", Start{}, 100, 1<<20); third.Head != first.Head+1 || !slices.ContainsFunc(third.Entries, func(e *Entry) bool { return e.Seq == third.Head }) {
		t.Errorf("head %d after %d", third.Head, first.Head)
	}
}
