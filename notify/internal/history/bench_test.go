package history

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"
	"github.com/pocketbase/pocketbase/tools/types"
)

var benchMessage = []byte(`"` + strings.Repeat("x", 98) + `"`)

// together calls f count times from as many goroutines as there are senders.
func together(senders, count int, f func() error) error {
	var left atomic.Int64
	left.Store(int64(count))
	var wg sync.WaitGroup
	errs := make(chan error, senders)
	for range senders {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := f(); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// BenchmarkGroupCommit measures how many messages the log takes from concurrent
// senders, against one insert a transaction in the same kind of database, in turns.
// x-single is how many times as many.
func BenchmarkGroupCommit(b *testing.B) {
	for _, senders := range []int{1, 8, 64, 256} {
		b.Run(fmt.Sprint(senders), func(b *testing.B) {
			l, single := newTestLog(b), newTestLog(b)
			l.setKeep("topic", Retention{Count: 1 << 40})
			if err := single.exclusive(func(s *store) error {
				return s.addTopic(&topicRow{name: "topic", lost: -1})
			}); err != nil {
				b.Fatal(err)
			}
			s := single.store.Load()
			seq := int64(0)
			const each = 512
			var own, other time.Duration
			for b.Loop() {
				start := time.Now()
				err := together(senders, each, func() error {
					_, err := l.add("topic", "", benchMessage)
					return err
				})
				if err != nil {
					b.Fatal(err)
				}
				middle := time.Now()
				own += middle.Sub(start)
				for range each / 8 {
					seq++
					if err := s.addEntry(1, &Entry{Seq: seq, Time: unixMilli(seq), ID: "abcdefghijklmno", Data: benchMessage}); err != nil {
						b.Fatal(err)
					}
				}
				other += time.Since(middle) * 8
			}
			count := float64(b.N * each)
			b.ReportMetric(count/own.Seconds(), "messages/s")
			b.ReportMetric(count/other.Seconds(), "single/s")
			b.ReportMetric(float64(other)/float64(own), "x-single")
			b.ReportMetric(count/float64(l.groups.Load()), "messages/transaction")
		})
	}
}

// BenchmarkOwnDatabase measures how long a message takes to be stored while
// PocketBase writes logs as it does under load, and trims them: in the database of
// its own, and where it would share PocketBase's auxiliary one, whose one writer it
// then waits for (and which is not synced at each commit).
func BenchmarkOwnDatabase(b *testing.B) {
	l := newTestLog(b)
	l.setKeep("topic", Retention{Count: 1 << 40})
	app, err := tests.NewTestApp(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(app.Cleanup)
	if _, err := app.AuxNonconcurrentDB().NewQuery("CREATE TABLE shared (seq INTEGER PRIMARY KEY, id TEXT, data BLOB)").Execute(); err != nil {
		b.Fatal(err)
	}
	stop := make(chan struct{})
	var logging sync.WaitGroup
	logging.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			// see initLogger in core/base.go
			err := app.AuxRunInTransaction(func(tx core.App) error {
				for range 200 {
					log := core.Log{Message: "GET /api/collections/orders/records", Data: types.JSONMap[any]{"status": 200, "userAgent": strings.Repeat("x", 300)}}
					log.Id = core.GenerateDefaultRandomId()
					log.Created = types.NowDateTime()
					if err := tx.AuxSave(&log); err != nil {
						return err
					}
				}
				return nil
			})
			if err == nil && i%50 == 49 {
				_, err = app.AuxNonconcurrentDB().NewQuery("DELETE FROM _logs").Execute()
			}
			if err != nil {
				b.Error(err)
			}
		}
	})
	var own, shared []time.Duration
	count := 0
	for b.Loop() {
		count++
		start := time.Now()
		if _, err := l.add("topic", "", benchMessage); err != nil {
			b.Fatal(err)
		}
		middle := time.Now()
		_, err := app.AuxNonconcurrentDB().NewQuery("INSERT INTO shared VALUES ({:seq}, {:id}, {:data})").
			Bind(dbx.Params{"seq": count, "id": "abcdefghijklmno", "data": benchMessage}).Execute()
		if err != nil {
			b.Fatal(err)
		}
		end := time.Now()
		own = append(own, middle.Sub(start))
		shared = append(shared, end.Sub(middle))
	}
	close(stop)
	logging.Wait()
	slices.Sort(own)
	slices.Sort(shared)
	for _, percent := range []int{50, 95, 99} {
		at := (count - 1) * percent / 100
		b.ReportMetric(float64(own[at].Microseconds()), fmt.Sprintf("µs/own-p%d", percent))
		b.ReportMetric(float64(shared[at].Microseconds()), fmt.Sprintf("µs/shared-p%d", percent))
	}
}
