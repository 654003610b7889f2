// Which messages were sent lately, so that a retry is not sent twice. Called by
// send.go.

package notify

import (
	"context"
	"sync"
	"time"
)

// recent remembers the reports of messages that came with an id, so that a
// sender who missed the answer can repeat the message without sending it twice.
type recent struct {
	window time.Duration

	mu     sync.Mutex // guards what follows; not held while a message is sent
	byID   map[string]*result
	byTime []*result // the finished ones, oldest first
}

type result struct {
	id      string
	done    chan struct{} // closed when the send is over
	sent    bool          // false: it failed, and may be tried again
	report  Report
	expires time.Time
}

// do calls send, unless a send with id is under way or was done within the
// window: then it returns that one's report. A send that fails is not
// remembered.
func (r *recent) do(ctx context.Context, id string, send func() (Report, error)) (Report, error) {
	for {
		r.mu.Lock()
		r.forget(time.Now())
		earlier, ok := r.byID[id]
		if !ok {
			mine := &result{id: id, done: make(chan struct{})}
			r.byID[id] = mine
			r.mu.Unlock()
			return r.run(mine, send)
		}
		r.mu.Unlock()

		select {
		case <-earlier.done:
		case <-ctx.Done():
			return Report{}, ctx.Err()
		}
		if earlier.sent {
			return earlier.report, nil
		}
	}
}

func (r *recent) run(mine *result, send func() (Report, error)) (report Report, err error) {
	defer func() { // also when send panics, or those who wait would do so for good
		r.mu.Lock()
		defer r.mu.Unlock()
		if mine.sent {
			mine.expires = time.Now().Add(r.window)
			r.byTime = append(r.byTime, mine)
		} else {
			delete(r.byID, mine.id)
		}
		close(mine.done)
	}()
	report, err = send()
	mine.report, mine.sent = report, err == nil
	return report, err
}

// forget drops what has expired. r.mu is held.
func (r *recent) forget(now time.Time) {
	for len(r.byTime) > 0 && now.After(r.byTime[0].expires) {
		delete(r.byID, r.byTime[0].id)
		r.byTime[0] = nil
		r.byTime = r.byTime[1:]
	}
}
