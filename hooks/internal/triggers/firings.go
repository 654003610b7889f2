// Firings: sent after the commit, in the order of the commits.

package triggers

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
)

// maxUndecided is how long a firing may be neither committed nor rolled back while later ones are.
// A transaction that panics never reports its end.
const maxUndecided = 10 * time.Second

// firing is a message of a trigger that waits to be sent.
type firing struct {
	trigger *trigger
	action  string
	record  *core.Record
	since   time.Time
	state   firingState // guarded by triggers.mu

	message notify.Message // composed at once for a delete, otherwise when it is sent; no topic: not composed yet
}

type firingState int

const (
	undecided firingState = iota
	committed
	dropped
)

// stand puts the firings of a transaction into the queue; they wait there for its outcome.
func (t *Triggers) stand(tx core.App, firings []*firing) {
	if len(firings) == 0 {
		return
	}
	t.mu.Lock()
	t.queue = append(t.queue, firings...)
	t.mu.Unlock()
	tx.TxInfo().OnComplete(func(txErr error) error {
		t.decide(firings, txErr == nil)
		return nil
	})
}

// decide records the outcome of a transaction.
func (t *Triggers) decide(firings []*firing, isCommitted bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range firings {
		if f.state = dropped; isCommitted {
			f.state = committed
		}
	}
	if !t.sending && !t.closed {
		t.sending = true
		go t.send()
	}
}

// send sends the decided firings in order, until none is left. Those that must be stored go to a
// lane of their own, so that the others need not wait for the disk of the history.
func (t *Triggers) send() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		f := t.next()
		if f == nil {
			t.sending = false
			t.idle.Broadcast()
			return
		}
		t.mu.Unlock()
		isReady := t.prepare(f)
		isStored := isReady && t.notifier.HasHistory(f.message.Topic)
		t.mu.Lock()
		switch {
		case !isReady:
		case isStored || t.storing[f.message.Topic] > 0: // which keeps the order of a topic whose channel changes
			t.toStore = append(t.toStore, f)
			if t.storing[f.message.Topic]++; !t.isStoring {
				t.isStoring = true
				go t.store()
			}
		default:
			t.mu.Unlock()
			t.fire(f)
			t.mu.Lock()
		}
	}
}

// store sends the firings that must be stored, in order, until none is left.
func (t *Triggers) store() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.toStore) > 0 {
		f := t.toStore[0]
		t.toStore[0] = nil
		t.toStore = t.toStore[1:]
		t.mu.Unlock()
		t.fire(f)
		t.mu.Lock()
		if t.storing[f.message.Topic]--; t.storing[f.message.Topic] == 0 {
			delete(t.storing, f.message.Topic)
		}
	}
	t.toStore, t.isStoring = nil, false
	t.idle.Broadcast()
}

// next takes the next committed firing off the queue, or returns nil. mu is held. An undecided
// firing stays first only for a moment: its transaction is over, because a later one has begun.
func (t *Triggers) next() *firing {
	for len(t.queue) > 0 {
		f := t.queue[0]
		if f.state == undecided {
			left := maxUndecided - time.Since(f.since)
			if left > 0 {
				return t.waitFor(left)
			}
			f.state = dropped
		}
		t.queue[0] = nil
		t.queue = t.queue[1:]
		if f.state == committed {
			return f
		}
	}
	t.queue = nil
	return nil
}

// waitFor makes sure that the queue is checked again when its head is overdue.
func (t *Triggers) waitFor(left time.Duration) *firing {
	if slices.ContainsFunc(t.queue, func(f *firing) bool { return f.state == committed }) && !t.closed {
		time.AfterFunc(left, func() { t.decide(nil, true) })
	}
	return nil
}

// prepare composes the message of f, and reports whether anyone could get it.
func (t *Triggers) prepare(f *firing) (isReady bool) {
	defer t.guard(f.trigger)
	if f.message.Topic != "" {
		return t.notifier.IsWanted(f.message.Topic) // perhaps no longer
	}
	t.compose(t.app, f)
	return f.message.Topic != ""
}

// fire sends the message of f.
func (t *Triggers) fire(f *firing) {
	defer t.guard(f.trigger)
	if _, err := t.notifier.Send(context.Background(), f.message); err != nil {
		t.fail(f.trigger, err)
		return
	}
	t.sent.Add(1)
}

// guard logs a panic, which costs one firing of trigger. It must be deferred.
func (t *Triggers) guard(trigger *trigger) {
	if cause := recover(); cause != nil {
		t.app.Logger().Error("Panic in a trigger", slog.String("trigger", trigger.name), slog.Any("cause", cause))
	}
}

// compose composes the message of f, unless nobody could get it. A failure is recorded.
func (t *Triggers) compose(app core.App, f *firing) {
	trigger := f.trigger
	topic, err := trigger.topic.of(app, f.record)
	if err != nil {
		t.fail(trigger, err)
		return
	}
	if topic == "" || !t.notifier.IsWanted(topic) {
		return
	}
	data, err := trigger.payloadOf(app, f.action, f.record)
	if err != nil {
		t.fail(trigger, err)
		return
	}
	to := trigger.to
	if trigger.toField != "" {
		relation := f.record.Collection().Fields.GetByName(trigger.toField).(*core.RelationField)
		to.Users = []string{} // nobody instead of everyone
		for _, id := range f.record.GetStringSlice(trigger.toField) {
			to.Users = append(to.Users, relation.CollectionId+":"+id)
		}
	}
	f.message = notify.Message{Topic: topic, Data: data, To: to}
}

// fail records a failure. A failure never fails the save.
func (t *Triggers) fail(trigger *trigger, err error) {
	t.failed.Add(1)
	t.app.Logger().Error("A trigger failed", slog.String("trigger", trigger.name), slog.String("error", err.Error()))
}

// close waits until all committed firings are sent, or until timeout is over.
func (t *Triggers) close(timeout time.Duration) {
	expired := time.AfterFunc(timeout, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.closed, t.queue, t.toStore = true, nil, nil
		t.idle.Broadcast()
	})
	defer expired.Stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	for (t.sending || t.isStoring) && !t.closed {
		t.idle.Wait()
	}
	t.closed, t.queue = true, nil
}
