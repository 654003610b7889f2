// How long a write has been waiting for the other side.

package notify

import (
	"sync/atomic"
	"time"
)

// stream is the writing side of a request's goroutine.
type stream struct {
	cut   func()
	since atomic.Int64 // when the current write began, as nanoseconds after processStart; 0 if there is none
}

// processStart is the origin of the times of writes: the wall clock may be set in the meantime.
var processStart = time.Now()

// behindFor is how long a write may take before it counts against the client. The writing goroutine
// cannot tell a peer that does not read from a server that is busy.
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

// write calls f and records when it began.
func (s *stream) write(f func() error) error {
	s.since.Store(int64(time.Since(processStart)))
	defer s.since.Store(0)
	return f()
}
