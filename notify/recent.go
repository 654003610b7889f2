// Recently sent messages, so that a retry is not sent twice. Called by send.go.

package notify

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// maxRecent is how many messages with an id are remembered in all, and maxRecentOfSender how
	// many of one sender other than the server's own code or a superuser. Beyond that, the oldest
	// are forgotten early.
	maxRecent         = 100_000
	maxRecentOfSender = 1000
)

// recent remembers the reports of messages that came with an id, so that a sender that missed the
// answer can repeat the message without sending it twice.
type recent struct {
	window time.Duration

	mu       sync.Mutex // guards the fields below; not held while a message is sent
	byID     map[string]*result
	byTime   []*result            // the finished ones, oldest first
	bySender map[string][]*result // the finished ones that have a sender
}

type result struct {
	id, sender string
	done       chan struct{} // closed when the send is over
	sent       bool          // false if it failed and may be tried again
	report     Report
	expires    time.Time
}

// do calls send, unless a send with id is under way or was done within the window: then it
// returns that one's report. A send that fails is not remembered. sender is empty for those
// who have no limit of their own.
func (r *recent) do(ctx context.Context, sender, id string, send func() (Report, error)) (Report, error) {
	for {
		r.mu.Lock()
		r.forget(time.Now())
		earlier, ok := r.byID[id]
		if !ok {
			mine := &result{id: id, sender: sender, done: make(chan struct{})}
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
	defer func() { // also if send panics; otherwise the waiting callers would wait forever
		r.mu.Lock()
		defer r.mu.Unlock()
		if mine.sent {
			mine.expires = time.Now().Add(r.window)
			r.remember(mine)
		} else {
			delete(r.byID, mine.id)
		}
		close(mine.done)
	}()
	report, err = send()
	mine.report, mine.sent = report, err == nil
	return report, err
}

// remember keeps a result, and forgets older ones if there are too many. r.mu is held.
func (r *recent) remember(mine *result) {
	r.byTime = append(r.byTime, mine)
	for len(r.byID) > maxRecent && len(r.byTime) > 1 {
		r.forgetFirst()
	}
	if mine.sender == "" {
		return
	}
	own := append(r.bySender[mine.sender], mine)
	if len(own) > maxRecentOfSender {
		delete(r.byID, own[0].id)
		own[0] = nil
		own = own[1:]
	}
	r.bySender[mine.sender] = own
	if len(r.byTime) > 2*len(r.byID)+maxRecentOfSender { // many of these are already forgotten
		r.byTime = slices.DeleteFunc(r.byTime, func(other *result) bool { return r.byID[other.id] != other })
	}
}

// forget drops what has expired. r.mu is held.
func (r *recent) forget(now time.Time) {
	for len(r.byTime) > 0 && now.After(r.byTime[0].expires) {
		r.forgetFirst()
	}
}

// forgetFirst drops the oldest result. r.mu is held.
func (r *recent) forgetFirst() {
	first := r.byTime[0]
	r.byTime[0] = nil
	r.byTime = r.byTime[1:]
	if r.byID[first.id] == first {
		delete(r.byID, first.id)
	}
	own := r.bySender[first.sender]
	if len(own) == 0 || own[0] != first {
		return // it is already forgotten
	}
	if own[0] = nil; len(own) == 1 {
		delete(r.bySender, first.sender)
	} else {
		r.bySender[first.sender] = own[1:]
	}
}
