package notify

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestBuckets: what a client may publish, and that buckets are freed.
func TestBuckets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := buckets{byClient: map[bucketKey]*bucket{}}
		key := func(i int) bucketKey { return bucketKey{"channel", fmt.Sprint(i)} }
		take := func(i int, limit float64) time.Duration { return b.take(key(i), limit, time.Now()) }

		count := func() int {
			synctest.Wait()
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.byClient)
		}

		for i := range 1000 {
			for range 2 {
				if wait := take(i, 2); wait != 0 {
					t.Fatalf("client %d has to wait %s", i, wait)
				}
			}
			if wait := take(i, 2); wait != 500*time.Millisecond {
				t.Fatalf("client %d has to wait %s, want 0.5s", i, wait)
			}
		}
		if got := count(); got != 1000 {
			t.Errorf("%d buckets", got)
		}
		time.Sleep(500 * time.Millisecond)
		if wait := take(1, 2); wait != 0 {
			t.Errorf("has to wait %s more", wait)
		}
		// one that is slow to fill stays as long as it is not full
		if wait := take(1, 0.05); wait == 0 {
			t.Error("the new limit has no effect")
		}
		time.Sleep(freeBucketsEvery)
		if got := count(); got != 1 {
			t.Errorf("%d buckets after a while", got)
		}
		time.Sleep(time.Minute)
		if got := count(); got != 0 || b.timer != nil {
			t.Errorf("%d buckets at the end", got)
		}
		// from anew
		if take(1, 2) != 0 || b.timer == nil {
			t.Error("no timer runs")
		}
		b.stop()
		if take(2, 0) != 0 {
			t.Error("0 is a limit")
		}
	})
}
