package history

import (
	"hash/maphash"
	"sync"
	"time"
)

// Pages that many ask for at the same time, as after a restart, are read once. A page is shared until
// something is written that it may depend on, and for a moment at most.
const (
	sharedFor = time.Second
	// sharedWithTTL is sharedFor where messages end by themselves.
	sharedWithTTL = 50 * time.Millisecond

	maxShared      = 256 // pages
	maxSharedBytes = 16 << 20
)

// request identifies a page.
type request struct {
	store           *store
	topic           string
	keep            Retention
	hasSince        bool
	since           Position
	rewind          bool
	count           int64
	end             Position
	limit, maxBytes int
}

// sharedPages are the pages that are being read or were a moment ago.
type sharedPages struct {
	seed maphash.Seed

	mu       sync.Mutex // guards the fields below
	written  [256]int64 // how often a topic of each hash was written
	all      int64      // how often any topic may have been written
	pages    map[request]*sharedPage
	bytes    int
	clearing *time.Timer // runs while there are pages
}

// sharedPage is a page, or one that is being read.
type sharedPage struct {
	version version
	began   time.Time
	read    chan struct{} // closed when the fields below are set
	page    *Page
	err     error
}

// version changes when the history of a topic does.
type version struct{ topic, all int64 }

func newSharedPages() sharedPages {
	return sharedPages{seed: maphash.MakeSeed(), pages: map[request]*sharedPage{}}
}

func (p *sharedPages) slot(topic string) *int64 {
	return &p.written[maphash.String(p.seed, topic)%uint64(len(p.written))]
}

// wrote must be called when messages of topics have been stored, before anybody can know of them.
// Without topics it means that anything may have changed.
func (p *sharedPages) wrote(group []*turn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(group) == 0 {
		p.all++
	}
	for _, t := range group {
		*p.slot(t.entry.Topic)++
	}
}

// get returns the page that another reader has read or is reading, or calls read.
func (p *sharedPages) get(r request, now time.Time, read func() (*Page, error)) (*Page, error) {
	longest := sharedFor
	if r.keep.TTL > 0 {
		longest = sharedWithTTL
	}
	p.mu.Lock()
	version := version{*p.slot(r.topic), p.all}
	if known := p.pages[r]; known != nil && known.version == version && !now.Before(known.began) && now.Sub(known.began) < longest {
		p.mu.Unlock()
		<-known.read
		if known.err == nil && known.page != nil {
			return known.page, nil
		}
		return read() // what failed for one may succeed for another
	}
	shared := &sharedPage{version: version, began: now, read: make(chan struct{})}
	if len(p.pages) == maxShared || p.bytes > maxSharedBytes {
		p.clear()
	}
	p.pages[r] = shared
	if p.clearing == nil {
		p.clearing = time.AfterFunc(2*sharedFor, p.clearAll)
	}
	p.mu.Unlock()

	defer close(shared.read)
	shared.page, shared.err = read()
	if shared.err == nil {
		p.mu.Lock()
		for _, entry := range shared.page.Entries {
			p.bytes += len(entry.Data) + len(entry.Audience)
		}
		p.mu.Unlock()
	}
	return shared.page, shared.err
}

func (p *sharedPages) clear() {
	clear(p.pages)
	p.bytes = 0
}

func (p *sharedPages) clearAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	p.clearing = nil
}
