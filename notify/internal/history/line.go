package history

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"slices"
)

const (
	// maxGroup is how many messages are stored in one transaction, and
	// maxGroupBytes how many bytes of data, but for the last one.
	maxGroup      = 512
	maxGroupBytes = 4 << 20
)

// turn is one who waits to write.
type turn struct {
	entry   *Entry
	deliver func()             // called when entry is stored, by whoever leads then
	do      func(*store) error // in the place of entry
	last    bool               // nothing comes after it

	leads chan bool // receives true: lead; false: it is done
	led   bool      // it has been told to lead; guarded by Log.mu
	err   error
}

// exclusive calls do while nobody stores anything.
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
	if first {
		h.lead()
		return t.err
	}

	lead := false
	select {
	case lead = <-t.leads:
	case <-ctx.Done():
		if h.withdraw(t) {
			return ctx.Err()
		}
		lead = <-t.leads
	}
	if lead {
		h.lead()
	}
	return t.err
}

// withdraw takes t out of the line; false where it is no longer in it.
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

// lead serves a group, of which the caller is the first.
func (h *Log) lead() {
	if h.crowded {
		runtime.Gosched() // let those of the last group stand in line again
	}
	group := h.group()
	h.crowded = len(group) > 1
	err := h.serve(group)
	for i, t := range group {
		if t.err = err; err == nil && t.entry != nil {
			h.deliver(t)
		}
		if i > 0 { // the first is the caller
			t.leads <- false
		}
	}
	h.passOn()
}

func (h *Log) deliver(t *turn) {
	defer func() { // or those behind it would wait for good
		if cause := recover(); cause != nil {
			h.config.Logger().Error("Panic while delivering a message", slog.Any("cause", cause), slog.String("stack", string(debug.Stack())))
		}
	}()
	t.deliver()
}

// serve stores what the group wants stored.
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
		return do(s)
	}
	if err = h.append(s, group); err == nil {
		h.stored.Add(int64(len(group)))
		h.groups.Add(1)
	}
	return err
}

// group takes from the line those who are served together.
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

// passOn makes the next in line lead.
func (h *Log) passOn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leading = len(h.waiting) > 0; h.leading {
		next := h.waiting[0]
		next.led = true
		next.leads <- true
	}
}
