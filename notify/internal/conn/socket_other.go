//go:build !unix

package conn

// retryAfter is how long a write waits: a deadline that passes may leave it unknown how much was written.
const retryAfter = WriteTimeout

// tryWrite writes nothing: here every write may wait, so a goroutine of the connection does all the
// writing (writeSlowly).
func tryWrite(int, []byte) (written int, err error) { return 0, nil }
