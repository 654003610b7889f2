package history

import "sync"

// Page is a part of a topic's history. Others may have the same one: do not change it.
type Page struct {
	Entries []*Entry
	Epoch   string // empty if the topic has no history
	Head    int64  // the topic's last number
	// Last is the number up to which the page reaches: the number of its last item, or where the
	// page began if it has none.
	Last int64
	// Complete says that the kept messages reach back to where the page should begin.
	Complete bool
	// Encoded is for what readers make of the entries, so that it is made once. It lives as long as the page.
	Encoded sync.Map
}

// Next returns the position at which the next page begins.
func (p *Page) Next() Position { return Position{p.Epoch, p.Last} }

// Read returns the page that begins at from, with at most limit messages and maxBytes of data; only
// the last message may exceed maxBytes. Without a history the page is empty.
func (h *Log) Read(topic string, from Start, limit, maxBytes int) (*Page, error) {
	keep := h.config.Keep(topic)
	if keep.Count == 0 {
		return &Page{Complete: from.Since == nil || *from.Since == Position{}}, nil
	}
	s, err := h.opened()
	if err != nil {
		return nil, err
	}
	read := func() (*Page, error) { return h.readFrom(s, topic, keep, from, limit, maxBytes) }
	var page *Page
	if from.Lasted > 0 || len(h.lapses.pending()) > 0 { // depends on more than what is written
		page, err = read()
	} else {
		r := request{
			store: s, topic: topic, keep: keep, hasSince: from.Since != nil, rewind: from.Rewind, count: from.Count,
			end: from.end, limit: limit, maxBytes: maxBytes,
		}
		if r.hasSince {
			r.since = *from.Since
		}
		page, err = h.shared.get(r, h.config.Now(), read)
	}
	if err != nil {
		return nil, h.reading(s, err)
	}
	return page, nil
}

func (h *Log) readFrom(s *store, topic string, keep Retention, from Start, limit, maxBytes int) (*Page, error) {
	t, err := h.topicNow(s, topic)
	if err != nil {
		return nil, err
	}
	now, since := h.clock.read()
	page := &Page{Epoch: s.epoch, Head: t.head, Complete: true}

	// messages before begins are not kept, though they may not be deleted yet
	begins := max(t.first, t.lost+1, t.head-keep.Count+1)
	if oldest := keep.oldest(now); oldest > 0 {
		t := t
		t.first = begins
		if begins, err = s.notBefore(t, oldest, since); err != nil {
			return nil, err
		}
	}

	after := begins - 1
	end := t.head // of the range that a rewind looks at
	if from.end.Epoch == s.epoch {
		end = min(end, from.end.Seq)
		page.Complete = begins-1 <= end
	}
	switch {
	case from.Rewind && from.Lasted > 0:
		t := t
		t.first = begins
		first, err := s.notBefore(t, now.Add(-from.Lasted).UnixMilli(), since)
		if err != nil {
			return nil, err
		}
		after = min(first-1, max(after, end))
	case from.Rewind:
		after = max(after, end-from.Count)
	case from.Since == nil:
	case from.Since.Epoch != s.epoch || from.Since.Seq > t.head:
		page.Complete = false
	default:
		page.Complete = from.Since.Seq >= after && from.Since.Seq > t.lost
		after = max(after, from.Since.Seq)
	}

	page.Last = after
	if page.Entries, err = s.entries(t, after, limit, maxBytes); err != nil {
		return nil, err
	}
	for _, entry := range page.Entries {
		page.Last = entry.Seq
	}
	if len(page.Entries) > 0 && page.Entries[0].Seq > after+1 {
		page.Complete = false // trimmed while it was read
	}
	page.Head = max(page.Head, page.Last)
	return page, nil
}
