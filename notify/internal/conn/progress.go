// How long a write has been waiting for the other side.

package conn

import (
	"sync/atomic"
	"time"
)

// progress is a goroutine's writes, one after another.
type progress struct {
	since atomic.Int64 // when the current write began, as nanoseconds after processStart; 0 if there is none
}

// processStart is the origin of the times of writes: the wall clock may be set in the meantime.
var processStart = time.Now()

// behindFor is how long a write may take before it counts against the client. The writing goroutine
// cannot tell a peer that does not read from a server that is busy.
const behindFor = time.Second

func (p *progress) isWriting() bool { return p.since.Load() != 0 }
func (p *progress) isBehind() bool  { return p.lasts() < behindFor }
func (p *progress) isStuck() bool   { return p.lasts() >= WriteTimeout }

func (p *progress) lasts() time.Duration {
	since := p.since.Load()
	if since == 0 {
		return 0
	}
	return time.Since(processStart) - time.Duration(since)
}

// began records that a write, or the next part of it, begins.
func (p *progress) began() { p.since.Store(int64(time.Since(processStart))) }

// write calls f and records when it began.
func (p *progress) write(f func() error) error {
	p.began()
	defer p.since.Store(0)
	return f()
}
