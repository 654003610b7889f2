// Package waits has an end for what waits for others.
package waits

import "context"

// For calls wait, and returns when that does or ctx is done: then wait is left behind.
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
