// The writers: a few goroutines that write to connections with waiting messages. Whoever queues a
// frame feeds them.

package conn

import (
	"runtime"
	"sync"
)

// writers is the list of connections to write to. Its goroutines exist only while there is work, so
// there is nothing to start or stop.
type writers struct {
	max int // of goroutines

	mu      sync.Mutex // guards the fields below; no lock is taken under it
	waiting []*Conn    // first come, first served; each at most once
	head    int        // index into waiting; entries before it are done
	running int
}

// writerShare is the maximum number of connections that a writer takes off the list at a time.
const writerShare = 16

func newWriters() *writers { return &writers{max: runtime.GOMAXPROCS(0)} }

// add hands connections to the writers.
func (w *writers) add(conns ...*Conn) {
	w.mu.Lock()
	if w.head > 1024 && w.head > len(w.waiting)/2 { // it never became empty
		w.waiting = w.waiting[:copy(w.waiting, w.waiting[w.head:])]
		w.head = 0
	}
	w.waiting = append(w.waiting, conns...)
	start := min(w.max-w.running, (len(w.waiting)-w.head+writerShare-1)/writerShare)
	w.running += max(start, 0)
	w.mu.Unlock()
	for range start {
		go w.run()
	}
}

// run writes until the list is empty.
func (w *writers) run() {
	buffer := buffers.Get().(*Buffer)
	defer buffers.Put(buffer)
	var share [writerShare]*Conn
	for {
		count := w.take(share[:])
		if count == 0 {
			return
		}
		for _, c := range share[:count] {
			w.write(c, buffer)
		}
		runtime.Gosched() // the scheduler does not notice these writes
	}
}

// take fills share from the list. If the list is empty, the writer counts as done.
func (w *writers) take(share []*Conn) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	// a writer leaves some for the others, and the last ones are taken one by one
	left := len(w.waiting) - w.head
	count := copy(share[:min(len(share), (left+w.max-1)/w.max)], w.waiting[w.head:])
	clear(w.waiting[w.head : w.head+count])
	w.head += count
	if w.head == len(w.waiting) {
		w.waiting, w.head = w.waiting[:0], 0
		if cap(w.waiting) > 4096 {
			w.waiting = nil
		}
	}
	if count == 0 {
		w.running--
	}
	return count
}

func (w *writers) write(c *Conn, buffer *Buffer) {
	defer c.Guard("writing to a realtime connection")
	if c.flushWith(buffer) {
		w.add(c)
	}
}

// Buffer is what frames are joined in for one write.
type Buffer [maxBatch]byte

var buffers = sync.Pool{New: func() any { return new(Buffer) }}

// Flush writes what waits without blocking. It reports whether more waits; then the connection must
// be handed to [Group.Write].
func (c *Conn) Flush() (more bool) {
	buffer := buffers.Get().(*Buffer)
	defer buffers.Put(buffer)
	return c.flushWith(buffer)
}

func (c *Conn) flushWith(buffer *Buffer) (more bool) {
	return c.writer.Flush(buffer) // a writer whose Wake has been true is never replaced
}
