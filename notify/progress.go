// How long a write lasts that waits for the other side.

package notify

import (
	"sync/atomic"
	"time"
)

// stream is the writing side of a request's goroutine.
type stream struct {
	cut   func()
	since atomic.Int64 // when the write under way began, after processStart; 0: there is none
}

// processStart is what times of writes count from: the wall clock may be set meanwhile.
var processStart = time.Now()

// behindFor is how long a write may take without being held against the client:
// from its goroutine nobody can tell a peer that does not read from a server
// that has much to do.
const behindFor = time.Second

func (s *stream) isWriting() bool { return s.since.Load() != 0 }
func (s *stream) isBehind() bool  { return s.lasts() < behindFor }
func (s *stream) isStuck() bool   { return s.lasts() >= WriteTimeout }

func (s *stream) lasts() time.Duration {
	since := s.since.Load()
	if since == 0 {
		return 0
	}
	return time.Since(processStart) - time.Duration(since)
}

// write calls f and notes when it began.
func (s *stream) write(f func() error) error {
	s.since.Store(int64(time.Since(processStart)))
	defer s.since.Store(0)
	return f()
}
