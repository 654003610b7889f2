// Statistics, counted throughout the engine and shown by hooks/stats.go.

package notify

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"
)

// Stats are the numbers of a [Notifier]. Those marked "so far" count since the process started.
type Stats struct {
	Connections   int `json:"connections"`   // open now, other code's included
	Taken         int `json:"taken"`         // open connections that are written to without net/http
	Subscriptions int `json:"subscriptions"` // of connections to topics, now
	Topics        int `json:"topics"`        // with subscribers, now
	Users         int `json:"users"`         // connected, now

	QueuedMessages int `json:"queuedMessages"` // waiting to be written, now
	QueuedBytes    int `json:"queuedBytes"`

	Messages   int64 `json:"messages"`   // sent so far
	Deliveries int64 `json:"deliveries"` // queued for a connection so far
	Dropped    int64 `json:"dropped"`    // deliveries lost so far, to connections that were ended
	Bytes      int64 `json:"bytes"`      // written to connections so far

	Stored        int64 `json:"stored"`        // messages of topics with history, so far
	StoreGroups   int64 `json:"storeGroups"`   // transactions that stored them
	StoreFailures int64 `json:"storeFailures"` // transactions that failed
	StoreDamaged  int64 `json:"storeDamaged"`  // files of the history that were damaged and set aside, so far
	Replayed      int64 `json:"replayed"`      // deliveries from history so far

	Disconnects map[string]int64 `json:"disconnects"` // so far, by reason

	FanOut Histogram `json:"fanOut"` // how long it took to queue a message for all recipients
}

// Histogram counts durations.
type Histogram struct {
	Count   int64           `json:"count"`
	Seconds float64         `json:"seconds"` // the sum of all durations
	Buckets []HistogramStep `json:"buckets"`
}

// HistogramStep counts the durations of at most UpTo.
type HistogramStep struct {
	UpTo  float64 `json:"upTo"` // seconds
	Count int64   `json:"count"`
}

var fanOutSteps = [...]time.Duration{
	10 * time.Microsecond, 50 * time.Microsecond, 100 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 500 * time.Millisecond, time.Second,
}

// stats counts for [Notifier.Stats].
type stats struct {
	messages, deliveries, dropped, replayed atomic.Int64

	fanOut      [len(fanOutSteps) + 1]atomic.Int64 // the last: longer than all steps
	fanOutNanos atomic.Int64

	mu          sync.Mutex
	disconnects map[string]int64
}

func (s *stats) sent(report Report, took time.Duration) {
	s.messages.Add(1)
	s.deliveries.Add(int64(report.Queued))
	s.dropped.Add(int64(report.Dropped))
	step := 0
	for step < len(fanOutSteps) && took > fanOutSteps[step] {
		step++
	}
	s.fanOut[step].Add(1)
	s.fanOutNanos.Add(int64(took))
}

func (s *stats) ended(reason string, undelivered int) {
	s.dropped.Add(int64(undelivered))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disconnects[reason]++
}

// Stats returns the current numbers.
func (n *Notifier) Stats() Stats {
	s := &n.stats
	stored := n.history.Counts()
	result := Stats{
		Connections:   n.app.SubscriptionsBroker().TotalClients(),
		Subscriptions: int(n.index.subscriptions.Load()),
		Topics:        n.index.topics(),
		Messages:      s.messages.Load(),
		Deliveries:    s.deliveries.Load(),
		Dropped:       s.dropped.Load(),
		Bytes:         n.conns.Bytes(),
		Stored:        stored.Stored,
		StoreGroups:   stored.Groups,
		StoreFailures: stored.Failures,
		StoreDamaged:  stored.Damaged,
		Replayed:      s.replayed.Load(),
	}
	n.index.usersMu.RLock()
	result.Users = len(n.index.users)
	n.index.usersMu.RUnlock()

	totals := n.conns.Totals()
	result.Taken, result.QueuedMessages, result.QueuedBytes = totals.Taken, totals.QueuedMessages, totals.QueuedBytes

	s.mu.Lock()
	result.Disconnects = maps.Clone(s.disconnects)
	s.mu.Unlock()

	result.FanOut.Seconds = time.Duration(s.fanOutNanos.Load()).Seconds()
	for i, step := range fanOutSteps {
		result.FanOut.Count += s.fanOut[i].Load()
		result.FanOut.Buckets = append(result.FanOut.Buckets, HistogramStep{step.Seconds(), result.FanOut.Count})
	}
	result.FanOut.Count += s.fanOut[len(fanOutSteps)].Load()
	return result
}
