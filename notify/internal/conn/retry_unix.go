//go:build unix

package conn

import "time"

// retryAfter is how long a write waits for the kernel to report room before it looks itself: see sendbuffer.go.
const retryAfter = time.Second
