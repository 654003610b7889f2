// Package waits limits how long to wait.
package waits

import "context"

// For calls wait and returns when wait returns or ctx is done. In the latter case wait continues on
// its own.
func For(ctx context.Context, wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
