package history

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
)

const (
	// maxGroup is the maximum number of messages stored in one transaction. maxGroupBytes is the
	// maximum number of bytes of data; only the last message may exceed it.
	maxGroup      = 512
	maxGroupBytes = 4 << 20
)

// turn is a waiting place in the line to write.
type turn struct {
	entry   *Entry
	deliver func()             // called once entry is stored
	isLong  bool               // deliver takes so long that the leader should not wait for it
	do      func(*store) error // instead of entry
	reads   bool               // do does not write
	last    bool               // no turn comes after it

	leads chan bool // receives true to lead, false when the turn is done
	led   bool      // it has been told to lead; guarded by Log.mu
	err   error

	// of a turn that delivers by itself
	delivered chan struct{} // closed when it has
	before    *turn         // the one of the same topic that has to deliver first, or nil
}

// exclusive calls do while nothing is being stored.
func (h *Log) exclusive(do func(*store) error) error {
	return h.take(context.Background(), &turn{do: do})
}

// take waits in line and returns when t is done.
func (h *Log) take(ctx context.Context, t *turn) error {
	t.leads = make(chan bool, 1)
	h.mu.Lock()
	if h.closed && !t.last {
		h.mu.Unlock()
		return ErrClosed
	}
	h.waiting = append(h.waiting, t)
	first := !h.leading
	h.leading = true
	h.mu.Unlock()
	lead := first
	if !first {
		select {
		case lead = <-t.leads:
		case <-ctx.Done():
			if h.withdraw(t) {
				return ctx.Err()
			}
			lead = <-t.leads
		}
	}
	if lead {
		h.lead()
	}
	h.deliverLate(t)
	return t.err
}

// withdraw removes t from the line. It returns false if t is no longer in it.
func (h *Log) withdraw(t *turn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.Index(h.waiting, t)
	if i < 0 || t.led {
		return false
	}
	h.waiting = slices.Delete(h.waiting, i, i+1)
	return true
}

// lead serves a group whose first turn is the caller's.
func (h *Log) lead() {
	if h.crowded {
		runtime.Gosched() // let the senders of the last group stand in line again
	}
	group := h.group()
	h.crowded = len(group) > 1
	err := h.serve(group)
	for i, t := range group {
		if t.err = err; err == nil && t.entry != nil && !h.leaveDelivery(t) {
			h.deliver(t)
		}
		if i > 0 { // the first is the caller's
			t.leads <- false
		}
	}
	h.passOn()
}

func (h *Log) deliver(t *turn) {
	defer h.config.Guard("delivering a message") // otherwise the turns behind it would wait forever
	t.deliver()
}

// leaveDelivery leaves the delivery of t to its own sender, so that the leader can go on, if it takes long or
// has to wait for another of the same topic. It is called in the order of the numbers.
func (h *Log) leaveDelivery(t *turn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.undelivered[t.entry.Topic]
	if !t.isLong && before == nil {
		return false
	}
	t.before, t.delivered = before, make(chan struct{})
	h.undelivered[t.entry.Topic] = t
	return true
}

// deliverLate delivers what the leader has left to t.
func (h *Log) deliverLate(t *turn) {
	if t.delivered == nil {
		return
	}
	if t.before != nil {
		<-t.before.delivered
		t.before = nil // or all turns of a busy topic would be kept
	}
	h.deliver(t)
	h.mu.Lock()
	if h.undelivered[t.entry.Topic] == t {
		delete(h.undelivered, t.entry.Topic)
	}
	h.mu.Unlock()
	close(t.delivered)
}

// serve executes the turns of group.
func (h *Log) serve(group []*turn) (err error) {
	var s *store
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v\n%s", cause, debug.Stack())
		}
		if err != nil && s != nil {
			err = h.failed(s, err)
		}
	}()
	if group[0].last {
		if s := h.store.Swap(nil); s != nil {
			return s.close()
		}
		return nil
	}
	if s, err = h.open(); err != nil {
		return err
	}
	if do := group[0].do; do != nil {
		if !group[0].reads {
			defer h.shared.wrote(nil)
		}
		return do(s)
	}
	defer h.shared.wrote(group) // before they are delivered
	if err = h.append(s, group); err == nil {
		h.stored.Add(int64(len(group)))
		h.groups.Add(1)
	}
	return err
}

// group takes the turns that are served together off the line.
func (h *Log) group() []*turn {
	h.mu.Lock()
	defer h.mu.Unlock()
	count, size := 0, 0
	for _, t := range h.waiting {
		isOther := t.entry == nil
		if isOther && count > 0 || count == maxGroup || size > maxGroupBytes {
			break
		}
		count++
		if isOther {
			break
		}
		size += len(t.entry.Data)
	}
	group := slices.Clone(h.waiting[:count])
	h.waiting = slices.Delete(h.waiting, 0, count)
	return group
}

// passOn makes the next in line the leader.
func (h *Log) passOn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leading = len(h.waiting) > 0; h.leading {
		next := h.waiting[0]
		next.led = true
		next.leads <- true
	}
}
