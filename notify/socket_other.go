//go:build !unix

package notify

import "sync"

// writeCall is the buffer to join frames in.
type writeCall struct{ buffer []byte }

var writeCalls = sync.Pool{New: func() any { return &writeCall{buffer: make([]byte, 0, maxBatch)} }}

// tryWrite takes nothing: here there is no write that does not wait, so all is
// left to a goroutine of the connection's own (writeSlowly).
func (s *socket) tryWrite(*writeCall, []byte) (written int, err error) { return 0, nil }
