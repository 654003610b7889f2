//go:build unix

package notify

import (
	"errors"
	"sync"
	"syscall"
)

// writeCall is what a writer needs for a system call, kept so that none is
// allocated for each.
type writeCall struct {
	buffer []byte // to join frames in
	call   func(fd uintptr) bool

	out     []byte
	written int
	err     error
}

var writeCalls = sync.Pool{New: func() any {
	w := &writeCall{buffer: make([]byte, 0, maxBatch)}
	w.call = w.write
	return w
}}

// write is called by the runtime with the descriptor, which is non-blocking.
func (w *writeCall) write(fd uintptr) bool {
	for {
		w.written, w.err = syscall.Write(int(fd), w.out)
		if !errors.Is(w.err, syscall.EINTR) {
			return true // done; false would wait until the descriptor is writable
		}
	}
}

// tryWrite writes of out what the socket takes without waiting.
func (s *socket) tryWrite(w *writeCall, out []byte) (written int, err error) {
	if s.raw == nil {
		return 0, nil
	}
	w.out = out
	err = s.raw.Write(w.call)
	w.out = nil
	switch {
	case err != nil: // it is closed
		return 0, err
	case errors.Is(w.err, syscall.EAGAIN):
		return 0, nil
	}
	return max(w.written, 0), w.err
}
