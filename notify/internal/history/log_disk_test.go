package history

import (
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

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
	for name, random := range map[string]func() bool{
		"short": nil, "long": func() bool { return true }, "mixed": func() bool { return rand.IntN(3) == 0 },
	} {
		t.Run(name, func(t *testing.T) { testGroups(t, random) })
	}
}

func testGroups(t *testing.T, random func() bool) {
	const senders, each, topics = 64, 50, 3
	l := newTestLog(t)
	l.random = random
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
		failed <- l.Append(ctx, &Entry{Topic: "topic", Data: []byte("1")}, false, func() {})
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

// TestLogLongDelivery: a message to many holds up its own topic only.
func TestLogLongDelivery(t *testing.T) {
	l := newTestLog(t)
	for _, topic := range []string{"large", "small"} {
		l.setKeep(topic, Retention{Count: 100})
	}
	var order []int64 // of the large topic
	var group sync.WaitGroup
	begun, release := make(chan struct{}, 10), make(chan struct{})
	large := func(isLong bool) {
		entry := &Entry{Topic: "large", Data: []byte("1")}
		group.Go(func() {
			if err := l.Append(context.Background(), entry, isLong, func() {
				begun <- struct{}{}
				<-release
				order = append(order, entry.Seq)
			}); err != nil {
				t.Error(err)
			}
		})
	}
	large(true)
	<-begun
	for i, isLong := range []bool{false, true, false} {
		large(isLong)
		for l.Counts().Stored < int64(i+2) {
			time.Sleep(time.Millisecond)
		}
	}
	for range 3 {
		if _, err := l.add("small", "", []byte("1")); err != nil {
			t.Fatal(err)
		}
	}
	if head, err := l.Settled("small"); err != nil || head.Seq != 3 {
		t.Errorf("small: %v %v", head, err)
	}
	settled := make(chan Position)
	go func() {
		head, err := l.Settled("large")
		if err != nil {
			t.Error(err)
		}
		settled <- head
	}()
	select {
	case head := <-settled:
		t.Errorf("settled at %v before all was delivered", head)
	case <-time.After(50 * time.Millisecond):
	}
	if len(begun) > 0 {
		t.Error("delivered before the one before")
	}
	close(release)
	if head := <-settled; head.Seq != 4 {
		t.Errorf("large: %v", head)
	}
	group.Wait()
	if !slices.Equal(order, []int64{1, 2, 3, 4}) {
		t.Errorf("delivered %v", order)
	}
	if len(l.undelivered) > 0 {
		t.Errorf("%d are kept", len(l.undelivered))
	}
}
